"""Images out of a gradient: averaging and clipping hide nothing, noise does; and the pictures that show it."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import in_one_test
from PIL import Image
from verdicts import unexpected

from dpteach import plots
from dpteach.attacks import imprint_model, reconstruct
from dpteach.data import load_mnist
from dpteach.exercises import find
from dpteach.mechanism import add_noise, clipped_sum
from dpteach.models import mlp
from dpteach.plots import COLOURS, Panel, Pictures, Points
from dpteach.plots.painters import Axes


@pytest.fixture(scope="module")
def digits():
    return load_mnist()


def first_layer(gradient, units):
    weight, bias = gradient[: 785 * units].split([784 * units, units])
    return weight.view(units, 784), bias


@pytest.fixture(scope="module")
def exact(digits):
    """How many of 64 images come out with every grey value right, from one noisy sum of clipped gradients."""
    images, model = digits.take(64), imprint_model(digits.take(range(50_000, 60_000)))

    def count(noise_multiplier, max_grad_norm):
        summed = clipped_sum(model, F.cross_entropy, *images[:], max_grad_norm)
        noisy = add_noise(summed, noise_multiplier, max_grad_norm, torch.Generator().manual_seed(0))
        found = reconstruct(*first_layer(noisy, 512))
        nearest = found[torch.cdist(images.X.flatten(1), found).argmin(1)]
        return int(((nearest - images.X.flatten(1)).abs() < 1 / 510).all(1).sum())

    return count


@in_one_test("max_grad_norm", [1e6, 1.0, 0.01])
def test_neither_the_sum_over_a_batch_nor_clipping_hides_an_image(exact, max_grad_norm):
    assert exact(0.0, max_grad_norm) == 56


def test_noise_hides_them_all(exact):
    assert exact(1e-6, 1.0) > 50 and exact(1e-4, 1.0) == exact(1.0, 1.0) == 0


def test_one_record_comes_out_of_any_linear_layer(digits):
    record = digits.take([7])
    sent = clipped_sum(mlp(784, 16, 10), F.cross_entropy, *record[:], 0.1)
    found = reconstruct(*first_layer(sent, 16))
    rows = found[found.abs().sum(1) > 0]
    assert len(rows) > 3
    torch.testing.assert_close(rows, record.X.flatten().expand_as(rows), rtol=0, atol=1e-3)


def test_the_servers_units_part_the_public_images_into_equal_groups(digits):
    public = digits.take(5000)
    model = imprint_model(public, units=50)
    on = model[:3](public.X) > 0
    assert ((on.sum(0) - torch.linspace(5000, 100, 50)).abs() <= 40).all()
    assert (on[:, 1:] <= on[:, :-1]).all()  # whoever is above a threshold is above all lower ones
    with pytest.raises(ValueError, match="^units must"):
        imprint_model(public, units=1)


def test_where_no_record_lies_between_two_units_the_row_is_zeros():
    assert reconstruct(torch.ones(3, 4), torch.ones(3)).tolist() == [[0.0] * 4] * 2


def test_the_solution_of_exercise_8_1_is_the_packages_own_and_others_pass_too():
    weight, bias = torch.randn(9, 5), torch.randn(9)
    assert torch.equal(find("8.1").reference(weight, bias), reconstruct(weight, bias))

    def in_a_loop(weight, bias):
        rows = []
        for j in range(len(bias) - 1):
            share = bias[j] - bias[j + 1]
            rows.append((weight[j] - weight[j + 1]) / share if share != 0 else torch.zeros(weight.shape[1]))
        return torch.stack(rows)

    def nan_to_zero(weight, bias):
        return ((weight[1:] - weight[:-1]) / (bias[1:] - bias[:-1])[:, None]).nan_to_num(0.0)

    def pixels_apart(weight, bias):
        return weight.diff(dim=1)

    cases = [("8.1", right, True, "undoes any factor") for right in (in_a_loop, nan_to_zero)]
    assert unexpected([*cases, ("8.1", pixels_apart, False, "shape")]) == ""


# The picture


def gallery(**more):
    images = np.zeros((5, 4, 4))
    images[0], images[4], images[1, 0, 0] = 1.0, 0.5, np.nan
    return Panel("Five", "", "", [Pictures(images, 3, 2.0, "data", "five", **more)], "Five pictures.", bare=True)


def pixels(panel):
    href = ElementTree.fromstring(plots.svg([panel])).find(".//{*}image").get("href")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(href.partition(",")[2]))))


def test_pictures_are_ink_of_their_colour_row_by_row():
    sheet = pixels(gallery())
    assert sheet.shape == (8, 12, 4)  # 2 rows of 3; the sixth place stays empty
    assert (sheet[..., :3] == [int(COLOURS["data"][i : i + 2], 16) for i in (1, 3, 5)]).all()
    ink = sheet[..., 3]
    assert (ink[:4, :4] == 255).all() and (ink[4:, 4:8] == 127).all()
    assert (ink[:4, 4:] == 0).all() and (ink[4:, 8:] == 0).all()  # a NaN too


def test_what_lies_outside_is_drawn_as_no_ink_or_full_ink():
    panel = Panel("t", "", "", [Pictures(np.array([[[-3.0, 7.0]]]), 1, 1.0, "data")], "alt", bare=True)
    assert pixels(panel)[..., 3].tolist() == [[0, 255]]


def test_a_gallery_has_no_axes_live_or_in_the_still_but_its_words():
    svg = plots.svg([gallery()])
    assert 'aria-label="Five pictures."' in svg and re.findall(r"<text[^>]*>([^<]*)", svg) == ["Five", "five"]
    assert "polyline" not in svg.partition("</g>")[0]  # neither frame nor ticks; the key's own sign comes later
    figure = plots.still([gallery()])
    assert repr(figure) == "Five pictures."
    (image,) = figure.axes[0].images
    assert [t.get_text() for t in figure.axes[0].texts] == ["Five", "five"]
    left, right, bottom, top = image.get_extent()
    drawn = ElementTree.fromstring(svg).find(".//{*}image")
    assert [float(drawn.get(k)) for k in ("x", "width")] == pytest.approx([left, right - left], abs=0.1)
    assert [float(drawn.get(k)) for k in ("y", "height")] == pytest.approx([top, bottom - top], abs=0.1)


def test_a_picture_is_one_unit_of_the_axes_wide_and_high():
    panel = Panel("t", "", "", [Pictures(np.zeros((6, 2, 2)), 3, 5.0, "data")], "alt", (0, 6), (0, 6), bare=True)
    drawn, axes = ElementTree.fromstring(plots.svg([panel])).find(".//{*}image"), Axes(panel)
    assert float(drawn.get("width")) == pytest.approx(axes.width / 2, abs=0.1)
    assert float(drawn.get("height")) == pytest.approx(axes.height / 3, abs=0.1)
    assert float(drawn.get("y")) == pytest.approx(axes.y([5.0])[0], abs=0.1)
    assert Panel("t", "x", "y", [Pictures(np.zeros((6, 2, 2)), 3, 5.0, "data")], "alt").ranges()[0] == (0, 3)


def test_with_axes_the_ticks_and_the_frame_are_there():
    svg = plots.svg([Panel("t", "x", "y", [Points([0, 1], [0, 1], "data")], "alt")])
    assert {"x", "y", "0", "1"} <= set(re.findall(r"<text[^>]*>([^<]*)", svg)) and svg.count("<polyline") > 8
