"""Splits, statistics and batches."""

import dataclasses
import math
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as transforms

import labutils as lab
from labutils.base.settings import Augment, data_dir
from labutils.data import load
from labutils.data.sources import Raw

REAL_DATA = data_dir()  # before the fixtures redirect it
DISTORTED = Augment(rotate=40, translate=3, zoom=0.2)
ALL_AT_ONCE = Augment(rotate=40, translate=3, zoom=0.2, flip="random", crop=2, cutout=3, mixup=0.5)


def numbered(count: int, *, mean: float = 0.0) -> lab.Split:
    """Images of a single pixel that holds the image's number, as does the label."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return lab.Split(pixels, torch.arange(count), (mean,), (1 / 255,))


def load_raw(labels, **options) -> lab.ImageData:
    """Load a made-up source whose every image holds its number; the last nine are test."""
    labels = np.asarray(labels, dtype=np.int64)
    number = np.arange(len(labels), dtype="<u2").view(np.uint8).reshape(-1, 1, 1, 2)
    classes = tuple(str(label) for label in range(labels.max() + 1))
    raw = Raw("made up", classes, (number[:-9], labels[:-9]), (number[-9:], labels[-9:]))
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
    with pytest.raises(ValueError, match=r"val_size = 5 does not fit 1,347 .* in 10 classes") as e:
        lab.load_data("digits", device="cpu", val_size=5)
    assert "a fraction in (0, 1) or a number of images from 10 to 1337" in str(e.value)
    with pytest.raises(ValueError, match=r"the smallest of 1.*at least two images a class"):
        load_raw([0] * 20 + [1] + [0] * 9)


def test_a_source_with_its_own_val_split_keeps_it():
    images, labels = np.arange(40, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(40) % 2
    parts = {"train": slice(0, 20), "val": slice(20, 30), "test": slice(30, 40)}
    raw = Raw("r", ("a", "b"), **{key: (images[cut], labels[cut]) for key, cut in parts.items()})
    with mock.patch("labutils.data.load.read", return_value=raw):
        loaded = lab.load_data("r", device="cpu", val_size=4)
    for key, cut in parts.items():
        np.testing.assert_array_equal(getattr(loaded, key).images, images[cut])


def test_the_fingerprint_names_pixels_labels_classes_and_the_cut(write_npz):
    def fingerprint(**replaced):
        options = {key: replaced.pop(key) for key in ("seed", "val_size") if key in replaced}
        write_npz(**replaced)
        return lab.load_data("tiny", **{"device": "cpu", "val_size": 12} | options).fingerprint

    path = write_npz()
    with np.load(path) as file:
        arrays = dict(file)
    changed = {name: arrays[name].copy() for name in arrays}
    for name in "x_train", "x_test":
        changed[name][7, 2, 3] ^= 1
    for name in "y_train", "y_test":
        changed[name][7] = (changed[name][7] + 1) % 3
    same = [{}, {"y_train": arrays["y_train"].astype(np.uint8)}]
    same += [{"x_test": arrays["x_test"][..., None]}, {"val_size": 0.2}]
    different = [{name: value} for name, value in changed.items()] + [{"seed": 1}, {"val_size": 13}]
    assert {fingerprint(**case) for case in same} == {fingerprint()}
    assert len({fingerprint(**case) for case in [{}, *different]}) == 1 + len(different)
    path.with_name("tiny_names.json").write_text('["a", "b", "c"]')
    renamed = fingerprint()
    path.with_name("tiny_names.json").unlink()
    assert renamed != fingerprint()


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
    raw = Raw("constant", ("a", "b"), *[(constant, np.arange(40) % 2)] * 2)
    with mock.patch("labutils.data.load.read", return_value=raw):
        train = lab.load_data("constant", device="cpu").train
    assert set(train.std) == {1.0}
    images = train.normalise(train.images)
    torch.testing.assert_close(images, torch.zeros_like(images), rtol=0, atol=1e-4)


def test_normalising_equals_a_slow_loop_and_torchvision(write_npz):
    rng = np.random.default_rng(2)
    write_npz(
        x_train=rng.integers(0, 256, (60, 5, 7, 3), np.uint8),
        x_test=rng.integers(0, 99, (20, 5, 7, 3), np.uint8),
    )
    split = lab.load_data("tiny", device="cpu").test
    found = split.normalise(split.images)
    assert found.dtype == torch.float32
    reference = transforms.normalize(split.images / 255, list(split.mean), list(split.std))
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    assert torch.equal(split.pixels(found), split.images)
    beyond = torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert split.pixels(beyond)[:, :, 0, 0].tolist() == [[0] * 3, [255] * 3]
    for image, result in zip(split.images.numpy() / 255.0, found):
        for channel in range(3):
            expected = (image[channel] - split.mean[channel]) / split.std[channel]
            np.testing.assert_allclose(result[channel], expected, rtol=1e-5, atol=1e-5)


def test_evaluation_batches_hold_all_images_in_order():
    batches = list(numbered(11, mean=3 / 255).batches(4))
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(11))
    pixels = torch.cat([images for images, _ in batches]).flatten()
    torch.testing.assert_close(pixels, torch.arange(11) - 3.0)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.integers(0, 9))
def test_an_epoch_holds_every_image_once_but_a_lone_last_one(count, batch_size, group, epoch):
    split = numbered(count)
    with mock.patch("labutils.data.load._batches_at_once", return_value=group):
        batches = list(split.shuffled(batch_size, seed=0, epoch=epoch))
    labels = torch.cat([labels for _, labels in batches])
    dropped = 1 if count > 1 and count % batch_size == 1 else 0
    assert len(set(labels.tolist())) == len(labels) == count - dropped
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert (
        len(batches) == split.num_batches(batch_size) == math.ceil((count - dropped) / batch_size)
    )
    torch.testing.assert_close(
        torch.cat([images for images, _ in batches]).flatten(), labels.float(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("augment", [None, DISTORTED, ALL_AT_ONCE])
def test_an_epoch_can_be_taken_up_at_any_batch(digits, monkeypatch, augment):
    monkeypatch.setattr(load, "_batches_at_once", lambda images, batch_size: 3)
    split = dataclasses.replace(
        digits.train, images=digits.train.images[:130], labels=digits.train.labels[:130]
    )
    whole = list(split.shuffled(16, seed=1, epoch=2, augment=augment))
    for start in range(len(whole) + 1):
        rest = list(split.shuffled(16, seed=1, epoch=2, start=start, augment=augment))
        assert len(rest) == len(whole) - start
        for ours, theirs in zip(rest, whole[start:]):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("augment", [None, DISTORTED, ALL_AT_ONCE])
def test_an_epoch_depends_on_seed_and_epoch_only(digits, augment):
    def first(**options):
        return next(digits.train.shuffled(8, augment=augment, **options))

    torch.manual_seed(0)
    images, labels = first(seed=3, epoch=5)
    torch.manual_seed(1)
    again = first(seed=3, epoch=5)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    for options in {"seed": 3, "epoch": 6}, {"seed": 4, "epoch": 5}, {"seed": 5, "epoch": 3}:
        assert not torch.equal(labels, first(**options)[1])


def test_each_group_and_epoch_is_distorted_anew(monkeypatch):
    monkeypatch.setattr(load, "_batches_at_once", lambda images, batch_size: 2)
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(12, -1, -1, -1)
    split = lab.Split(pixels, torch.arange(12), (0.0,), (1.0,))
    distorted = [
        image
        for epoch in (0, 1)
        for images, _ in split.shuffled(2, seed=0, epoch=epoch, augment=ALL_AT_ONCE)
        for image in images
    ]
    assert len({tuple(image.flatten().tolist()) for image in distorted}) == 24


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_how_many_batches_are_prepared_together_changes_nothing(digits, monkeypatch, flip):
    augment, epochs = Augment(flip=flip, crop=2, cutout=3, mixup=0.5), []
    for group in (1, 3, 50):
        monkeypatch.setattr(load, "_batches_at_once", lambda images, size, group=group: group)
        epochs.append(list(digits.train.shuffled(100, seed=1, epoch=2, augment=augment)))
    for batches in zip(*epochs):
        for other in batches[1:]:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches[0], other))


class Held(TorchDispatchMode):
    """Notes the size in bytes of the largest storage that an operation returns."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() != self.known:
                    self.largest = max(self.largest, storage.nbytes())
        return found


def test_an_epoch_makes_no_second_copy_of_the_images(monkeypatch):
    monkeypatch.setattr(load, "_batches_at_once", lambda images, batch_size: 1)
    pixels = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    split = lab.Split(pixels, torch.arange(400) % 10, (0.5,) * 3, (0.2,) * 3)
    with Held(pixels) as held:
        for _ in split.shuffled(4, seed=0, epoch=0, augment=ALL_AT_ONCE, num_classes=10):
            pass
    assert 0 < held.largest < 0.1 * pixels.nbytes


def test_no_batch_waits_for_the_device():
    # Reading a value of a tensor without values fails.
    split = lab.load_data("digits", device="meta").train
    batches = split.shuffled(100, seed=0, epoch=0, augment=ALL_AT_ONCE, num_classes=10)
    shapes = [(images.shape, labels.shape) for images, labels in batches]
    assert shapes == [((100, 1, 8, 8), (100, 10))] * 12 + [((12, 1, 8, 8), (12, 10))]


def test_labels_of_mixed_images_have_a_share_for_each_class(digits):
    augment = Augment(mixup=0.4)
    for num_classes, width in ((None, 10), (12, 12)):
        options = {"seed": 0, "epoch": 0, "augment": augment, "num_classes": num_classes}
        images, labels = next(digits.train.shuffled(50, **options))
        assert labels.shape == (50, width)
        assert labels.dtype == images.dtype == torch.float32
        torch.testing.assert_close(labels.sum(1), torch.ones(50))


def test_no_augmentation_changes_nothing(digits):
    plain, unchanged = (
        next(digits.train.shuffled(8, seed=0, epoch=0, augment=augment))[0]
        for augment in (None, Augment())
    )
    assert torch.equal(plain, unchanged)


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
