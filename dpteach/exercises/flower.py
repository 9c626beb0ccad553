"""Notebook 07: what the server may report, what a client charges and tells, the ε of a whole client."""

import copy
import inspect
import math
import random
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dpteach
from dpteach import Ledger, Settings, models
from dpteach.accounting import epsilon
from dpteach.exercises.budget import calls, seeded
from dpteach.exercises.core import Complaint, Wrong, as_number, attempted, changed, coding, examine
from dpteach.flower import installed

if installed():
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.app.metadata import Metadata

    from dpteach.flower.client_app import records


def message(weights: dict[str, torch.Tensor]) -> "Message":
    """A message that asks for a round from ``weights``, as a ServerApp sends it; made without one."""
    about: dict = {"run_id": 1, "message_id": "1", "src_node_id": 1, "dst_node_id": 2, "group_id": "1"}
    about |= {"reply_to_message_id": "", "created_at": time.time(), "ttl": 3600.0, "message_type": "train"}
    content = RecordDict({"arrays": ArrayRecord(weights), "config": ConfigRecord()})
    return Message(content=content, metadata=Metadata(**about))


def yours(id: str, answer: Callable) -> str:
    """The source of ``answer`` if it is right; if not, of the workbook's own, and a line that says so."""
    exercise = {"7.1": exercise_7_1, "7.2": exercise_7_2}[id]
    right = examine(exercise, answer).passed
    print(f"Exercise {id}: {'your answer' if right else 'no right answer yet, so the solution'} goes into the app.")
    return inspect.getsource(answer if right else exercise.reference)


# 7.1: what the server may report


def privacy_report(contents, weighted_by):
    """The strategy's train_metrics_aggr_fn: each client's ε under its own name, and no mean."""
    return MetricRecord({f"epsilon/{content['who']['name']}": content["metrics"]["epsilon"] for content in contents})


_LOSS = "the loss is computed from private records, without noise, and ε does not cover it. Report ε alone."
_RECORDS = "the number of records is not a promise about privacy. Report ε alone."
_KIND = 'return a MetricRecord whose keys are "epsilon/" and a client\'s name, and whose values are numbers.'


def _told(contents) -> list[dict]:
    return [{"name": content["who"]["name"], **content["metrics"]} for content in contents]


def _a_report(each: Callable) -> Callable:
    """A wrong answer: ``each(rows)`` is a dict, or a number for the one key ``epsilon``."""

    def answer(contents, weighted_by):
        made = each(_told(contents))
        return MetricRecord(made if isinstance(made, dict) else {"epsilon": made})

    return answer


def _reported(fn: Callable, args: tuple) -> Any:
    (contents, _), kept = args, copy.deepcopy(args[0])
    result = attempted(fn(*args))
    if list(map(repr, contents)) != list(map(repr, kept)):
        raise Complaint("your function changes the replies. Make a new record.")
    if not isinstance(result, MetricRecord):
        raise Complaint(f"Flower wants a MetricRecord here, got {type(result).__name__}: {_KIND}")
    values, rows = {as_number(value) for value in result.values()}, _told(contents)
    for secret, sentence in (("loss", _LOSS), ("num-examples", _RECORDS)):
        if any(row[secret] in values for row in rows):
            raise Complaint(sentence)
    if None in values:
        raise Complaint(_KIND)
    if list(result) == [row["name"] for row in rows]:
        raise Complaint('the right names, but of what are the numbers? Write "epsilon/" before each name.')
    return dict(result)


def _replies(*rows):
    return [
        RecordDict(
            {
                "metrics": MetricRecord({"num-examples": n, "epsilon": spent, "loss": loss}),
                "who": ConfigRecord({"name": name}),
            }
        )
        for name, n, spent, loss in rows
    ]


def _some_clients(seed: int) -> tuple:
    draw = random.Random(seed)
    names = draw.sample(["north", "south", "east", "west", "ward 3", "Ärzte", "alice", "bob"], draw.randint(3, 6))
    rows = ((name, draw.randint(100, 9000), draw.uniform(0.1, 8), draw.uniform(0.1, 3)) for name in names)
    return _replies(*rows), "num-examples"


def _mean(rows):
    return sum(r["epsilon"] for r in rows) / len(rows)


exercise_7_1 = coding(
    "7.1",
    hint="Whom does alice's ε protect, and whom bob's? A reader of the server's log needs both. Each `content` has a "
    '`content["metrics"]` and a `content["who"]`.',
    reference=privacy_report,
    inputs=[
        lambda: (_replies(("alice", 2000, 1.17, 0.9), ("bob", 2000, 2.24, 1.1)), "num-examples"),
        lambda: (_replies(("clinic", 300, 3.4567, 2.0), ("hospital", 50_000, 0.6, 0.4)), "num-examples"),
        *(partial(_some_clients, seed) for seed in (1, 2)),
    ],
    observe=_reported,
    wrong=[
        Wrong(
            _a_report(
                lambda rows: sum(r["num-examples"] * r["epsilon"] for r in rows) / sum(r["num-examples"] for r in rows)
            ),
            "this is the weighted mean, and it is what Flower does to every metric if you don't say otherwise. It "
            "tells bob's patients a smaller ε than theirs. Keep one for each client.",
        ),
        Wrong(
            _a_report(_mean),
            "a mean of two promises is a promise to nobody: one of the two is always larger. Keep one for each client.",
        ),
        Wrong(
            _a_report(lambda rows: sum(r["epsilon"] for r in rows)),
            "the clients have no record in common, so nobody's record has paid the sum. Keep one for each client.",
        ),
        Wrong(
            _a_report(lambda rows: max(r["epsilon"] for r in rows)),
            "the largest is true for every person, and the best *single* number. But it hides what the others have "
            "left to spend. Keep one for each client.",
        ),
        Wrong(
            _a_report(lambda rows: {f"epsilon/{k}": r["epsilon"] for k, r in enumerate(rows)}),
            "numbers without names: the answers arrive in another order in each round. Take the name from "
            '`content["who"]["name"]`.',
        ),
        Wrong(
            _a_report(lambda rows: {f"epsilon/{r['name']}": _mean(rows) for r in rows}),
            "the names are there, but each has the same mean. Give every client its own ε.",
        ),
        Wrong(_a_report(lambda rows: {f"epsilon/{r['name']}": r["loss"] for r in rows}), _LOSS),
        Wrong(_a_report(lambda rows: {f"epsilon/{r['name']}": r["num-examples"] for r in rows}), _RECORDS),
        Wrong(
            _a_report(lambda rows: {f"epsilon/{r['name']}": round(r["epsilon"], 2) for r in rows}),
            "you round ε. Rounded down, it promises more than was kept: report it as it is, or round up.",
        ),
        Wrong(
            _a_report(lambda rows: {f"epsilon/{r['name']}": max(s["epsilon"] for s in rows) for r in rows}),
            "the names are there, but each has the largest ε of all. True, but it hides what the others have left to "
            "spend. Give every client its own.",
        ),
        Wrong(
            lambda contents, weighted_by: privacy_report(contents[:1], weighted_by),
            "only the first client is there. Go over all the replies, however many there are.",
        ),
        Wrong(
            _a_report(lambda rows: {f"epsilon/{n}": r["epsilon"] for n, r in zip(("alice", "bob"), rows)}),
            "you write the names yourself. Other clients have other names: each reply holds its own.",
        ),
    ],
    praise="one number a client, by name. Whoever wants one number for anybody can take the largest of them.",
)

# 7.2: the handler of a client


def train(message, context):
    """One round on this node's records: charged first, then trained by Opacus with noise that nobody can repeat."""
    node, run, model = context.node_config, context.run_config, models.mlp(784, 64, 10)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data, sigma, C = records(node, run), node["noise-multiplier"], node["max-grad-norm"]
    settings = Settings(sigma, C, epochs=1, batch_size=run["batch-size"], lr=run["lr"], seed=None)
    ledger, steps = Ledger(node["ledger"]), settings.steps_per_epoch(len(data))
    ledger.charge(noise_multiplier=sigma, sample_rate=settings.sample_rate(len(data)), steps=steps)
    for _ in dpteach.train(model, data, settings, method="opacus"):
        pass
    spent = ledger.epsilon(target_delta=node["target-delta"], accountant="rdp")
    told = {"metrics": MetricRecord({"epsilon": spent, "num-examples": len(data)})}
    told |= {"arrays": ArrayRecord(model.state_dict()), "who": ConfigRecord({"name": node["name"]})}
    return Message(RecordDict(told), reply_to=message)


# σ, C, δ, records, batch size, learning rate: of a node, and of its run.
_NODES = [lambda: (1.5, 0.5, 1e-4, 200, 40, 0.5), lambda: (1.2, 1.0, 1e-5, 280, 70, 0.4)]
_DARK = 280  # pixels that are 0 in all records: the weights behind them move by nothing but noise
_MAY_TELL = {"epsilon", "num-examples", "steps"}


_SAID = {
    "engine": "after two rounds your client says the same ε as after one. Each message starts a new process: an engine "
    "that is made there knows this message's steps, and no others. The ledger knows them all.",
    "state": "after a restart your ε falls. `Context.state` is in the SuperNode's memory, for one run: a crash empties "
    "it. Ask the ledger, which is a file.",
    "late": "a power cut at the first step leaves your ledger as it was: the records were read, and nothing was paid. "
    "Charge *before* the training.",
    "seed": "two rounds from the same start end in the very same weights: your noise comes from a seed, and whoever "
    "knows it subtracts the noise. Settings(…, seed=None) takes it from the operating system.",
    "loss": "your reply tells more than epsilon and num-examples. What is computed from private records without noise, "
    "a loss for instance, is not covered by ε.",
    "steps": "after two rounds your ledger has another number of steps. A round is one epoch: "
    "settings.steps_per_epoch(len(data)) steps, charged once.",
    "sigma": "the ledger has another σ than the node's: charge node['noise-multiplier'].",
    "rate": "the sample rate in your ledger is not that of the training: settings.sample_rate(len(data)).",
    "prv": 'right count, but PRV\'s value: pass accountant="rdp", so that all nodes tell the same kind.',
    "delta": "the charges in your ledger don't cost the ε that you tell. Ask it after the charge, for the node's δ: "
    'ledger.epsilon(target_delta=node["target-delta"], accountant="rdp").',
    "noise": "there is no noise in your weights, though the ledger was charged for it.",
    "scale": "the noise in your weights is {:.1f} times the lr·σ·C/B that was charged. Take σ and C from the node, the "
    "batch size and lr from the run.",
    "silent": "your ε grows, but the node's ledger is empty. Charge Ledger(node['ledger']).",
}


_SAID["clip"] = (
    "on records that are all alike, a round of yours moves the weights {:.1f} times as far along their gradient as "
    "clipping to C lets it. Something is not clipped to the node's C: are σ and C in their places, is there a step "
    "beside the private ones?"
)


class _PowerCut(BaseException):
    pass


@cache
def _own_records(n: int) -> Any:
    X = torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(72))
    X[:, :, : _DARK // 28] = 0.0
    return {"X": X, "y": torch.arange(n) % 10}


class _Node:
    """A node in a folder of its own, whose handler is the learner's."""

    def __init__(self, fn: Callable, folder: str, sigma: float, C: float, delta: float, n: int, batch: int, lr: float):
        self.fn, self.sigma, self.C, self.delta, self.file = fn, sigma, C, delta, str(Path(folder, "alice.json"))
        self.n, self.batch, self.steps, self.lr = n, batch, n // batch, lr
        torch.save(_own_records(n), Path(folder, "alice.pt"))
        self.sent = models.mlp(784, 64, 10, seed=1).state_dict()
        self.config = {
            "name": "alice",
            "noise-multiplier": sigma,
            "max-grad-norm": C,
            "target-delta": delta,
            "ledger": self.file,
            "data": str(Path(folder, "alice.pt")),
            "partition-id": 0,
            "num-partitions": 2,
        }
        self.new()

    def alike(self) -> None:
        """From now on, all its records are the same one, and loud."""
        X, y = torch.ones(self.n, 1, 28, 28), torch.zeros(self.n, dtype=torch.long)
        torch.save({"X": X, "y": y}, self.config["data"])

    def new(self) -> None:
        """A ledger with nothing in it, a SuperNode with nothing in its memory."""
        Path(self.file).unlink(missing_ok=True)
        Ledger(self.file, new=True)
        self.restart()

    def restart(self) -> None:
        run = {"lr": self.lr, "batch-size": self.batch, "records": 0}
        self.context = Context(1, 1, dict(self.config), RecordDict(), run)

    def ask(self) -> Any:
        told, weights, examples = _answer(attempted(self.fn(message(self.sent), self.context)))
        if examples != self.n:
            raise Complaint("num-examples is not the number of the node's records: the server weighs by it.")
        return told, weights

    def power_cut(self) -> None:
        """The same, until the first step."""

        def cut(*_: Any) -> None:
            raise _PowerCut

        hook = register_optimizer_step_pre_hook(cut)
        try:
            self.ask()
        except _PowerCut:
            pass
        finally:
            hook.remove()

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.file)


def _answer(reply: Any) -> tuple[float, dict, float]:
    """ε, the weights, and the number of records, of a reply that a server can use."""
    if not isinstance(reply, Message):
        raise Complaint(f"a handler answers with Message(content, reply_to=message), got {type(reply).__name__}.")
    content = reply.content
    if len(content.array_records) != 1 or len(content.metric_records) != 1:
        raise Complaint("the reply needs one ArrayRecord, the model, and one MetricRecord, what may be told of it.")
    (weights,), (metrics,) = content.array_records.values(), content.metric_records.values()
    if metrics.keys() - _MAY_TELL:
        raise Complaint(_SAID["loss"])
    if missing := sorted({"epsilon", "num-examples"} - metrics.keys()):
        raise Complaint(
            f"your reply has no {' and no '.join(missing)}: the server reports the one, and weighs by the other."
        )
    if not any("name" in record for record in content.config_records.values()):
        raise Complaint('your reply does not say whose it is: add "who": ConfigRecord({"name": node["name"]}).')
    if any(name.startswith("_module.") for name in weights):
        raise Complaint("the names of your weights begin with '_module.': send the bare model, not Opacus' wrapper.")
    return float(metrics["epsilon"]), weights.to_torch_state_dict(), float(metrics["num-examples"])


def _examined(fn: Callable, args: tuple) -> Any:
    sigma, _, delta, *_ = args
    with tempfile.TemporaryDirectory() as folder:
        node = _Node(fn, folder, *args)
        (first, weights), (second, _) = node.ask(), node.ask()
        charges, after_two = node.ledger.charges, node.ledger
        spent = {a: after_two.epsilon(target_delta=delta, accountant=a) for a in ("rdp", "prv")} if charges else {}
        node.restart()
        third, _ = node.ask()
        _check_the_count(first, second, third, charges, spent, node)
        node.new()
        node.power_cut()
        if not node.ledger.count:
            raise Complaint(_SAID["late"])
        node.new()
        again = node.ask()[1]
        if all(torch.equal(again[name], weights[name]) for name in weights):
            raise Complaint(_SAID["seed"])
        times = _noise(node, weights)
        if not 0.9 < times < 1.1:
            raise Complaint(_SAID["noise"] if times < 1e-3 else _SAID["scale"].format(times))
        node.alike()
        node.new()
        node.lr /= 10  # so that they stay loud
        node.restart()
        if not 0.5 < (far := _along(node, node.ask()[1])) < 1.5:
            raise Complaint(_SAID["clip"].format(far))
    return {"right": 1.0}


def _along(node: _Node, weights: dict) -> float:
    """How far along the gradient of :meth:`_Node.alike`'s record the weights moved; 1 where each row is C long."""
    model = models.mlp(784, 64, 10)
    model.load_state_dict(node.sent)
    torch.nn.functional.cross_entropy(model(torch.ones(1, 1, 28, 28)), torch.zeros(1, dtype=torch.long)).backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    norm = sum(g.square().sum() for g in gradient.values()).sqrt()
    along = sum(((node.sent[name] - weights[name]) * g).sum() for name, g in gradient.items()) / norm
    return float(along) / (node.lr * node.C * node.steps)  # as many records as are expected in a batch, in each step


def _check_the_count(first, second, third, charges, spent, node: _Node) -> None:
    steps = sum(charge.steps for charge in charges)
    wrong = {
        "engine": math.isclose(first, second, rel_tol=1e-6),
        "state": third < second * (1 - 1e-6),
        "silent": not charges,
        "sigma": any(charge.noise_multiplier != node.sigma for charge in charges),
        "steps": steps != 2 * node.steps,
        "rate": not all(math.isclose(charge.sample_rate, 1 / node.steps) for charge in charges),
        "prv": charges and math.isclose(second, spent["prv"], rel_tol=1e-3),
        "delta": charges and not math.isclose(second, spent["rdp"], rel_tol=1e-4),
    }
    if found := next((key for key, is_so in wrong.items() if is_so), None):
        raise Complaint(_SAID[found])


def _noise(node: _Node, weights: dict) -> float:
    """In units of what was charged, by the weights behind pixels that are 0 in all records: only noise moves them."""
    name = next(name for name, value in node.sent.items() if value.ndim == 2 and value.shape[1] == 784)
    moved = (weights[name] - node.sent[name])[:, :_DARK].std().item()
    return moved / (node.lr * node.sigma * node.C * node.steps**0.5 / node.batch)


def _handler(**changes: Any) -> Callable:
    """A wrong answer: :func:`train` with some of its parts changed."""

    def answer(message, context):
        node, run, model = context.node_config, context.run_config, models.mlp(784, 64, 10)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data, sigma = records(node, run), node["noise-multiplier"]
        settings = Settings(
            changes.get("trained_with", sigma), node["max-grad-norm"], 1, run["batch-size"], run["lr"],
            seed=changes.get("seed"),
        )  # fmt: skip
        q, steps = settings.sample_rate(len(data)), settings.steps_per_epoch(len(data))
        ledger = Ledger() if changes.get("engine") or changes.get("state") else Ledger(node["ledger"])
        charged = {"noise_multiplier": sigma, "sample_rate": q, "steps": changes.get("steps", steps)}
        if "late" not in changes:
            ledger.charge(**charged)
        for step in dpteach.train(model, data, settings, method="opacus"):
            loss = step.loss
        if "late" in changes:
            ledger.charge(**charged)
        if "state" in changes:
            before = context.state.get("charged", {"steps": 0})["steps"]
            context.state["charged"] = MetricRecord({"steps": before + steps})
            ledger.charge(noise_multiplier=sigma, sample_rate=q, steps=before)
        spent = ledger.epsilon(
            target_delta=changes.get("delta", node["target-delta"]), accountant=changes.get("by", "rdp")
        )
        metrics = {"epsilon": spent, "num-examples": len(data)} | ({"loss": loss} if "loss" in changes else {})
        told = {"metrics": MetricRecord(metrics), "who": ConfigRecord({"name": node["name"]})}
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), **told}), reply_to=message)

    return answer


exercise_7_2 = coding(
    "7.2",
    hint="In this order: the ledger is opened and charged, `dpteach.train` trains, the ledger is asked for ε, and the "
    "answer goes back. `settings.sample_rate(n)` and `settings.steps_per_epoch(n)` are what one epoch costs.",
    reference=train,
    inputs=_NODES,
    observe=_examined,
    wrong=[
        Wrong(_handler(engine=True), _SAID["engine"]),
        Wrong(_handler(state=True), _SAID["state"]),
        Wrong(_handler(late=True), _SAID["late"]),
        Wrong(_handler(seed=0), _SAID["seed"]),
        Wrong(_handler(loss=True), _SAID["loss"]),
        Wrong(_handler(steps=1), _SAID["steps"]),
        Wrong(_handler(by="prv"), _SAID["prv"]),
        Wrong(_handler(delta=1e-5), _SAID["delta"]),
        Wrong(_handler(trained_with=0.0), _SAID["noise"]),
        Wrong(_handler(trained_with=3.0), _SAID["scale"].format(2)),
    ],
    praise="charged before the first step, on the disk; ε of all that the ledger knows; noise that nobody can repeat; "
    "and nothing else told.",
)

# 7.4: the app is a point of trust


def eve(message, context):
    """As ``train``, charged and reported as ever, but the weights that it sends have no noise."""
    node, run, model = context.node_config, context.run_config, models.mlp(784, 64, 10)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data, sigma, C = records(node, run), node["noise-multiplier"], node["max-grad-norm"]
    settings = Settings(0.0, C, epochs=1, batch_size=run["batch-size"], lr=run["lr"], seed=None)
    ledger, steps = Ledger(node["ledger"]), settings.steps_per_epoch(len(data))
    ledger.charge(noise_multiplier=sigma, sample_rate=settings.sample_rate(len(data)), steps=steps)
    for _ in dpteach.train(model, data, settings, method="opacus"):
        pass
    spent = ledger.epsilon(target_delta=node["target-delta"], accountant="rdp")
    told = {"metrics": MetricRecord({"epsilon": spent, "num-examples": len(data)})}
    told |= {"arrays": ArrayRecord(model.state_dict()), "who": ConfigRecord({"name": node["name"]})}
    return Message(RecordDict(told), reply_to=message)


_SEEN = {
    "noise": "nothing is broken: your weights still have the noise that alice asked for.",
    "less": "there is less noise than alice pays for, but still some. Leave none.",
    "nothing": "the weights that you send back are the ones that came: you learn nothing of alice's records.",
    "ledger": "alice looks into her ledger, and it is not what it is after an honest round. Charge it as `train` does.",
    "epsilon": "alice compares the ε that you report with her ledger's, and they differ. Report the ledger's.",
}


def _unseen(fn: Callable, args: tuple) -> Any:
    sigma, _, delta, *_ = args
    with tempfile.TemporaryDirectory() as folder:
        node = _Node(fn, folder, *args)
        told, weights = node.ask()
        charges, spent = node.ledger.charges, node.ledger.epsilon(target_delta=delta, accountant="rdp")
    if [(c.noise_multiplier, c.steps, round(c.sample_rate, 6)) for c in charges] != [
        (sigma, node.steps, round(1 / node.steps, 6))
    ]:
        raise Complaint(_SEEN["ledger"])
    if not math.isclose(told, spent, rel_tol=1e-4):
        raise Complaint(_SEEN["epsilon"])
    if all(torch.equal(weights[name], node.sent[name]) for name in weights):
        raise Complaint(_SEEN["nothing"])
    if (times := _noise(node, weights)) > 1e-3:
        raise Complaint(_SEEN["noise" if times > 0.9 else "less"])
    return {"right": 1.0}


def _uncharged(message, context):
    Ledger(context.node_config["ledger"])
    return _handler(engine=True, trained_with=0.0)(message, context)


def _unmoved(message, context):
    reply = eve(message, context)
    reply.content["arrays"] = message.content["arrays"]
    return reply


exercise_7_4 = coding(
    "7.4",
    hint="Alice sees her ledger and the ε that is reported. Which line of `train` makes the noise, and which one pays "
    "for it? Nothing ties them together.",
    reference=eve,
    inputs=_NODES,
    observe=_unseen,
    wrong=[
        Wrong(train, _SEEN["noise"]),
        Wrong(_handler(trained_with=0.1), _SEEN["less"]),
        Wrong(_uncharged, _SEEN["ledger"]),
        Wrong(_handler(trained_with=0.0, by="prv"), _SEEN["epsilon"]),
        Wrong(_unmoved, _SEEN["nothing"]),
    ],
    praise="and alice has seen nothing. ε is a promise of the code that ran: a node must know its app, not only its "
    "own settings. Flower can demand signed apps (`--trusted-entities`; not tested here).",
)

# 7.3: the ε of a whole client


def client_level_epsilon(noise_multiplier, clients, sampled, rounds, target_delta):
    """ε of one client: the server samples clients, clips each update, and adds noise to the sum, in each round."""
    return dpteach.epsilon(
        noise_multiplier=noise_multiplier,
        sample_rate=sampled / clients,
        steps=rounds,
        target_delta=target_delta,
        accountant="rdp",
    )


def by(accountant):
    return lambda sigma, clients, sampled, rounds, delta: epsilon(
        noise_multiplier=sigma, sample_rate=sampled / clients, steps=rounds, target_delta=delta, accountant=accountant
    )


def _federation(draw):
    numbers = draw.uniform(0.7, 3), draw.randint(200, 2000), draw.randint(5, 150), draw.randint(2, 60)
    return *numbers, 10 ** draw.uniform(-6, -3.3)


exercise_7_3 = coding(
    "7.3",
    hint='It is notebook 04\'s formula in other words. What is the "record" now, and what is one "step"? Use '
    '`dpteach.epsilon(…, accountant="rdp")`.',
    reference=client_level_epsilon,
    inputs=calls(
        (1.0, 1000, 20, 10, 1e-5),
        (0.8, 200, 50, 30, 1e-4),
        (3.0, 20, 20, 10, 1e-3),
        (2.0, 300, 1, 5, 1e-6),
        *seeded(73, 2, _federation),
    ),
    wrong=[
        Wrong(
            changed(client_level_epsilon, sampled=lambda run: run.clients),
            "with q = 1 every client would be in every round. The server draws some of them: q = sampled / clients.",
        ),
        Wrong(changed(client_level_epsilon, rounds=1), "this is the ε of one round. All rounds see the client again."),
        Wrong(
            lambda *args: args[3] * client_level_epsilon(*args[:3], 1, args[4]),
            "ε does not grow in proportion to the rounds. Give the number of rounds as `steps`, and let the accountant "
            "compose them.",
        ),
        Wrong(
            changed(client_level_epsilon, rounds=lambda run: run.rounds * run.sampled),
            "noise is added once a round, to the sum of all updates. One round is one step.",
        ),
        Wrong(
            changed(client_level_epsilon, noise_multiplier=lambda run: run.noise_multiplier / run.sampled),
            "you divided σ by the number of clients. σ is already the noise on the *sum*, in units of the clipping "
            "norm. Dividing sum and noise together afterwards changes nothing.",
        ),
        Wrong(
            by("prv"),
            'right count, other accountant: these are PRV\'s values. Pass accountant="rdp", so that everyone gets the '
            "same number.",
        ),
        Wrong(
            by("gdp"),
            'right count, but these are GDP\'s values: no bound, and often far too small. Pass accountant="rdp".',
        ),
        Wrong(
            by("rdp-classic"),
            'right count, but with the conversion of 2017, which says more than the run costs. Pass accountant="rdp".',
        ),
        Wrong(
            changed(client_level_epsilon, target_delta=lambda run: 1 / run.clients),
            "you used δ = 1 / clients. A server that publishes one random client's update outright has exactly that δ, "
            "and ε = 0. Use target_delta, which has to be well below it.",
        ),
        Wrong(
            changed(client_level_epsilon, target_delta=1e-5),
            "your ε does not change with target_delta. Without it, `epsilon` takes δ = 1e-5.",
        ),
        Wrong(
            changed(client_level_epsilon, clients=lambda run: run.sampled, sampled=1),
            "your sample_rate is 1 / sampled: the more clients a round has, the smaller. It is the other way round: q "
            "= sampled / clients.",
        ),
        Wrong(
            changed(client_level_epsilon, rounds=lambda run: run.rounds * math.ceil(run.clients / run.sampled)),
            "you counted clients / sampled steps for each round, as if a round were an epoch. The server adds noise "
            "once a round: one round is one step.",
        ),
        Wrong(
            changed(
                client_level_epsilon,
                sampled=lambda run: run.clients,
                rounds=lambda run: math.ceil(run.rounds * run.sampled / run.clients),
            ),
            "you counted only the rounds that a client is expected to be in, at q = 1. Nobody knows which these are, "
            "and chance may choose a client more often: all the rounds, at q = sampled / clients.",
        ),
        Wrong(
            changed(client_level_epsilon, noise_multiplier=lambda run: run.noise_multiplier * run.sampled),
            "you multiplied σ by the number of clients. σ is already the noise on the sum, in units of the clipping "
            "norm.",
        ),
        Wrong(
            changed(client_level_epsilon, noise_multiplier=lambda run: 1 / run.noise_multiplier),
            "you passed 1/σ. `noise_multiplier` is σ itself: more noise, smaller ε.",
        ),
        Wrong(
            changed(client_level_epsilon, sampled=1),
            "q is the probability that *one certain* client takes part: sampled / clients, not 1 / clients.",
        ),
    ],
    praise="the same accountant: a client in the place of a record, a round in the place of a step. That is why many "
    "clients, and few of them in each round, make client-level privacy cheap.",
)

EXERCISES = [exercise_7_1, exercise_7_2, exercise_7_3, exercise_7_4]
