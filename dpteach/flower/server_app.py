"""The server of the Flower app: federated averaging that keeps each client's ε apart."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from dpteach._checks import choice
from dpteach.data import load_mnist
from dpteach.flower.client_app import MODELS
from dpteach.training import accuracy

app = ServerApp()


class RoundFailed(RuntimeError):
    """A client refused or did not answer; the message says which one and why."""


class NamedFedAvg(FedAvg):
    """Federated averaging over the nodes that are named: Flower takes a node that was killed for alive, for a minute.

    Args:
        only: the ids of the nodes that take part; all that are online if empty.
        everything else: as for Flower's ``FedAvg``.
    """

    def __init__(self, only: list[int], **everything_else):
        super().__init__(**everything_else)
        self.only = only

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message to each node that is named; Flower's own choice if none is."""
        if not self.only:
            return super().configure_train(server_round, arrays, config, grid)
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return [Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node) for node in self.only]


class ApartFedAvg(NamedFedAvg):
    """The same, and it stops at the first client that refuses or is lost, with its reason."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        """The average; RoundFailed at the first refusal."""
        return super().aggregate_train(server_round, answers(server_round, replies, self.min_train_nodes))


class Central(DifferentialPrivacyServerSideFixedClipping):
    """Flower's own central privacy, which stops at the first client that refuses or is lost, with its reason."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        """The noisy average; RoundFailed at the first refusal."""
        return super().aggregate_train(server_round, answers(server_round, replies, self.strategy.min_train_nodes))


def answers(server_round: int, replies: Iterable[Message], expected: int) -> list[Message]:
    """The replies of a round. RoundFailed if one is a refusal or an error, or if there are fewer than ``expected``."""
    replies = list(replies)
    for reply in replies:
        if reply.has_error():
            raise RoundFailed(f"a node did not answer in round {server_round}: {reply.error.reason}")
        if "refusal" in reply.content:
            refusal = reply.content["refusal"]
            raise RoundFailed(f"{refusal['name']} refused round {server_round}: {refusal['why']}")
    if len(replies) < expected:
        raise RoundFailed(f"round {server_round} got {len(replies)} of {expected} answers in time")
    return replies


def apart(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Each client's metrics under its own name: ``epsilon/alice``. A mean ε would be nobody's promise."""
    return MetricRecord(
        {f"{key}/{content['who']['name']}": value for content in contents for key, value in content["metrics"].items()}
    )


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds, and report each."""
    torch.set_num_threads(1)
    config = context.run_config
    report = Report(config["report"])
    report.add({"run": context.run_id})
    try:
        run(grid, config, report)
    except Exception as error:
        report.add({"error": str(error) if isinstance(error, RoundFailed) else f"{type(error).__name__}: {error}"})
        raise
    report.add({"end": True})


def run(grid: Grid, config: dict, report: "Report") -> None:
    """All rounds of a run; a line of the report after each."""
    nodes, rounds = int(config["num-nodes"]), int(config["num-server-rounds"])
    model = MODELS[choice("model", config["model"], MODELS)]()
    test_data = load_mnist(train=False)
    metrics_of: dict = {}

    def keep_apart(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        metrics = apart(contents, weighted_by)
        metrics_of.update(metrics)
        return metrics

    common = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": nodes,
        "min_available_nodes": nodes,
        "train_metrics_aggr_fn": keep_apart,
    }
    named = [int(node) for node in config["nodes"].split(",") if node]
    if choice("privacy", config["privacy"], ("sample", "client")) == "sample":
        strategy = ApartFedAvg(named, **common)
    else:
        strategy = central(NamedFedAvg(named, **common), config)

    def after(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        reached = accuracy(model, test_data)
        line = {"round": server_round, "rounds": rounds, "accuracy": reached, **metrics_of}
        if isinstance(strategy, Central):
            line["epsilon"] = strategy.privacy_spent().epsilon  # of a whole client, not of a record
        if server_round:
            report.add(line)
        return MetricRecord({"accuracy": reached})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=rounds,
        timeout=float(config["round-timeout"]),
        evaluate_fn=after,
    )


def central(strategy: FedAvg, config: dict) -> Central:
    """Flower's own central privacy: the server clips each client's update and adds the noise. Clients must trust it."""
    from flwr.serverapp import NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod

    nodes = int(config["num-nodes"])
    accountant = RdpAccountant(
        PrivacyConfig(
            target_delta=config["server-target-delta"],
            population_size=nodes,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
    )
    return Central(
        strategy,
        noise_multiplier=config["server-noise-multiplier"],
        clipping_norm=config["clipping-norm"],
        num_sampled_clients=nodes,
        accountant=accountant,
    )


class Report:
    """A file of JSON lines, one a round; no file for an empty name. Each line is also printed, to the run's log."""

    def __init__(self, path: str):
        self.path = Path(path) if path else None
        self._began = time.monotonic()

    def add(self, line: dict) -> None:
        """Print a line, and write it to the file."""
        text = json.dumps({**line, "seconds": round(time.monotonic() - self._began, 1)})
        print(text, flush=True)
        if self.path:
            with self.path.open("a", encoding="utf8") as file:
                file.write(text + "\n")
