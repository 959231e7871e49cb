"""Where the samples are in each layer: found and verified by passes of our own on one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.pytree import map_tensors, tensors_in
from .._torch.transforms import inside_transform
from .._torch.vjp import fresh_generator, gradients
from ..batch import preferred_size, sample_dimension, sample_sizes
from ..errors import DoubleBackwardError, InvalidArgumentError
from ..layers.layout import Layout
from ..layers.selection import Layer, sharded_parameter
from ..layers.structure import independent_by_structure
from ..layers.tying import Ties, tied_layers
from ..oneshot.independence import changed_entries, outputs_independent, separating_masks, with_neighbours
from ..oneshot.isolation import IsolatedModel, isolate
from ..oneshot.output_hessian import expose_output
from ..oneshot.recorded_layer import RecordedLayer, layout_options, scale_draws, scales
from ..oneshot.recording import recorded
from ..parallel.fsdp import over_ranks

__all__ = ["Attribution", "attribute"]


@dataclass
class Attribution:
    """Where the samples are in the layers of a model that trains.

    Attributes:
        layouts: by layer, for each output tensor of each call.
        unknown: layers of whose output no dimension was found to hold the samples.
        outside: layers whose parameters the model also uses outside of the calls of their enclosing modules.
        reached: layers whose calls the model's output depends on.
        layers: the layers, with the enclosing modules whose calls tell all: they themselves, or a part of the model.
        calls: by layer, how many calls were seen.
        coupled: whether samples influence one another in the model.
        argument: index, among the tensors of the model's arguments, of one whose size tells the number of samples.
        unclear: whether the output held nan or inf, so that nothing can be told from this batch.
        ambiguous: sizes of arguments that may all be the number of samples, where nothing tells which is.
        ties: the layers whose gradient is to be put together from that of several; see :func:`tied_layers`.
    """

    layouts: dict[str, list[Layout]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    layers: list[Layer] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    coupled: bool = False
    argument: int = 0
    unclear: bool = False
    ambiguous: list[int] = field(default_factory=list)
    ties: Ties = field(default_factory=dict)

    def sharing(self, name: str) -> list[str]:
        """The layers whose gradient is put together, and takes part of what a layer's calls bring."""
        return [own for own, by in self.ties.items() if any(name == h for holders in by.values() for h, _ in holders)]

    def count(self, arguments: Any, dim: int) -> int:
        """The number of samples of a batch."""
        tensor = next(islice(tensors_in(arguments), self.argument, None))
        return tensor.shape[dim] if tensor.dim() > dim else 0


def attribute(
    model: nn.Module,
    layers: Sequence[Layer],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dim: int,
    *,
    direct: bool = False,
) -> Attribution:
    """Find and verify where samples are in each layer, by passes of our own on one batch.

    Random cotangents on the model's output, weighted sample by sample, must come back weighted by the same factors in
    the rows of every layer's output. Where the model returns no tensor with samples (a loss alone), replacing samples
    must change their rows in a layer's output and no others. Parameters that are used outside of their layers' calls
    are found by the structure of the autograd graph.

    A layer whose own calls do not do (a row that all samples share, a parameter that is used elsewhere, a frozen layer
    with nothing trainable before it) is looked for in the calls of the module that contains it, up to the model.

    Args:
        model: the model.
        layers: the layers to find samples in.
        args: positional arguments of one forward.
        kwargs: keyword arguments of it.
        dim: where the samples are in the arguments.
        direct: on a direct isolated (see :func:`secorder.oneshot.isolation.run_isolated`).
    """
    together, ties = tied_layers(model, layers)
    if ties:
        found = _escalate(model, together, args, kwargs, dim, direct)
        members = {name for by in ties.values() for holders in by.values() for name, _ in holders}
        if found.unclear or all(x.rule is not None for x in found.layers if x.name in members):
            found.ties = ties
            return found
    return _escalate(model, layers, args, kwargs, dim, direct)


def _escalate(
    model: nn.Module, layers: Sequence[Layer], args: tuple[Any, ...], kwargs: dict[str, Any], dim: int, direct: bool
) -> Attribution:
    """Attribution of layers or, step by step, of modules that contain them."""
    parents = {id(child): module for module in model.modules() for child in module.children()}
    layers = list(layers)
    independent = independent_by_structure(model, dim)
    while True:
        found = _attribute(model, layers, (args, kwargs), dim, independent, direct)
        found.layers = layers
        independent = True  # or the search ends here: the samples are no less so when other modules are looked at
        missing = found.unknown | found.outside
        if found.unclear:
            return found
        if not found.coupled and not any(x.sharded for x in layers):
            missing |= found.reached & _without_gradient(model, layers, (args, kwargs))
        movable = {x.name for x in layers if x.name in missing and x.enclosing is not model and not x.sharded}
        if found.coupled or not movable:
            return found
        layers = [replace(x, enclosing=parents[id(x.enclosing)], rule=None) if x.name in movable else x for x in layers]


def _without_gradient(model: nn.Module, layers: Sequence[Layer], arguments: Any) -> set[str]:
    """Frozen layers whose output carries no gradient in the model as it is, or that it does not even call."""
    frozen = [x for x in layers if not any(p.requires_grad for p in x.parameters.values())]
    if not frozen:
        return set()
    missing = {layer.name for layer in frozen}

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if any(t.requires_grad for t in tensors_in(output)):
                missing.discard(layer.name)

        return hook

    with isolate(model, None, []) as isolated:
        handles = [layer.enclosing.register_forward_hook(watch(layer)) for layer in frozen]
        try:
            isolated.run(lambda copied: model(*copied[0], **copied[1]), arguments)
        finally:
            for handle in handles:
                handle.remove()
    return missing


def _attribute(
    model: nn.Module, layers: Sequence[Layer], arguments: Any, dim: int, independent: bool, direct: bool
) -> Attribution:
    found = Attribution()
    # Sharded parameters are gathered and freed by hooks of FSDP2, and are not replaced; what uses them outside of their
    # layers shows in the probe's check of whole gradients.
    cut = sharded_parameter(layers)
    with isolate(model, None, [] if cut is not None else layers, direct=direct) as isolated:

        def forward(arguments: Any) -> Any:
            with torch.set_grad_enabled(cut is None):  # FSDP2 expects a backward to follow
                return isolated.run(lambda copied: model(*copied[0], **copied[1]), arguments)

        with recorded(isolated, layers, own_parameters=cut is not None) as recording:
            output = forward(arguments)
            recording.close()
            isolated.require_replacements(output)
            # Logits may be masked by -inf; nan, and the gradients that it spoils, say nothing.
            found.unclear = any(
                bool((t.isnan() | (t == torch.inf)).any()) for t in tensors_in(output) if t.is_floating_point()
            )
            if cut is not None:
                found.unclear = bool(over_ranks(found.unclear, cut, "max"))
            if found.unclear:
                return found
            found.calls = {name: len(calls) for name, calls in recording.inputs.items()}
            count = _count(found, arguments, output, dim)
            if cut is not None and over_ranks(count == 0, cut, "max"):
                raise InvalidArgumentError(
                    "a rank has no samples in a batch that the probe looks at: under fully_shard every rank needs some."
                )
            if count == 0:
                return found
            if cut is None:
                _uses_outside(found, isolated, [x for x in layers if x.enclosing is not model], output)
            found.outside |= {x.name for x in layers if x.name in recording.differentiated and x.enclosing is not model}
            by_layer = [
                RecordedLayer(layer, recording.inputs[layer.name], recording.leaves[layer.name])
                for layer in layers
                if recording.leaves.get(layer.name)
            ]
            model_outputs: list[Tensor] = []
            expose_output(
                [t for t in tensors_in(output) if t.requires_grad and sample_dimension(t, count, dim) is not None],
                model_outputs,
                lambda t: sample_dimension(t, count, dim),
                detach=False,
            )
            try:
                if model_outputs:
                    _by_cotangents(found, by_layer, model_outputs, count)
            except DoubleBackwardError:  # reentrant checkpoints do not go with torch.autograd.grad
                model_outputs = []
        if not model_outputs:
            _by_replacement(found, layers, forward, arguments, count, dim, cut)
        else:
            found.coupled = not independent and not outputs_independent(isolated, arguments, count, dim, forward)
    return found


def _count(found: Attribution, arguments: Any, output: Any, dim: int) -> int:
    """The number of samples: a size that the arguments agree on, or that the output has too."""
    sizes = sample_sizes(arguments, dim)
    known = {t.shape[d] for t in tensors_in(output) for d in (dim, 0) if t.dim() > d}
    count = preferred_size([size for size in sizes if size in known] or sizes) if sizes else 0
    if count not in known and len(set(sizes) - {1}) > 1:
        found.ambiguous = sizes
        return 0
    tensors = list(tensors_in(arguments))
    found.argument = next((i for i, t in enumerate(tensors) if t.dim() > dim and t.shape[dim] == count), 0)
    return count


def _uses_outside(found: Attribution, isolated: IsolatedModel, layers: Sequence[Layer], output: Any) -> None:
    for one, other in combinations(layers, 2):  # tied weights: each layer's calls are another's outside
        together = one.rule is not None and other.rule is not None  # see tied_layers
        if not together and _apart(one.enclosing, other.enclosing) and _share(one, other):
            found.outside |= {one.name, other.name}
    ends = [t for t in tensors_in(output) if t.requires_grad]
    if not ends:
        return
    replacements = [(layer.name, s) for layer in layers for s in isolated.replacements(layer)]
    try:
        reached = gradients(ends, [s for _, s in replacements], [torch.ones_like(t) for t in ends])
    except DoubleBackwardError:  # a reentrant checkpoint; the probe's own check of whole gradients remains
        return
    found.outside |= {name for (name, _), r in zip(replacements, reached, strict=True) if r is not None}


def _share(one: Layer, other: Layer) -> bool:
    return not {id(p) for p in one.parameters.values()}.isdisjoint(id(p) for p in other.parameters.values())


def _apart(one: nn.Module, other: nn.Module) -> bool:
    return all(m is not other for m in one.modules()) and all(m is not one for m in other.modules())


def _options(z: RecordedLayer, count: int) -> list[list[Layout]]:
    """For each output tensor of the layer its candidate layouts."""
    if z.layer.rule is None:
        return [_any_dimension(leaf, count) for leaf in z.leaves]
    joint = layout_options(z, count)
    return [[layouts[index] for layouts in joint] for index in range(len(z.leaves))]


def _any_dimension(tensor: Tensor, count: int) -> list[Layout]:
    options = [Layout(dim) for dim, size in enumerate(tensor.shape) if size == count]
    if tensor.dim() and tensor.shape[0] > count and tensor.shape[0] % count == 0:
        options += [Layout(0, tensor.shape[0] // count, major) for major in (True, False)]
    return options


def _by_cotangents(
    found: Attribution, layers: Sequence[RecordedLayer], model_outputs: list[Tensor], count: int
) -> None:
    generator = fresh_generator()
    leaves = [leaf for z in layers for leaf in z.leaves]

    def random(shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(like)

    cotangents = [random(f.shape, f) for f in model_outputs]

    def pull_back(stack: list[Tensor]) -> dict[int, Tensor]:
        pulled = gradients(model_outputs, leaves, stack)
        return {
            id(leaf): (torch.zeros_like(leaf) if g is None else g)[None] for leaf, g in zip(leaves, pulled, strict=True)
        }

    plain = pull_back(cotangents)
    options = [_options(z, count) for z in layers]
    for _ in range(scale_draws(leaves)):
        weights = 0.5 + random((count,), model_outputs[0]).abs()
        scaled = pull_back([c * weights.to(c).view(-1, *(1,) * (c.dim() - 1)) for c in cotangents])
        options = [
            [
                [o for o in choices if scales([leaf], [o], plain, scaled, weights)]
                for leaf, choices in zip(z.leaves, by_leaf, strict=True)
            ]
            for z, by_leaf in zip(layers, options, strict=True)
        ]
    for z, by_leaf in zip(layers, options, strict=True):
        if any(bool((plain[id(leaf)] != 0).any()) for leaf in z.leaves):
            found.reached.add(z.layer.name)
        if all(by_leaf):
            found.layouts[z.layer.name] = [choices[0] for choices in by_leaf]
        else:
            found.unknown.add(z.layer.name)


def _by_replacement(
    found: Attribution,
    layers: Sequence[Layer],
    forward: Callable[[Any], Any],
    arguments: Any,
    count: int,
    dim: int,
    cut: Tensor | None,
) -> None:
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if inside_transform():
                found.outside.add(name)
                return
            found.reached.add(name)
            tensors = [t.detach().clone() for t in tensors_in(output) if t.is_floating_point()]
            outputs.setdefault(name, []).extend(tensors)

        return hook

    handles = [layer.enclosing.register_forward_hook(keep(layer.name)) for layer in layers]

    def run(mask: Tensor | None) -> dict[str, list[Tensor]]:
        outputs.clear()
        with torch.no_grad():
            forward(arguments if mask is None else map_tensors(partial(with_neighbours, mask, count, dim), arguments))
        return dict(outputs)

    try:
        base = run(None)
        masks = list(separating_masks(count))
        # Every rank that shares the parameters runs the model as often, whatever its number of samples.
        turns = len(masks) if cut is None else int(over_ranks(len(masks), cut, "max"))
        changed = [run(mask) for mask in masks]
        for _ in range(turns - len(masks)):
            run(None)
    finally:
        for handle in handles:
            handle.remove()

    def holds(layout: Layout, before: Tensor, after: list[Tensor]) -> bool:
        changed = False
        for mask, tensor in zip(masks, after, strict=True):
            moved = layout.split(changed_entries(before, tensor))
            mask = mask.to(before.device)
            if bool(moved[~mask].any()):
                return False
            changed = changed or bool(moved[mask].any())
        return changed or count == 1

    for name, tensors in base.items():
        layouts = [
            next((o for o in _any_dimension(t, count) if holds(o, t, [c[name][i] for c in changed])), None)
            for i, t in enumerate(tensors)
        ]
        if any(layout is None for layout in layouts):
            found.unknown.add(name)
        else:
            found.layouts[name] = [layout for layout in layouts if layout is not None]
