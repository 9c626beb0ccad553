"""Nothing but the noisy gradient moves a model, and nothing else of the records leaves with it."""

import copy
import io
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from dpteach import guards, models
from dpteach.data import Data, two_moons
from dpteach.federated import Worker, federated_average, train_rounds
from dpteach.mechanism import clipped_sum, clipped_sum_and_losses, per_sample_gradients
from dpteach.training import METHODS, OPTIMIZERS, Settings, train

MOONS = two_moons(60, seed=1)
SETTINGS = Settings(epochs=2, batch_size=20, noise_multiplier=50.0, lr=0.5)

private_methods = pytest.mark.parametrize("method", ["dpsgd", "opacus"])


def linear():
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))


def run(model, method="dpsgd", optimizer="sgd", settings=SETTINGS, data=MOONS):
    return list(train(model, data, settings, method=method, optimizer=optimizer))


# --- stale gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["train", "train_round"])
def test_a_frozen_parameter_with_a_stale_gradient_stays_to_the_bit(way, method, optimizer):
    model = linear()
    F.cross_entropy(model(MOONS.X), MOONS.y).backward()  # the private gradient, without clipping and noise
    model[0].weight.requires_grad_(False)
    before, trained = model[0].weight.clone(), model[2].weight.clone()
    if way == "train":
        run(model, method, optimizer)
    else:
        list(Worker("a", MOONS, SETTINGS, method=method, optimizer=optimizer).train_round(model))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[2].weight, trained)
    assert model[0].weight.grad is None  # it is gone, so that it does not leave with the model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@private_methods
def test_a_stale_gradient_does_not_move_a_trained_parameter(method, optimizer):
    with_stale, without = linear(), None
    without = copy.deepcopy(with_stale)
    (1e6 * F.cross_entropy(with_stale(MOONS.X), MOONS.y)).backward()
    for model in (with_stale, without):
        run(model, method, optimizer)
    assert torch.equal(parameters_to_vector(with_stale.parameters()), parameters_to_vector(without.parameters()))


@private_methods
def test_a_parameter_that_is_frozen_in_the_middle_of_a_run_stays_from_there_on(method):
    if method == "opacus":
        pytest.skip("Opacus refuses it")
    model = linear()
    steps = train(model, MOONS, SETTINGS, method=method)
    next(steps)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    list(steps)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("when", ["paused", "given up", "finished"])
@private_methods
def test_no_gradient_leaves_with_the_model(method, when):
    """Opacus keeps the clipped sum without its noise on each parameter, and ``torch.save(model)`` would pickle it."""
    model = linear()
    clean = linear()
    steps = train(model, MOONS, SETTINGS, method=method)
    next(steps)
    if when == "given up":
        steps.close()
    elif when == "finished":
        list(steps)
    for p, q in zip(model.parameters(), clean.parameters()):
        assert p.grad is None
        assert all(value is None for name, value in vars(p).items() if name in ("grad_sample", "summed_grad"))
        if when != "paused":
            assert vars(p).keys() == vars(q).keys()
    if when != "paused":
        saved = io.BytesIO()
        torch.save(model, saved)
        again = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
        assert all(vars(p) == {} for p in again.parameters())


# --- what a model keeps of its records --------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Passes its input on, and keeps something of it."""

    def __init__(self, how):
        super().__init__()
        self.how, self.seen, self.log, self.book = how, torch.zeros(2), [], {}
        self.first, self.total, self.place = None, 0.0, SimpleNamespace()
        self.register_buffer("mean", torch.zeros(2))
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        with torch.no_grad():
            if self.how == "buffer":
                self.mean.copy_(x.detach()[0])
            elif self.how == "new buffer":
                self.mean = x.detach()[0].clone()
            elif self.how == "parameter":
                self.weight.add_(x.detach().mean(0))
            elif self.how == "attribute":
                self.seen = x.detach()[-1].clone()
            elif self.how == "list":
                self.log.append(x.detach().clone())
            elif self.how == "dict":
                self.book["last"] = x.detach().clone()
            elif self.how == "first pass" and self.first is None:
                self.first = x.detach().mean(0)
            elif self.how == "float":
                self.total = (
                    self.total + float(x.detach().sum()) if not torch._C._functorch.is_batchedtensor(x) else 0.0
                )
            elif self.how == "array":
                self.first = x.detach().numpy().copy()
            elif self.how == "object":
                self.place.kept = x.detach()[0].tolist()
            elif self.how == "new parameter" and self.first is None:
                self.first = nn.Parameter(x.detach()[0].clone(), requires_grad=False)
        return x * self.weight


@pytest.mark.parametrize(
    "how, name",
    [
        ("buffer", "mean"),
        ("new buffer", "mean"),
        ("parameter", "weight"),
        ("attribute", "seen"),
        ("list", "log"),
        ("dict", "book"),
        ("first pass", "first"),
        ("float", "total"),
        ("array", "first"),
        ("object", "place"),
        ("new parameter", "first"),
    ],
)
@private_methods
def test_a_model_that_keeps_something_of_its_records_is_refused_and_left_as_it_was(method, how, name):
    model = nn.Sequential(Keeps(how), nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"forward pass changes .0.{name}.*no noise covers it"):
        train(model, MOONS, SETTINGS, method=method)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "layer",
    [nn.InstanceNorm1d(1, track_running_stats=True), nn.BatchNorm1d(1), nn.SyncBatchNorm(1), nn.LazyBatchNorm1d()],
    ids=lambda layer: type(layer).__name__,
)
@private_methods
def test_layers_with_running_statistics_are_refused_by_name(method, layer):
    model = nn.Sequential(nn.Unflatten(1, (1, 2)), layer, nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must .*Norm.*at '1'"):
        train(model, MOONS, SETTINGS, method=method)


@private_methods
def test_an_embedding_that_rescales_the_rows_it_looks_up_is_refused(method):
    words = Data(torch.randint(0, 9, (20, 3)), torch.arange(20) % 2)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match="Embedding at '0' with max_norm"):
        train(model, words, SETTINGS, method=method)


class LateBuffer(nn.Module):
    """Behaves for a while: no probe sees it."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        if self.calls > 3:
            self.kept = self.kept + 1
        return x * self.weight


def test_a_buffer_that_moves_later_stops_the_run_and_is_put_back():
    model = nn.Sequential(LateBuffer(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a training step changed '0.kept'"):
        run(model)
    assert model[0].kept.tolist() == [0, 0]


def test_a_model_whose_buffers_stand_still_trains():
    model = nn.Sequential(Keeps("nothing"), nn.Linear(2, 2))
    model[0].mean[0] = math.nan  # equal to itself, here
    assert len(run(model)) == 6


def test_an_average_does_not_carry_buffers_out_unseen():
    a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    assert torch.equal(federated_average([a, b])["running_mean"], torch.zeros(2))
    b.running_mean += 3
    with pytest.raises(ValueError, match="same buffers, got different ones at 'running_mean'.*no noise covers"):
        federated_average([a, b])


def test_an_average_leaves_a_frozen_parameter_to_the_bit():
    a = nn.Linear(50, 50)
    averaged = federated_average([a, copy.deepcopy(a), copy.deepcopy(a)], [0.3, 0.1, 0.7])
    assert torch.equal(averaged["weight"], a.weight)


# --- layers that mix samples ------------------------------------------------------------------------------------------


class Center(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class BySize(nn.Module):
    def forward(self, x):
        return x / len(x)


class Neighbour(nn.Module):
    def forward(self, x):
        return x + 1e-3 * x.roll(1, 0)


class CenterInTraining(Center):
    def forward(self, x):
        return super().forward(x) if self.training else x


class CenterWithNoise(Center):
    """Draws in training, so that its outputs differ anyway; at rest it shows."""

    def forward(self, x):
        return super().forward(x) + (torch.rand(()) if self.training else 0)


class ByMaximum(nn.Module):
    def forward(self, x):
        return x / (1e-6 + x.abs().max())


class Mixup(nn.Module):
    """In training only, and at random."""

    def forward(self, x):
        return 0.5 * x + 0.5 * x[torch.randperm(len(x))] if self.training else x


class InLargeBatches(Center):
    def forward(self, x):
        return super().forward(x) if len(x) > 6 else x


class ReZero(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.alpha * (x - x.mean(0))


def zero_head():
    last = nn.Linear(8, 8)
    nn.init.zeros_(last.weight)
    return nn.Sequential(Center(), last)


def hooked_center():
    layer = nn.Tanh()
    layer.register_forward_hook(lambda m, args, out: out - out.mean(0))
    return layer


MIXING = {
    "by the maximum": ByMaximum,
    "mixup": Mixup,
    "in large batches only": InLargeBatches,
    "nothing yet": ReZero,
    "before a head of zeros": zero_head,
    "a hook": hooked_center,
    "centering": Center,
    "by the batch's size": BySize,
    "a neighbour": Neighbour,
    "in training only": CenterInTraining,
    "beside a dropout": lambda: nn.Sequential(nn.Dropout(), Center()),
    "with noise": CenterWithNoise,
    "softmax over the batch": lambda: nn.Softmax(dim=0),
    "flattened batch": lambda: nn.Flatten(0),
}


@pytest.mark.parametrize("name", MIXING)
@private_methods
def test_a_layer_that_mixes_samples_is_refused_by_train(method, name):
    model = nn.Sequential(nn.Linear(2, 8), MIXING[name](), nn.Linear(8, 2))
    if name == "flattened batch":
        model = nn.Sequential(nn.Linear(2, 4), nn.Flatten(0), nn.Unflatten(0, (-1, 2)))
    with pytest.raises(ValueError, match="model must treat each sample alone"):
        train(model, MOONS, SETTINGS, method=method)


@pytest.mark.parametrize("way", [per_sample_gradients, lambda *args: clipped_sum(*args, 1.0)], ids=["gradients", "sum"])
def test_a_layer_that_mixes_samples_is_refused_by_the_mechanism(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Center(), nn.Linear(8, 3))
    X = torch.randn(40, 8)
    X[0] = 1e4
    with pytest.raises(ValueError, match="depends on the others in the batch"):
        way(model, F.cross_entropy, X, torch.arange(40) % 3)


def test_the_probe_runs_once_a_model_and_again_when_the_model_has_changed(monkeypatch):
    class Counted(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model, probed, probe = nn.Sequential(Counted(2, 2)), [], guards._mixed
    monkeypatch.setattr(guards, "_mixed", lambda *args: probed.append(args[0]) or probe(*args))
    for _ in range(3):
        per_sample_gradients(model, F.cross_entropy, MOONS.X[:5], MOONS.y[:5])
    # The copies that the probe runs count for themselves. The model itself runs once to make what it keeps whatever the
    # records are, then once a gradient, under vmap.
    assert model[0].calls == 4 and probed == [model]
    model.append(Center())
    with pytest.raises(ValueError, match="depends on the others"):
        per_sample_gradients(model, F.cross_entropy, MOONS.X[:5], MOONS.y[:5])


def test_the_probe_leaves_the_readers_random_numbers_where_they_were():
    model = nn.Sequential(nn.Linear(2, 2), CenterWithNoise())
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        train(model, MOONS, SETTINGS)
    assert torch.equal(torch.get_rng_state(), before) and model.training


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.GroupNorm(2, 8), nn.Linear(8, 2)),
        lambda: nn.Sequential(nn.Linear(2, 8), nn.RReLU(), nn.LayerNorm(8), nn.Linear(8, 2)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.InstanceNorm1d(1), nn.Flatten(), nn.Linear(2, 2)),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(4, 2)),
    ],
)
@private_methods
def test_layers_that_treat_samples_alone_are_not_refused(make, method):
    assert len(run(make(), method)) == 6


# --- the quick way is taken where it is right -------------------------------------------------------------------------


class InPlace(nn.Module):
    def forward(self, x):
        return F.relu(x, inplace=True)


def with_hook(kind, where="layer"):
    def make():
        model = nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3))
        at = {"layer": model[0][0], "container": model[0], "model": model}[where]
        if kind == "pre":
            at.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        elif kind == "forward":
            at.register_forward_hook(lambda m, args, out: out * 3)
        else:
            at.forward = lambda x, f=at.forward: f(x * 2)
        return model

    return make


TRICKY = {
    "an in-place layer": lambda: nn.Sequential(nn.Linear(5, 6), InPlace(), nn.Linear(6, 3)),
    **{
        f"{kind} on a {where}": with_hook(kind, where)
        for kind in ("pre", "forward", "another forward")
        for where in ("layer", "container", "model")
    },
}


@pytest.mark.parametrize("name", TRICKY)
def test_the_sum_is_right_whatever_stands_between_the_layers(name):
    torch.manual_seed(0)
    model, X, y = TRICKY[name](), torch.randn(6, 5), torch.arange(6) % 3
    alone = [
        torch.autograd.grad(F.cross_entropy(model(x[None].clone()), t[None]), list(model.parameters()))
        for x, t in zip(X, y)
    ]
    rows = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in alone])
    C = float(rows.norm(dim=1).median())
    wanted = (rows * (C / rows.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    assert torch.allclose(clipped_sum(model, F.cross_entropy, X.clone(), y, C), wanted, atol=1e-5)


def test_a_hook_on_every_module_is_seen():
    model, X, y = linear(), MOONS.X[:6], MOONS.y[:6]
    plain = clipped_sum(model, F.cross_entropy, X, y, math.inf)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: out * 2 if isinstance(m, nn.Linear) else None
    )
    try:
        hooked = clipped_sum(model, F.cross_entropy, X, y, math.inf)
        rows = per_sample_gradients(model, F.cross_entropy, X, y).sum(0)
    finally:
        handle.remove()
    assert torch.allclose(hooked, rows, atol=1e-6) and not torch.allclose(hooked, plain, atol=1e-2)


def test_a_loss_over_many_places_is_the_mean_of_each_sample():
    """Cross-entropy on (B, K, H, W): PyTorch's mean is over all pixels, so a sample alone has the mean over its own."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1))
    X, y = torch.randn(5, 1, 6, 6), torch.randint(0, 3, (5, 6, 6))
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        summed, losses = clipped_sum_and_losses(model, loss, X, y, math.inf)
        batch = torch.autograd.grad(F.cross_entropy(model(X), y), list(model.parameters()))
        assert torch.allclose(summed / 5, torch.cat([g.flatten() for g in batch]), atol=1e-6)
        assert losses.shape == (5,) and float(losses.mean()) == pytest.approx(
            F.cross_entropy(model(X), y).item(), abs=1e-6
        )


def test_an_image_without_a_channel_axis_is_not_read_as_a_batch_of_channels():
    """A convolution takes (4, 6, 6) for one image with four channels: then four records would be one."""
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Flatten(1))
    with pytest.raises((ValueError, RuntimeError)):
        clipped_sum(model, F.cross_entropy, torch.randn(4, 6, 6), torch.arange(3), 1.0)


def test_a_loss_that_gives_many_numbers_is_refused():
    for model in (linear(), nn.Sequential(nn.Linear(2, 2), InPlace())):
        with pytest.raises(ValueError, match="loss_fn must give one number, got shape"):
            clipped_sum(model, lambda out, y: out * 2, MOONS.X[:5], MOONS.y[:5], 1.0)


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.RReLU])
def test_a_layer_that_vmap_cannot_run_is_run_one_sample_at_a_time(layer):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = layer(1, 2, batch_first=True), nn.Linear(2, 2)

        def forward(self, x):
            return self.out(self.rnn(x.unsqueeze(2))[0][:, -1])

    torch.manual_seed(0)
    model = (
        Last() if layer is not nn.RReLU else nn.Sequential(nn.Linear(2, 4), nn.RReLU(0.1, 0.1 + 1e-9), nn.Linear(4, 2))
    )
    X, y = MOONS.X[:5], MOONS.y[:5]
    rows = per_sample_gradients(model, F.cross_entropy, X, y)
    batch = torch.autograd.grad(F.cross_entropy(model(X), y), list(model.parameters()))
    assert torch.allclose(rows.mean(0), torch.cat([g.flatten() for g in batch]), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_nothing_to_train_is_refused_at_the_call(method):
    frozen = linear().requires_grad_(False)
    for model in (nn.Flatten(), frozen):
        with pytest.raises(ValueError, match="at least one trainable parameter"):
            train(model, MOONS, SETTINGS, method=method)


def test_a_layer_whose_bias_comes_before_its_weight_has_its_own_gradients():
    """As after remove_weight_norm or prune.remove."""
    torch.manual_seed(0)
    model, X, y = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 4), torch.arange(6) % 3
    weight = model[0].weight
    del model[0].weight
    model[0].weight = nn.Parameter(weight.detach())
    assert list(dict(model[0].named_parameters())) == ["bias", "weight"]
    rows = per_sample_gradients(model, F.cross_entropy, X, y)
    assert torch.allclose(clipped_sum(model, F.cross_entropy, X, y, math.inf), rows.sum(0), atol=1e-5)


@pytest.mark.parametrize("make", [linear, lambda: nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2))])
def test_autocast_does_not_sum_in_half_precision(make):
    torch.manual_seed(0)
    model, X, y, C = make(), torch.randn(1500, 2), torch.arange(1500) % 2, 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = clipped_sum(model, F.cross_entropy, X, y, C)
        for k in range(5):
            moved = whole - clipped_sum(
                model, F.cross_entropy, torch.cat([X[:k], X[k + 1 :]]), torch.cat([y[:k], y[k + 1 :]]), C
            )
            assert float(moved.norm()) <= 1.001 * C


@private_methods
def test_the_probe_leaves_the_readers_data_alone(method):
    """A layer that works in place on the model's input, and gets a copy of the record."""

    class Scale(nn.Module):
        def forward(self, x):
            return x.mul_(0.5)

    data = Data(MOONS.X.clone(), MOONS.y)
    train(nn.Sequential(Scale(), nn.Linear(2, 2)), data, SETTINGS, method=method)
    assert torch.equal(data.X, MOONS.X)


def test_a_tensor_that_asks_for_a_gradient_and_is_no_parameter_is_refused():
    model = nn.Sequential(InPlace(), nn.Linear(2, 2))
    model[0].scale = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="must hold what it trains in model.parameters.., but '0.scale'"):
        train(model, MOONS, SETTINGS, method="opacus")


# --- Opacus, and hostile records --------------------------------------------------------------------------------------


@private_methods
def test_a_record_of_infinities_does_not_reach_the_model(method):
    X = MOONS.X.clone()
    X[7], X[8], X[9] = math.nan, math.inf, 3e38
    model = linear()
    run(model, method, data=Data(X, MOONS.y))
    assert bool(parameters_to_vector(model.parameters()).isfinite().all())


def test_a_label_that_is_ignored_does_not_scale_the_other_gradients_of_an_opacus_run():
    """cross_entropy's mean divides by the labels that it counts: one record more or less would change all the others' gradients."""
    y = MOONS.y.clone()
    y[30:] = -100
    settings = replace(SETTINGS, noise_multiplier=0.0, max_grad_norm=math.inf, batch_size=60, epochs=1, lr=0.1)
    model, still = linear(), None
    still = copy.deepcopy(model)
    run(model, "opacus", settings=settings, data=Data(MOONS.X, y))
    losses = F.cross_entropy(still(MOONS.X), y, reduction="none")
    grads = torch.autograd.grad(losses.sum() / 60, list(still.parameters()))
    moved = parameters_to_vector(still.parameters()) - parameters_to_vector(model.parameters())
    assert torch.allclose(moved, 0.1 * parameters_to_vector(grads), atol=1e-6)


def test_models_of_the_package_are_plain():
    """So their training pays for no probe."""
    from dpteach.bookkeeping import draws, plain_layers

    for model in (models.mlp(), models.cnn(), models.cnn(activation="tanh")):
        assert plain_layers(model) and not draws(model)


class Fold(nn.Module):
    """Makes rows of a record's 25 places, and records of them again."""

    def __init__(self, back=False):
        super().__init__()
        self.back = back

    def forward(self, x):
        return x.view(-1, 25, 3).mean(1) if self.back else x.reshape(-1, 4)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).mean(0)


@pytest.mark.parametrize(
    "model, X",
    [
        (nn.Sequential(Fold(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), Fold(back=True)), torch.randn(6, 25, 4)),
        (SequenceFirst(), torch.randn(6, 3, 4)),
        (SequenceFirst(), torch.randn(6, 5, 4)),
    ],
)
def test_opacus_does_not_take_the_parts_of_a_record_for_records(model, X):
    data = Data(X, torch.arange(6) % 2)
    settings = replace(SETTINGS, batch_size=3)
    with pytest.raises(ValueError, match="treat each sample alone.*method='dpsgd'"):
        run(model, "opacus", settings=settings, data=data)
    assert len(run(model, "dpsgd", settings=settings, data=data)) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.insert(1, Center()),
        lambda model: model[0].register_forward_hook(lambda m, args, out: out - out.mean(0)),
        lambda model: model.__setitem__(1, nn.Softmax(0)),
    ],
    ids=["a layer", "a hook", "another layer"],
)
def test_a_model_that_changes_while_opacus_trains_it_stops_the_run(change):
    model = linear()
    steps = train(model, MOONS, SETTINGS, method="opacus")
    next(steps)
    change(model)
    with pytest.raises(ValueError, match="must stay as it is while Opacus trains it"):
        list(steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opacus_does_not_sum_in_half_precision(dtype):
    data = Data(MOONS.X.to(dtype), MOONS.y)
    with pytest.raises(ValueError, match="float32 or float64 with method='opacus'"):
        run(linear().to(dtype), "opacus", data=data)


def test_an_interrupted_opacus_run_leaves_no_record_on_the_model():
    model = linear()
    steps = train(model, MOONS, SETTINGS, method="opacus")
    next(steps)
    model(MOONS.X)  # its activations wait for a backward pass
    assert any(vars(layer).get("activations") for layer in model.modules())
    steps.close()
    assert not any({"activations", "max_batch_len"} & vars(layer).keys() for layer in model.modules())
    assert not any({"grad_sample", "summed_grad"} & vars(p).keys() for p in model.parameters())


def test_an_empty_batch_does_not_end_an_opacus_run_of_a_model_that_cannot_run_on_nothing():
    """An end would tell that the batch was empty, and ε pays for a step that always takes place."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            if len(x) == 0:
                raise RuntimeError("nothing to look at")
            return self.inner(x)

    model, empty = Positions(), 0
    before = parameters_to_vector(model.parameters()).detach().clone()
    for step in train(model, MOONS.take(4), Settings(epochs=10, batch_size=1), method="opacus"):
        now = parameters_to_vector(model.parameters()).detach().clone()
        assert not torch.equal(now, before)
        empty, before = empty + math.isnan(step.loss), now
    assert step.step == 40 and empty > 0


class FailsLater(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(2)), 0
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        if self.calls > 3:
            self.kept = self.kept + 1
            raise RuntimeError("out of memory, say")
        return x * self.weight


def test_a_step_that_fails_leaves_the_buffers_as_they_were():
    model = nn.Sequential(FailsLater(), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model)
    assert model[0].kept.tolist() == [0, 0]


@pytest.mark.parametrize(
    "how", ["attribute", "list", "dict", "first pass", "float", "array", "object", "new parameter", "buffer"]
)
def test_a_refused_model_holds_nothing_of_the_records(how):
    model = nn.Sequential(Keeps(how), nn.Linear(2, 2))
    before = dict(guards._leaves(model))
    with pytest.raises(ValueError, match="its forward pass changes"):
        train(model, MOONS, SETTINGS)
    assert dict(guards._leaves(model)) == before


def test_a_layer_at_the_address_of_an_old_one_is_another_layer():
    model = nn.Sequential(Scaling(), Scaling(), nn.Linear(2, 2))
    per_sample_gradients(model, F.cross_entropy, MOONS.X[:5], MOONS.y[:5])
    for _ in range(200):  # now and then the new layer gets the old one's address
        del model[1]
        model.insert(1, Center())
        with pytest.raises(ValueError, match="depends on the others"):
            per_sample_gradients(model, F.cross_entropy, MOONS.X[:5], MOONS.y[:5])
        del model[1]
        model.insert(1, Scaling())
        per_sample_gradients(model, F.cross_entropy, MOONS.X[:5], MOONS.y[:5])


class Scaling(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_parameter_that_its_own_forward_pass_rescales_later_stops_the_run():
    """As F.embedding with max_norm does, once a row has grown: no probe at the start sees it."""

    class Rescaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.weight = 0, nn.Parameter(torch.ones(2))

        def forward(self, x):
            self.calls += 1
            if self.calls > 200:
                with torch.no_grad():
                    self.weight.mul_(0.5)
            return x * self.weight

    with pytest.raises(ValueError, match="a training step changed '0.weight' in its forward pass"):
        run(nn.Sequential(Rescaled(), nn.Linear(2, 2)), "opacus", settings=replace(SETTINGS, epochs=100))


def test_huge_weights_average_as_their_proportions():
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(a.weight, 0.0), nn.init.constant_(b.weight, 4.0)
    for huge in (1e308, 1e-308):
        assert federated_average([a, b], [huge, huge])["weight"].item() == pytest.approx(2.0)


def test_an_average_does_not_carry_a_models_extra_state_out_unseen():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    models_ = [Extra(2, 2), Extra(2, 2)]
    for value, model in zip((0.0, 3.0), models_):
        model.extra = torch.tensor([value])
    with pytest.raises(ValueError, match="same buffers, got different ones at '_extra_state'"):
        federated_average(models_)


def test_two_runs_with_dropout_in_two_threads_draw_what_each_draws_alone():
    def made():  # not in the threads: a new layer draws from the global stream
        model = nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 2))
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        return model

    def trained(seed, model):
        list(train(model, MOONS, replace(SETTINGS, epochs=10, seed=seed), method="dpsgd"))
        return parameters_to_vector(model.parameters()).detach()

    seeds = (1, 2, 3)
    alone, rounds = [trained(seed, made()) for seed in seeds], [[made() for _ in seeds] for _ in range(3)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        for models_ in rounds:
            assert all(torch.equal(a, b) for a, b in zip(pool.map(trained, seeds, models_), alone))
    assert torch.equal(torch.get_rng_state(), before)


# --- what is not refused ----------------------------------------------------------------------------------------------


class Text(nn.Module):
    """Token numbers that arrive as floats, and a mask that is made at the first pass and kept."""

    def __init__(self):
        super().__init__()
        self.words, self.out, self.mask = nn.Embedding(10, 4), nn.Linear(4, 2), None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(x.shape[1], 1)
        return self.out((self.words(x.long()) * self.mask).mean(1))


class Columns(nn.Module):
    """One table of vectors a column, each with a size of its own."""

    def __init__(self):
        super().__init__()
        self.tables, self.out = nn.ModuleList(nn.Embedding(size, 3) for size in (2, 9, 30)), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(sum(table(column) for table, column in zip(self.tables, x.unbind(1))))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(F.dropout(self.first(x).tanh(), 0.5, self.training))


class Strict(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.no_decay, self.seconds = nn.Linear(4, 2), set(), 0.0
        self.no_decay |= set(self.out.parameters())

    def forward(self, x):
        if not bool(torch._C._functorch.is_functorch_wrapped_tensor(x)) and not (
            float(x.min()) >= 0 and float(x.max()) <= 1
        ):
            raise ValueError("pixels must lie between 0 and 1")
        self.seconds = time.perf_counter()
        return self.out(x)


def frozen_batch_norm():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    model[1].eval().requires_grad_(False)
    return model


def wide_and_deep():
    torch.manual_seed(0)
    return nn.Sequential(
        *(layer for _ in range(60) for layer in (nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())), nn.Linear(4, 2)
    )


GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.rand(40, 4, generator=GENERATOR)
HONEST = {
    "words as floats": (Text, torch.randint(0, 10, (40, 5), generator=GENERATOR).float()),
    "a column a table": (
        Columns,
        torch.stack([torch.randint(0, size, (40,), generator=GENERATOR) for size in (2, 9, 30)], 1),
    ),
    "functional dropout": (FunctionalDropout, PIXELS),
    "strict about its input": (Strict, PIXELS),
    "frozen batch norm": (frozen_batch_norm, PIXELS),
    "many layers": (wide_and_deep, PIXELS),
    "one number a record": (lambda: nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2)), PIXELS[:, 0]),
}


@pytest.mark.parametrize("name", HONEST)
@private_methods
def test_an_honest_model_trains(method, name):
    make, X = HONEST[name]
    data, settings = Data(X, torch.arange(40) % 2), replace(SETTINGS, batch_size=10)
    model = make()
    frozen = [(layer, layer.training) for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]
    if name == "one number a record" and method == "opacus":
        pytest.skip("Opacus wants an axis of features")
    assert len(run(model, method, settings=settings, data=data)) == 8
    assert all(layer.training == mode for layer, mode in frozen)
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())


def test_a_bfloat16_transformer_is_not_taken_to_mix():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.Unflatten(1, (4, 16)), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(64, 2)
    ).bfloat16()
    guards.check_alone(model, torch.randn(20, 64).bfloat16())


# --- what a second sceptic found --------------------------------------------------------------------------------------


@private_methods
def test_a_layer_in_a_plain_list_is_refused(method):
    """A forgotten ModuleList: its weights are not in model.parameters(), and would be left with a gradient without noise."""

    class Forgot(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.lost = nn.Linear(2, 2), [nn.Linear(2, 2)]

        def forward(self, x):
            return self.seen(x) + self.lost[0](x)

    with pytest.raises(ValueError, match=r"in model.parameters\(\), but 'lost\[0\].*nn.ModuleList"):
        train(Forgot(), MOONS, SETTINGS, method=method)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@private_methods
def test_a_hook_on_a_parameter_is_refused(method, register):
    model = linear()
    getattr(model[0].bias, register)(lambda g: None)
    with pytest.raises(ValueError, match="no hooks on its parameters, got one on '0.bias'"):
        train(model, MOONS, SETTINGS, method=method)


class Slots:
    __slots__ = ("kept",)


HIDING = {
    "deque": lambda m, x: m.deque.append(x.tolist()),
    "slots": lambda m, x: setattr(m.slots, "kept", x.tolist()),
    "callable": lambda m, x: setattr(m.callable, "kept", x.tolist()),
    "bytes": lambda m, x: m.bytes.extend(x.numpy().tobytes()),
    "file": lambda m, x: m.file.write(x.numpy().tobytes()),
    "parameter": lambda m, x: setattr(m.weight, "kept", x.tolist()),
}


class Callable_:
    def __call__(self):
        pass


@pytest.mark.parametrize("place", HIDING)
@private_methods
def test_no_place_on_a_model_hides_a_record(method, place):
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.deque, self.slots, self.callable = (
                nn.Parameter(torch.ones(2)),
                deque(),
                Slots(),
                Callable_(),
            )
            self.bytes, self.file = bytearray(), io.BytesIO()

        def forward(self, x):
            if not torch._C._functorch.is_functorch_wrapped_tensor(x):
                HIDING[place](self, x.detach())
            return x * self.weight

    with pytest.raises(ValueError, match="its forward pass changes"):
        train(Hides(), MOONS, SETTINGS, method=method)


@private_methods
def test_a_buffer_that_a_later_pass_adds_stops_the_run_and_is_gone(method):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.ones(2)), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 204:
                self.register_buffer("late", torch.ones(2))
            return x * self.weight

    model = nn.Sequential(Adds(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a training step changed '0.late'"):
        run(model, method, settings=replace(SETTINGS, epochs=100))
    assert "0.late" not in model.state_dict()


def test_a_model_that_cuts_to_the_longest_record_of_a_batch_is_refused_in_any_order():
    class Cuts(Text):
        def forward(self, x):
            return self.out(self.words(x[:, : int((x != 0).sum(1).max())]).mean(1))

    words = torch.randint(1, 10, (40, 4), generator=GENERATOR)
    words[20:, 2:] = 0
    for X in (words, words.flip(0)):
        with pytest.raises(ValueError, match="depends on the others"):
            train(Cuts(), Data(X, torch.arange(40) % 2), replace(SETTINGS, batch_size=10), method="opacus")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[1], "dim", 0),
        lambda model: setattr(model[1], "forward", lambda x: x - x.mean(0)),
        lambda model: setattr(model[1], "__class__", Center),
    ],
    ids=["an option", "a forward", "a class"],
)
def test_an_option_that_changes_while_opacus_trains_stops_the_run(change):
    model = nn.Sequential(nn.Linear(2, 4), nn.Softmax(1), nn.Linear(4, 2))
    steps = train(model, MOONS, SETTINGS, method="opacus")
    next(steps)
    change(model)
    with pytest.raises(ValueError, match="must stay as it is"):
        list(steps)


@private_methods
def test_what_can_not_be_trained_is_refused_before_it_is_charged(method):
    wrong = {"input": (MOONS, nn.Linear(3, 2)), "label": (Data(MOONS.X, MOONS.y + 1), nn.Linear(2, 2))}
    for data, layer in wrong.values():
        worker = Worker("a", data, SETTINGS, method=method)
        with pytest.raises((RuntimeError, IndexError)):
            worker.train_round(nn.Sequential(layer))
        assert worker.ledger.steps == 0


def test_a_federation_probes_its_model_once(monkeypatch):
    probed, probe = [], guards._mixed
    monkeypatch.setattr(guards, "_mixed", lambda *args: probed.append(1) or probe(*args))
    workers = [Worker(name, MOONS, SETTINGS) for name in "abc"]
    list(train_rounds(workers, nn.Sequential(nn.Linear(2, 4), nn.PReLU(), nn.Linear(4, 2)), 3))
    assert len(probed) == 1
