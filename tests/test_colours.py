"""The pictures' colours, by computation: enough contrast on both pages, and told apart by readers who see fewer colours."""

import itertools

import numpy as np
import pytest

from dpteach.plots import COLOURS, Line, Panel, Points

PAGES = {"light": "#FFFFFF", "dark": "#111111"}  # what JupyterLab's own themes put behind an output
CONTRAST = 3.0  # WCAG 2.1, 1.4.11: graphics. Text is drawn in the page's own colour.
APART = 10.0  # CIEDE2000. Some 2 is just noticed side by side; 10 is told apart at a glance, in thin lines too.

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE TVCG
# 15(6), 2009: severity 1.0, on linear RGB.
SEEN_BY = {
    "everybody": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    """'#RRGGBB' as linear RGB in [0, 1]."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(linear(c) @ [0.2126, 0.7152, 0.0722] for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def cielab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / [0.95047, 1.0, 1.08883]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def ciede2000(one: np.ndarray, other: np.ndarray) -> float:
    """Sharma, Wu and Dalal, "The CIEDE2000 Color-Difference Formula", 2005."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    grow = 1.5 - 0.5 * np.sqrt(c7 / (c7 + 25**7))
    c1, c2 = np.hypot(grow * a1, b1), np.hypot(grow * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, grow * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    mid_l, mid_c = (l1 + l2) / 2, (c1 + c2) / 2
    mid_h = np.radians((h1 + turn / 2) % 360 if c1 * c2 else h1 + h2)
    t = (
        1
        - 0.17 * np.cos(mid_h - np.radians(30))
        + 0.24 * np.cos(2 * mid_h)
        + 0.32 * np.cos(3 * mid_h + np.radians(6))
        - 0.2 * np.cos(4 * mid_h - np.radians(63))
    )
    sl, sc, sh = (
        1 + 0.015 * (mid_l - 50) ** 2 / np.sqrt(20 + (mid_l - 50) ** 2),
        1 + 0.045 * mid_c,
        1 + 0.015 * mid_c * t,
    )
    around_blue = np.radians(60) * np.exp(-(((np.degrees(mid_h) - 275) / 25) ** 2))
    rt = -2 * np.sqrt(mid_c**7 / (mid_c**7 + 25**7)) * np.sin(around_blue)
    return float(np.sqrt((dl / sl) ** 2 + (dc / sc) ** 2 + (dh / sh) ** 2 + rt * dc / sc * dh / sh))


@pytest.mark.parametrize(
    ("one", "other", "published"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ],
)
def test_the_colour_difference_gives_its_authors_published_values(one, other, published):
    assert ciede2000(one, other) == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize("role", COLOURS)
def test_a_colour_stands_out_from_both_pages(role):
    assert {page: c for page, c in ((p, contrast(COLOURS[role], h)) for p, h in PAGES.items()) if c < CONTRAST} == {}


@pytest.mark.parametrize("eyes", SEEN_BY)
def test_any_two_colours_can_be_told_apart(eyes):
    seen = {c: cielab(np.array(SEEN_BY[eyes]) @ linear(c)) for c in COLOURS.values()}
    apart = {(a, b): ciede2000(seen[a], seen[b]) for a, b in itertools.combinations(seen, 2)}
    assert {pair: d for pair, d in apart.items() if d < APART} == {}


@pytest.mark.parametrize(
    ("items", "same"),
    [
        ([Line([], [], "private", "a"), Line([], [], "private", "b")], True),
        ([Line([], [], "non-private", "a"), Line([], [], "other worker", "b")], True),
        ([Points([], [], "data", "a"), Points([], [], "data", "b")], True),
        ([Line([], [], "private", "a"), Line([], [], "private", "b", dashed=True)], False),
        ([Points([], [], "data", "a"), Points([], [], "data", "b", cross=True)], False),
        ([Line([], [], "private", "a"), Points([], [], "private", "b")], False),
        ([Line([], [], "private", "a"), Line([], [], "private")], False),  # nobody has to tell it from the other
    ],
)
def test_two_things_that_look_the_same_are_refused(items, same):
    def make():
        Panel("t", "x", "y", items, "alt")

    if same:
        with pytest.raises(ValueError, match="items must look different, got 'a' and 'b'"):
            make()
    else:
        make()
