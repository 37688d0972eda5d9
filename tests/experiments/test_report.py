import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ddpnopt.experiments import files
from ddpnopt.experiments.report import markdown
from ddpnopt.experiments.report.claims import CLAIMS, standings
from ddpnopt.experiments.report.report import duration, write
from ddpnopt.experiments.report.section import Picture, Section, Table
from experiments.made_up import AWKWARD, accuracies, grid

COMMANDS = {"table3": "ddpnopt table3", "fig4": "ddpnopt fig4 --quick"}
SECONDS = {"table3": 4000.0, "fig4": 75.0}
MARKDOWN = MarkdownIt("commonmark").enable("table")


class Reader(HTMLParser):
    """What a page holds: its tags, its text by element, its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text.append(" ".join(data.split()))
        if self._cell:
            self.tables[-1][-1][-1] += data

    def values(self, *names: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for name, value in attributes.items() if name in names]


def write_both(folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {"title": "Title", "seconds": SECONDS, "commands": COMMANDS}
    return write([accuracies(), grid()], folder, **(values | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("report") / "new" / "folder").parent


@pytest.fixture(scope="module")
def page(folder: Path) -> Reader:
    return Reader((folder / "index.html").read_text())


def judged(cells: Sequence[str]) -> list[str]:
    return [" ".join(cell.split()) for cell in cells]


def test_the_page_fetches_nothing(page: Reader) -> None:
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    fetched = page.values("src", "href", "xlink:href", "srcset", "action")
    assert fetched
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in fetched)


def test_names_within_the_page_are_unique_and_every_reference_meets_one(page: Reader, folder: Path) -> None:
    names = page.values("id")
    assert len(names) == len(set(names))
    content = (folder / "index.html").read_text()
    inside = set(re.findall(r"url\(#([^)]+)\)", content))
    assert inside
    assert inside <= set(names)
    links = [value[1:] for value in page.values("href", "xlink:href") if value.startswith("#")]
    assert {"table3", "fig4", *links, *page.values("aria-labelledby")} <= set(names)


def test_the_verdicts_stand_first_by_claim_and_form(page: Reader) -> None:
    header, *rows = [judged(row) for row in page.tables[0]]
    assert header == ["claim", "published form", "batch form", "evidence"]
    assert [row[0] for row in rows] == [*CLAIMS, "a claim of nobody's"]
    assert [row[1:3] for row in rows] == [
        ["✓ holds table3", "– not run"],
        ["✓ holds table3", "✗ does not hold table3 ? cannot be tested here fig4"],
        ["– not run", "✓ holds fig4"],
        ["? cannot be tested here fig4", "– not run"],
        ["– not run", "– not run"],
        ["– not run", "✓ holds table3"],
    ]
    assert rows[0][3] == f"published, table3: {AWKWARD}"
    assert rows[3][3] == "published, fig4: Needs a GPU."
    assert rows[4][3] == "No experiment of this report tests it."


def test_the_page_shows_every_word_and_figure(page: Reader) -> None:
    tables = [[judged(row) for row in table] for table in page.tables]
    for section in (accuracies(), grid()):
        facts = [word for fact in section.facts for word in fact]
        shown_things: list[Table | Picture] = [*section.tables, *section.pictures]
        about = [words for one in shown_things for words in (one.title, one.note)]
        for words in (section.title, *section.text, *facts, *about):
            assert " ".join(words.split()) in page.text
        for table in section.tables:
            assert [list(table.header), *map(list, table.rows)] in tables
        verdicts = [[one.claim, one.form, one.judgement, one.evidence] for one in section.verdicts]
        shown = [
            [row[0], row[1], row[2].partition(" ")[2], row[3]] for table in tables for row in table if len(row) == 4
        ]
        assert all(verdict in shown for verdict in verdicts)
        assert {one.title for one in section.pictures} <= set(page.values("aria-label"))
    assert sum(tag == "svg" for tag, _ in page.tags) == len(accuracies().pictures) + len(grid().pictures)


def test_every_table_and_picture_says_how_it_was_made(folder: Path) -> None:
    content = (folder / "index.html").read_text()
    for section, took in ((accuracies(), "1 h 06 min"), (grid(), "1 min 15 s")):
        part = content.partition(f'<section id="{section.name}">')[2].partition("</section>")[0]
        figures = part.split("<figure")[1:]
        assert len(figures) == len(section.tables) + len(section.pictures)
        for figure in figures:
            made = Reader(figure.partition("<details")[2]).text
            assert COMMANDS[section.name] in made
            assert f", {took} of computing" in figure
            assert took in made
            for name, value in section.facts:
                assert name in made
                assert " ".join(value.split()) in made
    assert content.count(", seeds: 0 to 9, tuning on 1000 to 1002; settings</summary>") == 4


def test_column_titles_are_marked_as_such(page: Reader) -> None:
    titles = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert titles.count("col") == 4 + 4 + 4 + 8 + 2 + 17
    assert set(titles) == {"col", "row"}


def test_the_markdown_of_a_section_shows_the_same(folder: Path) -> None:
    shown = Reader(MARKDOWN.render((folder / "table3.md").read_text()))
    section = accuracies()
    for words in (section.title, *section.text, *(f"{name}: {value}" for name, value in section.facts)):
        assert " ".join(words.split()) in shown.text
    assert f"command: {COMMANDS['table3']}" in shown.text
    expected = [[list(table.header), *map(list, table.rows)] for table in section.tables]
    assert shown.tables[:2] == expected
    assert shown.tables[2][2] == [CLAIMS[1], "batch", "✗ does not hold", section.verdicts[1].evidence]
    assert shown.values("src") == ["table3-differences.svg", "table3-small.svg"]
    assert shown.values("alt") == [picture.title for picture in section.pictures]


def test_the_index_leads_to_every_file(folder: Path) -> None:
    shown = Reader(MARKDOWN.render((folder / "README.md").read_text()))
    assert [row[1] for row in shown.tables[0][1:3]] == ["✓ holds (table3)", "✓ holds (table3)"]
    assert [row[0] for row in shown.tables[0][1:]] == [*CLAIMS, "a claim of nobody's"]
    assert shown.tables[1][1:] == [[one.title, COMMANDS[one.name]] for one in (accuracies(), grid())]
    links = set(shown.values("href"))
    assert links == {"table3.md", "fig4.md", "index.html"}
    assert all((folder / link).is_file() for link in links)


def test_pictures_beside_the_markdown_are_whole_and_have_a_size(folder: Path) -> None:
    files = sorted(folder.glob("*.svg"))
    assert len(files) == 8
    for path in files:
        element = ET.fromstring(path.read_bytes())
        assert element.tag == "{http://www.w3.org/2000/svg}svg"
        assert int(element.attrib["width"]) > int(element.attrib["height"]) > 100
    assert ET.fromstring((folder / "table3-small.svg").read_bytes()).attrib["width"] == "384"  # 4 inches


def test_equal_results_give_equal_files(folder: Path, tmp_path: Path) -> None:
    write_both(tmp_path, seconds={"table3": 1.0, "fig4": 2.0})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"index.html"}  # it names durations
    assert not any(b"<metadata" in content or b"<dc:date" in content for content in after.values())


def test_every_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def recorded(path: Path, content: bytes) -> None:
        seen.append(path.name)
        files.write_atomic(path, content)

    monkeypatch.setattr("ddpnopt.experiments.report.report.write_atomic", recorded)
    write_both(tmp_path)
    assert sorted(seen) == sorted(path.name for path in tmp_path.iterdir())
    assert seen[-1] == "index.html"


def test_an_experiment_may_come_alone_and_say_nothing_about_the_claims(tmp_path: Path) -> None:
    alone = Section("fig5", "Alone", ("Text.",), ())
    path = write([alone], tmp_path, "Title", {"fig5": 1}, {"fig5": "ddpnopt fig5", "other": "unused"})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["README.md", "fig5.md", "index.html"]
    assert [judged(row)[1:3] for row in Reader(path.read_text()).tables[0][1:]] == [["– not run", "– not run"]] * 5
    assert "## Verdicts" not in (tmp_path / "fig5.md").read_text()


def test_claims_are_gathered_from_all_sections() -> None:
    second = next(one for one in standings([accuracies(), grid()]) if one.claim == CLAIMS[1])
    assert [finding.section for finding in second.findings["batch"]] == ["table3", "fig4"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (90060, "25 h 01 min"),
    ],
)
def test_durations_are_for_people(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([], "give at least one section"),
        ([replace(grid(), name="Fig 4")], "section name 'Fig 4' will not do"),
        ([replace(grid(), name="readme")], "section name 'readme' will not do"),
        ([grid(), grid()], "two files would be named 'fig4'"),
        ([replace(grid(), name="fig9")], "no duration is known for section 'fig9'"),
        ([replace(grid(), tables=[Table("T", ("a", "b"), [("1",)])])], "has 2 columns, but a row of 1 cells"),
        ([replace(grid(), pictures=[replace(accuracies().pictures[0], name="../x")])], "picture name '../x'"),
        ([replace(grid(), pictures=[accuracies().pictures[0]] * 2)], "two files would be named 'fig4-differences'"),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_written(
    sections: list[Section], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write(sections, tmp_path / "report", "Title", SECONDS, COMMANDS)
    assert not (tmp_path / "report").exists()


def test_a_missing_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no command is known for section 'table3'"):
        write_both(tmp_path / "report", commands={"fig4": "x"})


def in_markdown(text: str) -> Sequence[tuple[str, str]]:
    """The text as a paragraph, a heading and a cell, and the tag that must hold it."""
    cell = markdown.table(("a", "b"), [["x", markdown.escape(text)]])
    return (markdown.escape(text), "p"), (f"## {markdown.escape(text)}", "h2"), (cell, "td")


@given(st.text("ab1. \\`*_[]<>|~$#&;!()-+=:'\"\näß", min_size=1).filter(str.strip))
@example("1. one")
@example("2024) two")
@example("&amp; #")
@example("- a")
@example("---")
@example("https://a.b")
def test_markdown_shows_plain_text_as_it_is(text: str) -> None:
    for source, tag in in_markdown(text):
        shown = MARKDOWN.render(source)
        held = re.search(rf"<{tag}[^>]*>(?:x</td>\s*<td[^>]*>)?(.*?)</{tag}>", shown, re.DOTALL)
        assert held is not None, shown
        assert Reader(held[1]).tags == []
        assert "".join(Reader(f"<p>{held[1]}</p>").text) == " ".join(text.split())


def test_a_picture_keeps_its_drawing_when_its_names_are_changed(folder: Path) -> None:
    element = ET.fromstring((folder / "table3-small.svg").read_bytes())
    names = {one.attrib["id"] for one in element.iter() if "id" in one.attrib}
    used = [one.attrib["{http://www.w3.org/1999/xlink}href"][1:] for one in element.iter() if one.tag.endswith("}use")]
    assert used
    assert set(used) <= names
    assert all(name.startswith("table3-small-") for name in names)
