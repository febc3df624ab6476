"""Tables that `synthetic` cuts images from: outlines of shapes, and textures."""

import functools

import numpy as np

SHAPES = "disc ring square triangle star cross crescent heart arrow hourglass".split()  # noqa: SIM905
THINGS = ("bar", "pebble")  # what lies about: like no shape, so that it cannot be taken for one
TEXTURES = "plain striped checked dotted gridded zigzag bricked speckled blotched shaded".split()  # noqa: SIM905
GRID, REACH = 256, 1.25  # a shape is a table of GRID x GRID cells, REACH radii from its middle
TILE = 64  # side of a texture in cells; it repeats
FULL = 128  # weight of a pixel that is covered whole: FULL times a difference of 255 fits int16


@functools.cache
def distances() -> np.ndarray:
    """Signed distances from the outline, positive inside: int16 [12, GRID, GRID], 1024 a radius."""
    line = (np.arange(GRID) + 0.5 - GRID / 2) * (2 * REACH / GRID)
    x, y = line[None, :], line[:, None]

    def disc(cx: float, cy: float, radius: float) -> np.ndarray:
        return radius - np.sqrt((x - cx) * (x - cx) + (y - cy) * (y - cy))

    def polygon(*points: tuple[float, float]) -> np.ndarray:
        nearest, inside = np.full((GRID, GRID), np.inf), np.zeros((GRID, GRID), bool)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
            dx, dy, px, py = x1 - x0, y1 - y0, x - x0, y - y0
            along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clip(0, 1)
            ex, ey = px - dx * along, py - dy * along
            nearest = np.minimum(nearest, ex * ex + ey * ey)
            inside ^= ((y0 > y) != (y1 > y)) & ((dx * py > dy * px) == (dy > 0))
        return np.where(inside, 1, -1) * np.sqrt(nearest)

    def box(a: float, b: float) -> np.ndarray:
        return polygon((-a, -b), (a, -b), (a, b), (-a, b))

    tips = [(0, -1), (0.951, -0.309), (0.588, 0.809), (-0.588, 0.809), (-0.951, -0.309)]
    dents = [(0.247, -0.340), (0.399, 0.130), (0, 0.42), (-0.399, 0.130), (-0.247, -0.340)]
    head, shaft = [(0.2, -0.75), (1, 0), (0.2, 0.75)], [(-0.95, 0.28), (-0.95, -0.28)]
    point = polygon((0, 0.95), (-0.8, -0.01), (-0.43, -0.3), (0.43, -0.3), (0.8, -0.01))
    pebble = [(-0.9, -0.1), (-0.4, -0.7), (0.3, -0.6), (0.9, 0.05), (0.5, 0.7), (-0.3, 0.5)]
    tables = {
        "disc": disc(0, 0, 0.88),
        "ring": 0.21 - abs(disc(0, 0, 0.74)),
        "square": box(0.76, 0.76),
        "triangle": polygon((0, -1), (0.9, 0.6), (-0.9, 0.6)),
        "star": polygon(*[corner for pair in zip(tips, dents) for corner in pair]),
        "cross": np.maximum(box(0.28, 0.9), box(0.9, 0.28)),
        "crescent": np.minimum(disc(-0.1, 0, 0.98), -disc(0.42, 0, 0.8)),
        "heart": np.maximum(np.maximum(disc(-0.43, -0.3, 0.47), disc(0.43, -0.3, 0.47)), point),
        "arrow": polygon(*head, (0.2, 0.28), *shaft, (0.2, -0.28)),
        "hourglass": polygon((-0.75, -0.85), (0.75, -0.85), (-0.75, 0.85), (0.75, 0.85)),
        "bar": box(1, 0.2),
        "pebble": polygon(*pebble),
    }
    return np.rint(1024 * np.stack([tables[name] for name in (*SHAPES, *THINGS)])).astype(np.int16)


@functools.cache
def tiles() -> np.ndarray:
    """Share of the second colour: int16 [10, TILE, TILE], 0..FULL."""
    y, x = np.mgrid[:TILE, :TILE]
    rng = np.random.Generator(np.random.PCG64(0))
    specks = np.kron(rng.integers(0, 2, (8, 8)), np.ones((8, 8), int))
    blots = np.kron(rng.integers(0, 2, (4, 4)), np.ones((16, 16), int))
    patterns = {
        "plain": 0 * x,
        "striped": x // 16 % 2,
        "checked": (x // 16 + y // 16) % 2,
        "dotted": (x % 32 - 16) ** 2 + (y % 32 - 16) ** 2 < 11**2,
        "gridded": (x % 32 < 8) | (y % 32 < 8),
        "zigzag": (y + abs(x % 32 - 16)) // 16 % 2,
        "bricked": (y % 32 < 7) | ((x + y // 32 * 32) % 64 < 7),
        "speckled": specks,
        "blotched": _blur(FULL * blots, 16) > FULL // 2,
        "shaded": abs(x - 32) / 32,
    }
    sharp = np.stack([FULL * patterns[name] for name in TEXTURES]).astype(np.int64)
    return _blur(sharp, 5).astype(np.int16)


def _blur(tiles: np.ndarray, size: int) -> np.ndarray:
    """Mean over size x size cells, in whole numbers."""
    shifts = [(i, j) for i in range(size) for j in range(size)]
    return sum(np.roll(tiles, shift, (-2, -1)) for shift in shifts) // size**2
