"""Write a report: one self-contained page, and beside it the same as Markdown with its pictures."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from ddpnopt.experiments.environment import environment
from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.report import markdown
from ddpnopt.experiments.report.claims import FORMS, MARKS, NOT_RUN, standings
from ddpnopt.experiments.report.page import render
from ddpnopt.experiments.report.plots import to_svg
from ddpnopt.experiments.report.section import Picture, Section

PAGE, INDEX = "index.html", "README.md"

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_TAKEN = frozenset({"contents", "environment", "readme", "verdicts"})  # the page's own parts, the folder's index


def write(
    sections: Sequence[Section], folder: Path, title: str, seconds: Mapping[str, float], commands: Mapping[str, str]
) -> Path:
    """Write the report's files, each whole or not at all, the page last.

    The Markdown files and pictures hold no date, duration or version: they differ only where a figure does.

    Args:
        sections: one experiment or several, in the order in which they are shown.
        folder: where to; made if missing, files of the same names are replaced.
        title: heading of the page and of the index.
        seconds: how long each experiment's runs took together, by its name.
        commands: what regenerates each experiment, by its name.

    Returns:
        The page's path.

    Raises:
        ValueError: a name, a table or a mapping will not do.
    """
    _check(sections, seconds, commands)
    svg = {
        (section.name, picture.name): to_svg(picture.figure, stem, picture.title)
        for section in sections
        for picture in section.pictures
        for stem in [f"{section.name}-{picture.name}"]
    }
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        pictures = {picture.name: f"{section.name}-{picture.name}.svg" for picture in section.pictures}
        for picture in section.pictures:
            write_atomic(folder / pictures[picture.name], _alone(svg[section.name, picture.name], picture))
        text = markdown.section_page(section, commands[section.name], pictures)
        write_atomic(folder / f"{section.name}.md", text.encode())
    write_atomic(folder / INDEX, markdown.index(title, sections, commands).encode())
    context = {
        "title": title,
        "sections": sections,
        "standings": standings(sections),
        "forms": FORMS,
        "marks": MARKS,
        "not_run": NOT_RUN,
        "commands": commands,
        "durations": {section.name: duration(seconds[section.name]) for section in sections},
        "total": duration(sum(seconds[section.name] for section in sections)),
        "pictures": {names: Markup(element) for names, element in svg.items()},
        "environment": {name: value for name, value in environment(1).items() if value is not None},
    }
    write_atomic(folder / PAGE, render("report.html.j2", context))
    return folder / PAGE


def duration(seconds: float) -> str:
    """Write a time for people: ``0.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _check(sections: Sequence[Section], seconds: Mapping[str, float], commands: Mapping[str, str]) -> None:
    for complaint in _complaints(sections, seconds, commands):
        raise ValueError(complaint)


def _complaints(
    sections: Sequence[Section], seconds: Mapping[str, float], commands: Mapping[str, str]
) -> Iterator[str]:
    if not sections:
        yield "nothing to report: give at least one section"
    stems: set[str] = set()
    for section in sections:
        if not _NAME.fullmatch(section.name) or section.name in _TAKEN:
            yield (
                f"section name {section.name!r} will not do: use small letters, digits, - and _, "
                f"and none of {', '.join(sorted(_TAKEN))}"
            )
        for known, what in ((seconds, "duration"), (commands, "command")):
            if section.name not in known:
                yield f"no {what} is known for section {section.name!r}: give one under its name"
        for table in section.tables:
            for row in table.rows:
                if len(row) != len(table.header):
                    yield (
                        f"table {table.title!r} of {section.name!r} has {len(table.header)} columns, but a row of "
                        f"{len(row)} cells: {list(row)}"
                    )
        for picture in section.pictures:
            if not _NAME.fullmatch(picture.name):
                yield f"picture name {picture.name!r} of {section.name!r} will not do: use small letters, digits, - _"
        for stem in [section.name, *(f"{section.name}-{picture.name}" for picture in section.pictures)]:
            if stem in stems:
                yield f"two files would be named {stem!r}: give sections and pictures names of their own"
            stems.add(stem)


def _alone(svg: str, picture: Picture) -> bytes:
    """A picture as a file of its own, which needs a size (in CSS pixels)."""
    width, height = (round(96 * float(inches)) for inches in picture.figure.get_size_inches())
    return svg.replace("<svg", f'<svg width="{width}" height="{height}"', 1).encode() + b"\n"
