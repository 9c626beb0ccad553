"""Private workers and their average: what each spends, what is drawn anew, what the average is."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import in_one_test
from torch import nn

from dpteach import models
from dpteach.accounting import Ledger, epsilon
from dpteach.data import split, two_moons
from dpteach.experiments import load, two_workers_run
from dpteach.federated import Round, Worker, WorkerStep, federated_average, train_rounds, train_steps
from dpteach.training import Settings, train

SETTINGS = Settings(noise_multiplier=1.2, epochs=1, batch_size=50, lr=0.5)
MOONS, TEST = two_moons(400), two_moons(300, seed=9)


def pair(settings=SETTINGS, names=("alice", "bob"), **more):
    parts = split(MOONS, len(names), **more)
    return [Worker(name, part, settings) for name, part in zip(names, parts)]


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("names", [("alice",), ("alice", "bob"), ("a", "b", "c"), tuple("abcdefghij")])
def test_every_workers_epsilon_is_that_of_its_own_steps_over_all_rounds(names):
    workers = pair(dataclasses.replace(SETTINGS, batch_size=20), names)
    rounds = list(train_rounds(workers, models.mlp(), 3, test_data=TEST))
    per_round = math.ceil(len(workers[0].data) / 20)
    for made in rounds:
        for worker in workers:
            alone = epsilon(
                noise_multiplier=1.2, sample_rate=1 / per_round, steps=made.round * per_round, accountant="rdp"
            )
            assert made.epsilons[worker.name] == pytest.approx(alone, rel=1e-9)
    assert [made.round for made in rounds] == [1, 2, 3] and 0 <= rounds[-1].accuracy <= 1


def test_workers_with_other_sizes_and_noise_spend_other_amounts():
    alice, bob = (
        Worker(name, part, dataclasses.replace(SETTINGS, noise_multiplier=sigma))
        for name, part, sigma in zip(("alice", "bob"), split(MOONS, 2, weights=[3, 1]), (1.5, 1.1))
    )
    *_, made = train_rounds([alice, bob], models.mlp(), 2)
    assert made.epsilons["alice"] == pytest.approx(
        epsilon(noise_multiplier=1.5, sample_rate=1 / 6, steps=12, accountant="rdp")
    )
    assert made.epsilons["bob"] == pytest.approx(
        epsilon(noise_multiplier=1.1, sample_rate=1 / 2, steps=4, accountant="rdp")
    )


def test_a_second_run_on_the_same_records_adds_up():
    workers = pair()
    *_, first = train_rounds(workers, models.mlp(), 2)
    *_, second = train_rounds(workers, models.mlp(), 1)
    assert second.epsilons["alice"] > first.epsilons["alice"]
    assert workers[0].ledger.steps == 3 * workers[0].steps_per_round


def test_a_round_is_charged_before_its_first_step():
    worker = pair()[0]
    steps = worker.train_round(models.mlp())
    assert worker.ledger.steps == worker.steps_per_round
    next(steps)
    steps.close()  # killed in the middle
    assert worker.ledger.steps == worker.steps_per_round
    assert worker.epsilon("rdp") == pytest.approx(
        epsilon(noise_multiplier=1.2, sample_rate=1 / 4, steps=4, accountant="rdp")
    )


def test_nothing_is_charged_before_the_first_round_is_asked_for():
    workers = pair()
    made = train_rounds(workers, models.mlp(), 2)
    assert workers[0].ledger.steps == 0
    next(made)
    assert workers[0].ledger.steps == workers[0].steps_per_round


def test_a_damaged_ledger_stops_the_worker_before_it_trains(tmp_path):
    path = tmp_path / "bob.json"
    worker = Worker("bob", MOONS, SETTINGS, Ledger(path, new=True))
    path.write_text("{")
    model = models.mlp()
    before = flat(model).clone()
    with pytest.raises(ValueError, match="is not a readable ledger"):
        worker.train_round(model)
    assert torch.equal(flat(model), before)


def test_no_noise_is_drawn_twice_by_another_worker_or_in_another_round():
    alike = [Worker(name, MOONS, SETTINGS) for name in ("alice", "bob")]

    def trained(worker):
        model = models.mlp()
        list(worker.train_round(model))
        return flat(model)

    results = [
        trained(alike[0]),
        trained(alike[1]),
        trained(alike[0]),
        trained(Worker("alice", MOONS, dataclasses.replace(SETTINGS, seed=1))),
    ]
    assert all(not torch.allclose(a, b) for k, a in enumerate(results) for b in results[:k])
    assert torch.equal(trained(Worker("alice", MOONS, SETTINGS)), results[0])  # but the whole can be repeated


def test_a_worker_trains_as_train_does():
    worker = pair()[0]
    model = models.mlp()
    steps = list(worker.train_round(model))
    assert [s.step for s in steps] == [1, 2, 3, 4] == [s.step for s in train(models.mlp(), worker.data, SETTINGS)]
    assert {s.epsilon for s in steps} == {worker.epsilon("rdp")}


def test_a_worker_without_noise_or_without_privacy_spends_everything():
    for worker in (
        Worker("a", MOONS, dataclasses.replace(SETTINGS, noise_multiplier=0)),
        Worker("a", MOONS, SETTINGS, method="sgd"),
    ):
        list(worker.train_round(models.mlp()))
        assert worker.epsilon() == math.inf


@pytest.mark.parametrize("method", ["dpsgd", "opacus"])
def test_both_private_methods_spend_the_same_and_learn(method):
    workers = [
        Worker(name, part, Settings(0.8, epochs=2, batch_size=50, lr=2.0), method=method)
        for name, part in zip(("alice", "bob"), split(two_moons(1000), 2))
    ]
    *_, made = train_rounds(workers, models.mlp(), 5, test_data=TEST)
    assert made.accuracy > 0.85
    assert made.epsilons["alice"] == pytest.approx(
        epsilon(noise_multiplier=0.8, sample_rate=0.1, steps=100, accountant="rdp")
    )


def test_the_turns_hold_the_same_rounds_and_every_step_of_every_worker():
    made = list(train_steps(pair(), models.mlp(), 2))
    assert [t for t in made if isinstance(t, Round)] == list(train_rounds(pair(), models.mlp(), 2))
    turns = [(t.round, t.worker, t.step.step) for t in made if isinstance(t, WorkerStep)]
    assert turns == [(r, w, s) for r in (1, 2) for s in (1, 2, 3, 4) for w in ("alice", "bob")]


def test_a_delta_of_one_over_n_is_warned_of_where_the_call_stands_and_not_by_the_steps_of_a_picture():
    settings = dataclasses.replace(SETTINGS, target_delta=0.01)
    sentence = "should be below 1/n = 0.005 for 200 records, got 0.01"
    alice, bob = pair(settings)
    with pytest.warns(UserWarning, match=sentence) as of_a_round:
        list(alice.train_round(models.mlp()))
    with pytest.warns(UserWarning, match=sentence) as of_rounds:
        list(train_rounds([alice, bob], models.mlp(), 2))
    assert [w.filename for w in (*of_a_round, *of_rounds)] == [__file__] * 3
    plain = Worker("c", MOONS, settings, method="sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(train_steps([alice, bob], models.mlp(), 1))
        list(train_rounds([plain], models.mlp(), 1))
    assert alice.ledger.count == 4


def test_the_model_becomes_the_weighted_average_of_the_workers():
    workers = pair(weights=[3, 1])
    start = models.mlp()
    apart = []
    for worker in copy.deepcopy(workers):
        model = copy.deepcopy(start)
        list(worker.train_round(model))
        apart.append(flat(model))
    for weights, shares in (("size", (0.75, 0.25)), ("equal", (0.5, 0.5))):
        model = copy.deepcopy(start)
        list(train_rounds(copy.deepcopy(workers), model, 1, weights=weights))
        assert torch.allclose(flat(model), shares[0] * apart[0] + shares[1] * apart[1], atol=1e-6)


def test_an_empty_batch_does_not_make_a_rounds_loss_nan():
    worker = Worker("tiny", MOONS.take(30), Settings(1.0, max_grad_norm=0.1, epochs=5, batch_size=1, lr=0.1))
    losses = [t.step.loss for t in train_steps([worker], models.mlp(), 1) if isinstance(t, WorkerStep)]
    *_, made = train_rounds([Worker("tiny", worker.data, worker.settings)], models.mlp(), 1)
    assert any(map(math.isnan, losses)) and math.isfinite(made.losses["tiny"])


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=5))
def test_an_average_of_equal_models_is_that_model(weights):
    model = nn.Linear(2, 2)
    averaged = federated_average([model] * len(weights), weights)
    assert all(torch.allclose(averaged[name], value, rtol=1e-5) for name, value in model.state_dict().items())


def test_the_average_keeps_a_counters_type():
    averaged = federated_average([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    assert averaged["num_batches_tracked"] == 0 and averaged["num_batches_tracked"].dtype == torch.int64


@in_one_test(
    "call, sentence",
    [
        (lambda: federated_average([]), "models must hold at least one model, got none"),
        (
            lambda: federated_average([nn.Linear(1, 1)] * 2, [1]),
            "weights must hold one number for each of the 2 models",
        ),
        (lambda: federated_average([nn.Linear(1, 1)] * 2, [0, 0]), "not all zero"),
        (lambda: federated_average([nn.Linear(1, 1)], [-1]), "weights must be a number >= 0"),
        (
            lambda: federated_average([nn.Linear(1, 1), nn.Linear(2, 1)]),
            "models must have the same names and shapes, got a model 1 .*'weight'",
        ),
        (lambda: federated_average([nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))]), "hand in model._module"),
        (lambda: train_rounds([], models.mlp(), 1), "workers must be at least one"),
        (
            lambda: train_rounds(pair(names=("a", "b")) + pair(names=("a",)), models.mlp(), 1),
            "a name of its own, got .*'a', 'b', 'a'",
        ),
        (lambda: train_rounds(pair(), models.mlp(), 0), "rounds must be a whole number >= 1, got 0"),
        (
            lambda: train_rounds(pair(), models.mlp(), 1, weights="loss"),
            "weights must be one of 'size', 'equal', got 'loss'",
        ),
        (lambda: Worker("", MOONS, SETTINGS), "name must be a text that is not empty, got ''"),
        (
            lambda: Worker("bob", MOONS.take(10), SETTINGS),
            "batch_size must be at most the number of records .10., got 50",
        ),
    ],
)
def test_bad_input_is_one_error_at_the_call(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_small_run_of_the_two_workers_gives_its_stored_rows_again():
    stored = [r for r in load("two-workers") if r["n"] == 2000]
    again = list(two_workers_run(2000, 2))
    assert len(stored) == len(again) == 4
    for old, new in zip(stored, again):
        assert old["worker"] == new["worker"] and old["records"] == new["records"]
        assert math.isclose(old["loss"], new["loss"], abs_tol=5e-3)
        assert math.isclose(old["accuracy"], new["accuracy"], abs_tol=0.01)
        for name in ("epsilon_prv", "epsilon_rdp", "epsilon_classic"):
            assert math.isclose(old[name], new[name], rel_tol=1e-3)


def test_the_blogs_setting_in_full_reaches_what_the_notebook_says_of_it():
    whole = [
        r
        for r in load("two-workers")
        if r["n"] == 60_000 and r["worker"] == "alice" and r["sizes"] == "1:1" and r["skew"] == 0
    ]
    assert [round(r["epsilon_classic"], 2) for r in whole] == [
        0.86,
        0.9,
        0.93,
        0.97,
        1.01,
    ]  # q = 1/235; with 128/30000: 0.94
    assert whole[-1]["accuracy"] > 0.87 and whole[-1]["records"] == 30_000
