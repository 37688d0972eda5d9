"""A second device for machines that have none.

Torch's device ``meta`` holds shapes and no numbers. Here each of its tensors has a twin on the CPU that holds the
numbers, and every operation runs on twins: what is computed "on meta" is what the CPU computes. Operations that mix
devices are refused by the rules of an accelerator, so that a tensor left behind, or fetched, is found without one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ddpnopt import conditions

NAME = "meta"
_ATEN = torch.ops.aten
_FROM_ANYWHERE = {_ATEN.copy_.default}
_INDICES_FROM_THE_CPU = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default}


class SecondDevice(TorchDispatchMode):
    """A context in which ``meta`` computes.

    Attributes:
        brought: shapes of the tensors that were copied from it to the CPU.
        ran: operations carried out on it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.ran = 0
        self.brought: list[tuple[int, ...]] = []
        self._twins: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == NAME
        if not to_device and not any(t.is_meta for t in tensors):
            return func(*args, **kwargs)
        self._refuse_mixtures(func, tensors)
        self.ran += 1
        on_twins = kwargs | {"device": "cpu"} if to_device else kwargs
        found = func(*tree_map(self._twin, args), **tree_map(self._twin, on_twins))
        if func in _FROM_ANYWHERE:
            if not args[0].is_meta:
                self.brought.append(tuple(args[0].shape))
            return args[0]
        if target is not None and not to_device:
            self.brought.append(tuple(found.shape))
            return found
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return func(*args, **kwargs)  # a view, or the argument itself: shares a storage that has its twin
        return tree_map(self._image, found)

    def _refuse_mixtures(self, func: Any, tensors: Sequence[Tensor]) -> None:
        if func in _FROM_ANYWHERE:
            return
        counted = tensors[:1] if func in _INDICES_FROM_THE_CPU else tensors
        if len({t.device.type for t in counted if t.ndim or t.is_meta}) > 1:
            raise RuntimeError(f"{func} on two devices: {[(t.device.type, tuple(t.shape)) for t in tensors]}")

    def _twin(self, value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        _, numbers = self._twins[value.untyped_storage()._cdata]
        return torch.empty(0, dtype=value.dtype).set_(numbers, value.storage_offset(), value.shape, value.stride())

    def _image(self, value: Any) -> Any:
        """The tensor on the device whose twin a tensor on the CPU is."""
        if not isinstance(value, Tensor):
            return value
        value = value.clone() if value.storage_offset() else value
        image = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=NAME)
        storage = image.untyped_storage()
        self._twins[storage._cdata] = storage, value.untyped_storage()  # held, so that its address stays its own
        return image


@contextmanager
def second_device(monkeypatch: Any) -> Iterator[SecondDevice]:
    """Let ``meta`` compute in the body; ``torch.autocast``, which does not know it, takes it for the CPU."""
    now = conditions.Conditions.now
    with monkeypatch.context() as patch, SecondDevice() as device:
        patch.setattr(conditions.Conditions, "now", staticmethod(lambda model, _: now(model, "cpu")))
        yield device
