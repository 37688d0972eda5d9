"""Every experiment by the name of its command."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ddpnopt.experiments.paper import fig3, fig4, fig5, fig6, table3, table4
from ddpnopt.experiments.report.section import Section
from ddpnopt.experiments.study.lab import Lab


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper.

    Attributes:
        what: what it shows, in one line for ``--help``.
        run: carries it out in a lab, with quick (True) or full settings.
        reported: whether ``ddpnopt reproduce`` has it.
    """

    what: str
    run: Callable[[Lab, bool], Section]
    reported: bool = True


EXPERIMENTS: Mapping[str, Experiment] = {
    "table3": Experiment("test accuracy of every method on every problem", table3.run),
    "table3-uncut": Experiment("the same at the whole effort: days of computing", table3.run_uncut, reported=False),
    "fig3": Experiment("seconds and memory of a step against the batch size", fig3.run),
    "table4": Experiment("how time and memory grow with batch, width and depth", table4.run),
    "fig4": Experiment("what feedback adds over learning rates and weight decays, all else equal", fig4.run),
    "fig5": Experiment("to which changes of the image the feedback policy reacts", fig5.run),
    "fig6": Experiment("vanishing gradients in a deep sigmoid network", fig6.run),
}
