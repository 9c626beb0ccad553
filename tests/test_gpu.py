"""A model on a GPU trains there, with the same steps, noise and ε as on the CPU. Skipped where there is none."""

import copy
import math

import pytest
import torch

from dpteach import Explorer, FederatedExplorer, models
from dpteach.attacks import margin_scores
from dpteach.data import Data, split, two_moons
from dpteach.explorer.training import diverged
from dpteach.federated import Worker, train_rounds
from dpteach.mechanism import clip, clipped_sum, per_sample_gradients
from dpteach.training import METHODS, OPTIMIZERS, Settings, train

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU here", allow_module_level=True)

MOONS, TEST = two_moons(400), two_moons(300, seed=9)
SETTINGS = Settings(noise_multiplier=1.2, epochs=3, batch_size=50, lr=0.5)

private_methods = pytest.mark.parametrize("method", ["dpsgd", "opacus"])


def on_gpu() -> torch.nn.Module:
    return models.mlp().cuda()


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "method, noise_multiplier", [(m, 0.0) for m in METHODS] + [("dpsgd", 1.2)]
)  # Opacus draws on the GPU
def test_a_run_is_that_of_the_cpu_but_for_rounding(method, noise_multiplier, optimizer):
    settings = Settings(
        noise_multiplier=noise_multiplier, epochs=3, batch_size=50, lr=0.5 if optimizer == "sgd" else 0.05
    )
    ours, theirs = on_gpu(), models.mlp()
    on, off = (
        list(train(m, MOONS, settings, method=method, optimizer=optimizer, test_data=TEST)) for m in (ours, theirs)
    )
    assert all(p.is_cuda for p in ours.parameters())
    assert [s.loss for s in on] == pytest.approx([s.loss for s in off], rel=1e-3)
    assert [s.epsilon for s in on] == [s.epsilon for s in off]
    assert on[-1].accuracy == pytest.approx(off[-1].accuracy, abs=0.01)
    assert torch.allclose(flat(ours), flat(theirs), atol=1e-3)


@private_methods
def test_the_noise_has_its_size_and_repeats_with_the_seed_only(method):
    data = Data(torch.zeros(40, 1, 28, 28), torch.arange(40) % 10)
    changes = []
    for seed in (0, 0, 1):
        settings = Settings(noise_multiplier=50.0, max_grad_norm=0.02, epochs=1, batch_size=12, lr=0.1, seed=seed)
        model = models.cnn().cuda()
        before = flat(model)
        next(train(model, data, settings, method=method))
        changes.append(flat(model) - before)
    std = 0.1 * 50.0 * 0.02 / (40 / 4)
    assert float(changes[0].std()) == pytest.approx(std, rel=4 / math.sqrt(2 * 26_010))
    assert torch.equal(changes[0], changes[1]) and not torch.allclose(changes[0], changes[2], atol=std)


@private_methods
def test_an_empty_batch_gets_noise(method):
    model, empty = on_gpu(), 0
    before = flat(model)
    for step in train(model, MOONS.take(4), Settings(epochs=10, batch_size=1), method=method):
        now = flat(model)
        assert not torch.equal(now, before)
        empty, before = empty + math.isnan(step.loss), now
    assert empty > 0


@pytest.mark.parametrize(
    "make, data", [(models.mlp, MOONS.take(30)), (models.cnn, Data(torch.rand(30, 1, 28, 28), torch.arange(30) % 10))]
)
def test_the_moves_stay_on_the_gpu(make, data):
    model, X, y = make().cuda(), data.X.cuda(), data.y.cuda()
    slow = clip(per_sample_gradients(model, torch.nn.functional.cross_entropy, X, y), 0.1).sum(0)
    fast = clipped_sum(model, torch.nn.functional.cross_entropy, X, y, 0.1)
    assert fast.is_cuda and torch.allclose(fast, slow, atol=1e-4)
    assert len(clipped_sum(model, torch.nn.functional.cross_entropy, X[:0], y[:0], 0.1)) == len(fast)


def test_workers_average_on_the_gpu():
    ends = []
    for model in (on_gpu(), models.mlp()):
        workers = [Worker(name, part, SETTINGS) for name, part in zip(("alice", "bob"), split(MOONS, 2))]
        *_, last = train_rounds(workers, model, 2, test_data=TEST)
        ends.append((last, flat(model)))
    assert ends[0][0].epsilons == ends[1][0].epsilons and torch.allclose(ends[0][1], ends[1][1], atol=1e-3)


def test_an_attack_scores_as_on_the_cpu():
    model = on_gpu()
    list(train(model, MOONS, SETTINGS, method="sgd"))
    assert torch.allclose(margin_scores(model, MOONS), margin_scores(copy.deepcopy(model).cpu(), MOONS), atol=1e-4)


@pytest.mark.parametrize("kind", [Explorer, FederatedExplorer])
@pytest.mark.parametrize("place", ["model", "data", "both"])
def test_an_explorer_shows_a_model_or_data_on_the_gpu(kind, place):
    data = Data(MOONS.X.cuda(), MOONS.y.cuda()) if place != "model" else MOONS
    make = on_gpu if place != "data" else models.mlp
    explorer = (
        Explorer(data, make, SETTINGS) if kind is Explorer else FederatedExplorer(data, make, SETTINGS, test_data=TEST)
    )
    explorer.wait(120)
    assert explorer.status.startswith("Finished"), explorer.status


def test_an_explorer_repeats_a_model_that_is_made_on_the_gpu_and_leaves_the_readers_random_numbers_alone():
    def make():
        with torch.device("cuda"):
            return torch.nn.Linear(2, 2)

    torch.cuda.manual_seed(5)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    ends = []
    for _ in range(2):
        explorer = Explorer(MOONS, make, SETTINGS)
        explorer.wait(120)
        ends.append([step.loss for step in explorer.steps])
    assert ends[0] == pytest.approx(ends[1])
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_divergence_is_seen_on_the_gpu():
    model = on_gpu()
    assert not diverged(model, MOONS)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    assert diverged(model, MOONS)


@private_methods
def test_a_run_without_a_seed_trains_on_the_gpu_and_never_repeats(method):
    models_ = [on_gpu(), on_gpu()]
    for model in models_:
        steps = list(
            train(model, MOONS, Settings(noise_multiplier=1.2, epochs=1, batch_size=50, seed=None), method=method)
        )
        assert len(steps) == 8 and all(p.is_cuda and bool(p.isfinite().all()) for p in model.parameters())
    assert not torch.allclose(flat(models_[0]), flat(models_[1]))
