"""Data sets as tensors on the training device: splits, batches cut by index, augmentation.

No DataLoader: what fits the device is cut there (https://github.com/KellerJordan/cifar10-airbench).
"""

import hashlib
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..base.settings import Augment, Pixels, PositiveInt, Seed, check
from .augmentation import blank, crop_and_flip, distort, draw, generator

Batches = Iterator[tuple[Tensor, Tensor]]  # images float32 [n, C, H, W], normalised; labels [n]
PLAIN = Augment()
_SHUFFLED = {"batch_size": PositiveInt, "seed": Seed, "epoch": Pixels, "start": Pixels}


@dataclass(frozen=True)
class Split:
    """Labelled images on one device, with the statistics that normalise them."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    mean: tuple[float, ...]  # of each channel, for pixels in [0, 1]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> float32 [n, C, H, W] with zero mean and unit deviation on train."""
        statistics = torch.tensor([self.mean, self.std]).view(2, 1, -1, 1, 1) * 255
        mean, std = statistics.to(images.device, non_blocking=images.is_cuda)
        return images.to(torch.float32, copy=True).sub_(mean).div_(std)

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of normalise: float32 [n, C, H, W] -> uint8 [n, C, H, W], clamped."""
        mean, std = torch.tensor([self.mean, self.std], device=images.device).view(2, 1, -1, 1, 1)
        return ((images * std + mean) * 255).round().clamp(0, 255).byte()

    def num_batches(self, batch_size: int) -> int:
        """How many batches `shuffled` yields."""
        last_is_single = len(self) % batch_size == 1 and len(self) > 1
        return math.ceil(len(self) / batch_size) - last_is_single

    def batches(self, batch_size: int) -> Batches:
        """All images in their order: float32 [n, C, H, W], normalised, and labels int64 [n]."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size)):
            yield self.normalise(images), labels

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, augment: Augment = PLAIN
    ) -> Batches:
        """The batches of one training epoch, from batch number `start` on, for a run that resumes.

        float32 [n, C, H, W] and int64 [n]. Order, crops, flips and holes depend on seed and epoch
        alone; distortion on batch size, image size and kind of device as well. A last batch of one
        image, which batch normalisation cannot take, is left out. augment.flip: 'random' draws half
        of the images every epoch, 'alternating' once, so that two show each both ways
        (https://arxiv.org/abs/2404.00498).
        Raises ValueError for numbers below these, and for images too small for augment.
        """
        given = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "start": start}
        check("shuffled", _SHUFFLED, given)  # plain whole numbers, not NumPy's: they make the key
        count, device, num_batches = len(self), self.images.device, self.num_batches(batch_size)
        order = torch.randperm(count, generator=generator(seed, epoch))[: num_batches * batch_size]
        # For the whole epoch at once: these depend on the image alone, and no GPU waits for them.
        drawn = draw(augment, self.images.shape, seed, epoch)
        order, flips, corners, centres = (tensor.to(device) for tensor in (order, *drawn))
        group = _batches_at_once(self.images, batch_size)
        for first in range(start // group * group, num_batches, group):
            index = order[first * batch_size : (first + group) * batch_size]
            images = self.images.index_select(0, index)
            if augment.crop or augment.flip != "none":
                images = crop_and_flip(images, corners[index], flips[index], augment.crop)
            images = self.normalise(images)
            if augment.rotate or augment.translate or augment.zoom or augment.area < 1:
                images = distort(images, augment, generator(seed, epoch, first))
            if augment.cutout:
                images = blank(images, centres[index], augment.cutout)
            batches = zip(images.split(batch_size), self.labels[index].split(batch_size))
            yield from islice(batches, max(0, start - first), None)


@dataclass(frozen=True)
class ImageData:
    """A data set cut into train, val and test, on one device."""

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    loaded: dict[str, Any] = field(default_factory=dict)  # the arguments of load_data

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits for images, labels, classes and the cut as they are now."""
        splits = self.train, self.val, self.test
        tensors = [tensor for split in splits for tensor in (split.images, split.labels)]
        # PyTorch does not count changes of tensors made in inference mode (so these are read anew
        # each time) nor those through .numpy() or .data, which go unseen.
        state = [object() if t.is_inference() else (id(t), t._version) for t in tensors]
        if vars(self).get("_state") != state:
            vars(self).update(_state=state, _fingerprint=_fingerprint(self.classes, splits))
        return vars(self)["_fingerprint"]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:  # (C, H, W)
        return tuple(self.train.images.shape[1:])

    @property
    def num_features(self) -> int:
        return math.prod(self.image_shape)

    def __repr__(self) -> str:
        sizes = f"{len(self.train):,} train, {len(self.val):,} val, {len(self.test):,} test"
        images = f"images of {'x'.join(map(str, self.image_shape))}, {self.num_classes} classes"
        return f"{self.name} from {self.source}: {sizes} {images}, fingerprint {self.fingerprint}"


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of uint8 [N, C, H, W], for pixels in [0, 1].

    From counts of whole numbers: the same on every machine. Without variation, a deviation is 1.
    """
    counts = 0  # [C, 256]
    for piece in _pieces(images):
        channels = piece.byte().transpose(0, 1).flatten(1)
        counts += torch.stack([channel.bincount(minlength=256) for channel in channels])
    n, values = max(1, int(counts[0].sum())), torch.arange(256)
    sums, squares = ((counts * values**power).sum(1).tolist() for power in (1, 2))
    variances = (n * square - total**2 for total, square in zip(sums, squares))
    std = tuple(math.sqrt(variance) / n / 255 or 1.0 for variance in variances)
    return tuple(total / n / 255 for total in sums), std


def _fingerprint(classes: Sequence[str], splits: Sequence[Split]) -> str:
    hasher, formats = hashlib.sha256(), []
    for split in splits:
        hasher.update(repr((tuple(split.images.shape), tuple(classes))).encode())
        for tensor in (split.images, split.labels):
            for piece in _pieces(tensor):
                hasher.update(piece.view(-1).view(torch.uint8).numpy())
        if type(split) is not Split:  # nothing tells what code of your own shows
            hasher.update(secrets.token_bytes(8))
        dtypes = split.images.dtype, split.labels.dtype
        formats.append((*dtypes, tuple(split.mean), tuple(split.std)))
    # What is as load_data makes it adds nothing: published runs were named without it.
    if set(formats) != {(torch.uint8, torch.int64, *pixel_statistics(splits[0].images))}:
        hasher.update(repr(formats).encode())
    return hasher.hexdigest()[:12]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in consecutive parts of at most 16 MB, each contiguous on the CPU."""
    for piece in tensor.split(max(1, 2**24 // max(1, tensor[:1].nbytes))):
        yield piece.cpu().contiguous()


def _batches_at_once(images: Tensor, batch_size: int) -> int:
    """How many batches to prepare at once, which saves time: on a CPU, a few MB for its cache."""
    budget = 2**22 if images.device.type == "cpu" else 2**27
    return max(1, budget // (batch_size * images[0].numel() * 4))
