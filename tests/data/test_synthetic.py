"""Generated data sets: the same bytes everywhere, true masks, and nothing but shapes to go by."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from labutils.base.files import project_dir
from labutils.data import synthetic
from labutils.data.synthetic import SETS, generate

COUNTS = {"shapes10": 150, "shapes100": 150, "scenes10": 20}  # several blocks, the last one cut
CHECKSUMS = {
    "shapes10": "608919aba17a33b4ff404b3114e50f640e12ea61dc1522c8b195183441249eec",
    "shapes100": "6b099e7ec606e91244f297d3aa74a80a6de4c7c4ab1823ceae6f05b645f94e1a",
    "scenes10": "c3560a01d47f3b744ff67d43981220732ccf9cf1754709bcdd05543878a6be31",
}
AREAS = {  # of a shape of radius 1, by school geometry
    "disc": math.pi * 0.88**2,
    "ring": math.pi * (0.95**2 - 0.53**2),
    "square": 1.52**2,
    "triangle": 1.8 * 1.6 / 2,
    "star": 5 * 0.42 * math.sin(math.pi / 5),
    "cross": 2 * 0.56 * 1.8 - 0.56**2,
    "arrow": 1.15 * 0.56 + 1.5 * 0.8 / 2,
    "hourglass": 2 * 1.5 * 0.85 / 2,
}


def checksum(name: str) -> str:
    """Of everything in the first images, with a shortcut in scenes10."""
    options = {"shortcut": 0.5} if name == "scenes10" else {}
    scenes = generate(name, COUNTS[name], 0, **options)
    hasher = hashlib.sha256()
    for array in scenes.images, scenes.labels, scenes.masks, scenes.backgrounds:
        hasher.update(np.ascontiguousarray(array))
    return hasher.hexdigest()


@pytest.fixture(scope="module")
def scenes():
    return generate("shapes10", 5000, seed=3)


@pytest.fixture(scope="module")
def worlds():
    """scenes10 with a shortcut of 0.8, by what has become of it."""
    return {
        agreement: generate("scenes10", 400, shortcut=0.8, agreement=agreement)
        for agreement in ("kept", "removed", "reversed")
    }


@pytest.mark.parametrize("name", SETS)
def test_the_bytes_are_those_of_every_other_machine(name):
    assert checksum(name) == CHECKSUMS[name]


def test_the_bytes_do_not_depend_on_vector_units():
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    code = "import test_synthetic as t; print({name: t.checksum(name) for name in t.SETS})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ
        | {"NPY_DISABLE_CPU_FEATURES": " ".join(found), "PYTHONPATH": str(project_dir())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(CHECKSUMS)


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_its_sizes_and_as_many_images_of_each_class(name):
    scenes, side = generate(name, 200), SETS[name].side
    assert (scenes.images.shape, scenes.images.dtype) == ((200, 3, side, side), np.uint8)
    assert (scenes.masks.shape, scenes.masks.dtype) == ((200, side, side), bool)
    assert (scenes.labels.shape, scenes.labels.dtype) == ((200,), np.int64)
    assert (scenes.backgrounds.shape, scenes.backgrounds.dtype) == ((200,), np.int64)
    assert len(set(scenes.classes)) == len(scenes.classes)
    assert set(np.bincount(scenes.labels)) == {200 // len(scenes.classes)}


def test_a_larger_count_adds_images():
    few, many = generate("shapes10", 70, seed=5), generate("shapes10", 200, seed=5)
    for part in "images", "labels", "masks", "backgrounds":
        np.testing.assert_array_equal(getattr(few, part), getattr(many, part)[:70])


def test_no_image_comes_twice():
    drawn = [generate("shapes10", 500, 0), generate("shapes10", 500, 1)]
    drawn += [generate("shapes100", 500, 0)]
    assert len({image.tobytes() for scenes in drawn for image in scenes.images}) == 1500
    assert len({mask.tobytes() for scenes in drawn for mask in scenes.masks}) == 1500


@pytest.mark.parametrize("name", SETS)
def test_a_mask_is_what_changes_with_the_colour_of_the_object(name, monkeypatch):
    surface, drawn = synthetic._surface, []
    for grey in 60, 190:
        # The original is called all the same, so that the random numbers after it stay.
        monkeypatch.setattr(
            synthetic, "_surface", lambda *given, g=grey: np.full_like(surface(*given), g)
        )
        drawn.append(generate(name, 60))
    dark, light = drawn
    np.testing.assert_array_equal(dark.masks, light.masks)
    share = (light.images.astype(int) - dark.images).mean(axis=1) / 130
    rounding = 4 / 130
    assert share.min() >= 0
    assert share[dark.masks].min() >= 0.5 - rounding
    assert share[~dark.masks].max() <= 0.5 + rounding
    assert dark.masks.sum() == pytest.approx(share.sum(), rel=0.02)


@pytest.mark.parametrize("side", [32, 96])
def test_edges_are_smooth_wherever_a_shape_lies(side):
    rng = np.random.default_rng(0)
    for shape, area in AREAS.items():
        radius = side * rng.uniform(0.2, 0.35, 40)
        pose = synthetic._pose(rng, radius, 0.4 * side, 0.6 * side)
        weight = synthetic._coverage(np.full(40, synthetic.SHAPES.index(shape)), pose, side)
        covered = weight.sum((1, 2, 3)) / 128 * pose.stretch / radius**2
        np.testing.assert_allclose(covered, area, rtol=0.03, err_msg=shape)


@pytest.mark.parametrize("name", SETS)
def test_an_image_shows_the_shape_that_its_label_names(name):
    scenes = generate(name, 400)
    found, expected = [], []
    for shape, area in AREAS.items():
        of_shape = [scenes.classes[label].startswith(shape) for label in scenes.labels]
        found.append(scenes.masks[of_shape].mean())
        expected.append(area)
    assert np.corrcoef(found, expected)[0, 1] > 0.98


def test_an_image_of_shapes100_shows_the_texture_that_its_label_names():
    scenes = generate("shapes100", 1000)
    assert scenes.classes[41] == "star, striped"
    rough = {texture: [] for texture in synthetic.TEXTURES}
    for image, label, mask in zip(scenes.images, scenes.labels, scenes.masks):
        steps = abs(np.diff(image.mean(0), axis=1))[mask[:, 1:] & mask[:, :-1]]
        rough[scenes.classes[label].split(", ")[1]].append(steps.mean())
    order = sorted(rough, key=lambda texture: np.median(rough[texture]))
    assert order[:2] == ["plain", "shaded"]


@pytest.mark.parametrize("name", SETS)
def test_enough_of_every_object_is_visible(name):
    scenes = generate(name, 400)
    smallest = min(AREAS.values()) * SETS[name].radius[0] ** 2
    assert scenes.masks.sum((1, 2)).min() > 0.3 * smallest


def test_neither_colour_nor_background_tells_the_class(scenes):
    table = np.zeros((10, 10))
    np.add.at(table, (scenes.labels, scenes.backgrounds), 1)
    assert stats.chi2_contingency(table).pvalue > 0.01
    images, masks = scenes.images.astype(np.float32), scenes.masks[:, None]
    inside = (images * masks).sum((2, 3)) / masks.sum((2, 3))
    outside = (images * ~masks).sum((2, 3)) / (~masks).sum((2, 3))
    for colour in *inside.T, *outside.T, abs(inside - outside).mean(1):
        groups = [colour[scenes.labels == label] for label in range(10)]
        assert stats.f_oneway(*groups).pvalue > 0.001


def test_a_shortcut_holds_as_often_as_asked(worlds):
    agrees = {name: scenes.backgrounds == scenes.labels for name, scenes in worlds.items()}
    assert stats.binomtest(agrees["kept"].sum(), 400, 0.8).pvalue > 0.01
    assert stats.binomtest(agrees["removed"].sum(), 400, 0.1).pvalue > 0.01
    assert not agrees["reversed"].any()
    others = (worlds["reversed"].backgrounds - worlds["reversed"].labels) % 10
    assert stats.chisquare(np.bincount(others, minlength=10)[1:]).pvalue > 0.01
    for shortcut in 0.0, 1.0:
        for name, textures in ("scenes10", 1), ("shapes10", 1), ("shapes100", 10):
            scenes = generate(name, 50, shortcut=shortcut)
            assert set(scenes.backgrounds == scenes.labels // textures) == {bool(shortcut)}


def test_without_a_shortcut_the_background_is_independent(worlds):
    scenes = generate("scenes10", 50)
    np.testing.assert_array_equal(scenes.backgrounds, worlds["removed"].backgrounds[:50])
    np.testing.assert_array_equal(scenes.images, worlds["removed"].images[:50])


def test_nothing_but_the_background_changes_with_the_agreement(worlds):
    kept, reverse = worlds["kept"], worlds["reversed"]
    np.testing.assert_array_equal(kept.masks, reverse.masks)
    np.testing.assert_array_equal(kept.labels, reverse.labels)
    changed = (kept.images != reverse.images).any(1)
    np.testing.assert_array_equal(changed.any((1, 2)), kept.backgrounds != reverse.backgrounds)
    # Away from its edges, where the background shines through.
    near = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    middle = np.logical_and.reduce([np.roll(kept.masks, shift, (1, 2)) for shift in near])
    assert middle.sum() > 0.5 * kept.masks.sum()
    assert not changed[middle].any()


@pytest.mark.parametrize("factor", [2, 3])
def test_a_mask_shrinks_to_where_the_object_fills_half_of_a_pixel_or_more(factor):
    whole, small = (generate("scenes10", 12, image_size=size) for size in (None, 96 // factor))
    blocks = whole.masks.reshape(12, 96 // factor, factor, 96 // factor, factor)
    np.testing.assert_array_equal(small.masks, blocks.mean((2, 4)) >= 0.5)
    assert small.masks.dtype == bool
    assert small.images.shape == (12, 3, 96 // factor, 96 // factor)


@pytest.mark.parametrize(
    ("arguments", "options", "problem"),
    [
        (("shape10", 5), {}, r"name = 'shape10'\. .*'shapes10', 'shapes100' or 'scenes10'"),
        ((10, 5), {}, "name = 10"),
        (("shapes10", 0), {}, r"count = 0\..* greater than 0"),
        (("shapes10", -3), {}, "count = -3"),
        (("shapes10", 2.5), {}, "count = 2.5"),
        (("shapes10", 5, -1), {}, "seed = -1"),
        (("scenes10", 5), {"shortcut": 1.1}, r"shortcut = 1\.1\..* less than or equal to 1"),
        (("scenes10", 5), {"shortcut": -0.1}, r"shortcut = -0\.1\..* greater than or equal to 0"),
        (("scenes10", 5), {"shortcut": math.nan}, "shortcut = nan"),
        (("scenes10", 5), {"shortcut": "0.9"}, "shortcut = '0.9'"),
        (
            *(("scenes10", 5), {"shortcut": 0.9, "agreement": "inverted"}),
            "agreement = 'inverted'.*'kept', 'removed' or 'reversed'",
        ),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments, options, problem):
    with pytest.raises(ValueError, match=f"generate: .*{problem}|generate: {problem}"):
        generate(*arguments, **options)
