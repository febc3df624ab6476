"""Data sets as tensors on the training device: splits, batches cut by index, augmentation.

There is no DataLoader: a data set of this project fits the device, and cutting a batch out of a
tensor costs less than handing one over from a worker (the idea of
https://github.com/KellerJordan/cifar10-airbench).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.settings import Augment
from . import augmentation


@dataclass(frozen=True)
class Split:
    """Labelled images on one device, with the statistics that normalise them.

    images: uint8 [N, C, H, W]. labels: int64 [N]. mean, std: per channel, for pixels in [0, 1].
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> float32 [n, C, H, W] with zero mean and unit deviation on train."""
        statistics = torch.tensor([self.mean, self.std]).view(2, 1, -1, 1, 1) * 255
        mean, std = statistics.to(images.device, non_blocking=True)
        return images.float().sub_(mean).div_(std)

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of normalise: float32 [n, C, H, W] -> uint8 [n, C, H, W], clamped."""
        mean, std = torch.tensor([self.mean, self.std], device=images.device).view(2, 1, -1, 1, 1)
        return ((images * std + mean) * 255).round().clamp(0, 255).byte()

    def num_batches(self, batch_size: int) -> int:
        """How many batches `shuffled` yields."""
        last_is_single = len(self) % batch_size == 1 and len(self) > 1
        return math.ceil(len(self) / batch_size) - last_is_single

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in their order, normalised: (float32 [n, C, H, W], int64 [n])."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size)):
            yield self.normalise(images), labels

    def shuffled(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        augment: Augment | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one training epoch, from batch number `start` on.

        Yields images, float32 [n, C, H, W], and labels, int64 [n]. They depend on seed and epoch
        alone, so that a run can be resumed within an epoch. A last batch of a single image is left
        out: batch normalisation has nothing to normalise there.
        augment.flip: 'random' flips half of the images, drawn anew every epoch; 'alternating' draws
        once and then flips what it did not flip the epoch before, so that two epochs show every
        image both ways (https://arxiv.org/abs/2404.00498).
        Raises ValueError if the images are too small for augment.crop or augment.cutout.
        """
        augment = augment or Augment()
        augmentation.require_fit(augment, self.images.shape)
        num_batches = self.num_batches(batch_size)
        order = torch.randperm(len(self), generator=augmentation.generator(seed, epoch))
        order = order.to(self.images.device)[: num_batches * batch_size]
        group = _batches_at_once(self.images, batch_size)
        change = _changes(self, augment, seed, epoch)
        for first in range(start // group * group, num_batches, group):
            index = order[first * batch_size : (first + group) * batch_size]
            images = change(index, first)
            batches = zip(images.split(batch_size), self.labels[index].split(batch_size))
            for number, batch in enumerate(batches, first):
                if number >= start:
                    yield batch


def _changes(
    split: Split, augment: Augment, seed: int, epoch: int
) -> Callable[[Tensor, int], Tensor]:
    """What an epoch makes of images: a function of their numbers and that of their first batch.

    Crops, flips and holes are drawn for the whole epoch at once: they depend on the image, not on
    how many batches are prepared together, and a GPU is not kept waiting for them.
    """
    count, device, size = len(split), split.images.device, split.images.shape[2:]
    moves = augment.crop or augment.flip != "none"
    if moves:
        window = 2 * [2 * augment.crop + 1]
        flips = augmentation.draw_flips(count, augment.flip, seed, epoch).to(device)
        corners = augmentation.draw_pixels(count, window, "crop", seed, epoch).to(device)
    if augment.cutout:
        centres = augmentation.draw_pixels(count, size, "cutout", seed, epoch).to(device)

    def change(index: Tensor, first: int) -> Tensor:
        images = split.images.index_select(0, index)
        if moves:
            images = augmentation.crop_and_flip(images, corners[index], flips[index], augment.crop)
        images = split.normalise(images)
        if augment.rotate or augment.translate or augment.zoom:
            source = augmentation.generator(seed, epoch, first)
            images = augmentation.distort(images, augment, source)
        if augment.cutout:
            images = augmentation.blank(images, centres[index], augment.cutout)
        return images

    return change


@dataclass(frozen=True)
class ImageData:
    """A data set cut into train, val and test, on one device."""

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name images, labels, classes and the cut as they are now.

        Computed when it is asked for, and again after a change in place, but not after one through
        .numpy() or .data, which PyTorch does not count.
        """
        splits = self.train, self.val, self.test
        tensors = [tensor for split in splits for tensor in (split.images, split.labels)]
        # Nor does it count those of tensors made in inference mode: they are read anew each time.
        state = [object() if t.is_inference() else (id(t), t._version) for t in tensors]
        if vars(self).get("_state") != state:
            vars(self).update(_state=state, _fingerprint=_fingerprint(self.classes, splits))
        return vars(self)["_fingerprint"]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return tuple(self.train.images.shape[1:])

    @property
    def num_features(self) -> int:
        """Length of a flattened image."""
        return math.prod(self.image_shape)

    def __str__(self) -> str:
        sizes = f"{len(self.train):,} train, {len(self.val):,} val, {len(self.test):,} test"
        shape = "x".join(str(size) for size in self.image_shape)
        return (
            f"{self.name} from {self.source}: {sizes} images of {shape}, "
            f"{self.num_classes} classes, fingerprint {self.fingerprint}"
        )


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of uint8 [N, C, H, W], for pixels in [0, 1].

    From counts of whole numbers: the same on every machine. Without variation, a deviation is 1.
    """
    counts = 0  # [C, 256]
    for piece in _pieces(images):
        channels = piece.transpose(0, 1).flatten(1)
        counts += torch.stack([channel.bincount(minlength=256) for channel in channels])
    n, values = max(1, int(counts[0].sum())), torch.arange(256)
    sums, squares = ((counts * values**power).sum(1).tolist() for power in (1, 2))
    mean = tuple(total / n / 255 for total in sums)
    variances = (n * square - total**2 for total, square in zip(sums, squares))
    return mean, tuple(math.sqrt(variance) / n / 255 or 1.0 for variance in variances)


def _fingerprint(classes: Sequence[str], splits: Sequence[Split]) -> str:
    hasher, formats = hashlib.sha256(), []
    for split in splits:
        hasher.update(repr((tuple(split.images.shape), tuple(classes))).encode())
        for tensor in (split.images, split.labels):
            for piece in _pieces(tensor):
                hasher.update(piece.view(-1).view(torch.uint8).numpy())
        dtypes = split.images.dtype, split.labels.dtype
        formats.append((*dtypes, tuple(split.mean), tuple(split.std)))
    dtypes, statistics = {item[:2] for item in formats}, {item[2:] for item in formats}
    # What is as load_data makes it adds nothing: published runs were named without it.
    usual = dtypes == {(torch.uint8, torch.int64)}
    if not usual or statistics != {pixel_statistics(splits[0].images)}:
        hasher.update(repr(formats).encode())
    return hasher.hexdigest()[:12]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in consecutive parts of at most 16 MB, each contiguous on the CPU."""
    for piece in tensor.detach().split(max(1, 2**24 // max(1, tensor[:1].nbytes))):
        yield piece.cpu().contiguous()


def _batches_at_once(images: Tensor, batch_size: int) -> int:
    """How many batches to prepare at once, which saves time: on a CPU, a few MB for its cache."""
    budget = 2**22 if images.device.type == "cpu" else 2**27
    return max(1, budget // (batch_size * images[0].numel() * 4))
