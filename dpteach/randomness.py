"""Random numbers: from a seed, for a lesson that must repeat; from the operating system, for a release.

A ``torch.Generator`` on the CPU keeps 32 bits of its seed and is a Mersenne Twister: wrong for a release, since whoever
finds the seed subtracts the noise.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor


class SystemRandom:
    """Numbers from the operating system's cryptographic generator (``os.urandom``). It has no seed and no state.

    Takes the place of a ``torch.Generator`` in :func:`dpteach.mechanism.poisson_batches` and ``add_noise``.
    """

    def uniform(self, n: int) -> Tensor:
        """``(n,)`` float64 in [0, 1), on a grid of 2⁻⁵³."""
        bits = np.frombuffer(os.urandom(8 * n), dtype=np.uint64)
        return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)

    def normal(self, n: int) -> Tensor:
        """``(n,)`` float64 from N(0, 1).

        Two numbers of 53 bits make each two of these. Round the *noised* sum to float32, not the noise: the rounding
        then hides which sums float64 could have reached (Mironov 2012; Jin et al. 2022).

        Source: Box and Muller 1958.
        """
        half = (n + 1) // 2
        draws = self.uniform(2 * half)
        radius, angle = draws[:half], draws[half:]
        small = radius < 2.0**-20  # far out on the tail, 53 bits would leave gaps: 53 more
        radius[small] += self.uniform(int(small.sum())) * 2.0**-53
        radius = torch.sqrt(-2 * torch.log(radius.clamp(min=2.0**-106)))
        angle = 2 * math.pi * angle
        return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:n]


Random = torch.Generator | SystemRandom

RANDOM_STATE = threading.RLock()  # held by whoever swaps PyTorch's global random state, which all threads share


def generators(seed: int | None) -> tuple[Random, Random]:
    """One for the sampling and one for the noise: the same seed in both would tie the two together."""
    if seed is None:
        return SystemRandom(), SystemRandom()
    sampling, noise, _ = seeds(seed)
    return torch.Generator().manual_seed(sampling), torch.Generator().manual_seed(noise)


def seeds(seed: int | None) -> list[int]:
    """Three unlike numbers below 2⁶³ from one: for the sampling, the noise, and what the model draws."""
    return [int(s >> np.uint64(1)) for s in np.random.SeedSequence(seed).generate_state(3, dtype=np.uint64)]


def own_stream(device: torch.device, seed: int | None) -> Callable[[], AbstractContextManager[None]]:
    """A context for each forward pass: Dropout draws from the run's own stream; the reader's stays as it was.

    PyTorch's layers know the global stream only, so it is swapped, by one run at a time. Code of the reader's that
    draws from the global stream in another thread at that moment gets the run's numbers.
    """
    own = {"cpu": torch.Generator().manual_seed(seeds(seed)[2]).get_state()}
    if device.type == "cuda":
        own["cuda"] = torch.Generator(device).manual_seed(seeds(seed)[2]).get_state()

    def get(kind: str) -> Tensor:
        return torch.get_rng_state() if kind == "cpu" else torch.cuda.get_rng_state(device)

    def put(kind: str, state: Tensor) -> None:
        torch.set_rng_state(state) if kind == "cpu" else torch.cuda.set_rng_state(state, device)

    @contextmanager
    def swapped() -> Iterator[None]:
        with RANDOM_STATE:
            outside = {kind: get(kind) for kind in own}
            try:
                for kind, state in own.items():
                    put(kind, state)
                yield
            finally:
                for kind, state in outside.items():
                    own[kind] = get(kind)
                    put(kind, state)

    return swapped
