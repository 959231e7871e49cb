"""Which dimension of the model's arguments holds the samples: the one along which its outputs do not influence another.

Each candidate is tried by passes of our own: while the samples of one part are changed, the outputs of the others must
stay. Where several hold, that one is taken whose samples may be exchanged; where none does, it is said why.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch.expected_draws import MIDDLE, ExpectedDraws
from ..._torch.modules import evaluating
from ..._torch.pytree import tensors_in
from ..._torch.random_state import fresh_generator
from ...layers.layout import Layout
from ...layers.structure import independent_by_structure
from ...oneshot.independence import separating_masks
from ...parallel.ranks import Ranks
from .attribution import Attribution
from .hypotheses import (
    Hypothesis,
    SampleDim,
    Separation,
    Trial,
    any_layout,
    equivariant,
    from_names,
    hypotheses,
    of_owned,
    one_each,
    separates,
    shapes_of,
)

#: Later looks change some samples so often: enough to see a coupling that is new; rows are verified besides.
TRIALS = 1

#: Quantiles of random numbers at which, too, samples are to stay apart.
RARE = (0.01, 0.99)


@dataclass(frozen=True)
class Question:
    """One look: at what, and how thoroughly."""

    model: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    sample_dim: SampleDim
    before: Attribution | None
    direct: bool
    not_followed: Collection[str] = ()
    fixed: tuple[nn.Module, ...] = ()  # batch normalisation, fake quantisation: to go by running statistics, ranges
    ranks: Ranks | None = None  # that parameters lie over, and look together

    @staticmethod
    def masks(count: int, trials: int | None = None) -> list[Tensor]:
        """Which samples are changed in each trial: every ordered pair is told apart, or so many trials, drawn."""
        masks = separating_masks(count)
        if trials is None or len(masks) <= trials:
            return list(masks)
        drawn = torch.rand(trials, count, generator=fresh_generator(), device="cpu") < 0.5
        drawn[:, 0], drawn[:, 1] = True, False  # never all, never none
        order = torch.argsort(torch.rand(trials, count, generator=fresh_generator(), device="cpu"), 1)
        return list(drawn.gather(1, order))


LISTED = (
    "the model is called with a list, or rows that a vector gives to graphs, and its output does not show whether each "
    'of them is a sample: let it return one tensor of a row a sample, or pass sample_dim="list" where each entry of '
    "the list is one, the dimension that holds the samples, or None by the arguments' names where each call is one"
)

#: A hypothesis that holds, with the layouts that it leaves open of each output.
Choice = tuple[Hypothesis, list[list[Layout]]]


def choose(asked: Question, forward: Any, base: list[Tensor]) -> Choice | Attribution:
    """The hypothesis that holds, with what it leaves open of the outputs; or why there is none."""
    dim, arguments = asked.sample_dim, asked.arguments
    tried = [from_names(asked.model, *arguments, dim)] if isinstance(dim, Mapping) else hypotheses(arguments, base, dim)
    if not tried:
        return Attribution(undecided=_no_candidate(arguments, dim))
    usual = tried[0]
    if _needs_no_trial(asked, tried):
        return usual, [any_layout(f, usual.num_samples) for f in base]
    still = _still_holds(asked, forward, base)
    if still is not None:
        return still
    if not any(any_layout(f, h.num_samples) for f in base for h in tried):
        return _by_size_alone(asked, forward, base, tried)
    holding, without_evidence = _try_each(asked, forward, base, tried)
    if usual.num_samples == 1 and dim is None and all(h.owned is None for h, _ in holding):
        return _of_one_sample(asked, base, tried, holding)
    if dim is None and usual.dim == 0 and without_evidence and (without_evidence.accepted or not holding):
        # Nothing changes anything, as where weights start at zero, or of a dead net one entry by another dim.
        holding = [(usual._replace(untested=True), without_evidence.layouts), *holding]
    if not holding:
        return _none_holds(asked, forward, base, tried, unrefuted=without_evidence is not None)
    return holding[0] if len(holding) == 1 else _one_of(asked, forward, holding)


def _needs_no_trial(asked: Question, tried: Sequence[Hypothesis]) -> bool:
    """Whether the usual hypothesis is taken as it is."""
    usual, alone = tried[0], len(tried) == 1
    if asked.ranks is not None or (alone and usual.num_samples <= 1):
        return True
    return alone and usual.dim == 0 and usual.owned is None and independent_by_structure(asked.model, 0)


def _still_holds(asked: Question, forward: Any, base: Sequence[Tensor]) -> Choice | None:
    """What held before, if a short trial does not refute it."""
    before = asked.before
    count = None if before is None else before.count(asked.arguments)
    if before is None or count is None or count <= 1:
        return None
    owned = None if before.grouping is None else before.grouping.of(asked.arguments)
    known = of_owned(owned, asked.arguments) if owned else Hypothesis(before.dims, count, before.alternative)
    known, still = _separates(Trial(forward, asked.arguments, known), base, asked.masks(count, TRIALS))
    return None if still is None else (known, _as_before(still.layouts, before.outputs))


def _as_before(options: Sequence[Sequence[Layout]], before: Sequence[Layout | None]) -> list[list[Layout]]:
    """Of the layouts that a short trial leaves open for each output, first the one that all pairs of samples told."""
    found = [list(choices) for choices in options]
    for choices, known in zip(found, before, strict=False):
        if known is not None:
            choices.sort(key=partial(_is_other, known))
    return found


def _is_other(known: Layout, found: Layout) -> bool:
    """Whether samples lie otherwise, however many rows each has."""
    return (found.dim, found.sample_major) != (known.dim, known.sample_major)


def _try_each(
    asked: Question, forward: Any, base: Sequence[Tensor], tried: Sequence[Hypothesis]
) -> tuple[list[Choice], Separation | None]:
    """The hypotheses that hold; and what the usual one leaves open, where nothing refutes it nor supports it."""
    holding: list[Choice] = []
    without_evidence = None
    for hypothesis in tried:
        usual = hypothesis is tried[0]
        if hypothesis.num_samples > 1:
            trial, masks = Trial(forward, asked.arguments, hypothesis), asked.masks(hypothesis.num_samples)
            if holding and not holding[0][0].shifting:  # then numbers that are drawn refute no other one
                found = separates(trial, base, masks)
            else:
                hypothesis, found = _separates(trial, base, masks)
            listed = hypothesis.owned is not None and hypothesis.owned.grouping.place is None
            certain = usual and (asked.sample_dim is not None or (len(tried) == 1 and not listed))
            if found is not None and not usual and hypothesis.owned is None and asked.sample_dim is None:
                found = None if found.beside or _each_is_of_one(asked, forward, base, tried[0]) else found
            if found is not None and (found.changed or certain):
                holding.append((hypothesis, found.layouts))
            elif usual:
                without_evidence = found
        if holding and asked.sample_dim is not None:
            break
    return holding, without_evidence


def _separates(trial: Trial, base: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Hypothesis, Separation | None]:
    """:func:`separates`, also where data tells how many random numbers are drawn; the hypothesis says whether it does.

    Such as of dropout on the tokens that an expert gets: one sample's are drawn before another's, which gets others
    then. With what is expected of them the others' outputs stay; and with what is rare, since a mean of zero, or a coin
    that shows what it mostly does, hides what it is multiplied by, or chooses.
    """
    found = separates(trial, base, masks)
    if found is not None:
        return trial.hypothesis, found
    drawn: set[tuple[tuple[int, ...], ...]] = set()

    def steady(at: float) -> Separation | None:
        def forward(arguments: Any) -> Any:
            with ExpectedDraws(at) as draws:
                result = trial.forward(arguments)
            drawn.add(draws.sizes)
            return result

        fixed = trial._replace(forward=forward)
        outputs = fixed.outputs_changed(torch.zeros_like(masks[0]))
        return separates(fixed, outputs, masks) if outputs is not None and drawn != {()} else None

    found = steady(MIDDLE)
    holds = found is not None and len(drawn) > 1 and None not in map(steady, RARE)
    return trial.hypothesis._replace(shifting=True), found if holds else None


def _each_is_of_one(asked: Question, forward: Any, base: Sequence[Tensor], usual: Hypothesis) -> bool:
    """Whether outputs are one sample's each, as the usual hypothesis has these: then no dimension of them holds any."""
    count = usual.num_samples
    trial = Trial(forward, asked.arguments, usual)
    return 1 < count <= len(base) and one_each(trial, base, asked.masks(count))


def _of_one_sample(
    asked: Question, base: Sequence[Tensor], tried: Sequence[Hypothesis], holding: Sequence[Choice]
) -> Choice | Attribution:
    """Where the usual dimension holds one sample."""
    if any(h.owned is not None and h.num_samples > 1 for h in tried):
        return Attribution(provisional=True, undecided=LISTED)
    if holding:  # one sample of many positions, or many samples of one
        return _undecided_by_shapes(asked)
    return tried[0], [any_layout(f, 1) for f in base]


def _none_holds(
    asked: Question, forward: Any, base: Sequence[Tensor], tried: Sequence[Hypothesis], *, unrefuted: bool
) -> Attribution:
    """Why no hypothesis holds; another batch may support the usual one, where this one does not refute it."""
    if any(h.owned is not None and h.num_samples == 1 for h in tried):  # a list of one entry, or one graph
        return _undecided_by_shapes(asked)
    if asked.sample_dim is None and any(h.owned is not None and h.owned.grouping.place is None for h in tried):
        return Attribution(provisional=unrefuted, undecided=LISTED)
    return _nothing_separates(asked, forward, base, tried[0])


def _undecided_by_shapes(asked: Question) -> Attribution:
    return Attribution(provisional=True, undecided=f"of arguments of shapes {list(shapes_of(asked.arguments))}")


def _one_of(asked: Question, forward: Any, holding: Sequence[Choice]) -> Choice:
    """Of several that hold: one whose samples may be exchanged, that most outputs hold."""
    with evaluating(asked.model):  # random numbers of dropout stay where they are when samples are exchanged
        alike = [choice for choice in holding if equivariant(Trial(forward, asked.arguments, choice[0]))] or holding[:1]
    most = max(_held(options) for _, options in alike)
    alike = [choice for choice in alike if _held(choice[1]) == most]
    first, options = alike[0]
    others = [h.dim for h, _ in alike if h.owned is None and h.dim != first.dim] if first.owned is None else []
    return first._replace(alternative=next(iter(others), None)), options


def _no_candidate(arguments: tuple[tuple[Any, ...], dict[str, Any]], dim: SampleDim) -> str:
    """Why nothing among the arguments may hold samples."""
    args, kwargs = arguments
    if next(tensors_in(arguments), None) is None and (args or kwargs):
        kinds = ", ".join(dict.fromkeys(type(x).__name__ for x in (*args, *kwargs.values())))
        return (
            f"the model is called with {kinds} and no tensor, in which samples could be found: call it with tensors, "
            "or attach the probe to the part of it that is called with them"
        )
    what = 'is a list, as sample_dim="list" says' if dim == "list" else "has a dimension for samples"
    return f"none of the model's arguments {what}"


def _held(options: Sequence[Sequence[Layout]]) -> int:
    """How many of the outputs may hold the samples."""
    return sum(map(bool, options))


def _by_size_alone(
    asked: Question, forward: Any, base: Sequence[Tensor], tried: Sequence[Hypothesis]
) -> Choice | Attribution:
    """Where the outputs tell nothing of the number of samples (a loss alone)."""
    if asked.sample_dim == "list":
        return tried[0], []
    if (
        asked.sample_dim is None
        and any(h.owned is not None and h.num_samples > 1 for h in tried)
        and (tried[0].num_samples == 1 or None in tried[0].dims)
    ):
        return Attribution(undecided=LISTED)
    if base and all(f.numel() > 1 for f in base):
        return _nothing_separates(asked, forward, base, tried[0])
    sizes = {h.num_samples for h in tried if h.dim == tried[0].dim} - {1}
    if len(sizes) > 1:
        return Attribution(
            undecided=f"the model's arguments have sizes {sorted(sizes)} in dim {tried[0].dim}, and its output does "
            "not show which of them is the number of samples: pass sample_dim= with a mapping of argument names to "
            "dimensions, or let the model return a tensor of that size"
        )
    return tried[0], []


def _nothing_separates(asked: Question, forward: Any, base: Sequence[Tensor], usual: Hypothesis) -> Attribution:
    """No dimension holds samples that do not influence one another, or not the one that was told: another one?"""
    others = [] if asked.sample_dim is None else hypotheses(asked.arguments, base, None)
    separable = None
    for other in others:
        if other.num_samples > 1 and other.dim != usual.dim:
            found = separates(Trial(forward, asked.arguments, other), base, asked.masks(other.num_samples))
            if found is not None and found.changed:
                separable = other.dim
    return Attribution(dims=usual.dims, coupled=True, separable=separable)
