"""What an experiment has to say, before it is a page: text, facts, tables, pictures and verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from matplotlib.figure import Figure

Form = Literal["published", "batch"]
Judgement = Literal["holds", "does not hold", "cannot be tested here"]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it shows.
        header: column titles; the first column is left-aligned, the others right-aligned.
        rows: cells, as many a row as there are titles.
        note: what a reader needs to read it: units, intervals, what a mark means. May be empty.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: file name without ending, unique in the section.
        title: what it shows, also for readers who cannot see it.
        figure: drawn by the functions of this package; no global matplotlib state.
        note: what a reader needs to read it. May be empty.
    """

    name: str
    title: str
    figure: Figure
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """What an experiment says about one of the paper's claims, for one form of the method.

    Attributes:
        claim: the claim, in one line.
        form: ``"published"``: the paper's policy per sample; ``"batch"``: the exact joint batch.
        judgement: the verdict.
        evidence: the figures it rests on, in one or two sentences.
    """

    claim: str
    form: Form
    judgement: Judgement
    evidence: str


@dataclass(frozen=True)
class Section:
    """One experiment's part of a report.

    Attributes:
        name: of the experiment, also its command: ``table3``, ``fig4``, ...
        title: heading.
        text: paragraphs of plain text: what the paper shows, what was run here, what came out, what was cut.
        facts: settings worth a line each: (name, value), for instance seeds, budget, data, software.
        tables, pictures, verdicts: in the order in which they are shown.
    """

    name: str
    title: str
    text: Sequence[str]
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    verdicts: Sequence[Verdict] = ()


def withheld(section: Section, why: str) -> Section:
    """The section with no claim judged, for the reason given."""
    verdicts = [
        replace(one, judgement="cannot be tested here", evidence=f"{why} {one.evidence}") for one in section.verdicts
    ]
    return replace(section, verdicts=verdicts)


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines; inside a paragraph line breaks become spaces."""
    return [" ".join(part.split()) for part in text.strip().split("\n\n")]
