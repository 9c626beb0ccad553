"""The Flower app: what a client charges and tells, what the server keeps apart, and a federation that leaves no trace."""

import json
import math
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from dpteach import Ledger, epsilon, models
from dpteach.flower import MISSING, installed
from dpteach.training import Settings

if not installed():
    if os.environ.get("CI") and sys.version_info >= (3, 11):
        pytest.fail(MISSING, pytrace=False)
    pytest.skip(MISSING, allow_module_level=True)
if os.name == "nt":
    pytest.skip("a federation runs on Linux and macOS", allow_module_level=True)

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from dpteach.exercises.flower import message
from dpteach.flower import Federation, Node, Simulation, client_app, door, keeper, server_app
from dpteach.flower.federation import _answers, _free_port, _listening

ROOT = Path(__file__).resolve().parent.parent

RECORDS, STEPS = 300, 3  # batches of 128: three steps a round
SIGMAS = {"alice": 1.5, "bob": 1.1}
RUN_CONFIG = {
    "model": "mlp",
    "local-epochs": 1,
    "batch-size": 128,
    "lr": 0.5,
    "records": RECORDS,
    "method": "dpsgd",
    "privacy": "sample",
}


CENTRAL = {
    "num-nodes": 20,
    "clipping": "server",
    "server-target-delta": 1e-2,
    "server-noise-multiplier": 1.0,
    "clipping-norm": 1.0,
}


def test_windows_is_told_at_once_that_no_federation_runs_there(monkeypatch):
    monkeypatch.setattr("dpteach.flower.federation._WINDOWS", True)
    for make in (lambda: Federation([Node("alice"), Node("bob")]), lambda: Simulation(2)):
        with pytest.raises(RuntimeError, match="runs on Linux and macOS, got Windows: .* WSL"):
            make()


def owed(name, rounds):
    """ε of ``rounds`` rounds of one node of these tests, by RDP."""
    return epsilon(noise_multiplier=SIGMAS[name], sample_rate=1 / STEPS, steps=rounds * STEPS, accountant="rdp")


# A client, without any process


@pytest.fixture
def context(tmp_path):
    """The context of one node; its ledger is in a file of its own."""
    node = {
        "name": "alice",
        "partition-id": 0,
        "num-partitions": 2,
        "noise-multiplier": 1.5,
        "ledger": str(tmp_path / "alice.json"),
    }
    Ledger(node["ledger"], new=True)
    return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=dict(RUN_CONFIG))


def asked(context):
    """What the node answers to the same model each time."""
    return client_app.answer(ArrayRecord(models.mlp(784, 64, 10).state_dict()), context)


def test_a_client_tells_the_epsilon_of_its_whole_ledger_and_no_loss(context):
    first, second = asked(context), asked(context)
    assert dict(first["metrics"]) == {
        "num-examples": RECORDS,
        "steps": STEPS,
        "epsilon": pytest.approx(owed("alice", 1)),
        "epsilon-by-state": pytest.approx(owed("alice", 1)),
    }
    assert second["metrics"]["epsilon"] == pytest.approx(owed("alice", 2)) and second["metrics"]["steps"] == 2 * STEPS
    assert Ledger(context.node_config["ledger"]).steps == 2 * STEPS


def test_the_memory_of_flower_forgets_what_the_ledger_keeps(context):
    asked(context)
    context.state = RecordDict()  # a SuperNode was killed, or a second run begins
    told = asked(context)["metrics"]
    assert told["epsilon-by-state"] == pytest.approx(owed("alice", 1)) and told["epsilon"] == pytest.approx(
        owed("alice", 2)
    )


def test_the_charge_is_on_the_disk_before_the_first_step(context, monkeypatch):
    def power_cut(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("dpteach.federated.begin", power_cut)
    with pytest.raises(KeyboardInterrupt):
        asked(context)
    assert Ledger(context.node_config["ledger"]).steps == STEPS


def test_the_same_round_twice_draws_other_noise_and_no_seed_makes_it(context, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(client_app, "Settings", lambda **asked: made.append(Settings(**asked)) or made[-1])
    first = asked(context)["arrays"].to_torch_state_dict()
    (tmp_path / "alice.json").unlink()
    Ledger(context.node_config["ledger"], new=True)  # so that name, ledger and settings are the same again
    again = asked(context)["arrays"].to_torch_state_dict()
    assert all(not torch.equal(first[name], again[name]) for name in first)
    assert [settings.seed for settings in made] == [None, None]  # the system's random numbers: see test_release.py


def refused(context, tmp_path, monkeypatch):
    """Why the node refuses. It must not train, and its ledger must stay as it is."""
    monkeypatch.setattr("dpteach.federated.begin", lambda *_, **__: pytest.fail("it trained"))
    before = Path(context.node_config["ledger"]).read_bytes()
    answer = asked(context)
    assert list(answer) == ["refusal"] and answer["refusal"]["name"] == "alice"
    assert Path(context.node_config["ledger"]).read_bytes() == before and len(list(tmp_path.glob("*.json"))) == 1
    return answer["refusal"]["why"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("noise-multiplier", 0.0),
        ("noise-multiplier", 50.0),
        ("max-grad-norm", 1e6),
        ("target-delta", 0.5),
        ("max-epsilon", 1e9),
        ("ledger", "other.json"),
        ("ledgers", "."),
        ("data", "other.pt"),
        ("name", "bob"),
        ("partition-id", 1),
        ("num-partitions", 1),
    ],
)
def test_a_run_can_not_decide_what_only_the_node_may(context, tmp_path, monkeypatch, key, value):
    context.run_config[key] = value
    told = f"{key} must not be in a run's config, got {value!r}: only a node's own --node-config may set it"
    assert refused(context, tmp_path, monkeypatch) == told
    context.node_config.pop(key, None)  # not even where the node says nothing
    assert asked(context)["refusal"]["why"] == told


def test_a_run_can_not_ask_a_node_for_training_without_noise(context, tmp_path, monkeypatch):
    context.run_config |= {"privacy": "client", "server-noise-multiplier": 1e-12, "clipping-norm": 1e6}
    why = refused(context, tmp_path, monkeypatch)
    assert why.startswith("privacy must be 'sample' on this node, got 'client' from the run") and "--node-config" in why
    context.run_config["privacy"] = "none"
    assert refused(context, tmp_path, monkeypatch).startswith("privacy must be one of 'sample', 'client', got 'none'")
    context.run_config |= {"privacy": "sample", "method": "sgd"}
    assert refused(context, tmp_path, monkeypatch).startswith("method must be one of 'dpsgd', 'opacus', got 'sgd'")


def test_what_the_node_does_not_say_is_not_the_runs_to_say(context, tmp_path):
    del context.node_config["noise-multiplier"]
    assert asked(context)["metrics"]["steps"] == STEPS
    assert [charge.noise_multiplier for charge in Ledger(context.node_config["ledger"]).charges] == [1.3]


def test_a_node_refuses_the_round_that_would_go_above_its_max_epsilon(context, tmp_path, monkeypatch):
    context.node_config["max-epsilon"] = (owed("alice", 2) + owed("alice", 3)) / 2
    assert [asked(context)["metrics"]["steps"] for _ in range(2)] == [STEPS, 2 * STEPS]
    why = refused(context, tmp_path, monkeypatch)
    assert why.startswith("max-epsilon is ") and f"after the round ε would be {owed('alice', 3):.4g}" in why
    context.run_config["privacy"] = context.node_config["privacy"] = "client"
    assert "ε would be inf" in refused(context, tmp_path, monkeypatch)


def test_opacus_costs_what_dpsgd_costs_in_the_same_ledger(context):
    context.run_config["method"] = "opacus"
    first = asked(context)
    assert first["metrics"]["epsilon"] == pytest.approx(owed("alice", 1), abs=1e-9)
    context.node_config["method"] = "dpsgd"  # a node may name one: it goes before the run's
    second = asked(context)["metrics"]
    assert second["epsilon"] == pytest.approx(owed("alice", 2), abs=1e-9) and second["steps"] == 2 * STEPS
    (one,) = set(Ledger(context.node_config["ledger"]).charges)
    assert (one.noise_multiplier, one.sample_rate, one.steps) == (1.5, 1 / STEPS, STEPS)


def test_opacus_itself_does_the_work_and_its_noise_is_other_noise_each_time(context, monkeypatch):
    from opacus import PrivacyEngine

    context.run_config |= {"method": "opacus", "local-epochs": 2}
    seen, make_private = [], PrivacyEngine.make_private
    monkeypatch.setattr(
        PrivacyEngine, "make_private", lambda self, **asked: seen.append(asked) or make_private(self, **asked)
    )
    ways = [asked(context)["arrays"].to_torch_state_dict() for _ in range(2)]
    assert [(one["noise_multiplier"], one["max_grad_norm"]) for one in seen] == [(1.5, 1.0)] * 2
    assert list(ways[0]) == list(models.mlp(784, 64, 10).state_dict())  # no "_module."
    assert all(not torch.equal(ways[0][name], ways[1][name]) for name in ways[0])


@pytest.mark.parametrize("damage", ["{}", "not json", ""])
def test_a_damaged_ledger_is_a_refusal_and_nothing_is_trained(context, tmp_path, monkeypatch, damage):
    (tmp_path / "alice.json").write_text(damage)
    monkeypatch.setattr("dpteach.federated.begin", lambda *_, **__: pytest.fail("it trained"))
    answer = asked(context)
    assert list(answer) == ["refusal"]
    assert answer["refusal"]["name"] == "alice" and "is not a readable ledger" in answer["refusal"]["why"]
    assert (tmp_path / "alice.json").read_text() == damage


def test_a_ledger_that_is_gone_is_a_refusal_and_nothing_is_trained(context, tmp_path, monkeypatch):
    asked(context)
    (tmp_path / "alice.json").unlink()
    monkeypatch.setattr("dpteach.federated.begin", lambda *_, **__: pytest.fail("it trained"))
    assert "alice.json" in asked(context)["refusal"]["why"]
    assert not (tmp_path / "alice.json").exists()


def test_without_a_ledger_nothing_is_trained(context):
    del context.node_config["ledger"]
    assert "ledger must be named in --node-config" in asked(context)["refusal"]["why"]


def test_a_node_trains_on_its_own_file_where_it_names_one(context, tmp_path):
    torch.save({"X": torch.rand(200, 1, 28, 28), "y": torch.arange(200) % 10}, tmp_path / "own.pt")
    context.node_config["data"] = str(tmp_path / "own.pt")
    assert asked(context)["metrics"]["num-examples"] == 200
    context.node_config["data"] = str(tmp_path / "none.pt")
    assert "none.pt" in asked(context)["refusal"]["why"]


def test_where_the_node_agrees_the_server_may_add_the_noise_and_the_ledger_says_so(context):
    context.run_config["privacy"] = context.node_config["privacy"] = "client"
    assert list(asked(context)["metrics"]) == ["num-examples"]
    assert Ledger(context.node_config["ledger"]).epsilon() == math.inf  # what has left the node has no noise
    del context.node_config["ledger"]
    assert list(asked(context)["metrics"]) == ["num-examples"]


WHOLE_CLIENT = {"privacy": "client", "clipping-norm": 0.1, "server-target-delta": 1e-2, "local-epsilon": 1.0}


@pytest.mark.parametrize("clipping", ["server", "adaptive", "client", "local"])
def test_each_way_to_client_level_privacy_does_at_the_node_what_it_says(context, clipping):
    context.run_config |= {**WHOLE_CLIENT, "clipping": clipping}
    context.node_config["privacy"] = "client"
    sent = models.mlp(784, 64, 10).state_dict()
    asked_for = message(sent)
    asked_for.content["config"]["clipping_norm"] = 0.1  # as Flower's strategy adds it
    (array,) = client_app.train(asked_for, context).content.array_records.values()
    moved = torch.cat([(v - sent[k]).flatten() for k, v in array.to_torch_state_dict().items()])
    if clipping == "client":
        assert moved.norm().item() == pytest.approx(0.1, rel=1e-3)
    elif clipping == "local":  # Flower's formula for one Gaussian release; one update in the place of another moves 2C
        assert moved.std().item() == pytest.approx(2 * 0.1 * math.sqrt(2 * math.log(1.25 / 1e-2)), rel=0.02)
    else:
        assert moved.norm() > 0.5  # as it is: the server clips


@pytest.mark.parametrize(
    ("key", "value"),
    [("clipping", "server"), ("local-epsilon", 1e6), ("clipping-norm", 1e6), ("server-target-delta", 0.9)],
)
def test_a_run_can_not_take_from_a_node_the_noise_of_its_own(context, tmp_path, monkeypatch, key, value):
    context.run_config |= {**WHOLE_CLIENT, "clipping": "local"}
    context.node_config |= {**WHOLE_CLIENT, "clipping": "local"}
    assert "arrays" in asked(context)
    context.run_config[key] = value
    assert f"{key} must be {context.node_config[key]!r}, as this node's own" in refused(context, tmp_path, monkeypatch)


@pytest.mark.parametrize("clipping", ["client", "local"])
def test_a_refusal_comes_through_flowers_mods(context, clipping):
    context.run_config |= {**WHOLE_CLIENT, "clipping": clipping, "noise-multiplier": 0.0}
    content = client_app.train(message(models.mlp(784, 64, 10).state_dict()), context).content
    assert "only a node's own --node-config" in content["refusal"]["why"]


def test_virtual_nodes_have_their_own_config_from_a_file_of_their_owner(context, tmp_path, monkeypatch):
    context.node_config = {"partition-id": 3, "num-partitions": 20}
    assert "ledger must be named" in asked(context)["refusal"]["why"]
    (tmp_path / "nodes.json").write_text(json.dumps({"ledgers": str(tmp_path), "noise-multiplier": 2.0}))
    monkeypatch.setenv(client_app.VARIABLE, str(tmp_path / "nodes.json"))
    Ledger(tmp_path / "client-03.json", new=True)
    assert asked(context)["metrics"]["steps"] == STEPS
    assert [charge.noise_multiplier for charge in Ledger(tmp_path / "client-03.json").charges] == [2.0]


# The server, without any process


def test_the_server_keeps_each_epsilon_apart():
    replies = [
        RecordDict({"metrics": MetricRecord({"num-examples": n, "epsilon": e}), "who": ConfigRecord({"name": name})})
        for name, n, e in (("alice", 100, 1.0), ("bob", 300, 3.0))
    ]
    kept = server_app.apart(replies, "num-examples")
    assert dict(kept) == {"num-examples/alice": 100, "epsilon/alice": 1.0, "num-examples/bob": 300, "epsilon/bob": 3.0}


def test_a_refusal_ends_the_run_with_its_reason():
    apart = server_app.ApartFedAvg([], min_train_nodes=2)
    whole = server_app.central(server_app.FedAvg(min_train_nodes=2), CENTRAL)
    content = RecordDict({"refusal": ConfigRecord({"name": "bob", "why": "no ledger"})})
    refused = SimpleNamespace(has_error=lambda: False, content=content)
    for strategy in (apart, whole):
        with pytest.raises(server_app.RoundFailed, match="bob refused round 3: no ledger"):
            strategy.aggregate_train(3, [refused])
        with pytest.raises(server_app.RoundFailed, match="round 3 got 0 of 2 answers in time"):
            strategy.aggregate_train(3, [])


def test_flowers_accountant_for_whole_clients_agrees_with_ours():
    from flwr.serverapp import GaussianPrivacyEvent

    strategy = server_app.central(server_app.FedAvg(), CENTRAL)
    for _ in range(10):
        strategy.accountant.compose(GaussianPrivacyEvent(noise_multiplier=1.0, sample_size=20, population_size=20))
    ours = epsilon(noise_multiplier=1.0, sample_rate=1.0, steps=10, target_delta=1e-2, accountant="rdp")
    assert strategy.privacy_spent().epsilon == pytest.approx(ours, rel=0.02)


def test_flower_draws_a_fixed_number_of_clients_and_counts_no_draw_at_all():
    from flwr.serverapp import NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod
    from flwr.serverapp.strategy.strategy_utils import sample_nodes

    grid = SimpleNamespace(get_node_ids=lambda: list(range(1000)))
    assert {len(set(sample_nodes(grid, 1000, 20)[0])) for _ in range(50)} == {20}
    for draw, change in (
        (SamplingMethod.POISSON, NeighboringRelation.ADD_OR_REMOVE_ONE),
        (SamplingMethod.WITHOUT_REPLACEMENT, NeighboringRelation.REPLACE_ONE),
    ):
        config = PrivacyConfig(
            target_delta=1e-5, population_size=1000, sampling_method=draw, neighboring_relation=change
        )
        with pytest.raises(ValueError, match="requires sampling_method='no-amplification'"):
            server_app.Central(server_app.FedAvg(), 1.0, 1.0, 20, accountant=RdpAccountant(config))
    unequal = [SimpleNamespace(content=RecordDict({"metrics": MetricRecord({"num-examples": n})})) for n in (100, 300)]
    with pytest.raises(ValueError, match="equal client weights"):
        server_app.central(server_app.FedAvg(), CENTRAL)._validate_uniform_weights(unequal)


# A federation, with all its processes

OWN = """
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from dpteach import models
from dpteach.flower.server_app import apart, reporting

app = ServerApp()
node = ClientApp()

@node.train()
def train(message, context):
    if context.run_config["fail"]:
        raise KeyError("a mistake in an own app")
    own = {"metrics": MetricRecord({"num-examples": 1, "epsilon": context.node_config["noise-multiplier"]})}
    own |= {"arrays": message.content["arrays"], "who": ConfigRecord({"name": context.node_config["name"]})}
    return Message(RecordDict(own), reply_to=message)

@app.main()
def main(grid, context):
    told, rounds = {}, context.run_config["num-server-rounds"]
    def keep(contents, weighted_by):
        told.update(apart(contents, weighted_by))
        return MetricRecord(told)
    strategy = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=keep)
    start = ArrayRecord(models.mlp(2, 2, 2).state_dict())
    with reporting(context) as report:
        def after(k, arrays):
            if k and told:
                report({"round": k, "rounds": rounds, **told})
        strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds, evaluate_fn=after)
"""
OWN_PROJECT = """
project = {name = "own-app", version = "1.0.0", description = "", license = "Apache-2.0", dependencies = []}
[tool.flwr.app]
publisher = "me"
components = {serverapp = "own:app", clientapp = "own:node"}
config = {num-server-rounds = 3, records = 0, fail = "", report = ""}
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One federation, and what happens to it.

    Two runs, one that is given too little time, a kill in mid-round, a restart and a run, a damaged ledger, and the
    end. ``told``: what came of each; ``steps``: what alice's ledger held before it.
    """
    folder, told, steps = tmp_path_factory.mktemp("ledgers"), {}, {}

    def chapter(name, rounds=1, timeout=180, **config):
        steps[name], began = federation.ledger("alice").steps, time.monotonic()
        try:
            told[name] = list(federation.rounds(rounds, timeout=timeout, records=RECORDS, **config))
        except (RuntimeError, TimeoutError) as error:
            told[name] = error
        told[f"{name}, seconds"] = time.monotonic() - began

    with Federation([Node(name, sigma) for name, sigma in SIGMAS.items()], folder, start_timeout=180) as federation:
        chapter("first", rounds=2)
        chapter("second")
        federation.kill("alice", in_next_round=True)
        chapter("killed")
        chapter("still dead")
        federation.restart("alice")
        chapter("after")
        federation._start_timeout = 1
        chapter("too little time", timeout=1)
        federation._start_timeout = 180
        kept = (folder / "bob.json").read_text()
        (folder / "bob.json").write_text(kept.replace("0", "1", 1))
        chapter("damaged")
        (folder / "bob.json").unlink()
        chapter("vanished")
        told["made again"] = (folder / "bob.json").exists()
        (folder / "bob.json").write_text(kept)
        told["before less noise"] = {name: federation.ledger(name).steps for name in SIGMAS}
        chapter("less noise", privacy="client", server_noise_multiplier=1e-12, clipping_norm=1e6)
        told["after less noise"] = {name: federation.ledger(name).steps for name in SIGMAS}
        chapter("opacus", method="opacus")
        told["events"] = list(federation.events)
        (own := tmp_path_factory.mktemp("apps") / "own-app").mkdir()
        (own / "own.py").write_text(OWN)
        (own / "pyproject.toml").write_text(OWN_PROJECT)
        chapter("own app", rounds=2, app=own)
        chapter("own app fails", app=own, fail="yes")
        mark, home, port = federation._mark, federation._home, federation._port
        assert len(keeper.marked(mark)) >= 3 and home.exists()
    told["nothing left"] = gone(mark, home, port, within=5)
    return SimpleNamespace(told=told, steps=steps, folder=folder, federation=federation)


def test_each_round_tells_every_clients_own_cumulative_epsilon(story):
    first = story.told["first"]
    assert [(made.round, made.rounds) for made in first] == [(1, 2), (2, 2)]
    for done, made in enumerate(first, start=1):
        assert made.epsilons == {name: pytest.approx(owed(name, done)) for name in SIGMAS}
        assert made.epsilons_by_state == made.epsilons and 0 <= made.accuracy <= 1


def test_two_runs_in_a_row_add_up_and_the_memory_of_flower_does_not(story):
    second = story.told["second"][-1]
    assert second.epsilons == {name: pytest.approx(owed(name, 3)) for name in SIGMAS}
    assert second.epsilons_by_state == {name: pytest.approx(owed(name, 1)) for name in SIGMAS}


def test_a_killed_node_is_one_message_and_not_a_hang(story):
    for chapter in ("killed", "still dead"):
        assert "The node 'alice' has ended" in str(story.told[chapter]) and "restart('alice')" in str(
            story.told[chapter]
        )
        assert story.told[f"{chapter}, seconds"] < 150


def test_after_a_kill_in_mid_round_epsilon_never_falls_and_covers_that_round(story):
    assert story.steps["after"] == story.steps["killed"] + STEPS == 4 * STEPS
    after = story.told["after"][-1]
    assert after.steps["alice"] == 5 * STEPS and after.epsilons["alice"] == pytest.approx(owed("alice", 5))
    assert after.epsilons["alice"] > story.told["second"][-1].epsilons["alice"]
    assert after.epsilons_by_state["alice"] == pytest.approx(owed("alice", 1))  # what an app without a ledger would say


def test_a_round_that_takes_too_long_is_one_error_and_the_next_run_answers(story):
    assert isinstance(story.told["too little time"], TimeoutError)
    assert "No round was finished within 1 s" in str(story.told["too little time"])
    assert story.told["too little time, seconds"] < 60
    assert isinstance(story.told["damaged"], RuntimeError)


def test_a_damaged_ledger_stops_the_run_with_the_nodes_name(story):
    assert "bob refused round 1: " in str(story.told["damaged"])
    assert "bob.json is not a readable ledger" in str(story.told["damaged"])


def test_a_ledger_that_vanishes_while_the_federation_lives_stops_the_run_and_is_not_made_again(story):
    assert "bob refused round 1: " in str(story.told["vanished"]) and "bob.json" in str(story.told["vanished"])
    assert not story.told["made again"]


def test_a_run_that_asks_for_no_noise_stops_with_a_nodes_name_and_nothing_is_charged(story):
    assert re.search(
        "(alice|bob) refused round 1: privacy must be 'sample' on this node", str(story.told["less noise"])
    )
    assert story.told["before less noise"] == story.told["after less noise"]


def test_a_round_of_opacus_in_processes_goes_into_the_same_ledgers(story):
    (made,) = story.told["opacus"]
    done = {name: made.steps[name] // STEPS for name in SIGMAS}
    assert made.steps == {name: story.told["after less noise"][name] + STEPS for name in SIGMAS}
    assert made.epsilons == {name: pytest.approx(owed(name, done[name]), abs=1e-9) for name in SIGMAS}


def test_the_events_tell_that_a_killed_round_was_charged_before_the_kill(story):
    alices = [what for _, who, what in story.told["events"] if who in ("alice", "server")]
    assert alices[:6] == ["charged", "averaged"] * 3  # two runs
    assert alices[6:11] == ["charged", "killed", "online", "charged", "averaged"]
    assert [time for time, _, _ in story.told["events"]] == sorted(time for time, _, _ in story.told["events"])


def test_an_app_of_ones_own_runs_where_it_is_named_and_its_numbers_arrive(story):
    assert [(made.round, made.rounds, made.epsilons, made.steps, made.accuracy) for made in story.told["own app"]] == [
        (k, 2, SIGMAS, {}, None) for k in (1, 2)
    ]


def test_a_mistake_in_an_own_app_is_told_with_the_nodes_name(story):
    told = str(story.told["own app fails"])
    assert re.search(r"The run ended after 0 of 1 rounds. .*(alice|bob): .*a mistake in an own app", told), told


def test_an_app_that_can_not_report_is_one_error(tmp_path):
    (tmp_path / "pyproject.toml").write_text(OWN_PROJECT.replace(', report = ""', ""))
    with pytest.raises(ValueError, match="must name keys of the app's pyproject.toml, got 'report'"):
        Federation([Node("a"), Node("b")]).rounds(1, app=tmp_path)


def test_a_folder_whose_ledger_is_gone_is_an_error_in_the_next_federation_too(tmp_path):
    Federation([Node("a"), Node("b")], tmp_path)
    Federation([Node("a"), Node("b")], tmp_path)
    (tmp_path / "b.json").unlink()
    with pytest.raises((ValueError, OSError), match="b.json"):
        Federation([Node("a"), Node("b")], tmp_path)
    assert not (tmp_path / "b.json").exists()


def test_what_can_not_be_a_federation_is_one_error(tmp_path, refuses):
    with pytest.raises(ValueError, match="nodes must be at least two, each with a name of its own, got .'a', 'a'."):
        Federation([Node("a"), Node("a")])
    with pytest.raises(ValueError, match="folder must be a folder that exists"):
        Federation([Node("a"), Node("b")], tmp_path / "none")
    with refuses("noise_multiplier", -1.0):
        Node("a", -1.0)
    with refuses("max_epsilon", -1.0):
        Node("a", max_epsilon=-1.0)
    with pytest.raises(ValueError, match="name must be letters"):
        Node("a/b")
    with pytest.raises(ValueError, match="name must not be one of 'link', 'run', 'command', got 'run'"):
        Node("run")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a readable ledger"):
        Federation([Node("a"), Node("b")], tmp_path)
    for key, named in (("noise_multiplier", "noise-multiplier"), ("ledger", "ledger"), ("epochs", "epochs")):
        with pytest.raises(ValueError, match=f"config must name keys of the app's pyproject.toml, got '{named}'"):
            Federation([Node("a"), Node("b")]).rounds(1, **{key: 0.0})
    with pytest.raises(RuntimeError, match="give Federation a folder"):
        Federation([Node("a"), Node("b")]).ledger("a")


def test_a_kill_that_is_not_over_does_not_reach_the_node_that_is_started_next(tmp_path, monkeypatch):
    federation = Federation([Node("alice"), Node("bob")])
    federation._mark, federation._home, federation._keeper = uuid.uuid4().hex, tmp_path, object()
    monkeypatch.setattr(federation, "_start_node", lambda name: federation._spawn(name, "sleep", "60"))
    monkeypatch.setattr(federation, "_wait_online", lambda: None)
    monkeypatch.setattr(
        "dpteach.flower.federation.end", lambda *args, **kwargs: (time.sleep(0.5), keeper.end(*args, **kwargs))
    )
    federation._make_ledgers()
    federation._start_node("alice")
    federation.kill("alice", in_next_round=True)
    federation.ledger("alice").charge(noise_multiplier=1.0, sample_rate=0.1, steps=1)
    assert federation._processes["alice"].wait(10)
    federation.restart("alice")
    try:
        time.sleep(1)
        assert federation._processes["alice"].poll() is None
    finally:
        federation._processes["alice"].kill()
        federation._processes["alice"].wait(10)


# Somebody else on the same machine

NOBODY = 65534
EVIL = """
import os
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ServerApp()
node = ClientApp()

@app.main()
def main(grid, context):
    Path(context.run_config["mark"]).write_text(str(os.getuid()))
"""
EVIL_PROJECT = """
[project]
name = "evil"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "eve"
[tool.flwr.app.components]
serverapp = "evil:app"
clientapp = "evil:node"
[tool.flwr.app.config]
mark = ""
"""


class Stranger:
    """Another account on this machine, with Flower's commands and whatever the ports tell everybody.

    Where only root can read this Python, it may read files as root can, and no more.
    """

    BECOME = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    READ = [
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=+dac_read_search",
        "--bounding-set=-all,+dac_read_search",
    ]

    def __init__(self, home):
        self.home, self.mark, self.opened, self.become = home, home / "mark", [], self.BECOME
        (home / "evil").mkdir()
        (home / "evil" / "evil.py").write_text(EVIL)
        (home / "evil" / "pyproject.toml").write_text(EVIL_PROJECT)
        door.make_node_key(home / "own.key")
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)

    def start(self, *command):
        """One of the commands as the other user; its output goes to ``said``."""
        environment = {
            "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }
        log = (self.home / f"{len(self.opened)}.log").open("w+")
        process = subprocess.Popen(
            [*self.become, *command],
            cwd=self.home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        process.said = lambda: Path(log.name).read_text(errors="replace")
        self.opened.append(process)
        return process

    def succeeds(self, *command):
        return self.start(*command).wait(90) == 0

    def flwr(self, port, how):
        """What these commands come to: list, register a key, and run an own program; and the uid that ran it, if any."""
        self.mark.unlink(missing_ok=True)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = "127.0.0.1:{port}"\n{how}\n'
        )
        came = [
            self.succeeds("flwr", "list"),
            self.succeeds("flwr", "supernode", "register", "own.pub"),
            self.succeeds("flwr", "run", "evil", "-c", f'mark="{self.mark}"'),
        ]
        deadline = time.monotonic() + (60 if came[-1] else 3)
        while not self.mark.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return (*came, self.mark.read_text() if self.mark.exists() else None)

    def join(self, port, *how):
        return self.start("flower-supernode", "--superlink", f"127.0.0.1:{port}", "--port", str(_free_port()), *how)

    def close(self):
        for process in self.opened:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


@pytest.fixture
def stranger():
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can become somebody else, with setpriv")
    with tempfile.TemporaryDirectory() as home:
        stranger = Stranger(Path(home))
        can = (
            sys.executable,
            "-c",
            "import os, subprocess as s, dpteach; "
            f"assert os.getuid() == {NOBODY} and s.run(['flower-superlink', '--version']).returncode == 0",
        )
        if not stranger.succeeds(*can):
            stranger.become = [*stranger.BECOME, *stranger.READ]
        assert stranger.succeeds(*can), stranger.opened[-1].said()
        yield stranger
        stranger.close()


def test_somebody_else_on_this_machine_can_not_list_run_or_join(stranger):
    environment = {
        **os.environ,
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "FLWR_HOME": str(stranger.home / "link"),
        "FLWR_TELEMETRY_ENABLED": "0",
        keeper.VARIABLE: (mark := uuid.uuid4().hex),
    }
    subprocess.Popen(
        [
            "flower-superlink",
            "--insecure",
            "--port",
            str(open_port := _free_port()),
            "--disable-runtime-dependency-installation",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with Federation([Node(name, sigma) for name, sigma in SIGMAS.items()], start_timeout=180) as federation:
            run = federation.rounds(2, timeout=180, records=RECORDS)
            next(run)
            ports = sorted({port for process in keeper.marked(federation._mark) for port in _listening(process)})
            assert len(ports) == 1 + len(SIGMAS) and federation._port in ports
            (stranger.home / "seen.crt").write_text(ssl.get_server_certificate(("127.0.0.1", federation._port)))
            trusting = f'root-certificates = "{stranger.home}/seen.crt"'  # what the port shows to everybody
            joins = [
                stranger.join(
                    federation._port, "--root-certificates", "seen.crt", "--auth-supernode-private-key", "own.key"
                ),
                stranger.join(federation._port, "--insecure"),
            ]
            for port in ports:  # no answer at all: so a token that is read in somebody's command line opens nothing
                look = (
                    f"from dpteach.flower.door import answers_strangers as a; assert a({open_port}) and not a({port})"
                )
                assert stranger.succeeds(sys.executable, "-c", look)
            assert stranger.flwr(federation._port, trusting) == (False, False, False, None)
            # The same attempts succeed where nothing is closed: as root.
            assert stranger.flwr(open_port, "insecure = true") == (True, True, True, "0")
            joined = stranger.join(open_port, "--insecure")
            wait_until(lambda: "SuperNode ID" in joined.said() or joined.poll() is not None)
            assert "SuperNode ID" in joined.said(), joined.said()
            assert all("SuperNode ID" not in join.said() for join in joins)
            # The key of the doors can't be read by others, whoever sees the folder's name.
            assert stranger.start(*stranger.BECOME, "cat", str(federation._home / door.KEY)).wait(10) != 0
            # And the owner's own commands succeed.
            assert [made.round for made in run] == [2]
            assert len(federation._flwr("list")["runs"]) == 1
            nodes = federation._flwr("supernode", "list")["nodes"]
            assert [node["status"] for node in nodes] == ["online"] * len(SIGMAS)
    finally:
        keeper.end(mark)


def test_a_port_that_answers_everybody_ends_the_federation(monkeypatch):
    monkeypatch.setattr(
        Federation,
        "_environment",
        lambda self, name, whole=Federation._environment: {
            **whole(self, name),
            "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        },
    )
    federation = Federation([Node("alice"), Node("bob")], start_timeout=180)
    with pytest.raises(RuntimeError, match="answers people who have no certificate"), federation:
        pass
    assert gone(federation._mark, federation._home, federation._port, within=5)


def test_a_simulation_gives_ray_a_token_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # Ray need not be here
    simulations = [Simulation(2), Simulation(2)]
    for simulation in simulations:
        simulation._mark, simulation._home = "mark", tmp_path
    told = [simulation._environment("run") for simulation in simulations]
    assert [environment["RAY_AUTH_MODE"] for environment in told] == ["token"] * 2
    assert (
        len({environment["RAY_AUTH_TOKEN"] for environment in told}) == 2
        and min(len(e["RAY_AUTH_TOKEN"]) for e in told) == 64
    )


# Nothing is left


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def gone(mark, home, port, *, within=30):
    """Whether, before long, no process has the mark, the folder is not there, and nobody listens at the port."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not keeper.marked(mark) and not os.path.exists(home) and not _answers(port):
            return True
        time.sleep(0.2)
    return False


def test_nothing_is_left_after_the_normal_end_of_all_these_runs(story):
    assert story.told["nothing left"]  # when the block is left, all is over
    with pytest.raises(RuntimeError, match="The federation is closed"):
        list(story.federation.rounds(1))


@pytest.mark.parametrize("how", ["exception", "death of the keeper"])
def test_nothing_is_left_after(how, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a Jupyter kernel
    try:
        with Federation([Node("alice"), Node("bob")], start_timeout=180) as federation:
            mark, home, port = federation._mark, federation._home, federation._port
            assert len(keeper.marked(mark)) >= 3 and home.exists()
            if how == "exception":
                raise ZeroDivisionError
            federation._keeper.kill()
    except ZeroDivisionError:
        pass
    assert gone(mark, home, port, within=5)  # when the block is left, all is over
    with pytest.raises(RuntimeError, match="The federation is closed"):
        list(federation.rounds(1))


def test_nothing_is_left_after_a_start_that_takes_too_long():
    federation = Federation([Node("alice"), Node("bob")], start_timeout=0.05)
    with pytest.raises(TimeoutError, match="within 0.05 s"), federation:
        pass
    assert gone(federation._mark, federation._home, federation._port, within=5)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_nothing_is_left_after_a_signal_to_the_one_who_started_it(sent):
    program = textwrap.dedent("""
        import json
        from dpteach.flower import Federation, Node
        with Federation([Node("alice"), Node("bob")], start_timeout=180) as federation:
            print(json.dumps([federation._mark, str(federation._home), federation._port]), flush=True)
            list(federation.rounds(5, timeout=180, records=300))
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # tests that were started by nohup ignore it, and hand that on
    )
    mark, home, port = json.loads(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while (
        not any("run" in p.environ().get(keeper.VARIABLE, "") for p in keeper.marked(mark))
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)  # until a run is under way
    parent.send_signal(sent)
    parent.communicate(timeout=60)
    assert gone(mark, home, port)


# The commands of the notebook, as they stand there


@pytest.fixture
def terminals(tmp_path):
    """Runs the notebook's command blocks in one empty folder, on free ports, and ends what they leave running."""
    notebook = nbformat.read(ROOT / "notebooks" / "07_flower.ipynb", as_version=4)
    blocks = {
        cell.id: found.group(1)
        for cell in notebook.cells
        if (found := re.search(r"```bash\n(.*?)```", cell.source, re.S))
    }
    exports = next(line for line in blocks["terminal-1"].splitlines() if line.startswith("export "))
    mark, ports = uuid.uuid4().hex, {}
    environment = {
        **os.environ,
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        keeper.VARIABLE: mark,
        "PYTHONUNBUFFERED": "1",
    }

    class Terminals:
        folder = tmp_path

        def text(self, id, **changed):
            text = f"{exports}\n{blocks[id]}"
            for old, new in {
                "num-server-rounds=3 records=2000": f"num-server-rounds=1 records={RECORDS}",
                **changed,
            }.items():
                text = text.replace(old, new)
            return re.sub(r"\b(8000|909\d)\b", lambda m: str(ports.setdefault(m.group(), _free_port())), text)

        def run(self, id, **changed):
            """What the block prints; it must succeed."""
            made = subprocess.run(
                ["bash", "-ec", self.text(id, **changed)],
                cwd=tmp_path,
                env=environment,
                text=True,
                timeout=300,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert made.returncode == 0, made.stdout[-2000:]
            return made.stdout

        def open(self, name, id, **changed):
            """Start the block in a terminal that stays open, with its output in ``name.log``."""
            with (tmp_path / f"{name}.log").open("w") as log:
                return subprocess.Popen(
                    ["bash", "-ec", self.text(id, **changed)],
                    cwd=tmp_path,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

        def said(self, name):
            return (tmp_path / f"{name}.log").read_text(errors="replace")

        def wait(self, condition, seconds=120):
            deadline = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < deadline, {
                    path.name: path.read_text(errors="replace")[-500:] for path in tmp_path.glob("*.log")
                }
                time.sleep(0.2)

        def online(self, *names):
            self.wait(lambda: all("SuperNode ID" in self.said(name) for name in names))

        def link(self, id):
            self.run(id)
            self.wait(lambda: _answers(ports["8000"]))

    yield Terminals()
    keeper.end(mark)


def rounds_in(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"round"')]


def test_the_three_terminals_of_the_notebook_train(terminals):
    terminals.run("ledgers")
    terminals.link("terminal-1")
    nodes = [terminals.open("alice", "terminal-2"), terminals.open("bob", "terminal-3")]
    terminals.online("alice", "bob")
    (told,) = rounds_in(terminals.run("terminal-run"))
    assert {name: told[f"epsilon/{name}"] for name in SIGMAS} == {name: pytest.approx(owed(name, 1)) for name in SIGMAS}
    assert Ledger(terminals.folder / "alice.json").steps == STEPS
    whole = f"num-server-rounds=1 records={RECORDS}"
    assert not rounds_in(
        terminals.run("terminal-run", **{whole: f"{whole} noise-multiplier=0.0", "flwr run": "! flwr run"})
    )
    assert Ledger(terminals.folder / "alice.json").steps == STEPS
    assert all(node.poll() is None for node in nodes)


def test_with_certificates_and_keys_known_nodes_train_and_strangers_stay_out(terminals):
    for name in ("alice", "bob", "eve"):
        torch.save(
            {"X": torch.rand(RECORDS, 1, 28, 28), "y": torch.arange(RECORDS) % 10}, terminals.folder / f"{name}.pt"
        )
    terminals.run("tls-certificate")
    terminals.link("tls-link")
    terminals.run("tls-key")
    terminals.run("tls-key", alice="eve", bob="unused")
    terminals.run("tls-register")
    terminals.run("ledgers")
    terminals.run("ledgers", alice="eve", bob="unused")
    terminals.open("alice", "tls-node")
    terminals.open("bob", "tls-node", **{"alice": "bob", "9094": "9095", "=1.5": "=1.1"})
    stranger = terminals.open("eve", "tls-node", **{"alice": "eve", "9094": "9096"})
    plain = terminals.open("plain", "terminal-2", **{"9094": "9097"})
    terminals.online("alice", "bob")
    (told,) = rounds_in(terminals.run("terminal-run"))
    assert {name: told[f"epsilon/{name}"] for name in SIGMAS} == {name: pytest.approx(owed(name, 1)) for name in SIGMAS}
    assert {key.split("/")[1] for key in told if "/" in key} == set(SIGMAS)
    assert stranger.wait(60) != 0 and "SuperNode ID" not in terminals.said("eve")
    assert plain.poll() is not None or "SuperNode ID" not in terminals.said("plain")
    assert Ledger(terminals.folder / "eve.json").steps == 0
