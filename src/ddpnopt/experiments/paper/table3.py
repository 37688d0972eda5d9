"""Table 3: test accuracy of every method on every problem, and what it says about two of the paper's claims."""

from collections.abc import Iterator, Sequence
from statistics import mean

import torch

from ddpnopt.experiments.data import source
from ddpnopt.experiments.paper.methods import METHODS, Family
from ddpnopt.experiments.paper.problems import PROBLEMS, Problem
from ddpnopt.experiments.paper.table3_runs import (
    FULL,
    OWN,
    QUICK,
    UNCUT,
    UNTUNED_MARK,
    Effort,
    Entry,
    Row,
    rows,
)
from ddpnopt.experiments.report.claims import CLAIMS, LEAST_SEEDS
from ddpnopt.experiments.report.plots import accuracy_figure
from ddpnopt.experiments.report.section import Form, Judgement, Picture, Section, Table, Verdict, paragraphs
from ddpnopt.experiments.report.tables import number
from ddpnopt.experiments.stats import Interval, paired_difference, paired_p
from ddpnopt.experiments.study.lab import Lab

MARGIN = 0.5  # points that a competitive method may be behind, on the mean over problems
_TEXT = f"""
The paper's Table 3 gives the test accuracy of seven methods on seven problems as means of ten seeds, without
deviations. Its numbers of steps, splits and learning rates are not known to us. IRIS is no row of the paper. Here
every method gets the same number of combinations of hyper-parameters and the same seeds; they are chosen by
validation accuracy (the lower train loss breaks ties) on seeds that are not reported. Test data chooses no hyper-
parameter and no form of DDPNOpt; it chooses the opponent alone, which helps the opponent. Equal numbers of
combinations are not equal coverage: where a grid is thinned, its second hyper-parameter stays at its first value.
Runs are paired: a seed fixes initial weights and order of the samples.

DDPNOpt as published is run in both readings of what a sample's value function belongs to: the sample's own loss
(policies are averaged), or its share 1/B of the mean loss, which is what back-propagation of a mean hands to each
sample (policies are added). Without feedback the two are the same optimizer, SGD's without momentum. The paper used
the curvature of RMSprop on dense networks and a Kronecker one on convolution networks; all three are run.

Vanilla DDP is computed in the coordinates of the batch's columns, which gives the dense method's step to rounding
(tests/experiments/test_table3.py) at a cost that can be paid; the paper could not run it on convolution networks, and
neither is it run there here.

Rules of the verdicts. The published form is represented by the paper's choice of curvature, in the reading with the
better validation accuracy; the batch form by itself. Opponent is, on each problem, the rival with the highest mean
test accuracy. 'Outperforms the methods from optimal control' holds if the paired 95 % interval lies above zero on
more than half of the problems and below zero on none. 'Competitive with first- and second-order methods' holds if it
lies below zero on fewer than half of the problems and the difference is above -{MARGIN} points on average over
problems. Problems with fewer than {LEAST_SEEDS} seeds are shown and not judged.
"""


def run(lab: Lab, quick: bool) -> Section:
    """Tune every method on every problem whose data is at hand, run the seeds, and report."""
    return section(rows(lab, QUICK if quick else FULL))


def run_uncut(lab: Lab, quick: bool) -> Section:
    """The same with no row cut down, on a CUDA device where there is one; quick settings are those of :func:`run`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return section(rows(lab, QUICK if quick else UNCUT, device), "table3-uncut")


def section(found: Sequence[Row], name: str = "table3") -> Section:
    """Say what the rows show."""
    done = [row for row in found if row.entries]
    return Section(
        name=name,
        title="Table 3: accuracy of every method on every problem",
        text=list(_text(done)),
        facts=list(_facts(found)),
        tables=[*([_summary(done), _reported(done)] if done else []), *map(_details, done), _cut(found)],
        pictures=[_picture(row) for row in done],
        verdicts=[verdict for form in ("published", "batch") for verdict in _verdicts(done, form)],
    )


def label(name: str) -> str:
    """Return an entry's name in tables."""
    method = METHODS[name.removesuffix(UNTUNED_MARK)].label
    return f"{method}, untuned" if name.endswith(UNTUNED_MARK) else method


def title(problem: str) -> str:
    """Return a problem's name in tables."""
    own = PROBLEMS[problem]
    return f"{source(own.dataset).title}, {own.network.upper()}"


def reported(problem: Problem, name: str) -> float | None:
    """Accuracy the paper reports for a method, in percent; its own method used M of RMSprop or, on pictures, EKFAC."""
    adapted = "rmsprop" if problem.network == "fcn" else "ekfac"
    return problem.paper.get("published" if name in (f"own-{adapted}", f"share-{adapted}") else name)


def difference(entry: Entry, other: Entry) -> Interval:
    """Points of test accuracy between two entries, paired by seed."""
    return paired_difference(entry.tests, other.tests).scaled(100)


def strongest(row: Row, family: Family) -> Entry:
    """Entry of a family with the highest mean test accuracy: test data may choose a rival, since that only helps it."""
    own = [entry for entry in row.entries if _family(entry) == family]
    return max(own, key=lambda entry: entry.accuracy.mean)


def representative(row: Row, form: Form) -> Entry:
    """Entry that stands for a form of DDPNOpt: of the published one, the paper's M, read as validation has it."""
    if form == "batch":
        return _entry(row, OWN)
    adapted = "rmsprop" if PROBLEMS[row.problem].network == "fcn" else "ekfac"
    readings = [_entry(row, f"own-{adapted}"), _entry(row, f"share-{adapted}")]
    return max(readings, key=lambda entry: entry.tuned or 0.0)


def _entry(row: Row, name: str) -> Entry:
    return next(entry for entry in row.entries if entry.name == name)


def _family(entry: Entry) -> Family | None:
    return None if entry.name.endswith(UNTUNED_MARK) else METHODS[entry.name].family


def _verdicts(found: Sequence[Row], form: Form) -> Iterator[Verdict]:
    """The two claims about accuracy, by the rules that :func:`_text` states."""
    judged = [row for row in found if row.effort.seeds >= LEAST_SEEDS]
    left = "; ".join(title(row.problem) for row in found if row not in judged)
    families: tuple[tuple[str, Family], ...] = ((CLAIMS[0], "control"), (CLAIMS[1], "standard"))
    for claim, family in families:
        compared = [(row, difference(representative(row, form), strongest(row, family))) for row in judged]
        if not compared:
            yield Verdict(claim, form, "cannot be tested here", f"No problem was run with {LEAST_SEEDS} seeds.")
            continue
        better = sum(points.low > 0 for _, points in compared)
        worse = sum(points.high < 0 for _, points in compared)
        average = mean(points.mean for _, points in compared)
        if family == "control":
            holds = worse == 0 and 2 * better > len(compared)
        else:
            holds = 2 * worse < len(compared) and average > -MARGIN
        judgement: Judgement = "holds" if holds else "does not hold"
        behind = f"{worse} of {len(compared)} problems significantly below, {better} significantly above"
        words = "; ".join(
            f"{title(row.problem)} {number(points, 1, sign=True)} against {label(strongest(row, family).name)}"
            for row, points in compared
        )
        words += f". Not judged: {left}" if left else ""
        yield Verdict(claim, form, judgement, f"{behind}, {average:+.1f} points on average. {words}.")


def _text(found: Sequence[Row]) -> Iterator[str]:
    yield from paragraphs(_TEXT)
    if found:
        own = [(row, difference(_entry(row, OWN + UNTUNED_MARK), strongest(row, "standard"))) for row in found]
        words = "; ".join(f"{title(row.problem)} {number(points, 1, sign=True)}" for row, points in own)
        untuned = "The batch form untuned, at the library's learning rate and damping"
        yield f"{untuned}, against the best tuned standard method: {words}."


def _facts(found: Sequence[Row]) -> Iterator[tuple[str, str]]:
    for row in found:
        own = PROBLEMS[row.problem]
        network = f"width {own.width}, {own.activation.title()}" if own.network == "fcn" else "32 channels, ReLU"
        words = f"{network}, batches of {own.batch_size}; {_words(row.effort)}"
        yield title(row.problem), words if row.entries else "not run"
    yield (
        "settings",
        "momentum 0.9 for SGD, 0 elsewhere; no weight decay, constant learning rate, no augmentation; one thread",
    )


def _words(effort: Effort) -> str:
    seeds = f"{effort.tuning_seeds} tuning seed{'s' * (effort.tuning_seeds > 1)}"
    return (
        f"{effort.trials} combinations of hyper-parameters on {seeds}, then {effort.seeds} seeds, for each method; "
        f"{effort.steps} steps a run"
    )


def _names(found: Sequence[Row]) -> list[str]:
    return [name for method in METHODS for name in _with_untuned(method) if any(_has(row, name) for row in found)]


def _with_untuned(method: str) -> tuple[str, ...]:
    return (method, method + UNTUNED_MARK) if method == OWN else (method,)


def _has(row: Row, name: str) -> bool:
    return any(entry.name == name for entry in row.entries)


def _summary(found: Sequence[Row]) -> Table:
    best = {row.problem: max(row.entries, key=lambda entry: entry.accuracy.mean).name for row in found}

    def cell(row: Row, name: str) -> str:
        text = number(_entry(row, name).accuracy, 1) if _has(row, name) else "not run"
        return f"{text} *" if best[row.problem] == name else text

    return Table(
        "Test accuracy, %",
        ["", *(title(row.problem) for row in found)],
        [[label(name), *(cell(row, name) for row in found)] for name in _names(found)],
        "Mean over seeds ± half of a 95 % t interval. * highest mean of its column, which need not mean anything.",
    )


def _reported(found: Sequence[Row]) -> Table:
    def cell(row: Row, name: str) -> str:
        value = reported(PROBLEMS[row.problem], name)
        return "–" if value is None else f"{value:.2f}"

    names = [name for name in _names(found) if any(cell(row, name) != "–" for row in found)]
    return Table(
        "The paper's figures, %",
        ["", *(title(row.problem) for row in found)],
        [[label(name), *(cell(row, name) for row in found)] for name in names],
        "Liu, Chen, Theodorou, ICLR 2021, Table 3, mean of ten seeds; budgets and splits differ from those here. Its "
        "DDPNOpt stands beside both readings.",
    )


def _details(row: Row) -> Table:
    problem, opponent = PROBLEMS[row.problem], strongest(row, "standard")

    def cells(entry: Entry) -> list[str]:
        paper = reported(problem, entry.name)
        return [
            label(entry.name),
            ", ".join(f"{name} {value:g}" for name, value in entry.params.items()),
            "" if entry.tuned is None else f"{100 * entry.tuned:.1f}",
            number(entry.accuracy, 2),
            "" if paper is None else f"{paper:.2f}",
            "" if entry is opponent else number(difference(entry, opponent), 2, sign=True),
            "" if entry is opponent else _p(paired_p(entry.tests, opponent.tests)),
            str(entry.diverged),
            f"{entry.seconds:.1f}",
        ]

    return Table(
        title(row.problem),
        [
            "",
            "chosen",
            "validation, %",
            "test, %",
            "paper, %",
            "points against best standard",
            "p",
            "diverged",
            "s per run",
        ],
        [cells(entry) for entry in row.entries],
        f"{_words(row.effort)}. Best standard method: {label(opponent.name)}. p: paired t test, not corrected "
        "for the number of comparisons. Diverged: seeds whose loss or step was not finite; they count with their last "
        "weights. Seconds depend on what else the machine did.",
    )


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _cut(found: Sequence[Row]) -> Table:
    """What was not run, or at less than the whole effort, and what that would take."""
    lines, shapes = [], {name: source(own.dataset).shape for name, own in PROBLEMS.items()}
    for name, whole in UNCUT.items():
        row = next((row for row in found if row.problem == name), None)
        if row is None or row.missing is not None:
            done = [one.problem for one in found if one.entries and PROBLEMS[one.problem].network == "cnn"]
            done.sort(key=lambda one: shapes[one] != shapes[name])
            hours = f"about as {title(done[0])}" if done and PROBLEMS[name].network == "cnn" else ""
            lines.append([title(name), _words(whole), "not run" if row is None else str(row.missing), hours])
        elif row.effort != whole:
            runs = whole.trials * whole.tuning_seeds + whole.seeds
            once = sum(entry.seconds for entry in row.entries if entry.tuned is not None) / row.effort.steps
            lines.append([title(name), _words(whole), _words(row.effort), f"{once * whole.steps * runs / 3600:.1f}"])
    return Table(
        "What was cut",
        ["", "whole effort", "what was run", "core-hours of the whole"],
        lines,
        "Hours follow from the seconds of training steps measured here, one core; they are too many where the machine "
        "did other things meanwhile. 'ddpnopt table3-uncut' runs the whole; other machines join by 'ddpnopt worker'.",
    )


def _picture(row: Row) -> Picture:
    return Picture(
        f"accuracy-{row.problem}",
        f"Test accuracy on {title(row.problem)}, seed by seed",
        accuracy_figure(
            {label(entry.name): entry.tests for entry in row.entries},
            {label(entry.name): entry.accuracy.scaled(0.01) for entry in row.entries},
        ),
        "Rings: seeds, equal ones stacked. Diamonds: mean with 95 % interval.",
    )
