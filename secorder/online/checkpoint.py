"""What was accumulated, as tensors: saved, loaded, and added up over the ranks of a process group."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InvalidArgumentError
from ..parallel.all_reduce import add_up
from ..parallel.fsdp import Shard, local
from .fisher import OnlineFisher
from .sums import LayerSums

if TYPE_CHECKING:
    from .hooks import Attachment

__all__ = ["load_state", "state_of", "synchronize"]

#: Of the layout of :meth:`CurvatureProbe.state_dict`.
VERSION = 3


def _kind(fisher: OnlineFisher) -> str:
    return fisher.reduction if isinstance(fisher.reduction, str) else "weights"


_KINDS = ("mean", "sum", "weights")


def state_of(fisher: OnlineFisher, attachment: "Attachment | None") -> dict[str, Tensor]:
    """See :meth:`secorder.CurvatureProbe.state_dict`."""
    counts = [0, 0] if attachment is None else [attachment.counts[True], attachment.counts[False]]
    state = {
        "header": torch.tensor([VERSION, _KINDS.index(_kind(fisher)), fisher.batches, *counts]),
        "decay": torch.tensor(fisher.decay or 0.0, dtype=torch.float64),
        "seen": torch.stack([fisher.seen, fisher.seen.new_tensor(fisher.elsewhere)]),
    }
    for layer, failures in zip(fisher.layers, fisher.failures, strict=True):
        sums = fisher.sums[layer.name]
        numbers = [sums.counts, sums.counts.new_tensor([sums.batches]), failures[None].to(sums.counts)]
        state[f"counts/{layer.name}"] = torch.cat(numbers)
        for (name, p), total in zip(layer.parameters.items(), sums.sums, strict=True):
            key = f"sums/{layer.parameter_name(name)}"
            state[key] = Shard.of(p).place(total.clone()) if layer.sharded else total.clone()
    return state


def load_state(fisher: OnlineFisher, attachment: "Attachment | None", state: Mapping[str, Tensor]) -> None:
    """See :meth:`secorder.CurvatureProbe.load_state_dict`."""
    header = state.get("header") if isinstance(state, Mapping) else None
    if not isinstance(header, Tensor) or int(header[0]) != VERSION:
        raise InvalidArgumentError(f"the state is not one of CurvatureProbe.state_dict(), version {VERSION}.")
    _, kind, batches, *counts = (int(number) for number in header.tolist())
    theirs = (_KINDS[kind], float(state["decay"]) or None)
    for key, own, other in zip(("reduction", "decay"), (_kind(fisher), fisher.decay), theirs, strict=True):
        if own != other:
            raise InvalidArgumentError(f"the state was accumulated with {key}={other!r}, not {own!r}.")
    _require_same_parameters(fisher, state)
    loaded = {}
    for layer in fisher.layers:
        sums = loaded[layer.name] = LayerSums.empty(layer, fisher.device, fisher.dtype)
        sums.sums = [
            local(state[f"sums/{layer.parameter_name(name)}"]).flatten().to(like, copy=True)
            for name, like in zip(layer.parameters, sums.sums, strict=True)
        ]
        numbers = state[f"counts/{layer.name}"].to(sums.counts, copy=True)
        sums.counts, sums.batches = numbers[:3].clone(), round(float(numbers[3]))
    fisher.reset()
    fisher.sums, fisher.batches = loaded, batches
    fisher.seen.copy_(state["seen"][0])
    fisher.elsewhere = float(state["seen"][1])
    fisher.failures.copy_(torch.stack([state[f"counts/{layer.name}"][4] for layer in fisher.layers]))
    if attachment is not None:
        attachment.counts[True], attachment.counts[False] = counts


def _require_same_parameters(fisher: OnlineFisher, state: Mapping[str, Tensor]) -> None:
    sizes = {
        f"sums/{layer.parameter_name(name)}": p.numel()
        for layer in fisher.layers
        for name, p in layer.parameters.items()
    }
    found = {key: value.numel() for key, value in state.items() if key.startswith("sums/")}
    different = sorted(key.removeprefix("sums/") for key in sizes.keys() ^ found.keys())
    if different:
        raise InvalidArgumentError(f"the state and the probe differ in the parameters {different}.")
    different = sorted(key.removeprefix("sums/") for key, size in sizes.items() if found[key] != size)
    if different:
        raise InvalidArgumentError(f"the state has other shapes of the parameters {different}.")


def synchronize(fisher: OnlineFisher, group: "dist.ProcessGroup | None" = None) -> None:
    """See :meth:`secorder.CurvatureProbe.synchronize`."""
    if fisher.shard is not None:
        return  # sums are those of all ranks at every step
    every = [fisher.sums[layer.name] for layer in fisher.layers]
    # Each rank goes on with its share of what all have: a later call then adds what came since.
    kept = [sums.counts[:2].clone() for sums in every]
    add_up([fisher.seen, *kept, *(total for sums in every for total in sums.sums)], group)
    ranks = dist.get_world_size(group)
    for sums, counts in zip(every, kept, strict=True):
        sums.counts[:2] = counts / ranks
        for total in sums.sums:
            total.div_(ranks)
    fisher.elsewhere = float(fisher.seen) * (1 - 1 / ranks)
    fisher.seen.div_(ranks)
