"""What every measurement returns: one diagonal per layer, and how it was come by."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .layers.selection import Layer
from .parallel.all_reduce import add_up
from .parallel.fsdp import Shard, shards, whole

__all__ = ["Diagonals", "LayerInfo", "Strategy", "weighted_mean", "weighted_sum"]


class Strategy(str, Enum):
    """How a layer's curvature was come by; prints as its string, and is equal to it."""

    UNUSED = "unused"
    COLUMNS = "columns"
    OUTPUT_BASIS = "output-basis"
    PARAMETER_BASIS = "parameter-basis"
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


@dataclass(frozen=True)
class LayerInfo:
    """How a layer's diagonal was computed.

    Attributes:
        strategy: for the Hessian ``"columns"`` (of a root of the output Hessian), ``"output-basis"``,
            ``"parameter-basis"``, ``"output-draws"``, ``"columns+output-draws"`` (the Gauss-Newton part exact, the rest
            drawn), ``"parameter-draws"``, or ``"unused"`` (the loss does not depend on the layer); for the Fisher
            ``"online"``, ``"rule"``, ``"per-sample"`` or ``"loop"``.
        num_hvps: Hessian-vector products spent on this layer.
        checks: outcome of the run-time checks behind the choice, by name.
        num_draws: draws of an estimate; 0 where the result is exact.
        relative_error: the estimate's ``‖standard error‖ / ‖diagonal‖``; 0 where the result is exact.
        converged: whether an estimate met ``rtol`` before it ran out of draws; where nothing was asked of it, whether
            its relative error is below one half.
    """

    strategy: Strategy
    num_hvps: int = 0
    checks: Mapping[str, bool] = field(default_factory=dict)
    num_draws: int = 0
    relative_error: float = 0.0
    converged: bool = True


class Diagonals(dict[str, Tensor]):
    """A curvature diagonal per layer: layer name → 1-D tensor, weight flattened first, then bias.

    It is a plain ``dict`` in ``model.named_modules()`` order that also knows the parameters behind it. Of a model that
    ``fully_shard`` cuts over ranks, a value holds this rank's shards alone; :meth:`by_parameter` gives ``DTensor`` in
    the parameters' own shapes and placements, and :meth:`whole` gathers.

    Attributes:
        info: per layer, how its diagonal was computed (:class:`LayerInfo`).
        standard_error: per layer, the standard error of every entry; None for exact results.
        layer_types: per layer, the name of its type.

    Example:
        >>> import torch
        >>> from secorder import CurvatureProbe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> probe = CurvatureProbe(model)
        >>> fisher = probe.fisher_diagonal(torch.nn.functional.mse_loss, torch.randn(4, 3), torch.randn(4, 2))
        >>> fisher["0"].shape, fisher.by_parameter()["0.weight"].shape
        (torch.Size([8]), torch.Size([2, 3]))
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
        super().__init__((layer.name, torch.cat(list(values[layer.name]))) for layer in layers)
        self.info = {layer.name: info[layer.name] for layer in layers}
        self.standard_error = (
            None
            if standard_error is None
            else {layer.name: torch.cat(list(standard_error[layer.name])) for layer in layers}
        )
        self.layer_types = {layer.name: type(layer.module).__name__ for layer in layers}
        self._shards = {
            layer.name: [Shard.of(p) for p in layer.parameters.values()] for layer in layers if layer.sharded
        }
        self._parameters = {
            layer.name: [(layer.parameter_name(local), p.shape) for local, p in layer.parameters.items()]
            for layer in layers
        }

    def parameter_shapes(self) -> dict[str, dict[str, torch.Size]]:
        """Per layer, the shapes of its parameters by their names in the model."""
        return {name: dict(parameters) for name, parameters in self._parameters.items()}

    def by_parameter(self) -> dict[str, Tensor]:
        """The same values by parameter name, each in the shape of its parameter (``"fc1.weight"`` …)."""
        result: dict[str, Tensor] = {}
        for name, diagonal in self.items():
            if name in self._shards:
                placed = shards(diagonal, self._shards[name])
                result.update(
                    (parameter, part) for (parameter, _), part in zip(self._parameters[name], placed, strict=True)
                )
                continue
            parts = diagonal.split([shape.numel() for _, shape in self._parameters[name]])
            for (parameter, shape), part in zip(self._parameters[name], parts, strict=True):
                result[parameter] = part.view(shape)
        return result

    def whole(self) -> Iterator[Tensor]:
        """Layer by layer the whole diagonal: gathered where it is sharded, so that every rank must iterate over it."""
        for name, diagonal in self.items():
            sharded = self._shards.get(name)
            yield (diagonal if sharded is None else torch.cat([whole(t).flatten() for t in shards(diagonal, sharded)]))

    def replaced(self, values: Mapping[str, Tensor], standard_error: Mapping[str, Tensor] | None = None) -> "Diagonals":
        """Other values for the same layers.

        Args:
            values: layer name → 1-D tensor.
            standard_error: layer name → standard error of every entry.
        """
        errors = None if standard_error is None else dict(standard_error)
        return _rebuild(dict(values), self.info, errors, self.layer_types, self._parameters, self._shards)

    def __reduce__(self) -> Any:
        parts = (dict(self), self.info, self.standard_error, self.layer_types, self._parameters, self._shards)
        return (_rebuild, parts)


def weighted_sum(total: Diagonals | None, part: Diagonals, weight: float) -> Diagonals:
    """``total + weight · part``, entry by entry, for diagonals of the same layers.

    Standard errors add up in squares, as those of independent estimates do; of ``info``, HVPs are summed.

    Args:
        total: what was summed up so far; None for nothing.
        part: what is added.
        weight: its weight.
    """
    if total is None:
        total = part.replaced({name: torch.zeros_like(d) for name, d in part.items()})
        total.info = {name: replace(info, num_hvps=0) for name, info in part.info.items()}
    values = {name: total[name] + weight * d for name, d in part.items()}
    errors = None
    if part.standard_error is not None:
        before = total.standard_error or {name: torch.zeros_like(d) for name, d in part.items()}
        errors = {name: (before[name] ** 2 + (weight * e) ** 2).sqrt() for name, e in part.standard_error.items()}
    result = total.replaced(values, errors)
    result.info = {
        name: replace(info, num_hvps=info.num_hvps + part.info[name].num_hvps) for name, info in total.info.items()
    }
    return result


def weighted_mean(
    diagonals: Diagonals, weight: float, group: "torch.distributed.ProcessGroup | None" = None
) -> Diagonals:
    """``Σ_r w_r D_r / Σ_r w_r`` over the ranks: the diagonal of the whole batch from those of its parts.

    Args:
        diagonals: of this rank's part of the batch.
        weight: its number of samples, for a Fisher and for the Hessian of a mean loss.
        group: a process group; the default group if None.

    Returns:
        the same on every rank; standard errors are combined as those of independent estimates.

    Raises:
        ProbeStateError: ``torch.distributed`` is not initialised.
    """
    total = torch.tensor(weight, dtype=torch.float64)
    values = {name: weight * d for name, d in diagonals.items()}
    errors = {name: (weight * e) ** 2 for name, e in (diagonals.standard_error or {}).items()}
    add_up([total, *values.values(), *errors.values()], group)
    whole = total.item()
    return diagonals.replaced(
        {name: d / whole for name, d in values.items()},
        {name: e.sqrt() / whole for name, e in errors.items()} if diagonals.standard_error is not None else None,
    )


def _rebuild(
    values: dict[str, Tensor], info: Any, standard_error: Any, layer_types: Any, parameters: Any, sharded: Any
) -> Diagonals:
    result = Diagonals.__new__(Diagonals)
    dict.update(result, values)
    result.info, result.standard_error = info, standard_error
    result.layer_types, result._parameters, result._shards = layer_types, parameters, sharded
    return result
