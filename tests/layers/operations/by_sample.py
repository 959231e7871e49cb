"""What an operation's inputs get of each sample, against one backward a sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from secorder._torch.graph import outputs_of
from secorder.layers.layout import DIM_ZERO, Layout
from secorder.layers.operations import OPERATIONS, OperationCall, per_sample_gradient
from secorder.layers.per_sample import dense


def assert_exact(
    function: Callable[..., Tensor], *inputs: Tensor, layout: Layout = DIM_ZERO, index: int = 1, ruled: bool = True
) -> None:
    """The per-sample gradient of an input of the operation that ``function`` is, for a random gradient on its output.

    Args:
        function: one operation.
        inputs: of it.
        layout: where samples are in the output.
        index: of the input.
        ruled: whether a rule is to serve it.
    """
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    z = function(*leaves)
    g = torch.randn_like(z)
    count = layout.size(z)
    call = OperationCall(z.grad_fn, [g], [layout], count, g.dtype)
    assert len(outputs_of(z.grad_fn)) == 1
    leaf = z.grad_fn.next_functions[index][0].variable
    expected = []
    for sample in range(count):
        alone = torch.zeros_like(layout.split(g))
        alone[sample] = layout.split(g)[sample]
        expected += torch.autograd.grad(z, leaf, layout.join(alone), retain_graph=True)
    rule = OPERATIONS.get(z.grad_fn.name())
    assert (rule is not None and rule(call, index) is not None) == ruled
    found = dense(per_sample_gradient(call, index), leaf.numel()).reshape(count, *leaf.shape)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)
