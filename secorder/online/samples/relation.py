"""Where samples are in a layer's calls, as a relation between shapes that was verified and explains those of now.

A relation is learnt from a batch that can tell the candidates apart, and used only where it explains the shape of now.
The same shapes of the model's arguments with another number of rows mean rows that depend on data (routed tokens), for
which no relation of shapes holds.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import prod
from typing import NamedTuple

from ...layers.layout import Layout

Shape = tuple[int, ...]


class Verified(NamedTuple):
    """One output of a call whose samples were found, and the arguments of the model that it belongs to."""

    layout: Layout | None  #: where the samples are in it; None for an output of the model that has none, beside others
    place: int | str  #: of it among all that the layer's calls returned in one forward; for operations, the way to it
    shape: Shape  #: of the output
    arguments: tuple[Shape, ...]  #: shapes of the tensors among the model's arguments
    num_samples: int  #: of the batch


def explain(
    known: Sequence[Verified], place: int | str, shape: Shape, arguments: tuple[Shape, ...], num_samples: int
) -> Layout | None:
    """The layout of a call by what was verified before; None where that does not explain its shape, or not in one way.

    The place is that of the output among those of the layer's calls; shapes of the model's arguments are of tensors.
    Where a call with arguments of the same shapes was verified, it is one such that explains the shape; and no other
    may explain it in another way, as that of a forward of other operations.
    """
    if num_samples == 1:
        return whole_call(shape)
    known = [seen for seen in known if seen.place == place] or known  # or a layer that is called more often
    found = {seen: _explained(seen, shape, arguments, num_samples) for seen in known}
    alike = [layout for seen, layout in found.items() if seen.arguments == arguments]
    layouts = set(found.values()) - {None}
    return layouts.pop() if len(layouts) == 1 and (not alike or any(alike)) else None


def _explained(seen: Verified, shape: Shape, arguments: tuple[Shape, ...], num_samples: int) -> Layout | None:
    layout = seen.layout
    if layout is None or len(shape) != len(seen.shape) or len(shape) <= (dim := layout.dim):
        return None
    if arguments == seen.arguments:
        return layout if shape == seen.shape and num_samples == seen.num_samples else None
    if layout.rows == 1:
        return layout if shape[dim] == num_samples else None
    rows, rest = divmod(shape[dim], num_samples)
    if rest or rows not in _rows(layout.rows, seen.arguments, arguments):
        return None
    return layout._replace(rows=rows, sample_major=layout.sample_major or rows == 1)  # of one row, in either order


def whole_call(shape: Shape) -> Layout | None:
    """The layout of a call of a batch of one, all of whose rows are that sample's; None for a call without rows."""
    return Layout(0, shape[0]) if shape else None


def _rows(told: int, then: tuple[Shape, ...], arguments: tuple[Shape, ...]) -> Iterator[int]:
    """How many rows a sample may have: as many as before, or as the sizes tell that were behind the number before."""
    yield told
    for before, now in zip(then, arguments, strict=False):
        if len(before) == len(now):
            yield from (size for was, size in zip(_products(before), _products(now), strict=True) if was == told)


def _products(shape: Sequence[int]) -> Iterator[int]:
    """The sizes of a shape, and the products of two of them."""
    yield from shape
    yield from (prod(pair) for pair in combinations(shape, 2))
