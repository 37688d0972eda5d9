"""Several processes that share every batch, with `DistributedDataParallel`; each has its part of the training samples.

Run:  torchrun --standalone --nproc-per-node 2 examples/ddp.py [--optimizer adamw]
      python examples/ddp.py      (one process, all samples)

What to expect: DDPNOpt's lines are the same for any number of processes, to rounding: a step couples the samples of all
of them. So are AdamW's as long as all parts are of one size, since it sees the mean gradient alone.
"""

import torch
from _shared import criterion, digits, flags, network, row
from torch import distributed, nn

from ddpnopt import DDPNOpt

arguments = flags(__doc__, epochs=5, batch=16)
if distributed.is_torchelastic_launched():
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
several = distributed.is_initialized()
rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)

train, test = digits()
inner = network()
model = nn.parallel.DistributedDataParallel(inner) if several else inner
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

if rank == 0:
    row(0, inner, train, test)
shuffled = torch.Generator().manual_seed(0)  # the same order on every rank
for epoch in range(arguments.epochs):
    for batch in torch.randperm(len(train), generator=shuffled).split(arguments.batch):
        x, y = train[batch.tensor_split(ranks)[rank]]
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    if rank == 0:
        row(epoch + 1, inner, train, test)
if several:
    distributed.destroy_process_group()
