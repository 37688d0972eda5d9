"""The table of runs: one row a task, in a SQLite file or on a PostgreSQL server.

Every change is one conditional statement, so that any number of processes on any number of machines may work on one
table, and any of them may be killed at any moment.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from ddpnopt.experiments.study import identity
from ddpnopt.experiments.study.address import connect, make_tables
from ddpnopt.experiments.study.task import Task

LEASE = 60.0
ATTEMPTS = 5  # workers that may die over one task before it is held to be the cause
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # between tries to reach a server that restarts
_CHUNK = 500  # keys in one statement; databases limit its parameters


class _Now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock, the one clock that all machines share."""

    type = sql.Double()
    inherit_cache = True


@compiles(_Now, "sqlite")
def _now_sqlite(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(_Now, "postgresql")
def _now_postgresql(*_: Any, **__: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


_RUNS = sql.Table(
    "runs",
    sql.MetaData(),
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("study", sql.Text, nullable=False),
    sql.Column("kind", sql.Text, nullable=False),
    sql.Column("settings", sql.Text, nullable=False),
    sql.Column("code", sql.Text, nullable=False),
    sql.Column("state", sql.String(8), nullable=False, default="waiting"),
    sql.Column("worker", sql.Text),
    sql.Column("beat", sql.Double),
    sql.Column("attempts", sql.Integer, nullable=False, default=0),
    sql.Column("result", sql.Text),
    sql.Column("error", sql.Text),
    sql.Column("seconds", sql.Double),
    sql.Column("created", sql.Double, nullable=False, default=_Now()),
    sql.Column("started", sql.Double),
    sql.Column("finished", sql.Double),
    sql.Index("runs_state_study", "state", "study"),
)
_C = _RUNS.c


@dataclass(frozen=True)
class Claim:
    """A task that a worker was handed out."""

    key: str
    kind: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A row as it stands.

    Attributes:
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        result: figures of a run that is done, else None.
        error: what went wrong with one that failed, else None.
        seconds: how long it took, else None.
    """

    state: str
    result: dict[str, Any] | None
    error: str | None
    seconds: float | None


class Store:
    """The table of runs, made where it does not exist; a context that closes its connections.

    Args:
        address: ``sqlite:///FOLDER/FILE.db`` or ``postgresql+psycopg://USER:PASSWORD@HOST/DATABASE``.
        lease: seconds after a worker's last sign of life when its task is handed out again; one of this machine
            whose process has ended is noticed at once.

    Raises:
        ValueError: the address will not do, or the database does not answer; also raised by every method.
    """

    def __init__(self, address: str, lease: float = LEASE) -> None:
        self.address, self.lease = address, lease
        self._engine = connect(address)
        self._insert = (sqlite if self._engine.dialect.name == "sqlite" else postgresql).insert(_RUNS)
        try:
            make_tables(lambda: _RUNS.metadata.create_all(self._engine))
        except DBAPIError as error:
            raise ValueError(self._silent(error)) from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.dispose()

    def add(self, study: str, tasks: Sequence[Task]) -> None:
        """Have tasks run for a study; those that are known stay as they are, waiting ones change to this study."""
        rows = {task.key: _row(study, task) for task in tasks}
        for keys in _chunks(list(rows)):
            self._execute(self._insert.on_conflict_do_nothing(), [rows[key] for key in keys])
            others = sql.and_(_C.key.in_(keys), _C.state == "waiting", _C.study != study)
            self._execute(sql.update(_RUNS).where(others).values(study=study))

    def keep(self, study: str, done: Sequence[tuple[Task, Run]]) -> None:
        """Take over finished runs; a task that is finished here, or under way, stays as it is."""
        rows = {
            task.key: _row(study, task)
            | {"state": "done", "result": json.dumps(run.result, allow_nan=False), "seconds": run.seconds}
            for task, run in done
        }
        values = {name: self._insert.excluded[name] for name in ("study", "state", "result", "seconds")}
        idle = sql.or_(_C.state == "waiting", _C.state == "failed")
        change = self._insert.on_conflict_do_update(index_elements=["key"], set_=values | {"error": None}, where=idle)
        for keys in _chunks(list(rows)):
            self._execute(change, [rows[key] for key in keys])

    def retry(self, keys: Sequence[str]) -> None:
        """Let those of these tasks that failed wait again."""
        for some in _chunks(keys):
            failed = sql.and_(_C.key.in_(some), _C.state == "failed")
            self._execute(sql.update(_RUNS).where(failed).values(state="waiting", attempts=0, error=None))

    def forget_others(self, study: str, keys: Sequence[str]) -> None:
        """Drop tasks that wait for a study which no longer asks for them: only ``keys`` are left waiting."""
        waiting = sql.and_(_C.study == study, _C.state == "waiting")
        known = {row.key for row in self._execute(sql.select(_C.key).where(waiting))}
        for some in _chunks(sorted(known - set(keys))):
            self._execute(sql.delete(_RUNS).where(_C.key.in_(some), waiting))

    def claim(self, worker: str, codes: Mapping[str, str], study: str | None = None) -> Claim | None:
        """Hand out a waiting task; None if there is none.

        Args:
            worker: name of the process (:func:`identity.own`).
            codes: kinds the worker can run, each with the fingerprint its code has here; a task of other code is
                left to whoever has that.
            study: only tasks of this study; None (default): of any.
        """
        found = self._take(worker, codes, study)
        if found is None and self._recover():
            found = self._take(worker, codes, study)
        return found

    def beat(self, key: str, worker: str) -> bool:
        """Give a sign of life; False if the task is no longer this worker's."""
        return self._change(key, worker, {"beat": _Now()})

    def finish(self, key: str, worker: str, result: str, seconds: float) -> bool:
        """Keep a result (JSON text); False, and nothing is changed, if the task is no longer this worker's."""
        done = {"state": "done", "result": result, "seconds": seconds, "finished": _Now()}
        return self._change(key, worker, done)

    def fail(self, key: str, worker: str, error: str, seconds: float) -> bool:
        """Keep an error in place of a result."""
        failed = {"state": "failed", "error": error, "seconds": seconds, "finished": _Now()}
        return self._change(key, worker, failed)

    def release(self, key: str, worker: str) -> bool:
        """Give a task back unfinished."""
        return self._change(key, worker, {"state": "waiting", "worker": None, "attempts": _C.attempts - 1})

    def unfinished(self, codes: Mapping[str, str], study: str | None = None) -> bool:
        """Whether a task that a worker could run (see :meth:`claim`) waits or is being run by someone."""
        some = sql.and_(_C.state.in_(["waiting", "running"]), _suits(codes, study))
        return bool(self._execute(sql.select(_C.key).where(some).limit(1)))

    def counts(self, keys: Sequence[str]) -> dict[str, int]:
        """How many of these tasks are in each state."""
        found = dict.fromkeys(("waiting", "running", "done", "failed"), 0)
        for some in _chunks(keys):
            query = sql.select(_C.state, sql.func.count()).where(_C.key.in_(some)).group_by(_C.state)
            for state, count in self._execute(query):
                found[state] += count
        return found

    def runs(self, keys: Sequence[str]) -> dict[str, Run]:
        """The rows of these tasks, by key."""
        found = {}
        for some in _chunks(keys):
            query = sql.select(_C.key, _C.state, _C.result, _C.error, _C.seconds).where(_C.key.in_(some))
            for key, state, result, error, seconds in self._execute(query):
                found[key] = Run(state, None if result is None else json.loads(result), error, seconds)
        return found

    def results(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The results of those of these tasks that are done, by key."""
        return {key: run.result for key, run in self.runs(keys).items() if run.result is not None}

    def _take(self, worker: str, codes: Mapping[str, str], study: str | None) -> Claim | None:
        waiting = sql.and_(_C.state == "waiting", _suits(codes, study))
        first = sql.select(_C.key).where(waiting).order_by(_C.created, _C.key).limit(1)
        # a server would let two workers find the same row and leave one empty-handed; SQLite has a single writer
        chosen = first.with_for_update(skip_locked=True).scalar_subquery()
        change = sql.update(_RUNS).where(_C.key == chosen, _C.state == "waiting")
        change = change.values(state="running", worker=worker, attempts=_C.attempts + 1, beat=_Now(), started=_Now())
        for key, kind, settings in self._execute(change.returning(_C.key, _C.kind, _C.settings)):
            return Claim(key, kind, json.loads(settings))
        return None

    def _recover(self) -> bool:
        """Let tasks of dead workers wait again; one over which too many died fails. Whether there were any."""
        workers = self._execute(sql.select(_C.worker).where(_C.state == "running").distinct())
        gone = [worker for (worker,) in workers if identity.gone(worker)]
        abandoned = sql.or_(_C.worker.in_(gone), _C.beat < _Now() - self.lease)
        last = _C.attempts >= ATTEMPTS
        error = f"{ATTEMPTS} workers died over it without a word; it may need more memory than there is"
        change = sql.update(_RUNS).where(_C.state == "running", abandoned)
        change = change.values(
            state=sql.case((last, "failed"), else_="waiting"), error=sql.case((last, error)), worker=None
        )
        return bool(self._execute(change.returning(_C.key)))

    def _change(self, key: str, worker: str, values: Mapping[str, Any]) -> bool:
        own = sql.and_(_C.key == key, _C.worker == worker, _C.state == "running")
        return bool(self._execute(sql.update(_RUNS).where(own).values(dict(values)).returning(_C.key)))

    def _execute(self, statement: sql.Executable, rows: list[dict[str, Any]] | None = None) -> Sequence[Any]:
        """Carry out one statement for good, once more if the database does not answer: each may be repeated."""
        for pause in (*_PAUSES, None):
            try:
                with self._engine.begin() as connection:
                    done = connection.execute(statement, rows)
                    return done.all() if done.returns_rows else []
            except OperationalError as error:
                if pause is None:
                    raise ValueError(self._silent(error)) from error
                time.sleep(pause)
        raise AssertionError("unreachable: the last round returns or raises")

    def _silent(self, error: DBAPIError) -> str:
        where = self._engine.url.render_as_string(hide_password=True)
        return f"the storage {where} does not answer ({error.orig}); what it holds is kept: start again when it does"


def _row(study: str, task: Task) -> dict[str, Any]:
    settings = json.dumps(dict(task.settings), sort_keys=True, allow_nan=False)
    return {"key": task.key, "study": study, "kind": task.kind, "settings": settings, "code": task.code}


def _suits(codes: Mapping[str, str], study: str | None) -> sql.ColumnElement[bool]:
    able = sql.or_(sql.false(), *(sql.and_(_C.kind == kind, _C.code == code) for kind, code in codes.items()))
    return able if study is None else sql.and_(able, _C.study == study)


def _chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (keys[start : start + _CHUNK] for start in range(0, len(keys), _CHUNK))
