"""Recurrent layers that run as one operation.

Autograd tells no gradient on the gates, so that the time steps are gone through backwards once more: all gates are
computed again in one product, from the inputs and outputs of all steps, and each weight's per-sample gradient is then
one product over time.

Source: Hochreiter, Schmidhuber (1997), "Long short-term memory"; with a forget gate, Gers, Schmidhuber, Cummins (2000).
"""

import torch
from torch import Tensor

from ..layout import Layout
from ..per_sample import Outer, PerSample
from .call import OperationCall
from .registry import operation_rule

__all__ = ["lstm"]

#: What ``mode`` says of an LSTM.
LSTM = 2


@operation_rule("MkldnnRnnLayerBackward0")
def lstm(call: OperationCall, index: int) -> PerSample | None:
    """One layer and direction of ``nn.LSTM`` on a CPU: of its weights and biases, inputs 1 to 4."""
    over_time = call.count == 1 or (call.layouts[0] == Layout(1) and set(call.layouts[1:]) == {Layout(0)})
    if index not in (1, 2, 3, 4) or call.saved("mode") != LSTM or not over_time:
        return None
    if "lstm" not in call.shared:
        call.shared["lstm"] = _pre_activations(call)
    x, before, gates = call.shared["lstm"]
    return Outer((x, before, None, None)[index - 1], gates)


def _pre_activations(call: OperationCall) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, outputs of the step before, gradients on the gates before their activations; by sample and step."""
    x, h, weight = call.saved("input"), call.saved("result0"), call.saved("weight1")
    g, last_h, last_c = call.gradients
    steps, count, width = h.shape
    if call.saved("reverse"):
        x, h, g = x.flip(0), h.flip(0), None if g is None else g.flip(0)
    h0, c0 = (call.saved(name).reshape(1, count, width) for name in ("hx_", "cx_"))
    before = torch.cat([h0, h[:-1]])
    gates = torch.mm(x.flatten(0, 1), call.saved("weight0").t()).addmm_(before.flatten(0, 1), weight.t())
    if call.saved("has_biases"):
        gates += call.saved("weight2") + call.saved("weight3")
    gates = gates.view(steps, count, 4, width)
    cell = gates[:, :, 2].tanh_()
    gates[:, :, :2].sigmoid_()
    gates[:, :, 3].sigmoid_()
    i, f, o = gates[:, :, 0], gates[:, :, 1], gates[:, :, 3]
    cells = torch.empty(steps + 1, count, width, dtype=h.dtype, device=h.device)
    cells[0] = c0[0]
    fresh = i * cell
    for t in range(steps):
        torch.addcmul(fresh[t], f[t], cells[t], out=cells[t + 1])
    squashed = cells[1:].tanh()
    # What the gradient on a cell, for the last gate that on the output, is multiplied by: by the gates' derivatives.
    factors = torch.empty_like(gates)
    torch.mul(fresh, 1 - i, out=factors[:, :, 0])
    torch.mul(cells[:-1] * f, 1 - f, out=factors[:, :, 1])
    torch.mul(i, 1 - cell * cell, out=factors[:, :, 2])
    torch.mul(squashed * o, 1 - o, out=factors[:, :, 3])
    through = o * (1 - squashed * squashed)
    dc = torch.zeros_like(c0[0]) if last_c is None else last_c.reshape(count, width)
    dh = torch.zeros_like(c0[0]) if last_h is None else last_h.reshape(count, width)
    if g is not None:
        dh = dh + g[-1]
    found = torch.empty_like(factors)
    for t in reversed(range(steps)):
        dc = torch.addcmul(dc, dh, through[t])
        torch.mul(factors[t, :, :3], dc.unsqueeze(1), out=found[t, :, :3])
        torch.mul(factors[t, :, 3], dh, out=found[t, :, 3])
        if t:
            dc = dc * f[t]
            flat = found[t].flatten(1)
            dh = torch.mm(flat, weight) if g is None else torch.addmm(g[t - 1], flat, weight)
    return tuple(part.transpose(0, 1).unsqueeze(1) for part in (x, before, found.flatten(2)))  # type: ignore[return-value]
