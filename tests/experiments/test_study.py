import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

from ddpnopt.experiments.study import database_lab, identity, search
from ddpnopt.experiments.study import store as store_module
from ddpnopt.experiments.study.database_lab import DatabaseLab, Progress
from ddpnopt.experiments.study.display import RunsDisplay
from ddpnopt.experiments.study.lab import DirectLab, Params
from ddpnopt.experiments.study.store import ATTEMPTS, Store
from ddpnopt.experiments.study.task import Kind, Task
from ddpnopt.experiments.study.worker import codes, work
from experiments import toy_kinds as toy

CODES = codes(toy)
ONE, OTHER = "elsewhere:1:1", "elsewhere:2:2"  # workers on a machine of which nothing is known


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study/runs.db"


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with Store(address) as opened:
        yield opened


def keys(tasks: list[Task]) -> list[str]:
    return [task.key for task in tasks]


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def share_out(address: str, folder: Path) -> None:
    """Sixty runs by two processes: every one exactly once."""
    tasks = toy.squares(folder, 60, sleep=0.01)
    with Store(address) as store:
        store.add("toy", tasks)
        hand_out(store, tasks, folder)


def hand_out(store: Store, tasks: list[Task], folder: Path) -> None:
    line = "import sys; from experiments import toy_kinds as toy; toy.work_off(sys.argv[1])"
    workers = [subprocess.Popen([sys.executable, "-c", line, store.address], env=environment()) for _ in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert Counter(number for what, number, _ in toy.log(folder) if what == "started") == {str(n): 1 for n in range(60)}
    assert {key: result["square"] for key, result in store.results(keys(tasks)).items()} == {
        task.key: n * n for n, task in enumerate(tasks)
    }
    assert len({process for _, _, process in toy.log(folder)}) == 2


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def test_two_workers_run_every_task_exactly_once(address: str, tmp_path: Path) -> None:
    share_out(address, tmp_path)


class Disturbed:
    """A coordinator that is started again whenever it was killed, and what its database holds."""

    def __init__(self, address: str, folder: Path, count: int) -> None:
        self.folder = folder
        self._words = [sys.executable, "-m", toy.NAME, address, str(folder), str(count)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._words, env=environment(), stdout=subprocess.PIPE, text=True)

    def kill(self) -> None:
        assert self.process.poll() is None
        self.end()
        self.start()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()  # its workers, which end their runs meanwhile, hold the other end

    def kill_worker(self) -> None:
        """Kill the process that began the latest run, once it begins another."""
        before = len(toy.log(self.folder))
        until(lambda: any(what == "started" for what, _, _ in toy.log(self.folder)[before:]))
        os.kill(int(toy.log(self.folder)[-1][2]), signal.SIGKILL)

    def rows(self, query: str) -> list[Any]:
        try:
            with sqlite3.connect(self.folder / "study" / "runs.db", timeout=30) as connection:
                return connection.execute(query).fetchall()
        except sqlite3.OperationalError:  # no table yet
            return []
        finally:
            connection.close()

    def done(self) -> dict[str, Any]:
        return {
            row[0]: row[1:] for row in self.rows("SELECT key, started, finished, result FROM runs WHERE state='done'")
        }


def test_ten_kills_at_random_moments_lose_and_repeat_nothing(address: str, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "calm").mkdir()
    count, draw = 150, random.Random(0)
    run = Disturbed(address, tmp_path, count)
    until(lambda: run.rows("SELECT 1 FROM trials WHERE number = 2"))
    run.kill()  # while the search is asking
    for what in draw.sample([run.kill] * 3 + [run.kill_worker] * 6, 9):
        before = len(toy.log(tmp_path))
        until(lambda: len(toy.log(tmp_path)) > before)  # noqa: B023
        time.sleep(draw.uniform(0.0, 0.2))
        finished = run.done()
        what()
        assert finished.items() <= run.done().items()
    assert 0 < len(run.done()) < count  # it was disturbed until the end
    finished = run.done()
    outcome = json.loads(run.process.communicate(timeout=120)[0])
    assert outcome == toy.experiment(DirectLab(toy.KINDS), tmp_path / "calm", count, sleep=0.0)
    assert finished.items() <= run.done().items()
    assert len(run.done()) == count + 8
    assert run.rows("SELECT state, count(*) FROM trials GROUP BY state") == [("COMPLETE", 8)]


@pytest.mark.skipif(sys.platform != "linux", reason="process start times are read from /proc")
def test_workers_finish_their_run_and_end_when_their_coordinator_is_killed(address: str, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    run = Disturbed(address, tmp_path, 400)
    until(lambda: len(toy.log(tmp_path)) > 30)
    run.end()
    workers = {int(process) for _, _, process in toy.log(tmp_path)}
    until(lambda: not any(map(identity._birth, workers)), 10)
    what = Counter(word for word, _, _ in toy.log(tmp_path))
    assert what["started"] == what["ended"] == len(run.done()) < 400


def expire(store: Store, folder: Path) -> None:
    """A lease of 0.3 s runs out: the next worker's result stands."""
    (task,) = toy.squares(folder, 1)
    store.add("toy", [task])
    assert store.claim(ONE, CODES) is not None
    for _ in range(5):
        time.sleep(0.1)
        assert store.beat(task.key, ONE)
        assert store.claim(OTHER, CODES) is None
    time.sleep(0.4)
    assert store.claim(OTHER, CODES) is not None
    assert not store.beat(task.key, ONE)
    assert not store.finish(task.key, ONE, '{"square": 1}', 1.0)
    assert not store.fail(task.key, ONE, "too late", 1.0)
    assert not store.release(task.key, ONE)
    assert store.finish(task.key, OTHER, '{"square": 2}', 1.0)
    assert not store.finish(task.key, ONE, '{"square": 1}', 1.0)
    assert store.results([task.key]) == {task.key: {"square": 2}}
    assert store.claim(ONE, CODES) is None


def test_a_lease_that_ran_out_hands_the_task_to_another_whose_result_stands(address: str, tmp_path: Path) -> None:
    with Store(address, lease=0.3) as store:
        expire(store, tmp_path)


def test_a_worker_keeps_its_lease_while_a_run_is_long(store: Store, tmp_path: Path) -> None:
    store.lease = 0.4

    def steal(settings: object) -> dict[str, Any]:
        time.sleep(1.0)
        return {"stolen": store.claim(OTHER, CODES) is not None}

    tasks = toy.squares(tmp_path, 1)
    store.add("toy", tasks)
    assert work(store, {"square": Kind(steal, ())}, CODES, wait=0) == 1
    assert store.results(keys(tasks)) == {tasks[0].key: {"stolen": False}}


@pytest.mark.skipif(sys.platform != "linux", reason="process start times are read from /proc")
def test_the_task_of_a_process_that_ended_on_this_machine_is_handed_out_at_once(store: Store, tmp_path: Path) -> None:
    place, number, birth = identity.own().split(":")
    assert not identity.gone(f"{place}:{number}:{birth}")
    assert not identity.gone(f"elsewhere:{number}:1")
    store.add("toy", toy.squares(tmp_path, 1))
    assert store.claim(f"{place}:{number}:{int(birth) - 1}", CODES) is not None  # its number was given again
    assert store.claim(OTHER, CODES) is not None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        name = f"{place}:{child.pid}:{identity._birth(child.pid)}"
        assert not identity.gone(name)
        child.kill()
        until(lambda: identity.gone(name), 10)  # although nobody has asked for its exit code yet


def test_interrupted_work_is_given_back(store: Store, tmp_path: Path) -> None:
    def interrupt(settings: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    tasks = toy.squares(tmp_path, 1)
    store.add("toy", tasks)
    for _ in range(ATTEMPTS + 1):  # which is no fault of the task
        with pytest.raises(KeyboardInterrupt):
            work(store, {"square": Kind(interrupt, ())}, CODES, wait=0)
        assert store.counts(keys(tasks)) == {"waiting": 1, "running": 0, "done": 0, "failed": 0}
    store.lease = 0.0
    assert store.claim(ONE, CODES) is not None
    assert store.claim(OTHER, CODES) is not None


def test_a_worker_waits_while_others_run_and_takes_only_its_study_and_code(store: Store, tmp_path: Path) -> None:
    mine, theirs = toy.squares(tmp_path, 2), toy.squares(tmp_path, 2, other=True)
    store.add("mine", mine)
    store.add("theirs", theirs)
    store.add("mine", [Task("square", {"n": 0}, "older code")])
    assert work(store, toy.KINDS, CODES, "mine", wait=0) == 2
    assert store.counts(keys(mine))["done"] == 2
    assert store.counts(keys(theirs))["waiting"] == 2
    claim = store.claim(ONE, CODES)
    assert claim is not None
    threading.Timer(0.5, lambda: store.release(claim.key, ONE)).start()
    assert work(store, toy.KINDS, CODES, wait=0.1) == 2  # also the one that was given back after longer than that


def test_known_tasks_are_added_once_and_waiting_ones_move_to_the_study_that_asks(store: Store, tmp_path: Path) -> None:
    tasks = toy.squares(tmp_path, 3)
    for _ in range(2):
        store.add("old", tasks)
    work(store, toy.KINDS, CODES, "old", wait=0)
    more = toy.squares(tmp_path, 6)
    store.add("old", more)
    store.add("new", more[3:5])
    assert store.counts(keys(more)) == {"waiting": 3, "running": 0, "done": 3, "failed": 0}
    store.forget_others("new", [more[3].key])
    assert not store.runs([more[4].key])
    assert work(store, toy.KINDS, CODES, "new", wait=0) == 1
    store.forget_others("old", [])
    assert store.counts(keys(more)) == {"waiting": 0, "running": 0, "done": 4, "failed": 0}


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


Trials = dict[str, list[tuple[int, str, Params, float | None]]]


def trials(address: str) -> Trials:
    found, some = {}, optuna.samplers.RandomSampler()
    for summary in optuna.get_all_study_summaries(address):
        study = optuna.load_study(study_name=summary.study_name, storage=address, sampler=some)
        found[summary.study_name] = [(one.number, one.state.name, one.params, one.value) for one in study.trials]
    return found


def score(asked: list[tuple[str, Params]]) -> list[float]:
    return [-math.inf if params["a"] > 2 else -abs(params["a"] - 1.5) for _, params in asked]


def test_a_search_is_resumed_with_the_same_trials_and_choice(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = store.address
    calm = f"sqlite:///{tmp_path}/calm.db"
    choice = search.search(calm, "toy", CODES, toy.GRIDS, score)
    assert choice == DirectLab({}).search(toy.GRIDS, score)
    counted = {name.rpartition(" ")[0]: len(some) for name, some in trials(calm).items()}
    assert counted == {"toy first": 6, "toy second": 2}
    whole, asked, told = optuna.trial.Trial.suggest_float, [0], [0]

    def die_asking(*arguments: Any, **options: Any) -> float:
        asked[0] += 1
        if asked[0] == 6:  # one of two hyper-parameters of the third trial
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    tell = optuna.Study.tell

    def die_telling(*arguments: Any, **options: Any) -> Any:
        told[0] += 1
        if told[0] == 4:
            raise KeyboardInterrupt
        return tell(*arguments, **options)

    for method, dies in (("suggest_float", die_asking), ("tell", die_telling)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(optuna.trial.Trial if dies is die_asking else optuna.Study, method, dies)
            search.search(address, "toy", CODES, toy.GRIDS, score)
    assert {state for some in trials(address).values() for _, state, _, _ in some} == {"COMPLETE", "RUNNING"}
    for _ in range(2):
        assert search.search(address, "toy", CODES, toy.GRIDS, score) == choice
        assert trials(address) == trials(calm)
    search.search(address, "toy", CODES | {"square": "newer code"}, toy.GRIDS, score)
    assert len(trials(address)) == 4


def test_a_value_that_is_no_number_is_a_failed_trial_and_a_doubled_one_is_refused(store: Store) -> None:
    address = store.address
    grids = {"some": {"a": (1.0, 2.0)}}
    assert search.search(address, "toy", 1, grids, lambda _: [0.0, math.nan]) == {"some": {"a": 1.0}}
    assert [state for some in trials(address).values() for _, state, _, _ in some].count("FAIL") == 1
    with pytest.raises(ValueError, match="names a value twice"):
        search.search(address, "toy", 1, {"some": {"a": (1.0, 1.0)}}, lambda _: [0.0, 0.0])


def test_a_search_outlives_connections_that_are_dropped_during_the_runs(store: Store) -> None:
    opened: list[sqlite3.Connection] = []

    def drop(asked: list[tuple[str, Params]]) -> list[float]:
        for connection in opened:
            connection.close()
        return score(asked)

    def remember(connection: sqlite3.Connection, _: Any) -> None:
        opened.append(connection)

    event.listen(Engine, "connect", remember)
    try:
        choice = search.search(store.address, "toy", CODES, toy.GRIDS, drop)
    finally:
        event.remove(Engine, "connect", remember)
    assert choice == DirectLab({}).search(toy.GRIDS, score)
    assert {state for some in trials(store.address).values() for _, state, _, _ in some} == {"COMPLETE"}


@pytest.mark.parametrize(
    "error",
    [OperationalError("", {}, sqlite3.OperationalError("away")), optuna.exceptions.StorageInternalError("away")],
)
def test_a_search_whose_storage_goes_away_says_so_and_is_continued(
    store: Store, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="does not answer; what it holds is kept"):
        patch.setattr(optuna.Study, "tell", away)
        search.search(store.address, "toy", CODES, toy.GRIDS, score)
    choice = search.search(store.address, "toy", CODES, toy.GRIDS, score)
    assert choice == DirectLab({}).search(toy.GRIDS, score)
    assert sum(len(some) for some in trials(store.address).values()) == 8


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mysql://somewhere/runs", "mysql is not supported; use sqlite:///"),
        ("nonsense", "cannot be read; use sqlite:///"),
        ("sqlite+nothing:///runs.db", "cannot be read; use sqlite:///"),
        ("sqlite://", "is no file"),
        ("sqlite:///.", "unable to open database file"),
    ],
)
def test_addresses_that_will_not_do_are_refused(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Store(address)


def test_a_password_is_not_shown() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(ValueError, match="does not answer") as caught:
        Store("postgresql+psycopg://me:secret@localhost:1/runs")
    assert "secret" not in str(caught.value)


def test_a_database_that_is_away_for_a_moment_is_asked_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, calls = store._engine.begin, [0]

    def unsteady() -> Any:
        calls[0] += 1
        if calls[0] < 3:
            raise OperationalError("", {}, sqlite3.OperationalError("away"))
        return begin()

    monkeypatch.setattr(store._engine, "begin", unsteady)
    monkeypatch.setattr(store_module, "_PAUSES", (0.0, 0.0))
    assert store.runs(["some key"]) == {}
    calls[0] = -1
    with pytest.raises(ValueError, match=r"does not answer \(away\)"):
        store.runs(["some key"])


def test_progress_in_a_log_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with RunsDisplay() as display:
        display.start("toy")
        for done in range(4):
            display(Progress(4, 0, done, done // 3))
    assert capsys.readouterr().err.splitlines() == ["toy: 0 of 4 runs", "toy: 4 of 4 runs, 1 failed"]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *filter(None, [Path(shutil.which("initdb") or "")])]
    folder = next((path.resolve().parent for path in found if path.is_file()), None)
    if folder is None:
        pytest.skip("PostgreSQL's server is not installed")
    place = Path(tempfile.mkdtemp(prefix="study", dir="/tmp"))  # its socket's path must be short
    user: dict[str, Any] = {"cwd": place}
    if os.geteuid() == 0:  # as which the server refuses to run
        shutil.chown(place, "postgres", "postgres")
        user |= {"user": "postgres", "group": "postgres", "extra_groups": []}

    def program(name: str, *words: str) -> None:
        subprocess.run([folder / name, "-D", place / "data", *words], check=True, stdout=subprocess.DEVNULL, **user)

    program("initdb", "-A", "trust", "-U", "study", "--no-sync")
    program("pg_ctl", "-w", "-l", str(place / "log"), "-o", f"-F -k {place} -c listen_addresses=''", "start")
    try:
        yield f"postgresql+psycopg://study@/postgres?host={place}"
    finally:
        program("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(place)


def test_postgresql_serves_two_workers_and_a_lab(postgresql: str, tmp_path: Path) -> None:
    for name in ("shared", "lab", "calm"):
        (tmp_path / name).mkdir()
    share_out(postgresql, tmp_path / "shared")
    with Store(postgresql) as store:
        outcome = toy.experiment(DatabaseLab(store, "toy", toy.NAME, 2), tmp_path / "lab", 10)
    assert outcome == toy.experiment(DirectLab(toy.KINDS), tmp_path / "calm", 10, sleep=0.0)
    with Store(postgresql, lease=0.3) as store:
        expire(store, tmp_path)
