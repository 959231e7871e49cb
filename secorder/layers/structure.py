"""Properties that follow from a model's structure: independent samples, pure functions, piecewise linear tails."""

from torch import Tensor, nn

from .._torch.modules import (
    backward_hooks,
    backward_hooks_on_all_modules,
    forward_hooks,
    has_hooks,
    hooks_on_all_modules,
    modules_in,
    own_attributes,
    own_tensors,
)
from .._torch.own_hooks import OwnHook, is_own
from .._torch.surroundings import function_modes

_Types = tuple[type[nn.Module], ...]

_DROPOUTS: _Types = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_BATCH_NORMS: _Types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: Those that treat rows alone and are piecewise linear.
_BOTH: _Types = (
    nn.Identity, *_DROPOUTS,
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip

_ROWWISE: _Types = (
    nn.Sequential, *_BOTH, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardswish, nn.LogSigmoid, nn.Softsign, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding,
)  # fmt: skip

_PIECEWISE_LINEAR: _Types = (*_BOTH, nn.Flatten, *_BATCH_NORMS)


def independent_by_structure(model: nn.Module, sample_dim: int = 0) -> bool:
    """Whether samples are in dim 0 and the model is a chain of torch's own layers that all treat its rows alone."""

    def rowwise(module: nn.Module) -> bool:
        if "forward" in module.__dict__:
            return False
        if has_hooks(module):
            own = all(isinstance(hook, OwnHook) for hook in forward_hooks(module))
            if backward_hooks(module) or not own:
                return False
        if type(module) is nn.Flatten:
            return module.start_dim >= 1
        if type(module) in _BATCH_NORMS:
            return not module.training and getattr(module, "running_mean", None) is not None
        return type(module) in _ROWWISE

    if sample_dim != 0 or backward_hooks_on_all_modules() or not all(map(is_own, hooks_on_all_modules())):
        return False
    return all(map(rowwise, modules_in(model)))


def pure_by_structure(model: nn.Module) -> bool:
    """Whether a model that :func:`independent_by_structure` knows is a function of parameters, buffers and input alone.

    It draws no random numbers then, writes nothing, its input included, holds no tensors in other places and none of
    inference, and gives dense gradients; no function mode of the user's sees its calls.
    """

    def pure(module: nn.Module) -> bool:
        if module.training and isinstance(module, _DROPOUTS):
            return False
        own = own_attributes(module)
        writes = own.get("inplace") or own.get("max_norm") is not None or own.get("sparse")
        if writes or True in [isinstance(value, Tensor) for value in own.values()]:
            return False
        return True not in [t.is_inference() for t in own_tensors(module)]

    return not function_modes() and all(map(pure, modules_in(model)))


def linear_by_structure(model: nn.Module, module: nn.Module) -> bool:
    """Whether, in a model that :func:`independent_by_structure` knows, all after a module is piecewise linear."""
    chain = chain_of(model)
    places = [index for index, m in enumerate(chain) if m is module]
    return len(places) == 1 and all(type(m) in _PIECEWISE_LINEAR for m in chain[places[0] + 1 :])


def chain_of(model: nn.Module) -> list[nn.Module]:
    """The modules of nested ``nn.Sequential`` in the order in which they run."""
    if type(model) is nn.Sequential:
        return [m for child in model for m in chain_of(child)]
    return [model]
