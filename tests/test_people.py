"""The live pictures for everybody, in a real JupyterLab: by keyboard alone, by ear, on a narrow page, with large text."""

import re

import pytest
from lab import new_notebook, new_page

SETUP = """
import torch
from dpteach import Explorer, FederatedExplorer, Playground, Scene, Settings, Viewer, models, plots, two_moons
torch.set_num_threads(1)
data, unseen = two_moons(400), two_moons(200, seed=1)
quick = Settings(epochs=2, batch_size=100, lr=1.0)
"""
LIVE = {
    "Explorer": "live = Explorer(data, models.mlp, quick, test_data=unseen)",
    "Viewer": """live = Viewer(lambda noise_multiplier, prior: [plots.Panel("A line", "x", "y", [plots.Line([0, 1], [noise_multiplier, prior],
                        "private")], f"A line from {noise_multiplier:.3g} to {prior:.2f}.")], noise_multiplier=1.0, prior=0.5)""",
    "FederatedExplorer": """live = FederatedExplorer(data, models.mlp, quick, test_data=unseen, rounds=2,
                                 workers=("alice", "the hospital in the next town"))""",
    "Playground": 'live = Playground({"two moons": Scene(data, models.mlp, quick, unseen)})',
}
SLIDERS = ["noise multiplier σ", "clipping norm C", "epochs"]
BUTTONS = ["Start", "Stop", "Reset", "The odds as 100 dots"]
TEXTS = ["Explain this run", "Copy as Opacus script"]
CONTROLS = {  # what Tab must reach, in this order
    "Explorer": [*SLIDERS, "More: learning rate, batch size", "bring back", "Settings as text", *BUTTONS, *TEXTS],
    "Viewer": ["noise multiplier σ", "prior"],
    "FederatedExplorer": [
        "σ of alice",
        "σ of the hospital in the next town",
        "rounds",
        "alice's share of records",
        "label skew",
        "average",
        "bring back",
        *BUTTONS,
    ],
    "Playground": [
        "data and model",
        "method",
        "optimizer",
        *SLIDERS,
        "learning rate",
        "batch size",
        "δ",
        "bring back",
        "Settings as text",
        *BUTTONS,
        *TEXTS,
    ],
}

# What has the keyboard's focus: its role, its name for a screen reader, its value, and how its outline stands out.
FOCUSED = """() => {
  const e = document.activeElement, look = getComputedStyle(e);
  return {role: e.getAttribute('role') ?? e.tagName.toLowerCase(), value: e.getAttribute('aria-valuetext') ?? '',
          name: (e.getAttribute('aria-label') ?? e.labels?.[0]?.textContent ?? e.textContent).trim(),
          inside: Boolean(e.closest('.dpteach')),
          outlined: look.outlineStyle === 'solid' && parseFloat(look.outlineWidth) >= 2 && look.outlineColor === look.color};
}"""


@pytest.fixture(scope="module")
def opened(lab_folder, address, browser):
    lab = new_page(browser).open(
        address, new_notebook(lab_folder, "people.ipynb", SETUP, *(f"{c}\nlive" for c in LIVE.values()))
    )
    lab.run_cell(0)
    yield lab
    assert lab.errors == [] and lab.failures() == []
    lab.close()


@pytest.fixture(params=LIVE)
def kind(request):
    return request.param


@pytest.fixture
def lab(opened, kind):
    """The cell with one kind of live picture, run anew; its training is over."""
    index = 1 + list(LIVE).index(kind)
    opened.run_cell(index)
    opened.look_at(index).watch()
    opened.execute("live.wait()")
    opened.cell.locator(".noUi-handle[aria-label]").first.wait_for(state="attached")
    opened.watch()
    return opened


def first_control(lab):
    """Put the focus on the first control, as Tab would from above."""
    lab.cell.locator(".noUi-handle, select").first.focus()
    return lab.page.evaluate(FOCUSED)


def walk(lab) -> list[dict]:
    """Press Tab until the focus leaves the live picture: everything that had it."""
    seen = [first_control(lab)]
    while len(seen) < 60:
        lab.page.keyboard.press("Tab")
        now = lab.page.evaluate(FOCUSED)
        if not now["inside"]:
            break
        seen.append(now)
    return seen


def test_tab_reaches_every_control_in_order_with_a_name_and_a_visible_focus(lab, kind):
    lab.page.keyboard.press("Escape")  # the keyboard is in use: a browser shows the focus only then
    seen = walk(lab)
    assert [s["name"] for s in seen if s["role"] != "textbox"] == CONTROLS[kind]
    assert (
        lab.cell.locator("[title=null], [title=undefined]").count() == 0
    )  # what ipywidgets says where nobody says anything
    assert [s for s in seen if not s["name"] or not s["outlined"]] == []
    for slider, number in zip(seen, seen[1:]):
        if slider["role"] == "slider":  # its number can be typed, too
            assert (number["role"], number["name"]) == ("textbox", slider["name"] + ", typed")
    back = []
    for _ in seen:
        lab.page.keyboard.press("Shift+Tab")
        back.append(lab.page.evaluate(FOCUSED)["name"])
    assert back == [s["name"] for s in reversed(seen)]


def test_an_arrow_key_moves_a_slider_and_a_new_frame_answers(lab, kind):
    slider = lab.slider("noise multiplier" if kind != "FederatedExplorer" else "σ of alice")
    before = slider.locator(".widget-readout").inner_text()
    slider.locator(".noUi-handle").focus()
    for _ in range(5):
        lab.page.keyboard.press("ArrowRight")
    lab.until("f.picture !== all[0].picture")
    after = slider.locator(".widget-readout").inner_text()
    assert float(after) > float(before)
    lab.page.wait_for_function("text => document.activeElement.getAttribute('aria-valuetext') === text", arg=after)


def keys(lab, words: str, *names: str) -> list[str]:
    """What the slider's readout says after each key."""
    lab.slider(words).locator(".noUi-handle").focus()
    seen = []
    for name in names:
        lab.page.keyboard.press(name)
        lab.page.wait_for_timeout(100)
        seen.append(lab.readout(words))
    return seen


@pytest.mark.parametrize("kind", ["Explorer"], indirect=True)
def test_an_arrow_key_moves_a_twentieth_of_a_decade(lab):
    around = {
        "ArrowRight": "1.12",
        "ArrowUp": "1.26",
        "ArrowLeft": "1.12",
        "ArrowDown": "1.00",
        "PageUp": "1.78",
        "PageDown": "1.00",
        "End": "10.0",
    }
    assert keys(lab, "noise multiplier", *around) == list(around.values())
    assert keys(lab, "noise multiplier", "ArrowRight", "ArrowLeft") == ["10.0", "8.91"]
    assert lab.page.evaluate(FOCUSED)["name"] == "noise multiplier σ"
    lab.click("More:")
    lab.slider("batch size").wait_for()
    around = ["Home", "ArrowRight", "ArrowRight", "PageUp", "ArrowLeft"]
    assert keys(lab, "batch size", *around) == ["1", "2", "3", "6", "5"]
    assert keys(lab, "epochs", "Home", "ArrowRight") == ["1", "2"]
    lab.execute("live.wait()")
    run = lab.execute("print(live.settings.noise_multiplier, live.settings.batch_size, live.settings.epochs)")
    assert run == "8.91 5 2"


@pytest.mark.parametrize("kind", ["Viewer"], indirect=True)
def test_an_arrow_key_moves_a_probability_by_a_hundredth(lab):
    around = ["ArrowRight", "ArrowRight", "ArrowLeft", "PageDown", "End"]
    assert keys(lab, "prior", *around) == ["0.51", "0.52", "0.51", "0.46", "0.99"]


@pytest.mark.parametrize("kind", ["Explorer", "FederatedExplorer", "Playground"], indirect=True)
@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_key_presses_start_and_stop(lab, key):
    lab.execute(
        "(live.explorer if hasattr(live, 'explorer') else live).controls"
        "['rounds' if hasattr(live, 'rounds') else 'epochs'].value = 20 if hasattr(live, 'rounds') else 100"
    )
    lab.execute("live.wait()")
    for button, beginning in (("Start", "Training"), ("Stop", "Stopped")):
        lab.cell.locator("button", has_text=button).first.focus()
        pressed = lab.now()
        lab.page.keyboard.press(key)
        lab.until(f"f.ms > {pressed} && f.status.startsWith('{beginning}')")


@pytest.mark.parametrize("kind", ["Explorer"], indirect=True)
def test_the_folded_sliders_open_by_key_and_are_next_in_order(lab):
    more = lab.cell.locator("button", has_text="More:")
    assert more.get_attribute("aria-expanded") == "false"
    more.focus()
    lab.page.keyboard.press("Enter")
    lab.slider("learning rate").wait_for()
    lab.page.wait_for_function("() => document.activeElement.getAttribute('aria-expanded') === 'true'")
    names = []
    for _ in range(5):
        lab.page.keyboard.press("Tab")
        names.append(lab.page.evaluate(FOCUSED)["name"])
    assert names == ["learning rate", "learning rate, typed", "batch size", "batch size, typed", "bring back"]


@pytest.mark.parametrize("kind", ["Explorer"], indirect=True)
def test_the_words_for_a_screen_reader_follow_the_figures_without_chatter(lab):
    """One place on the page is read out when it changes. It is there before its words are, and no other looks like it.

    The Orca screen reader said nothing of a sentence that also stood in a place with ``aria-live="off"``.
    """
    read_out = lab.cell.locator(".dpteach").first.locator("[aria-live], [role=status], [role=alert], [role=log]")
    assert read_out.count() == 1 and read_out.get_attribute("aria-live") == "polite"
    read_out.evaluate("place => { window.read_out = place; }")
    lab.execute("live.controls['epochs'].value = 100")
    lab.until(
        "f.spoken.startsWith('Finished') && all.slice(0, i).some(g => g.spoken.startsWith('Training'))", timeout=60
    )
    frames = lab.frames()
    spoken = [f["spoken"] for f, before in zip(frames[1:], frames) if f["spoken"] != before["spoken"]]
    assert [re.split("[: ]", words)[0] for words in spoken] == ["Training", "Finished"]
    assert len({f["status"] for f in frames}) > 3 and len({f["alt"] for f in frames}) > 3
    assert read_out.evaluate("place => place === window.read_out && place.textContent.startsWith('Finished')")
    # The picture comes first, its status next: what is said about the picture is never older than the status.
    steps = [
        (int(re.search(r"after step (\d+) of", f["alt"]).group(1)), int(m.group(1)))
        for f in frames
        if (m := re.search(r"Training: step (\d+)", f["status"]))
    ]
    assert steps and all(picture >= status for picture, status in steps)


# A page of 1300 pixels at 200 %, and a panel of 400.
@pytest.mark.parametrize(("width", "height"), [(650, 500), (400, 900)])
def test_nothing_sticks_out_and_nothing_is_cut_on_a_narrow_page(lab, width, height):
    if lab.page.locator(".jp-SideBar").first.is_visible():
        lab.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    try:
        lab.page.set_viewport_size({"width": width, "height": height})
        lab.page.wait_for_function("width => document.querySelector('.jp-Notebook').clientWidth < width", arg=width)
        wide = lab.cell.locator(
            ".dpteach"
        ).first.evaluate("""box => {
            const right = box.closest('.jp-OutputArea-output').getBoundingClientRect().right;
            const out = e => e.getBoundingClientRect().right > right + 0.5 && !e.closest('[style*="overflow-x"]');
            const cut = e => e.scrollWidth > e.clientWidth + 1 && !e.closest('[style*="overflow-x"], .dpteach-spoken');
            return [...box.querySelectorAll('button, select, svg, .widget-label, .widget-readout, .widget-html-content, .noUi-base')]
                .filter(e => e.offsetParent !== null || e.tagName === 'svg').filter(e => out(e) || cut(e)).map(e => e.outerHTML.slice(0, 90)); }""")
        assert wide == []
        for control in lab.cell.locator(".noUi-handle:visible, button:visible, select:visible").all():
            control.scroll_into_view_if_needed()
            control.click(trial=True)  # nothing lies over it
        text = lab.cell.locator("svg text").first.evaluate("t => t.getBoundingClientRect().height")
        assert text >= 10, "the letters of the picture are too small"
    finally:
        lab.page.set_viewport_size({"width": 1300, "height": 1000})


@pytest.mark.parametrize("kind", ["Explorer"], indirect=True)
def test_everything_is_on_one_screen_and_on_a_narrow_one_the_pictures_come_first(lab):
    boxes = """cell => ['.dpteach-controls', '.dpteach-numbers', 'svg[role=img]'].flatMap(what => [...cell.querySelectorAll(what)])
               .map(e => e.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"""
    if lab.page.locator(".jp-SideBar").first.is_visible():
        lab.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    try:
        lab.page.set_viewport_size({"width": 1400, "height": 900})
        lab.page.wait_for_timeout(500)
        controls, numbers, *pictures = lab.cell.evaluate(boxes)
        assert max(p[3] for p in [controls, *pictures]) - numbers[1] < 760  # what Lab leaves of 900
        assert controls[2] <= min(p[0] for p in [numbers, *pictures]) and 230 <= controls[2] - controls[0] <= 300
        assert max(p[2] for p in pictures) > 1250  # to the right end
        lab.page.set_viewport_size({"width": 700, "height": 900})
        lab.page.wait_for_timeout(500)
        controls, numbers, *pictures = lab.cell.evaluate(boxes)
        assert numbers[1] < pictures[0][1] < max(p[3] for p in pictures) <= controls[1]
    finally:
        lab.page.set_viewport_size({"width": 1300, "height": 1000})


# Every control: its kind, how thick the line around it is, and whether text and line stand out from what they are drawn
# on.
DRAWN = """cell => [...cell.querySelectorAll('.noUi-target, .noUi-handle, button, select')].filter(e => e.checkVisibility()).map(e => {
  const look = getComputedStyle(e);
  const lines = [[look.borderTopStyle, look.borderTopWidth, look.borderTopColor], [look.outlineStyle, look.outlineWidth, look.outlineColor]];
  return {kind: e.localName + '.' + e.className, background: look.backgroundColor, text: look.color,
          lines: lines.filter(([style, width]) => style === 'solid' && parseFloat(width) >= 1).map(line => line[2])};
})"""


def test_with_the_systems_own_high_contrast_colours_every_control_still_has_an_outline(lab):
    picture = "cell => [...cell.querySelectorAll('svg polyline:not([stroke=currentColor])')].map(line => getComputedStyle(line).stroke)"
    before = lab.cell.evaluate(picture)
    white, black = "rgb(255, 255, 255)", "rgb(0, 0, 0)"
    for scheme, paper, ink in (("light", white, black), ("dark", black, white)):
        lab.page.emulate_media(forced_colors="active", color_scheme=scheme)
        try:
            drawn, after = lab.cell.evaluate(DRAWN), lab.cell.evaluate(picture)
        finally:
            lab.page.emulate_media(forced_colors="none", color_scheme="light")
        assert {control["text"] for control in drawn} == {ink}
        assert {control["background"] for control in drawn} <= {paper, "rgba(0, 0, 0, 0)"}
        assert [control for control in drawn if ink not in control["lines"]] == []
        assert after == before != []  # the lines of a picture keep the colours that its key names


@pytest.mark.parametrize("kind", ["Explorer"], indirect=True)
def test_where_the_system_asks_for_less_motion_nothing_glides(lab):
    gliding = """cell => [...cell.querySelectorAll('.dpteach *')].map(e => getComputedStyle(e))
                   .filter(look => parseFloat(look.transitionDuration) > 0 || look.animationName !== 'none').length"""
    lab.cell.locator(".noUi-target").first.evaluate(
        "slider => slider.classList.add('noUi-state-tap')"
    )  # as a click on the track does
    assert lab.cell.evaluate(gliding) > 0
    lab.page.emulate_media(reduced_motion="reduce")
    try:
        assert lab.cell.evaluate(gliding) == 0
    finally:
        lab.page.emulate_media(reduced_motion="no-preference")
