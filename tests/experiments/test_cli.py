import subprocess
import sys
from pathlib import Path

import pytest

from ddpnopt.experiments import cli


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on the error stream, which must be one line that begins with the program's name."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("ddpnopt: ")
    return said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "name a dataset"),
        (["train", "nothing"], "unknown dataset 'nothing'"),
        (["train", "iris", "--lr", "-1"], "lr must be above 0"),
        (["train", "iris", "--optimizer", "sgd", "--damping", "1"], "damping 1.0 has no meaning"),
        (["train", "fashion-mnist", "--data", "nowhere"], "install the Debian package dataset-fashion-mnist"),
        (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["train", "--resume", "nowhere", "--lr", "1"], "leave out lr"),
        (["compare", "nothing"], "unknown dataset 'nothing'"),
        (["compare", "iris", "--seeds", "0"], "seeds must be at least 1"),
        (["compare", "iris", "--lr-adam", "0"], "lr must be above 0"),
        (["compare", "iris", "--optimizers", "sgd", "sgd"], "optimizers must be different names"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert message in one_line(capsys)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words", [["train", "iris", "--optimizer", "newton"], ["fly"], ["train", "iris", "--epochs", "x"]]
)
def test_misuse_exits_with_code_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"], ["compare", "--help"]])
def test_help_is_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    assert "usage: ddpnopt" in capsys.readouterr().out


def test_train_prints_its_result_and_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "IRIS", "--epochs", "1", "--optimizer", "adam"]) == 0
    said = capsys.readouterr()
    assert "test accuracy" in said.out
    assert "run folder     runs/iris-adam-seed0" in said.out
    assert "epoch 1/1  step 7  train loss" in said.err


def test_a_repeated_command_makes_a_folder_of_its_own_and_a_given_name_is_not_taken_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "iris", "--epochs", "1", "--optimizer", "sgd"]
    for _ in range(2):
        assert cli.main(words) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"iris-sgd-seed0", "iris-sgd-seed0-2"}
    capsys.readouterr()
    assert cli.main([*words, "--name", "iris-sgd-seed0"]) == 2
    assert "exists; continue it with --resume runs/iris-sgd-seed0" in one_line(capsys)


def test_resuming_a_finished_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "iris", "--epochs", "1", "--optimizer", "sgd", "--name", "done"]) == 0
    assert cli.main(["train", "--resume", "runs/done"]) == 0
    assert "runs/done is finished already" in capsys.readouterr().out


def test_a_damaged_folder_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "iris", "--epochs", "1", "--optimizer", "sgd", "--name", "run"]) == 0
    Path("runs/run/config.json").write_text('{"dataset": "iris"')
    capsys.readouterr()
    assert cli.main(["train", "--resume", "runs/run"]) == 2
    assert "runs/run/config.json is damaged" in one_line(capsys)


def test_a_missing_extra_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("ddpnopt.experiments.")]:
        if name != "ddpnopt.experiments.cli":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("ddpnopt.experiments.commands")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["train", "iris"]) == 2
    assert "pip install 'ddpnopt[experiments]'" in one_line(capsys)


def test_the_library_imports_none_of_this() -> None:
    check = "import sys, ddpnopt; print([m for m in sys.modules if m.split('.')[0] in {names} or 'experiments' in m])"
    names = {"tyro", "rich", "matplotlib", "jinja2", "sklearn", "scipy"}
    done = subprocess.run([sys.executable, "-c", check.format(names=names)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
