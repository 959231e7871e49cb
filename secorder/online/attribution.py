"""Where the samples are in each layer: found and verified by passes of our own on one batch.

Random cotangents on the model's outputs, weighted sample by sample, must come back weighted by the same factors in the
rows of every layer's output. Where the model returns no tensor with samples (a loss alone), changing samples must
change their rows in a layer's output and no others. Parameters that are used outside of their layers' calls are found
by the structure of the autograd graph.

A layer whose own calls do not do (a row that all samples share, rows that depend on data, a parameter that is used
elsewhere, a frozen layer with nothing trainable before it) is looked for in the calls of the module that contains it,
up to the model.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from .._torch.attention import attention_kernels
from .._torch.modules import Place, batch_normalisation, buffer_places, evaluating
from .._torch.pytree import tensors_in
from .._torch.versions import version
from .._torch.vjp import fresh_generator
from ..errors import InvalidArgumentError
from ..layers.layout import Layout
from ..layers.selection import Layer, sharded_parameter
from ..layers.structure import independent_by_structure
from ..layers.tying import Ties, tied_layers
from ..layers.uses import Route
from ..oneshot.independence import separating_masks
from ..oneshot.isolation import IsolatedModel, isolate
from ..oneshot.recorded_layer import RecordedLayer
from ..oneshot.recording import recorded
from ..parallel.fsdp import over_ranks
from .outside import share_parameters, uses_outside, without_gradient
from .relation import Shape, Verified
from .routes import Selections, layers_of_routed_rows, unowned_arguments
from .rows import Rows, rows_of_layers
from .samples import (
    Hypothesis,
    SampleDim,
    any_layout,
    equivariant,
    floating,
    hypotheses,
    separates,
    shapes_of,
    told,
)
from .use_rows import UseRows, rows_of_uses

__all__ = ["Attribution", "attribute", "merged"]

#: Later looks change some samples so often: enough to see a coupling that is new; rows are verified besides.
TRIALS = 1


@dataclass(frozen=True)
class Attribution:
    """What is known of where samples are, for one combination of train and eval modes.

    Attributes:
        layers: the layers, with the enclosing modules whose calls tell all: they themselves, or a part of the model.
        dims: for each tensor among the model's arguments, the dimension that holds the samples.
        shapes: of these tensors in this batch.
        known: by layer, the calls that were verified.
        outputs: for each of the model's outputs in this batch, where the samples are in it.
        unknown: layers of whose calls no dimension was found to hold the samples.
        outside: layers whose parameters the model also uses outside of the calls of their enclosing modules.
        reached: layers whose calls the model's output depends on.
        coupled: whether samples influence one another in the model.
        normalised: whether they do by its batch normalisation alone; the rest is then known for fixed statistics.
        unclear: whether the output held nan or inf, so that nothing can be told from this batch.
        provisional: whether the batch could not tell where samples are (a batch of one).
        undecided: why it cannot be told which dimension holds the samples; empty where it can.
        separable: another dimension that separates, where the one that was told does not.
        alternative: another dimension that would do as well as the one that was taken.
        certain: whether the model is a chain of torch's own layers, whose structure leaves no doubt.
        ties: the layers whose gradient is to be put together from that of several; see :func:`tied_layers`.
        changing: the buffers that a forward overwrites.
        routes: by layer that is measured by operations, those that are followed; see :mod:`secorder.layers.uses`.
        hidden: layers whose operations cannot be followed, since a checkpoint computes them again.
        selections: how often a forward selected rows by tensors; see :mod:`secorder.online.routes`.
        explained: what was made of calls that came, by layer, shapes of the arguments, samples, and the calls' shapes.
    """

    layers: tuple[Layer, ...] = ()
    dims: tuple[int | None, ...] = ()
    shapes: tuple[Shape, ...] = ()
    known: Mapping[str, tuple[Verified, ...]] = field(default_factory=dict)
    outputs: tuple[Layout | None, ...] = ()
    unknown: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    reached: frozenset[str] = frozenset()
    coupled: bool = False
    normalised: bool = False
    unclear: bool = False
    provisional: bool = False
    undecided: str = ""
    separable: int | None = None
    alternative: int | None = None
    certain: bool = False
    ties: Ties = field(default_factory=dict)
    changing: tuple[Place, ...] = ()
    routes: Mapping[str, frozenset[Route]] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    selections: int = 0
    explained: dict[tuple[Any, ...], list[list[Layout]] | None] = field(default_factory=dict, compare=False)

    def holders(self, name: str) -> set[str]:
        """The layers that hold a parameter of a layer whose gradient is put together."""
        return {holder for by in self.ties.get(name, {}).values() for holder, _ in by}

    def sharing(self, name: str) -> list[str]:
        """The layers whose gradient is put together, and takes part of what a layer's calls bring."""
        return [own for own, by in self.ties.items() if any(name == h for holders in by.values() for h, _ in holders)]

    def owners(self, name: str) -> list[str]:
        """The layers whose number a layer's calls take part in: those that share a parameter with it, or it alone."""
        return self.sharing(name) or [name]

    def count(self, shapes: Sequence[Shape]) -> int | None:
        """The number of samples of a batch, by its arguments' shapes; None where these contradict what is known."""
        if len(shapes) != len(self.dims) or any(
            dim is not None and len(shape) <= dim for shape, dim in zip(shapes, self.dims, strict=True)
        ):
            return None
        sizes = {shape[dim] for shape, dim in zip(shapes, self.dims, strict=True) if dim is not None}
        if 0 in sizes:
            return 0
        return max(sizes) if len(sizes - {1}) <= 1 and sizes else None


def merged(before: Attribution, after: Attribution) -> Attribution:
    """What a new look found, with what earlier ones verified of the layers that are captured as they were."""
    same = {x.name for x in before.layers} & {x.name for x in after.layers if x in before.layers}
    known = {
        name: _latest((*after.known.get(name, ()), *(before.known.get(name, ()) if name in same else ())))
        for name in {**before.known, **after.known}
    }
    return replace(after, known=known, reached=before.reached | after.reached, explained={})


def _latest(calls: Sequence[Verified]) -> tuple[Verified, ...]:
    """The latest sixteen of what was verified at each place."""
    at: dict[int | str, int] = {}
    kept = []
    for seen in dict.fromkeys(calls):
        at[seen.place] = at.get(seen.place, 0) + 1
        if at[seen.place] <= 16:
            kept.append(seen)
    return tuple(kept)


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

    Args:
        model: the model.
        layers: the layers to find samples in.
        args: positional arguments of one forward.
        kwargs: keyword arguments of it.
        sample_dim: where the samples are in the arguments, if it is told.
        before: what an earlier look found: its enclosing modules, and where it found samples, are what this one
            begins with, by a few drawn trials where the first look tells every ordered pair of samples apart.
        direct: leave the parameters in their places (see :func:`secorder.oneshot.isolation.run_isolated`).
        not_followed: layers that are not to be measured by operations.
    """
    if sharded_parameter(layers) is not None:
        not_followed = [x.name for x in layers]
    asked = _Question(model, (args, kwargs), sample_dim, before, direct, not_followed)
    if before is not None:
        return replace(_escalate(asked, before.layers), ties=before.ties)
    layers = [_by_operations(asked, x) if x.rule is None else x for x in layers]
    together, ties = tied_layers(model, layers)
    if ties:
        found = _escalate(asked, together)
        members = {name for by in ties.values() for holders in by.values() for name, _ in holders}
        if found.unclear or all(x.rule is not None for x in found.layers if x.name in members):
            return replace(found, ties=ties)
    return _escalate(asked, layers)


@dataclass(frozen=True)
class _Question:
    """One look: at what, and how thoroughly."""

    model: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    sample_dim: SampleDim
    before: Attribution | None
    direct: bool
    not_followed: Collection[str] = ()
    fixed: tuple[nn.Module, ...] = ()  # batch normalisation that is to go by its running statistics

    @staticmethod
    def masks(count: int, trials: int | None = None) -> list[Tensor]:
        """Which samples are changed in each trial: every ordered pair is told apart, or so many trials, drawn."""
        masks = separating_masks(count)
        if trials is None or len(masks) <= trials:
            return list(masks)
        drawn = torch.rand(trials, count, generator=fresh_generator(), device="cpu") < 0.5
        drawn[:, 0], drawn[:, 1] = True, False  # never all, never none
        order = torch.argsort(torch.rand(trials, count, generator=fresh_generator(), device="cpu"), 1)
        return list(drawn.gather(1, order))


def _escalate(asked: _Question, layers: Sequence[Layer]) -> Attribution:
    """Attribution of layers or, step by step, of modules that contain them."""
    model = asked.model
    parents = {id(child): module for module in model.modules() for child in module.children()}
    first, layers = layers, list(layers)
    found, chosen = _attribute(asked, layers, layers, None)
    while True:
        certain = found.certain and all(x.rule is not None for x in layers)
        found = replace(found, layers=tuple(layers), certain=certain)
        missing = found.unknown | found.outside
        if found.unclear or found.undecided:
            return found
        if found.coupled and not asked.fixed and (fixed := batch_normalisation(model)):
            without = _escalate(replace(asked, fixed=fixed), first)
            if not (without.coupled or without.unclear or without.undecided):
                return replace(without, coupled=True, normalised=True, changing=found.changing)
        if not found.coupled and not any(x.sharded for x in layers):
            missing |= found.reached & without_gradient(model, layers, asked.arguments)
        movable = {
            x.name
            for x in layers
            if x.name in missing
            and not x.sharded
            and (x.by_operations or x.rule is not None or x.enclosing is not model)
        }
        if found.coupled or not movable:
            return found
        layers = [_slower(asked, parents, x) if x.name in movable else x for x in layers]
        moved = [x for x in layers if x.name in movable]
        again = [x for x in layers if any(x is y or share_parameters(x, y) for y in moved)]
        found = _updated(found, _attribute(asked, again, layers, chosen)[0], {x.name for x in again})


def _updated(found: Attribution, again: Attribution, names: set[str]) -> Attribution:
    """What was found, with what was found anew of some layers."""
    if again.unclear:
        return again
    return replace(
        found,
        known={**{name: calls for name, calls in found.known.items() if name not in names}, **again.known},
        unknown=found.unknown - names | again.unknown,
        outside=found.outside - names | again.outside,
        routes={**found.routes, **again.routes},
        hidden=found.hidden | again.hidden,
        reached=found.reached - names | again.reached,
    )


def _by_operations(asked: _Question, layer: Layer) -> Layer:
    """The layer measured by operations, where that may be: its parameters are trained, so that the graph holds them."""
    trained = all(p.requires_grad for p in layer.parameters.values())
    if not trained or layer.sharded or layer.name in asked.not_followed:
        return layer
    return replace(layer, rule=None, by_operations=True)


def _slower(asked: _Question, parents: Mapping[int, nn.Module], layer: Layer) -> Layer:
    """The layer measured in the next slower way: by its rule, by operations, by its module, by one around that."""
    if layer.by_operations:
        return replace(layer, by_operations=False)
    if layer.rule is not None and (followed := _by_operations(asked, layer)) is not layer:
        return followed
    return replace(layer, enclosing=_around(parents, layer), rule=None)


def _around(parents: Mapping[int, nn.Module], layer: Layer) -> nn.Module:
    """The module around a layer's enclosing module that is itself called: not a mere list of modules."""
    module = parents[id(layer.enclosing)]
    while isinstance(module, (nn.ModuleList, nn.ModuleDict)) and id(module) in parents:
        module = parents[id(module)]
    return module


#: Nothing known of any layer.
_NONE: Rows = ({}, set(), set())

#: A hypothesis that holds, with the layouts that it leaves open of each output.
_Choice = tuple[Hypothesis, list[list[Layout]]]


def _attribute(
    asked: _Question, layers: Sequence[Layer], every: Sequence[Layer], chosen: _Choice | None
) -> tuple[Attribution, _Choice | None]:
    """One look at layers, of every one that is asked about, in their present enclosing modules."""
    model, arguments = asked.model, asked.arguments
    operated, layers = [x for x in layers if x.by_operations], [x for x in layers if not x.by_operations]
    # Sharded parameters are gathered and freed by hooks of FSDP2, and are not replaced; what uses them outside of their
    # layers shows in the audit.
    shard = sharded_parameter(layers)
    kernels = attention_kernels()  # those of now: no second derivatives are taken here, for which some have none
    with isolate(model, None, [] if shard is not None else [*layers, *operated], direct=asked.direct) as isolated:
        for module in asked.fixed:
            module.training = False  # until the isolation ends

        def forward(arguments: Any, begins: Callable[[Any], None] = lambda _: None) -> Any:
            def run(copied: Any) -> Any:
                begins(copied)
                return model(*copied[0], **copied[1])

            # FSDP2 expects a backward after a forward with gradients.
            with torch.set_grad_enabled(shard is None and torch.is_grad_enabled()), sdpa_kernel(kernels):
                return isolated.run(run, arguments)

        with recorded(isolated, layers, own_parameters=shard is not None) as recording:
            with Selections() as selections:
                output = forward(arguments)
            changing = tuple(p for m in model.modules() for p in buffer_places(m) if version(p.value) > 0)
            recording.close()
            isolated.require_replacements(output)
            if _not_finite(output, shard):
                return Attribution(unclear=True), None
            base = floating(output)
            seen = [  # now: further forwards are recorded too
                RecordedLayer(x, list(recording.inputs[x.name]), list(recording.leaves[x.name]))
                for x in layers
                if recording.leaves.get(x.name)
            ]
            choice = _choose(asked, forward, base, shard) if chosen is None else chosen
            if isinstance(choice, Attribution):
                return replace(choice, changing=changing), None
            hypothesis, options = choice
            if shard is not None and over_ranks(hypothesis.num_samples == 0, shard, "max"):
                raise InvalidArgumentError(
                    "a rank has no samples in a batch that the probe looks at: under fully_shard every rank needs some."
                )
            outside = (
                set()
                if shard is not None
                else uses_outside(isolated, [x for x in layers if x.enclosing is not model], output)
            )
            outside |= {x.name for x in layers if x.name in recording.differentiated and x.enclosing is not model}
            found = _NONE
            if layers:
                found = rows_of_layers(seen, layers, asked.arguments, forward, hypothesis, base, options, shard)
        routed: set[str] = set()
        before = asked.before
        routable = shard is None and not (
            before is not None and before.layers == tuple(every) and before.selections == selections.count
        )
        routable = routable and bool(selections.count or any(unowned_arguments(arguments, hypothesis)))
        if routable and layers:
            routed = layers_of_routed_rows(layers, forward, arguments, hypothesis)
        uses = _uses(asked, operated, isolated, forward, hypothesis, options, routable)
    known, unknown, reached = found
    shapes = shapes_of(arguments)
    count = hypothesis.num_samples
    verified = {
        name: tuple(Verified(layout, i, tuple(t.shape), shapes, count) for i, (layout, t) in enumerate(calls))
        for name, calls in known.items()
    } | {
        name: tuple(dict.fromkeys(Verified(layout, place, shape, shapes, count) for layout, place, shape in calls))
        for name, calls in uses.known.items()
    }
    return Attribution(
        dims=hypothesis.dims,
        shapes=shapes,
        known=verified if count > 1 else {},
        outputs=tuple(o[0] if o else None for o in options),
        unknown=frozenset(unknown | routed | uses.unknown),
        outside=frozenset(outside),
        reached=frozenset(reached | uses.reached),
        routes=uses.routes,
        hidden=frozenset(uses.hidden),
        provisional=count == 1,
        changing=changing,
        selections=selections.count,
        alternative=hypothesis.alternative,
        certain=hypothesis.dim == 0 and all(x.rule is not None for x in every) and independent_by_structure(model, 0),
    ), choice


def _uses(
    asked: _Question,
    layers: Sequence[Layer],
    isolated: IsolatedModel,
    forward: Any,
    hypothesis: Hypothesis,
    options: list[list[Layout]],
    routable: bool,
) -> UseRows:
    """The uses of the parameters of layers that are measured by operations."""
    if not layers:
        return UseRows()
    return rows_of_uses(
        {x.name: dict(zip(x.parameters, isolated.replacements(x), strict=True)) for x in layers},
        forward,
        asked.arguments,
        hypothesis,
        options,
        {} if asked.before is None else asked.before.routes,
        routed=forward if routable else None,
    )


def _not_finite(output: Any, shard: Tensor | None) -> bool:
    """Logits may be masked by -inf; nan, and the gradients that it spoils, say nothing."""
    bad = any(bool((t.isnan() | (t == torch.inf)).any()) for t in tensors_in(output) if t.is_floating_point())
    return bool(over_ranks(bad, shard, "max")) if shard is not None else bad


def _choose(asked: _Question, forward: Any, base: list[Tensor], shard: Tensor | None) -> _Choice | Attribution:
    """The hypothesis that holds, with what it leaves open of the outputs; or why there is none."""
    model, arguments, dim = asked.model, asked.arguments, asked.sample_dim
    tried = [told(model, *arguments, dim)] if isinstance(dim, Mapping) else hypotheses(arguments, base, dim)
    if not tried:
        return Attribution(undecided="none of the model's arguments has a dimension for samples")
    usual = tried[0]
    certain = len(tried) == 1 and usual.dim == 0 and independent_by_structure(model, 0)
    if (usual.num_samples <= 1 and len(tried) == 1) or certain or shard is not None:
        return usual, [any_layout(f, usual.num_samples) for f in base]
    before = asked.before
    if before is not None and (count := before.count(shapes_of(arguments))) is not None and count > 1:
        known = Hypothesis(before.dims, count, before.alternative)
        options = separates(forward, arguments, base, known, asked.masks(count, TRIALS), usual=True)
        if options is not None:
            return known, options
    if not any(any_layout(f, h.num_samples) for f in base for h in tried):
        return _by_size_alone(asked, forward, base, tried)
    holding = []
    for hypothesis in tried:
        if hypothesis.num_samples > 1:
            masks = asked.masks(hypothesis.num_samples)
            alone = hypothesis is usual and (dim is not None or len(tried) == 1)
            options = separates(forward, arguments, base, hypothesis, masks, usual=alone)
            if options is not None:
                holding.append((hypothesis, options))
        if holding and dim is not None:
            break
    if usual.num_samples == 1 and dim is None:
        if holding:  # one sample of many positions, or many samples of one
            return Attribution(provisional=True, undecided=f"of arguments of shapes {list(shapes_of(arguments))}")
        return usual, [any_layout(f, 1) for f in base]
    if (
        not holding and dim is None and usual.dim == 0
    ):  # perhaps nothing changes anything, as where weights start at zero
        options = separates(forward, arguments, base, usual, asked.masks(usual.num_samples), usual=True)
        holding = [] if options is None else [(usual, options)]
    if not holding:
        return _nothing_separates(asked, forward, base, usual)
    if len(holding) == 1:
        return holding[0]
    with evaluating(model):  # random numbers of dropout stay where they are when samples are exchanged
        alike = [choice for choice in holding if equivariant(forward, arguments, choice[0])] or holding[:1]
    first, options = alike[0]
    return first._replace(alternative=next((h.dim for h, _ in alike if h.dim != first.dim), None)), options


def _by_size_alone(
    asked: _Question, forward: Any, base: Sequence[Tensor], tried: Sequence[Hypothesis]
) -> _Choice | Attribution:
    """Where the outputs tell nothing of the number of samples (a loss alone)."""
    if base and all(f.numel() > 1 for f in base):
        return _nothing_separates(asked, forward, base, tried[0])
    sizes = {h.num_samples for h in tried if h.dim == tried[0].dim} - {1}
    if len(sizes) > 1:
        return Attribution(
            undecided=f"the model's arguments have sizes {sorted(sizes)} in dim {tried[0].dim}, and its output does "
            "not tell which of them is the number of samples: pass sample_dim= with a mapping of argument names to "
            "dimensions, or let the model return a tensor of that size"
        )
    return tried[0], []


def _nothing_separates(asked: _Question, forward: Any, base: Sequence[Tensor], usual: Hypothesis) -> Attribution:
    """No dimension holds samples that do not influence one another, or not the one that was told: another one?"""
    others = [] if asked.sample_dim is None else hypotheses(asked.arguments, base, None)
    separable = None
    for other in others:
        if other.num_samples > 1 and other.dim != usual.dim:
            masks = asked.masks(other.num_samples)
            if separates(forward, asked.arguments, base, other, masks, usual=False) is not None:
                separable = other.dim
    return Attribution(dims=usual.dims, coupled=True, separable=separable)
