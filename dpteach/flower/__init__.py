"""Federated averaging on Flower: the workers of :mod:`dpteach.federated`, each a process or a machine of its own.

This folder is the Flower app (``flwr run dpteach/flower``): ``server_app``, ``client_app`` and their
``pyproject.toml``. :class:`Federation` starts it on one machine, with a process a node, and leaves nothing behind.

Needs Flower 1.41 or newer, on Python 3.11 or newer; importing this package does not.
"""

import importlib
import importlib.util
from pathlib import Path

APP = Path(__file__).resolve().parent
MISSING = "Flower is not installed: it needs Python 3.11 or newer and `pip install 'flwr>=1.41'`."

__all__ = ["APP", "MISSING", "Federation", "FederatedRound", "Node", "Simulation", "installed"]


def installed() -> bool:
    """Whether Flower can be imported."""
    return importlib.util.find_spec("flwr") is not None


def __getattr__(name: str):
    if name in ("Federation", "FederatedRound", "Node", "Simulation"):
        return getattr(importlib.import_module("dpteach.flower.federation"), name)
    raise AttributeError(f"module 'dpteach.flower' has no attribute {name!r}")
