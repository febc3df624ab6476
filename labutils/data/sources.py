"""Where images come from: LABUTILS_DATA, torchvision, a folder or the package; NumPy arrays all."""

import json
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from ..base.files import data_dir, project_dir
from ..base.settings import first_line, suggestion
from .folder import Arrays, DataError, read_folder
from .stencils import SHAPES, TEXTURES
from .synthetic import SETS, generate

Raw = tuple[str, tuple[str, ...], dict[str, Arrays]]  # source, classes, arrays of each split

# Superclass -> its classes: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR100 = json.loads(Path(__file__).with_name("cifar100.json").read_text())
CIFAR100_CLASSES = sorted(name for names in CIFAR100.values() for name in names)
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905


class _Known(NamedTuple):  # a data set that torchvision can download
    dataset: str  # class in torchvision.datasets
    folder: str  # what torchvision leaves under its root
    stand_in: str  # embedded data set that answers the same question
    classes: Sequence[str] = ()


KNOWN = {
    "mnist": _Known("MNIST", "MNIST", "digits", "0123456789"),
    "cifar10": _Known("CIFAR10", "cifar-10-batches-py", "shapes10", CIFAR10_CLASSES),
    "cifar100": _Known("CIFAR100", "cifar-100-python", "shapes100", CIFAR100_CLASSES),
    "imagenette": _Known("Imagenette", "imagenette2-160", "scenes10"),
}
EMBEDDED = ("digits", *SETS)  # at hand everywhere, without files or a network


def read(name: str, *, image_size: int | None = None, shortcut: float | None = None) -> Raw:
    """Find a data set by name: embedded, an npz file, torchvision's files, torchvision's download.

    shortcut, image_size: as for load_data; the size is by default 64 for folder:PATH, 128 for
    imagenette.
    """
    npz = data_dir() / f"{name}.npz"
    if name in EMBEDDED:
        load = _generated if name in SETS else _digits
    elif name.startswith("folder:"):
        load = _folder
    elif Path(name).name == name and os.path.isfile(npz):  # noqa: PTH113, no slash leads elsewhere
        load = _npz
    elif name in KNOWN:
        load = _torchvision
    else:
        names = [*EMBEDDED, *KNOWN]
        problem = f"unknown data set {name!r}.{suggestion(name, names)} Known: {', '.join(names)}"
        more = f"folder:PATH, or any NAME without a slash for which {data_dir()}/NAME.npz exists"
        raise ValueError(f"load_data: {problem}, {more}.")
    sized = load is _folder or (load is not _npz and name in (*SETS, "imagenette"))
    if image_size is not None and not sized:
        which = f"{name!r}, read from {npz}" if load is _npz else repr(name)
        hint = f"Leave it out; it is for imagenette's folder, {', '.join(SETS)} and folder:PATH."
        raise ValueError(f"load_data: image_size = {image_size} has no effect on {which}. {hint}")
    if shortcut is not None and load is not _generated:
        hint = f"Leave it out; it is for {', '.join(SETS)}."
        raise ValueError(f"load_data: shortcut = {shortcut} has no effect on {name!r}. {hint}")
    options = {} if shortcut is None else {"shortcut": shortcut}
    try:
        return load(name, image_size, **options)
    except OSError as error:  # a folder that nobody may read, a path that is too long
        raise DataError(f"load_data: {name!r} cannot be read ({first_line(error)}).") from error


def _digits(name: str, _) -> Raw:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    cut = train_test_split(images, labels, test_size=450, stratify=labels, random_state=0)
    return "scikit-learn load_digits", tuple("0123456789"), {"train": cut[::2], "test": cut[1::2]}


def _generated(name: str, size: int | None, **options: float) -> Raw:
    spec, splits = SETS[name], {}
    for seed, (split, count) in enumerate({"train": spec.train, "test": spec.test}.items()):
        scenes = generate(name, count, seed, image_size=size, **options)
        splits[split] = scenes.images, scenes.labels
    return "labutils.synthetic", scenes.classes, splits


def _npz(name: str, _) -> Raw:
    path = data_dir() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = [p for p in ("train", "val", "test") if p != "val" or "x_val" in file]
            splits = {p: _checked(file[f"x_{p}"], file[f"y_{p}"], p) for p in parts}
        shapes = {part: images.shape[1:] for part, (images, _) in splits.items()}
        for part, shape in shapes.items():
            if shape != (first := shapes["train"]):
                raise ValueError(f"images [C, H, W] are {first} in x_train, {shape} in x_{part}")
    except Exception as error:  # zip, zlib and NumPy report damage as almost any exception
        problem = f"load_data: {path} cannot be read ({first_line(error)}). Replace or move it"
        needed = "Needed: x_train, y_train, x_test, y_test: images uint8 [N, H, W(, 1 or 3)]"
        raise DataError(f"{problem}. {needed}, labels int [N]") from error
    return path.name, _names(path, *(labels for _, labels in splits.values())), splits


def _checked(images: np.ndarray, labels: np.ndarray, split: str, limit: int = 2**31) -> Arrays:
    """Images [N, C, H, W] and labels int64 [N], below limit. Raises ValueError for other arrays."""
    found = f"x_{split} is {images.dtype} {images.shape}, y_{split} {labels.dtype} {labels.shape}"
    images = images[..., None] if images.ndim == 3 else images
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    are_images = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
    are_labels = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not (are_images and are_labels and images.size):
        raise ValueError(found)
    if (bad := labels[(labels < 0) | (labels >= limit)]).size:
        raise ValueError(f"y_{split} holds the label {bad[0]}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64)


def _names(path: Path, train: np.ndarray, *others: np.ndarray) -> tuple[str, ...]:
    """Names from NAME_names.json beside the file, from what is known, or plain numbers."""
    beside = path.with_name(f"{path.stem}_names.json")
    names = KNOWN[path.stem].classes if path.stem in KNOWN else ()
    if beside.exists():
        try:
            names = TypeAdapter(list[str]).validate_json(beside.read_bytes())
        except (ValueError, OSError) as error:
            raise DataError(f"load_data: {beside} is not a JSON list of names.") from error
    elif not names:
        names = [str(number) for number in range(len(np.unique(train)))]
    if (highest := int(max(labels.max() for labels in (train, *others)))) >= len(names):
        problem = f"{path} has labels up to {highest}, but {len(names)} class names"
        hint = f"Put a JSON list of all {highest + 1} into {beside} or number the classes from 0"
        raise DataError(f"load_data: {problem}. {hint}.")
    if len({*names}) < len(names):
        raise DataError(f"load_data: {beside} has a name twice. Give every class its own.")
    return tuple(names)


def _torchvision(name: str, size: int | None) -> Raw:
    from torchvision import datasets

    known, root, splits = KNOWN[name], data_dir(), {}
    _download(name)
    try:
        if name == "imagenette":
            names = tuple(words[0] for words in datasets.Imagenette(root, size="160px").classes)
            if len(names) != 10:
                raise ValueError(f"{len(names)} of 10 classes")
            _, splits = read_folder(root / known.folder, size or 128)
            return f"torchvision's folder {known.folder}", names, splits
        for split in ("train", "test"):
            dataset = getattr(datasets, known.dataset)(root, train=split == "train")
            arrays = map(np.asarray, (dataset.data, dataset.targets))
            splits[split] = _checked(*arrays, split, len(known.classes))
    except Exception as error:  # torchvision reports damage as almost any exception
        problem = f"{root / known.folder} is damaged or incomplete ({first_line(error)})"
        hint = "Delete that folder and run again, or put a copy in its place"
        raise DataError(f"load_data: {problem}. {hint}.") from error
    return f"torchvision {known.dataset}", tuple(known.classes), splits


def _download(name: str) -> None:
    """Fetch what is not there, into a temporary folder, and move the result when it is whole."""
    from torchvision import datasets

    known, root, before = KNOWN[name], data_dir(), socket.getdefaulttimeout()
    if (root / known.folder).exists():
        return
    options = {"size": "160px"} if name == "imagenette" else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # seconds; a server that falls silent would hang us for ever
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            getattr(datasets, known.dataset)(temporary, **options, download=True)
            if not (root / known.folder).exists():  # a notebook beside this one may be first
                Path(temporary, known.folder).replace(root / known.folder)
    except Exception as error:  # a proxy that answers in its own words is no OSError
        raise DataError(
            f"load_data: {name!r} is not on disk and could not be downloaded: {first_line(error)}\n"
            f"Looked for: {root / name}.npz, then {root / known.folder}.\n"
            "Three ways to get it: 1. connect to the network and run again; "
            f"2. copy {known.folder} or {name}.npz (x_train, y_train, x_test, y_test) into {root}; "
            "3. set LABUTILS_DATA to a folder that holds it.\n"
            f"The embedded load_data({known.stand_in!r}) answers the same question offline."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _folder(name: str, size: int | None) -> Raw:
    root = project_dir() / os.path.expanduser(name.removeprefix("folder:"))  # noqa: PTH111
    classes, splits = read_folder(root, size or 64)
    return f"folder {root.name}, {size or 64} px", classes, splits


def superclasses(classes: Sequence[str]) -> list[str]:
    """The superclass of each class, of cifar100 or of shapes100, whose superclasses are the shapes.

    Raises ValueError for a class that has none.
    """
    coarse = {name: group for group, names in CIFAR100.items() for name in names}
    coarse |= {f"{shape},_{texture}": shape for shape in SHAPES for texture in TEXTURES}
    found = {name: coarse.get(name.replace(" ", "_")) for name in classes}  # copies have either
    if unknown := [name for name, group in found.items() if group is None]:
        hint = "Give the classes of cifar100 or shapes100."
        raise ValueError(f"superclasses: {unknown[0]!r} has no superclass. {hint}")
    return [found[name] for name in classes]
