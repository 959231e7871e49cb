"""One operation of a forward, with the gradient on what it returned."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..._torch.graph import Node, saved, shape_of
from ..dtypes import cast
from ..layout import Layout


class OperationCall:
    """An operation as its node of the autograd graph knows it, while a backward has come to it.

    There is no gradient on an output that the loss does not depend on.
    """

    def __init__(
        self, node: Node, gradients: Sequence[Tensor | None], layouts: Sequence[Layout], count: int, dtype: torch.dtype
    ) -> None:
        self.node = node
        self.gradients = [None if g is None else cast(g.detach(), dtype) for g in gradients]
        self.layouts = layouts
        self.count = count
        self.dtype = dtype
        #: What the rule of several inputs works out once.
        self.shared: dict[str, Any] = {}

    @property
    def g(self) -> Tensor:
        """The gradient on the first output."""
        g = self.gradients[0]
        assert g is not None
        return g

    @property
    def layout(self) -> Layout:
        """Where the samples are in the first output."""
        return self.layouts[0]

    def saved(self, name: str) -> Any:
        """What the operation has saved for its backward, in the dtype that is computed in."""
        found = saved(self.node, name)
        return cast(found, self.dtype) if isinstance(found, Tensor) else found

    def shape(self, index: int) -> tuple[int, ...]:
        """Of the operation's input."""
        return shape_of(*self.node.next_functions[index])

    @cached_property
    def rows(self) -> Tensor:
        """The gradient as factor of a product: shape ``(N, 1, positions, width)``, for samples in dim 0."""
        return self.as_rows(self.g)

    def as_rows(self, matrix: Tensor) -> Tensor:
        """Rows of samples as they are in the output: shape ``(N, 1, positions, width)``."""
        split = self.layout.split(matrix)
        return split.flatten(1, -2)[:, None] if split.dim() > 2 else split[:, None, None]

    def of_samples(self, values: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Values of the output's shape, summed to that of an input that was broadcast, by sample: ``(N, *shape)``.

        None where the input has a row for each row of the samples' dimension.
        """
        own = [1] * (values.dim() - len(shape)) + list(shape)
        dim, rows, _ = self.layout
        if own[dim] != 1:
            return None
        by_sample = self.layout.split(values)  # (N, [rows,] other dims)
        others = own[:dim] + own[dim + 1 :]
        lead = 2 if rows > 1 else 1
        summed = [1] if rows > 1 else []
        summed += [lead + i for i, size in enumerate(others) if size == 1 and by_sample.shape[lead + i] != 1]
        if summed:
            by_sample = by_sample.sum(summed)
        return by_sample.reshape(self.count, *shape)
