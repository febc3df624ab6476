"""Batches: every image once, in an order that the seed fixes."""

import dataclasses
import hashlib
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as transforms

import labutils as lab
from labutils.base.files import data_dir, project_dir
from labutils.base.settings import Augment
from labutils.data import tensors
from labutils.data.sources import KNOWN

REAL_DATA = data_dir()  # before the fixtures redirect it

DISTORTED = Augment(rotate=40, translate=3, zoom=0.2)


ALL_AT_ONCE = Augment(rotate=40, translate=3, zoom=0.2, flip="random", crop=2, cutout=3)


def numbered(count: int, *, mean: float = 0.0) -> lab.Split:
    """Images of a single pixel that holds the image's number, as does the label."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return lab.Split(pixels, torch.arange(count), (mean,), (1 / 255,))


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


def test_splits_with_code_of_their_own_have_a_fingerprint_each(digits):
    class Inverted(lab.Split):
        def normalise(self, images):
            return -super().normalise(images)

    def inverted():
        return dataclasses.replace(digits, train=Inverted(**vars(digits.train)))

    data = inverted()
    assert data.fingerprint == data.fingerprint
    assert len({digits.fingerprint, data.fingerprint, inverted().fingerprint}) == 3


def test_the_fingerprint_is_the_one_that_names_published_runs(digits):
    hasher = hashlib.sha256()
    for split in digits.train, digits.val, digits.test:
        images, labels = split.images.numpy(), split.labels.numpy()
        hasher.update(repr((images.shape, digits.classes)).encode())
        hasher.update(images.tobytes() + labels.tobytes())
    assert digits.fingerprint == hasher.hexdigest()[:12] == "805c71ac3846"


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_published_cards_name_the_real_data_or_a_share_of_their_labels(name, monkeypatch):
    if not any((REAL_DATA / path).exists() for path in (f"{name}.npz", KNOWN[name].folder)):
        pytest.skip(f"no {name} in LABUTILS_DATA")
    monkeypatch.setenv("LABUTILS_DATA", str(REAL_DATA))
    data = lab.load_data(name, val_size=0.1, seed=0, device="cpu")
    cards = [json.loads(path.read_text()) for path in (project_dir() / "models").glob("*.json")]
    facts = [card["info"]["data"] for card in cards if card["info"]["data"]["name"] == name]
    assert facts
    for images, fingerprint in {(fact["images"]["train"], fact["fingerprint"]) for fact in facts}:
        share = images / len(data.train)
        assert (lab.label_budget(data, share) if share < 1 else data).fingerprint == fingerprint


def test_a_data_set_names_itself_in_a_line(digits):
    sizes = f"{len(digits.train):,} train, {len(digits.val):,} val, {len(digits.test):,} test"
    assert sizes in repr(digits)
    assert digits.fingerprint in repr(digits)
    assert "\n" not in repr(digits)


def replaced(data: lab.ImageData, part: str, **changes) -> lab.ImageData:
    split = dataclasses.replace(getattr(data, part), **changes)
    return dataclasses.replace(data, **{part: split})


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_the_fingerprint_follows_what_is_replaced(digits, part):
    split = getattr(digits, part)
    wider = dataclasses.replace(split, mean=(0.5,), std=(0.25,))
    cases = [
        replaced(digits, part, labels=split.labels.roll(1)),
        replaced(digits, part, labels=split.labels.int()),
        replaced(digits, part, images=split.images.flip(0)),
        replaced(digits, part, images=split.images.char()),
        replaced(digits, part, images=split.images[1:], labels=split.labels[1:]),
        replaced(digits, part, mean=(0.5,)),
        replaced(digits, part, std=(0.5,)),
        dataclasses.replace(digits, **{part: wider}),
        dataclasses.replace(digits, classes=digits.classes[::-1]),
        dataclasses.replace(digits, train=wider, val=wider, test=wider),
    ]
    found = {case.fingerprint for case in cases}
    assert len(found) == len(cases)
    assert digits.fingerprint not in found
    same = replaced(digits, part, images=split.images.clone(), mean=list(split.mean))
    assert same.fingerprint == digits.fingerprint
    same = replaced(
        digits, part, images=split.images.permute(1, 0, 3, 2).clone().permute(1, 0, 3, 2)
    )
    assert same.fingerprint == digits.fingerprint


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("name", ["images", "labels"])
def test_the_fingerprint_follows_changes_in_place(digits, part, name):
    tensor = getattr(getattr(digits, part), name).clone()
    data = replaced(digits, part, **{name: tensor})
    assert data.fingerprint == digits.fingerprint
    with torch.inference_mode():
        tensor[3:5] += 1
    changed = data.fingerprint
    view = tensor[4]
    view -= 1
    assert len({digits.fingerprint, changed, data.fingerprint}) == 3
    tensor[3] -= 1
    assert data.fingerprint == digits.fingerprint


def test_the_fingerprint_follows_labels_that_a_network_gave(digits):
    with torch.inference_mode():
        labels = digits.train.labels + 0
        data = replaced(digits, "train", labels=labels)
        assert data.fingerprint == digits.fingerprint
        labels += 1
        assert data.fingerprint != digits.fingerprint


def test_an_empty_split_has_a_fingerprint(digits):
    empty = {"images": digits.train.images[:0], "labels": digits.train.labels[:0]}
    found = {replaced(digits, part, **empty).fingerprint for part in ("train", "val", "test")}
    assert len(found | {digits.fingerprint}) == 4


def test_the_fingerprint_is_computed_once(digits, monkeypatch):
    data = dataclasses.replace(digits)
    first = data.fingerprint
    monkeypatch.setattr(tensors, "_fingerprint", lambda *_: pytest.fail("computed again"))
    assert data.fingerprint == first


def test_the_fingerprint_of_large_data_is_computed_in_pieces():
    images = torch.arange(2**23 + 2**22 + 3).byte().view(-1, 1, 1, 1).expand(-1, 1, 1, 2)
    labels = torch.arange(1).expand(len(images))
    split = lab.Split(images, labels, *tensors.pixel_statistics(images))
    data = lab.ImageData("large", "made up", ("a",), split, split, split)
    with Held(images) as held:
        found = data.fingerprint
    assert 0 < held.largest <= 2**24 < 2 * len(images)
    part = repr(((len(images), 1, 1, 2), ("a",))).encode()
    part += images.numpy().tobytes() + labels.numpy().tobytes()
    assert found == hashlib.sha256(3 * part).hexdigest()[:12]


def test_pixels_that_are_floats_are_normalised_in_a_copy(digits):
    pixels = digits.test.images.float()
    split = dataclasses.replace(digits.test, images=pixels)
    assert split.normalise(split.images).equal(digits.test.normalise(digits.test.images))
    assert pixels.equal(digits.test.images.float())


def test_a_run_belongs_to_the_data_as_they_are(digits):
    def trained(data):
        torch.manual_seed(0)
        model = lab.MLP(data.num_features, [4], data.num_classes)
        return lab.train(model, data, lab.TrainConfig(epochs=1), name="fingerprint", track=None)

    run = trained(digits)
    assert trained(dataclasses.replace(digits)).key == run.key
    relabelled = replaced(digits, "train", labels=digits.train.labels.roll(1))
    assert trained(relabelled).key != run.key
    tests = replaced(digits, "test", labels=digits.test.labels.clone())
    assert run.test(tests).accuracy == run.test(digits).accuracy
    tests.test.labels.add_(1).remainder_(10)
    with pytest.raises(lab.RunError, match=f"trained on data {digits.fingerprint}"):
        run.test(tests)


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
    with mock.patch("labutils.data.tensors._batches_at_once", return_value=group):
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


@pytest.mark.parametrize("augment", [Augment(), DISTORTED, ALL_AT_ONCE])
def test_an_epoch_can_be_taken_up_at_any_batch(digits, monkeypatch, augment):
    monkeypatch.setattr(tensors, "_batches_at_once", lambda images, batch_size: 3)
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


@pytest.mark.parametrize("augment", [Augment(), DISTORTED, ALL_AT_ONCE])
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
    monkeypatch.setattr(tensors, "_batches_at_once", lambda images, batch_size: 2)
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(12, -1, -1, -1)
    split = lab.Split(pixels, torch.arange(12), (0.0,), (1.0,))
    distorted = [
        image
        for epoch in (0, 1)
        for images, _ in split.shuffled(2, seed=0, epoch=epoch, augment=DISTORTED)
        for image in images
    ]
    assert len({tuple(image.flatten().tolist()) for image in distorted}) == 24


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_how_many_batches_are_prepared_together_changes_nothing(digits, monkeypatch, flip):
    augment, epochs = Augment(flip=flip, crop=2, cutout=3), []
    for group in (1, 3, 50):
        monkeypatch.setattr(tensors, "_batches_at_once", lambda images, size, group=group: group)
        epochs.append(list(digits.train.shuffled(100, seed=1, epoch=2, augment=augment)))
    for batches in zip(*epochs):
        for other in batches[1:]:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches[0], other))


def test_an_epoch_makes_no_second_copy_of_the_images(monkeypatch):
    monkeypatch.setattr(tensors, "_batches_at_once", lambda images, batch_size: 1)
    pixels = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    split = lab.Split(pixels, torch.arange(400) % 10, (0.5,) * 3, (0.2,) * 3)
    with Held(pixels) as held:
        for _ in split.shuffled(4, seed=0, epoch=0, augment=ALL_AT_ONCE):
            pass
    assert 0 < held.largest < 0.1 * pixels.nbytes


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("batch_size", -3), ("seed", np.int64(3)), ("epoch", -1), ("start", -1)],
)
def test_an_epoch_names_numbers_that_make_none(digits, name, value):
    given = {"batch_size": 8, "seed": 0, "epoch": 0, "start": 0}
    with pytest.raises(ValueError, match=rf"^shuffled: {name} = "):
        next(digits.train.shuffled(**given | {name: value}))


def test_no_batch_waits_for_the_device():
    # Reading a value of a tensor without values fails.
    split = lab.load_data("digits", device="meta").train
    batches = split.shuffled(100, seed=0, epoch=0, augment=ALL_AT_ONCE)
    shapes = [(images.shape, labels.shape) for images, labels in batches]
    assert shapes == [((100, 1, 8, 8), (100,))] * 12 + [((12, 1, 8, 8), (12,))]


def test_no_augmentation_changes_nothing(digits):
    images, labels = next(digits.train.shuffled(8, seed=0, epoch=0))
    plain = {image.numpy().tobytes() for image in digits.train.normalise(digits.train.images)}
    assert {image.numpy().tobytes() for image in images} <= plain
    unchanged = next(digits.train.shuffled(8, seed=0, epoch=0, augment=Augment()))
    assert torch.equal(unchanged[0], images)
    assert torch.equal(unchanged[1], labels)


def test_a_key_stands_for_this_order_and_for_so_many_batches_at_once(digits):
    # If this fails, published runs are no longer what their keys compute: raise FORMAT in key.py.
    labels = torch.cat([labels for _, labels in digits.train.shuffled(8, seed=3, epoch=5)])
    assert labels[:12].tolist() == [7, 5, 4, 5, 5, 8, 4, 5, 3, 0, 3, 4]
    # Distortion is drawn for all of them at once.
    assert tensors._batches_at_once(torch.empty(9, 1, 28, 28), 128) == 10
    assert tensors._batches_at_once(torch.empty(9, 3, 32, 32), 125) == 2
