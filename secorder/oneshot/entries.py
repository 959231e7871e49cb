"""What enters the autograd graph without a gradient, such as ids and masks: does it hold each sample's own rows?

The graph tells where samples are in all that requires a gradient. Tensors of which none does enter it as operands: the
ids of a lookup, a mask. Those that the model makes of sizes, buffers and parameters alone are the same for all samples.
Of the others the model is run once more as far as the last of them enters, with other samples in each sample's place:
the operand must be the same as before, or have its rows exchanged likewise, where the graph has the samples. What is in
the graph is not computed again: its values are nobody's concern.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch.pytree import map_tensors
from .._torch.sample_graph import SHARED, InnerSizes, place_of
from .._torch.versions import version

#: Functions whose operands are aligned with their result by the last dimensions, as broadcasting does.
_BROADCAST = frozenset({
    "add", "radd", "sub", "rsub", "mul", "rmul", "div", "rdiv", "truediv", "rtruediv", "where", "masked_fill",
})  # fmt: skip

#: Functions whose first operand is aligned with their result by its first dimensions.
_LOOKUPS = frozenset({"embedding", "linear"})

#: Operators that write into their first operand.
_ASSIGNMENTS = frozenset({
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__",
    "__ixor__", "__ilshift__", "__irshift__",
})  # fmt: skip

#: What is told of a tensor without its values.
_FACTS = (torch.Size, torch.device, torch.dtype, torch.layout)

#: Tensors of a call's arguments, looked at this deep in lists and dictionaries.
_DEPTH = 4


class Enough(BaseException):
    """The last call of interest was made: the model need not run on."""


@dataclass
class _Operand:
    """A tensor that may depend on the inputs, where it enters first."""

    call: int  #: number of the call
    index: int  #: of the tensor among the call's
    tensor: Tensor
    version: int  #: as which it entered
    #: what it entered: the node and output that the call ended with, its shape, whether the operand's dimensions count
    #: from the first of that, and how many of the last are others
    uses: list[tuple[Any, int, torch.Size, bool, int]] = field(default_factory=list)


class Entries:
    """Sees the calls of a forward."""

    def __init__(self, model: nn.Module) -> None:
        self.opaque = False  #: whether something was seen of which nothing can be told
        self._calls = 0
        self._names: list[str] = []
        #: By id: tensors that no input has a part in, as of a version.
        self._clean: dict[int, tuple[Tensor, int]] = {}
        self._operands: dict[tuple[int, int], _Operand] = {}
        #: By the number of the call: numbers that were read of tensors that inputs may have a part in.
        self._read: dict[int, Any] = {}
        #: By the number of the call: what it returned that is in the graph, without values.
        self._hollow: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._keep(tensor)

    def _keep(self, tensor: Tensor) -> None:
        self._clean[id(tensor)] = (tensor, version(tensor))

    def _is_clean(self, tensor: Tensor) -> bool:
        found = self._clean.get(id(tensor))
        return found is not None and found[0] is tensor and found[1] == version(tensor)

    def called(self, name: str, arguments: Any, result: Any, *, creates: bool, asks: bool) -> None:
        """Enter a call: one that ``creates`` takes only the shape of its arguments, one that ``asks`` no values."""
        self._calls += 1
        self._names.append(name)
        graph, dirty = False, []
        for index, tensor in enumerate(tensors_of(arguments)):
            if tensor.requires_grad:
                graph = True
            elif not self._is_clean(tensor):
                dirty.append((index, tensor))
        if graph and not creates:
            self._hollow[self._calls] = _without_values(result)
            if not dirty:
                return
        results = tensors_of(result)
        if not dirty or creates:
            for t in results:
                self._keep(t)
            return
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _ASSIGNMENTS
        entered = [t for t in results if t.requires_grad]
        if asks or (not entered and isinstance(result, _FACTS)):
            return
        if not results:
            self._read[self._calls] = result
            self.opaque |= graph or not isinstance(result, (bool, int, float, str, list, type(None)))
        elif graph and (in_place or not entered):
            self.opaque = True
        else:
            for index, tensor in dirty if entered else ():
                self._enter(name, index, tensor, entered)

    def _enter(self, name: str, index: int, tensor: Tensor, results: Sequence[Tensor]) -> None:
        aligned = _aligned(name.strip("_"), index)
        if aligned is None or len(results) != 1 or results[0].grad_fn is None:
            self.opaque = True
            return
        key = id(tensor), version(tensor)
        operand = self._operands.setdefault(key, _Operand(self._calls, index, tensor, key[1]))
        operand.uses.append((results[0].grad_fn, results[0].output_nr, results[0].shape, *aligned))

    def independent(self, inner_sizes: InnerSizes, count: int, order: Tensor, run: Callable[["Replay"], None]) -> bool:
        """Whether each operand's rows belong to the samples that the graph has there.

        ``run`` runs the model under what it is given, on samples exchanged so that place n holds sample ``order[n]``.
        """
        if self.opaque or any(inner is None for inner in inner_sizes.values()):
            return False
        operands = list(self._operands.values())
        wanted = {(operand.call, operand.index): operand for operand in operands}
        last = max([operand.call for operand in operands] + list(self._read), default=0)
        replay = Replay(self._names[:last], {call for call, _ in wanted}, set(self._read), self._hollow)
        if last:
            try:
                run(replay)
            except Enough:
                pass
            except Exception:  # of the model: samples may not stand in any order
                return False
        if replay.failed or replay.calls < last or any(replay.read.get(k) != v for k, v in self._read.items()):
            return False
        return all(
            version(operand.tensor) == operand.version
            and _follows(operand, replay.seen.get(key), inner_sizes, count, order)
            for key, operand in wanted.items()
        )


class Replay(TorchFunctionMode):
    """Inside, a model makes the same calls again, as far as they are of interest; those in the graph return no values.

    Attributes:
        calls: how many it made.
        seen: by call and number, the tensors that it made them with.
        read: by call, numbers that were read.
        failed: whether it made other calls.
    """

    def __init__(self, names: Sequence[str], entries: set[int], read: set[int], hollow: Mapping[int, Any]) -> None:
        super().__init__()
        self.calls, self.failed = 0, False
        self.seen: dict[tuple[int, int], Tensor] = {}
        self.read: dict[int, Any] = {}
        self._names, self._entries, self._answers, self._hollow = names, entries, read, hollow

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call."""
        kwargs = kwargs or {}
        self.calls += 1
        self.failed |= self.calls > len(self._names) or getattr(function, "__name__", "") != self._names[self.calls - 1]
        if self.failed:
            raise Enough
        if self.calls in self._entries:
            for index, tensor in enumerate(tensors_of((args, kwargs))):
                self.seen[self.calls, index] = tensor.detach()
            if self.calls == len(self._names):
                raise Enough
        result = self._hollow[self.calls] if self.calls in self._hollow else function(*args, **kwargs)
        if isinstance(result, _Kind):
            result = _hollow(result)
        if self.calls in self._answers:
            self.read[self.calls] = result
        if self.calls == len(self._names):
            raise Enough
        return result


class _Kind(NamedTuple):
    """What a tensor is, but for its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _hollow(kind: "_Kind | Tensor") -> Tensor:
    """A tensor of a shape and kind, which takes no memory."""
    return torch.empty_strided(kind.shape, (0,) * len(kind.shape), dtype=kind.dtype, device=kind.device)


def _without_values(result: Any) -> Any:
    """What a call returned; of a tensor, which most return, what it is: it is made where it is asked for."""
    if isinstance(result, Tensor):
        return _Kind(result.shape, result.dtype, result.device)
    plain = not isinstance(result, (tuple, list, dict)) or isinstance(result, torch.Size)
    return result if plain else map_tensors(_hollow, result)


def _follows(operand: _Operand, after: Tensor | None, inner_sizes: InnerSizes, count: int, order: Tensor) -> bool:
    """Whether an operand is the same after samples were exchanged, or exchanged as they are at all of its uses."""
    before = operand.tensor
    if after is None or after.shape != before.shape or after.dtype != before.dtype:
        return False
    if torch.equal(before, after):
        return True
    found: dict[tuple[int, int], bool] = {}
    for node, number, shape, first, others in operand.uses:
        inner = inner_sizes.get((node, number), ...)
        if inner is ...:  # the output does not depend on it
            continue
        place = None if inner is None or inner == SHARED else place_of(shape, inner, count)
        if place is None:
            return False
        dim = place.dim if first else place.dim - len(shape) + before.dim()
        apart = place.dim < len(shape) - others and 0 <= dim < before.dim()
        if not apart or before.shape[dim] != shape[place.dim]:
            return False
        if (dim, place.step) not in found:
            split = before.unflatten(dim, (-1, count, place.step)).index_select(dim + 1, order.to(before.device))
            found[dim, place.step] = torch.equal(split.flatten(dim, dim + 2), after)
        if not found[dim, place.step]:
            return False
    return True


def _aligned(name: str, index: int) -> tuple[bool, int] | None:
    """Whether an operand is aligned with a function's result by the first dimensions, and how many of the last are not.

    None where it is not known.
    """
    if name in _LOOKUPS and index == 0:
        return True, 1
    if name == "scaled_dot_product_attention" and index == 3:  # the mask, whose last dimensions are queries and keys
        return False, 2
    return (False, 0) if name in _BROADCAST else None


def tensors_of(arguments: Any, depth: int = _DEPTH) -> list[Tensor]:
    """The tensors among a call's arguments."""
    if isinstance(arguments, Tensor):
        return [arguments]
    found: list[Tensor] = []
    if depth and isinstance(arguments, (tuple, list, dict)):
        for x in arguments.values() if isinstance(arguments, dict) else arguments:
            if isinstance(x, Tensor):  # at once: a forward has thousands
                found.append(x)
            elif isinstance(x, (tuple, list, dict)):
                found += tensors_of(x, depth - 1)
    return found
