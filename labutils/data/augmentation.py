"""Random changes of training images, made for whole batches on the device that holds them.

Random numbers come from the CPU and depend on a key alone, so that a run that is resumed in the
middle of an epoch sees the same images; so does every device, but for distortion, which is drawn
for as many images at once as suit the device. `tensors` decides what is drawn when.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.settings import Augment


def generator(*key: int | str) -> torch.Generator:
    """Random numbers that depend on the key alone: drawn on the CPU, the same for every device."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def require_fit(augment: Augment, image_shape: Sequence[int]) -> None:
    """Raise ValueError if images of shape (C, H, W) are too small for a setting."""
    height, width = image_shape[-2:]
    side = min(height, width)
    for name, largest in (("crop", side - 1), ("cutout", side)):
        if (value := getattr(augment, name)) > largest:
            raise ValueError(
                f"Augment: {name} = {value} with images of {height}x{width} pixels: it can be "
                f"at most {largest}. Choose a smaller {name}, or 0 to leave it out."
            )


def draw_flips(count: int, flip: str, seed: int, epoch: int) -> Tensor:
    """Which of the images an epoch shows flipped: bool [count]. flip: as in Augment."""
    if flip == "none":
        return torch.zeros(count, dtype=torch.bool)
    key = ("flip", seed, epoch) if flip == "random" else ("flip", seed)
    drawn = torch.rand(count, generator=generator(*key)) < 0.5
    return drawn if flip == "random" or epoch % 2 == 0 else ~drawn


def draw_pixels(count: int, sizes: Sequence[int], *key: int | str) -> Tensor:
    """Uniform whole numbers below each of two sizes: int64 [count, 2]."""
    source = generator(*key)
    return torch.stack([torch.randint(n, (count,), generator=source) for n in sizes], dim=1)


def crop_and_flip(images: Tensor, corners: Tensor, flips: Tensor, pad: int) -> Tensor:
    """Pad each image with its mirrored border, cut its size out again, perhaps left for right.

    images: any dtype [N, C, H, W]. corners: int64 [N, 2], row and column of the window's corner in
    the padded image, 0 to 2 pad. flips: bool [N]. Returns the shape of images.
    Nothing is padded in fact: one gather looks each pixel up, which takes less time and memory.
    """
    (n, channels, height, width), device = images.shape, images.device
    rows = _mirrored(height, pad, device)[corners[:, :1] + torch.arange(height, device=device)]
    columns = _mirrored(width, pad, device)[corners[:, 1:] + torch.arange(width, device=device)]
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1)
    return images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)


def distort(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Rotate, zoom and shift each image at random, bilinear, with its border continued.

    images: float [N, C, H, W]; so is the result. Angle, zoom and both shifts are independent and
    uniform.
    """
    n, _, height, width = images.shape
    draw = torch.rand(4, n, generator=generator).mul_(2).sub_(1)
    draw = draw.to(images.device, non_blocking=True)
    angle, zoom = draw[0] * math.radians(augment.rotate), 1 + draw[1] * augment.zoom
    shift_x = draw[2] * (2 * augment.translate / width)
    shift_y = draw[3] * (2 * augment.translate / height)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    # Grid coordinates run from -1 to 1 on both axes, so a rotation scales by the aspect ratio.
    row_x = torch.stack([cos, -sin * (height / width), shift_x], dim=1)
    row_y = torch.stack([sin * (width / height), cos, shift_y], dim=1)
    # One product for the whole batch; F.affine_grid makes one an image, ten times as slow.
    pixels = F.affine_grid(
        torch.eye(2, 3, device=images.device)[None], (1, 1, height, width), False
    )
    base = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1).view(-1, 3)
    grid = torch.stack([row_x, row_y], dim=1).view(-1, 3) @ base.T
    grid = grid.view(n, 2, height, width).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blank(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Set a square of each image to 0, in place: cutout (https://arxiv.org/abs/1708.04552).

    images: float [N, C, H, W], normalised, so that 0 is the mean pixel. centres: int64 [N, 2], row
    and column. The square reaches from side // 2 pixels before its centre on; what lies beyond the
    border is cut off. Returns images.
    """
    inside = []
    for size, start in zip(images.shape[2:], (centres - side // 2).split(1, dim=1)):
        offset = torch.arange(size, device=images.device) - start
        inside.append((offset >= 0) & (offset < side))
    return images.masked_fill_(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0)


def _mirrored(size: int, pad: int, device: torch.device) -> Tensor:
    """For each row (or column) of the padded image, the row of the image that it mirrors."""
    row = torch.arange(-pad, size + pad, device=device).abs()
    return size - 1 - (size - 1 - row).abs()
