"""The examples for several processes print on several what they print on one."""

import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from launch import launch

EXAMPLES = Path(__file__).parents[2] / "examples"

KEPT: list[dict[str, object]] = []
"""What examples have left: a DistributedDataParallel that outlives its group waits, at its end and holding the
interpreter's lock, for a thread of gloo's that may want this lock. Here nothing ends before the process does."""


def printed(rank: int, size: int, script: str, *words: str) -> str:
    """What an example prints on this rank, at toy size."""
    torch.set_default_dtype(torch.float32)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": 0}  # as torchrun says
    os.environ |= {"MASTER_ADDR": "localhost", **{name: str(number) for name, number in numbers.items()}}
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = [script, "--epochs", "1", *words]
    found = io.StringIO()
    with contextlib.redirect_stdout(found):
        KEPT.append(runpy.run_path(str(EXAMPLES / script), run_name="__main__"))
    return found.getvalue()


def losses(told: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"train loss (\S+),", told)]


@pytest.mark.parametrize("optimizer", ["ddpnopt", "adamw"])
def test_two_ranks_print_what_one_does(optimizer: str) -> None:
    words = ("--batch", "240", "--optimizer", optimizer)
    one, (first, second) = launch(1, printed, "ddp.py", *words)[0], launch(2, printed, "ddp.py", *words)
    assert second == ""
    assert losses(one) == pytest.approx(losses(first), abs=2e-4)
    assert losses(first)[-1] < losses(first)[0]


def test_sharded_ranks_too_and_they_go_on_from_their_checkpoint(tmp_path: Path) -> None:
    words = ("--batch", "240", "--checkpoint", str(tmp_path))
    begun, second = launch(2, printed, "fsdp.py", *words)
    ended, _ = launch(2, printed, "fsdp.py", *words, "--epochs", "2")
    one = launch(1, printed, "fsdp.py", "--batch", "240", "--epochs", "2")[0]
    assert second == ""
    assert losses(one) == pytest.approx(losses(begun) + losses(ended)[1:], abs=2e-4)
    assert losses(one)[-1] < losses(one)[0]


def test_accelerate_on_two_processes() -> None:
    pytest.importorskip("accelerate")
    first, second = launch(2, printed, "accelerate_loop.py", "--batch", "240", "--accumulate", "2")
    assert second == ""
    assert losses(first)[-1] < losses(first)[0]
