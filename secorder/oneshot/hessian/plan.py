"""What was recorded and verified for one layer, and the strategy that it goes by."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..recorded_layer import RecordedLayer

__all__ = ["Plan"]


@dataclass(eq=False)
class Plan(RecordedLayer):
    """A layer's way to its diagonal, with what was recorded and verified for it."""

    strategy: str = "parameter-basis"
    output_gradients: list[Tensor | None] = field(default_factory=list)  # ∂L/∂z by call, differentiable
    checks: dict[str, bool] = field(default_factory=dict)
    residual: list[Tensor | None] = field(default_factory=list)  # ∂⟨w, f⟩/∂z by call, w = ∂L/∂f fixed
    values: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    num_columns: int = 0
    num_hvps: int = 0
    num_draws: int = 0
    converged: bool = True

    def layer_like(self, dtype: torch.dtype) -> Tensor:
        """An empty tensor of a dtype on the layer's device."""
        return next(iter(self.layer.parameters.values())).detach().new_empty(0, dtype=dtype)

    def exact_hvps(self) -> int:
        """Hessian-vector products of the cheapest exact way that the checks allow."""
        if self.strategy in ("unused", "columns"):
            return self.num_columns
        in_z = sum(self.sizes) if self.checks.get("samples_independent") else self.numel
        return min(in_z, self.numel)
