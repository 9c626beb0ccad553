"""Membership attacks: scores, ROC, AUC, and the wrong labels that make records easy to find."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loops import in_one_test
from scipy.stats import mannwhitneyu

from dpteach.attacks import auc, margin_scores, membership_scores, mislabel, roc_curve, true_positive_rate_at
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
        (lambda: mislabel(records(9), share=1.5, classes=10), "share"),
        (lambda: mislabel(records(9), share=0.1, classes=1), "classes"),
        (lambda: mislabel(records(90), share=0.1, classes=2), "data.y"),
        (lambda: mislabel(records(9), share=0.1, classes=10, seed=-1), "seed"),
    ],
)
def test_a_bad_argument_is_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        call()
