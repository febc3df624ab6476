"""Class activation maps as picture files: of a data set's images, and of an image of your own."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import InstanceOf
from torch import Tensor

from .. import plots
from ..base.files import atomic_write
from ..base.settings import PositiveInt, check
from ..data.folder import decode
from ..data.tensors import Split
from ..training.runs import Run, RunError
from .cam import Explanation, explain

_SHOWN = 320  # pixels, at least, of one's own image in its picture


def save_cam_visualization(
    folder: str | Path,
    images: Tensor,
    explanation: Explanation,
    labels: Tensor,
    classes: Sequence[str],
    *,
    per_class: int = 3,
    seed: int = 0,
) -> list[Path]:
    """Write image, map and overlay side by side to FOLDER/CLASS/INDEX.png; returns the files.

    images: uint8 [N, C, H, W], as they are explained. labels: int64 [N]; classes: their names.
    Of every class `per_class` images, drawn by the seed, among them a mistake if there is one.
    Raises ValueError for sizes that do not fit each other or a per_class below 1, OSError for a
    folder that cannot be written.
    """
    kinds = dict.fromkeys(["images", "labels"], InstanceOf[Tensor]) | {"per_class": PositiveInt}
    given = {"images": images, "labels": labels, "per_class": per_class}
    check("save_cam_visualization", kinds, given)
    counts = {len(images), len(explanation.raw), len(labels)}
    fits = images.dtype == torch.uint8 and images.shape[2:] == explanation.size
    if len(counts) > 1 or not fits:
        found = f"images are {images.dtype} {list(images.shape)}, {len(labels)} labels"
        needed = f"uint8 [{len(explanation.raw)}, C, {explanation.size[0]}, {explanation.size[1]}]"
        problem = f"{found}. The explanation is of {needed}"
        raise ValueError(f"save_cam_visualization: {problem}: give these, and as many labels.")
    meant = {*labels.tolist(), *explanation.predicted.tolist()}
    if not meant <= {*range(len(classes))}:
        problem = f"there are {len(classes)} classes, labels and predictions are {sorted(meant)}"
        raise ValueError(f"save_cam_visualization: {problem}. Give the name of each class.")
    written, maps, order = [], explanation.maps.cpu(), torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(images), generator=order).tolist()
    labels, predicted = labels.tolist(), explanation.predicted.tolist()
    for number, name in enumerate(classes):
        of_class = [i for i in shuffled if labels[i] == number]
        wrong = [i for i in of_class if predicted[i] != number][:1]
        chosen = (wrong + [i for i in of_class if i not in wrong])[:per_class]
        for i in sorted(chosen):
            title = f"True class: {name}. {verdict(explanation, classes, i)}"
            path = Path(folder) / re.sub(r"[^\w-]+", "_", name) / f"{i}.png"
            _save(path, images[i].cpu(), maps[i], title)
            written.append(path)
    return written


def explain_file(
    run: Run,
    image: Path,
    out: Path,
    *,
    method: str = "cam",
    layer: str | None = None,
    class_name: str | None = None,
) -> str:
    """Write a picture of where a run's network finds evidence in an image file; returns its title.

    The image is scaled and its centre cut out as the network's own images were. method: as in
    explain. class_name: whose evidence is shown; None: the predicted class's.
    Raises DataError for a file that cannot be decoded, RunError for a run whose card does not tell
    its classes, ValueError for a class, method or layer that does not exist or a format of `out`
    that is none of Matplotlib's, OSError for `out`.
    """
    about = run.info["data"]
    if "classes" not in about:
        problem = f"{run.name}: its card does not tell the classes and the statistics of its data"
        raise RunError(f"{problem}. Train it with retrain=True, or choose another.")
    classes, (_, side, width) = about["classes"], about["shape"]
    check("cam", {"class": Literal[*classes] | None}, {"class": class_name})
    if side != width:
        raise RunError(f"{run.name}: its images are {side}x{width} pixels. Choose a square one's.")
    pixels = own_image(image, about["shape"])
    if out.exists() and out.samefile(image):
        raise ValueError(f"cam: out = {str(out)!r} is the image itself. Give another file.")
    # A whole multiple, so that both show the same part of the image.
    shown = decode(image, side * max(1, -(-_SHOWN // side)))
    split = Split(pixels, torch.zeros(1, dtype=torch.int64), about["mean"], about["std"])
    class_idx = None if class_name is None else classes.index(class_name)
    found = explain(run.require_model(), split.normalise(pixels), method, layer, class_idx)
    title = verdict(found, classes, 0)
    maps = dataclasses.replace(found, size=shown.shape[1:]).maps
    _save(out, shown, maps[0], title)
    return title


def own_image(path: Path, shape: Sequence[int]) -> Tensor:
    """An image file in the shape (C, H, H) of a network's images: uint8 [1, C, H, H]."""
    pixels = torch.from_numpy(decode(path, shape[1]).copy())[None]
    return pixels if shape[0] == 3 else pixels.float().mean(1, keepdim=True).round().byte()


def verdict(explanation: Explanation, classes: Sequence[str], i: int) -> str:
    """What the network says of image i, and whose evidence is shown if it is another class's."""
    predicted, shown = int(explanation.predicted[i]), int(explanation.classes[i])
    title = f"Predicted: {classes[predicted]}, {100 * float(explanation.confidence[i]):.0f} % sure"
    return title if shown == predicted else f"{title}. Evidence for {classes[shown]}"


def _save(path: Path, image, heat: Tensor, title: str) -> None:
    with atomic_write(path) as file:
        plots.explained(image, heat, title=title).savefig(file, format=path.suffix[1:] or "png")
