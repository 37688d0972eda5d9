import math
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

from ddpnopt.experiments.study import search
from ddpnopt.experiments.study.lab import DirectLab, Params
from ddpnopt.experiments.study.store import Store
from experiments import toy_kinds as toy
from experiments.study_tools import CODES

Trials = dict[str, list[tuple[int, str, Params, float | None]]]


def trials(address: str) -> Trials:
    found, some = {}, optuna.samplers.RandomSampler()
    for summary in optuna.get_all_study_summaries(address):
        study = optuna.load_study(study_name=summary.study_name, storage=address, sampler=some)
        found[summary.study_name] = [(one.number, one.state.name, one.params, one.value) for one in study.trials]
    return found


def score(asked: list[tuple[str, Params]]) -> list[float]:
    return [-math.inf if params["a"] > 2 else -abs(params["a"] - 1.5) for _, params in asked]


def test_a_search_is_resumed_with_the_same_trials_and_choice(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = store.address
    calm = f"sqlite:///{tmp_path}/calm.db"
    choice = search.search(calm, "toy", CODES, toy.GRIDS, score)
    assert choice == DirectLab({}).search(toy.GRIDS, score)
    counted = {name.rpartition(" ")[0]: len(some) for name, some in trials(calm).items()}
    assert counted == {"toy first": 6, "toy second": 2}
    whole, asked, told = optuna.trial.Trial.suggest_float, [0], [0]

    def die_asking(*arguments: Any, **options: Any) -> float:
        asked[0] += 1
        if asked[0] == 6:  # one of two hyper-parameters of the third trial
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    tell = optuna.Study.tell

    def die_telling(*arguments: Any, **options: Any) -> Any:
        told[0] += 1
        if told[0] == 4:
            raise KeyboardInterrupt
        return tell(*arguments, **options)

    for method, dies in (("suggest_float", die_asking), ("tell", die_telling)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(optuna.trial.Trial if dies is die_asking else optuna.Study, method, dies)
            search.search(address, "toy", CODES, toy.GRIDS, score)
    assert {state for some in trials(address).values() for _, state, _, _ in some} == {"COMPLETE", "RUNNING"}
    for _ in range(2):
        assert search.search(address, "toy", CODES, toy.GRIDS, score) == choice
        assert trials(address) == trials(calm)
    search.search(address, "toy", CODES | {"square": "newer code"}, toy.GRIDS, score)
    assert len(trials(address)) == 4


def test_a_value_that_is_no_number_is_a_failed_trial_and_a_doubled_one_is_refused(store: Store) -> None:
    address = store.address
    grids = {"some": {"a": (1.0, 2.0)}}
    assert search.search(address, "toy", 1, grids, lambda _: [0.0, math.nan]) == {"some": {"a": 1.0}}
    assert [state for some in trials(address).values() for _, state, _, _ in some].count("FAIL") == 1
    with pytest.raises(ValueError, match="names a value twice"):
        search.search(address, "toy", 1, {"some": {"a": (1.0, 1.0)}}, lambda _: [0.0, 0.0])


def test_a_search_outlives_connections_that_are_dropped_during_the_runs(store: Store) -> None:
    opened: list[sqlite3.Connection] = []

    def drop(asked: list[tuple[str, Params]]) -> list[float]:
        for connection in opened:
            connection.close()
        return score(asked)

    def remember(connection: sqlite3.Connection, _: Any) -> None:
        opened.append(connection)

    event.listen(Engine, "connect", remember)
    try:
        choice = search.search(store.address, "toy", CODES, toy.GRIDS, drop)
    finally:
        event.remove(Engine, "connect", remember)
    assert choice == DirectLab({}).search(toy.GRIDS, score)
    assert {state for some in trials(store.address).values() for _, state, _, _ in some} == {"COMPLETE"}


@pytest.mark.parametrize(
    "error",
    [OperationalError("", {}, sqlite3.OperationalError("away")), optuna.exceptions.StorageInternalError("away")],
)
def test_a_search_whose_storage_goes_away_says_so_and_is_continued(
    store: Store, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="does not answer; what it holds is kept"):
        patch.setattr(optuna.Study, "tell", away)
        search.search(store.address, "toy", CODES, toy.GRIDS, score)
    choice = search.search(store.address, "toy", CODES, toy.GRIDS, score)
    assert choice == DirectLab({}).search(toy.GRIDS, score)
    assert sum(len(some) for some in trials(store.address).values()) == 8


@pytest.mark.parametrize("statement", ["CREATE TABLE studies", "CREATE TABLE trials", "INSERT INTO alembic_version"])
def test_commands_that_make_one_database_in_the_same_moment_do_not_collide(address: str, statement: str) -> None:
    met: list[str] = []

    def meanwhile(_: Any, __: Any, words: str, *___: Any) -> None:
        if words.strip().startswith(statement) and not met:
            met.append(words)
            with search._open(address):
                pass

    Path(address.removeprefix("sqlite:///")).parent.mkdir()
    event.listen(Engine, "before_cursor_execute", meanwhile)
    try:
        choice = search.search(address, "toy", CODES, toy.GRIDS, score)
    finally:
        event.remove(Engine, "before_cursor_execute", meanwhile)
    assert met
    assert choice == DirectLab({}).search(toy.GRIDS, score)
    assert sum(len(some) for some in trials(address).values()) == 8


def test_a_search_that_another_command_ends_meanwhile_is_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, asked = optuna.Study.ask, []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        trial = ask(*arguments, **options)
        asked.append(trial)
        if len(asked) == 3:
            monkeypatch.setattr(optuna.Study, "ask", ask)
            search.search(store.address, "toy", CODES, toy.GRIDS, score)
        return trial

    monkeypatch.setattr(optuna.Study, "ask", meanwhile)
    assert search.search(store.address, "toy", CODES, toy.GRIDS, score) == DirectLab({}).search(toy.GRIDS, score)
    assert {state for some in trials(store.address).values() for _, state, _, _ in some} == {"COMPLETE"}


def test_a_trial_that_another_command_tells_in_the_same_moment_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = optuna.Study.tell

    def told_before(*arguments: Any, **options: Any) -> None:
        tell(*arguments, **options)
        raise optuna.exceptions.UpdateFinishedTrialError

    monkeypatch.setattr(optuna.Study, "tell", told_before)
    assert search.search(store.address, "toy", CODES, toy.GRIDS, score) == DirectLab({}).search(toy.GRIDS, score)
    assert {state for some in trials(store.address).values() for _, state, _, _ in some} == {"COMPLETE"}
