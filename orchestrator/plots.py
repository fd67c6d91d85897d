"""This file is where figures become plots: SVG that a page carries. It is the door to matplotlib."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#62666b"  # legible on white and on black
BEST, PLAIN, FRONT = "#2463b0", "#9aa0a6", "#c96a12"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "raybooth",  # the same plot gives the same bytes
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
Point = tuple[float, float]


def scatter(
    points: Mapping[str, Point], front: Sequence[str], marked: Mapping[str, str], x: str, y: str
) -> str:
    """Trials as points, those of the front joined.

    Args:
        points: By trial.
        front: Trials on the Pareto front.
        marked: Words beside some of them.
        x: What the x axis is.
        y: What the y axis is.
    """
    with rc_context(_STYLE):
        figure, axes = _axes(x, y)
        across, up = zip(*points.values(), strict=True)
        axes.scatter(across, up, color=PLAIN, s=26)
        line = sorted(points[key] for key in front)
        axes.plot(*zip(*line, strict=True), color=FRONT, marker="o", linewidth=1.2, markersize=5)
        for key, word in marked.items():
            axes.annotate(word, points[key], xytext=(6, 6), textcoords="offset points", color=BEST)
            axes.scatter(*points[key], color=BEST, s=48)
        return _svg(figure)


def curves(
    lines: Mapping[str, Sequence[Point]],
    marked: Mapping[str, str],
    x: str,
    y: str,
    rings: Sequence[Point] = (),
) -> str:
    """Trials as lines, some of them with a word at their end; rings around points where something happened."""
    with rc_context(_STYLE):
        figure, axes = _axes(x, y)
        for key, line in lines.items():
            strong = key in marked
            axes.plot(
                *zip(*line, strict=True),
                color=BEST if strong else PLAIN,
                linewidth=2 if strong else 0.9,
                marker="o",
                markersize=3,
            )
            if strong:
                axes.annotate(marked[key], line[-1], xytext=(4, 0), textcoords="offset points", color=BEST)
        if rings:
            axes.plot(
                *zip(*rings, strict=True),
                color=FRONT,
                marker="o",
                markersize=8,
                markerfacecolor="none",
                linestyle="none",
            )
        return _svg(figure)


def bars(values: Mapping[str, float], x: str) -> str:
    """Named shares as bars, the largest on top."""
    with rc_context(_STYLE):
        figure, axes = _axes(x, "")
        ordered = sorted(values.items(), key=lambda item: item[1])
        axes.barh([name for name, _ in ordered], [value for _, value in ordered], color=BEST, height=0.6)
        axes.set_xlim(left=0)
        return _svg(figure)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(stream, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = stream.getvalue()
    # without its prolog; what is painted white would be a patch on a dark page
    return re.sub(r"fill: #ffffff", "fill: none", text[text.index("<svg") :])
