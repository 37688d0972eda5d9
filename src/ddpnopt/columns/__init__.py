"""What the Bellman pass asks of one block of parameters: its columns' gradients ``U``, rarely formed.

Shapes: ``R`` columns per sample, ``B`` samples, ``N = R * B``, ``S`` positions (places of an image or a
sequence, and uses, if a layer runs several times), a block's gradient is ``[out, fan_in]``. Column ``n`` is
``(r, b)`` with ``b`` fastest; its gradient ``U_n`` is that of column ``r`` of sample ``b``'s own loss.

Two forms: :class:`OuterColumns` keeps the factors ``v`` and ``x`` of ``U_n = sum_s v_ns x_bs'``;
:class:`DenseColumns` keeps ``U``. A third, for tables of rows, is in :mod:`ddpnopt.columns.rows`;
:class:`ScaledColumns` is any of them, times a number per sample, and :class:`SpreadColumns` those of the samples of
several processes. All answer the same
questions, and a test equates them.
"""

from .base import CHUNK, WIDEST, Columns, Diagonal, Moment, add_
from .combine import over_batches, over_uses
from .dense import DenseColumns
from .outer import OuterColumns
from .rows import RowColumns, gathered
from .scaled import ScaledColumns
from .spread import SpreadColumns, spreads

__all__ = [
    "CHUNK",
    "WIDEST",
    "Columns",
    "DenseColumns",
    "Diagonal",
    "Moment",
    "OuterColumns",
    "RowColumns",
    "ScaledColumns",
    "SpreadColumns",
    "add_",
    "gathered",
    "over_batches",
    "over_uses",
    "spreads",
]
