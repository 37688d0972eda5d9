"""One study on two machines against one PostgreSQL server, and a worker that is killed in the middle of a run.

    python benchmarks/two_machines.py

Writes docs/results/two_machines.md. The machines are network namespaces that see no processes but their own, so that
the death of a worker shows to the other as it would on another computer: by silence. That needs root; without it two
plain processes are run, and the page says so. Needs PostgreSQL's server (Debian: apt-get install postgresql iproute2).

What happened is told by a trigger of the database, which notes every change of a run's state, and not by the code
under test.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
import tyro
from _machines import Machines
from _markdown import command, duration, save_page, table
from _postgresql import server
from _training import RESULTS

from ddpnopt.experiments.environment import version
from ddpnopt.experiments.study.store import LEASE, Store

INTO = 0.4
"""Seconds of a run after which its worker is killed."""
PATIENCE = 600.0
NOTES = (
    "CREATE TABLE notes (at double precision, key text, state text, worker text)",
    "CREATE FUNCTION note() RETURNS trigger AS $$ BEGIN INSERT INTO notes VALUES "
    "(extract(epoch FROM clock_timestamp()), NEW.key, NEW.state, NEW.worker); RETURN NEW; END $$ LANGUAGE plpgsql",
    "CREATE TRIGGER changed AFTER UPDATE ON runs FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) "
    "EXECUTE FUNCTION note()",
)


@dataclass(frozen=True)
class Arguments:
    """Share a study out over two machines and kill a worker; exit code 1 if that cost or repeated anything."""

    experiment: str = "fig6"
    """Command of the experiment, run with --quick."""

    runs: int = 10
    """Runs that both have finished together before the first machine's worker is killed."""

    namespaces: bool = True
    """Whether to look for namespaces at all."""

    out: Path = RESULTS
    """Folder of the page."""


@dataclass(frozen=True)
class Note:
    """A run changed its state, at a moment of the server's clock."""

    at: float
    key: str
    state: str
    worker: str | None


@dataclass(frozen=True)
class Killing:
    """A worker was killed.

    Attributes:
        worker: its name in the database, and that of the other.
        key: the run it was at.
        at: when, by the server's clock, and when its last sign of life was.
    """

    worker: str
    other: str
    key: str
    at: float
    beat: float


class Study:
    """The experiment's processes on two machines, and what its database tells."""

    def __init__(self, given: Arguments, machines: Machines, place: Path, folder: Path) -> None:
        self._given, self._machines, self._folder = given, machines, folder
        here = f"postgresql+psycopg://study@/postgres?host={place}"
        self._address = f"postgresql+psycopg://study@{machines.address(0)}/postgres" if machines.apart else here
        self._engine = sql.create_engine(here)
        Store(here).__exit__()  # makes the table
        with self._engine.begin() as connection:
            for line in NOTES:
                connection.execute(sql.text(line))

    def start(self, machine: int, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of ``ddpnopt`` on a machine."""
        own = [sys.executable, "-m", "ddpnopt.experiments.cli", *words, "--storage", self._address]
        with (self._folder / "log.txt").open("ab") as log:
            line = self._machines.on(machine, own, own_processes=True)
            return subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)

    def rows(self, query: str, **values: Any) -> list[Any]:
        """Ask the database."""
        with self._engine.connect() as connection:
            return list(connection.execute(sql.text(query), values))

    def notes(self) -> list[Note]:
        """Everything that was noted, in order."""
        return [Note(*row) for row in self.rows("SELECT at, key, state, worker FROM notes ORDER BY at")]

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Wait until something holds; returns it."""
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            if time.monotonic() > end:
                raise TimeoutError((self._folder / "log.txt").read_text()[-2000:])
            time.sleep(0.05)
        return found

    def carry_out(self) -> Killing:
        """From the first command to the experiment's end, with a worker killed in between and started again."""
        asks = self.start(0, self._given.experiment, "--quick", "--jobs", "0", "--out", str(self._folder))
        worker = ("worker", "--wait", "10")
        first = self.start(0, *worker)
        (name,) = self.wait(lambda: self.rows("SELECT worker FROM notes WHERE state = 'running' LIMIT 1"))[0]
        second = self.start(1, *worker)
        done = "SELECT key FROM notes WHERE state = 'done'"
        self.wait(lambda: len(self.rows(done)) >= self._given.runs)
        now = "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
        under_way = f"SELECT key FROM runs WHERE state = 'running' AND worker = :name AND {now} - started > {INTO}"
        self.wait(lambda: self.rows(under_way, name=name))
        first.kill()
        first.wait()
        held = self.rows(f"SELECT key, {now}, beat FROM runs WHERE state = 'running' AND worker = :name", name=name)
        if not held:
            raise RuntimeError("the worker was killed between two runs; start this again")
        (other,) = self.rows("SELECT worker FROM notes WHERE state = 'running' AND worker != :name", name=name)[0]
        again = self.start(0, *worker)
        if asks.wait(PATIENCE):
            raise RuntimeError((self._folder / "log.txt").read_text()[-2000:])
        for process in (second, again):
            process.wait(PATIENCE)
        return Killing(name, other, *held[0])


def alone(given: Arguments, folder: Path) -> dict[str, Any]:
    """Figures of the same runs by one worker with a SQLite file, by key."""
    words = [given.experiment, "--quick", "--jobs", "1", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "ddpnopt.experiments.cli", *words], check=True, capture_output=True)
    engine = sql.create_engine(f"sqlite:///{folder / 'runs.db'}")
    with engine.connect() as connection:
        found = {key: json.loads(text) for key, text in connection.execute(sql.text("SELECT key, result FROM runs"))}
    engine.dispose()
    return found


def story(killing: Killing, notes: Sequence[Note]) -> tuple[list[list[str]], bool]:
    """Rows of the page on what the trigger noted, and whether it is as it should be."""
    started, ended = (Counter(n.key for n in notes if n.state == state) for state in ("running", "done"))
    finished = {n.key: n.at for n in notes if n.state == "done"}
    late = [n for n in notes if n.key in finished and n.at > finished[n.key]]
    twice = [key for key, count in started.items() if count > 1]
    names = {killing.worker: "first machine, until it was killed", killing.other: "second machine"}
    by = Counter(names.get(str(n.worker), "first machine, started again") for n in notes if n.state == "done")
    own = [n for n in notes if n.key == killing.key]
    picked = next(n for n in own if n.state == "running" and n.at > killing.at)
    begun = max(n.at for n in own if n.state == "running" and n.at < killing.at)
    rows = [["runs finished", str(len(finished))]]
    rows += [[f"by the {name}", str(by[name])] for name in sorted(by)]
    rows += [
        ["runs finished more than once", str(sum(count > 1 for count in ended.values()))],
        ["changes of a run after it was finished", str(len(late))],
        ["runs started more than once", f"{len(twice)}{': the killed one' * (twice == [killing.key])}"],
        ["the kill, after its run began", f"{killing.at - begun:.1f} s"],
        ["that run was handed out again, after its worker's last sign of life", f"{picked.at - killing.beat:.1f} s"],
        ["and after the kill", f"{picked.at - killing.at:.1f} s"],
        ["to the worker of the", names.get(str(picked.worker), "first machine, started again")],
        ["and was finished", "yes" if killing.key in finished else "no"],
    ]
    right = not late and set(ended.values()) == {1} and twice == [killing.key] and set(started) == set(finished)
    return rows, right


def main(words: Sequence[str] | None = None) -> int:
    """Run the study, look, write the page; returns the exit code."""
    given = tyro.cli(Arguments, args=words)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as text, Machines(2, wanted=given.namespaces) as machines:
        folder, listens = Path(text), machines.address(0) if machines.apart else ""
        os.environ["OMP_NUM_THREADS"] = "1"
        with server(listens, lambda line: machines.on(0, line), "10.213.77.0/24") as place:
            study = Study(given, machines, place, folder)
            killing = study.carry_out()
            notes = study.notes()
            results = {key: json.loads(found) for key, found in study.rows("SELECT key, result FROM runs")}
            trials = dict(map(tuple, study.rows("SELECT state::text, count(*) FROM trials GROUP BY state")))
        rows, right = story(killing, notes)
        (folder / "alone").mkdir()
        other = alone(given, folder / "alone")
    same = sum(results[key] == other.get(key) for key in results)
    rows.append(["Optuna's trials in the same database, by state", _listed(trials)])
    rows.append(["runs with the figures of one worker and a SQLite file", f"{same} of {len(other)}"])
    right &= same == len(results) == len(other) and set(trials) == {"COMPLETE"}
    how = (
        "two network namespaces that see no processes but their own, joined by virtual cables, the server on the first"
        if machines.apart
        else f"two plain processes on one machine (no namespaces: {machines.why}), where the death of a process is "
        "noticed at once"
    )
    page = f"""# One study, two machines, a killed worker

`ddpnopt {given.experiment} --quick --jobs 0` plans the runs and waits; one `ddpnopt worker` on each of two machines
takes them from one PostgreSQL server. After {given.runs} finished runs the first machine's worker is killed (SIGKILL)
in the middle of a run, and another is started there. The machines are
{how}.
A run is handed out again {LEASE:.0f} s after its worker's last sign of life, which it gives four times as often.

{table(["what a trigger of the database noted", ""], rows)}

{"No run was finished twice, and none is missing." if right else "**This is not as it should be.**"}

Command: `{command("two_machines.py", given, ("experiment", "runs"))}`
({duration(time.perf_counter() - began)}), ddpnopt {version("ddpnopt")}.
"""
    save_page(given.out, "two_machines", page)
    return 0 if right else 1


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
