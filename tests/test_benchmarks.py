"""The benchmark of learning rates, at a tiny size: it writes its page, and repeats no run that is on record."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(_FOLDER))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)
