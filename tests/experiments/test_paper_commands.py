import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpnopt.experiments import cli
from ddpnopt.experiments.paper import commands
from ddpnopt.experiments.paper.registry import Experiment
from ddpnopt.experiments.report.section import Section, Table, Verdict
from ddpnopt.experiments.study import identity
from ddpnopt.experiments.study.lab import Lab
from ddpnopt.experiments.study.store import Store
from experiments import toy_kinds as toy
from experiments.study_tools import environment, until


def section(name: str, lab: Lab, count: int, sleep: float) -> Section:
    results = lab.execute(toy.squares(Path.cwd(), count, sleep=sleep)[::-1])
    total = str(sum(result["square"] for result in results))
    verdict = Verdict("Squares add up", "batch", "holds", f"Their sum is {total}.")
    table = Table("Squares [of numbers]", ("what", "sum"), [("all", total)])
    return Section(name, f"Toy {name}", ["Some text."], [("numbers", str(count))], [table], (), [verdict])


def bad(lab: Lab, quick: bool) -> Section:
    lab.execute([toy.task("fail", {"n": 1, "folder": str(Path.cwd())})])
    raise AssertionError("its run fails")


EXPERIMENTS = {
    "toy": Experiment("Squares of numbers.", lambda lab, quick: section("toy", lab, 3 if quick else 5, 0.0)),
    "bad": Experiment("Fails.", bad),
    "slow": Experiment("Takes time.", lambda lab, quick: section("slow", lab, 24, 0.1)),
}


@pytest.fixture(autouse=True)
def toy_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "EXPERIMENTS", EXPERIMENTS)
    monkeypatch.setattr(commands, "_KINDS", toy.NAME)


def lines(path: str) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


def test_every_experiment_is_a_command_with_its_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("toy", "Squares of numbers.", "reproduce", "worker", "train", "compare"))
    with pytest.raises(SystemExit):
        cli.main(["toy", "--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("Squares of numbers.", "--quick", "--storage", "--jobs", "--out"))


def test_a_command_prints_and_writes_its_report_and_does_not_compute_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy"]) == 0
    said = capsys.readouterr()
    assert "Squares [of numbers]" in said.out
    assert "Squares add up (batch): holds. Their sum is 30." in said.out
    assert "5 runs, " in said.out
    assert "this call computed 5 of them" in said.out
    assert "page:    runs/paper/toy/index.html" in said.out
    assert "toy: 5 of 5 runs" in said.err
    assert "ddpnopt toy" in Path("runs/paper/toy/index.html").read_text()
    records = lines("runs/paper/records/toy.jsonl")
    assert [record["settings"]["n"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["result"] for record in records] == [{"square": n * n} for n in range(5)]
    assert all(record.keys() == {"kind", "settings", "code", "result", "seconds"} for record in records)
    before = Path("runs/paper/records/toy.jsonl").read_bytes()
    assert cli.main(["toy"]) == 0
    assert "this call computed 0 of them" in capsys.readouterr().out
    assert Path("runs/paper/records/toy.jsonl").read_bytes() == before


def test_quick_and_full_are_kept_apart_and_share_equal_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--quick", "--jobs", "1", "--out", "here", "--storage", "sqlite:///there/some.db"]) == 0
    assert "Their sum is 5." in capsys.readouterr().out
    assert cli.main(["toy", "--out", "here", "--storage", "sqlite:///there/some.db"]) == 0
    assert "this call computed 2 of them" in capsys.readouterr().out
    assert [len(lines(f"here/records/{name}.jsonl")) for name in ("toy-quick", "toy")] == [3, 5]
    assert "ddpnopt toy --quick" in Path("here/toy-quick/toy.md").read_text()
    assert not Path("runs").exists()


def test_reproduce_reports_on_what_could_be_done_and_names_what_could_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "--quick", "--jobs", "8"]) == 2
    said = capsys.readouterr()
    assert "ddpnopt: bad: 1 of 1 runs failed; the first: fail" in said.err
    assert said.err.splitlines()[-1].startswith("ddpnopt: ")
    page = Path("runs/paper/reproduce-quick/index.html").read_text()
    assert "Toy toy" in page
    assert "Toy slow" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toy", "--jobs", "-1"], "jobs must be at least 0"),
        (["toy", "--storage", "mysql://here/runs"], "mysql is not supported"),
        (["worker", "--storage", "sqlite:///runs.db", "--wait", "-1"], "wait must be at least 0"),
    ],
)
def test_bad_requests_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


MAIN = """
import sys
from experiments import test_paper_commands as here
from ddpnopt.experiments import cli
here.commands.EXPERIMENTS, here.commands._KINDS = here.EXPERIMENTS, here.toy.NAME
if sys.argv[1] == "worker":
    sys.exit(here.commands.Worker("sqlite:///runs/paper/runs.db", wait=0.5, kinds=here.toy.NAME).run())
sys.exit(cli.main())
"""


def start(*words: str) -> "subprocess.Popen[str]":
    words = (sys.executable, "-c", MAIN, *words)
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def states() -> dict[str, int]:
    connection = sqlite3.connect("runs/paper/runs.db", timeout=30)
    found = dict(connection.execute("SELECT state, count(*) FROM runs GROUP BY state").fetchall())
    connection.close()
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_and_its_workers_and_says_how_to_go_on(number: signal.Signals) -> None:
    with start("slow", "--jobs", "2") as command:
        until(lambda: any(what == "ended" for what, _, _ in toy.log(Path.cwd())))
        command.send_signal(number)
        _, said = command.communicate(timeout=60)
    assert command.returncode == 128 + number
    assert said.splitlines()[-1] == "ddpnopt: stopped; the same command goes on where this one stopped"
    assert "Traceback" not in said
    assert states().keys() == {"waiting", "done"}
    workers = {int(process) for _, _, process in toy.log(Path.cwd())}
    assert not any(map(identity._birth, workers))


def test_a_worker_takes_runs_until_none_are_left_and_gives_its_run_back_when_it_is_ended() -> None:
    tasks = toy.squares(Path.cwd(), 4, sleep=0.3)
    with Store("sqlite:///runs/paper/runs.db") as store:
        store.add("some study", tasks)
        store.add("some study", [toy.task("alone", {"n": 9, "folder": str(Path.cwd())})])
    with start("worker") as worker:
        until(lambda: len(toy.log(Path.cwd())) >= 3)
        worker.terminate()
        _, said = worker.communicate(timeout=60)
    assert worker.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert states().keys() == {"waiting", "done"}
    # the run that must be alone is left to the command that asks for it, and keeps the worker waiting for nothing
    with start("worker") as worker:
        said, _ = worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert "runs done; none is left" in said
    assert states() == {"waiting": 1, "done": 4}
