"""The client of the Flower app: one private round on the records of one node, charged before it is trained.

Every message starts a new process, so nothing in memory lasts. ``Context.state`` lasts as long as the SuperNode and the
run; the ledger's file outlasts both.
"""

import functools
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod

from dpteach import models
from dpteach._checks import choice, number
from dpteach.accounting import Ledger, epsilon
from dpteach.data import Data, load_mnist, split
from dpteach.federated import Worker
from dpteach.training import Settings

app = ClientApp()

MODELS = {"mlp": lambda: models.mlp(784, 64, 10), "cnn": models.cnn}
PRIVATE = ("dpsgd", "opacus")  # the methods that a run may choose from

# What a node does with its records if its own --node-config doesn't say otherwise. A run can't change it.
NODE = {"noise-multiplier": 1.3, "max-grad-norm": 1.0, "target-delta": 1e-5}
ONLY_THE_NODES = {*NODE, "max-epsilon", "ledger", "ledgers", "data", "name", "partition-id", "num-partitions"}
# How a whole client is protected. A run says so, but for what a node names itself: then the run must say the same. A
# node that trusts nobody names clipping="local", or a run could have its update as it is.
BOTH = ("clipping", "clipping-norm", "local-epsilon", "server-target-delta")
VARIABLE = "DPTEACH_NODES"  # a file of JSON in place of --node-config, for virtual nodes, which have none


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one round's message: train, and send the model with what it has cost."""
    torch.set_num_threads(1)
    reply, run = Message(answer(message.content["arrays"], context), reply_to=message), context.run_config
    if run["privacy"] == "sample" or run["clipping"] in ("server", "adaptive") or "refusal" in reply.content:
        return reply
    C, of = run["clipping-norm"], (run["local-epsilon"], run["server-target-delta"])
    mod = fixedclipping_mod if run["clipping"] == "client" else LocalDpMod(C, 2 * C, *of)  # one update for another: 2C
    return mod(message, context, lambda *_: reply)


def answer(arrays: ArrayRecord, context: Context) -> RecordDict:
    """What :func:`train_round` returns, or a refusal with its reason: then nothing was trained."""
    try:
        return train_round(arrays, context)
    except (ValueError, OSError) as error:
        return RecordDict({"refusal": ConfigRecord({"name": _name(own_config(context)), "why": str(error)})})


def train_round(arrays: ArrayRecord, context: Context) -> RecordDict:
    """One round on this node's records.

    Returns:
        The model, and ``epsilon``, ``epsilon-by-state``, ``steps``, ``num-examples``.
        No loss: it is computed from private records, and no noise covers it.
        The number of records is taken as public: the average is weighted by it.

    Raises:
        ValueError: if the run asks for what only the node may decide, a setting is out of its range, or the ledger is
            gone, damaged or not named.
        OSError: if the ledger can't be written, or the data file can't be read.
    """
    node, run = own_config(context), context.run_config
    check_request(node, run)
    model = MODELS[choice("model", run["model"], MODELS)]()
    model.load_state_dict(arrays.to_torch_state_dict())
    settings = Settings(
        noise_multiplier=node["noise-multiplier"],
        max_grad_norm=node["max-grad-norm"],
        target_delta=node["target-delta"],
        epochs=run["local-epochs"],
        batch_size=run["batch-size"],
        lr=run["lr"],
        seed=None,  # from the operating system: whoever knows a seed can compute the noise and subtract it
    )
    # Without noise on the node, for the server to clip and add it, a ledger that the node names says so: ε is infinite.
    method = choice("method", node.get("method", run["method"]), PRIVATE) if run["privacy"] == "sample" else "sgd"
    worker = Worker(_name(node), records(node, run), settings, _ledger(node, method), method=method)
    check_budget(node, worker)
    for _ in worker.train_round(model):  # charges the ledger first
        pass
    metrics = {"num-examples": len(worker.data)}
    if method != "sgd":
        metrics |= {"epsilon": worker.epsilon("rdp"), "steps": worker.ledger.steps}
        metrics |= {"epsilon-by-state": _by_state(context, worker)}
    who = ConfigRecord({"name": worker.name})
    return RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics), "who": who})


def own_config(context: Context) -> dict:
    """What the node itself has said: :data:`NODE`, and over it its ``--node-config``."""
    file = os.environ.get(VARIABLE)
    virtual = json.loads(Path(file).read_text(encoding="utf8")) if file else {}
    return NODE | virtual | context.node_config


def check_request(node: dict, run: dict) -> None:
    """Refuse a run that would decide what only the node may: its protection, its records, its ledger.

    Raises:
        ValueError: names the key, its value, and who may set it.
    """
    for key in sorted(ONLY_THE_NODES & run.keys()):
        only = "only a node's own --node-config may set it"
        raise ValueError(f"{key} must not be in a run's config, got {run[key]!r}: {only}")
    if choice("privacy", run["privacy"], ("sample", "client")) == "client" and node.get("privacy") != "client":
        raise ValueError(
            "privacy must be 'sample' on this node, got 'client' from the run, which is training without noise: only "
            'the node\'s own --node-config can agree to that, with privacy="client"'
        )
    for key in BOTH if run["privacy"] == "client" else ():
        if key in node and node[key] != run.get(key):
            raise ValueError(
                f"{key} must be {node[key]!r}, as this node's own --node-config says, got {run.get(key)!r}"
            )


def check_budget(node: dict, worker: Worker) -> None:
    """Refuse a round after which ε would be above the node's ``max-epsilon``, if it has one."""
    if "max-epsilon" not in node:
        return
    after, sigma = Ledger(), 0.0 if worker.method == "sgd" else worker.settings.noise_multiplier
    for charge in worker.ledger.charges:
        after.charge(**asdict(charge))
    after.charge(noise_multiplier=sigma, sample_rate=worker.sample_rate, steps=worker.steps_per_round)
    spent = after.epsilon(target_delta=worker.settings.target_delta, accountant="rdp")
    if spent > (limit := number("max-epsilon", node["max-epsilon"], low=0)):
        raise ValueError(f"max-epsilon is {limit:g} on this node, and after the round ε would be {spent:.4g}")


def _name(node: dict) -> str:
    return str(node.get("name", f"client-{node.get('partition-id', 0):02d}"))


def records(node: dict, run: dict) -> Data:
    """A node's own file where its config names one (``data``), else its part of MNIST; a run may ask for fewer."""
    if "data" in node:
        own = torch.load(node["data"], weights_only=True)
        data = Data(own["X"], own["y"])
    else:
        data = _parts(int(node["num-partitions"]))[int(node["partition-id"])]
    return data.take(min(int(run["records"]), len(data))) if run["records"] else data


@functools.cache  # one of Ray's processes answers for many virtual nodes
def _parts(count: int) -> list[Data]:
    return split(load_mnist(), count)


def _ledger(node: dict, method: str) -> Ledger:
    if node.get("ledger"):
        return Ledger(node["ledger"])
    if node.get("ledgers"):
        return Ledger(Path(node["ledgers"]) / f"{_name(node)}.json")
    if method == "sgd":
        return Ledger()
    raise ValueError(
        'ledger must be named in --node-config, as ledger="/folder/file.json", got none: nothing is trained uncounted'
    )


def _by_state(context: Context, worker: Worker) -> float:
    """ε of the steps in ``Context.state``, all of one run: too little after a restart, or in a second run."""
    new = worker.ledger.charges[-1]
    steps = context.state.get("charged", {"steps": 0})["steps"] + new.steps
    context.state["charged"] = MetricRecord({"steps": steps})
    setting = {**asdict(new), "steps": steps, "target_delta": worker.settings.target_delta}
    return epsilon(**setting, accountant="rdp")
