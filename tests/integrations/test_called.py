"""Which modules a training step calls."""

import torch
from torch import nn

from secorder.integrations.called import Called

from ..helpers import Net


def test_the_outermost_modules_and_no_trace() -> None:
    model = Net(lambda self, x: self.head(self.body(x)), body=nn.Sequential(nn.Linear(2, 2)), head=nn.Linear(2, 2))
    x = torch.randn(1, 2)
    with Called(model) as called:
        model.head(model.body(x))
        model.head(x)
    assert called.names == ["body", "head"]
    with Called(model) as called:
        model(x)
    assert called.names == [""]
    with Called(model.eval()) as called:
        model(x)
    assert called.names == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
