"""Open the database that an address names, or say what is wrong with the address."""

import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

_BUSY = 30.0  # seconds for which a process waits for another one's write to a SQLite file
_TRIES, _LONGEST = 10, 0.2  # at making tables; seconds between two
_Made = TypeVar("_Made")


def connect(address: str) -> Engine:
    """Make an engine; nothing is sent to a server yet.

    Args:
        address: ``sqlite:///FOLDER/FILE.db``, whose folder is made, or ``postgresql+psycopg://USER@HOST/DATABASE``.

    Raises:
        ValueError: the address is of another sort, or the driver is not installed.
    """
    forms = "use sqlite:///FOLDER/FILE.db or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
    try:
        url = make_url(address)
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise ValueError(f"storage {url.get_backend_name()} is not supported; {forms}")
        if url.get_backend_name() == "sqlite":
            return _sqlite(address, url.database, forms)
        return create_engine(url, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError):
        raise ValueError(f"the storage's address cannot be read; {forms}") from None
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'ddpnopt[experiments]'") from error


def make_tables(make: Callable[[], _Made], also: type[Exception] = DBAPIError) -> _Made:
    """Call what makes the tables that are missing until it does not fail, a few times.

    Processes that look at a new database in one moment all see that a table is missing, and all but one then fail to
    make it, or to insert its one row. Each goes on where the others are by then.

    Args:
        make: makes them.
        also: an error, beside the driver's own, by which it tells that it failed.
    """
    for left in reversed(range(_TRIES)):
        try:
            return make()
        except (DBAPIError, also):
            if not left:
                raise
            time.sleep(random.uniform(0.0, _LONGEST))
    raise AssertionError("unreachable: the last round returns or raises")


def tune(engine: Engine) -> None:
    """Let many processes share a SQLite file: readers beside one writer, one wait for the disk per checkpoint.

    A commit survives a killed process; one just before a power cut may be lost, as if its run had not ended.
    """

    def prepare(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(engine, "connect", prepare)


def connect_arguments(address: str) -> dict[str, Any]:
    """What the driver is given beside the address."""
    return {"timeout": _BUSY} if make_url(address).get_backend_name() == "sqlite" else {}


def _sqlite(address: str, file: str | None, forms: str) -> Engine:
    if file in (None, "", ":memory:"):
        raise ValueError(f"storage {address} is no file, so no other process could see it; {forms}")
    Path(str(file)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args=connect_arguments(address))
    tune(engine)
    return engine
