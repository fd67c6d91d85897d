"""This file is where the losses of a run become a curve: an SVG of a few kilobytes that takes the page's colours."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 340, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 8, 8, 18
_WINDOWS = 24  # means on a line: a single step's loss is mostly its timestep
_RAW = 160  # points of the faint line behind it

Point = tuple[float, float]


def loss_curve(said: Sequence[Mapping[str, Any]]) -> str | None:
    """The curve of a run's losses over its steps, as the markup of an `<svg>`; `None` without two steps.

    Classes of its lines: `raw` and `subject` (single steps, and means over windows of them), `class` (means of the
    prior's loss), `validation` (dots).

    Args:
        said: Entries of the run's `events.jsonl`.
    """
    steps = [entry for entry in said if entry.get("event") == "step"]
    subject = _points(steps, "loss_subject")
    if len(subject) < 2:
        return None
    lines = {"subject": _means(subject), "class": _means(_points(steps, "loss_class"))}
    dots = _points([entry for entry in said if entry.get("event") == "validation"], "loss")
    last = max(x for x, _ in [*subject, *dots])
    highest = max(y for points in (*lines.values(), dots) for _, y in points)
    unit = _round(highest / 3)
    top = unit * max(math.ceil(highest * 1.02 / unit), 1)

    def at(point: Point) -> str:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * point[0] / last
        y = HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * min(point[1], top) / top
        return f"{x:.1f},{y:.1f}"

    parts = [_axes(at, top, unit, last)]
    stride = math.ceil(len(subject) / _RAW)
    parts += [_line("raw", map(at, subject[::stride]))]
    parts += [_line(name, map(at, points)) for name, points in reversed(lines.items()) if points]
    for x, y in (at(point).split(",") for point in dots):
        parts.append(f'<circle class="validation" cx="{x}" cy="{y}" r="2.6"/>')
    told = f"loss from {lines['subject'][0][1]:.3f} to {lines['subject'][-1][1]:.3f} in {last:.0f} steps"
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">'
        f"<title>{told}</title>{''.join(parts)}</svg>"
    )


def _points(entries: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Step and value wherever the value is a number, each step once."""
    found = {
        float(entry["step"]): float(entry[key])
        for entry in entries
        if isinstance(entry.get(key), int | float) and math.isfinite(entry[key]) and entry["step"] > 0
    }
    return sorted(found.items())


def _means(points: Sequence[Point]) -> list[Point]:
    """Means over windows of as many points, at the middle of each; the ends stand at the first and the last point."""
    if len(points) < 2:
        return list(points)
    size = max(math.ceil(len(points) / _WINDOWS), min(5, len(points) // 4), 1)
    windows = [points[start : start + size] for start in range(0, len(points), size)]
    if len(windows) > 1 and len(windows[-1]) < size / 2:  # too few for a mean of their own
        windows[-2:] = [[*windows[-2], *windows[-1]]]
    means = [tuple(math.fsum(part) / len(window) for part in zip(*window, strict=True)) for window in windows]
    line = [(x, y) for x, y in means]
    return [(points[0][0], line[0][1]), *line[1:-1], (points[-1][0], line[-1][1])]


def _round(value: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten that is at least `value`."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(power * part for part in (1, 2, 2.5, 5, 10) if power * part >= value or part == 10)


def _line(name: str, places: Any) -> str:
    return f'<polyline class="{name}" points="{" ".join(places)}"/>'


def _axes(at: Any, top: float, unit: float, last: float) -> str:
    parts = []
    for number in range(round(top / unit) + 1):
        _, y = at((0.0, number * unit)).split(",")
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{_LEFT - 5}" y="{float(y) + 3:.1f}" text-anchor="end">{number * unit:g}</text>'
        )
    for step, anchor in ((0.0, "start"), (last, "end")):
        x, _ = at((step, 0.0)).split(",")
        word = f"{step:.0f}" if step == 0 else f"step {step:.0f}"
        parts.append(f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{word}</text>')
    return "".join(parts)
