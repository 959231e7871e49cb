"""The rows of each layer's output, and the samples that they belong to: by graph, weighted cotangents, or change."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch.engine import accumulate_node
from ..._torch.fsdp import local
from ..._torch.own_hooks import outputs_seen
from ..._torch.random_state import fresh_generator
from ..._torch.sample_graph import SHARED, InnerSizes
from ..._torch.surroundings import inside_transform
from ..._torch.vjp import gradients
from ...errors import DoubleBackwardError
from ...layers.layout import Layout
from ...layers.selection import Layer
from ...layers.uses import Route
from ...oneshot.independence import DRAWS, changed_entries, rows_weighted, separating_masks, weight_draws
from ...oneshot.recorded_layer import RecordedLayer, layout_options
from ...oneshot.use_rows import ByCotangents
from ...parallel.ranks import Ranks
from .forward_graph import ForwardGraph
from .hypotheses import Trial, any_layout, floating
from .relation import Shape


@dataclass
class Rows:
    """Whose the rows are of layers' calls, or of the operations that their parameters meet the samples in."""

    #: by layer, the layout, the place and the shape of each output
    known: dict[str, list[tuple[Layout, int | str, Shape]]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)  #: layers of which it could not be told
    reached: set[str] = field(default_factory=set)  #: layers that the model's output depends on
    blank: set[str] = field(default_factory=set)  #: layers of which an output got no gradient, though it might
    repeated: set[str] = field(default_factory=set)  #: those of them where another use at the same place got some
    hidden: set[str] = field(default_factory=set)  #: of those that are unknown, whose operations a checkpoint hides
    routes: dict[str, frozenset[Route]] = field(default_factory=dict)  #: by layer, those that are followed


def rows_of_layers(
    seen: Sequence[RecordedLayer], layers: Sequence[Layer], trial: Trial, graph: ForwardGraph, ranks: Ranks | None
) -> Rows | None:
    """Which rows of each layer's output belong to which sample; None where they are seen to influence one another.

    Ranks that parameters lie over do the same together.
    """
    result = Rows()
    if layers and graph.ends:
        beside = [z for z in seen if any(accumulate_node(leaf) in graph.beside for leaf in z.leaves)]
        try:
            _by_graph_and_cotangents([z for z in seen if z not in beside], graph, result)
        except DoubleBackwardError:  # reentrant checkpoints do not go with torch.autograd.grad
            result = Rows()
        else:
            layers = [z.layer for z in beside]
    if layers and not _by_change(layers, trial, ranks, result):
        return None
    result.blank = {z.layer.name for z in seen if z.layer.name in result.known and graph.depends_on(z.leaves)}
    result.blank -= result.reached
    return result


def _options(z: RecordedLayer, count: int) -> list[list[Layout]]:
    """For each output tensor of the layer its candidate layouts."""
    if z.layer.rule is None:
        return [any_layout(leaf, count) for leaf in z.leaves]
    joint = layout_options(z, count)
    return [[layouts[index] for layouts in joint] for index in range(len(z.leaves))]


def _by_graph_and_cotangents(layers: Sequence[RecordedLayer], graph: ForwardGraph, result: Rows) -> None:
    """What the graph tells of layers, and by cotangents what it does not."""
    sizes, rest = graph.inner_sizes or {}, []
    for z in layers:
        candidates = _options(z, graph.count)
        options = _by_graph(z, candidates, sizes)
        if options is None:
            rest.append((z, candidates))
        else:
            _note(z, options, any((accumulate_node(leaf), 0) in sizes for leaf in z.leaves), result)
    if rest:
        _by_cotangents(rest, graph, result)


def _note(z: RecordedLayer, options: list[list[Layout]], reached: bool, result: Rows) -> None:
    """Enter a layer with the layouts that its outputs may have, and whether the model's outputs depend on it."""
    if all(options):
        told = enumerate(zip(options, z.leaves, strict=True))
        result.known[z.layer.name] = [(choices[0], i, tuple(leaf.shape)) for i, (choices, leaf) in told]
    else:
        result.unknown.add(z.layer.name)
    if reached:
        result.reached.add(z.layer.name)


def _by_graph(z: RecordedLayer, candidates: list[list[Layout]], inner_sizes: InnerSizes) -> list[list[Layout]] | None:
    """For each output of a layer the layouts that the graph shows to be right; None where it does not tell."""
    found = []
    for leaf, choices in zip(z.leaves, candidates, strict=True):
        here = (accumulate_node(leaf), 0)
        inner = inner_sizes.get(here)
        if not inner_sizes or (here in inner_sizes and inner is None):
            return None
        # Of what nothing depends on, the usual layout is as good as any.
        found.append([o for o in choices if here not in inner_sizes or o.inner_size(leaf.shape) == inner])
        if not found[-1] and inner != SHARED:
            return None
    return found


def _by_cotangents(
    asked: Sequence[tuple[RecordedLayer, list[list[Layout]]]], graph: ForwardGraph, result: Rows
) -> None:
    ends, count = graph.ends, graph.count
    layers, candidates = [z for z, _ in asked], [choices for _, choices in asked]
    leaves = [leaf for z in layers for leaf in z.leaves]
    cotangents = ByCotangents(ends, count, fresh_generator(ends[0][0].device))

    def pull_back(stack: list[Tensor]) -> dict[int, Tensor]:
        pulled = gradients(cotangents.outputs, leaves, stack)
        return {
            id(leaf): (torch.zeros_like(leaf) if g is None else g)[None] for leaf, g in zip(leaves, pulled, strict=True)
        }

    plain = pull_back(cotangents.plain)
    options: list[list[list[Layout]]] = [[[]] for _ in layers]
    for number in dict.fromkeys((weight_draws(leaves), DRAWS)):  # by powers of two where rounding hides it
        unsettled = [i for i, (o, c) in enumerate(zip(options, candidates, strict=True)) if all(c) and not all(o)]
        if not unsettled:
            break
        draws = [(weights, pull_back(weighted)) for weights, weighted in cotangents.weighted(number)]
        for i in unsettled:
            options[i] = _that_scale(layers[i], candidates[i], plain, draws)
    for z, by_leaf in zip(layers, options, strict=True):
        _note(z, by_leaf, any(bool((plain[id(leaf)] != 0).any()) for leaf in z.leaves), result)


def _that_scale(
    z: RecordedLayer,
    candidates: list[list[Layout]],
    plain: dict[int, Tensor],
    draws: Sequence[tuple[Tensor, dict[int, Tensor]]],
) -> list[list[Layout]]:
    """For each output of a layer the layouts of which weighting the samples weights the rows."""

    def holds(layout: Layout, key: int) -> bool:
        return all(bool(rows_weighted(plain[key], found[key], weights, layout)) for weights, found in draws)

    return [[o for o in choices if holds(o, id(leaf))] for leaf, choices in zip(z.leaves, candidates, strict=True)]


def _by_change(layers: Sequence[Layer], trial: Trial, ranks: Ranks | None, result: Rows) -> bool:
    """By the rows of each layer's output that change where samples are changed; False where those of others do, too."""
    outputs: dict[str, list[Tensor]] = {}
    values: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        if inside_transform():
            result.unknown.add(name)
            return
        result.reached.add(name)
        outputs.setdefault(name, []).extend(floating(output))
        values.setdefault(name, []).extend(local(t).clone() for t in floating(output))

    def run(mask: Tensor | None) -> _Seen:
        outputs.clear()
        values.clear()
        with torch.enable_grad() if ranks is None else torch.no_grad():
            output = trial.forward(trial.arguments) if mask is None else trial.changed(mask)
        pulled = _output_gradients(output, outputs) if ranks is None else {}
        return _Seen(dict(values), pulled, [local(t) for t in floating(output)])

    count = trial.hypothesis.num_samples
    masks = list(separating_masks(count))
    # Where parameters lie over ranks, hooks make something else of what a layer returns.
    with outputs_seen([(layer.name, layer.enclosing) for layer in layers], keep, first=ranks is not None):
        base = run(None)
        # Every rank that shares the parameters runs the model as often, whatever its number of samples.
        turns = len(masks) if ranks is None else round(ranks.largest([len(masks)])[0])
        changed = [run(mask) for mask in masks]
        for _ in range(turns - len(masks)):
            run(None)
    if ranks is not None and ranks.any(not _apart(count, base.ends, [c.ends for c in changed], masks)):
        return False
    for name, tensors in base.values.items():
        layouts = [_layout(name, i, count, base, changed, masks) for i in range(len(tensors))]
        told = [(x, i, tuple(t.shape)) for i, (x, t) in enumerate(zip(layouts, tensors, strict=True)) if x is not None]
        if name in result.unknown or len(told) < len(tensors):
            result.unknown.add(name)
        else:
            result.known[name] = [*told]
    return True


class _Seen(NamedTuple):
    """One forward: outputs of the layers' calls, gradients on them of the sum of the model's outputs, and these."""

    values: dict[str, list[Tensor]]
    gradients: dict[str, list[Tensor]]
    ends: list[Tensor]


def _apart(count: int, before: list[Tensor], after: list[list[Tensor]], masks: Sequence[Tensor]) -> bool:
    """Whether in each output that may have rows of samples, those of samples that were not changed stay."""
    for index, end in enumerate(before):
        options = every = any_layout(end, count)
        for ends, mask in zip(after, masks, strict=True):
            options = separated(options, changed_entries(end, ends[index]), mask)
        if every and not options:
            return False
    return True


def separated(options: Sequence[Layout], moved: Tensor, mask: Tensor) -> list[Layout]:
    """The layouts of a tensor by which none of the entries that have moved is of a sample that was not changed."""
    kept = ~mask.to(moved.device)
    return [layout for layout in options if not bool(layout.split(moved)[kept].any())]


def _output_gradients(result: Any, outputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    ends = [t for t in floating(result) if t.requires_grad]
    inside = [t for tensors in outputs.values() for t in tensors if t.requires_grad]
    try:
        pulled = gradients(ends, inside, [torch.ones_like(t) for t in ends]) if ends else [None] * len(inside)
    except DoubleBackwardError:
        return {}
    by_id = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(inside, pulled, strict=True)}
    return {name: [by_id[id(t)] for t in tensors if id(t) in by_id] for name, tensors in outputs.items()}


def _layout(
    name: str, index: int, count: int, base: _Seen, changed: Sequence[_Seen], masks: Sequence[Tensor]
) -> Layout | None:
    """By which rows of changed samples change, and no others, nor what the model's outputs make of the others."""
    before, after = base.values[name][index], _nth([c.values for c in changed], name, index)
    if len(after) != len(masks) or any(tensor.shape != before.shape for tensor in after):
        return None
    moved = [changed_entries(before, tensor) for tensor in after]
    options = any_layout(before, count) if not masks or any(bool(x.any()) for x in moved) else []
    for own, mask in zip(moved, masks, strict=True):
        options = separated(options, own, mask)
    first, *others = _nth([base.gradients, *(c.gradients for c in changed)], name, index) or [before]
    for g, mask in zip(others if options else (), masks, strict=False):
        options = separated(options, changed_entries(first, g), mask)
    return next(iter(options), None)


def _nth(seen: Iterable[dict[str, list[Tensor]]], name: str, index: int) -> list[Tensor]:
    return [found[name][index] for found in seen if index < len(found.get(name, ()))]
