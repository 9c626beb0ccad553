"""Scenes in which privacy costs something, each with a learning rate tuned for either run.

``.ci/tune`` tries the learning rates, and writes what each reached into ``scenes.csv``; the best stand below.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dpteach import models
from dpteach.data import Data, load_breast_cancer, load_mnist, two_moons
from dpteach.training import Settings


@dataclass(frozen=True)
class Scene:
    """Something to train on: the arguments of an :class:`Explorer`."""

    data: Data
    make_model: Callable[[], nn.Module]
    settings: Settings
    test_data: Data
    baseline_lr: float | None = None
    challenge: tuple[float, float] | None = None


def scenes() -> dict[str, Scene]:
    """Five to choose from, by the name that a menu shows: two in the plane, two of images, and a table.

    The learning rates are the best of those that were tried, for σ = 1 and C = 1 and without privacy, by the accuracy
    on the test records: to teach with. An ε that is to hold covers such a search too.
    """
    digits, unseen_digits = load_mnist().take(4000), load_mnist(train=False).take(2000)
    moons, few, unseen = two_moons(150, noise=0.1), two_moons(50, noise=0.1), two_moons(2000, seed=1, noise=0.1)
    patients, others = load_breast_cancer(), load_breast_cancer(train=False)
    return {
        "two moons": Scene(
            moons, models.mlp, Settings(epochs=30, batch_size=15, lr=1.0, seed=1), unseen, 2.0, (2.0, 0.9)
        ),
        "two moons, 50 records": Scene(few, models.mlp, Settings(epochs=40, batch_size=25, lr=4.0), unseen, 2.0),
        "MNIST, perceptron": Scene(digits, _perceptron, Settings(epochs=10, lr=2.0), unseen_digits, 0.5),
        "MNIST, convolutions": Scene(digits, _convolutions, Settings(epochs=5, lr=2.0), unseen_digits, 0.5),
        "breast cancer, 400 patients": Scene(
            patients, _of_patients, Settings(epochs=20, batch_size=32, lr=0.5), others, 2.0
        ),
    }


def _perceptron() -> nn.Module:
    return models.mlp(784, 32, 10)


def _convolutions() -> nn.Module:
    return models.cnn(activation="tanh")


def _of_patients() -> nn.Module:
    return models.mlp(30, 16, 2)
