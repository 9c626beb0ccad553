"""Notebook 05: what ε depends on, the noise for a budget, a divisor that tells, and a script that only looks private."""

import math

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from dpteach.accounting import epsilon
from dpteach.data import two_moons
from dpteach.exercises.core import (
    _UNATTEMPTED,
    Complaint,
    Exercise,
    Verdict,
    Wrong,
    _observed,
    _unattempted,
    choose,
    value,
)
from dpteach.models import mlp

# 5.4: a script that only looks private

N, SIGMA, C, EPOCHS, BATCH, DELTA = 640, 1.3, 0.7, 3, 128, 1e-5


def train_private(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader = DataLoader(data, batch_size=batch_size, collate_fn=lambda batch: batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = PrivacyEngine()  # one engine, before the first epoch
    model, optimizer, loader = engine.make_private(  # all three replace the old ones
        module=model, optimizer=optimizer, data_loader=loader,
        noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm,
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
            module=model, optimizer=optimizer, data_loader=train_loader,
            noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm,
        )
        for X, y in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
    return engine.get_epsilon(delta=1 / len(private_loader))


def old_loader(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, _ = engine.make_private(module=model, optimizer=optimizer, data_loader=loader,
                                              noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def engine_by_epoch(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    for _ in range(epochs):
        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader,
                                                       noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def delta_of_batches(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader,
                                                   noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=1 / len(loader))


def old_optimizer(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, _, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader,
                                           noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def forgets_zero_grad(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader,
                                                   noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    for _ in range(epochs):
        for X, y in loader:
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
    return engine.get_epsilon(delta=target_delta)


def asks_too_early(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader,
                                                   noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    _epoch(model, optimizer, loader)
    spent = engine.get_epsilon(delta=target_delta)
    for _ in range(epochs - 1):
        _epoch(model, optimizer, loader)
    return spent


def noise_times_norm(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader,
        noise_multiplier=noise_multiplier * max_grad_norm, max_grad_norm=max_grad_norm)
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return engine.get_epsilon(delta=target_delta)


def without_engine(PrivacyEngine, model, data, noise_multiplier, max_grad_norm, epochs, batch_size, target_delta):
    loader, optimizer = _parts(model, data, batch_size)
    for _ in range(epochs):
        _epoch(model, optimizer, loader)
    return epsilon(noise_multiplier=noise_multiplier, sample_rate=1 / len(loader), steps=epochs * len(loader),
                   target_delta=target_delta, accountant="rdp")


_SENTENCES = {
    "no engine": "no make_private was called: the loop trains without clipping and without noise, whatever ε it returns.",
    "old optimizer": "you step the optimizer that you had before make_private. It neither clips nor adds noise, and the "
                     "engine counts none of its steps. Step the one that make_private returned.",
    "old loader": "you train on the loader that you had before make_private. Its batches are not Poisson batches, so the ε "
                  "that is printed does not hold. Loop over the one that make_private returned.",
    "many engines": "you make a new engine in each epoch. Each one starts from zero, so the last knows the last epoch only. "
                    "Make one engine before the loop, and call make_private once.",
    "no zero_grad": "you do not clear the gradients between two steps. What an older batch left behind would count again: "
                    "Opacus refuses to step. Call optimizer.zero_grad() in each step.",
    "noise": "make_private got another noise_multiplier or max_grad_norm than your function. The noise multiplier is σ alone: "
             "Opacus multiplies it by C itself.",
    "steps": "your function does not train for all of its epochs: the number of private steps is not epochs times the "
             "number of batches.",
    "delta": "you ask for ε at another δ than target_delta. One over the number of *batches* is far above one over the number "
             "of records; at such a δ, ε looks small and promises little.",
    "early": "you ask for ε before the training is over. The steps that follow cost too: ask after the last one.",
    "other number": "your function does not return what get_epsilon said.",
}


def _recording(engines: list, asked: list):
    """A class to put in the place of Opacus' PrivacyEngine: the same calls, without clipping and noise. It takes notes."""

    class Optimizer:
        def __init__(self, original, engine):
            self.original_optimizer, self.engine, self.last = original, engine, None
            self.param_groups = original.param_groups
            if not hasattr(original, "all_steps"):
                original.all_steps = 0
                original.register_step_post_hook(lambda optimizer, *_: setattr(optimizer, "all_steps", optimizer.all_steps + 1))

        def zero_grad(self, set_to_none=True):
            self.last = None
            self.original_optimizer.zero_grad()

        def step(self, closure=None):
            gradient = self.param_groups[0]["params"][0].grad
            self.engine.dirty |= self.last is not None and gradient is self.last
            self.last = gradient
            self.original_optimizer.step()
            self.engine.steps += 1

    class Loader:
        def __init__(self, loader, engine):
            self.dataset, self.engine, self.batches = loader.dataset, engine, len(loader)
            self.collate_fn, self.batch_size = loader.collate_fn, loader.batch_size

        def __len__(self):
            return self.batches

        def __iter__(self):
            draws = torch.Generator().manual_seed(0)
            for _ in range(self.batches):
                rows = torch.rand(len(self.dataset), generator=draws) < 1 / self.batches
                self.engine.batches += 1
                yield self.dataset.X[rows], self.dataset.y[rows]

    class PrivacyEngine:
        def __init__(self, *, accountant="prv", secure_mode=False):
            self.steps, self.batches, self.dirty, self.made = 0, 0, False, None
            engines.append(self)

        def make_private(self, *, module, optimizer, data_loader, noise_multiplier, max_grad_norm, **others):
            original = getattr(optimizer, "original_optimizer", optimizer)
            self.made = (noise_multiplier, max_grad_norm, original, len(data_loader))
            return module, Optimizer(original, self), Loader(data_loader, self)

        def get_epsilon(self, delta):
            spent = 0.0
            if self.steps:
                sigma, _, _, batches = self.made
                spent = epsilon(noise_multiplier=sigma, sample_rate=1 / batches, steps=self.steps, target_delta=delta,
                                accountant="rdp")
            asked.append((delta, self.steps, spent))
            return spent

    return PrivacyEngine


def _faults(fn, args):
    """All that makes the returned ε untrue: keys of _SENTENCES."""
    engines, asked = [], []
    spent = fn(_recording(engines, asked), *args, SIGMA, C, EPOCHS, BATCH, DELTA)
    if any(spent is nothing for nothing in _UNATTEMPTED):
        return spent
    if not isinstance(spent, float):
        raise Complaint(f"your function must return ε, a number, got a {type(spent).__name__}.")
    made = [engine for engine in engines if engine.made]
    if not made:
        return ["no engine"]
    private = sum(engine.steps for engine in made)
    faults = {
        "old optimizer": getattr(made[0].made[2], "all_steps", 0) > private,
        "old loader": sum(engine.batches for engine in made) < private,
        "many engines": len(made) > 1,
        "no zero_grad": any(engine.dirty for engine in made),
        "noise": any(engine.made[:2] != (SIGMA, C) for engine in made),
        "steps": private not in (0, EPOCHS * math.ceil(N / BATCH)),
        "delta": bool(asked) and asked[-1][0] != DELTA,
        "early": bool(asked) and len(made) == 1 and asked[-1][1] < private,
        "other number": not asked or not math.isclose(spent, asked[-1][2], rel_tol=1e-6),
    }
    return [name for name, there in faults.items() if there]


def _say(*faults: str) -> str:
    return " Besides: ".join(_SENTENCES[fault] for fault in faults)


def _examine(fn):
    if not callable(fn):
        return Verdict(False, f"the answer must be a function, got {type(fn).__name__}.")
    faults = _observed(_faults, fn, (mlp(), two_moons(N)))
    if any(faults is nothing for nothing in _UNATTEMPTED):
        return _unattempted()
    if faults:
        return Verdict(False, _say(*faults))
    return Verdict(True, "all three objects are the returned ones, one engine has counted every step, and ε is told at the δ "
                         "that was asked for.")


# 5.3: the divisor tells how many records there are

_NOT_TWO = "the answer must be a pair of whole numbers, (n, batch_size)."
_TOO_SMALL = "take n of at least 100 and batch_size of at least 10. With a handful of records, rounding hides the effect."
_TOO_LARGE = "the batch can't be larger than the data: batch_size must be at most n."
_NO_NEW_BATCH = "n + 1 records make as many batches as n records here, so the divisor hardly changes. Find an n for which the next record " \
                "needs a batch of its own."
_NOT_HALF = "the next record adds a batch, and the divisor falls. But it does not fall to half: from two batches to three, say, it falls by a " \
            "third. Take fewer batches."


def divisor(n, batch_size):
    """What Opacus divides the noisy sum by: n·q, rounded down, with q = 1 / ⌈n / batch_size⌉."""
    return int(n * (1 / math.ceil(n / batch_size)))


def _examine_divisor(answer):
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not all(type(number) is int for number in answer):
        return Verdict(False, _NOT_TWO)
    n, batch_size = answer
    if n < 100 or batch_size < 10:
        return Verdict(False, _TOO_SMALL)
    if batch_size > n:
        return Verdict(False, _TOO_LARGE)
    if divisor(n + 1, batch_size) <= 0.55 * divisor(n, batch_size):
        return Verdict(True, f"one record more, and the divisor goes from {divisor(n, batch_size)} to {divisor(n + 1, batch_size)}. "
                             "Whoever sees the size of a step learns that this record joined, and no noise hides it.")
    return Verdict(False, _NOT_HALF if n % batch_size == 0 else _NO_NEW_BATCH)


EXERCISES = [
    choose(
        "5.1",
        hint="The accountant's whole memory is `engine.accountant.history`. What would have to be written there for the model to matter?",
        answer="c",
        wrong=[
            Wrong("a", "Opacus can differentiate both models, and it counts nothing of them. The clipped sum of the big model has a norm "
                       "of at most C per record, like that of the small one: one vector, however many numbers it has."),
            Wrong("b", "the noise has standard deviation σ·C in every coordinate, so the *total* noise does grow with the number of weights. "
                       "That costs accuracy. But your record still moves the vector by at most C, in one direction, and σ hides this move."),
            Wrong("d", "an attack may indeed succeed more easily on one of the two. But ε is a bound for the worst case, over all models and "
                       "all attacks: it does not look at the model, so it can't be lower for one of them."),
        ],
        praise="σ, q, the number of steps and δ. A record moves the clipped sum by at most C and the noise is σ·C, whatever the model, "
               "so the ratio, and with it ε, is the same. Opacus' history holds σ, q and steps, and nothing else.",
        solution="**c.** The history of an engine is a list of (σ, q, steps). With δ, this is all that ε is computed from. The model decides "
                 "how well the *same* ε lets you learn.",
    ),
    value(
        "5.2",
        hint="`noise_multiplier_for(target_epsilon=..., sample_rate=..., steps=..., target_delta=...)` needs q = 1 / ⌈n / batch_size⌉ "
             "and the steps of *all* epochs. Or let `make_private_with_epsilon` search, and print `optimizer.noise_multiplier`.",
        answer=0.997,
        wrong=[
            Wrong(1.048, "this σ keeps the budget, but it is RDP's: a looser accountant, and so more noise than you need. PRV, "
                         "PrivacyEngine's default, is content with less."),
            Wrong(0.671, "this σ is right for one epoch. The budget is for the whole run: 20 epochs of 79 steps."),
            Wrong(0.617, "you counted 20 steps, one for each epoch. An epoch has ⌈n / batch_size⌉ = 79 steps, and each of them costs."),
            Wrong(0.721, "your δ is one over the number of batches, 1/79. At a δ that large, little noise seems to be enough. "
                         "The task asks for δ = 1e-5."),
            Wrong(0.449, "your q is 1/n, the rate of a batch of one record. A record is in a batch with probability 1 / 79 here."),
            Wrong(59.378, "you charged every step as if it used all the records (q = 1). Sampling makes a step much cheaper: q = 1/79."),
        ],
        praise="σ is about 1.00: the talk's noise multiplier, at twice its epochs, costs ε = 3.",
        solution="`noise_multiplier_for(target_epsilon=3.0, sample_rate=1 / 79, steps=20 * 79)` gives 0.997. `make_private_with_epsilon` "
                 "stops its search a little earlier and takes nearly the same.",
    ),
    Exercise(
        "5.3",
        hint="The number of batches is ⌈n / batch_size⌉. For which n does one record more add a batch? And where does one batch more matter "
             "most: where there are many, or few?",
        reference=(256, 256),
        examine=_examine_divisor,
        wrong=(
            Wrong((513, 256), _NO_NEW_BATCH),
            Wrong((512, 256), _NOT_HALF),
            Wrong((7, 7), _TOO_SMALL),
            Wrong((256, 512), _TOO_LARGE),
            Wrong(256, _NOT_TWO),
        ),
        solution="`answer_5_3 = (256, 256)`: 256 records fit in one batch, 257 need two. Opacus divides by 256, or by 128: the step is twice as "
                 "long because one record joined. Any n = batch_size does it.",
    ),
    Exercise(
        "5.4",
        hint="Three lines are at fault: one stands inside the loop and should stand before it, one uses an object that was replaced, one asks "
             "at the wrong δ.",
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
        ),
    ),
]
