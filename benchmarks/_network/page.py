"""The page of benchmarks/network.py, from what was measured."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from _markdown import table
from distributed_bytes import BATCH, NETWORKS

from _network.model import (
    ALL,
    BYTES,
    COMPARED,
    EXACT,
    HOPS,
    LOCAL,
    OWN,
    Fitted,
    Processor,
    Step,
    Wire,
    fitted,
    processor,
    sending,
)
from ddpnopt.experiments.environment import version

DELAY, RATE = 0.005, 200e6
CONDITIONS = ((0.0, 0.0), (DELAY, 0.0), (0.0, RATE), (DELAY, RATE))
SAMPLES = (32, 64, 128)
"""Per rank, for which steps are counted."""
TIMED = (8, 32, 64, 128)
"""On one rank, to fit how fast it computes."""
WIRES = (Wire("10 Gbit/s, 50 us", 50e-6, 10e9 / 8), Wire("100 Gbit/s, 5 us", 5e-6, 100e9 / 8))
FAST = Processor(overhead=0.0, rate=1e13)
PROCESSORS = (("this core", None), (f"{FAST.rate / 1e12:g} TFLOP/s", FAST))
MANY = tuple(2**i for i in range(1, 11))
CROSSINGS = 2
"""Of the wire by a message of gloo: the receiver says that it is ready, then the message comes."""
LARGE = 0.1
"""Seconds; predictions of less are lost in what else the machine does."""
LABELS = ("none", f"{1e3 * DELAY:g} ms", f"{RATE / 1e6:g} Mbit/s", "both")

Recorded = dict[str, Any]
"""By number of ranks: seconds of a message by condition; counts and times by network and method."""


def steps(found: Recorded) -> dict[tuple[str, str], Step]:
    """The model of every network and method."""
    models = {}
    for network in NETWORKS:
        for method in COMPARED:
            counts = {
                (int(size), batch): one
                for size, of in found.items()
                for n, m, batch, one in of["counts"]
                if (n, m) == (network, method)
            }

            def through(terms: Any, key: str, counts: dict[tuple[int, int], Any] = counts) -> Fitted:
                return fitted(terms, {at: one[key] for at, one in counts.items()})

            terms = OWN if method != EXACT else {**OWN, **ALL}
            flops = through(terms, "flops")
            times = [
                (flops(1, batch), one["processor"])
                for n, m, batch, one in found["1"]["times"]
                if (n, m) == (network, method)
            ]
            models[network, method] = Step(flops, through(BYTES, "bytes"), through(HOPS, "messages"), processor(times))
    first = list(found)[1]
    over = [
        (
            step.exchanges(BATCH),
            step.sent(int(first), BATCH),
            _timed(found, first, *at)["processor"] - step.computing(int(first), BATCH),
        )
        for at, step in models.items()
    ]
    exchange, byte = sending([(n, sent, max(seconds, 0.0)) for n, sent, seconds in over])
    return {
        at: replace(step, processor=replace(step.processor, exchange=exchange, byte=byte))
        for at, step in models.items()
    }


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
    models: dict[tuple[str, str], Step], found: Recorded
) -> tuple[list[list[str]], list[tuple[float, float]]]:
    """A row per network, ranks and method: seconds that a condition adds to a step, predicted and measured."""
    rows, pairs = [], []
    for (network, method), step in models.items():
        for size in list(found)[1:]:
            one, p = _timed(found, size, network, method), int(size)
            cells = [f"{1e3 * one['wall'][0]:.0f}"]
            for (delay, rate), added in list(zip(CONDITIONS, one["added"], strict=False))[1:]:
                predicted = step.messages(p, BATCH) * CROSSINGS * delay
                predicted += 8 * step.sent(p, BATCH) / rate if rate else 0.0
                cells.append(f"{1e3 * predicted:.0f} / {1e3 * added:.0f}")
                pairs.append((predicted, added))
            rows.append([network, size, method, *cells])
    return rows, pairs


def paper_rows(models: dict[tuple[str, str], Step], network: str, paper: Sequence[int]) -> list[list[str]]:
    """A row per processor, wire and number of ranks: milliseconds of a step, and what binds it."""
    rows = []
    for label, used in PROCESSORS:
        for wire in WIRES:
            for p in paper:
                spent = {m: models[network, m].spent(p, BATCH, wire, used) for m in COMPARED}
                exact, local = spent[EXACT], spent[LOCAL]
                best = "exact" if exact.total < local.total else "`local`"
                best += ", also than SGD" * (min(exact.total, local.total) < spent["SGD"].total)
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


def page(found: Recorded, paper: Sequence[int], turns: int, made: str) -> str:
    """The page's text.

    Args:
        found: what was measured.
        paper: numbers of ranks of which the model tells.
        turns: of timing.
        made: the command, and how long it took.
    """
    models = steps(found)
    sizes = list(found)[1:]
    why = found[sizes[0]]["why"]
    both = "predicted / measured"
    heads = ["network", "method", "fixed, ms", "GFLOP/s", "off by", "counts off by"]
    fit = table([*heads, *(f"{p} ranks, ms, {both}" for p in sizes)], fit_rows(models, found))
    sends = next(iter(models.values())).processor
    message = {p: found[p]["message"] for p in sizes}
    if why:
        checked = f"No machines of their own could be made here ({why}): the check on slow wires is left out."
    else:
        seen = " and ".join(f"{(of[1] - of[0]) / DELAY:.1f}" for of in message.values())
        rows, pairs = check_rows(models, found)
        loops = [one for p in sizes for *_, one in found[p]["times"]]
        large = [(predicted, added) for predicted, added in pairs if predicted >= LARGE]
        errors = [predicted / added - 1 for predicted, added in large]
        within = sum(abs(error) <= 0.25 for error in errors)
        noise = median(max(turn[0] for turn in one["turns"]) - min(turn[0] for turn in one["turns"]) for one in loops)
        checked = f"""The model's messages cross the wire {CROSSINGS} times, as gloo sends them: its receiver first
says that it is ready. That is no fit, but it was set after the first runs. A number that all ranks tell all others took
{_told(message, 0)} a hop on these wires and {_told(message, 1)} when every packet was held back for
{1e3 * DELAY:g} ms: {seen} times the delay more, measured once, while the machine had other work. With as many, the
predictions for delays would grow alike.

{table(["network", "ranks", "method", "nothing added, ms", *(f"{label}: {both}" for label in LABELS[1:])], rows)}

With nothing added, a step took {1e3 * noise:.0f} ms more in one turn than in another (median), for the machine's two
cores had other work; what is small beside that is not told apart from it. Of the {len(errors)} predictions of at least
{1e3 * LARGE:.0f} ms, {within} are within 25 % of what was measured; the median is off by
{100 * median(abs(e) for e in errors):.0f} %, the worst by {100 * max(errors, key=abs):+.0f} %."""
    heads = ["processor", "wires", "ranks", "SGD", "exact", "`local`", "sooner form"]
    heads += ["exact: own + algebra + messages + bytes", "exact binds", "`local` binds"]
    papers = "\n\n".join(
        f"### {network}\n\n{table(heads, paper_rows(models, network, paper))}\n\n{_binding(models, network)}"
        for network in NETWORKS
    )
    return f"""# Many ranks and slow networks, on paper

    seconds = fixed + operations / rate + messages * latency + bytes / bandwidth

for a rank's step, one after the other: nothing is sent while something is computed. Operations are counted by torch's
counter (and formulas for what it leaves out: triangular factors, solves, eigenvectors, groups of convolutions),
messages and bytes by `ddpnopt/ranks.py`, as means over the ten steps after which the curvature's work repeats;
{BATCH} samples a rank. The exact form sends whole numbers here; by default
convolutions in float32 send [fewer bytes](distributed_bytes.md).

## The fit

*Fixed* time and rate are fitted to processor times of one rank at {", ".join(map(str, TIMED))} samples, on a machine
that others use too; *off by* is the farthest of these. Counts at {", ".join(found)} ranks and
{", ".join(map(str, SAMPLES))} samples are put together from powers of samples and ranks; *counts off by* is again the
farthest. Sending takes the processor {1e6 * sends.exchange:.0f} us an exchange and {1e9 * sends.byte:.1f} ns a byte,
fitted to the excess over that at {sizes[0]} ranks. The last columns: processor milliseconds of the busiest of several
ranks.

{fit}

## Checked on slow wires

Every rank in a network namespace of its own. `tc` limits what it sends; a process between them holds every packet
back (the kernel here has no `sch_netem`). Milliseconds that this adds to a step, medians over {turns} turns of
ten steps under each condition:

{checked}

## On paper

Milliseconds of a step. *This core* is the one above; the other processor has {FAST.rate / 1e12:g} TFLOP/s and nothing
fixed, and sends for nothing. A message takes the latency once, and what all tell all takes `p - 1` hops, the ring that
is counted. Beyond {max(map(int, sizes)) * max(SAMPLES)} samples in all the counts are extrapolated.

{papers}

Command: {made}, ddpnopt {version("ddpnopt")}.
"""


def _told(message: dict[str, list[float]], condition: int) -> str:
    return " and ".join(f"{1e3 * of[condition]:.1f} ms ({p} ranks)" for p, of in message.items())


def _binding(models: dict[tuple[str, str], Step], network: str) -> str:
    """Where the sequential rollout and the replicated algebra bind the exact step, ring and tree."""
    step = models[network, EXACT]
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
