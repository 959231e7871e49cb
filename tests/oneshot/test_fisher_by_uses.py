"""One-shot Fishers of parameters that no layer with a rule holds: none runs sample by sample."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.oneshot import fisher_by_uses as by_uses_of

from ..cases import CASES
from ..helpers import run_again_where_nothing_tells, seed
from ..reference import assert_all_close, fisher_by_sample, ggn_by_sample
from ..test_matrix import brute_force, build

NAMES = ("operations/conv1d", "operations/dora", "operations/relative_bias", "operations/cross_attention")


@run_again_where_nothing_tells
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["empirical", "type-2"])
def test_by_operations(name: str, kind: Any) -> None:
    case = next(case for case in CASES if case.name == name)
    model, loss_fn, inputs, targets = build(case)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        found = probe.fisher_diagonal(loss_fn, inputs, targets, fisher_type=kind)
    assert {info.strategy for info in found.info.values()} == {"rule"}
    if kind == "empirical":
        assert_all_close(found.by_parameter(), brute_force(case, "fisher"))
    else:
        assert_all_close(found.by_parameter(), ggn_by_sample(model, loss_fn, inputs, targets))


@run_again_where_nothing_tells
def test_one_forward_and_one_backward_pass_are_all() -> None:
    """Of a table that all samples share, too, and of parameters that no module with a rule holds."""
    seed()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
            self.gain = nn.Parameter(torch.randn(4))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.words(ids) + self.places(torch.arange(5))[None])
            found: Tensor = self.head((x * self.gain).tanh().mean(1))
            return found

    model, ids, targets = Model().double(), torch.randint(9, (6, 5)), torch.randint(3, (6,))
    calls = itertools.count()  # which no measurement puts back, as it does with what hooks have written

    def count(*_: Any) -> None:
        next(calls)

    model.head.register_forward_hook(count)
    counted = mock.patch.object(by_uses_of, "gradients_at", side_effect=by_uses_of.gradients_at)
    with CurvatureProbe(model, "all") as probe, counted as passes:
        found = probe.fisher_diagonal(F.cross_entropy, ids, targets)
    assert (next(calls), passes.call_count) == (1, 1)
    assert_all_close(found.by_parameter(), fisher_by_sample(model, F.cross_entropy, ids, targets, 6))


@pytest.mark.parametrize("kind", ["empirical", "type-2", "mc"])
def test_a_matrix_from_the_right_is_one_from_the_left_transposed(kind: Any) -> None:
    """Also where the two factors of a pair differ, as for a loss of both signs."""
    seed()

    class Right(nn.Module):
        def __init__(self, like: nn.Linear) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(like.weight.detach().t().clone()), nn.Parameter(like.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.b, x.reshape(-1, 3), self.w).view(*x.shape[:-1], 4)

    def signed(output: Tensor, targets: Any) -> Tensor:
        return (targets[1] * F.cross_entropy(output, targets[0], reduction="none")).sum()

    left = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    right = nn.Sequential(Right(left[0]), *left[1:])
    x, targets = torch.randn(4, 2, 3, dtype=torch.float64), (torch.arange(4) % 3, torch.tensor([1.0, -2.0, 0.5, -1.0]))
    found = []
    for model in (left, right):
        with CurvatureProbe(model, "all") as probe:
            options: dict[str, Any] = {"fisher_type": kind, "generator": torch.Generator().manual_seed(1)}
            found.append(probe.fisher_diagonal(signed, x, targets, **options).by_parameter())
    expected = {"0.w": found[0]["0.weight"].view(4, 3).t().flatten(), "0.b": found[0]["0.bias"].flatten()}
    assert_all_close({name: found[1][name].flatten() for name in expected}, expected)


@pytest.mark.parametrize("width", [3, 4])
def test_a_matrix_that_is_used_as_it_is_and_transposed(width: int) -> None:
    """Of samples that are the rows, whose products are gone through together: also of a square one."""
    seed()

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, width))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(x @ self.w), self.w)

    model, inputs, targets = Tied().double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    expected = fisher_by_sample(model, F.mse_loss, inputs, targets, 5)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        assert_all_close(probe.fisher_diagonal(F.mse_loss, inputs, targets).by_parameter(), expected)
        F.mse_loss(model(inputs), targets).backward()
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


@run_again_where_nothing_tells
@pytest.mark.parametrize("kind", ["empirical", "type-2"])
def test_a_table_that_three_layers_hold_is_gone_through_once(kind: Any) -> None:
    """The head, which holds more than the others, and they hold what it does."""
    seed()

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.again, self.head = nn.Embedding(7, 4), nn.Embedding(7, 4), nn.Linear(4, 7)
            self.again.weight = self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids).sum(1) + torch.tanh(self.again(ids.flip(1))).mean(1)
            found: Tensor = self.head(x)
            return found

    model, ids, targets = Tied().double(), torch.randint(7, (5, 3)), torch.randint(7, (5,))
    counted = mock.patch.object(by_uses_of, "_add", side_effect=by_uses_of._add)
    with CurvatureProbe(model, "all") as probe, counted as additions:
        found = probe.fisher_diagonal(F.cross_entropy, ids, targets, fisher_type=kind)
    assert len({id(call.args[0]) for call in additions.call_args_list}) == 2  # a table and a bias
    if kind == "empirical":
        expected = fisher_by_sample(model, F.cross_entropy, ids, targets, 5)
    else:
        expected = ggn_by_sample(model, F.cross_entropy, ids, targets)
    assert_all_close({"words.weight": found["words.weight"], "head.bias": found["head.bias"]}, expected)
    for name in ("again.weight", "head.weight"):
        assert torch.equal(found[name], found["words.weight"])


@run_again_where_nothing_tells
@pytest.mark.parametrize("kind", ["empirical", "mc"])
def test_layers_that_nothing_depends_on_take_no_pass_of_their_own(kind: Any) -> None:
    """One that is never called, one whose output is not used, and a parameter beside them."""
    seed()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
            self.pool, self.norm, self.gain = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.randn(4))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids).tanh()
            self.norm(x)
            found: Tensor = self.head(x.mean(1))
            return found

    model, ids, targets = Model().double(), torch.randint(9, (6, 5)), torch.randint(3, (6,))
    calls = itertools.count()
    model.norm.register_forward_hook(lambda *_: [next(calls), None][1])
    with CurvatureProbe(model, "all") as probe:
        found = probe.fisher_diagonal(F.cross_entropy, ids, targets, fisher_type=kind)
    assert next(calls) == 1
    unused = {"": "unused", "pool": "unused", "norm": "unused"}
    assert {name: str(info.strategy) for name, info in found.info.items()} == {
        **unused, "words": "rule", "head": "rule"
    }  # fmt: skip
    assert not any(found[name].any() for name in unused)
    if kind == "empirical":
        assert_all_close(found.by_parameter(), fisher_by_sample(model, F.cross_entropy, ids, targets, 6))
