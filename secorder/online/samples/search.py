"""Where the samples are in each layer: found and verified by passes of our own on one batch.

The graph of the forward shows whose rows a layer's output has, as far as each operation on the way to the model's
outputs treats rows alike and no hook changes gradients. Where it does not tell, random cotangents on these outputs,
weighted sample by sample, must come back weighted by the same factors in the rows of the layer's output. Where the
model returns no tensor with samples (a loss alone), changing samples must change their rows in a layer's output and no
others. Parameters that are used outside of their layers' calls are found by the structure of the graph, too.

A layer whose own calls do not do (a row that all samples share, rows that depend on data, a parameter that is used
elsewhere, a frozen layer with nothing trainable before it) is looked for in the calls of the module that contains it,
up to the model.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from ..._torch.fsdp import local
from ..._torch.modules import batch_normalisation, buffer_places, is_scripted, observe_nothing, observers
from ..._torch.pytree import map_tensors, once_each, tensors_in
from ..._torch.surroundings import attention_kernels
from ..._torch.versions import version
from ...errors import InvalidArgumentError
from ...layers.layout import Layout
from ...layers.selection import Layer, ranks_of
from ...layers.structure import independent_by_structure
from ...layers.tying import tied_layers
from ...oneshot.isolation import IsolatedModel, isolate
from ...oneshot.recorded_layer import RecordedLayer
from ...oneshot.recording import recorded
from ...parallel.ranks import Ranks
from ..carried import cut_off
from .attribution import Attribution
from .beside import Beside, coupling, made_beside
from .forward_graph import ForwardGraph, Watched
from .held_iterators import HOLDS, iterators_kept
from .hypotheses import Hypothesis, SampleDim, Trial, floating, shapes_of
from .linear_backward import not_linear
from .outside import share_parameters, uses_outside, without_gradient
from .relation import Verified
from .routes import routed_outputs, unowned_arguments
from .rows import Rows, rows_of_layers
from .sample_dimension import Choice, Question, choose
from .slower import by_operations, slower_of
from .use_rows import rows_of_uses

_USED_UP = (
    "the model is called with an iterator, which running the model once more to see where samples are would use up: "
    "call it with what that yields, or attach the probe to the part that is called with tensors"
)

_EMPTY_RANK = "a rank has no samples in a verification batch: under fully_shard every rank needs some."

_NESTED = (
    "the model is called with a nested tensor, which has no dimension that samples could be found in: call it with a "
    "padded tensor, or with a list of tensors"
)


def attribute(
    model: nn.Module,
    layers: Sequence[Layer],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sample_dim: SampleDim = None,
    *,
    before: Attribution | None = None,
    direct: bool = False,
    not_followed: Collection[str] = (),
) -> Attribution:
    """Find and verify where samples are in each layer.

    What an earlier call found (``before``) is where this one begins, by a few drawn trials, where the first tells every
    ordered pair of samples apart. Layers that are ``not_followed`` are not to be measured by operations.
    """
    ranks = ranks_of(model, layers)
    if ranks is not None:
        not_followed = [x.name for x in layers]
    if any(isinstance(x, Iterator) for x in (*args, *kwargs.values())):
        return Attribution(undecided=_USED_UP)
    if any(t.is_nested for t in tensors_in((args, kwargs))):
        return Attribution(undecided=_NESTED)
    args, kwargs = map_tensors(once_each(cut_off), (args, kwargs))
    asked = Question(model, (args, kwargs), sample_dim, before, direct, not_followed, ranks=ranks)
    with iterators_kept(model) as held:
        try:
            found = _attribution(asked, layers, before)
        except Exception:
            if not held.wanted:
                raise
    return Attribution(undecided=HOLDS.format(held.wanted)) if held.wanted else found


def _attribution(asked: Question, layers: Sequence[Layer], before: Attribution | None) -> Attribution:
    """:func:`attribute` of a batch that the model may be run on again."""
    model = asked.model
    if before is not None:
        return replace(_again(asked, before), ties=before.ties)
    layers = [by_operations(asked, x) if x.rule is None else x for x in layers]
    together, ties = tied_layers(model, layers)
    if ties:
        found = _escalate(asked, together)
        members = {name for by in ties.values() for holders in by.values() for name, _ in holders}
        if found.unclear or all(x.rule is not None for x in found.layers if x.name in members):
            return replace(found, ties=ties)
    return _escalate(asked, layers)


def _again(asked: Question, before: Attribution) -> Attribution:
    """Attribution of what was looked at before.

    Statistics of the batch that coupled samples still do, whatever a short trial shows of outputs that are saturated.
    """
    fixed = _normalising(asked.model) if before.normalised else ()
    if fixed and _separable(found := _escalate(replace(asked, fixed=fixed), before.layers)):
        return replace(found, coupled=True, normalised=True, changing=before.changing)
    return _escalate(asked, before.layers)


def _normalising(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that go by statistics of the batch, or by its ranges, and could go by those that they have."""
    return (*batch_normalisation(model), *observers(model))


def _unseen(found: Attribution, modules: Sequence[nn.Module]) -> bool:
    """Whether these have coupled samples, as their buffers tell, so weakly that it shows in gradients alone."""
    holders = {id(place.holder) for module in modules for place in buffer_places(module)}
    return bool(found.unknown) and any(id(place.holder) in holders for place in found.changing)


def _separable(found: Attribution) -> bool:
    return not (found.coupled or found.unclear or found.undecided)


def _escalate(asked: Question, layers: Sequence[Layer]) -> Attribution:
    """Attribution of layers or, step by step, of modules that contain them."""
    model = asked.model
    parents = {id(child): module for module in model.modules() for child in module.children()}
    first, layers = layers, list(layers)
    found, chosen = _attribute(asked, layers, layers, None)
    while True:
        certain = found.certain and all(x.rule is not None for x in layers)
        found = replace(found, layers=tuple(layers), certain=certain)
        if found.unclear or found.undecided:
            return found
        if not asked.fixed and (fixed := _normalising(model)) and (found.coupled or _unseen(found, fixed)):
            without = _escalate(replace(asked, fixed=fixed), first)
            if _separable(without):
                return replace(without, coupled=True, normalised=True, changing=found.changing)
        if found.coupled or asked.ranks is not None:
            return found
        missing = found.unknown | found.outside | found.reached & without_gradient(model, layers, asked.arguments)
        missing -= found.not_linear
        slower = {x.name: y for x in layers if x.name in missing and (y := slower_of(asked, parents, x)) is not None}
        if not slower:
            return found
        layers = [slower.get(x.name, x) for x in layers]
        again = [x for x in layers if any(x is y or share_parameters(x, y) for y in slower.values())]
        found = _updated(found, _attribute(asked, again, layers, chosen)[0], {x.name for x in again})


def _updated(found: Attribution, again: Attribution, names: set[str]) -> Attribution:
    """What was found, with what was found anew of some layers."""
    if again.unclear:
        return again
    return replace(
        found,
        known={**{name: calls for name, calls in found.known.items() if name not in names}, **again.known},
        unknown=found.unknown - names | again.unknown,
        not_linear=found.not_linear | again.not_linear,
        outside=found.outside - names | again.outside,
        routes={**found.routes, **again.routes},
        hidden=found.hidden | again.hidden,
        reached=found.reached - names | again.reached,
        untested=found.untested - names | again.untested,
        repeated=found.repeated - names | again.repeated,
    )


def _attribute(
    asked: Question, layers: Sequence[Layer], every: Sequence[Layer], chosen: Choice | None
) -> tuple[Attribution, Choice | None]:
    """One look at layers, of every one that is asked about, in their present enclosing modules."""
    model, arguments = asked.model, asked.arguments
    operated, layers = [x for x in layers if x.by_operations], [x for x in layers if not x.by_operations]
    # Parameters that lie over ranks are gathered and freed by hooks of FSDP2, or DTensors, and are not replaced: what
    # uses them outside of their layers shows in the audit.
    ranks = asked.ranks
    with isolate(model, None, [] if ranks is not None else [*layers, *operated], direct=asked.direct) as isolated:
        for module in asked.fixed:
            module.training = False  # until the isolation ends

        forward = _forward(asked, isolated)
        with recorded(isolated, layers if ranks is None else [], own_parameters=ranks is not None) as recording:
            output, watched, beside = _watched(model, forward, arguments)
            changing = tuple(p for m in model.modules() for p in buffer_places(m) if version(p.value) > 0)
            recording.close()
            isolated.require_replacements(output)
            if _not_finite(output, ranks):
                return Attribution(unclear=True), None
            base = floating(output)
            seen = [  # now: further forwards are recorded too
                RecordedLayer(x, list(recording.inputs[x.name]), list(recording.leaves[x.name]))
                for x in layers
                if recording.leaves.get(x.name)
            ]
            choice = choose(asked, forward, base) if chosen is None else chosen
            if isinstance(choice, Attribution):
                return replace(choice, changing=changing), None
            hypothesis, options = choice
            if ranks is not None and ranks.any(hypothesis.num_samples == 0):
                raise InvalidArgumentError(_EMPTY_RANK)
            hooked = watched.hooked or any(map(is_scripted, model.modules()))
            graph = ForwardGraph(output, options, hypothesis.num_samples, hooked, [t for z in seen for t in z.leaves])
            outside = set() if ranks is not None else uses_outside(isolated, layers, graph.users)
            outside |= {x.name for x in layers if x.enclosing is not model} & set(recording.watch.differentiated)
            trial = Trial(forward, arguments, hypothesis)
            again = [x for x in layers if x.rule is None and x.enclosing is model and graph.ends]
            rest = [x for x in layers if x not in again]
            found = rows_of_layers([z for z in seen if z.layer in rest], rest, trial, graph, ranks)
            if found is None:
                return Attribution(dims=hypothesis.dims, coupled=True, changing=changing), None
        routable = _may_route(asked, every, watched.selections, hypothesis)
        routed = routed_outputs(layers, trial) if routable and layers else {}
        found.unknown |= {x.name for x in rest} & routed.keys()
        whole = _of_the_model(again, trial, graph, routed, found)
        uses = _uses(asked, operated, layers, isolated, trial, graph, routable)
        coupled = _coupling(asked, trial, graph, beside) if chosen is None else frozenset()
        attribution = _concluded(asked, hypothesis, options, found, uses)
        bent = _not_linear(asked, isolated, trial, graph, seen, operated)
    return replace(
        attribution,
        unknown=attribution.unknown | bent,
        not_linear=bent,
        outside=frozenset(outside),
        changing=changing,
        selections=watched.selections,
        coupling=coupled,
        made_of=whole.made_of,
    ), choice


def _of_the_model(
    layers: Sequence[Layer], trial: Trial, graph: ForwardGraph, routed: Mapping[str, Collection[int]], found: Rows
) -> ForwardGraph:
    """Enter layers for which the whole model runs again: samples are where they are in its outputs, if these tell all.

    What comes to an output that has none (the loss), or whose rows depend on data, is to come through the others. The
    graph that is returned tells whether it does.
    """
    graph = _whole_graph(trial, graph) if layers else graph
    outputs = floating(graph.output)
    for layer in layers:
        data = routed.get(layer.name, ())
        told = [o[0] if o and graph.made_of == "ends" and i not in data else None for i, o in enumerate(graph.options)]
        if told.count(None) < len(told):
            found.known[layer.name] = [(x, i, tuple(outputs[i].shape)) for i, x in enumerate(told)]
            found.reached.add(layer.name)
        else:
            found.unknown.add(layer.name)
    return graph


def _not_linear(
    asked: Question,
    isolated: IsolatedModel,
    trial: Trial,
    graph: ForwardGraph,
    seen: Sequence[RecordedLayer],
    operated: Sequence[Layer],
) -> frozenset[str]:
    """The layers whose gradients are not in proportion to those on the model's outputs."""
    if asked.ranks is not None:
        return frozenset()
    ends = {z.layer.name: z.leaves for z in seen if z.layer.rule is not None}
    bent = not_linear(graph, ends | {layer.name: isolated.replacements(layer) for layer in operated})
    if again := {z.layer.name: isolated.replacements(z.layer) for z in seen if z.layer.rule is None}:
        bent |= not_linear(_whole_graph(trial, graph), again)
    return bent


def _whole_graph(trial: Trial, graph: ForwardGraph) -> ForwardGraph:
    """That of one more forward: in recorded calls, the layers' parameters stood apart from it."""
    with Watched() as watched:
        output = trial.forward(trial.arguments)
    return replace(graph, output=output, hooked=graph.hooked or watched.hooked, leaves=())


def _may_route(asked: Question, every: Sequence[Layer], selections: int, hypothesis: Hypothesis) -> bool:
    """Whether the model may send rows elsewhere by data, in another way than an earlier look has seen."""
    before = asked.before
    if asked.ranks is not None:
        return False
    if before is not None and before.layers == tuple(every) and before.selections == selections:
        return False
    return bool(selections) or any(unowned_arguments(asked.arguments, hypothesis))


def _watched(
    model: nn.Module, forward: Callable[[Any], Any], arguments: Any
) -> tuple[Any, Watched, dict[Beside, Tensor]]:
    """The model's output, what it did on the way, and the tensors that it has made beside."""
    kept = set(map(id, made_beside(model, None).values()))  # by a forward before
    with Watched() as watched:
        output = forward(arguments)
    return output, watched, {p: t for p, t in made_beside(model, output).items() if id(t) not in kept}


def _coupling(asked: Question, trial: Trial, graph: ForwardGraph, beside: Mapping[Beside, Tensor]) -> frozenset[Beside]:
    """Where the forward makes what couples samples, beside outputs of samples."""
    if asked.ranks is not None:  # each would run the model as often as it has reason to
        return frozenset()
    of_samples = {id(f) for f, options in zip(floating(graph.output), graph.options, strict=False) if options}
    made = {place: t for place, t in beside.items() if id(t) not in of_samples}
    return coupling(asked.model, trial, made)


def _forward(asked: Question, isolated: IsolatedModel) -> Callable[..., Any]:
    """The model on arguments, which ``begins`` is called with before."""
    kernels = attention_kernels()  # those of now: no second derivatives are taken here, for which some have none

    def forward(arguments: Any, begins: Callable[[Any], None] = lambda _: None) -> Any:
        def run(copied: Any) -> Any:
            observe_nothing(asked.fixed)
            begins(copied)
            return asked.model(*copied[0], **copied[1])

        # FSDP2 expects a backward after a forward with gradients.
        with torch.set_grad_enabled(asked.ranks is None and torch.is_grad_enabled()), sdpa_kernel(kernels):
            return isolated.run(run, arguments)

    return forward


def _concluded(
    asked: Question, hypothesis: Hypothesis, options: Sequence[Sequence[Layout]], rows: Rows, uses: Rows
) -> Attribution:
    """What the rows of layers and of operations tell, for a batch whose samples are known."""
    shapes = shapes_of(asked.arguments)
    count = hypothesis.num_samples
    reached, blank = rows.reached | uses.reached, rows.blank | uses.blank
    verified = {
        name: tuple(dict.fromkeys(Verified(*call, shapes, count) for call in calls))
        for name, calls in (rows.known | uses.known).items()
    }
    # Where no gradient comes, zeros would do for samples anywhere: what was verified before still holds.
    held = set() if asked.before is None else asked.before.known.keys() - asked.before.untested
    verified = {x: calls for x, calls in verified.items() if x not in held or (x in reached and x not in blank)}
    return Attribution(
        dims=hypothesis.dims,
        grouping=None if hypothesis.owned is None else hypothesis.owned.grouping,
        shapes=shapes,
        known=verified if count > 1 else {},
        outputs=tuple(o[0] if o else None for o in options),
        unknown=frozenset(rows.unknown | uses.unknown),
        reached=frozenset(reached),
        untested=frozenset(blank & verified.keys()),
        repeated=frozenset(uses.repeated),
        routes=uses.routes,
        hidden=frozenset(uses.hidden),
        provisional=count == 1 or hypothesis.untested,
        alternative=hypothesis.alternative,
        certain=hypothesis.dim == 0 and hypothesis.owned is None and independent_by_structure(asked.model),
    )


def _uses(
    asked: Question,
    layers: Sequence[Layer],
    called: Sequence[Layer],
    isolated: IsolatedModel,
    trial: Trial,
    graph: ForwardGraph,
    routable: bool,
) -> Rows:
    """The uses of the parameters of layers that are measured by operations, beside those measured by their calls."""
    if not layers:
        return Rows()
    if any(share_parameters(one, other) for one in layers for other in called):
        graph = _whole_graph(trial, graph)
    parameters = {x.name: dict(zip(x.parameters, isolated.replacements(x), strict=True)) for x in layers}
    routes = {} if asked.before is None else asked.before.routes
    return rows_of_uses(parameters, trial, graph, routes, routed=routable)


def _not_finite(output: Any, ranks: Ranks | None) -> bool:
    """Logits may be masked by -inf; nan, and the gradients that it spoils, say nothing."""
    real = [t for t in map(local, tensors_in(output)) if t.is_floating_point() and t.numel()]
    bad = any(not bool(t.detach().amax() < torch.inf) for t in real)  # the greatest of some is nan where any is
    return bad if ranks is None else ranks.any(bad)
