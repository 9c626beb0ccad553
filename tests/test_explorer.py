"""The explorer without a browser: one thread, the newest setting, no traceback."""

import math
import threading
import time
import xml.etree.ElementTree as ElementTree

import pytest

from dpteach import models, plots
from dpteach.data import split, two_moons
from dpteach.explorer import RANGES, Explorer, FederatedExplorer, Playground, Range, Scene, Viewer
from dpteach.federated import Worker, train_rounds
from dpteach.plots import Line, Panel
from dpteach.training import Settings, train

QUICK = Settings(epochs=2, batch_size=100, lr=1.0)
LONG = Settings(epochs=20_000, batch_size=100, lr=1.0)


@pytest.fixture
def explore():
    made = []

    def make(settings=QUICK, **more):
        made.append(Explorer(two_moons(400), more.pop("make_model", models.mlp), settings, **more))
        return made[-1]

    yield make
    for explorer in made:
        explorer.stop()
        explorer.wait(10)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "dpteach-train"]


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_the_explorer_trains_with_the_same_steps_as_train(explore):
    explorer = explore()
    explorer.wait(30)
    alone = list(train(models.mlp(), two_moons(400), QUICK, test_data=two_moons(400)))
    assert explorer.steps == alone


def test_a_moved_slider_trains_again_with_its_value(explore):
    explorer = explore()
    explorer.wait(30)
    explorer.controls["noise_multiplier"].value = 4.0
    explorer.wait(30)
    assert explorer.settings.noise_multiplier == 4.0
    alone = list(train(models.mlp(), two_moons(400), explorer.settings, test_data=two_moons(400)))
    assert explorer.steps == alone
    assert "σ = 4" in explorer._picture.value and "σ = 4" in explorer.summary()


def test_sixty_quick_changes_end_on_the_last_with_one_thread(explore):
    explorer = explore(LONG)
    for k in range(60):
        explorer.controls["noise_multiplier"].value = 1 + k / 10
        time.sleep(0.005)
        assert len(threads()) == 1
    wait_for(lambda: explorer._run.settings.noise_multiplier == 6.9 and len(explorer.steps) > 3)
    assert len(threads()) == 1
    explorer.stop()
    wait_for(lambda: not threads(), 2)


def test_stop_ends_the_thread_and_keeps_what_was_drawn(explore):
    explorer = explore(LONG)
    wait_for(lambda: explorer.steps and "<svg" in explorer._picture.value)
    explorer.stop()
    explorer.wait(2)
    assert not threads()
    assert explorer.status.startswith("Stopped at step")
    picture = explorer._picture.value
    time.sleep(0.3)
    assert explorer._picture.value == picture


def test_start_after_stop_begins_again(explore):
    explorer = explore(LONG)
    wait_for(lambda: len(explorer.steps) > 20)
    explorer.stop()
    explorer.wait(2)
    explorer.start()
    wait_for(lambda: explorer.steps and explorer.status.startswith("Training"))
    assert explorer.steps[0].step == 1


@pytest.mark.parametrize("echo", [1.0000000000000002, 0.9999999999999994, 1.002])
def test_a_browsers_echo_of_a_value_does_not_train_again(explore, echo):
    explorer = explore()
    explorer.wait(30)
    before = explorer._generation
    explorer.controls["max_grad_norm"].value = echo
    assert explorer._generation == before
    assert explorer.settings.max_grad_norm == 1.0


def test_the_baseline_is_trained_once_for_all_noise_and_clipping(explore, monkeypatch):
    import dpteach.explorer.training as room

    methods = []
    monkeypatch.setattr(room, "train", lambda *a, **k: methods.append(k["method"]) or train(*a, **k))
    explorer = explore()
    explorer.wait(30)
    for name in ("noise_multiplier", "max_grad_norm"):
        explorer.controls[name].value = 2.0
        explorer.wait(30)
    assert methods.count("sgd") == 1 and methods.count("dpsgd") == 3
    assert [s.step for s in explorer._run.baseline] == [s.step for s in explorer.steps]


def test_a_new_explorer_stops_the_one_before(explore):
    first = explore(LONG)
    wait_for(lambda: first.steps)
    second = explore(LONG)
    wait_for(lambda: second.steps)
    assert len(threads()) == 1
    assert first.status.startswith("Stopped, because another explorer started")


def test_the_price_is_known_before_the_run_ends_and_gets_tighter_at_its_end(explore):
    explorer = explore(LONG)
    wait_for(lambda: explorer.steps)
    assert "Price of the whole run: ε" in explorer._price_line.value
    explorer.stop()
    quick = explore()
    quick.wait(30)
    assert quick._run.exact < quick._run.price
    assert f"ε = {quick._run.exact:.2f}" in quick._price_line.value


def test_a_model_that_fails_is_one_sentence_and_no_traceback(explore, capfd):
    def broken():
        raise RuntimeError("no such layer")

    explorer = explore(make_model=broken)
    explorer.wait(10)
    assert explorer.status == "Can't go on: no such layer"
    assert explorer.summary() == explorer.status
    assert isinstance(explorer.error, RuntimeError)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_batch_larger_than_the_data_is_one_sentence_in_the_status_line(explore):
    explorer = explore(Settings(batch_size=500))
    explorer.wait(10)
    assert explorer.status == "Can't go on: batch_size must be at most the number of records (400), got 500"
    explorer.controls["batch_size"].value = 100
    explorer.wait(30)
    assert explorer.status.startswith("Finished")


def test_a_delta_of_one_over_n_is_told_beside_the_price_and_not_on_stderr(explore, capfd):
    explorer = explore(Settings(epochs=2, target_delta=0.01))
    explorer.wait(30)
    assert "Careful: target_delta should be below 1/n" in explorer._price_line.value
    assert capfd.readouterr().err == ""


def test_a_loss_that_is_no_number_any_more_stops_the_run_with_a_reason(explore):
    explorer = explore(Settings(epochs=50, lr=1e30, batch_size=100))
    explorer.wait(30)
    assert explorer.status.startswith("Diverged at step")
    assert explorer.steps[-1].step < explorer.steps[-1].steps
    assert explorer.still() is not None


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm", "epochs", "lr", "batch_size"])
@pytest.mark.parametrize("end", ["min", "max"])
def test_every_slider_at_its_end_gives_a_finite_picture(explore, name, end):
    explorer = explore(Settings(epochs=1, batch_size=200), sliders=("noise_multiplier", "max_grad_norm", "epochs"),
                       ranges={"epochs": Range(1, 5, whole=True), "batch_size": Range(20, 400, log=True, whole=True)})
    explorer.wait(30)
    control = explorer.controls[name]
    edge = getattr(control, end)
    control.value = 10**edge if RANGES[name].log else edge
    explorer.wait(30)
    assert explorer.status.startswith(("Finished", "Diverged")), explorer.status
    ElementTree.fromstring(explorer._picture.value)
    assert "nan" not in explorer._picture.value


def test_wait_says_when_it_took_too_long(explore):
    explorer = explore(LONG)
    with pytest.raises(TimeoutError, match="still at work after 0.05 s"):
        explorer.wait(0.05)


@pytest.mark.parametrize("method", ["sgd", "opacus"])
def test_the_other_methods_show_too(explore, method):
    explorer = explore(method=method)
    explorer.wait(30)
    assert explorer.status.startswith("Finished")
    assert ("ε = ∞" in explorer.summary()) == (method == "sgd")


def test_sliders_must_be_settings():
    with pytest.raises(ValueError, match="sliders must be one of 'noise_multiplier'.*got 'sigma'"):
        Explorer(two_moons(100), models.mlp, sliders=("sigma",))


def test_hundred_runs_leave_no_thread(explore):
    explorer = explore(Settings(epochs=1, batch_size=200), baseline=False)
    for k in range(100):
        explorer.controls["noise_multiplier"].value = 1 + (k % 50) / 10
        explorer._changed.acquire()
        explorer._changed.release()
    explorer.wait(60)
    assert not threads()


def test_the_live_picture_is_well_formed_and_speaks_its_figures(explore):
    explorer = explore()
    explorer.wait(30)
    pictures = list(ElementTree.fromstring(explorer._picture.value))
    assert [picture.get("role") for picture in pictures] == ["img"] * 3
    titles = [picture.find("{http://www.w3.org/2000/svg}title").text for picture in pictures]
    assert titles == [picture.get("aria-label") for picture in pictures] == [panel.alt for panel in explorer._panels()]
    assert f"at most {explorer.steps[-1].epsilon:.2f} after step 8 of 8" in titles[1]


def test_a_screen_reader_hears_the_beginning_and_the_end_of_a_run_and_not_each_step(explore):
    heard = []
    explorer = explore(LONG)
    explorer.stop()
    explorer.wait(10)
    explorer._spoken.observe(lambda change: heard.append(change["new"]), "value")
    explorer.start()
    shown = explorer._picture.value
    for _ in range(5):
        wait_for(lambda: explorer._picture.value != shown)
        shown = explorer._picture.value
    explorer.stop()
    explorer.wait(10)
    explorer.controls["epochs"].value = 2
    explorer.wait(30)
    assert [words.split()[0] for words in heard] == ["Training:", "Stopped", "Training:", "Finished:"]


def test_the_folded_sliders_unfold_by_a_button(explore):
    button, inside = next(row for row in explore()._box.children if len(getattr(row, "children", ())) == 2
                          and hasattr(row.children[0], "children")).children
    assert inside.layout.display == "none"
    button.children[0].value = True
    assert inside.layout.display == "flex"
    button.children[0].value = False
    assert inside.layout.display == "none"


def test_the_still_is_a_png_with_the_sentence_as_its_text(explore):
    explorer = explore()
    explorer.wait(30)
    still = explorer.still()
    assert repr(still) == plots.alt_text(explorer._panels())
    assert still._repr_png_().startswith(b"\x89PNG")


def test_both_painters_draw_every_kind_of_item():
    xs = [1.0, 2.0, math.nan, 4.0, 5.0]
    panel = Panel("All <kinds>", "x", "y", [
        Line(xs, [1, 10, 5, math.inf, 100], "private", "line"), plots.Band([1, 5], [1, 2], [3, 4], "budget", "band"),
        plots.Points([1, 2], [3, 4], "data", "dots"), plots.Points([1, 2], [4, 5], "attacker", "crosses", cross=True),
        plots.Bars([1, 2, 3], [5, 1], "non-private", "bars"), plots.Mark("budget", "upright", x=2.0), plots.Mark("budget", y=3.0),
    ], "Everything.", y_log=True)
    for panels in ([panel], [panel, panel]):
        picture = ElementTree.fromstring(plots.svg(panels))
        assert len(picture.findall(".//{http://www.w3.org/2000/svg}polyline")) == 2 * len(panels)  # a gap makes two pieces
        assert plots.still(panels)._repr_png_()


def test_a_long_curve_is_thinned_to_means_and_keeps_its_last_point():
    xs, ys = plots._thin(*map(plots._array, (range(10_000), range(10_000))))
    assert len(xs) <= 152
    assert (xs[-1], ys[-1]) == (9999, 9999)
    assert all(a == b for a, b in zip(xs, ys))


def test_a_viewer_draws_what_its_sliders_say():
    viewer = Viewer(lambda prior: [Panel("p", "x", "y", [Line([0, 1], [0, prior], "private")], f"Prior {prior:g}.")], prior=0.5)
    viewer.wait(10)
    assert viewer.summary() == "Prior 0.5."
    viewer.controls["prior"].value = 0.9
    viewer.wait(10)
    assert "Prior 0.9." in viewer._picture.value


def test_a_viewer_whose_drawing_fails_says_so():
    viewer = Viewer(lambda prior: 1 / 0, prior=0.5)
    viewer.wait(10)
    assert viewer.status == "Can't go on: division by zero"


def test_a_viewer_needs_a_range_for_an_unknown_name():
    with pytest.raises(ValueError, match="ranges must be one of .*got 'colour'"):
        Viewer(lambda colour: [], colour=1.0)


def test_the_playground_keeps_runs_side_by_side():
    scenes = {name: Scene(two_moons(300, seed), models.mlp, QUICK, two_moons(200, 9)) for seed, name in enumerate(("a", "b"))}
    playground = Playground(scenes)
    try:
        playground.pin()
        assert "Nothing to pin yet" in playground._note.value or playground.pinned
        playground.wait(30)
        playground._unpin()
        playground.pin()
        playground.menus["scene"].value = "b"
        playground.menus["method"].value = "opacus"
        playground.wait(30)
        playground.pin()
        assert playground._note.value == "Run 2 is pinned."
        assert [(p.scene, p.method) for p in playground.pinned] == [("a", "dpsgd"), ("b", "opacus")]
        assert playground.pinned[0].epsilon == playground.pinned[1].epsilon
        assert f"{playground.pinned[0].accuracy:.1%}" in playground._kept.value
    finally:
        playground.explorer.stop()


def test_drawing_takes_little_of_the_training_threads_time(explore, monkeypatch):
    import dpteach.explorer.training as room

    drawing = []

    def timed(function):
        def run(*args, **kwargs):
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                drawing.append(time.thread_time() - began)
        return run

    monkeypatch.setattr(room, "svg", timed(room.svg))
    for name in ("_panels_of", "_show"):
        monkeypatch.setattr(Explorer, name, timed(getattr(Explorer, name)))
    monkeypatch.setattr(Explorer, "_work_on", timed(Explorer._work_on))
    explorer = explore(Settings(epochs=500, batch_size=100, lr=1.0), baseline=False)
    explorer.wait(60)
    share = sum(drawing[:-1]) / drawing[-1]
    print(f"\ndrawing: {share:.1%} of the thread's time, {len(drawing) // 3} frames")
    assert len(drawing) > 15 and share < 0.1  # 4 to 5 % on a quiet machine


@pytest.fixture
def federate():
    made = []

    def make(**more):
        settings = more.pop("settings", Settings(1.2, epochs=1, batch_size=50, lr=1.0))
        made.append(FederatedExplorer(two_moons(400), models.mlp, settings, test_data=two_moons(200, seed=1), **more))
        return made[-1]

    yield make
    for explorer in made:
        explorer.stop()
        explorer.wait(10)


def test_the_federated_explorer_trains_what_train_rounds_trains(federate):
    explorer = federate(rounds=3, noise_multipliers=(1.5, 1.1))
    explorer.wait(30)
    parts = split(two_moons(400), 2)
    workers = [Worker(name, part, Settings(sigma, epochs=1, batch_size=50, lr=1.0))
               for name, part, sigma in zip(("alice", "bob"), parts, (1.5, 1.1))]
    assert explorer.rounds == list(train_rounds(workers, models.mlp(), 3, test_data=two_moons(200, seed=1)))
    assert explorer.status.startswith("Finished") and "never their sum or mean" in explorer._price_line.value
    assert f"alice (200 records, σ = 1.5): ε = {workers[0].epsilon():.2f} (PRV)" in explorer.summary()
    ElementTree.fromstring(explorer._picture.value)


@pytest.mark.parametrize("name, value", [
    ("noise_multiplier_bob", 5.0), ("rounds", 2), ("share", 0.9), ("share", 0.02), ("skew", 0.99), ("weights", "equal"),
])
def test_every_control_of_the_federated_explorer_trains_again_with_its_value(federate, name, value):
    explorer = federate(rounds=1)
    explorer.wait(30)
    before = explorer.rounds
    explorer.controls[name].value = value
    explorer.wait(30)
    assert explorer.status.startswith("Finished") and explorer.values[name] == value
    assert explorer.rounds != before or name == "weights"
    assert "nan" not in explorer._picture.value


@pytest.mark.parametrize("count", [3, 10])
def test_the_federated_explorer_takes_a_third_and_a_tenth_worker(federate, count):
    explorer = federate(rounds=1, workers=[f"w{k}" for k in range(count)])
    explorer.wait(30)
    assert len(explorer.rounds[0].epsilons) == count
    assert len([name for name in explorer.controls if name.startswith("noise_multiplier")]) == (3 if count == 3 else 1)


def test_the_federated_explorer_stops_in_the_middle_of_a_round(federate):
    explorer = federate(rounds=20, settings=Settings(1.2, epochs=2000, batch_size=50, lr=1.0))
    wait_for(lambda: explorer._run.turns > 20)
    explorer.stop()
    explorer.wait(2)
    assert not threads() and explorer.status.startswith("Stopped at round 1 of 20")


def test_one_training_at_a_time_of_whatever_kind(explore, federate):
    first = explore(LONG)
    wait_for(lambda: first.steps)
    second = federate()
    second.wait(30)
    assert first.status.startswith("Stopped, because another explorer started") and second.status.startswith("Finished")


def test_a_federation_that_diverges_stops_with_a_reason(federate):
    explorer = federate(rounds=10, settings=Settings(1.2, epochs=1, batch_size=50, lr=1e30))
    explorer.wait(30)
    assert explorer.status.startswith("Diverged in round") and explorer.still() is not None


def test_the_federated_explorer_refuses_what_makes_no_sense():
    for more, sentence in (({"workers": ["alice"]}, "workers must be at least two different names"),
                           ({"noise_multipliers": [1.0]}, "noise_multipliers must hold one number for each of the 2 workers")):
        with pytest.raises(ValueError, match=sentence):
            FederatedExplorer(two_moons(100), models.mlp, test_data=two_moons(50), **more)
