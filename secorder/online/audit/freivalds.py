"""The audit of a recorded backward: do the captured calls explain the whole gradient of a parameter?

Freivalds' check of a matrix identity. For a parameter seen as a matrix and normal random vectors r, s (signs would be
orthogonal to a constant too often)::

    rᵀ G s = Σ_{n,p} (r · g_{n,p}) (a_{n,p} · s),

G the whole gradient of this backward, before hooks on the parameter change it, and the right side what the captured
calls bring. It sees every gradient that they do not explain: a penalty at some steps only, a use of the parameter
outside of the layer, a gradient that is counted twice. Of large parameters a block of rows is looked at, another one
each time. It is blind to *which* sample a row belongs to. Nothing is read on the host.

Source: Freivalds (1977), "Probabilistic machines can use less running time".
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.sparse import looked_up
from ...layers.dtypes import MANY_TERMS, added_up
from ...layers.one_by_one import Vectors
from ...layers.patches import Patches, whole_input
from ...layers.per_sample import Outer, PerSample, Rows, total_gradient
from ...layers.rank_one import RankOne
from .compared import Number, are_one
from .directions import IN_CHANNELS, Directions
from .rounding import FEW, added, before_sums, operations_of, size_of, tolerance_of


def actual(gradient: Tensor, vectors: Vectors, bias: Tensor | None = None) -> Tensor:
    """rᵀ G s, of the parameter's whole gradient; with that of its bias, rᵀ (G s + b), where it is given."""
    r, s = vectors.r, vectors.s
    if gradient.is_sparse:
        ids, values = looked_up(gradient)
        return torch.dot(_everywhere(vectors)[ids], values.to(s.dtype) @ s)
    matrix = gradient if gradient.dim() == 2 else gradient.reshape(vectors.rows, -1)
    if not vectors.whole or matrix.dtype is not r.dtype:
        matrix, bias = _block(matrix, vectors), None if bias is None else _block(bias, vectors)
    if bias is not None:
        return torch.dot(torch.addmv(bias, matrix, s), r)
    return torch.dot(matrix.flatten() if gradient.dim() < 2 else torch.mv(matrix, s), r)  # of one column, s is one


def _everywhere(vectors: Vectors) -> Tensor:
    """r for all rows: zero outside of the block."""
    weights = vectors.r.new_zeros(vectors.rows)
    weights[vectors.start : vectors.start + len(vectors.r)] = vectors.r
    return weights


def _block(gradient: Tensor, vectors: Vectors) -> Tensor:
    """The rows that are looked at."""
    if not vectors.whole:
        gradient = gradient[vectors.start : vectors.start + vectors.r.shape[0]]
    return gradient if gradient.dtype is vectors.r.dtype else gradient.to(vectors.r.dtype)


def explained(
    gradient: PerSample, vectors: Vectors, *, with_bias: bool = False, terms: float = 1.0
) -> tuple[Tensor, Tensor]:
    """rᵀ (Σ_n J_nᵀ g_n) s of per-sample gradients, and the square of the size that its rounding is relative to.

    Of an :class:`~secorder.layers.per_sample.Outer` with that of a bias that has the same cotangents, if asked; of a
    dense gradient each element is the sum of so many rows (``terms``).
    """
    r, s = vectors.r, vectors.s
    if isinstance(gradient, Tensor):
        matrix = gradient.reshape(len(gradient), vectors.rows, len(s))[:, vectors.start : vectors.start + len(r)]
        matrix = matrix.to(r.dtype)
        products = torch.matmul(matrix, s) @ r
        return products.sum(), torch.dot(matrix.flatten(), matrix.flatten()) * (len(matrix) * added(terms))
    if isinstance(gradient, Rows):
        weights = _everywhere(vectors)
        seen, right = gradient.g, (gradient.g.to(r.dtype) @ s).flatten()
        left = weights[gradient.ids].flatten()
        return torch.dot(left, right), size_of(seen, right) * (len(right) * added(len(right) / vectors.rows))
    if gradient.g.shape[1] * gradient.g.shape[3] != vectors.rows:
        return _explained_as_a_whole(gradient, vectors)
    seen, left = _cotangents(gradient.g, vectors)
    if gradient.a is None:
        return left.sum(), size_of(seen, left) * (left.shape[0] * added(left.shape[0]))
    right = _inputs(gradient, vectors).flatten()
    whole = gradient.a.image if isinstance(gradient.a, Patches) else gradient.a
    if with_bias and right.shape[0] > FEW:  # whose input is one
        right = right + 1
        size = size_of(whole, right)
    else:
        size = size_of(whole, right)
        if with_bias:
            right, size = right + 1, size + right.shape[0]
    if with_bias and isinstance(gradient.a, Patches):
        size = size + right.shape[0] * added(right.shape[0])
    if left.shape[0] <= MANY_TERMS or isinstance(gradient.a, Patches):  # which adds up few at a time
        return torch.dot(left, right), size_of(seen, left) * size
    value, rounds = added_up(left * right)
    return value, size_of(seen, left) * size * rounds


def _explained_as_a_whole(gradient: Outer, vectors: Vectors) -> tuple[Tensor, Tensor]:
    """:func:`explained` of factors that are those of another matrix than the parameter is looked at as.

    A stack of experts' matrices, say, or a vector that is used as a matrix.
    """
    total = total_gradient(gradient, vectors.rows * len(vectors.s))
    value, _ = explained(total[None], vectors)
    factors = [gradient.g] if gradient.a is None else [gradient.g, whole_input(gradient.a)]
    squares = [torch.linalg.vector_norm(x, dtype=value.dtype).square() for x in factors]
    return value, prod(squares, start=torch.ones_like(value)) * added(gradient.g.shape[0] * gradient.g.shape[2])


def _cotangents(g: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor]:
    """The part of a cotangent factor ``(N, groups, positions, out)`` that the block sees, and ``g · r`` of its rows."""
    r = vectors.r
    here = slice(vectors.start, vectors.start + r.shape[0])
    if g.shape[1] == 1 and g.shape[2] > 1 and g.stride(3) != 1:  # of a convolution: positions follow each other
        channels = g[:, 0, :, here].transpose(1, 2)
        channels = channels if channels.dtype is r.dtype else channels.to(r.dtype)
        return channels, torch.bmm(r.expand(channels.shape[0], 1, -1), channels).flatten()
    if g.shape[1] == 1:
        rows = g.reshape(-1, g.shape[3])
        rows = rows if vectors.whole else rows[:, here]
        rows = rows if rows.dtype is r.dtype else rows.to(r.dtype)
        return rows, torch.mv(rows, r)
    weights = r.new_zeros(vectors.rows)
    weights[here] = r
    seen = g.to(r.dtype)
    return seen, (seen * weights.view(g.shape[1], 1, -1)).sum(3).flatten()


def _inputs(gradient: Outer, vectors: Vectors) -> Tensor:
    """``a · s`` at every position, shape ``(N, groups, positions)``."""
    a, s = gradient.a, vectors.s
    if not isinstance(a, Patches):
        assert a is not None
        if a.shape[1] > 1:
            return torch.matmul(a.to(s.dtype), s.view(1, -1)[0])
        a = a.reshape(-1, a.shape[3])
        return torch.mv(a if a.dtype is s.dtype else a.to(s.dtype), s)
    here = slice(vectors.channel, vectors.channel + IN_CHANNELS)
    channels = a.image.unflatten(1, (a.groups, -1))[:, :, here]  # a convolution with one output is many times as slow
    weights = s.view(-1, prod(a.kernel))[here, vectors.place]
    found = channels[:, :, 0] * weights[0]
    for channel in range(1, len(weights)):
        found.addcmul_(channels[:, :, channel], weights[channel])
    return a.seen_at(vectors.place, found).flatten(2)


class Explained(NamedTuple):
    """What captured calls bring to one side of the identity."""

    value: Tensor  #: Σ (r · g)(a · s)
    size: Tensor  #: the square of what rounding is relative to
    tolerance: float  #: of it, what may be rounding


class Comparison(NamedTuple):
    """Both sides of the identity."""

    layer: int  #: its number
    whole: Tensor  #: rᵀ G s
    value: Tensor  #: what is explained of it
    size: Tensor  #: the square of what rounding is relative to
    tolerance: float  #: of it, what may be rounding


class Audit:
    """Both sides of the identity for the parameters of one backward; weight and bias of a layer are one number."""

    def __init__(self, directions: Directions) -> None:
        self._directions = directions
        self._numbers: dict[int, Number] = {}
        self._home: dict[int, int] = {}  # of a bias: the weight that it is one number with
        self._actual: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._together: set[int] = set()  # weights that calls explain together with their bias
        self._explained: dict[tuple[str, int], list[Explained]] = {}

    @property
    def empty(self) -> bool:
        """Whether no whole gradient has come."""
        return not self._actual

    @property
    def idle(self) -> bool:
        """Whether no parameter is looked at."""
        return not self._numbers

    def watch(
        self, parameters: Mapping[str, Tensor], graph: Mapping[str, Tensor], *, apart: bool, outputs: int
    ) -> list[str]:
        """Look at parameters of a layer from now on; the names of those whose gradient is to be seen for it.

        ``graph`` holds them as the autograd graph knows them. Where the layer shares a parameter with others
        (``apart``), its bias is a number of its own.
        """
        chosen = [n for n, p in parameters.items() if p.requires_grad and p.numel() and not self.covers(p)]
        if not apart and are_one({name: graph[name] for name in chosen}):
            weight, bias = parameters["weight"], parameters["bias"]
            self._numbers[id(weight)] = Number(weight, bias, self._directions.vectors(graph["weight"], outputs))
            self._home[id(bias)] = id(weight)
            return chosen
        for name, p in [(name, parameters[name]) for name in chosen]:
            self._numbers[id(p)] = Number(p, None, self._directions.vectors(graph[name], outputs))
        return chosen

    def covers(self, parameter: Tensor) -> bool:
        """Whether a parameter is looked at, alone or with its weight."""
        return id(parameter) in self._numbers or id(parameter) in self._home

    def _vectors_of(self, parameter: Tensor) -> Vectors | None:
        """Those of a parameter that is looked at; of a bias, the rows of its weight's."""
        home = self._home.get(id(parameter))
        number = self._numbers.get(id(parameter) if home is None else home)
        if number is None or home is None:
            return None if number is None else number.vectors
        r, _, start, rows = number.vectors[:4]
        return Vectors(r, self._directions.constants.vector([1.0], r), start, rows)

    def see(self, parameter: Tensor, gradient: Tensor) -> None:
        """The whole gradient of a parameter is here."""
        vectors = self._vectors_of(parameter)
        assert vectors is not None
        self._seen.add(id(parameter))
        self._add(self._home.get(id(parameter), id(parameter)), actual(gradient.detach(), vectors))

    def see_all(self, grads: Mapping[int, Tensor]) -> None:
        """The whole gradients of parameters are here, by ``id``."""
        for key, (_, bias, vectors) in self._numbers.items():
            whole, own = grads.get(key), None if bias is None else grads.get(id(bias))
            if whole is not None:
                self._seen.add(key)
                if own is not None:
                    self._seen.add(id(bias))
                self._add(key, actual(whole, vectors, own))
            elif bias is not None and own is not None:
                self.see(bias, own)

    def _add(self, key: int, value: Tensor) -> None:
        """Add to what whole gradients bring to a number."""
        before = self._actual.get(key)
        self._actual[key] = value if before is None else before + value

    def saw(self, parameter: Tensor) -> bool:
        """Whether the whole gradient of a parameter has come."""
        return id(parameter) in self._seen

    def halves(self) -> set[int]:
        """By ``id``, weights that are one number with a bias, where calls explain both and the gradient of one came."""
        homes, seen = self._home.items(), self._seen
        return {home for bias, home in homes if home in self._together and (home in seen) != (bias in seen)}

    def explain(
        self,
        name: str,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, PerSample],
        low: torch.dtype | None,
        elements: int = 0,
        cotangents: Sequence[Tensor] = (),
        sizes: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The per-sample gradients of a layer are here; the numbers that they bring, by parameter.

        ``low`` is the dtype that autocast computes in, ``cotangents`` what they are made of, and ``sizes`` the squares
        of what dense ones are sums of, where these are known.
        """
        brought = {}
        came: dict[int, Tensor | None] = {}
        for local, p in parameters.items():
            part, home = gradients.get(local), self._home.get(id(p))
            if part is None or (home is not None and _same_cotangents(gradients.get("weight"), part)):
                continue  # a bias is in the weight's number
            vectors = self._vectors_of(p)
            if vectors is None:
                continue
            bias = self._numbers[id(p)].bias if home is None else None
            same = bias is not None and _same_cotangents(part, gradients.get("bias"))
            value, size = explained(part, vectors, with_bias=same, terms=elements / max(1, p.numel()))
            brought[local] = value
            before = None if sizes is None else sizes.get(local)
            if before is None and isinstance(part, Tensor):
                if part.numel() not in came:  # a weight and a bias of the same are told by the same
                    came[part.numel()] = before_sums(cotangents, part)
                before = came[part.numel()]
            if before is not None:
                size = torch.maximum(size, before.to(size))
            if same:
                self._together.add(id(p))
            widest = max(len(vectors.r), len(vectors.s))
            found = Explained(value, size, tolerance_of(value, p.dtype, low, operations_of(part), widest))
            self._explained.setdefault((name, home or id(p)), []).append(found)
        return brought

    def vectors(self, one: RankOne) -> Vectors | None:
        """The random vectors of a layer, looked at or not; None where its weight and bias are not one number.

        Nor where the weight is not a matrix of its factors' dtype.
        """
        weight, bias = one.layer.parameters["weight"], one.layer.parameters.get("bias")
        number = self._numbers.get(id(weight))
        if weight.dim() != 2 or weight.dtype is not one.inputs.dtype:
            return None
        if number is not None:
            return number.vectors if number.bias is bias else None
        taken = self.covers(weight) or (bias is not None and self.covers(bias))
        return None if taken else self._directions.vectors(weight)

    def explain_weights(
        self, layers: Sequence[RankOne], values: Tensor, sizes: Tensor, low: torch.dtype | None
    ) -> None:
        """:meth:`explain` of layers whose numbers were found together; those that are not looked at are passed over."""
        widest = max([max(one.inputs.shape[1], one.cotangents.shape[1]) for one in layers])
        tolerance = tolerance_of(values, values.dtype, low, ("product",), widest)  # the weights' dtype is the factors'
        for one, value, size in zip(layers, values.unbind(), sizes.unbind(), strict=True):
            key = id(one.layer.parameters["weight"])
            if key in self._numbers:
                self._together.add(key)
                self._explained.setdefault((one.layer.name, key), []).append(Explained(value, size, tolerance))

    def compared(self, layer: int, parameters: Mapping[str, Tensor], holders: Iterable[str]) -> Iterator[Comparison]:
        """Both sides of what is known of a layer's whole gradients, which the ``holders`` bring, itself among them."""
        sides = []
        for parameter in parameters.values():
            key = id(parameter)
            whole = self._actual.get(key)
            if whole is not None:  # that of a bias may be in its weight's
                known = [found for name in holders for found in self._explained.get((name, key), ())]
                sides.append((whole, _sum(known, whole)))
        if not sides:
            return
        # What does not matter, as the direction of one element of a normalised weight, gets a gradient that is all
        # rounding, of what the layer brings elsewhere: all of its parameters tell the size.
        first, *others = [own.size for _, own in sides]
        size = sum([x.to(first) for x in others], first)
        for whole, own in sides:
            yield Comparison(layer, whole, own.value, size, own.tolerance)


def _same_cotangents(weight: PerSample | None, bias: PerSample | None) -> bool:
    return isinstance(weight, Outer) and isinstance(bias, Outer) and bias.g is weight.g


def _sum(parts: Sequence[Explained], like: Tensor) -> Explained:
    """What several layers bring, or none."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Explained(like.new_zeros(()), like.new_zeros(()), 0.0)
    value, size = (
        torch.stack([x.to(like) for x in numbers]).sum() for numbers in zip(*[p[:2] for p in parts], strict=True)
    )
    return Explained(value, size, max(part.tolerance for part in parts))
