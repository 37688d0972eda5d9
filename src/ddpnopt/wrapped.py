"""``DistributedDataParallel`` around the model: found, and told to leave every rank its own gradients.

Layers are read off columns, which ranks exchange themselves; averaging all of ``.grad`` beside that would send as much
again for nothing, and would weigh ranks alike where their batches are not.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, distributed, nn

if distributed.is_available():
    from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The module itself and the wrapper around it, if that is what was given."""
    if distributed.is_available() and isinstance(model, DistributedDataParallel):
        return model.module, model
    return model, None


def wrapper_running() -> Any:
    """The wrapper whose forward pass is under way, or ``None``."""
    return DistributedDataParallel._get_active_ddp_module() if distributed.is_available() else None


def keep_gradients_local(wrapper: Any, owner: object) -> None:
    """Let the wrapper average no gradients for as long as ``owner`` lives and is not closed.

    A wrapper that has a communication hook already keeps it: gradients then are that hook's.
    """
    known: weakref.ref[Any] = weakref.ref(owner)
    group = wrapper.process_group

    def hook(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        alive = known()
        if alive is None or alive.closed:
            mean = bucket.buffer().div_(distributed.get_world_size(group))
            future = distributed.all_reduce(mean, group=group, async_op=True).get_future()
            return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]
        own: torch.futures.Future[Tensor] = torch.futures.Future()
        own.set_result(bucket.buffer())
        return own

    hook.__annotations__.pop("bucket")  # torch looks at it
    try:
        wrapper.register_comm_hook(None, hook)
    except RuntimeError:  # there is one: torch lets nobody replace it
        return
