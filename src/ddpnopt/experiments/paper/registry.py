"""Every experiment by the name of its command."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ddpnopt.experiments.report.section import Section
from ddpnopt.experiments.study.lab import Lab


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper.

    Attributes:
        what: what it shows, in one line for ``--help``.
        run: carries it out in a lab, with quick (True) or full settings.
    """

    what: str
    run: Callable[[Lab, bool], Section]


EXPERIMENTS: Mapping[str, Experiment] = {}
