"""What was accumulated, as tensors: saved, loaded, and added up over the ranks of a process group."""

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .._arguments import listed
from .._torch.collectives import has_ranks
from .._torch.surroundings import lasting
from ..errors import InvalidArgumentError
from ..parallel.all_reduce import add_up
from ..parallel.fsdp import Shard, part_of
from .agreement import share_troubles
from .fisher import OnlineFisher
from .norm_sums import COLUMNS, NormSums
from .reading import num_samples
from .sums import LayerSums
from .window_sums import WindowSums, put_aside

if TYPE_CHECKING:
    from .hooks import Attachment

#: Of the layout of :meth:`CurvatureProbe.state_dict`.
VERSION = 5

#: What a state begins with, by its version; the one before did not tell of how many parts it is one.
HEADERS = {4: (5,), VERSION: (6,)}

#: Before the keys of what was accumulated before the last look at a window.
EARLIER = "earlier/"

_UNTOLD = (
    "what was accumulated of it before the state was saved is not to be told: reading it there says why; call reset() "
    "and accumulate anew."
)

#: What to do with the state of another probe.
_OTHER = "make the probe with the model and the options that the state is from."


def _kind(fisher: OnlineFisher) -> str:
    return fisher.reduction if isinstance(fisher.reduction, str) else "weights"


_KINDS = ("mean", "sum", "weights")
_ACCUMULATED = ("diagonal", "trace")

#: The columns of norms that ranks share; the others are of each alone.
_SHARED = [i for name, i in COLUMNS.items() if name not in ("batches", "kept")]


def state_of(fisher: OnlineFisher, attachment: "Attachment | None") -> dict[str, Tensor]:
    """See :meth:`secorder.CurvatureProbe.state_dict`."""
    counts = [0, 0] if attachment is None else [attachment.counts[True], attachment.counts[False]]
    settings = _KINDS.index(_kind(fisher)), _ACCUMULATED.index(fisher.accumulate)
    parts = _parts(fisher)
    if not has_ranks() and (seen := sum(float(x.seen) for x in (fisher, fisher.earlier) if x is not None)):
        parts = round(num_samples(fisher) / seen)  # it may be a part of what ranks had
    state = {
        "header": torch.tensor([VERSION, *settings, *counts, parts], device="cpu"),
        "decay": torch.tensor(fisher.decay or 0.0, dtype=torch.float64, device="cpu"),
        "failures": _failures(fisher),
        **_state_of(fisher, fisher, ""),
    }
    return state if fisher.earlier is None else {**state, **_state_of(fisher, fisher.earlier, EARLIER)}


def _failures(fisher: OnlineFisher) -> Tensor:
    """The audits that have failed, by layer; -1 where none has, and its number is not to be told for another reason."""
    names, counts = fisher.marked(), fisher.failures.counts
    marked = counts.new_tensor([layer.name in names for layer in fisher.layers])
    return torch.where(counts > 0, counts, -marked)


def _state_of(fisher: OnlineFisher, window: "OnlineFisher | WindowSums", prefix: str) -> dict[str, Tensor]:
    """Of what one window of training has brought."""
    numbers = [window.seen, *(window.seen.new_tensor(x) for x in (window.elsewhere, window.batches))]
    state = {f"{prefix}seen": torch.stack(numbers), f"{prefix}norms": window.norms.table.clone()}
    for layer in fisher.layers:
        sums = window.sums[layer.name]
        state[f"{prefix}counts/{layer.name}"] = torch.cat(
            [sums.counts, sums.counts.new_tensor([sums.batches, sums.decays])]
        )
        for (name, p), total in zip(layer.parameters.items(), sums.sums, strict=bool(sums.sums)):
            key = f"{prefix}sums/{layer.parameter_name(name)}"
            state[key] = Shard.of(p).place(total.clone()) if layer.spread is not None else total.clone().view(p.shape)
    return state


@lasting()
def load_state(fisher: OnlineFisher, attachment: "Attachment | None", state: Mapping[str, Tensor]) -> None:
    """See :meth:`secorder.CurvatureProbe.load_state_dict`."""
    none = torch.zeros(0)
    tensors = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    header, decay = (state.get(key, none) if tensors else none for key in ("header", "decay"))
    version = int(header[0]) if header.dim() == 1 and header.numel() else 0
    if decay.numel() != 1 or header.shape != HEADERS.get(version):
        raise InvalidArgumentError(f"the state is not one of CurvatureProbe.state_dict(), version {VERSION}.")
    _, kind, accumulated, train, evaluated, *parts = (int(number) for number in header.tolist())
    theirs = (_KINDS[kind], float(decay) or None, _ACCUMULATED[accumulated])
    ours = (_kind(fisher), fisher.decay, fisher.accumulate)
    for key, own, other in zip(("reduction", "decay", "accumulate"), ours, theirs, strict=True):
        if own != other:
            raise InvalidArgumentError(f"the state was accumulated with {key}={other!r}, not {own!r}.")
    _require_same_parameters(fisher, state)
    _require_whole(fisher, state)
    more = _parts(fisher) / parts[0] if parts else 1.0
    now = _window_of(fisher, state, "", more)
    earlier = _window_of(fisher, state, EARLIER, more) if f"{EARLIER}seen" in state else None
    fisher.reset()
    fisher.sums, fisher.batches, fisher.elsewhere = now.sums, now.batches, now.elsewhere
    fisher.norms = now.norms
    fisher.seen.copy_(now.seen)
    fisher.failures.counts.copy_(state["failures"].clamp(min=0))
    untold = [layer.name for layer, failed in zip(fisher.layers, state["failures"].tolist(), strict=True) if failed < 0]
    fisher.troubles.marks.update(dict.fromkeys(untold, _UNTOLD))
    fisher.earlier = earlier
    if attachment is not None:
        attachment.counts[True], attachment.counts[False] = train, evaluated


def _parts(fisher: OnlineFisher) -> int:
    """How many ranks' sums together are those of all samples, each counted once; whole ones are one part."""
    if not has_ranks() or (fisher.ranks is not None and fisher.ranks.data):
        return 1
    tensor = () if fisher.ranks is None else fisher.ranks.tensor
    same = [mesh.size(dim) for mesh, dim in tensor]  # ranks with the same samples
    return dist.get_world_size() // prod(map(int, same))


def _window_of(fisher: OnlineFisher, state: Mapping[str, Tensor], prefix: str, more: float) -> WindowSums:
    """What :func:`_state_of` told, divided where there are ``more`` parts now."""
    diagonal = fisher.accumulate == "diagonal"
    loaded = LayerSums.empty(fisher.layers, fisher.device, fisher.dtype, diagonal=diagonal)
    for layer in fisher.layers:
        sums = loaded[layer.name]
        sums.sums = [
            part_of(state[f"{prefix}sums/{layer.parameter_name(name)}"], p).flatten().to(like, copy=True)
            for (name, p), like in zip(layer.parameters.items(), sums.sums, strict=diagonal)
        ]
        numbers = state[f"{prefix}counts/{layer.name}"].to(sums.counts, copy=True)
        sums.counts = numbers[:3].clone()
        sums.batches, sums.decays = (round(number) for number in numbers[3:].tolist())
    seen, elsewhere, batches = state[f"{prefix}seen"].tolist()
    norms = NormSums(state[f"{prefix}norms"].to(fisher.norms.table, copy=True), round(batches))
    window = WindowSums(loaded, fisher.seen.new_tensor(seen), elsewhere, round(batches), norms)
    if more != 1.0:
        _divide(window, more)
    return put_aside(window) if prefix else window


def _require_same_parameters(fisher: OnlineFisher, state: Mapping[str, Tensor]) -> None:
    names = {key.removeprefix("counts/") for key in state if key.startswith("counts/")}
    if different := sorted(names ^ fisher.sums.keys()):
        raise InvalidArgumentError(f"the state and the probe differ in layers {listed(different)}: {_OTHER}")
    found = {key.removeprefix("sums/"): value.numel() for key, value in state.items() if key.startswith("sums/")}
    diagonal = [layer for layer in fisher.layers if fisher.accumulate == "diagonal"]
    sizes = {x.parameter_name(local): p.numel() for x in diagonal for local, p in x.parameters.items()}
    if different := sorted(sizes.keys() ^ found.keys()):
        raise InvalidArgumentError(f"the state and the probe differ in parameters {listed(different)}: {_OTHER}")
    if different := sorted(name for name, size in sizes.items() if found[name] != size):
        raise InvalidArgumentError(f"the state has other shapes of parameters {listed(different)}: {_OTHER}")


def _require_whole(fisher: OnlineFisher, state: Mapping[str, Tensor]) -> None:
    """Refuse what was cut, or put together by hand: nothing is to be taken over of it."""
    sizes = {"seen": 3, "norms": fisher.norms.table.numel()}
    sizes |= {f"counts/{name}": sums.counts.numel() + 2 for name, sums in fisher.sums.items()}
    if f"{EARLIER}seen" in state:
        sums_of = {key: value.numel() for key, value in state.items() if key.startswith("sums/")}
        sizes |= {f"{EARLIER}{key}": size for key, size in (sizes | sums_of).items()}
    sizes["failures"] = fisher.failures.counts.numel()
    if damaged := sorted(key for key, size in sizes.items() if key not in state or state[key].numel() != size):
        raise InvalidArgumentError(f"the state is damaged: {damaged} are missing, or of other sizes.")


@lasting()
def synchronize(fisher: OnlineFisher, group: "dist.ProcessGroup | None" = None) -> None:
    """See :meth:`secorder.CurvatureProbe.synchronize`."""
    if fisher.ranks is not None and fisher.ranks.data:
        return  # sums are those of all ranks at every step
    if fisher.ranks is not None and (group is None or fisher.ranks.holds(group)):
        raise InvalidArgumentError(
            "ranks that have parts of layers (tensor parallelism) have the same samples, which are not to be added up: "
            "pass synchronize() the group of those that have other samples (mesh.get_group of that dimension)."
        )
    share_troubles(fisher, group)
    divided = fisher.seen.new_tensor(float(fisher.earlier is not None))
    add_up([divided], group)
    if float(divided):  # on some rank a window was looked at: then all of them add up what came before apart
        fresh = fisher.fresh()
        earlier = fisher.earlier or WindowSums(fresh.sums, fresh.seen, 0.0, 0, fresh.norms)
        earlier = WindowSums(
            {name: sums.to(fisher.sums[name].counts.device, copy=True) for name, sums in earlier.sums.items()},
            earlier.seen.to(fisher.seen, copy=True),
            earlier.elsewhere,
            earlier.batches,
            earlier.norms.to(fisher.norms.table.device, copy=True),
        )
        _share(earlier, group)
        fisher.earlier = put_aside(earlier)
    _share(fisher, group)


def _share(window: "OnlineFisher | WindowSums", group: "dist.ProcessGroup | None") -> None:
    """Leave each rank its share of what all have: a later call then adds what came since."""
    every = list(window.sums.values())
    kept = [sums.counts[:2].clone() for sums in every]
    table = window.norms.table
    shared = table[:, _SHARED]
    add_up([window.seen, shared, *kept, *(total for sums in every for total in sums.sums)], group)
    table[:, _SHARED] = shared
    for sums, counts in zip(every, kept, strict=True):
        sums.counts[:2] = counts
    window.elsewhere = 0.0
    _divide(window, dist.get_world_size(group))


def _divide(window: "OnlineFisher | WindowSums", parts: float) -> None:
    """Keep one of so many parts of what is counted; the rest is elsewhere, if any: a part may be made the whole."""
    whole = float(window.seen) + window.elsewhere
    window.norms.table[:, _SHARED] /= parts
    for sums in window.sums.values():
        sums.counts[:2] /= parts
        for total in sums.sums:
            total.div_(parts)
    window.seen.div_(parts)
    window.elsewhere = max(whole - float(window.seen), 0.0)
