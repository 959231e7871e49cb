"""The same work by other libraries: each function returns something to call, or raises where a peer refuses.

A peer that is not installed is left out. ``pip install -e '.[bench]'`` installs those that have no pin of torchvision;
the command that installs the others is printed by ``python -m tests.benchmarks --help``.
"""

import copy
import importlib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .workloads import Workload

Work = Callable[[], Tensor]
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(name) is not None


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


# ---- BackPACK


def _backpack_extended(work: Workload) -> tuple[nn.Module, nn.Module]:
    from backpack import extend

    model = copy.deepcopy(work.model)
    chain = all(isinstance(m, nn.Sequential) or not list(m.children()) for m in model.modules())
    return extend(model, use_converter=not chain), extend(nn.CrossEntropyLoss())


def _backpack(work: Workload, extension: object, attribute: str) -> Work:
    from backpack import backpack

    model, loss_fn = _backpack_extended(work)

    def run() -> Tensor:
        model.zero_grad()
        with backpack(extension):
            loss_fn(model(work.inputs), work.targets).backward()
        return _flat([getattr(p, attribute) for p in model.parameters()])

    run()
    return run


def backpack_step(work: Workload, make_optimizer: Optimizer, extension: str) -> Callable[[], None]:
    """A training step with one of BackPACK's extensions, by name."""
    from backpack import backpack, extensions

    model, loss_fn = _backpack_extended(work)
    optimizer = make_optimizer(list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        with backpack(getattr(extensions, extension)()):
            loss_fn(model(work.inputs), work.targets).backward()
        optimizer.step()

    step()
    return step


def backpack_fisher(work: Workload) -> Work:
    """The empirical Fisher by SumGradSquared: gradients of the mean loss, so times N."""
    from backpack import extensions

    run = _backpack(work, extensions.SumGradSquared(), "sum_grad_squared")
    return lambda: run().mul_(len(work.inputs))


def backpack_type_2(work: Workload) -> Work:
    """The exact GGN diagonal."""
    from backpack import extensions

    return _backpack(work, extensions.DiagGGNExact(), "diag_ggn_exact")


def backpack_mc(work: Workload) -> Work:
    """One Monte Carlo draw of the GGN diagonal."""
    from backpack import extensions

    return _backpack(work, extensions.DiagGGNMC(mc_samples=1), "diag_ggn_mc")


def backpack_hessian(work: Workload) -> Work:
    """The exact Hessian diagonal."""
    from backpack import extensions

    return _backpack(work, extensions.DiagHessian(), "diag_h")


# ---- torch.func, opacus, nngeometry


def func_fisher(work: Workload) -> Work:
    """vmap of grad, what PyTorch's own tutorial does."""
    model = copy.deepcopy(work.model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (x[None],)), t[None])

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return lambda: _flat([(g**2).mean(0) for g in per_sample(parameters, work.inputs, work.targets).values()])


def opacus_fisher(work: Workload) -> Work:
    """Per-sample gradients of opacus, squared."""
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(work.model).train(), loss_reduction="mean")
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise TypeError("opacus refuses batch normalisation")

    def run() -> Tensor:
        model.zero_grad()
        F.cross_entropy(model(work.inputs), work.targets).backward()
        return _flat([(p.grad_sample**2).mean(0) for p in model.parameters()])

    run()
    return run


def opacus_step(work: Workload, make_optimizer: Optimizer) -> Callable[[], None]:
    """A training step with the norms of per-sample gradients by opacus' ghost clipping, nothing clipped."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    inner = copy.deepcopy(work.model)
    for module in inner.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise TypeError("opacus refuses batch normalisation")
    model = GradSampleModuleFastGradientClipping(inner, max_grad_norm=1.0, use_ghost_clipping=True)
    optimizer = make_optimizer(list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(work.inputs), work.targets).backward()
        model.get_norm_sample()
        optimizer.step()

    step()
    return step


def nngeometry_fisher(work: Workload) -> Work:
    """The type-2 Fisher diagonal of nngeometry."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    model = copy.deepcopy(work.model)
    loader = DataLoader(TensorDataset(work.inputs, work.targets), batch_size=len(work.inputs))

    def run() -> Tensor:
        return FIM(model, loader, PMatDiag, variant="classif_logits").get_diag().detach()

    run()
    return run


# ---- torch-secorder


def _torch_secorder() -> ModuleType:
    """The package in the folder that ``TORCH_SECORDER`` names: our alias bears its import name."""
    folder = os.environ.get("TORCH_SECORDER", "")
    if not os.path.isdir(os.path.join(folder, "torch_secorder")):
        raise ImportError("TORCH_SECORDER names no folder with torch_secorder")
    kept = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "torch_secorder"}
    for name in kept:
        del sys.modules[name]
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("torch_secorder.core.per_layer_curvature")
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_secorder"]:
            del sys.modules[name]
        sys.modules.update(kept)


def torch_secorder_hessian(work: Workload) -> Work:
    """Its per-layer Hessian diagonal."""
    module, model = _torch_secorder(), copy.deepcopy(work.model)
    return lambda: _flat(
        list(module.per_layer_hessian_diagonal(model, F.cross_entropy, work.inputs, work.targets).values())
    )


def torch_secorder_extrapolated(work: Workload, elements: int = 300) -> float:
    """Seconds that it would take, by so many parameter elements of each layer times the layer's number of them."""
    module, grad, total = _torch_secorder(), torch.autograd.grad, 0.0

    class Enough(Exception):
        pass

    class Chosen(nn.Linear):
        pass

    for index, layer in enumerate(work.model.children()):
        if not isinstance(layer, nn.Linear):
            continue
        model, calls = copy.deepcopy(work.model), 0
        model[index].__class__ = Chosen  # type: ignore[index]
        start = 0.0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, start
            calls += 1
            if calls == 2:  # the first is the gradient itself
                start = time.perf_counter()
            if calls == elements + 2:
                raise Enough
            return grad(*args, **kwargs)

        torch.autograd.grad = counted
        try:
            module.per_layer_hessian_diagonal(model, F.cross_entropy, work.inputs, work.targets, layer_types=(Chosen,))
        except Enough:
            pass
        finally:
            torch.autograd.grad = grad
        total += (time.perf_counter() - start) / elements * sum(p.numel() for p in layer.parameters())
    return total


# ---- estimates of the Hessian diagonal


def _curvlinops(work: Workload) -> Any:
    from curvlinops import HessianLinearOperator

    model = copy.deepcopy(work.model)
    return HessianLinearOperator(
        model, _criterion(work), list(model.parameters()), [(work.inputs, work.targets)], check_deterministic=False
    )


def _criterion(work: Workload) -> nn.Module:
    """The loss as a module, as peers want it."""
    return work.loss_fn if isinstance(work.loss_fn, nn.Module) else nn.CrossEntropyLoss()


def curvlinops_hutchinson(work: Workload, draws: int) -> Work:
    """Hutchinson's diagonal in the space of the parameters, by curvlinops."""
    from curvlinops import hutchinson_diag

    operator = _curvlinops(work)
    return lambda: hutchinson_diag(operator, num_matvecs=draws).detach()


def curvlinops_xdiag(work: Workload, draws: int) -> Work:
    """XDiag, with the directions of largest curvature taken out."""
    from curvlinops import xdiag

    operator = _curvlinops(work)
    return lambda: xdiag(operator, num_matvecs=draws).detach()


def pyhessian_hutchinson(work: Workload, draws: int) -> Work:
    """The same with PyHessian's Hessian-vector product (its trace, before it is summed)."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    model = copy.deepcopy(work.model)

    def run() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            computer = hessian(model, _criterion(work), data=(work.inputs, work.targets), cuda=False)
        total = torch.zeros(sum(p.numel() for p in computer.params))
        for _ in range(draws):
            v = [torch.randint_like(p, high=2) * 2 - 1 for p in computer.params]
            found = hessian_vector_product(computer.gradsH, computer.params, v)
            total += _flat([a * b for a, b in zip(v, found, strict=True)]) / draws
        return total

    return run
