"""Which operations parameters meet the samples in, and where the samples are there: verified on one batch.

As for layers (:mod:`.rows`): random cotangents on the model's outputs, weighted sample by sample, must
come back weighted by the same factors in the rows of the gradient on an operation's output. Where the model returns no
tensor with samples, the gradient of samples that are kept must stay while others are changed. An operation of which
neither holds owns no samples: it is followed to what takes its output.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._torch.graph import Node, Output, users_of
from ..._torch.pytree import tensors_in
from ..._torch.random_state import fresh_generator
from ...errors import DoubleBackwardError
from ...layers.layout import Layout, layouts_of
from ...layers.uses import Route, Uses, find_uses, hidden
from ...oneshot.independence import changed_entries, separating_masks
from ...oneshot.use_rows import ByCotangents, Evidence, Parameters, follow_uses, gradients_at
from .forward_graph import ForwardGraph
from .hypotheses import Trial, floating
from .relation import whole_call
from .routes import routed_nodes
from .rows import Rows, separated

#: How far ahead operations are looked at together, since each look runs the model again.
AHEAD = 2


def rows_of_uses(
    parameters: Parameters, trial: Trial, graph: ForwardGraph, routes: Mapping[str, Collection[Route]], *, routed: bool
) -> Rows:
    """Find and verify the uses of layers' parameters, along the ``routes`` that were found to be followed before.

    Where rows may depend on data (``routed``), the trial's forward is one for :func:`.routes.routed_nodes`.
    """
    result, count = Rows(), trial.hypothesis.num_samples
    try:
        if count == 1:
            _look(parameters, _OneSample(), graph, routes, result)
        else:
            rest = parameters
            if graph.ends:
                evidence = ByCotangents(graph.ends, count, fresh_generator(), graph.inner_sizes)
                rest = _look(parameters, evidence, graph, routes, result, untold=graph.beside)
            if rest:
                nothing = torch.zeros(count, dtype=torch.bool)  # in a graph of those that samples are changed in
                graph = replace(graph, output=trial.changed(nothing), leaves=())
                _look(rest, _ByChange(graph.output, trial), graph, routes, result)
    except DoubleBackwardError:  # reentrant checkpoints do not go with torch.autograd.grad
        return Rows(unknown=set(parameters))
    if routed:
        result.unknown |= _routed(parameters, result, trial)
    return result


def _look(
    parameters: Parameters,
    evidence: Evidence,
    graph: ForwardGraph,
    routes: Mapping[str, Collection[Route]],
    result: Rows,
    untold: Collection[Node] = (),
) -> Parameters:
    """Note what evidence tells of layers' uses, but not of those in operations that it says nothing about: these."""
    own = {name: frozenset(routes.get(name, ())) for name in parameters}
    known = parameters.keys() <= routes.keys()
    found = follow_uses(graph.users, parameters, evidence, own, known=known, passed=graph.added)
    rest = {
        name: parameters[name]
        for name, uses in found.items()
        if untold and (uses is None or any(use.node in untold for use in uses.uses))
    }
    for name in found.keys() - rest.keys():
        result.routes[name] = own[name]
        _note(name, found[name], evidence, graph.hooked and bool(own[name]), result)
    return rest


def _note(name: str, uses: Uses | None, evidence: Evidence, passed_by: bool, result: Rows) -> None:
    """What evidence tells of a layer's uses; hooks on what is followed are not called, so that they are passed by."""
    if uses is None or passed_by or hidden(uses):
        result.unknown.add(name)
        if uses is not None and not passed_by:
            result.hidden.add(name)
        return
    told = [
        (use.node, (layout, place, output.shape))
        for use in uses.uses
        for layout, place, output in zip(evidence.layouts[use.node], use.places, use.outputs, strict=True)
        if layout is not None
    ]
    # Where no gradient comes zeros would do for samples anywhere; what comes to another at the same place tells.
    seen = {(place, shape) for node, (_, place, shape) in told if node not in evidence.blank}
    blank = [(node, call) for node, call in told if node in evidence.blank and call[1:] not in seen]
    result.known[name] = [call for node, call in told if node not in evidence.blank or (node, call) in blank]
    if any(use.node in evidence.moved for use in uses.uses):
        result.reached.add(name)
    if any(node in evidence.blank for node, _ in told):
        result.blank.add(name)
        if not blank:
            result.repeated.add(name)


class _OneSample(Evidence):
    """All rows are the one sample's."""

    def _judge(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        self.moved |= {node for node, _ in outputs}
        return [whole_call(output.shape) for _, output in outputs]


class _ByChange(Evidence):
    """By what the gradients of the model's loss do where samples are changed."""

    ahead = AHEAD

    def __init__(self, output: Any, trial: Trial) -> None:
        super().__init__()
        self.output, self.trial = output, trial

    def _judge(self, outputs: Sequence[tuple[Node, Output]]) -> list[Layout | None]:
        count = self.trial.hypothesis.num_samples
        places = _places(self.output)
        wanted = [(places[node], node.name(), output) for node, output in outputs]
        base = self._gradients(self.output, outputs)
        options = [layouts_of(output.shape, count) for _, output in outputs]
        changes = [False] * len(outputs)
        for mask in separating_masks(count):
            changed = self.trial.changed(mask)
            nodes = list(_places(changed))
            if any(place >= len(nodes) or nodes[place].name() != name for place, name, _ in wanted):
                return [None] * len(outputs)
            pulled = self._gradients(changed, [(nodes[place], output) for place, _, output in wanted])
            for i, (before, after) in enumerate(zip(base, pulled, strict=True)):
                if before is None or after is None or before.shape != after.shape:
                    options[i] = []
                    continue
                moved = changed_entries(before, after)
                options[i] = separated(options[i], moved, mask)
                changes[i] = changes[i] or bool(moved.any())
        self.moved |= {node for (node, _), moved in zip(outputs, changes, strict=True) if moved}
        return [choices[0] if choices and moved else None for choices, moved in zip(options, changes, strict=True)]

    @staticmethod
    def _gradients(output: Any, outputs: Sequence[tuple[Node, Output]]) -> list[Tensor | None]:
        ends = [t for t in floating(output) if t.requires_grad]
        return gradients_at(ends, outputs, [torch.ones_like(t) for t in ends])


def _places(output: Any) -> dict[Node, int]:
    """The nodes of a graph, numbered: alike in graphs of one structure."""
    return {node: place for place, node in enumerate(users_of(tensors_in(output)))}


def _routed(parameters: Parameters, found: Rows, trial: Trial) -> set[str]:
    """Layers of which a use has rows that no shape tells the samples of."""
    output, states = routed_nodes(trial)
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
