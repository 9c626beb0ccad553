"""dpteach: the helper package of a workbook on differentially private training.

The rooms, from the ground up (each imports only from those before it):

- ``randomness``, ``guards``, ``bookkeeping``: random numbers for a release, what a model must be, a quick sum of
  clipped gradients
- ``data``, ``models``, ``mechanism``, ``accounting``, ``ledger``: what to train on, what to train, the four moves of
  DP-SGD, ε, and a file that keeps count
- ``training``: one generator for every way to train
- ``federated``, ``flower``: private workers whose models are averaged, in one process or each in processes of its own
- ``attacks``, ``experiments``: membership inference; runs too long for a notebook, stored
- ``plots``: pictures described once, drawn as live SVG or as a still
- ``explorer``, ``exercises``: sliders over real training; exercises that know the misconceptions

``import dpteach`` loads none of them: a name is loaded when it is first used.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Data": "data",
    "load_mnist": "data",
    "split": "data",
    "two_moons": "data",
    "poisson_batches": "mechanism",
    "per_sample_gradients": "mechanism",
    "clip": "mechanism",
    "clipped_sum": "mechanism",
    "add_noise": "mechanism",
    "SystemRandom": "randomness",
    "Ledger": "ledger",
    "epsilon": "accounting",
    "epsilon_path": "accounting",
    "noise_multiplier_for": "accounting",
    "Worker": "federated",
    "federated_average": "federated",
    "train_rounds": "federated",
    "Settings": "training",
    "Step": "training",
    "train": "training",
    "Explorer": "explorer",
    "Viewer": "explorer",
    "Range": "explorer",
    "FederatedExplorer": "explorer",
    "Playground": "explorer",
    "Scene": "explorer",
}
_ROOMS = (
    "accounting",
    "attacks",
    "data",
    "exercises",
    "experiments",
    "explorer",
    "federated",
    "flower",
    "guards",
    "ledger",
    "mechanism",
    "models",
    "plots",
    "randomness",
    "training",
)

__all__ = ["__version__", *_HOME, *_ROOMS]


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"dpteach.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"dpteach.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dpteach' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
