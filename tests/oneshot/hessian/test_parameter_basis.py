"""The basis of the parameters: exact for any layer."""

import pytest
from torch import nn

from secorder._torch import vjp
from secorder._torch.memory import most_bytes
from secorder._torch.vjp import CHUNK_BYTES
from secorder.oneshot.hessian import parameter_basis
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.facts import Facts

from ...helpers import Twice, data, make, mlp
from ...reference import assert_close
from .strategies import exact, on_theta


@pytest.mark.parametrize(("build", "layer"), [(mlp, "0"), (Twice, "a"), (lambda: make(nn.BatchNorm1d(5)), "1")])
def test_it_is_exact_with_a_product_for_each_element(build, layer: str) -> None:  # type: ignore[no-untyped-def]
    model, batch, told = build(), data(), []

    def run(task, own, gradients):  # type: ignore[no-untyped-def]
        return parameter_basis.run(task, own, gradients, 10, told.append)

    found = on_theta(run, model, batch, layer)
    for value, expected in zip(found, exact(model, batch, layer), strict=True):
        assert_close(value, expected)
    assert sum(told) == sum(p.numel() for p in model.get_submodule(layer).parameters())


def test_products_are_gone_before_there_are_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vjp, "ALONE_BYTES", 1 << 40)
    model, batch = nn.Sequential(nn.Linear(4, 600), nn.Tanh(), nn.Linear(600, 3)), data()

    def peak(limit: int) -> int:
        def run(task, own, gradients):  # type: ignore[no-untyped-def]
            elements = CHUNK_BYTES["cpu"] // (32 * 8)  # eight at once
            return most_bytes(lambda: parameter_basis.run(task, own, gradients, elements, lambda _: None, limit))

        return int(on_theta(run, model, batch, "0"))

    assert peak(100) < 1.1 * peak(8)


def test_it_applies_everywhere() -> None:
    facts = Facts("0", 30, own_use=False, samples_independent=False)
    assert parameter_basis.applies(facts)
    assert parameter_basis.products(facts, Budget()) == 30
