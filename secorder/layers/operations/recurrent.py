"""Recurrent layers that run as one operation.

Autograd tells no gradient on the gates, so that the time steps are gone through backwards once more, from the gates
that the operation keeps for its own backward (where that is so: else they are computed again, in one product from the
inputs and outputs of all steps). Each weight's per-sample gradient is then one product over time.

Source: Hochreiter, Schmidhuber (1997), "Long short-term memory"; with a forget gate, Gers, Schmidhuber, Cummins (2000).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._torch.recurrent import kept_gates
from ..layout import Layout
from ..per_sample import Outer, PerSample
from .call import OperationCall
from .registry import operation_rule

__all__ = ["lstm"]

#: What ``mode`` says of an LSTM.
LSTM = 2
#: What gates that are computed again may differ by from those that were kept: rounding. They lie between -1 and 1.
ROUNDING = 1e-4

#: By sizes: whether gates that were kept are where they are looked for. Learnt with the first call of these sizes.
MOST_SIZES = 1000
_kept: dict[tuple[int | bool, ...], bool] = {}


@operation_rule("MkldnnRnnLayerBackward0")
def lstm(call: OperationCall, index: int) -> PerSample | None:
    """One layer and direction of ``nn.LSTM`` on a CPU: of its weights and biases, inputs 1 to 4."""
    over_time = call.count == 1 or (call.layouts[0] == Layout(1) and set(call.layouts[1:]) == {Layout(0)})
    if index not in (1, 2, 3, 4) or call.saved("mode") != LSTM or not over_time:
        return None
    if "lstm" not in call.shared:
        call.shared["lstm"] = _factors(call)
    x, before, gates, summed = call.shared["lstm"]
    return Outer((x, before)[index - 1], gates) if index < 3 else Outer(None, summed)


def _factors(call: OperationCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What per-sample gradients are made of, by sample and step.

    Returns:
        the inputs; the outputs of the step before; the gradients on the gates before their activations; their sum over
        the steps.
    """
    x, h = call.saved("input"), call.saved("result0")
    g, last_h, last_c = call.gradients
    steps, count, width = h.shape
    if call.saved("reverse"):
        x, h, g = x.flip(0), h.flip(0), None if g is None else g.flip(0)
    first_h, first_c = (call.saved(name).reshape(count, width) for name in ("hx_", "cx_"))
    before = torch.cat([first_h.unsqueeze(0), h[:-1]])
    gates = _gates(call, x, before)
    by_cell, by_output, through = _derivatives(gates, first_c)
    found = h.new_empty(count, steps, 4, width)
    dc = torch.zeros_like(first_c) if last_c is None else last_c.reshape(count, width).clone()
    dh = torch.zeros_like(first_h) if last_h is None else last_h.reshape(count, width).clone()
    outside = [None] * steps if g is None else list(g.unbind(0))
    if outside[-1] is not None:
        dh += outside[-1]
    weight, forget, on_cells = call.saved("weight1"), gates[:, :, 1].unbind(0), dc.unsqueeze(1)
    of_cell, of_output, of_all = (part.unbind(1) for part in (found[:, :, :3], found[:, :, 3], found.flatten(2)))
    for t, (cell, output, on) in reversed(list(enumerate(zip(by_cell, by_output, through, strict=True)))):
        dc.addcmul_(dh, on)
        torch.mul(cell, on_cells, out=of_cell[t])
        torch.mul(output, dh, out=of_output[t])
        if t:
            dc *= forget[t]
            more = outside[t - 1]
            if more is None:
                torch.mm(of_all[t], weight, out=dh)
            else:
                torch.addmm(more, of_all[t], weight, out=dh)
    rows_of_gates = found.flatten(2).unsqueeze(1)
    x, before = (part.transpose(0, 1).contiguous().unsqueeze(1) for part in (x, before))
    return x, before, rows_of_gates, rows_of_gates.sum(2, keepdim=True)


def _gates(call: OperationCall, x: Tensor, before: Tensor) -> Tensor:
    """The four gates after their activations, shape ``(steps, N, 4, width)``: input, forget, cell, output."""
    steps, count, width = before.shape
    kept = kept_gates(call.node, steps, count, width)
    sizes = (*x.shape, width, call.saved("reverse"), call.saved("has_biases"), torch.get_num_threads())
    if kept is not None and _kept.get(sizes):
        return kept
    gates = torch.mm(x.flatten(0, 1), call.saved("weight0").t())
    gates.addmm_(before.flatten(0, 1), call.saved("weight1").t())
    if call.saved("has_biases"):
        gates += call.saved("weight2") + call.saved("weight3")
    gates = gates.view(steps, count, 4, width)
    gates[:, :, 2].tanh_()
    gates[:, :, :2].sigmoid_()
    gates[:, :, 3].sigmoid_()
    if kept is not None and sizes not in _kept:
        if len(_kept) >= MOST_SIZES:
            _kept.clear()
        _kept[sizes] = bool(((gates - kept).abs() <= ROUNDING).all())
    return gates


def _derivatives(gates: Tensor, first: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """What gradients on cells and outputs are multiplied by, from the gates and the first cell.

    Returns:
        by step, what the gradient on a cell brings to the three gates that make it; what that on an output brings to
        the last gate, and to the cell.
    """
    i, f, c, o = gates.unbind(2)
    steps = len(gates)
    cells = torch.empty(steps + 1, *first.shape, dtype=gates.dtype, device=gates.device)
    cells[0] = first
    rows = cells.unbind(0)
    for t, (fresh, forget) in enumerate(zip((i * c).unbind(0), f.unbind(0), strict=True)):
        torch.addcmul(fresh, forget, rows[t], out=rows[t + 1])
    squashed = cells[1:].tanh()
    by_cell = torch.empty_like(gates[:, :, :3], memory_format=torch.contiguous_format)
    sigmoid, tanh = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
    sigmoid.grad_input(c, i, grad_input=by_cell[:, :, 0])
    sigmoid.grad_input(cells[:-1], f, grad_input=by_cell[:, :, 1])
    tanh.grad_input(i, c, grad_input=by_cell[:, :, 2])
    return by_cell.unbind(0), sigmoid(squashed, o).unbind(0), tanh(o, squashed).unbind(0)
