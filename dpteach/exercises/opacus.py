"""Notebook 05: what ε depends on, the noise for a budget, a divisor that tells, a script that only looks private."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from dpteach.accounting import Ledger, epsilon
from dpteach.data import two_moons
from dpteach.exercises.core import (
    Complaint,
    Exercise,
    Verdict,
    Wrong,
    as_number,
    choose,
    not_attempted,
    observed,
    unattempted,
    value,
)
from dpteach.models import mlp

# 5.4: a script that only looks private


class Asked(NamedTuple):
    """A training that the check asks for. The last batch of an epoch is small."""

    n: int
    noise_multiplier: float
    max_grad_norm: float
    epochs: int
    batch_size: int
    target_delta: float


ASKED = (Asked(650, 1.3, 0.7, 3, 128, 1e-6), Asked(310, 0.9, 1.6, 2, 100, 1e-4))


def train_private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader = DataLoader(data, batch_size=batch_size, collate_fn=lambda batch: batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = PrivacyEngine()  # one engine, before the first epoch
    model, optimizer, loader = engine.make_private(  # all three replace the old ones
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    for _ in range(epochs):
        for X, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
    return engine.get_epsilon(delta=target_delta)  # at the δ that was asked for


def _parts(model, data, batch_size):
    loader = DataLoader(data, batch_size=batch_size, collate_fn=lambda batch: batch, shuffle=True)
    return loader, torch.optim.SGD(model.parameters(), lr=0.05)


def _epoch(model, optimizer, loader):
    for X, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()


def as_it_was_given(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    train_loader = DataLoader(data, batch_size=batch_size, collate_fn=lambda batch: batch, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        engine = PrivacyEngine()
        model, optimizer, private_loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=train_loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
        )
        for X, y in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
    return engine.get_epsilon(delta=1 / len(private_loader))


def old_loader(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, _ = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def engine_by_epoch(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    for _ in range(epochs):
        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
        )
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def delta_of_batches(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=1 / len(loader))


def old_optimizer(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, _, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def forgets_zero_grad(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    for _ in range(epochs):
        for X, y in loader:
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
    return engine.get_epsilon(delta=target_delta)


def asks_too_early(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    _epoch(model, optimizer, loader)
    spent = engine.get_epsilon(delta=target_delta)
    for _ in range(epochs - 1):
        _epoch(model, optimizer, loader)
    return spent


def noise_times_norm(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier * max_grad_norm,
        max_grad_norm=max_grad_norm,
    )
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def without_engine(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return epsilon(
        noise_multiplier=noise_multiplier,
        sample_rate=1 / len(loader),
        steps=epochs * len(loader),
        target_delta=target_delta,
        accountant="rdp",
    )


def _private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, batch_size, accountant="prv", **others):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine(accountant=accountant)
    return engine, *engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        **others,
    )


def not_poisson(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    engine, *private = _private(
        PrivacyEngine, model, data, noise_multiplier, max_grad_norm, batch_size, poisson_sampling=False
    )
    for _ in range(epochs):
        _epoch(*private)
    return engine.get_epsilon(delta=target_delta)


def skips_empty_batches(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    engine, model, optimizer, loader = _private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, batch_size)
    for _ in range(epochs):
        for X, y in loader:
            if len(X) == 0:
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
    return engine.get_epsilon(delta=target_delta)


def delta_of_records(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    return train_private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, 1 / len(data))


def delta_left_alone(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    return train_private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, 1e-5)


def one_epoch_only(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    return train_private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, 1, batch_size, target_delta)


def norm_of_one(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    return train_private(PrivacyEngine, model, data, noise_multiplier, 1.0, epochs, batch_size, target_delta)


def by_no_bound(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    engine, *private = _private(
        PrivacyEngine, model, data, noise_multiplier, max_grad_norm, batch_size, accountant="gdp"
    )
    for _ in range(epochs):
        _epoch(*private)
    return engine.get_epsilon(delta=target_delta)


def new_optimizer(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    engine, model, _, loader = _private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def clears_too_late(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    engine, model, optimizer, loader = _private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, batch_size)
    for _ in range(epochs):
        for X, y in loader:
            F.cross_entropy(model(X), y).backward()
            optimizer.zero_grad()
            optimizer.step()
    return engine.get_epsilon(delta=target_delta)


def other_batches(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    batch_size *= 2
    return train_private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta)


def rounds_the_answer(*args):
    return round(train_private(*args), 2)


_SENTENCES = {
    "no engine": "no make_private was called: the loop trains without clipping and without noise, whatever ε it "
    "returns.",
    "old optimizer": "you step the optimizer that you had before make_private. It neither clips nor adds noise, and "
    "the engine counts none of its steps. Step the one that make_private returned.",
    "other optimizer": "something moves the weights beside the private steps: a new optimizer, or your own update. It "
    "neither clips nor adds noise, and the engine counts none of it. Step the optimizer that "
    "make_private returned, and nothing else.",
    "not Poisson": "with poisson_sampling=False the loader shuffles and takes every record once. The ε that is "
    "printed is for Poisson batches: it does not hold for yours. Leave the argument out.",
    "old loader": "you train on the loader that you had before make_private. Its batches are not Poisson batches, so "
    "the ε that is printed does not hold. Loop over the one that make_private returned.",
    "old criterion": "ghost clipping happens in the criterion that make_private returned. With another one, nothing "
    "is clipped.",
    "batch size": "your loader has not the batch_size of your function: it samples at another rate, at another price.",
    "many engines": "you make a new engine in each epoch. Each one starts from zero, so the last knows the last epoch "
    "only. Make one engine before the loop, and call make_private once.",
    "no zero_grad": "you do not clear the gradients between two steps. What an older batch left behind would count "
    "again: Opacus refuses to step. Call optimizer.zero_grad() in each step.",
    "no gradient": "you step without gradients: zero_grad() has cleared them before step(), or backward() is missing. "
    "The order is zero_grad, backward, step.",
    "noise": "make_private got another noise_multiplier than your function. The noise multiplier is σ alone: "
    "Opacus multiplies it by C itself.",
    "norm": "make_private got another max_grad_norm than your function.",
    "skips empty": "you skip the batches without records. A step that takes nobody must add its noise too: else "
    "whoever counts the steps sees that the batch was empty, and the engine has counted a step too few.",
    "steps": "your function does not train for all of its epochs: the number of private steps is not epochs times the "
    "number of batches.",
    "delta": "you ask for ε at another δ than target_delta. One over the number of *batches* is far above one over "
    "the number of records; at such a δ, ε looks small and promises little.",
    "delta of records": "you ask for ε at δ = 1/n. A mechanism that publishes one random record outright has exactly "
    "that δ. Ask at target_delta.",
    "other delta": "you ask for ε at a δ of your own. A number that is told at one δ says nothing at another: ask at "
    "target_delta.",
    "early": "you ask for ε before the training is over. The steps that follow cost too: ask after the last one.",
    "no bound": "GDP's number is no bound: it can be far below what the run costs (notebook 04). Let PrivacyEngine "
    "use its default.",
    "rounded": "you round ε. Rounded down, it promises more than was kept: return the number as it is, and round when "
    "you print.",
    "other number": "the number that you return is not the ε of this training, whether by PRV or by RDP.",
}


class _Notes:
    """What the engines, optimizers and loaders of one training have done."""

    def __init__(self) -> None:
        self.engines: list = []  # all that were made
        self.made: list[dict] = []  # the arguments of each make_private
        self.batches: list[list[int]] = []  # of each batch: its records, and the private steps before the next one
        self.asked: list[tuple[float, int, float]] = []  # δ, private steps so far, ε
        self.steps = self.all_steps = 0  # private ones; those of the learner's optimizer
        self.weights: dict[torch.Tensor, torch.Tensor] = {}  # each weight, as the last step left it
        self.others = False  # something else has moved them
        self.losses = math.inf  # by the criterion that was returned, where there is one

    def look(self) -> None:
        self.others |= any(not torch.equal(w.nan_to_num(), last.nan_to_num()) for w, last in self.weights.items())

    def heard(self, criterion: Callable) -> Callable:
        def listening(*args, **settings):
            self.losses += 1
            return criterion(*args, **settings)

        self.losses = 0
        return listening

    def private_step(self) -> None:
        self.look()
        self.steps += 1
        if self.batches:
            self.batches[-1][1] += 1

    def after_step(self, *_) -> None:
        self.all_steps += 1
        self.weights = {w: w.detach().clone() for w in self.weights}


def _engine(notes: _Notes) -> type:
    """Opacus' own PrivacyEngine, which also takes notes. One batch of each epoch is empty."""
    from opacus import PrivacyEngine  # takes seconds

    class Batches:
        def __init__(self, sampler) -> None:
            self.sampler = sampler

        def __len__(self) -> int:
            return len(self.sampler)

        def __iter__(self) -> Iterator[list[int]]:
            for k, rows in enumerate(self.sampler):
                rows = [] if k == 1 else rows
                notes.batches.append([len(rows), 0])
                yield rows

    class Recording(PrivacyEngine):
        def __init__(self, **settings) -> None:
            super().__init__(**settings)
            notes.engines.append(self)
            self.accountant.get_epsilon = self.told

        def told(self, delta, **_):
            accountant = "gdp" if self.accountant.mechanism() == "gdp" else "rdp"  # PRV would take a second each time
            notes.asked.append((delta, notes.steps, _price([self], delta, accountant)))
            return notes.asked[-1][-1]

        def make_private_with_epsilon(self, **_):
            raise Complaint("σ is given, so call make_private: make_private_with_epsilon looks for a σ of its own.")

        def make_private(self, **args):
            model, optimizer, *criterion, loader = super().make_private(**args)
            count = optimizer.step_hook
            optimizer.attach_step_hook(lambda optimizer: (count(optimizer), notes.private_step()))
            if not notes.made:
                optimizer.original_optimizer.register_step_post_hook(notes.after_step)
                notes.weights = {w: w.detach().clone() for w in model.parameters()}
            notes.made.append(args)
            if args.get("poisson_sampling", True):
                batches = Batches(loader.batch_sampler)
                loader = DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)
            return model, optimizer, *map(notes.heard, criterion), loader  # a criterion with ghost clipping only

    return Recording


def _train(fn: Callable, args: tuple) -> Any:
    """What is wrong with the training or its ε: keys of _SENTENCES."""
    *given, asked = args
    notes = _Notes()
    engine = _engine(notes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spent = fn(engine, *given, *asked[1:])
    except ValueError as error:  # Opacus refuses to step
        refusals = {"cleared": "no zero_grad", "accumulation": "no zero_grad", "not initialized": "no gradient"}
        refusal = next((fault for words, fault in refusals.items() if words in str(error)), None)
        if refusal is None or not notes.made:
            raise
        notes.look()
        # The zero_grad of another optimizer does not reach Opacus' own gradients.
        causes = {"old optimizer", "other optimizer", "skips empty"}
        return [fault for fault in _faults_of_training(notes, asked) if fault in causes] or [refusal]
    if unattempted(spent):
        if notes.engines:
            raise Complaint("your function trains, and returns nothing. End it with `return`, and ε.")
        return spent
    number = as_number(spent)
    if number is None:
        raise Complaint(f"your function must return ε, a number, got a {type(spent).__name__}.")
    if not notes.made:
        return ["no engine"]
    notes.look()
    return _faults_of_training(notes, asked) + (_faults_of_number(notes, asked, number) if notes.steps else [])


def _faults_of_training(notes: _Notes, asked: Asked) -> list[str]:
    first = notes.made[0]
    poisson = all(args.get("poisson_sampling", True) for args in notes.made)
    old_optimizer = notes.all_steps > notes.steps
    skipped = any(steps for _, steps in notes.batches) and any(size == steps == 0 for size, steps in notes.batches[:-1])
    faults = {
        "old optimizer": old_optimizer,
        "other optimizer": notes.others,
        "not Poisson": not poisson,
        "old loader": poisson and len(notes.batches) < notes.steps,
        "old criterion": notes.losses < notes.steps,
        "batch size": first["data_loader"].batch_size not in (asked.batch_size, None),
        "many engines": sum(bool(engine.accountant.history) for engine in notes.engines) > 1,
        "noise": any(args["noise_multiplier"] != asked.noise_multiplier for args in notes.made),
        "norm": any(args["max_grad_norm"] != asked.max_grad_norm for args in notes.made),
        "skips empty": skipped,
        "steps": not (skipped or old_optimizer or notes.others)
        and notes.steps != asked.epochs * len(first["data_loader"]),
    }
    return [name for name, there in faults.items() if there]


def _price(engines: list, delta: float, accountant: str) -> float:
    ledger = Ledger()
    for engine in engines:
        for sigma, q, steps in engine.accountant.history:
            ledger.charge(noise_multiplier=sigma, sample_rate=q, steps=steps)
    return ledger.epsilon(target_delta=delta, accountant=accountant)


def _faults_of_number(notes: _Notes, asked: Asked, number: float) -> list[str]:
    """What is wrong with the ε that was returned, by an engine or by the learner's own call of an accountant."""
    batches = len(notes.made[0]["data_loader"])
    names = {asked.target_delta: None, 1 / batches: "delta", 1 / asked.n: "delta of records"}

    def close(other: float) -> bool:
        return math.isclose(number, other, rel_tol=1e-4)

    told = [
        (names.get(delta, "other delta"), "early" if steps < notes.steps else None)
        for delta, steps, spent in notes.asked
        if close(spent)
    ]
    told = min(([fault for fault in faults if fault] for faults in told), key=len, default=None)
    gdp = any(engine.accountant.mechanism() == "gdp" for engine in notes.engines)
    if told is not None:
        return told + ["no bound"] * gdp
    for accountant in ("rdp", "prv", "gdp"):
        for delta, name in {1e-5: "other delta", **names}.items():
            if close(_price(notes.engines, delta, accountant)):
                return [fault for fault in (name, "no bound" if accountant == "gdp" else None) if fault]
    rounded = any(round(spent, digits) == number for *_, spent in notes.asked for digits in range(4))
    return ["rounded" if rounded else "other number"]


def _say(*faults: str) -> str:
    return " Besides: ".join(_SENTENCES[fault] for fault in faults)


def _examine(fn):
    if not callable(fn):
        return Verdict(False, f"the answer must be a function, got {type(fn).__name__}.")
    for asked in ASKED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            faults = observed(_train, fn, (mlp(), two_moons(asked.n), asked))
        if unattempted(faults):
            return not_attempted()
        if faults:
            return Verdict(False, _say(*faults))
    return Verdict(
        True,
        "all three objects are the returned ones, one engine has counted every step, and ε is told "
        "at the δ that was asked for.",
    )


# 5.3: the divisor tells how many records there are

_NOT_TWO = "the answer must be a pair of whole numbers below a billion, (n, batch_size)."
_TOO_SMALL = (
    "take n of at least 100 and batch_size of at least 10. With a handful of records, rounding hides the effect."
)
_TOO_LARGE = "the batch can't be larger than the data: batch_size must be at most n."
_NO_NEW_BATCH = (
    "n + 1 records make as many batches as n records here, so the divisor hardly changes. Find an n for "
    "which the next record needs a batch of its own."
)
_NOT_HALF = (
    "the next record adds a batch, and the divisor falls. But it does not fall to half: from two batches to "
    "three, say, it falls by a third. Take fewer batches."
)


def divisor(n, batch_size):
    """What Opacus divides the noisy sum by: n·q, rounded down, with q = 1 / ⌈n / batch_size⌉."""
    return int(n * (1 / math.ceil(n / batch_size)))


def _examine_divisor(answer):
    try:
        pair = [as_number(x) for x in answer]
    except TypeError:
        pair = []
    if len(pair) != 2 or not all(x is not None and abs(x) < 1e9 and x == int(x) for x in pair):
        return Verdict(False, _NOT_TWO)
    n, batch_size = map(int, pair)
    if n < 100 or batch_size < 10:
        return Verdict(False, _TOO_SMALL)
    if batch_size > n:
        return Verdict(False, _TOO_LARGE)
    if divisor(n + 1, batch_size) <= 0.55 * divisor(n, batch_size):
        return Verdict(
            True,
            f"one record more, and the divisor goes from {divisor(n, batch_size)} to {divisor(n + 1, batch_size)}. "
            "The noise on the step doubles with it, so whoever looks at the steps learns that this record joined.",
        )
    return Verdict(False, _NOT_HALF if n % batch_size == 0 else _NO_NEW_BATCH)


EXERCISES = [
    choose(
        "5.1",
        hint="The accountant's whole memory is `engine.accountant.history`. What would have to be written there for "
        "the model to matter?",
        answer="c",
        wrong=[
            Wrong(
                "a",
                "Opacus can differentiate both models, and it counts nothing of them. The clipped sum of the "
                "big model has a norm of at most C per record, like that of the small one: one vector, "
                "however many numbers it has.",
            ),
            Wrong(
                "b",
                "the noise has standard deviation σ·C in every coordinate, so the *total* noise does grow "
                "with the number of weights. That costs accuracy. But your record still moves the vector by "
                "at most C, in one direction, and σ hides this move.",
            ),
            Wrong(
                "d",
                "an attack may indeed succeed more easily on one of the two. But ε is a bound for the worst "
                "case, over all models and all attacks: it does not look at the model, so it can't be lower "
                "for one of them.",
            ),
        ],
        praise="σ, q, the number of steps and δ. A record moves the clipped sum by at most C and the noise is σ·C, "
        "whatever the model, so the ratio, and with it ε, is the same. Opacus' history holds σ, q and steps, "
        "and nothing else.",
        solution="**c.** The history of an engine is a list of (σ, q, steps). With δ, this is all that ε is computed "
        "from. The model decides how well the *same* ε lets you learn.",
    ),
    value(
        "5.2",
        hint="`noise_multiplier_for(target_epsilon=..., sample_rate=..., steps=..., target_delta=...)` needs q = 1 / "
        "⌈n / batch_size⌉ and the steps of *all* epochs. Or let `make_private_with_epsilon` search, and print "
        "`optimizer.noise_multiplier`.",
        answer=0.997,
        wrong=[
            Wrong(
                1.048,
                "this σ keeps the budget, but it is RDP's: a looser accountant, and so more noise than you "
                "need. PRV, PrivacyEngine's default, is content with less.",
            ),
            Wrong(0.671, "this σ is right for one epoch. The budget is for the whole run: 20 epochs of 79 steps."),
            Wrong(
                0.617,
                "you counted 20 steps, one for each epoch. An epoch has ⌈n / batch_size⌉ = 79 steps, and "
                "each of them costs.",
            ),
            Wrong(
                0.721,
                "your δ is one over the number of batches, 1/79. At a δ that large, little noise seems to "
                "be enough. The task asks for δ = 1e-5.",
            ),
            Wrong(
                0.449,
                "your q is 1/n, the rate of a batch of one record. A record is in a batch with probability "
                "1 / 79 here.",
            ),
            Wrong(
                0.946,
                "this σ is too small by 5 %: it is GDP's, which is no bound, or one for δ = 1/n = 5e-5. "
                "Take PRV, at δ = 1e-5.",
            ),
            Wrong(1.139, "this σ keeps the budget, but by RDP with the conversion of 2017: more noise than you need."),
            Wrong(
                0.655,
                "your q is 1/256, one over the batch size. A record is in a batch with probability 1/79: "
                "one over the number of batches.",
            ),
            Wrong(
                0.491, "your q is one over the steps of the whole run. A record is expected once an *epoch*: q = 1/79."
            ),
            Wrong(
                2.808,
                "you gave each epoch a twentieth of ε. ε grows more slowly than the number of epochs: ask "
                "for all 20 · 79 steps at once.",
            ),
            Wrong(11.202, "you counted a step for each record. A step takes a whole batch: an epoch has 79."),
            Wrong(
                59.378,
                "you charged every step as if it used all the records (q = 1). Sampling makes a step much "
                "cheaper: q = 1/79.",
            ),
        ],
        praise="σ is about 1.00: the talk's noise multiplier, at twice its epochs, costs ε = 3.",
        solution="`noise_multiplier_for(target_epsilon=3.0, sample_rate=1 / 79, steps=20 * 79)` gives 0.997. "
        "`make_private_with_epsilon` stops its search a little earlier and takes nearly the same.",
    ),
    Exercise(
        "5.3",
        hint="The number of batches is ⌈n / batch_size⌉. For which n does one record more add a batch? And where does "
        "one batch more matter most: where there are many, or few?",
        reference=(256, 256),
        examine=_examine_divisor,
        wrong=(
            Wrong((513, 256), _NO_NEW_BATCH),
            Wrong((512, 256), _NOT_HALF),
            Wrong((7, 7), _TOO_SMALL),
            Wrong((256, 512), _TOO_LARGE),
            Wrong(256, _NOT_TWO),
        ),
        solution="`answer_5_3 = (256, 256)`: 256 records fit in one batch, 257 need two. Opacus divides by 256, or by "
        "128: the noise on each step is twice as long because one record joined. Any n = batch_size does it.",
    ),
    Exercise(
        "5.4",
        hint="Three lines are at fault: one stands inside the loop and should stand before it, one uses an object "
        "that was replaced, one asks at the wrong δ.",
        reference=train_private,
        examine=_examine,
        wrong=(
            Wrong(as_it_was_given, _say("old loader", "many engines", "delta")),
            Wrong(old_loader, _say("old loader")),
            Wrong(engine_by_epoch, _say("many engines")),
            Wrong(delta_of_batches, _say("delta")),
            Wrong(old_optimizer, _say("old optimizer")),
            Wrong(forgets_zero_grad, _say("no zero_grad")),
            Wrong(asks_too_early, _say("early")),
            Wrong(noise_times_norm, _say("noise")),
            Wrong(without_engine, _say("no engine")),
            Wrong(not_poisson, _say("not Poisson")),
            Wrong(skips_empty_batches, _say("skips empty")),
            Wrong(delta_of_records, _say("delta of records")),
            Wrong(delta_left_alone, _say("other delta")),
            Wrong(one_epoch_only, _say("steps")),
            Wrong(norm_of_one, _say("norm")),
            Wrong(by_no_bound, _say("no bound")),
            Wrong(new_optimizer, _say("other optimizer")),
            Wrong(clears_too_late, _say("no gradient")),
            Wrong(other_batches, _say("batch size")),
            Wrong(rounds_the_answer, _say("rounded")),
        ),
    ),
]
