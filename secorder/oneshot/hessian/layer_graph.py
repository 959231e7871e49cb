"""A layer with its recorded calls, and the derivatives of the loss in them."""

from dataclasses import dataclass, field

from torch import Tensor

from ..head import Head
from ..output_root import output_root
from ..recorded_layer import RecordedLayer
from ..root_forms import cross_entropy_root
from ..roots import Root


@dataclass(eq=False)
class LayerGraph(RecordedLayer):
    """A layer's part of the graph."""

    output_gradients: list[Tensor | None] = field(default_factory=list)  #: ∂L/∂z by call, differentiable
    #: ∂⟨w, f⟩/∂z by call with w = ∂L/∂f fixed, differentiable: of it, columns give nothing
    residual: list[Tensor | None] = field(default_factory=list)
    num_hvps: int = 0  #: products spent on it


@dataclass(eq=False)
class OutputSide:
    """The loss as a function of the model's output."""

    model_outputs: list[Tensor]  #: the output tensors, samples in dim 0
    points: list[Tensor]  #: leaves in their place
    output_gradients: list[Tensor | None]  #: of the loss in the leaves, differentiable
    #: c, where the loss's Hessian is c (diag p − p pᵀ) at each position by the loss's definition
    scale: float | None = None
    root: Root | None = None  #: of the loss's Hessian in the leaves, where it was found already
    #: layers whose output z is one of these, and whose part needs no columns (see :mod:`..head`)
    heads: dict[str, Head] = field(default_factory=dict)
    by_graph: bool = False  #: whether the graph may tell where samples are: no hook of the model's changes gradients

    def find_root(self, chunk_size: int | None) -> Root:
        """The root, by definition where that tells it; it is found once."""
        if self.root is None and self.scale is not None:
            self.root = cross_entropy_root(self.points[0].detach(), self.scale)
        elif self.root is None:
            self.root = output_root(self.output_gradients, self.points, chunk_size)
        return self.root

    @property
    def size(self) -> int:
        """Elements of one sample's output."""
        return sum(t[0].numel() for t in self.model_outputs)
