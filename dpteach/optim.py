"""What takes the step from a gradient: SGD, SGD with momentum, Adam."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class SGD:
    """``torch.optim.SGD``, to the bit, without its imports.

    The first optimizer from ``torch.optim`` imports PyTorch's compiler: 150 MB, and seconds before the first step of a
    learner's first run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.0):
        self.parameters, self.lr, self.momentum = list(parameters), lr, momentum
        self.velocities: dict[nn.Parameter, Tensor] = {}

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move each parameter that has a gradient."""
        for p in self.parameters:
            if p.grad is None:
                continue
            change = p.grad
            if self.momentum:
                before = self.velocities.get(p)
                change = change.clone() if before is None else before.mul_(self.momentum).add_(change)
                self.velocities[p] = change
            p.add_(change, alpha=-self.lr)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": SGD,
    "momentum": lambda parameters, lr: SGD(parameters, lr, momentum=0.9),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}
FOR_OPACUS: dict[str, Callable[..., torch.optim.Optimizer]] = {  # it takes torch.optim's only
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}
