"""Finding, checking and downloading data sets."""

import contextlib
import gzip
import io
import random
import re
import shutil
import socket
import tarfile
from collections import Counter
from http.client import BadStatusLine
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import datasets

import labutils as lab
from labutils.base.files import data_dir
from labutils.data import sources, synthetic
from labutils.data.sources import DataError

BLANK = np.zeros((60, 6, 6), np.uint8)
BAD_ARRAYS = {
    "missing array": ({"y_test": None}, "y_test is not a file"),
    "float images": ({"x_train": BLANK / 1.0}, "x_train is float64 (60, 6, 6)"),
    "flat images": ({"x_train": BLANK.reshape(60, 36)}, "x_train is uint8 (60, 36)"),
    "five channels": ({"x_train": np.zeros((60, 6, 6, 5), np.uint8)}, "(60, 6, 6, 5)"),
    "no pixels": ({"x_train": BLANK[:, :0]}, "x_train is uint8 (60, 0, 6)"),
    "negative labels": ({"y_train": np.arange(60) - 1}, "y_train holds the label -1"),
    "labels beyond int32": ({"y_test": np.full(20, 2**31)}, "y_test holds the label 2147483648"),
    "labels beyond int64": (
        {"y_train": np.full(60, 2**63 + 5, np.uint64)},
        "y_train holds the label 9223372036854775813",
    ),
    "float labels": ({"y_train": np.zeros(60)}, "y_train float64 (60,)"),
    "one-hot labels": ({"y_train": np.eye(60, dtype=int)}, "y_train int64 (60, 60)"),
    "lengths": ({"y_train": np.zeros(59, int)}, "x_train is uint8 (60, 6, 6), y_train int64 (59,)"),
    "empty": ({"x_test": BLANK[:0], "y_test": np.zeros(0, int)}, "x_test is uint8 (0, 6, 6)"),
    "sizes": ({"x_test": BLANK[:20, :5]}, "(1, 6, 6) in x_train, (1, 5, 6) in x_test"),
}
SINGLE_ARRAY = io.BytesIO()
np.save(SINGLE_ARRAY, BLANK)
NOT_NPZ = [b"", b"labels,pixels\n1,2\n", b"PK\x03\x04", b"\x93NUMPY", SINGLE_ARRAY.getvalue()]


@pytest.fixture
def mnist():
    """MNIST as torchvision leaves it, with 12 and 5 random images; returns the arrays."""
    return write_mnist(data_dir())


def read(name: str, **options) -> SimpleNamespace:
    source, classes, splits = sources.read(name, **options)
    return SimpleNamespace(source=source, classes=classes, **{"val": None} | splits)


def write_mnist(root: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in ("train", 12), ("t10k", 5):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (root / "MNIST" / "raw" / name).write_bytes(header + array.tobytes())
    return arrays


def test_an_unknown_name_gets_a_suggestion_and_the_known_names():
    with pytest.raises(ValueError, match=r"unknown data set 'minst'\. Did you mean 'mnist'\?") as e:
        read("minst")
    for known in [*sources.EMBEDDED, *sources.KNOWN, "folder:PATH", f"{data_dir()}/NAME.npz"]:
        assert known in str(e.value)
    with pytest.raises(ValueError, match="unknown data set 'xyz'") as e:
        read("xyz")
    assert "Did you mean" not in str(e.value)


@pytest.mark.parametrize("name", ["../x", "deep/x", "/absolute", "x/", "~nouser/x", "x" * 300])
def test_a_name_does_not_lead_out_of_the_data(name, write_npz, tmp_path):
    whole = write_npz().read_bytes()
    for path in (tmp_path / "x.npz", data_dir() / "deep" / "x.npz", data_dir() / "x" / ".npz"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole)
    name = str(tmp_path / "x") if name == "/absolute" else name
    with pytest.raises(ValueError, match=f"unknown data set '{name}'.*NAME without a slash"):
        read(name)


@pytest.mark.parametrize("path", ["x" * 300, ""])
def test_a_folder_that_cannot_be_is_named(path):
    with pytest.raises(DataError, match=f"^load_data: .*{path}"):
        read(f"folder:{path}")


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    raw = read("digits")
    images = np.concatenate([raw.train[0], raw.test[0]])[:, 0]
    assert (len(raw.train[1]), len(raw.test[1])) == (1347, 450)
    expected = np.rint(load_digits().images * 255 / 16)
    assert sorted(map(bytes, images)) == sorted(map(bytes, expected.astype(np.uint8)))
    assert abs(np.bincount(raw.test[1]) - np.bincount(load_digits().target) / 1797 * 450).max() < 1


@pytest.mark.parametrize(("name", "side"), [("shapes10", 32), ("shapes100", 32), ("scenes10", 96)])
def test_generated_sets_are_read_like_the_others(name, side, monkeypatch):
    small = synthetic.SETS[name]._replace(train=200, test=100)
    monkeypatch.setitem(synthetic.SETS, name, small)
    raw = read(name)
    for (images, labels), count, seed in (raw.train, 200, 0), (raw.test, 100, 1):
        drawn = synthetic.generate(name, count, seed)
        assert images.shape == (count, 3, side, side)
        np.testing.assert_array_equal(images, drawn.images)
        np.testing.assert_array_equal(labels, drawn.labels)
    assert (raw.source, raw.classes, raw.val) == ("labutils.synthetic", drawn.classes, None)


def test_npz_files_of_grey_and_colour_images_are_read(write_npz):
    grey, colour = BLANK + np.arange(6, dtype=np.uint8), np.stack([BLANK, BLANK + 1, BLANK + 2], -1)
    column = (np.arange(60) % 3).astype(np.uint8)[:, None]
    write_npz("grey", x_train=grey, y_train=column)
    write_npz("colour", x_train=colour, x_test=colour[:20])
    raw = read("grey")
    assert raw.train[0].shape == (60, 1, 6, 6)
    np.testing.assert_array_equal(raw.train[0][:, 0], grey)
    np.testing.assert_array_equal(raw.train[1], np.arange(60) % 3)
    assert (raw.source, raw.classes, raw.val) == ("grey.npz", ("0", "1", "2"), None)
    assert raw.train[0].dtype == np.uint8
    assert raw.train[1].dtype == np.int64
    raw = read("colour")
    assert raw.train[0].shape == (60, 3, 6, 6)
    assert raw.test[0][0, :, 4, 5].tolist() == [0, 1, 2]


def test_an_npz_may_have_a_validation_split_of_its_own(write_npz):
    write_npz(x_val=BLANK[:9] + 7, y_val=np.arange(9) % 3)
    data = lab.load_data("tiny", val_size=30, device="cpu")
    assert [len(split) for split in (data.train, data.val, data.test)] == [60, 9, 20]
    assert (data.val.images == 7).all()
    write_npz(x_val=BLANK[:9, 1:], y_val=np.arange(9) % 3)
    with pytest.raises(DataError, match=r"\(1, 6, 6\) in x_train, \(1, 5, 6\) in x_val"):
        read("tiny")


@pytest.mark.parametrize(("replaced", "problem"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_a_wrong_array_is_named_with_what_is_expected(write_npz, replaced, problem):
    path = write_npz(**replaced)
    with pytest.raises(DataError, match=r"images uint8 .* 1 or 3\)\], labels int") as caught:
        read("tiny")
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_pickled_objects_are_never_loaded(write_npz, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    write_npz(y_train=np.array([Payload()] * 60, dtype=object))
    with pytest.raises(DataError, match=r"tiny\.npz cannot be read .*allow_pickle"):
        read("tiny")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", NOT_NPZ)
def test_a_file_that_is_no_npz_is_named(write_npz, content):
    write_npz().write_bytes(content)
    with pytest.raises(DataError, match=r"tiny\.npz cannot be read .*Replace or move it"):
        read("tiny")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_in_an_npz_is_named_or_harmless(write_npz, save):
    path = write_npz()
    with np.load(path) as file:
        save(path, **file)
    whole, rng = path.read_bytes(), random.Random(0)
    harmless = 0
    for attempt in range(200):
        damaged = bytearray(whole)
        if attempt % 4 == 0:
            del damaged[rng.randrange(len(whole)) :]
        else:
            for _ in range(3):
                damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            read("tiny")
            harmless += 1
    assert harmless < 100


def test_class_names_lie_beside_the_npz(write_npz):
    names = write_npz().with_name("tiny_names.json")
    names.write_text('["cat", "dog", "Füchse"]', encoding="utf-8")
    assert read("tiny").classes == ("cat", "dog", "Füchse")


def test_the_classes_of_a_copy_of_cifar100_are_known_without_a_file(write_npz):
    write_npz("cifar100")
    classes = read("cifar100").classes
    assert list(classes) == sorted(classes)  # as the labels of the data set's own files
    assert len(set(classes)) == 100
    assert len(set(lab.superclasses(classes))) == 20


@pytest.mark.parametrize(
    ("train", "test", "named"),
    [([1, 2, 3], [1, 2, 3], 3), ([0, 1, 3], [0, 1], 3), ([0, 1], [2], 2), ([2**31 - 1], [0], 1)],
)
def test_a_class_without_a_training_image_needs_a_name(write_npz, train, test, named):
    highest = max(train + test)
    path = write_npz(y_train=np.resize(train, 60), y_test=np.resize(test, 20))
    names = path.with_name("tiny_names.json")
    wanted = rf"up to {highest}, but {named} class names. Put a JSON list of all {highest + 1} in"
    with pytest.raises(DataError, match=wanted) as caught:
        read("tiny")
    assert str(names) in str(caught.value)
    if highest < 4:
        names.write_text('["a", "b", "c", "d"]')
        assert read("tiny").classes == tuple("abcd")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '["cat", "dog"]',
            "labels up to 2, but 2 class names. .* list of all 3 into",
        ),
        ("[]", "0 class names"),
        ("[0, 1, 2]", "not a JSON list of names"),
        ("[" * 100_000, "not a JSON list of names"),
        ("cat\ndog", "not a JSON list"),
        ('{"0": "cat", "1": "dog", "2": "fox"}', "not a JSON list"),
        ("null", "not a JSON list"),
        ("3", "not a JSON list"),
        ('["cat", "dog", "cat"]', "has a name twice"),
    ],
)
def test_bad_class_names_are_refused(write_npz, text, problem):
    names = write_npz().with_name("tiny_names.json")
    names.write_text(text)
    with pytest.raises(DataError, match=problem) as caught:
        read("tiny")
    assert str(names) in str(caught.value)


def test_torchvisions_files_are_read(mnist):
    raw = read("mnist")
    for split, (images, labels) in ("train", raw.train), ("t10k", raw.test):
        np.testing.assert_array_equal(images[:, 0], mnist[f"{split}-images-idx3-ubyte"])
        np.testing.assert_array_equal(labels, mnist[f"{split}-labels-idx1-ubyte"])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert raw.source == "torchvision MNIST"
    assert raw.classes == tuple("0123456789")


def test_an_npz_comes_before_torchvisions_files(mnist, write_npz):
    write_npz("mnist")
    raw = read("mnist")
    assert raw.source == "mnist.npz"
    assert raw.train[0].shape == (60, 1, 6, 6)
    assert raw.classes == tuple("0123456789")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def drop_one_label(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:7] + bytes([content[7] - 1]) + content[8:-1])


def relabel(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xc8")


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (shorten, "train-images-idx3-ubyte"),
        (shorten, "t10k-labels-idx1-ubyte"),
        (Path.unlink, "t10k-images-idx3-ubyte"),
        (relabel, "train-labels-idx1-ubyte"),
        (drop_one_label, "train-labels-idx1-ubyte"),
        (lambda path: path.write_bytes(b"garbage"), "train-images-idx3-ubyte"),
        (lambda path: path.write_bytes(b""), "train-labels-idx1-ubyte"),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "t10k-images-idx3-ubyte"),
    ],
)
def test_damaged_torchvision_files_name_the_folder_and_the_way_out(mnist, damage, name):
    damage(data_dir() / "MNIST" / "raw" / name)
    with pytest.raises(DataError, match="is damaged or incomplete") as caught:
        read("mnist")
    for part in data_dir() / "MNIST", "Delete that folder and run again", "a copy in its place":
        assert str(part) in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvisions_own_checks_are_passed_on(name):
    folder = data_dir() / sources.KNOWN[name].folder
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"garbage")
    with pytest.raises(DataError, match="damaged or incomplete") as caught:
        read(name)
    assert str(folder) in str(caught.value)


def test_colour_images_of_torchvision_get_their_channels_first(monkeypatch):
    class Cifar:
        def __init__(self, root, train):
            self.data = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
            self.targets = [0, 1, 1, 0]

    (data_dir() / "cifar-100-python").mkdir(parents=True)
    monkeypatch.setattr(datasets, "CIFAR100", Cifar)
    raw = read("cifar100")
    assert raw.train[0][0, :, 1, 0].tolist() == [6, 7, 8]
    assert raw.train[0].flags.c_contiguous
    assert raw.classes[:2] == ("apple", "aquarium_fish")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "error",
    [URLError("no route"), RuntimeError("corrupt"), BadStatusLine("<html>"), tarfile.ReadError()],
)
def test_a_failed_download_explains_itself_and_leaves_nothing(monkeypatch, error, begun):
    def fetch(root, **options):
        if begun:
            (Path(root) / "MNIST" / "raw").mkdir(parents=True)
            (Path(root) / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(b"half")
        raise error

    monkeypatch.setattr(datasets, "MNIST", fetch)
    with pytest.raises(DataError, match="'mnist' is not on disk and could not be down") as caught:
        read("mnist")
    looked_for = [data_dir() / "mnist.npz", data_dir() / "MNIST"]
    ways = [
        "1. connect",
        "2. copy MNIST or mnist.npz",
        "3. set LABUTILS_DATA",
        "load_data('digits')",
    ]
    for part in [str(error) or "ReadError", *looked_for, *ways]:
        assert str(part) in str(caught.value)
    assert list(data_dir().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [("cifar10", "shapes10"), ("cifar100", "shapes100"), ("imagenette", "scenes10")],
)
def test_a_failed_download_names_the_embedded_set_that_is_most_alike(monkeypatch, name, stand_in):
    def fetch(root, **options):
        raise URLError("no route")

    monkeypatch.setattr(datasets, sources.KNOWN[name].dataset, fetch)
    with pytest.raises(DataError, match=rf"embedded load_data\('{stand_in}'\) answers"):
        read(name)
    assert stand_in in sources.EMBEDDED


def test_a_download_does_not_wait_for_ever_for_a_silent_server(monkeypatch):
    def fetch(*args, **kwargs):
        raise OSError(f"timeout {socket.getdefaulttimeout()}")

    before = socket.getdefaulttimeout()
    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    with pytest.raises(DataError, match=r"could not be downloaded: timeout 30"):
        read("mnist")
    assert socket.getdefaulttimeout() == before


def test_an_interrupted_download_leaves_nothing(monkeypatch):
    def fetch(root, **options):
        write_mnist(Path(root))
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "MNIST", fetch)
    with pytest.raises(KeyboardInterrupt):
        read("mnist")
    assert list(data_dir().iterdir()) == []


def test_a_download_takes_its_place_when_it_is_whole(monkeypatch):
    whole = datasets.MNIST

    def fetch(root, train=True, download=False):
        if download:
            write_mnist(Path(root))
            assert not (data_dir() / "MNIST").exists()
        return whole(root, train=train)

    monkeypatch.setattr(datasets, "MNIST", fetch)
    assert len(read("mnist").train[1]) == 12
    assert [path.name for path in data_dir().iterdir()] == ["MNIST"]
    monkeypatch.setattr(datasets, "MNIST", whole)
    assert len(read("mnist").test[1]) == 5


def test_two_notebooks_may_fetch_the_same(monkeypatch):
    whole = datasets.MNIST

    def fetch(root, train=True, download=False):
        if download:
            write_mnist(Path(root))
            write_mnist(data_dir())  # the other one is first
        return whole(root, train=train)

    monkeypatch.setattr(datasets, "MNIST", fetch)
    assert len(read("mnist").train[1]) == 12
    assert [path.name for path in data_dir().iterdir()] == ["MNIST"]


def test_imagenette_is_fetched_as_a_folder_with_readable_names(monkeypatch):
    # Found by torchvision, but nowhere else in public.
    whole = datasets.Imagenette
    names = whole._WNID_TO_CLASS

    def fetch(root, size, download=False):
        for name in ("train", "val") if download else ():
            for wnid in names:
                folder = Path(root) / "imagenette2-160" / name / wnid
                folder.mkdir(parents=True)
                Image.new("RGB", (30, 20), (120, 120, 120)).save(folder / "x.JPEG")
        return whole(root, size=size)

    monkeypatch.setattr(datasets, "Imagenette", fetch)
    raw = read("imagenette")
    assert raw.classes == tuple(names[wnid][0] for wnid in sorted(names))
    assert raw.train[0].shape == (10, 3, 128, 128)
    assert read("imagenette", image_size=16).test[0].shape == (10, 3, 16, 16)
    for split in "train", "val":
        shutil.rmtree(data_dir() / "imagenette2-160" / split / "n01440764")
    with pytest.raises(DataError, match=r"damaged or incomplete \(9 of 10 classes\)"):
        read("imagenette")


@pytest.mark.parametrize("size", [0, -8, 1.5, "64", True])
def test_a_bad_image_size_is_refused(size):
    with pytest.raises(ValueError, match=f"image_size = {size!r}"):
        lab.load_data("folder:somewhere", image_size=size)


@pytest.mark.parametrize(("name", "size"), [("shapes10", 16), ("shapes100", 4), ("scenes10", 48)])
def test_generated_images_shrink_to_the_mean_of_their_pixels(name, size, monkeypatch):
    spec = synthetic.SETS[name]._replace(train=20, test=10)
    monkeypatch.setitem(synthetic.SETS, name, spec)
    whole, small = read(name), read(name, image_size=size)
    side, factor = spec.side, spec.side // size
    pairs = zip((whole.train, whole.test), (small.train, small.test))
    for (images, labels), (shrunk, same) in pairs:
        assert (shrunk.dtype, shrunk.shape) == (np.uint8, (len(images), 3, size, size))
        oracle = F.avg_pool2d(torch.from_numpy(images).double(), factor)
        # Halves go up, where torch would round them to even.
        np.testing.assert_array_equal(shrunk, (oracle + 0.5).floor().numpy())
        np.testing.assert_array_equal(labels, same)
    np.testing.assert_array_equal(read(name, image_size=side).train[0], whole.train[0])


@pytest.mark.parametrize("size", [5, 64])
def test_a_size_that_generated_images_cannot_shrink_to_is_refused(size):
    wanted = f"image_size = {size} is no divisor of the 32 pixels of shapes10"
    with pytest.raises(ValueError, match=wanted):
        read("shapes10", image_size=size)


def test_a_shortcut_is_planted_in_train_and_test(monkeypatch):
    spec = synthetic.SETS["scenes10"]._replace(train=40, test=20)
    monkeypatch.setitem(synthetic.SETS, "scenes10", spec)
    data = lab.load_data("scenes10", shortcut=1.0, image_size=48, val_size=20, device="cpu")
    for split, seed, count in (([data.train, data.val], 0, 40), ([data.test], 1, 20)):
        drawn = synthetic.generate("scenes10", count, seed, shortcut=1.0, image_size=48)
        images = torch.cat([each.images for each in split]).numpy()
        assert {i.tobytes() for i in images} == {i.tobytes() for i in drawn.images}


@pytest.mark.parametrize("name", ["digits", "mnist", "other", "folder:somewhere"])
def test_a_shortcut_is_refused_where_it_has_no_effect(name, write_npz):
    write_npz("other")
    with pytest.raises(ValueError, match=f"shortcut = 0.5 has no effect on '{name}'"):
        lab.load_data(name, shortcut=0.5)


@pytest.mark.parametrize("name", ["digits", "mnist", "other"])
def test_image_size_is_refused_where_it_has_no_effect(name, write_npz):
    write_npz("other")
    with pytest.raises(ValueError, match=f"image_size = 32 has no effect on '{name}'"):
        read(name, image_size=32)


def test_image_size_is_for_imagenettes_folder_and_not_for_its_npz(write_npz):
    path = re.escape(str(write_npz("imagenette")))
    wanted = f"no effect on 'imagenette', read from {path}. Leave it out; .* imagenette's folder"
    with pytest.raises(ValueError, match=wanted):
        read("imagenette", image_size=32)


def test_cifar100_has_20_superclasses_of_five_classes_each():
    assert len(set(sources.CIFAR100_CLASSES)) == 100
    coarse = lab.superclasses(sources.CIFAR100_CLASSES)
    assert set(Counter(coarse).values()) == {5}
    # The fine and coarse labels of the first classes, as the data set's own files pair them.
    groups = sorted(sources.CIFAR100)
    assert [groups.index(name) for name in coarse[:8]] == [4, 1, 14, 8, 0, 6, 7, 7]


def test_a_generated_class_belongs_to_its_shape():
    classes = lab.generate("shapes100", 100).classes
    shapes = lab.generate("shapes10", 10).classes
    assert lab.superclasses(classes) == [shape for shape in shapes for _ in range(10)]


def test_a_class_without_a_superclass_is_refused():
    assert lab.superclasses(["maple tree", "maple_tree"]) == ["trees", "trees"]
    with pytest.raises(ValueError, match="'truck' has no superclass"):
        lab.superclasses(["apple", "truck"])
    with pytest.raises(ValueError, match="'fire_truck' has no superclass"):  # as it was given
        lab.superclasses(["fire_truck"])
