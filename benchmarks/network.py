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
from _markdown import command, duration, table
from _network.model import ALL, BYTES, HOPS, OWN, Fitted, Processor, Step, Wire, fitted, processor
from _network.running import measured
from _training import RESULTS
from distributed_bytes import BATCH, METHODS, NETWORKS

from ddpnopt.experiments.environment import version
from ddpnopt.experiments.files import write_atomic

DELAY, RATE = 0.005, 200e6
CONDITIONS = ((0.0, 0.0), (DELAY, 0.0), (0.0, RATE), (DELAY, RATE))
SAMPLES = (8, 32, 64)
"""Per rank, for which steps are counted."""
TIMED = (8, 32, 64, 128)
"""On one rank, to fit how fast it computes."""
WIRES = (Wire("10 Gbit/s, 50 us", 50e-6, 10e9 / 8), Wire("100 Gbit/s, 5 us", 5e-6, 100e9 / 8))
FAST = Processor(overhead=0.0, rate=1e13)
PROCESSORS = (("this core", None), (f"{FAST.rate / 1e12:g} TFLOP/s", FAST))
MANY = tuple(2**i for i in range(1, 11))
LABELS = ("none", f"{1e3 * DELAY:g} ms", f"{RATE / 1e6:g} Mbit/s", "both")

Recorded = dict[str, Any]
"""By number of ranks: seconds of a message by condition; counts and times by network and method."""


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
        "added": [median(column) for column in zip(*([w - turn[0] for w in turn] for turn in wall), strict=True)],
    }


def steps(found: Recorded) -> dict[tuple[str, str], Step]:
    """The model of every network and method."""
    models = {}
    for network in NETWORKS:
        for method in METHODS:
            counts = {
                (int(size), batch): one
                for size, of in found.items()
                for n, m, batch, one in of["counts"]
                if (n, m) == (network, method)
            }

            def through(terms: Any, key: str, counts: dict[tuple[int, int], Any] = counts) -> Fitted:
                return fitted(terms, {at: one[key] for at, one in counts.items()})

            terms = OWN if method != "DDPNOpt" else {**OWN, **ALL}
            flops = through(terms, "flops")
            times = [
                (flops(1, batch), one["processor"])
                for n, m, batch, one in found["1"]["times"]
                if (n, m) == (network, method)
            ]
            models[network, method] = Step(flops, through(BYTES, "bytes"), through(HOPS, "messages"), processor(times))
    return models


def fit_rows(models: dict[tuple[str, str], Step], found: Recorded) -> list[list[str]]:
    """A row per network and method: the fit, and its predictions of processor times on several ranks."""
    rows = []
    for (network, method), step in models.items():
        cells = [f"{1e3 * step.processor.overhead:.1f}", f"{step.processor.rate / 1e9:.0f}"]
        cells.append(f"{100 * step.processor.worst:.0f} %")
        cells.append(f"{100 * max(step.flops.worst, step.sent.worst, step.messages.worst):.1f} %")
        for size in list(found)[1:]:
            taken = _timed(found, size, network, method)["processor"]
            cells.append(f"{1e3 * step.computing(int(size), BATCH):.0f} / {1e3 * taken:.0f}")
        rows.append([network, method, *cells])
    return rows


def check_rows(
    models: dict[tuple[str, str], Step], found: Recorded, crossings: float
) -> tuple[list[list[str]], list[float]]:
    """A row per network, ranks and method: seconds that a condition adds to a step, predicted and measured."""
    rows, errors = [], []
    for (network, method), step in models.items():
        for size in list(found)[1:]:
            one, p = _timed(found, size, network, method), int(size)
            cells = [f"{1e3 * one['wall'][0]:.0f}"]
            for (delay, rate), added in list(zip(CONDITIONS, one["added"], strict=False))[1:]:
                predicted = step.messages(p, BATCH) * crossings * delay
                predicted += 8 * step.sent(p, BATCH) / rate if rate else 0.0
                cells.append(f"{1e3 * predicted:.0f} / {1e3 * added:.0f}")
                errors.append(predicted / added - 1)
            rows.append([network, size, method, *cells])
    return rows, errors


def paper_rows(models: dict[tuple[str, str], Step], network: str, given: Arguments) -> list[list[str]]:
    """A row per processor, wire and number of ranks: milliseconds of a step, and what binds it."""
    rows = []
    for label, used in PROCESSORS:
        for wire in WIRES:
            for p in given.paper:
                spent = {m: models[network, m].spent(p, BATCH, wire, used) for m in METHODS}
                exact, local = spent["DDPNOpt"], spent["DDPNOpt, `local`"]
                best = "exact" if exact.total < local.total else "`local`"
                cells = [_ms(one.total) for one in spent.values()]
                parts = [_ms(part) for part in (exact.own, exact.algebra, exact.messages, exact.bytes)]
                rows.append([label, wire.name, str(p), *cells, best, " + ".join(parts), exact.binds, local.binds])
    return rows


def _timed(found: Recorded, size: str, network: str, method: str) -> dict[str, Any]:
    one: dict[str, Any] = next(x for n, m, b, x in found[size]["times"] if (n, m, b) == (network, method, BATCH))
    return one


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _first(step: Step, wire: Wire, used: Processor | None, what: str) -> str:
    """The smallest number of ranks, a power of two up to 1,024, at which most of a step is spent on something."""
    found = [p for p in MANY if step.spent(p, BATCH, wire, used).binds == what]
    return f"{found[0]:,}" if found else "never"


def page(given: Arguments, found: Recorded, seconds: float) -> str:
    """The page's text."""
    models = steps(found)
    sizes = list(found)[1:]
    why = found[sizes[0]]["why"]
    pairs = "predicted / measured"
    fit = table(
        [
            "network",
            "method",
            "fixed, ms",
            "GFLOP/s",
            "off by",
            "counts off by",
            *(f"{p} ranks, ms, {pairs}" for p in sizes),
        ],
        fit_rows(models, found),
    )
    message = {p: found[p]["message"] for p in sizes}
    if why:
        checked = f"No machines of their own could be made here ({why}): the check on slow wires is left out."
    else:
        crossings = median((of[1] - of[0]) / DELAY for of in message.values())
        rows, errors = check_rows(models, found, crossings)
        within = sum(abs(error) <= 0.25 for error in errors)
        checked = f"""A number that all ranks tell all others takes {_told(message, 0)} a hop on these wires, and
{_told(message, 1)} when every packet is held back for {1e3 * DELAY:g} ms: {crossings:.1f} times the delay. gloo crosses
the wire twice for a message, because the receiver first says that it is ready. The model's messages take as many here.

{table(["network", "ranks", "method", "nothing added, ms", *(f"{label}: {pairs}" for label in LABELS[1:])], rows)}

Of {len(errors)} predictions {within} are within 25 % of what was measured; the median is off by
{100 * median(abs(e) for e in errors):.0f} %, the worst by {100 * max(errors, key=abs):+.0f} %."""
    heads = [
        "processor",
        "wires",
        "ranks",
        "SGD",
        "exact",
        "`local`",
        "sooner",
        "exact: own + algebra + messages + bytes",
    ]
    heads += ["exact binds", "`local` binds"]
    papers = "\n\n".join(
        f"### {network}\n\n{table(heads, paper_rows(models, network, given))}\n\n{_binding(models, network)}"
        for network in NETWORKS
    )
    return f"""# Many ranks and slow networks, on paper

    seconds = fixed + operations / rate + messages * latency + bytes / bandwidth

for a rank's step, one after the other: nothing is sent while something is computed. Operations are counted by torch's
counter (and formulas for what it leaves out: triangular factors, solves, eigenvectors, groups of convolutions),
messages and bytes by `ddpnopt/ranks.py`, as means over the ten steps after which the curvature's work repeats;
{BATCH} samples a rank.

## The fit

*Fixed* time and rate are fitted to processor times of one rank at {", ".join(map(str, TIMED))} samples, on a machine
that others use too; *off by* is the farthest of these. Counts at {", ".join(found)} ranks and
{", ".join(map(str, SAMPLES))} samples are put together from powers of samples and ranks; *counts off by* is again the
farthest. The last columns are no fit: processor milliseconds of the busiest of several ranks.

{fit}

## Checked on slow wires

Every rank in a network namespace of its own. `tc` limits what it sends; a process between them holds every packet
back (the kernel here has no `sch_netem`). Milliseconds that this adds to a step, medians over {given.turns} turns of
ten steps under each condition:

{checked}

## On paper

Milliseconds of a step. *This core* is the one above; the other processor has {FAST.rate / 1e12:g} TFLOP/s and nothing
fixed. A message takes the latency once, and what all tell all takes `p - 1` hops, the ring that is counted. Beyond
{max(map(int, sizes)) * max(SAMPLES)} samples in all the counts are extrapolated.

{papers}

Command: `{command("network.py", given, ("ranks", "paper", "turns"))}`
({duration(seconds)}), ddpnopt {version("ddpnopt")}.
"""


def _told(message: dict[str, list[float]], condition: int) -> str:
    return " and ".join(f"{1e3 * of[condition]:.1f} ms ({p} ranks)" for p, of in message.items())


def _binding(models: dict[tuple[str, str], Step], network: str) -> str:
    """Where the sequential rollout and the replicated algebra bind the exact step, ring and tree."""
    step = models[network, "DDPNOpt"]
    stages = sum(any(True for _ in module.parameters(recurse=False)) for module in NETWORKS[network]().modules())
    rows = []
    for label, used in PROCESSORS:
        for wire in WIRES:
            tree = Wire(wire.name, wire.latency, wire.bandwidth, tree=True)
            most = max(MANY)
            cells = [_first(step, one, used, what) for one in (wire, tree) for what in ("messages", "algebra of all")]
            rollout = [_ms(stages * one.hops(most) * one.latency) for one in (wire, tree)]
            rows.append([label, wire.name, *cells, " / ".join(rollout)])
    heads = ["processor", "wires", "messages, ring", "algebra, ring", "messages, tree", "algebra, tree"]
    return f"""The numbers of ranks from which most of an exact step goes into its messages, or into the algebra of all
samples, up to {max(MANY):,}: by a ring, whose hops are `p - 1`, and by a tree, whose hops are `log2 p`. In the last
column the second forward pass alone at {max(MANY):,} ranks: a message to all for each of {stages} stages, one after the
other, by ring / tree.

{table([*heads, "rollout's messages, ms"], rows)}"""


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
    path = given.out / "network.md"
    write_atomic(path, page(given, read["found"], read["seconds"]).encode())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
