"""Notebook 06: the weighted average, a worker that pays too much, a ledger that loses count, what bob learns."""

import copy
import math
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from dpteach.accounting import epsilon
from dpteach.exercises.core import (
    Complaint,
    Wrong,
    as_number,
    as_numbers,
    attempted,
    changed,
    coding,
    open_ended,
    unattempted,
    value,
)
from dpteach.ledger import Ledger

# 6.1: the weighted average


def average(models, weights):
    """The weighted mean of the models' parameters: a state dict."""
    total = sum(weights)
    states = [model.state_dict() for model in models]
    return {name: sum(w / total * state[name] for w, state in zip(weights, states)) for name in states[0]}


def summed(factors):
    """An answer that adds the models, each times its factor: ``factors(weights)``."""

    def answer(models, weights):
        states = [model.state_dict() for model in models]
        return {name: sum(f * state[name] for f, state in zip(factors(weights), states)) for name in states[0]}

    return answer


def _flat_state(fn: Any, args: tuple) -> Any:
    models, weights = args
    before = copy.deepcopy([model.state_dict() for model in models])
    given = list(weights)
    result = fn(*args)
    if list(weights) != given:
        raise Complaint(
            "your function changes the list of weights. Make a new one: shares = [w / total for w in weights]."
        )
    if isinstance(result, nn.Module):
        result = result.state_dict()
    if not isinstance(attempted(result), dict):
        raise Complaint(f"your function must return a state dict (names to tensors), got {type(result).__name__}.")
    result = {name: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for name, v in result.items()}
    names = list(before[0])
    if set(result) != set(names) or not all(isinstance(v, torch.Tensor) for v in result.values()):
        raise Complaint(f"your state dict must have a tensor for each of {', '.join(names)}.")
    for model, state in zip(models, before):
        if any(not torch.equal(model.state_dict()[name], state[name]) for name in names):
            raise Complaint("your function changes the workers' models. Make new tensors instead.")
    for name in names:
        if result[name].shape != before[0][name].shape:
            raise Complaint(
                f"{name} must have the shape {tuple(before[0][name].shape)}, got {tuple(result[name].shape)}."
            )
    return torch.cat([result[name].flatten() for name in names])


def _models(seed: int, count: int, *widths: int) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))) for _ in range(count)]


exercise_6_1 = coding(
    "6.1",
    hint="`model.state_dict()` gives a model's tensors by name. For each name: multiply each worker's tensor by its "
    "share of all the weights, and add. The shares must sum to 1.",
    reference=average,
    inputs=[
        lambda: (_models(1, 2, 3, 2), [3.0, 1.0]),
        lambda: (_models(2, 3, 3, 4, 2), [1, 2, 5]),
        lambda: (_models(3, 10, 2, 3, 1), [30_000.0, 120.0, 5.5, 0.25, 7000.0, 30_000.0, 1.0, 2.0, 3.0, 900.0]),
        lambda: (_models(4, 1, 3, 2), [0.2]),
    ],
    observe=_flat_state,
    wrong=[
        Wrong(
            changed(average, weights=lambda run: [1.0] * len(run.models)),
            "every worker counts the same. That is right for workers of one size; here the weights say that one has "
            "more records, and its model should count for more.",
        ),
        Wrong(
            summed(lambda weights: weights),
            "you multiply by the weights but never divide by their sum. With 30,000 records a worker, the average "
            "would be tens of thousands of times too large.",
        ),
        Wrong(
            summed(lambda weights: [w / len(weights) for w in weights]),
            "you divide the weighted sum by the number of workers. Divide by the sum of the *weights*: the shares must "
            "sum to 1.",
        ),
        Wrong(
            summed(lambda weights: [1.0] * len(weights)),
            "this is the sum of the models, not their mean: with two equal models the result must be that model.",
        ),
        Wrong(
            changed(average, weights=lambda run: [1 / w for w in run.weights]),
            "the weights work the wrong way round: the worker with the most records counts least.",
        ),
        Wrong(
            lambda models, weights: models[0].state_dict(),
            "this is the first worker's model. The others trained for nothing.",
        ),
        Wrong(
            changed(average, models=lambda run: run.models[:2], weights=lambda run: run.weights[:2]),
            "the third worker is left out. Go over all the models, however many there are.",
        ),
        Wrong(
            changed(average, weights=lambda run: torch.tensor(run.weights).softmax(0).tolist()),
            "you put the weights through a softmax. With 10 records more, a worker would count e^10 times as much: "
            "divide by the sum of the weights.",
        ),
        Wrong(
            summed(lambda weights: [w / sum(weights) / len(weights) for w in weights]),
            "you divide twice, by the sum of the weights and by the number of workers. The shares sum to 1 already.",
        ),
        Wrong(
            summed(lambda weights: [0.5 ** (len(weights) - max(k, 1)) for k in range(len(weights))]),
            "you average pair by pair: the last worker gets a half, the first ones next to nothing. Go over all the "
            "models with their own shares.",
        ),
        Wrong(
            summed(lambda weights: [w // sum(weights) for w in weights]),
            "`//` cuts the shares to whole numbers: all of them are 0, or 1 for a single worker. Use `/`.",
        ),
        Wrong(
            lambda models, weights: models[weights.index(max(weights))].state_dict(),
            "this is the model of the worker with the largest weight. The others trained for nothing.",
        ),
        Wrong(
            changed(average, weights=lambda run: [w * w for w in run.weights]),
            "the weights enter twice. Multiply by weight / (sum of weights), once.",
        ),
    ],
    praise="each worker counts by its share, and the shares sum to 1. Whatever the weights are, the average reads no "
    "private record: it costs no ε.",
)

# 6.2: a worker who pays too much

SIGMA, BATCH, ROUNDS, DELTA = 1.2, 128, 5, 1e-5


def price_of(n: int) -> float:
    """ε of 5 rounds of one local epoch for a worker with ``n`` records (σ = 1.2, batch 128, δ = 1e-5), by RDP."""
    per_round = math.ceil(n / BATCH)
    return epsilon(
        noise_multiplier=SIGMA,
        sample_rate=1 / per_round,
        steps=ROUNDS * per_round,
        target_delta=DELTA,
        accountant="rdp",
    )


def _pays_too_much(answer: Any) -> str:
    n = as_number(answer)
    if n is None or not abs(n) < 1e9 or n != int(n):
        return "no count"
    if n < BATCH:
        return "no batch"
    if n >= 20_000:
        return "huge"
    return "right" if price_of(int(n)) > 5 else "too cheap"


exercise_6_2 = open_ended(
    "6.2",
    hint="Bob's rate is q = 1 / ⌈n / 128⌉. Try `price_of(30_000)`, then smaller numbers.",
    reference=300,
    describe=_pays_too_much,
    wrong={
        "no batch": Wrong(
            100,
            f"a batch of {BATCH} needs at least {BATCH} records: `train` refuses a batch that is larger than the data.",
        ),
        "huge": Wrong(30_000, "that is alice's size: her ε is below 1. What is different about a *small* worker?"),
        "too cheap": Wrong(
            3000,
            "with so many records ε stays below 5. A record's rate q is one over the number of batches: which n makes "
            "q large?",
        ),
        "no count": Wrong(
            "few", f"the answer must be a whole number of records, from {BATCH} (the batch size) to a billion."
        ),
    },
    praise="few records, so each is in a large part of the batches. Same code, same σ, same number of rounds, and a "
    "promise that is several times weaker. A small worker needs a larger σ of its own, or a smaller batch: never "
    "alice's settings unread.",
    solution="`answer_6_2 = 300`: three batches, q = 1/3, and ε is 7.63. Every n from 128 to 896 (seven batches) does "
    "it.",
)

# 6.3: a ledger that loses count


def private_rounds(ledger, train_one_round, rounds, noise_multiplier, sample_rate, steps):
    """Train for some rounds; ε of everything in the ledger after each, by RDP."""
    path = []
    for _ in range(rounds):
        ledger.charge(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)  # before, not after
        train_one_round()
        path.append(ledger.epsilon(accountant="rdp"))
    return path


def as_it_was_given(ledger, train_one_round, rounds, noise_multiplier, sample_rate, steps):
    path = []
    for _ in range(rounds):
        ledger = Ledger()
        train_one_round()
        ledger.charge(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        path.append(ledger.epsilon(accountant="rdp"))
    return path


def in_rounds(*moves):
    """An answer that makes these moves in each round."""

    def answer(ledger, train_one_round, rounds, noise_multiplier, sample_rate, steps):
        run = SimpleNamespace(ledger=ledger, train=train_one_round, rounds=rounds, steps=steps, path=[])
        run.settings = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate}
        for run.k in range(1, rounds + 1):
            for move in moves:
                move(run)
        return run.path

    return answer


def _charge(run, rounds=1):
    run.ledger.charge(**run.settings, steps=rounds * run.steps)


def _train(run):
    run.train()


def _ask(run):
    run.path.append(run.ledger.epsilon(accountant="rdp"))


def _price(run, rounds):
    return epsilon(**run.settings, steps=rounds * run.steps, accountant="rdp")


def _charge_in_finally(run):
    try:
        run.train()
    finally:
        _charge(run)


_NOT_RDP = (
    'pass accountant="rdp" when you ask the ledger. Another accountant has other numbers, and PRV, the default, takes '
    "its time."
)


class _ByRdp(Ledger):
    """A ledger that answers by RDP only, at once."""

    def epsilon(self, *, target_delta: float = 1e-5, accountant: str = "prv") -> float:
        if accountant != "rdp":
            raise Complaint(_NOT_RDP)
        return super().epsilon(target_delta=target_delta, accountant=accountant)


class _Crash(Exception):
    """What stops the training in the middle of a round."""


def _rounds_and_what_stays(fn: Any, args: tuple) -> Any:
    """ε after each round; what the ledger says in the end, when each round begins, and after an error in the last one.

    When a process is killed, or the power fails, no line runs any more, `finally` neither: then only that counts which
    is in the ledger when the round begins.
    """
    rounds = args[0]

    def run(stops: bool) -> tuple[Any, Ledger, list[float]]:
        ledger, at_the_start = _ByRdp(), []
        ledger.charge(noise_multiplier=2.0, sample_rate=0.05, steps=40)  # an earlier run on the same records

        def train_one_round():
            at_the_start.append(float(ledger.steps))
            if stops and len(at_the_start) == rounds:
                raise _Crash

        try:
            return fn(ledger, train_one_round, *args), ledger, at_the_start
        except _Crash:
            return _Crash, ledger, at_the_start

    path, ledger, at_the_start = run(stops=False)
    if at_the_start and unattempted(path):
        raise Complaint("your function trains, and returns nothing. End it with `return`, and the list of ε.")
    listed = isinstance(attempted(path), (list, tuple, np.ndarray, torch.Tensor))
    path = as_numbers(path) if listed else None
    if path is None:
        raise Complaint("your function must return a list of numbers: ε after each round.")
    if len(at_the_start) != rounds:
        raise Complaint(
            f"train_one_round must run once in each of the {rounds} rounds, it ran {len(at_the_start)} times."
        )
    stopped, after_the_error, _ = run(stops=True)
    if stopped is not _Crash:
        raise Complaint("your function hides an error of train_one_round. Let it through: the caller must know.")
    return {
        "path": path,
        "ledger": _totals(ledger),
        "at the start": at_the_start,
        "after an error": float(after_the_error.steps),
    }


def _totals(ledger: Ledger) -> list[float]:
    """Steps by σ and q, flat, in order: how they were cut into charges does not matter."""
    totals: dict[tuple[float, float], int] = {}
    for c in ledger.charges:
        totals[c.noise_multiplier, c.sample_rate] = totals.get((c.noise_multiplier, c.sample_rate), 0) + c.steps
    return [float(x) for key in sorted(totals) for x in (*key, totals[key])]


def _rounds(seed: int) -> tuple:
    draw = random.Random(seed)
    return draw.randint(2, 6), draw.uniform(0.8, 2), draw.uniform(0.01, 0.2), draw.randint(5, 60)


exercise_6_3 = coding(
    "6.3",
    hint="Two lines are at fault. Which ledger still knows the earlier run, and the rounds before? And what does the "
    "ledger say if the power fails inside of `train_one_round`?",
    reference=private_rounds,
    inputs=[
        lambda: (4, 1.2, 0.1, 10),
        lambda: (3, 0.9, 0.02, 50),
        lambda: (1, 2.0, 0.05, 1),
        lambda: _rounds(1),
        lambda: _rounds(2),
    ],
    observe=_rounds_and_what_stays,
    traits={
        "ledger": "the ledger that you were given does not hold what was trained: every round's steps, with its σ and "
        "its q, once.",
        "at the start": "the ledger does not yet know of a round when its training begins, or knows of too much. "
        "Charge one round, then train it.",
        "after an error": "after an error in train_one_round the ledger must hold all rounds that have begun, once.",
    },
    wrong=[
        Wrong(
            as_it_was_given,
            "each round has a new ledger of its own, so every round reports the ε of one round: it never grows. Charge "
            "the ledger that you were given.",
        ),
        Wrong(
            changed(private_rounds, ledger=lambda run: Ledger()),
            "you start a new ledger. The one that you were given knows of an earlier run on the same records: that run "
            "still counts.",
        ),
        Wrong(
            in_rounds(_train, _charge, _ask),
            "you charge after the training. If it stops half-way, the model has seen the records and the ledger knows "
            "nothing of it. Charge first.",
        ),
        Wrong(
            in_rounds(_charge_in_finally, _ask),
            "`finally` runs after an error, but not when the process is killed or the power fails: then the model has "
            "seen the records, and the ledger knows nothing of it. Charge before the training.",
        ),
        Wrong(
            in_rounds(_charge, _train, _charge, _ask),
            "you charge each round twice, before and after. Before is enough.",
        ),
        Wrong(
            in_rounds(_ask, _charge, _train),
            "you ask the ledger before the round is charged, so each number is that of the round before. Charge, "
            "train, then ask.",
        ),
        Wrong(
            changed(private_rounds, ledger=lambda run: copy.deepcopy(run.ledger)),
            "you charge a copy. The ledger that you were given has not learnt of these rounds, and the next run on "
            "these records will not know of them.",
        ),
        Wrong(
            in_rounds(_charge, _train, lambda run: run.path.append(_price(run, rounds=run.k))),
            "the ledger is right, but your numbers are these rounds' alone. An earlier run on the same records still "
            "counts: ask the ledger.",
        ),
        Wrong(in_rounds(_charge, _train, lambda run: run.path.append(run.ledger.epsilon())), _NOT_RDP),
        Wrong(lambda *args: private_rounds(*args)[-1:], "you return the last ε only. The list has one for each round."),
        Wrong(
            in_rounds(lambda run: run.k == 1 and _charge(run), _train, _ask),
            "you charge once, but every round trains. Each round must be paid for.",
        ),
        Wrong(
            in_rounds(lambda run: run.k == 1 and _charge(run, run.rounds), _train, _ask),
            "you charge all the rounds before the first. The total is right, but what you report after each round is "
            "too high, and a run that ends early has paid for rounds that never ran. Charge round by round.",
        ),
        Wrong(
            in_rounds(_charge, _train, lambda run: run.path.append(run.k * _price(run, rounds=1))),
            "you multiply one round's ε by the number of rounds, and forget the earlier run. Steps compose better than "
            "that: ask the ledger.",
        ),
        Wrong(
            in_rounds(lambda run: _charge(run, run.k), _train, _ask),
            "you charge all the steps so far in every round: earlier rounds are paid for again and again.",
        ),
        Wrong(
            changed(private_rounds, steps=1),
            "you charge one step a round. The noise is added in each *step* of a local epoch: charge `steps`.",
        ),
    ],
    praise="one ledger for one set of records, over rounds and runs, and it is charged before each round. After a "
    "crash it says more than was used at the worst, never less.",
)

# 6.4: what bob learns about alice

ALICE, BOB = 1.0, 2.0


def _sure(e: float) -> float:
    return math.exp(e) / (1 + math.exp(e))


exercise_6_4 = value(
    "6.4",
    hint="Odds are probability / (1 - probability). Before, they are 1 to 1. Whatever bob sees that comes out of "
    "alice's private updates multiplies them by e^ε at most (notebook 04). Whose ε counts?",
    answer=round(_sure(ALICE), 4),
    share=True,
    wrong=[
        Wrong(0.5, "that would be ε = 0: bob learns nothing at all. Alice's promise is weaker."),
        Wrong(
            1.0,
            "bob does get alice's model exactly, but that model is private: ε holds for whoever sees it, with whatever "
            "else they know.",
        ),
        Wrong(
            round(_sure(BOB), 4),
            "this is bob's ε. It protects bob's records from alice. Alice's records are protected by alice's ε.",
        ),
        Wrong(
            round(_sure(ALICE + BOB), 4),
            "you added the two ε. Only alice's training has read alice's records; bob's noise and bob's ε say nothing "
            "about them.",
        ),
        Wrong(
            round(_sure((ALICE + BOB) / 2), 4),
            "you averaged the two ε. An average is nobody's promise: alice's records are protected by alice's ε.",
        ),
        Wrong(
            round(math.exp(ALICE), 4),
            "e^ε multiplies the *odds*, it is not a probability. Odds of 2.72 to 1 are a probability of 2.72 / 3.72.",
        ),
        Wrong(
            round(math.exp(ALICE) / 2, 4),
            "e^ε multiplies the odds, not the probability: a probability above 1 can't be right.",
        ),
        Wrong(
            round(1 - _sure(ALICE), 4),
            "the odds the wrong way round: this is how sure he can be *at least*. At most is one minus it.",
        ),
        Wrong(
            round(math.tanh(ALICE / 2), 4),
            "this is how far the true and the false positive rate of an attack can lie apart. Bob's probability starts "
            "at 1/2: odds of 1 to 1, times e^ε.",
        ),
        Wrong(
            round(1 - math.exp(-ALICE), 4),
            "this is not the posterior. Turn the prior into odds (1 to 1), multiply by e^ε, and turn the odds back "
            "into a probability.",
        ),
    ],
    praise="odds of 1 to 1 become at most e to 1, which is 73 % (and δ more). It does not matter that bob can compute "
    "alice's model from the average: ε already assumes that he sees it.",
    solution="**0.731**: e^1 / (1 + e^1). Bob subtracts his own model from the average and has alice's, so he sees all "
    "that alice sent. Her ε = 1 holds against exactly that. His own ε = 2 is about *his* records.",
)

EXERCISES = [exercise_6_1, exercise_6_2, exercise_6_3, exercise_6_4]
