"""`fully_shard` (FSDP2): every process keeps a piece of each parameter, and of the optimizer's state.

Run:  torchrun --standalone --nproc-per-node 2 examples/fsdp.py [--optimizer adamw] [--checkpoint runs/fsdp]
      python examples/fsdp.py      (one process, one piece)

What to expect: DDPNOpt's lines are the same for any number of processes, to rounding, and those of ddp.py. A run of
DDPNOpt with `--checkpoint` goes on from the last epoch that one has left there, also on another number of processes.
"""

import contextlib
import sys
from pathlib import Path

import torch
from _shared import criterion, digits, flags, network, row
from torch import distributed, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ddpnopt import DDPNOpt

arguments = flags(__doc__, epochs=5, batch=16, checkpoint="")
if distributed.is_torchelastic_launched():
    distributed.init_process_group("gloo")
elif not distributed.is_initialized():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
rank, ranks = distributed.get_rank(), distributed.get_world_size()

train, test = digits()
model = network()
mesh = init_device_mesh("cpu", (ranks,))
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

done = 0
folder = Path(arguments.checkpoint or ".")
while arguments.checkpoint and (folder / str(done + 1)).exists():
    done += 1
if done:
    load({"model": model.state_dict()}, checkpoint_id=folder / str(done))  # into every rank's own pieces
    if rank == 0:
        dcp_to_torch_save(folder / str(done), folder / "whole")
    distributed.barrier()
    whole = torch.load(folder / "whole", mmap=True, weights_only=True)  # of which every rank keeps its pieces
    optimizer.load_state_dict(whole["optimizer"])

shuffled = torch.Generator().manual_seed(0)  # the same order on every rank
with contextlib.redirect_stdout(sys.stdout if rank == 0 else None):  # every rank runs the model, one prints
    row(done, model, train, test)
    for epoch in range(arguments.epochs):
        order = torch.randperm(len(train), generator=shuffled)
        if epoch < done:
            continue
        for batch in order.split(arguments.batch):
            x, y = train[batch.tensor_split(ranks)[rank]]
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        row(epoch + 1, model, train, test)
        if arguments.checkpoint:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(state, checkpoint_id=folder / str(epoch + 1))
distributed.destroy_process_group()
