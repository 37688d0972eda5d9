"""Hugging Face Accelerate: ``prepare`` wraps model, optimizer and loader; the loop is Accelerate's usual one.

Run:  python examples/accelerate_loop.py [--optimizer adamw] [--accumulate 2]
      torchrun --standalone --nproc-per-node 2 examples/accelerate_loop.py      (processes that share every batch)

What to expect: about 96 % for both, and in one process the very weights of a plain loop on the same batches. Make the
optimizer with the model itself, before ``prepare``. Clipping more than usual makes a step shorter in one process, and
reaches no layer of DDPNOpt on several.
"""

import contextlib
import sys

import torch
from _shared import criterion, digits, flags, network, row
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ddpnopt import DDPNOpt

arguments = flags(__doc__, epochs=5, accumulate=1, batch=16)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=arguments.accumulate)
train, test = digits()
model = network()
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
parts = arguments.accumulate * accelerator.num_processes  # in which the pictures of a step come
loader = DataLoader(train, batch_size=arguments.batch // parts, shuffle=True)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
    optimizer, arguments.epochs * len(loader) // arguments.accumulate
)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

with contextlib.redirect_stdout(sys.stdout if accelerator.is_main_process else None):
    row(0, model, train, test)
    for epoch in range(arguments.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        row(epoch + 1, model, train, test)
