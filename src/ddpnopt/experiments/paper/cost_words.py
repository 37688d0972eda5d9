"""What the experiments on cost, Fig. 3 and Table 4, call their methods, and which stands for each form of DDPNOpt."""

from collections.abc import Mapping

from ddpnopt.experiments.paper.cost import DENSE
from ddpnopt.experiments.paper.methods import METHODS
from ddpnopt.experiments.report.section import Form

FORMS: Mapping[Form, str] = {"published": "share-ekfac", "batch": "batch"}
"""Method that is measured for each form."""


def label(method: str) -> str:
    """A method's name in tables and pictures: of a key of ``METHODS``, or of ``DENSE``."""
    return "vanilla DDP, dense matrices" if method == DENSE else METHODS[method].label
