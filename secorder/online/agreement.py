"""Decisions that ranks with shards of the same parameters take together, so that no collective waits in vain.

A batch that one of them cannot record, or a layer's batch, is left out by all; and what one of them cannot tell, none
does: whoever reads on one rank goes on, or is told why not, as on all.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..parallel.all_reduce import largest
from ..parallel.ranks import ELSEWHERE, Ranks
from .fisher import OnlineFisher
from .record import ForwardRecord

if TYPE_CHECKING:
    import torch.distributed as dist


def share_troubles(fisher: OnlineFisher, group: "Ranks | dist.ProcessGroup | None") -> None:
    """Mark the layers that another rank of the group cannot tell."""
    marks = fisher.troubles.marks
    marks.update(fisher.marked())
    marked = fisher.failures.counts.new_tensor([layer.name in marks for layer in fisher.layers])
    own = torch.stack([fisher.failures.counts, marked]).clamp(max=1)
    found = (group.most(own) if isinstance(group, Ranks) else largest(own, group)).tolist()
    if not any(map(any, found)):
        return
    fisher.failures.counts.clamp_(min=fisher.failures.counts.new_tensor(found[0]))
    for layer, elsewhere in zip(fisher.layers, found[1], strict=True):
        if elsewhere:
            marks.setdefault(layer.name, ELSEWHERE)


def opened_together(
    fisher: OnlineFisher, ranks: Ranks, error: Exception | None, opened: Callable[[], ForwardRecord | None]
) -> ForwardRecord | None:
    """The record of this rank's part of a batch; None on all ranks where one of them has none.

    An error that this rank's verification ended in is raised when the others know.
    """
    record = None
    try:
        record = None if error is not None else opened()
    except Exception as raised:  # by a function of the user's, on this rank perhaps alone
        error = raised
    here = 0 if record is None else record.num_samples
    counted = here if record is None or record.counted is None else int(record.counted)
    together, weighed, missing = ranks.together([here, counted, record is None])
    if missing:
        share_troubles(fisher, ranks)
    if error is not None:
        raise error
    if missing or record is None:
        return None
    record.together, record.counted_together = round(together), round(weighed)
    return record


def leave_out_together(fisher: OnlineFisher, ranks: Ranks, record: ForwardRecord) -> None:
    """Leave a batch out of the layers that are troubled in it on any rank."""
    elsewhere = zip(fisher.sums, ranks.largest([record.layers[name].troubled for name in fisher.sums]), strict=True)
    names = [name for name, troubled in elsewhere if troubled and not record.layers[name].troubled]
    fisher.troubles.leave_out(record, names, ELSEWHERE)
