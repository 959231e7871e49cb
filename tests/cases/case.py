"""What a case is, and what many of them are built of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secorder import AttributionError, CouplingError

N = 4


@dataclass(frozen=True, eq=False)
class Case:
    """One model with its data.

    Attributes:
        name: what it shows.
        make: builds ``(model, loss_fn, inputs, targets)``.
        refused: measurement → the error it must raise (``"hessian"``, ``"fisher"``, ``"online"``).
        skip: measurement → why there is nothing to compare with.
        options: arguments of the probe.
        by_slices: per-sample losses are those of slices of the batch's output (random models: same draws).
        count: number of samples.
        ill_conditioned: in float32, brute force itself is off by more than 1e-4.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Any, Any, Any]]
    refused: dict[str, type[Exception]] = field(default_factory=dict)
    skip: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    by_slices: bool = False
    count: int = N
    ill_conditioned: bool = False

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []
Builder = Callable[..., Any]


def case(name: str = "", *arguments: Any, **options: Any) -> Callable[[Builder], Builder]:
    """Enter the decorated builder by its file's name and its own, or by ``name`` instead, called with the arguments."""

    def enter(make: Builder) -> Builder:
        prefix = make.__module__.rpartition(".")[2]
        CASES.append(Case(f"{prefix}/{name or make.__name__}", partial(make, *arguments), **options))
        return make

    return enter


def classes(outputs: int = 3, *extra: int) -> Tensor:
    return torch.randint(outputs, (N, *extra))


def settled(norm: nn.Module) -> nn.Module:
    """Running statistics that are not the initial ones, eval mode."""
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return norm.eval()


PASSIVE_REFUSES = {"online": AttributionError}
COUPLED = {"fisher": CouplingError, "online": CouplingError}
STRICT = {"strict": True}
