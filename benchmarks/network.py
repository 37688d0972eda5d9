"""What a step over several ranks costs on slow networks: a model, checked on wires that delay, and used on paper.

    python benchmarks/network.py

Writes docs/results/network.md and, with what was measured, docs/results/records/network.json; with ``--read`` the page
is written anew from that. Ranks are in network namespaces, one each: ``tc`` limits the rate, and a process between them
holds packets back. That needs root and Debian's iproute2; without, only counts and processor times are taken.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from _markdown import command, duration
from _network.page import CONDITIONS, SAMPLES, TIMED, Recorded, page
from _network.running import measured
from _training import RESULTS
from distributed_bytes import BATCH

from ddpnopt.experiments.files import write_atomic


@dataclass(frozen=True)
class Arguments:
    """Count and time steps on simulated networks, fit a model, write what it says of many ranks."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes; the first is 1."""

    paper: tuple[int, ...] = (8, 32, 128, 512, 1024)
    """Numbers of ranks of which the model tells."""

    turns: int = 3
    """Turns of timing, each ten steps under every condition."""

    read: bool = False
    """Measure nothing: write the page from the record."""

    out: Path = RESULTS
    """Folder of the page."""


def measure(given: Arguments) -> Recorded:
    """Everything, by number of ranks."""
    found: Recorded = {}
    for size in given.ranks:
        ranks, why = measured(size, SAMPLES, TIMED if size == 1 else (BATCH,), CONDITIONS, given.turns)
        found[str(size)] = {
            "why": why,
            "message": ranks[0]["messages"],
            "counts": [
                [*at, {key: max(r["counts"][i][3][key] for r in ranks) for key in one}]
                for i, (*at, one) in enumerate(ranks[0]["counts"])
            ],
            "times": [
                [*at, _summary([r["times"][i][3] for r in ranks])] for i, (*at, _) in enumerate(ranks[0]["times"])
            ],
        }
    return found


def _summary(times: Sequence[dict[str, list[list[float]]]]) -> dict[str, Any]:
    """Medians over turns: the busiest rank's processor seconds, wall seconds, and those over the first condition's."""
    wall = times[0]["wall"]
    return {
        "processor": max(median(turn[0] for turn in one["processor"]) for one in times),
        "wall": [median(column) for column in zip(*wall, strict=True)],
        "turns": wall,
        "added": [median(column) for column in zip(*([w - turn[0] for w in turn] for turn in wall), strict=True)],
    }


def main(words: Sequence[str] | None = None) -> int:
    """Measure or read, write the page; returns the exit code."""
    given = tyro.cli(Arguments, args=words)
    if given.ranks[0] != 1 or len(given.ranks) < 2:
        print("network.py: the numbers of ranks must begin with 1 and go on", file=sys.stderr)
        return 2
    record = given.out / "records" / "network.json"
    if not given.read:
        began = time.perf_counter()
        found = measure(given)
        record.parent.mkdir(parents=True, exist_ok=True)
        written = {"seconds": time.perf_counter() - began, "found": found}
        write_atomic(record, (json.dumps(written) + "\n").encode())
    read = json.loads(record.read_text())
    made = f"`{command('network.py', given, ('ranks', 'paper', 'turns'))}` ({duration(read['seconds'])})"
    path = given.out / "network.md"
    write_atomic(path, page(read["found"], given.paper, given.turns, made).encode())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
