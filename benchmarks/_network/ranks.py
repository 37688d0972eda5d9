"""One rank on its machine: counts what steps do, then times them under one condition after the other.

    python ranks.py FOLDER RANK SIZE

What is to be done stands in FOLDER/job.json; what was found is written to FOLDER/RANK.json.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _machines import DEVICE
from distributed_bytes import CYCLE, METHODS, NETWORKS

from _network.model import COMPARED
from ddpnopt.ranks import Ranks

SETTLE = 0.15
"""Seconds until every packet and every process knows of a new condition."""
TINY = 40
"""Exchanges of a number each that measure what a message costs."""
_BURST = 262144  # bytes that pass at once; at least a packet


def _product(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _mm(result: Any, left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _conv_backward(grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *more: Any, **_: Any) -> int:
    wanted: list[bool] = more[7][:2]  # torch's own formula leaves groups out
    return sum(wanted) * 2 * _product(grad) * _product(weight[1:])


def _cubic(factor: float) -> Callable[..., int]:
    return lambda matrix, *_, **__: int(factor * _product(matrix[:-2]) * matrix[-2] * matrix[-1] * min(matrix[-2:]))


def _solve(right: Sequence[int], factor: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _product(right) * factor[-1]


aten = torch.ops.aten
FLOPS: dict[Any, Any] = {
    aten.addmm_: _mm,
    aten.convolution_backward: _conv_backward,
    aten.linalg_cholesky_ex: _cubic(1 / 3),
    aten.cholesky_solve: _solve,
    aten.cholesky_inverse: _cubic(2 / 3),
    aten.linalg_qr: _cubic(2),
    aten._linalg_eigh: _cubic(9),
}
"""What torch's counter does not know, or counts otherwise."""


class Rank:
    """One rank of a group that has met.

    Args:
        rank: its number.
        size: of the group.
        folder: of the job.
        job: what is to be done.
    """

    def __init__(self, rank: int, size: int, folder: Path, job: dict[str, Any]) -> None:
        self.rank, self.size, self.folder, self.job = rank, size, folder, job

    def condition(self, delay: float, rate: float) -> None:
        """Have packets held back for ``delay`` seconds and sent at ``rate`` bits a second (0: as fast as may be)."""
        if self.size == 1 or not self.job["apart"]:
            return
        distributed.barrier()
        subprocess.run(["tc", "qdisc", "del", "dev", DEVICE, "root"], capture_output=True)
        if rate:
            limit = ["tbf", "rate", f"{rate:.0f}bit", "burst", str(_BURST), "latency", "4s"]
            subprocess.run(["tc", "qdisc", "add", "dev", DEVICE, "root", *limit], check=True)
        if self.rank == 0:
            (self.folder / "delay").write_text(str(delay))
        time.sleep(SETTLE)
        distributed.barrier()

    def messages(self) -> list[float]:
        """Seconds of a message, by condition: all ranks tell all others a number."""
        found = []
        own = torch.zeros(1)
        theirs = [torch.zeros(1) for _ in range(self.size)]
        for delay, rate in self.job["conditions"]:
            self.condition(delay, rate)
            began = time.perf_counter()
            for _ in range(TINY if self.size > 1 else 0):
                distributed.all_gather(theirs, own)
            found.append((time.perf_counter() - began) / TINY / max(self.size - 1, 1))
        return found

    def counts(self, network: str, method: str, batch: int) -> dict[str, float]:
        """Operations, bytes and messages of a step, means over the steps after which the curvature's work repeats."""
        step, ranks = self._loop(network, method, batch)
        step()
        ranks.traffic.bytes = ranks.traffic.messages = 0
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            for _ in range(CYCLE):
                step()
        done = {"flops": counter.get_total_flops(), "bytes": ranks.traffic.bytes, "messages": ranks.traffic.messages}
        return {name: value / CYCLE for name, value in done.items()}

    def times(self, network: str, method: str, batch: int) -> dict[str, list[list[float]]]:
        """Wall and processor seconds of a step, by turn and condition, the conditions taking turns."""
        step, _ = self._loop(network, method, batch)
        for _ in range(CYCLE):
            step()
        wall, processor = [], []
        for _ in range(self.job["turns"]):
            took = []
            for delay, rate in self.job["conditions"] if self.size > 1 else [(0.0, 0.0)]:
                self.condition(delay, rate)
                began, before = time.perf_counter(), time.process_time()
                for _ in range(CYCLE):
                    step()
                took.append(((time.perf_counter() - began) / CYCLE, (time.process_time() - before) / CYCLE))
            wall.append([seconds for seconds, _ in took])
            processor.append([seconds for _, seconds in took])
        self.condition(0.0, 0.0)
        return {"wall": wall, "processor": processor}

    def _loop(self, network: str, method: str, batch: int) -> tuple[Callable[[], None], Ranks]:
        torch.manual_seed(0)
        model: Any = nn.parallel.DistributedDataParallel(NETWORKS[network]())
        ranks = Ranks(distributed.group.WORLD)
        optimizer, criterion = METHODS[method](model, ranks), nn.CrossEntropyLoss()
        torch.manual_seed(self.rank)

        def step() -> None:
            optimizer.zero_grad()
            criterion(model(torch.randn(batch, 1, 28, 28)), torch.randint(10, (batch,))).backward()
            optimizer.step()

        return step, ranks


def main(folder: Path, rank: int, size: int) -> None:
    """Do the job."""
    torch.set_num_threads(1)
    with contextlib.suppress(PermissionError):  # of what else the machine does, as little as possible is measured
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    job = json.loads((folder / "job.json").read_text())
    own = Rank(rank, size, folder, job)
    found: dict[str, Any] = {"messages": own.messages(), "counts": [], "times": []}
    own.condition(0.0, 0.0)
    for network in NETWORKS:
        for method in COMPARED:
            for batch in job["batches"]:
                found["counts"].append([network, method, batch, own.counts(network, method, batch)])
            for batch in job["timed"]:
                found["times"].append([network, method, batch, own.times(network, method, batch)])
            print(f"{size} ranks: {network}, {method}", file=sys.stderr, flush=True)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
