"""Which operations parameters meet the samples in, and where the samples are there: verified on one graph.

As for layers: random cotangents on the model's outputs, weighted sample by sample, must come back weighted by the same
factors in the rows of the gradient on an operation's output. An operation of which that does not hold owns no samples:
it is followed to what takes its output.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._torch.graph import Node, Output, Users, collection_paused, fewest_digits, outputs_of
from .._torch.sample_graph import SHARED, InnerSizes
from .._torch.vjp import gradients
from ..layers.layout import Layout, layout_of, layouts_of
from ..layers.uses import Route, Uses, find_uses
from .cotangents import measured_rounding
from .independence import over_samples, rows_weighted, sample_weights, weight_draws

#: How often further operations are looked at.
ROUNDS = 24

#: How many random weights tell where fewer digits than those of either end are looked at.
_DRAWS = 3

Parameters = Mapping[str, Mapping[str, Tensor]]


@collection_paused()
def follow_uses(
    users: Users,
    parameters: Parameters,
    evidence: "Evidence",
    routes: dict[str, frozenset[Route]],
    *,
    known: bool,
    passed: Collection[Node] = (),
) -> dict[str, Uses | None]:
    """The uses of each layer, once no operation is left that owns no samples; None where they cannot be followed.

    Further ``routes`` are entered, unless those given are ``known`` to be likely all; operations that are ``passed``
    are none of the model's own.
    """
    ahead = 0 if known else evidence.ahead
    found: dict[str, Uses | None] = {}
    waiting = set(parameters)
    for _ in range(ROUNDS):
        for name in waiting:
            found[name] = find_uses(users, parameters[name], routes[name], passed)
        nodes = [use.node for name in waiting for use in (found[name] or Uses({}, {})).uses]
        evidence.judge(_with_users(users, nodes, ahead))
        ahead = evidence.ahead
        further = set()
        for name in waiting:
            uses = found[name]
            shared = [use for use in uses.uses if None in evidence.layouts[use.node]] if uses is not None else []
            if shared:
                routes[name] |= {route for use in shared for route in use.routes}
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


class Evidence:
    """Where samples are in what operations computed.

    Attributes:
        layouts: by operation, the layout of each output; None where there is none, so that no sample owns its rows.
        moved: operations that the model's output depends on.
        blank: those of which it does by the graph alone, so that zeros would do for samples anywhere.
        ahead: how many operations behind those that are asked about are looked at with them.
    """

    ahead = 0

    def __init__(self) -> None:
        self.layouts: dict[Node, list[Layout | None]] = {}
        self.moved: set[Node] = set()
        self.blank: set[Node] = set()

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


def gradients_at(
    ends: Sequence[Tensor], outputs: Sequence[tuple[Node, Output]], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients on what nodes computed, as every hook on it leaves them; None where it is not reached.

    What ``torch.autograd.grad`` hands out is that, but of a node that it goes on behind it is the gradient before.
    """
    seen: dict[Node, tuple[Tensor | None, ...]] = {}
    with ExitStack() as hooks:
        for node in dict.fromkeys(node for node, _ in outputs):
            hooks.enter_context(node.register_prehook(partial(seen.__setitem__, node)))
        found = gradients(ends, [GradientEdge(node, o.number) for node, o in outputs], cotangents)
    return [seen[node][o.number] if node in seen else g for (node, o), g in zip(outputs, found, strict=True)]


class ByCotangents(Evidence):
    """By random cotangents on the model's outputs, beside what the graph tells by itself (``inner_sizes``)."""

    def __init__(
        self,
        ends: Sequence[tuple[Tensor, Layout]],
        count: int,
        generator: torch.Generator,
        inner_sizes: InnerSizes | None = None,
    ) -> None:
        super().__init__()
        self.inner_sizes = inner_sizes or {}
        self.ends, self.count, self.generator = ends, count, generator
        self._weighted: list[tuple[Tensor, list[Tensor]]] = []

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The model's outputs."""
        return [f for f, _ in self.ends]

    @cached_property
    def plain(self) -> list[Tensor]:
        """Random cotangents on them."""
        own, kind = self.generator, torch.float32
        return [torch.randn(f.shape, generator=own, dtype=kind, device=own.device).to(f) for f in self.outputs]

    def weighted(self, draws: int) -> list[tuple[Tensor, list[Tensor]]]:
        """So many times, random weights of the samples, and the cotangents weighted by them."""
        while len(self._weighted) < draws:
            w = sample_weights(self.count, self.generator)
            spread = [over_samples(w[None].to(c), c, o)[0] for c, (_, o) in zip(self.plain, self.ends, strict=True)]
            self._weighted.append((w, [c * s for c, s in zip(self.plain, spread, strict=True)]))
        return self._weighted[:draws]

    def _judge(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        by_graph = [self._by_graph(node, output) for node, output in outputs]
        self.moved |= {node for node, output in outputs if self.inner_sizes.get((node, output.number)) is not None}
        rest = [i for i, (node, o) in enumerate(outputs) if by_graph[i] is None and not self._shared(node, o)]
        for i, layout in zip(rest, self._by_gradients([outputs[i] for i in rest]) if rest else (), strict=True):
            by_graph[i] = layout
        return by_graph

    def _by_graph(self, node: Node, output: Output) -> Layout | None:
        here = (node, output.number)
        if self.inner_sizes and here not in self.inner_sizes:  # nothing depends on it, such as on a last state
            return next(iter(layouts_of(output.shape, self.count)), None)
        return layout_of(output.shape, self.count, self.inner_sizes.get(here))

    def _shared(self, node: Node, output: Output) -> bool:
        """Whether an operation is followed without a look: so the graph says, or it takes leaves alone."""
        return bool(self.inner_sizes) and (self.inner_sizes.get((node, output.number)) == SHARED or _of_leaves(node))

    def _by_gradients(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        plain = gradients_at(self.outputs, outputs, self.plain)
        alike: dict[tuple[int, ...], list[int]] = {}  # the steps of a recurrent layer are looked at together
        for i, ((_, output), g) in enumerate(zip(outputs, plain, strict=True)):
            if g is not None:
                alike.setdefault(output.shape, []).append(i)
        options = [layouts_of(output.shape, self.count) for _, output in outputs]
        before = {shape: torch.stack([plain[i] for i in ids]) for shape, ids in alike.items()}  # type: ignore[misc]
        seen = [*self.outputs, *before.values()]  # few digits at either end are what is rounded to
        kind = fewest_digits(t.dtype for t in seen)
        for weights, cotangents in self.weighted(weight_draws(seen)):
            scaled = gradients_at(self.outputs, outputs, cotangents)
            for shape, ids in alike.items():
                after = torch.stack([scaled[i] for i in ids])  # type: ignore[misc]
                for layout in layouts_of(shape, self.count):
                    holds = rows_weighted(before[shape], after, weights, layout, kind=kind)
                    for i, held in zip(ids, holds.tolist(), strict=True):
                        if not held and layout in options[i]:
                            options[i].remove(layout)
        unsettled = {i: g for i, g in enumerate(plain) if g is not None and not options[i]}
        for i, choices in self._with_fewer_digits(outputs, unsettled).items():
            options[i] = choices
        for shape, ids in alike.items():
            moved = (before[shape].reshape(len(ids), -1) != 0).any(1).tolist()
            for i, here in zip(ids, moved, strict=True):
                (self.moved if here else self.blank).add(outputs[i][0])
        return [next(iter(choices), None) for choices in options]

    def _with_fewer_digits(
        self, outputs: Sequence[tuple[Node, Output]], plain: Mapping[int, Tensor]
    ) -> dict[int, list[Layout]]:
        """The layouts of outputs, by their numbers, to the rounding that their gradients (``plain``) show themselves.

        A part of the model on the way may compute in fewer digits than either end.
        """
        plain = {i: g for i, g in plain.items() if layouts_of(g.shape, self.count)}
        if not plain:
            return {}
        asked = [outputs[i] for i in plain]

        def at(cotangents: Sequence[Tensor]) -> dict[int, Tensor]:
            found = gradients_at(self.outputs, asked, cotangents)
            return {id(g): torch.zeros_like(g) if f is None else f for g, f in zip(plain.values(), found, strict=True)}

        own = {id(g): g for g in plain.values()}
        noise = measured_rounding(list(plain.values()), own, lambda number: at([number * c for c in self.plain]))
        draws = [(weights, at(cotangents)) for weights, cotangents in self.weighted(_DRAWS)]

        def holds(layout: Layout, g: Tensor) -> bool:
            return all(
                bool(rows_weighted(g[None], found[id(g)][None], weights, layout, noise=noise[id(g)]))
                for weights, found in draws
            )

        return {i: [o for o in layouts_of(g.shape, self.count) if holds(o, g)] for i, g in plain.items()}


def _of_leaves(node: Node) -> bool:
    """Whether an operation takes leaves alone: where the graph tells no samples, it is followed without a look."""
    return all(hasattr(before, "variable") for before, _ in node.next_functions if before is not None)
