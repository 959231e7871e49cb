"""The rows of each layer's output, and the samples that they belong to: by graph, weighted cotangents, or change."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch.engine import accumulate_node
from ..._torch.fsdp import local
from ..._torch.graph import Node, Output
from ..._torch.own_hooks import outputs_seen
from ..._torch.random_state import fresh_generator
from ..._torch.sample_graph import SHARED
from ..._torch.surroundings import inside_transform
from ..._torch.vjp import gradients
from ...errors import DoubleBackwardError
from ...layers.layout import Layout
from ...layers.selection import Layer
from ...layers.uses import Route, reentrant
from ...oneshot.independence import changed_entries, separating_masks
from ...oneshot.recorded_layer import RecordedLayer, layout_options
from ...oneshot.use_rows import ByCotangents, Evidence
from ...parallel.ranks import Ranks
from .forward_graph import ForwardGraph
from .hypotheses import Trial, any_layout, floating
from .relation import Shape


@dataclass
class Rows:
    """Whose the rows are of layers' calls, or of the operations that their parameters meet the samples in."""

    #: by layer, the layout, the place and the shape of each output
    known: dict[str, list[tuple[Layout | None, int | str, Shape]]] = field(default_factory=dict)
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
    result, unreached = Rows(), set()
    if layers and graph.ends:
        options = {z.layer.name: _options(z, graph.count) for z in seen}
        nodes = {z.layer.name: set(map(accumulate_node, z.leaves)) for z in seen}
        if not reentrant(graph.users):  # whose insides the graph does not show
            unreached = {x for x, own in nodes.items() if graph.users.keys().isdisjoint(own)}
        # What no output depends on may be in the loss yet, where the model keeps it: of several layouts, which is it?
        untold = [(z, zip(z.leaves, options[z.layer.name], strict=True)) for z in seen]
        kept = [z for z, own in untold if any(len(o) > 1 and accumulate_node(x) not in graph.users for x, o in own)]
        beside = [z for z in seen if z in kept or not nodes[z.layer.name].isdisjoint(graph.beside)]
        told = [z for z in seen if z not in beside]
        evidence = _AtLeaves(graph, told, options)
        try:
            evidence.judge([accumulate_node(leaf) for z in told for leaf in z.leaves])
        except DoubleBackwardError:  # reentrant checkpoints do not go with torch.autograd.grad
            pass
        else:
            for z in told:
                _note(z, evidence, result)
            layers = [z.layer for z in beside]
    apart = not layers or _by_change(layers, trial, ranks, result)
    result.reached -= unreached
    return result if apart else None


class _AtLeaves(ByCotangents):
    """At the leaves that were added to what layers returned, where samples are as their rules have them."""

    real = False

    def __init__(
        self, graph: ForwardGraph, layers: Sequence[RecordedLayer], options: Mapping[str, Sequence[list[Layout]]]
    ) -> None:
        super().__init__(graph.ends, graph.count, fresh_generator(graph.ends[0][0].device), graph.inner_sizes)
        own = [(leaf, of_leaf) for z in layers for leaf, of_leaf in zip(z.leaves, options[z.layer.name], strict=True)]
        self.options: dict[Node, list[Layout]] = {accumulate_node(leaf): of_leaf for leaf, of_leaf in own}

    def _candidates(self, node: Node, output: Output) -> list[Layout]:
        return list(self.options[node])

    def _shared(self, node: Node, output: Output) -> bool:
        return self.inner_sizes.get((node, output.number)) == SHARED


def _options(z: RecordedLayer, count: int) -> list[list[Layout]]:
    """For each output of a layer the layouts that it may have by shape."""
    if z.layer.rule is None:
        return [any_layout(leaf, count) for leaf in z.leaves]
    joint = layout_options(z, count)
    return [[layouts[index] for layouts in joint] for index in range(len(z.leaves))]


def _note(z: RecordedLayer, evidence: Evidence, result: Rows) -> None:
    """Enter what evidence tells of a layer's outputs."""
    nodes = list(map(accumulate_node, z.leaves))
    layouts = [layout for node in nodes for layout in evidence.layouts[node] if layout is not None]
    if len(layouts) == len(nodes):
        shapes = [tuple(leaf.shape) for leaf in z.leaves]
        # Where no gradient comes, zeros would do for samples anywhere: outputs of the same shape tell.
        told = {s: x for s, x, node in zip(shapes, layouts, nodes, strict=True) if node in evidence.moved}
        by_node = zip(shapes, layouts, nodes, strict=True)
        result.known[z.layer.name] = [
            (x if node in evidence.moved else told.get(s, x), i, s) for i, (s, x, node) in enumerate(by_node)
        ]
    else:
        result.unknown.add(z.layer.name)
    if any(node in evidence.moved and node not in evidence.blank for node in nodes):
        result.reached.add(z.layer.name)
    elif z.layer.name in result.known and not evidence.blank.isdisjoint(nodes):
        result.blank.add(z.layer.name)


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
            output = trial.unchanged() if mask is None else trial.changed(mask)
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
