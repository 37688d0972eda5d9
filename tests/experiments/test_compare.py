import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ddpnopt.experiments import cli, commands, compare, files, runs
from ddpnopt.experiments.compare import Choice, CompareConfig, Trial, best, check, count_runs, folder_name, run_config
from ddpnopt.experiments.config import OPTIMIZERS, TrainConfig
from ddpnopt.experiments.report.comparison import command
from ddpnopt.experiments.report.curves import loss_curve
from ddpnopt.experiments.report.plots import loss_figure, to_svg
from ddpnopt.experiments.runs import Result

WORDS = ["compare", "iris", "--seeds", "2", "--epochs", "2", "--name", "small"]
FOLDER = Path("runs/small")


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {"status": "finished", "reason": None, "steps": 10, "train_loss": 0.5, "seconds": 0.1}
    values |= {"train_accuracy": 0.9, "validation_accuracy": 0.9, "test_accuracy": 0.9}
    return Result(**(values | changes))


class Visits(HTMLParser):
    """Every tag of a page, and everything it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        links = {"src", "href", "xlink:href", "data", "action", "srcset"}
        self.fetched += [value or "" for key, value in attrs if key in links]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of all four optimizers, rivals tuned, made once."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(compare, "TUNING_SEEDS", (1000,))
        assert cli.main(WORDS) == 0
    return folder / FOLDER


def test_the_page_refers_to_nothing_outside(compared: Path) -> None:
    page = (compared / "index.html").read_text()
    addresses = set(re.findall(r"\w+://[^\"'\s<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    visits = Visits()
    visits.feed(page)
    assert not visits.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert all(link.startswith("#") for link in visits.fetched)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))


def test_the_page_shows_every_optimizer_its_choice_and_the_command(compared: Path) -> None:
    page = (compared / "index.html").read_text()
    numbers = json.loads((compared / "comparison.json").read_text())
    assert [row["optimizer"] for row in numbers["rows"]] == ["ddpnopt", "sgd", "rmsprop", "adam"]
    for row in numbers["rows"]:
        assert f"<td>{row['optimizer']}</td><td>{row['choice']['lr']:g} ({row['choice']['how']})</td>" in page
    assert [row["choice"]["how"] for row in numbers["rows"]] == ["default", "tuned", "tuned", "tuned"]
    assert page.count("<svg") == 2
    assert "ddpnopt compare iris --seeds 2 --epochs 2" in page
    assert (compared / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tuning_looks_at_validation_data_and_other_seeds_only(compared: Path) -> None:
    seeds: dict[float, set[int]] = {}
    for folder in compared.glob("adam-*"):
        config = runs.read_config(folder)
        seeds.setdefault(float(config.lr or 0), set()).add(config.seed)
    assert sorted(seeds) == sorted(OPTIMIZERS["adam"].grid)
    assert sorted(map(sorted, seeds.values())) == [[0, 1, 1000], *[[1000]] * 4]


def test_the_same_command_repeats_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--optimizers", "sgd", "adam", "--no-tune"]
    assert cli.main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*") if path.parent != FOLDER}
    first = capsys.readouterr()

    def never(*_: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("ddpnopt.experiments.train.start", never)
    assert cli.main(words) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert second.err.count("read back") == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(before) == 4 * 5  # four folders with five files each


def test_a_stopped_comparison_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--optimizers", "sgd", "adam", "--no-tune"]
    with monkeypatch.context() as patch:
        patch.setattr("ddpnopt.experiments.interrupt.StopRequest.__call__", lambda _: len(list(FOLDER.glob("*"))) > 1)
        assert cli.main(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert capsys.readouterr().err.count("read back") == 1


def test_a_stop_between_two_runs_starts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpnopt.experiments.interrupt.StopRequest.__call__", lambda _: True)
    assert cli.main(WORDS) == 130
    assert not FOLDER.exists()


def test_runs_are_paired_by_seed(compared: Path) -> None:
    numbers = json.loads((compared / "comparison.json").read_text())
    own, rival = numbers["rows"][0]["accuracies"], numbers["rows"][3]["accuracies"]
    expected = sum(b - a for a, b in zip(own, rival, strict=True)) / 2
    assert numbers["rows"][3]["difference"]["mean"] == pytest.approx(expected)
    assert numbers["rows"][0]["difference"] is None


def test_a_folder_is_named_after_settings_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(CompareConfig("iris"), "adam", 0.01, 3)
    name = folder_name(config)
    assert name.startswith("adam-lr0.01-seed3-")
    assert folder_name(TrainConfig("iris", optimizer="adam", lr=0.01, seed=3)) == name
    assert folder_name(TrainConfig("iris", optimizer="adam", lr=0.01, seed=3, epochs=7)) != name
    monkeypatch.setattr(compare, "code", lambda: "changed")
    assert folder_name(config) != name


def test_the_best_trial_has_the_highest_accuracy_then_the_lowest_loss() -> None:
    trials = [Trial(0.1, 0.9, 0.5), Trial(0.2, 0.9, 0.4), Trial(0.3, 0.8, 0.1), Trial(0.4, 0.9, math.inf)]
    assert best(trials).lr == 0.2
    assert Choice(0.4, "tuned", tuple(trials)).at_edge
    assert not Choice(0.2, "tuned", tuple(trials)).at_edge


def test_diverged_runs_count_and_are_named() -> None:
    def run(config: TrainConfig, name: str) -> Result:
        broken = config.optimizer == "sgd" and config.seed == 1
        return result(status="diverged", train_loss=None, test_accuracy=0.3) if broken else result()

    config = check(CompareConfig("iris", optimizers=("ddpnopt", "sgd"), seeds=3, tune=False))
    own, rival = compare.compare(config, Path("somewhere"), run).rows
    assert (own.diverged, rival.diverged, rival.loss) == (0, 1, None)
    assert rival.accuracies == (0.9, 0.3, 0.9)
    assert rival.difference is not None
    assert rival.difference.mean == pytest.approx(-0.2)


def test_planned_runs_are_counted_as_they_come() -> None:
    seen: list[str] = []

    def run(config: TrainConfig, name: str) -> Result:
        seen.append(name)
        return result()

    config = check(CompareConfig("iris", seeds=3, lr_adam=0.02))
    rows = compare.compare(config, Path("somewhere"), run).rows
    assert len(seen) == count_runs(config)
    assert (rows[3].choice.lr, rows[3].choice.how) == (0.02, "given")


def test_the_printed_command_asks_for_the_same_comparison() -> None:
    config = CompareConfig("iris", optimizers=("ddpnopt", "adam"), seeds=3, tune=False, lr_adam=0.02, epochs=4)
    words = command(config).split()
    parsed = commands.parse(words[1:])
    assert isinstance(parsed, commands.Compare)
    assert parsed.config == config


def test_runs_too_short_for_a_curve_are_drawn_without_one(tmp_path: Path) -> None:
    (tmp_path / files.METRICS).write_text("")
    curve = loss_curve("adam", [tmp_path])
    assert curve.steps == curve.median == ()
    assert to_svg(loss_figure("nothing", {"adam": curve}), "loss", "nothing").startswith("<svg")
