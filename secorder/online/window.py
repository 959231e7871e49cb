"""Windows: what was accumulated from one call of ``probe.window()`` to the next.

There is one set of accumulators, and a step adds to nothing else. A call takes them out and puts empty ones in their
place. What was taken out is put together with what was accumulated before, in the host's memory, or forgotten where
nobody wants the mean over the whole run.
"""

from dataclasses import dataclass, field

from .._torch.surroundings import lasting
from ..oneshot.trace import Trace
from ..results import Diagonals
from .fisher import OnlineFisher
from .noise import NoiseScales
from .reading import Missing, Read, diagonals, fisher_traces, noise_scales, num_skipped, unreadable
from .sums import ADDING
from .window_sums import WindowSums, add_behind, put_aside, small


@dataclass(frozen=True)
class Window:
    """What a probe accumulated from one call of :meth:`secorder.CurvatureProbe.window` to the next.

    Attributes:
        num_samples: that it holds, of all ranks where it was synchronised.
        num_batches: that were recorded in it on this rank, those included that were left out.

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
    num_batches: int
    _fisher: OnlineFisher = field(repr=False)
    _read: Read = field(repr=False)

    @property
    def num_skipped(self) -> dict[str, int]:
        """How many of its batches were left out of a layer's mean because a gradient held nan or inf, by layer."""
        return num_skipped(self._fisher, self._read[0])

    def fisher_diagonal(self, *, missing: Missing = "raise") -> Diagonals:
        """The empirical Fisher diagonal per layer of the window's samples, their mean or moving average.

        Args:
            missing: what to do where a layer's number cannot be given: ``"raise"``, or ``"skip"`` to return the others.

        Returns:
            layer name → 1-D tensor (weight flattened, then bias), as of
            :meth:`~secorder.CurvatureProbe.fisher_diagonal`.

        Raises:
            ProbeStateError: no sample was recorded in the window.
            AttributionError: a layer's gradient could not be attributed to samples while training.
        """
        return diagonals(self._fisher, missing, self._read)

    def fisher_trace(self, *, missing: Missing = "raise") -> dict[str, Trace]:
        """The trace of each layer's empirical Fisher of the window's samples.

        Args:
            missing: as for :meth:`fisher_diagonal`.

        Returns:
            layer name → :class:`~secorder.Trace`, as of :meth:`~secorder.CurvatureProbe.fisher_trace`.

        Raises:
            SecorderError: as :meth:`fisher_diagonal`.
        """
        return fisher_traces(self._fisher, missing, self._read)

    def gradient_noise_scale(self, *, missing: Missing = "raise") -> NoiseScales:
        """The gradient noise scale of each layer in the window.

        Args:
            missing: as for :meth:`fisher_diagonal`.

        Returns:
            layer name → :class:`~secorder.NoiseScale`, as of :meth:`~secorder.CurvatureProbe.gradient_noise_scale`.

        Raises:
            SecorderError: as :meth:`fisher_diagonal`; AttributionError where no batch of the window determines it.
        """
        return noise_scales(self._fisher, missing, self._read)


@lasting()
def take_window(fisher: OnlineFisher, *, keep_total: bool) -> Window:
    """See :meth:`secorder.CurvatureProbe.window`."""
    with ADDING:
        troubles = unreadable(fisher)
        vectors = small(fisher.sums)
        sums = fisher.sums if vectors is None else {**fisher.sums, **vectors.layers(fisher.sums)}
        taken = WindowSums(sums, fisher.seen, fisher.elsewhere, fisher.batches, fisher.norms, vectors)
        fisher.renew(() if vectors is None else vectors.names)
    earlier = fisher.earlier
    if not keep_total:
        fisher.earlier = None
    elif earlier is None:
        fisher.earlier = put_aside(taken, copy=True)
    else:
        fisher.earlier = add_behind(earlier, taken, fisher.decay)
    return Window(round(float(taken.seen) + taken.elsewhere), taken.batches, fisher, (taken, troubles))
