"""The quick sums of clipped gradients against the slow one, layer by layer, over random shapes."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from dpteach import bookkeeping, models
from dpteach.bookkeeping import clipped_sum_of_layers, plain_layers
from dpteach.mechanism import clip, clipped_sum_and_losses, per_sample_gradients, sample_losses
from dpteach.perceptrons import clipped_sum_by_hand

few, yes_no = st.integers(1, 4), st.booleans()


def spans(draw, n):
    """Kernel, stride, padding, dilation along ``n`` dimensions, and a size that they fit into."""
    kernel, stride, padding, dilation, more = (
        [draw(st.integers(low, high)) for _ in range(n)] for low, high in ((1, 3), (1, 3), (0, 2), (1, 2), (0, 3))
    )
    sizes = [max(1, d * (k - 1) + 1 - 2 * p) + m for k, p, d, m in zip(kernel, padding, dilation, more)]
    return tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), sizes


def convolution(draw, kind, n):
    kernel, stride, padding, dilation, sizes = spans(draw, n)
    channels = draw(few)
    return kind(channels, draw(few), kernel, stride, padding, dilation, bias=draw(yes_no)), (channels, *sizes)


def layer_norm(draw):
    shape = [draw(few) for _ in range(draw(st.integers(1, 3)))]
    normalized = shape[-draw(st.integers(1, len(shape))) :]
    eps, affine = draw(st.sampled_from([1e-5, 0.1])), draw(yes_no)
    return nn.LayerNorm(normalized, eps, elementwise_affine=affine, bias=draw(yes_no)), tuple(shape)


def group_norm(draw):
    groups, each = draw(few), draw(st.integers(2, 4))  # nothing is left of a group of one number
    more = [draw(few) for _ in range(draw(st.integers(0, 2)))]
    eps = draw(st.sampled_from([1e-5, 0.1]))
    return nn.GroupNorm(groups, groups * each, eps, affine=draw(yes_no)), (groups * each, *more)


def embedding(draw):
    words = draw(st.integers(2, 5))
    padding = draw(st.sampled_from([None, 0, words - 1, -1]))
    return nn.Embedding(words, draw(few), padding_idx=padding), tuple(draw(few) for _ in range(draw(st.integers(0, 2))))


def linear(draw, places):
    features = draw(few)
    shape = (*(draw(few) for _ in range(places)), features)
    return nn.Linear(features, draw(few), bias=draw(yes_no)), shape


LAYERS = {
    "linear": lambda draw: linear(draw, 0),
    "linear at many places": lambda draw: linear(draw, draw(st.integers(1, 2))),
    "conv1d": lambda draw: convolution(draw, nn.Conv1d, 1),
    "conv2d": lambda draw: convolution(draw, nn.Conv2d, 2),
    "embedding": embedding,
    "layer norm": layer_norm,
    "group norm": group_norm,
}


@st.composite
def models_with(draw, name):
    """A model in double precision with this layer in it, and a way to make n records for it."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer, shape = LAYERS[name](draw)

    def records(n):
        if name == "embedding":
            return torch.randint(layer.num_embeddings, (n, *shape))
        return torch.randn(n, *shape, dtype=torch.float64)

    layer = layer.double()
    outputs = layer(records(2)).flatten(1).shape[1]
    for p in layer.parameters():
        nn.init.normal_(p)
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(outputs, 3)).double(), records


def slow(model, X, y, C):
    grads = per_sample_gradients(model, F.cross_entropy, X, y)
    losses = F.cross_entropy(model(X), y, reduction="none").detach() if len(X) else torch.zeros(0, dtype=grads.dtype)
    return clip(grads, C).sum(0), losses


def quick(model, X, y, C):
    return clipped_sum_of_layers(plain_layers(model), X, lambda outputs: sample_losses(F.cross_entropy, outputs, y), C)


def middle(model, X, y):
    """A C that clips some and leaves some."""
    C = float(per_sample_gradients(model, F.cross_entropy, X, y).norm(dim=1).median())
    assume(C > 1e-6)
    return C


def near(a, b):
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=12)
@given(st.data())
def test_each_layers_quick_sum_is_the_slow_one(name, data):
    model, records = data.draw(models_with(name))
    for batch in (1, 3):
        X, y = records(batch), torch.arange(batch) % 3
        C = middle(model, X, y)
        taken = quick(model, X, y, C)
        assert taken is not None, "the quick way was not taken"
        assert near(taken, slow(model, X, y, C)) and near(
            clipped_sum_and_losses(model, F.cross_entropy, X, y, C), taken
        )
    nothing = clipped_sum_and_losses(model, F.cross_entropy, records(0), torch.zeros(0, dtype=torch.int64), 1.0)
    assert near(nothing, slow(model, records(0), torch.zeros(0, dtype=torch.int64), 1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
@settings(max_examples=3)
@given(st.data())
def test_a_record_that_is_not_finite_leaves_no_trace_in_the_others_sum(name, bad, data):
    model, records = data.draw(models_with(name))
    X, y = records(3), torch.arange(3)
    C = middle(model, X, y)
    X[1].view(-1)[data.draw(st.integers(0, X[1].numel() - 1))] = bad
    summed, losses = clipped_sum_and_losses(model, F.cross_entropy, X, y, C)
    assert near((summed,), (slow(model, X, y, C)[0],))
    if not per_sample_gradients(model, F.cross_entropy, X, y)[1].isfinite().all():  # relu and the like may forgive
        others = slow(model, X[[0, 2]], y[[0, 2]], C)
        assert near((summed, losses[[0, 2]]), others)


@pytest.mark.parametrize("batch", [3, 4, 5, 8, 9])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "linear at many places"])
@settings(max_examples=5)
@given(st.data())
def test_a_batch_of_about_a_chunk_or_two_is_summed_whole(name, batch, data):
    model, records = data.draw(models_with(name))
    X, y = records(batch), torch.arange(batch) % 3
    C, layer, whole = middle(model, X, y), model[0], bookkeeping._CHUNK
    places = model[:1](X).shape
    a_record = layer.weight[0].numel() * (layer.out_features if isinstance(layer, nn.Linear) else math.prod(places[2:]))
    try:
        bookkeeping._CHUNK = 4 * a_record  # chunks of four
        assert near(quick(model, X, y, C), slow(model, X, y, C))
    finally:
        bookkeeping._CHUNK = whole


@st.composite
def perceptrons(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    widths = [draw(st.sampled_from([1, 2, 5, 17, 70]))] + [
        draw(st.integers(2, 5)) for _ in range(draw(st.integers(1, 3)))
    ]
    layers = [nn.Flatten()] if draw(yes_no) else []
    for a, b in zip(widths, widths[1:]):
        layers.append(nn.Linear(a, b, bias=draw(yes_no)))
        behind = draw(st.sampled_from([None, nn.ReLU, nn.Tanh, nn.Sigmoid]))
        layers += [behind()] if behind else []
    return nn.Sequential(*layers).double(), widths[0], widths[-1]


@settings(max_examples=25)
@given(perceptrons(), st.sampled_from([1, 3, 20]), yes_no)
def test_a_perceptrons_sum_by_hand_is_the_slow_one(drawn, batch, ignored):
    model, inputs, classes = drawn
    X, y = torch.randn(batch, inputs, dtype=torch.float64), torch.randint(classes, (batch,))
    if ignored:
        y[batch // 2] = -100
    for C in (0.1, 1.0, math.inf):
        taken = clipped_sum_by_hand(plain_layers(model), X, y, C)
        assert taken is not None and near(taken, slow(model, X, y, C))
        assert near(clipped_sum_and_losses(model, F.cross_entropy, X, y, C), taken)


@pytest.mark.parametrize("width", [32, 64, 65, 130])
def test_a_perceptrons_sum_by_hand_is_the_slow_one_in_single_precision(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, width), nn.Tanh(), nn.Linear(width, 4))
    X, y = torch.randn(50, 40), torch.randint(4, (50,))
    for C in (0.1, 1.0):
        assert near(clipped_sum_by_hand(plain_layers(model), X, y, C), slow(model, X, y, C))


def test_a_perceptron_is_left_to_another_way_where_the_hand_does_not_reach():
    model, X, y = models.mlp(4, 5, 3), torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    layers = plain_layers(model)
    assert clipped_sum_by_hand(layers, X, y, 1.0) is not None
    assert clipped_sum_by_hand(layers, X.half(), y, 1.0) is None
    assert clipped_sum_by_hand(layers, X, F.one_hot(y, 3).float(), 1.0) is None  # probabilities as targets
    assert clipped_sum_by_hand(plain_layers(models.cnn()), torch.rand(2, 1, 28, 28), y[:2], 1.0) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert clipped_sum_by_hand(layers, X, y, 1.0) is None
    for hostile in (math.nan, math.inf, 1e30):
        assert (
            clipped_sum_by_hand(layers, torch.cat([X, torch.full((1, 4), hostile)]), torch.cat([y, y[:1]]), 1.0) is None
        )


@pytest.mark.parametrize("label", [3, -1, 1000])
def test_a_label_that_is_no_class_is_an_error_as_ever(label):
    with pytest.raises(IndexError, match="out of bounds"):
        clipped_sum_and_losses(models.mlp(4, 5, 3), F.cross_entropy, torch.randn(2, 4), torch.tensor([0, label]), 1.0)


@pytest.mark.parametrize("way", ["by hand", "by layers"])
def test_a_gradient_whose_squares_vanish_in_single_precision_is_clipped_by_the_quick_sums(way):
    """The scores' gradient is some 1e-26, the record 1e18: their product is 1e-8, and the bound 1e-11."""
    layer = nn.Linear(1, 32)  # 32: squares are added in single precision
    nn.init.zeros_(layer.bias)
    nn.init.zeros_(layer.weight)
    layer.weight.data[0] = 6e-17
    model, X, y = nn.Sequential(layer), torch.tensor([[1e18]]), torch.tensor([0])
    taken = clipped_sum_by_hand([layer], X, y, 1e-11) if way == "by hand" else quick(model, X, y, 1e-11)
    assert taken is not None and float(taken[0].double().norm()) <= 1e-11


def test_a_hook_on_a_parameter_is_seen_before_the_quick_way_is_taken():
    model = models.mlp(4, 5, 3)
    model[1].weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="hooks on its parameters"):
        clipped_sum_and_losses(model, F.cross_entropy, torch.randn(2, 4), torch.tensor([0, 1]), 1.0)


MEMORY = r"""
import re, torch
import torch.nn.functional as F
from dpteach import models
from dpteach.mechanism import clipped_sum
torch.set_num_threads(1)
model, X, y = models.{model}, torch.rand(1024, 1, 28, 28), torch.arange(1024) % 10
def kilobytes(name):
    return int(re.search(name + r":\s+(\d+)", open("/proc/self/status").read())[1])
clipped_sum(model, F.cross_entropy, X[:32], y[:32], 1.0)
before = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the highest mark is taken anew
clipped_sum(model, F.cross_entropy, X, y, 1.0)
print((kilobytes("VmHWM") - before) / (4 * sum(p.numel() for p in model.parameters())))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux can say how high memory went")
@pytest.mark.parametrize("model, most", [("cnn()", 1.25), ("mlp(784, 128, 10)", 0.1)])
def test_the_quick_sum_takes_no_more_memory_than_the_matrix_of_gradients(model, most):
    code = MEMORY.format(model=model)  # with all activations, which are a good part of it
    share = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0 < share <= most
