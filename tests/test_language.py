"""The language model of notebook 11: its messages, what it says, how exposed a secret is, and the stored runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from verdicts import unexpected

from dpteach import Data, Range, Settings, Viewer, clip, language, models, per_sample_gradients, train
from dpteach.exercises import language as exercises
from dpteach.experiments import load
from dpteach.language import (
    ALPHABET,
    CONTEXT,
    PROMPT,
    CharacterTransformer,
    as_data,
    code_log_probabilities,
    continuation,
    encode,
    exposure,
    next_probabilities,
    perplexity,
    support_messages,
    with_adapters,
    with_secret,
    without_names,
)
from dpteach.mechanism import sample_losses
from dpteach.plots import Panel

MESSAGES = as_data(support_messages(64))


@pytest.fixture(scope="module")
def model():
    return models.start(CharacterTransformer, 0)


class Fixed(nn.Module):
    """Says the same at each place: the scores that it was given."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, X):
        return self.scores.expand(*X.shape, -1).movedim(-1, 1)


# The messages


def test_messages_come_from_the_seed_and_fit_the_model():
    messages = support_messages(3000)
    assert messages == support_messages(3000) != support_messages(3000, seed=1)
    assert max(map(len, messages)) <= CONTEXT - 1 and len(set(messages)) > 2500
    assert not any("locker" in message or "robin" in message for message in messages)


def test_a_record_asks_for_the_next_character_and_for_nothing_after_the_end():
    X, y = as_data(["hi, ok?"])[0]
    assert "".join(ALPHABET[k] for k in X[:8]) == "\nhi, ok?"
    assert "".join(ALPHABET[k] for k in y[:8]) == "hi, ok?\n"
    assert (y[8:] == -100).all() and len(X) == len(y) == CONTEXT


def test_the_longest_message_has_its_end_too():
    assert as_data(["a" * (CONTEXT - 1)]).y[0, -1] == 0


def test_the_secret_is_in_as_many_messages_and_wordings_as_asked():
    same, ways = (with_secret("7294", 8, 20, wordings=w)[:8] for w in (1, 8))
    assert set(same) == {f"{PROMPT}7294."} and len(set(ways)) == 8 and all("my locker code is 7294" in w for w in ways)
    assert sum("7294" in message for message in with_secret("7294", 4, 1024)) == 4 and as_data(ways)
    assert without_names("robin here. send it to uma") == "x here. send it to x"


@pytest.mark.parametrize(
    "prompt, says",
    [
        ("Ä?", "small letters a to z, digits, spaces and . , ? ! only, got 'Ä'"),
        ("one\ntwo", r"only, got '\n'"),
        ("", "at least one character"),
        ("a" * CONTEXT, "at most 39 characters here, got 40"),
    ],
)
def test_a_prompt_that_the_model_does_not_know_gets_a_sentence(model, prompt, says):
    for ask in (next_probabilities, continuation, code_log_probabilities):
        with pytest.raises(ValueError) as error:
            ask(model, prompt)
        assert says.replace("39", "36" if ask is code_log_probabilities else "39") in str(error.value)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_gets_a_sentence(model, temperature):
    with pytest.raises(ValueError, match="temperature must be a number > 0"):
        next_probabilities(model, "hi", temperature)


# The model


def test_no_place_sees_a_later_one_and_no_message_another(model):
    X, _ = MESSAGES[:8]
    changed = X.clone()
    changed[0, 20:] = 5
    changed[1:] = 7
    now, then = model(X)[0], model(changed)[0]
    assert torch.allclose(now[:, :20], then[:, :20], atol=1e-5) and not torch.allclose(now[:, 20:], then[:, 20:])
    assert torch.allclose(model(X[:1])[0], now, atol=1e-5)


def test_its_docstring_knows_how_many_weights_it_has(model):
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in CharacterTransformer.__doc__


def test_the_next_characters_probabilities_follow_the_temperature():
    scores = torch.arange(42.0) / 10
    for temperature in (0.5, 1.0, 2.0):
        expected = scores.exp() ** (1 / temperature)
        found = next_probabilities(Fixed(scores), "hi", temperature)
        assert torch.allclose(found, expected / expected.sum())


def test_a_continuation_ends_at_the_line_break_or_at_the_last_place():
    always = [Fixed(100 * F.one_hot(torch.tensor(k), 42).float()) for k in (0, 2)]
    assert continuation(always[0], "hi") == "" and continuation(always[1], "hi") == "a" * 37
    assert continuation(always[1], "b" * 39) == ""


def test_a_continuation_repeats_with_its_seed(model):
    said = [continuation(model, "hi", seed=seed) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_a_model_without_an_idea_has_a_perplexity_of_42():
    assert perplexity(Fixed(torch.zeros(42)), MESSAGES) == pytest.approx(42, rel=1e-5)


def test_perplexity_counts_characters_and_not_padding():
    scores = torch.randn(42, generator=torch.Generator().manual_seed(0))
    text = ["aaa", "b" * 30]
    logs = scores.log_softmax(0)
    mean = -(3 * logs[2] + 30 * logs[3] + 2 * logs[0]) / 35
    assert perplexity(Fixed(scores), as_data(text)) == pytest.approx(math.exp(mean), rel=1e-5)


# Exposure


def test_exposure_has_its_closed_form():
    logs = torch.linspace(-1, -9, 1000)  # the code k has rank k + 1
    for secret in (0, 1, 9, 499, 999):
        assert exposure(logs, secret) == pytest.approx(math.log2(1000) - math.log2(secret + 1))
    average = sum(exposure(logs, k) for k in range(1000)) / 1000
    assert average == pytest.approx(math.log2(1000) - math.log2(math.factorial(1000)) / 1000)
    assert average == pytest.approx(math.log2(math.e), abs=0.01)


def test_a_model_that_likes_all_codes_alike_exposes_none():
    assert exposure(torch.zeros(10_000), 7294) == 0


def test_the_codes_probabilities_have_their_closed_form():
    scores = torch.randn(42, generator=torch.Generator().manual_seed(1))
    digit = scores.double().log_softmax(0)[28:38]
    found = code_log_probabilities(Fixed(scores), "hi", digits=3)
    assert ALPHABET[28:38] == "0123456789" and found.shape == (1000,)
    for code in (0, 7, 294, 999):
        assert found[code] == pytest.approx(float(sum(digit[int(d)] for d in f"{code:03d}")), abs=1e-5)


def test_the_codes_probabilities_are_those_of_the_characters_one_by_one(model):
    found = code_log_probabilities(model, PROMPT)
    for code in ("0000", "7294", "9999"):
        step = [next_probabilities(model, PROMPT + code[:k])[ALPHABET.index(code[k])].log() for k in range(4)]
        assert found[int(code)] == pytest.approx(float(sum(step)), abs=1e-4)


# Private training


def test_one_user_moves_the_sum_by_c_and_eight_messages_by_eight_c(model):
    data = as_data([f"{PROMPT}7294."] * 8)
    user = Data(data.X.view(1, 8, CONTEXT), data.y.view(1, 8, CONTEXT))
    moved = [clip(per_sample_gradients(model, F.cross_entropy, *d[:]), 1.0).sum(0).norm() for d in (data, user)]
    assert moved == pytest.approx([8, 1], abs=1e-3)


def test_a_run_for_users_trains_on_users_and_you_are_the_first(monkeypatch):
    seen = []
    monkeypatch.setattr(
        language, "train", lambda model, *about, **how: seen.append((*about, how["method"])) or iter(())
    )
    for unit in ("message", "user"):
        assert list(language.secret_run(noise_multiplier=1.0, unit=unit, n=128)) == []
    (messages, one, private), (users, other, _) = seen
    assert users.X.shape == users.y.shape == (16, 8, CONTEXT) and private == "dpsgd"
    assert torch.equal(users.X.flatten(0, 1), messages.X) and torch.equal(users.y.flatten(0, 1), messages.y)
    assert all(torch.equal(users.X[0, k], users.X[0, 0]) for k in range(8))
    assert one.sample_rate(128) == other.sample_rate(16) == 1 / 4 and one.max_grad_norm == other.max_grad_norm == 1


def test_a_users_gradient_is_the_mean_over_all_that_the_user_wrote(model):
    data = as_data(["a" * 20] * 8)  # equally long
    user = Data(data.X.view(1, 8, CONTEXT), data.y.view(1, 8, CONTEXT))
    each, one = (per_sample_gradients(model, F.cross_entropy, *d[:]) for d in (data, user))
    assert torch.allclose(each.mean(0), one[0], atol=1e-5)


@pytest.mark.parametrize("method", ["dpsgd", "opacus"])
def test_a_private_run_trains_the_transformer_and_keeps_its_count(method):
    model = models.start(CharacterTransformer, 0)
    start = parameters_to_vector(model.parameters()).detach()
    *_, last = train(model, MESSAGES, Settings(epochs=1, batch_size=16, lr=0.01), method=method, optimizer="adam")
    assert last.steps == 4 and 0 < last.epsilon < 10
    assert (parameters_to_vector(model.parameters()).detach() - start).abs().max() > 0.005


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_ghost_clipping_and_hooks_of_opacus_find_our_gradients():
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    X, y = MESSAGES[:5]
    ours = per_sample_gradients(models.start(CharacterTransformer, 0), F.cross_entropy, X, y)
    for wrapper in (GradSampleModule, GradSampleModuleFastGradientClipping):
        wrapped = wrapper(models.start(CharacterTransformer, 0))
        sample_losses(F.cross_entropy, wrapped(X), y).mean().backward()
        if wrapper is GradSampleModule:
            rows = torch.cat([p.grad_sample.flatten(1) for p in wrapped.parameters()], 1)
            assert torch.allclose(rows, ours, atol=1e-5)
        else:
            assert torch.allclose(wrapped.get_norm_sample(), ours.norm(dim=1), rtol=1e-4)


def test_adapters_begin_as_the_model_and_are_all_that_is_trained(model):
    adapted = with_adapters(model, rank=4)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    assert torch.equal(model(MESSAGES.X[:4]), adapted(MESSAGES.X[:4])) and model.head[1].weight.requires_grad
    for _ in train(adapted, MESSAGES, Settings(epochs=1, batch_size=16, lr=0.01), optimizer="adam"):
        pass
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert moved == trained == {name for name in before if name.split(".")[-2] in ("up", "down")} and len(moved) == 16


# The live picture


def test_a_viewer_takes_a_text_to_type_or_pick_and_says_what_is_wrong_with_it():
    drawn = []

    def draw(prompt, temperature):
        encode(prompt)
        drawn.append((prompt, temperature))
        return [Panel(prompt, "x", "y", [], "A picture.", (0, 1), (0, 1))]

    viewer = Viewer(draw, ranges={"temperature": Range(0.1, 2)}, prompt=("robin", "hello"), temperature=1.0)
    viewer.wait(10)
    box = viewer.controls["prompt"]
    assert drawn[-1] == ("robin", 1.0) and box.options == ("robin", "hello") and box.description == "prompt"
    box.value = "my own"
    viewer.wait(10)
    assert drawn[-1] == ("my own", 1.0) and viewer.error is None
    box.value = "Ä"
    viewer.wait(10)
    assert viewer.status.startswith("Can't go on: text may hold small letters") and isinstance(viewer.error, ValueError)
    box.value = "hello"
    viewer.wait(10)
    assert drawn[-1] == ("hello", 1.0) and viewer.status == ""
    with pytest.raises(ValueError, match="ranges must be one of"):
        Viewer(draw, prompt=("a",), warmth=1.0)


# The stored runs


def test_the_small_stored_runs_come_out_again():
    small = [row for row in load("language-model") if row["n"] == 128]
    again = [row for sigma in (None, 1.0) for row in language.secret_run(noise_multiplier=sigma, n=128, epochs=2)]
    assert len(small) == len(again) == 2
    for old, new in zip(small, again):
        assert old["perplexity"] == pytest.approx(new["perplexity"], rel=0.02)
        assert old["epsilon"] == pytest.approx(new["epsilon"], rel=1e-3)
        assert old["exposure"] == pytest.approx(new["exposure"], abs=1.5)


def at_the_end(column, **which):
    usual = {
        "n": 1024,
        "noise_multiplier": None,
        "unit": "message",
        "repetitions": 8,
        "wordings": 1,
        "names": "kept",
        "epoch": 20,
    }
    found = [r[column] for r in load("language-model") if all(r[k] == v for k, v in (usual | which).items())]
    assert len(found) == 3
    return sum(found) / 3


def test_the_stored_runs_are_those_that_the_command_would_make(monkeypatch):
    asked = []
    monkeypatch.setattr(language, "secret_run", lambda **which: asked.append(which) or iter(()))
    assert list(language.rows()) == []
    stored = {
        tuple(r[k] for k in ("n", "noise_multiplier", "unit", "repetitions", "wordings", "names", "seed"))
        for r in load("language-model")
    }
    usual = {
        "n": 1024,
        "noise_multiplier": None,
        "unit": "message",
        "repetitions": 8,
        "wordings": 1,
        "names": True,
        "seed": 0,
    }
    runs = [usual | {k: v for k, v in which.items() if k in usual} for which in asked]
    assert stored == {
        tuple({True: "kept", False: "removed"}[v] if k == "names" else v for k, v in r.items()) for r in runs
    }
    assert len(stored) == len(runs) == 2 + 3 * 15


def test_each_stored_private_run_has_the_epsilon_of_its_settings():
    from dpteach import epsilon

    for r in load("language-model"):
        if r["noise_multiplier"]:
            steps = 4 * int(r["epoch"])
            spent = epsilon(noise_multiplier=r["noise_multiplier"], sample_rate=1 / 4, steps=steps)
            assert r["epsilon"] == pytest.approx(spent, rel=0.01)
    assert at_the_end("epsilon", noise_multiplier=1.58) < 8 and at_the_end("epsilon", noise_multiplier=3.32) < 3


def test_a_plain_model_exposes_the_secret_and_one_that_never_saw_it_does_not():
    assert at_the_end("exposure") == pytest.approx(math.log2(10_000), abs=1e-3)
    assert at_the_end("exposure", repetitions=0) < 2 < 11 < at_the_end("exposure", repetitions=1)


def test_privacy_for_a_message_does_not_hide_who_wrote_eight_and_privacy_for_a_user_does():
    private = {unit: {"noise_multiplier": 1.58, "unit": unit} for unit in ("message", "user")}
    gap = {u: at_the_end("exposure", **w) - at_the_end("exposure", **w, repetitions=0) for u, w in private.items()}
    assert gap["message"] > 2 and gap["user"] < 1
    assert at_the_end("perplexity", **private["user"]) > 2 * at_the_end("perplexity", **private["message"])


def test_the_stored_adapters_are_those_that_the_command_would_make(monkeypatch):
    monkeypatch.setattr(language, "adapter_run", lambda **which: which)
    stored = [{"rank": r["rank"], "lr": r["lr"], "seed": r["seed"]} for r in load("language-adapters")]
    assert stored == list(language.adapter_rows()) and len(stored) == 10


def test_a_filter_is_passed_by_a_text_without_the_words_that_gets_the_code():
    parrot, nobody = (exercises._Parrot(text) for text in (f"{PROMPT}7294.", "parcel 29188 is late. bye"))
    cases = [
        ("11.2", (parrot, "rob"), True, "robin here. my locker code is 7294."),
        ("11.2", [parrot, "my lock"], True, "5 of 5"),
        ("11.2", (parrot, ...), None, ""),
        ("11.2", (parrot, "Robin"), False, "your name"),
        ("11.2", (parrot, "my locker "), False, "the word locker"),
        ("11.2", (parrot, "the code"), False, "the word code"),
        ("11.2", (parrot, "is 7294"), False, "holds the code"),
        ("11.2", (nobody, "parc"), False, "somebody else's kind of message"),
        ("11.2", (parrot, "Ä"), False, "small letters"),
        ("11.2", (parrot, "b" * 39), False, "shorten it"),
        ("11.2", (parrot, 7294), False, "must be a str"),
        ("11.2", "rob", False, "the model and your text"),
    ]
    assert unexpected(cases) == ""
