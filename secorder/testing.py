"""Hold a layer's rule against brute force before trusting it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import require_number, shown
from .errors import InvalidTypeError, RuleError
from .layers.contraction import contract
from .layers.layout import DIM_ZERO
from .layers.per_sample import Rule, dense, stacked_gradients
from .layers.rules import rule_for

__all__ = ["check_rule"]


def check_rule(module: nn.Module, *inputs: Tensor, rule: Rule | None = None, tolerance: float = 1e-9) -> None:
    """Check a layer type's rule: that it is exact for one module and one batch of inputs.

    In float64, on a copy of the module, for random cotangents g on its output z:

    - each sample's gradient ``J_nᵀ g_n`` of every parameter is what autograd gives for a cotangent that is g_n on the
      sample and zero elsewhere;
    - the contraction ``Σ_n (J_nᵀ u_n) ⊙ (J_nᵀ v_n)`` is the sum of products of such gradients;
    - the same holds for several cotangents at once, which the library batches with ``torch.vmap``;
    - z is linear in the parameters, which curvature in the coordinates of z rests on.

    Args:
        module: a layer with parameters.
        inputs: the tensors that it is called with, N ≥ 2 samples in dim 0; of integers where it takes indices.
        rule: the rule; by default the one that is entered for the module in ``secorder.layers.rules``.
        tolerance: largest difference allowed, relative to the largest entry.

    Raises:
        InvalidTypeError: the module is none, an input is no tensor, or the tolerance no number.
        RuleError: the rule is wrong; says for which parameter and by how much.

    Example:
        >>> import torch
        >>> from secorder.testing import check_rule
        >>> check_rule(torch.nn.Conv2d(2, 4, 3, groups=2), torch.randn(3, 2, 5, 5))
    """
    if not isinstance(module, nn.Module):
        raise InvalidTypeError(f"module must be a torch.nn.Module, got {shown(module)}.")
    if not all(isinstance(x, Tensor) for x in inputs):
        raise InvalidTypeError("inputs must be tensors, those that the module is called with.")
    require_number("tolerance", tolerance, zero=True)
    rule = rule or rule_for(module)
    if rule is None:
        kind = type(module).__name__
        raise RuleError(f"no rule is entered for {kind}: decorate one with @rule_of({kind}).")
    if not inputs or any(x.dim() == 0 or len(x) < 2 for x in inputs):
        raise RuleError("a rule is checked on at least two samples: pass input tensors with samples in dim 0.")
    module = copy.deepcopy(module).double()
    inputs = tuple(x.detach().double() if x.is_floating_point() else x for x in inputs)
    parameters = dict(module.named_parameters(recurse=False))
    for p in parameters.values():
        p.requires_grad_(True)
    z = module(*inputs)
    stack = torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    expected = [_by_autograd(z, list(parameters.values()), g) for g in stack]
    with torch.no_grad():
        single = rule(module, inputs, stack[0])
        missing = set(parameters) - set(single)
        if missing:
            raise RuleError(f"the rule returns nothing for the parameters {sorted(missing)}.")
        stacked = stacked_gradients(rule, module, [inputs], [stack], [DIM_ZERO])
        for index, (name, parameter) in enumerate(parameters.items()):
            first, second = expected[0][index], expected[1][index]
            by_sample = dense(single[name], parameter.numel()).view(-1, *parameter.shape)
            _compare(f"per-sample gradient of {name!r}", by_sample, first, tolerance)
            found = contract(stacked[name], numel=parameter.numel()).view_as(parameter)
            wanted = (first**2).sum(0) + (second**2).sum(0)
            _compare(f"contraction of {name!r} over two cotangents", found, wanted, tolerance)
    _require_linear(module, inputs, z.detach(), tolerance)


def _by_autograd(z: Tensor, parameters: list[nn.Parameter], g: Tensor) -> list[Tensor]:
    """One backward a sample: for each parameter, shape ``(N, *parameter.shape)``."""
    rows = []
    for n in range(len(z)):
        alone = torch.zeros_like(g)
        alone[n] = g[n]
        found = torch.autograd.grad(z, parameters, alone, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if x is None else x for p, x in zip(parameters, found, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _require_linear(module: nn.Module, inputs: Any, z: Tensor, tolerance: float) -> None:
    """z(θ + δ) + z(θ − δ) = 2 z(θ) for a random δ of θ's size."""
    generator = torch.Generator().manual_seed(1)
    original = [p.detach().clone() for p in module.parameters()]
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in original]
    moved = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, start, step in zip(module.parameters(), original, steps, strict=True):
                p.copy_(start + sign * step)
            moved.append(module(*inputs))
    try:
        _compare("output, moved along the parameters,", (moved[0] + moved[1]) / 2, z, tolerance)
    except RuleError as error:
        raise RuleError(
            f"{type(module).__name__} is not linear in its parameters ({error}): leave it without a rule; it is "
            "measured all the same, by its operations or its module."
        ) from error


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise RuleError(f"the {what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}.")
    error = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-300)
    if not error <= tolerance:
        raise RuleError(f"the {what} is off by {error:.1e} of its largest entry.")
