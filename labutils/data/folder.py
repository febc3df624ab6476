"""A tree of image files as arrays: decoded and resized in parallel, then cached."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..base.files import atomic_write, data_dir, digest
from ..base.settings import first_line

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, C, H, W], labels int64 [N]

# Pillow knows many more, some of which start other programs: PostScript starts Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
DECODING = 2  # raised when the same files give other pixels, so that older caches are not used


class DataError(RuntimeError):
    """A data set is missing, damaged or not what it claims to be."""


def read_folder(root: Path, size: int) -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """Class names, and the arrays of each split: train/, and val/ or test/ (else val/ is test).

    size: side in pixels that images are scaled to; the centre of a longer side is cut out.
    Raises DataError for a tree of another form and for a file that cannot be decoded.
    """
    from torchvision.datasets.folder import find_classes, make_dataset  # a second to import

    def is_image(file: str) -> bool:  # what is hidden was left by a program: a Mac, Jupyter
        parts = Path(file).relative_to(root).parts
        return file.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in parts)

    found, splits = [name for name in ("train", "val", "test") if (root / name).is_dir()], {}
    if "train" not in found or len(found) < 2:
        problem = f"{root} holds {', '.join(found) or 'none'} of train/, val/, test/"
        needed = "train/CLASS/IMAGE and the same under val/ or test/"
        raise DataError(f"load_data: {problem}. Needed: {needed}.")
    try:
        named = {name for split in found for name in find_classes(root / split)[0]}
        classes = sorted(name for name in named if not name.startswith("."))
        numbers = {name: number for number, name in enumerate(classes)}
        trees = {s: make_dataset(root / s, numbers, is_valid_file=is_image) for s in found}
    except (FileNotFoundError, ValueError) as error:
        needed = f"Each class needs an image ({', '.join(SUFFIXES)}) in each of {', '.join(found)}"
        raise DataError(f"load_data: {root}: {str(error).rstrip('.')}. {needed}.") from error
    for split, tree in trees.items():
        files, labels = zip(*tree)
        # Files come class by class; elsewhere the first images of a set are some of each class.
        order = np.random.default_rng(0).permutation(len(labels))
        splits[split] = _decode_all(root, files, size)[order], np.array(labels)[order]
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    return tuple(classes), splits


def _decode_all(root: Path, files: Sequence[str], size: int) -> np.ndarray:
    """The images of all files, from the cache if they did not change: uint8 [N, 3, size, size]."""
    read = [(file, (stat := Path(file).stat()).st_size, stat.st_mtime_ns) for file in files]
    cache = data_dir() / "cache" / f"{root.name}-{size}px-{digest([DECODING, read])}.npz"
    # NumPy reports damage as almost any exception; a damaged cache is made again.
    with suppress(Exception), np.load(cache, allow_pickle=False) as stored:
        return stored["images"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = np.stack(list(pool.map(lambda file: decode(file, size), files)))
    with suppress(OSError), atomic_write(cache) as target:  # else it is decoded anew next time
        np.savez(target, images=images)
    return images


def decode(path: Path | str, size: int) -> np.ndarray:
    """One image file of any mode (of an animation, the first frame) as uint8 [3, size, size].

    The centre of a longer side is cut out. Raises DataError if it cannot be decoded or is no file.
    """
    from PIL import Image, ImageOps

    if not os.path.isfile(path):  # noqa: PTH113, which refuses no name
        raise DataError(f"{path} is no file. Give that of an image: {', '.join(FORMATS)}.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                raise ValueError("32 bits of grey, of unknown white: use 8 or 16")
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
        problem = f"{path} cannot be decoded ({first_line(error)}). Replace or remove the file"
        raise DataError(f"{problem}. Read are {', '.join(FORMATS)}.") from error
