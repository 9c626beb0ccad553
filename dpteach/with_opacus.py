"""DP-SGD by Opacus: ``PrivacyEngine.make_private``, kept from releasing more than the noisy gradient."""

import warnings
from collections.abc import Generator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from opacus.accountants import RDPAccountant
from torch import Tensor, nn

from dpteach.bookkeeping import draws
from dpteach.data import Data
from dpteach.guards import copied, kept_still, same_shape, shape_of, vouch
from dpteach.mechanism import add_noise, per_sample_gradients, poisson_batches, sample_losses
from dpteach.randomness import SystemRandom, generators, own_stream
from dpteach.settings import Settings


def _say_nothing_of_hooks() -> None:
    """No input asks for a gradient, and the parameters' gradients are right all the same.

    A filter that stays: a generator can't hold ``warnings.catch_warnings`` open between its steps.
    """
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


class _QuietEngine(PrivacyEngine):
    """Says nothing of its random numbers: ``SystemRandom`` is here for a release.

    A filter for the warning would belong to all threads.
    """

    def __init__(self) -> None:
        self.accountant, self.secure_mode, self.secure_rng, self.dataset = RDPAccountant(), False, None, None


def opacus_steps(model: nn.Module, data: Data, settings: Settings, optimizer: Any) -> Generator[float, None, None]:
    """:func:`dpteach.training.dpsgd_steps`, but ``PrivacyEngine.make_private`` clips and adds the noise."""
    n, device = len(data), data.X.device
    sampling, noise = generators(settings.seed)
    own_random_numbers = own_stream(device, settings.seed) if draws(model) else nullcontext
    seeded = noise if isinstance(noise, torch.Generator) else None
    if seeded and device.type != "cpu":  # Opacus draws the noise where the model is
        seeded = torch.Generator(device).manual_seed(seeded.initial_seed())
    loader = torch.utils.data.DataLoader(data, batch_size=settings.batch_size)
    private, optimizer, _ = _QuietEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_generator=seeded,
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=min(settings.max_grad_norm, torch.finfo(torch.float32).max),  # σ·C would be 0·inf = NaN
    )
    # Opacus rounds n·q down, to 3 for 10/3 and to 0 for 49 · (1/49). Its loader, which is not used here, rounds 1/q
    # down (92 steps where 93 were meant) and draws q on a grid of 2⁻²⁴.
    q = settings.sample_rate(n)
    _say_nothing_of_hooks()
    optimizer.expected_batch_size = n * q
    if isinstance(noise, SystemRandom):
        optimizer.add_noise = lambda: _noise_from_the_system(optimizer, noise)
    shape = shape_of(model)
    try:
        for batch in poisson_batches(n, q, settings.epochs * settings.steps_per_epoch(n), sampling):
            X, y = data[batch]
            if not same_shape(shape, shape_of(model)):
                raise ValueError(
                    "model must stay as it is while Opacus trains it: a layer or a hook has changed since the run began"
                )
            if len(batch):
                with kept_still(model):
                    with own_random_numbers():
                        losses = sample_losses(F.cross_entropy, private(X), y)
                    # Opacus multiplies by the batch's size; cross_entropy's own mean would divide by the labels that it
                    # does not ignore.
                    (losses.sum() / len(X)).backward()
            else:  # some layers can't run on nothing, and that would tell
                losses = X.new_zeros(0)
            _check_rows(optimizer, len(X))
            optimizer.step()
            # The clipped sum, without noise, is kept on the parameters until then. Opacus' default leaves zeros.
            optimizer.zero_grad(set_to_none=True)
            yield losses.mean().item()
    finally:
        private.to_standard_module()
        model.zero_grad(set_to_none=True)
        for p in model.parameters():  # what is of the records would be pickled with a whole model
            vars(p).pop("grad_sample", None)
            vars(p).pop("summed_grad", None)
        for layer in model.modules():
            vars(layer).pop("activations", None)
            vars(layer).pop("max_batch_len", None)


def check_gradients(model: nn.Module, X: Tensor, y: Tensor) -> None:
    """ValueError if Opacus' gradients of a few records are not those of each alone, or the model is of half precision.

    It takes the first dimension of each layer's input, whatever the model has made of it, for the records.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise ValueError(
            "model must be float32 or float64 with method='opacus', which sums in the model's precision: use "
            "model.float()"
        )
    finite = X.reshape(len(X), -1).isfinite().all(1)
    X, y = X[finite], y[finite]
    if len(X) == 0:
        return
    still = copied(model)
    for layer in still.modules():  # nothing draws; Opacus looks at layers with parameters of their own in training only
        layer.training &= any(p.requires_grad for p in layer.parameters(recurse=False))
    vouch(still)
    ours = per_sample_gradients(still, F.cross_entropy, X, y)
    wrapped = GradSampleModule(copied(still))
    _say_nothing_of_hooks()
    with torch.enable_grad():
        (sample_losses(F.cross_entropy, wrapped(X.clone()), y).sum() / len(X)).backward()
    trained = [(p.grad_sample, p) for p in wrapped.parameters() if p.requires_grad]
    theirs = [p.new_zeros(len(X), p.numel()) if rows is None else rows.flatten(1) for rows, p in trained]
    near = {"rtol": 1e-3, "atol": 1e-4 * float(ours.nan_to_num().abs().max()) + 1e-12}
    alike = all(len(rows) == len(X) for rows in theirs)
    if not (alike and torch.allclose(torch.cat(theirs, 1), ours, **near, equal_nan=True)):
        raise ValueError(
            "model must treat each sample alone along the first dimension in every layer, but Opacus' gradients of "
            "three records are not those of each record alone: clipping would bound something else. Use "
            "method='dpsgd', which takes each record alone."
        )


def _check_rows(optimizer: Any, records: int) -> None:
    """One gradient a record, and finite.

    Opacus turns an infinity into a model of NaN, which tells that the record took part. It counts as zero, as in
    ``clip``.
    """
    for p in optimizer.params:
        if p.grad_sample is None:  # a parameter that this batch did not use, or an empty batch
            p.grad_sample = p.new_zeros(records, *p.shape)
        if len(p.grad_sample) != records:
            raise ValueError(
                f"model must treat each sample alone, but Opacus found {len(p.grad_sample)} gradients for {records} "
                "records: a layer sees another first dimension. Use method='dpsgd', which takes each record alone."
            )
    finite = torch.stack([p.grad_sample.flatten(1).isfinite().all(1) for p in optimizer.params]).all(0)
    if not bool(finite.all()):
        for p in optimizer.params:
            p.grad_sample[~finite] = 0.0


def _noise_from_the_system(optimizer: Any, noise: SystemRandom) -> None:
    for p in optimizer.params:
        p.grad = add_noise(p.summed_grad, optimizer.noise_multiplier, optimizer.max_grad_norm, noise).view_as(p)
