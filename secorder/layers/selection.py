"""Which layers of a model are measured: selection by type and by name."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._arguments import like, listed, shown
from .._torch.collectives import has_ranks
from .._torch.differentiability import can_be_trained
from .._torch.fsdp import flattens_parameters, fsdp_mesh_dims, sharded_by_gathered
from .._torch.modules import holds, is_scripted, modules_in, own_parameters, own_tensors, parameters_with
from .._torch.sparse import gives_sparse_gradients
from ..errors import AttributionError, InvalidArgumentError, InvalidTypeError
from ..parallel import tensor_parallel
from ..parallel.ranks import Axis, Ranks
from ..parallel.spread import Spread, is_distributed
from .per_sample import Rule
from .rules import rule_for

DEFAULT_LAYER_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)

#: What ``layer_types`` may be: one type, several, ``"all"`` (every module with parameters of its own), or None.
LayerTypes = type[nn.Module] | Sequence[type[nn.Module]] | Literal["all"] | None

_NO_TYPES = 'layer_types must be module types, such as nn.Linear, or "all", got '

#: What tells the per-sample gradients of a layer in training; empty where it is not known.
MeasuredBy = Literal["", "rule", "operations", "rerun"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A selected module of the model, under its path, with the parameters its curvature is reported for."""

    name: str  #: the module's path in ``model.named_modules()`` (``""`` for the model itself)
    module: nn.Module
    #: its parameters by name relative to the module, in registration order (weight, then bias)
    parameters: dict[str, nn.Parameter]
    #: the layer type's per-sample gradient rule; None where the layer is measured without one, by its module
    rule: Rule | None
    #: the module whose forward uses the parameters: the module itself, except for what another module reads directly,
    #: such as the ``out_proj`` of ``nn.MultiheadAttention``
    enclosing: nn.Module
    #: whether the layer is measured by the operations that take its parameters, without a rule
    by_operations: bool = False
    spread: Spread | None = None  #: how the parameters lie over the ranks of a device mesh; None for whole ones

    @cached_property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the parameters over ranks that have samples of their own."""
        return self.spread is not None and bool(self.spread.data)

    @cached_property
    def split(self) -> bool:
        """Whether ranks that have the same samples compute with parts of the layer (tensor parallelism)."""
        return self.spread is not None and bool(self.spread.tensor)

    @cached_property
    def sparse(self) -> bool:
        """Whether a backward gives the rows of its gradient that were looked up alone."""
        return gives_sparse_gradients(self.module)

    def sizes(self) -> list[int]:
        """By parameter, the number of elements of what this rank computes with: its shard under tensor parallelism."""
        if self.spread is None:
            return [p.numel() for p in self.parameters.values()]
        return [self.spread.shape(p).numel() for p in self.parameters.values()]

    def gradient(self, parameter: Tensor, gradient: Tensor) -> Tensor | None:
        """What this rank has of a whole gradient, of the shape that it computes with; None where that is not known."""
        if self.spread is None or not self.split:
            return gradient.detach()
        return self.spread.part_of_gradient(gradient, parameter)

    @cached_property
    def measured_by(self) -> "MeasuredBy":
        """What tells the per-sample gradients: see :attr:`secorder.LayerInfo.measured_by`."""
        return "rule" if self.rule is not None else "operations" if self.by_operations else "rerun"

    @property
    def strategy(self) -> tuple[Rule | None, bool, nn.Module]:
        """The same, with the rule, and the module whose calls are seen."""
        return self.rule, self.by_operations, self.enclosing

    def parameter_name(self, local: str) -> str:
        """The name of a parameter in ``model.named_parameters()``."""
        return f"{self.name}.{local}" if self.name else local


def select_layers(
    model: nn.Module,
    layer_types: LayerTypes = None,
    layers: str | Iterable[str] | None = None,
    *,
    unchecked: bool = False,
) -> list[Layer]:
    """The layers of ``model`` that match, in ``model.named_modules()`` order.

    Types and names are as of :class:`secorder.CurvatureProbe`; names alone stand for modules of any type. Where only
    dependence is asked for (``unchecked``), layers whose curvature is not defined are admitted.
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    named = dict(model.named_modules())
    if any(isinstance(m, nn.DataParallel) for m in named.values()):
        raise InvalidTypeError(
            "nn.DataParallel runs on replicas that hooks cannot follow: attach to the wrapped model "
            "(model.module) on one device, or use DistributedDataParallel."
        )
    if any(map(flattens_parameters, named.values())):
        raise InvalidTypeError(
            "FullyShardedDataParallel computes with flattened parameters, which cannot be followed: shard the model by "
            "fully_shard (FSDP2)."
        )
    chosen = _choose(named, layer_types, layers)
    if gathered := sharded_by_gathered(model) if has_ranks() else {}:  # evaluation may have left them whole
        for _, parameters in chosen.values():
            parameters.update({local: gathered.get(id(p), p) for local, p in parameters.items()})
    owners = Counter(id(p) for _, parameters in chosen.values() for p in parameters.values())
    readers, special = read_elsewhere(named.values()), _special_tables(named)
    distributed = any(is_distributed(p) for _, parameters in chosen.values() for p in parameters.values())
    managed = fsdp_mesh_dims(model) if distributed else {}
    selected = []
    for name, (module, parameters) in chosen.items():
        _require_hookable(name, module, parameters)
        spread = None
        if not unchecked:
            _require_dense_real(name, parameters, special)
            if distributed and any(map(is_distributed, parameters.values())):
                spread = _spread(managed, name, module, parameters)
        # A parameter of two selected layers gets its gradient from both: one layer's hooks do not see all of it.
        shared = any(owners[id(p)] > 1 for p in parameters.values())
        enclosing = readers.get(module, module)
        empty = any(not p.numel() for p in parameters.values())  # a dimension of no elements: not what rules are for
        rule = rule_for(module) if enclosing is module and not shared and not empty else None
        selected.append(Layer(name, module, parameters, rule, enclosing, spread=spread))
    return selected


def layers_to_measure(
    model: nn.Module,
    layer_types: LayerTypes,
    layers: str | Iterable[str] | None,
    *,
    frozen: bool,
    unchecked: bool = False,
) -> list[Layer]:
    """The layers that match, of which something is trained unless frozen ones are asked for, or named."""
    selected = select_layers(model, layer_types, layers, unchecked=unchecked)
    return selected if frozen or names_layers(layers) else trained(selected)


def _require_hookable(name: str, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raise :class:`InvalidArgumentError` for a layer that is not initialised, or that no hook can be put on."""
    held = [t for m in modules_in(module) for t in own_tensors(m)]
    if any(map(is_lazy, (*parameters.values(), *held))):
        raise InvalidArgumentError(f"layer {name!r} is lazy and not initialised: run one forward before attaching.")
    if is_scripted(module):
        raise InvalidArgumentError(
            f"layer {name!r} is compiled by TorchScript, where nothing can be hooked: leave it out with "
            f"layers={'!' + name!r}, or keep the module that it was made of."
        )


def _require_dense_real(name: str, parameters: Mapping[str, Tensor], special: Mapping[int, tuple[str, str]]) -> None:
    """Raise for a layer whose gradient is not that of a fixed dense table, or that is complex."""
    table, option = next((special[id(p)] for p in parameters.values() if id(p) in special), ("", ""))
    if option:
        what = "is" if table == name else f"has a parameter of {table!r},"
        raise AttributionError(
            f"layer {name!r} {what} an embedding with {option}=, whose gradient is not that of a fixed table: "
            f"build it without, or leave the layer out with layers={'!' + name!r}."
        )
    complex_names = [local for local, p in parameters.items() if p.is_complex()]
    if complex_names:
        raise InvalidArgumentError(
            f"layer {name!r} has complex parameters {complex_names}, for which curvature is not defined here: "
            f"leave it out with layers={'!' + name!r}."
        )


def present(layer: Layer) -> Layer:
    """The layer with the parameters that its module holds now, which may have been exchanged since it was selected."""
    if holds(layer.module, layer.parameters):
        return layer
    now = dict(layer.module.named_parameters())
    if all(now.get(name) is p for name, p in layer.parameters.items()) or not layer.parameters.keys() <= now.keys():
        return layer
    return replace(layer, parameters={name: now[name] for name in layer.parameters})


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """A model's parameters, but for those of integers (quantised weights), which have no gradient."""
    return list(filter(can_be_trained, model.parameters()))


def trained(layers: Sequence[Layer]) -> list[Layer]:
    """The layers of which something is trained, unless nothing is of any."""
    found = [layer for layer in layers if any(p.requires_grad for p in layer.parameters.values())]
    return found or list(layers)


def share_of_parameters(model: nn.Module, layers: Sequence[Layer]) -> float:
    """The layers' share of the trainable elements of a model; 1 where nothing is trained."""
    every = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    own = {id(p) for layer in layers for p in layer.parameters.values()}
    total = sum(every.values())
    return sum(size for key, size in every.items() if key in own) / total if total else 1.0


def ranks_of(model: nn.Module, layers: Sequence[Layer]) -> Ranks | None:
    """The ranks that shards of the layers lie over, and those of tensor parallelism anywhere in the model."""
    data: tuple[Axis, ...] = ()
    for layer in layers:
        if layer.spread is not None:
            mesh: Any = next(iter(layer.parameters.values()))
            data = tuple((mesh.device_mesh, dim) for dim in layer.spread.data)
            break
    tensor = _tensor_parallel(model)
    return Ranks(data, tensor) if data or tensor else None


def _tensor_parallel(model: nn.Module) -> tuple[Axis, ...]:
    """The dimensions of a mesh that tensor parallelism shards parameters of a model over."""
    distributed: list[Any] = [p for m in modules_in(model) for p in own_parameters(m).values() if is_distributed(p)]
    managed = fsdp_mesh_dims(model) if distributed else {}
    for p in distributed:
        if p.device_mesh.ndim > managed.get(id(p), 0):
            return tuple((p.device_mesh, dim) for dim in range(managed.get(id(p), 0), p.device_mesh.ndim))
    return ()


def read_elsewhere(modules: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Modules of a model whose parameters another one of them reads without calling them, by module."""
    return {m.out_proj: m for m in modules if isinstance(m, nn.MultiheadAttention)}


def special_option(module: nn.Module) -> str | None:
    """An option with which an embedding's gradient is not that of a fixed dense table."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return next((o for o in ("max_norm", "scale_grad_by_freq") if getattr(module, o)), None)
    return None


def _special_tables(named: Mapping[str, nn.Module]) -> dict[int, tuple[str, str]]:
    """Tables of such embeddings, by ``id``: the module's name and the option."""
    options = ((name, m, special_option(m)) for name, m in named.items())
    return {id(m.weight): (name, option) for name, m, option in options if option}


def _spread(managed: Mapping[int, int], name: str, module: nn.Module, parameters: Mapping[str, Any]) -> Spread:
    """How a layer's parameters, one at least of which is distributed, lie over the ranks.

    Raises :class:`InvalidArgumentError` where that is in a way that is not known. ``managed`` tells by ``id`` of a
    parameter of FSDP2's how many dimensions of its mesh are FSDP2's own.
    """
    spreads = {(managed.get(id(p), 0), p.device_mesh.ndim) if is_distributed(p) else None for p in parameters.values()}
    if len(spreads) > 1:
        raise InvalidArgumentError(
            f"layer {name!r} has parameters some of which lie over the ranks and some of which do not, or over others: "
            "distribute all of them, or leave the layer out with layers=."
        )
    ((data, dims),) = spreads  # type: ignore[misc]
    spread = Spread(tuple(range(data)), tuple(range(data, dims)))
    tensor_parallel.check(name, module, parameters, spread)
    if rule_for(module) is None or not all(p.requires_grad for p in parameters.values()):
        raise InvalidArgumentError(
            f"layer {name!r} lies over the ranks (fully_shard, tensor parallelism) and is frozen, or of a type without "
            f"a rule ({type(module).__name__}), so that its module would have to run again, which such ones cannot: "
            "leave it out with layers=, or enter a rule for its type."
        )
    return spread


def _choose(
    named: dict[str, nn.Module], layer_types: LayerTypes, layers: str | Iterable[str] | None
) -> dict[str, tuple[nn.Module, dict[str, nn.Parameter]]]:
    """The matching modules with the parameters each one answers for."""
    patterns, left_out = _patterns(named, layers)
    types = _types(layer_types, default=DEFAULT_LAYER_TYPES if patterns is None else "all")
    chosen = {}
    for name, module in named.items():
        if any(fnmatchcase(name, pattern) for pattern in left_out):
            continue
        if patterns is not None and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if types == "all" and name not in (patterns or ()):
            # Every parameter belongs to the module that holds it; what a parametrization holds, to the layer it serves.
            if "parametrizations" in name.split("."):
                continue
            parameters = parameters_with(module, "parametrizations")
        elif types == "all" or isinstance(module, types):
            # A rule covers a module's own parameters; a module without one is a layer with all that it contains.
            parameters = dict(module.named_parameters()) if rule_for(module) is None else parameters_with(module)
        else:
            continue
        parameters = {local: p for local, p in parameters.items() if can_be_trained(p)}
        if parameters:
            chosen[name] = (module, parameters)
    return chosen


def names_layers(layers: str | Iterable[str] | None) -> bool:
    """Whether ``layers`` names any that are to be looked at, and not only some that are not."""
    if layers is None:
        return False
    return any(not pattern.startswith("!") for pattern in ([layers] if isinstance(layers, str) else layers))


def _patterns(named: dict[str, nn.Module], layers: str | Iterable[str] | None) -> tuple[list[str] | None, list[str]]:
    """The patterns of names to look at (None for all), and of those that are left out."""
    if layers is None:
        return None, []
    given = _names(layers)
    for pattern in given:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in named):
            names = list(filter(None, named))
            closest = like(pattern.removeprefix("!"), names)
            raise InvalidArgumentError(f"no module's name matches {pattern!r}: the model has {listed(names)}{closest}")
    wanted = [pattern for pattern in given if not pattern.startswith("!")]
    left_out = [pattern[1:] for pattern in given if pattern.startswith("!")]
    return (None if left_out and not wanted else wanted), left_out


def _names(layers: str | Iterable[str]) -> list[str]:
    if isinstance(layers, (nn.Module, Tensor)) or not isinstance(layers, Iterable):
        raise InvalidTypeError(f"layers must hold module names, got {type(layers).__name__}.")
    given = [layers] if isinstance(layers, str) else list(layers)
    for pattern in given:
        if not isinstance(pattern, str):
            raise InvalidTypeError(f"layers must hold module names, got {type(pattern).__name__}.")
    return given


def check_selection(layer_types: LayerTypes, layers: str | Iterable[str] | None) -> None:
    """Raise unless these are types and names, whatever the model may have."""
    _types(layer_types, default="all")
    if layers is not None:
        _names(layers)


def _types(
    layer_types: LayerTypes, default: tuple[type[nn.Module], ...] | Literal["all"]
) -> tuple[type[nn.Module], ...] | Literal["all"]:
    if layer_types is None:
        return default
    if isinstance(layer_types, str):
        if layer_types != "all":
            raise InvalidArgumentError(_NO_TYPES + shown(layer_types))
        return "all"
    if isinstance(layer_types, type):
        layer_types = (layer_types,)
    if isinstance(layer_types, (nn.Module, Tensor)) or not isinstance(layer_types, Iterable):
        raise InvalidTypeError(_NO_TYPES + shown(layer_types))
    types = tuple(layer_types)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidTypeError(f"layer_types must hold subclasses of torch.nn.Module, got {shown(kind)}.")
    return types
