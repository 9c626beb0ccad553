"""A guess is locked before the answer is seen, and is told how far off it was."""

import re

import pytest
from lab import new_notebook, new_page

from dpteach.explorer import Prediction, prediction, predictions


@pytest.fixture(autouse=True)
def nothing_asked_yet(monkeypatch):
    monkeypatch.setattr(prediction, "_MADE", {})


def press(asked):
    asked._button.click()


def shown(asked) -> str:
    return re.sub("<.*?>", "", asked._answer.value)


@pytest.mark.parametrize(
    "guess, measured, more, words",
    [
        (500, 800, {"log": True}, "measured 800; you said 500: 1.6 times too low"),
        (5000, 800, {"log": True}, "measured 800; you said 5,000: 6.25 times too high"),
        (30, 70, {}, "measured 70; you said 30: 40 too low"),
        (70.00001, 70, {}, "measured 70; you said 70: right"),
    ],
)
def test_how_far_a_guess_is_off_is_said_as_a_factor_on_a_logarithmic_scale_and_else_as_a_difference(
    guess, measured, more, words, capsys
):
    asked = Prediction("How many?", between=(1, 10_000), guess=guess, **more)
    asked.show(measured)
    assert capsys.readouterr().out == words + "\n" and shown(asked) == words


def test_without_a_guess_only_the_measurement_is_printed_and_the_page_keeps_it_back(capsys):
    asked = Prediction("How many?", between=(0, 100))
    asked.show(62.4, "{:.0f}")
    assert capsys.readouterr().out == "measured 62\n"
    assert shown(asked) == ""
    asked._sliders[0].widget.value = 50
    press(asked)
    assert asked.guess == 50 and shown(asked) == "measured 62; you said 50: 12 too low"


def test_show_locks_the_guess_before_and_after_the_measurement(capsys):
    asked = Prediction("How many?", between=(0, 100))
    asked._sliders[0].widget.value = 20
    press(asked)
    assert shown(asked) == "Locked: you said 20; not measured yet. Go on and measure it."
    assert asked._sliders[0].widget.disabled and asked._button.disabled
    asked._sliders[0].widget.value = 90  # by another cell
    press(asked)
    asked.show(90)
    assert asked.guess == 20 and "you said 20: 70 too low" in capsys.readouterr().out


def test_a_curve_is_told_where_it_is_worst_and_drawn_beside_the_guess(capsys):
    asked = Prediction("ε?", at=(1, 10, 100), x="steps", between=(0.1, 100), log=True, guess=[1, 2, 3])
    picture = asked.show([1, 3, 9])
    assert capsys.readouterr().out.endswith("3 times too low at steps = 100\n")
    assert [list(item.ys) for item in asked._panel().items] == [[1, 3, 9], [1, 2, 3]]
    assert "you said 1, 2, 3" in repr(picture) and "<svg" in asked._answer.value


def test_all_of_them_are_told_again_in_their_order_and_a_cell_that_runs_again_asks_once(capsys):
    Prediction("First?", between=(0, 1), guess=0.5)
    Prediction("Second?", between=(0, 1)).show(0.25)
    Prediction("First?", between=(0, 1))
    capsys.readouterr()
    predictions()
    told = capsys.readouterr().out
    assert told == "First?\n    no guess, and not measured yet\nSecond?\n    measured 0.25\n"


def test_what_cannot_be_shown_is_refused_by_name():
    asked = Prediction("How many?", between=(0, 1))
    with pytest.raises(ValueError, match="measured must be finite, got nan"):
        asked.show(float("nan"))
    with pytest.raises(ValueError, match="guess must have 2 numbers, one for each place, got 1"):
        Prediction("Which?", at=(1, 2), between=(0, 1), guess=[1])


CELLS = (
    "from dpteach.explorer import Prediction",
    'updates = Prediction("How many updates?", between=(1, 10_000), log=True)\nupdates',
    "updates.show(800)",
)


def test_in_jupyterlab_a_guess_is_dragged_locked_and_answered(lab_folder, address, browser):
    lab = new_page(browser).open(address, new_notebook(lab_folder, "prediction.ipynb", *CELLS))
    lab.run_cell(0)
    lab.run_cell(1)
    lab.look_at(1).drag("your guess", [0.6])
    lab.cell.locator("button", has_text="Show").click()
    lab.cell.get_by_text("Go on and measure it.").first.wait_for()
    lab.run_cell(2)
    lab.look_at(1).cell.get_by_text("times too low").first.wait_for()
    assert lab.errors == [] and lab.failures() == []
    lab.close()


def test_by_keyboard_alone_and_on_a_narrow_page_a_guess_is_made(lab_folder, address, browser):
    lab = new_page(browser).open(address, new_notebook(lab_folder, "prediction-by-keyboard.ipynb", *CELLS))
    lab.run_cell(0)
    lab.run_cell(1)
    lab.page.set_viewport_size({"width": 400, "height": 800})
    handle = lab.look_at(1).cell.locator(".noUi-handle[aria-label='your guess']")
    handle.focus()
    lab.page.keyboard.press("ArrowRight")
    for _ in range(2):  # over the number, which can be typed
        lab.page.keyboard.press("Tab")
    assert lab.page.evaluate("document.activeElement.textContent.trim()") == "Show"
    lab.page.keyboard.press("Enter")
    lab.cell.get_by_text("Go on and measure it.").first.wait_for()
    box = lab.cell.locator(".dpteach").first
    assert box.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    lab.close()
