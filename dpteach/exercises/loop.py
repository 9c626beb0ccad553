"""Notebook 01: where a training loop learns about a record, and how that shows from outside."""

import copy
import functools

import numpy as np
import torch
import torch.nn.functional as F

from dpteach.data import Data, two_moons
from dpteach.exercises.core import Complaint, Wrong, as_number, attempted, changed, coding, value, with_model
from dpteach.mechanism import per_sample_gradients
from dpteach.models import mlp
from dpteach.settings import Settings
from dpteach.training import train

# 1.1: what one step does to the weights


def plain_update(model, X, y, lr):
    loss = F.cross_entropy(model(X), y)  # the mean over the batch
    gradients = torch.autograd.grad(loss, model.parameters())
    return -lr * torch.cat([g.flatten() for g in gradients])


def _batch(seed: int, inputs: int, size: int, lr: float) -> tuple:
    """A model, a batch and a learning rate; from the step before, a gradient is left in the model."""
    generator, model = torch.Generator().manual_seed(seed), mlp(inputs, 4, 3, seed=seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    X = 2 * torch.randn(size, inputs, generator=generator)
    return model, X, torch.randint(0, 3, (size,), generator=generator), lr


def _joined(gradients):
    return torch.cat([g.flatten() for g in gradients])


def _from_loss(loss_of):
    """An answer that takes the gradient of another loss."""
    return lambda model, X, y, lr: -lr * _joined(torch.autograd.grad(loss_of(model(X), y), list(model.parameters())))


def _left_over(model, X, y, lr):
    F.cross_entropy(model(X), y).backward()  # adds to what is there
    return -lr * _joined(p.grad for p in model.parameters())


exercise_1_1 = coding(
    "1.1",
    hint="First the loss of the batch: `F.cross_entropy(model(X), y)`. Then its gradient: `torch.autograd.grad(loss, "
    "model.parameters())` returns a tuple of tensors, one for each layer's weights and biases. `g.flatten()` makes a "
    "vector of each, `torch.cat` joins them.",
    reference=plain_update,
    inputs=[lambda: _batch(0, 5, 7, 0.5), lambda: _batch(1, 2, 1, 2.0), lambda: _batch(2, 3, 40, 0.1)],
    observe=with_model,
    rtol=1e-5,
    atol=1e-7,
    wrong=[
        Wrong(
            lambda *args: -plain_update(*args),
            "the sign is turned round. The gradient points to where the loss grows, so the step goes the other way: "
            "minus the learning rate times the gradient.",
        ),
        Wrong(
            changed(plain_update, lr=1.0), "the learning rate is missing: a step adds minus `lr` times the gradient."
        ),
        Wrong(
            _from_loss(lambda outputs, y: F.cross_entropy(outputs, y, reduction="sum")),
            "your update is as many times too long as there are records in the batch: you added their losses up. The "
            "loop takes the mean.",
        ),
        Wrong(
            _from_loss(lambda outputs, y: F.cross_entropy(outputs, y) / len(y)),
            "you divided by the number of records twice: `F.cross_entropy` is a mean already.",
        ),
        Wrong(
            lambda model, X, y, lr: _joined(p.detach() for p in model.parameters()) + plain_update(model, X, y, lr),
            "these are the weights after the step. The question is what the step *adds* to them.",
        ),
        Wrong(
            _left_over,
            "your gradient still has that of the step before in it: `backward()` adds to what is there. The loop calls "
            "`zero_grad()` first; `torch.autograd.grad` needs no such call.",
        ),
        Wrong(
            lambda model, X, y, lr: (
                -lr
                * _joined(
                    torch.autograd.grad(F.cross_entropy(model(X), y), [p for p in model.parameters() if p.ndim > 1])
                )
            ),
            "the biases are missing. They are parameters too, and learn from your record like the rest.",
        ),
        Wrong(
            _from_loss(lambda outputs, y: F.cross_entropy(outputs.softmax(dim=1), y)),
            "you put the outputs through a softmax first. `F.cross_entropy` does that itself: give it the model's "
            "outputs as they are.",
        ),
        Wrong(
            lambda model, X, y, lr: plain_update(model, X[:1], y[:1], lr),
            "this is the update of the first record alone. The loss is the mean over the whole batch.",
        ),
    ],
    praise="that is all a step is: the mean of the records' gradients, times minus the learning rate. Your record gets "
    "into the model through your term of that mean, and in no other way.",
)

# 1.2: the loudest record

LIMIT = 2.0  # what a check before training lets pass, in both coordinates: about the range of the data
LOUD = 1.4  # times the longest gradient in the data


def loudest_record(model, data):
    corners = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])  # as far out as is allowed
    with torch.no_grad():
        logits = model(corners)
    labels = logits.argmin(dim=1)  # there, the label that the model finds least likely
    loudest = F.cross_entropy(logits, labels, reduction="none").argmax()
    return corners[loudest], labels[loudest]


def near(rank, label):
    """An answer: beside the record at ``rank`` (0 ... 1) by how sure the model is of it, with ``label(logits)``."""

    def answer(model, data):
        logits = model(data.X).detach()
        row = (logits[:, 0] - logits[:, 1]).abs().argsort()[int(rank * len(logits))]
        return data.X[row] + 0.001, label(logits[row])

    return answer


@functools.cache
def _trained():
    data, model = two_moons(2000, seed=0), mlp(seed=0)
    for _ in train(model, data, Settings(epochs=20, lr=0.05), method="sgd"):
        pass
    return model, data


# How the model of 1.2 is turned: each of the four corners, and each label, is the loudest once.
TURNS = (((1.0, 1.0), False), ((-1.0, 1.0), True), ((1.0, -1.0), True), ((-1.0, -1.0), False))


def turned(flip, swap):
    """The trained model and its data, with the coordinates times ``flip``; ``swap``: with the labels swapped."""
    model, data = copy.deepcopy(_trained())
    flip = torch.tensor(flip)
    with torch.no_grad():
        model[1].weight.mul_(flip)
        if swap:
            model[3].weight.copy_(model[3].weight.flip(0))
            model[3].bias.copy_(model[3].bias.flip(0))
    return model, Data(data.X * flip, 1 - data.y if swap else data.y)


def _what_it_does(fn, args):
    """The record that ``fn`` returns, in a few words: how loud it is, and if it is not, why not."""
    model, data = args
    X, y = data.X.clone(), data.y.clone()
    record = attempted(with_model(fn, (model, data)))
    if not (torch.equal(data.X, X) and torch.equal(data.y, y)):
        raise Complaint("your function changes the data in place. Make a new tensor instead.")
    x, y = _record(record)
    if not x.isfinite().all() or x.abs().max() > LIMIT:
        return "outside"
    if y not in (0, 1):
        return "no such label"
    loudest = _loudness(model, data.X, data.y).max()
    if _loudness(model, x.unsqueeze(0), torch.tensor([y]))[0] >= LOUD * loudest:
        return "loud"
    if ((x == data.X).all(dim=1) & (data.y == y)).any():
        return "a record of the data"
    with torch.no_grad():
        lead = membership_scores(model(x.unsqueeze(0)), torch.tensor([y])).item()
    if abs(lead) < 0.5:
        return "undecided"
    if lead < 0:
        return "a wrong label, but not far enough"
    return "far, with the expected label" if (x.abs() > data.X.abs().amax(dim=0)).any() else "quiet"


def _on_every_model(fn, args):
    """The same for several models: the first word that is not "loud"."""
    words = []
    for model, data in args:
        words.append(_what_it_does(fn, (model, data)))
        if words[-1] != "loud":
            return words[-1] if len(words) == 1 else "loud for one model only"
    return "loud"


def _loudness(model, X, y):
    return per_sample_gradients(model, F.cross_entropy, X, y).norm(dim=1)


def _record(record):
    if not isinstance(record, (tuple, list)) or len(record) != 2:
        raise Complaint(f"your function must return a pair (x, y), got a {type(record).__name__}.")
    x, y = record
    if isinstance(x, np.ndarray):
        x = torch.as_tensor(x)
    if not isinstance(x, torch.Tensor) or x.shape != (2,):
        found = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise Complaint(f"x must be a tensor of shape (2,), got {found}.")
    label = as_number(y)
    if label is None:
        raise Complaint(f"y must be a label, 0 or 1, got a {type(y).__name__}.")
    return x.detach().float(), int(label) if label in (0, 1) else -1


exercise_1_2 = coding(
    "1.2",
    hint="The gradient is large where the model is sure and wrong, and it grows with the coordinates of the record. "
    "Try the four corners that are allowed. Which label does the model not expect there?",
    reference=loudest_record,
    inputs=[lambda: tuple(turned(*how) for how in TURNS)],
    observe=_on_every_model,
    wrong=[
        Wrong(
            lambda model, data: (x := torch.tensor([LIMIT, LIMIT]), model(x.unsqueeze(0))[0].argmax()),
            "your record lies at the edge, but it has the label that the model expects there. Then the loss is nearly "
            "0, and the gradient too. Being extreme is not enough: the model must also be wrong about the record.",
        ),
        Wrong(
            near(0, torch.argmin),
            "you chose a record that the model is unsure about. There, the probability of its label is about one half, "
            "so the error that goes into the gradient is one half as well. A label that the model is sure is wrong "
            "gives twice that, and more at the edge of what is allowed.",
        ),
        Wrong(
            lambda model, data: data[_loudness(model, data.X, data.y).argmax()],
            "this record is in the data already, so it cannot be louder than all of them. You need not choose from the "
            "data: the loop takes any record that a person hands in.",
        ),
        Wrong(
            near(0.5, torch.argmin),
            "the model is wrong about your record, which is what you want. But the gradient of the first layer is the "
            "error times the record's coordinates, and yours are too small. Go to the edge of what is allowed.",
        ),
        Wrong(
            near(0.5, torch.argmax),
            "the model already gives this record its label, so there is little left to learn from it. Loud records are "
            "those that the model is sure about, and wrong.",
        ),
        Wrong(
            lambda model, data: loudest_record(*_trained()),
            "your record is loud for the model of this notebook, but your function gets other models too. What is loud "
            "for one is quiet for another: ask `model` inside your function.",
        ),
        Wrong(
            lambda model, data: (torch.tensor([-1e6, 1e6]), 1),
            "both coordinates must be finite and lie between -2 and 2: other records are rejected before training. "
            "(Without such a check, the gradient has no limit at all.)",
        ),
        Wrong(
            lambda model, data: (torch.tensor([-LIMIT, LIMIT]), 2),
            "the label must be 0 or 1. The loss of any other label is an error, so the loop would stop.",
        ),
    ],
    praise="one record is louder than all 2,000 of the data, and it passes the check on its values. Nothing in the "
    "loop limits what one record does to the update. Notebook 02 puts such a limit there.",
)

# 1.3: the attack's score


def membership_scores(logits, labels):
    rows = labels.unsqueeze(1)  # (n, 1): one column per record
    given = logits.double().gather(1, rows).squeeze(1)
    others = logits.double().scatter(1, rows, -torch.inf)  # a copy in which the record's own label can't win
    return given - others.amax(dim=1)


def _own(logits, labels):
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def _lead(logits, labels, fill):
    return _own(logits, labels) - logits.scatter(1, labels.unsqueeze(1), fill).amax(dim=1)


def _logits(scale: float):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(40, 10, generator=generator), torch.randint(0, 10, (40,), generator=generator)


exercise_1_3 = coding(
    "1.3",
    hint="`logits.gather(1, labels.unsqueeze(1))` takes each record's own logit. For the best of the others, first put "
    "minus infinity in place of that logit: `logits.scatter(1, labels.unsqueeze(1), -torch.inf)` makes a changed copy.",
    reference=membership_scores,
    inputs=[
        lambda: _logits(1.0),
        lambda: _logits(5.0),
        lambda: (torch.tensor([[40.0, 0.0, -1.0], [60.0, 3.0, 1.0], [-2.0, 0.5, 90.0]]), torch.tensor([0, 0, 2])),
        lambda: (torch.tensor([[-1.0, -3.0], [-5.0, -2.0], [-1e6, -2e6], [-0.5, -0.5]]), torch.tensor([0, 0, 1, 1])),
        lambda: (torch.tensor([[0.1, 0.7, 0.3]], dtype=torch.float64), torch.tensor([2])),
    ],
    dtype=(
        torch.float64,
        "In float32, leads that differ a little become equal, and the attack can't order them: `logits.double()`.",
    ),
    rtol=1e-9,
    atol=1e-9,
    wrong=[
        Wrong(
            lambda logits, labels: F.cross_entropy(logits.double(), labels, reduction="none"),
            "this is the loss. It is low for the records that the model has memorised, so it points the wrong way "
            "round: the attack would call the members non-members.",
        ),
        Wrong(
            lambda logits, labels: -F.cross_entropy(logits, labels, reduction="none"),
            "minus the loss points the right way, but it ends at 0. For a lead of 40 and for a lead of 90 it is "
            "exactly 0: the records that the model knows best all get one score, and the attack can't order them. Stay "
            "with the logits.",
        ),
        Wrong(
            lambda logits, labels: _own(logits.softmax(dim=1), labels),
            "the probability of the label ends at 1. For a lead of 40 and for a lead of 90 it is exactly 1: the "
            "records that the model knows best all get one score. Stay with the logits, before the softmax.",
        ),
        Wrong(
            lambda logits, labels: -logits.topk(2, dim=1).values.diff(dim=1).squeeze(1),
            "you measure how sure the model is of its own prediction. It may be sure of another label than the "
            "record's. The question is if the model has learned the label that this record came with.",
        ),
        Wrong(
            lambda logits, labels: logits.softmax(dim=1).amax(dim=1),
            "this is the probability of the label that the model predicts, and your function never looks at the "
            "labels. A model that contradicts a record's label has not memorised that record.",
        ),
        Wrong(
            lambda logits, labels: (
                _own(logits, labels) - (logits.sum(dim=1) - _own(logits, labels)) / (logits.shape[1] - 1)
            ),
            "you subtract the mean of the other logits. One strong rival among nine weak ones then counts for little. "
            "Compare the label with its best rival.",
        ),
        Wrong(
            lambda logits, labels: _own(logits, labels) - logits.amax(dim=1),
            "your maximum includes the label itself. So every record that the model gets right scores exactly 0, and "
            "the members, which are nearly all right, can't be ordered. Leave the label out first.",
        ),
        Wrong(
            lambda logits, labels: _lead(logits.double(), labels, 0.0),
            "you put 0 in the place of the record's own logit. Where all others are below 0, this 0 is the best rival, "
            "and there is no such logit. Put minus infinity there: it never wins.",
        ),
        Wrong(
            lambda logits, labels: _lead(logits.float(), labels, -torch.inf).double(),
            "you computed in float32, and made float64 of the result: the digits were lost before. Start from "
            "`logits.double()`.",
        ),
        Wrong(
            lambda logits, labels: (_own(logits, labels) - _own(logits, (labels + 1) % logits.shape[1])).double(),
            "you compare with one certain other label. The best rival is another one for each record: take the largest "
            "of all the others.",
        ),
        Wrong(
            _own,
            "this is the label's logit alone. Adding 5 to all logits of a record changes nothing for the model, but "
            "changes your score. Compare the label with its best rival.",
        ),
        Wrong(
            lambda logits, labels: -membership_scores(logits, labels),
            "the sign is turned round: you subtract the label's logit from its best rival's. The attack would call the "
            "members non-members.",
        ),
        Wrong(
            lambda logits, labels: membership_scores(logits, labels).mean(),
            "you return one number for all records together. An attack asks about one person, so it needs one score "
            "per record.",
        ),
    ],
    praise="one score per record: above 0 where the model says the given label, and higher the more sure it is, "
    "without a ceiling.",
)

# 1.4: what an answer of the attack is worth

exercise_1_4 = value(
    "1.4",
    hint="Imagine 10,000 people. How many are members, and how many of these does the attack call members? How many of "
    "the others?",
    answer=0.9 * 0.01 / (0.9 * 0.01 + 0.1 * 0.99),
    share=True,
    wrong=[
        Wrong(
            0.9,
            "0.9 is the share of the members that the attack finds. The question goes the other way: of those that it "
            "names, how many are members?",
        ),
        Wrong(
            0.1,
            "0.1 is the share of the non-members that the attack names by mistake. How many people is that, when 99 of "
            "100 are non-members?",
        ),
        Wrong(0.01, "0.01 is the share of members before the attack has spoken. Its answer does tell you something."),
        Wrong(
            0.009,
            "0.009 is the share of all people that are members *and* are named. Divide it by the share of people that "
            "are named.",
        ),
        Wrong(0.108, "0.108 is the share of all people that are named. Which part of these are members?"),
        Wrong(0.099 / 0.108, "this is the share of the named people that are *not* members. You want the others."),
    ],
    praise="about 1 in 12. It was 1 in 100 before. The attack multiplied the odds by nine (0.9 / 0.1), and still most "
    "of the people that it names are not members.",
    solution="Of 10,000 people 100 are members, and the attack names 90 of them. Of the 9,900 others it names 990. So "
    "of the 1,080 people that it names, 90 are members: $90 / 1080 \\approx 0.083$.",
)

EXERCISES = [exercise_1_1, exercise_1_2, exercise_1_3, exercise_1_4]
