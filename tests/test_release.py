"""The release path: random numbers of the operating system, and what a seed must never do twice."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.utils import parameters_to_vector

from dpteach import models, randomness
from dpteach.data import Data, two_moons
from dpteach.federated import Worker
from dpteach.mechanism import add_noise, poisson_batches
from dpteach.randomness import SystemRandom
from dpteach.training import METHODS, Settings, train

MOONS = two_moons(60, seed=1)
SETTINGS = Settings(epochs=2, batch_size=20, noise_multiplier=1.0, seed=None)

private_methods = pytest.mark.parametrize("method", ["dpsgd", "opacus"])


def weights(model):
    return parameters_to_vector(model.parameters()).detach().clone()


def test_system_numbers_are_uniform_and_normal():
    random = SystemRandom()
    assert stats.kstest(random.uniform(100_000).numpy(), "uniform").pvalue > 1e-4
    for n in (0, 1, 2, 3, 100_001):
        assert random.normal(n).shape == (n,) and random.normal(n).dtype == torch.float64
    draws = random.normal(200_000)
    assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-4
    first, second = draws.split(100_000)  # a pair of them comes from one radius and one angle
    assert abs(float((first * second).mean())) < 5 / math.sqrt(100_000)
    assert abs(float((first.square() * second.square()).mean()) - 1) < 5 * math.sqrt(8 / 100_000)


def test_the_largest_system_number_is_finite(monkeypatch):
    """No logarithm of zero, and no normal number beyond 12.2."""
    monkeypatch.setattr("os.urandom", lambda n: b"\xff" * n)
    assert bool(SystemRandom().normal(4).isfinite().all()) and float(SystemRandom().uniform(1)) < 1
    monkeypatch.setattr("os.urandom", lambda n: b"\x00" * n)
    assert SystemRandom().normal(2).tolist() == pytest.approx([math.sqrt(2 * 106 * math.log(2)), 0.0])


def test_the_tail_of_the_system_normals_has_no_gaps(monkeypatch):
    """A radius from a uniform number below 2⁻²⁰ gets 53 bits more: with one grid of 2⁻⁵³ few radii would be left out there."""
    random, asked = SystemRandom(), []
    draws = iter([torch.tensor([3 * 2.0**-53, 0.25], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)])
    monkeypatch.setattr(SystemRandom, "uniform", lambda self, n: asked.append(n) or next(draws))
    cosine, sine = random.normal(2).tolist()
    assert asked == [2, 1]
    assert math.hypot(cosine, sine) == pytest.approx(math.sqrt(-2 * math.log(3.5 * 2.0**-53)), rel=1e-12)


def test_noise_of_the_system_has_standard_deviation_sigma_times_c_on_the_sum():
    summed = torch.linspace(-5, 5, 200_000)
    noised = add_noise(summed, 2.5, 0.4, SystemRandom())
    assert noised.dtype == torch.float32
    assert float((noised - summed).std()) == pytest.approx(1.0, rel=4 / math.sqrt(400_000))


def test_batches_of_the_system_are_poisson():
    sizes = torch.tensor([float(len(batch)) for batch in poisson_batches(500, 0.1, 2000, SystemRandom())])
    assert float(sizes.mean()) == pytest.approx(50, abs=0.6)
    assert float(sizes.var()) == pytest.approx(45, rel=0.15)


@private_methods
def test_a_run_without_a_seed_never_repeats_whatever_the_seeds_around_it(method):
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        model = models.mlp()
        list(train(model, MOONS, SETTINGS, method=method))
        results.append(weights(model))
    assert all(not torch.allclose(a, b) for k, a in enumerate(results) for b in results[:k])


@private_methods
def test_a_run_without_a_seed_asks_no_generator_of_pytorch(monkeypatch, method):
    def refuse(*args, **kwargs):
        raise AssertionError("a random number that does not come from the system")

    model = models.mlp()
    steps = train(model, MOONS, SETTINGS, method=method)
    next(steps)  # before it, a probe draws
    for name in ("rand", "randn", "randperm", "normal"):
        monkeypatch.setattr(torch, name, refuse)
    assert len(list(steps)) == 5


@private_methods
def test_noise_of_a_run_without_a_seed_has_the_standard_deviation_that_epsilon_assumes(method):
    data = Data(torch.zeros(40, 1, 28, 28), torch.arange(40) % 10)
    settings = Settings(noise_multiplier=50.0, max_grad_norm=0.02, epochs=1, batch_size=12, lr=0.1, seed=None)
    model = models.cnn()
    before = weights(model)
    next(train(model, data, settings, method=method))
    assert float((weights(model) - before).std()) == pytest.approx(
        0.1 * 50.0 * 0.02 / 10, rel=4 / math.sqrt(2 * 26_010)
    )


def test_a_worker_without_a_seed_draws_anew(tmp_path):
    def trained():
        model = models.mlp()
        list(Worker("alice", MOONS, SETTINGS).train_round(model))
        return weights(model)

    assert not torch.allclose(trained(), trained())


# --- seeds, for lessons
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dropout_draws_from_the_runs_own_stream(method):
    def run(elsewhere):
        torch.manual_seed(elsewhere)
        model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        before = torch.get_rng_state()
        list(train(model, MOONS, replace(SETTINGS, seed=3), method=method))
        assert torch.equal(torch.get_rng_state(), before)  # what the reader draws next is what it would have been
        return weights(model)

    assert torch.equal(run(1), run(2))


def test_dropout_draws_anew_in_each_step():
    model = nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    masks = []
    model[1].register_forward_hook(lambda m, args, out: masks.append(out == 0))
    data = Data(MOONS.X[:1].repeat(60, 1), MOONS.y[:1].repeat(60))
    list(train(model, data, replace(SETTINGS, seed=3, batch_size=60), method="sgd"))
    assert len(masks) == 2 and not torch.equal(*masks)


def test_two_workers_with_one_ledger_never_get_one_stream(tmp_path):
    """The stream belongs to the charge, and the ledger gives each charge its number under its lock."""
    seeds = set()
    for name in ("a", "b", "a\0", "a\x00\x00"):
        worker = Worker(name, MOONS, replace(SETTINGS, seed=5))
        seeds |= {worker._seed_of(charge) for charge in range(5)}
    assert len(seeds) == 20


def test_sampling_noise_and_dropout_have_streams_of_their_own():
    seeds = [s for seed in range(50) for s in randomness.seeds(seed)]
    assert len(set(seeds)) == 150
