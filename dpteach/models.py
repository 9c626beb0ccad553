"""What to train: small models that learn on a CPU in seconds. A new model starts the same way for the same seed."""

import math
from collections.abc import Callable

import torch
from torch import nn

from dpteach._checks import choice, whole
from dpteach.randomness import RANDOM_STATE

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(
    inputs: int = 2, hidden: int = 20, outputs: int = 2, *, activation: str = "relu", seed: int = 0
) -> nn.Sequential:
    """A perceptron with one hidden layer; images are flattened first.

    Args:
        inputs: numbers per record (2 for two moons, 784 for MNIST).
        hidden: width of the hidden layer.
        outputs: number of classes.
        activation: ``"relu"`` or ``"tanh"``.
        seed: the same seed gives the same starting weights, whatever else draws random numbers.

    Raises:
        ValueError: if a width is < 1, or ``activation`` is not known.
    """
    inputs, hidden, outputs = (
        whole(k, v, low=1) for k, v in (("inputs", inputs), ("hidden", hidden), ("outputs", outputs))
    )
    act = _ACTIVATIONS[choice("activation", activation, _ACTIVATIONS)]
    return _started(nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), act(), nn.Linear(hidden, outputs)), seed)


def cnn(*, activation: str = "relu", seed: int = 0) -> nn.Sequential:
    """The small convolutional network for MNIST of Opacus' examples: 26,010 parameters, input (n, 1, 28, 28).

    ``activation="tanh"`` bounds the activations, which helps under clipping (Papernot et al. 2020).

    Args:
        activation: ``"relu"`` or ``"tanh"``.
        seed: the same seed gives the same starting weights.

    Raises:
        ValueError: if ``activation`` is not known.
    """
    act = _ACTIVATIONS[choice("activation", activation, _ACTIVATIONS)]
    return _started(
        nn.Sequential(
            nn.Conv2d(1, 16, 8, stride=2, padding=3),
            act(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            act(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            act(),
            nn.Linear(32, 10),
        ),
        seed,
    )


def start(make_model: Callable[[], nn.Module], seed: int | None) -> nn.Module:
    """``make_model()``, the same for the same seed whatever it draws from, and the global random numbers as they were.

    The models of this room have a seed of their own. A reader's knows PyTorch's global generator only, which is swapped
    here by one thread at a time; code of the reader's that draws from it at that moment gets other numbers.

    Args:
        make_model: as for an explorer.
        seed: >= 0; None, for a run that nobody is to repeat, leaves the generator as it stands.
    """
    if seed is None:
        return make_model()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with RANDOM_STATE, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return make_model()


def _started(model: nn.Sequential, seed: int) -> nn.Sequential:
    # PyTorch's own start for these layers, U(-1/√fan_in, 1/√fan_in), but from a generator of its own: the global one
    # is shared with every thread and cell, so a run could not be repeated.
    generator = torch.Generator().manual_seed(whole("seed", seed, low=0))
    for layer in model:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return model
