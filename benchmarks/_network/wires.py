"""Wires between machines that hold every packet back for a while.

The kernel limits rates (``tc`` with ``tbf``), but one without ``sch_netem`` cannot delay. Here the other end of every
machine's cable is this process, which passes packets on when they are due; nothing in the library knows of it.
"""

import contextlib
import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType

from _machines import DEVICE, Machines, run

_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
LARGEST = 65000
"""Bytes of a packet: few of them, since each costs this process some microseconds."""
_URGENT = -20
_LOOK = 0.02  # seconds between looks at the file


class Wires:
    """A context in which machines reach one another through this process.

    Args:
        machines: whose own cables are replaced.
        delay: a file that says how many seconds a packet is held back; it may change at any time.
    """

    def __init__(self, machines: Machines, delay: Path) -> None:
        self._machines, self._delay = machines, delay
        self._ends: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._pass_on)

    def __enter__(self) -> "Wires":
        for i in range(self._machines.count):
            self._ends.append(self._plugged(i))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for end in self._ends:
            os.close(end)

    def _plugged(self, machine: int) -> int:
        """Give a machine a new cable; returns this process's end."""
        name, space = f"wire{os.getpid() % 10**6}-{machine}", self._machines.name(machine)
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _TUN_WITHOUT_HEADER))
        run("ip", "link", "set", name, "netns", space)
        run("ip", "-n", space, "link", "del", DEVICE)
        run("ip", "-n", space, "link", "set", name, "name", DEVICE, "mtu", str(LARGEST))
        run("ip", "-n", space, "address", "add", f"{self._machines.address(machine)}/24", "dev", DEVICE)
        run("ip", "-n", space, "link", "set", DEVICE, "up")
        return end

    def _pass_on(self) -> None:
        with contextlib.suppress(PermissionError):  # a wire does not wait for its turn
            os.setpriority(os.PRIO_PROCESS, 0, _URGENT)
        held: deque[tuple[float, int, bytes]] = deque()
        last = {int(self._machines.address(i).rpartition(".")[2]): end for i, end in enumerate(self._ends)}
        delay, looked = 0.0, -_LOOK
        while not self._over.is_set():
            now = time.monotonic()
            if now - looked > _LOOK:
                delay, looked = float(self._delay.read_text() or 0), now
            while held and held[0][0] <= now:
                _, end, packet = held.popleft()
                _write(end, packet)
            ready, _, _ = select.select(self._ends, [], [], max(held[0][0] - now, 0) if held else _LOOK)
            for end in ready:
                packet = os.read(end, LARGEST + 100)
                to = last.get(packet[19]) if packet[0] >> 4 == 4 else None  # the address of IPv4 ends there
                if to is not None:
                    held.append((time.monotonic() + delay, to, packet))


def _write(end: int, packet: bytes) -> None:
    try:
        os.write(end, packet)
    except OSError:  # its queue is full or its machine gone: the packet is lost, as packets are
        return
