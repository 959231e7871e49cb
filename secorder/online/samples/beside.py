"""What a forward makes beside outputs of samples, such as auxiliary losses: is it a sum of what each sample makes?

A loss may use what the model keeps (the balance of experts, a commitment, a penalty on activations), or returns beside
its outputs. Each sample has a gradient of its own of it where it is a sum over samples: then, of two parts of a batch,
what changing one of them changes is the same whatever the other one is: of the parts s and t, with others s' and t' in
their places, k(s, t) − k(s', t) − k(s, t') + k(s', t') = 0. Otherwise (a mean that is squared, or multiplied with
another mean) samples influence one another's gradients, which shows in train mode too, and of what has no derivative.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._torch.modules import own_attributes
from ..._torch.pytree import attributes_of, elements, tensors_in
from ..._torch.random_state import fresh_generator
from ...oneshot.independence import without_gradients
from ...oneshot.user_code import is_foreign
from .hypotheses import Trial

#: What passes for rounding in sums of as many terms as models have, in units in the last place of the largest value.
UNITS = 128

#: How deep lists, dicts and the user's own objects on a module are gone through, and how many of their entries.
DEPTH, ENTRIES = 3, 256


class Beside(NamedTuple):
    """Where a tensor is that a forward has made."""

    module: str | None  #: the name of the module that keeps it; None where the model returns it
    #: the attribute, and what leads to it there: keys, attributes of an object with a dot before them, or places
    #: counted from a list's end, which may have held others before; of what is returned, its number among the output's
    #: tensors
    path: tuple[Any, ...]

    def __str__(self) -> str:
        if self.module is None:
            return f"tensor {self.path[0]} of its output"
        name = f"{self.module}.{self.path[0]}".lstrip(".")
        return name + "".join(key if _is_attribute(key) else f"[{key!r}]" for key in self.path[1:])


def made_beside(model: nn.Module | None, output: Any) -> dict[Beside, Tensor]:
    """The differentiable tensors that modules keep after a forward, and those that the model returns."""
    found = {
        Beside(name, (key, *path)): tensor
        for name, module in (model.named_modules() if model is not None else ())
        for key, value in own_attributes(module).items()
        for path, tensor in inside(value)
    }
    return found | {Beside(None, (i,)): t for i, t in enumerate(tensors_in(output)) if is_made(t)}


def inside(value: Any, depth: int = DEPTH) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The differentiable tensors in nested lists, tuples, dicts and objects, each with what leads to it."""
    if isinstance(value, Tensor):
        if is_made(value):
            yield (), value
        return
    for key, entry in _entries(value)[-ENTRIES:] if depth else ():
        for path, tensor in inside(entry, depth - 1):
            yield (key, *path), tensor


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """What a container, or an object of the user's own, holds, with what leads to it."""
    if isinstance(value, dict):
        return list(dict.items(value))
    if isinstance(value, (list, tuple)):
        held = elements(value)
        return [(i - len(held), x) for i, x in enumerate(held)]
    return [] if is_foreign(type(value)) else [(f".{name}", x) for name, x in attributes_of(value).items()]


def _is_attribute(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(".")


def is_made(tensor: Tensor) -> bool:
    """Whether it is one of real numbers that a forward has computed, and that a loss can be differentiated by."""
    return tensor.requires_grad and not tensor.is_leaf and tensor.is_floating_point() and not tensor.is_nested


def coupling(model: nn.Module, trial: Trial, base: Mapping[Beside, Tensor]) -> frozenset[Beside]:
    """Of what a forward has made beside outputs of samples (``base``), the tensors that are no sums over samples."""
    count = trial.hypothesis.num_samples
    if count < 2 or not base:
        return frozenset()
    part = torch.randperm(count, generator=fresh_generator(), device="cpu") < count // 2

    def values(mask: Tensor, alike: bool) -> dict[Beside, Tensor]:
        """What the forward makes where these samples have others, of the batch, in their places."""
        output = without_gradients(lambda x: trial._replace(arguments=x).changed(mask, alike=alike), trial.arguments)
        return made(output)

    def made(output: Any) -> dict[Beside, Tensor]:
        held = {place: tensor_at(model, output, place) for place in base}
        return {p: t.detach().double() for p, t in held.items() if t is not None and t.shape == base[p].shape}

    before = {place: t.detach().double() for place, t in base.items()}
    if trial.hypothesis.shifting:
        before = made(without_gradients(lambda x: trial._replace(arguments=x).unchanged(), trial.arguments))
    kinds = {torch.float32, *(p.dtype for p in model.parameters() if p.is_floating_point())}  # float32: of many losses
    eps = max(torch.finfo(kind).eps for kind in kinds)
    found: set[Beside] = set()
    untold = set(base)
    for alike in (True, False):  # what is not finite where many samples are one may be so of neighbours
        try:
            first = values(part, alike)
            untold = {p for p in untold if p in first and not torch.equal(first[p], before[p])}
            if not untold:
                break
            second, both = values(~part, alike), values(torch.ones_like(part), alike)
        except Exception:  # inputs that the model does not accept tell nothing
            break
        for place in untold & second.keys() & both.keys():
            four = torch.stack([before[place], first[place], second[place], both[place]])
            if bool(four.isfinite().all()):
                untold.discard(place)
                rounding = UNITS * max(eps, torch.finfo(base[place].dtype).eps) * four.abs().amax()
                if bool(((four[0] - four[1] - four[2] + four[3]).abs() > rounding).any()):
                    found.add(place)
    return frozenset(found)


def tensor_at(model: nn.Module, output: Any, place: Beside) -> Tensor | None:
    """The tensor that is in a place now."""
    try:
        found: Any = list(tensors_in(output))
        if place.module is not None:
            found = own_attributes(model.get_submodule(place.module))
        for key in place.path:
            is_container = isinstance(found, (dict, list, tuple))
            found = found[key] if is_container or not _is_attribute(key) else getattr(found, key[1:])
    except (AttributeError, LookupError, TypeError):
        return None
    return found if isinstance(found, Tensor) else None
