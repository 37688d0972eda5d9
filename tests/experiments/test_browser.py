from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from browser import check_page, launched, missing
from ddpnopt.experiments import cli
from ddpnopt.experiments.report.report import write
from experiments.made_up import AWKWARD, accuracies, grid

pytestmark = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.xdist_group("browser")]

GOOD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>page</title></head>
<body style="margin: 0"><h1 id="top">Title</h1><a href="#top">up</a>
<img alt="a dot" src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==">
<div id="verdicts"><table><thead><tr><th scope="col">claim</th></tr></thead>
<tbody><tr><td>holds</td></tr></tbody></table></div>
{}</body></html>"""


def page(extra: str) -> Path:
    path = Path("page.html")
    path.write_text(GOOD.format(extra))
    return path


Check = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    with launched() as browser:
        yield partial(check_page, browser=browser)


def test_the_report_opens_without_a_fault(tmp_path: Path, check: Check) -> None:
    sections = [accuracies(), grid()]
    seconds, commands = {"table3": 4000.0, "fig4": 3.0}, {"table3": "ddpnopt table3", "fig4": AWKWARD}
    assert check(write(sections, tmp_path / "report", AWKWARD, seconds, commands)) == []


def test_a_comparison_opens_without_a_fault(check: Check) -> None:
    words = ["compare", "iris", "--optimizers", "ddpnopt", "sgd", "--seeds", "2", "--epochs", "2", "--no-tune"]
    assert cli.main(words) == 0
    found = check(Path("runs/compare-iris/index.html"))
    assert found == []


def test_a_good_page_has_no_fault(check: Check) -> None:
    assert check(page("")) == []


def test_what_the_console_says_is_a_fault(check: Check) -> None:
    found = check(page("<script>console.error('lost'); console.warn('online', navigator.onLine); nowhere()</script>"))
    assert {problem.partition(" (")[0] for problem in found} == {
        "console error: lost",
        "console warning: online true",
        "console warning: online false",
        "error: nowhere is not defined",
    }
    assert len(found) == 3 * 2 * 2 * 2  # two widths, two colour schemes, with and without network


def test_a_picture_from_outside_is_a_fault_even_where_there_is_no_network(check: Check) -> None:
    found = check(page('<img alt="far away" src="https://example.invalid/far.png">'))
    asked = [problem for problem in found if problem.startswith("request: https://example.invalid/far.png")]
    assert len(asked) == 2 * 2 * 2
    assert any("no network" in problem for problem in asked)
    assert any(problem.startswith("picture not loaded") for problem in found)


def test_a_file_beside_the_page_is_a_fault(check: Check) -> None:
    Path("style.css").write_text("h1 { margin: 0 }")
    found = check(page('<link rel="stylesheet" href="style.css">'))
    assert {problem.partition(": ")[0] for problem in found} == {"request"}


FAULTS = {
    '<div style="width: 450px">wide</div>': "wider than the window: 450 pixels (400 pixels, light)",
    '<svg aria-label="none" width="0" height="0"></svg>': 'picture without size: <svg aria-label="none"',
    '<svg width="9" height="9"></svg>': 'picture without words: <svg width="9"',
    "<h3>deep</h3>": "headings leap: 1,3,1",
    "<h1>again</h1>": "not exactly one h1",
    '<p id="top">again</p>': "id used twice: top",
    '<a href="#bottom">down</a>': 'leads nowhere: <a href="#bottom"',
    '<p style="color: #888">pale</p>': 'contrast 3.5: <p style="color: #888"',
}
ROWS = {
    "<th>method</th>": "column title without scope: <th>method",
    '<td style="font-size: 8px; padding: 9px">small</td>': 'verdict not readable: <td style="font-size',
    '<td style="visibility: hidden">unseen</td>': 'verdict not readable: <td style="visibility',
    '<td style="position: relative; left: -3rem">cut</td>': 'verdict not readable: <td style="position',
    "<td> </td>": "verdict not readable: <td> </td>",
}


def test_what_a_reader_would_stumble_over_is_a_fault(check: Check) -> None:
    path = page("".join(FAULTS))
    text = path.read_text().replace("</tr></thead>", f"{next(iter(ROWS))}</tr></thead>")
    path.write_text(text.replace("<td>holds</td>", "<td>holds</td></tr><tr>" + "</tr><tr>".join([*ROWS][1:])))
    found = check(path)
    for words in [*FAULTS.values(), *ROWS.values()]:
        assert any(problem.startswith(words) for problem in found), words
    assert not any("holds</td>" in problem for problem in found)


def test_a_page_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.html is not a file"):
        check_page(Path("nowhere.html"))
