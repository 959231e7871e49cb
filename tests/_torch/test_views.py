"""Parts of a vector that are put together again."""

import torch

from secorder._torch.views import joined


def test_parts_of_one_vector_are_joined_without_a_copy() -> None:
    base = torch.arange(8.0)
    first, second = base.split([6, 2])
    assert joined([first, second]) is base
    assert joined([first.mul_(2), second]) is base
    for parts in ([second, first], [first, second.clone()], [base[:6], base[4:6]], [first], [base[::2], base[4:]]):
        assert joined(parts) is not base
        assert torch.equal(joined(parts), torch.cat(parts))
    w = torch.ones(8, requires_grad=True)
    assert joined((w * 2).split([6, 2])).requires_grad
