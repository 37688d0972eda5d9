"""Markdown tables, numbers with their intervals, and the page they stand on."""

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.stats import Interval


def save_page(folder: Path, name: str, text: str) -> None:
    """Write ``name.md``, and print where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    write_atomic(path, text.encode())
    print(path)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is aligned to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(interval: Interval, digits: int = 1, sign: bool = False) -> str:
    """Write ``mean ± half``, or the mean alone where a single value has no interval."""
    mean = f"{interval.mean:{'+' if sign else ''}.{digits}f}"
    return mean if math.isnan(interval.half) else f"{mean} ± {interval.half:.{digits}f}"


def verdict(difference: Interval) -> str:
    """Say what a difference shows: ``higher``, ``lower``, or that its interval holds 0."""
    if difference.low > 0:
        return "higher"
    if difference.high < 0:
        return "lower"
    return "not told apart"


def duration(seconds: float) -> str:
    """Write a computing time, such as ``48 s`` or ``12 min``."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def plural(count: int | None, word: str) -> str:
    """Write a number of things: ``1 epoch``, ``5 epochs``."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def command(script: str, given: object, options: Iterable[str]) -> str:
    """Write the command that repeats a page: those of the options whose value is not the default.

    Args:
        script: file name in benchmarks/.
        given: the command's settings; their class makes the defaults.
        options: names of the settings that decide what the page shows.
    """
    words, default = ["python", f"benchmarks/{script}"], type(given)()
    for option in options:
        value = getattr(given, option)
        if value != getattr(default, option):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return shlex.join(words)
