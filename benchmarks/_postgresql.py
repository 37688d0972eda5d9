"""A PostgreSQL server of one's own in a folder that is thrown away."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_USER = "postgres"  # as Debian's package calls it; the server refuses to be root


def programs() -> Path | None:
    """Folder of ``initdb`` and ``pg_ctl``; ``None`` where the server is not installed."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *filter(None, [Path(shutil.which("initdb") or "")])]
    return next((path.resolve().parent for path in found if path.is_file()), None)


@contextmanager
def server(
    address: str = "", on: Callable[[Sequence[str]], list[str]] = list, network: str = "127.0.0.1/32"
) -> Iterator[Path]:
    """Run a server, whose user ``study`` needs no password.

    Args:
        address: where it listens, at its usual port, beside the socket; default nowhere.
        on: makes of a command the one that runs it where the server shall be; default here.
        network: of its clients.

    Returns:
        The folder of its socket.

    Raises:
        FileNotFoundError: the server is not installed.
    """
    folder = programs()
    if folder is None:
        raise FileNotFoundError("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    place = Path(tempfile.mkdtemp(prefix="study", dir="/tmp"))  # its socket's path must be short
    user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(place, _USER, _USER)
        user = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]

    def program(name: str, *words: str) -> None:
        command = on([*user, str(folder / name), "-D", str(place / "data"), *words])
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=place)

    try:
        program("initdb", "-A", "trust", "-U", "study", "--no-sync")
        with (place / "data" / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all study {network} trust\n")
        options = f"-F -k {place} -c listen_addresses='{address}'"
        program("pg_ctl", "-w", "-l", str(place / "log"), "-o", options, "start")
        try:
            yield place
        finally:
            program("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(place)
