"""One measurement of second order: the isolated model, the loss, and how to work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch.autocast import under_autocast
from ..._torch.vjp import check_chunk_size, fresh_generator
from ...batch import batch_size, require_agreement, sample_dimension
from ...layers.selection import Layer
from ...layers.structure import independent_by_structure
from ..isolation import IsolatedModel, Result, isolate, run_isolated
from ..loss import check_loss

__all__ = ["Problem", "on_problem", "ruled"]


def on_problem(
    work: Callable[["Problem"], Result],
    model: nn.Module,
    layers: Sequence[Layer],
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
    sample_dim: int = 0,
) -> Result:
    """Run ``work`` on a borrowed model."""
    check_chunk_size(chunk_size)
    count = batch_size(inputs, targets, sample_dim)
    generator = generator or fresh_generator()
    loss_fn = under_autocast(loss_fn)

    certain = independent_by_structure(model, sample_dim)

    def on_isolated(direct: bool) -> Result:
        with isolate(model, loss_fn, layers, create_graph=create_graph, direct=direct) as isolated:
            asked = loss_fn, inputs, targets, count, sample_dim, generator, chunk_size, progress
            return work(Problem(isolated, layers, *asked, certain))

    return run_isolated(on_isolated)


def ruled(problem: "Problem") -> list[Layer]:
    """The layers that have a rule."""
    return [layer for layer in problem.layers if layer.rule is not None]


@dataclass
class Problem:
    """One measurement: the borrowed model, the loss and how to work."""

    isolated: IsolatedModel
    layers: Sequence[Layer]
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Any
    targets: Any
    num_samples: int
    sample_dim: int
    generator: torch.Generator
    chunk_size: int | None
    progress: bool
    certain: bool  # samples are independent by the model's structure
    passed: int = 0  # numbers that a product passes through: recorded activations and outputs
    outputs: int = 0  # the outputs among them

    def loss(self) -> tuple[Any, Tensor]:
        """The model's output and the loss, from the same random state each time."""
        output = self.isolated.forward(self.inputs)
        require_agreement(output, self.targets, self.num_samples, self.sample_dim)
        loss = check_loss(self.loss_fn(output, self.targets), self.isolated, self.inputs)
        self.isolated.require_replacements(loss)
        # A factor that requires a gradient lets functions without a double backward see that there will be one: where
        # the gradient is constant, they would pass for linear.
        return output, loss * torch.ones_like(loss, requires_grad=True) if loss.requires_grad else loss

    def dimension(self, tensor: Tensor) -> int | None:
        """Where an output tensor's samples are."""
        return sample_dimension(tensor, self.num_samples, self.sample_dim)

    def random(self, shape: Sequence[int], like: Tensor) -> Tensor:
        device = self.generator.device
        return torch.randn(tuple(shape), generator=self.generator, dtype=like.dtype, device=device).to(like.device)

    def signs(self, shape: Sequence[int], like: Tensor) -> Tensor:
        bits = torch.randint(0, 2, tuple(shape), generator=self.generator, device=self.generator.device)
        return bits.to(like.device).mul_(2).sub_(1).to(like.dtype)
