"""The pairs of cotangents on the model's output that make a Fisher of second order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..layers.selection import Layer
from ..results import LayerInfo, Strategy
from .measurement import Measurement
from .output_hessian import output_hessian
from .output_root import output_root
from .roots import Columns, Draws, Root, from_hessian

FisherType = Literal["empirical", "type-2", "mc"]


@dataclass(frozen=True)
class Asked:
    """Which Fisher is asked for."""

    fisher_type: FisherType = "empirical"
    num_draws: int = 1  #: of ``"mc"``

    @property
    def second_order(self) -> bool:
        """Whether it takes second derivatives of the loss, and several cotangents of each sample."""
        return self.fisher_type != "empirical"

    @property
    def one_pair(self) -> bool:
        """Whether each sample has one pair of cotangents alone."""
        return self.fisher_type == "empirical" or (self.fisher_type == "mc" and self.num_draws == 1)


#: Per layer its diagonal by parameter, which is the mean over samples, and how it was come by.
Found = dict[str, tuple[list[Tensor], LayerInfo]]


def second_order_columns(
    task: Measurement,
    output_gradients: Sequence[Tensor | None],
    points: Sequence[Tensor],
    asked: Asked,
    root: Root | None = None,
) -> Columns:
    """Pairs of which Σ_c u_c v_cᵀ is every sample's ∂²ℓ_n/∂f_n² (``"type-2"``), or has it as expectation (``"mc"``).

    From differentiable gradients of Σ_n ℓ_n in points with samples in dim 0; or by the Hessian's root, where it is
    known.
    """
    if root is None and task.create_graph:  # a square root is not differentiable where eigenvalues meet
        root = from_hessian(output_hessian(output_gradients, points, task.chunk_size))
    elif root is None:
        root = output_root(output_gradients, points, task.chunk_size)
    return root if asked.fisher_type == "type-2" else Draws.of(root, asked.num_draws, task.generator)


def collect(layers: Sequence[Layer], totals: Sequence[Tensor], strategy: Strategy, count: int) -> Found:
    """Totals by parameter over so many samples, put together by layer."""
    rest = iter(totals)
    return {
        layer.name: ([next(rest).flatten() / count for _ in layer.parameters], LayerInfo(strategy)) for layer in layers
    }
