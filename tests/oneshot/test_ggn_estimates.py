"""Draws of the Gauss-Newton matrix on the model's outputs."""

import pytest
import torch
from torch import Tensor, nn

from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.trace import traces

from ..helpers import measured, seed, seeded


def test_a_drawn_ggn_is_unbiased_and_tells_its_error() -> None:
    """On the outputs, for layers with a rule, for operations and for what is left; the head is exact."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * self.scale)

    seed()
    model = nn.Sequential(Scaled(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 40))
    batch = torch.randn(5, 4), torch.randint(40, (5,))
    exact = measured(lambda task: traces(task, Budget("exact"), of="ggn", by="parameter"), model, batch)
    draws = [
        measured(
            lambda task: traces(task, Budget("hutchinson", 12), of="ggn", by="parameter"),
            model,
            batch,
            generator=seeded(k),
        )
        for k in range(80)
    ]
    for name, told in exact.items():
        if name.startswith("3"):
            assert draws[0][name].num_draws == 0
            assert draws[0][name].value == pytest.approx(told.value, rel=1e-5)
            continue
        values = torch.tensor([d[name].value for d in draws])
        errors = torch.tensor([d[name].standard_error for d in draws])
        assert {d[name].num_draws for d in draws} == {6}
        assert abs(values.mean() - told.value) < 4 * values.std() / len(draws) ** 0.5
        assert 0.5 < errors.square().mean() / values.var() < 2.0
