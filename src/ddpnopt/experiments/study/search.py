"""Searches over grids as Optuna studies, kept in the database of the runs."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import GridSampler
from optuna.storages import RDBStorage
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import DBAPIError

from ddpnopt.experiments.study.address import connect_arguments, make_tables, tune
from ddpnopt.experiments.study.lab import Grid, Params, Values, best, combinations


class _Grid(GridSampler):
    def after_trial(self, *_: Any) -> None:
        """Do nothing: the base class would stop a loop that does not exist here, which is an error."""


def search(address: str, name: str, version: Any, grids: Mapping[str, Grid], values: Values) -> dict[str, Params]:
    """Let Optuna ask for every combination of every grid, and tell it the values.

    Args:
        address: of the database.
        name: of the study; an Optuna study is named ``NAME SEARCH DIGEST``.
        version: what else decides the values (fingerprints of the code), as JSON can hold it; another version is
            another Optuna study. Trials of the same version that were asked for and not told are told now.
        grids: by the name of the search.
        values: scores, higher is better.

    Returns:
        As :meth:`Lab.search`.

    Raises:
        ValueError: a grid names a value twice, or the database does not answer.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # says nothing that the progress of the runs does not
    with _open(address) as storage:
        asked: list[tuple[str, Params]] = []
        trials: list[tuple[optuna.Study, int, int]] = []
        for search, grid in grids.items():
            digest = hashlib.sha256(json.dumps([grid, version], sort_keys=True).encode()).hexdigest()[:12]
            study = optuna.create_study(
                storage=storage,
                sampler=_Grid(grid, seed=0),
                study_name=f"{name} {search} {digest}",
                direction="maximize",
                load_if_exists=True,
            )
            trials += [(study, number, len(asked) + place) for number, place in _ask(study, search, grid).items()]
            asked += [(search, one) for one in combinations(grid)]
        found = values(asked)
        for study, number, place in trials:
            told = {"state": TrialState.FAIL} if math.isnan(found[place]) else {"values": found[place]}
            with suppress(UpdateFinishedTrialError):  # as below; told between Optuna's look and its writing
                study.tell(number, **told, skip_if_finished=True)
    return best(asked, found)


@contextmanager
def _open(address: str) -> Iterator[RDBStorage]:
    # between asking and telling lie the runs, hours in which a server may drop a connection that is not used
    options = {"connect_args": connect_arguments(address), "pool_pre_ping": True}
    try:
        storage = make_tables(lambda: RDBStorage(address, engine_kwargs=options), StorageInternalError)
        try:
            tune(storage.engine)
            storage.engine.dispose()  # connections made before that
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except (DBAPIError, StorageInternalError) as error:
        raise ValueError(
            "the storage of the searches does not answer; what it holds is kept: start again when it does"
        ) from error


def _ask(study: optuna.Study, search: str, grid: Grid) -> dict[int, int]:
    """Place of each trial's combination in the grid, by the trial's number; asks for those never asked for."""
    if any(len(set(values)) < len(values) for values in grid.values()):
        raise ValueError(f"the grid of {search} names a value twice: {dict(grid)}; name it once")
    while True:
        try:
            return _places(study, grid)
        except UpdateFinishedTrialError:  # the same command, given twice, has told it meanwhile: look again
            continue


def _places(study: optuna.Study, grid: Grid) -> dict[int, int]:
    places, known = combinations(grid), dict[int, int]()
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:  # asked for, perhaps not in full, by a process that was then killed
            known[trial.number] = places.index(_suggest(Trial(study, trial._trial_id), grid))
        else:
            known[trial.number] = places.index(trial.params)
    while len(set(known.values())) < len(places):
        asked = study.ask()
        known[asked.number] = places.index(_suggest(asked, grid))
    return known


def _suggest(trial: Trial, grid: Grid) -> Params:
    return {name: trial.suggest_float(name, min(values), max(values)) for name, values in grid.items()}
