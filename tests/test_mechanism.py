import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import in_one_test
from scipy import stats
from torch import nn
from torch.nn.utils import prune

from dpteach import mechanism, models
from dpteach.mechanism import (
    add_noise,
    clip,
    clipped_sum,
    clipped_sum_and_losses,
    per_sample_gradients,
    poisson_batches,
)
from dpteach.randomness import SystemRandom

SLACK = 1e-5  # what float32 may round away, relative to C

# --- one record's influence -----------------------------------------------------------------------------------------

P = 6
anything = st.floats(width=32, allow_nan=True, allow_infinity=True)
ordinary = st.floats(-1e4, 1e4, width=32)


def rows(elements, least=1):
    arrays = st.integers(least, 5).flatmap(lambda n: hnp.arrays(np.float32, (n, P), elements=elements))
    return arrays.map(torch.from_numpy)


clipping_norms = st.floats(1e-3, 1e3)


def clipped_total(grads, C):
    return clip(grads, C).double().sum(0)  # in double, so that only the clipping is measured


def mean_clipped_total(grads, C):
    return clip(grads.mean(0, keepdim=True), C).double().sum(0) * len(grads)


def influence(total, grads, record, C):
    """How far one more record moves the total."""
    return float((total(torch.cat([grads, record]), C) - total(grads, C)).norm())


@given(rows(anything), rows(anything), clipping_norms)
def test_one_record_moves_the_clipped_sum_by_at_most_c(grads, records, C):
    assert influence(clipped_total, grads, records[:1], C) <= C * (1 + SLACK)


@given(rows(anything), rows(anything, least=2), clipping_norms)
def test_replacing_one_record_moves_the_clipped_sum_by_at_most_2c(grads, records, C):
    one, other = (clipped_total(torch.cat([grads, record]), C) for record in (records[:1], records[1:2]))
    assert float((one - other).norm()) <= 2 * C * (1 + SLACK)


def test_replacing_one_record_can_move_the_clipped_sum_by_more_than_c():
    record = torch.full((1, P), 5.0)
    assert float((clipped_total(record, 1.0) - clipped_total(-record, 1.0)).norm()) == pytest.approx(2.0)


def test_clipping_the_mean_gradient_would_not_bound_one_record():
    grads, outlier = torch.zeros(99, P), torch.full((1, P), 1e6)
    assert influence(clipped_total, grads, outlier, 1.0) <= 1 + SLACK
    assert influence(mean_clipped_total, grads, outlier, 1.0) > 50  # the same yardstick sees the broken mechanism


@given(rows(ordinary), clipping_norms)
def test_clip_leaves_short_gradients_alone_and_shortens_the_others_to_c_without_turning_them(grads, C):
    norms = grads.double().norm(dim=1, keepdim=True)
    clipped = clip(grads, C)
    short = (norms <= C * (1 - SLACK)).squeeze(1)
    assert torch.equal(clipped[short], grads[short])
    wanted = grads.double() * (C / norms).clamp(max=1)
    assert torch.allclose(clipped.double(), wanted.nan_to_num(), rtol=SLACK, atol=SLACK * C)


@in_one_test("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero_and_harms_no_other(bad):
    grads = torch.tensor([[3.0, 4.0], [bad, bad], [0.0, 0.5]])
    assert torch.equal(clip(grads, 1.0)[1], torch.zeros(2))
    assert torch.equal(clip(grads, 1.0)[[0, 2]], clip(grads[[0, 2]], 1.0))


@in_one_test("size", [3e19, 1e30, 3e38])
def test_a_gradient_that_is_huge_but_finite_is_clipped_and_not_dropped(size):
    for grads in (
        torch.full((1, 6), size),
        torch.full((1, 6), size, dtype=torch.float64),
        torch.full((1, 6), 1e307, dtype=torch.float64),
    ):
        for C in (1.0, 1e-6):
            assert float(clip(grads, C).double().norm()) == pytest.approx(C, rel=1e-5)


@in_one_test("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@in_one_test("C", [1e-20, 1e-12, 1e-6, 1.0, 1e4])
@in_one_test("P", [1, 1000, 1_000_000])
def test_no_row_is_longer_than_c_after_clipping_at_any_size_and_precision(P, C, dtype):
    generator = torch.Generator().manual_seed(P)
    for scale in (1e-6 if dtype == torch.float16 else 1e-22, 1.0, 6e4 if dtype == torch.float16 else 1e30):
        rows = (torch.rand(3, P, generator=generator, dtype=torch.float64) * scale).to(dtype)
        assert bool((clip(rows, C).double().norm(dim=1) <= C).all())


def test_no_row_is_longer_than_c_after_clipping_25_million_numbers():
    assert float(clip(torch.rand(1, 25_000_000), 1.0).double().norm()) <= 1.0


@in_one_test("shape", [(6,), (4, 3, 5), ()])
def test_clip_takes_one_flattened_gradient_a_row_only(shape):
    with pytest.raises(ValueError, match=r"per_sample_grads must have shape \(B, P\).*use flatten\(1\)"):
        clip(torch.ones(shape), 1.0)


def test_a_crafted_record_does_not_pass_the_quick_sum_with_more_than_c():
    """X = 1e19 and weights of zero: norms that overflow float32, and factors that it can hardly hold."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    for p in model.parameters():
        nn.init.zeros_(p)
    for x in (1e10, 1e19, 1e30, 3e38):
        for C in (1e-20, 1e-6, 1.0):
            X, y = torch.full((1, 4), x), torch.tensor([0])
            assert float(clipped_sum(model, F.cross_entropy, X, y, C).double().norm()) <= C


def test_a_record_whose_squares_vanish_in_float32_is_clipped_by_the_quick_sum():
    model = nn.Sequential(nn.Linear(4_000_000, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    summed = clipped_sum(model, F.cross_entropy, torch.full((1, 4_000_000), 1e-22), torch.tensor([0]), 1e-20)
    assert float(summed.double().norm()) == pytest.approx(1e-20, rel=1e-5) and float(summed.double().norm()) <= 1e-20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "custom module", "stride, padding, dilation"])
def test_a_model_of_half_precision_is_clipped_in_float32(name, dtype):
    model, X, y, _ = setup(name, batch=64)
    model, X = model.to(dtype), X.to(dtype)
    for C in (0.01, 1.0):
        summed = clipped_sum(model, F.cross_entropy, X, y, C)
        assert summed.dtype == torch.float32
        for k in range(3):
            moved = summed - clipped_sum(
                model, F.cross_entropy, torch.cat([X[:k], X[k + 1 :]]), torch.cat([y[:k], y[k + 1 :]]), C
            )
            assert float(moved.norm()) <= C * (1 + SLACK)


def test_infinite_c_clips_nothing():
    grads = torch.randn(5, 7) * 1e6
    assert torch.equal(clip(grads, math.inf), grads)


# --- models of every kind -------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(x + self.first(x).tanh())


def shared_layer():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(5, 3))


def tied_weight():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


def frozen_parameter():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    return model


def pruned():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    prune.l1_unstructured(model[0], "weight", 7)
    return model


def on_images(make_first, features, bias=True):
    return lambda: nn.Sequential(make_first(), nn.Tanh(), nn.Flatten(), nn.Linear(features, 3, bias=bias))


# name -> (model, shape of a record, does it go by book-keeping)
MODELS = {
    "cnn relu": (models.cnn, (1, 28, 28), True),
    "cnn tanh": (lambda: models.cnn(activation="tanh"), (1, 28, 28), True),
    "mlp": (lambda: models.mlp(5, 8, 3), (5,), True),
    "mlp tanh": (lambda: models.mlp(5, 8, 3, activation="tanh"), (5,), True),
    "no bias": (on_images(lambda: nn.Conv2d(2, 3, 3, bias=False), 48, bias=False), (2, 6, 6), True),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.ReLU()), nn.Linear(4, 3)), (5,), True),
    "stride, padding, dilation": (
        on_images(lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (2, 1), (1, 2)), 72),
        (2, 6, 6),
        True,
    ),
    "frozen batch norm": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(),
        (5,),
        False,
    ),
    "custom module": (Residual, (5,), False),
    "custom module in a sequence": (lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh(), Residual()), (5,), False),
    "shared layer": (shared_layer, (5,), False),
    "tied weight": (tied_weight, (5,), False),
    "in-place relu": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), (5,), False),
    "frozen parameter": (frozen_parameter, (5,), False),
    "pruned": (pruned, (5,), False),
    "group norm": (
        on_images(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), 64),
        (2, 6, 6),
        True,
    ),
    "grouped convolution": (on_images(lambda: nn.Conv2d(2, 4, 3, groups=2), 64), (2, 6, 6), False),
    "padding by name": (on_images(lambda: nn.Conv2d(2, 2, 3, padding="same"), 72), (2, 6, 6), False),
    "circular padding": (
        on_images(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 72),
        (2, 6, 6),
        False,
    ),
    "linear at many places": (on_images(lambda: nn.Linear(5, 5), 25), (5, 5), True),
}

every_model = pytest.mark.parametrize("name", MODELS)


def setup(name, batch=5):
    torch.manual_seed(0)
    make, shape, bookkeeping = MODELS[name]
    model = make()
    X, y = torch.randn(batch, *shape), torch.arange(batch) % 3
    return model, X, y, bookkeeping


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def gradients_by_a_loop(model, loss_fn, X, y):
    """The reference: autograd, one sample after the other."""
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = (loss_fn(model(X[i : i + 1]), y[i : i + 1]) for i in range(len(X)))
    return torch.stack([flat(torch.autograd.grad(loss, trained)) for loss in losses])


def clip_by_hand(grads, C):
    return grads * (C / grads.norm(dim=1, keepdim=True)).clamp(max=1)


@every_model
def test_per_sample_gradients_are_those_of_each_sample_alone(name):
    model, X, y, _ = setup(name)
    grads = per_sample_gradients(model, F.cross_entropy, X, y)
    assert torch.allclose(grads, gradients_by_a_loop(model, F.cross_entropy, X, y), atol=1e-5)


@every_model
def test_the_mean_of_the_per_sample_gradients_is_the_batch_gradient(name):
    model, X, y, _ = setup(name)
    batch = flat(torch.autograd.grad(F.cross_entropy(model(X), y), [p for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(per_sample_gradients(model, F.cross_entropy, X, y).mean(0), batch, atol=1e-5)


@every_model
def test_clipped_sum_is_the_sum_of_the_clipped_per_sample_gradients(name, monkeypatch):
    model, X, y, bookkeeping = setup(name)
    grads = gradients_by_a_loop(model, F.cross_entropy, X, y)
    C = float(grads.norm(dim=1).median())  # some are clipped, some are not
    general = []
    way = mechanism._gradients_and_losses
    monkeypatch.setattr(mechanism, "_gradients_and_losses", lambda *args: general.append(1) or way(*args))

    summed, losses = clipped_sum_and_losses(model, F.cross_entropy, X, y, C)

    assert bool(general) != bookkeeping, "the way taken is not the one that this model is here to test"
    assert torch.allclose(summed, clip_by_hand(grads, C).sum(0), atol=1e-5)
    assert torch.allclose(clipped_sum(model, F.cross_entropy, X, y, C), summed, atol=1e-6)
    assert torch.allclose(losses, F.cross_entropy(model(X), y, reduction="none"), atol=1e-5)


@every_model
def test_clipped_sum_leaves_the_model_as_it_was(name):
    model, X, y, _ = setup(name)
    before = [(p, p.detach().clone()) for p in model.parameters()]
    summed, losses = clipped_sum_and_losses(model, F.cross_entropy, X, y, 1.0)
    assert not summed.requires_grad and not losses.requires_grad
    for (p, value), now in zip(before, model.parameters(), strict=True):
        assert now is p and torch.equal(p, value) and p.grad is None


# A loss that sums, weights or counts over the batch could let one record change what another is weighted with.
WEIGHTS = torch.tensor([100.0, 1.0, 0.01])
LOSSES = {
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "class weights, sum": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
    "times the batch size": lambda outputs, y: len(outputs) ** 2 * F.cross_entropy(outputs, y),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "custom module"])
def test_a_loss_that_couples_the_batch_is_still_taken_one_sample_at_a_time(name, loss):
    model, X, y, _ = setup(name)
    grads = gradients_by_a_loop(model, LOSSES[loss], X, y)
    C = float(grads.norm(dim=1).median())
    summed, losses = clipped_sum_and_losses(model, LOSSES[loss], X, y, C)
    assert torch.allclose(summed, clip_by_hand(grads, C).sum(0), rtol=1e-4, atol=1e-5 * C)
    assert torch.allclose(losses, torch.stack([LOSSES[loss](model(x[None]), t[None]) for x, t in zip(X, y)]), atol=1e-5)


@in_one_test("loss", [F.cross_entropy, *LOSSES.values()])
@pytest.mark.parametrize(
    "name", ["mlp", "stride, padding, dilation", "custom module", "group norm", "linear at many places"]
)
def test_no_record_however_hostile_moves_the_clipped_sum_of_a_model_by_more_than_c(name, loss):
    model, X, y, _ = setup(name)
    C = 0.1
    without = clipped_sum(model, loss, X[1:], y[1:], C)
    for hostile in (X[0], 1e4 * X[0], 1e18 * X[0], 1e38 * X[0], math.inf * X[0], math.nan * X[0]):
        for target in (0, 2):
            X_with, y_with = torch.cat([hostile[None], X[1:]]), torch.cat([torch.tensor([target]), y[1:]])
            moved = clipped_sum(model, loss, X_with, y_with, C) - without
            assert float(moved.norm()) <= C * (1 + SLACK)  # NaN fails this too


# --- what cannot be made private, and nothing at all ----------------------------------------------------------------


@pytest.mark.parametrize(
    "way", [per_sample_gradients, lambda *args: clipped_sum(*args, 1.0)], ids=["per_sample_gradients", "clipped_sum"]
)
@pytest.mark.parametrize("batch", [4, 0])
def test_batch_norm_in_training_is_refused(way, batch):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"model must treat each sample alone, got BatchNorm1d at '1'.*Use GroupNorm"):
        way(model, F.cross_entropy, torch.randn(batch, 5), torch.zeros(batch, dtype=torch.int64))


def test_batch_norm_without_running_statistics_is_refused_in_evaluation_too():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="mixes the samples"):
        clipped_sum(model, F.cross_entropy, torch.randn(4, 5), torch.zeros(4, dtype=torch.int64), 1.0)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        clipped_sum(nn.Flatten(), F.cross_entropy, torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cnn relu", "mlp", "custom module", "frozen parameter"])
def test_an_empty_batch_has_zeros_for_a_sum_and_no_rows(name, dtype):
    model, X, y, _ = setup(name)
    model, X, y = model.to(dtype), X[:0].to(dtype), y[:0]
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    summed, losses = clipped_sum_and_losses(model, F.cross_entropy, X, y, 1.0)
    rows = per_sample_gradients(model, F.cross_entropy, X, y)
    assert summed.tolist() == [0.0] * size and losses.shape == (0,) and rows.shape == (0, size)
    assert {summed.dtype, losses.dtype, rows.dtype} == {dtype}
    assert clip(torch.zeros(0, size), 1.0).shape == (0, size)


# --- noise ----------------------------------------------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sigma, C", [(2.5, 0.4), (0.5, 30.0), (1.0, 1e-3)])
def test_noise_on_the_sum_is_gaussian_with_standard_deviation_sigma_times_c(sigma, C):
    summed = torch.linspace(-5, 5, 200_000)
    noise = (add_noise(summed, sigma, C, generator()).double() - summed.double()) / (sigma * C)
    # Four standard errors; the addition to a float32 sum rounds, which the smallest σ·C shows first.
    assert abs(float(noise.std()) - 1) < 4 / math.sqrt(2 * len(noise))
    assert abs(float(noise.mean())) < 4 / math.sqrt(len(noise))
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3


def test_noise_is_independent_over_coordinates_and_over_steps():
    stream = generator()
    draws = torch.stack([add_noise(torch.zeros(8), 1.0, 1.0, stream) for _ in range(20_000)])
    assert float((draws.T.cov() - torch.eye(8)).abs().max()) < 5 / math.sqrt(20_000) * math.sqrt(2)
    assert abs(float((draws[1:] * draws[:-1]).mean())) < 5 / math.sqrt(draws.numel())


def test_an_empty_batch_gets_noise():
    assert bool((add_noise(torch.zeros(50), 1.0, 1.0, generator()) != 0).all())


def test_without_sigma_nothing_is_added_and_the_sum_is_not_the_caller_s_own():
    summed = torch.randn(5)
    for C in (1.0, math.inf):
        noised = add_noise(summed, 0.0, C)
        assert torch.equal(noised, summed) and noised.data_ptr() != summed.data_ptr()


def test_noise_repeats_with_its_seed_only():
    zeros = torch.zeros(5)
    assert torch.equal(add_noise(zeros, 1.0, 1.0, generator(3)), add_noise(zeros, 1.0, 1.0, generator(3)))
    assert not torch.equal(add_noise(zeros, 1.0, 1.0, generator(3)), add_noise(zeros, 1.0, 1.0, generator(4)))


# --- Poisson sampling -----------------------------------------------------------------------------------------------


def taken(n, q, steps, seed=0):
    """``(steps, n)`` of 0 and 1: who takes part when."""
    mask = torch.zeros(steps, n)
    for step, batch in enumerate(poisson_batches(n, q, steps, generator(seed))):
        mask[step, batch] = 1
    return mask


def test_every_record_takes_part_in_a_step_with_probability_q():
    steps, q = 4000, 0.1
    counts = taken(500, q, steps).sum(0)
    deviations = (counts - steps * q) / math.sqrt(steps * q * (1 - q))
    assert float(deviations.abs().max()) < 6  # no record is favoured
    assert abs(float(deviations.square().mean()) - 1) < 0.3  # and none is rationed, as by shuffling: that gives 0


def test_the_batch_size_varies_as_a_binomial_does():
    n, q = 500, 0.1
    sizes = taken(n, q, 4000).sum(1)
    assert abs(float(sizes.mean()) - n * q) < 0.5
    assert float(sizes.var()) == pytest.approx(n * q * (1 - q), rel=0.12)  # a shuffled batch of fixed size: 0


def test_steps_do_not_depend_on_each_other():
    mask = taken(500, 0.1, 4000)
    for lag in (1, 9):  # in a shuffled epoch of 10 steps, nobody comes twice
        assert float((mask[lag:] * mask[:-lag]).mean()) == pytest.approx(0.01, rel=0.05)


def test_an_epoch_of_poisson_sampling_touches_63_percent_of_the_records():
    touched = taken(50_000, 1 / 100, 100).any(0).double().mean()
    assert float(touched) == pytest.approx(1 - math.exp(-1), abs=0.01)
    assert float(touched) == pytest.approx(1 - 0.99**100, abs=4 * math.sqrt(0.63 * 0.37 / 50_000))


def test_empty_batches_occur_as_often_as_they_should():
    empty = (taken(20, 0.1, 5000).sum(1) == 0).double().mean()
    assert float(empty) == pytest.approx(0.9**20, abs=4 * math.sqrt(0.12 * 0.88 / 5000))


def test_poisson_batches_repeat_with_their_seed_only():
    assert torch.equal(taken(50, 0.3, 20, seed=1), taken(50, 0.3, 20, seed=1))
    assert not torch.equal(taken(50, 0.3, 20, seed=1), taken(50, 0.3, 20, seed=2))


@settings(max_examples=30)
@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 6))
def test_a_batch_lists_records_once_in_order_and_there_are_as_many_batches_as_asked_for(n, q, steps):
    batches = list(poisson_batches(n, q, steps, generator()))
    assert len(batches) == steps
    for batch in batches:
        assert batch.dtype == torch.int64 and batch.dim() == 1
        assert set(batch.tolist()) <= set(range(n)) and batch.tolist() == sorted(set(batch.tolist()))


class Replayed(SystemRandom):
    """Uniform numbers that are given; they are asked for in this order."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def uniform(self, n):
        given = torch.tensor(self.draws.pop(0), dtype=torch.float64)
        assert len(given) == n
        return given


def test_sampling_is_exact_to_q_on_a_grid_of_53_bits():
    """Below its cell a number is taken, above it is not, and within it another draw decides with what is left of q."""
    cell = 2.0**-53
    q = 5.25 * cell
    (batch,) = poisson_batches(4, q, 1, Replayed([4 * cell, 5 * cell, 6 * cell, 5 * cell], [0.2499, 0.25]))
    assert batch.tolist() == [0, 1]
    (batch,) = poisson_batches(2, cell * cell / 2, 1, Replayed([0.0, cell], [0.0], [0.4]))  # q below the grid, twice
    assert batch.tolist() == [0]
    (batch,) = poisson_batches(
        3, 1 / 3, 1, Replayed([1 / 3 - cell, 1 / 3, 1 / 3 + cell])
    )  # q on the grid: no other draw
    assert batch.tolist() == [0]


@pytest.mark.parametrize("q", [6e-9, 1e-5, 0.3])
def test_a_small_sample_rate_is_not_rounded_up(q):
    n = 4_000_000
    steps = 25 if q < 1e-6 else 5
    taken_ = sum(len(batch) for batch in poisson_batches(n, q, steps, generator(1)))
    assert abs(taken_ - n * steps * q) < 5 * math.sqrt(n * steps * q) + 3


def test_at_sample_rate_one_everybody_takes_part():
    assert all(batch.tolist() == list(range(30)) for batch in poisson_batches(30, 1.0, 20))


# --- arguments ------------------------------------------------------------------------------------------------------

NOT_NUMBERS = [math.nan, True, "1", None]


@in_one_test("value", [0, -1.0, *NOT_NUMBERS])
def test_clipping_norms_that_clip_nothing_or_everything_are_refused(refuses, value):
    model, X, y, _ = setup("mlp")
    for call in (
        lambda: clip(torch.ones(2, 3), value),
        lambda: clipped_sum(model, F.cross_entropy, X, y, value),
        lambda: clipped_sum(model, F.cross_entropy, X[:0], y[:0], value),
        lambda: add_noise(torch.zeros(3), 1.0, value),
    ):
        with refuses("max_grad_norm", value):
            call()


@in_one_test("value", [1e-21, 1e-300, 5e-324])
def test_clipping_norms_that_float32_cannot_hold_gradients_for_are_refused(refuses, value):
    with refuses("max_grad_norm", value):
        clip(torch.ones(2, 3), value)


@in_one_test("value", [-0.1, math.inf, *NOT_NUMBERS])
def test_noise_multipliers_that_are_no_sigma_are_refused(refuses, value):
    with refuses("noise_multiplier", value):
        add_noise(torch.zeros(3), value, 1.0)


def test_noise_for_an_unbounded_gradient_is_refused():
    with pytest.raises(ValueError, match="max_grad_norm must be finite where noise_multiplier > 0, got inf"):
        add_noise(torch.zeros(3), 1.0, math.inf)


@in_one_test(
    "name, value",
    [
        *(("n", v) for v in (0, -1, 1.5, math.inf, *NOT_NUMBERS)),
        *(("sample_rate", v) for v in (0, -0.1, 1.1, *NOT_NUMBERS)),
        *(("steps", v) for v in (-1, 0.5, math.inf, *NOT_NUMBERS)),
    ],
)
def test_poisson_batches_refuses_bad_arguments_when_called(refuses, name, value):
    with refuses(name, value):
        poisson_batches(**{"n": 10, "sample_rate": 0.5, "steps": 3, name: value})
