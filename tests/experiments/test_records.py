import json
from pathlib import Path
from typing import Any

import pytest

from ddpnopt.experiments import cli
from ddpnopt.experiments.paper import commands
from ddpnopt.experiments.paper.registry import Experiment
from ddpnopt.experiments.report.section import Section
from ddpnopt.experiments.study import records
from ddpnopt.experiments.study.lab import Lab
from ddpnopt.experiments.study.store import Run, Store
from ddpnopt.experiments.study.task import Task
from ddpnopt.experiments.study.worker import codes
from experiments import toy_kinds as toy

CODES = codes(toy, alone=False)
TIMED = codes(toy, alone=True)
RECORDS = Path("runs/paper/records/toy.jsonl")
ADDRESS = "sqlite:///elsewhere/runs.db"


def section(lab: Lab, quick: bool) -> Section:
    folder = str(Path.cwd())
    total = sum(result["square"] for result in lab.execute(toy.squares(Path.cwd(), 5)))
    (alone,) = lab.execute([toy.task("alone", {"n": 9, "folder": folder})])
    return Section("toy", "Toy", [f"{total} and {alone['square']}"], [], [], (), [])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An experiment's records, on disk, and no other trace of it."""
    monkeypatch.setattr(commands, "EXPERIMENTS", {"toy": Experiment("Squares.", section)})
    monkeypatch.setattr(commands, "_KINDS", toy.NAME)
    assert cli.main(["toy", "--jobs", "2"]) == 0
    Path("runs/paper/runs.db").unlink()
    Path("log").unlink()
    return [json.loads(line) for line in RECORDS.read_text().splitlines()]


def write(lines: list[dict[str, Any]]) -> None:
    RECORDS.write_text("".join(json.dumps(line) + "\n" for line in lines))


def taken_over(*words: str) -> int:
    return cli.main(["import", "runs/paper/records", "--storage", ADDRESS, *words])


def test_what_a_report_recorded_is_not_computed_again(
    recorded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    before, page = RECORDS.read_bytes(), Path("runs/paper/toy/toy.md").read_bytes()
    assert taken_over("--timings") == 0
    assert "toy.jsonl: 6 runs taken over, 0 known\n" in capsys.readouterr().out
    assert cli.main(["toy", "--storage", ADDRESS]) == 0
    assert "this call computed 0 of them" in capsys.readouterr().out
    assert toy.log(Path.cwd()) == []
    assert RECORDS.read_bytes() == before
    assert Path("runs/paper/toy/toy.md").read_bytes() == page
    assert taken_over("--timings") == 0
    assert "toy.jsonl: 0 runs taken over, 6 known\n" in capsys.readouterr().out


def test_times_of_another_machine_are_taken_only_where_they_are_asked_for(
    recorded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert taken_over() == 0
    left = "left out: 1 that measure time or memory (--timings takes them)"
    assert f"toy.jsonl: 5 runs taken over, 0 known; {left}\n" in capsys.readouterr().out
    assert cli.main(["toy", "--storage", ADDRESS]) == 0
    assert "this call computed 1 of them" in capsys.readouterr().out


def test_runs_of_other_code_and_failed_ones_are_left_out_and_counted(
    recorded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    alone, *squares = recorded
    assert alone["kind"] == "alone"
    squares[0]["code"] = "older code"
    squares[1]["kind"] = "forgotten"
    squares[2]["result"] = None
    write([alone | {"code": "older code"}, *squares])
    assert taken_over() == 0
    words = "3 made by other source or another torch, 1 that failed"
    assert f"toy.jsonl: 2 runs taken over, 0 known; left out: {words}\n" in capsys.readouterr().out


def test_records_that_are_all_of_other_code_are_refused(
    recorded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    write([line | {"code": "older code"} for line in recorded])
    assert taken_over("--timings") == 2
    said = capsys.readouterr()
    assert "0 runs taken over, 0 known; left out: 6 made by other source or another torch" in said.out
    assert "none of these runs can stand for one of this installation" in said.err


def test_a_run_that_is_finished_or_under_way_stays_as_it_is(tmp_path: Path) -> None:
    tasks = toy.squares(tmp_path, 4)
    with Store(ADDRESS) as store:
        store.add("toy", tasks)
        by_key = {}
        for _ in range(3):
            claim = store.claim("elsewhere:1:1", CODES)
            assert claim is not None
            by_key[claim.key] = claim
        first, second, third = by_key
        store.finish(first, "elsewhere:1:1", '{"square": 1000}', 1.0)
        store.fail(second, "elsewhere:1:1", "went wrong", 1.0)
        path = tmp_path / "toy.jsonl"
        path.write_bytes(records.lines(tasks, {task.key: Run("done", {"square": 5}, None, 2.0) for task in tasks}))
        assert records.take(store, path, CODES, TIMED) == records.Taken(2, 2, 0, 0, 0)
        states = {key: run.state for key, run in store.runs([task.key for task in tasks]).items()}
        assert states.pop(third) == "running"
        assert set(states.values()) == {"done"}
        found = store.results([task.key for task in tasks])
        assert found.pop(first) == {"square": 1000}
        assert store.runs([second])[second] == Run("done", {"square": 5}, None, 2.0)
        assert len(found) == 2
        assert store.finish(third, "elsewhere:1:1", '{"square": 7}', 1.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "square"', "line 2: Expecting"),
        ("[1, 2]", "line 2: not the record of a run"),
        ('{"kind": "square", "settings": {}, "code": "toy code", "result": {}}', "line 2: not the record of a run"),
        (
            '{"kind": 1, "settings": {}, "code": "toy code", "result": {}, "seconds": 1.0}',
            "line 2: not the record of a run",
        ),
        (
            '{"kind": "square", "settings": {}, "code": "toy code", "result": {"square": NaN}, "seconds": 1.0}',
            "line 2: NaN is no number",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_line_and_nothing_of_it_is_taken(
    recorded: list[dict[str, Any]], line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    RECORDS.write_text(json.dumps(recorded[0]) + "\n" + line + "\n")
    assert taken_over("--timings") == 2
    said = capsys.readouterr().err
    assert f"toy.jsonl, {message}" in said
    assert "restore the file from a copy" in said
    with Store(ADDRESS) as store:
        assert not store.unfinished(CODES | TIMED)
        assert store.runs([Task(recorded[0]["kind"], recorded[0]["settings"], recorded[0]["code"]).key]) == {}


def test_places_without_records_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    for place in ("nowhere.jsonl", "empty"):
        assert cli.main(["import", place, "--storage", ADDRESS]) == 2
        assert f"{place} is neither a file of records nor a folder" in capsys.readouterr().err
    assert cli.main(["import", "--storage", ADDRESS]) == 2
    assert "name files of records" in capsys.readouterr().err
    assert not Path("elsewhere").exists()


def test_the_records_of_this_repository_can_be_read() -> None:
    paths = records.files([Path(__file__).parents[2] / "docs/results/paper/records"])
    assert {path.stem for path in paths} == {"table3", "table4", "fig3", "fig4", "fig5", "fig6"}
    for path in paths:
        tasks, runs = zip(*records._read(path), strict=True)
        assert len({task.key for task in tasks}) == len(tasks)
        assert records.lines(tasks, {task.key: run for task, run in zip(tasks, runs, strict=True)}) == path.read_bytes()
