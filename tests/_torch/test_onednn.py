"""Matrix products by oneDNN against those in float64, however the factors lie in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secorder._torch import onednn
from secorder._torch.graph import can_be_run, operation_of, outputs_of, recomputed, run_node, saved
from secorder._torch.onednn import addmm_by_onednn, linear_by_onednn, multiplied_by_onednn, product_by_onednn

from ..helpers import by_onednn

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


#: By name, a product by oneDNN and by PyTorch, both of x, weight and bias.
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "linear": (linear_by_onednn, nn.functional.linear),
    "without_bias": (lambda x, w, _: linear_by_onednn(x, w), lambda x, w, _: nn.functional.linear(x, w)),
    "addmm": (lambda x, w, b: addmm_by_onednn(b, x, w.t()), lambda x, w, b: torch.addmm(b, x, w.t())),
}


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    by_onednn(monkeypatch)


def drawn(rows: int = 3, inner: int = 4, columns: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight and bias."""
    shapes = (rows, inner), (columns, inner), (columns,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("call", CALLS)
def test_a_product_can_be_differentiated_as_often_as_one_likes(call: str) -> None:
    ours, _ = CALLS[call]

    def curved(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        result: Tensor = ours(x, w, b).tanh() + b
        return result

    assert torch.autograd.gradcheck(curved, drawn(), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(curved, drawn(), check_batched_grad=True)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("call", CALLS)
def test_many_products_at_once_are_differentiated_too(call: str, wanted: int) -> None:
    given, cotangents = drawn(), torch.randn(5, 3, 2, dtype=torch.float64)
    found = []
    for product in CALLS[call]:
        x, w, b = given
        z = product(x.tanh(), w, b).sin()
        gradients = torch.autograd.grad(z, [x, w], cotangents, is_grads_batched=True, create_graph=True)
        total = torch.stack([g.sin().sum() for g in gradients]).sum()
        found.append(torch.autograd.grad(total, given[wanted], allow_unused=True)[0])
    ours, theirs = found
    if theirs is None:
        assert ours is None
    else:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("call", CALLS)
def test_its_node_is_read_as_that_of_pytorch(call: str) -> None:
    given = drawn()
    outputs = [f(*given) for f in CALLS[call]]  # a node is read while its output is there
    ours, theirs = (z.grad_fn for z in outputs)
    assert ours.name() == theirs.name()
    assert operation_of(ours) == operation_of(theirs) != ""
    assert [n and n.name() for n, _ in ours.next_functions] == [n and n.name() for n, _ in theirs.next_functions]
    assert outputs_of(ours) == outputs_of(theirs)
    assert can_be_run(ours)
    assert recomputed(ours) is recomputed(theirs)
    for name in ("self", "mat2") if call == "without_bias" else ("mat1", "mat2", "alpha", "beta"):
        assert torch.equal(torch.as_tensor(saved(ours, name)), torch.as_tensor(saved(theirs, name)))
    g = torch.randn(3, 2, dtype=torch.float64)
    for index in range(len(ours.next_functions)):
        torch.testing.assert_close(run_node(ours, [g], index), run_node(theirs, [g], index))


@pytest.mark.usefixtures("everything")
def test_what_a_backward_pass_does_not_want_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = drawn()
    z = linear_by_onednn(x * 2, w * 1, b)
    assert z is not None
    calls: list[Any] = []
    monkeypatch.setattr(onednn, "product_by_onednn", lambda *factors: calls.append(factors) or factors[0] @ factors[1])
    torch.autograd.grad(z, x, torch.ones_like(z), retain_graph=True)
    assert len(calls) == 1
    torch.autograd.grad(z, [x, w, b], torch.ones_like(z), retain_graph=True)
    assert len(calls) == 3
    torch.autograd.grad(z, b, torch.ones_like(z))
    assert len(calls) == 3


@pytest.mark.skipif(not has_it(), reason="PyTorch was built without oneDNN, or for another processor")
@pytest.mark.parametrize("call", CALLS)
def test_large_products(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "ALONE", ROWS * INNER * COLUMNS)
    ours, theirs = CALLS[call]
    given = drawn(ROWS, INNER, COLUMNS, torch.float32)
    exact = [t.detach().double().requires_grad_(True) for t in given]
    z, expected = ours(*given), theirs(*exact)
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)
    for shape in ((), (3,)):
        cotangents = torch.randn(*shape, *z.shape, dtype=torch.float64)
        found, true = (
            torch.autograd.grad(f, t, c, is_grads_batched=bool(shape), retain_graph=True, allow_unused=True)
            for f, t, c in ((z, given, cotangents.float()), (expected, exact, cotangents))
        )
        for ours_of_one, theirs_of_one in zip(found, true, strict=True):
            if theirs_of_one is None:
                assert ours_of_one is None
            else:
                torch.testing.assert_close(ours_of_one.double(), theirs_of_one, rtol=1e-5, atol=1e-4)


def _left_alone() -> dict[str, Callable[[], Any]]:
    """Calls that are PyTorch's own affair."""
    x, w, b = drawn()

    def under(context: Callable[[], Any]) -> Tensor | None:
        with context():
            return linear_by_onednn(x, w, b)

    def forward_mode() -> Tensor | None:
        with torch.autograd.forward_ad.dual_level():
            return linear_by_onednn(x, w, b)

    def transformed() -> Tensor | None:
        seen: list[Tensor | None] = []
        torch.vmap(lambda one: seen.append(linear_by_onednn(x, w, b)) or one)(torch.zeros(2))
        return seen[0]

    class Mine(Tensor):
        pass

    return {
        "vector": lambda: linear_by_onednn(x[0], w, b),
        "other_width": lambda: linear_by_onednn(x[:, :2], w, b),
        "one_bias_for_all": lambda: linear_by_onednn(x, w, b[:1]),
        "other_dtype": lambda: linear_by_onednn(x, w.half(), b),
        "subclass": lambda: linear_by_onednn(x.as_subclass(Mine), w, b),
        "sparse": lambda: linear_by_onednn(x, w.detach().to_sparse(), b),
        "rows_apart": lambda: linear_by_onednn(x.t().contiguous().t(), w, b),
        "number": lambda: addmm_by_onednn(1.0, x, w.t()),
        "matrix_added": lambda: addmm_by_onednn(x @ w.t(), x, w.t()),
        "autocast": lambda: under(lambda: torch.autocast("cpu", torch.bfloat16)),
        "saved_elsewhere": lambda: under(lambda: torch.autograd.graph.save_on_cpu()),
        "transform": transformed,
        "forward_mode": forward_mode,
    }


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("case", _left_alone())
def test_what_is_left_to_pytorch(case: str) -> None:
    assert _left_alone()[case]() is None
    assert linear_by_onednn(*drawn()) is not None
