"""``ddpnopt train`` on several ranks: the run of one process, in one folder, that can be continued on any number."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch

from ddpnopt.experiments import data, runs
from ddpnopt.experiments.config import TrainConfig
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.interrupt import StoppedError
from ddpnopt.experiments.progress import Silent
from ddpnopt.experiments.team import ALONE, ElsewhereError, Team
from ddpnopt.experiments.train import train
from experiments.folders import assert_same_run, metrics, result, tiny

SIZE, AT = 2, 1
UNEVEN = 13  # of 105 samples: the last batch of an epoch is a single one, and rank 1 has nothing
CONFIGS = {
    "ddpnopt": tiny(batch_size=UNEVEN),
    "adapted": tiny(batch_size=UNEVEN, coupling="sample", feedback=False, curvature="adaptive", lr=0.001),
    "adam": tiny(batch_size=UNEVEN, optimizer="adam"),
    "diverges": tiny(batch_size=UNEVEN, optimizer="sgd", lr=1e308),
}


def iris() -> Dataset:
    found = data.load("iris")
    parts = {name: replace(part, x=part.x.double()) for name, part in vars(found).items() if hasattr(part, "x")}
    return replace(found, **parts)


def on_ranks(rank: int, size: int, folder: Path) -> dict[str, str]:
    """Every kind of run: as it is, stopped by rank 1 and continued, stopped for one process to go on, and failing."""
    os.chdir(folder)
    team, dataset, told = Team(rank, size), iris(), dict[str, str]()
    for name, config in CONFIGS.items():
        train(config, folder / name, dataset, team=team)
        if name == "diverges":
            continue
        for place in (folder / f"{name}, stopped", folder / f"{name}, for one"):
            steps = Steps()
            try:
                train(config, place, dataset, steps, lambda: rank == AT and steps.done == 6, team)  # noqa: B023
            except StoppedError as error:
                told[place.name] = str(error.step)
        train(config, folder / f"{name}, stopped", dataset, team=team)
    if rank == AT:
        dataset = replace(dataset, train=replace(dataset.train, y=dataset.train.y + 7))
    try:
        train(tiny(), folder / "fails", dataset, team=team)
    except (IndexError, ElsewhereError) as error:
        told["fails"] = type(error).__name__
    return told


class Steps(Silent):
    done = 0

    def step(self, done: int, total: int, loss: float) -> None:
        self.done = done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, launch(SIZE, on_ranks, folder)


def close(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(close(mine[key], theirs[key]) for key in mine)
    return math.isclose(mine, theirs, rel_tol=1e-8) if isinstance(mine, float) else bool(mine == theirs)


def assert_close(folder: Path, config: TrainConfig, alone: Path) -> None:
    train(config, alone, iris())
    assert len(metrics(folder)) == len(metrics(alone))
    assert all(close(*lines) for lines in zip(metrics(folder), metrics(alone), strict=True))
    assert close(result(folder), result(alone))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_metrics_are_those_of_one_process(trained: tuple[Path, Any], name: str, tmp_path: Path) -> None:
    assert_close(trained[0] / name, CONFIGS[name], tmp_path / "alone")
    assert (result(tmp_path / "alone")["status"] == "diverged") == (name == "diverges")
    assert json.loads((trained[0] / name / "environment.json").read_text())["ranks"] == SIZE


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "diverges"])
def test_a_stop_on_one_rank_stops_all_and_the_run_goes_on(trained: tuple[Path, Any], name: str, tmp_path: Path) -> None:
    folder, told = trained
    assert [one[f"{name}, stopped"] for one in told] == ["6"] * SIZE
    assert_same_run(folder / f"{name}, stopped", folder / name)
    shutil.copytree(folder / f"{name}, for one", tmp_path / "continued")
    assert runs.prepare(runs.read_config(tmp_path / "continued"), tmp_path / "continued", ranks=SIZE) is None
    note = runs.prepare(runs.read_config(tmp_path / "continued"), tmp_path / "continued")
    assert note is not None
    assert "ranks 2 against 1" in note
    assert_close(folder / name, CONFIGS[name], tmp_path / "continued")


def test_what_fails_on_one_rank_is_raised_there_and_ends_the_others(trained: tuple[Path, Any]) -> None:
    assert [one["fails"] for one in trained[1]] == ["ElsewhereError", "IndexError"]
    assert not (trained[0] / "fails" / "result.json").exists()


def test_alone_nothing_is_exchanged() -> None:
    rows = torch.arange(5)
    assert torch.equal(ALONE.own(rows), rows)
    assert (ALONE.mean(0.5, 1.0), ALONE.agree(3.0).item(), ALONE.from_first(lambda: "made")) == (0.5, 3.0, "made")


def test_torchrun_starts_it_with_no_other_change(tmp_path: Path) -> None:
    done = torchrun(["-m", "ddpnopt", "train", "iris", "--epochs", "1", "--optimizer", "sgd"], tmp_path)
    assert done.stdout.count("test accuracy") == 1
    assert done.stderr.count("epoch 1/1") == 1
    assert [place.name for place in (tmp_path / "runs").iterdir()] == ["iris-sgd-seed0"]
    assert json.loads((tmp_path / "runs" / "iris-sgd-seed0" / "environment.json").read_text())["ranks"] == 2


PARTS = """
import weakref, torch
from ddpnopt.experiments.team import join

with join():
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    group = weakref.ref(torch.distributed.group.WORLD)
print("gone" if group() is None else "left", flush=True)
"""


def test_nothing_of_the_group_is_left_when_the_team_parts(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    printed = torchrun(["parts.py"], tmp_path).stdout  # two processes' lines may run into one another
    assert (printed.count("gone"), printed.count("left")) == (2, 0)


def torchrun(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done
