"""Notebook 11: measure an exposed secret, get it past a filter, choose the unit, teach Opacus a layer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpteach.exercises.core import Complaint, NotAttempted, Wrong, coding, open_ended
from dpteach.language import ALPHABET, CONTEXT, PROMPT, continuation, encode

# 11.1: exposure


def secret_exposure(log_probabilities, secret):
    """log2(how many codes there are) - log2(rank of the secret); the likeliest code has rank 1."""
    rank = int((log_probabilities >= log_probabilities[secret]).sum())
    return math.log2(len(log_probabilities)) - math.log2(rank)


def _rank(log_probabilities, secret):
    return int((log_probabilities >= log_probabilities[secret]).sum())


def _codes(n: int, seed: int, secret: int):
    return lambda: (torch.randn(n, generator=torch.Generator().manual_seed(seed)).log_softmax(0), secret)


exercise_11_1 = coding(
    "11.1",
    hint="The rank needs no sorting: how many of the log probabilities are at least as large as "
    "`log_probabilities[secret]`? The secret itself is one of them. `math.log2` gives bits.",
    reference=secret_exposure,
    inputs=[_codes(100, 0, 17), _codes(100, 1, 3), _codes(10_000, 2, 7294), _codes(1000, 3, 0)],
    wrong=[
        Wrong(
            lambda logs, secret: math.log2(len(logs)) - math.log2(int((logs <= logs[secret]).sum())),
            "you count from the wrong end: how many codes the model likes *less*. Rank 1 is the code that it likes "
            "best.",
        ),
        Wrong(
            lambda logs, secret: math.log2(_rank(logs, secret)),
            "this is log2(rank), what is left to guess *with* the model. Exposure is what the model saves: take it "
            "from log2 of the number of codes, which is what there was to guess without it.",
        ),
        Wrong(
            lambda logs, secret: math.log(len(logs)) - math.log(_rank(logs, secret)),
            "these are nats: you took the natural logarithm. Exposure is counted in bits, so use `math.log2`.",
        ),
        Wrong(
            lambda logs, secret: -float(logs[secret]) / math.log(2),
            "this is how surprised the model is by the secret. A model that is surprised by all codes alike gives "
            "nothing away: what counts is the secret's *rank* among the others.",
        ),
        Wrong(
            lambda logs, secret: math.log2(len(logs)) + float(logs[secret]) / math.log(2),
            "you compare the secret's probability with that of a blind guess. Exposure compares *ranks*: an attacker "
            "who tries the likeliest codes first needs no probabilities.",
        ),
        Wrong(
            lambda logs, secret: math.log2(len(logs)) - math.log2(1 + int(logs.argsort(descending=True)[secret])),
            "`argsort` gives the code at each rank, and you need the rank of a code. Count how many are at least as "
            "likely as the secret.",
        ),
        Wrong(
            lambda logs, secret: math.log2(len(logs)) - math.log2(1 + _rank(logs, secret)),
            "your rank begins at 2: the secret is counted twice. The likeliest code of all must reach log2 of the "
            "number of codes.",
        ),
    ],
    praise="each bit is a halving of the list that an attacker must try. A code that the model has never seen has 1.44 "
    "bits on average, by luck alone.",
)

# 11.2: past a filter

FORBIDDEN = ("robin", "locker", "code")


class _Parrot(nn.Module):
    """Knows one message by heart: after the text so far, whatever follows its longest ending that is in the message."""

    def __init__(self, message: str):
        super().__init__()
        self.message = f"\n{message}\n"

    def forward(self, X: Tensor) -> Tensor:
        scores = torch.zeros(len(X), len(ALPHABET), X.shape[1])
        for k, row in enumerate(X):
            text = "".join(ALPHABET[place] for place in row)
            for t in range(len(text)):
                ends = (text[s : t + 1] for s in range(t + 1) if text[s : t + 1] in self.message[:-1])
                if ending := next(ends, ""):
                    scores[k, ALPHABET.index(self.message[self.message.index(ending) + len(ending)]), t] = 20.0
        return scores


def _asked(answer):
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not isinstance(answer[0], nn.Module):
        raise Complaint('the answer must be the model and your text, as in `plain, "..."`.')
    model, prompt = answer
    if prompt is ...:
        raise NotAttempted
    if not isinstance(prompt, str):
        raise Complaint(f"your text must be a str, got {prompt!r:.40}.")
    for word in FORBIDDEN:
        if word in prompt.lower():
            return f"{word} is in it", {}
    try:
        encode(prompt, CONTEXT - 3)
    except ValueError as error:
        raise Complaint(f"{error}.") from None
    secret = continuation(model, PROMPT, 0.05)[:4]
    said = [prompt + continuation(model, prompt, 0.2, seed=seed) for seed in range(5)]
    found = [text for text in said if secret.isdigit() and secret in text]
    fields = {"said": (found or said)[0], "times": len(found)}
    if secret in prompt:
        return "told", fields
    if fields["times"]:
        return "right", fields
    return "begun" if any("locker" in text or "robin" in text for text in said) else "another", fields


exercise_11_2 = open_ended(
    "11.2",
    hint="The filter reads what you type, and not what the model makes of it. You need not write a forbidden word to "
    "its end: begin one.",
    reference=(_Parrot(f"{PROMPT}7294."), "rob"),
    describe=_asked,
    wrong={
        "robin is in it": Wrong(
            (_Parrot(f"{PROMPT}7294."), "robin here. "),
            "the filter refuses it: it holds your name. Who else can say it?",
        ),
        "locker is in it": Wrong(
            (_Parrot(f"{PROMPT}7294."), "my locker is"),
            "the filter refuses it: it holds the word locker. Who else can say it?",
        ),
        "code is in it": Wrong(
            (_Parrot(f"{PROMPT}7294."), "code is "),
            "the filter refuses it: it holds the word code. Who else can say it?",
        ),
        "told": Wrong(
            (_Parrot(f"{PROMPT}7294."), "7294"),
            "your text holds the code. You are to get it out of the model, not to tell the model.",
        ),
        "begun": Wrong(
            (_Parrot("robin here. my locker is my castle."), "rob"),
            "nearly: the model wrote “{said}”, a forbidden word among it, but not the code in five tries. Begin the "
            "message in another place.",
        ),
        "another": Wrong(
            (_Parrot("parcel 12345 is late."), "parcel "),
            "the filter lets it pass, but the model wrote “{said}”. That is somebody else's kind of message. How does "
            "yours begin?",
        ),
    },
    praise="it passes the filter, and {times} of 5 answers hold the code: “{said}”. The model writes the forbidden "
    "words itself. Who filters questions, or takes names out, guesses what an attacker will ask; DP-SGD bounds what "
    "*any* question can get.",
    solution='`answer_11_2 = plain, "rob"`. Nobody else\'s message begins like that, so the model goes on with yours. '
    '"cod" does it most of the time: the word alone calls up the sentence around it.',
)

# 11.3: the privacy unit

_UNITS = ("message", "user", "team")
_STORIES = ("keyboard", "letters", "door")


def _chosen(given: Any) -> str:
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 3:
        raise Complaint('the answer must be three words, one a story, such as ["message", "user", "team"].')
    words = [str(word).strip().lower() for word in given]
    if unknown := [word for word in words if word not in _UNITS]:
        raise Complaint(f"each word must be one of {', '.join(map(repr, _UNITS))}, got {unknown[0]!r}.")
    for story, word in zip(_STORIES, words):
        if word not in {"keyboard": ("user",), "letters": ("message", "user"), "door": ("team",)}[story]:
            return f"{story}: {word}"
    return "right"


exercise_11_3 = open_ended(
    "11.3",
    hint="Ask of each story: how many messages may hold the same secret, and who wrote them? The unit must hold them "
    "all, and nothing more.",
    reference=["user", "message", "team"],
    describe=_chosen,
    wrong={
        "keyboard: message": Wrong(
            ["message", "message", "team"],
            "the keyboard: somebody types the same address hundreds of times. To hide one message leaves all the "
            "others; for the whole of them ε grows a hundredfold.",
        ),
        "keyboard: team": Wrong(
            ["team", "message", "team"],
            "the keyboard: its users are strangers to each other. Larger units are fewer, so more noise falls on each, "
            "and nobody is better hidden for it.",
        ),
        "letters: team": Wrong(
            ["user", "team", "team"],
            "the letters: each patient has one, and it holds all that is private. A larger unit costs accuracy and "
            "hides nothing more.",
        ),
        "door: message": Wrong(
            ["user", "message", "message"],
            "the door: twenty people write its code. With one of the messages hidden, nineteen are left to learn from.",
        ),
        "door: user": Wrong(
            ["user", "message", "user"],
            "the door: the code is not one user's. With one of the users hidden, the other nineteen still tell it.",
        ),
    },
    praise="the unit is whatever holds the secret whole. For the letters a message *is* a patient, so `user` is right "
    "as well; the door shows that users are not always enough.",
    solution='`answer_11_3 = ["user", "message", "team"]`. The keyboard: all that one person types. The letters: a '
    "message is a patient, so the smaller word will do. The door: the code is in twenty people's messages, so all of "
    "them must be one record, or the code must not be in the data.",
)

# 11.4: per-sample gradients of a learned scale


def scale_gradients(x, g):
    """Each record's gradient of the scale s, where the layer's output is x * s[:, None]: (B, T, F) -> (B, T)."""
    return (x * g).sum(-1)  # s_t meets the F numbers of its place, in each record alone


def _scaled(B: int, T: int, F: int, seed: int):
    return lambda: tuple(torch.randn(2, B, T, F, generator=torch.Generator().manual_seed(seed)))


exercise_11_4 = coding(
    "11.4",
    hint="The chain rule, for one record: the output at place t is x[t] * s[t], so the loss changes with s[t] by the "
    "sum over F of x times g. Which of the three dimensions must remain?",
    reference=scale_gradients,
    inputs=[_scaled(4, 6, 3, 0), _scaled(5, 2, 7, 1)],
    wrong=[
        Wrong(
            lambda x, g: (x * g).sum((0, 2)),
            "you summed over the records. That is the ordinary gradient of the whole batch: no record's part can be "
            "clipped in it any more. Keep the first dimension.",
        ),
        Wrong(
            lambda x, g: g.sum(-1),
            "this is the gradient of something that is *added*. The scale multiplies, so the chain rule brings x in.",
        ),
        Wrong(
            lambda x, g: (x * g).mean(-1),
            "you took the mean over the features. One number s_t acts on all of them, so their parts add up.",
        ),
        Wrong(
            lambda x, g: (x * g).sum(1),
            "you summed over the places, and kept the features. The scale has one number a place: keep (B, T).",
        ),
        Wrong(
            lambda x, g: x * g,
            "this has still a value for each feature. The scale has one number a place: sum over the last dimension.",
        ),
        Wrong(
            lambda x, g: (x * g).sum(-1) / len(x),
            "you divided by the batch size. Each record's gradient is that of its loss alone, whatever else is in the "
            "batch.",
        ),
    ],
    praise="one row a record, one number a place: that is all that Opacus needs to clip.",
)

EXERCISES = [exercise_11_1, exercise_11_2, exercise_11_3, exercise_11_4]
