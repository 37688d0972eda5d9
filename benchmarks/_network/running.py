"""Start the ranks on machines of their own and collect what they found."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _machines import DEVICE, Machines

from _network.wires import Wires

_RANKS = Path(__file__).with_name("ranks.py")


def measured(
    size: int, batches: Sequence[int], timed: Sequence[int], conditions: Sequence[tuple[float, float]], turns: int
) -> tuple[list[dict[str, Any]], str]:
    """What every rank found, by rank; and what was in the way of machines of their own, if anything.

    Args:
        size: number of ranks.
        batches: samples per rank for which operations, bytes and messages are counted.
        timed: those for which steps are timed.
        conditions: of the network, each a delay in seconds and a rate in bits a second (0: no limit).
        turns: of timing.
    """
    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder = Path(text)
        (folder / "delay").write_text("0")
        machines = stack.enter_context(Machines(size))
        if machines.apart and size > 1:
            stack.enter_context(Wires(machines, folder / "delay"))
        job = {
            "batches": batches,
            "timed": timed,
            "turns": turns,
            "apart": machines.apart,
            "conditions": conditions if machines.apart else [(0.0, 0.0)],
        }
        (folder / "job.json").write_text(json.dumps(job))
        where = {"GLOO_SOCKET_IFNAME": DEVICE if size > 1 else "lo"} if machines.apart else {}
        environment = os.environ | where | {"OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(_RANKS), str(folder)]
        ranks = [
            subprocess.Popen(
                machines.on(rank, [*words, str(rank), str(size)]),
                env=environment,
                stderr=None if not rank else subprocess.DEVNULL,
            )
            for rank in range(size)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"ranks ended with codes {codes}")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)], machines.why
