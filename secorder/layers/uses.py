"""The operations in which parameters meet the samples: found in the autograd graph of a forward.

From a parameter on, operations whose values no sample owns (a transpose, 1 + w, the rows of a position table) are
followed to those whose output has rows of samples. Each sample's gradient of the parameter is what its own rows of the
gradient on these outputs bring: the sum over all such uses, whatever else the parameter is used for.

Which operations are followed, and which end the way, is learnt and verified where a batch is verified; a forward that
is recorded is read by the same *routes*, the operations' names and inputs from the parameter on.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch.engine import accumulate_node
from .._torch.graph import Node, Output, Users, can_be_run, is_complex, outputs_of, recomputed, run_node_once, shape_of
from .operations import MAPS, OPERATIONS, TOGETHER, OperationCall, per_sample_gradient
from .operations.registry import each
from .operations.routed import OwnedRows, through_rows
from .per_sample import Outer, PerSample, Rows, dense, form_of, merge

#: A parameter's name, and the operations from it on, each with the number of its input.
Route = tuple[str, ...]

#: What one use brings: the per-sample gradients of a layer's parameters.
Piece = list[tuple[str, PerSample]]


class Later(NamedTuple):
    """What is kept of a use that is gone through together with others."""

    operation: str  #: the name of its node
    kept: Any  #: what its rule for several calls needs of it
    targets: "Targets"  #: those of its inputs that are parameters


class Targets(NamedTuple):
    """Inputs of an operation that are parameters as they are, or their transposes."""

    names: Mapping[int, str]  #: by the number of the input, the parameter's
    turned: frozenset[int]  #: those that are transposes


#: Operations that do nothing but put the elements of a parameter elsewhere.
MOVES = frozenset(MAPS) - {
    "AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "EmbeddingBackward0", "IndexBackward0",
}  # fmt: skip

#: Operations that are followed from one layer's parameters, at most; and backwards of such without a map, that all uses
#: together run for all samples: from so many on, a module that runs again costs less.
MOST, MOST_RUN = 400, 64


@dataclass(eq=False, slots=True)
class Use:
    """An operation that a layer's parameters meet the samples in."""

    node: Node  #: of the graph
    routes: list[Route] = field(default_factory=list)  #: that end in it
    #: for each of its inputs that leads to parameters, the node and the output that it comes from
    sources: dict[int, tuple[Node, int]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)  #: what it computed
    targets: Targets | None = None  #: where all of these inputs are parameters

    @property
    def places(self) -> list[str]:
        """What its outputs have in common with those of other uses on the same routes."""
        routes = "; ".join(sorted(" ".join(route) for route in self.routes))
        return [f"{routes} {output.number}" for output in self.outputs]


@dataclass(eq=False)
class Uses:
    """All of a layer's."""

    leaves: dict[Node, str]  #: by the node that accumulates a parameter's gradient, the parameter's name
    followed: dict[Node, Route]  #: nodes whose values no sample owns, these among them
    uses: list[Use] = field(default_factory=list)  #: in an order that the graph's structure alone gives


def find_uses(
    users: Users, parameters: Mapping[str, Tensor], followed: Collection[Route], passed: Collection[Node] = ()
) -> Uses | None:
    """The uses of a layer's parameters, where routes of operations that no sample owns are followed further.

    No route names operations that are ``passed``, which are none of the model's own. None where a parameter reaches the
    end of the graph or becomes complex, its uses are too many to follow, or one has no rule and no backward of its own.
    """
    leaves = {accumulate_node(p): name for name, p in parameters.items()}
    found = Uses(leaves, {node: (name,) for node, name in leaves.items()})
    waiting: list[Node] = list(leaves)
    uses: dict[Node, Use] = {}
    num_run = 0
    for node in waiting:  # which grows meanwhile
        route, taken = found.followed[node], users.get(node, ())
        if not taken and node not in leaves:
            return None
        for user, index in taken:
            name = user.name()
            moves = name in MOVES or user in passed
            here = route if moves else (*route, f"{name} {index}")
            further = moves or here in followed
            if is_complex(user) or not ((name in OPERATIONS and not further) or can_be_run(user)):
                return None
            if not further:
                use = uses.get(user)
                if use is None:
                    use = uses[user] = Use(user)
                use.routes.append(here)
                use.sources[index] = (node, user.next_functions[index][1])
            elif user not in found.followed:
                num_run += not (moves or name in MAPS)
                if len(found.followed) > MOST or num_run > MOST_RUN:
                    return None
                found.followed[user] = here
                waiting.append(user)
    found.uses = [use for node, use in uses.items() if node not in found.followed]
    ends = {node: (leaf, turned) for node in waiting for leaf, turned in _parameter(node, leaves)}
    _see_outputs_and_targets(found.uses, ends)
    return None if num_run and _too_many_run(found) else found


def _too_many_run(found: Uses) -> bool:
    """Whether the uses run more than :data:`MOST_RUN` backwards of what is followed."""
    sources = (source for use in found.uses for source, _ in use.sources.values())
    run = (node for source in sources for node in _behind(source, found.followed) if _is_run(node, found.leaves))
    return next(itertools.islice(run, MOST_RUN, None), None) is not None


def _is_run(node: Node, leaves: Collection[Node]) -> bool:
    return node not in leaves and node.name() not in MAPS


def _behind(node: Node, followed: Collection[Node]) -> list[Node]:
    """A node and the followed ones that it was made of, each behind those that it comes from."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in order:
            for before, _ in node.next_functions:
                if before in followed:
                    visit(before)
            order[node] = None

    visit(node)
    return list(order)


def _see_outputs_and_targets(uses: Sequence[Use], ends: Mapping[Node, tuple[str, bool]]) -> None:
    """Enter what operations computed, and which inputs are parameters: what is the same for several uses, once."""
    alike: dict[tuple[tuple[int, str, bool], ...], Targets] = {}
    for use in uses:
        use.outputs = outputs_of(use.node)
        if all(node in ends for node, _ in use.sources.values()):
            inputs = tuple([(index, *ends[node]) for index, (node, _) in use.sources.items()])
            if inputs not in alike:
                names = {index: name for index, name, _ in inputs}
                alike[inputs] = Targets(names, frozenset([index for index, _, turned in inputs if turned]))
            use.targets = alike[inputs]


def _parameter(node: Node, leaves: Mapping[Node, str]) -> Iterable[tuple[str, bool]]:
    """The parameter that a node's output is, or whose transpose it is: its name, and which of them; if any."""
    if node in leaves:
        yield leaves[node], False
    elif node.name() == "TBackward0":
        leaf = node.next_functions[0][0]
        if leaf in leaves and len(shape_of(node, 0)) == 2:
            yield leaves[leaf], True


def reentrant(nodes: Iterable[Node]) -> bool:
    """Whether a checkpoint of the reentrant kind hides a part of the graph."""
    return True in ["CheckpointFunction" in type(node).__name__ for node in nodes]


def hidden(found: Uses) -> bool:
    """Whether what operations saved cannot be read, since a checkpoint computes it again."""
    return any(recomputed(node) is not False for node in (*(use.node for use in found.uses), *found.followed))


def brought(
    call: OperationCall,
    sources: Mapping[int, tuple[Node, int]],
    leaves: Mapping[Node, str],
    followed: Collection[Node],
    targets: Targets | None,
) -> Piece | Later:
    """What one of a layer's uses brings, whose gradient is here; perhaps later, with others of the same targets."""
    name = call.node.name()
    together = None if targets is None else TOGETHER.get(name)
    if together is not None and targets is not None:
        kept = together.keep(call, targets.names)
        if kept is not None:
            return Later(name, kept, targets)
    return [
        part
        for index, source in sources.items()
        for part in carried(per_sample_gradient(call, index), source, leaves, followed)
    ]


def carried(
    gradient: PerSample | OwnedRows, source: tuple[Node, int], leaves: Mapping[Node, str], followed: Collection[Node]
) -> Iterable[tuple[str, PerSample]]:
    """Carry a per-sample gradient from an operation's input on to the parameters that it was made of."""
    if isinstance(gradient, OwnedRows):
        yield from _pulled_back(gradient, source, leaves, followed)
        return
    node, number = source
    while node not in leaves:
        move = MAPS.get(node.name())
        before = [x for x in node.next_functions if x[0] is not None]
        if move is None or len(before) != 1:
            break
        found = move(node, number, gradient, shape_of(node, number), shape_of(*before[0]))
        if found is None:
            break
        gradient, (node, number) = found, before[0]
    if node in leaves:
        yield leaves[node], gradient
        return
    shape = shape_of(node, number)
    flat = dense(gradient, torch.Size(shape).numel())
    yield from _pulled_back(flat.reshape(len(flat), *shape), (node, number), leaves, followed)


def _pulled_back(
    gradient: Tensor | OwnedRows, source: tuple[Node, int], leaves: Mapping[Node, str], followed: Collection[Node]
) -> Iterable[tuple[str, PerSample]]:
    """The same by the backward of the operations between, run for all samples at once."""
    order = _behind(source[0], followed)
    brought: dict[tuple[Node, int], Tensor | OwnedRows] = {source: gradient}
    for node in reversed(order):
        if node in leaves:
            if (node, 0) in brought:
                yield leaves[node], _written_out(brought[node, 0])
            continue
        own = [brought.pop((node, k), None) for k in range(len(outputs_of(node, real=False)))]
        given = [k for k, g in enumerate(own) if g is not None]
        if not given:
            continue
        wanted = [i for i, (x, _) in enumerate(node.next_functions) if x in order]
        found: Sequence[PerSample | OwnedRows] | None = through_rows(node, own, wanted)
        if found is None:
            found = _through(node, [None if g is None else _written_out(g) for g in own], given, wanted)
        for index, part in zip(wanted, found, strict=True):
            before = node.next_functions[index]
            if isinstance(part, (Outer, Rows)):
                yield from carried(part, before, leaves, followed)
            else:
                brought[before] = _sum(brought[before], part) if before in brought else part


def _written_out(gradient: Tensor | OwnedRows) -> Tensor:
    return gradient.written_out() if isinstance(gradient, OwnedRows) else gradient


def _sum(one: Tensor | OwnedRows, other: Tensor | OwnedRows) -> Tensor | OwnedRows:
    if isinstance(one, OwnedRows) and isinstance(other, OwnedRows) and one.owner is other.owner:
        return one._replace(g=one.g + other.g)
    return _written_out(one) + _written_out(other)


def _through(node: Node, own: Sequence[Tensor | None], given: Sequence[int], wanted: Sequence[int]) -> list[Tensor]:
    """What a followed node makes of per-sample gradients, for some of its inputs, in one run."""
    shapes = [torch.Size(shape_of(*node.next_functions[index])) for index in wanted]
    seen = outputs_of(node, real=False)

    def pull(*gradients: Tensor) -> Tensor:
        like = gradients[0]
        whole = [like.new_zeros(m.shape, dtype=m.dtype) for m in seen]
        for k, g in zip(given, gradients, strict=True):
            whole[k] = g.to(seen[k].dtype)
        found = run_node_once(node, whole, wanted)
        return found[0].flatten() if len(found) == 1 else torch.cat([g.flatten() for g in found])

    together = each(pull, [g for g in own if g is not None])
    parts = together.split([shape.numel() for shape in shapes], 1)
    return [part.reshape(len(part), *shape) for part, shape in zip(parts, shapes, strict=True)]


def pieces(found: Iterable[Piece | Later]) -> dict[str, list[PerSample]]:
    """By parameter, the per-sample gradients that all uses bring together: one of each form."""
    forms: dict[str, dict[tuple[Any, ...], list[PerSample]]] = {}
    later: dict[tuple[str, object, frozenset[int]], list[Later]] = {}
    every: list[Piece] = []
    for one in found:
        if isinstance(one, Later):
            key = one.operation, TOGETHER[one.operation].alike(one.kept), one.targets.turned
            later.setdefault(key, []).append(one)
        else:
            every.append(one)
    for name, part in itertools.chain(*every, *(_together(name, waiting) for (name, *_), waiting in later.items())):
        forms.setdefault(name, {}).setdefault(form_of(part), []).append(part)
    return {name: [merge(parts) for parts in by_form.values()] for name, by_form in forms.items()}


def _together(operation: str, waiting: Sequence[Later]) -> Iterable[tuple[str, PerSample]]:
    """What uses bring that are gone through together."""
    for number, index, part in TOGETHER[operation].bring([one.kept for one in waiting]):
        names, turned = waiting[number].targets
        if index in turned:  # a parameter's transpose has its factors the other way round
            assert isinstance(part, Outer)
            assert isinstance(part.a, Tensor)
            part = Outer(part.g, part.a)
        yield names[index], part
