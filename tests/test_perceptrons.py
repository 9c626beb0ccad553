"""A perceptron's clipped sum by hand against the slow one; what both quick ways must hold; what they take of memory."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpteach import models
from dpteach.bookkeeping import clipped_sum_of_layers, plain_layers
from dpteach.mechanism import clip, clipped_sum_and_losses, per_sample_gradients, sample_losses
from dpteach.perceptrons import clipped_sum_by_hand

yes_no = st.booleans()


def slow(model, X, y, C):
    grads = per_sample_gradients(model, F.cross_entropy, X, y)
    losses = F.cross_entropy(model(X), y, reduction="none").detach() if len(X) else torch.zeros(0, dtype=grads.dtype)
    return clip(grads, C).sum(0), losses


def quick(model, X, y, C):
    return clipped_sum_of_layers(plain_layers(model), X, lambda outputs: sample_losses(F.cross_entropy, outputs, y), C)


def near(a, b):
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(a, b, strict=True))


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
        assert near(taken, quick(model, X, y, C))
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
    assert way == "by layers" or taken is not None
    taken = taken or clipped_sum_and_losses(
        model, F.cross_entropy, X, y, 1e-11
    )  # the layers leave it to the general way
    assert float(taken[0].double().norm()) <= 1e-11


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
@pytest.mark.parametrize("model, most", [("cnn()", 1.5), ("mlp(784, 128, 10)", 0.1)])
def test_the_quick_sum_takes_hardly_more_memory_than_the_matrix_of_gradients(model, most):
    code = MEMORY.format(model=model)  # with all activations; the allocator makes it 1.2 to 1.35, by chance
    share = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0 < share <= most
