"""The report's charts, drawn by matplotlib as SVG that goes into the page and takes its colours from the page's CSS."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

# Placeholders: the page has one palette for light and one for dark mode, so its CSS variables replace these.
COLOURS = [f"#0000f{number}" for number in range(6)]
TEXT, GRID = "#0000fd", "#0000fe"
VARIABLES = {colour: f"var(--s{number})" for number, colour in enumerate(COLOURS)}
VARIABLES |= {TEXT: "currentColor", GRID: "var(--grid)"}
RIGHT, WRONG = (48, 128, 210), (218, 106, 38)  # pixels of an image cannot follow the mode: these suit both
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **{"axes.grid": True, "axes.grid.axis": "y", "ytick.major.size": 0, "axes.axisbelow": True},
    **{"axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0},
    **{"axes.formatter.limits": (-3, 4), "axes.formatter.useoffset": False, "lines.linewidth": 1.75},
    **{"font.size": 10, "axes.labelsize": 10, "font.sans-serif": ["DejaVu Sans"]},
    **{"svg.fonttype": "none", "figure.dpi": 72},
}
# What a page needs no part of: ids that charts share, clips (which would halve marks at the edge), and addresses.
SUPERFLUOUS = (
    r'(?s)<(metadata|style|clipPath).*?</\1>|<!--.*?-->|(?<=<g) id="[^"]*"| (clip-path|xmlns|xmlns:xlink)="[^"]*"'
)


class Series(NamedTuple):
    """A line of a chart: N x and y; of a line with marks also N (low, high) intervals of y, and N labels."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]] = ()
    labels: Sequence[str] = ()


class Chart(NamedTuple):
    """At least one series, each of at least one point; where y is in percent, its axis stays between 0 and 100."""

    title: str
    x_axis: str
    y_axis: str
    series: Sequence[Series]
    percent: bool = False

    @property
    def text(self) -> str:
        """The chart for those who cannot see it."""
        sentence = "{}: {:.3g} at {:g}, {:.3g} at {:g}, between {:.3g} and {:.3g}"
        said = (sentence.format(name, y[0], x[0], y[-1], x[-1], min(y), max(y)) for name, x, y, *_ in self.series)
        return f"{self.y_axis} over {self.x_axis}. {'; '.join(said)}."

    @property
    def svg(self) -> str:
        """The picture as an <svg> element."""
        return to_svg(draw(self), salt=repr(self))


@matplotlib.rc_context(STYLE)
def draw(chart: Chart) -> Figure:
    """Draws a chart; the page has its title and legend."""
    figure = Figure(figsize=(3.75, 2.8))
    axes = figure.add_axes((0.17, 0.19, 0.78, 0.75), xlabel=chart.x_axis, ylabel=chart.y_axis)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    for number, (_, x, y, intervals, _) in enumerate(chart.series):
        colour, line = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
        axes.plot(x, y, line, color=colour, marker="o" if intervals or len(x) == 1 else None)
        if intervals:
            errors = np.abs(np.transpose(intervals) - np.asarray(y))
            axes.errorbar(x, y, errors, fmt="none", color=colour, elinewidth=1, capsize=4)
    low, high = axes.get_ylim()
    if chart.percent:
        axes.set_ylim(max(low, 0), min(high, 100))
    _label_marks(axes, [mark for one in chart.series for mark in zip(one.x, one.y, one.labels, strict=False)])
    return figure


def _label_marks(axes: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Puts texts, (x, y, text), beside their marks; leaves out those that cover something or seem another mark's."""
    marks = axes.transData.transform([(x, y) for x, y, _ in labels] or np.empty((0, 2)))
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in marks]
    for number, (mark, (x, y, text)) in enumerate(zip(marks, labels, strict=True)):
        if any(text == labels[i][2] and np.hypot(*(mark - marks[i])) < 14 for i in range(number)):
            continue  # of equal texts at marks that are close to one another, the first is enough
        for right, up in ((6, 5), (6, -14), (-6, 5), (-6, -14)):
            side = "left" if right > 0 else "right"
            label = axes.annotate(text, (x, y), (right, up), textcoords="offset points", ha=side)
            box = label.get_window_extent()
            nearest = np.hypot(*(marks - np.mean(box.get_points(), 0)).T).argmin()
            inside = box.x1 < axes.bbox.x1 + 8 and box.x0 > axes.bbox.x0 and axes.bbox.y0 < box.y0
            if inside and labels[nearest][2] == text and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def heat_map(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A confusion matrix (C, C) as pixels (C, C, 4), RGBA: the larger a share of its row, the more opaque."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    opacity = np.where(shares > 0, 102 + 153 * shares, 0)
    colours = np.where(np.eye(len(counts), dtype=bool)[..., None], RIGHT, WRONG)
    return np.dstack([colours, opacity]).round().astype(np.uint8)


@matplotlib.rc_context(STYLE | {"axes.autolimit_mode": "data", "axes.grid": False})
def draw_heat_map(counts: NDArray[np.int64]) -> Figure:
    """Draws the heat map of a confusion matrix."""
    figure = Figure(figsize=(6, 6))
    axes = figure.add_axes((0.1, 0.1, 0.88, 0.88), xlabel="predicted class, number", ylabel="class, number")
    axes.set_facecolor(GRID)
    axes.imshow(heat_map(counts), interpolation="none")  # a pixel a class
    return figure


def to_svg(figure: Figure, salt: str) -> str:
    """A figure as an <svg> element in the page's colours; equal figures and salts give equal text."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure.savefig(file, format="svg")
    svg = re.sub(SUPERFLUOUS, "", "<svg" + file.getvalue().partition("<svg")[2])
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
