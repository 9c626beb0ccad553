"""Notebook 08: images out of a gradient, a membership score from reference models, and what an ROC allows to say."""

import torch
from torch.distributions import Normal

from dpteach.exercises import audit
from dpteach.exercises.core import Wrong, choose, coding

# 8.1: the reconstruction


def reconstruct(weight_gradient, bias_gradient):
    """weight_gradient: (units, inputs); bias_gradient: (units,). Returns (units - 1, inputs)."""
    rows = weight_gradient.diff(dim=0)  # each unit less the one before: the records between their thresholds
    shares = bias_gradient.diff().unsqueeze(1)  # the same multiple of 1 that the row has of the record
    return torch.where(shares == 0, 0.0, rows / shares)


def _gradients(seed: int, units: int, records: int) -> tuple:
    """Of records between random thresholds, as an imprint layer sums them; where no record lies, nothing."""
    generator = torch.Generator().manual_seed(seed)
    X, share = torch.randn(records, 5, generator=generator), torch.rand(records, generator=generator) - 1.2
    on = torch.arange(units).unsqueeze(1) <= torch.randint(0, units, (records,), generator=generator)
    on = on * share  # (units, records): a record is on from the first unit up to its own threshold
    return on @ X, on.sum(1)


exercise_8_1 = coding(
    "8.1",
    hint="`diff(dim=0)` gives each row less the row before it. Do it with both gradients; the bias needs one more "
    "dimension before you divide, `unsqueeze(1)`. Where no record lies between two units, both differences are 0: "
    "`torch.where(condition, a, b)` takes a where the condition holds.",
    reference=reconstruct,
    inputs=[
        lambda: (torch.tensor([[3.0, 1.0], [2.0, 2.0], [0.0, 0.0]]), torch.tensor([3.0, 2.0, 0.0])),
        lambda: _gradients(1, 6, 4),
        lambda: _gradients(2, 9, 3),
        lambda: (torch.ones(3, 4), torch.ones(3)),  # no record between any two
    ],
    wrong=[
        Wrong(
            lambda w, b: (w / b.unsqueeze(1))[1:],
            "you divided row by bias, unit by unit. That works for a single record. Here a unit is on for *every* "
            "image above its threshold, so your rows are averages of many images. Take the difference of "
            "neighbouring units first, of the rows and of the biases.",
        ),
        Wrong(
            lambda w, b: (w / b.unsqueeze(1))[:-1],
            "you divided row by bias, unit by unit, all but the last one. That works for a single record. Here a unit "
            "is on for *every* image above its threshold, so your rows are averages of many images. Take the "
            "difference of neighbouring units first, of the rows and of the biases.",
        ),
        Wrong(
            lambda w, b: (w / b.unsqueeze(1)).diff(dim=0),
            "you divided first and then took differences. The quotients are averages of images, and a difference of "
            "two averages is no image. Differences first, of rows and of biases; then divide.",
        ),
        Wrong(
            lambda w, b: w.diff(dim=0),
            "these are the right differences, but each is its image times a factor that you don't know. The bias knows "
            "it: the difference of the biases is the same factor, times 1. Divide by it.",
        ),
        Wrong(
            lambda w, b: w.diff(dim=0) / b[1:].unsqueeze(1),
            "you divided the difference of two rows by one unit's bias. That bias counts all images above its "
            "threshold. Divide by the difference of the two biases.",
        ),
        Wrong(
            lambda w, b: w.diff(dim=0) / b[:-1].unsqueeze(1),
            "you divided the difference of two rows by the first unit's bias. That bias counts all images above its "
            "threshold. Divide by the difference of the two biases.",
        ),
        Wrong(
            lambda w, b: w.diff(dim=0) / b.diff().unsqueeze(1),
            "right, but for units with no image between them: 0 divided by 0 is NaN. Return a row of zeros there.",
        ),
        Wrong(
            lambda w, b: -reconstruct(w, b),
            "your images are negatives: one of the two differences goes the other way round. Both must be upper minus "
            "lower, or both lower minus upper; then the sign cancels.",
        ),
        Wrong(
            lambda w, b: reconstruct(w, b).clamp(0, 1),
            "you cut the values to between 0 and 1. For clean pixels that changes nothing, but these inputs are no "
            "pixels. Return the quotient as it is.",
        ),
    ],
    praise="the difference of two units holds the records between their thresholds, and the bias undoes any factor: "
    "averaging, clipping, the learning rate.",
)

# 8.2: the attack's score


def relative_scores(target, references, included):
    """target: (n,); references: (R, n); included: (R, n) bool. Returns (n,), in float64."""

    def log_density(rows):
        mean = (references * rows).sum(0) / rows.sum(0)  # (n,): of the models of this side
        variance = ((references - mean) ** 2 * rows).sum() / rows.sum()  # one for all records
        return torch.distributions.Normal(mean, variance.sqrt()).log_prob(target)

    return log_density(included) - log_density(~included)


def _sides(score):
    """An answer ``score(target, (mean, variance) with the record, (mean, variance) without it)``."""

    def answer(target, references, included):
        def side(rows):
            mean = (references * rows).sum(0) / rows.sum(0)
            return mean, ((references - mean) ** 2 * rows).sum() / rows.sum()

        return score(target, side(included), side(~included))

    return answer


def _each(target, references, included):
    def log_density(rows):
        mean = (references * rows).sum(0) / rows.sum(0)
        return Normal(mean, (((references - mean) ** 2 * rows).sum(0) / rows.sum(0)).sqrt()).log_prob(target)

    return log_density(included) - log_density(~included)


def _log(target, mean, variance):
    return Normal(mean, variance.sqrt()).log_prob(target)


def _models(seed: int, references: int, records: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    included = (torch.arange(references).unsqueeze(1) + torch.arange(records)) % 2 == 0
    included = included[torch.randperm(references, generator=generator)]
    base, width = 4 * torch.randn(records, **draw), 0.5 + 2 * torch.rand(records, **draw)
    scores = base + 2.0 * included + width * torch.randn(references, records, **draw) * (1 + included)
    return base + torch.randn(records, **draw), scores, included


exercise_8_2 = coding(
    "8.2",
    hint="`(references * rows).sum(0) / rows.sum(0)` is each record's mean over the models that `rows` marks. The "
    "variance is the mean of all squared distances from those means, over all records at once. "
    "`torch.distributions.Normal(mean, variance.sqrt()).log_prob(target)` is the log-density; you need it twice: for "
    "`included` and for `~included`.",
    reference=relative_scores,
    dtype=(torch.float64, "In float32, scores of records that the models are sure of tie."),
    inputs=[lambda: _models(1, 8, 5), lambda: _models(2, 16, 30), lambda: _models(3, 24, 4)],
    wrong=[
        Wrong(
            lambda target, references, included: target,
            "this is the plain score. A record that is easy for every model gets a high one, member or not. Compare it "
            "with what the reference models say about the *same* record.",
        ),
        Wrong(
            lambda target, references, included: target - references.mean(0),
            "you subtracted the mean over all reference models. That is better than the plain score, but the "
            "question is which of two sides the target fits: the models that saw the record, or those that did not.",
        ),
        Wrong(
            _sides(lambda target, with_, without: target - without[0]),
            "you compare with the models that did *not* see the record only. That is an attack too (offline LiRA), but "
            "here you also have models that did. Subtract the two log-densities.",
        ),
        Wrong(
            _sides(lambda target, with_, without: (target - without[0]) / without[1].sqrt()),
            "you count standard deviations from the models that did *not* see the record only. That is an attack too "
            "(offline LiRA), but here you also have models that did. Subtract the two log-densities.",
        ),
        Wrong(
            _sides(lambda target, with_, without: _log(target, *with_)),
            "this is the log-density among the models that saw the record. It is high also where both sides look "
            "alike. Subtract the log-density among those that did not.",
        ),
        Wrong(
            _sides(lambda target, with_, without: _log(target, *without) - _log(target, *with_)),
            "your score is turned round: it is high for records that look like *non*-members. Side with the record "
            "minus side without it.",
        ),
        Wrong(
            _sides(lambda target, with_, without: (_log(target, *with_) - _log(target, *without)).exp()),
            "you return the likelihood ratio itself. The order is right, but in floating-point numbers it ends at 0 "
            "and at infinity, and there records tie. Stay with the logarithm.",
        ),
        Wrong(
            _each,
            "your score has a variance of its own for each record. That is the paper's form for hundreds of models. A "
            "dozen on each side give a poor variance, and a poor one ruins the left end of the ROC. Take one variance "
            "for all records on each side.",
        ),
        Wrong(
            _sides(
                lambda target, with_, without: (
                    Normal(with_[0], with_[1]).log_prob(target) - Normal(without[0], without[1]).log_prob(target)
                )
            ),
            "`Normal` wants the standard deviation, and you gave it the variance. Take the square root.",
        ),
        Wrong(
            _sides(lambda target, with_, without: with_[0] - without[0]),
            "you return how far apart the two sides are: how much a record *can* be remembered. The attacked model's "
            "own score is not in it.",
        ),
    ],
    praise="a log-likelihood ratio for each record: hard and easy records are judged by what models usually say about "
    'them, so that a "yes" can be trusted at the left end of the ROC.',
)

# 8.3: reading an ROC

exercise_8_3 = choose(
    "8.3",
    hint="No false positive in 1,000 tries: how large can the true rate be, so that this still happens once in twenty "
    "times? Solve (1 − p)^1000 = 0.05.",
    answer="c",
    wrong=[
        Wrong(
            "a",
            "an AUC is an average over all thresholds. 970 members that look like everybody else hide 30 that are "
            "found. Those 30 have no use for the average.",
        ),
        Wrong(
            "b",
            "0 of 1,000 is what was seen; the rate behind it can be larger than 0. At 0.3 %, a thousand non-members "
            "pass without a single false positive once in twenty times.",
        ),
        Wrong(
            "d",
            "an accuracy counts all records alike, and at this threshold nearly all of it is chance. What harms a "
            "person is an attacker who can be sure about *them*.",
        ),
        Wrong(
            "e",
            "an attack gives a *lower* bound on what leaks: a better one may find more. Only a proof, an ε, says "
            "what no attack can do.",
        ),
    ],
    praise="members found and false positives, the second with its confidence: (1 − 0.003)^1000 is 0.05. And it is "
    "said of this attack alone.",
    solution="**c.** Above the threshold are 3 % of the members and none of 1,000 non-members. A false positive rate "
    "of 0.3 % would still give none once in twenty times: $(1 - 0.003)^{1000} \\approx 0.05$. So 0 % may not be said. "
    "The AUC and the accuracy average over everybody; and another attack may find more.",
)

EXERCISES = [exercise_8_1, exercise_8_2, exercise_8_3, *audit.EXERCISES]
