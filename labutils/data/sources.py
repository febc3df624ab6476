"""Where images come from: files under LABUTILS_DATA, torchvision, a folder, or the package itself.

Everything is returned as NumPy arrays; splitting and devices are the business of `load`.
"""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from ..base.files import data_dir, project_dir
from ..base.settings import first_line, suggestion
from .folder import Arrays, DataError, read_folder
from .synthetic import SETS, class_names, generate

CIFAR10_CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
IMAGENETTE_CLASSES = [  # in the order of their folders, n01440764 to n03888257
    *("tench", "English springer", "cassette player", "chain saw", "church"),
    *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
]


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
    "imagenette": _Known("Imagenette", "imagenette2-160", "scenes10", IMAGENETTE_CLASSES),
}
EMBEDDED = ("digits", *SETS)  # at hand everywhere, without files or a network


def read(name: str, *, image_size: int | None = None) -> Raw:
    """Find a data set by name: embedded, an npz file, torchvision's files, torchvision's download.

    image_size: side in pixels for `folder:PATH` (default 64), imagenette (default 128) and the
        generated sets, where it has to divide the side that they are drawn with.
    Raises ValueError for an unknown name, DataError for missing or damaged data.
    """
    load = _LOADERS.get("folder:" if name.startswith("folder:") else name)
    # A name with a slash would lead out of the folder.
    if load not in (_digits, _generated, _folder) and Path(name).name == name:
        load = _npz if os.path.isfile(_npz_path(name)) else load  # noqa: PTH113
    if load is None:
        names = ["digits", *KNOWN, *SETS]
        raise ValueError(
            f"load_data: unknown data set {name!r}.{suggestion(name, names)} "
            f"Known: {', '.join(names)}, folder:PATH, "
            f"or any NAME without a slash for which {data_dir()}/NAME.npz exists."
        )
    if image_size is not None and load not in (_generated, _folder, _imagenette):
        raise ValueError(
            f"load_data: image_size = {image_size!r} has no effect on {name!r}. "
            f"It is for imagenette, {', '.join(SETS)} and folder:PATH; leave it out."
        )
    try:
        return load(name, image_size)
    except OSError as error:  # a folder that nobody may read, a path that is too long
        raise DataError(f"load_data: {name!r} cannot be read ({first_line(error)}).") from error


def _digits(name: str, _) -> Raw:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    cut = train_test_split(images, labels, test_size=450, stratify=labels, random_state=0)
    classes = tuple(str(digit) for digit in range(10))
    return Raw("scikit-learn load_digits", classes, (cut[0], cut[2]), (cut[1], cut[3]))


def _generated(name: str, size: int | None) -> Raw:
    spec, splits = SETS[name], []
    size = size or spec.side
    factor = spec.side // size
    if spec.side % size:
        allowed = ", ".join(str(n) for n in range(1, spec.side + 1) if spec.side % n == 0)
        raise ValueError(
            f"load_data: image_size = {size} does not divide the {spec.side} pixels that {name} is "
            f"drawn with. Choose one of {allowed}."
        )
    for seed, count in enumerate((spec.train, spec.test)):
        scenes = generate(name, count, seed)
        images = scenes.images
        if factor > 1:
            squares = images.reshape(count, 3, size, factor, size, factor)
            sums = squares.sum(axis=(3, 5), dtype=np.uint32)
            # In whole numbers, halves up, so that the bytes are the same on every machine.
            images = ((sums + factor**2 // 2) // factor**2).astype(np.uint8)
        splits.append((images, scenes.labels))
    return Raw("labutils.synthetic", class_names(name), *splits)


def _npz_path(name: str) -> Path:
    return data_dir() / f"{name}.npz"


def _npz(name: str, _) -> Raw:
    path = _npz_path(name)
    try:
        with np.load(path, allow_pickle=False) as file:
            splits = [_checked(file[f"x_{s}"], file[f"y_{s}"], s) for s in ("train", "test")]
        shapes = [images.shape[1:] for images, _ in splits]
        if shapes[0] != shapes[1]:
            raise ValueError(f"images [C, H, W] are {shapes[0]} in x_train, {shapes[1]} in x_test")
    except Exception as error:  # zip, zlib and NumPy report damage as almost any exception
        why = first_line(error).strip("'\"")  # a KeyError quotes
        raise DataError(
            f"load_data: {path} cannot be read ({why}). Expected arrays x_train, y_train, x_test, "
            "y_test: images uint8 [N, H, W] or [N, H, W, C] with 1 or 3 channels, labels whole "
            "numbers [N]. Replace the file or move it away."
        ) from error
    return Raw(path.name, _names(name, *[labels for _, labels in splits]), *splits)


def _checked(images: np.ndarray, labels: np.ndarray, split: str) -> Arrays:
    """Images [N, C, H, W] and labels int64 [N]. Raises ValueError where they are no such thing."""
    found = f"x_{split} is {images.dtype} {images.shape}, y_{split} {labels.dtype} {labels.shape}"
    images = images[..., None] if images.ndim == 3 else images
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(found)
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or images.size == 0:
        raise ValueError(found)
    for label in (labels.min(), labels.max()):
        if not 0 <= label < 2**31:
            raise ValueError(f"y_{split} holds the label {label}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64)


def _names(name: str, train: np.ndarray, test: np.ndarray) -> tuple[str, ...]:
    """Names from NAME_names.json beside the file, from what is known, or plain numbers."""
    beside = data_dir() / f"{name}_names.json"
    names = KNOWN[name].classes if name in KNOWN else []
    problem = f"{len(names)} class names are known for {name!r}"
    if beside.exists():
        try:
            names = TypeAdapter(list[str]).validate_json(beside.read_bytes())
        except (ValueError, OSError) as error:
            raise DataError(
                f'load_data: {beside} is not a JSON list of names, such as ["cat", "dog"].'
            ) from error
        problem = f"{beside.name} holds {len(names)} names"
    elif not names:
        present = np.unique(train).tolist()
        missing = min(set(range(len(present) + 1)).difference(present))
        names = [str(label) for label in range(missing)]
        problem = f"no training image is of class {missing}"
    if (highest := int(max(train.max(), test.max()))) >= len(names):
        raise DataError(
            f"load_data: {_npz_path(name)} has labels up to {highest}, but {problem}. Number the "
            f"classes from 0 on, or put a JSON list of all {highest + 1} names into {beside}."
        )
    return tuple(names)


def _torchvision(name: str, _) -> Raw:
    from torchvision import datasets

    known, splits = KNOWN[name], []
    _download(name)
    try:
        for split in ("train", "test"):
            dataset = getattr(datasets, known.dataset)(data_dir(), train=split == "train")
            splits.append(_checked(np.asarray(dataset.data), np.asarray(dataset.targets), split))
            names = known.classes or dataset.classes
            if (highest := splits[-1][1].max()) >= len(names):
                raise ValueError(f"y_{split} holds the label {highest}")
    # torchvision reports damage as almost any exception, AssertionError among them.
    except Exception as error:
        raise _damaged(name, first_line(error)) from error
    return Raw(f"torchvision {known.dataset}", tuple(names), *splits)


def _imagenette(name: str, size: int | None) -> Raw:
    known = KNOWN[name]
    _download(name)
    folders, splits = read_folder(data_dir() / known.folder, size or 128)
    if len(folders) != len(known.classes):
        raise _damaged(name, f"{len(folders)} of {len(known.classes)} classes")
    source = "torchvision Imagenette, 160 px variant"
    return Raw(source, tuple(known.classes), splits["train"], splits["val"])


def _damaged(name: str, why: str) -> DataError:
    return DataError(
        f"load_data: {data_dir() / KNOWN[name].folder} is damaged or incomplete ({why}). "
        f"Delete that folder and run again to download {name!r} anew, "
        f"or put a whole copy at {_npz_path(name)}."
    )


def _download(name: str) -> None:
    """Fetch what is not there, into a temporary folder, and move the result when it is whole."""
    from torchvision import datasets

    known, root = KNOWN[name], data_dir()
    if (root / known.folder).exists():
        return
    options = {"size": "160px"} if name == "imagenette" else {}
    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            getattr(datasets, known.dataset)(temporary, **options, download=True)
            Path(temporary, known.folder).replace(root / known.folder)
    except Exception as error:  # a proxy that answers in its own words is no OSError
        raise DataError(
            f"load_data: {name!r} is not on disk and could not be downloaded "
            f"({first_line(error)}).\n"
            f"Looked for: {_npz_path(name)}, then {root / known.folder}.\n"
            "Three ways to get it: 1. connect to the network and run again; "
            f"2. copy {name}.npz (x_train, y_train, x_test, y_test) into {root}; "
            "3. set LABUTILS_DATA to a folder that holds it.\n"
            f"The embedded load_data({known.stand_in!r}) answers the same question offline."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _folder(name: str, size: int | None) -> Raw:
    # Not by Path.expanduser, which fails in its own words where there is no such user.
    root = project_dir() / os.path.expanduser(name.removeprefix("folder:"))  # noqa: PTH111
    size = size or 64
    classes, splits = read_folder(root, size)
    test = splits.get("test") or splits["val"]
    val = splits.get("val") if "test" in splits else None
    return Raw(f"folder {root.name}, {size} px", classes, splits["train"], test, val)


_LOADERS = {  # each takes a name and an image size
    "digits": _digits,
    **dict.fromkeys(SETS, _generated),
    **dict.fromkeys(KNOWN, _torchvision),
    "imagenette": _imagenette,
    "folder:": _folder,
}
