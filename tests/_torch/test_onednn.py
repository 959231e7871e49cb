"""Matrix products by oneDNN against those in float64, however the factors lie in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secorder._torch import onednn
from secorder._torch.onednn import linear_by_onednn, multiplied_by_onednn, product_by_onednn

ROWS, INNER, COLUMNS = 24, 40, 56

LEFT = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "cut_out": lambda x: torch.nn.functional.pad(x, (3, 2))[:, 3:-2],
    "every_other_row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every_other_column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one_row": lambda x: x[:1].expand_as(x),
    "one_column": lambda x: x[:, :1].expand_as(x),
    "one_number": lambda x: x[0, 0].expand_as(x),
}


def has_it() -> bool:
    return multiplied_by_onednn(torch.zeros(1, dtype=torch.float32), onednn.ALONE)


@pytest.mark.skipif(not has_it(), reason="PyTorch was built without oneDNN, or for another processor")
@pytest.mark.parametrize("right", LEFT)
@pytest.mark.parametrize("left", LEFT)
def test_product_of_factors_in_any_layout(left: str, right: str) -> None:
    a = LEFT[left](torch.randn(ROWS, INNER, dtype=torch.float32))
    b = LEFT[right](torch.randn(INNER, COLUMNS, dtype=torch.float32))
    before: list[Tensor] = [a.clone(), b.clone()]
    found = product_by_onednn(a, b)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


class _Seen(TorchDispatchMode):
    """The right factors of products, transposed, as oneDNN gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.right: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_linear_pointwise" in str(function):
            self.right.append(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not has_it(), reason="PyTorch was built without oneDNN, or for another processor")
@pytest.mark.parametrize("right", LEFT)
def test_right_factors_are_dense(right: str) -> None:
    """Of others oneDNN has products that take a thousand times as long; what is dense is not copied."""
    b = LEFT[right](torch.randn(INNER, COLUMNS, dtype=torch.float32))
    with _Seen() as seen:
        product_by_onednn(torch.randn(ROWS, INNER, dtype=torch.float32), b)
    (given,) = seen.right
    assert given.is_contiguous() or given.t().is_contiguous()
    assert (given.data_ptr() == b.data_ptr()) == (right in ("contiguous", "transposed"))


def test_what_is_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    single = torch.zeros(2, dtype=torch.float32)
    assert not multiplied_by_onednn(single, onednn.ALONE - 1)
    assert not multiplied_by_onednn(single.double(), onednn.ALONE)
    assert not multiplied_by_onednn(single.bfloat16(), onednn.ALONE)
    assert not multiplied_by_onednn(single.to("meta"), onednn.ALONE)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not multiplied_by_onednn(single, onednn.ALONE)


@pytest.mark.skipif(not has_it(), reason="PyTorch was built without oneDNN, or for another processor")
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_and_what_comes_back_through_it(biased: bool) -> None:
    x, w, b = (torch.randn(*shape, dtype=torch.float32) for shape in ((ROWS, INNER), (COLUMNS, INNER), (COLUMNS,)))
    parameters = [nn.Parameter(w), nn.Parameter(b)]
    cotangents = torch.randn(3, ROWS, COLUMNS, dtype=torch.float32)
    x.requires_grad_(True)
    z = linear_by_onednn(x, parameters[0], parameters[1] if biased else None)
    expected = torch.nn.functional.linear(x.double(), w.double(), b.double() if biased else None)
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(z, x, cotangents, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found.double(), cotangents.double() @ w.double(), rtol=1e-5, atol=1e-5)
    cotangent = cotangents[0].clone().requires_grad_(True)
    (alone,) = torch.autograd.grad(z, x, cotangent, retain_graph=True, create_graph=True)
    torch.testing.assert_close(alone, found[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        alone.sum().backward()
    assert linear_by_onednn(x.detach(), parameters[0], None).grad_fn is not None
