"""Crops, flips, distortions and holes: each against a slow loop or a closed form."""

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

import labutils as lab
from labutils.base.settings import Augment
from labutils.data import augmentation

ALL_AT_ONCE = Augment(rotate=40, translate=3, zoom=0.2)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def shown(split, augment, epoch=0, seed=0):
    """All images of an epoch, normalised, and the numbers of the images in the split."""
    batches = split.shuffled(16, seed=seed, epoch=epoch, augment=augment)
    order = torch.cat([labels for _, labels in split.shuffled(16, seed=seed, epoch=epoch)])
    return torch.cat([images for images, _ in batches]), order


def numbered(count, *size, seed=0):
    """Random images whose labels are their numbers, with pixels that normalising leaves alone."""
    pixels = (noise(count, *size, seed=seed) * 255 + 1).byte()
    channels = size[0]
    return lab.Split(pixels, torch.arange(count), (0.0,) * channels, (1 / 255,) * channels)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.sampled_from([torch.uint8, torch.float]))
def test_a_crop_is_a_window_of_the_mirrored_image(data, height, width, dtype):
    pad = data.draw(st.integers(0, min(height, width) - 1))
    images = (noise(4, 2, height, width) * 255).to(dtype)
    corners = torch.tensor([[data.draw(st.integers(0, 2 * pad)) for _ in "yx"] for _ in images])
    flips = torch.tensor([data.draw(st.booleans()) for _ in images])
    found = augmentation.crop_and_flip(images, corners, flips, pad)
    assert found.dtype == dtype
    for image, (top, left), flip, result in zip(images, corners.tolist(), flips, found):
        padded = np.pad(image.numpy(), [(0, 0), (pad, pad), (pad, pad)], mode="reflect")
        window = padded[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(result, window[..., ::-1] if flip else window)


@pytest.mark.parametrize("flip", ["none", "random"])
def test_an_epoch_shows_every_crop_about_equally_often(flip):
    split, pad = numbered(4_000, 1, 6, 7), 2
    images, order = shown(split, Augment(crop=pad, flip=flip))
    padded = F.pad(split.images.float(), (pad,) * 4, mode="reflect")[order]
    counts = []
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        window = padded[..., top : top + 6, left : left + 7]
        for view in (window,) if flip == "none" else (window, window.flip(-1)):
            counts.append(int((images - view).abs().flatten(1).amax(1).lt(1e-3).sum()))
    assert sum(counts) == 4_000
    assert stats.chisquare(counts).pvalue > 1e-3
    again = shown(split, Augment(crop=pad, flip=flip), epoch=1)[0]
    assert not torch.equal(images, again)


@pytest.mark.parametrize(
    "augment",
    [Augment(rotate=180), Augment(translate=4), Augment(zoom=0.5), ALL_AT_ONCE],
    ids=["rotate", "translate", "zoom", "all"],
)
@pytest.mark.parametrize("size", [(9, 9), (8, 14), (15, 6)], ids=str)
def test_distortion_equals_a_slow_loop_over_pixels(augment, size):
    height, width = size
    images = torch.rand(5, 2, height, width, generator=torch.Generator().manual_seed(0))
    found = augmentation.distort(images, augment, torch.Generator().manual_seed(1))
    draw = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).numpy() * 2.0 - 1
    rows, columns = np.indices(size)
    y, x = rows - (height - 1) / 2, columns - (width - 1) / 2  # pixels from the centre
    for number, (turn, scale, right, down) in enumerate(draw.T):
        angle, zoom = math.radians(turn * augment.rotate), 1 + scale * augment.zoom
        from_x = (math.cos(angle) * x - math.sin(angle) * y) / zoom + right * augment.translate
        from_y = (math.sin(angle) * x + math.cos(angle) * y) / zoom + down * augment.translate
        places = [from_y + (height - 1) / 2, from_x + (width - 1) / 2]
        for channel in range(2):
            image = images[number, channel].numpy()
            expected = ndimage.map_coordinates(image, places, order=1, mode="nearest")
            np.testing.assert_allclose(found[number, channel], expected, atol=1e-4)


def test_an_image_is_shifted_before_it_is_turned():
    # As the settings are listed. A turn takes a shift along both axes further along one of them.
    images = torch.zeros(2_000, 1, 63, 63)
    images[:, :, 31, 31] = 1
    augment = Augment(translate=10, rotate=45)
    found = augmentation.distort(images, augment, torch.Generator().manual_seed(0))
    rows = found.amax((1, 3)).argmax(1)
    assert 13 <= (rows - 31).abs().max() <= 14.2  # 10 * sqrt(2)
    fields = list(Augment.__dataclass_fields__)
    assert fields.index("translate") < fields.index("rotate") < fields.index("zoom")


def test_a_rotation_is_torchvisions_also_on_wide_images():
    # Inside the circle that a turn cannot leave, the border does not matter.
    rows, columns = np.indices((11, 21))
    inside = torch.from_numpy((rows - 5) ** 2 + (columns - 10) ** 2 < 16)
    image = torch.rand(1, 1, 11, 21, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        found = augmentation.distort(image, Augment(rotate=90), torch.Generator().manual_seed(seed))
        turn = torch.rand(4, 1, generator=torch.Generator().manual_seed(seed))[0].item() * 2 - 1
        bilinear = transforms.InterpolationMode.BILINEAR
        expected = transforms.rotate(image, turn * 90, interpolation=bilinear)
        torch.testing.assert_close(found[..., inside], expected[..., inside], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (12, 24)], ids=str)
@pytest.mark.parametrize("least", [0.1, 0.8])
def test_a_window_is_a_slow_crop_that_is_resized(size, least):
    height, width = size
    images = torch.rand(20, 2, height, width, generator=torch.Generator().manual_seed(0))
    found = augmentation.distort(images, Augment(area=least), torch.Generator().manual_seed(1))
    source = torch.Generator().manual_seed(1)
    torch.rand(4, 20, generator=source)  # what the other distortions draw
    drawn = torch.rand(4, 20, generator=source).double().numpy()
    seen = []
    for number, (share, ratio, right, down) in enumerate(drawn.T):
        area, ratio = least + share * (1 - least), (4 / 3) ** (2 * ratio - 1)
        wide, high = min(1, math.sqrt(area * ratio)), min(1, math.sqrt(area / ratio))
        left, top = right * (1 - wide) * width, down * (1 - high) * height
        rows = top + (np.arange(height) + 0.5) * high - 0.5
        columns = left + (np.arange(width) + 0.5) * wide - 0.5
        places = np.meshgrid(rows, columns, indexing="ij")
        for channel in range(2):
            image = images[number, channel].numpy()
            expected = ndimage.map_coordinates(image, places, order=1, mode="nearest")
            np.testing.assert_allclose(found[number, channel], expected, atol=1e-4)
        seen.append(wide * high)
    assert 0.75 * least < min(seen) < max(seen) <= 1


def test_a_window_is_part_of_a_training_epoch(digits):
    first = next(digits.train.shuffled(16, seed=0, epoch=0))[0]
    windows = next(digits.train.shuffled(16, seed=0, epoch=0, augment=Augment(area=0.3)))[0]
    assert not torch.allclose(first, windows, atol=0.1)


def test_no_distortion_is_the_identity(digits):
    images = digits.train.normalise(digits.train.images[:40])
    found = augmentation.distort(images, Augment(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, images, rtol=0, atol=1e-4)


def flipped(split, flip, epoch, seed=3):
    """Which images an epoch shows the other way round, in the order of the split."""
    augment = Augment(flip=flip)
    order, shown = [], []
    for options, found in (({}, order), ({"augment": augment}, shown)):
        for images, _ in split.shuffled(16, seed=seed, epoch=epoch, **options):
            found.append(images)
    plain, shown = torch.cat(order), torch.cat(shown)
    as_is = (shown == plain).flatten(1).all(1)
    mirrored = (shown == plain.flip(-1)).flatten(1).all(1)
    assert (as_is | mirrored).all()
    images = split.normalise(split.images)
    index = [int((images == image).flatten(1).all(1).nonzero()) for image in plain]
    return {number: bool(flag) for number, flag in zip(index, mirrored & ~as_is)}


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_flips_mirror_half_of_the_images(digits, flip):
    split = dataclasses.replace(
        digits.train, images=digits.train.images[:100], labels=digits.train.labels[:100]
    )
    turns = [flipped(split, flip, epoch) for epoch in range(3)]
    assert all(30 <= sum(turn.values()) <= 70 for turn in turns)
    both_ways = sum(turns[0][number] != turns[1][number] for number in turns[0])
    again = sum(turns[0][number] == turns[2][number] for number in turns[0])
    if flip == "alternating":
        assert (both_ways, again) == (100, 100)
    else:
        assert 30 <= both_ways <= 70
        assert 30 <= again <= 70
    assert flipped(split, flip, 0, seed=4) != turns[0]


def test_flips_leave_the_distortion_as_it_is(digits):
    options = {"rotate": 10.0, "translate": 1.0}
    plain, mirrored = (
        torch.cat([x for x, _ in digits.train.shuffled(8, seed=0, epoch=1, augment=augment)])
        for augment in (Augment(**options), Augment(flip="random", **options))
    )
    same = (plain == mirrored).flatten(1).all(1).float().mean()
    assert 0.4 < same < 0.6


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_hole_equals_a_slow_loop(data, height, width, side):
    images = noise(4, 2, height, width) + 1
    centres = [[data.draw(st.integers(0, size - 1)) for size in (height, width)] for _ in images]
    found = augmentation.blank(images.clone(), torch.tensor(centres), side)
    for image, (y, x), result in zip(images.numpy().copy(), centres, found):
        top, left = max(0, y - side // 2), max(0, x - side // 2)
        image[:, top : y - side // 2 + side, left : x - side // 2 + side] = 0
        np.testing.assert_array_equal(result, image)


def test_holes_are_square_where_they_fit_and_centred_anywhere():
    split, side = numbered(3_000, 3, 8, 6), 4
    images, _ = shown(split, Augment(cutout=side))
    blank = images.eq(0)
    assert torch.equal(blank.all(1), blank.any(1))
    rows, columns = (blank.any(1).any(axis) for axis in (2, 1))
    sizes = rows.sum(1) * columns.sum(1)
    assert torch.equal(sizes, blank.all(1).sum((1, 2)))
    for lengths, n in ((rows.sum(1), 8), (columns.sum(1), 6)):
        # The length that each centre on an axis of n pixels leaves, all equally likely.
        left = [min(n, centre + 2) - max(0, centre - 2) for centre in range(n)]
        expected = np.bincount(left)[2:] * 3_000 / n
        assert lengths.min() == 2
        assert stats.chisquare(torch.bincount(lengths)[2:], expected).pvalue > 1e-3


def test_holes_hold_the_mean_pixel(digits):
    plain, _ = shown(digits.train, Augment())
    images, _ = shown(digits.train, Augment(cutout=5))
    changed = images != plain
    assert 0.2 < changed.float().mean() < 0.5
    assert set(images[changed].tolist()) == {0.0}


def test_what_is_drawn_depends_on_the_whole_key():
    drawn = [
        augmentation.draw_pixels(50, (5, 7), *key)
        for key in (("crop", 0, 1), ("cutout", 0, 1), ("crop", 1, 0))
    ]
    again = augmentation.draw_pixels(50, (5, 7), "crop", 0, 1)
    assert torch.equal(again, drawn[0])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert (again.amin(0).tolist(), again.amax(0).tolist()) == ([0, 0], [4, 6])


@pytest.mark.parametrize(("setting", "largest"), [("crop", 5), ("cutout", 6)])
def test_images_that_are_too_small_are_named(setting, largest):
    split = numbered(20, 1, 6, 9)
    next(split.shuffled(4, seed=0, epoch=0, augment=Augment(**{setting: largest})))
    augment = Augment(**{setting: largest + 1})
    wanted = f"Augment: {setting} = {largest + 1} with images of 6x9 pixels: .* at most {largest}"
    with pytest.raises(ValueError, match=wanted):
        next(split.shuffled(4, seed=0, epoch=0, augment=augment))


def test_crops_and_holes_leave_the_distortion_as_it_is(digits):
    crop = {"crop": 2, "flip": "random"}
    cropped, _ = shown(digits.train, Augment(**crop))
    images, _ = shown(digits.train, Augment(**crop, translate=1.0, cutout=3))
    distorted = augmentation.distort(
        cropped, Augment(translate=1.0), augmentation.generator(0, 0, 0)
    )
    changed = images != distorted
    assert 0.05 < changed.float().mean() < 0.3
    assert set(images[changed].tolist()) == {0.0}


@pytest.mark.parametrize("side", [8, 12, 24])
def test_resized_images_are_those_of_torchvision(digits, side):
    images = next(digits.train.batches(5))[0]
    expected = transforms.resize(images, [side, side], antialias=True)
    assert torch.equal(augmentation.resize(images, side), expected)


def test_half_the_side_averages_by_a_triangle():
    row = torch.zeros(1, 1, 8, 8)
    row[..., 3] = 1.0
    weights = torch.tensor([0.0, 3 / 8, 1 / 8, 0.0])
    torch.testing.assert_close(augmentation.resize(row, 4), weights.expand(1, 1, 4, 4))


ALONE = [{"crop": 2}, {"flip": "random"}, {"rotate": 20}, {"translate": 2}, {"zoom": 0.3}]
ALONE += [{"area": 0.5}, {"cutout": 3}]


@pytest.mark.parametrize("change", ALONE, ids=str)
def test_each_setting_alone_changes_an_epoch_and_each_epoch_otherwise(digits, change):
    plain, *changed = (
        shown(digits.train, augment, epoch)[0]
        for augment, epoch in ((Augment(), 0), (Augment(**change), 0), (Augment(**change), 1))
    )
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([plain, *changed], 2))


def test_flips_crops_and_holes_depend_on_seed_and_epoch_and_not_on_each_other():
    augment = Augment(crop=3, flip="random", cutout=2)  # 7 corners on an axis, and 7 pixels
    first, *others = (
        augmentation.draw(augment, (200, 1, 7, 7), seed, epoch)
        for seed, epoch in ((0, 0), (1, 0), (0, 1))
    )
    for other in others:
        assert not any(torch.equal(a, b) for a, b in zip(first, other))
    _, corners, centres = first
    assert not torch.equal(corners, centres)


def test_what_a_key_stands_for_is_drawn_as_ever():
    # If this fails, published runs are no longer what their keys compute: raise FORMAT in key.py.
    assert augmentation.generator("flip", 3).initial_seed() == 19170980406694032
    changes = Augment(crop=2, flip="random", cutout=3)
    drawn = b"".join(t.numpy().tobytes() for t in augmentation.draw(changes, (50, 1, 8, 8), 3, 5))
    assert hashlib.sha256(drawn).hexdigest().startswith("b16d7c6679e48d94")
