"""Notebook 06: the weighted average, masks that cancel, a ledger that loses count, what bob learns, a late message."""

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
from dpteach.exercises.core import Complaint, Wrong, as_numbers, attempted, changed, coding, unattempted, value
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

# 6.2: masks that cancel


def masks(n, shared):
    """A mask for each of n workers, (n, size); modulo 2**48 their sum is 0."""
    rows = []
    for i in range(n):
        added = sum(shared(i, j) for j in range(i + 1, n))
        taken_off = sum(shared(i, j) for j in range(i))
        rows.append((added - taken_off) % 2**48)
    return torch.stack(rows)


RING = 2**48


def from_pairs(sign, *, pairs=lambda i, j, n: True):
    """An answer whose worker i has ``sign(i, j)`` times what it shares with j, for each j that ``pairs`` lets in."""

    def answer(n, shared):
        nothing = torch.zeros_like(shared(0, 1))
        rows = [
            sum((sign(i, j) * shared(i, j) for j in range(n) if j != i and pairs(i, j, n)), nothing) for i in range(n)
        ]
        return torch.stack(rows) % RING

    return answer


def _plus_minus(i, j):
    return 1 if i < j else -1


def _without_modulo(n, shared):
    return torch.stack([sum(_plus_minus(i, j) * shared(i, j) for j in range(n) if j != i) for i in range(n)])


def _what_the_masks_hold(fn: Any, args: tuple) -> Any:
    """How often each worker's mask holds what each pair shares: by pair, so that either of the two may add it."""
    n, seed = args
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    secrets = torch.randint(RING // 2, RING, (len(pairs),), generator=torch.Generator().manual_seed(seed))

    def shared(i, j):
        pair = tuple(sorted((int(i), int(j))))
        if pair not in pairs:
            raise Complaint(
                f"your function asks for shared({i}, {j}), with {n} workers. They are 0 to {n - 1}, and nobody shares "
                "a mask with herself."
            )
        row = torch.zeros(len(pairs), dtype=torch.long)
        row[pairs.index(pair)] = secrets[pairs.index(pair)]
        return row

    rows = attempted(fn(n, shared))
    if isinstance(rows, (list, tuple)) and all(isinstance(row, torch.Tensor) for row in rows) and len(rows) == n:
        rows = torch.stack(list(rows)) if len({row.shape for row in rows}) == 1 else rows
    if not isinstance(rows, torch.Tensor) or rows.shape != (n, len(pairs)):
        got = f"the shape {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else f"a {type(rows).__name__}"
        raise Complaint(f"your function must return a mask for each of the {n} workers, (n, size), got {got}.")
    if rows.dtype != torch.long:
        raise Complaint(
            f"masks are whole numbers (int64), yours are {rows.dtype}: floats are rounded, so a rest stays."
        )
    times = torch.full(rows.shape, 9)  # 9: not a small multiple
    for c in range(-3, 4):
        times[rows % RING == c * secrets % RING] = c
    first = torch.stack([column[column != 0][0] if column.any() else column[0] for column in times.T])
    return {
        "sum": float((rows.sum(0) % RING != 0).any()),
        "range": float(((rows < 0) | (rows >= RING)).any()),
        "pairs": (times * first.sign()).flatten().tolist(),
    }


exercise_6_2 = coding(
    "6.2",
    hint="Go over all workers i. For every other worker j, i and j know the same numbers, `shared(i, j)`. One of the "
    "two must add them and the other take them off: the one with the lower number adds, say. Take the result modulo "
    "2**48.",
    reference=masks,
    inputs=[lambda: (3, 1), lambda: (2, 2), lambda: (5, 3), lambda: (8, 4)],
    observe=_what_the_masks_hold,
    traits={
        "sum": "your masks do not cancel: their sum is not 0 modulo 2**48, and the server's total is spoilt.",
        "range": "a mask must lie between 0 and 2**48: take it modulo 2**48. Beyond, its size tells something about "
        "what is under it.",
        "pairs": "your masks cancel, but a worker's mask must hold what it shares with *each* other worker, once.",
    },
    wrong=[
        Wrong(
            from_pairs(lambda i, j: 1),
            "both workers of a pair add what they share, so the total holds it twice. One adds it, the other takes it "
            "off.",
        ),
        Wrong(
            from_pairs(lambda i, j: 1 if i < j else 0),
            "one of each pair adds what they share, and nobody takes it off again: all of it stays in the total.",
        ),
        Wrong(
            from_pairs(_plus_minus, pairs=lambda i, j, n: abs(i - j) == 1),
            "your masks cancel, but each worker shares with its neighbours in line alone: the first one with a single "
            "worker, who can take the mask off. Use every pair: then all others must work together to see one.",
        ),
        Wrong(
            from_pairs(_plus_minus, pairs=lambda i, j, n: (i - j) % n in (1, n - 1)),
            "your masks cancel, but two neighbours who work together see through the worker between them. Use every "
            "pair: then all others must work together.",
        ),
        Wrong(
            from_pairs(_plus_minus, pairs=lambda i, j, n: 0 in (i, j)),
            "your masks cancel, but everybody shares with worker 0 alone, who knows all the masks. Use every pair.",
        ),
        Wrong(
            from_pairs(_plus_minus, pairs=lambda i, j, n: n - 1 in (i, j)),
            "your masks cancel, but everybody shares with the last worker alone, who knows all the masks. Use every "
            "pair.",
        ),
        Wrong(
            _without_modulo,
            "your masks cancel, but they leave the ring: take each modulo 2**48. A mask that may be negative, or "
            "larger, tells by its size what is under it.",
        ),
        Wrong(
            from_pairs(lambda i, j: 0),
            "all your masks are 0. Did each pair come up twice, once added and once taken off by the same worker?",
        ),
        Wrong(
            from_pairs(lambda i, j: 2 * _plus_minus(i, j)),
            "each pair is used twice. It cancels, but a mask that is always even leaves the last bit of what is under "
            "it bare. Go over each pair once.",
        ),
    ],
    praise="each pair of workers shares numbers that one adds and the other takes off, so all of it cancels in the "
    "total, to the last bit. To see one worker's update, all the others would have to work together.",
)

# 6.5: the worker who was late


def unmask(i, sent, revealed):
    """What worker i sent, without its mask: (size,), in the ring modulo 2**48."""
    mask = sum(numbers if i < j else -numbers for j, numbers in revealed.items())
    return (sent - mask) % 2**48


def _with_signs(sign, start=lambda sent: sent):
    return lambda i, sent, revealed: (start(sent) + sum(sign(i, j) * r for j, r in revealed.items())) % RING


def _late(i: int, n: int, seed: int) -> tuple[int, torch.Tensor, dict[int, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    revealed = {j: torch.randint(RING, (6,), generator=draw) for j in range(n) if j != i}
    update = torch.randint(RING, (6,), generator=draw)
    return i, _with_signs(_plus_minus)(i, update, revealed), revealed


exercise_6_5 = coding(
    "6.5",
    hint="Worker i has *added* the numbers that it shares with every later worker, and *taken off* those that it "
    "shares with every earlier one. You have all of them: do the opposite, modulo 2**48.",
    reference=unmask,
    inputs=[lambda: _late(0, 3, 1), lambda: _late(2, 5, 2), lambda: _late(3, 4, 3), lambda: _late(1, 2, 4)],
    rtol=0.0,
    atol=0.5,
    dtype=(torch.int64, "Floats round: the last bits of an update would be lost."),
    wrong=[
        Wrong(
            _with_signs(_plus_minus),
            "you put the mask on a second time. What worker i has added must be taken off, and the other way round.",
        ),
        Wrong(
            _with_signs(lambda i, j: -1),
            "you take everything off. That is right for worker 0; a later worker has *taken off* what it shares with "
            "earlier ones, so these numbers must be added.",
        ),
        Wrong(
            _with_signs(lambda i, j: 1),
            "you add everything. That is right for the last worker; an earlier one has *added* what it shares with "
            "later ones, so these numbers must be taken off.",
        ),
        Wrong(
            lambda i, sent, revealed: sent - sum(_plus_minus(i, j) * r for j, r in revealed.items()),
            "the mask is off, but the result has left the ring: take it modulo 2**48.",
        ),
        Wrong(
            _with_signs(lambda i, j: -_plus_minus(i, j), start=torch.zeros_like),
            "this is the mask (turned round), not what was under it. Begin with `sent`.",
        ),
        Wrong(lambda i, sent, revealed: sent, "this is what worker i sent, mask and all."),
    ],
    praise="the late message lies open. Nobody broke a promise: the others were asked for what they share with a "
    "worker who seemed to be gone. That is why Bonawitz et al. (2017) put a second mask on each message, the worker's "
    "own, and let the server ask for one of the two kinds, never for both.",
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

EXERCISES = [exercise_6_1, exercise_6_2, exercise_6_3, exercise_6_4, exercise_6_5]
