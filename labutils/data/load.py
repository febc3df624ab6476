"""`load_data`: a data set by name, cut into train, val and test, on the device."""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from ..base.device import resolve_device
from ..base.settings import PositiveFloat, PositiveInt, Seed, check
from .sources import Arrays, read
from .tensors import ImageData, Split, pixel_statistics

_KINDS = {"name": str, "val_size": PositiveFloat, "subset": Annotated[float, Field(gt=0, le=1)]}
_KINDS |= {"seed": Seed, "image_size": PositiveInt | None, "shortcut": float | None}


def load_data(
    name: str,
    *,
    val_size: int | float = 0.1,
    subset: float = 1.0,
    seed: int = 0,
    image_size: int | None = None,
    shortcut: float | None = None,
    device: str | torch.device = "auto",
) -> ImageData:
    """Load a data set by name, cut off a validation split and put everything on the device.

    name: digits, shapes10, shapes100, scenes10 (embedded), mnist, cifar10, cifar100, imagenette,
        NAME of $LABUTILS_DATA/NAME.npz, or folder:PATH (train/CLASS/IMAGE, and val/ or test/).
    val_size: images, or a fraction, cut from train unless the source has a val beside its test.
    subset: fraction of the remaining training images to keep. All cuts keep the class shares.
    seed: fixes all cuts. image_size: side in pixels, for folder:PATH, imagenette, generated sets.
    shortcut: of generated sets, see generate.
    Raises ValueError for bad arguments, DataError for missing or damaged data.
    """
    given = dict(zip(_KINDS, (name, val_size, subset, seed, image_size, shortcut)))
    given = check("load_data", _KINDS, given)  # plain numbers, as cards have them, for NumPy's
    val_size, subset, shortcut = (given[name] for name in ("val_size", "subset", "shortcut"))
    if val_size > 1 and val_size.is_integer():
        val_size = given["val_size"] = int(val_size)
    device = resolve_device(device)
    source, classes, splits = read(name, image_size=image_size, shortcut=shortcut)
    if "val" not in splits:
        allowed = "a fraction in (0, 1) or {} to {} images"
        splits["train"], splits["val"] = _cut(splits["train"], val_size, seed, "val_size", allowed)
    if subset < 1:
        allowed = "1, or a fraction that keeps {} to {} of them"
        _, splits["train"] = _cut(splits["train"], subset, seed, "subset", allowed)
    statistics = pixel_statistics(torch.from_numpy(splits["train"][0]))
    for part, arrays in splits.items():
        images, labels = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)
        splits[part] = Split(images, labels, *statistics)
    return ImageData(name, source, classes, **splits, loaded=given)


def _cut(arrays: Arrays, size: float, seed: int, what: str, allowed: str) -> list[Arrays]:
    """Split images and labels in two with equal class shares; the second part has the size."""
    from sklearn.model_selection import train_test_split

    images, labels = arrays
    numbers = np.arange(len(labels))
    try:
        parts = train_test_split(numbers, test_size=size, stratify=labels, random_state=seed)
    except ValueError as error:
        classes, problem = len(np.unique(labels)), f"does not fit {len(labels):,} training images"
        hint = f"Give {allowed.format(classes, len(labels) - classes)}; classes need two."
        raise ValueError(f"load_data: {what} = {size!r} {problem}. {hint}") from error
    return [(images[index], labels[index]) for index in map(np.sort, parts)]
