"""Recurrent layers that run as one operation.

Autograd tells no gradient on the gates, so that the time steps are gone through backwards once more, from the gates
that the operation keeps for its own backward (where that is so: else they are computed again, in one product from the
inputs and outputs of all steps). Each weight's per-sample gradient is then one product over time. A step is a few
small operations, so that layers and directions of one shape take it together, when the gradients on all have come.

Source: Hochreiter, Schmidhuber (1997), "Long short-term memory"; with a forget gate, Gers, Schmidhuber, Cummins (2000).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.graph import saved
from ..._torch.recurrent import kept_gates
from ..layout import Layout
from ..per_sample import Outer, PerSample
from .call import OperationCall
from .registry import TOGETHER, Together, operation_rule

#: What ``mode`` says of an LSTM.
LSTM = 2
#: What gates that are computed again may differ by from those that were kept: rounding. They lie between -1 and 1.
ROUNDING = 1e-4
#: What outputs are divided by where the last gate is zero, as they are then.
TINY = torch.finfo(torch.float32).tiny
#: Elements of gates up to which layers take their steps together: of more, the operations cost more than their calls.
SMALL_ELEMENTS = 1 << 21

#: By sizes: whether gates that were kept are where they are looked for. Learnt with the first call of these sizes.
MOST_SIZES = 1000
_kept: dict[tuple[int | bool, ...], bool] = {}


class Pass(NamedTuple):
    """One layer and direction of ``nn.LSTM``, time steps in the order in which they were gone through."""

    x: Tensor  #: inputs, shape ``(N, steps, in)``
    before: Tensor  #: outputs of the step before, shape ``(N, steps, width)``
    outputs: Tensor | None  #: shape ``(steps, N, width)``; None where they are rounded to fewer digits
    gates: Tensor  #: after their activations, shape ``(steps, N, 4, width)``: input, forget, cell, output
    cell: Tensor  #: the first, shape ``(N, width)``
    weight: Tensor  #: on the outputs of the step before, shape ``(4 · width, width)``, as it was in this backward
    outside: Tensor | None  #: the gradient on the outputs, shape ``(steps, N, width)``
    last_h: Tensor | None  #: that on the last output
    last_c: Tensor | None  #: that on the last cell
    inputs: tuple[int, ...]  #: those of the operation that are asked for


@operation_rule("MkldnnRnnLayerBackward0")
def lstm(call: OperationCall, index: int) -> PerSample | None:
    """One layer and direction of ``nn.LSTM`` on a CPU: of its weights and biases, inputs 1 to 4."""
    if not _known(call, (index,)):
        return None
    if "lstm" not in call.shared:
        call.shared["lstm"] = {i: part for _, i, part in _gone_through([_pass(call, (1, 2, 3, 4))])}
    found: PerSample = call.shared["lstm"][index]
    return found


def _kept_of(call: OperationCall, targets: Mapping[int, str]) -> Pass | None:
    steps, count, width = call.saved("result0").shape
    if not _known(call, tuple(targets)) or 4 * steps * count * width > SMALL_ELEMENTS:
        return None
    one = _pass(call, tuple(targets))
    return one._replace(weight=one.weight.clone())  # which an optimizer may change before the other layers' turn


def _shaped_alike(one: Pass) -> object:
    return one.gates.shape, one.gates.dtype


def _known(call: OperationCall, inputs: tuple[int, ...]) -> bool:
    """Whether these are weights and biases of an LSTM whose samples are where they are in one that is batched."""
    if not set(inputs) <= {1, 2, 3, 4} or call.saved("mode") != LSTM or call.saved("result0").shape[1] != call.count:
        return False
    return call.count == 1 or (call.layouts[0] == Layout(1) and set(call.layouts[1:]) == {Layout(0)})


def _pass(call: OperationCall, inputs: tuple[int, ...]) -> Pass:
    x, h = call.saved("input"), call.saved("result0")
    outside, last_h, last_c = call.gradients
    if call.saved("reverse"):
        x, h, outside = x.flip(0), h.flip(0), None if outside is None else outside.flip(0)
    steps, count, width = h.shape
    first_h, cell = (call.saved(name).reshape(count, width) for name in ("hx_", "cx_"))
    before = h.new_empty(count, steps, width)
    before[:, 0] = first_h
    before[:, 1:] = h[:-1].transpose(0, 1)
    gates = _gates(call, x, before)
    ends = [None if g is None else g.reshape(count, width) for g in (last_h, last_c)]
    outputs = h if saved(call.node, "result0").dtype is torch.float32 else None
    x, weight = x.transpose(0, 1), call.saved("weight1")
    return Pass(x, before, outputs, gates, cell, weight, outside, ends[0], ends[1], inputs)


def _gone_through(passes: Sequence[Pass]) -> Iterator[tuple[int, int, PerSample]]:
    """The per-sample gradients of passes of one shape: the number of the pass, and of the operation's input."""
    for number, (one, gates) in enumerate(zip(passes, _gradients_on_gates(passes), strict=True)):
        rows = gates.unsqueeze(1)
        summed = rows.sum(2, keepdim=True) if {3, 4} & set(one.inputs) else rows
        parts = (Outer(one.x.unsqueeze(1), rows), Outer(one.before.unsqueeze(1), rows), *[Outer(None, summed)] * 2)
        for index in one.inputs:
            yield number, index, parts[index - 1]


TOGETHER["MkldnnRnnLayerBackward0"] = Together(_kept_of, _shaped_alike, _gone_through)


def _gradients_on_gates(passes: Sequence[Pass]) -> Tensor:
    """The gradients on the gates before their activations, of each pass: shape ``(passes, N, steps, 4 · width)``."""
    steps, count, _, width = passes[0].gates.shape
    found = passes[0].cell.new_empty(len(passes), count, steps, 4, width)
    forget, through = _derivatives(passes, found)
    weights = torch.stack([one.weight for one in passes])
    dh = torch.stack([_or_zeros(one.last_h, one.cell) for one in passes])
    dc = torch.stack([_or_zeros(one.last_c, one.cell) for one in passes])
    outside = torch.stack([_or_zeros(one.outside, one.gates[:, :, 0]) for one in passes], 1).unbind(0)
    dh += outside[-1]
    of_cells, of_output = found[:, :, :, :3].unbind(2), found[:, :, :, 3].unbind(2)
    of_gates, dc_each = found.flatten(3), dc.unsqueeze(2)
    rows = of_gates.unbind(2)
    for t in range(steps - 1, -1, -1):
        dc.addcmul_(dh, through[t])
        of_cells[t].mul_(dc_each)
        of_output[t].mul_(dh)
        if t:
            dc *= forget[t]
            torch.baddbmm(outside[t - 1], rows[t], weights, out=dh)
    return of_gates


def _or_zeros(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if g is None else g


def _gates(call: OperationCall, x: Tensor, before: Tensor) -> Tensor:
    """The four gates after their activations, shape ``(steps, N, 4, width)``: input, forget, cell, output."""
    count, steps, width = before.shape
    kept = kept_gates(call.node, steps, count, width)
    sizes = (*x.shape, width, call.saved("reverse"), call.saved("has_biases"), torch.get_num_threads())
    if kept is not None and _kept.get(sizes):
        return kept
    gates = torch.mm(x.flatten(0, 1), call.saved("weight0").t())
    gates.addmm_(before.transpose(0, 1).flatten(0, 1), call.saved("weight1").t())
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


def _derivatives(passes: Sequence[Pass], found: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What gradients on cells and outputs are multiplied by, from the gates and the first cell.

    By step, shape ``(passes, N, width)``: what the gradient on the cells brings to those before, and what that on the
    outputs brings to the cells. To ``found``, shape ``(passes, N, steps, 4, width)``, is written what the gradient on
    the cells brings to the three gates that make them, and that on the outputs to the last.
    """
    steps, count, _, width = passes[0].gates.shape
    shape = (steps, len(passes), count, width)
    like = passes[0].cell
    forget, through = like.new_empty(shape), like.new_empty(shape)
    cells = like.new_empty(steps + 1, *shape[1:])
    torch.stack([one.cell for one in passes], out=cells[0])
    every = [one.gates.unbind(2) for one in passes]
    for k, (i, f, c, _) in enumerate(every):
        torch.mul(i, c, out=cells[1:, k])
        forget[:, k] = f
    rows, by_step = cells.unbind(0), forget.unbind(0)
    for t in range(steps):
        rows[t + 1].addcmul_(by_step[t], rows[t])
    sigmoid, tanh = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
    for k, (one, (i, f, c, o)) in enumerate(zip(passes, every, strict=True)):
        squashed = through[:, k]  # the cells' tanh, which an output is the last gate's multiple of
        if one.outputs is None:
            torch.tanh(cells[1:, k], out=squashed)
        else:
            torch.div(one.outputs, torch.clamp(o, min=TINY, out=squashed), out=squashed)
        to_i, to_f, to_c, to_o = found[k].transpose(0, 1).unbind(2)
        sigmoid.grad_input(c, i, grad_input=to_i)
        sigmoid.grad_input(cells[:-1, k], f, grad_input=to_f)
        tanh.grad_input(i, c, grad_input=to_c)
        sigmoid.grad_input(squashed, o, grad_input=to_o)
        tanh.grad_input(o, squashed, grad_input=squashed)
    return by_step, through.unbind(0)
