"""What every measurement returns: one diagonal per layer, and how it was computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ._arguments import listed, require_device, require_path, shown
from ._sharing import held_before
from ._torch.views import joined
from .errors import InvalidArgumentError, InvalidTypeError
from .layers.selection import Layer, MeasuredBy
from .parallel.fsdp import Shard, shards, whole

#: Said of a file, or a state, of something else.
_FOREIGN = "this is not what Diagonals.state_dict() returns: was it saved by Diagonals.save()?"

#: On operands, or on operands and their errors.
Operation = Callable[..., Tensor]


class Strategy(str, Enum):
    """How a layer's curvature is computed; it prints as, and is equal to, its string.

    :class:`LayerInfo` says what each is; ``"output-products"`` and ``"parameter-products"`` are those of eigenvalues.
    """

    UNUSED = "unused"
    COLUMNS = "columns"
    CHAIN = "chain"
    OUTPUT_BASIS = "output-basis"
    PARAMETER_BASIS = "parameter-basis"
    COLUMN_DRAWS = "column-draws"
    OUTPUT_DRAWS = "output-draws"
    COLUMNS_AND_OUTPUT_DRAWS = "columns+output-draws"
    PARAMETER_DRAWS = "parameter-draws"
    OUTPUT_PRODUCTS = "output-products"
    PARAMETER_PRODUCTS = "parameter-products"
    ONLINE = "online"
    RULE = "rule"
    PER_SAMPLE = "per-sample"
    LOOP = "loop"

    def __str__(self) -> str:
        return self.value

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, specification: str) -> str:
        return format(self.value, specification)


def brief(result: Any) -> str:
    """A dataclass as Python shows it, with numbers of four digits."""
    values = [(one.name, getattr(result, one.name)) for one in fields(result)]
    texts = [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value!r}" for name, value in values]
    return f"{type(result).__name__}({', '.join(texts)})"


@dataclass(frozen=True)
class LayerInfo:
    """How a layer's diagonal was computed.

    Attributes:
        strategy: for the Hessian ``"columns"`` (of a root of the output Hessian), ``"chain"`` (each sample's Hessian
            carried backwards), ``"output-basis"``, ``"parameter-basis"``, ``"column-draws"`` (the heaviest columns of
            each sample, and draws of the others), ``"output-draws"``, ``"columns+output-draws"`` (the Gauss-Newton part
            exact, the rest drawn), or ``"parameter-draws"``; for the Fisher ``"online"``, ``"rule"``, ``"per-sample"``
            or ``"loop"``; for both ``"unused"`` (the loss does not depend on the layer).
        num_hvps: Hessian-vector products spent on this layer.
        checks: outcome of the run-time checks behind the choice, by name.
        num_draws: draws of an estimate; 0 where the result is exact.
        relative_error: the estimate's ``‖standard error‖ / ‖diagonal‖``; 0 where the result is exact, nan where draws
            do not show it (``"mc"``).
        converged: whether an estimate met ``rtol`` before it ran out of draws; without ``rtol``, whether its relative
            error is below one half.
        num_batches: how many batches it is the mean, or the sum, of.
        measured_by: for the online Fisher, how the per-sample gradients of the latest batch were computed: ``"rule"``
            (by the rule of the layer's type), ``"operations"`` (by a rule for each operation that uses a parameter), or
            ``"rerun"`` (the layer, or the smallest module around it that can, ran a second time, sample by sample: as
            exact, and slower); ``""`` if it was not measured in this process, and for all other quantities.
    """

    strategy: Strategy
    num_hvps: int = 0
    checks: Mapping[str, bool] = field(default_factory=dict)
    num_draws: int = 0
    relative_error: float = 0.0
    converged: bool = True
    num_batches: int = 1
    measured_by: MeasuredBy = ""

    __repr__ = brief


def relative_error(values: Sequence[Tensor], errors: Sequence[Tensor]) -> float:
    """``‖standard error‖ / ‖values‖`` of a layer; 0 where both vanish."""
    error = torch.cat([e.flatten() for e in errors]).norm().item()
    norm = torch.cat([v.flatten() for v in values]).norm().item()
    return 0.0 if error == 0 else error / norm if norm else inf


def joined_info(infos: Sequence[LayerInfo], relative_error: float) -> LayerInfo:
    """How the sum, or mean, of several results of a layer was computed: products and draws of all of them."""
    drawn = next((info for info in infos if info.num_draws), infos[0])
    names = {name for info in infos for name in info.checks}
    return replace(
        drawn,
        num_hvps=sum(info.num_hvps for info in infos),
        num_draws=sum(info.num_draws for info in infos),
        checks={name: all(info.checks.get(name, True) for info in infos) for name in sorted(names)},
        relative_error=relative_error or sum(0 * info.relative_error for info in infos),  # nan where it is not known
        converged=all(info.converged for info in infos),
        num_batches=sum(info.num_batches for info in infos),
    )


class Diagonals(dict[str, Tensor]):
    """A curvature diagonal per layer: layer name → 1-D tensor, weight flattened first, then bias.

    A plain ``dict`` in ``model.named_modules()`` order that also takes a parameter's name (``"fc1.weight"``), for its
    part in its shape. For a model sharded by ``fully_shard``, a value holds only this rank's shards;
    :meth:`by_parameter` gives ``DTensor`` in the parameters' shapes and placements, and :meth:`whole` gathers.

    ``+``, ``-``, ``*`` and ``/`` accept another one of the same layers, or a number; standard errors are propagated to
    first order, as those of independent estimates. :func:`secorder.weighted_mean` averages several.

    Attributes:
        info: per layer, how its diagonal was computed (:class:`LayerInfo`).
        standard_error: per layer, the standard error of every entry: of an estimate, or over the batches of a data set;
            None for exact results of one batch.
        layer_types: per layer, the name of its type.

    Example:
        >>> import torch
        >>> from secorder import CurvatureProbe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> probe = CurvatureProbe(model)
        >>> fisher = probe.fisher_diagonal(torch.nn.functional.mse_loss, torch.randn(4, 3), torch.randn(4, 2))
        >>> fisher["0"].shape, fisher.by_parameter()["0.weight"].shape
        (torch.Size([8]), torch.Size([2, 3]))
        >>> (2 * fisher)["0.bias"].shape, round((fisher / fisher.total).total, 4)
        (torch.Size([2]), 1.0)
    """

    info: dict[str, LayerInfo]
    standard_error: dict[str, Tensor] | None
    layer_types: dict[str, str]

    def __init__(
        self,
        layers: Sequence[Layer],
        values: Mapping[str, Sequence[Tensor]],
        info: Mapping[str, LayerInfo],
        standard_error: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Assemble from flat tensors per parameter, in each layer's parameter order."""
        super().__init__((layer.name, joined(values[layer.name])) for layer in layers)
        self.info = {layer.name: info[layer.name] for layer in layers}
        self.standard_error = (
            None
            if standard_error is None
            else {layer.name: torch.cat(list(standard_error[layer.name])) for layer in layers}
        )
        self.layer_types = {layer.name: type(layer.module).__name__ for layer in layers}
        self._shards = {
            layer.name: [Shard.of(p) for p in layer.parameters.values()] for layer in layers if layer.spread is not None
        }
        self._parameters = {
            layer.name: [(layer.parameter_name(local), p.shape) for local, p in layer.parameters.items()]
            for layer in layers
        }
        self._repeated = held_before(
            {x.name: {x.parameter_name(local): p for local, p in x.parameters.items()} for x in layers}
        )

    def __missing__(self, name: str) -> Tensor:
        for layer, parameters in self._parameters.items():
            if any(name == parameter for parameter, _ in parameters):
                return self._of_layer(layer)[name]
        raise KeyError(f"{name!r} is neither a layer nor a parameter that was measured ({listed([*self])}).")

    def parameter_shapes(self) -> dict[str, dict[str, torch.Size]]:
        """Per layer, the shapes of its parameters by their names in the model."""
        return {name: dict(parameters) for name, parameters in self._parameters.items()}

    def by_parameter(self) -> dict[str, Tensor]:
        """The same values by parameter name, each in the shape of its parameter (``"fc1.weight"`` …)."""
        return {name: part for layer in self for name, part in self._of_layer(layer).items()}

    def _of_layer(self, layer: str) -> dict[str, Tensor]:
        diagonal, parameters = self[layer], self._parameters[layer]
        if layer in self._shards:
            placed = shards(diagonal, self._shards[layer])
            return {name: part for (name, _), part in zip(parameters, placed, strict=True)}
        parts = diagonal.split([shape.numel() for _, shape in parameters])
        return {name: part.view(shape) for (name, shape), part in zip(parameters, parts, strict=True)}

    def whole(self) -> Iterator[Tensor]:
        """The whole diagonal, layer by layer; if it is sharded, it is gathered, and every rank must iterate over it."""
        for name, diagonal in self.items():
            sharded = self._shards.get(name)
            yield (diagonal if sharded is None else torch.cat([whole(t).flatten() for t in shards(diagonal, sharded)]))

    @property
    def total(self) -> float:
        """The trace over all layers, in which a parameter that layers share counts once (gathered, if sharded)."""
        again = [self._of_layer(layer)[name] for layer, names in self._repeated.items() for name in names]
        return sum(self._traces().values()) - sum(whole(part).detach().double().sum().item() for part in again)

    @property
    def repeated(self) -> list[str]:
        """The layers whose parameters all belong to earlier layers too, such as a head tied to its embedding."""
        return [name for name, again in self._repeated.items() if len(again) == len(self._parameters[name])]

    def shares(self) -> dict[str, float]:
        """Per layer, its trace over :attr:`total`; a parameter that layers share counts in each of them."""
        total = self.total
        return {name: trace / total if total else 0.0 for name, trace in self._traces().items()}

    def _traces(self) -> dict[str, float]:
        sums = [d.detach().double().sum().cpu() for d in self.whole()]
        return dict(zip(self, torch.stack(sums).tolist() if sums else [], strict=True))

    def to(self, *args: Any, **kwargs: Any) -> "Diagonals":
        """A copy on another device or in another dtype, as by :meth:`torch.Tensor.to`; standard errors too."""
        return self._mapped(lambda t: t.to(*args, **kwargs))

    def copy(self) -> "Diagonals":
        """A shallow copy: of the same tensors."""
        return self._mapped(lambda t: t)

    def detach(self) -> "Diagonals":
        """The same numbers, detached from the graph."""
        return self._mapped(lambda t: t.detach())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Diagonals":
        errors = None if self.standard_error is None else {n: change(e) for n, e in self.standard_error.items()}
        return self.replaced({name: change(d) for name, d in self.items()}, errors)

    # ---- arithmetic

    def _combined(self, other: Any, value: Operation, error: Operation) -> "Diagonals":
        """Entry by entry: values, and the standard errors of independent operands to first order."""
        infos = None
        if not isinstance(other, Diagonals):
            scalar = isinstance(other, Tensor) and other.dim() == 0 and not other.is_complex()
            if not (scalar or isinstance(other, Real)):
                raise InvalidTypeError(
                    f"diagonals are combined with others of the same layers, or with one number, not {shown(other)}."
                )
            number = other
            other = self.replaced({n: torch.as_tensor(number, dtype=d.dtype, device=d.device) for n, d in self.items()})
        elif other._parameters == self._parameters:
            infos = {name: [self.info[name], other.info[name]] for name in self}
        else:
            raise InvalidArgumentError("these diagonals are of other layers or shapes: measure the same layers.")
        errors = None
        if self.standard_error is not None or other.standard_error is not None:
            mine = self.standard_error or {name: torch.zeros_like(d) for name, d in self.items()}
            theirs = other.standard_error or {name: torch.zeros_like(d) for name, d in other.items()}
            errors = {n: error(self[n], other[n], mine[n], theirs[n]).abs() for n in self}
        result = self.replaced({n: value(self[n], other[n]) for n in self}, errors)
        relative = {n: relative_error([d.detach()], [errors[n].detach()]) if errors else 0.0 for n, d in result.items()}
        result.info = {n: joined_info(infos[n] if infos else [self.info[n]], relative[n]) for n in self}
        return result

    def __add__(self, other: "Diagonals") -> "Diagonals":
        return self._combined(other, lambda a, b: a + b, lambda a, b, x, y: torch.hypot(x, y.expand_as(x)))

    def __radd__(self, other: Any) -> "Diagonals":
        return self if isinstance(other, int) and other == 0 else self + other  # the start of sum()

    def __sub__(self, other: "Diagonals") -> "Diagonals":
        return self + (-other)

    def __rsub__(self, other: Any) -> "Diagonals":
        return other + (-self)  # type: ignore[no-any-return]

    def __neg__(self) -> "Diagonals":
        return -1 * self

    def __mul__(self, other: Any) -> "Diagonals":
        return self._combined(other, lambda a, b: a * b, lambda a, b, x, y: torch.hypot(x * b, y * a))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Diagonals":
        return self._combined(other, lambda a, b: a / b, lambda a, b, x, y: torch.hypot(x / b, y * a / b**2))

    def __rtruediv__(self, other: Any) -> "Diagonals":
        return self._combined(other, lambda a, b: b / a, lambda a, b, x, y: torch.hypot(y / a, x * b / a**2))

    # ---- files

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain containers, for ``torch.save`` and for ``torch.load`` with ``weights_only=True``.

        Raises:
            InvalidArgumentError: the parameters are sharded, so that this rank holds only a part.
        """
        if self._shards:
            raise InvalidArgumentError("sharded diagonals are a part: gather them with whole(), and save that.")
        return {
            "version": 1,
            "values": dict(self),
            "standard_error": self.standard_error,
            "info": {name: asdict(info) | {"strategy": str(info.strategy)} for name, info in self.info.items()},
            "layer_types": self.layer_types,
            "parameters": {n: [(p, list(shape)) for p, shape in parts] for n, parts in self._parameters.items()},
            "repeated": self._repeated,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Diagonals":
        """The diagonals that :meth:`state_dict` was called on.

        Raises:
            InvalidArgumentError: the state is one of something else.
        """
        parts = {"values", "standard_error", "info", "layer_types", "parameters"}
        if not isinstance(state, Mapping) or state.get("version") != 1 or not parts <= state.keys():
            raise InvalidArgumentError(_FOREIGN)
        try:
            info = {
                n: LayerInfo(**{**kept, "strategy": Strategy(kept["strategy"])}) for n, kept in state["info"].items()
            }
            parameters = {n: [(p, torch.Size(shape)) for p, shape in parts] for n, parts in state["parameters"].items()}
            errors = state["standard_error"]
            sizes = {n: sum(shape.numel() for _, shape in parts) for n, parts in parameters.items()}
            if not all(
                held.keys() == info.keys() == sizes.keys()
                and all(held[n].shape == (size,) for n, size in sizes.items())
                for held in ([state["values"]] if errors is None else [state["values"], errors])
            ):
                raise ValueError("sizes do not agree")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(_FOREIGN) from error
        return _rebuild(state["values"], info, errors, state["layer_types"], parameters, {}, state.get("repeated", {}))

    def save(self, file: Any) -> None:
        """Write to a path or an open file; see :meth:`load`.

        Raises:
            InvalidArgumentError, InvalidTypeError: as :meth:`state_dict`; it is neither a path nor a file.
        """
        require_path("file", file, or_with="write")
        torch.save(self._mapped(lambda t: t.detach().clone()).state_dict(), file)

    @classmethod
    def load(cls, file: Any, map_location: Any = None) -> "Diagonals":
        """The diagonals that :meth:`save` wrote.

        Args:
            file: a path or an open file.
            map_location: where tensors are put, as for ``torch.load``.

        Raises:
            InvalidArgumentError: the file holds something else; ``map_location`` is no device of this machine.
        """
        require_path("file", file, or_with="read")
        if not (callable(map_location) or isinstance(map_location, Mapping)):
            require_device("map_location", map_location)
        try:
            state = torch.load(file, map_location=map_location, weights_only=True)
        except OSError:  # there is no file, say
            raise
        except Exception as error:
            raise InvalidArgumentError(_FOREIGN) from error
        return cls.from_state_dict(state)

    def replaced(self, values: Mapping[str, Tensor], standard_error: Mapping[str, Tensor] | None = None) -> "Diagonals":
        """Other values for the same layers.

        Args:
            values: layer name → 1-D tensor.
            standard_error: layer name → standard error of every entry.
        """
        errors = None if standard_error is None else dict(standard_error)
        parts = self.layer_types, self._parameters, self._shards, self._repeated
        return _rebuild(dict(values), self.info, errors, *parts)

    def __reduce__(self) -> Any:
        parts = self.layer_types, self._parameters, self._shards, self._repeated
        return (_rebuild, (dict(self), self.info, self.standard_error, *parts))


def _rebuild(values: dict[str, Tensor], info: Any, standard_error: Any, *parts: Any) -> Diagonals:
    result = Diagonals.__new__(Diagonals)
    dict.update(result, values)
    result.info, result.standard_error = info, standard_error
    # Pickles of a version before have no parameters that layers share.
    result.layer_types, result._parameters, result._shards, result._repeated = (*parts, {})[:4]
    return result
