"""Notebook 09: a better cell at the same ε, the record that decides when a run stops, and the leaks in a pipeline."""

import functools
from dataclasses import replace

import torch

from dpteach import models
from dpteach.accounting import epsilon
from dpteach.data import two_moons
from dpteach.exercises.core import Complaint, Wrong, coding, open_ended
from dpteach.settings import Settings
from dpteach.stack import train_many

# 9.1: a better cell on the same contour

START = Settings(noise_multiplier=2.0, max_grad_norm=0.1, epochs=20, batch_size=125, lr=1.0)
_BETTER = 0.92  # mean accuracy over three seeds


def _cost(s: Settings, n: int = 1000) -> float:
    steps = s.epochs * s.steps_per_epoch(n)
    return epsilon(noise_multiplier=s.noise_multiplier, sample_rate=s.sample_rate(n), steps=steps, accountant="rdp")


@functools.cache
def _reached(s: Settings) -> float:
    """Mean test accuracy over the seeds 0, 1 and 2."""
    runs = train_many(
        lambda s: models.mlp(seed=s.seed),
        two_moons(1000),
        [replace(s, seed=seed) for seed in range(3)],
        test_data=two_moons(2000, seed=1),
    )
    *_, last = runs
    return float(last.accuracies.mean())


def _moved(answer):
    if not isinstance(answer, Settings):
        raise Complaint(f"the answer must be a Settings, as `replace(start, lr=...)` makes one, got {answer!r:.40}.")
    if answer.epochs * answer.steps_per_epoch(1000) > 4000:
        raise Complaint("this run has more than 4,000 steps: the check would take long. Take fewer epochs.")
    answer = replace(answer, target_delta=START.target_delta, seed=0)
    fields = {"eps": _cost(answer), "limit": _cost(START)}
    if fields["eps"] > 1.001 * fields["limit"]:
        return "dearer", fields
    fields |= {"mine": 100 * _reached(answer), "start": 100 * _reached(START)}
    if fields["mine"] >= 100 * _BETTER:
        return "right", fields
    length = answer.lr * answer.max_grad_norm
    return "short" if length < 1 else "long" if length > 10 else "near", fields


exercise_9_1 = open_ended(
    "9.1",
    hint="σ, the epochs and the batch size set ε. So leave them, or change them together. C and the learning rate are "
    "free: what counts is their product, the length of a step, while most gradients are longer than C.",
    reference=replace(START, max_grad_norm=3.0),
    describe=_moved,
    wrong={
        "dearer": Wrong(
            replace(START, noise_multiplier=1.0),
            "this is another contour: ε is {eps:.1f}, and the start has {limit:.1f}. You bought accuracy. Keep σ, the "
            "epochs and the batch size, and move along C or the learning rate.",
        ),
        "short": Wrong(
            START,
            "ε is right ({eps:.1f}), and {mine:.0f} % is not enough yet. lr·C is below 1: the steps are too short to "
            "arrive in this many. Lengthen them.",
        ),
        "long": Wrong(
            replace(START, max_grad_norm=300.0),
            "ε is right ({eps:.1f}), and {mine:.0f} % is not enough. lr·C is above 10: now the noise, σ·C on the sum, "
            "throws the weights about. Go back a little.",
        ),
        "near": Wrong(
            replace(START, max_grad_norm=1.0),
            "ε is right ({eps:.1f}), and {mine:.0f} % is near, but not enough. Look at the surface: where on this "
            "contour is the best cell?",
        ),
    },
    praise="the same ε ({eps:.1f} for one run), and {mine:.0f} % right instead of {start:.0f}. Nothing was paid for "
    "it, but for the trying: a contour tells where a step is free.",
    solution="```python\nanswer_9_1 = replace(start, max_grad_norm=3.0)\n```\n\nOr `replace(start, lr=30.0)`: "
    "the same lr·C.",
)

# 9.2: which held-back record decides


def decides(right):
    """right: (epochs, records), 1 where the weights of an epoch are right. Returns (records,), bool."""
    counts = right.sum(1)
    without = (counts.unsqueeze(1) - right).argmax(0)  # the epoch that is published when a record is not there
    return without != counts.argmax()


def _held_back(seed: int, epochs: int, records: int, often: float) -> tuple:
    return ((torch.rand(epochs, records, generator=torch.Generator().manual_seed(seed)) < often).int(),)


def _last(counts):
    return len(counts) - 1 - counts.flip(0).argmax(0)


exercise_9_2 = coding(
    "9.2",
    hint="`right.sum(1)` counts each epoch's right records, and `argmax` picks the first of the best epochs. Take one "
    "record's column off the counts, and pick again. `(counts.unsqueeze(1) - right).argmax(0)` does it for all records "
    "at once.",
    reference=decides,
    inputs=[
        lambda: (torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0]]),),
        lambda: (torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]]),),  # two epochs are best, and the first is published
        lambda: _held_back(1, 30, 100, 0.9),
        lambda: _held_back(2, 12, 40, 0.7),
    ],
    wrong=[
        Wrong(
            lambda right: right[right.sum(1).argmax()].bool(),
            "these are the records on which the published weights are right. That alone decides nothing: take such a "
            "record away, and the best epoch may still be the best.",
        ),
        Wrong(
            lambda right: (right.sum(1).unsqueeze(1) - right).amax(0) != right.sum(1).max(),
            "you ask whether the best *count* changes. It changes for nearly every record. What is published is the "
            "weights of an epoch, so ask whether the *epoch* changes.",
        ),
        Wrong(
            lambda right: (
                (right.sum(1).unsqueeze(1) + torch.ones_like(right) - 2 * right).argmax(0) != right.sum(1).argmax()
            ),
            "you turned each record's answers round: right to wrong and wrong to right. You are asked for the run in "
            "which the record is not there: subtract its column from the counts.",
        ),
        Wrong(
            lambda right: (right.sum(1).unsqueeze(1) + right).argmax(0) != right.sum(1).argmax(),
            "you put a second copy of each record in. The neighbour here is the run without it: subtract its column.",
        ),
        Wrong(
            lambda right: _last(right.sum(1).unsqueeze(1) - right) != _last(right.sum(1)),
            "of equally good epochs you publish the last one. The first is published, as `argmax` picks it.",
        ),
        Wrong(
            lambda right: (right.sum(1).unsqueeze(1) - right).argmax(0) == right.sum(1).argmax(),
            "turned round: these are the records without which the *same* epoch is published.",
        ),
        Wrong(
            lambda right: (
                torch.ones(right.shape[1], dtype=torch.bool) & bool(right.sum(1).topk(2).values.diff().abs() < 2)
            ),
            "you ask how far the best epoch is ahead of the second, and say the same of every record. A narrow lead "
            "makes it possible that somebody decides; only a record on which the two epochs differ does.",
        ),
    ],
    praise="each True is a person. Whoever has seen the weights of all epochs, and knows the other records, reads off "
    "the published epoch whether that person was among them: for certain, whatever the ε of the training.",
)

# 9.3: find the leaks

LEAKS = "bdf"


def _found(answer):
    if not isinstance(answer, (str, list, tuple, set)):
        raise Complaint('the answer must be letters, "ag" say.')
    letters = {x for x in "".join(map(str, answer)).lower() if x.isalpha()}
    if not letters or letters - set("abcdefg"):
        raise Complaint('the answer must be letters from a to g, "ag" say.')
    for line in "bdf":
        if line not in letters:
            return f"missed {line}"
    for line in "aceg":
        if line in letters:
            return f"accused {line}"
    return "right"


exercise_9_3 = open_ended(
    "9.3",
    hint="Ask of each line: would its result change if one record were not there? And if so: does noise that was "
    "counted stand between the records and what leaves?",
    reference=LEAKS,
    describe=_found,
    wrong={
        "missed b": Wrong(
            "df",
            "one leak is early. A mean over all private records goes into every feature, and later into whatever "
            "serves the model. No noise was added to it.",
        ),
        "missed d": Wrong(
            "bf",
            "which 100 columns are kept depends on the private labels. The list of columns leaves with the model: one "
            "record can put a column on it, and no noise hides that.",
        ),
        "missed f": Wrong(
            "bd",
            "look at the choice among the runs. Each run has paid for itself alone; the best of 50, chosen on private "
            "records, costs more than one run, and ε says nothing of it.",
        ),
        "accused a": Wrong("abdf", "line a is fine: the pixels' range is known before anyone looks at a record."),
        "accused c": Wrong("bcdf", "line c is fine: each record is scaled by its own length, not by that of others."),
        "accused e": Wrong("bdef", "line e is fine: 50 private runs, each with its ε. What counts is what leaves."),
        "accused g": Wrong("bdfg", "line g is fine: an average of noisy weights is made of what is private already."),
    },
    praise="the mean (b), the columns (d) and the choice (f) touch private records without noise. ε = 3 is that of one "
    "run on features that somebody else had made.",
    solution="**b, d, f.** The mean is private: noise it, and count it. Columns chosen by private labels: choose them "
    "without, or by a private selection. The best of 50: stop at random and pay for it (section 4), or fix the "
    "settings before. Lines a and c treat each record alone, e has its ε, and g is post-processing.",
)

EXERCISES = [exercise_9_1, exercise_9_2, exercise_9_3]
