"""Parameters that were exchanged or moved since the layers were chosen: what is recorded follows the model.

Layers that are trained only since then are not recorded, which is said.
"""

from dataclasses import replace
from operator import attrgetter

from .._arguments import listed
from .._torch.fsdp import sharded_by_gathered
from .._torch.modules import constant_in_place_of, held_parameter, parameter_table
from ..errors import InvalidArgumentError
from ..layers.selection import Layer
from .attributions import Attributions
from .fisher import OnlineFisher
from .sums import Held

_DEVICE = attrgetter("device")


def refresh(fisher: OnlineFisher, attributions: Attributions) -> bool:
    """Take note of parameters that were exchanged or moved since; whether the layers can be recorded."""
    if _as_they_were(fisher):
        return True
    if all(_others_stand_in(layer) for layer in fisher.layers):
        fisher.troubles.saw("no gradient")
        return False
    fisher.held, changed = None, False
    gathered = {} if fisher.ranks is None else sharded_by_gathered(fisher.model)
    meta, computed = [], []
    for index, layer in enumerate(fisher.layers):
        found = layer.parameters
        if any(held_parameter(layer.module, name) is not p for name, p in found.items()):
            now = dict(layer.module.named_parameters(remove_duplicate=False))
            shapes = {name: p.shape for name, p in layer.parameters.items()}
            found = {name: gathered.get(id(now[name]), now[name]) for name in shapes if name in now}
            if {name: p.shape for name, p in found.items()} != shapes:
                fisher.troubles.mark(
                    [layer.name],
                    "its parameters have other names or other shapes now (parametrized, pruned): make a new probe.",
                )
                continue
            if not all(p.is_leaf for p in found.values()):
                computed.append(layer.name)
                continue
            if any(found[name] is not p for name, p in layer.parameters.items()):
                layer = fisher.layers[index] = replace(layer, parameters=found)
                changed = True
        if any(p.is_meta for p in found.values()):
            meta.append(layer.name)
    if changed:
        attributions.forget()
    if computed:
        fisher.troubles.saw("computed")
        fisher.troubles.warn(
            f"a forward is left out, since the parameters of layers {listed(computed)} are computed from others in it "
            "(torch.func.functional_call with adapted ones): per-sample gradients are those of the model's own."
        )
        return False
    if not meta:
        fisher.follow()
    else:
        fisher.troubles.mark(meta, "its weights are on the meta device: give them memory (to_empty), and call reset().")
    return len(meta) < len(fisher.layers)


def tell_of_new(fisher: OnlineFisher) -> None:
    """Say which layers would be measured if they were chosen now: they were frozen then, or not there."""
    try:
        layers = [] if fisher.select is None else fisher.select(fisher.model)
    except InvalidArgumentError:  # what a pattern named is gone, or new and not initialised yet
        return
    others = [x for x in layers if x.name not in fisher.by_layer]
    if new := [x.name for x in others if any(p.requires_grad for p in x.parameters.values())]:
        fisher.troubles.warn(
            f"layers {listed(new)} are trained now, and were not when the probe was made (frozen, or not there yet): "
            "it does not measure them; make a new probe, or one with frozen=True before."
        )


def _others_stand_in(layer: Layer) -> bool:
    """Whether a layer holds constants in place of its parameters, such as those of a target network, for a while."""
    found = [(constant_in_place_of(layer.module, name), p) for name, p in layer.parameters.items()]
    return all(constant is not None and constant.shape == p.shape for constant, p in found)


def _as_they_were(fisher: OnlineFisher) -> bool:
    """Whether the modules hold the parameters that the layers have, where these are counted."""
    if fisher.held is None:
        every = [(layer, name, p) for layer in fisher.layers for name, p in layer.parameters.items()]
        counted = [None if p.is_meta else fisher.by_layer[layer.name].counts.device for layer, _, p in every]
        places = [(layer.module, name, "." in name) for layer, name, _ in every]
        fisher.held = Held(places, [id(p) for *_, p in every], counted)
    places, parameters, devices = fisher.held
    found = [
        held_parameter(module, name) if inner else parameter_table(module).get(name) for module, name, inner in places
    ]
    if list(map(id, found)) != parameters or list(map(_DEVICE, found)) != devices:
        return False
    return fisher.counted.device == devices[0]
