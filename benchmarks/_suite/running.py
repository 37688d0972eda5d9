"""One run of the suite: settings in, figures out, nothing written."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ddpnopt.experiments.environment import code
from ddpnopt.experiments.job import own_random_state

from . import tasks
from .methods import Place, defaults, start
from .registration import Method, Size, Task

EARLY_SHARE, EARLY_EVERY, LATE_EVERY = 0.2, 0.01, 0.05  # of the steps
FAILURES = (ArithmeticError, RuntimeError, ValueError)  # what optimizers raise where numbers are not finite


@dataclass(frozen=True)
class Run:
    """A run to carry out; initial weights and order of the samples depend on its seed alone."""

    task: Task
    budget: str
    method: Method
    lr: float
    options: Mapping[str, Any]
    seed: int

    @property
    def size(self) -> Size:
        """How large the task is."""
        return self.task.sizes[self.budget]

    def settings(self) -> dict[str, Any]:
        """All that decides the run's numbers, as plain values."""
        return {
            "task": self.task.name,
            "budget": self.budget,
            "size": {name: value for name, value in asdict(self.size).items() if name not in ("seeds", "ablation")},
            "method": self.method.name,
            "lr": self.lr,
            "options": dict(self.options),
            "defaults": defaults(self.method, self.options, single=tasks.single(self.task.data)),
            "seed": self.seed,
        }


def marks(steps: int) -> tuple[int, ...]:
    """Steps after which a run is scored: often at first, then seldom; the last is the run's end."""
    often, seldom = (max(1, math.ceil(share * steps)) for share in (EARLY_EVERY, LATE_EVERY))
    switch = math.floor(EARLY_SHARE * steps)
    return tuple(sorted({*range(often, switch + 1, often), *range(switch + seldom, steps, seldom), steps}))


def train(run: Run, folder: Path | None = None) -> dict[str, Any]:
    """Carry out a run on one thread.

    Args:
        run: what to do.
        folder: of the files of sets that are not bundled.

    Returns:
        ``validation``: score in percent at each of ``marks``, up to where it diverged; ``test``: at the end, or None;
        ``loss``: of the validation part at the end, or None; ``diverged``: False, or what went wrong; ``seconds``
        spent in steps; ``wall``: in all; ``torch``: its version; ``code``: fingerprint of the library's source.
    """
    began = time.perf_counter()
    size, samples = run.size, tasks.load(run.task.data, run.size, folder)
    validation: list[float] = []
    test = loss = None
    with own_random_state(run.seed, threads=1):
        model = tasks.build(run.task, size, samples, run.seed)
        work = start(run.method, Place(model, samples.criterion, size.batch, run.lr), run.options)
        seconds, diverged = 0.0, ""
        stream, due = tasks.batches(samples, size.batch, run.seed), set(marks(size.steps))
        for step in range(1, size.steps + 1):
            x, y = next(stream)
            before = time.perf_counter()
            try:
                work.step(x, y, samples.criterion, 1 - (step - 1) / size.steps)
            except FAILURES as error:
                diverged = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                break
            seconds += time.perf_counter() - before
            if step in due:
                with work.evaluated() as judged:
                    found, value = tasks.score(judged, samples, samples.validation)
                if not math.isfinite(value):
                    diverged = "loss not finite"
                    break
                validation.append(round(found, 4))
        else:
            loss = value
            with work.evaluated() as judged:
                test = _finite(tasks.score(judged, samples, samples.test)[0])
    return {
        "validation": validation,
        "test": test,
        "loss": None if loss is None else float(f"{loss:.6g}"),
        "diverged": diverged,
        "seconds": round(seconds, 3),
        "wall": round(time.perf_counter() - began, 3),
        "torch": torch.__version__,
        "code": code(),
    }


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
