"""Looks at batches as they are recorded, before a forward or at its end, and what is said of what they find."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._arguments import listed
from .._torch.modules import batch_normalisation
from .._torch.random_state import cuda_devices, random_state_kept, set_random_state
from ..errors import NonFiniteError, SecorderError
from ..layers.selection import Layer
from ..oneshot.recording import RecordingFailed
from .attributions import Attributions
from .fisher import OnlineFisher
from .layer_record import Start, as_it_started
from .losses.watching import watch_beside
from .record import ForwardRecord
from .samples.attribution import Attribution
from .samples.hypotheses import shapes_of
from .samples.linear_backward import NOT_LINEAR
from .samples.relation import Shape
from .samples.sample_dimension import LISTED
from .troubles import coupled, tell_normalised

if TYPE_CHECKING:
    from .hooks import Attachment


def look_before(
    fisher: OnlineFisher,
    attributions: Attributions,
    before: Attribution | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Attribution | None:
    """Look at this batch, and say what was found; None where it cannot be recorded."""
    try:
        found = attributions.verify(fisher.layers, args, kwargs, _reduction(fisher))
    except SecorderError:
        raise
    except Exception as error:  # the model's own, in a pass of ours: the user's forward has not run yet
        fisher.troubles.saw("verification failed")
        cause = error.__cause__ if isinstance(error, RecordingFailed) else error
        fisher.troubles.warn(
            f"a batch is left out, since running the model on it to see where samples are failed "
            f"({type(cause).__name__}: {cause}); the next one is verified instead."
        )
        return None
    if found.unclear:  # a batch that ends in nan tells nothing: it is left out, and the next one is looked at
        fisher.troubles.saw("not finite")
        if fisher.on_nonfinite == "raise":
            raise NonFiniteError(
                "the model's output holds nan or inf: check the inputs, lower the learning rate or the scale, or "
                'pass on_nonfinite="skip" to leave such batches out.'
            )
        for sums in fisher.sums.values():
            sums.batches += 1
        return None
    if found.undecided and found.provisional:
        fisher.troubles.saw("listed" if found.undecided == LISTED else "one sample")
        return None
    if found.undecided:
        return found
    shapes = shapes_of((args, kwargs))
    _warn_of(fisher, attributions, before, found, shapes)
    return attributions.known(shapes)


def look_again(attachment: "Attachment", start: Start) -> Attribution | None:
    """Another verification of the batch; None where other threads run the model."""
    model, fisher = attachment.model, attachment.fisher
    with attachment.alone() as alone, random_state_kept(model), as_it_started(model, start.state):
        set_random_state(start.state.random_state, cuda_devices(model))
        if not alone:
            return None
        return attachment.attributions.verify(fisher.layers, *start.arguments, _reduction(fisher))


def look_at_other_kind(
    attachment: "Attachment", record: ForwardRecord, start: Start, output: Any, untold: Sequence[Layer]
) -> Attribution | None:
    """Look at a batch whose forward is made of other operations than those of the batches that were looked at.

    Of layers that are ``untold`` nothing was taken for granted, and what other operations have told otherwise, such as
    where a checkpoint hides them, is no row that has moved.
    """
    fisher = attachment.fisher
    found = None if start.overwritten() else look_again(attachment, start)
    if found is None or found.unclear or found.undecided:
        return None
    untold = [*untold, *told_otherwise(record, found)]
    _warn_of(fisher, attachment.attributions, record.attribution, found, record.shapes, untold)
    if found.coupled and not found.normalised:
        fisher.troubles.mark(fisher.by_layer, coupled(fisher.troubles, found, record.shapes))
    watch_beside(fisher, output, found.coupling, found.unreduced)
    return found


def told_otherwise(record: ForwardRecord, found: Attribution) -> list[Layer]:
    """The layers that another look measures in another way than that by which a record was begun."""
    now = {layer.name: layer.strategy for layer in found.layers}
    return [x for x in record.attribution.layers if now.get(x.name, x.strategy) != x.strategy]


def _reduction(fisher: OnlineFisher) -> Any:
    """What a loss that the model returns is held against; None where that is not to be done."""
    return fisher.reduction if fisher.ranks is None and fisher.penalty is None else None


def _warn_of(
    fisher: OnlineFisher,
    attributions: Attributions,
    before: Attribution | None,
    found: Attribution,
    shapes: Sequence[Shape],
    untold: Sequence[Layer] = (),
) -> None:
    """Say what was found that is not as a user would expect: another dimension, coupled samples, moved rows, reruns."""
    if found.alternative is not None and not fisher.assumed:
        usual = next(dim for dim in found.dims if dim is not None)
        fisher.assumed = (
            f"dim {usual} of the model's arguments, of shapes {list(shapes)}, was taken to hold the samples, and dim "
            f"{found.alternative} would do as well: pass sample_dim={usual} or sample_dim={found.alternative}."
        )
    if found.normalised:
        names = [layer.name for layer in fisher.layers]
        tell_normalised(fisher.troubles, names, quantised=not batch_normalisation(fisher.model))
    if before is not None and not found.coupled:
        others = {layer.name for layer in untold}
        fisher.troubles.mark(
            [name for name in attributions.moved(before, found) if name not in others],
            "the rows of its output belong to other samples than they did at the previous verification batch, so "
            "that what was accumulated since then may be wrong (rows that depend on data): measure it with one-shot "
            "calls, or leave it out with layers=.",
        )
    if before is not None:
        fisher.troubles.mark(found.not_linear - before.not_linear, NOT_LINEAR)
    slow = [x.name for x in found.layers if x.measured_by == "rerun" and x.enclosing is not x.module]
    if slow:
        fisher.troubles.warn(
            f"the calls of layers {listed(slow)} do not determine their per-sample gradients (a row that all samples "
            "share, rows that depend on data, a parameter used outside of them, nothing trainable before them): a "
            "module that contains them runs once more a step. That is exact and slow; leave them out with layers= if "
            "it is too slow."
        )
