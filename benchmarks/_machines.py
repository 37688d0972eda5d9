"""Machines that are made of one: network namespaces with an address each, joined by pairs of virtual cables.

Needs root and Linux's ``ip``, ``unshare``; where they will not do, the processes of all machines run side by side.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType

_NETWORK = "10.213.77"
_WINDOWS = {
    "tcp_slow_start_after_idle": "0",
    "tcp_rmem": "4096 8388608 33554432",
    "tcp_wmem": "4096 8388608 33554432",
    "tcp_congestion_control": "reno",
}
"""As on computers that are set up for training: a connection that was idle does not begin slowly again."""
DEVICE = "cable"
"""Name of a machine's end of its cable."""


class Machines:
    """A context in which there are ``count`` machines, their cables plugged into one switch.

    Args:
        count: of machines, each a network namespace of its own.
        wanted: ``False``: plain processes, whatever can be made.

    Attributes:
        apart: whether they are namespaces; else every machine is this one.
        why: what was in the way, if they are not.
    """

    def __init__(self, count: int, *, wanted: bool = True) -> None:
        self.count, self.apart = count, wanted
        self.why = "" if wanted else "not asked for"
        self._names = [f"ddpnopt-{os.getpid()}-{i}" for i in range(count)]
        self._switch = f"ddpnopt-{os.getpid()}-switch"

    def __enter__(self) -> "Machines":
        if not self.apart:
            return self
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__(None, None, None)
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
            self.apart, self.why = False, str(said or error).strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.apart and shutil.which("ip"):
            for name in (*self._names, self._switch):  # the cables go with them
                subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def name(self, machine: int) -> str:
        """Of its namespace."""
        return self._names[machine]

    def address(self, machine: int) -> str:
        """Where a machine can be reached by the others."""
        return f"{_NETWORK}.{machine + 1}" if self.apart else "127.0.0.1"

    def on(self, machine: int, words: Sequence[str], *, own_processes: bool = False) -> list[str]:
        """The command that runs ``words`` on a machine.

        Args:
            machine: from 0 on.
            words: a command.
            own_processes: whether it sees no processes but its own, as on another computer; ended with the command.
        """
        if not self.apart:
            return list(words)
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if own_processes else []
        return ["ip", "netns", "exec", self._names[machine], *alone, *words]

    def _make(self) -> None:
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for i, name in enumerate(self._names):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            cable = ["link", "add", DEVICE, "type", "veth", "peer", "name", f"port{i}", "netns", self._switch]
            run("ip", "-n", name, *cable)
            run("ip", "-n", self._switch, "link", "set", f"port{i}", "master", "bridge")
            run("ip", "-n", self._switch, "link", "set", f"port{i}", "up")
            run("ip", "-n", name, "address", "add", f"{self.address(i)}/24", "dev", DEVICE)
            run("ip", "-n", name, "link", "set", DEVICE, "up")
            for setting, value in _WINDOWS.items():
                run("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{setting}")


def run(*words: str) -> str:
    """Run a command to its end; what it printed."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
