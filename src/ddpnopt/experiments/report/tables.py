"""The comparison in words: the same table and the same verdict on the terminal and on the page."""

import math

from rich.table import Table

from ddpnopt.experiments.compare import Comparison, Row
from ddpnopt.experiments.stats import Interval, paired_difference


def header(comparison: Comparison) -> list[str]:
    """Return the column titles."""
    return [
        "optimizer",
        "learning rate",
        "test accuracy, %",
        f"points against {comparison.reference}",
        "train loss",
        "ms per step",
    ]


def cells(row: Row) -> list[str]:
    """Return one optimizer's line; intervals are 95%."""
    lr = f"{row.choice.lr:g} ({row.choice.how})"
    loss = f"diverged in {row.diverged} of {len(row.accuracies)}" if row.loss is None else number(row.loss, 4)
    return [
        row.optimizer,
        lr,
        number(row.accuracy.scaled(100), 1),
        "" if row.difference is None else number(row.difference.scaled(100), 1, sign=True),
        loss,
        f"{1000 * row.seconds_per_step:.2f}",
    ]


def number(interval: Interval, digits: int, sign: bool = False) -> str:
    """Write ``mean ± half``, or the mean alone where a single value has no interval."""
    mean = f"{interval.mean:{'+' if sign else ''}.{digits}f}"
    return mean if math.isnan(interval.half) else f"{mean} ± {interval.half:.{digits}f}"


def terminal_table(comparison: Comparison) -> Table:
    """Return the table for a terminal."""
    seeds = comparison.config.seeds
    table = Table(caption=f"mean of {seeds} seed{'s' * (seeds > 1)} ± 95% t interval, differences paired by seed")
    for place, title in enumerate(header(comparison)):
        table.add_column(title, justify="left" if place == 0 else "right")
    for row in comparison.rows:
        table.add_row(*cells(row), style="bold" if row.difference is None else None)
    return table


def verdict(comparison: Comparison) -> str:
    """Say in one sentence how the reference stands against the best of the others, by mean test accuracy."""
    own = next(row for row in comparison.rows if row.difference is None)
    rivals = [row for row in comparison.rows if row.difference is not None]
    if not rivals:
        return f"{own.optimizer} reaches {own.accuracy.mean:.1%} test accuracy."
    rival = max(rivals, key=lambda row: row.accuracy.mean)
    gap = paired_difference(own.accuracies, rival.accuracies).scaled(100)
    start = (
        f"{own.optimizer} (learning rate: {own.choice.how}) reaches {own.accuracy.mean:.1%} test accuracy, "
        f"the best other, {rival.optimizer} (learning rate: {rival.choice.how}), {rival.accuracy.mean:.1%}"
    )
    if math.isnan(gap.half):
        return f"{start}: a difference of {gap.mean:+.1f} points in a single seed, which shows nothing yet."
    factor = own.seconds_per_step / rival.seconds_per_step
    shown = "" if gap.low > 0 or gap.high < 0 else ", so these seeds show no difference"
    return (
        f"{start}: {gap.mean:+.1f} points, 95% interval {gap.low:+.1f} to {gap.high:+.1f} "
        f"over {gap.count} paired seeds{shown}. A step takes {factor:.1f} times as long as {rival.optimizer}'s."
    )
