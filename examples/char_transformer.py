"""A character transformer on Shakespeare's plays and poems, or on a text of yours.

Run:  ddpnopt data fetch shakespeare
      python examples/char_transformer.py [--optimizer adamw] [--text FILE]

What to expect: DDPNOpt is ahead at equal steps, AdamW at equal time: after 300 steps the test losses are 1.99 and 2.26
nats a letter, and a step of DDPNOpt costs about four of AdamW's. Neither learning rate was tuned.
"""

import math
import time
from pathlib import Path

import torch
from _shared import flags
from torch import Tensor, nn

from ddpnopt import DDPNOpt
from ddpnopt.experiments.data import cache

arguments = flags(__doc__, text=str(cache() / "shakespeare" / "shakespeare.txt"), steps=300, every=50, context=64)
if not (path := Path(arguments.text)).is_file():
    raise SystemExit(f"{path} is not there: run `ddpnopt data fetch shakespeare`, or name a text by --text")
text = path.read_text(encoding="utf-8")
letters = sorted(set(text))
index = {letter: i for i, letter in enumerate(letters)}
codes = torch.tensor([index[letter] for letter in text])
train, test = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]


class Block(nn.Module):
    """Causal attention with four heads, then a dense network, each added to what it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.back = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[B, T, width]``."""
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.to_qkv(self.norm(x)).chunk(3, 2))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.back(heads.transpose(1, 2).flatten(2))
        return x + self.dense(x)


class Transformer(nn.Module):
    """Characters ``[B, T]`` to the scores of each next one ``[B, T, letters]``."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(len(letters), width), nn.Embedding(arguments.context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(letters)))

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        places = torch.arange(x.shape[1]).expand_as(x)  # expanded: every layer's input leads with the batch
        scores: Tensor = self.head(self.blocks(self.letter(x) + self.place(places)))
        return scores


def loss_of(part: Tensor, generator: torch.Generator | None = None, count: int = 32) -> Tensor:
    """Mean over the letters of ``count`` random windows, in nats."""
    starts = torch.randint(len(part) - arguments.context, (count, 1), generator=generator)
    windows = part[starts + torch.arange(arguments.context + 1)]
    return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


model = Transformer()
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
print(f"{len(text):,} characters, {len(letters)} different; guessing evenly costs {math.log(len(letters)):.3f}")
began = time.perf_counter()
for step in range(arguments.steps + 1):
    if step % arguments.every == 0:
        with torch.no_grad():
            losses = [float(loss_of(part, torch.Generator().manual_seed(1), 128)) for part in (train, test)]
        seconds = time.perf_counter() - began
        print(f"step {step}: train loss {losses[0]:.3f}, test loss {losses[1]:.3f}, {seconds:.0f} s", flush=True)
    optimizer.zero_grad()
    loss_of(train).backward()
    optimizer.step()
