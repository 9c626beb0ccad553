"""Many runs as one: each is what ``train`` makes of its settings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_mechanism import Replayed
from torch import nn

from dpteach import models, stack
from dpteach.data import Data, two_moons
from dpteach.mechanism import poisson_batches
from dpteach.randomness import generators
from dpteach.stack import train_many
from dpteach.training import Settings, train

MOONS, UNSEEN = two_moons(300), two_moons(200, seed=1)
SHORT = Settings(epochs=2, batch_size=40)


def perceptron(s):
    return models.mlp(2, 8, 2, activation="tanh", seed=s.seed or 0)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def one_by_one(make_model, data, settings, **options):
    """The steps and the weights of a single run."""
    model = make_model(settings)
    return list(train(model, data, settings, **options)), flat(model)


def same_run(stacked, k, steps_of_stack, single, weights=1e-4):
    steps, expected = single
    assert len(steps_of_stack) == len(steps)
    for many, one in zip(steps_of_stack, steps):
        assert (many.step, many.steps, many.epoch) == (one.step, one.steps, one.epoch)
        assert many.losses[k] == pytest.approx(one.loss, abs=1e-4, nan_ok=True)
        assert many.epsilons[k] == pytest.approx(one.epsilon, abs=1e-9)
        assert (many.accuracies is None) == (one.accuracy is None)
        assert one.accuracy is None or many.accuracies[k] == pytest.approx(one.accuracy, abs=0.0051)
    assert float((flat(stacked.model(k)) - expected).abs().max()) <= weights


MODELS = {
    "tanh": perceptron,
    "relu": lambda s: models.mlp(2, 8, 2),
    "deep, no bias, sigmoid": lambda s: nn.Sequential(
        *(torch.manual_seed(3) and [nn.Linear(2, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 4), nn.Linear(4, 2)])
    ),
    "linear": lambda s: nn.Sequential(*(torch.manual_seed(3) and [nn.Linear(2, 2)])),
    "double precision": lambda s: models.mlp(2, 8, 2).double(),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", ["dpsgd", "sgd"])
@pytest.mark.parametrize("name", MODELS)
def test_a_stack_of_one_is_the_run_that_train_makes(name, method, shared):
    data = Data(MOONS.X.double(), MOONS.y) if name == "double precision" else MOONS
    test = Data(UNSEEN.X.double(), UNSEEN.y) if name == "double precision" else UNSEEN
    stacked = train_many(MODELS[name], data, [SHORT], method=method, shared_batches=shared, test_data=test)
    single = one_by_one(MODELS[name], data, SHORT, method=method, test_data=test)
    same_run(stacked, 0, list(stacked), single, weights=1e-5)


THIRTY = [
    Settings(sigma, C, epochs=3, batch_size=45, lr=lr, target_delta=delta, seed=seed)
    for seed, (sigma, C, lr, delta) in enumerate(
        (sigma, C, lr, delta)
        for sigma in (0.0, 0.4, 1.0, 2.0, 4.0)
        for C, lr in ((0.03, 2.0), (0.5, 0.5), (8.0, 0.1))
        for delta in (1e-5, 1e-3)
    )
]


@pytest.mark.parametrize("method", ["dpsgd", "sgd"])
def test_a_stack_of_thirty_is_thirty_runs(method, monkeypatch):
    monkeypatch.setattr(stack, "_CHUNK", 8 * 45 * 7)  # seven together: the last chunk is shorter
    stacked = train_many(perceptron, MOONS, THIRTY, method=method, test_data=UNSEEN)
    steps = list(stacked)
    assert len(stacked) == 30 and len(stacked._chunks(45)) > 3
    for k, s in enumerate(THIRTY):
        same_run(stacked, k, steps, one_by_one(perceptron, MOONS, s, method=method, test_data=UNSEEN))


def test_runs_on_images_are_those_of_train():
    images = Data(torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10)
    runs = [Settings(sigma, 0.5, epochs=2, batch_size=20, seed=k) for k, sigma in enumerate((0.5, 1.0, 3.0))]
    stacked = train_many(lambda s: models.mlp(36, 9, 10, seed=s.seed), images, runs)
    steps = list(stacked)
    for k, s in enumerate(runs):
        same_run(stacked, k, steps, one_by_one(lambda s: models.mlp(36, 9, 10, seed=s.seed), images, s))


def test_an_infinite_clipping_norm_clips_nothing():
    runs = [replace(SHORT, noise_multiplier=0.0, max_grad_norm=C) for C in (math.inf, 0.1)]
    stacked = train_many(perceptron, MOONS, runs)
    steps = list(stacked)
    for k, s in enumerate(runs):
        same_run(stacked, k, steps, one_by_one(perceptron, MOONS, s))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("shared", [False, True])
def test_a_record_that_is_not_finite_or_huge_is_handled_as_train_does(bad, shared):
    X = MOONS.X.clone()
    X[0] = bad  # the first: also what shorter batches could be filled up with
    data = Data(X, MOONS.y)
    runs = [replace(SHORT, seed=k, batch_size=150) for k in range(3)]
    stacked = train_many(perceptron, data, runs, shared_batches=shared)
    steps = list(stacked)
    for k, s in enumerate(runs[:1] if shared else runs):
        expected = one_by_one(perceptron, data, s)[1]
        assert bool(expected.isfinite().all()) and float((flat(stacked.model(k)) - expected).abs().max()) < 1e-4
    assert len(steps) == 4


def test_a_tiny_clipping_norm_goes_the_slow_way_and_is_kept():
    runs = [replace(SHORT, max_grad_norm=C, lr=1e10, epochs=1) for C in (1e-15, 1e-11)]
    stacked = train_many(perceptron, MOONS, runs)
    list(stacked)
    for k, s in enumerate(runs):
        assert float((flat(stacked.model(k)) - one_by_one(perceptron, MOONS, s)[1]).abs().max()) < 1e-4


def test_ignored_labels_count_for_nothing():
    y = MOONS.y.clone()
    y[::3] = -100
    for method in ("dpsgd", "sgd"):
        stacked = train_many(perceptron, Data(MOONS.X, y), [SHORT, SHORT], method=method)
        same_run(stacked, 1, list(stacked), one_by_one(perceptron, Data(MOONS.X, y), SHORT, method=method))


def test_empty_batches_get_noise_and_have_no_loss():
    few = two_moons(4)
    runs = [Settings(epochs=10, batch_size=1, target_delta=0.1, seed=k) for k in range(2)]
    for shared in (False, True):
        stacked = train_many(perceptron, few, runs, shared_batches=shared)
        before, silent = flat(stacked.model(0)), 0
        for step in stacked:
            now = flat(stacked.model(0))
            assert not torch.equal(now, before)
            before, silent = now, silent + bool(np.isnan(step.losses).any())
        assert silent > 3
    assert np.array_equal(np.isnan(step.losses), [np.isnan(step.losses[0])] * 2)  # shared: empty for both


# --- noise and batches ----------------------------------------------------------------------------------------------


def updates(runs, shared=False, data=MOONS):
    """What the first step adds to each run's weights, ``(R, P)``."""
    stacked = train_many(lambda s: models.mlp(2, 8, 2), data, runs, shared_batches=shared)
    next(stacked)
    return torch.stack([flat(stacked.model(k)) for k in range(len(runs))]) - flat(models.mlp(2, 8, 2))


@pytest.mark.parametrize("seeds", [range(400), [None] * 400], ids=["seeded", "from the system"])
def test_the_noise_of_a_stack_has_standard_deviation_sigma_times_c(seeds):
    """The signal is at most C·b, and σ is so large that it does not show."""
    sigma, C, lr, q, n = 1e4, 0.3, 0.7, 1 / 8, 300
    runs = [Settings(sigma, C, epochs=1, batch_size=40, lr=lr, seed=seed) for seed in seeds]
    noise = updates(runs).double() * (n * q) / (lr * sigma * C)
    assert abs(float(noise.std()) - 1) < 4 / math.sqrt(2 * noise.numel())
    assert abs(float(noise.mean())) < 4 / math.sqrt(noise.numel())
    between = torch.corrcoef(noise)  # of any two runs
    between.fill_diagonal_(0)
    assert float(between.abs().max()) < 7 / math.sqrt(noise.shape[1]) and abs(float(between.mean())) < 0.01


def test_each_run_has_noise_of_its_own_sigma_and_c():
    runs = [
        Settings(sigma, C, 1, 40, seed=k) for k, (sigma, C) in enumerate(100 * [(1e4, 1.0), (1e4, 5.0), (6e4, 1.0)])
    ]
    noise = updates(runs).double() * (300 / 8) / 0.5
    for k, scale in enumerate((1e4, 5e4, 6e4)):
        assert float(noise[k::3].std()) == pytest.approx(scale, rel=0.04)


def test_two_runs_of_unlike_seeds_share_neither_batches_nor_noise():
    """Records that point one way each: without noise, an update tells who was in the batch."""
    n = 40
    data, make = Data(torch.eye(n), torch.zeros(n, dtype=torch.int64)), lambda s: nn.Sequential(linear)
    linear = nn.Linear(n, 2, bias=False)
    nn.init.zeros_(linear.weight)
    runs = [Settings(0.0, 1.0, epochs=1, batch_size=20, seed=seed, target_delta=1e-3) for seed in (5, 6, 5)]

    def taken(shared):
        stacked = train_many(make, data, runs, shared_batches=shared)
        next(stacked)
        return [(flat(stacked.model(k)).view(2, n)[0] != 0).nonzero().flatten().tolist() for k in range(3)]

    expected = [next(poisson_batches(n, 0.5, 1, generators(s.seed)[0])).tolist() for s in runs]
    assert taken(shared=False) == expected and expected[0] != expected[1]
    assert taken(shared=True) == [expected[0]] * 3
    noisy = [replace(s, noise_multiplier=1.0) for s in runs]
    for shared in (False, True):
        one, other, again = updates(noisy, shared, Data(torch.zeros(n, 2), data.y))
        assert not torch.equal(one, other) and torch.equal(one, again)


def test_a_stacks_sampling_is_exact_to_q_on_a_grid_of_53_bits():
    cell = 2.0**-53
    streams = (
        Replayed([4 * cell, 5 * cell, 6 * cell, 5 * cell], [0.2499, 0.25]),
        Replayed([0.0, cell, 5 * cell, 1.0], [0.3]),
    )
    taken = stack._chosen(4, 5.25 * cell, streams)
    assert taken.tolist() == [[True, True, False, False], [True, True, False, False]]
    assert stack._chosen(3, 1.0, [torch.Generator()]).all()


def test_a_stack_from_the_systems_random_numbers_is_never_the_same_twice():
    runs = [replace(SHORT, seed=None)] * 2
    first, second = updates(runs), updates(runs)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


# --- what it says ---------------------------------------------------------------------------------------------------


def test_an_autocast_around_the_loop_does_not_reach_the_norms():
    def weights():
        stacked = train_many(perceptron, MOONS, [SHORT, replace(SHORT, max_grad_norm=0.01)])
        list(stacked)
        return stacked._weights

    plain = weights()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weights(), plain)


def test_a_model_of_the_stack_is_a_copy():
    stacked = train_many(perceptron, MOONS, [SHORT, SHORT])
    next(stacked)
    model, before = stacked.model(1), flat(stacked.model(1))
    nn.init.zeros_(model[1].weight)
    assert torch.equal(flat(stacked.model(1)), before) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(IndexError):
        stacked.model(2)


def test_the_makers_own_model_stays_as_it_was():
    mine = models.mlp(2, 8, 2)
    before = flat(mine).clone()
    list(train_many(lambda s: mine, MOONS, [SHORT, SHORT]))
    assert torch.equal(flat(mine), before) and all(p.grad is None for p in mine.parameters())


@pytest.mark.parametrize("name, values", [("epochs", (2, 3)), ("batch_size", (40, 41))])
def test_settings_that_cannot_be_stacked_are_named_with_their_values(name, values):
    runs = [replace(SHORT, **{name: value}) for value in values]
    with pytest.raises(
        ValueError, match=rf"^{name} must be the same for all runs of a stack, got {values[0]}, {values[1]}"
    ):
        train_many(perceptron, MOONS, runs)


@pytest.mark.parametrize(
    "make, layer",
    [
        (lambda s: nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 2)), "Dropout"),
        (lambda s: nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "LayerNorm"),
        (lambda s: nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), "Tanh"),
        (lambda s: nn.Linear(2, 2), "Linear"),
        (lambda s: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "BatchNorm1d"),
    ],
)
def test_a_model_that_is_no_perceptron_is_one_sentence_that_names_the_layer(make, layer):
    with pytest.raises(
        ValueError, match=rf"make_model must make perceptrons: .*got {layer}: call train for each run"
    ) as e:
        train_many(make, MOONS, [SHORT])
    assert "\n" not in str(e.value)


def test_other_bad_input_is_one_sentence():
    images = Data(torch.rand(9, 2, 2), torch.zeros(9, dtype=torch.int64))
    widths = iter((8, 9))
    few = replace(SHORT, batch_size=5)
    for call, message in (
        (lambda: train_many(perceptron, MOONS, []), "settings must hold at least one Settings, got none"),
        (lambda: train_many(perceptron, MOONS, [SHORT], method="opacus"), "method must be one of 'sgd', 'dpsgd', got"),
        (lambda: train_many(perceptron, MOONS, [replace(SHORT, batch_size=400)]), "batch_size must be at most"),
        (
            lambda: train_many(lambda s: models.mlp(2, next(widths), 2), MOONS, [SHORT, SHORT]),
            r"make_model must make models of one shape, got Linear\(in_features=2, out_features=9.* for run 1, and",
        ),
        (lambda: train_many(lambda s: nn.Sequential(nn.Linear(4, 2)), images, [few]), "begin with nn.Flatten, for rec"),
        (
            lambda: train_many(lambda s: perceptron(s).half(), MOONS, [SHORT]),
            "torch.float32 or torch.float64, got torch.f",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_delta_of_one_over_n_is_warned_of_once():
    runs = [replace(SHORT, target_delta=0.01, seed=k) for k in range(3)]
    with pytest.warns(UserWarning, match="target_delta should be below 1/n") as said:
        train_many(perceptron, MOONS, runs)
    assert len(said) == 1
