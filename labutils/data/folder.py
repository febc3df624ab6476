"""A tree of image files as arrays: decoded and resized in parallel, then cached."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

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
    found = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    trees, splits = {split: _image_files(root / split) for split in found}, {}
    classes = sorted(set().union(*trees.values()))
    if "train" not in found or len(found) < 2 or not classes:
        problem = f"{root} holds {', '.join(found) or 'none'} of train/, val/, test/"
        needed = "train/CLASS/IMAGE and the same under val/ or test/"
        raise DataError(f"load_data: {problem}. Needed: {needed}.")
    for split, tree in trees.items():
        if missing := [name for name in classes if not tree.get(name)]:
            problem = f"{root / split} has no image of the classes {', '.join(missing)}"
            hint = f"Add some ({', '.join(SUFFIXES)}) or remove these folders from all splits"
            raise DataError(f"load_data: {problem}. {hint}.")
        labels = np.repeat(np.arange(len(classes)), [len(tree[name]) for name in classes])
        # Files come class by class; elsewhere the first images of a set are some of each class.
        order = np.random.default_rng(0).permutation(len(labels))
        images = _decode_all(root, [file for name in classes for file in tree[name]], size)
        splits[split] = images[order], labels[order]
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    return tuple(classes), splits


def _image_files(split: Path) -> dict[str, list[Path]]:
    """The image files of each class, in the order of torchvision's ImageFolder."""
    classes: dict[str, list[Path]] = {path.name: [] for path in sorted(split.glob("*/"))}
    # ** follows no links, which could lead in circles.
    for path in sorted(split.glob("*/**/*"), key=lambda path: (str(path.parent), path.name)):
        is_image = path.name.lower().endswith(SUFFIXES)
        if is_image and path.is_file():
            classes[path.relative_to(split).parts[0]].append(path)
        elif not path.is_file() and (path.is_symlink() or (is_image and not path.is_dir())):
            what = "a link to a folder or to nothing, a pipe or a device"
            raise DataError(f"load_data: {path} is {what}. Replace or remove it.")
    return classes


def _decode_all(root: Path, files: list[Path], size: int) -> np.ndarray:
    """The images of all files, from the cache if they did not change: uint8 [N, 3, size, size]."""
    read = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    cache = data_dir() / "cache" / f"{root.name}-{size}px-{digest([DECODING, read])}.npz"
    # NumPy reports damage as almost any exception; a damaged cache is made again.
    with suppress(Exception), np.load(cache, allow_pickle=False) as stored:
        return stored["images"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = np.stack(list(pool.map(lambda file: decode(file, size), files)))
    with suppress(OSError, NotImplementedError):  # then it is decoded anew next time
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.parent / ".lock", timeout=600):
            # Whoever wrote these files without holding the lock was killed.
            for abandoned in cache.parent.glob(".*.tmp"):
                abandoned.unlink()
            with atomic_write(cache) as target:
                np.savez(target, images=images)
    return images


def decode(path: Path, size: int) -> np.ndarray:
    """One image file of any mode (of an animation, the first frame) as uint8 [3, size, size].

    The centre of a longer side is cut out. Raises DataError if it cannot be decoded.
    """
    from PIL import Image, ImageOps

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
