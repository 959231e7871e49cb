"""The operations in which parameters meet the samples, in a graph."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from secorder._torch.graph import users_of
from secorder.layers.layout import Layout
from secorder.layers.operations import OperationCall
from secorder.layers.per_sample import Outer, dense
from secorder.layers.uses import (
    MOST_RUN,
    Later,
    Piece,
    Use,
    brought,
    find_uses,
    hidden,
    pieces,
    reentrant,
)  # fmt: skip

from ..helpers import Doubled


def routes(z: Tensor, followed: set[tuple[str, ...]], **parameters: Tensor) -> list[tuple[str, ...]] | None:
    found = find_uses(users_of([z]), parameters, followed)
    return None if found is None else sorted(route for use in found.uses for route in use.routes)


def test_moves_are_followed_and_other_operations_as_is_told() -> None:
    w, x = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    z = x @ (1 + w).t() + w[:, 0]
    assert routes(z, set(), w=w) == [("w", "AddBackward0 0"), ("w", "AddBackward0 1")]
    assert routes(z, {("w", "AddBackward0 0")}, w=w) == [
        ("w", "AddBackward0 0", "MmBackward0 1"),
        ("w", "AddBackward0 1"),
    ]


def test_operations_that_are_none_of_the_models_are_in_no_route() -> None:
    w, x = torch.randn(2, 3, requires_grad=True), torch.randn(5, 2)
    added = w.exp() + torch.zeros(2, 3)
    users, followed = users_of([(x @ added).tanh()]), {("w", "ExpBackward0 0")}
    found = find_uses(users, {"w": w}, followed, {added.grad_fn})
    assert found is not None
    assert [use.routes for use in found.uses] == [[("w", "ExpBackward0 0", "MmBackward0 1")]]


def test_a_parameter_that_reaches_the_output_has_no_use() -> None:
    w = torch.randn(3, requires_grad=True)
    assert routes(w.exp(), {("w", "ExpBackward0 0")}, w=w) is None
    assert routes(torch.randn(3, requires_grad=True).exp(), set(), w=w) == []


@pytest.mark.parametrize("more", [False, True])
def test_a_long_way_of_operations_without_a_map_is_not_followed(more: bool) -> None:
    """As of the states of packed sequences."""
    w = torch.randn(4, 3, requires_grad=True)
    v, route, followed = w, ("w",), set()
    for name in ["AddBackward0"] * 100 + ["TanhBackward0"] * (MOST_RUN + more):
        v, route = 1 + v if name == "AddBackward0" else v.tanh(), (*route, f"{name} 0")
        followed.add(route)
    found = routes(torch.randn(5, 3) @ v.t(), followed, w=w)
    assert found == (None if more else [(*route, "MmBackward0 1")])


@pytest.mark.parametrize("more", [False, True])
def test_what_all_uses_together_would_run_is_counted(more: bool) -> None:
    w, x = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    v = w.tanh().exp()
    z = sum(x @ v.t() for _ in range(MOST_RUN // 2 + more))
    found = routes(z, {("w", "TanhBackward0 0"), ("w", "TanhBackward0 0", "ExpBackward0 0")}, w=w)
    assert (found is None) is more


def test_what_a_checkpoint_computes_again_is_hidden() -> None:
    w, x = torch.randn(3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    z = checkpoint(lambda x: x * w, x, use_reentrant=True)
    assert reentrant(users_of([z]))
    z = checkpoint(lambda x: x * w, x, use_reentrant=False)
    found = find_uses(users_of([z]), {"w": w}, set())
    assert found is not None
    assert hidden(found)


def test_pieces_of_one_form_are_put_together() -> None:
    def outer(positions: int) -> Outer:
        return Outer(torch.randn(2, 1, positions, 3), torch.randn(2, 1, positions, 4))

    found = pieces([[("w", outer(1)), ("b", torch.ones(2, 3))], [("w", outer(2)), ("b", torch.ones(2, 3))]])
    assert [part.g.shape[2] for part in found["w"]] == [3]
    assert torch.equal(found["b"][0], torch.full((2, 3), 2.0))


def test_a_function_of_the_users_own_cannot_be_asked() -> None:
    assert routes(Doubled.apply(torch.randn(3, requires_grad=True)) * 2, set()) == []
    w = torch.randn(3, requires_grad=True)
    assert routes(Doubled.apply(w) * 2, set(), w=w) is None


def test_uses_are_gone_through_together_as_one_by_one() -> None:
    """The steps of a loop, one of whose products is scaled, and one whose parameter is computed."""
    w, b, x = torch.randn(3, 3, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(4, 3)
    h = x
    for _ in range(3):
        h = torch.tanh(F.linear(h, w, b))
    z = torch.addmm(b, torch.addmm(h, h, w.t() * 2), w, alpha=0.5)
    found = find_uses(users_of([z]), {"w": w, "b": b}, {("w", "MulBackward0 0")})
    assert found is not None

    def hook(use: Use, gradients: tuple[Tensor | None, ...]) -> None:
        for several, here in zip((True, False), brings, strict=True):
            call = OperationCall(use.node, gradients, [Layout()], 4, z.dtype)
            targets = use.targets if several else None
            here.append(brought(call, use.sources, found.leaves, found.followed, targets))

    brings: tuple[list[Piece | Later], list[Piece | Later]] = ([], [])
    for use in found.uses:
        use.node.register_prehook(partial(hook, use))
    z.sin().sum().backward()
    assert sum(isinstance(one, Later) for one in brings[0]) == 4
    assert not any(isinstance(one, Later) for one in brings[1])
    forms = [pieces(one) for one in brings]
    for name, p in (("w", w), ("b", b)):
        together, apart = (sum(dense(part, p.numel()) for part in form[name]) for form in forms)
        torch.testing.assert_close(together, apart)
        torch.testing.assert_close(torch.as_tensor(together).sum(0), p.grad.flatten())  # type: ignore[union-attr]
