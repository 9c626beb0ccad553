"""A run of an explorer as a script for Opacus that runs as it is."""

import re

from torch import nn

from dpteach.data import Data
from dpteach.explorer.controls import number_text
from dpteach.explorer.training import Run

_OPTIMIZERS = {"sgd": "SGD(model.parameters(), lr={})", "momentum": "SGD(model.parameters(), lr={}, momentum=0.9)"}
_OPTIMIZERS["adam"] = "Adam(model.parameters(), lr={})"

_SEED = "torch.manual_seed({})  # for a lesson; a release needs PrivacyEngine(secure_mode=True)"

_SCRIPT = '''"""Private training with Opacus. The explorer got: {result}

    pip install torch "opacus>=1.4"
    python train_private.py
"""

import opacus
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpteach.data import {loaders}  # or your own records: tensors X and y; none may make the loss infinite

if tuple(map(int, opacus.__version__.split(".")[:2])) < (1, 4):
    raise SystemExit(f"Opacus 1.4 or newer is needed, got {{opacus.__version__}}: pip install --upgrade opacus")

{seed}
records = {records}
unseen = {unseen}

model = nn.Sequential(
{layers}
)
optimizer = torch.optim.{optimizer}
loader = DataLoader(TensorDataset(records.X, records.y), batch_size={batch_size})
batch = len(records) / len(loader)  # expected: Poisson sampling, each record with probability 1 / len(loader)

engine = opacus.PrivacyEngine(accountant="rdp")  # "prv" says less than this bound, and takes longer
model, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier={sigma}, max_grad_norm={C}
)
optimizer.expected_batch_size = batch  # Opacus rounds it down

for epoch in range(1, {epochs} + 1):
    model.train()
    for X, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(unseen.X).argmax(1) == unseen.y).float().mean().item()
    epsilon = engine.get_epsilon({delta})
    print(f"epoch {{epoch}}: ε = {{epsilon:.2f}} at δ = {delta}, accuracy {{accuracy:.3f}}")
'''


def opacus_script(run: Run, test_data: Data, result: str) -> str:
    """``train_private.py``: the run's records, model and settings, with Opacus in place of our own steps.

    Args:
        run: of one worker; its model is an ``nn.Sequential`` of layers of PyTorch's.
        test_data: for the accuracy.
        result: what the explorer got, for the head of the script.

    Raises:
        ValueError: if nobody knows what makes the records, or the model is of another kind.
    """
    worker, s = run.workers[0], run.settings
    sources = worker.data.source, test_data.source
    if not all(sources):
        raise ValueError(
            "data must have a source for a script: records of two_moons or load_mnist, and .take(n) of them"
        )
    layers = list(run.model) if type(run.model) is nn.Sequential else [run.model]
    if any(getattr(nn, type(layer).__name__, None) is not type(layer) or list(layer.children()) for layer in layers):
        raise ValueError(f"make_model must make an nn.Sequential of PyTorch's layers for a script, got {run.model}")
    return _SCRIPT.format(
        result=result,
        loaders=", ".join(sorted({re.split(r"\W", source)[0] for source in sources})),
        seed="# No seed, but 32 bits can be tried: a release needs PrivacyEngine(secure_mode=True)"
        if s.seed is None
        else _SEED.format(s.seed),
        records=sources[0],
        unseen=sources[1],
        layers="\n".join(f"    nn.{layer}," for layer in layers),
        optimizer=_OPTIMIZERS[worker.optimizer].format(s.lr),
        batch_size=s.batch_size,
        sigma=s.noise_multiplier,
        C=s.max_grad_norm,
        epochs=s.epochs,
        delta=number_text(s.target_delta),
    )
