"""Open the database that an address names, or say what is wrong with the address."""

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

_BUSY = 30.0  # seconds for which a process waits for another one's write to a SQLite file


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
        raise ValueError(f"{error.name} is not installed; install it with pip install 'ddpnopt[postgres]'") from error


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
