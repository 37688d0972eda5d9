"""Figures. Functions take plain numbers and return a matplotlib figure; no global state, no windows."""

import html
import io
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.report.curves import Curve
from ddpnopt.experiments.stats import Interval

PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8a8a8a", "#6b4c9a")
"""Okabe and Ito's colours, told apart by colour-blind readers as well, then a grey and a violet."""

_COLOURS: Mapping[str, str] = dict(zip(("ddpnopt", "sgd", "rmsprop", "adam"), PALETTE, strict=False))
_SPARE = PALETTE[4:7]


def colour(name: str, place: int = 0) -> str:
    """Colour of an optimizer, the same in every figure; ``place`` chooses one for a name without its own."""
    return _COLOURS.get(name, _SPARE[place % len(_SPARE)])


def plain(axes: Axes) -> None:
    """Give axes the look that all figures share: a faint grid, and no frame above and on the right."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def loss_figure(title: str, curves: Mapping[str, Curve]) -> Figure:
    """Train loss against steps and against seconds; lines are medians, bands reach from quartile to quartile."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for place, (name, curve) in enumerate(curves.items()):
        for axes, x in ((by_step, curve.steps), (by_time, curve.seconds)):
            axes.plot(x, curve.median, color=colour(name, place), label=curve.label, linewidth=1.8)
            axes.fill_between(x, curve.low, curve.high, color=colour(name, place), alpha=0.15, linewidth=0)
    by_step.set(xlabel="step", ylabel="train loss")
    by_time.set(xlabel="seconds of training")
    if any(curve.steps for curve in curves.values()):  # an empty axis cannot be logarithmic
        by_step.set(yscale="log")
        by_time.set(xscale="log")
    figure.suptitle(title)
    by_step.legend(frameon=False)
    for axes in (by_step, by_time):
        plain(axes)
    return figure


def accuracy_figure(values: Mapping[str, tuple[float, ...]], means: Mapping[str, Interval]) -> Figure:
    """Test accuracy in percent: a ring for each seed, equal ones stacked, the mean with its interval beneath.

    Args:
        values: accuracies of the seeds, 0 to 1, by optimizer.
        means: their means and intervals, in the same units.
    """
    figure = Figure(figsize=(10, 0.7 + 0.75 * len(values)), layout="constrained")
    axes = figure.subplots()
    for place, (name, accuracies) in enumerate(values.items()):
        mean = means[name].scaled(100)
        again = [accuracies[:i].count(value) for i, value in enumerate(accuracies)]  # stack equal values
        axes.plot(
            [100 * value for value in accuracies],
            [place - 0.05 - 0.1 * height for height in again],
            "o",
            markerfacecolor="none",
            markeredgecolor=colour(name, place),
        )
        half = 0.0 if mean.count == 1 else mean.half
        axes.errorbar(mean.mean, place + 0.22, xerr=half, fmt="D", color=colour(name, place), capsize=4)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.7)
    axes.set_xlabel("test accuracy, %")
    plain(axes)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, 150 dots to the inch."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def to_svg(figure: Figure, salt: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element to be put into a page: no prologue, metadata or fixed size.

    Args:
        figure: what to draw.
        salt: a word of its own for each figure of a page: the prefix of the figure's inner names, which a page may
            not hold twice.
        label: what the figure shows, for readers who cannot see it.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg")
    element = buffer.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{salt}-", element)
    head, rest = element.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(label)}">{rest}'
