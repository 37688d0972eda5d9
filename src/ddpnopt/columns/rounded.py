"""Rows of float32 numbers in 18 bits each, for sums of many products: half as much to send, and little lost.

A block of 64 numbers has one scale, its largest size over 131,071, and of each number the nearest whole multiple:
sixteen bits of it as an integer, two more with those of three others in a byte. That is 148 bytes instead of 256. An
error is at most half a multiple, 4e-6 of the block's largest number, whatever its size. Errors are independent, so in
an inner product of rows of ``P`` numbers of like size they come to about ``1e-5 / sqrt(P)`` of the rows' lengths. Half
precision, at 128 bytes, would keep eleven bits of a number.
"""

import torch
from torch import Tensor

BLOCK = 64
"""Numbers that share a scale."""

LARGEST = (1 << 17) - 1
"""The largest multiple."""

BYTES = 4 + 2 * BLOCK + BLOCK // 4
"""Bytes of a block: its scale, the high sixteen bits, the low two."""


def packed(rows: Tensor) -> Tensor:
    """Rows ``[..., P]`` of float32 as bytes ``[..., ceil(P / BLOCK), BYTES]``.

    A block with a number that is not finite comes out as not finite.

    Example:
        >>> import torch
        >>> from ddpnopt.columns.rounded import packed, unpacked
        >>> rows = torch.tensor([[1.0, 0.3, 0.0], [1e-30, -3e-31, 0.0]])
        >>> packed(rows).shape
        torch.Size([2, 1, 148])
        >>> torch.testing.assert_close(unpacked(packed(rows))[:, :3], rows, rtol=1e-5, atol=0)
    """
    blocks = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(torch.finfo(rows.dtype).tiny)
    multiples = (blocks / scale).round_().int()
    low = (multiples & 3).to(torch.uint8).unflatten(-1, (-1, 4)) << _shifts(rows.device)
    parts = [scale.view(torch.uint8), (multiples >> 2).short().view(torch.uint8), low.sum(-1, dtype=torch.uint8)]
    return torch.cat(parts, -1)


def unpacked(data: Tensor) -> Tensor:
    """Rows ``[..., n * BLOCK]`` of float32 from bytes ``[..., n, BYTES]``; what :func:`packed` added are zeros."""
    scale, high, low = data.split([4, 2 * BLOCK, BLOCK // 4], -1)
    two = low[..., None] >> _shifts(data.device) & 3
    multiples = (high.clone().view(torch.int16).int() << 2) + two.flatten(-2)
    rows: Tensor = multiples * scale.clone().view(torch.float32)
    return rows.flatten(-2)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 8, 2, dtype=torch.uint8, device=device)
