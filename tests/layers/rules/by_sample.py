"""A rule against one backward a sample."""

import torch
from torch import Tensor, nn

from secorder.layers.per_sample import dense
from secorder.layers.rules import rule_for

from ...reference import gradient_by_sample


def assert_exact(module: nn.Module, *inputs: Tensor) -> None:
    """The entered rule's per-sample gradients of every parameter, for a random cotangent, are autograd's."""
    rule = rule_for(module)
    assert rule is not None
    g = torch.randn_like(module(*inputs))
    found = rule(module, inputs, g)
    for name, expected in gradient_by_sample(module, inputs, g).items():
        torch.testing.assert_close(dense(found[name], expected.shape[1]), expected, rtol=1e-10, atol=1e-12)
