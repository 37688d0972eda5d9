"""What a run folder means: whose settings it holds, and how its run ended."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpnopt.experiments import files
from ddpnopt.experiments.config import TrainConfig, from_dict
from ddpnopt.experiments.environment import environment


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        status: ``"finished"`` or ``"diverged"``.
        reason: why it diverged, else None.
        steps: steps taken.
        train_loss: mean loss over the whole train part at the last weights; None where it is not finite.
        train_accuracy, validation_accuracy, test_accuracy: of the last weights, from 0 to 1.
        seconds: spent in training steps, evaluation and files not counted.
    """

    status: str
    reason: str | None
    steps: int
    train_loss: float | None
    train_accuracy: float
    validation_accuracy: float
    test_accuracy: float
    seconds: float


def prepare(config: TrainConfig, folder: Path, ranks: int = 1) -> str | None:
    """Make the folder of a run, or check that an existing one belongs to it.

    Args:
        config: resolved settings.
        folder: the run folder.
        ranks: processes that share each batch.

    Returns:
        A note where an unfinished run began with other versions, code or ranks than it would go on with.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    path, now = folder / files.CONFIG, environment(config.threads, ranks)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / files.ENVIRONMENT, now)
        files.write_json(path, asdict(config))  # last: a folder with settings is complete
        return None
    changed = differences(asdict(read_config(folder)), asdict(config))
    if changed:
        raise ValueError(f"{path} has other settings ({changed}); take another folder")
    other = differences(files.read_json(folder / files.ENVIRONMENT), now)
    if not other or (folder / files.RESULT).exists():
        return None
    return f"note: this run began otherwise ({other}); bit-exact continuation is not promised"


def read_config(folder: Path) -> TrainConfig:
    """Read the settings of a run folder; a folder that is none, or is damaged, is refused by name."""
    path = folder / files.CONFIG
    try:
        return from_dict(files.read_json(path), str(path))
    except TypeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder and start the run again") from error


def finish(folder: Path, result: Result) -> None:
    """Record how the run ended."""
    files.write_json(folder / files.RESULT, asdict(result))


def finished(folder: Path) -> Result | None:
    """Return the result of a run folder, or None where the run has not come to its end."""
    path = folder / files.RESULT
    if not path.exists():
        return None
    try:
        return Result(**files.read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and resume the run") from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the entries in which two mappings differ, with both values; empty where they agree."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)!r} against {new.get(key)!r}" for key in keys)
