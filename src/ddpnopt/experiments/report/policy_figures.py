"""Figures of a feedback policy: images, the directions it answers to, and where their energy lies."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpnopt.experiments.report.plots import PALETTE, plain
from ddpnopt.experiments.stats import Interval

Picture = Sequence[Sequence[float]]


def image_rows(images: Sequence[Picture], columns: Mapping[str, Sequence[Picture]], signed: bool) -> Figure:
    """Draw each image in a row with the pictures that belong to it.

    Args:
        images: ``[N][H][W]``, dark is low.
        columns: by title, ``[N][h][w]``, all of one image height; smaller ones fill the same square.
        signed: whether the columns hold signed values with largest magnitude 1, drawn in two colours about
            white, or energies, drawn from white at zero to dark at the picture's largest.
    """
    figure = Figure(figsize=(1.5 * (1 + len(columns)), 1.45 * len(images) + 0.3), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for row, image in enumerate(images):
        _show(grid[row, 0], image, "gray", None)
        for axes, pictures in zip(grid[row, 1:], columns.values(), strict=True):
            _show(axes, pictures[row], "PuOr" if signed else "Purples", 1.0 if signed else None)
    for axes, title in zip(grid[0], ("image", *columns), strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def share_lines(steps: Sequence[int], lines: Mapping[str, Sequence[Interval]], area: float) -> Figure:
    """Draw shares of energy on the foreground, 0 to 1, over training.

    Args:
        steps: at which moments.
        lines: by name, mean and interval at each moment.
        area: the foreground's share of the pixels, a line for comparison.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (name, values) in enumerate(lines.items()):
        shade, away = PALETTE[place % len(PALETTE)], 0.06 * (place - len(lines) / 2)  # apart, so that bars show
        axes.errorbar(
            [moment + away for moment in range(len(steps))],
            [value.mean for value in values],
            yerr=[value.half for value in values],
            color=shade,
            marker="o",
            markersize=4,
            capsize=3,
            label=name,
        )
    axes.axhline(area, color="grey", linestyle="--", linewidth=1, label="share of the pixels")
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set(xlabel="step", ylabel="energy on the foreground")
    plain(axes)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _show(axes: Axes, picture: Picture, palette: str, largest: float | None) -> None:
    low = None if palette == "gray" else 0.0 if largest is None else -largest
    axes.imshow(picture, cmap=palette, vmin=low, vmax=largest, interpolation="nearest", aspect="equal")
    axes.set_axis_off()
