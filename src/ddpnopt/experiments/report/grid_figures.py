"""Figures of grids over two hyper-parameters: heat maps of a difference, and curves beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ddpnopt.experiments.report.plots import colour, plain

_ACROSS = 4


@dataclass(frozen=True)
class HeatMap:
    """A grid of numbers.

    Attributes:
        title: above it.
        columns, rows: labels of the two hyper-parameters' values.
        values: by row and column.
        marked: which of them are told apart, by bold text with a star.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]
    marked: Sequence[Sequence[bool]]


@dataclass(frozen=True)
class Band:
    """A line along training and a band about it.

    Attributes:
        label: name in the legend.
        steps: steps done at each point.
        line, low, high: value, and the band's edges, at each point.
    """

    label: str
    steps: Sequence[float]
    line: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def heat_maps(maps: Sequence[HeatMap], x: str, y: str, unit: str, limit: float) -> Figure:
    """Draw maps side by side, four in a row, with one scale of colours from ``-limit`` to ``limit``.

    Args:
        maps: what to draw.
        x, y: names of the two hyper-parameters.
        unit: of the values, beside the scale.
        limit: values beyond it have the colour of the limit.
    """
    palette, scale = matplotlib.colormaps["PuOr"], Normalize(-limit, limit, clip=True)  # safe for the colour-blind

    def draw(axes: Axes, place: int) -> None:
        one = maps[place]
        axes.imshow(one.values, cmap=palette, norm=scale, aspect="auto")
        for row, values in enumerate(one.values):
            for column, value in enumerate(values):
                marked = one.marked[row][column]
                axes.text(
                    column,
                    row,
                    f"{round(value, 1) + 0.0:+.1f}{'*' if marked else ''}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    fontweight="bold" if marked else "normal",
                    color="white" if abs(value) > 0.6 * limit else "black",
                )
        axes.set_xticks(range(len(one.columns)), list(one.columns))
        axes.set_yticks(range(len(one.rows)), list(one.rows))
        axes.set_title(one.title, fontsize=9)

    figure, used = _panels(len(maps), 2.1, draw)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    figure.colorbar(ScalarMappable(scale, palette), ax=used, label=unit, extend="both", shrink=0.8)
    return figure


def curve_panels(panels: Mapping[str, Sequence[Band]]) -> Figure:
    """Draw train losses against steps: two bands, with and without feedback, for each panel by its title."""
    titles = list(panels)

    def draw(axes: Axes, place: int) -> None:
        for band, shade in zip(panels[titles[place]], (colour("ddpnopt"), colour("sgd")), strict=True):
            axes.plot(band.steps, band.line, color=shade, label=band.label, linewidth=1.5)
            axes.fill_between(band.steps, band.low, band.high, color=shade, alpha=0.2, linewidth=0)
        axes.set_yscale("log")
        axes.set_title(titles[place], fontsize=9)
        plain(axes)

    figure, used = _panels(len(titles), 2.6, draw)
    used[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("train loss", fontsize=9)
    return figure


def _panels(count: int, height: float, draw: Callable[[Axes, int], None]) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes, four in a row of ``height`` inches, each drawn by its place."""
    down = -(-count // _ACROSS)
    across = min(count, _ACROSS)
    figure = Figure(figsize=(2.9 * across + 1, height * down + 0.6), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for place, one in enumerate(axes):
        if place < count:
            draw(one, place)
        else:
            one.set_axis_off()
    return figure, axes[:count]
