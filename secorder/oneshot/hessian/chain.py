"""Chains, linear in depth: the Hessian of each sample is carried backwards from one cut of the graph to the one before.

A cut is a tensor through which every way from the layers before it to the loss goes. With f the segment of the graph
from a cut to the next, H and g the loss's Hessian and gradient there, sample by sample,

    H_before = J_fᵀ H J_f + Σ_k g_k ∇²f_k.

For matrices and functions of each element this is written down, D Wᵀ H W D + diag(φ″ ∘ Wᵀg); for any other segment it
takes as many Hessian-vector products *of the segment alone* as a sample has elements before it, or in a layer's z that
lies inside. H itself is kept as columns of the loss's root and a diagonal where it is no more than that (up to the
second nonlinearity from the end). Before, the diagonal's part is the rows of a matrix, one column more each, over few
layers; over many, a matrix a sample. Where nothing but a diagonal is asked for, nothing but a diagonal is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._torch.chain_graph import Kind, Segment, batched_gradients, segments_of
from ..._torch.vjp import ACCELERATOR_CHUNK_BYTES, chunks, gradients
from ...layers.layout import DIM_ZERO
from ...monitor.progress import progress_bar
from ...results import Strategy
from ..measurement import Measurement
from ..timing import Pieces, Rehearsal, now, seconds_of
from .block import Block
from .budget import Budget
from .facts import Facts
from .layer_block import by_block, by_diagonal
from .layer_graph import LayerGraph, OutputSide
from .steps import Step, steps_of

NAME = Strategy.CHAIN

#: Memory of the matrices of the samples that are carried at a time, before a step and behind it, where samples may be
#: taken a few at a time: what stays in a CPU's caches.
_CACHED_BYTES = 3 << 21

#: And at most, where they may not.
CHAIN_BYTES = 1 << 30

#: Memory of the products with a segment's basis that are made at a time.
_PRODUCT_BYTES = 1 << 25

#: Multiplications of a product with the Hessian of a segment, to one of its forward; how much longer they take than in
#: one large matrix; and those that take as long as to put one number of what they give into its place.
_PRODUCT, _SLOWER, _MOVED = 6, 4, 100

#: Multiplications that are worth one number that a product passes through, in :class:`.Budget`.
_WORK = 100


@dataclass(eq=False)
class Chain:
    """The graph from the output to the layers, cut into segments."""

    side: OutputSide  #: the loss as a function of the output
    segments: list[Segment]  #: from the output backwards
    graphs: dict[int, LayerGraph]  #: by ``id`` of its leaf, each layer that the chain leads to


def applies(facts: Facts) -> bool:
    """Where parameters act through z alone, and the chain leads to it."""
    return bool(facts.own_use and facts.chain_depth)


def products(facts: Facts, budget: Budget) -> int:
    """The rows of each sample's Hessian in z, which are as many products with it; none where z is the output."""
    return facts.chain_products


def affords(served: Sequence[Facts], budget: Budget) -> bool:
    """Whether it may be taken for these layers together."""
    if budget.method == "exact":
        return True
    if budget.max_hvps is None or max(f.chain_products for f in served) > budget.max_hvps:
        return False
    seconds = [f.chain_seconds for f in served if f.chain_seconds is not None]
    if seconds:
        return sum(seconds) <= budget.max_seconds
    return sum(f.chain_work for f in served) <= _WORK * budget.max_work


def find_chain(task: Measurement, side: OutputSide, graphs: Sequence[LayerGraph]) -> Chain | None:
    """The chain of layers that act through one call's z alone, where the graph is one."""
    kinds = {p.dtype for g in graphs for p in g.layer.parameters.values()} | {t.dtype for t in side.model_outputs}
    if len(side.model_outputs) != 1 or task.num_samples == 1 or len(kinds) != 1 or task.autocast:
        return None
    if not kinds <= {torch.float32, torch.float64}:
        return None
    if task.num_samples * side.size**2 * side.points[0].element_size() > CHAIN_BYTES // 4:  # the columns at the output
        return None
    single = {id(g.leaves[0]): g for g in graphs if len(g.leaves) == 1}
    output = side.model_outputs[0]
    segments = segments_of(output, [g.leaves[0] for g in single.values()], task.num_samples)
    limit = CHAIN_BYTES // (task.num_samples * output.element_size())
    chain = Chain(side, [], {})
    for segment in segments:
        within = (_size(segment.shape, task), _size(segment.shape_before, task))
        if segment.kind == Kind.GENERAL and max(within) ** 2 > limit:
            break
        chain.segments.append(segment)
        for key in segment.leaves:
            chain.graphs[key] = single[key]
    while chain.segments and not chain.segments[-1].leaves:
        chain.segments.pop()
    return chain if chain.segments else None


def shortened(chain: Chain, layers: Sequence[str]) -> Chain:
    """The chain as far as to the last of some layers."""
    wanted = [any(chain.graphs[key].layer.name in layers for key in s.leaves) for s in chain.segments]
    segments = chain.segments[: len(wanted) - wanted[::-1].index(True)]
    return Chain(chain.side, segments, {key: chain.graphs[key] for s in segments for key in s.leaves})


def _size(shape: Sequence[int], task: Measurement) -> int:
    return torch.Size(shape).numel() // task.num_samples if shape else 0


def facts_of_chain(task: Measurement, chain: Chain) -> dict[str, dict[str, int]]:
    """What the chain, and a basis, would cost each layer: work as multiplications, counted for one sample."""
    found: dict[str, dict[str, int]] = {}
    columns, passed, spent, curved, dense, moved = chain.side.size, 0, 0, False, False, False
    for index, segment in enumerate(chain.segments):
        size, before = _size(segment.shape, task), _size(segment.shape_before, task)
        inside = [chain.graphs[key] for key in segment.leaves]
        ahead = {following.kind for following in chain.segments[index + 1 :]}
        work = segment.work // task.num_samples
        passed += work
        moved |= segment.kind != Kind.SAME
        if segment.kind == Kind.LINEAR:
            rows = size + before if dense else columns + before if curved else columns
            diagonal = ahead <= {Kind.SAME, Kind.ELEMENTWISE}  # and no more is asked for
            spent += work * (min(rows, size if dense else columns + 1) if diagonal else rows)
            dense |= curved
        elif segment.kind == Kind.GENERAL:
            basis = sum(_size(g.leaves[0].shape, task) for g in inside) + (before if ahead else 0)
            spent += basis * (_SLOWER * (_PRODUCT * work + size * (size if dense else 2 * columns)) + _MOVED * before)
            dense = True
        elif segment.kind == Kind.ELEMENTWISE:
            spent += size * size if dense else columns * size
            curved = True
        for graph in inside:
            basis = _size(graph.leaves[0].shape, task)
            by_basis, by_column = _contractions(graph, basis)
            spent += basis * by_basis if dense else 2 * columns * by_column
            in_z, on_parameters = _PRODUCT * passed + by_basis, _PRODUCT * (passed + by_column)
            found[graph.layer.name] = {
                "chain_depth": len(found) + 1,
                "chain_work": spent * task.num_samples,
                "chain_products": basis if moved else 0,
                "basis_work": max(1, min(basis * in_z, graph.numel * on_parameters)) * task.num_samples,
            }
            spent = 0
    return found


def _contractions(graph: LayerGraph, size: int) -> tuple[int, int]:
    """Multiplications for one sample's gradient, of a vector of the basis of z, and of any: of many positions."""
    if graph.leaves[0].dim() == 2:
        return 0, 0
    rows = max(p.shape[0] for p in graph.layer.parameters.values())
    return size * graph.numel // rows**2, size * graph.numel // rows


# ---- carrying


def run(task: Measurement, chain: Chain) -> dict[str, list[Tensor]]:
    """The diagonal of each layer on the chain, by parameter."""
    steps, top = _prepared(task, chain)
    with progress_bar(task.progress, "Hessian along the chain", task.num_samples, unit="samples") as advance:
        diagonals, totals = _carried_over(task, chain, steps, top, task.num_samples, advance)
    for key, diagonal in diagonals.items():
        _add(totals, chain.graphs[key], by_diagonal(chain.graphs[key], diagonal))
    return totals


def seconds_of_chain(task: Measurement, chain: Chain) -> dict[str, float]:
    """How long each layer takes, from the one before it.

    By what is made for all samples, those that are carried at once, and some of the products.
    """
    prepared: list[tuple[list[Step], Block]] = []
    before = seconds_of(lambda: prepared.append(_prepared(task, chain)))
    steps, top = prepared[0]
    count = min(task.num_samples, _at_once(task, steps, top))
    rehearsal, found = Rehearsal(), dict[str, float]()
    told = 0.0

    def passed(key: int) -> None:
        nonlocal told
        here = now() + rehearsal.skipped
        found[chain.graphs[key].layer.name] = (here - told) * task.num_samples / count
        told = here

    told = now()
    _carried_over(task, chain, steps, top, count, pieces=rehearsal, passed=passed)
    found[next(iter(found))] += before
    return found


def _prepared(task: Measurement, chain: Chain) -> tuple[list[Step], Block]:
    """The steps, and the loss's Hessian in the output."""
    side = chain.side
    root = side.find_root(task.chunk_size)
    pairs = root.columns(range(root.num_columns))
    u = pairs.u.transpose(0, 1)
    top = Block(u, u if pairs.v is None else pairs.v.transpose(0, 1), None if pairs.sign is None else pairs.sign.T)
    (gradient,) = (g for g in side.output_gradients if g is not None)
    steps = steps_of(chain.segments, chain.graphs, gradient.detach())
    for graph in chain.graphs.values():
        graph.layouts = [DIM_ZERO]
    return steps, top


def _carried_over(
    task: Measurement,
    chain: Chain,
    steps: Sequence[Step],
    top: Block,
    count: int,
    advance: Callable[[int], None] = lambda _: None,
    pieces: Pieces = chunks,
    passed: Callable[[int], None] = lambda _: None,
) -> tuple[dict[int, Tensor], dict[str, list[Tensor]]]:
    """Of the first samples: diagonals of H_z by ``id`` of the leaf; of layers that need more, those by parameter."""
    diagonals: dict[int, Tensor] = {}
    totals: dict[str, list[Tensor]] = {}
    for rows in chunks(count, _at_once(task, steps, top)):
        here = slice(rows.start, rows.stop)
        for key, block, whole in _carried(task, chain, steps, top.of_samples(here), here, pieces):
            graph = chain.graphs[key]
            if whole:
                _add(totals, graph, by_block(graph, block, here, pieces))
            else:
                own = block.diagonal()
                if key not in diagonals:
                    diagonals[key] = own.new_empty(count, own.shape[1])
                diagonals[key][here] = own
            passed(key)
        advance(len(rows))
    return diagonals, totals


def _at_once(task: Measurement, steps: Sequence[Step], top: Block) -> int:
    """Samples that are carried together: all of them where segments have products of their own."""
    u = top.u
    assert u is not None
    columns, largest, second, matrix = u.shape[1], u.shape[1], False, False
    for step in steps:
        if step.segment.kind == Kind.GENERAL:
            return task.num_samples
        if step.last and not step.whole:
            break
        sizes = [_size(shape, task) for shape in (step.segment.shape, step.segment.shape_before)]
        second |= step.second is not None
        if step.factored:
            columns += sizes[0]
        matrix |= step.segment.kind == Kind.LINEAR and second and not step.factored and not step.diagonal
        largest = max(largest, max(sizes) * max(sizes if matrix else [columns]))
    most = _CACHED_BYTES if u.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    few = max(1, most // (2 * largest * u.element_size()))
    return -(-task.num_samples // -(-task.num_samples // few))  # pieces of about the same size


def _add(totals: dict[str, list[Tensor]], graph: LayerGraph, values: list[Tensor]) -> None:
    name = graph.layer.name
    totals[name] = [a + b for a, b in zip(totals[name], values, strict=True)] if name in totals else values


def _carried(
    task: Measurement, chain: Chain, steps: Sequence[Step], block: Block, here: slice, pieces: Pieces
) -> Iterator[tuple[int, Block, bool]]:
    """Each layer's leaf with H_z of some samples, and whether all of it is needed; till the next is asked for."""
    for step in steps:
        segment = step.segment
        if segment.kind == Kind.GENERAL:
            block, inside = _through(task, chain, step, block, pieces)
            yield from ((key, own, key in step.whole) for key, own in inside)
        else:
            yield from ((key, block, key in step.whole) for key in segment.leaves)
        if step.last:
            return
        if segment.kind == Kind.LINEAR:
            assert segment.weight is not None
            block = block.before_matrix(segment.weight, diagonal=step.diagonal, factored=step.factored)
        elif segment.kind == Kind.ELEMENTWISE:
            assert step.first is not None
            second = None if step.second is None else step.second[here]
            block = block.before_elementwise(step.first[here], second)


def _through(
    task: Measurement, chain: Chain, step: Step, block: Block, pieces: Pieces
) -> tuple[Block, list[tuple[int, Block]]]:
    """The Hessian before any segment, and in the layers inside, by products of the segment alone."""
    segment, count = step.segment, task.num_samples
    weights = step.gradient().clone().requires_grad_(True)
    ends: list[Any] = [chain.graphs[key].leaves[0] for key in segment.leaves]
    shapes = [tuple(leaf.shape) for leaf in ends]
    if not step.last:
        assert segment.into is not None
        ends, shapes = [*ends, segment.into], [*shapes, segment.shape_before]
    pulled = gradients([segment.out], ends, [weights], create_graph=True)
    found = []
    for index, (end, shape) in enumerate(zip(ends, shapes, strict=True)):
        key = segment.leaves[index] if index < len(segment.leaves) else None
        all_of_it = not step.diagonal if key is None else key in step.whole
        size = _size(shape, task)
        result = weights.new_zeros(size, count, size) if all_of_it else weights.new_zeros(count, size)
        at_once = max(1, _PRODUCT_BYTES // (4 * max(1, segment.work) * weights.element_size()))
        for ids in pieces(size, at_once):
            rows = _products(segment, end, pulled[index], weights, block, shape, ids, count)
            if all_of_it:
                result[:, :, ids.start : ids.stop] = rows.permute(2, 1, 0)
            else:
                result[:, ids.start : ids.stop] = rows[range(len(ids)), :, list(ids)].T
        found.append(Block(matrix=result) if all_of_it else Block(only=result))
    inside = list(zip(segment.leaves, found, strict=False))
    return (block if step.last else found[-1]), inside


def _products(
    segment: Segment,
    end: Any,
    pulled: Tensor | None,
    weights: Tensor,
    block: Block,
    shape: Sequence[int],
    ids: range,
    count: int,
) -> Tensor:
    """Rows of H in ``end`` for some basis vectors, the same in all samples: shape (k, N, size)."""
    size = torch.Size(shape).numel() // count
    basis = weights.new_zeros(len(ids), 1, size)
    basis[range(len(ids)), 0, list(ids)] = 1
    if pulled is None:
        return basis.new_zeros(len(ids), count, size)
    vectors = basis.expand(-1, count, -1).reshape(len(ids), *shape)
    along, curved = batched_gradients(pulled, [weights, end], vectors)
    total = basis.new_zeros(len(ids), count, size) if curved is None else curved.reshape(len(ids), count, size)
    if along is not None:
        forth = block.times(along.reshape(len(ids), count, -1)).reshape(len(ids), *segment.shape)
        (back,) = batched_gradients(segment.out, [end], forth)
        total = total if back is None else total + back.reshape(len(ids), count, size)
    return total.detach()
