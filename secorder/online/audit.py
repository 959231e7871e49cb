"""The audit of each recorded backward: do the captured calls explain the whole gradient of a parameter?

Freivalds' check of a matrix identity. For a parameter seen as a matrix and normal random vectors r, s (signs would be
orthogonal to a constant too often)::

    rᵀ G s = Σ_{n,p} (r · g_{n,p}) (a_{n,p} · s),

G the whole gradient of this backward, before hooks on the parameter change it, and the right side what the captured
calls bring. It sees every gradient that they do not explain: a penalty at some steps only, a use of the parameter
outside of the layer, a gradient that is counted twice. Of large parameters a block of rows is looked at, another one
each time. It is blind to *which* sample a row belongs to. Nothing is read on the host.

Source: Freivalds (1977), "Probabilistic machines can use less running time".
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.patches import Patches
from ..layers.per_sample import Outer, PerSample, Rows

__all__ = ["Audit", "Directions", "Vectors", "actual", "explained"]

#: Elements of a parameter above which only a block of its rows is looked at, and rows of the block.
WHOLE_ELEMENTS = 1 << 17
BLOCK = 64
#: Output and input channels of convolutions that are looked at: activations cost more to read than parameters there.
OUT_CHANNELS, IN_CHANNELS = 16, 4
#: Random vectors that parameters of one shape are looked at with in turn (seldom is seven the period of a penalty),
#: and backward passes after which others are drawn.
IN_TURN, KEPT = 7, 112
#: Sets of numbers that are kept on the device.
CONSTANTS = 16
#: Rows up to which the norm of a factor is taken whole, since few may happen to be orthogonal to r or s; of more, the
#: rows, or samples of several rows each, that are looked at beside their products with r or s.
FEW, FEW_SAMPLES = 32, 4
#: What passes for rounding, in units in the last place of the products' size: of the parameter's dtype, and of a lower
#: one that factors are rounded to before they are multiplied.
UNITS = 64
UNITS_OF_FACTORS = 8
#: Of what matrix units may round float32 to.
TF32 = 2.0**-10


class Vectors(NamedTuple):
    """The random vectors of one parameter in one backward.

    Attributes:
        r: normal, one a row of the block.
        s: normal, one a column; of a convolution, zero but for some input channels.
        start: the first row of the block.
        rows: rows of the parameter.
        channel: the first of these input channels.
    """

    r: Tensor
    s: Tensor
    start: int
    rows: int
    channel: int = 0

    @property
    def whole(self) -> bool:
        """Whether the block is all of the parameter."""
        return self.r.shape[0] == self.rows


class Directions:
    """Random numbers, drawn once and looked at from random places: a private stream that costs nothing."""

    def __init__(self) -> None:
        self._places = random.Random()
        self._generator = torch.Generator()
        self._generator.seed()
        self._pool: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._kept: dict[tuple[Any, ...], list[Vectors]] = {}
        self._constants: dict[tuple[float, ...], Tensor] = {}
        self._passes = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Directions, ()  # a copy draws numbers of its own

    def _take(self, size: int, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        pool = self._pool.get(key)
        if pool is None or len(pool) < 2 * size:
            numbers = torch.randn(max(2 * size, 1 << 13), generator=self._generator, device="cpu")
            pool = self._pool[key] = numbers.to(like)
        start = self._places.randrange(len(pool) - size + 1)
        return pool[start : start + size]

    def begin(self) -> None:
        """A backward begins."""
        self._passes += 1
        if self._passes % KEPT == 0:
            self._kept.clear()

    def constants(self, numbers: Sequence[float], like: Tensor) -> Tensor:
        """Numbers that are much the same each time, where they are already on the device; 1-D."""
        key = tuple(numbers)
        found = self._constants.get(key)
        if found is None or found.device != like.device or found.dtype is not like.dtype:
            if len(self._constants) > CONSTANTS:
                self._constants.clear()
            found = self._constants[key] = like.new_tensor(numbers)
        return found

    def vectors(self, parameter: Tensor) -> Vectors:
        """Those of one parameter, for one backward; the same for parameters of one shape that are looked at whole."""
        key = (parameter.shape, parameter.dtype, parameter.device)
        found = self._kept.get(key)
        if found is None:
            first = self._drawn(parameter)
            if not first.whole:
                return first
            found = self._kept[key] = [first, *(self._drawn(parameter) for _ in range(IN_TURN - 1))]
        return found[self._passes % IN_TURN]

    def _drawn(self, parameter: Tensor) -> Vectors:
        rows = parameter.shape[0] if parameter.dim() else 1
        columns = parameter.numel() // max(rows, 1) if parameter.dim() > 1 else 1
        block = rows if parameter.numel() <= WHOLE_ELEMENTS or parameter.dim() < 2 else min(rows, BLOCK)
        block = block if parameter.dim() < 3 else min(block, OUT_CHANNELS)
        start = self._places.randrange(rows - block + 1)
        like = parameter.detach()
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        s = self._take(columns, like) if parameter.dim() > 1 else like.new_ones(1)
        channel = 0
        if parameter.dim() > 2 and parameter.shape[1] > IN_CHANNELS:
            channel, size = self._places.randrange(parameter.shape[1] - IN_CHANNELS + 1), columns // parameter.shape[1]
            some = torch.zeros_like(s)
            some[channel * size : (channel + IN_CHANNELS) * size] = s[: IN_CHANNELS * size]
            s = some
        return Vectors(self._take(block, like), s, start, rows, channel)

    def some(self, names: Sequence[str], most: int) -> set[str]:
        """So many of the names at most, drawn anew."""
        return set(names) if len(names) <= most else set(self._places.sample(list(names), most))


def actual(gradient: Tensor, vectors: Vectors) -> Tensor:
    """rᵀ G s, of the parameter's whole gradient."""
    r, s = vectors.r, vectors.s
    gradient = gradient.detach()
    matrix = gradient if gradient.dim() == 2 else gradient.reshape(vectors.rows, -1)
    if not vectors.whole:
        matrix = matrix[vectors.start : vectors.start + r.shape[0]]
    if matrix.dtype is not r.dtype:
        matrix = matrix.to(r.dtype)
    return torch.dot(matrix.flatten() if gradient.dim() < 2 else torch.mv(matrix, s), r)  # of one column, s is one


def explained(gradient: PerSample, vectors: Vectors, *, with_bias: bool = False) -> tuple[Tensor, Tensor]:
    """rᵀ (Σ_n J_nᵀ g_n) s of per-sample gradients, and the square of the size that its rounding is relative to.

    Args:
        gradient: of one parameter.
        vectors: the random ones.
        with_bias: of an :class:`~secorder.layers.per_sample.Outer`, with that of the bias that has the same cotangents.
    """
    r, s = vectors.r, vectors.s
    if isinstance(gradient, Tensor):
        matrix = gradient.reshape(len(gradient), vectors.rows, -1)[:, vectors.start : vectors.start + len(r)].to(
            r.dtype
        )
        products = torch.matmul(matrix, s) @ r
        return products.sum(), torch.dot(matrix.flatten(), matrix.flatten())
    if isinstance(gradient, Rows):
        weights = r.new_zeros(vectors.rows)
        weights[vectors.start : vectors.start + len(r)] = r
        seen, right = gradient.g, (gradient.g.to(r.dtype) @ s).flatten()
        left = weights[gradient.ids].flatten()
        return torch.dot(left, right), _size(seen, right) * len(right)
    seen, left = _cotangents(gradient.g, vectors)
    if gradient.a is None:
        return left.sum(), _size(seen, left) * left.shape[0]
    right = _inputs(gradient, vectors).flatten()
    whole = gradient.a.image if isinstance(gradient.a, Patches) else gradient.a
    if with_bias and right.shape[0] > FEW:  # whose input is one
        right = right + 1
        size = _size(whole, right)
    else:
        size = _size(whole, right)
        if with_bias:
            right, size = right + 1, size + right.shape[0]
    return torch.dot(left, right), _size(seen, left) * size


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
    image = a.image.unflatten(1, (a.groups, -1))[:, :, here].flatten(1, 2).to(s.dtype)
    kernel = s.view(1, -1, *a.kernel)[:, here].expand(a.groups, -1, *a.kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(a.kernel) - 1]
    found: Tensor = convolve(image, kernel, stride=a.stride, dilation=a.dilation, groups=a.groups)
    return found.flatten(2)


def _size(whole: Tensor, product: Tensor) -> Tensor:
    """The square of a factor's norm; where it has rows enough, by their product with random numbers and by some rows.

    Rows that are nearly alike, as tokens in a deep transformer are, may all happen to be orthogonal to what was drawn;
    and a few rows alone do not tell of one that is much larger than the others.
    """
    if product.shape[0] <= FEW:
        flat = whole.to(product.dtype).flatten()
        return torch.dot(flat, flat)
    some = whole[:: max(1, len(whole) // (FEW if whole.dim() == 2 else FEW_SAMPLES))]
    flat = some.to(product.dtype).flatten()
    return torch.dot(flat, flat) * (len(whole) / len(some)) + torch.dot(product, product)


class Explained(NamedTuple):
    """What captured calls bring to one side of the identity.

    Attributes:
        value: Σ (r · g)(a · s).
        size: the square of what rounding is relative to.
        tolerance: of it, what may be rounding.
    """

    value: Tensor
    size: Tensor
    tolerance: float


class Audit:
    """Both sides of the identity for the parameters of one backward; weight and bias of a layer are one number."""

    def __init__(self, directions: Directions) -> None:
        self._directions = directions
        directions.begin()
        self._vectors: dict[int, Vectors] = {}
        self._home: dict[int, int] = {}  # of a bias: the weight that it is one number with
        self._actual: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._explained: dict[tuple[str, int], list[Explained]] = {}

    @property
    def empty(self) -> bool:
        """Whether no whole gradient has come."""
        return not self._actual

    def watch(self, parameters: Mapping[str, Tensor], graph: Mapping[str, Tensor], *, apart: bool) -> list[str]:
        """Look at parameters of a layer from now on; the names of those whose gradient is to be seen for it.

        Args:
            parameters: of the layer.
            graph: the same as the autograd graph knows them.
            apart: whether the layer shares a parameter with others, so that its bias is a number of its own.
        """
        chosen = [n for n, p in parameters.items() if p.requires_grad and id(p) not in self._vectors]
        one = not apart and chosen == ["weight", "bias"] and graph["bias"].shape == graph["weight"].shape[:1]
        for name in chosen:
            key = id(parameters[name])
            if one and name == "bias" and graph["weight"].dim() > 1:
                weight = self._vectors[id(parameters["weight"])]
                self._vectors[key] = weight._replace(s=weight.r.new_ones(1))
                self._home[key] = id(parameters["weight"])
            else:
                self._vectors[key] = self._directions.vectors(graph[name])
        return chosen

    def see(self, parameter: Tensor, gradient: Tensor) -> None:
        """The whole gradient of a parameter is here."""
        self._seen.add(id(parameter))
        vectors = self._vectors[id(parameter)]
        value = actual(gradient.detach(), vectors)
        key = self._home.get(id(parameter), id(parameter))
        self._actual[key] = self._actual[key] + value if key in self._actual else value

    def saw(self, parameter: Tensor) -> bool:
        """Whether the whole gradient of a parameter has come."""
        return id(parameter) in self._seen

    def explain(
        self,
        name: str,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, PerSample],
        low: torch.dtype | None,
    ) -> dict[str, Tensor]:
        """The per-sample gradients of a layer are here; the numbers that they bring, by parameter.

        Args:
            name: of the layer.
            parameters: of the layer.
            gradients: by the parameters' names.
            low: the dtype that autocast computes in, where it does.
        """
        brought = {}
        for local, p in parameters.items():
            vectors, part = self._vectors.get(id(p)), gradients.get(local)
            if vectors is None or part is None:
                continue
            joined = self._home.get(id(parameters["bias"])) == id(p) if "bias" in parameters else False
            same = joined and _same_cotangents(part, gradients.get("bias"))
            home = self._home.get(id(p))
            if home is not None and _same_cotangents(gradients.get("weight"), part):
                continue  # in the weight's number
            value, size = explained(part, vectors, with_bias=same)
            brought[local] = value
            found = Explained(value, size, _tolerance(value, p.dtype, low, part))
            self._explained.setdefault((name, home or id(p)), []).append(found)
        return brought

    def failures(self, layers: Sequence[tuple[Mapping[str, Tensor], set[str]]]) -> tuple[list[int], Tensor] | None:
        """Which layers' whole gradients are not explained: their numbers in the list, and a bool for each.

        Args:
            layers: of each its parameters, and the layers that bring gradients of these, itself among them.
        """
        indices: list[int] = []
        wholes: list[Tensor] = []
        values: list[Tensor] = []
        sizes: list[Tensor] = []
        squares: list[float] = []
        for index, (parameters, holders) in enumerate(layers):
            keys = dict.fromkeys(self._home.get(id(p), id(p)) for p in parameters.values())
            for key in keys:
                whole = self._actual.get(key)
                if whole is None:
                    continue
                known = [found for name in holders for found in self._explained.get((name, key), ())]
                tolerance = max((found.tolerance for found in known), default=0.0)
                indices.append(index)
                wholes.append(whole)
                values.append(_sum([found.value for found in known], whole))
                sizes.append(_sum([found.size for found in known], whole))
                squares.append(tolerance**2)
        if not indices:
            return None
        whole = _stack(wholes)
        difference = whole - _stack(values)
        bounds = _stack(sizes) * self._directions.constants(squares, whole)
        return indices, (difference * difference > bounds) & (whole - whole == 0)


def _tolerance(value: Tensor, dtype: torch.dtype, low: torch.dtype | None, gradient: PerSample) -> float:
    """What part of a number's size may be rounding: ``dtype`` of the parameter, ``low`` what factors are rounded to."""
    factors = 0.0 if low is None else torch.finfo(low).eps
    if value.is_cuda and dtype is torch.float32:
        convolved = isinstance(gradient, Outer) and isinstance(gradient.a, Patches)
        lower = torch.backends.cudnn.allow_tf32 if convolved else torch.get_float32_matmul_precision() != "highest"
        factors = max(factors, TF32 if lower else 0.0)
    return max(UNITS * torch.finfo(dtype).eps, UNITS_OF_FACTORS * factors)


def _same_cotangents(weight: PerSample | None, bias: PerSample | None) -> bool:
    return isinstance(weight, Outer) and isinstance(bias, Outer) and bias.g is weight.g


def _stack(numbers: Sequence[Tensor]) -> Tensor:
    like = numbers[0]
    if any(x.dtype is not like.dtype or x.device != like.device for x in numbers):
        numbers = [x.to(like) for x in numbers]
    return torch.stack(list(numbers))


def _sum(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.to(like) for part in parts]).sum() if parts else like.new_zeros(())
