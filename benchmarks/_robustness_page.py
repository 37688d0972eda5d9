"""The page that benchmarks/robustness.py writes: a function of the comparisons, in Markdown."""

from collections.abc import Sequence

from _comparison import ALLOWED_DROP, COLLAPSED_BELOW, Comparison, Curve, Point, failures
from _markdown import duration, number, plural, table, verdict
from _robustness_figure import figure_name
from _training import TUNING_SEEDS

from ddpnopt.experiments import data

_LOW, _HIGH = 1e-3, 1e2  # the learning rates over which drops are taken, for every optimizer alike

_INTRODUCTION = f"""# Test accuracy against learning rate

DDPNOpt runs with its default settings but for weight decay, of which nobody has any, *not tuned at all*; SGD (momentum
0.9), RMSprop and Adam run with the learning rate that is best on validation data. This page is written by the command
named under each dataset, from the runs in [`records`](records); it reports what they say, gains and losses alike.

* **Same for all**: network, initial weights and order of the samples (paired by seed), batch size, number of epochs.
  *Not* the same: computing time; a step of DDPNOpt costs more, see the last column of the first table.
* **Split**: fixed. Tables: 70 % train, 10 % validation, 20 % test within each class. Fashion-MNIST: its own test part,
  validation on the last 5,000 training samples. Intervals cover initial weights and order of samples, not the split.
* **Tuning**: the rivals' learning rate is the one of highest mean validation accuracy over {len(TUNING_SEEDS)} seeds
  that are not among those reported; ties go to the lower train loss. The test part chooses nothing.
  Not tuned, for anyone: momentum, decay rates of moving averages, weight decay (none), batch size, schedule (constant).
* **Numbers**: test accuracy after the last epoch, in percent; mean over seeds ± 95 % t interval; differences paired by
  seed. *Diverged*: a loss or a step was not finite. *Collapsed*: finite, but at the end less than
  {COLLAPSED_BELOW:g} points above guessing; at very small learning rates this means that nothing is learned yet.
"""


def page(comparisons: Sequence[Comparison], command: str) -> str:
    """Return the whole page.

    Args:
        comparisons: one for each dataset that is complete.
        command: what repeats a dataset's part, less its name.
    """
    return "\n".join([_INTRODUCTION, *(_section(comparison, command) for comparison in comparisons)])


def _section(comparison: Comparison, command: str) -> str:
    study, config, source = comparison.study, comparison.study.config(), data.source(comparison.study.dataset)
    activation = {"tanh": "Tanh", "relu": "ReLU"}[source.activation]
    network = f"Dense network, 5 layers, {activation}, width {source.width}"
    cost = f"{len(study.runs())} runs, {duration(comparison.seconds)} of computing on one thread"
    return f"""## {source.title}

{network}; batch {config.batch_size}, {plural(config.epochs, "epoch")}, {plural(study.seeds, "seed")}.

{_headline(comparison)}
{_notes(comparison)}
![Test accuracy against learning rate on {source.title}]({figure_name(study.dataset)})

Test accuracy by learning rate; in brackets the points below the optimizer's own best (bold);
`✗n`: n of {study.seeds} runs diverged or collapsed.

{_by_rate(comparison)}

The same for learning rates from {_LOW:g} to {_HIGH:g}:

{_summary(comparison)}

{_claims(comparison)}

Command: `{command} {study.dataset}` ({cost}, torch {", ".join(comparison.torch)}).

Settings:
{_settings(comparison)}
"""


def _headline(comparison: Comparison) -> str:
    header = ["", "learning rate", "test accuracy", "DDPNOpt minus it", "DDPNOpt is", "seconds per run"]
    return table(header, (_headline_row(comparison, curve) for curve in comparison.curves))


def _headline_row(comparison: Comparison, curve: Curve) -> list[str]:
    point, lead = curve.chosen, comparison.lead(curve)
    rate = f"{point.lr:g} ({'default' if curve.method.own else 'tuned'})"
    against = ["", ""] if curve is comparison.own else [number(lead, sign=True), verdict(lead)]
    return [curve.method.label, rate, number(point.accuracy), *against, f"{point.seconds:.2f}"]


def _notes(comparison: Comparison) -> str:
    return "".join(
        f"\n{curve.method.label}'s learning rate {curve.chosen.lr:g} ends its grid; a better one may lie beyond.\n"
        for curve in comparison.rivals
        if curve.at_edge
    )


def _by_rate(comparison: Comparison) -> str:
    rates = sorted({point.lr for curve in comparison.curves for point in curve.points})
    return table(
        ["learning rate", *(curve.method.label for curve in comparison.curves)],
        ([f"{rate:g}", *(_cell(curve, rate) for curve in comparison.curves)] for rate in rates),
    )


def _cell(curve: Curve, rate: float) -> str:
    point = next((point for point in curve.points if point.lr == rate), None)
    if point is None:
        return ""
    mean, drop = f"{point.accuracy.mean:.1f}", curve.drop(point)
    failed = f" ✗{point.failed}" if point.failed else ""
    return (f"{mean} (−{drop:.1f})" if drop > 0 else f"**{mean}**") + failed


def _summary(comparison: Comparison) -> str:
    header = [
        "",
        "lowest accuracy",
        "largest drop",
        f"within {ALLOWED_DROP:g} points of its best",
        "diverged",
        "collapsed",
    ]
    return table(header, (_summary_row(curve) for curve in comparison.curves if curve.between(_LOW, _HIGH)))


def _summary_row(curve: Curve) -> list[str]:
    points: tuple[Point, ...] = curve.between(_LOW, _HIGH)
    worst = min(points, key=lambda point: point.accuracy.mean)
    runs = sum(len(point.tests) for point in points)
    low, high = curve.usable()
    return [
        curve.method.label,
        number(worst.accuracy),
        f"{curve.drop(worst):.1f} at {worst.lr:g}",
        f"{low:g} to {high:g}",
        f"{sum(point.diverged for point in points)} of {runs}",
        f"{sum(point.collapsed for point in points)} of {runs}",
    ]


def _claims(comparison: Comparison) -> str:
    faults = list(failures(comparison))
    if not faults:
        return "The checks of `--check` hold here."
    return "\n".join(["Of the checks of `--check`, these do **not** hold:", "", *(f"* {fault}" for fault in faults)])


def _settings(comparison: Comparison) -> str:
    return "\n".join(f"* `{curve.written}`" for curve in comparison.curves)
