"""The client of the Flower app: one private round on the records of one node, charged before it is trained.

Every message starts a new process, so nothing in memory lasts. ``Context.state`` lasts as long as the SuperNode and the run;
the ledger's file outlasts both.
"""

import secrets
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpteach import models
from dpteach._checks import choice
from dpteach.accounting import Ledger
from dpteach.data import Data, load_mnist, split
from dpteach.federated import Worker
from dpteach.training import Settings

app = ClientApp()

MODELS = {"mlp": lambda: models.mlp(784, 64, 10), "cnn": models.cnn}


@app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    return Message(answer(message.content["arrays"], context), reply_to=message)


def answer(arrays: ArrayRecord, context: Context) -> RecordDict:
    """What :func:`train_round` returns, or a refusal with its reason, in which case nothing was trained."""
    try:
        return train_round(arrays, context)
    except (ValueError, OSError) as error:
        return RecordDict({"refusal": ConfigRecord({"name": _name(context), "why": str(error)})})


def train_round(arrays: ArrayRecord, context: Context) -> RecordDict:
    """One round on this node's records.

    Returns:
        The model, and ``epsilon``, ``epsilon-by-state``, ``steps``, ``num-examples``.
        No loss: it is computed from private records, and no noise covers it.
        The number of records is taken as public: the average is weighted by it.

    Raises:
        ValueError: if a setting is out of its range, or the ledger is damaged or not named.
        OSError: if the ledger can't be written, or the data file can't be read.
    """
    config = {**context.run_config, **context.node_config}
    model = MODELS[choice("model", config["model"], MODELS)]()
    model.load_state_dict(arrays.to_torch_state_dict())
    settings = Settings(
        noise_multiplier=config["noise-multiplier"], max_grad_norm=config["max-grad-norm"],
        epochs=config["local-epochs"], batch_size=config["batch-size"], lr=config["lr"],
        target_delta=config["target-delta"],
        seed=secrets.randbits(62),  # whoever knows the seed can subtract the noise
    )
    name, data = _name(context), _records(config)
    if choice("privacy", config["privacy"], ("sample", "client")) == "sample":
        worker = Worker(name, data, settings, Ledger(_ledger_file(config, name)))
    else:  # no noise here: the server clips and adds it
        worker = Worker(name, data, settings, method="sgd")
    for _ in worker.train_round(model):  # charges the ledger first
        pass
    metrics = {"num-examples": len(data)}
    if worker.method == "dpsgd":
        metrics |= {"epsilon": worker.epsilon("rdp"), "steps": worker.ledger.steps,
                    "epsilon-by-state": _by_state(context, worker)}
    return RecordDict({
        "arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics),
        "who": ConfigRecord({"name": name}),
    })


def _name(context: Context) -> str:
    partition = context.node_config.get("partition-id", 0)
    return str(context.node_config.get("name", f"client-{partition:02d}"))


def _records(config: dict) -> Data:
    """The node's own file where node-config names one (``data``), else its part of MNIST."""
    if "data" in config:
        own = torch.load(config["data"], weights_only=True)
        data = Data(own["X"], own["y"])
    else:
        data = split(load_mnist(), int(config["num-partitions"]))[int(config["partition-id"])]
    return data.take(min(int(config["records"]), len(data))) if config["records"] else data


def _ledger_file(config: dict, name: str) -> Path:
    if config.get("ledger"):
        return Path(config["ledger"])
    if config["ledgers"]:
        return Path(config["ledgers"]) / f"{name}.json"
    raise ValueError("ledger must be named in --node-config, as ledger=\"/folder/file.json\", got none: nothing is trained uncounted")


def _by_state(context: Context, worker: Worker) -> float:
    """ε as an app would report it that keeps its history in ``Context.state``: too little after a restart or in a second run."""
    kept = context.state.get("history", {"noise-multiplier": [], "sample-rate": [], "steps": []})
    new = worker.ledger.charges[-1]
    history = {
        "noise-multiplier": [*kept["noise-multiplier"], new.noise_multiplier],
        "sample-rate": [*kept["sample-rate"], new.sample_rate],
        "steps": [*kept["steps"], new.steps],
    }
    context.state["history"] = MetricRecord(history)
    remembered = Ledger()
    for sigma, q, steps in zip(*history.values()):
        remembered.charge(noise_multiplier=sigma, sample_rate=q, steps=int(steps))
    return remembered.epsilon(target_delta=worker.settings.target_delta, accountant="rdp")
