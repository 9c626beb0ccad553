"""Membership attacks: scores, reference models, ROC, AUC, what no attack can exceed, and the labels that help one."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loops import in_one_test
from scipy.stats import binomtest, mannwhitneyu, norm
from verdicts import unexpected

from dpteach.accounting import epsilon
from dpteach.attacks import (
    auc,
    lira_scores,
    margin_scores,
    membership_scores,
    mislabel,
    most_found,
    report,
    rmia_scores,
    roc_curve,
    true_positive_rate_at,
)
from dpteach.data import Data
from dpteach.exercises import find
from dpteach.models import mlp
from dpteach.training import Settings, train

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)  # few values: many ties


def records(n: int, classes: int = 10, inputs: int = 5) -> Data:
    generator = torch.Generator().manual_seed(n)
    return Data(torch.randn(n, inputs, generator=generator), torch.randint(0, classes, (n,), generator=generator))


def test_the_score_is_the_lead_of_the_given_label_and_not_of_the_predicted_one():
    logits = torch.tensor([[5.0, 2.0, 1.0], [5.0, 2.0, 1.0], [0.0, 0.0, 7.0]])
    assert membership_scores(logits, torch.tensor([0, 2, 2])).tolist() == [3.0, -4.0, 7.0]


def test_records_the_model_is_sure_of_do_not_tie():
    logits, labels = torch.tensor([[40.0, 0.0], [60.0, 0.0], [90.0, 0.0]]), torch.tensor([0, 0, 0])
    assert F.cross_entropy(logits, labels, reduction="none").unique().numel() == 1  # float32: exactly 0 for all three
    assert F.cross_entropy(logits.double(), labels, reduction="none")[1:].unique().numel() == 1  # float64: no better
    scores = membership_scores(logits, labels)
    assert scores.dtype == torch.float64
    assert scores.tolist() == [40.0, 60.0, 90.0]


def test_the_solution_of_exercise_1_3_is_the_packages_own_score():
    logits, labels = torch.randn(30, 10, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 10
    assert torch.equal(find("1.3").reference(logits, labels), membership_scores(logits, labels))


def test_logits_and_labels_are_left_as_they_were():
    for dtype in (torch.float32, torch.float64):
        logits, labels = torch.randn(4, 3, dtype=dtype), torch.tensor([0, 1, 2, 0])
        kept = logits.clone()
        membership_scores(logits, labels)
        assert torch.equal(logits, kept) and labels.tolist() == [0, 1, 2, 0]


def test_a_models_scores_are_those_of_its_logits_batch_by_batch():
    model, data = mlp(5, 8, 10), records(2500)
    with torch.no_grad():
        expected = membership_scores(model(data.X), data.y)
    torch.testing.assert_close(margin_scores(model, data), expected, rtol=1e-5, atol=1e-6)


def test_scoring_is_done_in_evaluation_mode_and_leaves_the_model_in_its_own():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), mlp(5, 8, 10))
    data = records(50)
    assert torch.equal(margin_scores(model, data), margin_scores(model, data))  # dropout would differ
    assert model.training
    model.eval()
    margin_scores(model, data)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_perfect_separation():
    members, non_members = torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0, -1.0])
    assert auc(members, non_members) == 1.0
    assert auc(non_members, members) == 0.0
    false_positive_rate, true_positive_rate = roc_curve(members, non_members)
    assert true_positive_rate[false_positive_rate == 0].max() == 1.0


def test_equal_scores_are_worth_a_guess_whatever_their_order():
    same = torch.zeros(6)
    assert auc(same, same) == 0.5
    false_positive_rate, true_positive_rate = roc_curve(same, same)
    assert false_positive_rate.tolist() == true_positive_rate.tolist() == [0.0, 1.0]  # one step for all, no corner


def test_ties_between_members_and_non_members_invent_no_attack():
    # A quarter of the members saturated, as many non-members too: sorted members first, the curve would start at 0.25.
    members = torch.cat([torch.full((25,), 9.0), torch.zeros(75)])
    false_positive_rate, true_positive_rate = roc_curve(members, members.clone())
    assert torch.equal(false_positive_rate, true_positive_rate)


def test_scores_from_one_distribution_are_at_chance_level():
    generator = torch.Generator().manual_seed(0)
    members, non_members = torch.randn(2, 4000, generator=generator)
    assert abs(auc(members, non_members) - 0.5) < 0.03


@given(SCORES, SCORES)
def test_auc_is_the_mann_whitney_statistic(members, non_members):
    expected = mannwhitneyu(members, non_members).statistic / (len(members) * len(non_members))
    assert auc(members, non_members) == pytest.approx(expected, abs=1e-12)


@given(SCORES, SCORES)
def test_the_curve_rises_from_corner_to_corner_and_turns_over_with_the_scores(members, non_members):
    false_positive_rate, true_positive_rate = roc_curve(members, non_members)
    for rate in (false_positive_rate, true_positive_rate):
        assert rate[0] == 0 and rate[-1] == 1 and (rate.diff() >= 0).all() and rate.dtype == torch.float64
    assert auc(members, non_members) == pytest.approx(1 - auc(non_members, members), abs=1e-12)
    turned = auc([-s for s in members], [-s for s in non_members])
    assert auc(members, non_members) == pytest.approx(1 - turned, abs=1e-12)


def test_mislabel_changes_the_share_asked_for_and_always_to_another_label():
    data = records(500)
    kept = data.y.clone()
    changed_data, changed = mislabel(data, share=0.2, classes=10, seed=3)
    assert int(changed.sum()) == 100
    assert torch.equal(changed_data.y != data.y, changed)
    assert torch.equal(data.y, kept)
    assert changed_data.y.min() >= 0 and changed_data.y.max() <= 9
    assert len(((changed_data.y - data.y) % 10)[changed].unique()) == 9  # every other label occurs


def test_mislabel_repeats_itself_for_a_seed_and_only_for_it():
    data = records(200)
    again = [mislabel(data, share=0.3, classes=10, seed=seed)[1] for seed in (5, 5, 6)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


@in_one_test("share, count", [(0, 0), (1, 30), (0.1, 3)])
def test_mislabel_at_the_ends_of_its_range(share, count):
    assert int(mislabel(records(30), share=share, classes=10)[1].sum()) == count


def test_the_plain_loop_gives_its_mislabelled_records_away_and_an_untrained_model_does_not():
    both, changed = mislabel(records(120, inputs=50), share=0.5, classes=10, seed=1)
    members, others = both.take(range(60)), both.take(range(60, 120))

    def found(model):
        return auc(margin_scores(model, members)[changed[:60]], margin_scores(model, others)[changed[60:]])

    model = mlp(50, 50, 10)
    assert 0.3 < found(model) < 0.7
    for _ in train(model, members, Settings(epochs=100, batch_size=20, lr=0.5), method="sgd"):
        pass
    assert found(model) > 0.9


@in_one_test("false_positives, found", [(0, 0.02), (1, 0.04), (2, 0.06), (99, 1.0), (100, 1.0)])
def test_so_many_false_positives_are_allowed_and_not_one_more(false_positives, found):
    non_members = torch.arange(100.0)
    members = torch.cat([torch.tensor([99.5, 99.4, 98.5, 98.4, 97.5, 97.4]), torch.full((94,), 0.5)])
    assert true_positive_rate_at(members, non_members, false_positives / 100) == pytest.approx(found)


def test_members_that_tie_with_a_non_member_are_not_found_before_it():
    assert true_positive_rate_at([1.0, 1.0], [1.0, 0.0], false_positive_rate=0.49) == 0.0
    assert true_positive_rate_at([1.0, 1.0], [1.0, 0.0], false_positive_rate=0.5) == 1.0


def test_an_auc_of_one_half_can_hide_members_that_are_found_for_certain():
    non_members = torch.linspace(0, 1, 1000)
    members = non_members.clone()
    members[5::100] = 2.0  # ten of a thousand; the others are guesses
    assert auc(members, non_members) == pytest.approx(0.505, abs=1e-3)
    assert true_positive_rate_at(members, non_members, false_positive_rate=0.0) == pytest.approx(0.01)


def test_the_curve_and_the_area_are_those_of_scikit_learn_also_with_ties_and_infinities():
    # scikit-learn 1.9.1, roc_curve(drop_intermediate=False) and roc_auc_score; it takes no infinity: ±1e9 stood for it.
    members = [3, 3, 1, 0, math.inf, 2, math.inf, -1]
    non_members = [3, 0, 0, -2, 1, math.inf, -math.inf]
    false_positives, found = roc_curve(members, non_members)
    torch.testing.assert_close(7 * false_positives, torch.tensor([0, 1, 2, 2, 3, 5, 5, 6, 7], dtype=torch.float64))
    torch.testing.assert_close(8 * found, torch.tensor([0, 2, 4, 5, 6, 7, 8, 8, 8], dtype=torch.float64))
    assert auc(members, non_members) == pytest.approx(0.6875, abs=1e-12)


def reference_models(n=400, R=24, lead=2.0, seed=0):
    """Scores of R + 1 models for n records of unlike difficulty; a model that saw a record has a lead on it."""
    generator = torch.Generator().manual_seed(seed)
    included = torch.rand(R + 1, n, generator=generator) < 0.5
    noise = torch.randn(R + 1, n, generator=generator, dtype=torch.float64)
    return 5 * torch.randn(n, generator=generator) + lead * included + noise, included


def test_reference_models_find_members_that_a_threshold_on_the_score_does_not():
    scores, included = reference_models()
    plain = report(scores[0], included[0])
    for attack in (lira_scores, rmia_scores):
        better = report(attack(scores[0], scores[1:], included[1:]), included[0])
        assert better["auc"] > plain["auc"] + 0.2 and better["found at 1 %"] > 4 * plain["found at 1 %"], attack
    exact = norm.cdf(2 / math.sqrt(2))  # of two Gaussians that are 2 apart: nothing can be better
    assert report(lira_scores(scores[0], scores[1:], included[1:]), included[0])["auc"] < exact + 0.02


def test_an_attack_finds_nothing_where_no_model_saw_the_records():
    scores, included = reference_models(n=4000, lead=0.0)
    for attack in (lira_scores, rmia_scores):
        found = report(attack(scores[0], scores[1:], included[1:]), included[0])
        assert abs(found["auc"] - 0.5) < 0.03 and found["found at 1 %"] < 0.025, attack


def test_lira_is_the_likelihood_ratio_of_two_gaussians_and_the_solution_of_exercise_8_2():
    references = torch.tensor([[1.0, 5.0], [3.0, 7.0], [0.0, 1.0], [0.0, 3.0]])
    included = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
    target = torch.tensor([2.0, 3.0])
    high, low = 1.0, math.sqrt(0.5)  # one spread a side, for both records
    expected = norm.logpdf([2, 3], [2, 6], high) - norm.logpdf([2, 3], [0, 2], low)
    for answer in (lira_scores, find("8.2").reference):
        got = answer(target.double(), references.double(), included)
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_rmia_compares_with_models_of_both_kinds_and_does_not_tie_where_the_models_are_sure():
    included = torch.tensor([[True], [True], [False], [False], [False], [False]])
    references = torch.tensor([[2.0], [0.0], [-1.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64)
    p = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    mean = ((p(2) + p(0)) / 2 + p(-1)) / 2  # each side counts the same, whatever its number of models
    assert rmia_scores([1.0], references, included).item() == pytest.approx(math.log(p(1) / mean))
    sure = torch.full((4, 2), 600.0)
    scores = rmia_scores([500.0, 600.0], sure, torch.tensor([[True], [True], [False], [False]]).expand(4, 2))
    assert scores[0] < scores[1]


def test_other_right_answers_to_exercise_8_2_pass_and_other_wrong_ones_do_not():
    def written_out(target, references, included):
        sides = []
        for rows in (included, torch.logical_not(included)):
            some = torch.where(rows, references, torch.nan)
            mean = some.nanmean(dim=0)
            variance = (some - mean).square().nanmean()
            sides.append(-0.5 * (target - mean) ** 2 / variance - 0.5 * variance.log())
        return sides[0] - sides[1]

    def one_mean(target, references, included):
        sides = [references[rows] for rows in (included, ~included)]
        return sum(s * torch.distributions.Normal(r.mean(), r.std()).log_prob(target) for s, r in zip((1, -1), sides))

    cases = [
        ("8.2", written_out, True, "likelihood ratio"),
        ("8.2", one_mean, False, "the values are not right"),
        ("8.2", lambda *args: written_out(*args).float(), False, "float64"),
    ]
    assert unexpected(cases) == ""


def test_a_report_has_the_numbers_at_few_false_positives_first_and_the_area_last():
    scores, members = torch.cat([torch.arange(1000.0), torch.arange(1000.0) + 5.5]), torch.arange(2000) >= 1000
    assert list(report(scores, members)) == ["found at 0.1 %", "found at 1 %", "accuracy", "auc"]
    found = report(scores, members)
    assert found["found at 0.1 %"] == pytest.approx(0.007) and found["found at 1 %"] == pytest.approx(0.016)
    assert found["accuracy"] == pytest.approx((1 + 0.006) / 2) and found["auc"] > 0.5
    assert report(scores.view(2, -1), members.view(2, -1)) == found


@in_one_test("sigma, q, steps", [(1.0, 1.0, 1), (4.0, 1.0, 10), (0.7, 1.0, 1)])
def test_the_limit_of_a_run_on_all_the_data_is_little_above_the_gaussian_trade_off_curve(sigma, q, steps):
    rates = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    exact = torch.special.ndtr(torch.special.ndtri(rates) + math.sqrt(steps) / sigma)
    limit = most_found(rates, noise_multiplier=sigma, sample_rate=q, steps=steps)
    assert (limit >= exact - 1e-6).all() and (limit - exact).max() < 0.02


def test_the_limit_is_nowhere_above_that_of_the_reported_epsilon_and_one_without_noise():
    run = {"noise_multiplier": 1.1, "sample_rate": 0.1, "steps": 200}
    rates = torch.tensor([0.0, 0.001, 0.1, 1.0])
    limit = most_found(rates, **run)
    assert (
        (limit <= math.exp(epsilon(**run)) * rates + 1.1e-5).all() and limit[-1] == 1 and limit.dtype == torch.float64
    )
    assert most_found(rates, noise_multiplier=0.0, sample_rate=0.1, steps=200).tolist() == [1.0] * 4


def test_no_attack_on_a_private_run_lies_beyond_its_trade_off_curve_and_one_on_a_run_without_noise_does():
    """At 99.9 % confidence; the attacker knows the weights at which a record that stands alone adds its gradient."""
    run, n = {"noise_multiplier": 2.0, "sample_rate": 0.5, "steps": 4}, 200
    alone = Data(torch.eye(n), torch.zeros(n, dtype=torch.int64))

    def beyond(noise_multiplier):
        inside, outside = [], []
        for seed in range(12):
            coins = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
            model = torch.nn.Linear(n, 2, bias=False)
            torch.nn.init.zeros_(model.weight)
            settings = Settings(noise_multiplier, 0.1, 2, math.ceil(coins.sum().item() / 2), seed=seed)
            for _ in train(model, alone.take(coins.nonzero().squeeze(1)), settings):
                pass
            lead = (model.weight[0] - model.weight[1]).detach()
            inside.append(lead[coins])
            outside.append(lead[~coins])
        inside, outside = torch.cat(inside), torch.cat(outside)
        count = 0
        for threshold in outside.quantile(torch.linspace(0.1, 0.99, 20)):
            low, high = (
                binomtest(int((s > threshold).sum()), len(s)).proportion_ci(0.999, "exact") for s in (inside, outside)
            )
            count += low.low > most_found(high.high, **run).item()
        return count, auc(inside, outside)

    private, area = beyond(2.0)
    assert private == 0 and area > 0.6  # a strong attack, and not beyond
    assert beyond(1.0)[0] > 5  # half the noise that the curve is for


@in_one_test(
    "call, name",
    [
        (lambda: membership_scores(torch.zeros(3), torch.zeros(3, dtype=torch.int64)), "logits"),
        (lambda: membership_scores(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)), "logits"),
        (lambda: membership_scores(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)), "labels"),
        (lambda: membership_scores(torch.zeros(3, 2), torch.zeros(3)), "labels"),
        (lambda: membership_scores(torch.zeros(3, 2), torch.tensor([0, 1, 2])), "labels"),
        (lambda: membership_scores(torch.zeros(3, 2), torch.tensor([0, 1, -1])), "labels"),
        (lambda: roc_curve([], [1.0]), "member_scores"),
        (lambda: roc_curve([1.0], []), "non_member_scores"),
        (lambda: auc([1.0], [float("nan")]), "non_member_scores"),
        (lambda: auc(torch.zeros(2, 2), [1.0]), "member_scores"),
        (lambda: true_positive_rate_at([1.0], [0.0], false_positive_rate=1.5), "false_positive_rate"),
        (lambda: report([1.0, 2.0], torch.tensor([False, False])), "members"),  # the model never saw a candidate
        (lambda: report([1.0, 2.0], torch.tensor([True, True])), "members"),
        (lambda: report([1.0, 2.0], torch.tensor([True])), "members"),
        (lambda: report([1.0, 2.0], torch.tensor([1, 0])), "members"),
        (lambda: report([1.0, 1.0], torch.tensor([True, False])), "scores"),
        (lambda: report([math.inf, 1.0], torch.tensor([True, False])), "scores"),
        (lambda: report([math.nan, 1.0], torch.tensor([True, False])), "scores"),
        (lambda: lira_scores([math.inf], torch.zeros(4, 1), torch.zeros(4, 1) > 0), "target"),
        (lambda: lira_scores([0.0], torch.zeros(4, 2), torch.zeros(4, 2) > 0), "references"),
        (lambda: rmia_scores([0.0], torch.full((4, 1), math.nan), torch.zeros(4, 1) > 0), "references"),
        (lambda: lira_scores([0.0], torch.zeros(4, 1), torch.zeros(4, 1)), "included"),
        (lambda: lira_scores([0.0], torch.zeros(4, 1), torch.zeros(4, 1) > 0), "included"),  # in none of them
        (lambda: rmia_scores([0.0], torch.zeros(4, 1), torch.ones(4, 1) > 0), "included"),  # in all
        (lambda: most_found(0.1, noise_multiplier=-1.0, sample_rate=0.1, steps=1), "noise_multiplier"),
        (lambda: most_found(1.5, noise_multiplier=1.0, sample_rate=0.1, steps=1), "false_positive_rate"),
        (lambda: mislabel(records(9), share=1.5, classes=10), "share"),
        (lambda: mislabel(records(9), share=0.1, classes=1), "classes"),
        (lambda: mislabel(records(90), share=0.1, classes=2), "data.y"),
        (lambda: mislabel(records(9), share=0.1, classes=10, seed=-1), "seed"),
    ],
)
def test_a_bad_argument_is_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        call()
