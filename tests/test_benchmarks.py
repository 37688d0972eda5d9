"""The benchmark of learning rates, at a tiny size: it writes its page, and repeats no run that is on record."""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

Main = Callable[[Sequence[str]], int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield importlib.import_module("robustness").main
    torch.set_default_dtype(before)


def test_a_run_on_record_is_not_repeated(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, page = tmp_path / "records" / "robustness-iris.jsonl", tmp_path / "robustness.md"
    words = [
        "iris",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--lrs",
        "0.1",
        "1",
        "--rival-lrs",
        "0.01",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    first, shown = records.read_bytes(), page.read_text()
    settings = [json.loads(line)["settings"] for line in first.splitlines()]
    assert len(settings) == 2 * 2 + 3 * 11  # two forms of DDPNOpt at two rates; three rivals, also on the tuning seeds
    assert "## IRIS" in shown
    assert main(words) == 0
    assert records.read_bytes() == first
    assert page.read_text() == shown

    records.write_bytes(first[:-20])  # a crash while the last line was written
    capsys.readouterr()
    assert main(words) == 0
    assert [json.loads(line)["settings"] for line in records.read_bytes().splitlines()] == settings
    assert records.read_bytes().startswith(first[: first.rindex(b"\n", 0, -1)])
    assert "1 of 1 runs" in capsys.readouterr().err


def test_an_unknown_dataset_is_refused_by_name(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mnist", "--out", str(tmp_path)]) == 2
    assert "mnist" in capsys.readouterr().err


def test_batch_norm_is_measured_against_a_step_that_is_exact_without_it(main: Main, tmp_path: Path) -> None:
    measured = importlib.import_module("batch_norm")
    assert measured.difference(0, 6, 1.0, training=False).error < 1e-12
    assert 0.01 < measured.difference(0, 6, 1.0, training=True).error < 0.5
    assert measured.main(["--batches", "6", "--lrs", "1", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert "| 6 | 1 | " in (tmp_path / "batch_norm.md").read_text()
