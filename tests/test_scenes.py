"""The scenes: privacy costs something in them, and their learning rates are the best of those that were tried."""

import csv
import dataclasses
import warnings
from importlib.resources import files

import pytest
import torch

from dpteach import data, scenes, train
from dpteach.data import load_breast_cancer


def stored(**like):
    rows = csv.DictReader(files("dpteach.explorer").joinpath("scenes.csv").read_text("utf8").splitlines())
    return [row for row in rows if all(row[name] == str(value) for name, value in like.items())]


def reached(scene, method, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a δ of 1e-5 is a large one nowhere here
        settings = dataclasses.replace(scene.settings, **changes)
        *_, last = train(scene.make_model(), scene.data, settings, method=method, test_data=scene.test_data)
    return last.accuracy


def test_the_learning_rates_are_the_best_that_were_tried_and_privacy_costs_in_every_scene():
    for name, scene in scenes().items():
        rows = stored(scene=name, method="sgd"), stored(scene=name, method="dpsgd", noise_multiplier=1.0)
        plain, private = (max(tried, key=lambda row: float(row["accuracy"])) for tried in rows)
        assert len(rows[0]) == len(rows[1]) == 7
        assert (float(plain["lr"]), float(private["lr"])) == (scene.baseline_lr, scene.settings.lr), name
        others = stored(scene=name, method="dpsgd")
        assert float(plain["accuracy"]) > max(float(row["accuracy"]) for row in others) - 0.003, name
        by_sigma = [
            float(row["accuracy"])
            for sigma in (0.1, 1.0, 4.0, 10.0)
            for row in stored(scene=name, noise_multiplier=sigma, lr=scene.settings.lr)
        ]
        assert by_sigma == sorted(by_sigma, reverse=True) and by_sigma[0] - by_sigma[-1] > 0.08, name


@pytest.mark.parametrize("method, sigma", [("sgd", 0.0), ("dpsgd", 1.0)])
def test_a_stored_row_comes_out_again(method, sigma):
    scene = scenes()["two moons"]
    lr = scene.baseline_lr if method == "sgd" else scene.settings.lr
    (row,) = stored(scene="two moons", method=method, noise_multiplier=sigma, lr=lr)
    found = [reached(scene, method, lr=lr, noise_multiplier=sigma, seed=seed) for seed in range(int(row["seeds"]))]
    assert sum(found) / len(found) == pytest.approx(float(row["accuracy"]), abs=0.01)


def test_on_two_moons_four_noise_multipliers_differ_by_eye_in_the_run_that_a_learner_sees():
    scene = scenes()["two moons"]
    four = [reached(scene, "dpsgd", noise_multiplier=sigma) for sigma in (0.1, 1.0, 4.0, 10.0)]
    assert all(before - after > 0.04 for before, after in zip(four, four[1:])), four


def test_the_patients_are_scaled_by_the_public_ones_only():
    private, public = load_breast_cancer(), load_breast_cancer(train=False)
    assert (len(private), len(public), private.X.shape[1]) == (400, 169, 30)
    assert public.X.mean(0).abs().max() < 1e-5 and (public.X.std(0, correction=0) - 1).abs().max() < 1e-5
    assert private.X.mean(0).abs().max() > 0.05
    assert int(private.y.sum() + public.y.sum()) == 357  # benign, of 569


def test_the_source_of_records_makes_them_again():
    for scene in scenes().values():
        for records in (scene.data, scene.test_data):
            again = eval(records.source, vars(data))
            assert torch.equal(again.X, records.X) and torch.equal(again.y, records.y), records.source
    assert scene.data.take([1, 2]).source == "" and scene.data.take(slice(3, 9)).take(2).source.endswith(
        ".take(slice(3, 9, None)).take(2)"
    )
