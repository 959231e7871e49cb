"""Squares of several parameters, of which some have a factor in common."""

import pytest
import torch

from secorder.layers import common_factor
from secorder.layers.common_factor import contract_each
from secorder.layers.contraction import contract
from secorder.layers.per_sample import Outer, PerSample, dense


@pytest.mark.parametrize("positions", [1, 6])
def test_some_with_one_factor(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g, other = torch.randn(2, 5, 1, positions, 4).unbind()
    in_groups = torch.randn(5, 2, positions, 2)
    parts: list[PerSample] = [
        Outer(torch.randn(5, 1, positions, 3), g),
        Outer(torch.randn(5, 1, positions, 3), other),
        Outer(None, g),
        torch.randn(5, 4, 2),
        Outer(torch.randn(5, 1, positions, 2), g),
        Outer(torch.randn(5, 2, positions, 3), in_groups),
        Outer(torch.randn(5, 2, positions, 3), in_groups),
    ]
    sizes = [12, 12, 4, 8, 8, 12, 12]
    products: list[int] = []

    def counted(part: PerSample, **options: object) -> torch.Tensor:
        products.append(1)
        return contract(part, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(common_factor, "contract", counted)
    outs = torch.full((sum(sizes),), torch.nan).split(sizes)
    contract_each(parts, outs)
    for part, size, out in zip(parts, sizes, outs, strict=True):
        torch.testing.assert_close(out, dense(part, size).square().sum(0))
    assert len(products) == len(parts) - 1
