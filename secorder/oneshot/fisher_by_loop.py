"""The Fisher by definition: the model and the loss on batches of one."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch.failures import is_out_of_memory
from .._torch.graph import least_precise
from .._torch.pytree import tensors_in
from .._torch.vjp import chunks, default_chunk_size, gradients
from ..errors import CouplingError, InvalidArgumentError, NonFiniteError, SecorderError
from ..layers.dtypes import rounding, zeros
from ..layers.selection import Layer
from ..monitor.progress import progress_bar
from ..results import Strategy
from .cotangents import pull_back
from .fisher_pairs import Asked, Found, collect, second_order_columns
from .loss import require_dependence
from .measurement import Measurement
from .output_hessian import filled, loss_of_output, output_points
from .recording import seen


def by_loop(task: Measurement, layers: Sequence[Layer], asked: Asked) -> Found:
    """By definition: the model and the loss on batches of one, for losses that cannot be cut into those of samples.

    That the batch's loss is made of theirs is checked by its gradient, which must be a combination of theirs, else
    :class:`CouplingError`.
    """
    replacements = [s for layer in layers for s in task.isolated.replacements(layer)]
    with seen(layers) as recording:
        _, whole = task.loss()
        if not whole.requires_grad:
            require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
        sketch = _Sketch(replacements, task.num_samples, least_precise([whole]))
        batch = sketch.of(filled(gradients(whole, replacements), replacements))
        recording.require_seen(whole)
    _require_invariance(task, replacements, sketch, batch)
    value, own, losses = whole.detach(), [], []
    del whole
    totals = [total for layer in layers for total in zeros(layer)]
    with progress_bar(task.progress, "Fisher by batches of one", task.num_samples, unit="samples") as advance:
        for n in range(task.num_samples):
            output, loss = _of_samples(task, [n])
            losses.append(loss.detach())
            g = filled(gradients(loss, replacements, create_graph=task.create_graph), replacements)
            own.append(sketch.of(g))
            for u, v in _columns(task, output, loss, n, replacements, asked) if asked.second_order else [(g, g)]:
                for index, total in enumerate(totals):
                    totals[index] = total + u[index].to(total).flatten() * v[index].to(total).flatten()
            advance(1)
    if not sketch.combines(batch, torch.stack(own)):
        every = torch.stack(losses)
        raise CouplingError(
            f"the loss of the batch ({value.item():.6g}) is not made of the losses of its samples taken alone (their "
            f"mean is {every.mean().item():.6g}, their sum {every.sum().item():.6g}), nor its gradient of theirs: "
            "samples are coupled, the loss holds tensors of the batch itself, or model or loss are random; call "
            "model.eval(), pass such tensors (and random numbers) in targets, or let the model return what loss_fn is "
            "to take the mean of. (A penalty of the weights goes with a mean of losses, not with a sum.)"
        )
    return collect(layers, totals, Strategy.LOOP, task.num_samples)


def _require_invariance(task: Measurement, replacements: list[Tensor], sketch: "_Sketch", batch: Tensor) -> None:
    """Raise if the loss, or its gradient, depends on the order of the samples: it holds what belongs to them."""
    if task.num_samples == 1:
        return
    _of_samples(task, [*range(task.num_samples), 0])  # what holds a number for each sample takes no other batch
    _, loss = _of_samples(task, [*range(1, task.num_samples), 0])
    exchanged = sketch.of(filled(gradients(loss, replacements), replacements))
    if not bool(((exchanged - batch).abs() <= sketch.rounding * batch.abs().amax()).all()):
        raise CouplingError(
            "the model and loss_fn do not treat the samples of a batch alike: in another order, inputs and targets "
            "together, the loss has another gradient. If the loss holds tensors of the batch itself (weights, a "
            "teacher's outputs), pass them in targets; if model or loss draw random numbers, call model.eval(), or "
            "pass such numbers in targets; hessian_diagonal takes the loss as it is."
        )


def _of_samples(task: Measurement, index: list[int]) -> tuple[Any, Tensor]:
    """Output and loss of a batch that holds these samples."""
    inputs, targets, leaves = task.part(index)
    try:
        with warnings.catch_warnings(), task.isolated.loss_holds(leaves):
            warnings.simplefilter("ignore")  # of a batch of one, such as that it has no standard deviation
            output = task.isolated.forward(inputs)
            loss: Tensor = task.loss_fn(output, targets).reshape(())
    except SecorderError:
        raise
    except Exception as error:
        which = _which(index)
        alone = isinstance(task.inputs, Tensor) and task.inputs.dim() == 1
        one = "; where the batch is one sample, pass inputs[None] and targets[None]" * alone
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise CouplingError(
            f"the model and loss_fn work on the batch and fail on {which} ({type(error).__name__}: "
            f"{str(error).strip()[:200]}): if the loss holds tensors of the batch itself, pass them in targets (also "
            "the inputs, where it differentiates by them), or let the model return what loss_fn is to take the mean "
            f"of; if one dimension of an input holds several rows a sample, give the samples one of their own{one}."
        ) from error
    if not bool(loss.detach().isfinite()):
        raise NonFiniteError(
            f"the loss of {_which(index)} is {loss.item()}, though that of the batch is finite: it divides by "
            "what only a batch has, so that there is no per-sample gradient; compute such statistics beforehand and "
            "pass them in targets."
        )
    return output, loss


def trials_of_loop(
    task: Measurement, layers: Sequence[Layer]
) -> tuple[Callable[[list[int]], None], Callable[[], None]]:
    """What :func:`by_loop` does with a batch of some samples, of which it makes many, and what it checks at the end.

    For the time that it takes, and the memory.
    """
    replacements = [s for layer in layers for s in task.isolated.replacements(layer)]
    sketch = _Sketch(replacements, task.num_samples, torch.float32)
    seeded = torch.Generator(device="cpu").manual_seed(0)

    def trial(index: list[int]) -> None:
        _, loss = _of_samples(task, index)
        g = filled(gradients(loss, replacements), replacements)
        sketch.of(g)
        for u in g:
            u.mul(u)

    def check() -> None:
        shape = task.num_samples, min(sketch.numel, sketch.size)
        own = torch.rand(shape, generator=seeded, dtype=torch.float64, device="cpu").to(replacements[0].device)
        sketch.combines(own.mean(0), torch.stack(list(own)))

    return trial, check


def _which(index: list[int]) -> str:
    return f"sample {index[0]} alone" if len(index) == 1 else f"another one of {len(index)} samples"


def _columns(
    task: Measurement, output: Any, loss: Tensor, index: int, replacements: list[Tensor], asked: Asked
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The pairs of gradients on the parameters that one sample contributes to a Fisher of second order."""
    if not loss.requires_grad:
        return
    _, targets, _ = task.part([index])
    found = loss_of_output(task.loss_fn, output, targets, None, loss)
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    if found is None or task.enters_model(
        found[0], [point for f, point in zip(outputs, found[1], strict=True) if f.dim() == 0]
    ):
        raise InvalidArgumentError(
            f"fisher_type={asked.fisher_type!r}, as of='ggn', needs a loss that loss_fn computes from the model's "
            "output: here it comes from inside the model (compute it from the logits), or the network is inside of the "
            "loss (leave a penalty of the weights out)."
        )
    again, points, _ = found
    pairs = second_order_columns(task, gradients(again, points, create_graph=True), points, asked)
    exposed = output_points(output, None)
    elements = sum(t.numel() for t in (*replacements, *exposed))
    for ids in chunks(pairs.num_columns, default_chunk_size(elements, exposed[0], task.chunk_size)):
        some = pairs.columns(ids)
        u = pull_back(exposed, replacements, some.u, task.create_graph)
        v = u if some.v is None else pull_back(exposed, replacements, some.v, task.create_graph)
        sign = [1.0] * len(ids) if some.sign is None else some.sign[:, 0].tolist()
        for k, factor in enumerate(sign):
            yield [u[id(s)][k] * factor for s in replacements], [v[id(s)][k] for s in replacements]


class _Sketch:
    """Gradients in a few random directions, enough to tell whether one is a combination of others."""

    def __init__(self, like: Sequence[Tensor], count: int, kind: torch.dtype) -> None:
        self.numel = sum(t.numel() for t in like)
        self.size = 2 * count + 8
        self.count = count
        generator = torch.Generator(device="cpu").manual_seed(0)
        self.signs = torch.randint(0, 2, (self.numel,), generator=generator, device="cpu") * 2 - 1
        self.rounding = rounding(kind)

    def of(self, gradient: Sequence[Tensor]) -> Tensor:
        """The gradient's components: all of them where they are few, else random sums of them."""
        flat = torch.cat([g.detach().flatten().double() for g in gradient]) * self.signs.to(gradient[0].device)
        if self.numel <= self.size:
            return flat
        padding = -self.numel % self.size
        return torch.nn.functional.pad(flat, (0, padding)).view(-1, self.size).sum(0)

    def combines(self, whole: Tensor, own: Tensor) -> bool:
        """Whether ``whole`` is the mean or sum of the rows of ``own``, or another combination without negative parts.

        The other is only told where there are more components than rows.
        """
        ones = own.new_ones(self.count)
        candidates = [ones / self.count, ones]
        if self.numel > self.count:
            scale = own.abs().amax(1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
            solved = torch.linalg.lstsq(
                (own / scale).T, whole[:, None], driver="gelsd" if own.device.type == "cpu" else None
            )
            candidates.append(solved.solution[:, 0] / scale[:, 0])
        for factors in candidates:
            size = (factors.abs()[:, None] * own.abs()).sum(0).amax()
            if bool((factors >= -self.rounding * factors.abs().amax()).all()) and bool(
                ((factors @ own - whole).abs() <= self.rounding * torch.maximum(size, whole.abs().amax())).all()
            ):
                return True
        return False
