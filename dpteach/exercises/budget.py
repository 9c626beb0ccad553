"""Notebook 04: price a run, spend a budget, catch an accountant that is not a bound, add up people."""

import functools
import math
import random
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

from dpteach.accounting import epsilon
from dpteach.exercises.core import Exercise, Verdict, Wrong, as_numbers, changed, choose, coding, open_ended

# 4.1: what does a run cost?


def price(n, batch_size, epochs, noise_multiplier, target_delta):
    steps_per_epoch = math.ceil(n / batch_size)
    return epsilon(
        noise_multiplier=noise_multiplier,
        sample_rate=1 / steps_per_epoch,
        steps=epochs * steps_per_epoch,
        target_delta=target_delta,
        accountant="rdp",
    )


def priced(rounding=math.ceil, **arguments):
    """An answer that is right, but for its rounding or arguments of ``epsilon``: values, or functions of the run."""

    def answer(n, batch_size, epochs, noise_multiplier, target_delta):
        batches = rounding(n / batch_size)
        run = SimpleNamespace(n=n, batch_size=batch_size, epochs=epochs, batches=batches)
        right = {"noise_multiplier": noise_multiplier, "sample_rate": 1 / batches, "steps": epochs * batches}
        wrong = {name: value(run) if callable(value) else value for name, value in arguments.items()}
        return epsilon(**{**right, "target_delta": target_delta, "accountant": "rdp", **wrong})

    return answer


def seeded(seed, count, draw):
    """``count`` calls' arguments, the same ones each time: nothing that was written for one of them passes them all."""
    numbers = random.Random(seed)
    return [draw(numbers) for _ in range(count)]


@functools.cache
def load_prv():
    epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=1)


def calls(*rows):
    """The inputs of an exercise whose arguments are numbers."""

    def call(row):
        load_prv()  # the first use takes a second or two: not out of the learner's
        return row

    return [functools.partial(call, row) for row in rows]


def _run(draw):
    numbers = draw.randint(500, 9000), draw.randint(50, 400), draw.randint(2, 9), draw.uniform(0.7, 3)
    return *numbers, 10 ** draw.uniform(-7, -4.5)


_RUNS = [  # n / batch_size has a fraction above ½, above ½, below ½, none, hardly one; then one batch holds all
    (2000, 256, 5, 1.0, 1e-6),
    (20_000, 300, 3, 2.0, 1e-7),
    (1300, 600, 4, 3.0, 1e-5),
    (1200, 300, 2, 1.5, 1e-4),
    (1201, 300, 6, 0.8, 1e-5),
    (500, 500, 7, 5.0, 1e-6),
    *seeded(41, 3, _run),
]


exercise_4_1 = coding(
    "4.1",
    hint="An epoch is ⌈n / batch_size⌉ steps (`math.ceil`). Opacus' loader, and `train`, use one over that number as "
    "the sampling rate. `epsilon(...)` wants the steps of the whole run.",
    reference=price,
    inputs=calls(*_RUNS),
    wrong=[
        Wrong(
            priced(target_delta=lambda run: 1 / run.batches),
            "you used δ = 1 / (number of batches). δ is about records, not batches: at such a δ, even a mechanism that "
            "publishes a whole record now and then would pass. Use target_delta.",
        ),
        Wrong(
            changed(price, target_delta=lambda run: 1 / run.n),
            "you used δ = 1/n. A mechanism that publishes one random record outright has exactly that δ, and ε = 0. "
            "Use target_delta, which has to be well below 1/n.",
        ),
        Wrong(
            changed(price, target_delta=1e-5),
            "your ε does not change with target_delta. Without it, `epsilon` takes δ = 1e-5, and the number that you "
            "report belongs to another δ.",
        ),
        Wrong(
            priced(steps=lambda run: run.epochs),
            "you counted one step for each epoch. The noise is added once a *step*, and an epoch has ⌈n / batch_size⌉ "
            "of them: your ε is far too small.",
        ),
        Wrong(
            priced(sample_rate=lambda run: run.batch_size / run.n, steps=lambda run: run.epochs * run.n),
            "you counted one step for each *record* of an epoch. A step takes a whole batch: an epoch has ⌈n / "
            "batch_size⌉ steps.",
        ),
        Wrong(
            priced(sample_rate=1.0),
            "you charged every step as if it used all the records (sample_rate = 1). A record is in a batch only with "
            "probability q, and this chance to be left out makes the step much cheaper.",
        ),
        Wrong(
            priced(sample_rate=lambda run: 1 / run.n),
            "your sample_rate is 1/n: the rate of a batch of one record. q is the probability that a record is in the "
            "batch: one over the number of steps in an epoch.",
        ),
        Wrong(
            lambda n, batch_size, epochs, *rest: epochs * price(n, batch_size, 1, *rest),
            "you multiplied the ε of one epoch by the number of epochs. That bounds the run very loosely, and at a "
            "larger δ. The accountant composes all the steps together: give it the steps of the whole run.",
        ),
        Wrong(
            lambda n, batch_size, epochs, *rest: (
                epochs * math.ceil(n / batch_size) * priced(steps=1)(n, batch_size, epochs, *rest)
            ),
            "you multiplied the ε of one step by the number of steps. That bounds the run so loosely that it is "
            "useless: give the accountant the number of steps instead.",
        ),
        Wrong(
            priced(math.floor),
            "you rounded the steps of an epoch down (n // batch_size). The loader rounds up: the last, smaller batch "
            "is a step too, and it costs.",
        ),
        Wrong(
            priced(sample_rate=lambda run: run.batch_size / run.n),
            "almost: your q is batch_size / n. `train` and Opacus sample with q = 1 / ⌈n / batch_size⌉, which differs "
            "where batch_size does not divide n. Charge the rate that the loader really uses.",
        ),
        Wrong(
            changed(price, noise_multiplier=lambda run: run.noise_multiplier / run.batch_size),
            "you divided σ by the batch size. The noise multiplier belongs to the *sum* of the clipped gradients; "
            "dividing the noisy sum afterwards costs no privacy and saves none.",
        ),
        Wrong(
            priced(round),
            "you rounded the steps of an epoch to the nearest whole number. Where the last batch is less than half "
            "full, its step is missing. The loader rounds up: ⌈n / batch_size⌉.",
        ),
        Wrong(
            priced(lambda batches: math.floor(batches) + 1),
            "n // batch_size + 1 is one step too many where batch_size divides n. Round up: ⌈n / batch_size⌉.",
        ),
        Wrong(
            priced(steps=lambda run: math.ceil(run.epochs * run.n / run.batch_size)),
            "you rounded once for the whole run. *Every* epoch ends with a smaller batch, so each has ⌈n / batch_size⌉ "
            "steps: round up first, then multiply by the epochs.",
        ),
        Wrong(
            priced(
                sample_rate=lambda run: run.batch_size / run.n, steps=lambda run: run.epochs * run.n // run.batch_size
            ),
            "q = batch_size / n and epochs · n / batch_size steps: many scripts have it so, but no loader runs it. It "
            "rounds up to ⌈n / batch_size⌉ steps an epoch, and samples with one over that number.",
        ),
        Wrong(
            priced(math.floor, sample_rate=lambda run: run.batch_size / run.n),
            "two roundings: n // batch_size leaves out the last, smaller batch of each epoch, and batch_size / n is "
            "not the rate of the loader. Both come from ⌈n / batch_size⌉.",
        ),
        Wrong(
            priced(sample_rate=lambda run: 1 / run.batch_size),
            "your sample_rate is 1 / batch_size. A large batch would then be a small rate, but the larger the batch, "
            "the more often a record is in it: one over the number of *batches*.",
        ),
        Wrong(
            priced(sample_rate=lambda run: 1 / (run.epochs * run.batches)),
            "your sample_rate is one over the steps of the whole run. A record is expected once an *epoch*, not once a "
            "run: one over the number of steps in an epoch.",
        ),
        Wrong(
            changed(price, epochs=1),
            "this is the price of one epoch. All of them read the same records: multiply the steps by epochs.",
        ),
        Wrong(
            changed(price, noise_multiplier=lambda run: 1 / run.noise_multiplier),
            "you passed 1/σ. `noise_multiplier` is σ itself: more noise, smaller ε.",
        ),
        Wrong(
            changed(price, noise_multiplier=lambda run: run.noise_multiplier**2),
            "you passed σ². `noise_multiplier` is the standard deviation over C, not the variance.",
        ),
        Wrong(
            priced(accountant="prv"),
            'right count, other accountant: these are PRV\'s values. Pass accountant="rdp" here, so that everyone '
            "gets the same number at once.",
        ),
        Wrong(
            priced(accountant="gdp"),
            'right count, but these are GDP\'s values: no bound, and often far too small. Pass accountant="rdp".',
        ),
        Wrong(
            priced(accountant="rdp-classic"),
            'right count, but with the conversion of 2017, which says more than the run costs. Pass accountant="rdp".',
        ),
    ],
    praise="steps of the whole run, the loader's sampling rate, and the δ that was asked for: nothing else sets the "
    "price.",
)

# 4.2: how many epochs does a budget pay for?


# A formatter pulls the condition of this solution, which learners read, into pieces.
# fmt: off
def epochs_within(budget, n, batch_size, noise_multiplier, target_delta):
    steps_per_epoch = math.ceil(n / batch_size)
    epochs = 0
    while epsilon(
        noise_multiplier=noise_multiplier,
        sample_rate=1 / steps_per_epoch,
        steps=(epochs + 1) * steps_per_epoch,  # would one more epoch still be within the budget?
        target_delta=target_delta,
        accountant="rdp",
    ) <= budget:
        epochs += 1
    return epochs
# fmt: on


def paid_by(price):
    """An answer that is right, but for its price of a run."""
    return lambda budget, n, batch_size, *rest: next(
        epochs for epochs in count() if price(n, batch_size, epochs + 1, *rest) > budget
    )


_BY_PRV = paid_by(priced(accountant="prv"))


def _ends_at(last):
    return lambda *args: min(last, epochs_within(*args))


def _to_the_last_digit(fn, args):
    """Without a budget: those that whole epochs spend exactly. An ε rounded otherwise may miss some, not all."""
    budget, n, batch_size, *rest = args
    if budget is not None:
        return fn(*args)
    return max(fn(price(n, batch_size, epochs, *rest), n, batch_size, *rest) - epochs for epochs in range(1, 9))


def _budget(draw):
    numbers = draw.uniform(1, 2), draw.randint(1000, 3000), draw.randint(200, 500), draw.uniform(3, 6)
    return *numbers, 10 ** draw.uniform(-7, -4.5)


_SMALL_BUDGETS = [  # a search by PRV, the default, must reach its end here within the time limit, to be told apart
    (1.5, 2000, 250, 2.5, 1e-6),
    (1.0, 20_000, 1000, 2.5, 1e-7),
    (0.3, 2000, 250, 2.5, 1e-5),
    (0.9, 1100, 512, 6.0, 1e-6),
    (1.2, 1000, 350, 5.0, 1e-6),
]
_LARGE_BUDGETS = [
    (2.2, 1100, 512, 6.0, 1e-6),
    (3.0, 2000, 300, 4.0, 1e-6),
    (4.0, 1290, 430, 12.0, 1e-5),
    *seeded(42, 2, _budget),
    (None, 2000, 300, 2.5, 1e-6),
]


def _in_two_parts(first: Exercise, rows, wrong) -> Exercise:
    """``first``; then, for an answer that is right there, the same on ``rows``: too much for a search by PRV."""
    wrong = (*first.wrong, *wrong)
    then = coding(
        first.id,
        hint=first.hint,
        reference=first.reference,
        inputs=calls(*rows),
        praise="",
        observe=_to_the_last_digit,
        wrong=[other for other in wrong if other.answer is not _BY_PRV],
    )

    def examine(fn: Any) -> Verdict:
        verdict = first.examine(fn)
        if not verdict.passed:
            return verdict
        more = then.examine(fn)
        return verdict if more.passed else more

    return replace(first, examine=examine, wrong=wrong)


exercise_4_2 = _in_two_parts(
    coding(
        "4.2",
        hint='Begin with zero epochs. Ask what one more epoch would bring the *whole* run to, by "rdp"; take it if '
        "that is at most the budget. `epsilon` answers at once.",
        reference=epochs_within,
        inputs=calls(*_SMALL_BUDGETS),
        wrong=[
            Wrong(
                lambda budget, n, batch_size, *rest: int(budget / price(n, batch_size, 1, *rest)),
                "you divided the budget by the price of one epoch. The first epoch is the dearest, ε grows more slowly "
                "than the number of epochs: you leave most of the budget unspent.",
            ),
            Wrong(
                lambda budget, n, batch_size, *rest: int((budget / price(n, batch_size, 1, *rest)) ** 2),
                "you took ε to grow with the square root of the epochs. That is a good rule of thumb for one "
                "accountant in its middle range, not a guarantee: ask the accountant.",
            ),
            Wrong(
                lambda *args: epochs_within(*args) + 1,
                "one too many: this epoch brings the run *over* the budget. Stop before it. A budget that is passed "
                "can't be paid back.",
            ),
            Wrong(
                lambda *args: max(1, epochs_within(*args)),
                "where the budget does not pay for a single epoch, the answer is 0. You train at least one epoch "
                "anyway, and so exceed the budget.",
            ),
            Wrong(
                paid_by(priced(sample_rate=1.0)),
                "you charged every step as if it used all the records (sample_rate = 1), so almost nothing is "
                "affordable. Sampling makes a step much cheaper: q = 1 / ⌈n / batch_size⌉.",
            ),
            Wrong(
                paid_by(priced(steps=lambda run: run.epochs)),
                "this is the number of *steps* that the budget pays for: you charged one step for each epoch. An epoch "
                "has ⌈n / batch_size⌉ steps, and each of them costs.",
            ),
            Wrong(
                changed(epochs_within, target_delta=1e-5),
                "your answer does not change with target_delta. Without it, `epsilon` takes δ = 1e-5: at a smaller δ "
                "the same steps cost more ε.",
            ),
            Wrong(
                _BY_PRV,
                "right search, other accountant: PRV's ε is smaller, so it pays for more epochs. Pass "
                'accountant="rdp" here: it answers at once, and everyone gets the same number.',
            ),
            Wrong(
                lambda *args: epochs_within(*args) - 1,
                "one too few: the run with one more epoch is still within the budget.",
            ),
            Wrong(
                paid_by(priced(sample_rate=lambda run: run.batch_size / run.n)),
                "your q is batch_size / n. `train` and Opacus sample with q = 1 / ⌈n / batch_size⌉: charge the rate "
                "that the loader really uses.",
            ),
            Wrong(
                paid_by(priced(math.floor)),
                "you rounded the steps of an epoch down. The loader rounds up: the last, smaller batch is a step too.",
            ),
            Wrong(
                paid_by(priced(round)),
                "you rounded the steps of an epoch to the nearest whole number. Where the last batch is less than half "
                "full, its step is missing: round up.",
            ),
            Wrong(
                changed(epochs_within, target_delta=lambda run: 1 / run.n),
                "you used δ = 1/n. A mechanism that publishes one random record outright has exactly that δ. Use "
                "target_delta.",
            ),
            Wrong(
                paid_by(priced(accountant="gdp")),
                "right search, but by GDP: it is no bound, and pays for epochs that you can't afford. Pass "
                'accountant="rdp".',
            ),
            Wrong(
                paid_by(priced(accountant="rdp-classic")),
                "right search, but with the conversion of 2017, which says more than the run costs: you leave a part "
                'of the budget unspent. Pass accountant="rdp".',
            ),
        ],
        praise="the last epoch that still fits. Decide it before training: stopping because the loss looks good is a "
        "look at private data.",
    ),
    _LARGE_BUDGETS,
    [
        Wrong(
            changed(epochs_within, budget=lambda run: math.nextafter(run.budget, 0)),
            "a run that costs *exactly* the budget is still within it: ε <= budget, not ε < budget.",
        ),
        *(
            Wrong(
                _ends_at(last),
                f"your search ends at {last} epochs, however large the budget. "
                "Search until one more would be too much.",
            )
            for last in (9, 10, 19, 20, 49, 50, 99, 100, 199, 200)
        ),
    ],
)

# 4.3: an ε that is not a bound

_AT_LEAST, _AT_MOST = 0.5, 20.0


def _misled(answer: Any) -> str:
    """Whether GDP misleads about the run that was given, and if not, why not."""
    numbers = as_numbers(answer, 3)
    if numbers is None:
        return "not three"
    sigma, q, steps = numbers
    if not (0.4 <= sigma <= 10 and 0 < q <= 1 and 1 <= steps <= 10_000 and steps == int(steps)):
        return "out of range"
    run = {"noise_multiplier": sigma, "sample_rate": q, "steps": int(steps)}
    gdp = epsilon(**run, accountant="gdp")
    # RDP first: it bounds PRV from above, and spares the slow call where ε is far too large.
    if epsilon(**run, accountant="rdp") > 1.5 * _AT_MOST:
        return "too dear"
    prv = epsilon(**run, accountant="prv")
    if prv > _AT_MOST:
        return "too dear"
    if prv < _AT_LEAST:
        return "too cheap"
    if gdp < prv / 2:
        return "right"
    if gdp > 1.02 * prv:
        return "too high"
    return "too gentle" if gdp > 0.97 * prv else "too close"


exercise_4_3 = open_ended(
    "4.3",
    hint="GDP replaces the privacy loss of the whole run by a bell curve. That is wrong where few steps matter, each "
    "with little noise: try a noise multiplier of 1 or below, and a sampling rate of 0.01 or below. `compare(0.7, "
    "0.01, 500)` is a place to start.",
    reference=(0.5, 0.001, 1000),
    describe=_misled,
    wrong={
        "too gentle": Wrong(
            (5.0, 0.02, 10_000),
            "many steps, each with much noise: here the central limit theorem holds, and GDP is right. Ask for fewer "
            "steps, or for less noise with a small sampling rate.",
        ),
        "too close": Wrong(
            (1.0, 1 / 79, 790),
            "GDP says less than PRV here, but more than half of it. Go on in this direction: a lower noise multiplier, "
            "a smaller sampling rate, fewer steps.",
        ),
        "too high": Wrong(
            (1.0, 1.0, 5),
            "here GDP says more than PRV: it errs in both directions. At a sampling rate of 1, or near it, it says too "
            "much; look at small sampling rates.",
        ),
        "too cheap": Wrong(
            (1.0, 0.004, 1),
            f"PRV's ε is below {_AT_LEAST:g} here. Both numbers are so small that nobody would be misled, and PRV "
            "itself is only good to 0.01. Spend more: less noise or more steps.",
        ),
        "too dear": Wrong(
            (0.5, 0.3, 1000),
            f"ε is above {_AT_MOST:g} here: no accountant makes this run look private, and PRV gets slow. Use more "
            "noise or fewer steps.",
        ),
        "out of range": Wrong(
            (0.1, 0.001, 1000),
            "in this order: the noise multiplier must lie between 0.4 and 10, the sampling rate in (0, 1], and the "
            "steps in 1 ... 10000.",
        ),
        "not three": Wrong(0.5, "the answer must be three numbers: (noise_multiplier, sample_rate, steps)."),
    },
    praise="GDP reports less than half of what the run costs. A step that rarely samples you, but with little noise "
    "when it does, has a privacy loss with a long tail, and GDP replaces it by a bell curve. Never publish GDP's "
    "number as a guarantee.",
    solution="For example `answer_4_3 = (0.5, 0.001, 1000)`. A record is expected in one single batch of the thousand, "
    "but there the noise is only half the clipping norm.",
)

# 4.4: two data sets

exercise_4_4 = choose(
    "4.4",
    hint="ε is a promise to one person. In how many of the two data sets is that person's record?",
    answer="b",
    wrong=[
        Wrong(
            "a",
            "you added the two. Budgets add up where the *same* records are used twice. Here nobody is in both data "
            "sets: each person's record was used in one run only, and the other run can say nothing about it.",
        ),
        Wrong(
            "c",
            "you averaged. An average promises alice's patients something that no run has given them: each of them is "
            "protected by alice's ε, and by nothing else. (Some tools average metrics by default.)",
        ),
        Wrong(
            "d",
            "averaging the two models reads no record again. Whatever is computed from private outputs alone costs "
            "nothing: this is called post-processing.",
        ),
    ],
    praise="alice's run protects alice's patients with ε = 3, bob's run protects bob's. Disjoint records: the ε of a "
    "person is that of the one run that this person is in (parallel composition). Were somebody in both, it would be "
    "up to 6.",
    solution="**b**. Nobody is in both data sets, so each person pays for one run only: ε = 3. With different budgets, "
    'the ε for "a person, whoever it is" is the larger of the two.',
)

EXERCISES = [exercise_4_1, exercise_4_2, exercise_4_3, exercise_4_4]
