"""Every example runs, at toy size where it can be told to."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS: dict[str, list[list[str]]] = {
    "drop_in.py": [["--epochs", "1"], ["--epochs", "1", "--optimizer", "adamw"]],
    "closure.py": [[]],
}


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name, runs in ARGUMENTS.items() for arguments in runs]
)
def test_example_runs(name: str, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)
