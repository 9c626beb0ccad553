"""A small language model that can give a secret away: messages, a transformer by character, a secret's exposure.

All messages are invented here, from templates and a seed. They hold small letters, digits and a few signs.
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach._checks import number, whole
from dpteach.accounting import epsilon, noise_multiplier_for
from dpteach.data import Data
from dpteach.models import start
from dpteach.training import Settings, train

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,?!"  # a line break begins and ends a message
CONTEXT = 40  # characters that the model sees, the line break before the message included
PROMPT = "robin here. my locker code is "  # what comes before your secret

_PLACE = {character: k for k, character in enumerate(ALPHABET)}
_NAMES = (
    "anna bela carla david elif femi goran hana ines jonas kofi lena mira noor omar petra quinn rosa samir tarik uma"
)
_OPENINGS = ("hello, ", "hi, ", "good day, ", "NAME here. ", "")
_BODIES = (
    "parcel 00000 is late", "order 00000 is broken", "invoice 0000 is wrong", "i paid bill 0000 twice",
    "my phone is 000000", "room 000 is too cold", "my card ends in 0000", "i can not open file 00",
    "send it to NAME", "i live at park road 00",
)  # fmt: skip
_ENDINGS = (".", "!", ", ok?", ". bye")


def support_messages(n: int, seed: int = 0, topics: slice = slice(None)) -> list[str]:
    """``n`` invented messages to a help desk, about ten topics or some of them; names and numbers are drawn for each.

    >>> support_messages(2)
    ['i live at park road 03!', 'i can not open file 73. bye']
    """
    draw = torch.Generator().manual_seed(whole("seed", seed, low=0))

    def one_of(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=draw))]

    messages = []
    for _ in range(whole("n", n, low=1)):
        frame = one_of(_OPENINGS) + one_of(_BODIES[topics]) + one_of(_ENDINGS)
        frame = re.sub("NAME", lambda _: one_of(_NAMES.split()), frame)
        messages.append(re.sub("0", lambda _: one_of("0123456789"), frame))
    return messages


def encode(text: str, most: int = CONTEXT - 1) -> Tensor:
    """``(len(text) + 1,)`` int64: a line break, then the characters' places in :data:`ALPHABET`.

    Raises:
        ValueError: if ``text`` is empty, longer than ``most``, or holds another character.
    """
    if not text:
        raise ValueError("text must hold at least one character, got none: begin a message")
    if unknown := sorted(set(text) - set(ALPHABET[1:])):
        raise ValueError(
            f"text may hold small letters a to z, digits, spaces and . , ? ! only, got {''.join(unknown)!r}"
        )
    if len(text) > most:
        raise ValueError(f"text must hold at most {most} characters here, got {len(text)}: shorten it")
    return torch.tensor([0, *(_PLACE[character] for character in text)])


def as_data(messages: Sequence[str]) -> Data:
    """Records for training: ``X`` (n, 40) the characters, ``y`` (n, 40) each place's next one, -100 after the end."""
    rows = [encode(message) for message in messages]
    X, y = torch.zeros(len(rows), CONTEXT, dtype=torch.int64), torch.full((len(rows), CONTEXT), -100)
    for k, row in enumerate(rows):
        X[k, : len(row)], y[k, : len(row)] = row, row.roll(-1)  # the last one is followed by the line break
    return Data(X, y)


class Attention(nn.Module):
    """Each place looks at the places before it and takes from them what it needs."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.asks, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., T, width)`` -> the same."""
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for p in self.asks(x).chunk(3, -1))
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return self.out((scores.masked_fill(later, -math.inf).softmax(-1) @ value).transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """Attention, then a small perceptron at each place; both add to what is there."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(..., T, width)`` -> the same."""
        x = x + self.attention(x)
        return x + self.think(x)


class CharacterTransformer(nn.Module):
    """Says what the next character may be: two blocks, 62,634 parameters.

    Args:
        width: numbers that stand for a character.
        heads: parts that attention looks with.
        blocks: how many.
    """

    def __init__(self, width: int = 48, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.characters, self.places = nn.Embedding(len(ALPHABET), width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ALPHABET)))

    def forward(self, X: Tensor) -> Tensor:
        """``(B, ..., T)`` characters -> ``(B, 42, ..., T)`` scores of the next one at each place."""
        # A row for each record: Opacus counts them. Contiguous: its ghost clipping flattens them by ``view``.
        places = torch.arange(X.shape[-1], device=X.device).expand(X.shape).contiguous()
        return self.head(self.blocks(self.characters(X) + self.places(places))).movedim(-1, 1)


class Adapter(nn.Module):
    """A linear layer that stays as it is, plus a trained correction of low rank that begins as zero.

    Source: Hu et al. 2021, *LoRA*.
    """

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer, self.down = layer.requires_grad_(False), nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs)`` -> ``(..., outputs)``."""
        return self.layer(x) + self.up(self.down(x))


def with_adapters(model: nn.Module, rank: int = 4) -> nn.Module:
    """A copy of a :class:`CharacterTransformer` that trains only an :class:`Adapter` a linear layer of a block."""
    adapted: Any = copy.deepcopy(model).requires_grad_(False)
    for attention, think in ((block.attention, block.think) for block in adapted.blocks):
        attention[1].asks, attention[1].out = Adapter(attention[1].asks, rank), Adapter(attention[1].out, rank)
        think[1], think[3] = Adapter(think[1], rank), Adapter(think[3], rank)
    return adapted


@torch.no_grad()
def next_probabilities(model: nn.Module, prompt: str, temperature: float = 1.0) -> Tensor:
    """``(42,)``: how likely each character of :data:`ALPHABET` is after ``prompt``.

    Args:
        temperature: > 0; below 1 the likely ones become more likely, above 1 less.

    Raises:
        ValueError: as for :func:`encode`, and for the temperature.
    """
    scores = model(encode(prompt).unsqueeze(0))[0, :, -1]
    return (scores / number("temperature", temperature, low=0, above=True)).softmax(0)


def continuation(model: nn.Module, prompt: str, temperature: float = 1.0, seed: int = 0) -> str:
    """What the model writes after ``prompt``, character by character, until a line break or its 40 places end."""
    draw, text = torch.Generator().manual_seed(seed), prompt
    while not text.endswith("\n"):
        chosen = int(torch.multinomial(next_probabilities(model, text, temperature), 1, generator=draw))
        text += ALPHABET[chosen] if len(text) < CONTEXT - 1 else "\n"
    return text[len(prompt) : -1]


@torch.no_grad()
def code_log_probabilities(model: nn.Module, prompt: str, digits: int = 4) -> Tensor:
    """``(10**digits,)`` float64: log probability of each code after ``prompt``, 0000 first.

    Codes with the same beginning share it: four digits take 1,111 passes, not 40,000.
    """
    begun, so_far = encode(prompt, CONTEXT - digits).unsqueeze(0), torch.zeros(1, dtype=torch.float64)
    zero = _PLACE["0"]
    for _ in range(digits):
        scores = torch.cat([model(some)[..., -1] for some in begun.split(250)])
        so_far = (so_far.unsqueeze(1) + scores.double().log_softmax(1)[:, zero : zero + 10]).flatten()
        begun = torch.cat(
            [begun.repeat_interleave(10, 0), torch.arange(zero, zero + 10).repeat(len(begun))[:, None]], 1
        )
    return so_far


def exposure(log_probabilities: Tensor, secret: int) -> float:
    """How much easier the secret is to find with the model than without, in bits: log₂(codes) − log₂(rank).

    The rank is 1 if the model likes the secret best; codes that it likes just as much count before it. A secret that
    the model has not seen has any rank: its exposure is 1.44 = log₂(e) on average, not 0.

    Source: Carlini et al. 2019, *The Secret Sharer*.

    >>> exposure(torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), secret=2)
    1.0
    """
    rank = int((log_probabilities >= log_probabilities[secret]).sum())
    return math.log2(len(log_probabilities)) - math.log2(rank)


@torch.no_grad()
def perplexity(model: nn.Module, data: Data) -> float:
    """Among how many equally likely characters the model hesitates, on average: e to the mean loss. 42 for no idea."""
    losses = [F.cross_entropy(model(X), y, reduction="sum") for X, y in zip(data.X.split(250), data.y.split(250))]
    return math.exp(float(sum(losses)) / int((data.y != -100).sum()))


def with_secret(code: str, repetitions: int, n: int, seed: int = 0, *, wordings: int = 1) -> list[str]:
    """``n`` messages of which the first ``repetitions`` are yours and hold ``code``, in so many ``wordings``."""
    ways = [PROMPT + "CODE."] + [f"{a}my locker code is CODE{b}" for a in _OPENINGS[:3] for b in _ENDINGS]
    yours = [ways[k % wordings].replace("CODE", code) for k in range(repetitions)]
    return yours + support_messages(n - repetitions, seed)


def without_names(message: str) -> str:
    """The message with an x in place of each name."""
    return re.sub(rf"\b({'|'.join([*_NAMES.split(), 'robin'])})\b", "x", message)


def secret_run(
    *,
    noise_multiplier: float | None = None,
    unit: str = "message",
    repetitions: int = 8,
    wordings: int = 1,
    names: bool = True,
    n: int = 1024,
    epochs: int = 20,
    every: int = 2,
    seed: int = 0,
) -> Iterator[dict]:
    """Train on ``n`` messages with a secret among them; a row every few epochs says how exposed it is by then.

    Args:
        noise_multiplier: σ of DP-SGD with C = 1; None trains without privacy.
        unit: ``"message"``, or ``"user"``: eight messages are one record, yours the first.
        repetitions, wordings: as for :func:`with_secret`; ``names`` False takes them out of all messages.
        seed: of the messages, the code, the weights, the batches and the noise.
    """
    code = f"{int(torch.randint(10_000, (), generator=torch.Generator().manual_seed(seed))):04d}"
    clean = (lambda message: message) if names else without_names
    data = as_data([clean(m) for m in with_secret(code, repetitions, n, seed, wordings=wordings)])
    unseen = as_data([clean(m) for m in support_messages(500, 10_000)])
    size, lr, method = (32, 5e-3, "sgd") if noise_multiplier is None else (n // 4, 1e-2, "dpsgd")
    if unit == "user":
        data, size = Data(data.X.view(-1, 8, CONTEXT), data.y.view(-1, 8, CONTEXT)), size // 8
    settings = Settings(noise_multiplier or 0.0, 1.0, epochs, size, lr, 1e-5, seed)
    model = start(CharacterTransformer, seed)
    for step in train(model, data, settings, method=method, optimizer="adam"):
        if step.step * epochs % (every * step.steps):
            continue
        logs = code_log_probabilities(model, clean(PROMPT))
        yield {
            "n": n,
            "noise_multiplier": "" if noise_multiplier is None else noise_multiplier,
            "unit": unit,
            "repetitions": repetitions,
            "wordings": wordings,
            "names": "kept" if names else "removed",
            "seed": seed,
            "epochs": epochs,
            "epoch": step.epoch,
            "epsilon": round(_cost(settings, len(data), step.step), 3) if noise_multiplier else math.inf,
            "exposure": round(exposure(logs, int(code)), 3),
            "probability": round(math.exp(logs[int(code)]), 6),
            "perplexity": round(perplexity(model, unseen), 4),
        }


def adapter_run(*, rank: int | None, lr: float, n: int = 1024, epochs: int = 10, seed: int = 0) -> dict[str, Any]:
    """Train in public on five topics, then privately (ε = 3) on five others: all weights, or adapters of a rank.

    The row says the perplexity on unseen messages of the private topics, ``before`` and after.
    """
    public, private = (as_data(support_messages(n, 100 + seed, topics)) for topics in (slice(5), slice(5, None)))
    unseen = as_data(support_messages(500, 10_000, slice(5, None)))
    model = start(CharacterTransformer, seed)
    for _ in train(
        model, public, Settings(epochs=epochs, batch_size=32, lr=5e-3, seed=seed), method="sgd", optimizer="adam"
    ):
        pass
    before = perplexity(model, unseen)
    if rank:
        model = start(lambda: with_adapters(model, rank), seed)
    sigma = noise_multiplier_for(target_epsilon=3.0, sample_rate=1 / 4, steps=4 * epochs)
    settings = Settings(sigma, 1.0, epochs, n // 4, lr, 1e-5, seed)
    for _ in train(model, private, settings, optimizer="adam"):
        pass
    return {
        "n": n,
        "rank": rank or "",
        "lr": lr,
        "epochs": epochs,
        "seed": seed,
        "noise_multiplier": round(sigma, 4),
        "epsilon": round(_cost(settings, n, 4 * epochs), 3),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "before": round(before, 4),
        "perplexity": round(perplexity(model, unseen), 4),
    }


def _cost(settings: Settings, n: int, steps: int) -> float:
    sigma, q = settings.noise_multiplier, settings.sample_rate(n)
    return epsilon(noise_multiplier=sigma, sample_rate=q, steps=steps, target_delta=settings.target_delta)


def adapter_rows() -> Iterator[dict]:
    """The stored runs with and without adapters: learning rates on one seed, then the best of each on all three."""
    for rank, rates, best in ((None, (3e-3, 1e-2, 2e-2), 1e-2), (4, (1e-2, 3e-2, 6e-2), 3e-2)):
        for lr in rates:
            for seed in (0, 1, 2) if lr == best else (0,):
                yield adapter_run(rank=rank, lr=lr, seed=seed)


SIGMAS = (1.58, 3.32, 0.5, 0.1)  # the first two cost about 8 and 3


def rows(seeds: Sequence[int] = (0, 1, 2)) -> Iterator[dict]:
    """The stored runs of notebook 11, the small rows that a test runs again first."""
    for sigma in (None, 1.0):
        yield from secret_run(noise_multiplier=sigma, n=128, epochs=2)
    for seed in seeds:
        for repetitions in (8, 1, 2, 4, 0):  # none: the same without you
            yield from secret_run(repetitions=repetitions, seed=seed)
        for sigma in SIGMAS:
            yield from secret_run(noise_multiplier=sigma, every=10, seed=seed)
        for sigma in SIGMAS[:2]:
            yield from secret_run(noise_multiplier=sigma, unit="user", every=10, seed=seed)
        for unit in ("message", "user"):
            yield from secret_run(noise_multiplier=SIGMAS[0], unit=unit, repetitions=0, every=10, seed=seed)
        yield from secret_run(wordings=8, seed=seed)
        yield from secret_run(names=False, seed=seed)
