"""Is a loss multiplied by 1/N on each way from it to the outputs of N samples, as a mean over these is?

A loss of N samples is a mean of their losses where 1/N comes in once on every path of its graph: as a mean over
samples, or as a number that a sum is divided by. A sum of some terms and a mean of others, a loop that adds up means of
one sample each, or a term that is divided by the number of boxes, shows so. What a constant of the loss is, and what
the number of samples, is told by its value alone in one batch; where it may be either, it is what is specified until a
batch of another size comes (:mod:`.sizes`).
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.graph import Node, operation_of, run_node, shape_of
from ..._torch.loss_graph import Place, UnknownNode, pull_back
from ..._torch.loss_terms import averaged, divides_by_tensor, hides, multiplier, ones_for, selected, summed, uniform
from .extent import ADDS, copies, in_pieces, mixes, of_a_part, of_several, over_samples, samples_of
from .seen import SeenLoss

WEIGHTED = (
    "the loss weights its samples ({}), which is no mean over them: pass reduction= with a function of the model's "
    "arguments that returns the weights c_n of L = Σ_n c_n ℓ_n, such as secorder.token_weights."
)

_REDUCED = 'the loss is the {0} of its samples\' losses, and was taken to be their {1}: pass reduction="{0}"{2}.'

_CONSTANT = ", or loss_scale=1 where a factor in it is a constant that does not go with the number of samples"

_MIXED = (
    "of the terms of the loss, some are divided by the number of samples and others are not ({}), so that it is no {} "
    "of samples' losses: divide each of them by it, or none, or pass loss_scale=1 where a factor in it is a constant."
)

_DIVIDED = (
    "in the loss there is {}, which was taken to be a constant: pass reduction= with a function that returns the "
    "weights c_n of L = Σ_n c_n ℓ_n where it goes with the batch, as a number of tokens or boxes does, or else "
    "loss_scale=1."
)

#: A factor below it, or above one over it, tells nothing.
TINY = 1e-30

#: So many paths from a loss to one node are kept apart by what multiplies them.
MOST = 1024

#: What a factor does not come through: behind it, such as a temperature of logits, it is a part of samples' losses.
CURVED = frozenset({
    "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "Exp", "Expm1", "Log", "Log1P", "LogSigmoid", "LogSoftmax",
    "Logsumexp", "Sigmoid", "Softmax", "Softplus", "Tanh",
})  # fmt: skip


class Path(NamedTuple):
    """What all ways of one kind from a loss to an output have in common."""

    power: int = 0  #: of N, by which means and divisions multiply the loss: -1 in a mean
    likely: int = 0  #: the same of factors that may be constants of the loss
    number: int = 0  #: what it was divided by last, or how many numbers the last mean was of
    why: str = ""  #: how samples are weighted that is no mean over them; empty where that does not show
    scale: float = 1.0  #: what it was multiplied by, means aside
    mean: bool = False  #: whether there was a mean over samples
    added: int = 0  #: how many numbers were added up to one
    inside: bool = False  #: whether what comes is a part of samples' losses


@dataclass
class _Walk:
    """From a loss to its outputs."""

    loss: SeenLoss  #: where it begins and ends
    samples: int  #: how many there are
    told: str  #: ``"mean"`` or ``"sum"``
    leads: Collection[Node]  #: the nodes on the way, those that computed the outputs included
    sizes: set[int]  #: how many numbers of the samples there are on the way, and the number of samples
    alike: Counter[str]  #: how many nodes there are of each operation


@torch.no_grad()
def paths_of(loss: SeenLoss, samples: int, told: str) -> set[Path]:
    """The kinds of paths from a loss to its outputs; without those through what hides what it does.

    Raises :class:`UnknownNode` where samples are put together in a way that is not known.
    """
    ends = {node for node, _ in loss.outputs}
    leads = ends.union(loss.order)
    places = [place for node in loss.order for place in node.next_functions if place[0] in leads]
    counts = [*(prod(shape_of(*place)) for place in places), *map(averaged, loss.order)]
    sizes = {samples, *(count for count in counts if count and not count % samples)}
    walk = _Walk(loss, samples, told, leads, sizes, Counter(map(operation_of, loss.order)))
    found: dict[Node, dict[int, set[Path]]] = {}
    for (node, number), g in loss.roots.items():
        if bool(g.any()) and uniform(g.abs()):  # others, such as of a loss that this graph does not hold, tell nothing
            _reach(found, (node, number), [_scaled(walk, Path(), float(g.abs().amax()), whole=not g.dim())])
    for node in loss.order:
        for number, paths in found.pop(node, {}).items():
            if len(paths) > MOST:
                paths = {x._replace(scale=1.0) for x in paths}
            for index, before in enumerate(node.next_functions):
                if before[0] in leads and not hides(node):
                    curved = operation_of(node) in CURVED
                    on = [x._replace(inside=x.inside or curved) for x in _through(walk, paths, (node, number), index)]
                    _reach(found, before, on)
    return {_in_all(walk, path) for end in ends for paths in found.get(end, {}).values() for path in paths}


def _reach(found: dict[Node, dict[int, set[Path]]], place: Place, paths: Iterable[Path]) -> None:
    """Enter paths by where they have come to."""
    found.setdefault(place[0], {}).setdefault(place[1], set()).update(paths)


def _in_all(walk: _Walk, path: Path) -> Path:
    """Behind factors that are one over the number of samples together alone, such as those of a running mean."""
    if path.power or path.likely or path.mean:
        return path
    power = _scaled(walk, path._replace(inside=False, scale=1.0), path.scale, whole=True)
    return power._replace(scale=path.scale, inside=path.inside)


def _through(walk: _Walk, paths: Collection[Path], place: Place, index: int) -> list[Path]:
    """Paths that go on from an output of a node to one of its inputs.

    Raises :class:`UnknownNode` for what makes one number of several samples in a way that is not known.
    """
    node, number = place
    if averaged(node):
        if not over_samples(walk.loss, node):
            return list(paths)
        held = of_a_part(walk.loss, node, walk.samples)
        return [_averaged(walk, path, node, held) for path in paths]
    if count := summed(node):
        divided = any(_divides(path, count) for path in paths)
        held = of_a_part(walk.loss, node, walk.samples) if divided else 0
        return [_added(walk, path, count, held) for path in paths]
    if rows := selected(node):
        return [_chosen(walk, path, *rows) for path in paths]
    by = multiplier(node, index, walk.leads, walk.samples, number)
    times, alike = copies(walk.loss, walk.samples, node, index)
    if times > 1 and alike:  # which undoes the latest mean, if there was one
        by = run_node(node, [ones_for(node)], index) / times
        own = ((x, x.scale * (1 if x.mean else times)) for x in paths)
        paths = [x._replace(power=x.power + 1, scale=scale, mean=False) for x, scale in own]
    if by is None or not by.numel():
        joins = operation_of(node) not in ADDS and prod(shape_of(*place)) < walk.samples and mixes(place, index)
        if joins and samples_of(walk.loss, *place) > 1:
            g = pull_back(walk.loss.roots, {place}).get(place)
            if g is None or not bool(g.any()):
                return []  # a term that is switched off
            raise UnknownNode(node.name())
        return list(paths)
    if node.next_functions[index] in walk.loss.outputs and uniform(by) and _squared(walk, by) in walk.sizes:
        # Of outputs that may be squared later nothing is known; a temperature's square outside is no number of samples.
        paths = [path._replace(likely=0) for path in paths if path.inside]
    whole = prod(shape_of(*place)) == 1
    if uniform(by):
        factor, counted = abs(float(by.flatten()[0])), divides_by_tensor(node)
        how = {"divides": operation_of(node) == "Div", "whole": whole, "counted": counted}
        return [_scaled(walk, path, factor, **how) for path in paths] if factor else []
    # Weights that add up to one, which are no mask that leaves one, or that are a part of each sample's loss.
    one = not by.numel() % walk.samples and abs(float(by.sum()) - 1) < 1e-5 and float(by.max()) < 1
    one = one and of_several(walk.loss, node.next_functions[index])
    if walk.told == "sum" and operation_of(node) == "Div" and _are_counts(by) and samples_of(walk.loss, *place) > 1:
        return [path._replace(power=path.power - 1, why="sums that are divided by several numbers") for path in paths]
    return [path._replace(power=path.power - one, mean=path.mean or one) for path in paths]


def _are_counts(divided: Tensor) -> bool:
    """Whether numbers are one over whole ones each."""
    whole = 1 / divided
    return bool(((whole - whole.round()).abs() < 1e-5 * whole.abs()).all())


def _squared(walk: _Walk, by: Tensor) -> int:
    """The number of samples, or a multiple of it, that the square of a constant is one over; else 0."""
    factor = float(by.flatten()[0])
    return _whole(walk, factor**-2) if factor else 0


def _whole(walk: _Walk, number: float) -> int:
    """A whole number that is a multiple of the number of samples; 0 for any other."""
    near = round(number)
    return near if near and not near % walk.samples and abs(number / near - 1) < 1e-5 else 0


def _scaled(
    walk: _Walk, path: Path, factor: float, *, whole: bool, divides: bool = False, counted: bool = False
) -> Path:
    """Behind a constant factor: one over the number of samples, or a multiple of it, or a number of its own.

    Of a divisor that was ``counted``, it is told also where it is less than the number of samples.
    """
    if path.inside or not TINY < factor < 1 / TINY:
        return path
    if whole or not path.mean:
        path = path._replace(scale=float(f"{path.scale * factor:.6g}"))  # without rounding that makes kinds of its own
    under, over, near = _whole(walk, 1 / factor), _whole(walk, factor), round(1 / factor)
    mean, known = walk.told == "mean", walk.sizes | {2 * walk.samples}
    if divides and whole and near >= (2 if mean or counted else max(walk.samples, 3)) and abs(factor * near - 1) < 1e-5:
        path = path._replace(why=f"a sum that is divided by {near} for {walk.samples} samples", number=near)
    if mean and under and (divides or under in known):
        return path._replace(power=path.power - 1, number=under, why="" if under in known else path.why)
    if under in known:
        return path._replace(likely=path.likely - 1, number=under)
    if over in walk.sizes and (over == walk.samples or not mean):
        return path._replace(likely=path.likely + 1, number=over)
    return path


def _averaged(walk: _Walk, path: Path, node: Node, held: int) -> Path:
    """Behind a mean; of pieces that hold so many samples, if any (see :func:`.extent.of_a_part`)."""
    count = averaged(node)
    if not _joins(walk, node):
        return path
    part = 0 < held < walk.samples
    share = path.scale / path.number if path.mean and path.number else path.scale
    if part and _as_of_all(walk, share, held):
        return path._replace(power=path.power - 1, number=count, mean=True, why="", scale=1.0)
    if part or count % walk.samples:
        why = f"a mean over {held} of {walk.samples}" if part else f"a mean of {count} for {walk.samples} samples"
        power = path.power - (walk.told == "sum")
        return path._replace(power=power, number=count, mean=True, why=why)
    return path._replace(power=path.power - 1, number=0 if held else count, mean=True, why="")


def _as_of_all(walk: _Walk, factor: float, held: int) -> bool:
    """Whether a mean over some of the samples is multiplied by their share of all, as where that of halves is taken."""
    return abs(factor * walk.samples / held - 1) < 1e-5


def _divides(path: Path, count: int) -> bool:
    """Whether a sum of so many numbers is divided by how many there are."""
    return path.number == count and path.power < 0 and not path.mean


def _added(walk: _Walk, path: Path, count: int, held: int) -> Path:
    """Behind a sum of so many numbers to one, of so many samples where these are not all."""
    path = path._replace(added=path.added or count)
    if held % walk.samples and _divides(path, count) and not _as_of_all(walk, path.scale * count, held):
        why = f"a sum over {held} of {walk.samples} that is divided by {count}"
        power = path.power + (walk.told == "mean")
        return path._replace(power=power, why=why, scale=path.scale * count, mean=True)
    each, rest = divmod(path.number, walk.samples)
    fewer = each and not rest and path.number < count and path.number not in walk.sizes
    if fewer and (2 * count // walk.samples) % each and path.power < 0 and differ(walk.loss, 1):  # without padding
        why = f"a sum that is divided by {path.number} for {walk.samples} samples"
        return path._replace(power=path.power + 1, why=why)
    return path if path.number == count and held != walk.samples else path._replace(number=0)


def _chosen(walk: _Walk, path: Path, rows: int, *rest: int) -> Path:
    """Behind the choice of some rows, such as of tokens by a mask, which may not be as many of each sample."""
    held = not rows % walk.samples or walk.samples in rest
    whole = rows == walk.samples or (held and not differ(walk.loss, 1))
    if not path.number or not rows or path.number % rows or whole:
        return path
    why = f"a mean of {rows} that were selected for {walk.samples} samples"
    power = min(path.power + 1, 0) if walk.told == "mean" else path.power
    return path._replace(power=power, number=0, why=why)


def _joins(walk: _Walk, node: Node) -> bool:
    """Whether one number that a node makes is of several samples: a loop has many alike, of one sample each.

    Of several samples' mean, too, the gradient may come to one alone, such as where all others keep a margin.
    """
    alike, as_samples = walk.alike[operation_of(node)], not averaged(node) % walk.samples
    few = alike < (walk.samples if as_samples else 2)
    if prod(shape_of(node, 0)) == 1 and (few or in_pieces(walk.loss, node, walk.samples) != 1):
        return True
    try:
        return samples_of(walk.loss, node, 0) != 1  # where the gradient is zero, it is not known
    except UnknownNode:
        return True


def differ(loss: SeenLoss, classes: int) -> bool:
    """Whether samples have different numbers of targets: the gradient on the classes of one that is ignored is zero."""
    try:
        gradients = loss.gradients
    except UnknownNode:
        return False
    split = [loss.outputs[place].layout.split(g.detach()).unsqueeze(-1) for place, g in gradients.items()]
    counts = [(own != 0).flatten(1).sum(1) for own in split]
    return any(bool(2 * (own.amax() - own.amin()) >= classes) for own in counts)


def reduced_otherwise(
    loss: SeenLoss, paths: Collection[Path], told: str, *, constant: bool = False
) -> tuple[str, bool]:
    """Why a loss is not the mean, or the sum, of samples' losses that is specified; and whether that is sure.

    Args:
        loss: the loss.
        paths: from it to its outputs.
        told: ``"mean"`` or ``"sum"``.
        constant: whether it is known that a factor that is as large as the number of samples is not that number.
    """
    if told == "mean":
        others = {x for x in paths if x.power >= 0}
        likely = [x for x in paths if x.likely > 0 and x.power + x.likely >= 0]
    else:
        others = {x for x in paths if x.power + max(x.likely, 0) < 0}
        likely = [x for x in paths if x.power + x.likely < 0]
    why = min((x.why for x in others), default="")  # empty where one of several is a plain sum
    if others and len(others) < len(paths):
        return _MIXED.format(why or f"{'sums' if told == 'mean' else 'means'} over them", told), True
    if why:
        return WEIGHTED.format(why), True
    if others or (likely and len(likely) == len(paths) and not constant):
        return _REDUCED.format("sum" if told == "mean" else "mean", told, "" if others else _CONSTANT), True
    why = min((x.why for x in paths if x.why), default="")
    return _DIVIDED.format(why) if why and (told == "sum" or differ(loss, 1)) else "", False
