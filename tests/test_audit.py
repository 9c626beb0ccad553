"""Audits: the bounds against published figures and closed forms, honest trainers and liars, and what is refused."""

import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from loops import in_one_test
from scipy.stats import beta, binom

import dpteach
from dpteach import audit
from dpteach.accounting import epsilon
from dpteach.data import Data
from dpteach.exercises import audit as exercises
from dpteach.exercises.core import examine
from dpteach.training import train

ESTIMATORS = [audit.clopper_pearson, audit.one_run, audit.one_run_fdp, audit.gaussian_fit]
SIGMA = 3.29  # 30 steps with q = 1: ε = 8 at δ = 1e-5
NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "08_attack_and_audit.ipynb"


@pytest.fixture(scope="module")
def ground():
    """300 digits, and the pixels that are black in all of MNIST."""
    mnist = dpteach.load_mnist()
    return mnist.take(300), audit.dead_pixels(mnist)


@pytest.fixture(scope="module")
def honest(ground):
    """Twenty audits of ``train`` at ε = 8."""
    return [audit.audit_training(train, *ground, noise_multiplier=SIGMA, seed=seed) for seed in range(20)]


def two_bells(mu, n=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coins = torch.rand(n, generator=generator) < 0.5
    return torch.randn(n, generator=generator, dtype=torch.float64) + mu * coins, coins


# The bounds, against what others have published and what can be computed otherwise


def test_the_bound_of_an_audit_is_at_the_delta_of_its_claim():
    generator = torch.Generator().manual_seed(0)
    included = torch.rand(3000, generator=generator) < 0.5
    seen = (included.double() * 1.4 + torch.randn(3000, generator=generator)).unsqueeze(0)
    at = {delta: audit.Audit(included, seen, 1.0, delta).lower_bound() for delta in (1e-5, 0.5)}
    assert at[1e-5] > 1.5 and at[0.5] == audit.one_run(seen[0], included, target_delta=0.5) < 1


def test_one_run_gives_the_two_figures_that_the_paper_prints():
    """Steinke et al. 2023: appendix D, and section 7."""
    assert abs(audit._one_run(1000, 100, 75, 1e-4, 0.05) - 0.673) < 1e-3
    assert abs(audit._one_run(100_000, 1510, 1439, 1e-5, 0.05) - 2.675) < 1e-3


JAX_PRIVACY = [  # bells 1, 2 and 4 apart; thresholds tried, right and wrong guesses, both bounds
    (386, (2807, 569), 1.13346, (379, 27), 2.164749),
    (374, (4499, 167), 2.311945, (934, 4), 4.7218075),
    (140, (8223, 10), 4.395568, (5436, 0), 9.133752),
]


@in_one_test("tried, plain, plain_bound, curve, curve_bound", JAX_PRIVACY)
def test_both_one_run_bounds_are_those_that_jax_privacy_publishes(tried, plain, plain_bound, curve, curve_bound):
    """``test_epsilon_one_run_close`` there: 20,000 canaries, δ = 1e-6, the best threshold at 5 % over all tried."""
    right, wrong = plain
    assert abs(audit._one_run(20_000, right + wrong, right, 1e-6, 0.05 / tried) / plain_bound - 1) < 1e-5
    right, wrong = curve
    mu = audit._one_run_mu(20_000, right + wrong, right, 0.05 / tried)
    assert abs(audit.gaussian_epsilon(mu, 1e-6) / curve_bound - 1) < 1e-5


@in_one_test("guesses, right", [(20, 18), (100, 60), (300, 300)])
def test_without_delta_one_run_is_a_binomial_test(guesses, right):
    found = audit._one_run(1000, guesses, right, 0.0, 0.05)
    assert abs(binom.sf(right - 1, guesses, 1 / (1 + math.exp(-found))) - 0.05) < 1e-6


@in_one_test("sigma, steps, delta", [(1.0, 1, 1e-5), (3.29, 30, 1e-5), (10.0, 30, 1e-3), (0.5, 4, 1e-6)])
def test_the_gaussian_curve_costs_what_the_accountant_says(sigma, steps, delta):
    mine = audit.gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    theirs = epsilon(noise_multiplier=sigma, sample_rate=1.0, steps=steps, target_delta=delta, accountant="pld")
    assert mine - 1e-6 <= theirs < mine + 0.02 + 0.002 * mine
    assert (
        audit.gaussian_epsilon(0.0) == audit.gaussian_epsilon(-1.0) == 0.0
        and audit.gaussian_epsilon(1.0, 0) == math.inf
    )


def test_clopper_pearson_ends_where_the_binomial_leaves_half_of_the_error():
    hits, n, false, k = 70, 100, 10, 120
    found = audit._clopper_pearson(hits, n, false, k, 0.01, 0.1)
    low, high = beta.ppf(0.05, hits, n - hits + 1), beta.ppf(0.95, false + 1, k - false)
    assert abs(binom.sf(hits - 1, n, low) - 0.05) < 1e-9 and abs(binom.cdf(false, k, high) - 0.05) < 1e-9
    assert abs(found - math.log((low - 0.01) / high)) < 1e-12
    assert found == pytest.approx(exercises.epsilon_at_least(hits, n, false, k, 0.01, 0.9))


@in_one_test("counts", [(0, 10, 0, 10), (10, 10, 10, 10), (3, 10, 9, 10)])
def test_counts_that_say_nothing_give_zero(counts):
    assert audit._clopper_pearson(*counts, 1e-5, 0.05) == 0.0


@in_one_test("estimator", ESTIMATORS)
def test_a_bound_of_95_percent_is_above_the_truth_in_one_of_twenty_at_most(estimator):
    """Two Gaussian bells, μ = 1: exactly what all four assume."""
    truth = audit.gaussian_epsilon(1.0)
    above = sum(estimator(*two_bells(1.0, n=400, seed=seed)) > truth for seed in range(200))
    assert above <= 18  # of 200; 10 expected of the tightest, and 18 is 2.6 standard deviations more


@in_one_test("estimator", ESTIMATORS)
def test_scores_that_know_nothing_give_next_to_nothing(estimator):
    assert np.mean([estimator(*two_bells(0.0, seed=seed)) for seed in range(20)]) < 0.1


@in_one_test("estimator", ESTIMATORS)
def test_more_confidence_costs_some_of_the_bound(estimator):
    scores, coins = two_bells(1.5)
    assert estimator(scores, coins, confidence=0.8) > estimator(scores, coins, confidence=0.999)


def test_with_all_guesses_right_the_bounds_end_where_the_notebook_says():
    """166 of 670: below a claim of 8."""
    assert round(audit._one_run(670, 166, 166, 1e-5, 0.05), 1) == 4.0
    assert round(audit.gaussian_epsilon(audit._one_run_mu(670, 166, 166, 0.05)), 1) == 7.2


def test_a_gaussian_curve_convicts_an_honest_mechanism_that_is_not_gaussian():
    """Randomised response: ε = 1, by the definition."""
    generator = torch.Generator().manual_seed(0)
    coins = torch.rand(2000, generator=generator) < 0.5
    truthful = torch.rand(2000, generator=generator) < math.e / (1 + math.e)
    answers = torch.where(truthful, coins, ~coins).double()
    assert [estimator(answers, coins) > 1 for estimator in ESTIMATORS] == [False, False, True, True]


# A training


def test_an_audit_reaches_the_shares_of_epsilon_that_the_notebook_promises(honest):
    bounds = np.array([[estimator(run.scores, run.included) for estimator in ESTIMATORS] for run in honest])
    _, _, curve, bells = bounds.mean(0)
    assert curve >= 0.3 * 8 and bells >= 0.65 * 8
    truth = audit.gaussian_epsilon(math.sqrt(30) / SIGMA)
    assert (bounds[:, :3] > truth).sum() == 0 and (bounds[:, 3] > truth).sum() <= 3  # 95 %: one of twenty expected


def test_canaries_stand_as_far_apart_as_the_noise_lets_them(honest):
    run = honest[0]
    scores = torch.stack([r.scores / r.scores[~r.included].std() for r in honest])
    coins = torch.stack([r.included for r in honest])
    apart = (scores[coins].mean() - scores[~coins].mean()).item()
    assert 0.93 * math.sqrt(30) / SIGMA < apart < math.sqrt(30) / SIGMA  # ten canaries share a pixel
    assert run.seen.shape == (30, 670) and 8 < run.epsilon < 9  # by RDP


def test_a_private_record_leaves_no_trace_where_the_canaries_live(ground):
    digits, pixels = ground
    runs = [audit.audit_training(train, data, pixels, noise_multiplier=1.0) for data in (digits, digits.take(100))]
    n = [len(data) + int(runs[0].included.sum()) for data in (digits, digits.take(100))]
    assert torch.allclose(runs[0].seen[0] * n[0], runs[1].seen[0] * n[1], atol=1e-4)  # the first step


def test_two_looks_at_every_step_share_the_error(honest):
    run = honest[0]
    looks = [audit.one_run(look, run.included, confidence=0.975) for look in (run.scores, run.seen.var(0))]
    assert run.lower_bound() == pytest.approx(max(looks)) and max(looks) > 0
    one_step = audit.Audit(run.included, run.seen[:1], run.epsilon)
    assert one_step.lower_bound() == audit.one_run(run.seen[0], run.included)


def test_dim_canaries_give_a_low_bound_on_the_same_training(ground):
    run = audit.audit_training(train, *ground, noise_multiplier=SIGMA, brightness=0.1)
    assert audit.gaussian_fit(run.scores, run.included) < 0.5 and run.epsilon > 8


@pytest.mark.parametrize("name", exercises.BROKEN)
def test_each_liar_is_caught_in_19_of_20_runs(ground, name):
    caught = 0
    for seed in range(20):
        run = audit.audit_training(
            exercises.BROKEN[name], *ground, noise_multiplier=8.0, epochs=50, steps_per_epoch=2, seed=seed
        )
        caught += run.lower_bound() > run.epsilon
    assert caught >= 19


@pytest.mark.parametrize("trainer", [train, exercises.SEALED["a"]], ids=["train", "twice the noise"])
def test_no_honest_trainer_is_caught_in_20_runs(ground, trainer):
    for seed in range(20):
        run = audit.audit_training(trainer, *ground, noise_multiplier=8.0, epochs=50, steps_per_epoch=2, seed=seed)
        assert run.lower_bound() < run.epsilon


def test_the_same_seed_shows_how_far_one_record_moves_the_sum():
    moved = {name: audit.sensitivity(trainer) for name, trainer in {"honest": train, **exercises.BROKEN}.items()}
    late = moved.pop("clip after averaging")
    assert abs(late - 10 * math.sqrt(0.9)) < 1e-3  # the gradient's own length
    assert all(abs(far - 1) < 1e-4 for far in moved.values()), moved
    assert abs(audit.sensitivity(train, brightness=0.1) - 0.1 * math.sqrt(0.9)) < 1e-5  # shorter than C: not stretched


# What is refused, in a sentence

GOOD = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([True, False, True, False])
REFUSED = [
    (torch.zeros(0), torch.zeros(0, dtype=torch.bool), {}, "there is no canary"),
    (GOOD[0], torch.ones(4, dtype=torch.bool), {}, "all 4 are in"),
    (GOOD[0], torch.zeros(4, dtype=torch.bool), {}, "all 4 are out"),
    (torch.tensor([0.0, math.nan, 2.0, 3.0]), GOOD[1], {}, "finite, got nan: did the training diverge"),
    (torch.tensor([0.0, -math.inf, 2.0, 3.0]), GOOD[1], {}, "finite, got -inf"),
    (torch.full((4,), 0.5), GOOD[1], {}, "must differ, got 0.5 for every canary"),
    (GOOD[0], GOOD[1].long(), {}, "included True or False, got .* int64"),
    (GOOD[0], GOOD[1][:3], {}, r"shapes \(4,\) and \(3,\)"),
    (*GOOD, {"confidence": 1.0}, "confidence must be a number > 0 and < 1, got 1.0"),
    (*GOOD, {"target_delta": -0.1}, "target_delta must be"),
]


@in_one_test("scores, included, more, sentence", REFUSED)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_that_allow_no_bound_are_one_sentence_and_no_silent_zero(estimator, scores, included, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimator(scores, included, **more)


def test_no_bell_can_be_fitted_to_scores_without_spread():
    with pytest.raises(ValueError, match="there is no bell to fit"):
        audit.gaussian_fit(torch.tensor([1.0, 0.0, 1.0, 0.0]), GOOD[1])


def test_some_equal_scores_are_no_reason_to_refuse():
    scores, coins = two_bells(2.0)
    assert all(estimator(scores.round(), coins) > 0 for estimator in ESTIMATORS)


def test_a_diverged_training_is_one_sentence(ground):
    def diverges(model, data, settings):
        for step in train(model, data, settings):
            model[1].weight.data.fill_(math.nan)
            yield step

    run = audit.audit_training(diverges, *ground, noise_multiplier=SIGMA, epochs=2)
    with pytest.raises(ValueError, match="did the training diverge"):
        run.lower_bound()


def test_what_can_not_be_audited_is_one_sentence(ground):
    digits, pixels = ground
    with pytest.raises(ValueError, match="must yield a Step"):
        audit.audit_training(lambda *_: [], digits, pixels, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="must be black at pixels"):
        audit.audit_training(train, digits, torch.tensor([400]), noise_multiplier=1.0)
    with pytest.raises(ValueError, match="must have a pixel"):
        audit.dead_pixels(Data(torch.ones(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="brightness must be"):
        audit.audit_training(train, digits, pixels, noise_multiplier=1.0, brightness=0.0)


# The exercises


def test_the_liar_among_the_sealed_shows_in_every_step_only(ground):
    guilty = {}
    for name, trainer in exercises.SEALED.items():
        run = audit.audit_training(trainer, *ground, noise_multiplier=8.0, epochs=50, steps_per_epoch=2)
        guilty[name] = audit.one_run(run.scores, run.included) > run.epsilon, run.lower_bound() > run.epsilon
    assert guilty == {"a": (False, False), "b": (False, False), "c": (False, True)}
    assert exercises.exercise_8_5.reference == "c"


def a_step_in_four_moves(model, X, y, noise_multiplier, max_grad_norm, expected_batch_size, generator):
    rows = dpteach.clip(dpteach.per_sample_gradients(model, torch.nn.functional.cross_entropy, X, y), max_grad_norm)
    noise = torch.randn(rows.shape[1], generator=generator) * noise_multiplier * max_grad_norm
    return (rows.sum(0) + noise) / expected_batch_size


def a_step_that_divides_by_the_actual_size(model, X, y, noise_multiplier, max_grad_norm, size, generator):
    return a_step_in_four_moves(model, X, y, noise_multiplier, max_grad_norm, len(X), generator)


def a_step_of_one_draw(model, X, y, noise_multiplier, max_grad_norm, size, generator):
    rows = dpteach.clip(dpteach.per_sample_gradients(model, torch.nn.functional.cross_entropy, X, y), max_grad_norm)
    return (rows.sum(0) + torch.randn(1, generator=generator) * noise_multiplier * max_grad_norm) / size


def test_a_step_of_another_kind_gets_the_verdict_that_fits():
    exercise = exercises.exercise_8_6
    assert examine(exercise, a_step_in_four_moves).passed
    assert "not the clipped sum" in examine(exercise, a_step_that_divides_by_the_actual_size).message
    assert "same in every coordinate" in examine(exercise, a_step_of_one_draw).message
    assert "shape (P,)" in examine(exercise, lambda model, X, *_: X).message


def test_every_bug_of_the_museum_fails_until_it_is_mended():
    """The cells of the notebook, as a learner runs them: first as they are, then with the functions of the solution."""
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells]
    rooms = {"math": math, "dpteach": dpteach}
    for cell in cells:
        if re.match(r"def (divisor|delta_for|museum)\(", cell):
            exec(cell, rooms)
    assert list(rooms["museum"]().values()) == [False] * 4
    solution = next(cell for cell in cells if "What was wrong" in cell)
    exec(re.search(r"```python\n(.*?)```", solution, re.DOTALL).group(1), rooms)
    assert list(rooms["museum"]().values()) == [True] * 4
