"""The server of the Flower app: federated averaging that keeps each client's ε apart."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)

from dpteach._checks import choice
from dpteach.data import load_mnist
from dpteach.flower.client_app import MODELS
from dpteach.training import accuracy

app = ServerApp()


class RoundFailed(RuntimeError):
    """A client refused or did not answer; the message says which one and why."""


class NamedFedAvg(FedAvg):
    """Federated averaging over the nodes that are named.

    Args:
        only: the ids of the nodes that take part: Flower takes a node that was killed for alive, for a minute. All that
            are online if empty.
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


class Strict:
    """In front of a strategy: it stops at the first client that refuses or is lost, with its reason."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        """The average, noisy if the strategy says so; RoundFailed at the first refusal."""
        least = getattr(self, "strategy", self).min_train_nodes
        return super().aggregate_train(server_round, answers(server_round, replies, least))


def strict(strategy: type[Strategy]) -> type:
    """The same strategy, :class:`Strict`."""
    return type(f"Strict{strategy.__name__}", (Strict, strategy), {})


ApartFedAvg = strict(NamedFedAvg)
# Flower's central privacy: the server clips each client's update, or each client does.
Central = strict(DifferentialPrivacyServerSideFixedClipping)
CentralOfClipped = strict(DifferentialPrivacyClientSideFixedClipping)


class CentralAdaptive(Strict, DifferentialPrivacyServerSideAdaptiveClipping):
    """The server clips to a norm that it moves after each round.

    Flower 1.42 moves the norm first and scales the round's noise to the new one, which can be smaller. Here the noise
    fits the norm that clipped.
    """

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        """As :class:`Strict`'s; keeps the norm that clips this round."""
        self._clipped_to = self.clipping_norm
        return super().aggregate_train(server_round, replies)

    def _add_noise_to_aggregated_arrays(self, aggregated_arrays: ArrayRecord) -> ArrayRecord:
        moved, self.clipping_norm = self.clipping_norm, self._clipped_to
        try:
            return super()._add_noise_to_aggregated_arrays(aggregated_arrays)
        finally:
            self.clipping_norm = moved


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
    with reporting(context) as report:
        run(grid, context.run_config, report)


@contextlib.contextmanager
def reporting(context: Context) -> Iterator[Callable[[dict], None]]:
    """A function that prints a line of JSON, to the run's log, and appends it to the file that the run names.

    Before it the run's number is reported, and at last its end, or its error. A server of your own reports a round as
    ``{"round": 1, "rounds": 3, "accuracy": 0.7, "epsilon/alice": 1.17}``.
    """
    path, began = context.run_config["report"], time.monotonic()

    def report(line: dict) -> None:
        text = json.dumps({**line, "seconds": round(time.monotonic() - began, 1)})
        print(text, flush=True)
        if path:
            with open(path, "a", encoding="utf8") as file:
                file.write(text + "\n")

    report({"run": context.run_id})
    try:
        yield report
    except Exception as error:
        report({"error": str(error) if isinstance(error, RoundFailed) else f"{type(error).__name__}: {error}"})
        raise
    report({"end": True})


def run(grid: Grid, config: dict, report: Callable[[dict], None]) -> None:
    """All rounds of a run; a line of the report after each."""
    nodes, rounds, timeout = int(config["num-nodes"]), int(config["num-server-rounds"]), float(config["round-timeout"])
    model = MODELS[choice("model", config["model"], MODELS)]()
    test_data = load_mnist(train=False)
    metrics: dict = {}  # of the last round

    def keep_apart(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        metrics.update(apart(contents, weighted_by))
        return MetricRecord(metrics)

    def after(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        reached = accuracy(model, test_data)
        line = {"round": server_round, "rounds": rounds, "accuracy": reached, **metrics}
        if getattr(strategy, "accountant", None):
            line["epsilon"] = strategy.privacy_spent().epsilon  # of a whole client, not of a record
        if server_round:
            report(line)
        return MetricRecord({"accuracy": reached})

    everyone = {"fraction_train": 1.0, "min_train_nodes": nodes, "min_available_nodes": nodes, "fraction_evaluate": 0.0}
    named = [int(node) for node in config["nodes"].split(",") if node]
    central_privacy = choice("privacy", config["privacy"], ("sample", "client")) == "client"
    by_server = central_privacy and config["clipping"] != "local"
    kind = NamedFedAvg if by_server else ApartFedAvg  # Flower's accountant accepts its own aggregate_train only
    strategy = kind(named, train_metrics_aggr_fn=keep_apart, **everyone)
    if by_server:
        strategy = central(strategy, config)
    initial = ArrayRecord(model.state_dict())
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds, timeout=timeout, evaluate_fn=after)


def central(strategy: FedAvg, config: dict) -> Strategy:
    """The run's way to client-level privacy; Flower's accountant with it where Flower has one."""
    from flwr.serverapp import NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod

    nodes, sigma, C = int(config["num-nodes"]), config["server-noise-multiplier"], config["clipping-norm"]
    way = choice("clipping", config["clipping"], ("server", "client", "adaptive"))
    if way == "adaptive":
        return CentralAdaptive(strategy, sigma, nodes, initial_clipping_norm=C)
    draw, change = SamplingMethod.NO_AMPLIFICATION, NeighboringRelation.ADD_OR_REMOVE_ONE
    what = {"population_size": nodes, "sampling_method": draw, "neighboring_relation": change}
    accountant = RdpAccountant(PrivacyConfig(target_delta=config["server-target-delta"], **what))
    return (Central if way == "server" else CentralOfClipped)(strategy, sigma, C, nodes, accountant=accountant)
