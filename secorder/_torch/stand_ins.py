"""Tensors that a module holds in place of a parameter for a while: what a target network's forward computes with."""

from torch import Tensor, nn


def constant_in_place_of(module: nn.Module, name: str) -> Tensor | None:
    """What a module holds by a parameter's name (``"weight"``, ``"0.weight"``), if it is no parameter and constant.

    ``torch.func.functional_call`` puts such tensors where parameters are, others among buffers or plain attributes.
    """
    path, _, local = name.rpartition(".")
    holder = dict(module.named_modules(remove_duplicate=False)).get(path)
    if holder is None:
        return None
    found = {**vars(holder), **holder._buffers, **holder._parameters}.get(local)
    if not isinstance(found, Tensor) or isinstance(found, nn.Parameter) or found.requires_grad:
        return None
    return found
