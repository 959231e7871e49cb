"""How much memory a device has left, and how much work takes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily

from .pytree import tensors_in

#: By how much what may be alive exceeds the most that was, before it is looked at what is.
SLACK = 1.05


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a CUDA device, what PyTorch holds in reserve among them; None elsewhere.

    Asked for once a second at most: the driver takes milliseconds to tell, as long as a small model's step.
    """
    return None if device.type != "cuda" else _free_in(int(time.monotonic()), device)


@lru_cache(maxsize=16)
def _free_in(second: int, device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + reserve)


def most_bytes(work: Callable[[], object]) -> int:
    """Bytes of the tensors made while ``work`` runs that are alive at once, at most, to some hundredths.

    Those that operations return: what one takes for itself alone is not seen.
    """
    with _Alive() as alive:
        work()
    most: int = alive.most
    return most


@contextmanager
def unmetered() -> Iterator[None]:
    """Inside, operations are as fast as they are, and :func:`most_bytes` does not see what they return."""
    with _pop_mode_temporarily() if isinstance(_get_current_dispatch_mode(), _Alive) else nullcontext():
        yield


class _Alive(TorchDispatchMode):
    """Follows the memory of what operations return, by references that keep nothing alive."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled inside, and to be skipped loads all of the compiler, which takes a second."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._bound = 0  # the bound counts what may have been freed
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and note what is new."""
        result = function(*args, **(kwargs or {}))
        if not _makes_tensors(function):
            return result
        for tensor in (result,) if isinstance(result, Tensor) else tensors_in(result):
            place = _memory(tensor)
            known = self._made.get(place)
            if place and (known is None or known[0].expired()):
                self._note(place, tensor)
        return result

    def _note(self, place: int, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._made[place] = StorageWeakRef(storage), storage.nbytes()
        self._bound += storage.nbytes()
        if self._bound > SLACK * self.most:
            self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
            self._bound = sum(size for _, size in self._made.values())
            self.most = max(self.most, self._bound)


@lru_cache(maxsize=4096)
def _makes_tensors(function: Any) -> bool:
    """Whether it returns memory of its own, by its schema; views, and what is changed in place, are somebody's."""
    schema = getattr(function, "_schema", None)
    return schema is None or any(returned.alias_info is None for returned in schema.returns)


def _memory(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 where it has none of its own, as what wraps another one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
