import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _postgresql import programs, server
from sqlalchemy.exc import OperationalError

from ddpnopt.experiments.study import identity
from ddpnopt.experiments.study import store as store_module
from ddpnopt.experiments.study.database_lab import DatabaseLab
from ddpnopt.experiments.study.lab import DirectLab
from ddpnopt.experiments.study.store import ATTEMPTS, Store
from ddpnopt.experiments.study.task import Kind, Task
from ddpnopt.experiments.study.worker import work
from experiments import toy_kinds as toy
from experiments.study_tools import CODES, ONE, OTHER, environment, expire, keys, share_out, until


def test_two_workers_run_every_task_exactly_once(address: str, tmp_path: Path) -> None:
    share_out(address, tmp_path)


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


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    if programs() is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    with server() as place:
        yield f"postgresql+psycopg://study@/postgres?host={place}"


def test_postgresql_serves_two_workers_and_a_lab(postgresql: str, tmp_path: Path) -> None:
    for name in ("shared", "lab", "calm"):
        (tmp_path / name).mkdir()
    share_out(postgresql, tmp_path / "shared")
    with Store(postgresql) as store:
        outcome = toy.experiment(DatabaseLab(store, "toy", toy.NAME, 2), tmp_path / "lab", 10)
    assert outcome == toy.experiment(DirectLab(toy.KINDS), tmp_path / "calm", 10, sleep=0.0)
    with Store(postgresql, lease=0.3) as store:
        expire(store, tmp_path)


def test_postgresql_hands_the_run_of_a_killed_worker_to_another(postgresql: str, tmp_path: Path) -> None:
    (long,) = toy.squares(tmp_path, 1, sleep=60.0)
    with Store(postgresql) as store:
        store.add("kill", [long])
        line = "import sys; from experiments import toy_kinds as toy; toy.work_off(sys.argv[1])"
        worker = subprocess.Popen([sys.executable, "-c", line, postgresql], env=environment())
        until(lambda: toy.log(tmp_path))
        worker.kill()
        worker.wait()
        assert store.counts([long.key])["running"] == 1
        assert store.claim(OTHER, CODES, "kill") is not None
        assert store.finish(long.key, OTHER, '{"square": 0}', 1.0)
    assert [what for what, _, _ in toy.log(tmp_path)] == ["started"]
