from pathlib import Path
from typing import Any

import pytest

from ddpnopt.experiments.study import database_lab
from ddpnopt.experiments.study.database_lab import DatabaseLab, Progress
from ddpnopt.experiments.study.display import RunsDisplay
from ddpnopt.experiments.study.store import ATTEMPTS, Store
from ddpnopt.experiments.study.task import Task
from experiments import toy_kinds as toy
from experiments.study_tools import keys


def test_results_come_in_order_and_are_computed_once(store: Store, tmp_path: Path) -> None:
    seen: list[Progress] = []
    tasks = [*toy.squares(tmp_path, 5), *toy.squares(tmp_path, 5)[::-1]]
    lab = DatabaseLab(store, "toy", toy.NAME, 2, seen.append)
    assert [result["square"] for result in lab.execute(tasks)] == [0, 1, 4, 9, 16, 16, 9, 4, 1, 0]
    assert (lab.computed, len(lab.tasks)) == (5, 5)
    assert (seen[0], seen[-1]) == (Progress(5, 0, 0, 0), Progress(5, 0, 5, 0))
    again = DatabaseLab(store, "other", toy.NAME, 0)
    assert again.execute(tasks) == lab.execute(tasks)
    assert again.computed == 0
    assert len(toy.log(tmp_path)) == 10


def test_tasks_that_must_be_alone_run_one_by_one_after_the_others(store: Store, tmp_path: Path) -> None:
    alone = [toy.task("alone", {"n": n, "folder": str(tmp_path), "sleep": 0.1}) for n in range(10, 13)]
    DatabaseLab(store, "toy", toy.NAME, 3).execute([*alone, *toy.squares(tmp_path, 4, sleep=0.1)])
    log = [(what, int(number)) for what, number, _ in toy.log(tmp_path)]
    assert all(number < 10 for _, number in log[:8])
    assert [what for what, _ in log[8:]] == ["started", "ended"] * 3
    assert [number for _, number in log[8::2]] == [number for _, number in log[9::2]]


def test_failed_runs_are_named_once_the_others_are_done_and_tried_again_by_the_next_command(
    store: Store, tmp_path: Path
) -> None:
    bad, nan = toy.task("fail", {"n": 7, "folder": str(tmp_path)}), toy.task("nan", {})
    tasks = [bad, nan, *toy.squares(tmp_path, 6)]
    message = r'2 of 8 runs failed; the first: fail .*"n": 7.*nothing good comes of 7; the same command tries .* again'
    with pytest.raises(ValueError, match=message):
        DatabaseLab(store, "toy", toy.NAME, 2).execute(tasks)
    assert store.counts(keys(tasks)) == {"waiting": 0, "running": 0, "done": 6, "failed": 2}
    assert "not JSON compliant" in str(store.runs([nan.key])[nan.key].error)
    assert [number for _, number, _ in toy.log(tmp_path)].count("7") == 1
    (tmp_path / "well").touch()
    assert DatabaseLab(store, "toy", toy.NAME, 1).execute([bad]) == [{}]


def test_a_task_that_ends_its_workers_fails_in_the_end(store: Store, tmp_path: Path) -> None:
    bad = toy.task("stop", {"n": 100, "folder": str(tmp_path)})
    tasks = [bad, *toy.squares(tmp_path, 4)]
    with pytest.raises(ValueError, match=f"1 of 5 runs failed.*{ATTEMPTS} workers died over it"):
        DatabaseLab(store, "toy", toy.NAME, 1).execute(tasks)
    assert sum(number == "100" for _, number, _ in toy.log(tmp_path)) == ATTEMPTS
    assert store.counts(keys(tasks))["done"] == 4


def test_a_stop_gives_the_runs_at_hand_back_and_the_next_command_goes_on(store: Store, tmp_path: Path) -> None:
    tasks = toy.squares(tmp_path, 4, sleep=0.5)
    lab = DatabaseLab(store, "toy", toy.NAME, 2, stop=lambda: len(toy.log(tmp_path)) >= 2)
    with pytest.raises(KeyboardInterrupt):
        lab.execute(tasks)
    count = store.counts(keys(tasks))
    assert count["running"] == 0
    assert count["waiting"] >= 2
    assert [result["square"] for result in DatabaseLab(store, "toy", toy.NAME, 2).execute(tasks)] == [0, 1, 4, 9]


def test_source_that_changes_under_a_command_ends_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = toy.squares(tmp_path, 1)
    monkeypatch.setattr(toy, "task", lambda kind, settings: Task(kind, settings, "newer code"))
    lab = DatabaseLab(store, "toy", toy.NAME, 1)
    with pytest.raises(ValueError, match=r"not made by experiments\.toy_kinds\.task as it is now"):
        lab.execute(old)
    with pytest.raises(ValueError, match="source of these runs was changed"):
        lab.execute(toy.squares(tmp_path, 1))
    assert toy.log(tmp_path) == []


def test_workers_that_cannot_start_are_not_started_for_ever(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_lab, "serve", lambda *_: None)  # cannot be found by a new process
    monkeypatch.setattr(database_lab, "_context", lambda _: Idle())
    with pytest.raises(ValueError, match="workers ended one after another"):
        DatabaseLab(store, "toy", toy.NAME, 2).execute(toy.squares(tmp_path, 1))


class Idle:
    """A process that has ended before it began."""

    exitcode = 1

    def Process(self, **_: Any) -> "Idle":
        return self

    def start(self) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def join(self, timeout: float = 0) -> None: ...
    def is_alive(self) -> bool:
        return False


def test_progress_in_a_log_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with RunsDisplay() as display:
        display.start("toy")
        for done in range(4):
            display(Progress(4, 0, done, done // 3))
    assert capsys.readouterr().err.splitlines() == ["toy: 0 of 4 runs", "toy: 4 of 4 runs, 1 failed"]
