"""Rows whose samples depend on data: routed tokens, nodes of graphs, sequences that are sorted by length.

That the rows of a layer belong to samples in the same way whenever the shapes are the same cannot be seen in one batch:
by chance each expert may have had as many tokens of each sample. So one forward is followed: what indices that depend
on data select, and arguments whose rows are not the samples', give rows that no shape tells of, until they are put back
(added or copied into their places, or selected by the inverse permutation). Layers that see such rows are measured by a
module around them whose own rows are told by shape.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..._torch.graph import Node
from ..._torch.own_hooks import outputs_seen
from ..._torch.pytree import tensors_in
from ...layers.selection import Layer
from .hypotheses import Hypothesis, Trial, floating

#: What was selected, the latest last: by which indices, or None for what no inverse is known of.
State = tuple[Tensor | None, ...]

_OPAQUE: State = (None,)


def _named(*names: str) -> frozenset[Any]:
    return frozenset(
        f for name in names for owner in (torch, Tensor) for f in [getattr(owner, name, None)] if f is not None
    )


_GET = Tensor.__getitem__
_SELECT = _named("index_select", "masked_select", "take", "gather", "take_along_dim", "sort", "topk")
_FIND = _named("nonzero", "argwhere", "unique", "unique_consecutive", "repeat_interleave")
_RECURRENT = _named("lstm", "gru", "rnn_tanh", "rnn_relu")  # of packed sequences, they return states of sequences
_PACK, _UNPACK = _named("_pack_padded_sequence"), _named("_pad_packed_sequence")
_PUT = _named(
    "index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_", "scatter", "scatter_",
    "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "masked_scatter", "masked_scatter_",
    "index_reduce", "index_reduce_",
) | {Tensor.__setitem__}  # fmt: skip
_RANDOM = _named("rand", "randn", "randperm", "randint", "rand_like", "randn_like", "bernoulli", "multinomial")
_FRESH = _named(
    "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"
)  # fmt: skip
_LIKE = _named("to", "type_as", "expand_as", "view_as", "reshape_as")  # of the second argument, they take no numbers
_ADD = _named("add", "add_", "__add__", "__radd__", "__iadd__")
_PRODUCTS = _named("matmul", "mm", "bmm", "__matmul__") | {F.linear}
_SELECTING = _SELECT | _FIND | _PACK | {_GET}


def _tensors(tree: Any) -> list[Tensor]:
    return list(tensors_in(tree))


def selects_rows(func: Any, args: Sequence[Any]) -> bool:
    """Whether a function selects rows, by tensors where it may do so by other things."""
    return func in _SELECTING and (func is not _GET or bool(_tensors(args[1:])))


def unowned_arguments(arguments: Any, hypothesis: Hypothesis) -> list[bool]:
    """For each tensor among the arguments, whether it has rows, and no dimension for the samples, nor is one's own."""
    return [
        dim is None and tensor.dim() > 0 and tensor.shape[0] > 1 and not isinstance(owner, int)
        for tensor, dim, owner in zip(tensors_in(arguments), hypothesis.dims, hypothesis.owners, strict=True)
    ]


def routed_outputs(layers: Sequence[Layer], trial: Trial) -> dict[str, set[int]]:
    """By layer, which of the tensors that its enclosing module returns have rows that no shape tells the samples of.

    The trial's forward calls its second argument with the copies of the arguments that the model gets.
    """
    found: dict[str, set[int]] = {}
    routes = _Routes(trial)

    def see(name: str, output: Any) -> None:
        routed = {i for i, t in enumerate(floating(output)) if routes.states.get(t)}
        if routed:
            found.setdefault(name, set()).update(routed)

    with outputs_seen([(layer.name, layer.enclosing) for layer in layers], see), torch.no_grad(), routes:
        trial.forward(trial.arguments, routes.begin)
    return found


def routed_nodes(trial: Trial) -> tuple[Any, dict[Node, State]]:
    """One forward's output, and by the nodes of its graph what was selected there and is not yet put back.

    Of what functions return; what they compute on the way has no entry. Forwards are as above.
    """
    routes = _Routes(trial)
    with routes:
        output = trial.forward(trial.arguments, routes.begin)
    return output, routes.nodes


class _Routes(TorchFunctionMode):
    """Follows what depends on the arguments: for each such tensor, what was selected and is not yet put back."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.dim, self.unowned = trial.hypothesis.dim or 0, unowned_arguments(trial.arguments, trial.hypothesis)
        self.count = trial.hypothesis.num_samples
        #: Of indices, how many rows each sample has: they count them from its own first one.
        self.rows: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self.states: MutableMapping[Tensor, State] = WeakTensorKeyDictionary()
        self.nodes: dict[Node, State] = {}

    def begin(self, arguments: Any) -> None:
        """The model is about to run on these."""
        for tensor, unowned in zip(tensors_in(arguments), self.unowned, strict=True):
            self.states[tensor] = _OPAQUE if unowned else ()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _tensors((args, kwargs))
        kwargs = kwargs or {}
        state = self._after(func, args, kwargs, given)
        result = func(*args, **kwargs)
        if state is not None:
            if isinstance(result, Tensor) and not state and (rows := self._counted_from_own(func, given, result)):
                self.rows[result] = rows
            for index, tensor in enumerate(tensors_in(args[0] if func is Tensor.__setitem__ else result)):
                packed = func in _RECURRENT and index > 0 and isinstance(args[1], Tensor)
                self.states[tensor] = state[:-1] if packed else state
                if tensor.grad_fn is not None:
                    self.nodes[tensor.grad_fn] = self.states[tensor]
        return result

    def _after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]) -> State | None:
        """The state of what a function returns; None for what depends on no argument."""
        if func in _RANDOM:
            return ()
        states = [(t, self.states[t]) for t in given if t in self.states]
        if not states or func in _FRESH or (func in _LIKE and given[0] not in self.states):
            return None
        source = self.states.get(given[0])
        if func in _PUT and (func is not Tensor.__setitem__ or _tensors(args[1])):
            if source is not None:
                return source
            if any(self._in_own_rows(given[0], index) for index in given[1:]):
                return self.states.get(given[-1], ())
            written = _tensors(args[2]) if func is Tensor.__setitem__ else given[-1:]
            if self._within_samples(func, args, kwargs):
                return self.states.get(written[0], ()) if written else ()
            rows = self.states.get(given[-1])
            return rows[:-1] if rows else () if any(state for _, state in states) else _OPAQUE
        if func is F.embedding_bag and isinstance(offsets := kwargs.get("offsets"), Tensor):
            return self.states.get(offsets, ())
        if func in _PRODUCTS and source is not None and given[0].dim() > 1:
            return source
        if func in _UNPACK:
            return source[:-1] if source else source
        if func in _PACK or (func in _FIND and len(given) > (func not in _named("nonzero", "argwhere", "unique"))):
            return (*(source or ()), None)
        if selects_rows(func, args) and source is not None:
            return self._selected(func, args, kwargs, given, source)
        widest = max(t.dim() for t, _ in states)
        carriers = [(t, state) for t, state in states if t.dim() == widest]
        carriers = [(t, state) for t, state in carriers if t.dim() and t.shape[0] != 1] or carriers
        return max((state for _, state in carriers), key=len)

    def _selected(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor], source: State
    ) -> State:
        if func in _named("sort", "topk"):
            return source  # along one dimension of each row by itself, or values that say nothing of where they were
        indices = given[1:]
        if not any(index in self.states for index in indices):
            return source  # the same for all batches
        index = indices[0]
        if self._within_samples(func, args, kwargs) or (len(indices) == 1 and self._in_own_rows(given[0], index)):
            return source
        if index.dim() != 1 or index.dtype is torch.bool or func in _named("gather", "take_along_dim", "take"):
            return (*source, None)
        before = source[-1] if source else None
        if before is not None and len(before) == len(index) and _is_regular(before[index]):
            return source[:-1]
        return (*source, index.detach().clone())

    def _within_samples(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether data selects, or writes, within rows that are the same in all batches, and not among samples there.

        These are, by shape, the first dimension's, or another's that has as many entries where the first one has not.
        """
        tensor = args[0] if args else kwargs["input"]
        first, *others = places = _places(tensor, func, args, kwargs)
        if first == 0 and (not others or any(key in self.states for key in _tensors(args[1])[:1])):
            return False
        among = [place for place in places if place > 0 and tensor.shape[place] == self.count]
        return self.dim == 0 and (not among or len(tensor) == self.count)

    def _counted_from_own(self, func: Any, given: Sequence[Tensor], result: Tensor) -> int | None:
        """How many rows each sample has, if these are indices to which the number of those before its own was added."""
        if result.is_floating_point() or self.count < 2 or result.numel() % self.count:
            return None
        constant = [t for t in given if t not in self.states]
        if func in _ADD and len(given) == 2 and len(constant) == 1 and result.numel():
            before = constant[0].expand_as(result).reshape(self.count, -1)
            rows = int(before[1, 0])
            return rows if torch.equal(before, rows * _numbers(before)) else None
        same = (t for t in given if t in self.rows and t.numel() == result.numel())
        return next((self.rows[t] for t in same if torch.equal(t.flatten(), result.flatten().to(t.dtype))), None)

    def _in_own_rows(self, tensor: Tensor, index: Tensor) -> bool:
        """Whether an index chooses among rows of its own sample, where all samples' rows stand one after another."""
        rows = self.rows.get(index)
        if rows is None or self.dim != 0 or tensor.dim() == 0 or len(tensor) != rows * self.count:
            return False
        own = index.reshape(self.count, -1) // rows
        return torch.equal(own, _numbers(own))


def _numbers(rows: Tensor) -> Tensor:
    """In the place of each element its row's number."""
    return torch.arange(len(rows), device=rows.device, dtype=rows.dtype)[:, None].expand_as(rows)


def _is_regular(rows: Tensor) -> bool:
    """Whether these are all rows in order, each as often as the others: each several times, or all of them again."""
    count = int(rows.max()) + 1 if len(rows) else 1
    places = torch.arange(len(rows), device=rows.device)
    return len(rows) % count == 0 and any(
        bool((rows == told).all()) for told in (places // (len(rows) // count), places % count)
    )


def _places(tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The dimensions that are selected from, or written into."""
    if func not in (_GET, Tensor.__setitem__):
        numbers = [a for a in (kwargs.get("dim"), *args[1:]) if isinstance(a, int) and not isinstance(a, bool)]
        return [int(numbers[0]) % max(1, tensor.dim()) if numbers else 0]
    keys = [key for key in (args[1] if isinstance(args[1], tuple) else (args[1],)) if key is not None]
    for i in [i for i, key in enumerate(keys) if key is Ellipsis]:
        keys[i : i + 1] = [slice(None)] * (tensor.dim() - len(keys) + 1)
    return [i for i, key in enumerate(keys) if isinstance(key, (Tensor, list))] or [0]
