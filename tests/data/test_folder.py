"""Folders of images: decoded as they look, in the order of torchvision, once."""

import io
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from torchvision import datasets

from labutils.base.files import data_dir
from labutils.data import folder, sources
from labutils.data.folder import DataError

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)]
GREYS = [(0, 0, 0), (128, 128, 128), (200, 200, 200), (255, 255, 255)]


def read(name: str, **options) -> SimpleNamespace:
    source, classes, splits = sources.read(name, **options)
    return SimpleNamespace(source=source, classes=classes, **{"val": None} | splits)


@pytest.fixture
def tree(tmp_path):
    """Write one image for each 'split/class/file' under a new folder; returns the folder."""

    def write(images: dict[str, Image.Image], **options) -> Path:
        for name, image in images.items():
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **options)
        return tmp_path / "tree"

    return write


def plain(value: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def decoded(tree, image: Image.Image, suffix: str, size: int, **options) -> np.ndarray:
    root = tree({f"train/a/x{suffix}": image, f"val/a/x{suffix}": image}, **options)
    return read(f"folder:{root}", image_size=size).train[0][0].transpose(1, 2, 0)


def striped(pixels: list, dtype=np.uint8) -> Image.Image:
    """A square image, one column for each pixel."""
    return Image.fromarray(np.array([pixels] * len(pixels), dtype))


GREY_STRIPES = [value for value, _, _ in GREYS]
MODES = {
    "RGB": (striped(COLOURS), ".png", {}, COLOURS),
    "palette": (striped(COLOURS).quantize(4), ".png", {}, COLOURS),
    "palette with transparency": (
        *(striped(COLOURS).quantize(4), ".png"),
        *({"transparency": b"\x00\x80\xff\x10"}, COLOURS),
    ),
    "RGBA": (striped([(*rgb, 40) for rgb in COLOURS]), ".png", {}, COLOURS),
    "CMYK": (striped(COLOURS).convert("CMYK"), ".tif", {}, COLOURS),
    "grey": (striped(GREY_STRIPES), ".png", {}, GREYS),
    "grey with alpha": (striped(GREY_STRIPES).convert("LA"), ".png", {}, GREYS),
    "16 bits": (striped([v * 257 for v in GREY_STRIPES], np.uint16), ".png", {}, GREYS),
    "16 bits in pgm": (striped([v * 257 for v in GREY_STRIPES], np.uint16), ".pgm", {}, GREYS),
    "16 bits in tiff": (striped([v * 257 for v in GREY_STRIPES], np.uint16), ".tif", {}, GREYS),
    "gif": (striped(COLOURS).quantize(4), ".gif", {}, COLOURS),
    "first of two frames": (
        *(striped(COLOURS).quantize(4), ".gif"),
        *({"save_all": True, "append_images": [striped(COLOURS[::-1]).quantize(4)]}, COLOURS),
    ),
    "bits": (striped([0, 0, 255, 255]).convert("1"), ".png", {}, [GREYS[i] for i in (0, 0, 3, 3)]),
}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("image", "suffix", "options", "pixels"), MODES.values(), ids=MODES)
def test_every_mode_of_image_becomes_rgb(tree, image, suffix, options, pixels):
    np.testing.assert_array_equal(decoded(tree, image, suffix, 4, **options), [pixels] * 4)


def test_a_jpeg_with_two_views_shows_the_first(tree):
    options = {"format": "MPO", "save_all": True, "append_images": [plain(9)], "quality": 95}
    assert abs(decoded(tree, plain(200), ".jpg", 4, **options).astype(int) - 200).max() < 4


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_32_bits_is_refused(tree, dtype):
    image = striped([0, 0, 1, 1], dtype)
    with pytest.raises(DataError, match=r"x\.png cannot be decoded \(32 bits of grey.* 8 or 16\)"):
        decoded(tree, image, ".png", 4, format="TIFF")


def test_postscript_does_not_reach_ghostscript(tree, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: started.append(given))
    with pytest.raises(DataError, match=r"x\.png cannot be decoded .*Read are PNG, JPEG, BMP, GIF"):
        decoded(tree, plain(1), ".png", 4, format="EPS")
    assert started == []


def test_the_cameras_orientation_is_followed(tree):
    image = striped(COLOURS)
    exif = Image.Exif()
    exif[0x0112] = 6  # the first column is the top row
    found = decoded(tree, image, ".png", 4, exif=exif)
    np.testing.assert_array_equal(found, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("size", "box"),
    [((40, 24), (8, 0, 32, 24)), ((18, 30), (0, 6, 18, 24)), ((5, 5), (0, 0, 5, 5))],
)
def test_the_centre_is_cut_out_and_scaled(tree, size, box):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = image.resize((12, 12), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(decoded(tree, image, ".png", 12), np.asarray(expected))


def test_a_large_jpeg_looks_the_same_after_its_fast_decoding(tree):
    # Waves that are lost when the file is decoded at less than the size asked for.
    waves = np.add.outer(np.sin(np.arange(300) / 4), np.cos(np.arange(400) / 5))
    image = Image.fromarray((128 + 60 * waves).astype(np.uint8)).convert("RGB")
    expected = image.resize((100, 100), Image.Resampling.BILINEAR, box=(50, 0, 350, 300))
    found = decoded(tree, image, ".jpg", 100, quality=95)
    assert abs(found.astype(int) - np.asarray(expected)).mean() < 3


def test_a_folder_gives_its_splits_classes_and_labels(tree):
    images = {"train/b/1.png": plain(11), "train/a/1.png": plain(10), "train/a/2.jpg": plain(12)}
    images |= {"val/a/1.png": plain(20), "val/b/1.png": plain(21)}
    root = tree(images)
    raw = read(f"folder:{root}")
    assert raw.train[0].shape == (3, 3, 64, 64)
    assert labelled(raw.train) == {(10, 0), (12, 0), (11, 1)}
    assert labelled(raw.test) == {(20, 0), (21, 1)}
    assert (raw.classes, raw.val) == (("a", "b"), None)
    tree({"test/a/1.png": plain(30), "test/b/1.png": plain(31), "test/b/2.png": plain(32)})
    raw = read(f"folder:{root}")
    assert labelled(raw.val) == {(20, 0), (21, 1)}
    assert labelled(raw.test) == {(30, 0), (31, 1), (32, 1)}


def labelled(split) -> set[tuple[int, int]]:
    """The grey and the label of each image of a split of plain images."""
    images, labels = split
    return set(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


def test_the_first_images_of_a_folder_are_not_all_of_one_class(tree):
    images = {f"train/{name}/{n}.png": plain(n) for name in "abc" for n in range(20)}
    root = tree(images | {f"val/{name}/1.png": plain(1) for name in "abc"})
    first, again = (read(f"folder:{root}").train for _ in range(2))
    assert set(first[1][:10]) == {0, 1, 2}
    assert np.bincount(first[1]).tolist() == [20, 20, 20]
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()


def odd_tiff() -> bytes:
    """A TIFF that gives the place of its pixels as text, which Pillow reports as a TypeError."""
    file = io.BytesIO()
    plain(1).save(file, "TIFF")
    return file.getvalue().replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, 2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("short.jpg", None),
        ("odd.tif", odd_tiff()),
        ("text.png", b"not an image"),
        ("empty.jpg", b""),
    ],
)
def test_a_damaged_image_is_named_and_nothing_is_cached(tree, name, content):
    root = tree({"train/a/x.jpg": plain(1, (60, 60)), "val/a/x.jpg": plain(1, (60, 60))})
    whole = (root / "train" / "a" / "x.jpg").read_bytes()
    (root / "train" / "a" / name).write_bytes(whole[:-40] if content is None else content)
    with pytest.raises(DataError, match=f"{name} cannot be decoded .*Replace or remove the file"):
        read(f"folder:{root}")
    assert not list(data_dir().rglob("*"))


def test_an_incomplete_folder_says_what_is_needed(tree, tmp_path):
    with pytest.raises(DataError, match="holds none of train/, val/, test/") as caught:
        read(f"folder:{tmp_path / 'absent'}")
    assert str(tmp_path / "absent") in str(caught.value)
    root = tree({"val/a/1.png": plain(0)})
    with pytest.raises(DataError, match=r"holds val of .*Needed: train/CLASS/IMAGE"):
        read(f"folder:{root}")
    tree({"train/a/1.png": plain(0), "train/b/1.png": plain(0)})
    wanted = r"tree: .*no valid file for the classes b\. .* needs an image .* of train, val\."
    with pytest.raises(DataError, match=wanted):
        read(f"folder:{root}")
    (root / "val" / "b").mkdir()
    with pytest.raises(DataError, match=wanted):
        read(f"folder:{root}")
    for split in "train", "val":
        for path in (root / split / "a").iterdir():
            path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"no valid file for the classes a\. .*\(\.png, "):
        read(f"folder:{root}")
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    with pytest.raises(DataError, match=r"any class folder in .*val. Each class needs an image"):
        read(f"folder:{root}")
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train" / "x.png").touch()
    with pytest.raises(DataError, match=r"any class folder in .*train\."):
        read(f"folder:{root}")


def test_a_folder_whose_only_classes_are_hidden_says_what_is_needed(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / ".hidden").mkdir(parents=True)
    with pytest.raises(DataError, match="Each class needs an image"):
        read(f"folder:{tmp_path}")


def caches() -> list[Path]:
    return list((data_dir() / "cache").glob("*.npz"))


def test_linked_files_and_class_folders_are_read(tree, tmp_path):
    root = tree({"train/a/x.png": plain(1), "val/a/deep/er/x.png": plain(2)})
    (root / "train" / "a" / "y.png").symlink_to(root / "val" / "a" / "deep" / "er" / "x.png")
    (root / "train").rename(tmp_path / "elsewhere")
    (root / "train").mkdir()
    (root / "train" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (root / "test").symlink_to(root / "val")
    raw = read(f"folder:{root}")
    assert labelled(raw.train) == {(1, 0), (2, 0)}
    assert labelled(raw.val) == labelled(raw.test) == {(2, 0)}


def test_images_and_labels_are_those_of_torchvisions_imagefolder(tree):
    names = ["a/2.png", "a/B/1.png", "a/b/1.png", "a/b.png", "a/b-c/1.png", "a-b/1.png", "B/1.png"]
    images = {f"train/{name}": plain(10 * number) for number, name in enumerate(names)}
    images |= {f"val/{name}": plain(1) for name in names}
    root = tree(images | {"train/a/notes.txt": plain(1)}, format="PNG")
    theirs = datasets.ImageFolder(str(root / "train"))
    raw = read(f"folder:{root}")
    assert labelled(raw.train) == {(image.getpixel((0, 0))[0], label) for image, label in theirs}
    assert raw.classes == tuple(theirs.classes)


@pytest.fixture
def cached(tree):
    """A folder that was read once; returns its name, an image in train and the cache of train."""
    root = tree({"train/a/x.png": plain(50), "val/a/x.png": plain(60)})
    assert read(f"folder:{root}", image_size=8).train[0].max() == 50
    (cache,) = [path for path in caches() if np.load(path)["images"].max() == 50]
    return f"folder:{root}", root / "train" / "a" / "x.png", cache


def test_a_folder_is_decoded_once(cached, monkeypatch):
    monkeypatch.setattr(folder, "decode", lambda *_: pytest.fail("decoded again"))
    raw = read(cached[0], image_size=8)
    assert (raw.train[0] == 50).all()
    assert (raw.test[0] == 60).all()


def test_a_changed_image_or_size_is_decoded_anew(cached):
    name, path, _ = cached
    plain(51, (31, 9)).save(path)
    assert read(name, image_size=8).train[0].max() == 51
    assert read(name, image_size=5).train[0].shape == (1, 3, 5, 5)
    assert len(caches()) == 5  # train at first, train now, val, and both in the other size


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"labels,pixels\n1,2\n", None])
def test_a_damaged_cache_is_made_again(cached, content):
    name, _, cache = cached
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert (read(name, image_size=8).train[0] == 50).all()
    assert len(caches()) == 2
    with np.load(cache) as file:
        assert file["images"].shape == (1, 3, 8, 8)


def test_what_programs_hide_beside_images_is_no_class_and_no_image(tree):
    paths = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in "ab" for i in "12"]
    root = tree({path: plain(50) for path in paths})
    before = read(f"folder:{root}")
    tree({"train/a/.ipynb_checkpoints/1-checkpoint.png": plain(9), "train/.trash/1.png": plain(9)})
    (root / "train" / "a" / "._1.png").write_bytes(b"what a Mac leaves")
    after = read(f"folder:{root}")
    assert (after.classes, len(after.train[1])) == (before.classes, 4) == (("a", "b"), 4)


def test_what_is_no_file_is_said_to_be_none(tmp_path):
    for path in (tmp_path, tmp_path / "absent.png", "x" * 300):
        with pytest.raises(DataError, match=rf"^{path} is no file\."):
            folder.decode(path, 8)


def test_a_change_that_leaves_the_size_of_the_file_is_seen(cached):
    name, path, _ = cached
    before = path.stat()
    plain(51).save(path)
    os.utime(path, ns=(before.st_mtime_ns + 1, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert read(name, image_size=8).train[0].max() == 51


def test_a_relative_path_begins_at_the_project(tree, tmp_path, monkeypatch):
    tree({"train/a/x.png": plain(1), "val/a/x.png": plain(2)})
    monkeypatch.setattr(sources, "project_dir", lambda: tmp_path)
    assert labelled(read("folder:tree").train) == {(1, 0)}


def test_the_home_of_nobody_is_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "project_dir", lambda: tmp_path)
    with pytest.raises(DataError, match=r"~nouser/x holds none of train/"):
        read("folder:~nouser/x")
