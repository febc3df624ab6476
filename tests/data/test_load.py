"""Splits, statistics and batches."""

import dataclasses
import json
import math
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import labutils as lab
from labutils.base.files import data_dir


def made_up(name, classes, train, test, **others):
    """A data set as sources.read returns it."""
    return name, classes, {"train": train, "test": test} | others


REAL_DATA = data_dir()  # before the fixtures redirect it


def load_raw(labels, **options) -> lab.ImageData:
    """Load a made-up source whose every image holds its number; the last nine are test."""
    labels = np.asarray(labels, dtype=np.int64)
    number = np.arange(len(labels), dtype="<u2").view(np.uint8).reshape(-1, 1, 1, 2)
    classes = tuple(str(label) for label in range(labels.max() + 1))
    raw = made_up("made up", classes, (number[:-9], labels[:-9]), (number[-9:], labels[-9:]))
    with mock.patch("labutils.data.load.read", return_value=raw):
        return lab.load_data("made-up", device="cpu", **options)


def numbers(split: lab.Split) -> np.ndarray:
    return split.images.numpy().reshape(-1, 2).view("<u2")[:, 0]


@st.composite
def cuts(draw):
    """Labels of unequal classes in any order, and a size of val that can hold every class."""
    counts = draw(st.lists(st.integers(2, 40), min_size=2, max_size=6))
    labels = draw(st.randoms(use_true_random=False)).sample(
        [label for label, count in enumerate(counts) for _ in range(count)], sum(counts)
    )
    size = draw(st.integers(len(counts), sum(counts) - len(counts)))
    # A fraction is rounded up to whole images.
    return labels, draw(st.sampled_from([size, (size - 0.5) / sum(counts)])), size


# Whatever is imported on first use takes long.
@settings(deadline=None)
@given(cuts(), st.integers(0, 2**32 - 1))
def test_the_cut_is_stratified_disjoint_and_exhaustive(cut, seed):
    labels, val_size, expected = cut
    loaded = load_raw(labels + [0] * 9, val_size=val_size, seed=seed)
    train, val = numbers(loaded.train), numbers(loaded.val)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert len(val) == expected
    exact = np.bincount(labels) * len(val) / len(labels)
    assert abs(np.bincount(loaded.val.labels, minlength=len(exact)) - exact).max() < 1
    for split in loaded.train, loaded.val:
        np.testing.assert_array_equal(split.labels, np.asarray(labels)[numbers(split)])
    np.testing.assert_array_equal(numbers(loaded.test), len(labels) + np.arange(9))


def test_the_seed_alone_decides_the_cut():
    labels = np.arange(209) % 4
    first, again, other = (load_raw(labels, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(numbers(first.val), numbers(again.val))
    assert set(numbers(first.val)) != set(numbers(other.val))
    np.testing.assert_array_equal(numbers(first.test), numbers(other.test))


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ],
)
def test_the_device_does_not_change_what_is_loaded(digits, device):
    there = lab.load_data("digits", device=device)
    assert dataclasses.replace(there, train=0, val=0, test=0) == dataclasses.replace(
        digits, train=0, val=0, test=0
    )
    for split in (there.train, there.val, there.test):
        assert split.images.device.type == split.labels.device.type == device
        assert (split.mean, split.std) == (digits.val.mean, digits.val.std)


@pytest.mark.parametrize("subset", [0.1, 0.5, 1])
def test_a_subset_keeps_class_shares_and_the_other_splits(subset):
    labels = np.repeat([0, 1, 2], [100, 60, 49])
    whole, part = load_raw(labels), load_raw(labels, subset=subset)
    assert set(numbers(part.train)) <= set(numbers(whole.train))
    exact = np.bincount(whole.train.labels) * subset
    assert abs(np.bincount(part.train.labels) - exact).max() < 1
    for name in "val", "test":
        np.testing.assert_array_equal(numbers(getattr(part, name)), numbers(getattr(whole, name)))


@pytest.mark.parametrize(
    "options",
    [{"val_size": bad} for bad in (0, -0.1, 1.0, 5, 1340, math.nan, "0.1", True, None)]
    + [{"subset": bad} for bad in (0, -1, 1.1, 0.001, math.nan, "1", True, None)]
    + [{"seed": bad} for bad in (-1, 2**32, 1.0, "0", True, None)],
)
def test_a_bad_cut_is_named_with_its_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^load_data: {name} = {value!r}[. ]"):
        lab.load_data("digits", device="cpu", **options)


def test_a_cut_that_does_not_fit_says_what_would():
    with pytest.raises(ValueError, match=r"val_size = 5 does not fit 1,347 ") as caught:
        lab.load_data("digits", device="cpu", val_size=5)
    assert "a fraction in (0, 1) or 10 to 1337 images" in str(caught.value)
    with pytest.raises(ValueError, match=r"subset = 0\.999 .* 1, or a fraction that keeps 10 to "):
        lab.load_data("digits", device="cpu", subset=0.999)
    for labels in ([0] * 20 + [1], [1, 0]):
        with pytest.raises(ValueError, match=r"images; classes need two"):
            load_raw(labels + [0] * 9)


def test_a_source_with_its_own_val_split_keeps_it():
    images, labels = np.arange(40, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(40) % 2
    parts = {"train": slice(0, 20), "val": slice(20, 30), "test": slice(30, 40)}
    raw = made_up(
        "r", ("a", "b"), **{key: (images[cut], labels[cut]) for key, cut in parts.items()}
    )
    with mock.patch("labutils.data.load.read", return_value=raw):
        loaded = lab.load_data("r", device="cpu", val_size=4)
        for bad in (-5, math.nan):
            with pytest.raises(ValueError, match=f"^load_data: val_size = {bad!r}\\."):
                lab.load_data("r", device="cpu", val_size=bad)
    for key, cut in parts.items():
        np.testing.assert_array_equal(getattr(loaded, key).images, images[cut])


def test_statistics_are_those_of_the_training_pixels(write_npz):
    rng = np.random.default_rng(1)
    images = (rng.random((5_000, 6, 6, 3)) ** 3 * [255, 90, 20]).astype(np.uint8)
    write_npz(x_train=images, y_train=np.arange(5_000) % 3, x_test=images[:20])
    loaded = lab.load_data("tiny", device="cpu")
    pixels = loaded.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(loaded.train.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(loaded.train.std, pixels.std((0, 2, 3)), rtol=1e-12)
    assert loaded.test.mean == loaded.val.mean == loaded.train.mean
    assert loaded.test.std == loaded.train.std


def test_a_channel_without_variation_stays_finite():
    constant = np.arange(256, dtype=np.uint8)[None, :, None, None].repeat(40, 0).repeat(7, 3)
    raw = made_up("constant", ("a", "b"), *[(constant, np.arange(40) % 2)] * 2)
    with mock.patch("labutils.data.load.read", return_value=raw):
        train = lab.load_data("constant", device="cpu").train
    assert set(train.std) == {1.0}
    images = train.normalise(train.images)
    torch.testing.assert_close(images, torch.zeros_like(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("source", ["npz", "folder"])
def test_loaded_images_are_held_once(source, write_npz, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 64, 64, 3), np.uint8)
    name = "tiny"
    if source == "npz":
        write_npz(x_train=images[:60], x_test=images[60:])
    else:
        name = f"folder:{tmp_path / 'tree'}"
        for number, image in enumerate(images):
            split = "train" if number < 50 else "val"
            path = tmp_path / "tree" / split / str(number % 2) / f"{number}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    lab.load_data(name, device="cpu")  # what is imported and cached on first use is not counted
    tracemalloc.start()
    try:
        loaded = lab.load_data(name, device="cpu")
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert sum(len(split) for split in (loaded.train, loaded.val, loaded.test)) == 80
    assert images.nbytes <= held < 1.2 * images.nbytes


def test_a_data_set_describes_itself(digits):
    assert digits.num_classes == 10
    assert digits.image_shape == (1, 8, 8)
    assert digits.num_features == 64
    for part in "digits", "load_digits", "1,212 train, 135 val, 450 test", digits.fingerprint:
        assert part in str(digits)


@pytest.mark.skipif(
    not any((REAL_DATA / name).exists() for name in ("mnist.npz", "MNIST")),
    reason="no MNIST in LABUTILS_DATA",
)
def test_real_mnist_is_what_it_is_known_to_be(monkeypatch):
    monkeypatch.setenv("LABUTILS_DATA", str(REAL_DATA))
    mnist = lab.load_data("mnist", val_size=5_000, device="cpu")
    assert [len(split) for split in (mnist.train, mnist.val, mnist.test)] == [55_000, 5_000, 10_000]
    assert mnist.image_shape == (1, 28, 28)
    assert mnist.train.images.dtype == torch.uint8
    labels = torch.cat([mnist.train.labels, mnist.val.labels])
    # The counts of the digits 0 to 9 as published with the data set.
    assert torch.bincount(labels).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert torch.bincount(mnist.test.labels).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
    assert mnist.train.mean == pytest.approx((0.1307,), abs=5e-4)
    assert mnist.train.std == pytest.approx((0.3081,), abs=5e-4)


def test_numbers_of_numpy_are_those_of_python_in_a_card(digits):
    given = {"val_size": np.int64(100), "subset": np.float32(0.5)}
    data = lab.load_data("digits", **given, device="cpu")
    assert (len(data.val), json.dumps(data.loaded)) == (
        100,
        '{"name": "digits", "val_size": 100, "subset": 0.5, "seed": 0, "image_size": null, '
        '"shortcut": null}',
    )
    assert type(lab.load_data("shapes10", shortcut=np.float32(0.5)).loaded["shortcut"]) is float


def test_a_subset_is_drawn_by_the_seed_and_normalised_by_its_own_pixels():
    kept = []
    for seed in (0, 1):
        images = np.arange(209, dtype=np.uint8).reshape(-1, 1, 1, 1)
        splits = {name: (images, np.arange(209) % 2) for name in ("train", "val", "test")}
        raw = ("r", ("a", "b"), splits)
        with mock.patch("labutils.data.load.read", return_value=raw):
            train = lab.load_data("r", subset=0.5, seed=seed, device="cpu").train
        pixels = train.images.double() / 255
        assert train.mean == pytest.approx((pixels.mean().item(),), rel=1e-12)
        assert train.std == pytest.approx((pixels.std(correction=0).item(),), rel=1e-12)
        kept.append(train.images)
    assert not kept[0].equal(kept[1])


def test_data_go_to_the_best_device_unless_told_otherwise():
    with mock.patch("labutils.data.load.resolve_device", return_value="meta") as resolve:
        assert lab.load_data("digits").train.images.is_meta
    resolve.assert_called_once_with("auto")
