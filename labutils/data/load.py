"""`load_data`: a data set by name, cut into train, val and test, on the device."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from ..base.device import resolve_device
from ..base.settings import Seed, check
from .sources import Raw, read
from .tensors import ImageData, Split


def load_data(
    name: str,
    *,
    val_size: int | float = 0.1,
    subset: float = 1.0,
    seed: int = 0,
    image_size: int | None = None,
    device: str | torch.device = "auto",
) -> ImageData:
    """Load a data set by name, cut off a validation split and put everything on the device.

    name: digits, shapes10, shapes100, scenes10 (embedded), mnist, cifar10, cifar100, imagenette,
        folder:PATH (a tree train/CLASS/IMAGE plus val/ or test/), or NAME for a file
        $LABUTILS_DATA/NAME.npz.
    val_size: images, or a fraction, taken from train with equal class shares; unused where the
        source has a val split beside its test split.
    subset: fraction of the remaining training images to keep, with equal class shares.
    seed: fixes which images go where; the cut is the same on every machine.
    image_size: side in pixels, for folder:PATH, imagenette and, where it divides the side that they
        are drawn with, the generated sets.
    Raises ValueError for bad arguments, DataError for missing or damaged data.
    """
    kinds = {"name": str, "val_size": float, "subset": float, "seed": Seed}
    values = {"name": name, "val_size": val_size, "subset": subset, "seed": seed}
    check("load_data", kinds, values)
    device = resolve_device(device)
    raw = read(name, image_size=image_size)
    train = np.arange(len(raw.train[1]))
    if raw.val is None:
        train, held = _cut(train, raw.train[1], val_size, seed, "val_size")
        val = raw.train[0][held], raw.train[1][held]
    else:
        val = raw.val
    if not 0 < subset <= 1:
        raise ValueError(f"load_data: subset = {subset!r}. Give a fraction in (0, 1].")
    if subset < 1:
        _, train = _cut(train, raw.train[1], float(subset), seed, "subset")
    parts = {"train": (raw.train[0][train], raw.train[1][train]), "val": val, "test": raw.test}
    return _to_tensors(name, raw, parts, device)


def _cut(index: np.ndarray, labels: np.ndarray, size, seed: int, what: str):
    """Split index in two with equal class shares; the second part has the given size."""
    from sklearn.model_selection import train_test_split

    try:
        rest, part = train_test_split(
            index, test_size=size, stratify=labels[index], random_state=seed
        )
    except ValueError as error:
        classes, counts = np.unique(labels[index], return_counts=True)
        raise ValueError(
            f"load_data: {what} = {size!r} does not fit {len(index):,} training images in "
            f"{len(classes)} classes, the smallest of {counts.min()}. Give a fraction in (0, 1) or "
            f"a number of images from {len(classes)} to {len(index) - len(classes)}, "
            "with at least two images a class."
        ) from error
    return np.sort(rest), np.sort(part)


def _to_tensors(name: str, raw: Raw, parts: dict, device: torch.device) -> ImageData:
    hasher = hashlib.sha256()
    for images, labels in parts.values():
        hasher.update(repr((images.shape, raw.classes)).encode())
        hasher.update(np.ascontiguousarray(images))
        hasher.update(np.ascontiguousarray(labels))
    mean, std = _pixel_statistics(parts["train"][0])
    splits = {
        part: Split(
            torch.from_numpy(np.ascontiguousarray(images)).to(device),
            torch.from_numpy(np.ascontiguousarray(labels)).to(device),
            mean,
            std,
        )
        for part, (images, labels) in parts.items()
    }
    return ImageData(
        name=name,
        source=raw.source,
        classes=raw.classes,
        fingerprint=hasher.hexdigest()[:12],
        **splits,
    )


def _pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel, from counts of whole numbers: the same on every machine."""
    means, stds = [], []
    values = np.arange(256)
    for channel in range(images.shape[1]):
        # Not by NumPy, which first makes eight bytes of each.
        counts = torch.from_numpy(images[:, channel]).flatten().bincount(minlength=256).numpy()
        n, total, squares = (int((counts * values**power).sum()) for power in range(3))
        means.append(total / n / 255)
        stds.append(math.sqrt(n * squares - total**2) / n / 255 or 1.0)
    return tuple(means), tuple(stds)
