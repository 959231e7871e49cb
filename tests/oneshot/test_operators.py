"""Blocks as operators: products against matrices formed whole."""

from contextlib import closing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder.oneshot.hessian.layer_graph import LayerGraph
from secorder.oneshot.measurement import Measurement
from secorder.oneshot.operators import ProductInZ, operators

from ..helpers import Net, Twice, data, make, measured
from ..reference import assert_close


def whole(model: nn.Module, of: str, batch: tuple[Tensor, Tensor], layer: str) -> Tensor:
    """A layer's block, in float64."""
    names = [n for n, _ in model.named_parameters() if n.startswith(f"{layer}.")]
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    sizes, shapes = [parameters[n].numel() for n in names], [parameters[n].shape for n in names]

    def output(flat: Tensor) -> Tensor:
        parts = {n: p.view(s) for n, p, s in zip(names, flat.split(sizes), shapes, strict=True)}
        return torch.func.functional_call(model, parameters | parts, (batch[0],))

    flat = torch.cat([parameters[n].flatten() for n in names])
    if of == "hessian":
        return torch.func.hessian(lambda v: F.cross_entropy(output(v), batch[1]))(flat)
    jacobian, f = torch.func.jacrev(output)(flat), output(flat)
    p = f.softmax(1)
    if of == "ggn":
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    else:
        g = p - F.one_hot(batch[1], 3)
        middle = g[:, :, None] * g[:, None]
    return torch.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian) / len(f)


def sized() -> nn.Module:
    """A layer's calls take more than tensors."""
    size = [5, 6]
    return Net(
        lambda m, x: m.b(m.c(x.view(-1, 1, 2, 2), output_size=size).tanh().flatten(1)),
        c=nn.ConvTranspose2d(1, 1, 3, stride=2),
        b=nn.Linear(30, 3),
    )


@pytest.mark.parametrize("of", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("kind", [make, Twice, sized])
def test_products_are_those_of_the_block(kind: Any, of: Any) -> None:
    model, batch = kind(), data()

    def work(task: Measurement) -> list[tuple[str, Tensor, Tensor]]:
        found = []
        with closing(operators(task, of)) as blocks:
            for layer, product in blocks:
                assert product is not None
                v = torch.randn(sum(p.numel() for p in layer.parameters.values()))
                found.append((layer.name, v, product(v)))
        return found

    for name, v, product in measured(work, model, batch):
        assert_close(product, whole(model, of, batch, name) @ v)


@pytest.mark.parametrize("of", ["hessian", "ggn", "fisher"])
def test_the_block_of_what_is_not_used_is_none(of: Any) -> None:
    model = Net(lambda m, x: m.a(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3))

    def work(task: Measurement) -> dict[str, bool]:
        with closing(operators(task, of)) as blocks:
            return {layer.name: product is None for layer, product in blocks}

    assert measured(work, model, data()) == {"a": False, "b": True}


def test_a_block_goes_by_its_calls_where_the_rule_is_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is not the adjoint of what the layer does is seen, and the parameters themselves are taken."""

    def strategies(task: Measurement) -> list[bool]:
        with closing(operators(task, "hessian")) as blocks:
            return [isinstance(product, ProductInZ) for _, product in blocks]

    for build, batch in ((make, data()), (Twice, data())):
        assert any(measured(strategies, build(), batch))
    gradients = LayerGraph.gradients
    monkeypatch.setattr(LayerGraph, "gradients", lambda self, u: gradients(self, [1.01 * x for x in u]))
    assert measured(strategies, make(), data()) == [False, False]
