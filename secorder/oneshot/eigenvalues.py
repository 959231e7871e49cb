"""Extreme eigenvalues of each layer's block, by products with vectors."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._arguments import require_integer, require_number, require_one_of
from ..errors import NonFiniteError
from ..layers.dtypes import compute_dtype, rounding
from ..layers.selection import Layer
from ..monitor.progress import progress_bar
from .measurement import Measurement
from .operators import By, Curvature, Operator, ProductInZ, ProductOnParameters, blocks_of, operators
from .warn import NO_SUCH_DERIVATIVE

#: Which eigenvalues: those at both ends, the largest in modulus, the largest, the smallest.
Which = Literal["both", "largest", "top", "bottom"]

#: The usual number of products at most.
MAX_ITERATIONS = 200

#: Vectors that there is room for at first; for twice as many when it is full.
FIRST_ROWS = 16

#: Products before which nothing passes for converged: a start that has next to nothing of the largest eigenvector looks
#: as if it had found others.
FEWEST = 5

#: Elements of a block that is gone through to the end, whatever the tolerance.
SMALL = 16


@dataclass(frozen=True)
class Eigenvalues:
    """Extreme eigenvalues of a layer's block of the Hessian, the GGN or the Fisher.

    Attributes:
        top: the largest eigenvalues, descending; of the largest in modulus, those that are not negative.
        bottom: the smallest eigenvalues, ascending; of the largest in modulus, the negative ones.
        residual: largest ``‖H q − λ q‖`` of them; each is within this of an eigenvalue of the block. What products
            lack of a symmetric matrix' (by hooks that clamp gradients, by noise) is added to it.
        num_hvps: products taken.
        converged: whether the residual met the tolerance.
    """

    top: list[float]
    bottom: list[float]
    residual: float
    num_hvps: int
    converged: bool


@dataclass(frozen=True)
class Ends:
    """Which eigenvalues are looked for, and for how long.

    Attributes:
        count: how many; of both ends, at each.
        which: at which end.
        tolerance: on residuals, relative to the largest eigenvalue in modulus.
        max_iterations: products at most.
    """

    count: int = 1
    which: Which = "both"
    tolerance: float = 1e-3
    max_iterations: int = MAX_ITERATIONS

    def __post_init__(self) -> None:
        """Raise :class:`InvalidArgumentError` where a number is out of its range."""
        require_integer("count", self.count, 1)
        require_one_of("which", self.which, get_args(Which))
        require_number("tolerance", self.tolerance, zero=True)
        require_integer("max_iterations", self.max_iterations, 1)


def eigenvalues(task: Measurement, ends: Ends, *, of: Curvature, by: By) -> dict[str, Eigenvalues]:
    """Largest and smallest eigenvalues of each block.

    See :meth:`secorder.CurvatureProbe.hessian_eigenvalues`, which this function carries out.
    """
    found: dict[str, Eigenvalues] = {}
    bar = progress_bar(task.progress, "Eigenvalues", len(task.layers), unit="layers")
    with bar as advance, closing(operators(task, of)) as blocks:
        for layer, product in blocks:
            found |= _of_layer(task, layer, product, by, ends)
            advance(1)
    return {name: found[name] for layer in task.layers for name in blocks_of(layer, by)}


def _of_layer(task: Measurement, layer: Layer, product: Operator | None, by: By, ends: Ends) -> dict[str, Eigenvalues]:
    """Of one layer's block, or of its parameters'."""
    found: dict[str, Eigenvalues] = {}
    total = sum(layer.sizes())
    blocks = blocks_of(layer, by)
    for name, block in blocks.items():
        size = block.stop - block.start
        if product is None or not size:
            found[name] = nothing(min(ends.count, size), ends.which)
            continue
        start = start_of(task, layer, product, block)
        part = product if len(blocks) == 1 else restricted(product, block, total)
        found[name] = lanczos(part, start, replace(ends, max_iterations=min(ends.max_iterations, size)))
    return found


def start_of(task: Measurement, layer: Layer, product: Operator | None, block: slice) -> Tensor:
    """A random vector and, where it is at hand, the loss's gradient, which mostly lies among the extreme eigenvectors.

    Measured on small trained GPT-2s, Llamas and BERTs: a tenth to a third of the products less than of a random vector.
    """
    like = next(iter(layer.parameters.values())).detach().new_empty(0, dtype=compute_dtype(layer))
    start: Tensor = task.random((block.stop - block.start,), like)
    if not isinstance(product, (ProductInZ, ProductOnParameters)) or len(start) == 1:  # of which the two may cancel
        return start
    gradient = product.gradient[block].to(start)
    direction = (gradient / gradient.norm()).nan_to_num(0.0, 0.0, 0.0)  # at a minimum, there is none
    return start.div_(start.norm()).add_(direction)


def nothing(count: int, which: Which = "both") -> Eigenvalues:
    """Those of a zero."""
    zeros = [0.0] * count
    return Eigenvalues([] if which == "bottom" else zeros, zeros if which in ("both", "bottom") else [], 0.0, 0, True)


def restricted(product: Operator, block: slice, size: int) -> Operator:
    """The operator on some of the elements, the others left as they are."""

    def restricted(v: Tensor) -> Tensor:
        whole = v.new_zeros(size)
        whole[block] = v
        return product(whole)[block]

    return restricted


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, ends: Ends) -> Eigenvalues:
    """Extreme eigenvalues of a symmetric operator by Lanczos iteration with full reorthogonalisation.

    From a random vector.

    Source: Golub, Van Loan, "Matrix computations", 4th edition, section 10.3.
    """
    steps = lanczos_steps(start, ends)
    vector = next(steps)
    while True:
        try:
            vector = steps.send(product(vector))
        except StopIteration as done:
            result: Eigenvalues = done.value
            return result


def lanczos_steps(start: Tensor, ends: Ends) -> Generator[Tensor, Tensor, Eigenvalues]:
    """:func:`lanczos` that yields each vector whose product it is to be sent.

    Two products in turn must meet the tolerance: one may do so without an extreme eigenvalue, of whose vector the start
    had next to nothing, and which the next one mostly shows.
    """
    count, which, iterations = ends.count, ends.which, ends.max_iterations
    space = start.new_empty(min(iterations, FIRST_ROWS), start.numel())  # the basis, with room to grow
    torch.div(start, start.norm(), out=space[0])
    alphas: list[float] = []
    betas: list[float] = []
    top: list[float] = []
    bottom: list[float] = []
    residual, bound = math.inf, 0.0
    met = False  # by the product before
    skew = 0.0  # of a symmetric operator, a product has no part in vectors before the last two, and β in the one before
    for step in range(1, iterations + 1):
        known = space[:step]
        w = yield known[-1]
        overlaps = known @ w
        w = w - known.T @ overlaps
        w = w - known.T @ (known @ w)  # twice is enough
        *overlap, beta = torch.cat([overlaps, w.norm()[None]]).tolist()  # the one look at the device
        if not math.isfinite(beta):
            raise NonFiniteError(NO_SUCH_DERIVATIVE.format("a product with the curvature"))
        alphas.append(overlap[-1])
        skew = max(skew, math.dist(overlap[:-1], [0.0] * (step - 2) + betas[-1:]))
        exhausted = beta <= 1e-12 * max(1e-300, *map(abs, alphas), *betas)
        last = step == iterations or exhausted
        if last or (step >= FEWEST and start.numel() > SMALL):
            values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
            size = values.abs().max().item()
            above, below = _asked(values.tolist(), count, which)
            outermost = vectors[-1, above + below].abs().max().item()
            lack, bound = skew if skew > rounding(start.dtype) * size else 0.0, ends.tolerance * size
            residual = lack + (0.0 if exhausted or step == start.numel() else beta * outermost)
            top, bottom = values[above].tolist(), values[below].tolist()
            if last or lack > bound or (met and residual <= bound):
                break
            met = residual <= bound and len(values) >= (2 * count if which == "both" else count)
        if step == len(space):
            space = torch.cat([space, space.new_empty(min(step, iterations - step), start.numel())])
        torch.div(w, beta, out=space[step])
        betas.append(beta)
    return Eigenvalues(top, bottom, residual, len(alphas), residual <= bound)


def rows_of_basis(iterations: int) -> int:
    """Vectors that so many iterations have room for at once, at most: with more room, what is there is copied."""
    room, before = FIRST_ROWS, 0
    while room < iterations:
        room, before = 2 * room, room
    return room + before


def _asked(values: Sequence[float], count: int, which: Which) -> tuple[list[int], list[int]]:
    """Of ascending values, the places of those that are asked for: from the top down, and from the bottom up."""
    order = range(len(values))
    if which == "largest":
        chosen = sorted(order, key=lambda k: -abs(values[k]))[:count]
        return sorted((k for k in chosen if values[k] >= 0), reverse=True), sorted(k for k in chosen if values[k] < 0)
    return [] if which == "bottom" else list(order[::-1][:count]), [] if which == "top" else list(order[:count])


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    """A symmetric matrix, where it takes no time: in the host's memory, in double precision."""
    how: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    t = torch.diag(torch.tensor(diagonal, **how))
    if beside:
        off = torch.tensor(beside, **how)
        t.diagonal(1).copy_(off)
        t.diagonal(-1).copy_(off)
    return t
