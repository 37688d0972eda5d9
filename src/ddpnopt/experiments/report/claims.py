"""The paper's claims, and which experiment says what about each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from ddpnopt.experiments.report.section import Form, Section, Verdict

# Liu, Chen, Theodorou, ICLR 2021: abstract and section 4, in our words
CLAIMS: tuple[str, ...] = (
    "outperforms the methods from optimal control",
    "competitive with first- and second-order methods",
    "robust to hyper-parameters, the improvement growing with the learning rate",
    "nearly as fast as standard methods",
    "mitigates vanishing gradients",
)

LEAST_SEEDS = 5  # of an experiment whose verdict rests on an interval over seeds

FORMS: tuple[Form, ...] = get_args(Form)
NOT_RUN = "not run"
MARKS: Mapping[str, str] = {"holds": "✓", "does not hold": "✗", "cannot be tested here": "?", NOT_RUN: "–"}
"""A sign beside the words of every judgement, so that nothing is told by colour alone."""


@dataclass(frozen=True)
class Finding:
    """A verdict, and the name of the experiment it comes from."""

    section: str
    verdict: Verdict


@dataclass(frozen=True)
class Standing:
    """All that was found about one claim.

    Attributes:
        claim: in one line.
        findings: by form of the method; none where no experiment tested it.
    """

    claim: str
    findings: Mapping[Form, Sequence[Finding]]


def standings(sections: Sequence[Section]) -> list[Standing]:
    """Gather the verdicts by claim: the paper's five in their order, then others as they come."""
    findings = [Finding(section.name, verdict) for section in sections for verdict in section.verdicts]
    claims = dict.fromkeys([*CLAIMS, *(finding.verdict.claim for finding in findings)])
    return [
        Standing(
            claim,
            {
                form: [one for one in findings if (one.verdict.claim, one.verdict.form) == (claim, form)]
                for form in FORMS
            },
        )
        for claim in claims
    ]
