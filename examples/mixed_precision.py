"""Mixed precision: autocast to bfloat16, or to float16 with a GradScaler.

Run:  python examples/mixed_precision.py [--optimizer adamw] [--dtype float16]

What to expect: within a point of full precision for both, about 96 %. The second forward pass runs under the autocast
of the first. ``scaler.unscale_`` may stand before ``scaler.step``; a clip then counts as a factor of the loss.
"""

import torch
from _shared import criterion, digits, flags, network, row
from torch.utils.data import DataLoader

from ddpnopt import DDPNOpt

arguments = flags(__doc__, dtype=("bfloat16", "float16"), epochs=5)
device = "cuda" if torch.cuda.is_available() else "cpu"
train, test = digits()
loader = DataLoader(train, batch_size=16, shuffle=True)
model = network().to(device)
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, enabled=arguments.dtype == "float16")

row(0, model, train, test)
for epoch in range(arguments.epochs):
    for x, y in loader:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=getattr(torch, arguments.dtype)):
            loss = criterion(model(x.to(device)), y.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    row(epoch + 1, model, train, test)
