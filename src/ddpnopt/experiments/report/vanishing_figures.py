"""Figures of the vanishing-gradient experiment: loss curves, and update norms by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpnopt.experiments.report.plots import PALETTE, plain

_STYLES = ("-", "--")


def curves_figure(
    title: str, block: int, curves: Mapping[str, Sequence[float]], plateau: float, highest: float
) -> Figure:
    """Train loss against steps.

    Args:
        title: over the figure.
        block: steps per point.
        curves: loss of every block, by label.
        plateau: loss of the best constant output, drawn as a line.
        highest: upper end of the axis; what lies above is cut.
    """
    figure, axes = _empty(title)
    for place, (label, losses) in enumerate(curves.items()):
        axes.plot([block * (i + 1) for i in range(len(losses))], losses, label=label, **_look(place))
    axes.axhline(plateau, color="#000000", linewidth=0.8, linestyle=":", label="best constant output")
    axes.set(xlabel="step", ylabel="train loss", ylim=(0, highest))
    return _legend(figure, axes)


def norms_figure(title: str, norms: Mapping[str, Sequence[float]]) -> Figure:
    """Median length of a step's update against the layer, counted from 1 at the input, by label; logarithmic."""
    figure, axes = _empty(title)
    for place, (label, lengths) in enumerate(norms.items()):
        axes.plot(range(1, len(lengths) + 1), lengths, marker="o", markersize=4, label=label, **_look(place))
    axes.set(xlabel="layer", ylabel="median |du| of a step", yscale="log")
    return _legend(figure, axes)


def _empty(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def _look(place: int) -> dict[str, Any]:
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": _STYLES[place // len(PALETTE) % len(_STYLES)]}


def _legend(figure: Figure, axes: Axes) -> Figure:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
