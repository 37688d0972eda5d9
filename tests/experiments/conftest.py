"""Conditions of the command line for its tests: float32, one thread, a working folder that is thrown away."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddpnopt.experiments import data
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.study.store import Store


@pytest.fixture(autouse=True)
def conditions_of_the_program(
    fixed_conditions: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(data.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def iris() -> Dataset:
    return data.load("iris")


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study/runs.db"


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with Store(address) as opened:
        yield opened
