"""Time of a step and peak memory of each method on one task, in one process on one thread."""

import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpnopt.experiments.job import own_random_state

from . import tasks
from .methods import AtWork, Place, start
from .registration import Method, Size, Task
from .tasks import Samples

SMALL_LR = 1e-4  # weights must stay finite; no time depends on it, but for L-BFGS, which may end a step early
WARM_UP = 11  # steps: the state is made, and what is refreshed every ten steps has been twice


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within it that are alive; ``peak`` is the most at a time.

    Each storage counts once, from the operation that makes it to its end. Temporaries inside one operation are not
    seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._alive = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self._alive -= size


def measure(
    task: Task, size: Size, methods: Sequence[Method], rounds: int, steps: int, folder: Path | None = None
) -> dict[str, Any]:
    """Measure methods in turn.

    Returns:
        By method: ``milliseconds`` of processor time of a step, the median over rounds of their means, and
        ``megabytes`` at the peak; both None for one that raises an error.
    """
    samples = tasks.load(task.data, size, folder)
    with own_random_state(0, threads=1):
        megabytes = {method.name: _peak(task, size, samples, method) for method in methods}
        working = [method for method in methods if megabytes[method.name] is not None]
        works = {method.name: _begin(task, size, samples, method) for method in working}
        stream = tasks.batches(samples, size.batch, 0)
        times: dict[str, list[float]] = {name: [] for name in works}
        for work in works.values():
            _advance(work, samples, stream, WARM_UP)
        for _ in range(rounds):
            for name, work in works.items():
                began = time.process_time()
                _advance(work, samples, stream, steps)
                times[name].append(1000 * (time.process_time() - began) / steps)
    return {
        "milliseconds": {m.name: round(median(times[m.name]), 4) if m.name in times else None for m in methods},
        "megabytes": megabytes,
        "torch": torch.__version__,
    }


def _begin(task: Task, size: Size, samples: Samples, method: Method) -> AtWork:
    model = tasks.build(task, size, samples, 0)
    return start(method, Place(model, samples.criterion, size.batch, method.lr or SMALL_LR), method.options())


def _advance(work: AtWork, samples: Samples, stream: Any, steps: int) -> None:
    for _ in range(steps):
        x, y = next(stream)
        work.step(x, y, samples.criterion, 1.0)


def _peak(task: Task, size: Size, samples: Samples, method: Method) -> float | None:
    stream = tasks.batches(samples, size.batch, 0)
    with LiveBytes() as live:
        try:
            _advance(_begin(task, size, samples, method), samples, stream, WARM_UP)
        except Exception:
            return None
    megabytes: float = round(live.peak / 2**20, 3)
    return megabytes
