"""Fig. 3: time and memory of a step against the batch size, beside the standard methods'."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from matplotlib.figure import Figure

from ddpnopt.experiments.paper import cost
from ddpnopt.experiments.paper.cost import DENSE, case
from ddpnopt.experiments.paper.cost_words import FORMS, label
from ddpnopt.experiments.paper.fig3_groups import BATCHES, GROUPS, Group
from ddpnopt.experiments.paper.kinds import task
from ddpnopt.experiments.report.claims import CLAIMS
from ddpnopt.experiments.report.cost_figures import growth_figure, ratio
from ddpnopt.experiments.report.section import Form, Picture, Section, Table, Verdict
from ddpnopt.experiments.study.lab import Lab

SOURCE = "the authors' ICLR slides, p. 10, taken to be the paper's Fig. 3; read off, about 1 %"
# seconds per step and GB by batch size in BATCHES, from SOURCE; dense DDP did not go further
PAPER_SECONDS: Mapping[str, tuple[float, ...]] = {
    "adam": (0.065, 0.053, 0.048, 0.044, 0.045, 0.055),
    "ekfac": (0.100, 0.090, 0.090, 0.090, 0.090, 0.090),
    "share-ekfac": (0.110, 0.100, 0.095, 0.100, 0.100, 0.120),
    "emsa": (1.36, 1.38, 1.38, 1.52, 1.66, 1.91),
    DENSE: (0.38, 0.93, 3.00),
}
PAPER_GB: Mapping[str, tuple[float, ...]] = {
    "adam": (0.795, 0.795, 0.795, 0.795, 0.795, 0.795),
    "ekfac": (0.91, 0.92, 0.92, 0.92, 0.92, 0.92),
    "share-ekfac": (0.97, 1.02, 1.12, 1.31, 1.73, 2.56),
    "emsa": (0.96, 0.97, 0.97, 0.97, 0.97, 0.97),
    DENSE: (6.09, 11.9, 26.0, 50.0),
}
PAPER_OVER: Mapping[str, list[float]] = {
    base: [own / its for own, its in zip(PAPER_SECONDS["share-ekfac"], PAPER_SECONDS[base], strict=True)]
    for base in ("ekfac", "adam")
}
# nearly as fast, by the paper's own measure: its method's largest at any batch size
LIMITS: Mapping[str, float] = {base: max(over) for base, over in PAPER_OVER.items()}


Point = tuple[str, int, str]  # group, batch size, method
Cell = Callable[[int, str], str]  # of a batch size and a method


def run(lab: Lab, quick: bool) -> Section:
    """Measure time and memory, and judge "nearly as fast as standard methods"."""
    sizes = {name: group.quick_batches if quick else group.batches for name, group in GROUPS.items()}
    places = [(name, batch) for name in GROUPS for batch in sizes[name]]
    timed = [[(name, batch, method) for method in _fitting(GROUPS[name].timed, name, batch)] for name, batch in places]
    held = [(name, batch, one) for name, batch in places for one in _fitting(GROUPS[name].remembered, name, batch)]
    timing = [
        task("time", {"cases": [_case(*point) for point in points], "turns": _turns(GROUPS[points[0][0]], quick)})
        for points in timed
    ]
    # a quick run looks at the memory of small networks only, at the first and last batch size
    held = [p for p in held if not quick or (p[0] != "cnn" and p[1] in (sizes[p[0]][0], sizes[p[0]][-1]))]
    held = held if cost.STATUS.exists() else []
    memory = [task("memory", {"case": _case(*p), "repeats": 1 if quick else GROUPS[p[0]].repeats}) for p in held]
    results = lab.execute([*timing, *memory])
    blocks = {
        point: block
        for points, result in zip(timed, results, strict=False)
        for point, block in zip(points, result["blocks"], strict=True)
    }
    return section(blocks, dict(zip(held, results[len(timing) :], strict=True)), quick)


def section(
    blocks: Mapping[Point, Sequence[float]], memory: Mapping[Point, Mapping[str, float]], quick: bool
) -> Section:
    """What the measurements say.

    Args:
        blocks: seconds per step of every turn.
        memory: MiB ``added`` and ``peak``, as the task ``memory`` returns them.
        quick: whether the settings were the quick ones.
    """
    tables = [table for name in _of(blocks) for table in time_tables(name, blocks)]
    tables += [memory_table(name, memory) for name in _of(memory)]
    seconds = {point: median(block) for point, block in blocks.items()}
    added = {point: one["added"] for point, one in memory.items()}
    pictures = [Picture("time", "Seconds per step against the batch size", _figure(seconds, "seconds per step"))]
    if memory:
        drawn = _figure(added, "MiB that two steps add")
        pictures.append(Picture("memory", "Memory of two steps against the batch size", drawn))
    return Section(
        "fig3",
        "Time and memory of a step (Fig. 3)",
        _text(blocks, memory, quick),
        (
            ("threads", "1"),
            ("data", "random, of the shape the network takes; float32"),
            *(("network", group.words) for group in GROUPS.values()),
        ),
        tables,
        pictures,
        [verdict(form, blocks) for form in FORMS],
    )


def verdict(form: Form, blocks: Mapping[Point, Sequence[float]]) -> Verdict:
    """Judge one form by its medians, over batch sizes, of the time over EKFAC's and over Adam's.

    The claim holds if, on every measured one of the dense network and the convolutional one, neither is above the
    paper's largest at any batch size (``LIMITS``), which is lenient; it cannot be tested if neither was measured.
    """
    found = {name: _medians(name, FORMS[form], blocks) for name in ("fcn", "cnn") if name in _of(blocks)}
    if not found:
        return Verdict(CLAIMS[3], form, "cannot be tested here", "No time of a step was measured on either network.")
    holds = all(ekfac <= LIMITS["ekfac"] and adam <= LIMITS["adam"] for ekfac, adam in found.values())
    words = "; ".join(
        f"{name}: {ekfac:.2f} times EKFAC, {adam:.2f} times Adam" for name, (ekfac, adam) in found.items()
    )
    return Verdict(
        CLAIMS[3],
        form,
        "holds" if holds else "does not hold",
        f"Median over batch sizes of the time of a step: {words}; at most {LIMITS['ekfac']:.2f} and "
        f"{LIMITS['adam']:.2f} were asked for.",
    )


def time_tables(name: str, blocks: Mapping[Point, Sequence[float]]) -> list[Table]:
    """Milliseconds of one group, and ratios to Adam and EKFAC with the paper's beside them."""
    batches, methods = _axes(name, blocks)

    def milliseconds(batch: int, method: str) -> str:
        return f"{1000 * median(blocks[name, batch, method]):.3g}"

    def over(base: str) -> Cell:
        return lambda batch, method: str(ratio(blocks[name, batch, method], blocks[name, batch, base]))

    note = f"Median and quartiles of the turns. Paper: {SOURCE}; on a GPU, on a network that it does not name."
    compared = [
        *_rows(name, blocks, [m for m in methods if m != "adam"], over("adam"), "{} / Adam"),
        *_rows(name, blocks, list(FORMS.values()), over("ekfac"), "{} / EKFAC"),
        *_paper(PAPER_SECONDS, batches),
    ]
    words, header = GROUPS[name].words, ["", *(f"batch {batch}" for batch in batches)]
    return [
        Table(f"Milliseconds per step: {words}", header, _rows(name, blocks, methods, milliseconds, "{}"), "Medians."),
        Table(f"Time over another method's: {words}", header, compared, note),
    ]


def memory_table(name: str, memory: Mapping[Point, Mapping[str, float]]) -> Table:
    """Memory of one group, and ratios of whole processes with the paper's beside them."""
    batches, methods = _axes(name, memory)

    def added(batch: int, method: str) -> str:
        return f"{memory[name, batch, method]['added']:.1f}"

    def over_adam(batch: int, method: str) -> str:
        return f"{memory[name, batch, method]['peak'] / memory[name, batch, 'adam']['peak']:.2f}"

    rows = [
        *_rows(name, memory, methods, added, "{}: MiB added"),
        *_rows(name, memory, [m for m in methods if m != "adam"], over_adam, "{} / Adam, process"),
        *_paper(PAPER_GB, batches),
    ]
    note = (
        "MiB added: how far two steps, in a process of their own, raised the peak of resident memory above what was "
        "resident when libraries, network, optimizer and data were there. Process: ratio of the peaks themselves, of "
        f"which Python and torch are a part, as the GPU's context probably is of the paper's. Paper: {SOURCE}."
    )
    return Table(f"Memory: {GROUPS[name].words}", ["", *(f"batch {batch}" for batch in batches)], rows, note)


def _text(
    blocks: Mapping[Point, Sequence[float]], memory: Mapping[Point, Mapping[str, float]], quick: bool
) -> list[str]:
    adam, ekfac = (f"{min(PAPER_OVER[base]):.2f} to {LIMITS[base]:.2f}" for base in ("adam", "ekfac"))
    turns = {name: len(next(block for point, block in blocks.items() if point[0] == name)) for name in _of(blocks)}
    text = [
        f"The paper calls DDPNOpt nearly as fast as standard methods. Its figure shows {adam} times Adam's time and "
        f"{ekfac} times EKFAC's ({SOURCE}).",
        "Here all methods take turns in one process on one thread, and each block of steps is compared with the "
        f"other's of the same turn ({', '.join(f'{name}: {count} turns' for name, count in turns.items())}). A block "
        f"is {cost.BLOCK} steps, which hold a curvature's rare refresh in due share; of E-MSA and vanilla DDP, one.",
        "The verdicts ask for a median over batch sizes of at most "
        f"{LIMITS['ekfac']:.2f} times EKFAC's and {LIMITS['adam']:.2f} times Adam's, on the dense and on the "
        "convolutional network. That is lenient: our median is held against the paper's maximum over batch sizes. "
        "The published form is judged with EKFAC's matrix, which makes EKFAC its like. "
        "What Python takes per layer is part of the time, and weighs the more the smaller the layers.",
        _dense(blocks),
    ]
    if not memory:
        text.append(f"Memory was not measured: this system has no {cost.STATUS}.")
    if quick:
        text.append("A quick run: few batch sizes and turns, memory once, the convolutional network at one batch size.")
    return text


def _dense(blocks: Mapping[Point, Sequence[float]]) -> str:
    """How far dense DDP got, what it would need next, and how its time compares there."""
    network, first = GROUPS["digits"].network, cost.dense_gib(GROUPS["fcn"].network, BATCHES[0])
    largest = max((batch for name, batch, method in blocks if (name, method) == ("digits", DENSE)), default=None)
    start = f"Vanilla DDP with dense matrices would take {first:.1f} GiB on MNIST's shape at batch {BATCHES[0]}"
    if largest is None:
        return f"{start}, more than the {cost.LIMIT_GB:g} GiB allowed here."
    over = ratio(blocks["digits", largest, DENSE], blocks["digits", largest, "share-ekfac"]).median
    joint = ratio(blocks["digits", largest, DENSE], blocks["digits", largest, "vanilla"]).median
    following = BATCHES[0]
    while cost.dense_gib(network, following) <= cost.LIMIT_GB:
        following *= 2
    return (
        f"{start}, so it is measured on DIGITS' shape, up to batch {largest}: it takes "
        f"{median(blocks['digits', largest, DENSE]):.2f} s a step there, {over:.3g} times the published form's time "
        f"and {joint:.3g} times that of the same step in the joint batch's coordinates. Batch {following} would "
        f"take {cost.dense_gib(network, following):.2f} GiB, more than the {cost.LIMIT_GB:g} GiB allowed here."
    )


def _fitting(methods: Sequence[str], name: str, batch: int) -> list[str]:
    network = GROUPS[name].network
    return [m for m in methods if m != DENSE or cost.dense_gib(network, batch) <= cost.LIMIT_GB]


def _case(name: str, batch: int, method: str) -> dict[str, object]:
    return case(GROUPS[name].network, batch, method)


def _turns(group: Group, quick: bool) -> int:
    return group.quick_turns if quick else group.turns


def _of(values: Mapping[Point, object]) -> list[str]:
    return list(dict.fromkeys(name for name, _, _ in values))


def _axes(name: str, values: Mapping[Point, object]) -> tuple[list[int], list[str]]:
    """Batch sizes and methods of one group."""
    own = [point for point in values if point[0] == name]
    return sorted({batch for _, batch, _ in own}), list(dict.fromkeys(method for _, _, method in own))


def _rows(name: str, values: Mapping[Point, object], methods: Sequence[str], cell: Cell, words: str) -> list[list[str]]:
    batches, _ = _axes(name, values)
    return [
        [words.format(label(m)), *(cell(batch, m) if (name, batch, m) in values else "-" for batch in batches)]
        for m in methods
    ]


def _paper(values: Mapping[str, Sequence[float]], batches: Sequence[int]) -> list[list[str]]:
    """The paper's ratios at the same batch sizes."""

    def cell(batch: int, own: str, base: str) -> str:
        place = BATCHES.index(batch)
        return f"{values[own][place] / values[base][place]:.2f}" if place < len(values[own]) else "-"

    pairs = [("DDPNOpt", "share-ekfac"), ("EKFAC", "ekfac"), ("E-MSA", "emsa"), ("vanilla DDP", DENSE)]
    over_adam = [[f"paper: {words} / Adam", *(cell(b, own, "adam") for b in batches)] for words, own in pairs]
    return [*over_adam, ["paper: DDPNOpt / EKFAC", *(cell(b, "share-ekfac", "ekfac") for b in batches)]]


def _medians(name: str, method: str, blocks: Mapping[Point, Sequence[float]]) -> tuple[float, float]:
    """Median over batch sizes of the time over EKFAC's, and of that over Adam's."""
    batches, _ = _axes(name, blocks)
    over = {
        base: median(ratio(blocks[name, b, method], blocks[name, b, base]).median for b in batches)
        for base in ("ekfac", "adam")
    }
    return over["ekfac"], over["adam"]


def _figure(values: Mapping[Point, float], y: str) -> Figure:
    panels = {}
    for name in _of(values):
        batches, methods = _axes(name, values)
        lines = {}
        for m in methods:
            there = [batch for batch in batches if (name, batch, m) in values]
            lines[label(m)] = (there, [values[name, batch, m] for batch in there])
        panels[GROUPS[name].short] = ("batch size", lines)
    return growth_figure(panels, y)
