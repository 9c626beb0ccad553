"""What a run is made of: σ, C, epochs, batch size, learning rate, δ, seed."""

import math
from dataclasses import dataclass

from dpteach._checks import clipping_norm, number, whole


@dataclass(frozen=True)
class Settings:
    """What a run is made of. Frozen; ``dataclasses.replace`` makes a changed copy.

    Args:
        noise_multiplier: σ >= 0. The noise on the clipped sum has standard deviation σ·C.
        max_grad_norm: C >= 1e-20, the bound on the L2 norm of a sample's gradient; ``inf`` only where σ = 0.
        epochs: passes over the data, >= 1. One epoch is ⌈n / batch_size⌉ steps.
        batch_size: >= 1 and at most the number of records. Under Poisson sampling each record takes part in a step
            with probability q = 1 / ⌈n / batch_size⌉, so the *expected* batch is n·q, the sizes vary.
        lr: learning rate > 0.
        target_delta: δ in (0, 1), the one at which ε is reported.
        seed: >= 0; the same seed repeats the run bit for bit on one machine: for a lesson. None draws sampling and
            noise from the operating system's cryptographic random numbers, which nobody can repeat: for a release.

    Raises:
        ValueError: names the argument, its value and what it may be.

    >>> Settings(max_grad_norm=-1.0)
    Traceback (most recent call last):
    ValueError: max_grad_norm must be a number > 0, got -1.0
    """

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.5
    target_delta: float = 1e-5
    seed: int | None = 0

    def __post_init__(self) -> None:
        number("noise_multiplier", self.noise_multiplier, low=0)
        clipping_norm(self.max_grad_norm)
        if math.isinf(self.max_grad_norm) and self.noise_multiplier > 0:
            raise ValueError("max_grad_norm must be finite where noise_multiplier > 0, got inf: the noise is σ·C")
        number("lr", self.lr, low=0, above=True)
        number("target_delta", self.target_delta, low=0, above=True, high=1)
        for name, low in (("epochs", 1), ("batch_size", 1), *([] if self.seed is None else [("seed", 0)])):
            object.__setattr__(self, name, whole(name, getattr(self, name), low=low))  # 10.0, as a slider says, is 10

    def steps_per_epoch(self, n: int) -> int:
        """⌈n / batch_size⌉ for ``n`` records. ValueError if the batch is larger than the data."""
        if self.batch_size > n:
            raise ValueError(f"batch_size must be at most the number of records ({n}), got {self.batch_size}")
        return math.ceil(n / self.batch_size)

    def sample_rate(self, n: int) -> float:
        """The sample rate q for ``n`` records: one over the number of steps in an epoch, as in Opacus."""
        return 1 / self.steps_per_epoch(n)
