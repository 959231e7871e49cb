"""Which operations parameters meet the samples in, and where the samples are there: verified on one batch.

As for layers (:mod:`secorder.online.rows`): random cotangents on the model's outputs, weighted sample by sample, must
come back weighted by the same factors in the rows of the gradient on an operation's output. Where the model returns no
tensor with samples, the gradient of samples that are kept must stay while others are changed. An operation of which
neither holds owns no samples: it is followed to what takes its output.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._torch.graph import Node, Output, Users, outputs_of, users_of
from .._torch.pytree import tensors_in
from .._torch.vjp import fresh_generator, gradients
from ..errors import DoubleBackwardError
from ..layers.dtypes import rounding
from ..layers.layout import Layout
from ..oneshot.independence import changed_entries, over_samples, separating_masks
from .relation import whole_call
from .routes import routed_nodes
from .samples import Hypothesis, floating, run_changed
from .uses import Route, Uses, find_uses, hidden, layouts_of

__all__ = ["UseRows", "rows_of_uses"]

#: How far ahead operations are looked at together, and how often further ones are.
AHEAD = 2
ROUNDS = 24

Parameters = Mapping[str, Mapping[str, Tensor]]
Forward = Callable[[Any], Any]


@dataclass
class UseRows:
    """What was found of layers that are measured by operations.

    Attributes:
        known: by layer, the layout, the place and the shape of each output of each use.
        routes: by layer, those that are followed.
        unknown: layers whose uses could not be told.
        hidden: those of these whose operations a checkpoint hides.
        reached: layers that the model's output depends on.
    """

    known: dict[str, list[tuple[Layout, str, tuple[int, ...]]]] = field(default_factory=dict)
    routes: dict[str, frozenset[Route]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)


def rows_of_uses(
    parameters: Parameters,
    forward: Forward,
    arguments: Any,
    chosen: Hypothesis,
    options: Sequence[Sequence[Layout]],
    routes: Mapping[str, Collection[Route]],
    *,
    routed: Callable[[Any, Callable[[Any], None]], Any] | None,
) -> UseRows:
    """Find and verify the uses of layers' parameters.

    Args:
        parameters: by layer and name, as the graph of a forward has them.
        forward: the model on its arguments, from one and the same state.
        arguments: of the model.
        chosen: where samples are in the arguments.
        options: where samples may be in each of the model's outputs.
        routes: by layer, those that were found to be followed before.
        routed: the forward for :func:`~secorder.online.routes.routed_nodes`, where rows may depend on data.
    """
    output = forward(arguments)
    users = users_of(tensors_in(output))
    ends = [
        (f, o[0])
        for f, o in zip(floating(output), options, strict=False)
        if o and f.requires_grad and not f.is_complex()
    ]
    evidence: _Evidence
    if chosen.num_samples == 1:
        evidence = _OneSample()
    elif ends:
        evidence = _ByCotangents(ends, chosen.num_samples)
    else:
        evidence = _ByChange(output, forward, arguments, chosen)
    result = UseRows(routes={name: frozenset(routes.get(name, ())) for name in parameters})
    try:
        found = _follow(users, parameters, evidence, result, known=parameters.keys() <= routes.keys())
    except DoubleBackwardError:  # reentrant checkpoints do not go with torch.autograd.grad
        return UseRows(unknown=set(parameters))
    for name, uses in found.items():
        if uses is None or hidden(uses):
            result.unknown.add(name)
            if uses is not None:
                result.hidden.add(name)
            continue
        result.known[name] = [
            (layout, place, output.shape)
            for use in uses.uses
            for layout, place, output in zip(evidence.layouts[use.node], use.places, use.outputs, strict=True)
            if layout is not None
        ]
        if any(use.node in evidence.moved for use in uses.uses):
            result.reached.add(name)
    if routed is not None:
        result.unknown |= _routed(parameters, result, routed, arguments, chosen)
    return result


def _follow(
    users: Users, parameters: Parameters, evidence: "_Evidence", result: UseRows, *, known: bool
) -> dict[str, Uses | None]:
    """The uses of each layer, once no operation is left that owns no samples; the routes go into the result."""
    ahead = 0 if known else AHEAD
    found: dict[str, Uses | None] = {}
    waiting = set(parameters)
    for _ in range(ROUNDS):
        for name in waiting:
            found[name] = find_uses(users, parameters[name], result.routes[name])
        nodes = [use.node for name in waiting for use in (found[name] or Uses({}, {})).uses]
        evidence.judge(_with_users(users, nodes, ahead))
        ahead = AHEAD
        further = set()
        for name in waiting:
            uses = found[name]
            shared = [use for use in uses.uses if None in evidence.layouts[use.node]] if uses is not None else []
            if shared:
                result.routes[name] |= {route for use in shared for route in use.routes}
                further.add(name)
        waiting = further
        if not waiting:
            return found
    return {**found, **dict.fromkeys(waiting)}


def _with_users(users: Users, nodes: Sequence[Node], steps: int) -> list[Node]:
    found = dict.fromkeys(nodes)
    last = list(found)
    for _ in range(steps):
        last = [user for node in last for user, _ in users[node] if user not in found]
        found.update(dict.fromkeys(last))
    return list(found)


class _Evidence:
    """Where samples are in what operations computed.

    Attributes:
        layouts: by operation, the layout of each output; None where there is none, so that no sample owns its rows.
        moved: operations that the model's output depends on.
    """

    def __init__(self) -> None:
        self.layouts: dict[Node, list[Layout | None]] = {}
        self.moved: set[Node] = set()

    def judge(self, nodes: Sequence[Node]) -> None:
        """Find the layouts of operations."""
        new = [node for node in nodes if node not in self.layouts]
        outputs = [(node, output) for node in new for output in outputs_of(node)]
        self.layouts.update((node, []) for node in new)
        if outputs:
            for (node, _), layout in zip(outputs, self._judge(outputs), strict=True):
                self.layouts[node].append(layout)

    def _judge(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        raise NotImplementedError


def _edges(outputs: Sequence[tuple[Node, Output]]) -> Any:
    return [GradientEdge(node, output.number) for node, output in outputs]


class _OneSample(_Evidence):
    """All rows are the one sample's."""

    def _judge(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        self.moved |= {node for node, _ in outputs}
        return [whole_call(output.shape) for _, output in outputs]


class _ByCotangents(_Evidence):
    def __init__(self, ends: Sequence[tuple[Tensor, Layout]], count: int) -> None:
        super().__init__()
        generator = fresh_generator()
        self.outputs, self.count = [f for f, _ in ends], count
        self.plain = [torch.randn(f.shape, generator=generator, device="cpu").to(f) for f in self.outputs]
        draws = 3 if any(torch.finfo(f.dtype).bits < 32 for f in self.outputs) else 1
        self.weights = [0.5 + torch.randn(count, generator=generator, device="cpu").abs() for _ in range(draws)]
        self.scaled = [
            [c * over_samples(w[None].to(c), c, o)[0] for c, (_, o) in zip(self.plain, ends, strict=True)]
            for w in self.weights
        ]

    def _judge(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        edges = _edges(outputs)
        plain = gradients(self.outputs, edges, self.plain)
        alike: dict[tuple[int, ...], list[int]] = {}  # the steps of a recurrent layer are looked at together
        for i, ((_, output), g) in enumerate(zip(outputs, plain, strict=True)):
            if g is not None:
                alike.setdefault(output.shape, []).append(i)
        options = [layouts_of(output.shape, self.count) for _, output in outputs]
        before = {shape: torch.stack([plain[i] for i in ids]) for shape, ids in alike.items()}  # type: ignore[misc]
        for weights, cotangents in zip(self.weights, self.scaled, strict=True):
            scaled = gradients(self.outputs, edges, cotangents)
            for shape, ids in alike.items():
                after = torch.stack([scaled[i] for i in ids])  # type: ignore[misc]
                for layout in layouts_of(shape, self.count):
                    holds = _scale(before[shape], after, weights, layout)
                    for i, held in zip(ids, holds.tolist(), strict=True):
                        if not held and layout in options[i]:
                            options[i].remove(layout)
        for shape, ids in alike.items():
            moved = (before[shape].reshape(len(ids), -1) != 0).any(1).tolist()
            self.moved |= {outputs[i][0] for i, here in zip(ids, moved, strict=True) if here}
        return [next(iter(choices), None) for choices in options]


def _scale(plain: Tensor, scaled: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """Of each of stacked gradients, whether weighting the samples has weighted their rows, to rounding."""
    inner = layout._replace(dim=layout.dim + 1)

    def split(stacked: Tensor) -> Tensor:
        by_sample = inner.split(stacked).movedim(1 if layout.rows == 1 else 2, 0)
        return by_sample.reshape(*by_sample.shape[:2], -1)

    before, after = split(plain), split(scaled)
    if not before.numel():
        return torch.ones(len(plain), dtype=torch.bool)
    expected = before * weights.to(before)[:, None]
    bound = rounding(plain.dtype) * expected.abs().amax(2, keepdim=True)
    return ((after - expected).abs() <= bound).flatten(1).all(1)


class _ByChange(_Evidence):
    """By what the gradients of the model's loss do where samples are changed."""

    def __init__(self, output: Any, forward: Forward, arguments: Any, chosen: Hypothesis) -> None:
        super().__init__()
        self.output, self.forward, self.arguments, self.chosen = output, forward, arguments, chosen

    def _judge(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        chosen = self.chosen
        places = _places(self.output)
        wanted = [(places[node], node.name(), output) for node, output in outputs]
        base = self._slopes(self.output, outputs)
        options = [layouts_of(output.shape, chosen.num_samples) for _, output in outputs]
        changes = [False] * len(outputs)
        for mask in separating_masks(chosen.num_samples):
            changed = run_changed(self.forward, self.arguments, chosen, mask)
            nodes = list(_places(changed))
            if any(place >= len(nodes) or nodes[place].name() != name for place, name, _ in wanted):
                return [None] * len(outputs)
            slopes = self._slopes(changed, [(nodes[place], output) for place, _, output in wanted])
            for i, (before, after) in enumerate(zip(base, slopes, strict=True)):
                if before is None or after is None or before.shape != after.shape:
                    options[i] = []
                    continue
                moved = changed_entries(before, after)
                kept = ~mask.to(before.device)
                options[i] = [o for o in options[i] if not bool(o.split(moved)[kept].any())]
                changes[i] = changes[i] or bool(moved.any())
        self.moved |= {node for (node, _), moved in zip(outputs, changes, strict=True) if moved}
        return [choices[0] if choices and moved else None for choices, moved in zip(options, changes, strict=True)]

    @staticmethod
    def _slopes(output: Any, outputs: Sequence[tuple[Node, Output]]) -> list[Tensor | None]:
        ends = [t for t in floating(output) if t.requires_grad]
        return gradients(ends, _edges(outputs), [torch.ones_like(t) for t in ends])


def _places(output: Any) -> dict[Node, int]:
    """The nodes of a graph, numbered: alike in graphs of one structure."""
    return {node: place for place, node in enumerate(users_of(tensors_in(output)))}


def _routed(
    parameters: Parameters,
    found: UseRows,
    forward: Callable[[Any, Callable[[Any], None]], Any],
    arguments: Any,
    chosen: Hypothesis,
) -> set[str]:
    """Layers of which a use has rows that no shape tells the samples of."""
    output, states = routed_nodes(forward, arguments, chosen)
    users = users_of(tensors_in(output))
    routed = set()
    for name, own in parameters.items():
        uses = None if name in found.unknown else find_uses(users, own, found.routes[name])
        for use in uses.uses if uses is not None else ():
            waiting, seen = [use.node], {use.node}
            while waiting:
                node = waiting.pop()
                if node not in states:
                    following = [user for user, _ in users.get(node, ()) if user not in seen]
                    seen.update(following)
                    waiting += following
                elif states[node]:
                    routed.add(name)
    return routed
