"""Attacks on a trained model: was this record in its training set?

Every attack here gives one score to a record, higher where the record looks more like a member. How good the scores are
is then a question about two lists of numbers, the members' and the non-members': :func:`roc_curve`, :func:`auc` and
:func:`true_positive_rate_at`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dpteach._checks import number, whole
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


def _scores(name: str, given: Any) -> Tensor:
    scores: Tensor = torch.as_tensor(given, dtype=torch.float64).cpu()
    if scores.dim() != 1 or len(scores) == 0 or scores.isnan().any():
        found = "a NaN" if scores.isnan().any() else f"shape {tuple(scores.shape)}"
        raise ValueError(f"{name} must be a list of scores, at least one and none of them NaN, got {found}")
    return scores
