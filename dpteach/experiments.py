"""The reference experiments: runs too long for a notebook, run once and stored with what is needed to repeat them.

``python -m dpteach.experiments two-workers`` writes ``dpteach/results/two-workers.csv``.
"""

import copy
import csv
import functools
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dpteach import language, models
from dpteach._checks import choice
from dpteach.accounting import epsilon, noise_multiplier_for
from dpteach.data import Data, load_mnist, split
from dpteach.features import fixed_features
from dpteach.federated import Worker, federated_average, train_rounds
from dpteach.mechanism import add_noise, clipped_sum_and_losses
from dpteach.randomness import seeds
from dpteach.training import Settings, accuracy, set_gradient, train

RESULTS = Path(__file__).resolve().parent / "results"  # in the package: a notebook reads them wherever it is installed
_GUIDE_DELTA = 1e-5


def guide_run(n: int, target_epsilon: float | None, epochs: int, seed: int) -> Iterator[dict]:
    """The recipe of the guide *Implement Differential Privacy in AI Model Training in 20 Minutes*, a row an epoch.

    The small CNN on MNIST, plain SGD at learning rate 0.05, batch 256, C = 1, δ = 1e-5; σ from the target by PRV, as
    ``make_private_with_epsilon`` finds it.

    Args:
        n: how many of the training images, from the first one on; the guide takes all 60,000.
        target_epsilon: what the run may cost; None trains without privacy.
        epochs: the guide trains for 10.
        seed: of the weights, the batches and the noise.

    Yields:
        A dict by epoch: ``n, target_epsilon, seed, epochs, epoch, noise_multiplier, loss`` (mean over the epoch's
        batches), ``accuracy`` (on the 10,000 test images), ``epsilon_prv`` and ``epsilon_rdp`` so far, ``seconds`` so
        far.
    """
    settings = Settings(epochs=epochs, batch_size=256, lr=0.05, target_delta=_GUIDE_DELTA, seed=seed)
    q, per_epoch = settings.sample_rate(n), settings.steps_per_epoch(n)
    sigma = (
        0.0
        if target_epsilon is None
        else noise_multiplier_for(
            target_epsilon=target_epsilon, sample_rate=q, steps=epochs * per_epoch, target_delta=_GUIDE_DELTA
        )
    )
    settings = Settings(sigma, 1.0, epochs, 256, 0.05, _GUIDE_DELTA, seed)
    began, losses = time.perf_counter(), []
    for step in train(
        models.cnn(seed=seed),
        load_mnist().take(n),
        settings,
        method="sgd" if target_epsilon is None else "opacus",
        test_data=load_mnist(train=False),
    ):
        losses.append(step.loss)
        if step.accuracy is None:
            continue
        spent = {
            f"epsilon_{a}": ""
            if target_epsilon is None
            else round(
                epsilon(
                    noise_multiplier=sigma, sample_rate=q, steps=step.step, target_delta=_GUIDE_DELTA, accountant=a
                ),
                4,
            )
            for a in ("prv", "rdp")
        }
        yield {
            "n": n,
            "target_epsilon": "" if target_epsilon is None else target_epsilon,
            "seed": seed,
            "epochs": epochs,
            "epoch": step.epoch,
            "noise_multiplier": round(sigma, 6),
            "loss": round(sum(losses) / len(losses), 4),
            "accuracy": step.accuracy,
            **spent,
            "seconds": round(time.perf_counter() - began, 1),
        }
        losses = []


def _guide() -> Iterator[dict]:
    for target in (None, 8.0, 1.0):
        yield from guide_run(2000, target, 2, 0)  # the small rows that a test runs again
    for target in (None, 8.0, 1.0):
        yield from guide_run(60_000, target, 10, 0)


def two_workers_run(
    n: int, rounds: int, *, skew: float = 0.0, sizes: tuple[float, float] = (1, 1), weights: str = "size", seed: int = 0
) -> Iterator[dict]:
    """The two workers of a blog post of 2020 (PySyft and Opacus) with Poisson batches, a row a round and worker.

    MNIST over alice and bob, its pixels shifted by 0.1307 and divided by 0.3081 as in the post; the small CNN, σ = 1.2,
    C = 1, batch 128, learning rate 0.1, one local epoch a round.

    Args:
        n: how many of the training images, from the first one on; the post takes all 60,000.
        rounds: the post has 5.
        skew, sizes: as ``skew`` and ``weights`` of :func:`dpteach.data.split`.
        weights: ``"size"`` or ``"equal"``, as for :func:`dpteach.federated.train_rounds`.
        seed: of the split, the weights, the batches and the noise.

    Yields:
        A dict by round and worker: the arguments, ``round, worker, records, loss`` (mean over the round's batches),
        ``accuracy`` (of the average, on the 10,000 test images), ``epsilon_prv``, ``epsilon_rdp`` and
        ``epsilon_classic`` (of all rounds so far, for this worker's records), ``seconds`` so far.
    """
    settings = Settings(1.2, 1.0, epochs=1, batch_size=128, lr=0.1, target_delta=1e-5, seed=seed)
    images, unseen = _as_in_the_post(n)
    parts = split(images, 2, skew, sizes, seed=seed)
    workers = [Worker(name, part, settings) for name, part in zip(("alice", "bob"), parts)]
    began = time.perf_counter()
    for after in train_rounds(workers, models.cnn(seed=seed), rounds, weights=weights, test_data=unseen):
        seconds = round(time.perf_counter() - began, 1)
        for worker in workers:
            yield {
                "n": n,
                "skew": skew,
                "sizes": ":".join(f"{size:g}" for size in sizes),
                "weights": weights,
                "seed": seed,
                "rounds": rounds,
                "round": after.round,
                "worker": worker.name,
                "records": len(worker.data),
                "loss": round(after.losses[worker.name], 4),
                "accuracy": after.accuracy,
                **{
                    f"epsilon_{short}": round(worker.epsilon(accountant), 4)
                    for short, accountant in (("prv", "prv"), ("rdp", "rdp"), ("classic", "rdp-classic"))
                },
                "seconds": seconds,
            }


def _as_in_the_post(n: int) -> tuple[Data, Data]:
    first, unseen = load_mnist().take(n), load_mnist(train=False)
    return Data((first.X - 0.1307) / 0.3081, first.y), Data((unseen.X - 0.1307) / 0.3081, unseen.y)


def _two_workers() -> Iterator[dict]:
    yield from two_workers_run(2000, 2)  # the small rows that a test runs again
    yield from two_workers_run(60_000, 5)
    yield from two_workers_run(60_000, 5, sizes=(9, 1))
    yield from two_workers_run(60_000, 5, sizes=(9, 1), weights="equal")
    yield from two_workers_run(60_000, 5, skew=0.9)


#: What the post's update may have been: with clipping or not, with noise or not.
UPDATES = {"plain": (False, 0.0), "clipped only": (True, 0.0), "noise only": (False, 1.2), "private": (True, 1.2)}


def post_run(n: int, rounds: int, update: str, seed: int) -> Iterator[dict]:
    """The blog post of 2020 as it is written, its batches included, a row a round and worker.

    As :func:`two_workers_run`, but with the post's loader: shuffled batches of exactly 128, the rest dropped. No ε is
    stored: no accountant for Poisson batches holds for these.

    Args:
        n: how many of the training images, from the first one on; alice has the first half, bob the second.
        rounds: the post has 5.
        update: a key of :data:`UPDATES`: whether the sum is of clipped gradients, and whether it gets noise.
        seed: of the weights, the batches and the noise.

    Yields:
        ``n, update, seed, round, worker, batches`` (a round), ``loss`` (mean over the round's batches, as the post
        prints it), ``accuracy`` (of the average, on the 10,000 test images), ``cpu_seconds`` so far.
    """
    clipped, sigma = UPDATES[choice("update", update, UPDATES)]
    images, unseen = _as_in_the_post(n)
    halves = {"alice": images.take(slice(n // 2)), "bob": images.take(slice(n // 2, n))}
    model, began = models.cnn(seed=seed), time.process_time()
    sampling, noise = (torch.Generator().manual_seed(s) for s in seeds(seed)[:2])
    for turn in range(1, rounds + 1):
        copies = {name: copy.deepcopy(model) for name in halves}
        losses: dict[str, list[float]] = {}
        for name, half in halves.items():
            weights = list(copies[name].parameters())
            sgd, losses[name] = torch.optim.SGD(weights, lr=0.1), []
            for batch in torch.randperm(len(half), generator=sampling).split(128)[: len(half) // 128]:
                C = 1.0 if clipped else 1e9  # a bound that nothing reaches
                summed, of_batch = clipped_sum_and_losses(copies[name], F.cross_entropy, *half[batch], C)
                set_gradient(weights, add_noise(summed, sigma, 1.0, noise) / 128)
                sgd.step()
                losses[name].append(of_batch.mean().item())
        model.load_state_dict(federated_average(list(copies.values())))
        reached = accuracy(model, unseen)
        for name, of_round in losses.items():
            yield {
                "n": n,
                "update": update,
                "seed": seed,
                "round": turn,
                "worker": name,
                "batches": len(of_round),
                "loss": round(sum(of_round) / len(of_round), 4),
                "accuracy": reached,
                "cpu_seconds": round(time.process_time() - began, 1),
            }


def _post() -> Iterator[dict]:
    for update in UPDATES:
        yield from post_run(2000, 1, update, 0)  # the small rows that a test runs again
    for seed in range(3):
        for update in UPDATES:
            yield from post_run(60_000, 5, update, seed)


def _twenty_clients() -> Iterator[dict]:
    """Twenty virtual clients on Flower's Ray engine, 3,000 MNIST images each, ten rounds of one epoch, a row a round.

    First with privacy for each image, added by each client; then with privacy for each client, added by the server.
    """
    from dpteach.flower import Simulation

    made_with: dict[str, str | int] = {package: version(package) for package in ("flwr", "ray")}
    with Simulation(20) as simulation:
        for privacy, sigma in (("sample", 1.3), ("client", 1.0), ("client", 0.5)):
            key = "noise_multiplier" if privacy == "sample" else "server_noise_multiplier"
            for line in simulation.rounds(
                10, privacy=privacy, model="mlp", batch_size=128, lr=0.5, clipping_norm=1.0, **{key: sigma}
            ):
                spent = {value for name, value in line.items() if name.split("/")[0] == "epsilon"}
                yield {
                    "clients": 20,
                    "privacy": privacy,
                    "noise_multiplier": sigma,
                    "target_delta": 1e-5 if privacy == "sample" else 1e-2,
                    "round": line["round"],
                    "accuracy": line["accuracy"],
                    "epsilon_of_the_worst": round(max(spent), 4),
                    "seconds": line["seconds"],
                    **made_with,
                }


def _client_level() -> Iterator[dict]:
    """Privacy for a whole client in Flower's four ways: twenty virtual clients, 3,000 MNIST images each, ten rounds.

    A row a round: ``clipping`` (as in the app's ``pyproject.toml``), ``noise_multiplier`` (σ that ``epsilon`` is of),
    ``round, accuracy, epsilon`` (of a client, by RDP), ``target_delta, seconds`` so far. In the adaptive
    way also the number of clipped updates gets noise, of a standard deviation of one client (Flower's default: a
    twentieth of them). It counts fully: a client moves the count by one. (Flower's own split takes a half, as in the
    paper, which counts ±1/2 for a client.)
    """
    from dpteach.flower import Simulation

    made_with: dict[str, str | int] = {package: version(package) for package in ("flwr", "ray")}
    delta, model = 1e-2, (1.0**-2 - 2.0**-2) ** -0.5  # σ of the model in the adaptive way, as Flower splits σ = 1
    sigmas = {"server": 1.0, "client": 1.0, "adaptive": (model**-2 + 1.0**-2) ** -0.5}
    sigmas["local"] = (2 * math.log(1.25 / delta)) ** 0.5  # of LocalDpMod, for ε = 1 a round
    with Simulation(20) as simulation:
        for clipping, sigma in sigmas.items():
            for line in simulation.rounds(10, privacy="client", clipping=clipping, clipping_norm=1.0):
                of: dict = {"noise_multiplier": sigma, "sample_rate": 1.0, "steps": line["round"]}
                yield {
                    "clipping": clipping,
                    "noise_multiplier": round(sigma, 4),
                    "target_delta": delta,
                    "round": line["round"],
                    "accuracy": line["accuracy"],
                    "epsilon": round(epsilon(**of, target_delta=delta, accountant="rdp"), 4),
                    "seconds": line["seconds"],
                    **made_with,
                }


def _many_clients() -> Iterator[dict]:
    """The app of the two workers, unchanged, on 10, 100 and 1,000 virtual clients with 60 MNIST images each.

    A row a round: ``clients, round, accuracy, epsilon_of_the_worst`` (δ = 1e-5), ``seconds`` so far, and ``megabytes``
    that all of the simulation's processes hold (PSS: a page that some of them share counts once; Linux).
    """
    from dpteach.flower import Simulation
    from dpteach.flower.keeper import marked

    made_with: dict[str, str | int] = {package: version(package) for package in ("flwr", "ray")}
    for clients in (10, 100, 1000):
        with Simulation(clients) as simulation:
            for line in simulation.rounds(5, timeout=1800, records=60, batch_size=20, noise_multiplier=1.3):
                yield {
                    "clients": clients,
                    "round": line["round"],
                    "accuracy": line["accuracy"],
                    "epsilon_of_the_worst": round(max(v for k, v in line.items() if k.startswith("epsilon/")), 4),
                    "seconds": line["seconds"],
                    "megabytes": round(sum(p.memory_full_info().pss for p in marked(simulation._mark)) / 1e6),
                    **made_with,
                }


LADDER_SEEDS = 3  # a run takes about 90 processor seconds
#: The rungs at ε = 3: model, batch size, learning rate, C, optimizer.
LADDER = {
    "the guide": ("relu", 256, 0.05, 1.0, "sgd"),
    "C = 0.1": ("relu", 256, 0.05, 0.1, "sgd"),
    "C = 0.1, lr·C kept": ("relu", 256, 0.5, 0.1, "sgd"),
    "lr 0.5": ("relu", 256, 0.5, 1.0, "sgd"),
    "batch 1024": ("relu", 1024, 0.5, 1.0, "sgd"),
    "batch 1024, lr 2": ("relu", 1024, 2.0, 1.0, "sgd"),
    "tanh": ("tanh", 1024, 2.0, 1.0, "sgd"),
    "momentum": ("tanh", 1024, 0.2, 1.0, "momentum"),
}


def ladder_run(n: int, rung: str, epochs: int, seed: int) -> dict:
    """One run of a rung of :data:`LADDER`: the small CNN on the first ``n`` images of MNIST at ε = 3, δ = 1e-5 (PRV).

    Returns:
        ``n, rung, seed, epochs, noise_multiplier, epsilon_prv, accuracy`` (of the last weights, on the 10,000 test
        images), ``averaged`` (of the weights' running mean over the last epoch or so), ``cpu_seconds``.
    """
    began = time.process_time()
    activation, batch, lr, C, optimizer = LADDER[choice("rung", rung, LADDER)]
    start = Settings(0.0, C, epochs, batch, lr, _GUIDE_DELTA, seed)
    per_epoch = start.steps_per_epoch(n)
    of: dict = {"sample_rate": 1 / per_epoch, "steps": epochs * per_epoch, "target_delta": _GUIDE_DELTA}
    sigma = noise_multiplier_for(target_epsilon=3, **of)
    model = models.cnn(activation=activation, seed=seed)
    mean = copy.deepcopy(model)
    for step in train(model, load_mnist().take(n), replace(start, noise_multiplier=sigma), optimizer=optimizer):
        with torch.no_grad():
            for m, p in zip(mean.parameters(), model.parameters()):
                m.lerp_(p, max(1 / step.step, 1 / per_epoch))
    reached, averaged = (accuracy(m, load_mnist(train=False)) for m in (model, mean))
    return {
        "n": n,
        "rung": rung,
        "seed": seed,
        "epochs": epochs,
        "noise_multiplier": round(sigma, 6),
        "epsilon_prv": round(epsilon(noise_multiplier=sigma, **of), 4),
        "accuracy": reached,
        "averaged": averaged,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


#: lr·C by ε. Chosen on the last 10,000 training images, never on the test images.
STEP_LENGTHS = {1.0: 16.0, 3.0: 48.0, 8.0: 64.0}
_RECORD_BATCH, _RECORD_EPOCHS, _RECORD_C = 15_000, 50, 0.3


@functools.cache
def mnist_features(train_images: bool, upright: bool) -> Data:
    """All of MNIST as :func:`dpteach.features.fixed_features`: 5 to 7 processor seconds for the training images."""
    images = load_mnist(train=train_images)
    return Data(fixed_features(images.X, upright=upright), images.y)


def record_run(n: int, target_epsilon: float, seed: int, *, upright: bool = True, validate: bool = False) -> dict:
    """A linear model on fixed features of MNIST, at δ = 1e-5 (PRV): the most accurate recipe of the workbook.

    DP-SGD with momentum from zero weights; a quarter of the images a step, 200 steps, C = 0.3. No other data, and no
    statistic of the private data but the noisy gradients.

    Args:
        n: how many of the training images, from the first one on.
        target_epsilon: 1, 3 or 8.
        seed: of the batches and the noise.
        upright: as for :func:`dpteach.features.fixed_features`; False uses no knowledge of digits.
        validate: measure on the last 10,000 training images (then ``n`` is at most 50,000), not on the test images.

    Returns:
        ``n, target_epsilon, upright, seed, noise_multiplier, lr, epsilon_prv, epsilon_pld, accuracy, cpu_seconds`` (of
        the training, without the features).
    """
    data = mnist_features(True, upright)
    unseen = data.take(slice(50_000, 60_000)) if validate else mnist_features(False, upright)
    began = time.process_time()
    batch, lr = n // (60_000 // _RECORD_BATCH), STEP_LENGTHS[target_epsilon] / _RECORD_C
    settings = Settings(0.0, _RECORD_C, _RECORD_EPOCHS, batch, lr, _GUIDE_DELTA, seed)
    per_epoch = settings.steps_per_epoch(n)
    of: dict = {"sample_rate": 1 / per_epoch, "steps": _RECORD_EPOCHS * per_epoch, "target_delta": _GUIDE_DELTA}
    sigma = noise_multiplier_for(target_epsilon=target_epsilon, **of)
    model = linear(data)
    for _ in train(model, data.take(n), replace(settings, noise_multiplier=sigma), optimizer="momentum"):
        pass
    seconds = time.process_time() - began
    spent = {f"epsilon_{a}": round(epsilon(noise_multiplier=sigma, accountant=a, **of), 4) for a in ("prv", "pld")}
    return {
        "n": n,
        "target_epsilon": target_epsilon,
        "upright": int(upright),
        "seed": seed,
        "noise_multiplier": round(sigma, 6),
        "lr": round(lr, 3),
        **spent,
        "accuracy": accuracy(model, unseen),
        "cpu_seconds": round(seconds, 1),
    }


def linear(data: Data) -> nn.Sequential:
    """A linear model with ten outputs for the rows of ``data``, all weights zero."""
    layer = nn.Linear(data.X.shape[1], 10)
    for p in layer.parameters():
        nn.init.zeros_(p)
    return nn.Sequential(layer)


def _record() -> Iterator[dict]:
    for upright in (True, False):
        yield record_run(4000, 3.0, 0, upright=upright)  # the small rows that a test runs again
    for seed in range(5):
        for upright in (True, False):
            for target in STEP_LENGTHS:
                yield record_run(60_000, target, seed, upright=upright)


def _ladder() -> Iterator[dict]:
    for rung in ("the guide", "momentum"):
        yield ladder_run(2000, rung, 2, 0)  # the small rows that a test runs again
    for seed in range(LADDER_SEEDS):
        for rung in LADDER:
            yield ladder_run(60_000, rung, 10, seed)


def _speed() -> Iterator[dict]:
    from dpteach import speed  # it needs Opacus

    yield from speed.rows()


EXPERIMENTS = {
    "language-model": language.rows,
    "language-adapters": language.adapter_rows,
    "twenty-minute-guide": _guide,
    "two-workers": _two_workers,
    "post-of-2020": _post,
    "twenty-clients": _twenty_clients,
    "client-level": _client_level,
    "many-clients": _many_clients,
    "accuracy-ladder": _ladder,
    "accuracy-record": _record,
    "speed": _speed,
}


def run(name: str) -> Path:
    """Run an experiment and store its rows, each with the versions that made it. Returns the file.

    Raises:
        ValueError: if there is no experiment of that name; lists the ones there are.
    """
    experiment = EXPERIMENTS[choice("name", name, EXPERIMENTS)]
    made_with: dict[str, str | int] = {package: version(package) for package in ("torch", "opacus")}
    made_with["threads"] = torch.get_num_threads()
    RESULTS.mkdir(parents=True, exist_ok=True)
    target, part = RESULTS / f"{name}.csv", RESULTS / f"{name}.csv.part"
    with part.open("w", newline="", encoding="utf8") as file:
        writer = None
        for row in experiment():
            row = {**row, **{name: value for name, value in made_with.items() if name not in row}}
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(row, flush=True)
    os.replace(part, target)
    return target


def load(name: str) -> list[dict]:
    """The stored rows of an experiment: numbers as floats, an empty cell as None, anything else as text.

    Raises:
        ValueError: if there is no experiment of that name.
        FileNotFoundError: if it has not been run; says how to.
    """
    path = RESULTS / f"{choice('name', name, EXPERIMENTS)}.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. Make it with: python -m dpteach.experiments {name}")
    with path.open(newline="", encoding="utf8") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or EXPERIMENTS:
        print(f"wrote {run(name).name}")
