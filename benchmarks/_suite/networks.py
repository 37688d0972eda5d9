"""The networks, by the name that the registration gives them."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, arange, nn

HEADS = 4


def mlp(inputs: Sequence[int], outputs: int, width: Sequence[int]) -> nn.Module:
    """Dense, ReLU; ``[B, *inputs]`` to ``[B, outputs]``."""
    sizes = [_numel(inputs), *width]
    hidden = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*([nn.Flatten()] if len(inputs) > 1 else []), *hidden, nn.Linear(sizes[-1], outputs))


def cnn(inputs: Sequence[int], outputs: int, width: Sequence[int]) -> nn.Module:
    """Two 3x3 convolutions of stride 2 and two dense layers, ReLU; ``[B, C, H, W]`` to ``[B, outputs]``."""
    channels, (depth, height, width_) = width[0], inputs
    pixels = -(-height // 4) * -(-width_ // 4)
    return nn.Sequential(
        nn.Conv2d(depth, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * pixels, 4 * channels),
        nn.ReLU(),
        nn.Linear(4 * channels, outputs),
    )


class Residual(nn.Module):
    """``relu(short(x) + norm(conv(relu(norm(conv(x))))))``; a 1x1 convolution is the short cut where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(4, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(4, outputs),
        )
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.short(x) + self.body(x))


def resnet(inputs: Sequence[int], outputs: int, width: Sequence[int]) -> nn.Module:
    """A convolution of stride 2, three residual blocks of growing width, mean over pixels, a dense layer."""
    w = width[0]
    return nn.Sequential(
        nn.Conv2d(inputs[0], w, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(4, w),
        nn.ReLU(),
        Residual(w, w, 1),
        Residual(w, 2 * w, 2),
        Residual(2 * w, 4 * w, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * w, outputs),
    )


class Block(nn.Module):
    """Causal attention, then a dense network, each added to what it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.back = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.to_qkv(self.norm(x)).chunk(3, 2))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.back(heads.transpose(1, 2).flatten(2))
        out: Tensor = x + self.dense(x)
        return out


class Transformer(nn.Module):
    """Characters ``[B, T]`` to the scores of each next one ``[B, T, letters]``; a block for each entry of width."""

    def __init__(self, inputs: Sequence[int], outputs: int, width: Sequence[int]) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(outputs, width[0]), nn.Embedding(inputs[0], width[0])
        self.blocks = nn.Sequential(*(Block(w) for w in width))
        self.head = nn.Sequential(nn.LayerNorm(width[-1]), nn.Linear(width[-1], outputs))

    def forward(self, x: Tensor) -> Tensor:
        places = arange(x.shape[1], device=x.device).expand_as(x)
        scores: Tensor = self.head(self.blocks(self.letter(x) + self.place(places)))
        return scores


NETWORKS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "transformer": Transformer}


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
