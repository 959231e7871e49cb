"""Windows: what training brought between two looks, by itself.

There is one set of accumulators, and a step adds to nothing else. A look takes them out and puts empty ones in their
place. What was taken out is put together with what was accumulated before, in the host's memory, or forgotten where
nobody wants the mean over the whole run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..results import Diagonals
from .fisher import ADDING, OnlineFisher
from .reading import diagonals, untold
from .sums import LayerSums, Stretch, put_aside, together

__all__ = ["Window", "take_window"]


@dataclass(frozen=True)
class Window:
    """What a probe accumulated from one look to the next; returned by :meth:`secorder.CurvatureProbe.window`.

    Attributes:
        num_samples: that it holds, of all ranks where it was synchronised.

    Example:
        >>> import torch
        >>> from secorder import CurvatureProbe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> probe = CurvatureProbe(model, reduction="mean")
        >>> for _ in range(2):
        ...     model(torch.randn(8, 4)).square().sum(1).mean().backward()
        ...     window = probe.window()
        >>> window.num_samples, probe.num_samples
        (8, 16)
        >>> window.fisher_diagonal()["0"].shape
        torch.Size([10])
    """

    num_samples: int
    _fisher: OnlineFisher = field(repr=False)
    _sums: Mapping[str, LayerSums] = field(repr=False)
    _untold: Mapping[str, str] = field(repr=False)

    def fisher_diagonal(self, *, missing: Literal["raise", "skip"] = "raise") -> Diagonals:
        """The empirical Fisher diagonal per layer of the window's samples, their mean or moving average.

        Args:
            missing: what to do where a layer's number cannot be told: ``"raise"``, or ``"skip"`` to return the others.

        Returns:
            layer name → 1-D tensor (weight flattened, then bias), as of
            :meth:`~secorder.CurvatureProbe.fisher_diagonal`.

        Raises:
            ProbeStateError: no sample was recorded in the window.
            AttributionError: a layer's gradient could not be attributed to samples while training.
        """
        return diagonals(self._fisher, missing, self._sums, self._untold)


def take_window(fisher: OnlineFisher, *, keep_total: bool) -> Window:
    """See :meth:`secorder.CurvatureProbe.window`."""
    with ADDING:
        troubles = untold(fisher)
        taken = Stretch(fisher.sums, fisher.seen, fisher.elsewhere, fisher.batches)
        fisher.renew()
    if keep_total:
        fisher.earlier = _joined(fisher.earlier, taken, fisher.decay)
    else:
        fisher.earlier = None
    return Window(round(float(taken.seen) + taken.elsewhere), fisher, taken.sums, troubles)


def _joined(earlier: Stretch | None, taken: Stretch, decay: float | None) -> Stretch:
    """What was accumulated before the window, and in it, in the host's memory."""
    taken = put_aside(taken)
    if earlier is None:
        return taken
    for name, sums in taken.sums.items():  # one layer after the other, so that no third copy is ever whole
        earlier.sums[name] = together(earlier.sums[name], sums, decay)
    seen, elsewhere = earlier.seen + taken.seen, earlier.elsewhere + taken.elsewhere
    return Stretch(earlier.sums, seen, elsewhere, earlier.batches + taken.batches)
