"""Features of images for which no record pays: each is made of that image alone, and nothing was learned from data.

Hand-made knowledge stands in the place of public data: that a digit may lean and be large or small, that strokes have
directions, and how scribbles look that the computer draws itself.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 28  # pixels
FEATURES = 768  # 12 directions at 8 × 8 places


def fixed_features(images: Tensor, *, upright: bool = True) -> Tensor:
    """Oriented gradients of each image, whitened by those of scribbles, to length 1: what a linear model can learn on.

    Args:
        images: ``(n, 1, 28, 28)`` float32 in [0, 1].
        upright: first put each image upright, in the middle, and to one size: :func:`put_upright`.

    Returns:
        ``(n, 768)`` float32; a row depends on its own image only.

    Source: Dalal and Triggs 2005 (histograms of oriented gradients); Tramèr and Boneh 2020 (fixed features under DP).
    """
    mean, matrix = _of_scribbles(upright)
    parts = [F.normalize((_gradients(part, upright) - mean) @ matrix, dim=1) for part in images.split(1000)]
    return torch.cat(parts)


def put_upright(images: Tensor) -> Tensor:
    """Each image sheared until it does not lean, its mass in the middle, its spread 4 pixels across and 5 upright.

    Args:
        images: ``(n, 1, 28, 28)``. It is zoomed by at most 1.67 in, 1.5 out.

    Returns:
        Of the same shape, by bilinear interpolation.
    """
    X, at = images.flatten(0, 1), torch.arange(float(SIDE))
    mass = X.sum((1, 2)).clamp_min(1e-6)
    across, upright = X.sum(1), X.sum(2)
    x0, y0 = across @ at / mass, upright @ at / mass
    dx, dy = at - x0[:, None], at - y0[:, None]
    xx, yy = (across * dx**2).sum(1) / mass, (upright * dy**2).sum(1) / mass
    xy = torch.einsum("nij,ni,nj->n", X, dy, dx) / mass
    lean = xy / yy.clamp_min(1e-3)
    wide = ((xx - lean * xy).clamp_min(1e-3).sqrt() / 4).clamp(0.6, 1.5)
    tall = (yy.clamp_min(1e-3).sqrt() / 5).clamp(0.6, 1.5)
    middle, zero = (SIDE - 1) / 2, torch.zeros_like(wide)
    rows = wide, lean * tall, (x0 - middle) * 2 / SIDE, zero, tall, (y0 - middle) * 2 / SIDE
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def scribbles(n: int, seed: int = 0) -> Tensor:
    """``(n, 1, 28, 28)``: one or two random Bézier curves each. Drawn by the computer; no record is in them."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, 24)
    curve = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    at = torch.arange(float(SIDE))
    drawn = []
    for k in range(0, n, 500):
        ends = torch.rand(2, min(500, n - k), 4, 2, generator=generator) * 18 + 5
        single = torch.rand(ends.shape[1], generator=generator) < 0.5
        ends[1, single] = ends[0, single]
        x, y = torch.einsum("kt,cnkd->dnct", curve, ends).flatten(2).unbind(0)
        far = (at - x[..., None, None]) ** 2 + (at[:, None] - y[..., None, None]) ** 2
        drawn.append((1.9 - far.amin(1).sqrt()).clamp(0, 1))
    return torch.cat(drawn).unsqueeze(1)


def _gradients(images: Tensor, upright: bool) -> Tensor:
    """``(n, 768)``: how much of a stroke's edge looks each way, at each place; rows of length 1."""
    blur = _bells(torch.arange(SIDE), 0.7)
    X = blur @ (put_upright(images) if upright else images).flatten(0, 1) @ blur.T
    right, down = torch.zeros_like(X), torch.zeros_like(X)
    right[:, :, 1:-1], down[:, 1:-1] = (X[:, :, 2:] - X[:, :, :-2]) / 2, (X[:, 2:] - X[:, :-2]) / 2
    size = (right**2 + down**2).sqrt()
    pool, ways = _bells(torch.linspace(1.5, SIDE - 2.5, 8), 2), 12
    maps = []
    for angle in (2 * math.pi * k / ways for k in range(ways)):
        along = (right * math.cos(angle) + down * math.sin(angle)) / (size + 1e-9)
        maps.append((pool @ (along.clamp_min(0) ** 4 * size.sqrt()) @ pool.T).flatten(1))
    return F.normalize(torch.cat(maps, 1), dim=1)


def _bells(centres: Tensor, spread: float) -> Tensor:
    """``(k, 28)``: a bell around each centre, over the pixels; each sums to 1."""
    heights = (-((torch.arange(SIDE) - centres[:, None]) ** 2) / (2 * spread**2)).exp()
    return heights / heights.sum(1, keepdim=True)


@functools.cache
def _of_scribbles(upright: bool) -> tuple[Tensor, Tensor]:
    """Their mean, and a matrix that makes what is common in them as rare as the rest, half way (power ¼)."""
    rows = _gradients(scribbles(6000), upright)
    mean = rows.mean(0)
    centred = F.normalize(rows - mean, dim=1).double()
    sizes, ways = torch.linalg.eigh(centred.T @ centred / len(rows))
    return mean, (ways * (sizes.clamp_min(0) + 1e-3) ** -0.25 @ ways.T).float()
