"""Benchmarks at a tiny size: they write their page, and repeat no run that is on record."""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Main = Callable[[Sequence[str]], int]


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Main]]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield lambda name: importlib.import_module(name).main
    torch.set_default_dtype(before)


@pytest.fixture
def main(imported: Callable[[str], Main]) -> Main:
    return imported("robustness")


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
    assert 0.01 < measured.difference(0, 6, 1.0, training=True).error < 1.0
    words = ["--batches", "6", "--lrs", "1", "--seeds", "1", "--train-lrs", "1", "--train-seeds", "1", "--epochs", "1"]
    assert measured.main([*words, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "batch_norm.md").read_text()
    assert "| 6 | 1 | " in page
    accuracy = re.search(r"^\| 1 \| (\S+) \|$", page, re.MULTILINE)
    assert accuracy is not None
    assert 80 < float(accuracy[1]) <= 100


def test_units_are_told_apart_by_the_cap_alone(main: Main, tmp_path: Path) -> None:
    measured = importlib.import_module("units")
    words = ["--units", "1", "100", "--lrs", "0.1", "--seeds", "1", "--steps", "60", "--out", str(tmp_path)]
    assert measured.main(words) == 0
    page = (tmp_path / "units.md").read_text()
    found = re.findall(r"^\| (.+) \| (\S+) \| (\S+) \| (\S*) ?\| (\S+) \|$", page, re.MULTILINE)
    rows = {row[0]: row[1:] for row in found}
    assert len(rows) == 1 + 5  # the first is the rule below the header
    small, large = (rows[f"Friedman's set, targets of {unit}"] for unit in ("1", "100"))
    assert abs(float(small[0]) - float(small[1])) < 10
    assert float(large[0]) > float(large[1]) + 30
    assert "learning rates 0.0003, 0.001, 0.003, 0.01" in page


def test_a_limit_keeps_pictures_from_failing(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = importlib.import_module("pictures")
    torch.manual_seed(0)
    colour, grey = (torch.randn(600, 1, 1, 1) + torch.rand(600, channels, size, size) for channels, size in SIZES)
    parts = {"cifar10": colour, "fashion-mnist": grey}
    monkeypatch.setattr(measured.data, "load", lambda name, _: SimpleNamespace(train=SimpleNamespace(x=parts[name])))
    assert measured.main(["--lrs", "10", "--seeds", "1", "--steps", "20", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "pictures.md").read_text()
    found = {row[0]: row[1:] for row in re.findall(r"^\| (.+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", page, re.M)}
    convolutional, pixels = (found[name] for name in (WORDS, "Fashion-MNIST, level of each pixel"))
    assert len(found) == 1 + 3  # the first is the rule below the header
    assert float(convolutional[0]) > float(convolutional[1])
    assert float(pixels[1]) > 30


SIZES = ((3, 32), (1, 28))
WORDS = "CIFAR-10, autoencoder, convolutional"


def test_deep_plain_networks_train_where_damping_follows_their_gradients(main: Main, tmp_path: Path) -> None:
    measured = importlib.import_module("depth")
    words = ["--layers", "2", "--lrs", "0.1", "--seeds", "1", "--steps", "80", "--out", str(tmp_path)]
    assert measured.main(words) == 0
    page = (tmp_path / "depth.md").read_text()
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (.+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", page, re.M)}
    assert len(rows) == 1 + 4  # the first is the rule below the header
    assert float(rows["tanh, 2"][0]) > 70
    small = rows["GELU, 4, weights of 0.02"]
    assert float(small[0]) > float(small[2]) + 20


def test_terms_that_no_output_carries_are_trained(main: Main, tmp_path: Path) -> None:
    measured = importlib.import_module("penalties")
    assert measured.main(["--lrs", "0.1", "1", "--seeds", "1", "--steps", "40", "--out", str(tmp_path)]) == 0
    cells = [
        line.strip("| ").split(" | ") for line in (tmp_path / "penalties.md").read_text().splitlines() if "|" in line
    ]
    _, _, *rows = cells
    assert len(rows) == 9
    assert {len(row) for row in rows} == {1 + 2 + 2 + 1}
    penalised = [row for row in rows if "half the squared" in row[0] or "absolute" in row[0]]
    assert len(penalised) == 3
    assert all(float(own) < float(row[-1]) for row in penalised for own in row[1:3])


def test_relinearised_runs_differ_from_those_of_the_batch_form_in_that_alone(
    imported: Callable[[str], Main], tmp_path: Path
) -> None:
    words = ["--seeds", "2", "--epochs", "1", "--lrs", "1", "--out", str(tmp_path)]
    assert imported("relinearise")(words) == 0
    lines = (tmp_path / "records" / "relinearise.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    by_coupling: list[list[dict[str, Any]]] = [[], []]
    for record in records:
        by_coupling["Batch(relinearise=True)" in record["settings"]["method"]].append(record)
    assert [len(own) for own in by_coupling] == [4, 4]
    for plain, anew in zip(*by_coupling, strict=True):
        written = json.dumps(anew["settings"]).replace("Batch(relinearise=True)", "'batch'")
        assert written == json.dumps(plain["settings"])
        assert anew["result"]["train_loss"] != plain["result"]["train_loss"]
    shown = (tmp_path / "relinearise.md").read_text()
    assert "**Of 2 settings, relinearised is higher at" in shown
    assert shown.count("\n| 1 | ") == 2


def test_batch_sizes_are_compared_at_several_memories(
    imported: Callable[[str], Main], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--tasks",
        "digits",
        "--batches",
        "8",
        "16",
        "--memories",
        "0",
        "80",
        "--lrs",
        "3",
        "--rival-lrs",
        "0.01",
        "--steps",
        "4",
    ]
    words += ["--seeds", "2", "--out", str(tmp_path)]
    main = imported("batch_size")
    assert main(words) == 0
    records, page = tmp_path / "records" / "batch_size.jsonl", (tmp_path / "batch_size.md").read_text()
    runs = [json.loads(line) for line in records.read_text().splitlines()]
    own = [run for run in runs if run["settings"]["method"] == "ddpnopt-default"]
    kinds = {(run["settings"]["lr"], run["settings"]["options"].get("memory")) for run in own}
    assert kinds == {(0.1, 0), (0.1, 80), (3.0, None)}
    at_80 = [
        run for run in own if run["settings"]["size"]["batch"] == 16 and run["settings"]["options"] == {"memory": 80}
    ]
    score = sum(run["result"]["validation"][-1] for run in at_80) / 2
    assert re.search(rf"\| 16 \| [*0-9.]+ \| (\*\*)?{score:.1f}", page)

    first = records.read_bytes()
    assert main(words) == 0
    assert records.read_bytes() == first
    assert main(["--tasks", "nowhere"]) == 2
    assert "no task 'nowhere'; choose of: digits, " in capsys.readouterr().err


def test_sequences_are_compared_at_several_lengths(
    imported: Callable[[str], Main], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shakespeare.txt").write_text("to be or not to be, that is it\n" * 1500)
    words = ["--lengths", "2", "4", "--steps", "3", "--rival-lrs", "0.01", "0.1", "--seeds", "2"]
    words += ["--data", str(tmp_path), "--out", str(tmp_path)]
    main = imported("sequences")
    assert main(words) == 0
    records, page = tmp_path / "records" / "sequences.jsonl", (tmp_path / "sequences.md").read_text()
    runs = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(runs) == 2 * 2 * (5 + 2 + 2)
    at_4 = [run for run in runs if run["settings"]["task"] == "characters-4"]
    sampled = [run for run in at_4 if {"terminal", "damping"} <= run["settings"]["options"].keys()]
    assert [run["settings"]["seed"] for run in sampled] == [0, 1]
    score = sum(run["result"]["validation"][-1] for run in sampled) / 2
    assert re.search(rf"\| 4, 3 \|( [*0-9.-]+ \|){{4}} (\*\*)?{score:.1f}", page)
    adam = [run for run in at_4 if run["settings"]["method"] == "adamw"]
    best = max(
        sum(run["result"]["validation"][-1] for run in adam if run["settings"]["lr"] == lr) / 2 for lr in (0.01, 0.1)
    )
    assert f"| {best:.1f} (" in page.split("\n| 4, 3 |")[1].split("\n")[0]

    first = records.read_bytes()
    assert main(words) == 0
    assert records.read_bytes() == first
    capsys.readouterr()
    assert main([*words[:-4], "--lengths", "0", *words[-4:]]) == 2
    assert "must be at least 1" in capsys.readouterr().err
    assert main([*words[:-4], "--lengths", "400", *words[-4:]]) == 2
    assert "the train part has" in capsys.readouterr().err
