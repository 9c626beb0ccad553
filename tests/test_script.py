"""The exported script: it runs as it is, in a process of its own, and gets what the explorer got."""

import dataclasses
import re
import subprocess
import sys

import pytest
from torch import nn

from dpteach import Explorer, models, scenes, two_moons
from dpteach.data import Data
from dpteach.training import OPTIMIZERS, Settings


def exported(folder, explorer):
    """The script's last line: ε and accuracy."""
    (folder / "train_private.py").write_text(explorer.script(), encoding="utf8")
    ran = subprocess.run([sys.executable, "train_private.py"], cwd=folder, capture_output=True, encoding="utf8")
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = re.findall(r"epoch (\d+): ε = ([\d.]+) at δ = 1e-5, accuracy ([\d.]+)", ran.stdout)
    assert [int(epoch) for epoch, _, _ in lines] == list(range(1, explorer.run.settings.epochs + 1))
    return [float(value) for value in lines[-1][1:]]


@pytest.mark.parametrize("name", ["breast cancer, 400 patients", "MNIST, convolutions"])
def test_the_script_runs_as_it_is_and_gets_the_explorers_epsilon_and_accuracy(tmp_path, name):
    scene = scenes()[name]
    explorer = Explorer(scene.data, scene.make_model, scene.settings, test_data=scene.test_data, baseline=False)
    explorer.wait(120)
    assert explorer._script.value == explorer.script()
    epsilon, accuracy = exported(tmp_path, explorer)
    assert epsilon == pytest.approx(explorer.run.bound["worker"], abs=0.006)
    assert accuracy == pytest.approx(explorer.run.accuracy, abs=0.05)  # other random numbers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_script_has_every_setting_and_survives_an_empty_batch(tmp_path, optimizer):
    settings = Settings(2.5, 0.3, epochs=2, batch_size=1, lr=0.05, seed=None)
    explorer = Explorer(two_moons(60).take(50), models.mlp, settings, optimizer=optimizer, baseline=False)
    explorer.wait(60)
    epsilon, _ = exported(tmp_path, explorer)
    assert epsilon == pytest.approx(explorer.run.bound["worker"], abs=0.006)
    for words in ("noise_multiplier=2.5", "max_grad_norm=0.3", "batch_size=1)", "lr=0.05", "take(50)", "No seed"):
        assert words in explorer.script(), words


def test_a_script_that_could_not_run_is_refused_with_the_reason():
    moons, quick = two_moons(100), Settings(epochs=1, batch_size=50)
    own = nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    for records, make_model, why in (
        (Data(moons.X, moons.y), models.mlp, "data must have a source"),
        (moons, lambda: own, "make_model must make an nn.Sequential of PyTorch's layers"),
    ):
        explorer = Explorer(records, make_model, quick, baseline=False)
        explorer.wait(30)
        with pytest.raises(ValueError, match=why):
            explorer.script()
        assert explorer._script.value.startswith(f"# {why}")
    plain = Explorer(moons, models.mlp, dataclasses.replace(quick, lr=1.0), method="sgd")
    plain.wait(30)
    with pytest.raises(ValueError, match="needs a private run that went to its end"):
        plain.script()
