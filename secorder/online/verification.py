"""Whether the probe is told the right reduction of the loss: one batch by hooks and one-shot, compared."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.modules import buffer_places, is_scripted, own_tensors, put_back
from .._torch.pytree import call_model
from .._torch.random_state import random_state_kept
from ..oneshot.isolation import gradients_put_aside
from ..oneshot.output_hessian import filled
from ..oneshot.state import State
from .attributions import Attributions
from .fisher import OnlineFisher
from .hooks import Attachment
from .losses.accumulation import fraction
from .losses.reduction import usable_scale
from .reading import diagonals, unreadable
from .troubles import sentence

#: Relative differences that are no rounding.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Verification:
    """What :meth:`secorder.CurvatureProbe.verify` found; true where reduction and scale are right.

    Attributes:
        agrees: whether the Fisher of training and the one-shot one agree.
        message: one sentence: that they are, or what to pass.
        ratios: by layer, the online Fisher over the one-shot one, by their traces; nan where one of them is not
            known.
        differing: by layer, why it differs.
    """

    agrees: bool
    message: str
    ratios: dict[str, float] = field(default_factory=dict)
    differing: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.agrees

    def __str__(self) -> str:
        return self.message


def verify(
    fisher: OnlineFisher,
    sample_dim: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    one_shot: Mapping[str, Tensor],
    num_samples: int,
) -> Verification:
    """See :meth:`secorder.CurvatureProbe.verify`; nothing is added to the Fisher whose settings are in question."""
    scale = _scale_of_training(fisher, loss_fn, inputs, targets)
    told = usable_scale(fisher.loss_scale)
    if scale is not None and abs(scale / told - 1) > TOLERANCE:
        cleared = ", or clear them where several passes of this batch have added them up" if scale > told else ""
        told_of = f"gradients are scaled by {fraction(scale)}: pass loss_scale={fraction(scale)}{cleared}."
        return Verification(False, told_of)
    if scale is None and fisher.accumulation.reason:
        return Verification(False, fisher.accumulation.reason)
    online, reasons = _online(fisher, sample_dim, loss_fn, inputs, targets)
    ratios = {name: _ratio(online.get(name), value) for name, value in one_shot.items()}
    known = [ratio for ratio in ratios.values() if ratio == ratio]
    for kind, factor in {"sum": num_samples**2, "mean": num_samples**-2}.items() if known and num_samples > 1 else ():
        if all(abs(ratio / factor - 1) < TOLERANCE for ratio in known):
            return Verification(False, f'your loss is a {kind}: pass reduction="{kind}".', ratios)
    differing = {
        name: reasons.get(name) or _difference(ratio)
        for name, ratio in ratios.items()
        if not abs(ratio - 1) < TOLERANCE
    }
    if not differing:
        agreed = "the online Fisher agrees with the one-shot one: reduction= and loss_scale= are right."
        return Verification(True, agreed, ratios)
    if known and len(known) == len(ratios) and max(known) / min(known) - 1 < TOLERANCE:
        message = (
            f"the online Fisher is {known[0]:.3g} times the one-shot one in every layer: the loss does not reduce "
            f"samples as specified; pass reduction= with a function of the model's arguments that returns the weights "
            f"c_n of L = Σ_n c_n ℓ_n."
        )
        return Verification(False, message, ratios, differing)
    by_reason = {reason: [name for name in differing if differing[name] == reason] for reason in differing.values()}
    told_of = "; ".join(sentence(names, reason.rstrip(".")) for reason, names in by_reason.items())
    return Verification(False, f"some layers differ ({told_of}).", ratios, differing)


def _ratio(online: Tensor | None, one_shot: Tensor) -> float:
    if online is None:
        return float("nan")
    found, expected = online.double(), one_shot.double()
    ratio = float(found.sum() / expected.sum()) if float(expected.sum()) else (1.0 if not float(found.sum()) else 1e30)
    error = float((found - ratio * expected).norm() / (ratio * expected).norm().clamp(min=1e-300))
    return ratio if error < TOLERANCE else float("nan")  # else not a matter of a factor


def _difference(ratio: float) -> str:
    if ratio == ratio:
        return f"the online Fisher is {ratio:.3g} times the one-shot one"
    return (
        "the online Fisher is not the one-shot one times a number, as where a loss weights samples (padding, classes): "
        "pass reduction= with a function of the model's arguments that returns the weights c_n of L = Σ_n c_n ℓ_n, "
        "such as secorder.token_weights"
    )


def _online(
    fisher: OnlineFisher, sample_dim: Any, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The Fisher of one training step on the batch, by hooks of its own, told as the probe is."""
    trial = fisher.fresh("diagonal")
    trial.returned = bool(trial.returned)  # as if the scale were given: whatever the loss is, numbers tell
    attachment = Attachment(fisher.model, trial, Attributions(fisher.model, sample_dim), 1)
    attachment.attach()
    try:
        with _state_kept(fisher.model, loss_fn), torch.enable_grad():
            (loss_fn(call_model(fisher.model, inputs), targets) * usable_scale(fisher.loss_scale)).backward()
    finally:
        attachment.detach()
    reasons = {**trial.troubles.left_out, **(untold := unreadable(trial))}
    return {} if len(untold) == len(trial.layers) else diagonals(trial, "skip"), reasons


def _scale_of_training(
    fisher: OnlineFisher, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> float | None:
    """What the gradients that training left in ``.grad`` are multiples of this batch's by; None where they are not."""
    parameters = [p for p in fisher.model.parameters() if p.grad is not None and not p.grad.is_sparse]
    if not parameters:
        return None
    left = torch.cat([p.grad.detach().flatten().double() for p in parameters if p.grad is not None])
    with _state_kept(fisher.model, loss_fn), torch.enable_grad():
        loss = loss_fn(call_model(fisher.model, inputs), targets)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    own = torch.cat([g.detach().flatten().double() for g in filled(found, parameters)])
    scale = float(left @ own / (own @ own).clamp(min=1e-300))
    if scale <= 0 or float((left - scale * own).norm()) > TOLERANCE * float(left.norm()):
        return None  # of another batch, or of several
    return scale


@contextmanager
def _state_kept(model: nn.Module, loss_fn: Any) -> Iterator[None]:
    """Inside, parameters have no gradient; those they had are put back, and what a step changes of the model's state.

    Its buffers, the random state, and what model and loss keep in Python objects.
    """
    modules = [m for m in model.modules() if not is_scripted(m)]
    buffers = [place for m in modules for place in buffer_places(m)]
    values = [place.value.detach().clone() for place in buffers]
    tensors = [t for m in modules for t in own_tensors(m)]
    states = State(modules, tensors), State([getattr(loss_fn, "__wrapped__", loss_fn)], [*modules, *tensors])
    with random_state_kept(model), gradients_put_aside(list(model.parameters())):
        try:
            yield
        finally:
            for state in states:
                state.restore()
            put_back(buffers)
            with torch.no_grad():
                for place, value in zip(buffers, values, strict=True):
                    place.value.copy_(value)
