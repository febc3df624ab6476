"""`load_data`: a data set by name, cut into train, val and test, on the device."""

from __future__ import annotations

import numpy as np
import torch

from ..base.device import resolve_device
from ..base.settings import Seed, check
from .sources import read
from .tensors import ImageData, Split, pixel_statistics


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
    tensors = {
        part: [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        for part, arrays in parts.items()
    }
    statistics = pixel_statistics(tensors["train"][0])
    splits = {
        part: Split(images.to(device), labels.to(device), *statistics)
        for part, (images, labels) in tensors.items()
    }
    return ImageData(name=name, source=raw.source, classes=raw.classes, **splits)


def _cut(index: np.ndarray, labels: np.ndarray, size: float, seed: int, what: str):
    """Split index in two with equal class shares; the second part has the given size."""
    from sklearn.model_selection import train_test_split

    try:
        rest, part = train_test_split(
            index, test_size=size, stratify=labels[index], random_state=seed
        )
    except ValueError as error:
        classes, counts = np.unique(labels[index], return_counts=True)
        advice = (
            f"Give a fraction in (0, 1) or a number of images from {len(classes)} to "
            f"{len(index) - len(classes)}."
        )
        if counts.min() == 1:
            advice = f"Class {classes[counts.argmin()]} has one image; each needs two at least."
        raise ValueError(
            f"load_data: {what} = {size!r} does not fit {len(index):,} training images in "
            f"{len(classes)} classes. {advice}"
        ) from error
    return np.sort(rest), np.sort(part)
