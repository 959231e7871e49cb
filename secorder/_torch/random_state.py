"""The global random state, taken and set as a whole, and generators of our own beside it."""

import os
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_LOCK = threading.RLock()


def _let_go_in_child() -> None:
    """A child process has none of the other threads, so that what one of them held would be held for ever."""
    global _LOCK
    if _LOCK.acquire(blocking=False):  # as also where the thread that forked holds it, which goes on in the child
        _LOCK.release()
    else:
        _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class RandomState(NamedTuple):
    """The global random state: torch's on the CPU and on CUDA devices, Python's and NumPy's (where it is loaded).

    Of torch's alone, Python's is None: to take the others costs as much as some layers do.
    """

    cpu: Tensor
    cuda: list[Tensor]
    python: tuple[Any, ...] | None
    numpy: Any


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that the model is on."""
    if not torch.cuda.is_initialized():
        return []
    return sorted({t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.is_cuda})


def get_random_state(cuda: Sequence[int], *, of_torch: bool = False) -> RandomState:
    """The random state as it is now, or that of torch alone."""
    of_torch_now = torch.get_rng_state(), [torch.cuda.get_rng_state(index) for index in cuda]
    if of_torch:
        return RandomState(*of_torch_now, None, None)
    numpy = sys.modules.get("numpy")
    return RandomState(*of_torch_now, random.getstate(), None if numpy is None else numpy.random.get_state())


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside, other threads wait: what all share changes (the random state, PyTorch's settings, a model's parameters).

    A thread that Python did not start waits for none: autograd's of a device run what whoever is inside waits for.
    """
    lock = _LOCK  # in a child, that is another one
    held = lock.acquire(blocking=not isinstance(threading.current_thread(), threading._DummyThread))
    try:
        yield
    finally:
        if held:
            lock.release()


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """What is drawn inside (by a data loader, say), also on the model's devices, is put back at the end."""
    cuda = cuda_devices(model)
    with one_at_a_time():
        state = get_random_state(cuda)
        try:
            yield
        finally:
            set_random_state(state, cuda)


def same_random_state(one: RandomState, other: RandomState) -> bool:
    """Whether two random states of the same devices are one, so that nothing was drawn in between."""
    tensors = zip((one.cpu, *one.cuda), (other.cpu, *other.cuda), strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and same_beside_torch(one, other)


def same_beside_torch(one: RandomState, other: RandomState) -> bool:
    """The same of Python's and NumPy's alone."""
    return one.python == other.python and (
        one.numpy is None or other.numpy is None or _plain(one.numpy) == _plain(other.numpy)
    )


def _plain(numpy: Any) -> tuple[Any, ...]:
    """NumPy's state without an array, which compares element by element."""
    kind, key, *rest = numpy
    return kind, key.tobytes(), *rest


def set_random_state(state: RandomState, cuda: Sequence[int]) -> None:
    """Go back to a random state."""
    torch.set_rng_state(state.cpu)
    for index, device_state in zip(cuda, state.cuda, strict=True):
        torch.cuda.set_rng_state(device_state, index)
    if state.python is not None:
        random.setstate(state.python)
    if state.numpy is not None:
        sys.modules["numpy"].random.set_state(state.numpy)


#: Of generators of our own: the operating system's, that no seed of the user's is drawn from.
seeds: random.Random = random.SystemRandom()


def fresh_generator(device: torch.device | None = None) -> torch.Generator:
    """A generator seeded by the operating system: the global random state is not ours to advance.

    On a CUDA device where that is given, so that what is drawn need not be copied there; else on the CPU.
    """
    generator = torch.Generator(device if device is not None and device.type == "cuda" else torch.device("cpu"))
    return generator.manual_seed(seeds.getrandbits(63))
