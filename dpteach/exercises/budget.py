"""Notebooks 04 and 04b: measure δ, spend a budget, write an accountant, and tell which ε can't be true."""

import functools
import inspect
import math
import random
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dpteach.accounting import epsilon
from dpteach.exercises.core import (
    Complaint,
    Exercise,
    Verdict,
    Wrong,
    as_numbers,
    attempted,
    changed,
    coding,
    open_ended,
)


def price(n, batch_size, epochs, noise_multiplier, target_delta):
    """ε of a whole run by RDP."""
    steps_per_epoch = math.ceil(n / batch_size)
    return epsilon(
        noise_multiplier=noise_multiplier,
        sample_rate=1 / steps_per_epoch,
        steps=epochs * steps_per_epoch,
        target_delta=target_delta,
        accountant="rdp",
    )


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


# 4.1: δ of runs that were drawn


def share_above(losses, eps):
    return torch.clamp(1 - torch.exp(eps - losses), min=0).mean().item()


def _losses(seed, mean, spread, size=400):
    return lambda: (mean + spread * torch.randn(size, generator=torch.Generator().manual_seed(seed)).double(), mean)


def _above(weight):
    """An answer that gives each loss above ε another weight."""
    return lambda losses, eps: torch.where(losses > eps, weight(losses - eps), 0.0).mean().item()


exercise_4_1 = coding(
    "4.1",
    hint="First one number for each run: 0 where its loss is at most ε, otherwise 1 - exp(ε - loss). `torch.clamp(x, "
    "min=0)` makes negative numbers 0. Then the mean over *all* runs.",
    reference=share_above,
    inputs=[
        _losses(1, 0.5, 1.0),
        _losses(2, 2.0, 1.5),
        lambda: (torch.tensor([-900.0, -2.0, 0.0, 0.3, 4.0, 900.0], dtype=torch.float64), 0.2),
        lambda: (torch.tensor([0.1, 0.2], dtype=torch.float64), 1.0),
    ],
    wrong=[
        Wrong(
            _above(torch.ones_like),
            "this is how often the loss exceeds ε. δ is less: the world without you, times e^ε, covers a part of these "
            "runs. A run with loss L counts 1 - exp(ε - L), not 1.",
        ),
        Wrong(
            lambda losses, eps: (1 - torch.exp(eps - losses)).mean().item(),
            "your runs *below* ε count as well, as negative numbers. They are covered: 0 for each of them.",
        ),
        Wrong(
            lambda losses, eps: (
                (1 - torch.exp(eps - losses))[losses > eps].mean().item() if (losses > eps).any() else 0.0
            ),
            "you took the mean over the runs above ε alone. δ is a share of *all* runs: divide by their number.",
        ),
        Wrong(
            lambda losses, eps: torch.clamp(1 - torch.exp(eps - losses), min=0).sum().item(),
            "this is a sum. δ is a share: the mean over all runs.",
        ),
        Wrong(
            lambda losses, eps: torch.clamp(1 - torch.exp(losses - eps), min=0).mean().item(),
            "your exponent has the other sign: this counts the runs below ε. It is exp(ε - loss).",
        ),
        Wrong(
            _above(lambda over: over),
            "you counted how far each loss exceeds ε. A run with loss L counts 1 - exp(ε - L), which is never above 1.",
        ),
        Wrong(
            lambda losses, eps: torch.clamp(1 - torch.exp(-losses), min=0).mean().item(),
            "your answer does not change with ε. A run with loss L counts 1 - exp(ε - L).",
        ),
    ],
    praise="not how often the loss exceeds ε, but what e^ε times the world without you leaves uncovered.",
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


def priced(rounding=math.ceil, **arguments):
    """An answer that is right, but for its rounding or arguments of ``epsilon``: values, or functions of the run."""

    def answer(n, batch_size, epochs, noise_multiplier, target_delta):
        batches = rounding(n / batch_size)
        run = SimpleNamespace(n=n, batch_size=batch_size, epochs=epochs, batches=batches)
        right = {"noise_multiplier": noise_multiplier, "sample_rate": 1 / batches, "steps": epochs * batches}
        wrong = {name: value(run) if callable(value) else value for name, value in arguments.items()}
        return epsilon(**{**right, "target_delta": target_delta, "accountant": "rdp", **wrong})

    return answer


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

# 4.3 to 4.5: an accountant


def step_rdp(sigma, q, alpha):
    logs = [
        math.log(math.comb(alpha, k)) + (alpha - k) * math.log(1 - q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
        for k in range(alpha + 1)
    ]
    return np.logaddexp.reduce(logs) / (alpha - 1)


def summed(choose=math.comb, exponent=lambda k, sigma: k * (k - 1) / (2 * sigma**2), first=0, missing=0, end=None):
    """An answer to 4.3 that differs in a part of its sum."""

    def answer(sigma, q, alpha):
        terms = [
            math.log(choose(alpha, k)) + (alpha - k) * math.log(1 - q) + k * math.log(q) + exponent(k, sigma)
            for k in range(first, alpha + 1 - missing)
        ]
        whole = float(np.logaddexp.reduce(terms))
        return end(whole, alpha) if end else whole / (alpha - 1)

    return answer


def _by_exp(sigma, q, alpha):
    """The sum without logarithms, as NumPy computes it: infinite where a float ends."""
    with np.errstate(over="ignore"):
        terms = [
            math.comb(alpha, k) * (1 - q) ** (alpha - k) * q**k * float(np.exp(k * (k - 1) / (2 * sigma**2)))
            for k in range(alpha + 1)
        ]
    return math.log(sum(terms)) / (alpha - 1)


_STEPS = [(1.0, 1 / 79, 2), (1.2, 0.05, 16), (2.0, 0.3, 32), (0.7, 0.1, 63), (4.0, 0.5, 7)]

exercise_4_3 = coding(
    "4.3",
    hint="The terms become too large for `math.exp`, so add up logarithms: of each factor, `math.log`, and of the "
    "whole sum, `np.logaddexp.reduce(list_of_logs)`. How many terms are there?",
    reference=step_rdp,
    inputs=calls(*_STEPS),
    rtol=1e-7,
    wrong=[
        Wrong(
            summed(end=lambda whole, alpha: whole),
            "this is the logarithm of the sum. The divergence is that, divided by α - 1.",
        ),
        Wrong(summed(end=lambda whole, alpha: whole / alpha), "you divided by α. It is α - 1."),
        Wrong(
            summed(end=lambda whole, alpha: math.exp(min(whole, 700)) / (alpha - 1)),
            "the logarithm is missing: you divided the sum itself by α - 1.",
        ),
        Wrong(
            summed(exponent=lambda k, sigma: k * k / (2 * sigma**2)),
            "your exponent is k² / 2σ². It is k(k - 1) / 2σ²: one k fewer, as the mean is taken without you.",
        ),
        Wrong(
            summed(exponent=lambda k, sigma: k * (k + 1) / (2 * sigma**2)),
            "your exponent is k(k + 1) / 2σ². It is k(k - 1) / 2σ²: with k = 1 it is 0.",
        ),
        Wrong(
            summed(exponent=lambda k, sigma: k * (k - 1) / sigma**2),
            "the 2 in the exponent is missing: k(k - 1) / 2σ².",
        ),
        Wrong(
            summed(exponent=lambda k, sigma: k * (k - 1) / 2 * sigma**2),
            "your exponent *grows* with σ: `/ 2 * sigma**2` divides by 2 and then multiplies. Write `/ (2 * "
            "sigma**2)`.",
        ),
        Wrong(
            summed(exponent=lambda k, sigma: k * (k - 1) / (2 * sigma)),
            "your exponent has σ where it should have σ²: the square of the noise's standard deviation.",
        ),
        Wrong(
            summed(choose=lambda n, k: 1),
            "the binomial coefficients are missing. `math.comb(alpha, k)` ways lead to k times in and α - k times out.",
        ),
        Wrong(
            summed(missing=1),
            "your sum ends at k = α - 1. The last term, k = α, is often the largest: `range(alpha + 1)`.",
        ),
        Wrong(summed(first=1), "your sum begins at k = 1. The term k = 0, never in the batch, belongs to it."),
        Wrong(
            lambda sigma, q, alpha: step_rdp(sigma, 1 - q, alpha),
            "q and 1 - q have changed places: k counts the times in the batch, so q has the exponent k.",
        ),
        Wrong(
            lambda sigma, q, alpha: alpha / (2 * sigma**2),
            "this is the price of a step on *all* records, α / 2σ². With q < 1 a step costs less: the sum says how "
            "much.",
        ),
        Wrong(
            lambda sigma, q, alpha: q * alpha / (2 * sigma**2),
            "you took the price of a full step times q. Sampling does not scale a price like that: small orders become "
            "much cheaper than q times, large ones hardly.",
        ),
        Wrong(
            lambda sigma, q, alpha: q**2 * alpha / (2 * sigma**2),
            "q²·α / 2σ² is a rule of thumb, and only for small q, small α and much noise. It can say too little. Take "
            "the whole sum.",
        ),
        Wrong(
            lambda sigma, q, alpha: q**2 * alpha / sigma**2,
            "q²·α / σ² is a rule of thumb, and only for small q, small α and much noise. Take the whole sum.",
        ),
        Wrong(
            _by_exp,
            "right as long as it fits into a float: for a large α and little noise your sum is infinite. Add "
            "logarithms instead: `np.logaddexp.reduce(logs)`.",
        ),
    ],
    praise="one order of one step, as Opacus computes it. At q = 1 only the last term is left, and the price is α / "
    "2σ².",
)


def epsilon_of_order(alpha, rdp_of_a_step, steps, delta):
    return steps * rdp_of_a_step + math.log(1 - 1 / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1)


_ORDERS = [(2, 0.1, 10, 1e-5), (16, 0.002, 790, 1e-6), (63, 0.03, 5, 1e-3), (5, 0.0, 100, 0.5), (32, 1.7, 1, 1e-8)]

exercise_4_4 = coding(
    "4.4",
    hint="Three parts: what all the steps cost together, and the two terms of the conversion. `math.log` is the "
    "natural logarithm. Nothing of the conversion is multiplied by the steps.",
    reference=epsilon_of_order,
    inputs=calls(*_ORDERS),
    rtol=1e-7,
    wrong=[
        Wrong(
            lambda alpha, rdp, steps, delta: rdp * steps - math.log(delta) / (alpha - 1),
            "this is the conversion of 2017: a bound too, but a looser one. Two terms with α are missing.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: epsilon_of_order(alpha, rdp, 1, delta),
            "your answer does not change with the steps. Each of them costs: the prices add up.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: steps * epsilon_of_order(alpha, rdp, 1, delta),
            "you converted each step, and added the ε. The conversion has a price of its own, and you paid it once a "
            "step. First add up the divergences, then convert once.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: epsilon_of_order(alpha, rdp, math.sqrt(steps), delta),
            "you took the root of the steps. Divergences simply add up: times `steps`.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: (
                steps * rdp + math.log(1 - 1 / alpha) + (math.log(delta) + math.log(alpha)) / (alpha - 1)
            ),
            "the last term has the wrong sign. A smaller δ must cost more: log δ is negative, and is subtracted.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: (
                steps * rdp + math.log(1 - 1 / alpha) - (math.log(delta) - math.log(alpha)) / (alpha - 1)
            ),
            "in the last term log α has the wrong sign: log δ + log α, both in the bracket.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: steps * rdp - (math.log(delta) + math.log(alpha)) / (alpha - 1),
            "the term log(1 - 1/α) is missing.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: (
                steps * rdp + math.log(1 - 1 / alpha) - (math.log(delta) + math.log(alpha)) / alpha
            ),
            "you divided the last term by α. It is α - 1.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: (
                steps * rdp + math.log10(1 - 1 / alpha) - (math.log10(delta) + math.log10(alpha)) / (alpha - 1)
            ),
            "you took logarithms to base 10. ε belongs to e: `math.log`.",
        ),
        Wrong(
            lambda alpha, rdp, steps, delta: max(0.0, epsilon_of_order(alpha, rdp, steps, delta)),
            "leave a negative number as it is here: at a large δ the formula may give one. The next exercise takes "
            "care of that.",
        ),
    ],
    praise="the prices of the steps add up, and the conversion is paid once. That is why ε does not start at 0.",
)


def my_epsilon(sigma, q, steps, delta):
    return max(0.0, min(epsilon_of_order(a, step_rdp(sigma, q, a), steps, delta) for a in range(2, 64)))


def searched(orders, pick=min, step=step_rdp, convert=epsilon_of_order):
    """An answer to 4.5 that differs in a part of its search."""

    def answer(sigma, q, steps, delta):
        return max(0.0, pick([convert(a, step(sigma, q, a), steps, delta) for a in orders]))

    return answer


_RUNS = [(1.0, 1 / 79, 790, 1e-5), (0.4, 0.6, 20, 1e-5), (8.0, 0.002, 50, 1e-6), (1.2, 0.004, 235, 1e-5)]
_RUNS += [(6.0, 0.01, 3, 0.2)]

exercise_4_5 = coding(
    "4.5",
    hint="For each α from 2 to 63 call your two functions, and take the smallest ε. Where that is below 0, the answer "
    "is 0.",
    reference=my_epsilon,
    inputs=calls(*_RUNS),
    rtol=1e-7,
    solution="```python\n"
    + "\n\n\n".join(inspect.getsource(f).strip() for f in (step_rdp, epsilon_of_order, my_epsilon))
    + "\n```",
    wrong=[
        Wrong(
            searched(range(2, 64), pick=max),
            "you took the largest ε. Each order proves its own bound, and all of them hold: the smallest is the best.",
        ),
        Wrong(
            searched(range(2, 64), pick=lambda found: sum(found) / len(found)),
            "you took the mean over the orders. Each order proves its own bound: take the smallest.",
        ),
        Wrong(
            searched([2]),
            "you stopped at α = 2. The smallest *divergence* is always there, but at a small δ its conversion is dear: "
            "convert first, then take the minimum.",
        ),
        Wrong(searched(range(2, 63)), "your orders end at 62: `range(2, 64)` goes to 63."),
        Wrong(searched(range(3, 64)), "your orders begin at 3. With little noise α = 2 is the best one."),
        Wrong(
            searched(range(2, 32)),
            "your orders end at 31, as in the blog post of notebook 04b. With much noise a larger one is better: up to "
            "63.",
        ),
        *(
            Wrong(
                searched([order]),
                f"you asked one order only, {order}. Which one is best depends on the run: try them all.",
            )
            for order in (8, 16, 32, 63)
        ),
        Wrong(
            lambda *run: min(epsilon_of_order(a, step_rdp(run[0], run[1], a), *run[2:]) for a in range(2, 64)),
            "right, but for a large δ yours is negative. An ε is never below 0: `max(0.0, …)`.",
        ),
        Wrong(
            lambda sigma, q, steps, delta: epsilon(
                noise_multiplier=sigma, sample_rate=q, steps=steps, target_delta=delta, accountant="rdp"
            ),
            "that is the package's accountant. It also searches orders between the whole numbers, and comes out a "
            "little lower. Write your own, with the orders 2 to 63.",
        ),
        Wrong(
            searched(range(2, 64), convert=lambda a, rdp, steps, delta: steps * rdp - math.log(delta) / (a - 1)),
            "right search, with the conversion of 2017. Use your `epsilon_of_order` of exercise 4.4.",
        ),
        Wrong(
            searched(range(2, 64), step=lambda sigma, q, a: a / (2 * sigma**2)),
            "you charged every step as if it used all the records. Use your `step_rdp` of exercise 4.3, with q.",
        ),
        Wrong(
            lambda sigma, q, steps, delta: my_epsilon(sigma, q, 1, delta),
            "this is the ε of one step. Pass on the number of steps.",
        ),
    ],
    praise="an accountant, in three functions. Opacus' RDP accountant does the same with some more orders.",
)

# 4.6: ε = 0, and records on the street


def leak(n, delta, generator):
    return (torch.rand(n, generator=generator) < delta).nonzero().flatten()


_PEOPLE, _DELTA, _TIMES = 60, 0.05, 3000


def _published(fn: Any, n: int, delta: float, times: int) -> tuple[np.ndarray, float]:
    """How often each of n people is published, and how often anybody is."""
    counts, generator = np.zeros(n), torch.Generator().manual_seed(0)
    anybody = 0
    for _ in range(times):
        given = attempted(fn(n, delta, generator))
        try:
            whom = [float(k) for k in torch.as_tensor(given).flatten()] if not isinstance(given, set) else [*given]
        except Exception:
            raise Complaint(
                "your function must return the numbers of the published people, as a list or tensor."
            ) from None
        if any(k != int(k) or not 0 <= k < n for k in whom) or len(set(whom)) < len(whom):
            raise Complaint(
                f"the people are the numbers 0 to n - 1, each at most once: for n = {n} you returned {whom[:5]}."
            )
        counts[[int(k) for k in whom]] += 1
        anybody += bool(whom)
    return counts / times, anybody / times


def _what_leaks(fn: Any) -> str:
    """A word for whom ``fn`` publishes."""
    often, anybody = _published(fn, _PEOPLE, _DELTA, _TIMES)
    if anybody == 0:
        return "nobody"
    if often.max() > 0.99:
        return "one surely" if often.min() < 0.99 else "all"
    if often.max() > _DELTA + 5 * math.sqrt(_DELTA / _TIMES):
        return "one person" if np.median(often) < often.max() / 4 else "too often"
    if often.sum() < 0.8 * _PEOPLE * _DELTA:
        return "too few"
    more, _ = _published(fn, 2 * _PEOPLE, 4 * _DELTA, _TIMES // 4)
    return "right" if more.sum() > 6.4 * _PEOPLE * _DELTA and more.max() < 6 * _DELTA else "no delta"


exercise_4_6 = open_ended(
    "4.6",
    hint="Leaving somebody out may change the probability of any outcome by at most δ. So with which probability may "
    "that person be published? `torch.rand(n, generator=generator)` draws n numbers between 0 and 1.",
    reference=leak,
    describe=_what_leaks,
    wrong={
        "nobody": Wrong(
            lambda n, delta, generator: [],
            "nobody is ever published. That is private, but it breaks nothing. δ allows you more.",
        ),
        "all": Wrong(
            lambda n, delta, generator: list(range(n)),
            "everybody is published each time. Leaving you out changes a probability from 1 to 0: that needs δ = 1.",
        ),
        "one surely": Wrong(
            lambda n, delta, generator: [0],
            "one person is published each time: for that person δ = 1. The promise is made to everybody.",
        ),
        "one person": Wrong(
            lambda n, delta, generator: [0] if torch.rand(1, generator=generator) < 10 * delta else [],
            "one person is published much more often than the others, and with a probability above δ. The promise is "
            "made to everybody: at most δ for each.",
        ),
        "too often": Wrong(
            lambda n, delta, generator: torch.randperm(n, generator=generator)[: n // 5],
            "each person is published with a probability above δ, so ε = 0 does not hold at this δ.",
        ),
        "too few": Wrong(
            lambda n, delta, generator: [int(torch.rand(1, generator=generator) * n)],
            "the promise holds, but you publish fewer people than δ allows: n·δ of them on average. One random person "
            "each time is only 1/n for each.",
        ),
        "no delta": Wrong(
            lambda n, delta, generator: (torch.rand(n, generator=generator) < 0.05).nonzero().flatten(),
            "for one n and δ this is right, but not for others. Use the n and the δ that are given.",
        ),
    },
    praise="ε = 0, at exactly this δ, and whole records on the street. ε does not see that. A δ well below 1/n makes "
    "it unlikely that this happens to anybody at all.",
    solution=f"```python\n{inspect.getsource(leak).strip()}\n```\n\n"
    "Publishing *everybody*, with probability δ, keeps the same promise.",
)

# 4.7: the distribution of a whole run


def delta_of_run(losses, probabilities, steps, eps):
    whole = np.ones(1)
    for _ in range(steps):
        whole = np.convolve(whole, probabilities)
    width = losses[1] - losses[0]
    sums = steps * losses[0] + width * np.arange(len(whole))
    return float(whole @ np.maximum(0, 1 - np.exp(eps - sums)))


def folded_by(folds=lambda steps: steps, first=lambda losses, steps: steps * losses[0], width=None, count=None):
    """An answer to 4.7 that differs in a part."""

    def answer(losses, probabilities, steps, eps):
        whole = np.ones(1)
        for _ in range(folds(steps)):
            whole = np.convolve(whole, probabilities)
        sums = first(losses, steps) + (width or losses[1] - losses[0]) * np.arange(len(whole))
        return float(whole @ (count or (lambda over: np.maximum(0, 1 - np.exp(-over))))(sums - eps))

    return answer


def _one(losses, probabilities, eps):
    return float(probabilities @ np.maximum(0, 1 - np.exp(eps - losses)))


def _same_length(losses, probabilities, steps, eps):
    whole = np.array(probabilities)
    for _ in range(steps - 1):
        whole = np.convolve(whole, probabilities, mode="same")
    return _one(losses, whole, eps)


_FOLDED = [
    (np.array([-0.5, 0.0, 0.5, 1.0]), np.array([0.3, 0.4, 0.2, 0.1]), 5, 1.2),
    (np.linspace(-0.2, 0.4, 7), np.array([0.25, 0.3, 0.2, 0.1, 0.05, 0.05, 0.05]), 12, 0.9),
    (np.array([-1.0, 1.0]), np.array([0.4, 0.6]), 2, 0.5),
]

exercise_4_7 = coding(
    "4.7",
    hint="`np.convolve(a, b)` gives the probabilities of the sum of two numbers from their probabilities. Begin with "
    "`np.ones(1)`, a run of no steps, and fold once a step. The smallest sum is `steps * losses[0]`, and the sums lie "
    "as far apart as the losses do.",
    reference=delta_of_run,
    inputs=calls(*_FOLDED),
    rtol=1e-7,
    atol=1e-9,
    wrong=[
        Wrong(
            lambda losses, probabilities, steps, eps: _one(steps * losses, probabilities, eps),
            "you multiplied each loss by the steps, as if every step had the luck of the first one. The steps are "
            "independent: fold their distributions.",
        ),
        Wrong(
            lambda losses, probabilities, steps, eps: steps * _one(losses, probabilities, eps / steps),
            "you gave each step its part of ε and added up their δ. That is the plain sum rule: a bound, but a loose "
            "one. Fold the distributions.",
        ),
        Wrong(
            lambda losses, probabilities, steps, eps: _one(losses, probabilities, eps),
            "this is the δ of one step. Fold its distribution with itself, once a step.",
        ),
        Wrong(
            folded_by(first=lambda losses, steps: losses[0]),
            "the grid of your sums begins at the smallest loss of *one* step. The smallest sum is `steps * losses[0]`.",
        ),
        Wrong(
            folded_by(folds=lambda steps: steps - 1, first=lambda losses, steps: (steps - 1) * losses[0]),
            "you folded one time too few: this is the run without its last step.",
        ),
        Wrong(
            folded_by(folds=lambda steps: steps + 1, first=lambda losses, steps: (steps + 1) * losses[0]),
            "you folded one time too often. Begin with `np.ones(1)`, a run of no steps, not with one step.",
        ),
        Wrong(
            folded_by(folds=lambda steps: steps + 1),
            "your sums begin where they should, but there is one fold too many: `np.ones(1)` is a run of no steps.",
        ),
        Wrong(
            folded_by(width=1.0), "your sums lie 1 apart. They lie as far apart as the losses: `losses[1] - losses[0]`."
        ),
        Wrong(_same_length, '`mode="same"` cuts the ends off, and the tail is what counts here. Leave the mode away.'),
        Wrong(
            folded_by(count=lambda over: (over > 0).astype(float)),
            "this is how often the loss exceeds ε. A sum L counts 1 - exp(ε - L) where that is positive.",
        ),
        Wrong(
            folded_by(count=lambda over: 1 - np.exp(-over)),
            "sums below ε count as well, as negative numbers. They are covered: 0 for each of them.",
        ),
    ],
    praise="a PLD accountant. Google's does the same with a Fourier transform, and rounds every loss up before it "
    "begins.",
)

# 4.8: an ε that is not a bound

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


exercise_4_8 = open_ended(
    "4.8",
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
    solution="For example `answer_4_8 = (0.5, 0.001, 1000)`. A record is expected in one single batch of the thousand, "
    "but there the noise is only half the clipping norm.",
)

# 4.9: an ε that can't be


def impossible(claims, n, batch_size, noise_multiplier, target_delta):
    per_epoch = math.ceil(n / batch_size)
    return [
        epoch
        for epoch, printed in claims.items()
        if printed + 0.02
        < epsilon(
            noise_multiplier=noise_multiplier,
            sample_rate=1 / per_epoch,
            steps=epoch * per_epoch,
            target_delta=target_delta,
        )
    ]


def judged(rounding=math.ceil, guilty=lambda printed, cost: printed + 0.02 < cost, **arguments):
    """An answer to 4.8 with another price, or another verdict."""

    def answer(claims, n, batch_size, noise_multiplier, target_delta):
        def cost(epoch):
            return priced(rounding, **{"accountant": "prv", **arguments})(
                n, batch_size, epoch, noise_multiplier, target_delta
            )

        return [epoch for epoch, printed in claims.items() if guilty(printed, cost(epoch))]

    return answer


_CLAIMS = [  # in the first row PRV says 1.00, 1.61 and 2.89, RDP 3.18 at the end
    ({1: 1.0, 3: 1.575, 10: 3.0}, 2000, 300, 2.0, 1e-5),
    ({2: 0.7, 4: 0.9}, 1200, 100, 1.5, 1e-4),
    ({3: 0.3, 5: 2.0, 6: 2.5, 8: 3.1}, 1201, 300, 2.5, 1e-6),
    ({1: 2.9, 2: 9.0}, 600, 150, 1.3, 1e-5),
]

exercise_4_9 = coding(
    "4.9",
    hint="For each epoch: how many steps, and at which sampling rate? `epsilon` then says what they cost, by PRV if "
    "you name no accountant. `claims.items()` gives the pairs (epoch, printed ε).",
    reference=impossible,
    inputs=calls(*_CLAIMS),
    wrong=[
        Wrong(
            judged(accountant="rdp"),
            "you judge by RDP, which says more than a run costs. A printed ε below it may still be true: only a tight "
            "accountant can prove it wrong.",
        ),
        Wrong(
            judged(accountant="gdp"),
            "you judge by GDP, which is no bound: it says too little itself, and lets an impossible ε pass.",
        ),
        Wrong(
            judged(guilty=lambda printed, cost: printed < cost),
            "you leave no room for rounding. PRV may be 0.015 above the truth: call an ε impossible only where it is "
            "more than 0.02 below.",
        ),
        Wrong(
            judged(guilty=lambda printed, cost: abs(printed - cost) > 0.02),
            "you also report an ε that is too large. That is a loose bound, but it is true.",
        ),
        Wrong(
            judged(guilty=lambda printed, cost: printed - 0.02 > cost),
            "the other way round: an ε that is larger than needed is true, if loose. Impossible is one that is smaller "
            "than what the run costs.",
        ),
        Wrong(
            judged(guilty=lambda printed, cost: printed + 0.02 >= cost),
            "these are the epochs whose ε *can* be true. Return the others.",
        ),
        Wrong(
            judged(steps=lambda run: run.epochs),
            "you counted one step for each epoch. An epoch has ⌈n / batch_size⌉ of them.",
        ),
        Wrong(
            lambda claims, *run: judged()({max(claims): claims[max(claims)]}, *run),
            "you judged the last epoch alone. Every printed ε is a claim.",
        ),
        Wrong(
            judged(target_delta=1e-5),
            "your answer does not change with target_delta. Without it, `epsilon` takes δ = 1e-5.",
        ),
        Wrong(
            judged(math.floor),
            "you rounded the steps of an epoch down. The loader rounds up: the last, smaller batch is a step too.",
        ),
        Wrong(
            judged(sample_rate=lambda run: run.batch_size / run.n),
            "your q is batch_size / n. Opacus' loader samples with 1 / ⌈n / batch_size⌉: charge the rate that was "
            "used.",
        ),
        Wrong(
            judged(sample_rate=1.0),
            "you charged every step as if it used all the records. The printed ε may count on sampling: q = 1 / ⌈n / "
            "batch_size⌉.",
        ),
    ],
    praise="a bound below what the run costs is no bound. A printed ε above it may be loose, but you can't call it "
    "wrong.",
)

EXERCISES = [exercise_4_1, exercise_4_2, exercise_4_3, exercise_4_4, exercise_4_5]
EXERCISES += [exercise_4_6, exercise_4_7, exercise_4_8, exercise_4_9]
