"""Forwards that tell by their calls whether samples are independent: exact Fishers, or the refusal of coupled ones."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CouplingError, CurvatureProbe
from secorder._torch.sample_graph import samples_in_nodes
from secorder.oneshot import fisher, provenance
from secorder.oneshot.measurement import Measurement

from .. import helpers
from ..helpers import Net, data, run_again_where_nothing_tells
from ..reference import assert_all_close, fisher_by_sample

N = 12


def measured(function: Callable[[Any, Tensor], Tensor], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The Fisher of a model, and that of a loop over its samples."""
    torch.manual_seed(0)
    model = Net(function, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    x, t = torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N,))
    with CurvatureProbe(model) as probe:
        found = probe.fisher_diagonal(F.cross_entropy, x, t, **options).by_parameter()
    return found, fisher_by_sample(model, F.cross_entropy, x, t, N)


def by_halves(m: Any, x: Tensor) -> Tensor:
    """Control flow that depends on a value, sample by sample."""
    return m.b(torch.stack([row.tanh() if row[0] > 0 else 2 * row for row in m.a(x)]))


def hooked(m: Any, x: Tensor) -> Tensor:
    """Gradients that are clamped element by element, as in training."""
    z = m.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g.clamp(-0.05, 0.05))
    return m.b(z.tanh())


def hooked_node(m: Any, x: Tensor) -> Tensor:
    """The same by a hook on the operation, of which the tensor knows nothing."""
    z = m.a(x) * 1
    if z.grad_fn is not None:
        z.grad_fn.register_hook(lambda behind, _: tuple(g if g is None else g.clamp(-0.05, 0.05) for g in behind))
    return m.b(z.tanh())


BENIGN = {
    "plain": lambda m, x: m.b(torch.tanh(m.a(x)) + x.mean(1, keepdim=True)),
    "residual": lambda m, x: m.b((lambda h: h + F.layer_norm(F.gelu(h), (4,)))(m.a(x))),
    "in place": lambda m, x: m.b(m.a(x).mul_(2).tanh_()),
    "input changed": lambda m, x: m.b(torch.tanh(m.a(x.mul_(2)))),
    "through numpy": lambda m, x: m.b(torch.tanh(m.a(torch.from_numpy(2 * x.numpy())))),
    "detached": lambda m, x: m.b(m.a(x) * m.a(x).detach().tanh()),
    "by halves": by_halves,
    "hooked": hooked,
    "hooked node": hooked_node,
}


@pytest.mark.parametrize("name", BENIGN)
def test_independent_samples_are_exact(name: str) -> None:
    found, expected = measured(BENIGN[name])
    assert_all_close(found, expected)


def forces(m: Any, x: Tensor) -> Tensor:
    """The model differentiates itself."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        return m.b(m.a(torch.autograd.grad(m.a(x).square().sum(), x, create_graph=True)[0].tanh()))


ONEDNN = {
    **{name: BENIGN[name] for name in ("plain", "residual", "in place", "through numpy", "detached", "by halves")},
    "forces": forces,
    "positions": lambda m, x: m.b(torch.tanh(m.a(x.view(-1, 1, 3) * torch.arange(1, 6)[:, None]))).mean(1),
    "without bias": lambda m, x: F.linear(torch.tanh(m.a(x)), m.b.weight),
    "addmm": lambda m, x: torch.addmm(m.b.bias, torch.tanh(m.a(x)), m.b.weight.t()),
    "tied": lambda m, x: m.b(torch.tanh(m.a(F.linear(m.a(x), m.a.weight.t())))),
    "checkpoint": lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False)),
    "transform": lambda m, x: m.b(torch.vmap(lambda one: m.a(one).tanh())(x)),
}


@pytest.mark.parametrize("options", [{}, {"fisher_type": "type-2"}], ids=str)
@pytest.mark.parametrize("name", ONEDNN)
def test_products_by_onednn_are_read_as_those_of_pytorch(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, expected = measured(ONEDNN[name], **options)
    helpers.by_onednn(monkeypatch)
    found, _ = measured(ONEDNN[name], **options)
    assert_all_close(found, plain if options else expected)


@run_again_where_nothing_tells
@pytest.mark.parametrize("name", ["plain", "residual"])
def test_what_the_graph_tells_needs_no_further_pass(name: str) -> None:
    with patch.object(fisher, "outputs_independent") as compared:
        measured(BENIGN[name])
    assert not compared.called


def capacity(m: Any, x: Tensor) -> Tensor:
    """Of those routed to an expert, the first two are served."""
    h = m.a(x)
    routed = h[:, 0] > 0
    served = routed & (routed.long().cumsum(0) <= 2)
    return m.b(torch.where(served[:, None], h.tanh(), h))


def hooked_together(m: Any, x: Tensor) -> Tensor:
    """Gradients that are divided by the norm of all samples'."""
    z = m.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g / (1 + 10 * g.norm()))
    return m.b(z.tanh())


COUPLED = {
    "detached statistics": lambda m, x: m.b(m.a(x) / m.a(x).detach().std(0, correction=0).add(0.1)),
    "statistics without a graph": lambda m, x: m.b(torch.tanh(m.a(x - x.detach().mean(0)))),
    "statistics of the inputs": lambda m, x: m.b(torch.tanh(m.a(x - x.mean(0)))),
    "a number": lambda m, x: m.b(m.a(x) * m.a(x).abs().max().item()),
    "a list": lambda m, x: m.b(m.a(x) * sum(m.a(x)[:, 0].tolist())),
    "data": lambda m, x: m.b(m.a(x) * m.a(x).data.mean()),
    "the first": lambda m, x: m.b(torch.tanh(m.a(x) + x[:1, :1])),
    "the late ones": lambda m, x: m.b(torch.cat([m.a(x)[:10], m.a(x)[10:] + m.a(x)[:1]])),
    "order": lambda m, x: m.b(m.a(x.sort(0).values)),
    "neighbours": lambda m, x: m.b(m.a(x + x.roll(1, 0))),
    "capacity": capacity,
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_are_refused(name: str) -> None:
    with pytest.raises(CouplingError):
        measured(COUPLED[name])


def test_hooks_that_couple_are_seen() -> None:
    """One sample at a time, the hook does what it does to a batch of one."""
    found, expected = measured(hooked_together)
    assert_all_close(found, expected)


@pytest.mark.parametrize("name", ["hooked", "hooked node"])
@pytest.mark.parametrize("options", [{"fisher_type": "mc"}, {"fisher_type": "type-2"}, {"rtol": 0.1}])
def test_hooks_that_clamp_have_no_jacobian(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(AttributionError, match="not linear"):
        measured(BENIGN[name], **{"fisher_type": "type-2", **options})


def test_outputs_of_the_inputs_alone_require_no_gradient() -> None:
    def loss_fn(output: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        assert not output[1].requires_grad
        return F.cross_entropy(output[0], t)

    x, t = torch.randn(6, 3), torch.randint(2, (6,))
    with CurvatureProbe(Net(lambda m, x: (m.a(x), 2 * x), a=nn.Linear(3, 2))) as probe:
        probe.fisher_diagonal(loss_fn, x, t)
    assert not x.requires_grad


def test_a_graph_is_read_once_for_inputs_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(1)
        return samples_in_nodes(*args, **kwargs)

    def work(task: Measurement) -> None:
        traced = task.traced(inputs=True)
        output = traced(task.inputs)
        again = samples_in_nodes([output], 6)
        assert traced.inner_sizes([output]) == again
        assert len(read) == 1
        assert traced.inner_sizes([output.square()]) != again  # of another tensor it tells anew
        assert len(read) == 2

    monkeypatch.setattr(provenance, "samples_in_nodes", counted)
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    helpers.measured(work, model, data())
