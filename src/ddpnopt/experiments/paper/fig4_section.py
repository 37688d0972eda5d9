"""Figure 4 in words, tables, pictures and verdicts."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ddpnopt.experiments.data import source
from ddpnopt.experiments.paper.fig4_panel import READINGS, Panel, Runs, Tally, tally
from ddpnopt.experiments.paper.problems import PROBLEMS
from ddpnopt.experiments.paper.training import POINT
from ddpnopt.experiments.report.claims import CLAIMS, LEAST_SEEDS
from ddpnopt.experiments.report.grid_figures import Band, HeatMap, curve_panels, heat_maps
from ddpnopt.experiments.report.section import Form, Judgement, Picture, Section, Table, Verdict
from ddpnopt.experiments.report.tables import number
from ddpnopt.experiments.stats import Interval

GROWS = CLAIMS[2]
FASTER = "faster convergence than without feedback"
LIMIT = 10.0  # points at which the colours of the maps end

_PLACED = (
    "The adapted optimizers' grids were placed to reach learning rates at which they fail, by trials on DIGITS with "
    "seed 0, which is among those reported; the batch form's begins at its default, so that drops from the best cell "
    "do not compare them on equal terms."
)
_RULE = (
    "The rule: in a grid, an optimizer with feedback against the same without on one problem, the first "
    "claim holds if feedback is significantly better (95 % t interval over paired seeds above zero) in more cells than "
    "significantly worse, better in at least half of the cells at the two highest learning rates, and the slope "
    "of its improvement over the logarithm of the learning rate is significantly positive. The second, faster "
    "convergence, holds if the train loss, averaged over training at the learning rate best for the optimizer without "
    "feedback, is significantly lower. A lower variance is shown, not judged: of two equal optimizers one varies less "
    "by chance in half of the cells. Learning rates at which neither trains (no cell of either reaches half the grid's "
    "best mean accuracy) are shown, not judged. This choice and that of the best rate are made by mean validation "
    "accuracy. Cells share their seeds, so that they are not independent, and intervals are not corrected for the "
    "number of comparisons. A form's verdict is that of more than half of its grids; the published form is judged by "
    "the reading whose validation accuracy with feedback, mean over all cells of its grids, is higher."
)


def section(panels: Sequence[Panel], steps: Mapping[str, int], missing: Mapping[str, str], quick: bool) -> Section:
    """Report on panels.

    Args:
        panels: of problems whose data was at hand.
        steps: of a run, by problem.
        missing: why the others were left out, by problem.
        quick: whether settings were the quick ones.
    """
    tallies = [tally(panel) for panel in panels]
    problems = list(dict.fromkeys(panel.problem for panel in panels))
    by_problem = {problem: [panel for panel in panels if panel.problem == problem] for problem in problems}
    return Section(
        "fig4",
        "Figure 4: what feedback adds, at equal hyper-parameters",
        text=[
            "The paper's Figure 4 shows, over a grid of learning rates and weight decays, the accuracy of DDPNOpt less "
            "that of the optimizer it adapts, with all hyper-parameters equal, so that feedback alone makes the "
            "difference: an improvement in most cells that grows with the learning rate, a lower variance and a faster "
            "convergence. Its cell values and grids are not known to us.",
            "Here each cell runs the same optimizer with and without feedback from the same initial weights over the "
            "same batches; without feedback the published form is SGD (without momentum), RMSprop or EKFAC itself, and "
            "the batch form solves each layer's joint problem by itself. The paper leaves open whether "
            "a sample's value function is that of its own loss or of its share, 1/B, of the mean loss; both readings "
            f"are run. {_PLACED}",
            _RULE,
            *_findings(panels, tallies),
            *[f"{PROBLEMS[name].dataset} was left out: {why}." for name, why in missing.items()],
            *(["Quick run: fewer learning rates, decays, optimizers, steps and seeds."] if quick else []),
        ],
        facts=list(_facts(panels, steps)),
        tables=[
            _summary(panels, tallies),
            *[_cells(problem, own) for problem, own in by_problem.items()],
            _spread(panels, tallies),
            _robustness(panels),
        ],
        pictures=[picture for problem, own in by_problem.items() for picture in _pictures(problem, own)],
        verdicts=list(_verdicts(panels, tallies)),
    )


def _findings(panels: Sequence[Panel], tallies: Sequence[Tally]) -> Iterator[str]:
    for key, words in READINGS.items():
        own = [one for panel, one in zip(panels, tallies, strict=True) if panel.reading == key]
        if own:
            cells, better, worse = (sum(getattr(one, name) for one in own) for name in ("cells", "better", "worse"))
            yield (
                f"{words[0].upper()}{words[1:]}: of {cells} cells judged, feedback is significantly better in {better} "
                f"and worse in {worse}; the first claim's rule is met in {sum(one.grows for one in own)} of {len(own)} "
                f"grids, the second's in {sum(one.faster for one in own)}."
            )


def _verdicts(panels: Sequence[Panel], tallies: Sequence[Tally]) -> Iterator[Verdict]:
    forms: Mapping[Form, tuple[str, ...]] = {"published": ("own", "share"), "batch": ("batch",)}
    seeds = min((panel.open.accuracy.shape[-1] for panel in panels), default=0)
    for claim, rule in ((GROWS, "grows"), (FASTER, "faster")):
        for form, keys in forms.items():
            own = {
                key: [one for panel, one in zip(panels, tallies, strict=True) if panel.reading == key] for key in keys
            }
            met = {key: sum(getattr(one, rule) for one in own[key]) for key in keys}
            best = max(keys, key=lambda key: _validation(panels, key))
            evidence = "; ".join(f"{READINGS[key]}: rule met in {met[key]} of {len(own[key])} grids" for key in keys)
            if form == "published":
                evidence += f"; judged by the reading of higher validation accuracy, {READINGS[best]}"
            elif claim == GROWS:
                evidence += f"; {_drops(panels)}"
            if seeds < LEAST_SEEDS:
                evidence += f"; {seeds} seeds, and a verdict takes {LEAST_SEEDS}"
            judgement: Judgement = "holds" if 2 * met[best] > len(own[best]) else "does not hold"
            tested = seeds >= LEAST_SEEDS and own[best]
            yield Verdict(claim, form, judgement if tested else "cannot be tested here", f"{evidence.rstrip('.')}.")


def _validation(panels: Sequence[Panel], key: str) -> float:
    """Validation accuracy of a reading with feedback, mean over all cells of its grids."""
    own = [float(panel.closed.validation.mean()) for panel in panels if panel.reading == key]
    return math.fsum(own) / len(own) if own else -math.inf


def _drops(panels: Sequence[Panel]) -> str:
    """The batch form's absolute robustness beside that of the adapted optimizers, in words."""
    own = [panel.closed.drop.mean for panel in panels if panel.variant == "batch"]
    adapted = [panel.open.drop.mean for panel in panels if panel.reading == "own"]
    if not own or not adapted:
        return "no grid to compare its robustness with"
    return (
        f"its mean over a grid lies {min(own):.1f} to {max(own):.1f} points below its best cell, that of the "
        f"adapted optimizers {min(adapted):.1f} to {max(adapted):.1f}. {_PLACED}"
    )


def _summary(panels: Sequence[Panel], tallies: Sequence[Tally]) -> Table:
    return Table(
        "What feedback adds to the test accuracy, by grid",
        ("adapted optimizer", "problem", "cells", "better", "worse", "better of high", "points per decade", "rule"),
        [
            (
                panel.title,
                PROBLEMS[panel.problem].dataset,
                str(one.cells),
                str(one.better),
                str(one.worse),
                f"{one.high_better} of {one.high}",
                "" if math.isnan(one.trend.mean) else number(one.trend, 1, sign=True),
                "met" if one.grows else "not met",
            )
            for panel, one in zip(panels, tallies, strict=True)
        ],
        note="Better and worse: cells whose 95 % t interval of the paired difference leaves out zero. High: the two "
        "highest learning rates at which either optimizer trains. Slope: improvement in points per factor ten of the "
        "learning rate, with its 95 % interval over seeds.",
    )


def _cells(problem: str, panels: Sequence[Panel]) -> Table:
    factors = [rate / panels[0].rates[0] for rate in panels[0].rates]
    return Table(
        f"Test accuracy with feedback less that without, in points: {PROBLEMS[problem].dataset}",
        ("adapted optimizer", "lowest rate", "weight decay", *(f"{factor:.3g} ×" for factor in factors)),
        [
            (
                panel.title,
                f"{panel.rates[0]:g}",
                f"{decay:g}",
                *(_difference(row[place]) for row in panel.differences),
            )
            for panel in panels
            for place, decay in enumerate(panel.decays)
        ],
        note="Columns: learning rates as multiples of the lowest. Mean ± 95 % t interval over paired seeds; * where it "
        "leaves out zero.",
    )


def _difference(cell: Interval) -> str:
    return number(cell, 1, sign=True) + " *" * significant(cell)


def significant(cell: Interval) -> bool:
    """Whether an interval leaves out zero; that of a single value never does."""
    return cell.low > 0 or cell.high < 0


def _spread(panels: Sequence[Panel], tallies: Sequence[Tally]) -> Table:
    def deviation(runs: Runs, cell: tuple[int, int]) -> str:
        return f"{runs.accuracy[cell].std(ddof=min(1, runs.accuracy.shape[-1] - 1)):.2f}"

    return Table(
        "Variance and convergence (Figure 4b), where the optimizer without feedback is at its best",
        (
            "adapted optimizer", "problem", "learning rate", "deviation with", "without", "calmer cells",
            "loss along training", "runs diverged with", "without",
        ),
        [
            (
                panel.title,
                PROBLEMS[panel.problem].dataset,
                f"{panel.rates[panel.usual[0]]:g}",
                deviation(panel.closed, panel.usual),
                deviation(panel.open, panel.usual),
                f"{one.calmer} of {one.cells}",
                number(one.loss, 3, sign=True),
                str(panel.closed.diverged.sum()),
                str(panel.open.diverged.sum()),
            )
            for panel, one in zip(panels, tallies, strict=True)
        ],
        note=f"At weight decay {panels[0].decays[0] if panels else 0:g}. Deviation: standard deviation over seeds of "
        "the test accuracy, in points. Calmer: cells in which it is lower with feedback; by chance half of them. Loss: "
        "train loss, mean over training, with feedback less without, ± 95 % t interval over paired seeds; a run that "
        "diverged counts with its highest loss from there on. Diverged: runs of the whole grid whose loss or step was "
        "not finite.",
    )  # fmt: skip


def _robustness(panels: Sequence[Panel]) -> Table:
    rows = []
    for panel in panels:
        both = [(f"{panel.title}, with feedback", panel.closed)]
        if panel.reading != "share":  # without feedback the two readings are one optimizer
            both.append((f"{panel.adapted} without feedback", panel.open))
        for name, runs in both:
            best, worst = runs.mean.max(), runs.mean.min()
            row = name, PROBLEMS[panel.problem].dataset, f"{best:.1f}", number(runs.drop, 1), f"{best - worst:.1f}"
            rows.append(row)
    return Table(
        "Robustness by itself: how far accuracy falls below an optimizer's own best cell",
        ("optimizer", "problem", "best cell, %", "mean drop", "greatest drop"),
        rows,
        note="Drops in points, of the mean over all cells of the grid (± 95 % t interval over seeds) and of the worst "
        "cell, whether or not anything trains there; the best cell is that of the highest mean test accuracy. "
        f"{_PLACED}",
    )


def _pictures(problem: str, panels: Sequence[Panel]) -> Iterator[Picture]:
    dataset, maps, curves = source(PROBLEMS[problem].dataset).title, [], {}
    for panel in panels:
        cells = list(zip(*panel.differences, strict=True))  # by decay, which is a map's row
        heading = panel.title.replace(", ", "\n")
        maps.append(
            HeatMap(
                heading,
                [f"{rate:g}" for rate in panel.rates],
                [f"{decay:g}" for decay in panel.decays],
                [[cell.mean for cell in row] for row in cells],
                [[significant(cell) for cell in row] for row in cells],
            )
        )
        curves[f"{heading}\nlearning rate {panel.rates[panel.usual[0]]:g}"] = [
            _band(words, runs.curve[panel.usual])
            for words, runs in (("with feedback", panel.closed), ("without", panel.open))
        ]
    yield Picture(
        f"grid-{PROBLEMS[problem].dataset}",
        f"What feedback adds to the test accuracy on {dataset}, in points",
        heat_maps(maps, "learning rate", "weight decay", "points", LIMIT),
        note="Each map: accuracy with feedback less that without, mean over paired seeds; bold with a star where the "
        f"95 % t interval leaves out zero. Purple is better, orange worse; colours end at {LIMIT:g} points.",
    )
    yield Picture(
        f"curves-{PROBLEMS[problem].dataset}",
        f"Convergence with and without feedback on {dataset}",
        curve_panels(curves),
        note="Train loss, mean over seeds of the means of ten batches; the band reaches from quartile to quartile. At "
        "the learning rate best for the optimizer without feedback, first weight decay.",
    )


def _band(label: str, curves: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Band:
    low, high = np.quantile(curves, [0.25, 0.75], axis=0).tolist()
    steps = [POINT * (place + 1) for place in range(curves.shape[-1])]
    return Band(label, steps, curves.mean(0).tolist(), low, high)


def _facts(panels: Sequence[Panel], steps: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    if panels:
        rates, decays, seeds = panels[0].open.accuracy.shape
        span = sorted({round(panel.rates[-1] / panel.rates[0], 6) for panel in panels})
        factor = " or ".join(f"{one:g}" for one in span)
        yield (
            "grid",
            f"{rates} learning rates over a factor of {factor} x {decays} weight decays x {seeds} paired seeds",
        )
    for problem in dict.fromkeys(panel.problem for panel in panels):
        batch = PROBLEMS[problem].batch_size
        yield PROBLEMS[problem].dataset, f"the paper's dense network, {steps[problem]} steps of {batch} samples"
    params = {panel.title: panel.params for panel in panels if panel.params}
    fixed = [f"{name} {value:g} for {words}" for words, own in params.items() for name, value in own.items()]
    yield "fixed", "; ".join(["no momentum", *fixed, "all else the library's defaults"])
