"""Right answers that are written in other ways pass the checks of notebooks 04 to 07; wrong ones of an audit do not."""

import functools
import math
import re
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from verdicts import unexpected

import dpteach
from dpteach import Data, epsilon
from dpteach.exercises import budget, check, federated, flower, opacus
from dpteach.flower import MISSING, installed

if installed():
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

# Right, in other ways


def share_above_by_where(losses, eps):
    return torch.where(losses > eps, -torch.expm1(eps - losses), 0.0).sum() / len(losses)


def share_above_in_numpy(losses, eps):
    kept = losses.numpy()[losses.numpy() > eps]
    return np.sum(1 - np.exp(eps - kept)) / len(losses)


def step_rdp_by_opacus(sigma, q, alpha):
    return compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=[alpha])[0]


def step_rdp_by_a_loop(sigma, q, alpha):
    whole = torch.tensor(-math.inf, dtype=torch.float64)
    for k in range(alpha + 1):
        ways = math.lgamma(alpha + 1) - math.lgamma(k + 1) - math.lgamma(alpha - k + 1)
        term = ways + (alpha - k) * math.log1p(-q) + k * math.log(q) + (k * k - k) / 2 / sigma / sigma
        whole = torch.logaddexp(whole, torch.tensor(term, dtype=torch.float64))
    return whole / (alpha - 1)


def order_by_another_formula(alpha, rdp_of_a_step, steps, delta):
    return np.float64(steps * rdp_of_a_step + np.log((alpha - 1) / alpha) + np.log(1 / (delta * alpha)) / (alpha - 1))


def my_epsilon_in_a_loop(sigma, q, steps, delta):
    best = math.inf
    for alpha in range(2, 64):
        best = min(best, order_by_another_formula(alpha, step_rdp_by_opacus(sigma, q, alpha), steps, delta))
    return torch.tensor(max(best, 0))


def all_or_nobody(n, delta, generator):
    return range(n) if torch.rand(1, generator=generator) < delta else []


def leak_in_a_loop(n, delta, generator):
    return {k for k in range(n) if torch.rand((), generator=generator) < delta}


def folded_by_squaring(losses, probabilities, steps, eps):
    whole, power, left = np.ones(1), np.array(probabilities), steps
    while left:
        whole = np.convolve(whole, power) if left % 2 else whole
        power, left = np.convolve(power, power), left // 2
    sums = np.linspace(steps * losses[0], steps * losses[-1], len(whole))
    return (whole[sums > eps] * -np.expm1(eps - sums[sums > eps])).sum()


def impossible_by_a_ledger(claims, n, batch_size, noise_multiplier, target_delta):
    found, ledger, steps = [], dpteach.Ledger(), -(-n // batch_size)
    for epoch in range(1, max(claims) + 1):
        ledger.charge(noise_multiplier=noise_multiplier, sample_rate=1 / steps, steps=steps)
        if epoch in claims and ledger.epsilon(target_delta=target_delta) - claims[epoch] > 0.02:
            found.append(np.int64(epoch))
    return tuple(found)


def epochs_from_above(budget_, n, batch_size, noise_multiplier, target_delta):
    steps = math.ceil(n / batch_size)

    def cost(epochs):
        return epsilon(
            noise_multiplier=noise_multiplier,
            sample_rate=1 / steps,
            steps=epochs * steps,
            target_delta=target_delta,
            accountant="rdp",
        )

    high = 1
    while cost(high) <= budget_:
        high *= 2
    return next(e for e in range(high, -1, -1) if cost(e) <= budget_)


def cost(epochs, n, batch_size, noise_multiplier, target_delta):
    return budget.price(n, batch_size, epochs, noise_multiplier, target_delta)


def epochs_by_another_rounding(budget_, *run):
    """An ε that differs in the last place, as another library's does."""
    epochs = np.int64(0)
    while cost(int(epochs) + 1, *run) * (1 + 1e-16 * (-1) ** int(epochs)) <= budget_:
        epochs += 1
    return epochs


def average_in_numpy(models, weights):
    return {
        name: np.average([m.state_dict()[name].numpy() for m in models], axis=0, weights=weights)
        for name in models[0].state_dict()
    }


def average_of_parameters(models, weights):
    parameters = [dict(model.named_parameters()) for model in models]
    return {
        name: torch.stack([w / sum(weights) * p[name] for w, p in zip(weights, parameters)]).sum(0)
        for name in parameters[0]
    }


def average_of_the_package(models, weights):
    return dpteach.federated_average(models, weights)


def rounds_charged_step_by_step(ledger, train_one_round, rounds, noise_multiplier, sample_rate, steps):
    path = np.zeros(rounds)
    for k in range(rounds):
        for _ in range(steps):
            ledger.charge(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=1)
        try:
            train_one_round()
        finally:
            path[k] = ledger.epsilon(accountant="rdp", target_delta=1e-5)
    return path


def masks_pair_by_pair(n, shared):
    """The other way round: the worker with the higher number adds."""
    result = torch.zeros(n, len(shared(0, 1)), dtype=torch.int64)
    for i in range(n):
        for j in range(i):
            result[i] += shared(j, i)
            result[j] -= shared(i, j)
    return result % 2**48


def masks_in_a_list(n, shared):
    return [row + 0 for row in masks_pair_by_pair(n, shared)]


def unmask_step_by_step(i, sent, revealed):
    found = sent.clone()
    for j in sorted(revealed):
        found = torch.remainder(found + (revealed[j] if j < i else 2**48 - revealed[j]), 2**48)
    return found


def report_in_a_loop(contents, weighted_by):
    log = MetricRecord()
    for content in sorted(contents, key=lambda c: -c["metrics"]["epsilon"]):
        (name,) = (record["name"] for record in content.config_records.values())
        log[f"epsilon/{name}"] = content["metrics"]["epsilon"]
    return log


def train_by_a_worker(message, context):
    """Worker charges and trains; the reply has other keys, and tells the steps."""
    node, run, model = context.node_config, context.run_config, dpteach.models.mlp(784, 64, 10)
    (sent,) = message.content.array_records.values()
    model.load_state_dict(sent.to_torch_state_dict())
    settings = dpteach.Settings(
        node["noise-multiplier"], node["max-grad-norm"], 1, run["batch-size"], run["lr"], node["target-delta"], None
    )
    worker = dpteach.Worker(node["name"], flower.records(node, run), settings, dpteach.Ledger(node["ledger"]))
    for _ in worker.train_round(model):
        pass
    metrics = {"steps": worker.ledger.steps, "epsilon": worker.epsilon("rdp"), "num-examples": len(worker.data)}
    model_, about = ArrayRecord(model.state_dict()), ConfigRecord({"name": "alice"})
    return Message(RecordDict({"model": model_, "told": MetricRecord(metrics), "me": about}), reply_to=message)


def client_level_by_opacus(noise_multiplier, clients, sampled, rounds, target_delta):
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sampled / clients, rounds)]
    return accountant.get_epsilon(target_delta)


def parts_as_a_list(*args):
    return list(opacus.make_it_private(*args))


def shuffled_before(engine, model, X, y, batch_size, lr, noise_multiplier, max_grad_norm, batches, noise):
    loader = DataLoader(TensorDataset(X, y), batch_size, shuffle=True, generator=batches)
    sgd = torch.optim.SGD(model.parameters(), lr)
    strength = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm, "noise_generator": noise}
    return engine.make_private(module=model, optimizer=sgd, data_loader=loader, **strength)


adam = opacus.parts(optimizer=torch.optim.Adam)


def with_less_noise(model, optimizer, loader):
    optimizer.noise_multiplier = 0.1
    opacus.EPOCH(model, optimizer, loader)


def moves_the_weights_too(model, optimizer, loader):
    for X, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
        for p in model.parameters():
            p.data -= 0.01 * p.grad


RIGHT = [
    ("4.1", share_above_by_where),
    ("4.1", share_above_in_numpy),
    ("4.3", step_rdp_by_opacus),
    ("4.3", step_rdp_by_a_loop),
    ("4.4", order_by_another_formula),
    ("4.5", my_epsilon_in_a_loop),
    ("4.6", all_or_nobody),
    ("4.6", leak_in_a_loop),
    ("4.7", folded_by_squaring),
    ("4.9", impossible_by_a_ledger),
    ("4.2", epochs_from_above),
    ("4.2", epochs_by_another_rounding),
    ("6.1", average_in_numpy),
    ("6.1", average_of_parameters),
    ("6.1", average_of_the_package),
    ("6.3", rounds_charged_step_by_step),
    ("7.1", report_in_a_loop),
    ("7.2", train_by_a_worker),
    ("7.3", client_level_by_opacus),
    ("4.8", [0.5, 0.001, 1000.0]),
    ("4.8", torch.tensor([0.5, 0.001, 1000.0])),
    ("4.8", np.array([0.5, 0.001, 1000])),
    ("5.1", parts_as_a_list),
    ("5.1", shuffled_before),
    ("5.2", opacus.script(poisson_sampling=False)),
    ("5.2", opacus.script(use=lambda old, new: (*new[:2], old[2]))),
    ("5.2", opacus.script(ask_after=1)),
    ("5.2", opacus.script(forgets=True)),
    ("5.2", opacus.script(moves_the_weights_too)),
    ("5.3", (256.0, 256.0)),
    ("5.3", [100, 100]),
    ("5.3", np.array([300, 300])),
    ("5.3", torch.tensor([256, 256])),
    ("6.2", masks_pair_by_pair),
    ("6.2", masks_in_a_list),
    ("6.5", unmask_step_by_step),
    ("6.4", "73.1 %"),
    ("6.4", 0.73),
]


NOTEBOOKS = ["4", "5", "6", pytest.param("7", marks=pytest.mark.skipif(not installed(), reason=MISSING))]


@pytest.mark.parametrize("n", NOTEBOOKS)
def test_a_right_answer_that_is_written_in_another_way_passes(n):
    assert unexpected((id, answer, True, "") for id, answer in RIGHT if id.startswith(n)) == ""


# Wrong, and said to be right or misjudged before


def search_in(end):
    def epochs_within(*args):
        return next((e - 1 for e in range(1, end) if cost(e, *args[1:]) > args[0]), end - 1)

    return epochs_within


def no_next_epoch(budget_, n, batch_size, noise_multiplier, target_delta):
    epochs = 0
    while cost(epochs + 1, n, batch_size, noise_multiplier, target_delta) <= budget_:
        pass
    return epochs


def changes_the_weights(models, weights):
    for k, w in enumerate(list(weights)):
        weights[k] = w / 80
    return federated.average(models, weights)


def masks_of_a_star_in_the_middle(n, shared):
    return federated.from_pairs(lambda i, j: 1 if i < j else -1, pairs=lambda i, j, n: 1 in (i, j))(n, shared)


def hides_the_error(*args):
    ledger, train_one_round, *rest = args

    def quiet():
        with suppress(Exception):
            train_one_round()

    return federated.private_rounds(ledger, quiet, *rest)


def charges_in_except(ledger, train_one_round, rounds, noise_multiplier, sample_rate, steps):
    path = []
    for _ in range(rounds):
        try:
            train_one_round()
        except BaseException:
            ledger.charge(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
            raise
        ledger.charge(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        path.append(ledger.epsilon(accountant="rdp"))
    return path


def step_rdp_by_math_exp(sigma, q, alpha):
    ways = ((math.comb(alpha, k) * (1 - q) ** (alpha - k) * q**k, k) for k in range(alpha + 1))
    return math.log(sum(share * math.exp(k * (k - 1) / (2 * sigma**2)) for share, k in ways)) / (alpha - 1)


def with_reply(metrics=None, who=None, prefix=""):
    """The right handler, whose reply is then changed."""

    def train(message, context):
        content = flower.train(message, context).content
        if metrics is not None:
            content["metrics"] = MetricRecord(metrics)
        if who is not None:
            content["who"] = ConfigRecord(who)
        weights = {f"{prefix}{name}": value for name, value in content["arrays"].to_torch_state_dict().items()}
        content["arrays"] = ArrayRecord(weights)
        return Message(content, reply_to=message)

    return train


def with_node(handler=None, **node):
    """The handler, as if the node had said something else."""
    return lambda message, context: (handler or flower.train)(message, changed_context(context, node_config=node))


def with_settings(settings):
    def answer(message, context):
        def made(sigma, C, **rest):
            return settings(sigma, C, rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flower, "Settings", made)
            return flower.train(message, context)

    return answer


def with_run(**run):
    return lambda message, context: flower.train(message, changed_context(context, run_config=run))


def changed_context(context, **changes):
    configs = {key: {**getattr(context, key), **changes.get(key, {})} for key in ("node_config", "run_config")}
    return SimpleNamespace(state=context.state, **configs)


WRONG = [
    ("4.1", lambda losses, eps: losses.clamp(min=eps).mean().item() - eps, "how far each loss exceeds"),
    ("4.1", lambda losses, eps: 1 - torch.exp(eps - losses), "must return a number"),
    ("4.2", search_in(10), "ends at 9"),
    ("4.2", search_in(101), "ends at 100"),
    ("4.2", search_in(31), "too low"),
    ("4.2", no_next_epoch, "does its loop end?"),
    ("4.3", step_rdp_by_math_exp, "OverflowError"),
    ("4.3", lambda sigma, q, alpha: math.log10(math.exp(1)) * budget.step_rdp(sigma, q, alpha), "too low"),
    ("4.4", lambda *run: -budget.epsilon_of_order(*run), "too"),
    ("4.5", lambda *run: budget.my_epsilon(*run) + 1e-5, "too high"),
    ("4.6", lambda n, delta, generator: [n], "the numbers 0 to n - 1"),
    ("4.6", lambda n, delta, generator: [0, 0], "at most once"),
    ("4.6", lambda n, delta, generator: "all", "as a list or tensor"),
    ("4.6", lambda n, delta, generator: torch.randperm(n, generator=generator)[:1], "fewer people than δ allows"),
    ("4.6", lambda n, delta, generator: [3], "one person is published each time"),
    ("4.7", lambda losses, p, steps, eps: budget.delta_of_run(losses, p, steps, eps) ** 2, "too low"),
    ("4.8", (0.001, 0.5, 1000), "in this order"),
    ("4.8", (10**400, 0.1, 10), "in this order"),
    ("4.9", lambda claims, *run: [], "must return 1 values"),
    ("4.9", lambda claims, *run: [claims[e] for e in budget.impossible(claims, *run)], "too low"),
    ("5.1", lambda engine, model, *rest: model, "must return three objects"),
    ("5.1", lambda *args: parts_as_a_list(*args)[::-1], "in this order"),
    ("5.1", opacus.parts(poisson_sampling=False), "right so far: model, optimizer. The loader: it is a plain"),
    ("5.1", opacus.parts(clipping="per_layer", max_grad_norm=[0.35] * 4), "The optimizer: it clips to another norm"),
    ("5.1", opacus.kept("model", "loader"), "right so far: optimizer. The loader: it is a plain"),
    ("5.1", adam, "The optimizer: clipping and noise are right, and the step is not"),
    ("5.2", opacus.train_private, "this ε is true"),
    ("5.2", opacus.script(with_less_noise), "something else"),
    ("5.2", lambda *args: 1.0, "not the answer of an engine"),
    ("5.2", opacus.changed(opacus.train_private, noise_multiplier=9.0), "something else"),
    ("5.2", opacus.script(opacus.epoch(skip_empty=True)), "something else"),
    ("5.2", opacus.script(use=lambda old, new: (new[0], old[1], new[2])), "Opacus refuses"),
    ("5.3", (10**400, 10**400), "whole numbers"),
    ("5.3", (256.5, 256), "whole numbers"),
    ("5.3", "25", "at least 100"),
    ("6.1", changes_the_weights, "changes the list of weights"),
    ("6.2", lambda n, shared: masks_pair_by_pair(n, shared).double(), "floats are rounded"),
    ("6.2", lambda n, shared: torch.randint(2**48, (n, len(shared(0, 1)))), "do not cancel"),
    ("6.2", lambda n, shared: masks_pair_by_pair(n, shared) % 2**32, "do not cancel"),
    ("6.2", lambda n, shared: masks_pair_by_pair(n, shared)[1:], "for each of the 3 workers"),
    ("6.2", lambda n, shared: torch.stack([shared(i, i) for i in range(n)]), "with herself"),
    ("6.2", masks_of_a_star_in_the_middle, "with *each* other worker"),
    ("6.5", lambda i, sent, revealed: (sent - sum(revealed.values())) % 2**48, "right for worker 0"),
    ("6.5", lambda i, sent, revealed: federated.unmask(i, sent, revealed).double(), "Floats round"),
    ("6.5", lambda i, sent, revealed: federated.unmask(i, sent, revealed) + 1, "largest difference is 1."),
    ("6.3", charges_in_except, "killed"),
    ("6.3", hides_the_error, "hides an error"),
    ("6.4", 73.1, "in percent"),
    ("6.4", 88.08, "bob's ε"),
    ("6.4", "50 %", "learns nothing"),
    ("7.1", lambda contents, by: print(flower.privacy_report(contents, by)), "prints, and returns nothing"),
    (
        "7.1",
        lambda contents, by: dict(flower.privacy_report(contents, by)),
        "Flower wants a MetricRecord here, got dict",
    ),
    ("7.1", lambda contents, by: contents[0]["metrics"], "loss"),
    ("7.1", lambda contents, by: [c["metrics"].pop("loss") for c in contents], "changes the replies"),
    (
        "7.1",
        lambda contents, by: MetricRecord({c["who"]["name"]: c["metrics"]["epsilon"] for c in contents}),
        "of what",
    ),
    ("7.1", lambda contents, by: MetricRecord(), "the keys of your dict"),
    (
        "7.2",
        lambda message, context: message.content,
        "answers with Message(content, reply_to=message), got RecordDict",
    ),
    ("7.2", lambda message, context: Message(RecordDict(), reply_to=message), "needs one ArrayRecord"),
    ("7.2", with_reply(metrics={"epsilon": 1.0}), "your reply has no num-examples"),
    ("7.2", with_reply(metrics={"epsilon": 1.0, "num-examples": 200, "accuracy": 0.9}), "more than epsilon"),
    ("7.2", with_reply(who={}), "whose it is"),
    ("7.2", with_reply(prefix="_module."), "send the bare model"),
    ("7.2", with_node(**{"noise-multiplier": 3.0}), "another σ"),
    ("7.2", with_node(**{"max-grad-norm": 1.0}), "the noise in your weights is 2.0 times"),
    ("7.2", with_run(**{"batch-size": 100}), "another number of steps"),
    ("7.2", with_settings(lambda sigma, C, rest: dpteach.Settings(C, sigma, **rest)), "as clipping to C lets it"),
    (
        "7.2",
        with_settings(lambda sigma, C, rest: dpteach.Settings(sigma * C / 1e6, 1e6, **rest)),
        "as clipping to C lets",
    ),
    ("7.2", with_run(lr=0.05), "the noise in your weights is 0.1 times"),
    ("7.4", lambda message, context: flower.train(message, context).content, "answers with Message"),
    ("7.4", with_node(flower.eve, **{"noise-multiplier": 9.0}), "it is not what it is after an honest round"),
]


@pytest.mark.parametrize("n", NOTEBOOKS)
def test_a_wrong_answer_of_an_audit_gets_the_sentence_that_fits(n):
    assert unexpected((id, answer, False, words) for id, answer, words in WRONG if id.startswith(n)) == ""


@pytest.mark.skipif(not installed(), reason=MISSING)
def test_an_error_in_a_report_does_not_show_what_is_right():
    def doubled(contents, by):
        return MetricRecord({name: 2 * value for name, value in flower.privacy_report(contents, by).items()})

    answers = [doubled, lambda contents, by: MetricRecord({"epsilon/alice": 1}), lambda contents, by: [2.0]]
    found = [check("7.1", answer) for answer in answers]
    assert [v for v in found if v.passed is not False or "1.17" in v.message or "{" in v.message] == []


@pytest.mark.skipif(not installed(), reason=MISSING)
def test_a_right_answer_goes_into_the_app_and_a_wrong_one_does_not(capsys):
    assert "def report_in_a_loop" in flower.yours("7.1", report_in_a_loop)
    assert "your answer goes" in capsys.readouterr().out
    for answer in (lambda contents, by: MetricRecord(), lambda contents, by: None):
        assert flower.yours("7.1", answer).startswith("def privacy_report(contents, weighted_by):")
        assert "no right answer yet" in capsys.readouterr().out


def test_a_budget_that_is_spent_to_the_last_digit_pays():
    verdict = check("4.2", lambda money, *run: budget.epochs_within(math.nextafter(money, 0), *run))
    assert verdict.passed is False and "exactly" in verdict.message


# 5.4, with Opacus itself


def trains(
    PrivacyEngine,
    model,
    data,
    noise_multiplier,
    max_grad_norm,
    epochs,
    batch_size,
    target_delta,
    *,
    dataset=None,
    collate_fn=None,
    optimizer=torch.optim.SGD,
    accountant="prv",
    epoch=opacus.EPOCH,
    tell=lambda engine, loader, noise_multiplier, epochs, delta: engine.get_epsilon(delta),
    **settings,
):
    loader = DataLoader(dataset(data) if dataset else data, batch_size=batch_size, collate_fn=collate_fn)
    engine = PrivacyEngine(accountant=accountant)
    model, optimizer, *criterion, loader = engine.make_private(
        module=model,
        optimizer=optimizer(model.parameters(), lr=0.05),
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        **settings,
    )
    for _ in range(epochs):
        epoch(model, optimizer, loader, *criterion)
    return tell(engine, loader, noise_multiplier, epochs, target_delta)


def in_small_pieces(model, optimizer, loader):
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=32, optimizer=optimizer) as pieces:
        opacus.EPOCH(model, optimizer, pieces)


def with_the_criterion(model, optimizer, loader, criterion):
    for X, y in loader:
        optimizer.zero_grad()
        criterion(model(X), y).backward()
        optimizer.step()


def with_another_criterion(model, optimizer, loader, criterion):
    opacus.EPOCH(model, optimizer, loader)


def by_hand(engine, loader, noise_multiplier, epochs, delta, **others):
    return epsilon(
        **{
            "noise_multiplier": noise_multiplier,
            "sample_rate": 1 / len(loader),
            "steps": epochs * len(loader),
            "target_delta": delta,
            **others,
        }
    )


def each_epoch_makes_private_again(
    PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta
):
    loader = DataLoader(data, batch_size=batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = PrivacyEngine()
    for _ in range(epochs):
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
        )
        opacus.EPOCH(model, optimizer, loader)
        print(engine.get_epsilon(1e-5))
    return engine.get_epsilon(target_delta)


GHOST = {"grad_sample_mode": "ghost", "criterion": torch.nn.CrossEntropyLoss()}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"accountant": "rdp"},
        {"optimizer": torch.optim.Adam},
        {"dataset": lambda data: Data(*data.tensors), "collate_fn": lambda batch: batch},
        {"epoch": in_small_pieces},
        {"epoch": with_the_criterion, **GHOST},
        {"poisson_sampling": True},
        {"tell": lambda engine, loader, sigma, epochs, delta: engine.accountant.get_epsilon(delta=delta)},
        {"tell": lambda engine, *rest: torch.tensor(engine.get_epsilon(rest[-1]))},
        {"tell": by_hand},
        {"tell": functools.partial(by_hand, accountant="rdp")},
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_a_training_that_is_written_in_another_way_is_right(how):
    verdict = check("5.4", functools.partial(trains, **how))
    assert verdict.passed is True, verdict


def test_one_engine_may_make_the_model_private_in_each_epoch():
    assert check("5.4", each_epoch_makes_private_again).passed is True


def leaves_out_nan(model, optimizer, loader):
    for X, y in loader:
        loss = F.cross_entropy(model(X), y)
        if not torch.isnan(loss):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def with_another_norm(model, optimizer, loader):
    optimizer.max_grad_norm = 1e6
    opacus.EPOCH(model, optimizer, loader)


def first_batch_only(model, optimizer, loader):
    opacus.EPOCH(model, optimizer, [next(iter(loader))])


@pytest.mark.parametrize(
    "how, fault",
    [
        ({"poisson_sampling": False}, "not Poisson"),
        ({"epoch": leaves_out_nan}, "skips empty"),
        ({"epoch": moves_the_weights_too}, "other optimizer"),
        ({"epoch": lambda *args: None}, "steps"),
        ({"epoch": first_batch_only}, "steps"),
        ({"epoch": with_another_criterion, **GHOST}, "old criterion"),
        ({"dataset": lambda data: ConcatDataset([data, data])}, "twice"),
        ({"dataset": lambda data: Subset(data, range(300))}, "left out"),
        ({"epoch": with_less_noise}, "noise"),
        ({"epoch": with_another_norm}, "norm"),
        ({"accountant": "gdp"}, "no bound"),
        ({"tell": functools.partial(by_hand, accountant="gdp")}, "no bound"),
        ({"tell": functools.partial(by_hand, target_delta=1e-5)}, "other delta"),
        ({"tell": functools.partial(by_hand, sample_rate=128 / 650)}, "other number"),
        ({"tell": lambda *args: 1.0}, "other number"),
        ({"tell": lambda engine, *rest: round(engine.get_epsilon(rest[-1]), 1)}, "rounded"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_a_training_whose_epsilon_is_untrue_gets_the_reason(how, fault):
    verdict = check("5.4", functools.partial(trains, **how))
    assert (verdict.passed, verdict.message) == (False, opacus.FAULTS[fault].message)


def test_a_training_that_returns_nothing_is_not_unattempted():
    verdict = check("5.4", functools.partial(trains, tell=lambda *args: None))
    assert verdict.passed is False and "returns nothing" in verdict.message


def test_the_learners_random_numbers_go_on_after_a_training():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check("5.4", opacus.train_private)
    assert torch.equal(torch.get_rng_state(), before)
