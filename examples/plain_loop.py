"""A plain loop with all that a recipe may have: accumulation, clipping, a schedule by step, an average of the weights.

Run:  python examples/plain_loop.py [--optimizer adamw] [--schedule warm-restarts]

What to expect: both end between 96 and 97 %, by either schedule. Accumulation gives DDPNOpt the steps of the whole
batch. A clip shortens a step by as much as it cuts off more than usual. OneCycleLR cycles the momentum as well unless
it is told not to: AdamW takes that, DDPNOpt loses by it.
"""

import torch
from _shared import criterion, digits, flags, network, row
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ddpnopt import DDPNOpt

arguments = flags(__doc__, schedule=("one-cycle", "warm-restarts"), epochs=5, accumulate=2)
train, test = digits()
loader = DataLoader(train, batch_size=16, shuffle=True)
model = network()
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer, highest = DDPNOpt(model), 1.0
else:
    optimizer, highest = torch.optim.AdamW(model.parameters(), lr=3e-3), 1e-2

steps = arguments.epochs * len(loader)
scheduler: lr_scheduler.LRScheduler
if arguments.schedule == "one-cycle":
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=highest, total_steps=steps, cycle_momentum=False)
else:
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=len(loader))
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))

row(0, average, train, test)
for epoch in range(arguments.epochs):
    for x, y in loader:
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(arguments.accumulate), y.chunk(arguments.accumulate), strict=True):
            loss = criterion(model(part_x), part_y) * len(part_y) / len(y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
    row(epoch + 1, average, train, test)
