"""What modules carry from one forward to the next, such as membrane potentials, or the hidden state of an agent.

A forward goes on from it as from an argument: what it was computed from belongs to the forward before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .._torch.modules import Place, buffer_places, own_attributes, put_back
from .._torch.pytree import map_tensors, once_each
from .samples.beside import inside, made_beside


def cut_off(tensor: Tensor) -> Tensor:
    """A tensor without what it was computed from, such as the forward before this one."""
    return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()


def carried(model: nn.Module) -> list[Tensor]:
    """The differentiable tensors that the modules hold before a forward."""
    buffers = [place.value for module in model.modules() for place in buffer_places(module)]
    return [*made_beside(model, None).values(), *(b for b in buffers if b.grad_fn is not None)]


@contextmanager
def carried_cut_off(model: nn.Module) -> Iterator[bool]:
    """Inside, the modules hold what they carry as if it were given; whether they carry anything."""
    cut: Callable[[Tensor], Tensor] = once_each(cut_off)
    places: list[Place] = []
    if carried(model):
        for module in model.modules():
            held = [Place(vars(module), name, value) for name, value in own_attributes(module).items()]
            places += [p for p in (*held, *buffer_places(module)) if next(inside(p.value), None) is not None]
    held_by_all = map_tensors(cut, [place.value for place in places])  # what two modules share stays one
    for place, value in zip(places, held_by_all, strict=True):
        place.put(value)
    try:
        yield bool(places)
    finally:
        put_back(places)
