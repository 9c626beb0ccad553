"""Random numbers that nobody can repeat: for a model that leaves the house.

A ``torch.Generator`` on the CPU keeps 32 bits of its seed and is a Mersenne Twister: right for a lesson, which must
repeat, and wrong for a release, since whoever finds the seed subtracts the noise.
"""

import math
import os

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
