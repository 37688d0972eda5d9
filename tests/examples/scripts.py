"""Runs an example as a reader would, in a process of its own; the libraries are imported once for all of them."""

import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
LIBRARIES = ["torch", "sklearn.datasets", "accelerate", "lightning", "skorch", "transformers", "ddpnopt"]

# a fork of a process that has the libraries (it skips those that are not installed): seconds less per example
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(LIBRARIES)


def run(name: str, *words: str, folder: Path) -> str:
    """What ``python examples/NAME WORDS`` prints, run in a folder."""
    printed, complaints = folder / "stdout", folder / "stderr"
    process = _SERVER.Process(target=_main, args=(name, words, folder))
    process.start()
    process.join()
    said = complaints.read_text()
    assert process.exitcode == 0, said
    assert "it was not seen to run" not in said
    return printed.read_text()


def _main(name: str, words: Sequence[str], folder: Path) -> None:
    os.chdir(folder)
    for descriptor, path in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv, sys.path[0] = [name, *words], str(EXAMPLES)
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
