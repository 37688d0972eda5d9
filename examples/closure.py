"""The cheapest form: a closure that only returns the loss. No parameter gradient is formed, any loss will do.

Run:  python examples/closure.py
"""

import torch

from ddpnopt import DDPNOpt, Exact

torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.linspace(-1, 1, 64)[:, None]
y = torch.sin(4 * x)

model = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = DDPNOpt(model, terminal=Exact())  # the loss is at hand in the closure: no criterion is needed


def closure() -> torch.Tensor:
    """Mean over samples of half the squared error."""
    return (model(x) - y).square().sum(1).mean() / 2


for step in range(201):
    loss = optimizer.step(closure)
    if step % 50 == 0:
        told = optimizer.diagnostics()
        print(f"step {step}: loss {float(loss.detach()):.2e}, predicted decrease {told['predicted_decrease']:.2e}")
