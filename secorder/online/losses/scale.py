"""What training multiplies a loss by that the model returns, or by a scaler: seen in verification batches.

Where all of the gradient comes through the loss, what comes to it is the number that it was multiplied by. Outputs that
the loss is computed from get no other gradient then than the loss's.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from math import isfinite
from typing import Any

from torch import Tensor

from ..._torch.compile import never_compiled
from ..._torch.grad_scaler import multiplied_by_scaler
from ..._torch.graph import users_of
from ..._torch.loss_graph import Place
from ..._torch.pytree import tensors_in
from ..._torch.surroundings import inside_transform
from ..changed_gradients import gave
from ..fisher import OnlineFisher
from ..record import ForwardRecord
from ..troubles import Troubles
from .accumulation import TOLERANCE, fraction


def _by_whole_number(scale: float) -> bool:
    """Micro-batches and scalers have such scales; another one, such as of a weighted term, is the loss's own affair."""
    number = max(scale, 1 / scale) if scale and isfinite(scale) else 1.0
    return number > 1.5 and abs(number / round(number) - 1) < 1e-3


def watch_scale(fisher: OnlineFisher, record: ForwardRecord, output: Any) -> None:
    """See what gradients come to the scalars that the model has returned, where nothing is told of the loss's scale.

    Of a verification batch, with several samples: of one sample, a scalar may be anything.
    """
    if fisher.returned is not None or record.num_samples < 2 or record.weights is not None:
        return
    ends = [t for t in tensors_in(output) if t.grad_fn is not None]
    losses = [t for t in ends if not t.dim()]
    users = users_of(losses) if len(losses) < len(ends) else {}
    for tensor in ends if losses else ():
        through: list[Tensor] = []
        for user, index in users.get(tensor.grad_fn, ()) if tensor.dim() else ():
            if user.next_functions[index][1] == tensor.output_nr:
                user.register_hook(partial(gave, through, index))
        tensor.register_hook(partial(_came, fisher.troubles, record.scales, through))


@never_compiled
def _came(troubles: Troubles, scales: list[float | None], through: list[Tensor], gradient: Tensor) -> None:
    """A gradient has come to an output."""
    if not inside_transform() and gradient.numel():
        troubles.guarded(None, (), _see, scales, through, gradient)


def _see(scales: list[float | None], through: list[Tensor], gradient: Tensor) -> None:
    """Of a loss, its scale; of another output, whether more than the loss brings."""
    if not gradient.dim():
        scales.append(abs(float(gradient)))
        return
    rest = gradient.detach() - sum(through)
    through.clear()
    if rest.abs().max() > TOLERANCE * gradient.abs().max():
        scales.append(None)


def tell_scale(fisher: OnlineFisher, scales: Sequence[float | None]) -> None:
    """Mark all layers where the loss of the one forward of a backward is multiplied, or divided, by a whole number."""
    first = scales[0]
    if first is not None and scales.count(first) == len(scales) and _by_whole_number(first):
        fisher.troubles.mark(
            fisher.sums,
            f"the loss that the model returns is multiplied by {fraction(first)} before backward, and loss_scale= is "
            'not specified: pass loss_scale="returned" where that is no part of the loss (micro-batches whose '
            "gradients are accumulated, a GradScaler), or loss_scale=1 where it is.",
        )


def tell_scaler(fisher: OnlineFisher, roots: Iterable[Place]) -> None:
    """Mark all layers where a ``GradScaler`` has multiplied the loss, of whose scale nothing is specified."""
    if any(multiplied_by_scaler(node) for node, _ in roots):
        fisher.troubles.mark(
            fisher.sums,
            "a GradScaler multiplies the loss before backward, and loss_scale= does not say so: pass the scaler as "
            "loss_scale=.",
        )
