"""Costs in figures: ratios of interleaved blocks, exponents of growth, and pictures of cost against size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from matplotlib.figure import Figure

from ddpnopt.experiments.report.plots import PALETTE, plain
from ddpnopt.experiments.stats import Interval, mean_interval

FITTED = 3  # largest sizes of a range, where what grows fastest is most of the cost
Line = tuple[Sequence[float], Sequence[float]]
_STYLES = tuple(zip(PALETTE, "osD^vPX*h", strict=True))  # markers tell lines apart without any colour


@dataclass(frozen=True)
class Spread:
    """Median and quartiles; of a single value that value thrice."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def ratio(blocks: Sequence[float], others: Sequence[float]) -> Spread:
    """Median and quartiles of the ratios to another's blocks; those of the same place belong to the same turn."""
    ratios = [own / its for own, its in zip(blocks, others, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Spread(median(ratios), low, high)


@dataclass(frozen=True)
class Curve:
    """Costs of one method along one axis.

    Attributes:
        sizes: in ascending order.
        turns: for each turn the cost at every size; memory, measured once, has a single one.
    """

    sizes: Sequence[int]
    turns: Sequence[Sequence[float]]

    @property
    def medians(self) -> list[float]:
        """Median over the turns at every size."""
        return [median(values) for values in zip(*self.turns, strict=True)]


def growth(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent p of ``cost = c size^p`` by least squares on logarithms.

    Raises:
        ValueError: for fewer than two different sizes, or a size or cost that is not positive.
    """
    if min(*sizes, *costs) <= 0 or len(set(sizes)) < 2:
        raise ValueError(f"a power law needs two sizes and positive values; sizes {list(sizes)}, costs {list(costs)}")
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    middle = math.fsum(x) / len(x)
    moment = math.fsum((a - middle) * b for a, b in zip(x, y, strict=True))
    return moment / math.fsum((a - middle) ** 2 for a in x)


def exponent(curve: Curve, count: int = FITTED) -> Interval | None:
    """Mean over turns of the growth over the ``count`` largest sizes, with its 95% interval.

    The sizes of one turn were measured one after the other, so that a machine that slows down slows all. None where a
    cost is not positive: too small to be seen.
    """
    if min(value for turn in curve.turns for value in turn[-count:]) <= 0:
        return None
    return mean_interval([growth(curve.sizes[-count:], turn[-count:]) for turn in curve.turns])


def growth_figure(panels: Mapping[str, tuple[str, Mapping[str, Line]]], y: str) -> Figure:
    """Draw one panel beside another, both axes logarithmic: a power law is a straight line, its exponent the slope.

    Args:
        panels: by title: what the horizontal axis shows, and by label the (sizes, costs) of a line. Costs that are not
            positive have no place on the axis and are left out. A label has the same colour in every panel.
        y: what the vertical axes show.
    """
    labels = list(dict.fromkeys(label for _, lines in panels.values() for label in lines))
    if len(labels) > len(_STYLES):
        raise ValueError(f"a picture tells {len(_STYLES)} lines apart, got {len(labels)}: draw two")
    figure = Figure(figsize=(4.2 * len(panels), 4.8), layout="constrained")
    handles = {}
    for axes, (title, (x, lines)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for label, (sizes, costs) in lines.items():
            shown = [(size, cost) for size, cost in zip(sizes, costs, strict=True) if cost > 0]
            colour, marker = _STYLES[labels.index(label)]
            handles[label] = axes.plot(*zip(*shown, strict=True), color=colour, marker=marker)[0] if shown else None
        ticks = sorted({size for sizes, _ in lines.values() for size in sizes})
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        plain(axes)
    drawn = {label: handle for label, handle in handles.items() if handle is not None}
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=2, frameon=False)
    return figure
