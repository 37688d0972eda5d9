"""A report as Markdown: the same words and figures as on the page, and nothing that differs between equal runs."""

import re
from collections.abc import Iterator, Mapping, Sequence

from ddpnopt.experiments.report.claims import FORMS, MARKS, NOT_RUN, Finding, standings
from ddpnopt.experiments.report.section import Picture, Section, Table

# signs that mean something to Markdown anywhere, or at the start of a line, and the number of a list's item
_SIGN = re.compile(r"[\\`*_\[\]<>|~$#]|&(?=#?\w+;)|^[-+=]")
_NUMBER = re.compile(r"^(\d+)([.)])(?= |$)")


def escape(text: str) -> str:
    """Write plain text so that Markdown shows it as it is, in one line."""
    line = " ".join(text.split())
    return _NUMBER.sub(r"\1\\\2", _SIGN.sub(r"\\\g<0>", line))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Write a table.

    Args:
        header: column titles, plain text.
        rows: cells that are Markdown already.
        left: so many columns from the left are aligned to the left, the others to the right.
    """
    rule = ["---" if place < left else "---:" for place in range(len(header))]
    lines = [[escape(title) for title in header], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section_page(section: Section, command: str, pictures: Mapping[str, str]) -> str:
    """Write one experiment's page.

    Args:
        section: the experiment.
        command: what regenerates it.
        pictures: file name, in the same folder, by name of the picture.
    """
    facts = [*section.facts, ("command", command)]
    parts = [f"# {escape(section.title)}", *map(escape, section.text), "## Settings"]
    parts.append("\n".join(f"* {escape(name)}: {escape(value)}" for name, value in facts))
    for one in section.tables:
        parts += _table(one)
    for picture in section.pictures:
        parts += _picture(picture, pictures[picture.name])
    if section.verdicts:
        rows = [
            [escape(one.claim), one.form, f"{MARKS[one.judgement]} {one.judgement}", escape(one.evidence)]
            for one in section.verdicts
        ]
        parts += ["## Verdicts", table(("claim", "form", "verdict", "evidence"), rows, left=4)]
    return "\n\n".join(parts) + "\n"


def index(title: str, sections: Sequence[Section], commands: Mapping[str, str]) -> str:
    """Write the folder's front page: the verdicts on the paper's claims, and where everything is."""
    rows = []
    for one in standings(sections):
        evidence = [_evidence(finding) for form in FORMS for finding in one.findings[form]]
        rows.append([escape(one.claim), *(_judgements(one.findings[form]) for form in FORMS), "<br>".join(evidence)])
    header = ("claim", *(f"{form} form" for form in FORMS), "evidence")
    pages = [[f"[{escape(one.title)}]({one.name}.md)", escape(commands[one.name])] for one in sections]
    parts = [
        f"# {escape(title)}",
        "The claims are those of the DDPNOpt paper (Liu, Chen and Theodorou, ICLR 2021). *Published form*: its "
        "Algorithm 3, a policy per sample. *Batch form*: the joint problem of the whole batch, solved exactly.",
        table(header, rows, left=len(header)),
        "## Experiments",
        table(("experiment", "command"), pages, left=2),
        "[`index.html`](index.html) shows the same on one page that needs no network, with durations and software.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(one: Table) -> Iterator[str]:
    yield f"## {escape(one.title)}"
    yield table(one.header, [[escape(cell) for cell in row] for row in one.rows])
    if one.note:
        yield escape(one.note)


def _picture(one: Picture, file: str) -> Iterator[str]:
    yield f"## {escape(one.title)}"
    yield f"![{escape(one.title)}]({file})"
    if one.note:
        yield escape(one.note)


def _judgements(findings: Sequence[Finding]) -> str:
    words = [f"{MARKS[one.verdict.judgement]} {one.verdict.judgement} ({_link(one.section)})" for one in findings]
    return "<br>".join(words) or f"{MARKS[NOT_RUN]} {NOT_RUN}"


def _evidence(finding: Finding) -> str:
    return f"*{finding.verdict.form}*, {_link(finding.section)}: {escape(finding.verdict.evidence)}"


def _link(section: str) -> str:
    return f"[{escape(section)}]({section}.md)"
