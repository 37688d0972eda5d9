"""The example for several processes prints on several what it prints on one."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from launch import launch

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed(rank: int, size: int, optimizer: str) -> str:
    """What the example prints on this rank, at toy size."""
    torch.set_default_dtype(torch.float32)
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = ["ddp.py", "--epochs", "1", "--optimizer", optimizer]
    found = io.StringIO()
    with contextlib.redirect_stdout(found):
        runpy.run_path(str(EXAMPLES / "ddp.py"), run_name="__main__")
    return found.getvalue()


@pytest.mark.parametrize("optimizer", ["ddpnopt", "adamw"])
def test_two_ranks_print_what_one_does(optimizer: str) -> None:
    one, (first, second) = launch(1, printed, optimizer)[0], launch(2, printed, optimizer)
    assert second == ""
    losses = [[float(loss) for loss in re.findall(r"train loss (\S+),", told)] for told in (one, first)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[1][-1] < losses[1][0]
