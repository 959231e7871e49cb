"""The autograd graph: its nodes, the tensors that they have saved, and the backward of one node alone."""

import gc
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: A node of the graph, as ``tensor.grad_fn`` is one.
Node = Any

#: Nodes that ``torch.vmap`` runs without an error and with another result (PyTorch 2.13).
WRONG_UNDER_VMAP = frozenset({"CdistBackward0"})

#: Operations that see a tensor in other dimensions, or copy it, and change no number.
RESHAPES = frozenset({"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "Alias"})

#: Ends the names of PyTorch's own nodes; those of custom functions have no number.
_NUMBERED = re.compile(r"Backward\d+$")

#: Begins the names of functions that are not PyTorch's own, or of which it has no second derivative: a script's.
_OTHERS = ("torch::autograd::CppNode<", "torch::jit::")

#: How many nodes of graphs this thread has made so far: the number of the next one.
nodes_made: Callable[[], int] = torch._C._autograd._get_sequence_nr

#: By node, those that take its outputs: the node, and the number of its input.
Users = dict[Node, list[tuple[Node, int]]]


class Output(NamedTuple):
    """One of the tensors that a node computed."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@contextmanager
def collection_paused() -> Iterator[None]:
    """Inside, Python looks for no garbage: it would go through all there is for the many small objects of a walk."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def nodes_behind(roots: Iterable[Node]) -> Iterator[Node]:
    """These nodes and all that they lead to, each once; whoever iterates may stop."""
    waiting = list(dict.fromkeys(roots))
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)


def number_of(node: Node) -> int:
    """The number that a node got as it was made, which tells it from all others of its thread but from leaves."""
    return int(node._sequence_nr())


def elements_by_operation(output: Tensor) -> float:
    """The numbers that an operation in the graph of a tensor computed, on average."""
    nodes = [] if output.grad_fn is None else nodes_behind([output.grad_fn])
    sizes = [math.prod(x.shape) for node in nodes if not hasattr(node, "variable") for x in outputs_of(node)]
    return sum(sizes) / max(1, len(sizes))


def leaves_of(outputs: Iterable[Tensor]) -> dict[int, Tensor]:
    """The leaves that a backward from some tensors reaches, by ``id``; a leaf among these tensors is its own."""
    outputs = [t for t in outputs if t.requires_grad]
    nodes = nodes_behind(t.grad_fn for t in outputs if t.grad_fn is not None)
    leaves = [t for t in outputs if t.grad_fn is None]
    leaves += [v for node in nodes if isinstance(v := getattr(node, "variable", None), Tensor)]
    return {id(leaf): leaf for leaf in leaves}


def leads_to_these_alone(output: Tensor, leaves: Collection[int]) -> bool:
    """Whether a backward from a tensor reaches no leaves but these, given by ``id``."""
    if output.grad_fn is None:
        return id(output) in leaves
    reached = (getattr(node, "variable", None) for node in nodes_behind([output.grad_fn]))
    return all(leaf is None or id(leaf) in leaves for leaf in reached)  # the first other one will do


@collection_paused()
def users_of(outputs: Iterable[Tensor], inputs: Iterable[Tensor] = ()) -> Users:
    """The graph behind outputs, as far as inputs, from its leaves on; the same graph gives the same order."""
    roots = [t.grad_fn for t in outputs if t.grad_fn is not None]
    users: Users = {root: [] for root in roots}
    first = {t.grad_fn for t in inputs if t.grad_fn is not None}
    waiting = list(users)
    while waiting:
        node = waiting.pop()
        if node in first:
            continue
        for index, (before, _) in enumerate(node.next_functions):
            if before is None:
                continue
            found = users.get(before)
            if found is None:
                users[before] = [(node, index)]
                waiting.append(before)
            else:
                found.append((node, index))
    return users


def outputs_of(node: Node, *, real: bool = True) -> list[Output]:
    """What a node computed, as far as it holds real numbers, or all of it."""
    return [
        Output(number, tuple(seen.shape), seen.dtype)
        for number, seen in enumerate(node._input_metadata)
        if seen.dtype.is_floating_point or not real
    ]


def dtypes_of(nodes: Iterable[Node]) -> set[torch.dtype]:
    """Those of all that some nodes computed."""
    return {seen.dtype for node in nodes for seen in node._input_metadata}


def least_precise(tensors: Sequence[Tensor]) -> torch.dtype:
    """The floating-point dtype of the fewest digits in which anything in the graph of tensors was computed."""
    kinds = dtypes_of(nodes_behind(t.grad_fn for t in tensors if t.grad_fn is not None))
    return fewest_digits({*kinds, *(t.dtype for t in tensors)})


def fewest_digits(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one of the fewest digits among those that are floating-point, or whose parts are."""
    kinds = (kind.to_real() for kind in dtypes)
    return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: torch.finfo(kind).eps)


def shape_of(node: Node, number: int) -> tuple[int, ...]:
    """Of one of the tensors that a node computed; of a leaf, the leaf's."""
    return tuple(node._input_metadata[number].shape)


def operation_of(node: Node) -> str:
    """The name of the operation that a node is the backward of, such as ``"Add"``; "" for a custom function's."""
    return _operation(node.name())


@cache
def _operation(name: str) -> str:
    return _NUMBERED.sub("", name) if _NUMBERED.search(name) else ""


def current_node() -> Node:
    """The node that a hook on a node is called for."""
    return torch._C._current_autograd_node()


def saved(node: Node, name: str) -> Any:
    """What a node has saved from forward for its backward; a tensor without its history.

    A number, which to a dispatch mode is no tensor, is not touched.
    """
    found = getattr(node, f"_saved_{name}")
    return found.detach() if isinstance(found, Tensor) and found.requires_grad else found


def packed(node: Node, name: str) -> bool:
    """Whether hooks have packed a tensor that a node has saved, so that to ask for it runs theirs."""
    return getattr(node, f"_raw_saved_{name}").unpack_hook is not None


def signed(number: int) -> int:
    """A number as a node has saved it: of 64 bits without a sign, also where it was negative, such as a dimension."""
    return number - (1 << 64) if number >= 1 << 63 else number


def can_be_run(node: Node) -> bool:
    """Whether :func:`run_node` can run it: not those of ``torch.autograd.Function``, whose backward is the user's."""
    return callable(node) and node.name() not in WRONG_UNDER_VMAP


def runs_alone(node: Node) -> bool:
    """Whether a node is PyTorch's own, or one that it copies tensors with, so that it is run outside of its engine."""
    return callable(node) and not node.name().startswith(_OTHERS)


def is_builtin(node: Node) -> bool:
    """Whether a node is PyTorch's own, with a backward that is linear; a custom function may have any."""
    return bool(operation_of(node)) or node.name().endswith("AccumulateGrad")


def passes_on(node: Node) -> bool:
    """Whether a node hands every gradient on as it is: where a module has backward hooks, or of a wrapper for ranks."""
    kind = type(node).__name__
    hands = kind in ("BackwardHookFunctionBackward", "_DDPSinkBackward")
    return hands and len(node.next_functions) == len(node._input_metadata)


def is_complex(node: Node) -> bool:
    """Whether any of a node's outputs holds complex numbers."""
    return True in [seen.dtype.is_complex for seen in node._input_metadata]


def run_node(node: Node, gradients: Sequence[Tensor | None], index: int) -> Tensor:
    """What a node makes of gradients on its outputs for one of its inputs, by itself: no hook is called.

    As the engine does, a gradient is summed over the dimensions along which the input was broadcast.
    """
    return run_node_once(node, gradients, [index])[0]


def run_node_once(node: Node, gradients: Sequence[Tensor | None], indices: Sequence[int]) -> list[Tensor]:
    """:func:`run_node` for several inputs at once."""
    # What has no elements, such as the second state of cuDNN's layers that have one, some nodes take only as None.
    real = [None if g is None or not g.numel() else g for g in gradients]
    found = node(*(gradients if all(g is None for g in real) else real))
    result = []
    for index in indices:
        g = found[index] if isinstance(found, tuple) else found
        before, number = node.next_functions[index]
        shape = shape_of(before, number)
        if g is None:  # zeros, to the engine: a convolution's second derivative in what it is linear in
            made = before._input_metadata[number]
            g = torch.zeros(shape, dtype=made.dtype, device=made.device)
        if g.shape != shape:
            lead = g.dim() - len(shape)
            summed = [d for d in range(g.dim()) if d < lead or (shape[d - lead] == 1 and g.shape[d] != 1)]
            g = (g.sum(summed) if summed else g).reshape(shape)
        result.append(g)
    return result


def tells_recomputation() -> bool:
    """Whether this PyTorch tells what a saved tensor is unpacked by, so that :func:`recomputed` has an answer."""
    return hasattr(torch._C._autograd.SavedTensor, "unpack_hook")


def recomputed(node: Node) -> bool | None:
    """Whether what a node saved is computed again by a checkpoint, once; None where PyTorch does not tell."""
    kind: Any = type(node)
    for name in _raw_names(kind):
        for seen in _tensors(getattr(node, name)):
            try:
                hook = seen.unpack_hook
            except AttributeError:
                return None
            if getattr(hook, "__module__", "") == "torch.utils.checkpoint":
                return True
    return False


def _tensors(raw: Any) -> Sequence[Any]:
    return raw if isinstance(raw, (list, tuple)) else () if raw is None else (raw,)


@cache
def _raw_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved"))
