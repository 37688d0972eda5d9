"""The figure of benchmarks/robustness.py: test accuracy against learning rate, a line for each optimizer."""

from _comparison import Comparison
from matplotlib.figure import Figure

from ddpnopt.experiments import data
from ddpnopt.experiments.report.plots import colour


def figure_name(dataset: str) -> str:
    """Return the file name of a dataset's figure."""
    return f"robustness-{dataset}.png"


def accuracy_by_rate(comparison: Comparison) -> Figure:
    """Draw means over the seeds with their 95% intervals."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in comparison.curves:
        method = curve.method
        axes.errorbar(
            [point.lr for point in curve.points],
            [point.accuracy.mean for point in curve.points],
            yerr=[0.0 if point.accuracy.count == 1 else point.accuracy.half for point in curve.points],
            color=colour(method.optimizer),
            linestyle="--" if method.matched else "-",
            linewidth=2 if method.own else 1.2,
            marker="o" if method.own else ".",
            capsize=2,
            label=method.label,
        )
    axes.set(xscale="log", xlabel="learning rate", ylabel="test accuracy, %", ylim=(0, 101))
    axes.set_title(data.source(comparison.study.dataset).title)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure
