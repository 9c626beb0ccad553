"""Notebook 07: what the server may report, what ε must cover after a crash, the ε of a whole client."""

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import dpteach
from dpteach.accounting import epsilon
from dpteach.exercises.budget import calls, seeded
from dpteach.exercises.core import Complaint, Wrong, as_number, changed, coding, value

# 7.1: what the server may report


def report(replies):
    """What the server reports: each client's ε, by its name."""
    return {reply["name"]: reply["epsilon"] for reply in replies}


_LOSS = "the loss is computed from private records, without noise, and ε does not cover it. Report ε alone."
_RECORDS = (
    "the number of records is one of the client's secrets too, unless it was agreed to be public. Report ε alone."
)
_PAIRS = (
    "the right names with the right numbers. Return them as one dict, name to ε, so that a reader finds a client by "
    "its name."
)


def _parts(value: Any) -> list:
    """The names and numbers in ``value``, in the order in which they stand there."""
    if isinstance(value, dict):
        return [part for item in value.items() for part in _parts(item)]
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in _parts(item)]
    return [value if isinstance(value, str) else as_number(value)]


def _reported(fn: Callable, args: tuple) -> Any:
    (replies,), kept = args, copy.deepcopy(args)
    result = fn(*args)
    if args != kept:
        raise Complaint("your function changes the replies. Make a new dict.")
    parts = _parts(result)
    for secret, sentence in (("loss", _LOSS), ("records", _RECORDS)):
        if any(reply[secret] in parts for reply in replies):
            raise Complaint(sentence)
    reported = [part for part in parts if part not in ("name", "epsilon")]
    if isinstance(result, (list, tuple)) and reported == _parts(report(replies)):
        raise Complaint(_PAIRS)
    return result


def _replies(*rows):
    return [dict(zip(("name", "records", "epsilon", "loss"), row)) for row in rows]


def _some_clients(seed: int) -> tuple:
    draw = random.Random(seed)
    names = draw.sample(["north", "south", "east", "west", "ward 3", "Ärzte", "alice", "bob"], draw.randint(3, 6))
    return (_replies(*((name, draw.randint(100, 9000), draw.uniform(0.1, 8), draw.uniform(0.1, 3)) for name in names)),)


exercise_7_1 = coding(
    "7.1",
    hint="Whom does alice's ε protect, and whom bob's? Then: what does a reader of the server's log need to see?",
    reference=report,
    inputs=[
        lambda: (_replies(("alice", 2000, 1.17, 0.9), ("bob", 2000, 2.24, 1.1)),),
        lambda: (_replies(("clinic", 300, 3.4567, 2.0), ("hospital", 50_000, 0.6, 0.4), ("lab", 7000, 1.5, 0.7)),),
        *(partial(_some_clients, seed) for seed in (1, 2)),
    ],
    observe=_reported,
    wrong=[
        Wrong(
            lambda replies: sum(r["records"] * r["epsilon"] for r in replies) / sum(r["records"] for r in replies),
            "this is the weighted mean, and it is what Flower does to every metric if you don't say otherwise. It "
            "tells bob's patients a smaller ε than theirs. Keep one for each client.",
        ),
        Wrong(
            lambda replies: sum(r["epsilon"] for r in replies) / len(replies),
            "a mean of two promises is a promise to nobody: one of the two is always larger. Keep one for each client.",
        ),
        Wrong(
            lambda replies: sum(r["epsilon"] for r in replies),
            "the clients have no record in common, so nobody's record has paid the sum. Keep one for each client.",
        ),
        Wrong(
            lambda replies: max(r["epsilon"] for r in replies),
            "the largest is true for every person, and the best *single* number. But it hides what the others have "
            "left to spend. Keep one for each client.",
        ),
        Wrong(
            lambda replies: [r["epsilon"] for r in replies],
            "numbers without names: the answers arrive in another order in each round. Return a dict by name.",
        ),
        Wrong(
            lambda replies: {r["name"]: sum(r["epsilon"] for r in replies) / len(replies) for r in replies},
            "the names are there, but each has the same mean. Give every client its own ε.",
        ),
        Wrong(lambda replies: {r["name"]: (r["epsilon"], r["loss"]) for r in replies}, _LOSS),
        Wrong(lambda replies: {r["name"]: r["records"] for r in replies}, _RECORDS),
        Wrong(lambda replies: [(r["name"], r["epsilon"]) for r in replies], _PAIRS),
        Wrong(
            lambda replies: {r["name"]: round(r["epsilon"], 2) for r in replies},
            "you round ε. Rounded down, it promises more than was kept: report it as it is, or round up.",
        ),
        Wrong(
            lambda replies: {r["name"]: max(r["epsilon"] for r in replies) for r in replies},
            "the names are there, but each has the largest ε of all. True, but it hides what the others have left to "
            "spend. Give every client its own.",
        ),
        Wrong(
            lambda replies: report(replies[:1]),
            "only the first client is there. Go over all the replies, however many there are.",
        ),
        Wrong(
            lambda replies: {name: r["epsilon"] for name, r in zip(("alice", "bob"), replies)},
            "you write the names yourself. Other clients have other names: each reply holds its own.",
        ),
        Wrong(
            lambda replies: {r["name"]: sum(r["epsilon"] for r in replies[:k]) for k, r in enumerate(replies, start=1)},
            "you add up ε from client to client. They have no record in common: give every client its own.",
        ),
    ],
    praise="one number a client, by name. Whoever wants one number for anybody can take the largest of them.",
)

# 7.2: what ε must cover after a crash

STEPS = 16  # a round of the notebook's nodes: 2,000 records, batches of 128


exercise_7_2 = value(
    "7.2",
    hint="A record pays when it is read, not when the result arrives. In how many rounds were alice's records read?",
    answer=5 * STEPS,
    wrong=[
        Wrong(
            4 * STEPS,
            "you left out the round that was killed. Its steps have read the records, and nobody can prove that "
            "nothing of it was sent. The ledger was charged before it began: it counts.",
        ),
        Wrong(
            2 * STEPS,
            "this is what `Context.state` says after the restart: it has forgotten everything before. The records have "
            "not.",
        ),
        Wrong(3 * STEPS, "this is up to the crash. The two rounds after it read the same records again."),
        Wrong(STEPS, "this is one round. ε must cover all that read these records."),
        Wrong(
            6 * STEPS, "you counted the killed round twice. Two finished, one killed, two more: each was charged once."
        ),
        Wrong(5, "these are rounds. ε counts *steps*: each round has 16."),
        Wrong(4, "these are rounds, and one is missing. ε counts *steps*: each round has 16."),
    ],
    praise="5 rounds of 16 steps: two before, the killed one, and two after. The ledger has counted all of them.",
    solution="**80**: 5 · 16. The killed round was charged before it began. It may have been used only in part, so "
    "this can be too much by a few steps. It can't be too little.",
)

# 7.3: the ε of a whole client


def client_level_epsilon(noise_multiplier, clients, sampled, rounds, target_delta):
    """ε of one client: the server samples clients, clips each update, and adds noise to the sum, in each round."""
    return dpteach.epsilon(
        noise_multiplier=noise_multiplier,
        sample_rate=sampled / clients,
        steps=rounds,
        target_delta=target_delta,
        accountant="rdp",
    )


def by(accountant):
    return lambda sigma, clients, sampled, rounds, delta: epsilon(
        noise_multiplier=sigma, sample_rate=sampled / clients, steps=rounds, target_delta=delta, accountant=accountant
    )


def _federation(draw):
    numbers = draw.uniform(0.7, 3), draw.randint(200, 2000), draw.randint(5, 150), draw.randint(2, 60)
    return *numbers, 10 ** draw.uniform(-6, -3.3)


exercise_7_3 = coding(
    "7.3",
    hint='It is notebook 04\'s formula in other words. What is the "record" now, and what is one "step"? Use '
    '`dpteach.epsilon(…, accountant="rdp")`.',
    reference=client_level_epsilon,
    inputs=calls(
        (1.0, 1000, 20, 10, 1e-5),
        (0.8, 200, 50, 30, 1e-4),
        (3.0, 20, 20, 10, 1e-3),
        (2.0, 300, 1, 5, 1e-6),
        *seeded(73, 2, _federation),
    ),
    wrong=[
        Wrong(
            changed(client_level_epsilon, sampled=lambda run: run.clients),
            "with q = 1 every client would be in every round. The server draws some of them: q = sampled / clients.",
        ),
        Wrong(changed(client_level_epsilon, rounds=1), "this is the ε of one round. All rounds see the client again."),
        Wrong(
            lambda *args: args[3] * client_level_epsilon(*args[:3], 1, args[4]),
            "ε does not grow in proportion to the rounds. Give the number of rounds as `steps`, and let the accountant "
            "compose them.",
        ),
        Wrong(
            changed(client_level_epsilon, rounds=lambda run: run.rounds * run.sampled),
            "noise is added once a round, to the sum of all updates. One round is one step.",
        ),
        Wrong(
            changed(client_level_epsilon, noise_multiplier=lambda run: run.noise_multiplier / run.sampled),
            "you divided σ by the number of clients. σ is already the noise on the *sum*, in units of the clipping "
            "norm. Dividing sum and noise together afterwards changes nothing.",
        ),
        Wrong(
            by("prv"),
            'right count, other accountant: these are PRV\'s values. Pass accountant="rdp", so that everyone gets the '
            "same number.",
        ),
        Wrong(
            by("gdp"),
            'right count, but these are GDP\'s values: no bound, and often far too small. Pass accountant="rdp".',
        ),
        Wrong(
            by("rdp-classic"),
            'right count, but with the conversion of 2017, which says more than the run costs. Pass accountant="rdp".',
        ),
        Wrong(
            changed(client_level_epsilon, target_delta=lambda run: 1 / run.clients),
            "you used δ = 1 / clients. A server that publishes one random client's update outright has exactly that δ, "
            "and ε = 0. Use target_delta, which has to be well below it.",
        ),
        Wrong(
            changed(client_level_epsilon, target_delta=1e-5),
            "your ε does not change with target_delta. Without it, `epsilon` takes δ = 1e-5.",
        ),
        Wrong(
            changed(client_level_epsilon, clients=lambda run: run.sampled, sampled=1),
            "your sample_rate is 1 / sampled: the more clients a round has, the smaller. It is the other way round: q "
            "= sampled / clients.",
        ),
        Wrong(
            changed(client_level_epsilon, rounds=lambda run: run.rounds * math.ceil(run.clients / run.sampled)),
            "you counted clients / sampled steps for each round, as if a round were an epoch. The server adds noise "
            "once a round: one round is one step.",
        ),
        Wrong(
            changed(
                client_level_epsilon,
                sampled=lambda run: run.clients,
                rounds=lambda run: math.ceil(run.rounds * run.sampled / run.clients),
            ),
            "you counted only the rounds that a client is expected to be in, at q = 1. Nobody knows which these are, "
            "and chance may choose a client more often: all the rounds, at q = sampled / clients.",
        ),
        Wrong(
            changed(client_level_epsilon, noise_multiplier=lambda run: run.noise_multiplier * run.sampled),
            "you multiplied σ by the number of clients. σ is already the noise on the sum, in units of the clipping "
            "norm.",
        ),
        Wrong(
            changed(client_level_epsilon, noise_multiplier=lambda run: 1 / run.noise_multiplier),
            "you passed 1/σ. `noise_multiplier` is σ itself: more noise, smaller ε.",
        ),
        Wrong(
            changed(client_level_epsilon, sampled=1),
            "q is the probability that *one certain* client takes part: sampled / clients, not 1 / clients.",
        ),
    ],
    praise="the same accountant: a client in the place of a record, a round in the place of a step. That is why many "
    "clients, and few of them in each round, make client-level privacy cheap.",
)

EXERCISES = [exercise_7_1, exercise_7_2, exercise_7_3]
