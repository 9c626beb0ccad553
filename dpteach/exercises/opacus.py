"""Notebooks 05 and 05b: a loop made private, an ε that lies, a divisor that tells, a script that only looks private."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from dpteach.data import two_moons
from dpteach.exercises.core import (
    Complaint,
    Exercise,
    Verdict,
    Wrong,
    as_number,
    as_numbers,
    attempted,
    changed,
    observed,
    open_ended,
    unattempted,
)
from dpteach.ledger import Ledger
from dpteach.models import mlp

# 5.1: a plain loop made private


def make_it_private(engine, model, X, y, batch_size, lr, noise_multiplier, max_grad_norm, batches, noise):
    loader = DataLoader(TensorDataset(X, y), batch_size=batch_size, generator=batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        noise_generator=noise,
    )


def parts(*, dataset=TensorDataset, scaled=1.0, seeded=True, optimizer=torch.optim.SGD, **settings):
    """A wrong answer: other parts, or other ``settings`` of make_private."""

    def answer(engine, model, X, y, batch_size, lr, noise_multiplier, max_grad_norm, batches, noise):
        loader = DataLoader(dataset(scaled * X, y), batch_size=batch_size, generator=batches if seeded else None)
        given = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm, "noise_generator": noise}
        return engine.make_private(
            module=model, optimizer=optimizer(model.parameters(), lr=lr), data_loader=loader, **given | settings
        )

    return answer


def kept(*old):
    """A wrong answer that returns these of its own parts, and not those of make_private."""

    def answer(engine, model, X, y, batch_size, lr, noise_multiplier, max_grad_norm, batches, noise):
        loader = DataLoader(TensorDataset(X, y), batch_size=batch_size, generator=batches)
        own = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=lr), "loader": loader}
        strength = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm, "noise_generator": noise}
        new = engine.make_private(module=model, optimizer=own["optimizer"], data_loader=loader, **strength)
        return tuple(own[name] if name in old else part for name, part in zip(own, new))

    return answer


# The piece that is at fault, and why.
PIECES = {
    "plain": (
        "loader",
        Wrong(
            kept("model", "optimizer", "loader"),
            "it is a plain DataLoader, and the model and the optimizer are plain, too: nothing clips or adds noise. "
            "Return the three that engine.make_private returns.",
        ),
    ),
    "old loader": (
        "loader",
        Wrong(
            kept("loader"),
            "it is a plain DataLoader, the one that you made, or make_private got poisson_sampling=False. Its batches "
            "are no Poisson batches, so no ε that the engine prints holds for them.",
        ),
    ),
    "batch size": (
        "loader",
        Wrong(
            changed(make_it_private, batch_size=lambda given: 2 * given.batch_size),
            "it draws each record with another probability than q = 1/⌈n / batch_size⌉. Give DataLoader your "
            "function's batch_size.",
        ),
    ),
    "batches": (
        "loader",
        Wrong(
            parts(seeded=False),
            "its batches are not those that `batches` draws: give DataLoader generator=batches. Without it, nobody can "
            "run these batches again to compare.",
        ),
    ),
    "records": ("loader", Wrong(parts(scaled=0.5), "its batches do not hold the records (X, y) as they were given.")),
    "old model": (
        "model",
        Wrong(
            kept("model"),
            "you return the model that you had. The one that make_private returns keeps each record's gradient.",
        ),
    ),
    "other model": (
        "model",
        Wrong(
            changed(make_it_private, model=lambda given: copy.deepcopy(given.model)),
            "it is private, but it is not the model that your function was given: that one would never be trained.",
        ),
    ),
    "old optimizer": (
        "optimizer",
        Wrong(
            kept("optimizer"),
            "you return the optimizer that you had. It neither clips nor adds noise, and the engine does not hear of "
            "its steps.",
        ),
    ),
    "sigma": (
        "optimizer",
        Wrong(
            changed(make_it_private, noise_multiplier=lambda given: given.noise_multiplier * given.max_grad_norm),
            "its noise is not σ·C. noise_multiplier is σ alone: Opacus multiplies it by C itself.",
        ),
    ),
    "norm": ("optimizer", Wrong(changed(make_it_private, max_grad_norm=1.0), "it clips to another norm than C.")),
    "noise": (
        "optimizer",
        Wrong(
            parts(noise_generator=None),
            "its noise is not drawn from `noise`: give make_private noise_generator=noise. (Only to compare runs: a "
            "release has no seed.)",
        ),
    ),
    "step": (
        "optimizer",
        Wrong(
            parts(optimizer=partial(torch.optim.SGD, momentum=0.9)),
            "clipping and noise are right, and the step is not: three of its steps end at other weights than three of "
            "SGD at learning rate lr.",
        ),
    ),
    "uncounted": (
        "engine",
        Wrong(
            lambda engine, *rest: make_it_private(type(engine)(), *rest),
            "the engine of your function has heard of no step. You made another one: call make_private on `engine`.",
        ),
    ),
}


def _three_steps(model, optimizer, loader) -> torch.Tensor:
    for X, y in islice(loader, 3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def _faults_of_the_loader(loader: Any, right: Any) -> list[str]:
    if not isinstance(loader, type(right)):
        return ["old loader"]
    if loader.sample_rate != right.sample_rate:
        return ["batch size"]
    pairs = [(a, b) for mine, other in zip(islice(loader, 3), islice(right, 3)) for a, b in zip(mine, other)]
    if not all(len(a) == len(b) for a, b in pairs):  # three equal sizes from other numbers: one chance in a million
        return ["batches"]
    return [] if all(torch.equal(a, b) for a, b in pairs) else ["records"]


# Records, batch size, learning rate, σ and C.
PARTS = ((650, 128, 0.3, 1.3, 0.7), (310, 100, 0.1, 0.9, 1.6))


def _pieces(fn: Callable, args: tuple) -> list[str]:
    """Which of PIECES are at fault."""
    n, batch_size, lr, sigma, C = args
    from opacus import GradSampleModule, PrivacyEngine
    from opacus.optimizers import DPOptimizer

    def made_by(answer: Callable) -> tuple:
        engine, model, noise = PrivacyEngine(), mlp(), torch.Generator().manual_seed(6)
        batches = torch.Generator().manual_seed(5)
        made = answer(engine, model, *two_moons(n)[:], batch_size, lr, sigma, C, batches, noise)
        return engine, model, noise, attempted(made)

    engine, bare, noise, mine = made_by(fn)
    *_, right = made_by(make_it_private)
    if not (isinstance(mine, (tuple, list)) and len(mine) == 3):
        raise Complaint("your function must return three objects: model, optimizer and loader.")
    model, optimizer, loader = mine
    if not (isinstance(model, torch.nn.Module) and hasattr(optimizer, "step") and isinstance(loader, DataLoader)):
        raise Complaint("your function must return the model, the optimizer and the loader, in this order.")
    hooked, noisy = isinstance(model, GradSampleModule), isinstance(optimizer, DPOptimizer)
    faults = _faults_of_the_loader(loader, right[2])
    if not hooked and not noisy and faults == ["old loader"]:
        return ["plain"]
    faults += [] if hooked and model._module is bare else ["other model" if hooked else "old model"]
    if not noisy:
        return [*faults, "old optimizer"]
    faults += ["sigma"] * (optimizer.noise_multiplier != sigma) + ["norm"] * (optimizer.max_grad_norm != C)
    faults += ["noise"] * (optimizer.generator is not noise)
    if faults:
        return faults
    if not torch.allclose(_three_steps(*mine), _three_steps(*right), rtol=0, atol=1e-6):
        return ["step"]
    return ["uncounted"] * (not engine.accountant.history)


def _piece_by_piece(faults: list[str]) -> str:
    """One sentence for each piece that is at fault, after the pieces that are not."""
    at_fault = {PIECES[fault][0] for fault in faults} | ({"model", "optimizer"} if "plain" in faults else set())
    right = [piece for piece in ("model", "optimizer", "loader") if piece not in at_fault]
    told = [f"The {PIECES[fault][0]}: {PIECES[fault][1].message}" for fault in faults]
    return " ".join(([f"right so far: {', '.join(right)}."] if right else []) + told)


def _examine_parts(fn: Callable) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for args in PARTS:
            if faults := observed(_pieces, fn, args):
                return Verdict(False, _piece_by_piece(faults))
    return Verdict(
        True,
        "the model keeps each record's gradient, the optimizer clips and adds noise from `noise`, the loader draws "
        "Poisson batches from `batches`, and your engine hears of each step.",
    )


exercise_5_1 = Exercise(
    "5.1",
    hint="Make what the plain loop needs: TensorDataset, DataLoader (with generator=batches), SGD. Hand all three to "
    "engine.make_private, with σ, C and noise_generator=noise, and return what comes back.",
    reference=make_it_private,
    examine=_examine_parts,
    wrong=tuple(Wrong(wrong.answer, _piece_by_piece([fault])) for fault, (_, wrong) in PIECES.items()),
)

# 5.3: the divisor tells how many records there are


def divisor(n, batch_size):
    """What Opacus divides the noisy sum by: n·q, rounded down, with q = 1 / ⌈n / batch_size⌉."""
    return int(n * (1 / math.ceil(n / batch_size)))


def _doubling(answer: Any) -> str | tuple[str, dict[str, float]]:
    pair = as_numbers(answer, 2)
    if pair is None or not all(abs(x) < 1e9 and x == int(x) for x in pair):
        return "not two"
    n, batch_size = map(int, pair)
    if n < 100 or batch_size < 10:
        return "too small"
    if batch_size > n:
        return "too large"
    before, after = divisor(n, batch_size), divisor(n + 1, batch_size)
    if after <= 0.55 * before:
        return "right", {"before": before, "after": after}
    return "not half" if n % batch_size == 0 else "no new batch"


exercise_5_3 = open_ended(
    "5.3",
    hint="The number of batches is ⌈n / batch_size⌉. For which n does one record more add a batch? And where does one "
    "batch more matter most: where there are many, or few?",
    reference=(256, 256),
    describe=_doubling,
    wrong={
        "no new batch": Wrong(
            (513, 256),
            "n + 1 records make as many batches as n records here, so the divisor hardly changes. Find an n for which "
            "the next record needs a batch of its own.",
        ),
        "not half": Wrong(
            (512, 256),
            "the next record adds a batch, and the divisor falls. But it does not fall to half: from two batches to "
            "three, say, it falls by a third. Take fewer batches.",
        ),
        "too small": Wrong(
            (7, 7),
            "take n of at least 100 and batch_size of at least 10. With a handful of records, rounding hides the "
            "effect.",
        ),
        "too large": Wrong((256, 512), "the batch can't be larger than the data: batch_size must be at most n."),
        "not two": Wrong(256, "the answer must be a pair of whole numbers below a billion, (n, batch_size)."),
    },
    praise="one record more, and the divisor goes from {before} to {after}. The noise on the step doubles with it, so "
    "whoever looks at the steps learns that this record joined.",
    solution="`answer_5_3 = (256, 256)`: 256 records fit in one batch, 257 need two. Opacus divides by 256, or by 128: "
    "the noise on each step is twice as long because one record joined. Any n = batch_size does it.",
)

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
    loader = DataLoader(data, batch_size=batch_size)
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


def as_it_was_given(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    train_loader = DataLoader(data, batch_size=batch_size, shuffle=True)
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


def epoch(*moves, skip_empty=False):
    """An epoch that makes these moves on each batch, if not the right ones."""

    def train(model, optimizer, loader):
        for X, y in loader:
            if skip_empty and len(X) == 0:
                continue
            for move in moves or ("zero_grad", "backward", "step"):
                if move == "backward":
                    F.cross_entropy(model(X), y).backward()
                else:
                    getattr(optimizer, move)()

    return train


EPOCH = epoch()


def script(train=EPOCH, *, use=lambda old, new: new, engine_by_epoch=False, ask_after=None, forgets=False, **settings):
    """An answer that trains otherwise, on what it uses of the old and the new parts, or with its own ``settings``."""

    def answer(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
        loader = DataLoader(data, batch_size=batch_size, shuffle=True)
        old = new = model, torch.optim.SGD(model.parameters(), lr=0.05), loader
        given = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm, **settings}
        for k in range(epochs):
            if k == 0 or engine_by_epoch:
                engine = PrivacyEngine()
                new = engine.make_private(module=new[0], optimizer=new[1], data_loader=new[2], **given)
            if forgets:
                engine.accountant.history.clear()
            train(*use(old, new))
            if k + 1 == (ask_after or epochs):
                spent = engine.get_epsilon(delta=target_delta)
        return spent

    return answer


class _NoEngine:
    """Leaves all as it is: a loop that was never made private."""

    def make_private(self, module, optimizer, data_loader, **_):
        return module, optimizer, data_loader

    def get_epsilon(self, delta):
        return 1.0


FAULTS = {
    "no engine": Wrong(
        changed(train_private, PrivacyEngine=lambda run: _NoEngine),
        "no make_private was called: the loop trains without clipping and without noise, whatever ε it returns.",
    ),
    "old optimizer": Wrong(
        script(use=lambda old, new: (new[0], old[1], new[2])),
        "you step the optimizer that you had before make_private. It neither clips nor adds noise, and the engine "
        "counts none of its steps. Step the one that make_private returned.",
    ),
    "other optimizer": Wrong(
        script(use=lambda old, new: (new[0], torch.optim.SGD(new[0].parameters(), lr=0.05), new[2])),
        "something moves the weights beside the private steps: a new optimizer, or your own update. It neither clips "
        "nor adds noise, and the engine counts none of it. Step the optimizer that make_private returned, and nothing "
        "else.",
    ),
    "not Poisson": Wrong(
        script(poisson_sampling=False),
        "with poisson_sampling=False the loader shuffles and takes every record once. The ε that is printed is for "
        "Poisson batches: it does not hold for yours. Leave the argument out.",
    ),
    "old loader": Wrong(
        script(use=lambda old, new: (*new[:2], old[2])),
        "you train on the loader that you had before make_private. Its batches are not Poisson batches, so the ε that "
        "is printed does not hold. Loop over the one that make_private returned.",
    ),
    "old criterion": Wrong(
        script(
            use=lambda old, new: (*new[:2], new[3]), grad_sample_mode="ghost", criterion=torch.nn.CrossEntropyLoss()
        ),
        "ghost clipping happens in the criterion that make_private returned. With another one, nothing is clipped.",
    ),
    "batch size": Wrong(
        changed(train_private, batch_size=lambda run: 2 * run.batch_size),
        "your loader has not the batch_size of your function: it samples at another rate, at another price.",
    ),
    "many engines": Wrong(
        script(engine_by_epoch=True),
        "you make a new engine in each epoch. Each one starts from zero, so the last knows the last epoch only. Make "
        "one engine before the loop, and call make_private once.",
    ),
    "history": Wrong(
        script(forgets=True),
        "your code changes the history of the engine: it holds fewer steps than were taken, and ε is computed from it.",
    ),
    "no zero_grad": Wrong(
        script(epoch("backward", "step")),
        "you do not clear the gradients between two steps. What an older batch left behind would count again: Opacus "
        "refuses to step. Call optimizer.zero_grad() in each step.",
    ),
    "no gradient": Wrong(
        script(epoch("backward", "zero_grad", "step")),
        "you step without gradients: zero_grad() has cleared them before step(), or backward() is missing. The order "
        "is zero_grad, backward, step.",
    ),
    "noise": Wrong(
        changed(train_private, noise_multiplier=lambda run: run.noise_multiplier * run.max_grad_norm),
        "make_private, or a step, had another noise_multiplier than your function got. The noise multiplier is σ "
        "alone: Opacus multiplies it by C itself.",
    ),
    "norm": Wrong(
        changed(train_private, max_grad_norm=1.0),
        "make_private, or a step, had another max_grad_norm than your function got.",
    ),
    "twice": Wrong(
        changed(train_private, data=lambda run: ConcatDataset([run.data, run.data])),
        "your loader has more records than data. One that is there twice moves the sum by up to 2·C in a step that "
        "takes both, and the noise is made for C: no ε that is printed holds.",
    ),
    "left out": Wrong(
        changed(train_private, data=lambda run: Subset(run.data, range(len(run.data) // 2))),
        "your loader has fewer records than data. Train on all of them.",
    ),
    "skips empty": Wrong(
        script(epoch(skip_empty=True)),
        "you skip the batches without records. A step that takes nobody must add its noise too: else whoever counts "
        "the steps sees that the batch was empty, and the engine has counted a step too few.",
    ),
    "steps": Wrong(
        changed(train_private, epochs=1),
        "your function does not train for all of its epochs: the number of private steps is not epochs times the "
        "number of batches.",
    ),
    "delta": Wrong(
        changed(train_private, target_delta=lambda run: 1 / math.ceil(len(run.data) / run.batch_size)),
        "you ask for ε at another δ than target_delta. One over the number of *batches* is far above one over the "
        "number of records; at such a δ, ε looks small and promises little.",
    ),
    "delta of records": Wrong(
        changed(train_private, target_delta=lambda run: 1 / len(run.data)),
        "you ask for ε at δ = 1/n. A mechanism that publishes one random record outright has exactly that δ. Ask at "
        "target_delta.",
    ),
    "other delta": Wrong(
        changed(train_private, target_delta=1e-5),
        "you ask for ε at a δ of your own. A number that is told at one δ says nothing at another: ask at "
        "target_delta.",
    ),
    "early": Wrong(
        script(ask_after=1),
        "you ask for ε before the training is over. The steps that follow cost too: ask after the last one.",
    ),
    "no bound": Wrong(
        changed(train_private, PrivacyEngine=lambda run: partial(run.PrivacyEngine, accountant="gdp")),
        "GDP's number is no bound: it can be far below what the run costs (notebook 04b). Let PrivacyEngine use its "
        "default.",
    ),
    "rounded": Wrong(
        lambda *args: round(train_private(*args), 2),
        "you round ε. Rounded down, it promises more than was kept: return the number as it is, and round when you "
        "print.",
    ),
    "other number": Wrong(
        lambda *args: 2 * train_private(*args),
        "the number that you return is not the ε of this training, whether by PRV or by RDP.",
    ),
}


class _Notes:
    """What the engines, optimizers and loaders of one training have done."""

    def __init__(self) -> None:
        self.engines: list = []  # all of them
        self.calls: list[dict] = []  # the arguments of each make_private
        self.batches: list[list[int]] = []  # of each batch: its records, and the private steps before the next one
        self.asked: list[tuple[float, int, float]] = []  # δ, private steps so far, ε
        self.steps = self.all_steps = 0  # private ones; those of the learner's optimizer
        self.strengths: set[tuple[float, float]] = set()  # σ and C, as the private steps had them
        self.weights: dict[torch.Tensor, torch.Tensor] = {}  # each weight, as the last step left it
        self.others = False  # something else has moved them
        self.losses = math.inf  # by the criterion that was returned, where there is one
        self.told = math.nan  # the ε that the function returned

    def look(self) -> None:
        self.others |= any(not torch.equal(w.nan_to_num(), last.nan_to_num()) for w, last in self.weights.items())

    def counted(self, criterion: Callable) -> Callable:
        def counting(*args, **settings):
            self.losses += 1
            return criterion(*args, **settings)

        self.losses = 0
        return counting

    def private_step(self, optimizer: Any) -> None:
        self.look()
        self.strengths.add((optimizer.noise_multiplier, optimizer.max_grad_norm))
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
            self.accountant.get_epsilon = self.spent

        def spent(self, delta, **_):
            accountant = "gdp" if self.accountant.mechanism() == "gdp" else "rdp"  # PRV would take a second each time
            notes.asked.append((delta, notes.steps, _price([self], delta, accountant)))
            return notes.asked[-1][-1]

        def make_private_with_epsilon(self, **_):
            raise Complaint("σ is given, so call make_private: make_private_with_epsilon looks for a σ of its own.")

        def make_private(self, **args):
            model, optimizer, *criterion, loader = super().make_private(**args)
            count = optimizer.step_hook
            optimizer.attach_step_hook(lambda optimizer: (count(optimizer), notes.private_step(optimizer)))
            if not notes.calls:
                optimizer.original_optimizer.register_step_post_hook(notes.after_step)
                notes.weights = {w: w.detach().clone() for w in model.parameters()}
            notes.calls.append(args)
            if args.get("poisson_sampling", True):
                batches = Batches(loader.batch_sampler)
                loader = DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)
            return model, optimizer, *map(notes.counted, criterion), loader  # a criterion with ghost clipping only

    return Recording


def _train(fn: Callable, args: tuple, notes: _Notes | None = None) -> list[str]:
    """What is wrong with the training or its ε: keys of FAULTS."""
    *given, asked = args
    notes = notes or _Notes()
    engine = _engine(notes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spent = fn(engine, *given, *asked[1:])
    except ValueError as error:  # Opacus refuses to step
        refusals = {"cleared": "no zero_grad", "accumulation": "no zero_grad", "not initialized": "no gradient"}
        refusal = next((fault for words, fault in refusals.items() if words in str(error)), None)
        if refusal is None or not notes.calls:
            raise
        notes.look()
        # The zero_grad of another optimizer does not reach Opacus' own gradients.
        causes = {"old optimizer", "other optimizer", "skips empty"}
        return [fault for fault in _faults_of_training(notes, asked) if fault in causes] or [refusal]
    if notes.engines and unattempted(spent):
        raise Complaint("your function trains, and returns nothing. End it with `return`, and ε.")
    number = as_number(attempted(spent))
    if number is None:
        raise Complaint(f"your function must return ε, a number, got a {type(spent).__name__}.")
    notes.told = number
    if not notes.calls:
        return ["no engine"]
    notes.look()
    return _faults_of_training(notes, asked) + (_faults_of_number(notes, asked, number) if notes.steps else [])


def _faults_of_training(notes: _Notes, asked: Asked) -> list[str]:
    first = notes.calls[0]
    poisson = all(args.get("poisson_sampling", True) for args in notes.calls)
    old_optimizer = notes.all_steps > notes.steps
    strengths = notes.strengths | {(args["noise_multiplier"], args["max_grad_norm"]) for args in notes.calls}
    skipped = any(steps for _, steps in notes.batches) and any(size == steps == 0 for size, steps in notes.batches[:-1])
    faults = {
        "old optimizer": old_optimizer,
        "other optimizer": notes.others,
        "not Poisson": not poisson,
        "old loader": poisson and len(notes.batches) < notes.steps,
        "old criterion": notes.losses < notes.steps,
        "batch size": first["data_loader"].batch_size not in (asked.batch_size, None),
        "many engines": sum(bool(engine.accountant.history) for engine in notes.engines) > 1,
        "history": sum(steps for engine in notes.engines for *_, steps in engine.accountant.history) < notes.steps,
        "noise": any(sigma != asked.noise_multiplier for sigma, _ in strengths),
        "norm": any(asked.max_grad_norm != C for _, C in strengths),
        "twice": any(len(args["data_loader"].dataset) > asked.n for args in notes.calls),
        "left out": any(len(args["data_loader"].dataset) < asked.n for args in notes.calls),
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
    batches = len(notes.calls[0]["data_loader"])
    names = {asked.target_delta: None, 1 / batches: "delta", 1 / asked.n: "delta of records"}

    def close(other: float) -> bool:
        return math.isclose(number, other, rel_tol=1e-4)

    asked_for = [
        (names.get(delta, "other delta"), "early" if steps < notes.steps else None)
        for delta, steps, spent in notes.asked
        if close(spent)
    ]
    gdp = any(engine.accountant.mechanism() == "gdp" for engine in notes.engines)
    if asked_for:
        return min(([fault for fault in faults if fault] for faults in asked_for), key=len) + ["no bound"] * gdp
    for accountant in ("rdp", "prv", "gdp"):
        for delta, name in {1e-5: "other delta", **names}.items():
            if close(_price(notes.engines, delta, accountant)):
                return [fault for fault in (name, "no bound" if accountant == "gdp" else None) if fault]
    rounded = any(round(spent, digits) == number for *_, spent in notes.asked for digits in range(4))
    return ["rounded" if rounded else "other number"]


def _sentence(*faults: str) -> str:
    return " Besides: ".join(FAULTS[fault].message for fault in faults)


def _records(n: int) -> TensorDataset:
    return TensorDataset(*two_moons(n)[:])


def _examine(fn: Callable) -> Verdict:
    for asked in ASKED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            faults = observed(_train, fn, (mlp(), _records(asked.n), asked))
        if faults:
            return Verdict(False, _sentence(*faults))
    return Verdict(
        True,
        "all three objects are the returned ones, one engine has counted every step, and ε is told at the δ that was "
        "asked for.",
    )


exercise_5_4 = Exercise(
    "5.4",
    hint="Three lines are at fault: one stands inside the loop and should stand before it, one uses an object that was "
    "replaced, one asks at the wrong δ.",
    reference=train_private,
    examine=_examine,
    wrong=(Wrong(as_it_was_given, _sentence("old loader", "many engines", "delta")), *FAULTS.values()),
)

# 5.2: an ε that lies


def a_lie(PrivacyEngine, model, data, sigma, C, epochs, batch_size, delta):
    loader = DataLoader(data, batch_size=batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    strength = {"noise_multiplier": sigma, "max_grad_norm": C}
    for _ in range(epochs):
        engine = PrivacyEngine()  # here is the lie: it counts from zero again
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, **strength
        )
        for X, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
    return engine.get_epsilon(delta=delta)


# What no accountant's number holds for, and what costs more than is told.
NO_BOUND = {"old optimizer", "other optimizer", "not Poisson", "old loader", "old criterion", "twice"}
UNCOUNTED = {"many engines", "history", "early"}
OTHER_RUN = {"noise", "norm", "batch size", "steps", "skips empty", "left out"}
REFUSED = {"no zero_grad", "no gradient"}


def _lies(fn: Callable) -> str | tuple[str, dict[str, Any]]:
    found = [_lie(fn, asked) for asked in ASKED]
    return next((kind for kind in found if isinstance(kind, str)), found[0])


def _lie(fn: Callable, asked: Asked) -> str | tuple[str, dict[str, Any]]:
    notes = _Notes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        faults = set(observed(partial(_train, notes=notes), fn, (mlp(), _records(asked.n), asked)))
    if faults & REFUSED or math.isnan(notes.told) or notes.steps == 0 and notes.calls:
        return "refused"
    if faults & {"delta", "delta of records", "other delta", "no bound"}:
        return "open"
    if faults & {"no engine", "other number", "rounded"}:
        return "made up"
    if faults & OTHER_RUN:
        return "other run"
    if faults & NO_BOUND:
        return "right", {"told": notes.told, "truth": "no number at all: no accountant covers what it ran"}
    if faults & UNCOUNTED:
        ledger, batches = Ledger(), len(notes.calls[0]["data_loader"])
        ledger.charge(noise_multiplier=asked.noise_multiplier, sample_rate=1 / batches, steps=notes.steps)
        truth = ledger.epsilon(target_delta=asked.target_delta, accountant="rdp")
        return "right", {"told": notes.told, "truth": f"{truth:.2f}"}
    return "honest"


exercise_5_2 = open_ended(
    "5.2",
    hint="The engine hears of the steps that *its* optimizer takes, since it was made. And it believes that the "
    "batches come from the loader that it returned. Break one of the two.",
    reference=a_lie,
    describe=_lies,
    wrong={
        "honest": Wrong(
            changed(train_private),
            "this ε is true. One engine has counted each private step, on Poisson batches, and you ask at delta.",
        ),
        "made up": Wrong(
            lambda *args: 0.5 * train_private(*args),
            "this number is not the answer of an engine. A made-up one is too easy: let Opacus itself say it.",
        ),
        "open": Wrong(
            changed(train_private, target_delta=0.1),
            "another δ, or another accountant, stands beside ε in any report: whoever reads it sees the trick. Ask "
            "PrivacyEngine() at delta.",
        ),
        "other run": Wrong(
            changed(train_private, epochs=1),
            "you train something else than was asked for: other epochs, batches, σ or C. The ε that you tell is true "
            "for that run.",
        ),
        "refused": Wrong(
            script(epoch("backward", "step")),
            "Opacus refuses to step, or has counted no step and can't tell an ε. Find something that it does not look "
            "at.",
        ),
    },
    praise="Opacus says nothing, and your function tells ε = {told:.2f}. The truth is {truth}. Whoever gets only the "
    "number can't see it. Notebook 05b has a gallery of such lies that people tell by mistake.",
    solution="",
)

EXERCISES = [exercise_5_1, exercise_5_2, exercise_5_3, exercise_5_4]
