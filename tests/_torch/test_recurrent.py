"""What an LSTM that runs as one operation keeps for its backward."""

import pytest
import torch
from torch import nn

from secorder._torch.graph import users_of
from secorder._torch.recurrent import kept_gates


@pytest.mark.parametrize("width", [2, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_gates_that_are_kept(width: int, reverse: bool) -> None:
    """A piece more where rows would fall on the same lines of a cache, as those of 64 do."""
    layer = nn.LSTM(4, width, bidirectional=reverse).float()
    x = torch.randn(5, 3, 4).float()
    out, _ = layer(x)
    nodes = [node for node in users_of([out]) if node.name() == "MkldnnRnnLayerBackward0"]
    node = next((node for node in nodes if node._saved_reverse is reverse), None)
    if node is None:
        pytest.skip("this PyTorch runs nn.LSTM in many operations")
    end = "_reverse" if reverse else ""
    weights = [getattr(layer, f"{name}_l0{end}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    h = out[..., width:] if reverse else out
    h = h.flip(0) if reverse else h
    x = x.flip(0) if reverse else x
    before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    gates = (x @ weights[0].t() + before @ weights[1].t() + weights[2] + weights[3]).unflatten(2, (4, width))
    i, f, c, o = gates.unbind(2)
    found = kept_gates(node, 5, 3, width)
    assert found is not None
    torch.testing.assert_close(found, torch.stack([i.sigmoid(), f.sigmoid(), c.tanh(), o.sigmoid()], 2))
