import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ddpnopt.experiments.study import identity
from ddpnopt.experiments.study.lab import DirectLab
from experiments import toy_kinds as toy
from experiments.study_tools import environment, until


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
