"""This file is where a drawing is bent out of shape, with its colours and texture kept."""

import random

from PIL import Image

CELLS = 5  # along an edge: as coarse as what a drawing gets wrong

Point = tuple[float, float]


def warped(drawing: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """A copy whose inner grid points are moved by normal draws.

    Args:
        drawing: a square.
        strength: standard deviation in parts of the edge: at 0.05 a thing is still itself, at 0.15 hardly.
    """
    step = drawing.width / CELLS

    def moved(column: int, row: int) -> Point:
        sideways, downwards = (rng.gauss(0, strength) * drawing.width for _ in range(2))
        return (
            column * step + (sideways if 0 < column < CELLS else 0.0),
            row * step + (downwards if 0 < row < CELLS else 0.0),
        )

    points = {(column, row): moved(column, row) for row in range(CELLS + 1) for column in range(CELLS + 1)}
    mesh = []
    for row in range(CELLS):
        for column in range(CELLS):
            box = [round(step * part) for part in (column, row, column + 1, row + 1)]
            corners = ((column, row), (column, row + 1), (column + 1, row + 1), (column + 1, row))
            mesh.append((tuple(box), tuple(value for corner in corners for value in points[corner])))
    return drawing.transform(drawing.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
