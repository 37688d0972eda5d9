"""Table 4: how time and memory of a step grow with batch size, width and depth, beside what analysis says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from ddpnopt.experiments.paper import cost
from ddpnopt.experiments.paper.cost import DENSE, case
from ddpnopt.experiments.paper.cost_words import FORMS, label
from ddpnopt.experiments.paper.kinds import task
from ddpnopt.experiments.report.cost_figures import FITTED, Curve, exponent, growth_figure, ratio
from ddpnopt.experiments.report.section import Form, Picture, Section, Table, Verdict
from ddpnopt.experiments.stats import Interval
from ddpnopt.experiments.study.lab import Lab

ORDERS = 100.0  # "orders of magnitude": two, at least
METHODS = ("adam", "ekfac", "share-ekfac", "batch", "emsa")
# of this library's code, by counting products: B samples, every layer X wide
TIME: Mapping[str, str] = {
    "adam": "B X^2 L",
    "ekfac": "B X^2 L + X^3 L",
    "share-ekfac": "B X^2 L + X^3 L",
    "batch": "B X^2 L + X^3 L + B^2 X L + B^3 L",
    "emsa": "B X^2 L",
    DENSE: "(B^3 X^3 + B^2 X^4 + B X^5 + X^6) L",
}
MEMORY: Mapping[str, str] = {
    "adam": "X^2 L + B X L",
    "ekfac": "X^2 L + B X L",
    "share-ekfac": "X^2 L + B X L",
    "batch": "X^2 L + B X L + B^2 L",
    "emsa": "X^2 L + B X L",
    DENSE: "B X^3 L + B^2 X^2 + X^4",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a network whose layers are equally wide, and of a batch.

    Attributes:
        B: samples.
        X: units that enter a layer.
        L: linear layers; the last has ten outputs.
    """

    B: int
    X: int
    L: int


@dataclass(frozen=True)
class Range:
    """Sizes along one axis.

    Attributes:
        axis: ``"B"``, ``"X"`` or ``"L"``.
        shapes: in ascending order, alike but for the axis.
        methods: measured on them.
        remembered: those whose memory is measured, too.
        turns: timed blocks of each.
    """

    axis: str
    shapes: Sequence[Shape]
    methods: Sequence[str]
    remembered: Sequence[str]
    turns: int

    @property
    def sizes(self) -> list[int]:
        """The shapes' sizes along the axis."""
        return [getattr(shape, self.axis) for shape in self.shapes]


Costs = Mapping[tuple[str, str], Curve]  # by method and axis


def ranges(quick: bool) -> tuple[list[Range], list[Range]]:
    """What is measured: large sizes, and small ones for dense DDP, whose steps are so much dearer."""
    turns, held, depth, base = (3, (), 3, 32) if quick else (3, ("adam", *FORMS.values()), 4, 64)
    batch, width, deepest = (512, 256, 16) if quick else (1024, 1024, 32)
    large = {
        "B": [Shape(batch >> k, base, depth) for k in (3, 2, 1, 0)],
        "X": [Shape(32, width >> k, depth) for k in (3, 2, 1, 0)],
        "L": [Shape(64, base, deepest >> k) for k in (3, 2, 1, 0)],
    }
    small = {
        "B": [Shape(b, 16, 3) for b in ((8, 16, 32, 64) if quick else (16, 32, 64, 128))],
        "X": [Shape(8, x, 3) for x in ((8, 16, 24, 32) if quick else (16, 32, 48, 64))],
        "L": [Shape(8, 16, layers) for layers in (2, 4, 8, 16)],
    }
    alone, rivals = () if quick else (DENSE,), (DENSE, *FORMS.values())
    return (
        [Range(axis, shapes, METHODS, held, turns) for axis, shapes in large.items()],
        [Range(axis, shapes, rivals, alone, turns) for axis, shapes in small.items()],
    )


def run(lab: Lab, quick: bool) -> Section:
    """Measure growth and set it beside the analysis."""
    large, small = ranges(quick)
    wanted = [*large, *small]
    held = wanted if cost.STATUS.exists() else []
    timing = [task("time", {"cases": _cases(one, one.methods), "turns": one.turns}) for one in wanted]
    memory = [task("memory", {"case": c, "repeats": 1}) for one in held for c in _cases(one, one.remembered)]
    results = lab.execute([*timing, *memory])
    blocks = iter([block for result in results[: len(timing)] for block in result["blocks"]])
    added = iter([[result["added"]] for result in results[len(timing) :]])
    of_large, of_small = (
        {k: v for one in part for k, v in _curves(one, one.methods, blocks)} for part in (large, small)
    )
    mebibytes = {key: curve for one in held for key, curve in _curves(one, one.remembered, added)}
    return section(of_large, of_small, mebibytes, quick)


def section(large: Costs, small: Costs, mebibytes: Costs, quick: bool) -> Section:
    """What the measurements say.

    Args:
        large: seconds of a step of what is not dense, at large sizes.
        small: those of dense DDP and DDPNOpt at small sizes.
        mebibytes: that steps add to the memory.
        quick: whether the settings were the quick ones.
    """
    seconds = {**large, **{key: curve for key, curve in small.items() if key[0] == DENSE}}
    tables = [
        analysis_table("Time", TIME),
        analysis_table("Memory", MEMORY),
        growth_table("Time: measured exponents of growth", seconds),
    ]
    pictures = [
        Picture("time", "Seconds per step against batch size, width and depth", _figure(seconds, "seconds per step"))
    ]
    text = [
        "The paper says that vanilla DDP's time grows with the cube of batch size times width, and that DDPNOpt cuts "
        "it by orders of magnitude. Here a power law is fitted to measured costs, by least squares on logarithms, "
        f"over the {FITTED} largest sizes of each range, in every turn for itself.",
        f"The verdicts ask that vanilla DDP with dense matrices take at least {ORDERS:g} times the form's time at the "
        "largest batch size or at the largest width that it was measured at. This rule was set after a first "
        "measurement had been seen.",
        "Where several powers add up, and with what Python takes at every size, a measured exponent lies below the "
        "analysis' largest and comes nearer to it the further the range goes; the second column of a pair "
        "shows the slope between the two largest sizes alone. The batch form adds, to the published one's cost, "
        "products of all pairs of samples and a factorisation of a matrix as large as the batch, in each layer.",
    ]
    if mebibytes:
        tables.append(growth_table("Memory: measured exponents of growth", mebibytes))
        pictures.append(
            Picture(
                "memory",
                "Memory against batch size, width and depth",
                _figure(mebibytes, "MiB that two steps add"),
            )
        )
    else:
        text.append(
            "Memory is not fitted in a quick run."
            if cost.STATUS.exists()
            else f"Memory was not measured: this system has no {cost.STATUS}."
        )
    return Section(
        "table4",
        "Growth of time and memory (Table 4)",
        text,
        (
            ("threads", "1"),
            ("data", "random; float32, dense DDP computes in float64"),
            *(_in_words(one) for part in ranges(quick) for one in part),
        ),
        tables,
        pictures,
        [verdict(form, small) for form in FORMS],
    )


def verdict(form: Form, small: Costs) -> Verdict:
    """Judge by the time of dense DDP over the form's at the largest batch size and the largest width of the former.

    The claim holds if the larger of the two ratios is 100 at least.
    """
    over, words = [], []
    for axis, what in (("B", "batch size"), ("X", "width")):
        dense, own = small[DENSE, axis], small[FORMS[form], axis]
        over.append(ratio([turn[-1] for turn in dense.turns], [turn[-1] for turn in own.turns]))
        words.append(f"{over[-1]} at {what} {dense.sizes[-1]}")
    return Verdict(
        "cuts the time of vanilla DDP by orders of magnitude",
        form,
        "holds" if max(one.median for one in over) >= ORDERS else "does not hold",
        f"Time of vanilla DDP with dense matrices over this form's, median and quartiles: {', '.join(words)}; "
        f"{ORDERS:g} was asked for in one of them.",
    )


def analysis_table(what: str, terms: Mapping[str, str]) -> Table:
    """Terms of each method's cost in this code."""
    rows = [[label(method), cost_terms] for method, cost_terms in terms.items()]
    return Table(
        f"{what} of a step by analysis",
        ["", "this code, O(...)"],
        rows,
        "B samples, X units in every layer, L layers; counted for this code, not taken from the paper. This code keeps "
        "every layer's input for the second forward pass, and its dense DDP factorises Q_uu, of X^2 rows.",
    )


def growth_table(title: str, costs: Costs) -> Table:
    """Measured exponents by method and axis."""
    rows = []
    for method in dict.fromkeys(name for name, _ in costs):
        row = [label(method)]
        for axis in ("B", "X", "L"):
            curve = costs.get((method, axis))
            fits = [exponent(curve, count) if curve else None for count in (FITTED, 2)]
            row += ["-" if fit is None else _interval(fit) for fit in fits]
        rows.append(row)
    header = ["", "in B", "last step", "in X", "last step", "in L", "last step"]
    return Table(title, header, rows, "Mean of the turns, with 95% interval; last step: between the two largest sizes.")


def _cases(one: Range, methods: Sequence[str]) -> list[dict[str, object]]:
    return [case((s.X, s.X, s.L), s.B, method) for method in methods for s in one.shapes]


def _curves(
    one: Range, methods: Sequence[str], blocks: Iterator[Sequence[float]]
) -> Iterator[tuple[tuple[str, str], Curve]]:
    """Deal out what was measured, each case's turns, in the order of :func:`_cases`."""
    for method in methods:
        columns = [next(blocks) for _ in one.shapes]
        yield (method, one.axis), Curve(one.sizes, list(zip(*columns, strict=True)))


def _interval(one: Interval) -> str:
    return f"{one.mean:.2f}" + ("" if one.count == 1 else f" ± {one.half:.2f}")


def _in_words(one: Range) -> tuple[str, str]:
    who = "with dense DDP" if DENSE in one.methods else "all others"
    rest = ", ".join(f"{axis} = {getattr(one.shapes[0], axis)}" for axis in "BXL" if axis != one.axis)
    return f"range of {one.axis}, {who}", f"{', '.join(map(str, one.sizes))} at {rest}; {one.turns} turns"


def _figure(costs: Costs, y: str) -> Figure:
    axes = {"B": "batch size B", "X": "width X", "L": "depth L"}
    return growth_figure(
        {
            f"Growth with {what}": (
                what,
                {label(m): (c.sizes, c.medians) for (m, at), c in costs.items() if at == axis},
            )
            for axis, what in axes.items()
        },
        y,
    )
