import copy
import math
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, replace

import opacus.optimizers.optimizer
import pytest
import torch
import torch.nn.functional as F
from loops import in_one_test
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dpteach import models, training, with_opacus
from dpteach.accounting import epsilon
from dpteach.data import Data, two_moons
from dpteach.mechanism import poisson_batches
from dpteach.optim import FOR_OPACUS, OPTIMIZERS
from dpteach.randomness import generators
from dpteach.training import METHODS, Settings, train

MOONS = two_moons(60, seed=1)
SETTINGS = Settings(epochs=3, batch_size=20, target_delta=1e-5, max_grad_norm=0.5, noise_multiplier=1.0)
PLAIN = {"noise_multiplier": 0.0, "max_grad_norm": math.inf}

private_methods = pytest.mark.parametrize("method", ["dpsgd", "opacus"])
every_method = pytest.mark.parametrize("method", METHODS)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def weights(model):
    return parameters_to_vector(model.parameters()).detach().clone()


def weights_by_step(model, *args, **kwargs):
    return [weights(model) for _ in train(model, *args, **kwargs)]


# --- what a step does -----------------------------------------------------------------------------------------------


@every_optimizer
@every_method
def test_without_noise_clipping_and_sampling_every_method_is_plain_gradient_descent(method, optimizer):
    settings = replace(SETTINGS, batch_size=60, epochs=5, lr=0.1, **PLAIN)
    model, reference = models.mlp(), models.mlp()
    plain = FOR_OPACUS[optimizer](reference.parameters(), lr=0.1)
    for now in weights_by_step(model, MOONS, settings, method=method, optimizer=optimizer):
        plain.zero_grad()
        F.cross_entropy(reference(MOONS.X), MOONS.y).backward()
        plain.step()
        assert torch.allclose(now, weights(reference), atol=2e-6)


@private_methods
def test_the_sum_is_divided_by_the_expected_batch_size_not_by_the_actual_one(method):
    # Sixty copies of one record, so that a step's length tells how many took part. n·q = 60 / 7 is no whole number.
    data = Data(MOONS.X[:1].repeat(60, 1), MOONS.y[:1].repeat(60))
    settings = replace(SETTINGS, batch_size=9, epochs=6, lr=1e-3, **PLAIN)
    model, still, sizes = models.mlp(), models.mlp(), []
    for _ in train(model, data, settings, method=method):
        gradient = torch.autograd.grad(F.cross_entropy(still(data.X[:1]), data.y[:1]), list(still.parameters()))
        length = (weights(model) - weights(still)).norm() / (1e-3 * parameters_to_vector(gradient).norm())
        sizes.append(float(length) * 60 / 7)
        vector_to_parameters(weights(model), still.parameters())
    assert all(abs(size - round(size)) < 0.05 for size in sizes), sizes
    assert len({round(size) for size in sizes}) > 4
    assert sum(sizes) / len(sizes) == pytest.approx(60 / 7, abs=4 * math.sqrt(60 / 7 * 6 / 7 / len(sizes)))


@pytest.mark.filterwarnings("ignore")
@every_optimizer
@pytest.mark.parametrize(
    "make, data",
    [
        (models.mlp, MOONS),
        (
            models.cnn,
            Data(torch.rand(24, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10),
        ),
    ],
    ids=["mlp", "cnn"],
)
def test_a_step_is_the_step_of_opacus_given_the_same_batch_and_noise(monkeypatch, make, data, optimizer):
    """Opacus' model wrapper and optimizer get the batches of our run, and our noise in place of their own draws.

    The draws cannot coincide by seed: we draw one vector, Opacus one tensor a parameter. What Opacus makes of a draw,
    the standard deviation that it gives it and the division, stays its own.
    """
    settings = replace(SETTINGS, batch_size=len(data) // 3, epochs=2, max_grad_norm=0.7, noise_multiplier=1.3, lr=0.05)
    n, q = len(data), settings.sample_rate(len(data))
    sampling, noise = generators(settings.seed)
    model, reference = make(), make()
    sizes = [p.numel() for p in reference.parameters()]
    draws = (part for _ in iter(int, 1) for part in torch.randn(sum(sizes), generator=noise).split(sizes))

    def our_noise(std, reference, generator=None, secure_mode=False):
        return std * next(draws).view_as(reference)

    monkeypatch.setattr(opacus.optimizers.optimizer, "_generate_noise", our_noise)
    wrapped = GradSampleModule(reference)
    theirs = DPOptimizer(
        FOR_OPACUS[optimizer](reference.parameters(), lr=settings.lr),
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        expected_batch_size=n * q,
    )
    steps = weights_by_step(model, data, settings, method="dpsgd", optimizer=optimizer)
    for now, batch in zip(steps, poisson_batches(n, q, len(steps), sampling), strict=True):
        theirs.zero_grad()
        F.cross_entropy(wrapped(data.X[batch]), data.y[batch]).backward()
        theirs.step()
        # Adam divides by the gradient's size, and so can double what rounding leaves.
        assert torch.allclose(now, weights(reference), atol=1e-6 if optimizer != "adam" else 1e-5)


@private_methods
def test_noise_on_an_update_has_standard_deviation_lr_sigma_c_over_the_expected_batch(method):
    # 26,010 coordinates, and so much noise that the gradients do not show.
    data = Data(torch.zeros(40, 1, 28, 28), torch.arange(40) % 10)
    settings = Settings(noise_multiplier=50.0, max_grad_norm=0.02, epochs=1, batch_size=12, lr=0.1)
    model = models.cnn()
    before = weights(model)
    next(train(model, data, settings, method=method))
    std = 0.1 * 50.0 * 0.02 / (40 / 4)
    assert float((weights(model) - before).std()) == pytest.approx(std, rel=4 / math.sqrt(2 * 26_010))


@private_methods
def test_a_step_without_a_record_still_adds_noise(method):
    data = MOONS.take(4)
    model, empty = models.mlp(), 0
    run = train(model, data, Settings(epochs=10, batch_size=1), method=method)
    before = weights(model)
    for step in run:
        assert bool((weights(model) != before).all()), "a step without noise tells that nobody took part"
        before, empty = weights(model), empty + math.isnan(step.loss)
    assert step.step == 40 and 4 <= empty <= 22  # (3/4)⁴ = 32 % of 40 steps are empty


def test_a_record_of_nan_does_not_reach_the_model_of_dpsgd():
    X = MOONS.X.clone()
    X[7] = math.nan
    model = models.mlp()
    list(train(model, Data(X, MOONS.y), SETTINGS))
    assert bool(weights(model).isfinite().all())


# --- randomness -----------------------------------------------------------------------------------------------------


@every_method
def test_a_run_repeats_bit_for_bit_with_its_seed_only(method):
    def run(seed, elsewhere):
        torch.manual_seed(elsewhere)  # what other cells draw must not matter
        model = models.mlp()
        losses = [step.loss for step in train(model, MOONS, replace(SETTINGS, seed=seed), method=method)]
        return losses, weights(model).tolist()

    assert run(3, elsewhere=1) == run(3, elsewhere=2)
    assert run(3, elsewhere=1) != run(4, elsewhere=1)


def test_noise_and_sampling_come_from_different_streams(monkeypatch):
    seen = []
    sample, noise = training.poisson_batches, training.add_noise
    monkeypatch.setattr(training, "poisson_batches", lambda *args: seen.append(args[3].initial_seed()) or sample(*args))
    monkeypatch.setattr(training, "add_noise", lambda *args: seen.append(args[3].initial_seed()) or noise(*args))
    for seed in range(20):
        next(train(models.mlp(), MOONS, replace(SETTINGS, seed=seed)))
    assert len(set(seen)) == 40  # nor does one run's noise come back as the sampling of another


@every_method
def test_nothing_happens_before_the_first_step_is_asked_for(method):
    model = models.mlp()
    before = weights(model)
    run = train(model, MOONS, SETTINGS, method=method)
    assert torch.equal(weights(model), before)
    next(run)
    assert not torch.equal(weights(model), before)


# --- what a step reports --------------------------------------------------------------------------------------------


@every_optimizer
@every_method
def test_steps_are_numbered_and_carry_epsilon_and_accuracy(method, optimizer):
    test_data = two_moons(1500, seed=2)  # more than one chunk
    model = models.mlp()
    settings = replace(SETTINGS, batch_size=25, lr=0.1)  # ⌈60 / 25⌉ = 3 steps
    steps = []
    for step in train(model, MOONS, settings, method=method, optimizer=optimizer, test_data=test_data):
        assert model.training
        with torch.no_grad():
            right = model(test_data.X).argmax(1) == test_data.y
        assert step.accuracy == (pytest.approx(float(right.double().mean())) if step.step % 3 == 0 else None)
        steps.append(step)
    assert [step.step for step in steps] == list(range(1, 10)) and {step.steps for step in steps} == {9}
    assert [step.epoch for step in steps] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(math.isfinite(step.loss) for step in steps)
    for step in steps:
        assert step.epsilon == (
            math.inf
            if method == "sgd"
            else pytest.approx(
                epsilon(noise_multiplier=1.0, sample_rate=1 / 3, steps=step.step, accountant="rdp"), abs=1e-9
            )
        )


@every_method
def test_without_noise_epsilon_is_infinite(method):
    assert next(train(models.mlp(), MOONS, replace(SETTINGS, **PLAIN), method=method)).epsilon == math.inf


@every_method
def test_the_loss_is_that_of_the_batch_before_its_update(method):
    model = models.mlp()
    run = train(model, MOONS, replace(SETTINGS, batch_size=60), method=method)
    for _ in range(3):
        with torch.no_grad():
            wanted = float(F.cross_entropy(model(MOONS.X), MOONS.y))
        assert next(run).loss == pytest.approx(wanted, abs=1e-5)


@every_method
def test_training_learns(method):
    settings = Settings(noise_multiplier=0.6, epochs=30, batch_size=50, lr=1.0)
    *_, last = train(models.mlp(), two_moons(500), settings, method=method, test_data=two_moons(500, seed=9))
    assert last.accuracy > 0.84  # a straight line reaches about 0.84


# --- Opacus -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Opacus speaks to whoever uses it directly
def test_the_epsilon_of_an_opacus_run_is_the_one_that_opacus_reports():
    settings = replace(SETTINGS, batch_size=25, noise_multiplier=0.8)
    engine = PrivacyEngine(accountant="rdp")
    model = models.mlp()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(MOONS.X, MOONS.y), batch_size=25),
        noise_multiplier=0.8,
        max_grad_norm=0.5,
    )
    ours = train(models.mlp(), MOONS, settings, method="opacus")
    dpsgd = train(models.mlp(), MOONS, settings, method="dpsgd")
    for _ in range(settings.epochs):
        for X, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
            reported = engine.get_epsilon(settings.target_delta)
            assert next(ours).epsilon == pytest.approx(reported, abs=1e-9)
            assert next(dpsgd).epsilon == pytest.approx(reported, abs=1e-9)
    assert next(ours, None) is None and next(dpsgd, None) is None


def test_an_opacus_run_has_the_steps_that_its_epsilon_pays_for_and_its_divisor_at_every_ratio(monkeypatch):
    """Opacus itself takes int(1 / (1 / ratio)) steps, one too few for 93, 99, 105 …, and divides by int(n / ratio)."""
    traps = [r for r in range(1, 401) if int(1 / (1 / r)) != r or int(r * (1 / r)) != 1]
    assert {49, 93} <= set(traps) and len(traps) > 30
    ratios = [2, 3, 10, 235, 400, *traps]
    sampled, expected = [], []
    accumulate, sample = DPOptimizer.clip_and_accumulate, with_opacus.poisson_batches
    monkeypatch.setattr(with_opacus, "poisson_batches", lambda *args: sampled.append(args[:3]) or sample(*args))
    monkeypatch.setattr(
        DPOptimizer, "clip_and_accumulate", lambda self: expected.append(self.expected_batch_size) or accumulate(self)
    )
    data = two_moons(400)
    for ratio in ratios:
        next(train(models.mlp(), data.take(ratio), Settings(epochs=2, batch_size=1), method="opacus"))
    assert sampled == [(ratio, 1 / ratio, 2 * ratio) for ratio in ratios]
    assert expected == pytest.approx([1.0] * len(ratios))


@private_methods
def test_a_run_takes_all_its_steps_where_the_ratio_is_a_float_trap(method):
    assert int(1 / (1 / 93)) == 92
    steps = [step.step for step in train(models.mlp(), two_moons(93), Settings(epochs=2, batch_size=1), method=method)]
    assert steps == list(range(1, 187))


@pytest.mark.parametrize("end", ["given up", "forgotten", "finished", "failed"])
def test_an_opacus_run_leaves_the_model_as_trainable_as_any(end):
    model = models.mlp()
    too_wide = Data(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))
    run = train(model, MOONS, SETTINGS, method="opacus", test_data=too_wide if end == "failed" else None)
    next(run)
    if end == "given up":
        run.close()
    elif end == "finished":
        list(run)
    elif end == "failed":
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
            list(run)
        assert error.tb  # it keeps the run's frames alive, so that nothing is tidied up by chance
    del run
    for layer in model.modules():
        assert not layer._forward_hooks and not layer._forward_pre_hooks and not layer._backward_hooks
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    for method in METHODS:
        again, fresh = copy.deepcopy(model), models.mlp()
        fresh.load_state_dict(model.state_dict())
        runs = (train(start, MOONS, SETTINGS, method=method) for start in (again, fresh))
        for a, b in zip(*runs, strict=True):
            assert a == b and torch.equal(weights(again), weights(fresh))


def test_dpsgd_and_opacus_train_alike():
    settings = Settings(noise_multiplier=1.5, max_grad_norm=0.3, epochs=4, batch_size=40, lr=1.0)
    data = two_moons(200)

    def final_losses(method):
        losses = []
        for seed in range(12):
            model = models.mlp()
            list(train(model, data, replace(settings, seed=seed), method=method))
            losses.append(float(F.cross_entropy(model(data.X), data.y).detach()))
        return torch.tensor(losses)

    ours, theirs = final_losses("dpsgd"), final_losses("opacus")
    standard_error = math.sqrt(float(ours.var() + theirs.var()) / len(ours))
    assert abs(float(ours.mean() - theirs.mean())) < 3 * standard_error
    assert 1 / 4 < float(ours.var() / theirs.var()) < 4  # the noise shows in the spread


def test_an_opacus_run_warns_of_nothing_and_silences_nobody_else():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        list(train(models.mlp(), MOONS, SETTINGS, method="opacus"))
        assert [str(warning.message) for warning in said] == []
        PrivacyEngine()
        warnings.warn("something else", stacklevel=1)
        assert [str(warning.message)[:22] for warning in said] == ["Secure RNG turned off.", "something else"]


# --- δ, and arguments -----------------------------------------------------------------------------------------------


@private_methods
def test_a_delta_of_one_over_n_warns_and_says_why(method):
    with pytest.warns(UserWarning, match=r"below 1/n = 0.02 for 60 records, got 0.02: .*publishes one random record"):
        train(models.mlp(), MOONS, replace(SETTINGS, target_delta=0.02), method=method)


@every_method
def test_a_smaller_delta_and_a_run_without_privacy_do_not_warn(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(models.mlp(), MOONS, replace(SETTINGS, target_delta=0.5 if method == "sgd" else 0.016), method=method)


BAD = [math.nan, True, "1", None]


@in_one_test(
    "name, value",
    [
        *(("noise_multiplier", v) for v in (-0.1, math.inf, *BAD)),
        *(("max_grad_norm", v) for v in (0, -1.0, *BAD)),
        *(("epochs", v) for v in (0, -1, 1.5, math.inf, *BAD)),
        *(("batch_size", v) for v in (0, 2.5, *BAD)),
        *(("lr", v) for v in (0, -1.0, math.inf, *BAD)),
        *(("target_delta", v) for v in (0, 1, -0.1, 2, *BAD)),
        *(("seed", v) for v in (-1, 0.5, *BAD[:-1])),  # None is a choice: see test_release.py
    ],
)
def test_settings_refuse_bad_values(refuses, name, value):
    with refuses(name, value):
        Settings(**{name: value})


def test_settings_refuse_noise_without_a_clipping_norm():
    with pytest.raises(ValueError, match="max_grad_norm must be finite where noise_multiplier > 0, got inf"):
        Settings(max_grad_norm=math.inf)


def test_settings_cannot_change_under_a_run():
    with pytest.raises(FrozenInstanceError):
        SETTINGS.noise_multiplier = 0.0


@every_method
def test_whole_numbers_that_arrive_as_floats_from_a_slider_train(method):
    settings = Settings(epochs=2.0, batch_size=20.0, seed=1.0)
    assert settings == Settings(epochs=2, batch_size=20, seed=1)
    *_, last = train(models.mlp(), MOONS, settings, method=method)
    assert repr(last.steps) == "6"


@every_method
def test_a_batch_larger_than_the_data_is_refused_when_called(refuses, method):
    with refuses("batch_size", 61):
        train(models.mlp(), MOONS, replace(SETTINGS, batch_size=61), method=method)


def test_an_unknown_method_or_optimizer_is_refused_when_called(refuses):
    with refuses("method", "dp-sgd"):
        train(models.mlp(), MOONS, SETTINGS, method="dp-sgd")
    with refuses("optimizer", "lion"):
        train(models.mlp(), MOONS, SETTINGS, optimizer="lion")


@private_methods
def test_batch_norm_is_refused(method):
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    with pytest.raises(Exception, match="BatchNorm"):
        next(train(model, MOONS, SETTINGS, method=method))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_the_light_optimizer_is_torchs_to_the_bit(optimizer):
    models_ = [models.mlp(), models.mlp()]
    torchs, light = (make[optimizer](m.parameters(), lr=0.02) for make, m in zip((FOR_OPACUS, OPTIMIZERS), models_))
    for seed in range(5):
        for model, each in zip(models_, (torchs, light)):
            each.zero_grad()
            torch.manual_seed(seed)
            model(torch.randn(9, 2)).square().sum().backward()
            each.step()
        assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models_)))


def test_a_first_run_does_not_import_the_compiler():
    code = (
        "import sys; from dpteach import Settings, models, train, two_moons\n"
        "for method in ('sgd', 'dpsgd'):\n"
        "    for optimizer in ('sgd', 'momentum'):\n"
        "        next(train(models.mlp(), two_moons(64), Settings(batch_size=32), method=method, "
        "optimizer=optimizer))\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'matplotlib') if name in "
        "sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )
