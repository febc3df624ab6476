"""Stencils: outlines of the sizes that geometry gives, textures that repeat without a seam."""

import math

import numpy as np
import pytest

from labutils.data import stencils


def test_distances_grow_no_faster_than_the_way():
    cell = 2 * stencils.REACH / stencils.GRID * 1024
    for axis in 1, 2:
        assert abs(np.diff(stencils.distances(), axis=axis)).max() <= cell + 1


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("disc", math.pi * 0.88**2),
        ("ring", math.pi * (0.95**2 - 0.53**2)),
        ("square", 1.52**2),
        ("cross", 2 * 0.56 * 1.8 - 0.56**2),
        ("bar", 0.8),
    ],
)
def test_an_outline_encloses_its_area(name, area):
    inside = stencils.distances()[[*stencils.SHAPES, *stencils.THINGS].index(name)] > 0
    assert inside.mean() * (2 * stencils.REACH) ** 2 == pytest.approx(area, rel=0.03)


def test_a_texture_repeats_without_a_seam():
    tiles = stencils.tiles()
    assert tiles.shape == (len(stencils.TEXTURES), stencils.TILE, stencils.TILE)
    assert (tiles.min(), tiles.max()) == (0, stencils.FULL)
    for axis in 1, 2:
        steps = abs(np.diff(tiles.astype(int), axis=axis)).max()
        seam = abs(tiles.take(0, axis).astype(int) - tiles.take(-1, axis)).max()
        assert seam <= steps
