"""What limits a run, in two sentences, by what is measured on it."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach.explorer.training import Run
from dpteach.mechanism import clipped_sum
from dpteach.plots import short


def explain(run: Run, start: nn.Module) -> str:
    """Signal, noise and clipping of a private run that is over, and which of them, or its steps, holds it back.

    Noise, if it alone moves the weights further than training without privacy has moved them; too few or too small
    steps, if they came less far; else clipping, which bends the way. A rule of thumb, for plain SGD: the run with σ = 0
    tells for sure. All is computed from private gradients, and ε does not cover showing it.

    Args:
        run: of one worker.
        start: the model as it began.
    """
    worker, s = run.workers[0], run.settings
    few = worker.data.take(torch.linspace(0, len(worker.data) - 1, min(50, len(worker.data))).long())
    batch, steps = worker.sample_rate * len(worker.data), run.steps
    shortened, signal, device = [], [], next(run.model.parameters()).device
    for model in (start, run.model):
        # Sums over one record each: the general per-sample gradients would load PyTorch's compiler, for seconds.
        still = copy.deepcopy(model).eval()
        ones = zip(few.X.to(device).split(1), few.y.to(device).split(1))
        gradients = torch.stack([clipped_sum(still, F.cross_entropy, X, y, s.max_grad_norm) for X, y in ones])
        shortened.append(float((gradients.norm(dim=1) > 0.999 * s.max_grad_norm).float().mean()))
        signal.append(float(gradients.mean(0).norm()) * batch)
    noise = s.noise_multiplier * s.max_grad_norm * math.sqrt(gradients.shape[1])
    ratio = signal[0] / noise if noise else math.inf
    measured = (
        f"At the first step the signal is {short(ratio)} times the noise, over all {steps} about "
        f"{short(ratio * math.sqrt(steps))} times: it adds up like their number, noise like its root; C shortens "
        f"{shortened[0]:.0%} of the gradients at first, {shortened[1]:.0%} at the end."
    )
    without = run.baseline
    if worker.optimizer != "sgd" or without is None or without.accuracy is None or run.accuracy is None:
        return measured
    by_noise = s.lr * noise * math.sqrt(steps) / batch
    moved, plain = (float((_flat(m) - _flat(start)).norm()) for m in (run.model, without.model))
    if run.accuracy > without.accuracy - 0.015:
        return f"{measured} Nothing holds it back: it is as good as without privacy."
    if by_noise > plain:
        why = f"The noise holds it back: it alone moves the weights by about {short(by_noise)}"
    elif moved < plain:
        why = f"Too few or too small steps (learning rate times C) hold it back: the weights moved by {short(moved)}"
    else:
        why = f"Clipping holds it back: noise moves the weights by {short(by_noise)}, they moved by {short(moved)}"
    return f"{measured} {why}; without privacy they moved by {short(plain)}."


def _flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(p for p in model.parameters() if p.requires_grad).detach()
