"""Generated data sets with known truth: one shape before a cluttered background, and its mask.

The bytes are the same on every machine. Vector units differ in the last bit of sin and exp and in
the order of sums, so there are none: whatever is not in whole numbers is one + - * / or square root
at a time, which IEEE 754 fixes to the bit, and is rounded to whole numbers before it meets a pixel.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ..base.settings import PositiveInt, Seed, check
from .stencils import FULL, GRID, REACH, SHAPES, TEXTURES, THINGS, TILE, distances, tiles


@dataclass(frozen=True)
class Scenes:
    """Generated images, and all that is known about them."""

    images: np.ndarray  # uint8 [N, 3, H, W]
    labels: np.ndarray  # int64 [N], places in classes
    masks: np.ndarray  # bool [N, H, W], where the object can be seen in half of the pixel or more
    backgrounds: np.ndarray  # int64 [N], the kind, 0 to 9; a shortcut gives shape k the kind k
    classes: tuple[str, ...]


class _Set(NamedTuple):
    train: int  # images that load_data gives
    test: int
    side: int  # pixels
    radius: tuple[float, float]  # of the object, in pixels
    relief: int  # grey levels between the two colours of the object's texture
    textured: bool = False  # class = shape x texture


SETS = {
    "shapes10": _Set(10_000, 2_000, 32, (8.5, 13), 40),
    "shapes100": _Set(10_000, 2_000, 32, (9, 13), 90, textured=True),
    "scenes10": _Set(4_000, 1_000, 96, (15, 26), 40),
}
# The colour of each kind of background: red, green and blue above or below its lightness.
TINTS = [(60, -30, -30), (45, 5, -50), (30, 25, -55), (-15, 40, -25), (-40, 45, -5)]
TINTS += [(-45, 15, 30), (-30, -15, 45), (5, -45, 40), (45, -35, -10), (0, 0, 0)]
CLUTTER, OCCLUDERS = 3, 2  # things behind the object, and in front of it
Agreement = Literal["kept", "removed", "reversed"]
_KINDS = {"name": Literal[*SETS], "count": PositiveInt, "seed": Seed}
_KINDS |= {"shortcut": Annotated[float, Field(ge=0, le=1)], "agreement": Agreement}
_KINDS |= {"image_size": PositiveInt | None}


def generate(
    name: str,
    count: int,
    seed: int = 0,
    *,
    shortcut: float = 0.1,
    agreement: Agreement = "kept",
    image_size: int | None = None,
) -> Scenes:
    """Draw images of a generated data set; image i shows class i modulo the number of classes.

    name: shapes10, shapes100 (shape x texture), both 32x32, or scenes10, 96x96.
    seed: fixes the images; a larger count adds to them. load_data trains on 0 and tests on 1.
    shortcut: the probability that the background is that of the object's shape; 0.1: independent.
    agreement: what became of the shortcut: kept, removed (background independent of the shape) or
        reversed (always that of another shape). Nothing else changes.
    image_size: shrink to this side in pixels, a divisor of the data set's, else ValueError.
    """
    given = name, count, seed, shortcut, agreement, image_size
    check("generate", _KINDS, dict(zip(_KINDS, given)))
    share = {"kept": shortcut, "removed": 0.1, "reversed": 0.0}[agreement]
    spec, classes = SETS[name], tuple(SHAPES)
    factor, rest = divmod(spec.side, image_size or spec.side)
    if rest:
        pixels = f"the {spec.side} pixels of {name}"
        raise ValueError(f"generate: image_size = {image_size} is no divisor of {pixels}.")
    if spec.textured:
        classes = tuple(f"{shape}, {texture}" for shape in SHAPES for texture in TEXTURES)
    labels = np.arange(count, dtype=np.int64) % len(classes)
    blocks, at_once = [], 2**16 // spec.side**2  # so many that arrays stay in the cache
    for start in range(0, count, at_once):
        rng = np.random.Generator(np.random.PCG64([seed, start, *name.encode()]))
        blocks.append(_draw(spec, np.arange(start, start + at_once) % len(classes), share, rng))
    images, masks, backgrounds = (np.concatenate(parts)[:count] for parts in zip(*blocks))
    if factor > 1:
        # In whole numbers, halves up, so that the bytes are the same on every machine.
        area = factor**2
        images = ((_sums(images, factor) + area // 2) // area).astype(np.uint8)
        masks = 2 * _sums(masks, factor) >= area
    return Scenes(images, labels, masks, backgrounds, classes)


def _sums(values: np.ndarray, factor: int) -> np.ndarray:
    """[..., H, W] to the sums of squares of factor x factor: uint32 [..., H/factor, W/factor]."""
    *others, height, width = values.shape
    squares = values.reshape(*others, height // factor, factor, width // factor, factor)
    return squares.sum((-3, -1), np.uint32)


def _draw(spec: _Set, labels: np.ndarray, share: float, rng: np.random.Generator):
    """Images, masks and backgrounds, as in Scenes."""
    n, side = len(labels), spec.side
    shapes, textures = divmod(labels, 10) if spec.textured else (labels, rng.integers(0, 10, n))
    others = (shapes + rng.integers(1, 10, n)) % 10
    # Nothing drawn below depends on share, so that the rest of an image stays when it changes.
    backgrounds = np.where(rng.random(n) < share, shapes, others)
    sign = np.where(rng.random(n) < 0.5, 1, -1)  # an object lighter or darker than its surroundings
    light = 128 - sign * _between(rng, 0, 50, n)
    tint = np.array(TINTS)[backgrounds] + rng.integers(-12, 13, (n, 3))
    depth = _between(rng, 6, 15, n)
    pose = _pose(rng, _between(rng, 0.28, 0.42, n) * side, 0, side)
    dark, bright = _rgb(light - depth, tint), _rgb(light + depth, tint)
    canvas = _textured(backgrounds, pose, side, dark, bright)
    for _ in range(CLUTTER):
        pose = _pose(rng, _between(rng, 0.05, 0.2, n) * side, 0, side)
        thing = rng.integers(len(SHAPES), len(SHAPES) + len(THINGS), n)
        _paint(canvas, _coverage(thing, pose, side), _near(rng, light))

    radius = _between(rng, *spec.radius, n)
    pose = _pose(rng, radius, 0.8 * radius, side - 0.8 * radius, upright=True)
    visible = _coverage(shapes, pose, side)
    _paint(canvas, visible, _surface(rng, spec, textures, light, sign))
    low, high = pose.centre - 1.3 * radius, pose.centre + 1.3 * radius
    for _ in range(OCCLUDERS):
        bar = _pose(rng, radius * _between(rng, 0.3, 1, n), low, high)
        weight = _coverage(np.full(n, len(SHAPES)), bar, side)
        _paint(canvas, weight, _near(rng, light))
        visible = visible * (FULL - weight) // FULL
    noise = np.frombuffer(rng.bytes(canvas.size), np.uint8).reshape(canvas.shape) % 32
    images = (canvas + noise - 16).clip(0, 255).astype(np.uint8)
    return images, visible[:, 0] >= FULL // 2, backgrounds


def _surface(rng, spec: _Set, textures: np.ndarray, light: np.ndarray, sign: np.ndarray):
    """The object's colours at every pixel: int16 [n, 3, side, side]."""
    n, tint = len(light), rng.integers(-45, 46, (len(light), 3))
    pose = _pose(rng, _between(rng, 0.25, 0.38, n) * spec.side, 0, spec.side)
    first = light + sign * _between(rng, 40, 105, n)
    second = first - sign * _between(rng, 0.8, 1.2, n) * spec.relief
    return _textured(textures, pose, spec.side, _rgb(first, tint), _rgb(second, tint))


def _near(rng: np.random.Generator, light: np.ndarray) -> np.ndarray:
    """Any colour of about the lightness of the background."""
    shift = _between(rng, -30, 30, len(light))
    return _rgb(light + shift, rng.integers(-45, 46, (len(light), 3)))


def _rgb(light: np.ndarray, tint: np.ndarray) -> np.ndarray:
    return np.rint(light[:, None] + tint).clip(0, 255).astype(np.int16)[:, :, None, None]


def _paint(canvas: np.ndarray, weight: np.ndarray, colour: np.ndarray) -> None:
    """Mix colour into canvas. All int16: [n, 3, side, side], weight [n, 1, side, side]."""
    canvas += (colour - canvas) * weight // FULL


class _Pose(NamedTuple):
    """Where a table lies in each image: centre [2, n] and radius [n] in pixels, its direction."""

    centre: np.ndarray
    radius: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    stretch: np.ndarray


def _pose(rng, radius: np.ndarray, low, high, *, upright: bool = False) -> _Pose:
    """A centre between low and high; any direction, or at most 23 degrees from upright."""
    n = len(radius)
    centre = _between(rng, low, high, (2, n))
    # tan(angle / 2) gives cos and sin by division alone; up to 23 degrees, or 45 and quarter turns.
    half = _between(rng, -1, 1, n) * (0.2 if upright else 0.4142)
    cos, sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    turns = rng.integers(0, 1 if upright else 4, n)
    cos, sin = np.where(turns % 2, -sin, cos), np.where(turns % 2, cos, sin)
    flip = np.where(turns < 2, 1, -1)
    return _Pose(centre, radius, cos * flip, sin * flip, _between(rng, 0.85, 1.15, n))


def _between(rng: np.random.Generator, low, high, shape) -> np.ndarray:
    """Generator.uniform, which a compiler may fuse into one rounding, in two."""
    return low + (high - low) * rng.random(shape)


def _lay(pose: _Pose, side: int, cells: float) -> list[np.ndarray]:
    """Column and row of a table at every pixel, int32 [n, side, side]; cells make a radius."""
    scale = cells * 1024 / pose.radius
    middles = 16 * np.arange(side, dtype=np.int32) + 8
    x, y = middles - np.rint(16 * pose.centre).astype(np.int32)[:, :, None]
    cos, sin, axes = pose.cos * scale, pose.sin * scale, []
    for steps in ((cos * pose.stretch, sin * pose.stretch), (-sin, cos)):
        along_x, along_y = (np.rint(step).astype(np.int32)[:, None] for step in steps)
        axes.append((along_x * x)[:, None, :] + (along_y * y)[:, :, None] >> 14)
    return axes


def _look_up(tables: np.ndarray, kinds: np.ndarray, column, row) -> np.ndarray:
    size = tables.shape[-1]
    first = (kinds * size * size).astype(np.int32)[:, None, None]
    return tables.ravel().take(row * size + column + first)


def _coverage(kinds: np.ndarray, pose: _Pose, side: int) -> np.ndarray:
    """How much of each pixel a shape covers: int16 [n, 1, side, side], 0..FULL."""
    half = GRID // 2
    column, row = ((axis + half).clip(0, GRID - 1) for axis in _lay(pose, side, half / REACH))
    radius = np.rint(16 * pose.radius).astype(np.int32)[:, None, None]
    distance = _look_up(distances(), kinds, column, row) * radius >> 7  # in 1/FULL pixels
    return (distance + FULL // 2).clip(0, FULL).astype(np.int16)[:, None]


def _textured(kinds: np.ndarray, pose: _Pose, side: int, first, second) -> np.ndarray:
    """A texture from the first colour to the second: int16 [n, 3, side, side]."""
    column, row = (axis % TILE for axis in _lay(pose, side, TILE))
    share = _look_up(tiles(), kinds, column, row)[:, None]
    return first + (second - first) * share // FULL
