"""The Fisher by definition: the model and the loss on batches of one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.pytree import tensors_in
from .._torch.vjp import gradients, stacked_vjp
from ..batch import require_agreement
from ..errors import CouplingError, DoubleBackwardError, InvalidArgumentError
from ..layers.dtypes import zeros
from ..layers.selection import Layer, select_layers
from .fisher_task import Found, Task, collect, second_order_pairs
from .isolation import IsolatedModel, isolate
from .loss import check_loss, require_dependence
from .output_hessian import expose_output

__all__ = ["by_loop"]


def by_loop(task: Task, layers: Sequence[Layer], direct: bool) -> Found:
    """By definition: the model and the loss on batches of one, for outputs that cannot be cut into samples."""
    totals = [total for layer in layers for total in zeros(layer)]
    losses = []
    # All parameters are replaced: reentrant checkpoints run under .backward() only, which accumulates into each.
    everything = select_layers(task.model, "all", unchecked=True)
    with isolate(task.model, task.loss_fn, everything, create_graph=task.create_graph, direct=direct) as isolated:
        replacements = [isolated.replacement(p) for layer in layers for p in layer.parameters.values()]
        output = isolated.forward(task.inputs)
        require_agreement(output, task.targets, task.count, task.sample_dim)
        whole = check_loss(task.loss_fn(output, task.targets), isolated, task.inputs)
        isolated.require_replacements(whole)
        if not whole.requires_grad:
            require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
        for n in range(task.count):
            output = isolated.forward(task.cut(task.inputs, n))
            loss = task.loss_fn(output, task.cut(task.targets, n, rows=True)).reshape(())
            losses.append(loss.detach())
            for u, v in _one_sample(task, isolated, output, loss, n, replacements):
                for index, total in enumerate(totals):
                    totals[index] = total + u[index].to(total).flatten() * v[index].to(total).flatten()
    whole = whole.detach()
    mean, total_loss = torch.stack(losses).mean(), torch.stack(losses).sum()
    if not any(torch.allclose(whole, x, rtol=1024 * torch.finfo(whole.dtype).eps) for x in (mean, total_loss)):
        raise CouplingError(
            f"the loss of the batch ({whole.item():.6g}) is neither the mean nor the sum of the losses of its samples "
            f"taken alone ({mean.item():.6g}, {total_loss.item():.6g}): samples are coupled, or the model is random; "
            "call model.eval(), or pass a loss_fn that works on the model's output."
        )
    return collect(layers, totals, "loop")


def _one_sample(
    task: Task, isolated: IsolatedModel, output: Any, loss: Tensor, index: int, replacements: list[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The pairs of gradients on the parameters that one sample contributes."""
    if task.fisher_type == "empirical":
        g = _parameter_gradients(task, loss, replacements)
        return [(g, g)]
    points: list[Tensor] = []
    again = task.loss_fn(expose_output(output, points, None, detach=True), task.cut(task.targets, index, rows=True))
    model_outputs = [t for t in tensors_in(output) if t.requires_grad]
    output_gradients = gradients(again, points, create_graph=True) if again.requires_grad else [None] * len(points)
    if any(f.dim() == 0 and g is not None for f, g in zip(model_outputs, output_gradients, strict=True)) or (
        again.requires_grad and any(g is not None for g in gradients(again, replacements))
    ):
        raise InvalidArgumentError(
            f"fisher_type={task.fisher_type!r} needs a loss that is computed by loss_fn from the model's output: "
            "here it comes from inside the model."
        )
    pairs = second_order_pairs(task, output_gradients, points)
    sizes = [f.numel() for f in model_outputs]

    def pull_back(stack: Tensor) -> list[Tensor]:
        split = zip(stack[:, 0].split(sizes, 1), model_outputs, strict=True)
        return stacked_vjp(
            model_outputs, replacements, [c.reshape(-1, *f.shape) for c, f in split], create_graph=task.create_graph
        )

    u = pull_back(pairs.u)
    v = u if pairs.v is None and pairs.sign is None else pull_back(pairs.v if pairs.v is not None else pairs.u)
    factor = [1.0] * len(pairs.u) if pairs.sign is None else pairs.sign[:, 0].tolist()
    return [([x[k] * factor[k] for x in u], [x[k] for x in v]) for k in range(len(pairs.u))]


def _parameter_gradients(task: Task, loss: Tensor, replacements: list[Tensor]) -> list[Tensor]:
    try:
        found = gradients(loss, replacements, create_graph=task.create_graph)
    except (
        DoubleBackwardError
    ):  # reentrant checkpoints: .backward(), which reaches .grad, so on replacement parameters only
        if task.create_graph or any(isinstance(s, nn.Parameter) for s in replacements):
            raise
        loss.backward()
        found = [s.grad for s in replacements]
        for s in replacements:
            s.grad = None
    return [torch.zeros_like(s) if g is None else g for s, g in zip(replacements, found, strict=True)]
