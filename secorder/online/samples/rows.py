"""The rows of each layer's output, and the samples that they belong to: by graph, weighted cotangents, or change."""

from collections.abc import Callable, Iterable, Sequence
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
from ...oneshot.independence import DRAWS, changed_entries, rows_weighted, separating_masks, weight_draws
from ...oneshot.recorded_layer import RecordedLayer, layout_options
from ...oneshot.use_rows import ByCotangents
from ...parallel.ranks import Ranks
from .forward_graph import ForwardGraph
from .hypotheses import Hypothesis, any_layout, floating, run_changed

#: By layer the calls with their layouts, the layers without, the layers that the output depends on.
Rows = tuple[dict[str, list[tuple[Layout, Tensor]]], set[str], set[str]]


def rows_of_layers(
    seen: Sequence[RecordedLayer],
    layers: Sequence[Layer],
    arguments: Any,
    forward: Callable[[Any], Any],
    chosen: Hypothesis,
    graph: ForwardGraph,
    ranks: Ranks | None,
) -> Rows | None:
    """Which rows of each layer's output belong to which sample; None where they are seen to influence one another.

    Ranks that parameters lie over do the same together.
    """
    if not layers:
        return _none_yet()
    if graph.ends:
        beside = [z for z in seen if any(accumulate_node(leaf) in graph.beside for leaf in z.leaves)]
        try:
            found = _by_graph_and_cotangents([z for z in seen if z not in beside], graph)
        except DoubleBackwardError:  # reentrant checkpoints do not go with torch.autograd.grad
            beside = []
        else:
            more = _by_change([z.layer for z in beside], arguments, forward, chosen, ranks) if beside else _none_yet()
            return None if more is None else ({**found[0], **more[0]}, found[1] | more[1], found[2] | more[2])
    return _by_change(layers, arguments, forward, chosen, ranks)


def _options(z: RecordedLayer, count: int) -> list[list[Layout]]:
    """For each output tensor of the layer its candidate layouts."""
    if z.layer.rule is None:
        return [any_layout(leaf, count) for leaf in z.leaves]
    joint = layout_options(z, count)
    return [[layouts[index] for layouts in joint] for index in range(len(z.leaves))]


def _by_graph_and_cotangents(layers: Sequence[RecordedLayer], graph: ForwardGraph) -> Rows:
    """What the graph tells of layers, and by cotangents what it does not."""
    candidates = [_options(z, graph.count) for z in layers]
    by_graph = [_by_graph(z, c, graph.inner_sizes or {}) for z, c in zip(layers, candidates, strict=True)]
    rest = [(z, c) for z, c, o in zip(layers, candidates, by_graph, strict=True) if o is None]
    known, unknown, reached = _by_cotangents(rest, graph) if rest else _none_yet()
    for z, options in zip(layers, by_graph, strict=True):
        if options is None:
            continue
        if all(options):
            known[z.layer.name] = [(choices[0], leaf) for choices, leaf in zip(options, z.leaves, strict=True)]
        else:
            unknown.add(z.layer.name)
        if any((accumulate_node(leaf), 0) in (graph.inner_sizes or {}) for leaf in z.leaves):
            reached.add(z.layer.name)
    return known, unknown, reached


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


def _by_cotangents(asked: Sequence[tuple[RecordedLayer, list[list[Layout]]]], graph: ForwardGraph) -> Rows:
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
    known, unknown, reached = _none_yet()
    for z, by_leaf in zip(layers, options, strict=True):
        name = z.layer.name
        moved = [bool((plain[id(leaf)] != 0).any()) for leaf in z.leaves]
        if any(moved):
            reached.add(name)
        if all(by_leaf):
            known[name] = [(choices[0], leaf) for choices, leaf in zip(by_leaf, z.leaves, strict=True)]
        else:
            unknown.add(name)
    return known, unknown, reached


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


def _none_yet() -> Rows:
    return {}, set(), set()


def _by_change(
    layers: Sequence[Layer],
    arguments: Any,
    forward: Callable[[Any], Any],
    chosen: Hypothesis,
    ranks: Ranks | None,
) -> Rows | None:
    """By the rows of each layer's output that change where samples are changed."""
    outputs: dict[str, list[Tensor]] = {}
    values: dict[str, list[Tensor]] = {}
    known, unknown, reached = _none_yet()

    def keep(name: str, output: Any) -> None:
        if inside_transform():
            unknown.add(name)
            return
        reached.add(name)
        outputs.setdefault(name, []).extend(floating(output))
        values.setdefault(name, []).extend(local(t).clone() for t in floating(output))

    def run(mask: Tensor | None) -> _Seen:
        outputs.clear()
        values.clear()
        with torch.enable_grad() if ranks is None else torch.no_grad():
            result = forward(arguments) if mask is None else run_changed(forward, arguments, chosen, mask)
        pulled = _output_gradients(result, outputs) if ranks is None else {}
        return _Seen(dict(values), pulled, [local(t) for t in floating(result)])

    masks = list(separating_masks(chosen.num_samples))
    # Where parameters lie over ranks, hooks make something else of what a layer returns.
    with outputs_seen([(layer.name, layer.enclosing) for layer in layers], keep, first=ranks is not None):
        base = run(None)
        # Every rank that shares the parameters runs the model as often, whatever its number of samples.
        turns = len(masks) if ranks is None else round(ranks.largest([len(masks)])[0])
        changed = [run(mask) for mask in masks]
        for _ in range(turns - len(masks)):
            run(None)
    if ranks is not None and ranks.any(not _apart(chosen.num_samples, base.ends, [c.ends for c in changed], masks)):
        return None
    for name, tensors in base.values.items():
        layouts = [
            next((o for o in any_layout(t, chosen.num_samples) if _belong(o, name, i, base, changed, masks)), None)
            for i, t in enumerate(tensors)
        ]
        if name in unknown or any(layout is None for layout in layouts):
            unknown.add(name)
        else:
            known[name] = [(layout, t) for layout, t in zip(layouts, tensors, strict=True) if layout is not None]
    return known, unknown, reached


class _Seen(NamedTuple):
    """One forward: outputs of the layers' calls, gradients on them of the sum of the model's outputs, and these."""

    values: dict[str, list[Tensor]]
    gradients: dict[str, list[Tensor]]
    ends: list[Tensor]


def _apart(count: int, before: list[Tensor], after: list[list[Tensor]], masks: Sequence[Tensor]) -> bool:
    """Whether in each output that may have rows of samples, those of samples that were not changed stay."""
    for index, end in enumerate(before):
        moved = [
            (changed_entries(end, ends[index]), mask.to(end.device)) for ends, mask in zip(after, masks, strict=True)
        ]
        options = any_layout(end, count)
        if options and not any(all(not bool(o.split(m)[~mask].any()) for m, mask in moved) for o in options):
            return False
    return True


def _output_gradients(result: Any, outputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    ends = [t for t in floating(result) if t.requires_grad]
    inside = [t for tensors in outputs.values() for t in tensors if t.requires_grad]
    try:
        pulled = gradients(ends, inside, [torch.ones_like(t) for t in ends]) if ends else [None] * len(inside)
    except DoubleBackwardError:
        return {}
    by_id = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(inside, pulled, strict=True)}
    return {name: [by_id[id(t)] for t in tensors if id(t) in by_id] for name, tensors in outputs.items()}


def _belong(
    layout: Layout, name: str, index: int, base: _Seen, changed: Sequence[_Seen], masks: Sequence[Tensor]
) -> bool:
    """Whether rows of changed samples change, and no others, nor what the model's outputs make of the others."""
    if not _holds(layout, base.values[name][index], _nth([c.values for c in changed], name, index), masks):
        return False
    pulled = _nth([base.gradients, *(c.gradients for c in changed)], name, index)
    return all(
        not bool(layout.split(changed_entries(pulled[0], after))[~mask.to(after.device)].any())
        for after, mask in zip(pulled[1:], masks, strict=False)
    )


def _nth(seen: Iterable[dict[str, list[Tensor]]], name: str, index: int) -> list[Tensor]:
    return [found[name][index] for found in seen if index < len(found.get(name, ()))]


def _holds(layout: Layout, before: Tensor, after: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
    """Whether the rows of the changed samples have changed, and no others, in every trial."""
    if len(after) != len(masks) or any(tensor.shape != before.shape for tensor in after):
        return False
    changed = False
    for mask, tensor in zip(masks, after, strict=True):
        moved = layout.split(changed_entries(before, tensor))
        here = mask.to(before.device)
        if bool(moved[~here].any()):
            return False
        changed = changed or bool(moved[here].any())
    return changed or not masks
