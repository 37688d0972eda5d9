"""Kill an experiment again and again while it runs, and compare what it ends with to an undisturbed run.

The command and all its workers are killed (SIGKILL) at moments drawn from a seed: each a number of finished runs, and
up to two seconds more. The same command then goes on. At the end no run that was finished before a kill may have been
computed again, none may be missing, and the records must equal the undisturbed ones in all but seconds.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
import tyro


@dataclass(frozen=True)
class Arguments:
    """Kill an experiment again and again; exit code 1 if that changed anything."""

    experiment: str = "table3"
    """Command of the experiment, run with --quick."""

    kills: int = 10
    """How often it is killed."""

    seed: int = 0
    """Of the moments."""


def finished(folder: Path) -> dict[str, float]:
    """When each finished run was finished, by its key; empty where there is no database yet."""
    path = folder / "runs.db"
    if not path.exists():
        return {}
    engine = sql.create_engine(f"sqlite:///{path}")
    try:
        with engine.connect() as connection:
            rows = connection.execute(sql.text("SELECT key, finished FROM runs WHERE state = 'done'"))
            return {key: moment for key, moment in rows}
    except sql.exc.OperationalError:  # killed before the table was made
        return {}
    finally:
        engine.dispose()


def start(arguments: Arguments, folder: Path) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own."""
    words = [sys.executable, "-m", "ddpnopt.experiments.cli", arguments.experiment, "--quick", "--out", str(folder)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def records(folder: Path) -> list[Mapping[str, Any]]:
    """The experiment's runs without what the clock wrote."""
    (path,) = (folder / "records").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
        line["result"].pop("seconds", None)
    return lines


def disturbed(arguments: Arguments, folder: Path, runs: int) -> list[str]:
    """Run with kills spread over the progress through ``runs`` runs; returns what went wrong."""
    moments = random.Random(arguments.seed)
    before: dict[str, float] = {}
    faults: list[str] = []
    for number, least in enumerate(sorted(moments.choices(range(runs - 2), k=arguments.kills))):
        process = start(arguments, folder)
        while len(finished(folder)) < least and process.poll() is None:
            time.sleep(0.1)
        time.sleep(moments.uniform(0.0, 2.0))
        if process.poll() is not None:
            return [*faults, f"the command ended before kill {number + 1}; see {folder / 'log.txt'}"]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = finished(folder)
        print(f"kill {number + 1}: {len(now)} of {runs} runs finished", flush=True)
        faults += [f"run {key} was lost or computed again" for key in before if now.get(key) != before[key]]
        before = now
    if start(arguments, folder).wait():
        faults.append(f"the command failed in the end; see {folder / 'log.txt'}")
    after = finished(folder)
    return faults + [f"run {key} was lost or computed again" for key in before if after.get(key) != before[key]]


def main(words: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    place = Path(tempfile.mkdtemp(prefix="interrupted-"))
    whole, torn = place / "undisturbed", place / "disturbed"
    whole.mkdir()
    torn.mkdir()
    began = time.monotonic()
    if start(arguments, whole).wait():
        print(f"the undisturbed command failed; see {whole / 'log.txt'}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    print(f"undisturbed: {len(finished(whole))} runs in {seconds:.0f} s", flush=True)
    faults = disturbed(arguments, torn, len(finished(whole)))
    if not faults and records(torn) != records(whole):
        faults.append("the records differ from the undisturbed ones")
    print("\n".join(faults) or f"after {arguments.kills} kills: no run lost or repeated, equal records")
    print(f"files: {place}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
