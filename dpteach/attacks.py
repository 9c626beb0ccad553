"""Attacks: was this record in the training set? And: what does it look like?

Each membership attack gives one score to a record, higher where the record looks more like a member. How good the
scores are is then a question about two lists of numbers, the members' and the non-members': :func:`report`,
:func:`roc_curve`, :func:`auc` and :func:`true_positive_rate_at`. :func:`most_found` is the curve that no attack on a
private run can cross.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach._checks import number, whole
from dpteach.accounting import epsilon
from dpteach.data import Data


def membership_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """How far each record's own label stands above every other label: its logit minus the best of the others.

    A model that has memorised a record gives its label a large lead, also where that label is wrong.

    Args:
        logits: ``(n, classes)``, at least two classes: the model's outputs before any softmax.
        labels: ``(n,)`` int64 in 0 … classes-1: the label that the record came with.

    Returns:
        ``(n,)`` float64, in the logits' units; above 0 where the model predicts the label. Unlike the loss or the
        probability of the label, it has no ceiling at which records that the model is sure of all become equal.

    Raises:
        ValueError: if a shape or a label is out of range.

    Source: the loss as a membership signal is Yeom et al. 2018; scores on the logits' scale, Carlini et al. 2022.

    >>> membership_scores(torch.tensor([[3.0, 1.0, -2.0], [3.0, 1.0, -2.0]]), torch.tensor([0, 2]))
    tensor([ 2., -5.], dtype=torch.float64)
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must have shape (n, classes) with 2 classes or more, got {tuple(logits.shape)}")
    _check_labels("labels", labels, len(logits), logits.shape[1])
    logits = logits.double()
    given = labels.unsqueeze(1)
    others = logits.scatter(1, given, -torch.inf)
    return logits.gather(1, given).squeeze(1) - others.amax(dim=1)


@torch.no_grad()
def margin_scores(model: nn.Module, data: Data) -> Tensor:
    """The :func:`membership_scores` of a model for every record of ``data``.

    Args:
        model: maps ``(B, ...)`` records to ``(B, classes)`` logits. It is run in evaluation mode, and left as it was.
        data: records with the labels to score; members and non-members must come with labels of the same kind.

    Returns:
        ``(n,)`` float64, on the CPU.

    Raises:
        ValueError: if a label is out of the model's range.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        logits = torch.cat([model(X.to(device)).cpu() for X in data.X.split(1000)])
    finally:
        model.train(was_training)
    return membership_scores(logits, data.y.cpu())


def lira_scores(target: Tensor, references: Tensor, included: Tensor) -> Tensor:
    """How much better the target's score fits those of models that saw the record than those of models that didn't.

    Two Gaussians a record, with its own two means; as there are few reference models, one spread for all records.

    Args:
        target: ``(n,)``: the attacked model's score for each record, from :func:`margin_scores`, say.
        references: ``(R, n)``: the same of R models that the attacker trained, each on its own choice of the records.
        included: ``(R, n)`` bool: which records each of them was trained on.

    Returns:
        ``(n,)`` float64: the log-likelihood ratio.

    Raises:
        ValueError: if a shape is wrong, a score is not finite, or a record is in all of the references or in none.

    Source: Carlini et al. 2022, *Membership inference attacks from first principles* (LiRA, online).
    """
    target, references, included = _references(target, references, included)

    def log_density(rows: Tensor) -> Tensor:
        mean = (references * rows).sum(0) / rows.sum(0)
        spread = (((references - mean) ** 2 * rows).sum() / rows.sum()).sqrt()
        return -(((target - mean) / spread) ** 2) / 2 - spread.log()

    return log_density(included) - log_density(~included)


def rmia_scores(target: Tensor, references: Tensor, included: Tensor) -> Tensor:
    """How much more probable the target finds each record than models do on average, with the record and without.

    Args, errors and shapes as for :func:`lira_scores`; the scores must be logit margins.

    Returns:
        ``(n,)`` float64: the logarithm of Pr(x|θ) / Pr(x). RMIA's own score is the share of other records whose ratio
        is smaller: for one target that is the same order, and the same ROC.

    Source: Zarifzadeh et al. 2024, *Low-cost high-power membership inference attacks*.
    """
    target, references, included = _references(target, references, included)
    probability = references.sigmoid()
    sides = [(probability * rows).sum(0) / rows.sum(0) for rows in (included, ~included)]
    return F.logsigmoid(target) - torch.stack(sides).mean(0).log()


def report(scores: Tensor, members: Tensor) -> dict[str, float]:
    """An attack in the four numbers that belong into a report, the area under the curve last.

    Args:
        scores: higher for "more likely a member"; any shape.
        members: bool of the same shape: who was in.

    Returns:
        ``"found at 0.1 %"`` and ``"found at 1 %"``: the share of members found at this share of false positives;
        ``"accuracy"``: of the best threshold, in hindsight, if members and others are equally many; ``"auc"``.

    Raises:
        ValueError: if there is no member or no non-member, or the scores are not finite, or all the same: no attack.
    """
    scores, members = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(members)
    inside = int(members.sum())
    if members.shape != scores.shape or members.dtype != torch.bool or not 0 < inside < members.numel():
        raise ValueError(
            f"members must be bool, one for each score, with members and non-members among them, got {inside} of "
            f"{members.numel()}, shape {tuple(members.shape)} of {members.dtype}"
        )
    finite = scores.isfinite()
    if not finite.all() or scores.min() == scores.max():
        why = (
            f"{int((~finite).sum())} that are infinite or NaN"
            if not finite.all()
            else f"{scores.max().item():g} for all"
        )
        raise ValueError(f"scores must be finite and not all the same, got {why}: take logit margins in float64")
    both = scores[members], scores[~members]
    false_positives, found = roc_curve(*both)
    at = {f"found at {percent:g} %": true_positive_rate_at(*both, percent / 100) for percent in (0.1, 1)}
    return {**at, "accuracy": float((1 + found - false_positives).max() / 2), "auc": auc(*both)}


_DELTAS = np.append(np.geomspace(1e-7, 0.01, 12), np.linspace(0.02, 0.9, 23)).tolist()  # at which ε is asked


def most_found(false_positive_rate: Any, *, noise_multiplier: float, sample_rate: float, steps: int) -> Tensor:
    """The largest share of members that any attack on a private run can find: the run's trade-off curve.

    Args:
        false_positive_rate: numbers in [0, 1].
        noise_multiplier, sample_rate, steps: as for :func:`dpteach.accounting.epsilon`.

    Returns:
        float64, one for each rate. A bound, from the pairs (ε, δ) that the run meets: found ≤ e^ε·false + δ, and
        1 - false ≤ e^ε·(1 - found) + δ.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Kairouz et al. 2015, Theorem 2.1.
    """
    false = torch.as_tensor(false_positive_rate, dtype=torch.float64)
    if not ((false >= 0) & (false <= 1)).all():
        raise ValueError(f"false_positive_rate must be in [0, 1], got {false.min().item():g} … {false.max().item():g}")
    best = torch.ones_like(false)
    for delta, ratio in _pairs(noise_multiplier, sample_rate, steps):
        best = best.minimum(ratio * false + delta).minimum(1 - (1 - false - delta) / ratio)
    return best


@functools.lru_cache(maxsize=32)
def _pairs(noise_multiplier: float, sample_rate: float, steps: int) -> list[tuple[float, float]]:
    """(δ, e^ε) of a run, at many δ."""
    if noise_multiplier == 0:
        return []
    run: dict[str, Any] = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate, "steps": steps}
    return [(delta, math.exp(min(700, epsilon(**run, target_delta=delta)))) for delta in _DELTAS]


def imprint_model(public: Data, units: int = 512) -> nn.Sequential:
    """The model of a curious server: its gradient holds the images.

    Each hidden unit measures an image's mean brightness and is on where that is above its threshold; the thresholds
    part the public images into equal groups. So two neighbouring units differ by the images between their thresholds.

    Args:
        public: images that the server has, ``(n, ...)`` float32.
        units: >= 2, of the hidden layer.

    Returns:
        Flatten, Linear, ReLU, Linear to 10 classes.

    Source: Fowl et al. 2022, *Robbing the Fed*; Boenisch et al. 2023, *When the curious abandon honesty*.
    """
    pixels, units = public.X[0].numel(), whole("units", units, low=2)
    measure, count = nn.Linear(pixels, units), nn.Linear(units, 10)
    with torch.no_grad():
        measure.weight.fill_(1 / pixels)
        measure.bias.copy_(-public.X.flatten(1).mean(1).quantile(torch.linspace(0, 1, units + 1)[:-1]))
        count.weight.copy_(torch.linspace(-0.5, 0.5, 10).unsqueeze(1))  # every unit counts the same
        count.bias.zero_()
    return nn.Sequential(nn.Flatten(), measure, nn.ReLU(), count)


def reconstruct(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """The inputs that a linear layer's gradient holds, one between each unit and the next.

    A record adds a multiple of itself to a unit's row and the same multiple of 1 to the unit's bias; between two units
    of :func:`imprint_model` the difference is that of one record, or of none, or a mixture of several.

    Args:
        weight_gradient: ``(units, inputs)``, summed over any number of records, clipped or not.
        bias_gradient: ``(units,)``.

    Returns:
        ``(units - 1, inputs)``; a row of zeros where two units have the same bias gradient.
    """
    rows, shares = weight_gradient.diff(dim=0), bias_gradient.diff().unsqueeze(1)
    return torch.where(shares == 0, 0.0, rows / shares)


def roc_curve(member_scores: Tensor, non_member_scores: Tensor) -> tuple[Tensor, Tensor]:
    """What each threshold on the score would give: the share of non-members and of members at or above it.

    Records of one score cross a threshold together. Taking them one by one, members first, would invent an attack.

    Args:
        member_scores: ``(m,)``, higher for "more likely a member".
        non_member_scores: ``(k,)``.

    Returns:
        ``(false_positive_rate, true_positive_rate)``: float64, one point per distinct score after the first one,
        from (0, 0) to (1, 1), both never falling.

    Raises:
        ValueError: if a list of scores is empty, not one-dimensional, or holds a NaN.

    Source: Fawcett 2006, *An introduction to ROC analysis*, on equally scored instances.

    >>> false_positive_rate, true_positive_rate = roc_curve(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]))
    >>> false_positive_rate.tolist(), true_positive_rate.tolist()
    ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    members = _scores("member_scores", member_scores)
    non_members = _scores("non_member_scores", non_member_scores)
    thresholds = torch.cat([members, non_members]).unique().flip(0)

    def rate(scores: Tensor) -> Tensor:
        below = torch.searchsorted(scores.sort().values, thresholds)
        return torch.cat([torch.zeros(1, dtype=torch.float64), 1 - below.double() / len(scores)])

    return rate(non_members), rate(members)


def true_positive_rate_at(member_scores: Tensor, non_member_scores: Tensor, false_positive_rate: float) -> float:
    """The largest share of members that a threshold finds while few enough non-members are above it.

    An :func:`auc` is an average over all thresholds; this is the end of the curve where a "yes" can be trusted.

    Args:
        member_scores, non_member_scores: as for :func:`roc_curve`, and with its errors.
        false_positive_rate: the share of non-members allowed at or above the threshold, in [0, 1].

    Returns:
        In [0, 1]. Guessing gives about ``false_positive_rate``.

    Raises:
        ValueError: if ``false_positive_rate`` is out of its range.

    Source: Carlini et al. 2022, *Membership inference attacks from first principles*.

    >>> true_positive_rate_at(torch.tensor([4.0, 1.0]), torch.tensor([3.0, 2.0, 1.0, 0.0]), false_positive_rate=0.25)
    0.5
    """
    allowed = number("false_positive_rate", false_positive_rate, low=0, high=1, below=False)
    false_positives, found = roc_curve(member_scores, non_member_scores)
    return found[false_positives <= allowed + 1e-9].max().item()  # 1 of 100 is 0.01 only up to rounding


def auc(member_scores: Tensor, non_member_scores: Tensor) -> float:
    """The area under :func:`roc_curve`: how often a random member's score is above a random non-member's.

    Args and errors as for :func:`roc_curve`.

    Returns:
        0.5 for guessing, 1.0 where every member is above every non-member, 0.0 the other way round. A tie counts half.

    Source: Hanley & McNeil 1982: the area is the Mann-Whitney statistic.

    >>> auc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]))
    0.875
    """
    false_positive_rate, true_positive_rate = roc_curve(member_scores, non_member_scores)
    return torch.trapezoid(true_positive_rate, false_positive_rate).item()


def mislabel(data: Data, share: float, classes: int, seed: int = 0) -> tuple[Data, Tensor]:
    """Give a random part of the records a wrong label: the ones that a model can only memorise.

    Args:
        data: records with labels in 0 … classes-1; not changed.
        share: between 0 and 1; of n records, ``round(share * n)`` get another label.
        classes: number of classes, >= 2. The wrong label is any of the others, each as likely.
        seed: the same seed changes the same records in the same way.

    Returns:
        ``(data, changed)``: the records with their new labels, and ``(n,)`` bool, True where the label is wrong.

    Raises:
        ValueError: if an argument is out of its range.

    >>> _, changed = mislabel(Data(torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64)), share=0.2, classes=3)
    >>> int(changed.sum())
    2
    """
    share = number("share", share, low=0, high=1, below=False)
    classes = whole("classes", classes, low=2)
    _check_labels("data.y", data.y, len(data), classes)
    generator = torch.Generator().manual_seed(whole("seed", seed, low=0))
    changed = torch.zeros(len(data), dtype=torch.bool)
    changed[torch.randperm(len(data), generator=generator)[: round(share * len(data))]] = True
    shift = torch.randint(1, classes, (len(data),), generator=generator)
    y = torch.where(changed.to(data.y.device), (data.y + shift.to(data.y.device)) % classes, data.y)
    return Data(data.X, y), changed


def _check_labels(name: str, labels: Tensor, n: int, classes: int) -> None:
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise ValueError(f"{name} must be {n} whole numbers (int64), got shape {tuple(labels.shape)} of {labels.dtype}")
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{name} must lie in 0 … {classes - 1}, got {int(labels.min())} … {int(labels.max())}")


def _references(target: Any, references: Any, included: Any) -> tuple[Tensor, Tensor, Tensor]:
    target, references = (torch.as_tensor(scores, dtype=torch.float64) for scores in (target, references))
    included = torch.as_tensor(included)
    shape = (len(references), target.numel())
    for name, scores, expected in (("target", target, shape[1:]), ("references", references, shape)):
        if scores.shape != expected or not scores.isfinite().all():
            raise ValueError(f"{name} must be finite scores of shape {expected}, got shape {tuple(scores.shape)}")
    if included.shape != shape or included.dtype != torch.bool:
        raise ValueError(f"included must be bool of shape {shape}, got {included.dtype} of {tuple(included.shape)}")
    few = int((torch.minimum(included.sum(0), (~included).sum(0)) < 2).sum())
    if few:
        raise ValueError(
            f"included must have each record in at least 2 references and out of 2, got {few} records that have not: "
            "train more of them, each on a random half"
        )
    return target, references, included


def _scores(name: str, given: Any) -> Tensor:
    scores: Tensor = torch.as_tensor(given, dtype=torch.float64).cpu()
    if scores.dim() != 1 or len(scores) == 0 or scores.isnan().any():
        found = "a NaN" if scores.isnan().any() else f"shape {tuple(scores.shape)}"
        raise ValueError(f"{name} must be a list of scores, at least one and none of them NaN, got {found}")
    return scores
