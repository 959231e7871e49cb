"""Is a loss as those were that were looked at? Its last operations tell, at each step, in microseconds.

Of how many operations it is made, and what the last of them are, the host knows: one of another kind is looked at, too.
What it divides by, where that is a number of targets, the device knows: it goes on as at the looks.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from ..._torch.graph import Node, nodes_made, packed, saved, shape_of, signed
from ..._torch.loss_graph import made_by
from ..._torch.loss_terms import ARITHMETIC, MEAN, divides_by_tensor
from ..doubts import Doubts
from ..record import ForwardRecord

#: Operations that are looked at, at most.
MOST = 8

_UNEVEN = (
    "in some batches the loss was a mean over targets or terms of which some do not count (labels that are ignored, a "
    "mask), and may be more of one sample than of another; in those that were looked at it was not: pass reduction= "
    "with a function of the model's arguments that returns the weights c_n of L = Σ_n c_n ℓ_n, such as "
    "secorder.token_weights."
)

_ARITHMETIC = frozenset(f"{name}Backward0" for name in ARITHMETIC)
_OF_TARGETS = frozenset(("NllLossBackward0", "NllLoss2DBackward0"))


class Kind(NamedTuple):
    """How a loss ends."""

    key: tuple[Any, ...]  #: the same of all of one kind
    means: Sequence[tuple[Node, Tensor]]  #: the means over targets of classes that are not weighted, and the targets
    divisions: Sequence[tuple[Node, int]]  #: those of a sum, and of how many numbers it is

    def even(self) -> tuple[bool, ...]:
        """For each division, whether it is by how many numbers were added up, as a tensor has counted them."""
        return tuple(divides_by_tensor(node) and float(saved(node, "other")) == count for node, count in self.divisions)

    def expect(self, even: Sequence[bool], num_samples: int, doubts: Doubts) -> None:
        """What counts of this loss is to be as much of each sample, if it was so of one of its kind that was seen."""
        for node, target in self.means:
            if target.numel() == num_samples:
                doubts.expect(saved(node, "total_weight"), num_samples, _UNEVEN)
            else:
                kept = target != signed(saved(node, "ignore_index"))
                each = kept.view(num_samples, -1).sum(1), kept.view(-1, num_samples).sum(0)  # in either order
                doubts.expect((each[0] == each[0][0]).all() | (each[1] == each[1][0]).all(), 1, _UNEVEN)
        for (node, count), was_even in zip(self.divisions, even, strict=True):
            if was_even and not packed(node, "other"):
                doubts.expect(saved(node, "other") / count, 1, _UNEVEN)


def kind_of(record: ForwardRecord, ends: Sequence[Tensor], forwards: int) -> Kind:
    """The kind of a loss, behind so many forwards of which this is the latest."""
    key: list[Any] = [forwards, nodes_made() - record.ended]
    means, divisions = [], []
    last = [node for node in map(made_by, ends) if node is not None]
    for node in last:  # which grows
        name = node.name()
        key.append(name)
        if name in _ARITHMETIC:
            last.extend([x for x, _ in node.next_functions if x is not None and len(last) < MOST])
        if name == "MeanBackward0":
            key.append(prod(shape_of(*node.next_functions[0])) % record.num_samples)
        elif name in _OF_TARGETS:
            key.append(reduction := saved(node, "reduction"))
            if reduction == MEAN and not packed(node, "target"):
                target, alike = saved(node, "target"), saved(node, "weight") is None
                key += target.numel() % record.num_samples, alike
                if alike and not target.numel() % record.num_samples:
                    means.append((node, target))
        elif name == "DivBackward0":
            before = node.next_functions[0][0]
            if before is not None and before.name() == "SumBackward0":
                divisions.append((node, prod(shape_of(*before.next_functions[0]))))
        elif name not in _ARITHMETIC:
            key.append(getattr(node, "_saved_reduction", None))
    return Kind(tuple(key), means, divisions)
