"""Every exercise: its reference answer passes, every wrong answer that it knows gets its own sentence."""

import copy
import math
import signal
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from verdicts import unexpected

import dpteach
from dpteach import exercises
from dpteach.exercises import core, noise
from dpteach.exercises.core import Wrong, coding, examine

ALL = exercises.every()
CODING = [e for e in ALL if callable(e.reference)]
IDS = [e.id for e in ALL]
for_each = pytest.mark.parametrize("exercise", ALL, ids=IDS)


@for_each
def test_the_reference_answer_is_right(exercise):
    verdict = exercises.check(exercise.id, exercise.reference)
    assert verdict.passed is True, verdict
    assert repr(verdict).startswith("Right: ")


@for_each
def test_a_known_wrong_answer_gets_its_own_sentence(exercise):
    verdicts = [exercises.check(exercise.id, wrong.answer) for wrong in exercise.wrong]
    assert [(v.passed, v.message) for v in verdicts] == [(False, wrong.message) for wrong in exercise.wrong]


def noise_from_elsewhere(*args):
    return noise.noisy_mean_gradient(*args[:-1], generator=None)


def batch_from_elsewhere(n, sample_rate, generator):
    return noise.poisson_batch(n, sample_rate, generator=None)


@pytest.mark.parametrize("id, answer", [("3.1", noise_from_elsewhere), ("3.2", batch_from_elsewhere)])
def test_the_verdict_on_an_answer_with_random_numbers_is_no_matter_of_chance(id, answer):
    verdicts = set()
    for seed in (3, 14, 15, 92, 65):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        verdicts.add(exercises.check(id, answer))
        assert torch.equal(torch.get_rng_state(), before)  # the learner's own numbers go on as if there were no check
    assert len(verdicts) == 1 and "generator=generator" in verdicts.pop().message


def test_two_equal_batches_are_no_proof_that_the_seed_was_used():
    """Half of the batches are empty here, so two of them are often equal."""
    args = (1, 0.5, torch.Generator())
    for seed in range(20):
        torch.manual_seed(seed)
        assert noise._repeats(lambda: batch_from_elsewhere(*args), args[2]) == 0
        assert noise._repeats(lambda: noise.poisson_batch(*args), args[2]) == 1


def test_wrong_answers_of_one_exercise_have_different_sentences():
    messages = {e.id: sorted(w.message for w in e.wrong) for e in ALL}
    assert messages == {id: sorted(set(sentences)) for id, sentences in messages.items()}


def test_a_coding_exercise_knows_at_least_four_wrong_answers():
    assert [e.id for e in CODING if len(e.wrong) < 4] == []


@for_each
def test_an_answer_that_was_not_attempted_gets_one_line_that_says_so(exercise):
    answers = [None, ..., NotImplemented]
    if callable(exercise.reference):
        answers += [lambda *args, **kwargs: ..., lambda *args, **kwargs: None]
    found = [exercises.check(exercise.id, answer) for answer in answers]
    assert [(v.passed, "\n" in repr(v)) for v in found] == [(None, False)] * len(answers), found


def test_a_function_that_raises_gets_a_sentence():
    def raises(*args, **kwargs):
        raise KeyError("oops")

    assert unexpected((e.id, raises, False, "KeyError") for e in CODING) == ""


@for_each
def test_an_answer_of_the_wrong_type_gets_a_sentence(exercise):
    wrong = ["text", 3 + 4j, [1, 2], object(), torch.zeros(3), float("nan")]
    returned = [lambda *args, value=value, **kwargs: value for value in wrong] if callable(exercise.reference) else []
    found = [(answer, exercises.check(exercise.id, answer)) for answer in wrong + returned]
    assert [(a, v) for a, v in found if v.passed is not False or not v.message.endswith(".")] == []


def test_cmp_says_exact_close_or_how_far_apart(capsys):
    theirs = torch.tensor([1.0, -200.0])
    others = (theirs.clone(), theirs + 1e-4, theirs + 0.5, theirs * torch.nan, theirs[:1], (theirs + 1).numpy(), None)
    for mine in (*others, ...):
        exercises.cmp("mine and theirs", mine, theirs)
    exercises.cmp("mine and theirs", torch.zeros(0), torch.zeros(0))
    lines = [line.removeprefix("mine and theirs: ") for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "exact",
        "close, to a millionth",
        "they differ, by up to 0.5; the largest value is 2e+02",
        "they differ, by up to nan; the largest value is 2e+02",
        "shapes differ, (1,) and (2,)",
        "they differ, by up to 1; the largest value is 2e+02",
        "nothing to compare yet",
        "nothing to compare yet",
        "exact",
    ]


def test_an_exercise_has_a_hint_and_a_solution():
    short = [e.id for e in ALL if min(len(exercises.hint(e.id)), len(exercises.solution(e.id))) <= 20]
    assert short == []
    assert [e.id for e in ALL if exercises.hint(e.id) not in exercises.folded(e.id)] == []


def test_ids_are_unique_and_in_order():
    assert sorted(set(IDS), key=lambda id: [int(part) for part in id.split(".")]) == IDS


@pytest.mark.parametrize("id", ["20.1", "2.99", "x"])
def test_an_unknown_id_is_one_error_that_lists_the_known_ones(id):
    with pytest.raises(ValueError, match=f"id must .*got '{id}'"):
        exercises.check(id, None)


DOUBLE = coding(
    "0.1",
    hint="h",
    reference=lambda x: x * 2,
    inputs=[lambda: (torch.tensor([1.0, 2.0]),)],
    praise="p.",
    wrong=[Wrong(lambda x: x * 3, "you tripled it.")],
)


def in_place(x):
    x *= 2
    return x


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (lambda x: x * 2, "p."),
        (lambda x: x * 3, "you tripled it."),
        (in_place, "changes its input in place"),
        (lambda x: (x * 2).tolist(), "must return a Tensor, got a list"),
        (lambda x: x.sum(), "must return a tensor of shape (2,), got ()"),
        (lambda x: x * 2.5, "largest difference is 1"),
        (lambda: 0, "your function raised TypeError"),
    ],
)
def test_the_engine_tells_apart_the_ways_to_be_wrong(answer, sentence):
    assert sentence in examine(DOUBLE, answer).message


def never_ends(x):
    while True:
        pass


def swallows(x):
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except BaseException:
            continue


def sleeps(x):
    time.sleep(60)


def exits(x):
    sys.exit("bye")


def interrupts(x):
    raise KeyboardInterrupt


def recurs(x):
    return recurs(x)


def too_big(x):
    raise MemoryError


class Unprintable(BaseException):
    def __str__(self):
        raise ValueError


def raises_what_cannot_be_printed(x):
    raise Unprintable


class Hostile:
    """Every question to it is an error."""

    def _no(self, *args):
        raise ValueError("no")

    __eq__ = __bool__ = __float__ = __len__ = __iter__ = __repr__ = __str__ = __deepcopy__ = __format__ = __hash__ = _no

    def __getattr__(self, name):
        raise ValueError("no")


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(core, "TIME_LIMIT", 0.3)


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (never_ends, "your function did not finish within 0.3 seconds: does its loop end?"),
        (swallows, "your function did not finish within 0.3 seconds: does its loop end?"),
        (sleeps, "your function did not finish within 0.3 seconds: does its loop end?"),
        (exits, "your function ends Python (`sys.exit`). Use `return`."),
        (interrupts, "your function raised KeyboardInterrupt."),
        (recurs, "your function calls itself without end (RecursionError). It was called with a tensor of shape (2,)."),
        (
            too_big,
            "your function needs more memory than there is (MemoryError). It was called with a tensor of shape (2,).",
        ),
        (raises_what_cannot_be_printed, "your function raised Unprintable."),
    ],
)
@pytest.mark.parametrize("thread", ["main", "other"])
def test_whatever_an_answer_does_ends_in_a_sentence(answer, sentence, thread, short_limit):
    found = []
    streams = sys.stdout, sys.stderr
    began = time.monotonic()
    if thread == "main":
        found.append(examine(DOUBLE, answer))
    else:  # a cell that JupyterLab runs in a subshell
        other = threading.Thread(target=lambda: found.append(examine(DOUBLE, answer)))
        other.start()
        other.join()
    assert found == [core.Verdict(False, sentence)]
    assert time.monotonic() - began < 30 and streams == (sys.stdout, sys.stderr)
    assert examine(DOUBLE, lambda x: x * 2).passed  # and the next check is a check


@for_each
def test_a_hostile_object_gets_a_sentence(exercise):
    answers = (Hostile(), Hostile, lambda *args, **kwargs: Hostile(), (Hostile(), Hostile()), iter(()))
    found = [exercises.check(exercise.id, answer) for answer in answers]
    assert [v for v in found if v.passed is not False or not v.message.endswith(".") or not repr(v)] == []


def test_a_late_function_is_ended_and_not_left_running(short_limit):
    turns = []

    def counts(x):
        while True:
            turns.append(1)

    assert examine(DOUBLE, counts).passed is False
    counted = len(turns)
    time.sleep(0.1)
    assert len(turns) == counted > 0


def test_a_check_inside_of_an_answer_is_refused_and_leaves_no_lock():
    seen = []

    def checks(x):
        seen.append(exercises.check("2.1", checks))
        return x * 2

    assert examine(DOUBLE, checks).passed
    assert seen == [core.Verdict(False, "call `check` in a cell of its own, not in your function.")]


def test_many_calls_together_have_a_limit_too(monkeypatch):
    monkeypatch.setattr(core, "EXAMINATION_LIMIT", 0.3)
    slow = coding("0.2", hint="h", reference=lambda: 1.0, inputs=[lambda: ()] * 100, praise="p.", wrong=[])
    verdict = examine(slow, lambda: time.sleep(0.05) or 1.0)
    assert verdict.passed is False and "not over after 0.3 seconds" in verdict.message


@pytest.mark.skipif(sys.platform == "win32", reason="a process can't send itself an interrupt there")
def test_an_interrupt_by_the_learner_is_one_sentence_and_ends_the_function():
    turns = []

    def counts(x):
        while True:
            turns.append(1)

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a program that was started in the background ignores it
    try:
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
        timer.start()
        verdict = examine(DOUBLE, counts)
    finally:
        signal.signal(signal.SIGINT, before)
    assert verdict == core.Verdict(False, "you stopped the check before it was over.")
    counted = len(turns)
    time.sleep(0.1)
    assert len(turns) == counted > 0


def test_prints_are_shown_once_and_cut(capsys):
    calls = []

    def prints(x):
        calls.append(1)
        for k in range(1000):
            print(f"call {len(calls)}, line {k}")
        print("warning", file=sys.stderr)
        return x * 2

    many = coding("0.3", hint="h", reference=lambda x: x * 2, inputs=[lambda: (1.0,)] * 50, praise="p.", wrong=[])
    verdict = examine(many, prints)
    assert verdict.passed and verdict.message == "p."
    assert verdict.printed.splitlines() == ["...", *(f"call 1, line {k}" for k in range(996, 1000)), "warning"]
    assert repr(verdict).endswith("    warning") and len(repr(verdict).splitlines()) == 9
    assert capsys.readouterr() == ("", "")
    print("now")
    assert capsys.readouterr().out == "now\n"


def test_what_other_threads_print_during_a_check_is_not_taken(capsys):
    def waits(x):
        other = threading.Thread(target=print, args=["from the slider's thread"])
        other.start()
        other.join()
        return x * 2

    assert examine(DOUBLE, waits).printed == ""
    assert capsys.readouterr().out == "from the slider's thread\n"


def test_a_function_that_prints_and_returns_nothing_hears_of_return():
    verdict = examine(DOUBLE, lambda x: print(x * 2))
    assert verdict.passed is False and "`return`" in verdict.message and verdict.printed == "tensor([2., 4.])"


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: (x * 2).numpy(),
        lambda x: (x * 2).double(),
        lambda x: x.requires_grad_(False) * 2,
        lambda x: torch.nn.Parameter(x * 2),
    ],
)
def test_a_numpy_array_or_a_finer_tensor_is_right_where_a_tensor_is(answer):
    assert examine(DOUBLE, answer).passed


HALF = coding(
    "0.4",
    hint="h",
    reference=lambda x: x / 2,
    inputs=[lambda: (1.0,), lambda: (3.0,)],
    praise="p.",
    wrong=[Wrong(lambda x: x, "you did nothing.")],
)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, np.array, torch.tensor, Fraction])
def test_a_number_of_any_kind_is_right_where_a_number_is(kind):
    assert examine(HALF, lambda x: kind(x / 2)).passed
    assert examine(HALF, lambda x: kind(x)).message == "you did nothing."
    assert examine(HALF, lambda x: kind(x / 4)).message == "on input 1 your answer is 0.25: too low."


def test_an_answer_that_fails_on_a_late_input_is_known_by_the_earlier_ones():
    raises = coding(
        "0.31",
        hint="h",
        reference=lambda x: x.sum(),
        inputs=[lambda: (torch.ones(3),), lambda: (torch.ones(0),)],
        praise="p.",
        wrong=[Wrong(lambda x: x.max(), "this is the largest.")],
    )
    assert examine(raises, lambda x: x.max() * 1).message == "this is the largest."
    late = examine(raises, lambda x: x.sum() if len(x) else 1 / 0).message
    assert (
        late == "your function raised ZeroDivisionError: division by zero. It was called with a tensor of shape (0,)."
    )


def test_what_is_no_number_gets_a_sentence():
    for given in (True, "0.5", 0.5j, torch.tensor([0.5]), np.ones(3), torch.tensor(True)):
        message = examine(HALF, lambda x, given=given: given).message
        assert "your function must return a number, got a " in message, (given, message)


EXACT = coding(
    "0.5",
    hint="h",
    reference=lambda x: x.double() / 3,
    inputs=[lambda: (torch.tensor([1.0, 2.0]),)],
    praise="p.",
    wrong=[Wrong(lambda x: x, "you did nothing.")],
    dtype=(torch.float64, "Because."),
    rtol=1e-9,
    atol=0,
)


def test_the_dtype_that_is_asked_for_is_needed_and_the_verdict_says_why():
    assert examine(EXACT, lambda x: x.numpy().astype(float) / 3).passed
    assert (
        examine(EXACT, lambda x: x / 3).message
        == "your function must return torch.float64, got torch.float32. Because."
    )
    assert "largest difference" in examine(EXACT, lambda x: (x / 3).double()).message
    assert examine(EXACT, lambda x: x * 1).message == "you did nothing."  # a known wrong answer is known in any dtype


def test_a_trait_that_is_off_has_its_own_sentence():
    exercise = coding(
        "0.6",
        hint="h",
        reference=lambda: 2.0,
        inputs=[lambda: ()],
        praise="p.",
        wrong=[],
        observe=lambda fn, args: {"size": fn()},
        traits={"size": "{mine:g} is {times:g} times too large."},
    )
    assert examine(exercise, lambda: 6.0).message == "6 is 3 times too large."


SHARE = core.value(
    "0.7", hint="h", answer=1 / 12, praise="p.", solution="s", share=True, wrong=[Wrong(0.9, "turned round.")]
)


NUMBERS = [
    (1 / 12, True, "p."),
    ("0.0833", True, "p."),
    ("8.33 %", True, "p."),
    (" 8.3% ", True, "p."),
    (0.08, True, "p."),
    (np.float32(1 / 12), True, "p."),
    (torch.tensor([1 / 12]), True, "p."),
    (np.array(1 / 12), True, "p."),
    (8.33, False, "in percent"),
    (8, False, "in percent"),
    ("8.33", False, "in percent"),
    (0.9, False, "turned round."),
    (90, False, "taken as percent: turned round."),
    (0.07, False, "0.07 is too low."),
    (0.09, False, "0.09 is too high."),
    (10**400, False, "inf is too high."),
    (-(10**400), False, "-inf is too low."),
    (True, False, "must be a number, got a bool."),
    (np.True_, False, "must be a number"),
    ("e", False, "must be a number, got a str."),
    (math.nan, False, "nan is not"),
    (1j, False, "must be a number"),
    (torch.zeros(2), False, "must be a number, got a Tensor."),
]


def test_a_number_is_read_however_it_is_written():
    verdicts = [(given, examine(SHARE, given), passed, sentence) for given, passed, sentence in NUMBERS]
    assert [
        (given, v) for given, v, passed, sentence in verdicts if (v.passed, sentence in v.message) != (passed, True)
    ] == []


LETTER = core.choose(
    "0.8", hint="h", answer="b", praise="p.", solution="s", wrong=[Wrong("a", "not a."), Wrong("e", "not e.")]
)


def test_a_letter_is_read_however_it_is_written():
    for given in ("b", "B", "b)", "(b)", " B.", "b: because a record", "b.", "[b]", "**b**", '"b"', "b - it is"):
        assert examine(LETTER, given).passed is True, given
        other = given.replace("b", "e").replace("B", "E").replace("eecause", "because")
        assert examine(LETTER, other).message == "not e.", other


def test_what_is_no_letter_gets_the_list_of_letters():
    given = ["", "bb", "c", "a, b", "a/b", "because", 2, ["b"], np.zeros(2), "x" * 10_000]
    verdicts = [examine(LETTER, answer) for answer in given]
    assert all(v.passed is False and len(v.message) < 150 for v in verdicts), verdicts
    assert [v for v in verdicts if "must be one of 'a', 'b', 'e', got" not in v.message] == []


def test_no_verdict_shows_what_is_right():
    answers = [lambda: 1.2345, lambda: {"alice": 9.0}, lambda: {"x": 1}, lambda: [3.0], lambda: "no", lambda: None]
    for right in (9.8765, {"alice": 9.8765}, [9.8765], ["9.8765"], "9.8765", torch.tensor([9.8765])):
        exercise = coding("0.9", hint="h", reference=lambda r=right: r, inputs=[lambda: ()], praise="p.", wrong=[])
        verdicts = [repr(examine(exercise, answer)) for answer in answers]
        assert [v for v in verdicts if "9.8765" in v or "9.877" in v] == [], right


# What a sceptical learner answers. Written from the text of the exercises, not from the package's own answers.


def update_by_backward(model, X, y, lr):
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(X), y).backward()
    return torch.nn.utils.parameters_to_vector([-lr * p.grad for p in model.parameters()])


def forgets_zero_grad(model, X, y, lr):
    torch.nn.functional.cross_entropy(model(X), y).backward()
    return torch.cat([-lr * p.grad.flatten() for p in model.parameters()])


def update_by_optimizer(model, X, y, lr):
    trained = copy.deepcopy(model)
    step_in_place(trained, X, y, lr)
    pairs = zip(trained.parameters(), model.parameters())
    return torch.cat([(after.double() - before.double()).flatten() for after, before in pairs])


def step_in_place(model, X, y, lr):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(X), y).backward()
    optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters())


def update_record_by_record(model, X, y, lr):
    return sum(update_by_backward(model, X[i : i + 1], y[i : i + 1], lr) for i in range(len(y))) / len(y)


def margin_by_loop(logits, labels):
    scores = []
    for row, label in zip(logits.tolist(), labels.tolist()):
        scores.append(row[label] - max(row[:label] + row[label + 1 :]))
    return torch.tensor(scores, dtype=torch.float64)


def margin_by_topk(logits, labels):
    best = logits.double().topk(2, dim=1)
    own = logits.double()[torch.arange(len(labels)), labels]
    return own - torch.where(best.indices[:, 0] == labels, best.values[:, 1], best.values[:, 0])


def margin_by_mask(fill):
    def margin(logits, labels):
        own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
        return logits.double()[own] - logits.double().masked_fill(own, fill).max(dim=1).values

    return margin


def loud_by_search(model, data):
    draws = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) * 4 - 2
    draws = draws.sign() * draws.abs().clamp(min=1.9)
    with torch.no_grad():
        margins = model(draws)[:, 0] - model(draws)[:, 1]
    k = margins.abs().argmax()
    return draws[k].numpy(), np.int64(margins[k] > 0)


def noisy(make_noise):
    def mean(clipped, noise_multiplier, max_grad_norm, expected_batch_size, generator):
        noise = make_noise(noise_multiplier * max_grad_norm, clipped.shape[1], generator)
        return (clipped.sum(dim=0) + noise) / expected_batch_size

    return mean


def laplace_of_the_right_size(std, P, generator):
    a, b = (torch.zeros(P).exponential_(generator=generator) for _ in range(2))
    return std * (a - b) / math.sqrt(2)


def alternating(std, P, generator, kept=[]):  # noqa: B006
    kept[:] = [-kept[0]] if kept and len(kept[0]) == P else [torch.randn(P, generator=generator)]
    return std * kept[0]


def pairs(std, P, generator):
    half = torch.randn((P + 1) // 2, generator=generator)
    return std * torch.stack([half, -half], dim=1).flatten()[:P]


def batch_by_loop(n, q, generator):
    return torch.tensor([i for i in range(n) if torch.rand(1, generator=generator) < q], dtype=torch.int64)


def loop_in_pytorch(
    coins=lambda n, q, g: torch.rand(n, generator=g) < q,
    noise=lambda P, g: torch.randn(P, generator=g),
    factor=lambda norm, C: min(1.0, C / (norm + 1e-12)),
    kept=lambda batch, model, weights: (batch, weights),
):
    """A DP-SGD loop without anything of the package, parameter by parameter."""

    def loop(model, data, s, sampling, generator):
        n, steps = len(data.y), []
        rate, sizes = 1 / s.steps_per_epoch(n), [p.numel() for p in model.parameters()]
        for _ in range(s.epochs * s.steps_per_epoch(n)):
            batch = coins(n, rate, sampling).nonzero().flatten()
            total = s.noise_multiplier * s.max_grad_norm * noise(sum(sizes), generator)
            for i in batch.tolist():
                model.zero_grad()
                torch.nn.functional.cross_entropy(model(data.X[i : i + 1]), data.y[i : i + 1]).backward()
                gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
                total = total + gradient * factor(gradient.norm().item(), s.max_grad_norm)
            for p, part in zip(model.parameters(), total.split(sizes)):
                p.data = p.data - s.lr * part.view_as(p).to(p.dtype) / (n * rate)
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            steps.append(kept(batch, model, weights))
        return steps

    return loop


def at_most_as_expected(n, q, g):
    coins = torch.rand(n, generator=g) < q
    return coins & (coins.cumsum(0) <= max(1, round(n * q)))


def two_in_turn(P, g):
    """Noise that comes back in every other step."""
    drawn = two_in_turn.drawn.setdefault(g, [])
    if len(drawn) < 2 or len(drawn[0]) != P:
        drawn.append(torch.randn(P, generator=g))
    else:
        drawn.append(drawn[-2])
    return drawn[-1]


two_in_turn.drawn = {}


def clip_each(grads, C):
    return torch.stack([g * min(1.0, C / (g.norm().item() + 1e-6)) for g in grads])


def rows_by_backward(model, X, y):
    return [-update_by_backward(model, x[None], label[None], 1.0) for x, label in zip(X, y)]


def rows_by_vmap(model, X, y):
    def loss(parameters, x, label):
        outputs = torch.func.functional_call(model, parameters, (x[None],))
        return torch.nn.functional.cross_entropy(outputs, label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, X, y)
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def sum_by_backward(model, X, y, C):
    rows = rows_by_backward(model, X, y)
    return sum((row / max(1.0, row.norm().item() / C) for row in rows), torch.zeros(len(weights_of(model))))


def weights_of(model):
    return torch.nn.utils.parameters_to_vector(model.parameters())


ROWS = torch.tensor([[1.0, 0.0]])

RIGHT = [
    ("1.1", update_by_backward),
    ("1.1", update_by_optimizer),
    ("1.1", lambda *args: update_by_backward(*args).numpy()),
    ("1.1", update_record_by_record),
    ("1.2", loud_by_search),
    ("1.3", margin_by_loop),
    ("1.3", margin_by_topk),
    ("1.3", margin_by_mask(-math.inf)),
    ("1.3", margin_by_mask(-1e30)),
    ("1.3", lambda logits, labels: margin_by_loop(logits, labels).numpy()),
    ("1.4", 1 / 12),
    ("1.4", 0.08),
    ("1.4", 0.083),
    ("1.4", "8.3 %"),
    ("1.4", Fraction(1, 12)),
    ("1.4", torch.tensor(1 / 12)),
    ("2.1", clip_each),
    ("2.1", lambda g, C: g / (g.norm(dim=1, keepdim=True) / C).clamp(min=1)),
    ("2.1", lambda g, C: g.numpy() / np.maximum(np.linalg.norm(g.numpy(), axis=1, keepdims=True) / C, 1)),
    ("2.1", lambda g, C: torch.where(g.norm(dim=1, keepdim=True) > C, g * (C / g.norm(dim=1, keepdim=True)), g)),
    ("2.1", lambda g, C: torch.renorm(g, 2, 0, C)),
    ("2.2", np.array([0.0, 12.0])),
    ("2.2", [-24, 0]),
    ("2.2", torch.tensor([-1000, 3])),
    ("2.2", torch.tensor([2.5, 2.5]) * 10),
    ("2.3", 1),
    ("2.3", np.float32(1)),
    ("2.3", torch.tensor(1.0)),
    ("2.3", "1.0"),
    ("2.4", lambda *args: torch.stack(rows_by_backward(*args))),
    ("2.4", rows_by_vmap),
    ("2.4", lambda model, X, y: dpteach.per_sample_gradients(model, torch.nn.functional.cross_entropy, X, y).numpy()),
    ("2.5", sum_by_backward),
    ("2.5", lambda model, X, y, C: dpteach.clipped_sum(model, torch.nn.functional.cross_entropy, X, y, C)),
    ("3.1", noisy(lambda std, P, g: torch.normal(0.0, std, (P,), generator=g))),
    ("3.1", noisy(lambda std, P, g: torch.zeros(P).normal_(generator=g) * std)),
    ("3.1", noisy(lambda std, P, g: std * torch.randn(P, dtype=torch.float64, generator=g))),
    ("3.1", noisy(lambda std, P, g: std * torch.randn(1, P, generator=g).squeeze(0))),
    ("3.1", noisy(lambda std, P, g: -std * torch.randn(P, generator=g))),
    ("3.1", noisy(lambda std, P, g: std * torch.stack([torch.randn((), generator=g) for _ in range(P)]))),
    ("3.2", lambda n, q, g: torch.bernoulli(torch.full((n,), q), generator=g).nonzero().flatten()),
    ("3.2", lambda n, q, g: torch.arange(n)[torch.rand(n, generator=g) <= q]),
    ("3.2", lambda n, q, g: torch.where(torch.rand(n, generator=g) > 1 - q)[0]),
    ("3.2", lambda n, q, g: torch.nonzero(torch.rand(n, dtype=torch.float64, generator=g) < q).squeeze(1).numpy()),
    ("3.2", batch_by_loop),
    ("3.3", lambda: (ROWS, -ROWS[0])),
    ("3.3", lambda: [-ROWS.numpy(), ROWS[0].numpy()]),
    ("3.3", lambda: (ROWS.expand(3, 2), -ROWS[0])),
    ("3.4", loop_in_pytorch()),
    ("3.4", loop_in_pytorch(coins=lambda n, q, g: torch.bernoulli(torch.full((n,), q), generator=g) > 0)),
    ("3.4", loop_in_pytorch(noise=lambda P, g: -torch.randn(P, dtype=torch.float64, generator=g))),
]
WRONG = [
    ("1.1", step_in_place, "changes the model's weights"),
    ("1.1", lambda *args: -update_by_backward(*args), "the sign is turned round"),
    ("1.1", lambda model, X, y, lr: update_by_backward(model, X, y, lr) * len(y), "as many times too long"),
    ("1.1", lambda model, X, y, lr: update_by_backward(model, X, y, lr) / lr, "the learning rate is missing"),
    (
        "1.1",
        lambda model, X, y, lr: update_by_backward(model, X, y, lr) / len(y),
        "divided by the number of records twice",
    ),
    ("1.1", forgets_zero_grad, "that of the step before"),
    ("1.1", lambda *args: [update_by_backward(*args)], "must return a Tensor"),
    ("1.1", lambda *args: update_by_backward(*args)[:-3], "must return a tensor of shape"),
    ("1.1", lambda *args: update_by_backward(*args).half(), "largest difference"),
    ("1.2", lambda model, data: (torch.tensor([-2.0, 2.0]), 1), "other models too"),
    ("1.3", margin_by_mask(0.0), "you put 0 in the place"),
    (
        "1.3",
        lambda logits, labels: margin_by_loop(logits, labels).float(),
        "must return torch.float64, got torch.float32",
    ),
    ("1.3", lambda logits, labels: margin_by_mask(-math.inf)(logits.half(), labels), "largest difference"),
    ("1.4", 8, "in percent"),
    ("1.4", 8.3, "in percent"),
    ("1.4", 90, "taken as percent: 0.9 is the share of the members"),
    ("2.2", torch.tensor([2.5, 2.5]), "Make the row longer"),
    ("2.2", torch.tensor([0.0, 0.0]), "the result moved by 0.00·C: a row of zeros adds"),
    ("2.2", torch.tensor([0.0, 1.5]), "moved by 0.99·C, which is not more than 2·C. Clipping never moves"),
    ("2.2", torch.tensor([0.0, 1.5]), "so a row of norm 1.5 moves the result by 1.5 at most"),
    ("2.2", torch.tensor([2.5, 0.0]), "Choose another direction"),
    ("2.2", torch.tensor([99.0, 9.0]), "Choose another direction"),
    ("2.2", torch.tensor([1.0, 1j]), "must be a tensor of two numbers"),
    ("2.3", True, "must be a number, got a bool"),
    ("2.3", 0.1, "multiplied by the learning rate"),
    ("2.4", rows_by_backward, "must return a Tensor, got a list"),
    ("2.4", lambda model, X, y: torch.stack(rows_by_backward(model, X, y)).mean(0), "gradient of the whole batch"),
    ("2.4", lambda model, X, y: torch.stack(rows_by_backward(model, X, y)).cumsum(0), "all rows before it in it"),
    ("2.4", lambda model, X, y: torch.stack(rows_by_backward(model, X, y)) / len(y), "by the number of records"),
    ("2.4", lambda model, X, y: torch.stack(rows_by_backward(model, X, y)).T, "rows and columns are swapped"),
    ("2.4", lambda model, X, y: -torch.stack(rows_by_backward(model, X, y)), "largest difference"),
    ("2.4", lambda model, X, y: step_in_place(model, X, y, 0.1), "changes the model's weights"),
    (
        "2.5",
        lambda *args: dpteach.clip(torch.stack(rows_by_backward(*args[:3])), args[3]).sum(0),
        "stack expects a non-empty",
    ),
    ("2.5", lambda *args: sum_by_backward(*args[:3], 1e9), "nothing was clipped"),
    ("2.5", lambda *args: sum_by_backward(*args) / max(1, len(args[1])), "returned their mean"),
    ("2.5", lambda *args: sum_by_backward(*args[:3], args[3] / max(1, len(args[1]))), "not for the batch"),
    ("2.5", lambda *args: dpteach.clip(sum_by_backward(*args[:3], 1e9)[None], args[3])[0], "you clipped the sum"),
    ("2.3", 10**400, "without clipping there would be no limit"),
    ("3.1", noisy(pairs), "with the sign turned"),
    (
        "3.1",
        noisy(lambda std, P, g: std * torch.randn((P + 1) // 2, generator=g).repeat(2)[:P]),
        "depends on that of another",
    ),
    ("3.1", noisy(laplace_of_the_right_size), "not Gaussian"),
    ("3.1", noisy(alternating), "can be told from that of the call before"),
    (
        "3.1",
        noisy(lambda std, P, g: 2 * std * torch.randn(P, generator=g)),
        "2·σ·C. That would fit where one record is *replaced*",
    ),
    ("3.1", noisy(lambda std, P, g: 1.4 * std * torch.randn(P, generator=g)), "is 1.4 times what it must be"),
    ("3.1", lambda *args: noise.noisy_mean_gradient(*args).half(), "must return float32, got torch.float16"),
    (
        "3.1",
        lambda c, s, C, E, generator: (
            (c.sum(0) + s * C * torch.randn(c.shape[1], generator=generator)) / max(1, len(c))
        ),
        "you divided by `max(len(clipped), 1)`",
    ),
    ("3.2", lambda n, q, g: torch.randperm(n, generator=g)[: round(n * q)], "your batches always have the same size"),
    ("3.2", lambda n, q, g: torch.nonzero(torch.rand(n, generator=g) < q).squeeze(), "got torch.int64 of shape ()"),
    ("3.3", lambda: (ROWS.expand(4, 2), -ROWS[0]), "small, but not small enough"),
    ("3.3", lambda: (ROWS.expand(50, 2), -ROWS[0]), "hardly moves the mean"),
    ("3.4", loop_in_pytorch(noise=lambda P, g: 1.4 * torch.randn(P, generator=g)), "times the standard deviation"),
    ("3.4", loop_in_pytorch(noise=lambda P, g: torch.randn(1, generator=g).expand(P)), "the same in every coordinate"),
    ("3.4", loop_in_pytorch(noise=lambda P, g: torch.rand(P, generator=g)), "move 4: "),
    (
        "3.4",
        loop_in_pytorch(coins=lambda n, q, g: torch.rand(n, generator=g) < 2 * q),
        "2 times as many records as n·q",
    ),
    ("3.4", loop_in_pytorch(coins=lambda n, q, g: torch.randperm(n, generator=g) < n * q), "always have the same size"),
    ("3.4", loop_in_pytorch(coins=lambda n, q, g: torch.rand(n) < q), "do not come from `sampling`"),
    ("3.4", loop_in_pytorch(factor=lambda norm, C: C / norm), "you make every row C long"),
    (
        "3.4",
        loop_in_pytorch(noise=lambda P, g: torch.randn(P, generator=g) * (torch.arange(P) < P - 2)),
        "gets no noise",
    ),
    ("3.4", loop_in_pytorch(noise=two_in_turn), "in the difference of two"),
    (
        "3.4",
        loop_in_pytorch(coins=lambda n, q, g: torch.rand(n, generator=g) < 1.25 * q),
        "times as many records as n·q",
    ),
    ("3.4", loop_in_pytorch(coins=at_most_as_expected), "none of your batches is larger"),
    ("3.4", loop_in_pytorch(coins=lambda n, q, g: (torch.rand(1, generator=g) < q).expand(n)), "move 1: "),
    (
        "3.4",
        lambda model, data, s, sampling, noise: loop_in_pytorch()(
            model, data, s, sampling, noise.manual_seed(sampling.initial_seed() + noise.initial_seed())
        ),
        "does not come from `noise`",
    ),
    ("3.4", loop_in_pytorch(kept=lambda batch, model, weights: batch), "a pair for each step"),
    ("3.4", loop_in_pytorch(kept=lambda batch, model, weights: (len(batch), weights)), "indices of records"),
    ("3.4", loop_in_pytorch(kept=lambda batch, model, weights: (batch, weights[:5])), "must be all weights in one row"),
    ("3.4", loop_in_pytorch(kept=lambda batch, model, weights: (batch, weights + 1)), "are not the model's"),
    ("3.4", lambda *args: loop_in_pytorch()(*args) and None, "returns nothing"),
    ("3.4", lambda *args: loop_in_pytorch()(*args)[:-1], "steps of"),
    ("3.4", lambda *args: [loop_in_pytorch()(*args)[-1]] * args[2].epochs, "all your steps hold the same tensor"),
]


@pytest.mark.parametrize("n", "123")
def test_a_right_answer_of_another_kind_is_right(n):
    assert unexpected((id, answer, True, "") for id, answer in RIGHT if id.startswith(n)) == ""


@pytest.mark.parametrize("n", "123")
def test_a_wrong_answer_of_another_kind_gets_the_sentence_that_fits(n):
    assert unexpected((id, answer, False, words) for id, answer, words in WRONG if id.startswith(n)) == ""


def test_a_print_in_a_function_that_is_called_thousands_of_times_is_shown_once(capsys):
    def batch(n, q, generator):
        print("batch of", n)
        return torch.nonzero(torch.rand(n, generator=generator) < q).squeeze(1)

    verdict = exercises.check("3.2", batch)
    assert verdict.passed and verdict.printed == "batch of 100" and capsys.readouterr() == ("", "")
