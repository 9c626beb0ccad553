"""The quick sum of clipped gradients, layer by layer, against the slow way: a loop over the samples."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpteach import bookkeeping, mechanism
from dpteach.mechanism import clipped_sum_and_losses

size = st.integers(1, 5)
yes = st.booleans()


@st.composite
def convolutions(draw, kind):
    """A convolution, and the shape of one sample that it takes."""
    dims = 1 if kind is nn.Conv1d else 2
    kernel, stride, dilation, padding = ([draw(st.integers(low, 3)) for _ in range(dims)] for low in (1, 1, 1, 0))
    along = [draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 9)) for k, d, p in zip(kernel, dilation, padding)]
    layer = kind(draw(size), draw(size), kernel, stride, padding, dilation, bias=draw(yes))
    return layer, (layer.in_channels, *along)


@st.composite
def linears(draw):
    layer = nn.Linear(draw(size), draw(size), bias=draw(yes))
    return layer, (*draw(st.lists(size, max_size=2)), layer.in_features)


def moved(model, X, record, C):
    """How far the record moves the sum of the others', in C."""
    both = torch.cat([X, record])
    sums = [mechanism.clipped_sum(model, F.cross_entropy, rows, torch.ones(len(rows)).long(), C) for rows in (X, both)]
    return float((sums[1] - sums[0]).double().norm()) / C


@pytest.mark.parametrize("size", [1e8, 1e11, 1e14])
def test_a_record_whose_places_cancel_does_not_wipe_out_the_others(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten(), nn.Linear(3, 2))
    record = torch.zeros(1, 1, 4, 4)
    record[0, 0, 0], record[0, 0, 3] = size, -size
    X = (3 * torch.randn(1, 1, 4, 4)).expand(1000, -1, -1, -1).contiguous()
    assert bookkeeping.plain_layers(model) and moved(model, X, record, 1.0) < 1.01


def test_a_record_that_is_huge_where_its_gradient_is_tiny_is_clipped():
    for dtype, size, weight, C in ((torch.float64, 1e153, 1.9e-151, 2e-12), (torch.float32, 1e38, 1e-37, 1.4e-7)):
        model = nn.Sequential(nn.Linear(1, 2)).to(dtype)
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[weight], [0.0]]))
            model[0].bias.zero_()
        X, record = torch.zeros(3, 1, dtype=dtype), torch.full((1, 1), size, dtype=dtype)
        for sign in (-1, 1):
            assert moved(model, X, sign * record, C) < 1.01


def test_a_norm_over_the_first_dimension_mixes_the_batch_and_is_refused_without_parameters_too():
    model = nn.Sequential(nn.LayerNorm((50, 2), elementwise_affine=False), nn.Linear(2, 2))
    with pytest.raises((ValueError, RuntimeError)):  # the general way, whose probe has fewer records
        mechanism.clipped_sum(model, F.cross_entropy, torch.randn(50, 2), torch.ones(50).long(), 1.0)


@st.composite
def layer_norms(draw):
    shape = draw(st.lists(size, min_size=1, max_size=2))
    layer = nn.LayerNorm(shape, draw(st.sampled_from([1e-5, 0.1])), elementwise_affine=draw(yes), bias=draw(yes))
    return layer, (*draw(st.lists(size, max_size=2)), *shape)


@st.composite
def group_norms(draw):
    groups = draw(st.integers(1, 3))
    eps = draw(st.sampled_from([1e-5, 0.1]))
    layer = nn.GroupNorm(groups, groups * draw(st.integers(1, 3)), eps, affine=draw(yes))
    return layer, (layer.num_channels, *draw(st.lists(st.integers(2, 4), min_size=1, max_size=2)))


@st.composite
def embeddings(draw):
    layer = nn.Embedding(draw(st.integers(2, 6)), draw(size), padding_idx=draw(st.sampled_from([None, 0, 1])))
    return layer, tuple(draw(st.lists(size, max_size=2)))


LAYERS = {
    "Linear": linears(),
    "Conv1d": convolutions(nn.Conv1d),
    "Conv2d": convolutions(nn.Conv2d),
    "LayerNorm": layer_norms(),
    "GroupNorm": group_norms(),
    "Embedding": embeddings(),
}


def stack_of(layer, shape, batch, dtype, generator):
    """The layer with a head of three classes behind it, and a batch that it takes."""
    if isinstance(layer, nn.Embedding):
        X = torch.randint(layer.num_embeddings, (batch, *shape), generator=generator)
    else:
        X = torch.randn(batch, *shape, generator=generator, dtype=dtype)
    layer = layer.to(dtype)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=dtype)
    width = layer(X[:1] if batch else torch.zeros(1, *shape, dtype=X.dtype))[0].numel()
    head = nn.Linear(width, 3, dtype=dtype)
    y = torch.randint(3, (batch,), generator=generator)
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head), X, y


def by_a_loop(model, X, y, C):
    """The sum, one sample after the other; what is not finite counts as zero."""
    trained, total = list(model.parameters()), torch.zeros(sum(p.numel() for p in model.parameters()))
    for x, target in zip(X, y):
        loss = F.cross_entropy(model(x.unsqueeze(0)), target.unsqueeze(0))
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained, materialize_grads=True)]).double()
        if grad.isfinite().all():
            total = total + grad * min(1.0, C / max(float(grad.norm()), 1e-30))
    return total


@pytest.mark.parametrize("name", LAYERS)
def test_the_quick_sum_is_that_of_a_loop_for_every_layer_of_any_shape(name, monkeypatch):
    general, way = [], mechanism._gradients_and_losses
    monkeypatch.setattr(mechanism, "_gradients_and_losses", lambda *args: general.append(1) or way(*args))

    @settings(max_examples=30)
    @given(LAYERS[name], st.sampled_from([0, 1, 3, 7]), st.sampled_from([torch.float32, torch.float64]), st.data())
    def check(case, batch, dtype, data):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        model, X, y = stack_of(*case, batch, dtype, generator)
        C = data.draw(st.sampled_from([0.1, 1.0, 100.0]))
        monkeypatch.setattr(bookkeeping, "_CHUNK", data.draw(st.sampled_from([1, 40, 1 << 19])))
        summed, losses = clipped_sum_and_losses(model, F.cross_entropy, X, y, C)
        assert torch.allclose(summed.double(), by_a_loop(model, X, y, C).double(), atol=1e-5, rtol=1e-5)
        assert torch.allclose(losses, F.cross_entropy(model(X), y, reduction="none"), atol=1e-5)
        assert batch == 0 or general == [], "book-keeping gave this layer up"
        general.clear()

    check()


@pytest.mark.parametrize("name", ["Linear", "Conv1d", "Conv2d", "LayerNorm", "GroupNorm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_record_that_is_not_finite_leaves_the_other_two_as_they_are(name, bad):
    @settings(max_examples=10)
    @given(LAYERS[name], st.integers(0, 2), st.integers(0, 1000))
    def check(case, which, seed):
        model, X, y = stack_of(*case, 3, torch.float32, torch.Generator().manual_seed(seed))
        X[which] = bad
        summed, _ = clipped_sum_and_losses(model, F.cross_entropy, X, y, 1.0)
        rest = [k for k in range(3) if k != which]
        alone, _ = clipped_sum_and_losses(model, F.cross_entropy, X[which : which + 1], y[which : which + 1], 1.0)
        others = by_a_loop(model, X[rest], y[rest], 1.0)
        assert bool(summed.isfinite().all())
        assert torch.allclose(summed.double(), others + alone.double(), atol=2e-5)
        assert float(alone.double().norm()) <= 1 + 1e-6

    check()


@pytest.mark.parametrize("records", [1, 31, 32, 33, 64, 65])
def test_no_record_is_lost_or_taken_twice_at_the_edge_of_a_chunk(records, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    X, y = torch.randn(records, 1, 8, 8), torch.randint(3, (records,))
    monkeypatch.setattr(bookkeeping, "_CHUNK", 32 * 9 * 36)  # 32 records: 9 numbers in the kernel, 36 places
    summed, _ = clipped_sum_and_losses(model, F.cross_entropy, X, y, 0.5)
    assert torch.allclose(summed.double(), by_a_loop(model, X, y, 0.5), atol=1e-5)


def test_no_clipped_gradient_is_longer_than_c_where_float32_adds_millions_of_squares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20_000, 64), nn.Linear(64, 2))
    X = torch.randn(2, 20_000) * torch.logspace(-3, 3, 20_000)
    for k in range(2):
        summed, _ = clipped_sum_and_losses(model, F.cross_entropy, X[k : k + 1], torch.tensor([1]), 1e-3)
        assert float(summed.double().norm()) <= 1e-3 * (1 + 1e-7)


@pytest.mark.parametrize("C", [1e-6, 1e-9])
def test_squares_that_vanish_in_float32_do_not_let_a_record_past_c(C):
    """Gradients of 1e-23 at the outputs, whose squares float32 does not hold, times an input of 1e18: about 1e-4."""
    model = nn.Sequential(nn.Linear(64, 32))
    model[0].weight.data.zero_()
    model[0].bias.data = torch.cat([torch.tensor([53.0]), torch.zeros(31)])
    X, y = torch.full((1, 64), 1e18), torch.tensor([0])
    grads = mechanism.per_sample_gradients(model, F.cross_entropy, X, y)
    assert float(grads.double().norm()) > 10 * C
    summed, _ = clipped_sum_and_losses(model, F.cross_entropy, X, y, C)
    assert float(summed.double().norm()) <= C * (1 + 1e-6)


def test_a_layer_that_holds_another_parameter_or_couples_its_words_goes_the_slow_way():
    extra = nn.Linear(2, 2)
    extra.more = nn.Parameter(torch.zeros(1))
    for layer in (extra, nn.Embedding(4, 2, scale_grad_by_freq=True), nn.Conv2d(2, 2, 1, groups=2)):
        assert bookkeeping.plain_layers(nn.Sequential(layer)) is None
