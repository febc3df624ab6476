"""Where images come from: files under LABUTILS_DATA, torchvision, a folder, or the package itself.

Everything is returned as NumPy arrays; splitting and devices are the business of `data`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..base.files import atomic_write, data_dir, digest, project_dir
from ..base.settings import PositiveInt, check, first_line, suggestion
from .synthetic import SETS, class_names, generate

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, C, H, W], labels int64 [N]

CIFAR10_CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


class DataError(RuntimeError):
    """A data set is missing, damaged or not what it claims to be."""


@dataclass(frozen=True)
class Raw:
    """A data set as found. val is None where the source has none of its own."""

    source: str
    classes: tuple[str, ...]
    train: Arrays
    test: Arrays
    val: Arrays | None = None


@dataclass(frozen=True)
class _Known:
    """A data set that torchvision can download."""

    dataset: str  # class in torchvision.datasets
    folder: str  # what torchvision leaves under its root
    stand_in: str  # embedded data set that answers the same question
    classes: list[str] = field(default_factory=list)


KNOWN = {
    "mnist": _Known("MNIST", "MNIST", "digits", [str(digit) for digit in range(10)]),
    "cifar10": _Known("CIFAR10", "cifar-10-batches-py", "shapes10", CIFAR10_CLASSES),
    "cifar100": _Known("CIFAR100", "cifar-100-python", "shapes100"),
    "imagenette": _Known("Imagenette", "imagenette2-160", "scenes10"),
}
EMBEDDED = ("digits", *SETS)  # at hand everywhere, without files or a network


def read(name: str, *, image_size: int | None = None) -> Raw:
    """Find a data set by name: embedded, an npz file, torchvision's files, torchvision's download.

    image_size: side in pixels for `folder:PATH` (default 64), imagenette (default 128) and the
        generated sets, where it has to divide the side that they are drawn with.
    Raises ValueError for an unknown name, DataError for missing or damaged data.
    """
    takes_size = name in ("imagenette", *SETS) or name.startswith("folder:")
    if image_size is not None and not takes_size:
        raise ValueError(
            f"load_data: image_size = {image_size!r} has no effect on {name!r}. "
            f"It is for imagenette, {', '.join(SETS)} and folder:PATH; leave it out."
        )
    if image_size is not None:
        check("load_data", {"image_size": PositiveInt}, {"image_size": image_size})
    if name == "digits":
        return _digits()
    if name in SETS:
        return _generated(name, image_size or SETS[name].side)
    if name.startswith("folder:"):
        return _folder(
            project_dir() / Path(name.removeprefix("folder:")).expanduser(), image_size or 64
        )
    if (npz := data_dir() / f"{name}.npz").exists():
        return _npz(npz, name)
    if name not in KNOWN:
        names = ["digits", *KNOWN, *SETS]
        raise ValueError(
            f"load_data: unknown data set {name!r}.{suggestion(name, names)} "
            f"Known: {', '.join(names)}, "
            f"folder:PATH, or any NAME for which {data_dir()}/NAME.npz exists."
        )
    if not (data_dir() / KNOWN[name].folder).exists():
        _download(name)
    if name == "imagenette":
        raw = _folder(data_dir() / KNOWN[name].folder, image_size or 128)
        return Raw(
            "torchvision Imagenette, 160 px variant",
            tuple(IMAGENETTE_CLASSES.get(wnid, wnid) for wnid in raw.classes),
            raw.train,
            raw.test,
        )
    return _torchvision(name)


def _digits() -> Raw:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=450, stratify=labels, random_state=0
    )
    return Raw(
        "scikit-learn load_digits",
        tuple(str(name) for name in bunch.target_names),
        (images[train], labels[train]),
        (images[test], labels[test]),
    )


def _generated(name: str, size: int) -> Raw:
    side = SETS[name].side
    if side % size:
        allowed = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        raise ValueError(
            f"load_data: image_size = {size} does not divide the {side} pixels that {name} is "
            f"drawn with. Choose one of {allowed}."
        )
    train, test = (
        generate(name, count, seed)
        for seed, count in enumerate((SETS[name].train, SETS[name].test))
    )
    return Raw(
        "labutils.synthetic",
        class_names(name),
        (_shrunk(train.images, side // size), train.labels),
        (_shrunk(test.images, side // size), test.labels),
    )


def _shrunk(images: np.ndarray, factor: int) -> np.ndarray:
    """The mean of each square of factor x factor pixels: uint8 [N, C, H, W], rounded half up."""
    if factor == 1:
        return images
    count, channels, height, width = images.shape
    blocks = images.reshape(count, channels, height // factor, factor, width // factor, factor)
    area = factor**2
    # In whole numbers, so that the bytes are the same on every machine.
    return ((blocks.sum(axis=(3, 5), dtype=np.uint32) + area // 2) // area).astype(np.uint8)


def _npz(path: Path, name: str) -> Raw:
    expected = (
        "Expected arrays x_train, y_train, x_test, y_test: images uint8 [N, H, W] or [N, H, W, C] "
        "with 1 or 3 channels, labels whole numbers [N]. Replace the file or move it away."
    )
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except Exception as error:  # zip, zlib and NumPy report damage as almost any exception
        why = first_line(error).strip("'\"")  # a KeyError quotes
        raise DataError(f"load_data: {path} cannot be read ({why}). {expected}") from error
    splits = {}
    for split in ("train", "test"):
        images, labels = found[f"x_{split}"], found[f"y_{split}"]
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        images = images[..., None] if images.ndim == 3 else images
        problem = None
        shape = images.shape
        if images.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
            problem = f"x_{split} is {found[f'x_{split}'].dtype} {found[f'x_{split}'].shape}"
        elif labels.ndim != 1 or labels.dtype.kind not in "iu":
            problem = f"y_{split} is {found[f'y_{split}'].dtype} {found[f'y_{split}'].shape}"
        elif len(images) != len(labels) or len(images) == 0:
            problem = f"x_{split} holds {len(images)} images and y_{split} {len(labels)} labels"
        elif labels.min() < 0:
            problem = f"y_{split} holds the label {labels.min()}"
        if problem:
            raise DataError(f"load_data: {path}: {problem}. {expected}")
        splits[split] = np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64)
    if splits["train"][0].shape[1:] != splits["test"][0].shape[1:]:
        shapes = [found[f"x_{split}"].shape for split in splits]
        raise DataError(
            f"load_data: {path}: x_train is {shapes[0]}, x_test {shapes[1]}. {expected}"
        )
    return Raw(path.name, _class_names(path, name, splits), splits["train"], splits["test"])


def _class_names(path: Path, name: str, splits: dict[str, Arrays]) -> tuple[str, ...]:
    """Names from NAME_names.json beside the file, from what is known, or plain numbers."""
    count = 1 + max(int(labels.max()) for _, labels in splits.values())
    names = KNOWN[name].classes if name in KNOWN else []
    names = names or [str(label) for label in range(count)]
    beside = path.with_name(f"{name}_names.json")
    if beside.exists():
        try:
            names = json.loads(beside.read_text(encoding="utf-8"))
            if not isinstance(names, list):
                raise ValueError(f"it holds {names!r:.40}")
        except ValueError as error:
            raise DataError(f"load_data: {beside} is not a JSON list ({error}).") from error
    if len(names) < count:
        raise DataError(
            f"load_data: {path} has labels up to {count - 1}, but {len(names)} class names are "
            f"known for {name!r}. Put a JSON list of all {count} names into {beside}."
        )
    return tuple(str(item) for item in names)


def _torchvision(name: str) -> Raw:
    from torchvision import datasets

    known, root = KNOWN[name], data_dir()
    splits: dict[str, Arrays] = {}
    try:
        for split in ("train", "test"):
            dataset = getattr(datasets, known.dataset)(root, train=split == "train")
            images, labels = np.asarray(dataset.data), np.asarray(dataset.targets, dtype=np.int64)
            images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
            splits[split] = np.ascontiguousarray(images), labels
            names = known.classes or dataset.classes
            if len(images) != len(labels):
                raise ValueError(f"{len(images)} images but {len(labels)} labels in {split}")
            if labels.max() >= len(names):
                raise ValueError(f"the label {labels.max()} in {split}, but {len(names)} classes")
    # torchvision reports damage as almost any exception, AssertionError among them.
    except Exception as error:
        raise DataError(
            f"load_data: {root / known.folder} is damaged or incomplete ({first_line(error)}). "
            f"Delete that folder and run again to download {name!r} anew, "
            f"or put a whole copy at {root / (name + '.npz')}."
        ) from error
    return Raw(f"torchvision {known.dataset}", tuple(names), splits["train"], splits["test"])


def _download(name: str) -> None:
    """Fetch with torchvision into a temporary folder and move the result when it is whole."""
    from torchvision import datasets

    known, root = KNOWN[name], data_dir()
    fetch: Callable[..., Any] = getattr(datasets, known.dataset)
    timeout = socket.getdefaulttimeout()
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".download-", dir=root))
        socket.setdefaulttimeout(30)
        if name == "imagenette":
            fetch(temporary, split="train", size="160px", download=True)
        else:
            fetch(temporary, download=True)
        (temporary / known.folder).replace(root / known.folder)
    except Exception as error:  # a proxy that answers in its own words is no OSError
        raise DataError(
            f"load_data: {name!r} is not on disk and could not be downloaded "
            f"({first_line(error)}).\n"
            f"Looked for: {root / (name + '.npz')}, then {root / known.folder}.\n"
            "Three ways to get it: 1. connect to the network and run again; "
            f"2. copy {name}.npz (x_train, y_train, x_test, y_test) into {root}; "
            "3. set LABUTILS_DATA to a folder that holds it.\n"
            f"The embedded load_data({known.stand_in!r}) answers the same question offline."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _folder(root: Path, size: int) -> Raw:
    """An ImageFolder tree: train/ and one or both of val/ and test/, a folder for each class."""
    from torchvision.datasets import ImageFolder

    found = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    if "train" not in found or len(found) < 2:
        raise DataError(
            f"load_data: {root} holds {', '.join(found) or 'none'} of train/, val/, test/. "
            "Needed: train/CLASS/IMAGE and the same under val/ or test/."
        )
    try:
        trees = {split: ImageFolder(str(root / split)) for split in found}
    except FileNotFoundError as error:
        raise DataError(
            f"load_data: {root}: {error} Add images to each class or remove its folder."
        ) from error
    classes = trees["train"].classes
    for split, tree in trees.items():
        if tree.classes != classes:
            odd = sorted(set(classes) ^ set(tree.classes))
            raise DataError(
                f"load_data: {root}: train/ and {split}/ differ in the classes {', '.join(odd)}. "
                "Every class needs a folder in each split."
            )
    files = [Path(path) for tree in trees.values() for path, _ in tree.samples]
    stats = [(str(file.relative_to(root)), *_size_and_time(file)) for file in files]
    cache = (
        data_dir() / "cache" / f"{root.name}-{size}px-{digest([str(root.resolve()), stats])}.npz"
    )
    images = _cached(cache) if cache.exists() else None
    if images is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = np.stack(list(pool.map(lambda file: _decode(file, size), files)))
        # Where it cannot be kept, decoding is done anew next time.
        with suppress(OSError), atomic_write(cache) as target:
            np.savez(target, images=images)
    splits, start = {}, 0
    for split, tree in trees.items():
        labels = np.asarray(tree.targets, dtype=np.int64)
        # Files come class by class; elsewhere the first images of a set are some of each class.
        order = np.random.default_rng(0).permutation(len(labels))
        splits[split] = images[start : start + len(labels)][order], labels[order]
        start += len(labels)
    test = splits.get("test") or splits["val"]
    val = splits.get("val") if "test" in splits else None
    return Raw(f"folder {root.name}, {size} px", tuple(classes), splits["train"], test, val)


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _cached(path: Path) -> np.ndarray | None:
    """The images of an earlier decoding; None when the file is damaged and has to be made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["images"]
    except Exception:  # as in _npz
        return None


def _decode(path: Path, size: int) -> np.ndarray:
    """One image file of any mode as uint8 [3, size, size]: scaled to fill, centre cut out."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                grey = (np.asarray(image) / 257).round().clip(0, 255)
                image = Image.fromarray(grey.astype(np.uint8))
            if "transparency" in image.info:
                image = image.convert("RGBA")
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow, too, reports damage as almost any exception
        raise DataError(
            f"load_data: {path} cannot be decoded ({error}). Replace or remove the file."
        ) from error
