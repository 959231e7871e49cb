"""One loop run twice, without a probe and with one: all that the user can see is the same bit for bit."""

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning

from ..helpers import seed

#: A training loop: what it yields is compared, with the random state and all of the model at that moment.
Loop = Callable[[nn.Module], Iterator[Any]]


def seen_of(model: nn.Module, yielded: Any) -> dict[str, Any]:
    """All that a user can see of a model, and the random state."""
    return {
        "yielded": frozen(yielded),
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "flags": [(p.requires_grad, p.is_leaf) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
        "python": random.getstate(),
    }


def frozen(tree: Any) -> Any:
    """The tensors of a structure as they are now."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, (list, tuple)):
        return [frozen(part) for part in tree]
    return {key: frozen(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def same(one: Any, other: Any) -> bool:
    """Whether two structures agree bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        bits = one.dtype == other.dtype and one.shape == other.shape and one.layout == other.layout
        if not bits or one.layout is not torch.strided:
            return bits and torch.equal(one.to_dense(), other.to_dense())
        return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def bit_for_bit(build: Callable[[], nn.Module], loop: Loop, **options: Any) -> CurvatureProbe:
    """Run a loop on a fresh model without a probe, and on one with a probe, which is returned.

    Warnings of the probe's are no errors here.
    """
    runs = []
    for attached in (False, True):
        seed()
        random.seed(0)
        model = build()
        if attached:
            probe = CurvatureProbe(model, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)
            runs.append([seen_of(model, yielded) for yielded in loop(model)])
    plain, probed = runs
    assert len(plain) == len(probed)
    for index, (one, other) in enumerate(zip(plain, probed, strict=True)):
        for key in one:
            assert same(one[key], other[key]), f"{key} differs at point {index} of the loop"
    return probe


def traces(model: nn.Module) -> dict[str, Any]:
    """What something that is attached to a model would show by: hooks, attributes, hooks on parameters."""
    return {
        "hooks": {
            name: {key: list(value) for key, value in vars(module).items() if "_hooks" in key and value}
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "parameters": {name: len(p._backward_hooks or ()) for name, p in model.named_parameters()},
    }
