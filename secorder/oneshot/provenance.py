"""What the calls of a forward tell of it: whether all that depends on the samples does so in the autograd graph."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch.graph import leads_to_these_alone
from .._torch.modules import is_scripted
from .._torch.onednn import addmm_by_onednn, linear_by_onednn
from .._torch.pytree import call_model, map_tensors, once_each, tensors_in
from .._torch.sample_graph import InnerSizes, inner_size, samples_in_leaves, samples_in_nodes
from .._torch.saved_tensors import saved_tensor_hooks_active
from .entries import Entries
from .isolation import IsolatedModel
from .recording import is_watch

#: Calls that return tensors without a gradient, which hold no more of their arguments than the shape.
_CREATIONS = frozenset({
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
})  # fmt: skip

#: Calls that return no tensor, and tell nothing of the values.
_QUESTIONS = frozenset({
    "dim", "size", "stride", "numel", "nelement", "element_size", "ndimension", "is_floating_point", "is_complex",
    "is_contiguous", "is_tensor", "is_same_size", "get_device", "type", "storage_offset", "__len__", "__hash__",
    "is_inference", "is_conj", "is_neg", "is_signed",
})  # fmt: skip

#: Calls that are made by oneDNN, where that is faster.
_BY_ONEDNN: dict[Any, Callable[..., Tensor | None]] = {
    nn.functional.linear: linear_by_onednn,
    torch.addmm: addmm_by_onednn,
}


class Calls(TorchFunctionMode):
    """Inside, PyTorch's functions are watched as a model calls them.

    Attributes:
        hooked: whether a hook was, or may have been, put on a tensor's gradient, but for those of recordings.
        detached: whether a value left the autograd graph: a function of a tensor that requires a gradient gave one that
            does not, or a number.
        packed: whether something, such as an activation checkpoint, took what autograd saves.
        entries: are told of every call, where there are any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: Entries | None = None
        self.hooked = self.detached = self.packed = False

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one call."""
        kwargs = kwargs or {}
        self.packed = self.packed or saved_tensor_hooks_active()
        faster = None if kwargs else _BY_ONEDNN.get(function)
        result = None if faster is None else faster(*args)
        if result is None:
            result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "register_hook":
            self.hooked |= not (len(args) > 1 and is_watch(args[1]))
        elif name == "__get__":
            attribute = getattr(getattr(function, "__self__", None), "__name__", "data")
            self.detached |= attribute == "data"
            self.hooked |= attribute == "grad_fn"  # which takes hooks, and tells nobody
        elif not self.detached and name not in _CREATIONS and _has_gradient((args, tuple(kwargs.values()))):
            self.detached = not _all_have_gradients(result, name)
        if self.entries is not None:
            try:
                self.entries.called(name, (args, kwargs), result, creates=name in _CREATIONS, asks=name in _QUESTIONS)
            except RuntimeError:  # of tensors of other kinds, which tell nothing
                self.entries.opaque = True
        return result


def _has_gradient(arguments: Any) -> bool:
    """Whether a tensor among some arguments requires a gradient."""
    if isinstance(arguments, Tensor):
        return arguments.requires_grad
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (tuple, list)):
        return False
    return any(map(_has_gradient, arguments))


def _all_have_gradients(result: Any, name: str) -> bool:
    """Whether all that a function returned does; what is no tensor must be no value either."""
    if isinstance(result, Tensor):
        return result.requires_grad
    if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
        return bool(result) and all(_all_have_gradients(x, name) for x in result)
    return result is None or name in _QUESTIONS


class Traced:
    """A forward of which the calls are watched, perhaps with inputs that require gradients.

    Args:
        dimension: tells where a tensor's samples are.
        inputs: whether the inputs are to require gradients, so that the graph tells what depends on them.
        known: whether all that it would tell is known: then nothing is watched.

    Attributes:
        hooked: whether hooks of the model's own may change gradients.
        independent: whether the graph shows each sample's output to depend on that sample of the inputs alone.
        packed: whether something, such as an activation checkpoint, took what autograd saves.
    """

    def __init__(
        self,
        isolated: IsolatedModel,
        dimension: Callable[[Tensor], int | None],
        count: int,
        *,
        inputs: bool,
        known: bool = False,
    ) -> None:
        self._isolated, self._dimension, self._count = isolated, dimension, count
        self._inputs, self._known = inputs, known
        self.hooked, self.independent, self.packed = True, False, True
        self._entries: Entries | None = None
        self._inner_sizes: tuple[list[Any], InnerSizes] | None = None

    def __call__(self, inputs: Any) -> Any:
        """The model's output."""
        if self._known:
            self.hooked, self.packed = False, saved_tensor_hooks_active()
            return self._isolated.forward(inputs)
        scripted = any(is_scripted(m) for m in self._isolated.model.modules())
        if scripted or not (self._inputs and _float_tensors_alone(inputs)):
            return self._watched(inputs, scripted=scripted)
        leaves: list[Tensor] = []

        def with_gradients(model: nn.Module, copied: Any) -> Any:
            def leaf(tensor: Tensor) -> Tensor:
                if self._dimension(tensor) is None:
                    return tensor
                leaves.append(tensor.detach().requires_grad_(True))
                return leaves[-1].clone()

            return call_model(model, map_tensors(once_each(leaf), copied))

        calls = Calls()
        try:
            output = self._run(calls, with_gradients, inputs)
        except Exception:  # such as of what takes no tensor that requires a gradient
            return self._watched(inputs, scripted=False)
        self.hooked, self.packed = calls.hooked, calls.packed
        self.independent = not (calls.hooked or calls.detached) and self._by_graph(output, leaves)
        return map_tensors(partial(_detached, {id(x) for x in leaves}), output)

    def _watched(self, inputs: Any, *, scripted: bool) -> Any:
        calls = Calls()

        def forward(model: nn.Module, copied: Any) -> Any:
            if self._inputs and not scripted:
                calls.entries = Entries(model)
            return call_model(model, copied)

        output = self._run(calls, forward, inputs)
        self.hooked, self.packed = calls.hooked or scripted, calls.packed or scripted
        if not (self.hooked or self.packed or calls.detached):
            self._entries = calls.entries
        return output

    def follows(
        self, inputs: Any, inner_sizes: InnerSizes, order: Tensor, exchanged: Callable[[Tensor], Tensor]
    ) -> bool:
        """Whether the graph, and what enters it without a gradient, show each output to depend on its sample alone.

        ``order`` tells for each place the sample that is put there, which ``exchanged`` does.
        """
        entries, self._entries = self._entries, None

        def run(replay: TorchFunctionMode) -> None:
            def watched(copied: Any) -> Any:
                with replay:
                    return call_model(self._isolated.model, copied)

            self._isolated.run(watched, map_tensors(exchanged, inputs))

        return entries is not None and entries.independent(inner_sizes, self._count, order, run)

    def inner_sizes(self, outputs: Sequence[Tensor]) -> InnerSizes:
        """What the graph of the model's outputs, samples in dim 0, tells of them; it is not read twice."""
        nodes = [f.grad_fn for f in outputs]
        if self._inner_sizes is None or self._inner_sizes[0] != nodes:
            self._inner_sizes = nodes, samples_in_nodes(outputs, self._count)
        return self._inner_sizes[1]

    def _run(self, calls: Calls, forward: Callable[[nn.Module, Any], Any], inputs: Any) -> Any:
        def run(copied: Any) -> Any:
            with calls:
                return forward(self._isolated.model, copied)

        return self._isolated.run(run, inputs)

    def _by_graph(self, output: Any, inputs: Sequence[Tensor]) -> bool:
        outputs = [t for t in tensors_in(output) if t.requires_grad]
        placed = [(t, dim) for t in outputs if (dim := self._dimension(t)) is not None]
        if len(placed) < len(outputs) or self._count == 1:
            return False
        sizes = [inner_size(t.shape, dim) for t, dim in placed]
        inner_sizes = samples_in_nodes(outputs, self._count, sizes)
        self._inner_sizes = [t.grad_fn for t in outputs], inner_sizes
        found = samples_in_leaves(inner_sizes, inputs)
        expected = {id(x): inner_size(x.shape, self._dimension(x) or 0) for x in inputs}
        return all(expected[key] == inner for key, inner in found.items())


def _float_tensors_alone(inputs: Any) -> bool:
    """Whether all that a model is given are real tensors, numbers and what has no value."""
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    if isinstance(inputs, (tuple, list)):
        return all(_float_tensors_alone(x) for x in inputs)
    if isinstance(inputs, Tensor):
        return inputs.is_floating_point() and inputs.layout is torch.strided
    return inputs is None or isinstance(inputs, (bool, int, float))


def _detached(inputs: set[int], tensor: Tensor) -> Tensor:
    """A tensor; detached, where it requires a gradient for the sake of the inputs alone."""
    return tensor.detach() if tensor.requires_grad and leads_to_these_alone(tensor, inputs) else tensor
