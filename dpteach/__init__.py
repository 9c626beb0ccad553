"""dpteach: the helper package of a workbook on differentially private training.

The rooms, from the ground up (each imports only from those before it):

- ``settings``, ``randomness``, ``guards``, ``bookkeeping``, ``perceptrons``, ``optim``: what a run is made of, random
  numbers, what a model must be, quick sums of clipped gradients, what takes the step
- ``data``, ``features``, ``models``, ``mechanism``, ``accounting``, ``ledger``: what to train on, what of it to look
  at, what to train, the four moves of DP-SGD, ε, and a file that keeps count
- ``training``, ``with_opacus``: one generator for every way to train, and the one by Opacus
- ``stack``: many runs trained as one
- ``federated``, ``flower``: private workers whose models are averaged, in one process or each in processes of its own
- ``attacks``, ``audit``, ``language``, ``speed``, ``experiments``: members found and images reconstructed; a lower
  bound on ε by experiment; a language model that gives a secret away; how long a private step takes; runs too long for
  a notebook, stored
- ``plots``: pictures described once, drawn as live SVG or as a still
- ``explorer``, ``exercises``: sliders over real training; exercises that know the misconceptions

``import dpteach`` loads none of them: a name is loaded when it is first used.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {
    "data": "Data load_mnist split two_moons",
    "settings": "Settings",
    "randomness": "SystemRandom",
    "mechanism": "poisson_batches per_sample_gradients clip clipped_sum add_noise",
    "accounting": "epsilon epsilon_path noise_multiplier_for",
    "ledger": "Ledger",
    "training": "Step train",
    "stack": "StackStep train_many",
    "federated": "Worker federated_average train_rounds",
    "explorer": "Explorer Viewer Range FederatedExplorer Playground Scene SurfaceExplorer scenes",
}
_HOME = {name: room for room, names in _NAMES.items() for name in names.split()}
_MORE = [
    "attacks",
    "audit",
    "exercises",
    "experiments",
    "features",
    "flower",
    "guards",
    "language",
    "models",
    "optim",
    "plots",
]
_ROOMS = sorted([*_NAMES, *_MORE])

__all__ = ["__version__", *_HOME, *_ROOMS]


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"dpteach.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"dpteach.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dpteach' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
