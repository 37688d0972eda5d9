"""What changes while a run goes on, and how it is brought to a checkpoint and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpnopt.experiments import files, models, optimizers
from ddpnopt.experiments.config import TrainConfig
from ddpnopt.experiments.data import Source
from ddpnopt.experiments.runs import differences
from ddpnopt.experiments.team import Team


@dataclass
class Job:
    """The moving parts of a run; with torch's random state, all that a checkpoint needs.

    Attributes:
        model: the network.
        optimizer: what trains it.
        criterion: the loss, mean over the batch.
        step: steps taken.
        seconds: time spent in them.
        pending: losses of the batches since the last line of metrics.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: nn.Module
    step: int = 0
    seconds: float = 0.0
    pending: list[float] = field(default_factory=list)


def start(config: TrainConfig, source: Source) -> Job:
    """Return the job of a run that has taken no step yet; ``config`` is resolved."""
    model = models.build(str(config.model), source, config.seed)
    criterion = nn.CrossEntropyLoss()
    return Job(model, optimizers.build(config, model, criterion), criterion)


def save(job: Job, config: TrainConfig, folder: Path, metrics: files.Metrics) -> None:
    """Write the checkpoint; the metrics up to it reach the disk first."""
    files.save_checkpoint(
        folder / files.CHECKPOINT,
        {
            "config": asdict(config),
            "step": job.step,
            "seconds": job.seconds,
            "pending": job.pending,
            "metrics_size": metrics.sync(),
            "random": torch.get_rng_state(),
            "model": job.model.state_dict(),
            "optimizer": job.optimizer.state_dict(),
        },
    )


def restore(job: Job, config: TrainConfig, folder: Path, team: Team) -> int:
    """Bring a new job, and torch's random state, to the folder's checkpoint, if rank 0 finds one.

    Returns:
        How many bytes of ``metrics.jsonl`` belong to the checkpoint; 0 without one.
    """
    saved = team.from_first(lambda: _read(config, folder))
    if saved is None:
        return 0
    with team.together():
        job.model.load_state_dict(saved["model"])
        job.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        job.step, job.seconds, job.pending = saved["step"], saved["seconds"], list(saved["pending"])
        return int(saved["metrics_size"])


def _read(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    path = folder / files.CHECKPOINT
    if not path.exists():
        return None
    saved = files.load_checkpoint(path)
    changed = differences(saved["config"], asdict(config))
    if changed:
        raise ValueError(f"{path} was made with other settings ({changed}); restore {files.CONFIG}")
    return saved


@contextmanager
def own_random_state(seed: int, threads: int) -> Iterator[None]:
    """Seed torch's generator and set its threads; both are the caller's again afterwards."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
