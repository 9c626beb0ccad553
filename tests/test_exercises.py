"""Every exercise: its reference answer passes, every wrong answer that it knows gets its own sentence."""

import pytest
import torch

from dpteach import exercises
from dpteach.exercises import noise
from dpteach.exercises.core import Wrong, coding

ALL = exercises.every()
CODING = [e for e in ALL if callable(e.reference)]
IDS = [e.id for e in ALL]
WRONG = [pytest.param(e, w, id=f"{e.id}-{getattr(w.answer, '__name__', w.answer)}") for e in ALL for w in e.wrong]


@pytest.mark.parametrize("exercise", ALL, ids=IDS)
def test_the_reference_answer_is_right(exercise):
    verdict = exercises.check(exercise.id, exercise.reference)
    assert verdict.passed is True, verdict
    assert repr(verdict).startswith("Right: ")


@pytest.mark.parametrize("exercise, wrong", WRONG)
def test_a_known_wrong_answer_gets_its_own_sentence(exercise, wrong):
    verdict = exercises.check(exercise.id, wrong.answer)
    assert (verdict.passed, verdict.message) == (False, wrong.message)


@pytest.mark.parametrize("id, answer", [("3.1", noise._ignores_the_generator), ("3.2", noise._global_generator)])
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
    for seed in range(20):
        torch.manual_seed(seed)
        args = (1, 0.5, torch.Generator())
        assert noise._repeats(lambda: noise._global_generator(*args), args[2]) == 0
        assert noise._repeats(lambda: noise.poisson_batch(*args), args[2]) == 1


@pytest.mark.parametrize("exercise", ALL, ids=IDS)
def test_wrong_answers_of_one_exercise_have_different_sentences(exercise):
    messages = [w.message for w in exercise.wrong]
    assert len(set(messages)) == len(messages)


@pytest.mark.parametrize("exercise", CODING, ids=[e.id for e in CODING])
def test_a_coding_exercise_knows_at_least_four_wrong_answers(exercise):
    assert len(exercise.wrong) >= 4


@pytest.mark.parametrize("nothing", [None, ..., NotImplemented])
@pytest.mark.parametrize("exercise", ALL, ids=IDS)
def test_an_exercise_that_was_not_attempted_says_so_in_one_line(exercise, nothing):
    verdict = exercises.check(exercise.id, nothing)
    assert verdict.passed is None and "\n" not in repr(verdict)


@pytest.mark.parametrize("exercise", CODING, ids=[e.id for e in CODING])
def test_a_stub_is_not_attempted(exercise):
    assert exercises.check(exercise.id, lambda *args, **kwargs: ...).passed is None
    assert exercises.check(exercise.id, lambda *args, **kwargs: None).passed is None


@pytest.mark.parametrize("exercise", CODING, ids=[e.id for e in CODING])
def test_a_function_that_raises_gets_a_sentence(exercise):
    def raises(*args, **kwargs):
        raise KeyError("oops")

    verdict = exercises.check(exercise.id, raises)
    assert verdict.passed is False and "KeyError" in verdict.message


@pytest.mark.parametrize("answer", ["text", 3 + 4j, [1, 2], object(), torch.zeros(3), float("nan")])
@pytest.mark.parametrize("exercise", ALL, ids=IDS)
def test_an_answer_of_the_wrong_type_gets_a_sentence(exercise, answer):
    given = (lambda *args, **kwargs: answer) if callable(exercise.reference) else answer
    verdict = exercises.check(exercise.id, given)
    assert verdict.passed is False and verdict.message.endswith(".")
    assert exercises.check(exercise.id, answer).passed is False


@pytest.mark.parametrize("exercise", ALL, ids=IDS)
def test_an_exercise_has_a_hint_and_a_solution(exercise):
    assert len(exercises.hint(exercise.id)) > 20
    assert len(exercises.solution(exercise.id)) > 20
    assert exercises.hint(exercise.id) in exercises.folded(exercise.id)


def test_ids_are_unique_and_in_order():
    assert IDS == sorted(set(IDS), key=lambda id: [int(part) for part in id.split(".")])


@pytest.mark.parametrize("id", ["9.1", "2.99", "x"])
def test_an_unknown_id_is_one_error_that_lists_the_known_ones(id):
    with pytest.raises(ValueError, match=f"id must .*got '{id}'"):
        exercises.check(id, None)


DOUBLE = coding(
    "0.1", hint="h", reference=lambda x: x * 2, inputs=[lambda: (torch.tensor([1.0, 2.0]),)], praise="p.",
    wrong=[Wrong(lambda x: x * 3, "you tripled it.")],
)


def in_place(x):
    x *= 2
    return x


@pytest.mark.parametrize("answer, sentence", [
    (lambda x: x * 2, "p."),
    (lambda x: x * 3, "you tripled it."),
    (in_place, "changes its input in place"),
    (lambda x: (x * 2).tolist(), "must return a Tensor, got a list"),
    (lambda x: x.sum(), "must return a tensor of shape (2,), got ()"),
    (lambda x: x * 2.5, "largest difference is 1"),
    (lambda: 0, "your function raised TypeError"),
])
def test_the_engine_tells_apart_the_ways_to_be_wrong(answer, sentence):
    assert sentence in DOUBLE.examine(answer).message
