"""Random changes of training images, made for whole batches on the device that holds them.

Random numbers come from the CPU and depend on a key alone, so that a resumed run sees the same
images; so does every device, but for distortion, drawn for as many images as suit the device.
"""

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


def require_fit(augment: Augment, shape: Sequence[int]) -> None:
    """Raise ValueError if images of shape (..., H, W) are too small for a setting."""
    side = min(shape[-2:])
    for name, largest in (("crop", side - 1), ("cutout", side)):
        if (value := getattr(augment, name)) > largest:
            allowed = f"with images of {shape[-2]}x{shape[-1]} pixels: choose at most {largest}."
            raise ValueError(f"Augment: {name} = {value} {allowed}")


def draw(augment: Augment, shape: Sequence[int], seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The flips, corners and centres of an epoch of images of this shape, (N, C, H, W)."""
    require_fit(augment, shape)
    count, window, alternating = shape[0], 2 * augment.crop + 1, augment.flip == "alternating"
    key = ("flip", seed) if alternating else ("flip", seed, epoch)
    flips = torch.rand(count, generator=generator(*key)) < (0 if augment.flip == "none" else 0.5)
    corners = draw_pixels(count, (window, window), "crop", seed, epoch)
    centres = draw_pixels(count, shape[2:], "cutout", seed, epoch)
    return flips ^ (alternating and epoch % 2 == 1), corners, centres


def draw_pixels(count: int, sizes: Sequence[int], *key: int | str) -> Tensor:
    """Uniform whole numbers below each of two sizes: int64 [count, 2]."""
    source = generator(*key)
    return torch.stack([torch.randint(n, (count,), generator=source) for n in sizes], dim=1)


def crop_and_flip(images: Tensor, corners: Tensor, flips: Tensor, pad: int) -> Tensor:
    """Pad each image [N, C, H, W] with its mirrored border, cut its size out, flip where flips [N].

    corners: int64 [N, 2], row and column of the window's corner in the padded image, 0 to 2 pad.
    """
    # Nothing is padded in fact: one gather looks each pixel up, which takes less time and memory.
    mirrored = []
    for size, corner in zip(images.shape[2:], corners.split(1, dim=1)):
        place = (torch.arange(-pad, size - pad, device=images.device) + corner).abs()
        mirrored.append(size - 1 - (size - 1 - place).abs())
    rows, columns = mirrored
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)[:, None]
    return images.flatten(2).gather(2, pixels.expand(-1, images.shape[1], -1)).view_as(images)


def distort(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Rotate, zoom, shift each image at random, or show a window of it: float [N, C, H, W].

    One bilinear distortion, border continued. A window has its area drawn from [augment.area, 1] of
    the image, sides 3:4 to 4:3 of the image's, and lies anywhere (Szegedy et al. 2015,
    https://arxiv.org/abs/1409.4842); unlike theirs, one that would not fit is cut to the image.
    """
    n, _, height, width = images.shape
    drawn = torch.rand(4, n, generator=generator).mul_(2).sub_(1)
    turn, scale, right, down = drawn.to(images.device, non_blocking=images.is_cuda)
    angle, zoom = turn * math.radians(augment.rotate), 1 + scale * augment.zoom
    cos, sin, reach = angle.cos() / zoom, angle.sin() / zoom, 2 * augment.translate
    # Grid coordinates run from -1 to 1 on both axes, so a rotation scales by the aspect ratio.
    row_x = cos, -sin * (height / width), right * (reach / width)
    row_y = sin * (width / height), cos, down * (reach / height)
    if augment.area < 1:
        row_x, row_y = _in_window(row_x, row_y, augment.area, generator)
    # One product for the whole batch; F.affine_grid makes one an image, ten times as slow.
    identity = torch.eye(2, 3, device=images.device)[None]
    pixels = F.affine_grid(identity, (1, 1, height, width), align_corners=False).view(-1, 2)
    grid = torch.stack([*row_x, *row_y], dim=1).view(-1, 3) @ F.pad(pixels, (0, 1), value=1.0).T
    grid = grid.view(n, 2, height, width).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _in_window(row_x, row_y, least: float, generator: torch.Generator) -> tuple:
    """Rows of an affine map, applied to a random part of the square [-1, 1]^2 instead of it all."""
    drawn = torch.rand(4, len(row_x[0]), generator=generator)
    share, ratio, right, down = drawn.to(row_x[0].device, non_blocking=row_x[0].is_cuda)
    share, ratio = least + share * (1 - least), (4 / 3) ** (2 * ratio - 1)
    width, height = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    x, y = (2 * right - 1) * (1 - width), (2 * down - 1) * (1 - height)
    return tuple((a * width, b * height, c + a * x + b * y) for a, b, c in (row_x, row_y))


def blank(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Set a square of each image to 0, in place: cutout (https://arxiv.org/abs/1708.04552).

    images: float [N, C, H, W], normalised, so that 0 is the mean pixel; they are returned.
    centres: int64 [N, 2], row and column, side // 2 pixels from where the square starts.
    """
    inside = []
    for size, start in zip(images.shape[2:], (centres - side // 2).split(1, dim=1)):
        offset = torch.arange(size, device=images.device) - start
        inside.append((offset >= 0) & (offset < side))
    return images.masked_fill_(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0)


def resize(images: Tensor, side: int) -> Tensor:
    """Square images, float [N, C, H, H], with `side` pixels a side: bilinear, antialiased."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
