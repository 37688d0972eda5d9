"""What the tests of the study room share: waiting, shared work and a lease that runs out."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpnopt.experiments.study.store import Store
from ddpnopt.experiments.study.task import Task
from ddpnopt.experiments.study.worker import codes
from experiments import toy_kinds as toy

CODES = codes(toy)
ONE, OTHER = "elsewhere:1:1", "elsewhere:2:2"  # workers on a machine of which nothing is known


def keys(tasks: list[Task]) -> list[str]:
    return [task.key for task in tasks]


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def environment() -> dict[str, str]:
    """For new processes: they import the tests, and else what this one imports."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


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
