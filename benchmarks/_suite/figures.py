"""Performance profiles: share of tasks within a factor of the best method, a line for each method."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .registration import Method
from .scoring import profile, share_within
from .study import Entry, Outcome

WIDEST = 30.0  # factor at the right end


def profiles(outcomes: Sequence[Outcome], methods: Sequence[Method]) -> Figure:
    """Steps to the final target at the left, time to it at the right."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, outcomes, methods, lambda entry: entry.final)
    _draw(right, outcomes, methods, lambda entry: entry.seconds)
    left.set(xlabel="steps to the final target over the best method's", ylabel="share of tasks")
    right.set(xlabel="time to the final target over the best method's")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def _draw(axes: Axes, outcomes: Sequence[Outcome], methods: Sequence[Method], cost: Callable[[Entry], float]) -> None:
    costs = [{name: cost(entry) for name, entry in outcome.entries.items()} for outcome in outcomes]
    for number, method in enumerate(methods):
        ratios = profile(costs, method.name)
        at = [1.0, *(found for found in ratios if math.isfinite(found) and found <= WIDEST), WIDEST]
        own = method.package == "ddpnopt" and method.name.startswith("ddpnopt")
        axes.step(
            at,
            [share_within(ratios, factor) for factor in at],
            where="post",
            color=f"C{number % 10}",
            linestyle="-" if number < 10 else "--",
            linewidth=2.4 if own else 1.2,
            label=method.title,
        )
    axes.set(xscale="log", xlim=(1, WIDEST), ylim=(0, 1.02))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
