"""Sections of a report with invented words and figures: many pictures, long and wide tables, awkward signs."""

import math

from matplotlib.figure import Figure

from ddpnopt.experiments.report.claims import CLAIMS
from ddpnopt.experiments.report.section import Picture, Section, Table, Verdict

AWKWARD = 'Müller & Söhne: a < b > c, "quoted", |u|^2, Q_ux_, *stars*, `ticks`, 5 $ and ~6 $, &amp; ±½ [x](y) \\'


def curves(label: str, size: tuple[float, float] = (10, 4)) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    for axes in figure.subplots(1, 2):
        for place in range(3):
            steps = range(1, 40)
            axes.plot(steps, [math.exp(-step / (9 + 5 * place)) for step in steps], "o-", markersize=3, label=place)
        axes.set(xlabel="step", ylabel=label, title=label)
        axes.legend(frameon=False)
    return figure


def image() -> Figure:
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    axes.imshow([[math.sin(i * j / 9) for i in range(16)] for j in range(16)])
    return figure


def accuracies() -> Section:
    methods = ("SGD", "RMSprop", "Adam", "EKFAC", "E-MSA", "vanilla DDP", "DDPNOpt", "DDPNOpt, batch")
    rows = [
        (name, *(f"{90 + (3 * i + 7 * j) % 80 / 10:.1f} ± {1 + i % 3 / 10:.1f}" for j in range(7)))
        for i, name in enumerate(methods)
    ]
    header = ("method", "WINE", "DIGITS", "MNIST", "F-MNIST", "MNIST, cnn", "SVHN, cnn", "CIFAR-10, cnn")
    return Section(
        "table3",
        "Table 3: test accuracy of every method",
        (
            "The paper compares seven optimizers on seven problems and reports means of ten runs without intervals. "
            "Here every method is tuned with the same budget on seeds that are not reported, and differences are "
            "paired by seed. These words and figures are invented.",
            AWKWARD,
        ),
        (
            ("seeds", "0 to 9, tuning on 1000 to 1002"),
            ("budget", "8 combinations for each method, chosen by validation accuracy"),
            ("data", "70 % train, 10 % validation, 20 % test"),
            ("code", "0123456789abcdef" * 4),
            ("steps", "160 to 800, " + "by problem, " * 12),
        ),
        (
            Table("Test accuracy, %", header, rows, "Mean of 10 seeds ± 95 % t interval; * best of its column."),
            Table(AWKWARD, (AWKWARD, "a & b"), [("<b>bold</b>", AWKWARD), ("ä|ö", "")]),
        ),
        (
            Picture("differences", "Points by which each method differs", curves("loss"), "Bars: 95 % intervals."),
            Picture("small", AWKWARD, image()),
        ),
        (
            Verdict(CLAIMS[1], "published", "holds", "Within 0.3 points of the best rival on 5 of 7 problems."),
            Verdict(CLAIMS[1], "batch", "does not hold", "3.1 points below SGD on DIGITS (interval -4.0 to -2.2)."),
            Verdict(CLAIMS[0], "published", "holds", AWKWARD),
            Verdict("a claim of nobody's", "batch", "holds", "Invented."),
        ),
    )


def grid() -> Section:
    wide = [f"lr {10 ** (i / 4 - 3):.3g}" for i in range(16)]
    rows = [[f"setting {i} of the longer sort of name", *(f"{i * j / 7:.2f}" for j in range(16))] for i in range(90)]
    return Section(
        "fig4",
        "Figure 4: what feedback adds at equal hyper-parameters",
        ("Ninety rows and sixteen columns of nothing in particular.",),
        (("cells", "16 learning rates × 90"),),
        (Table("Improvement over the baseline", ["setting", *wide], rows),),
        tuple(Picture(f"part{i}", f"Part {i} of the grid", curves("improvement", (5 + i, 3))) for i in range(6)),
        (
            Verdict(CLAIMS[1], "batch", "cannot be tested here", "SVHN is not available on this machine."),
            Verdict(CLAIMS[2], "batch", "holds", "Improvement in 70 of 90 cells, growing from 0.2 to 3.4 points."),
            Verdict(CLAIMS[3], "published", "cannot be tested here", "Needs a GPU."),
        ),
    )
