"""Which operations parameters meet the samples in, and where the samples are there: verified on one graph.

As for layers: random cotangents on the model's outputs, weighted sample by sample, must come back weighted by the same
factors in the rows of the gradient on an operation's output. An operation of which that does not hold owns no samples:
it is followed to what takes its output.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._torch.graph import Node, Output, Users, collection_paused, outputs_of
from .._torch.sample_graph import SHARED, InnerSizes
from .._torch.vjp import gradients
from ..layers.layout import Layout, layouts_of
from ..layers.uses import Route, Uses, find_uses
from .cotangents import MEASURED
from .independence import DRAWS, over_samples, rows_weighted, sample_weights, weight_draws

#: How often further operations are looked at.
ROUNDS = 24

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
        real: whether what holds no real numbers is left out.
    """

    ahead = 0
    real = True

    def __init__(self) -> None:
        self.layouts: dict[Node, list[Layout | None]] = {}
        self.moved: set[Node] = set()
        self.blank: set[Node] = set()

    def judge(self, nodes: Sequence[Node]) -> None:
        """Find the layouts of operations."""
        new = [node for node in nodes if node not in self.layouts]
        outputs = [(node, output) for node in new for output in outputs_of(node, real=self.real)]
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
        self._weighted: dict[int, list[tuple[Tensor, list[Tensor]]]] = {}

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
        """So many times, random weights of the samples (of several powers of two), and cotangents weighted by them."""
        if draws not in self._weighted:
            self._weighted[draws] = [self._once_weighted(powers=draws > 1) for _ in range(draws)]
        return self._weighted[draws]

    def _once_weighted(self, *, powers: bool) -> tuple[Tensor, list[Tensor]]:
        w = sample_weights(self.count, self.generator, powers=powers)
        spread = [over_samples(w[None].to(c), c, o)[0] for c, (_, o) in zip(self.plain, self.ends, strict=True)]
        return w, [c * s for c, s in zip(self.plain, spread, strict=True)]

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
            return next(iter(self._candidates(node, output)), None)
        inner = self.inner_sizes.get(here)
        return next((x for x in self._candidates(node, output) if x.inner_size(output.shape) == inner), None)

    def _candidates(self, node: Node, output: Output) -> list[Layout]:
        """The layouts that samples may have in what an operation computed, the usual first."""
        return layouts_of(output.shape, self.count)

    def _shared(self, node: Node, output: Output) -> bool:
        """Whether an operation is followed without a look: so the graph says, or it takes leaves alone."""
        return bool(self.inner_sizes) and (self.inner_sizes.get((node, output.number)) == SHARED or _of_leaves(node))

    def _by_gradients(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        plain = gradients_at(self.outputs, outputs, self.plain)
        options = [self._candidates(*output) for output in outputs]
        reached = {i: g for i, g in enumerate(plain) if g is not None}
        moved = torch.stack([(g != 0).any() for g in reached.values()]).tolist() if reached else []
        for i, here in zip(reached, moved, strict=True):
            (self.moved if here else self.blank).add(outputs[i][0])
        rest = {i: g for i, g in reached.items() if options[i]}
        few = weight_draws([*self.outputs, *rest.values()])
        for draws in dict.fromkeys((few, DRAWS)):  # on the way there may be fewer digits than at either end
            found = self._layouts_weighted(outputs, rest, draws) if rest else {}
            for i, choices in found.items():
                options[i] = choices
            rest = {i: g for i, g in rest.items() if not options[i]}
        return [next(iter(choices), None) for choices in options]

    def _layouts_weighted(
        self, outputs: Sequence[tuple[Node, Output]], plain: Mapping[int, Tensor], draws: int
    ) -> dict[int, list[Layout]]:
        """Of some outputs, by their numbers, the layouts of which weighting the samples weights the rows."""
        alike: dict[tuple[int, ...], list[int]] = {}  # the steps of a recurrent layer are looked at together
        for i, g in plain.items():
            alike.setdefault(tuple(g.shape), []).append(i)

        def at(cotangents: Sequence[Tensor]) -> dict[tuple[int, ...], Tensor]:
            found = gradients_at(self.outputs, [outputs[i] for i in plain], cotangents)
            by_number = dict(zip(plain, found, strict=True))
            return {shape: torch.stack([by_number[i] for i in ids]) for shape, ids in alike.items()}  # type: ignore[misc]

        before = {shape: torch.stack([plain[i] for i in ids]) for shape, ids in alike.items()}
        # By powers of two the same is weighted, to the last of however few digits, but for sums in another order.
        again = at(self.plain) if draws > 1 else {}
        noise = {shape: MEASURED * (g - before[shape]).abs().amax() for shape, g in again.items() if g.numel()}
        options = {i: self._candidates(*outputs[i]) for i in plain}
        for weights, cotangents in self.weighted(draws):
            for shape, after in at(cotangents).items():
                kind = torch.promote_types(torch.float32, after.dtype)
                for layout in layouts_of(shape, self.count):
                    how: Any = {"kind": kind, "noise": noise.get(shape)}
                    holds = rows_weighted(before[shape], after, weights, layout, **how)
                    for i, held in zip(alike[shape], holds.tolist(), strict=True):
                        if not held and layout in options[i]:
                            options[i].remove(layout)
        return options


def _of_leaves(node: Node) -> bool:
    """Whether an operation takes leaves alone: where the graph tells no samples, it is followed without a look."""
    return all(hasattr(before, "variable") for before, _ in node.next_functions if before is not None)
