"""Samples that no dimension holds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.owners import Grouping, owned_by_entries, owned_by_index, owned_by_lengths, take_owned

from .helpers import Net
from .reference import assert_all_close, fisher_of


def test_owners() -> None:
    a, b, c, y = torch.randn(2), torch.randn(3, 4), torch.randn(1), torch.randn(2)
    (owned,) = owned_by_entries((([{"a": a, "b": b}, {"c": c}], y), {"labels": [y, y]}))
    assert owned.num_samples == 2
    assert owned.owners[:3] == (0, 0, 1)
    index = torch.tensor([0, 0, 1, 2])
    (owned,) = owned_by_index(((torch.randn(4, 2), index, y), {}))
    assert (owned.num_samples, owned.grouping) == (3, Grouping(1, 3))
    assert owned.owners[2] is None
    for other in ([0, 2, 2], [1, 1, 2], [0, 1, 4]):
        assert not owned_by_index(((torch.randn(3, 2), torch.tensor(other)), {}))


def test_taking_graphs_takes_their_edges() -> None:
    nodes, graph = torch.arange(5.0)[:, None], torch.tensor([0, 0, 1, 1, 1])
    edges, of_edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 4]]), torch.arange(4.0)
    tree = nodes, edges, graph, of_edges
    (owned,) = owned_by_index((tree, {}))
    bounds = torch.tensor([0, 2, 5])
    (told,) = owned_by_index(((tree[0], bounds), {}))
    assert take_owned((tree[0], bounds), told, (tree[0], bounds), [1, 1, 0])[1].tolist() == [0, 3, 6, 8]
    nodes, edges, graph, of_edges = take_owned(tree, owned, tree, [1, 0])
    assert nodes.flatten().tolist() == [2, 3, 4, 0, 1]
    assert graph.tolist() == [0, 0, 0, 1, 1]
    assert edges.tolist() == [[0, 1, 3, 4], [1, 2, 4, 3]]
    assert of_edges.tolist() == [2, 3, 0, 1]


def test_rows_of_which_a_list_tells_how_many_each_sample_has() -> None:
    rows, of_each = torch.arange(5.0)[:, None], torch.arange(3.0)
    tree = {"x": rows, "n": [2, 0, 3]}, of_each
    (owned,) = owned_by_lengths((tree, {}))
    assert (owned.num_samples, owned.grouping) == (3, Grouping(0, 2, lengths=True))
    assert owned.owners[1] is None
    assert owned.grouping.of((tree, {})) is not None
    taken, kept = take_owned(tree, owned, (rows, of_each), [2, 0])
    assert taken["x"].flatten().tolist() == [2, 3, 4, 0, 1]
    assert (taken["n"], kept.tolist()) == ([3, 2], [2, 0])
    for other in ([2, 2], [6, -1], [True] * 5, [2.0, 3.0], []):
        assert not owned_by_lengths(((rows, other), {}))


@pytest.mark.parametrize("kind", [list, tuple, np.array], ids=["list", "tuple", "numpy"])
def test_a_model_that_splits_rows_by_lengths(kind: Callable[[Sequence[int]], Any]) -> None:
    def pooled(m: Any, x: Tensor, lengths: Any) -> Tensor:
        return m.head(torch.stack([part.mean(0) for part in m.fc(x).tanh().split([int(n) for n in lengths])]))

    model = Net(pooled, fc=nn.Linear(4, 5), head=nn.Linear(5, 3)).double()
    found: list[dict[str, Tensor]] = []
    with CurvatureProbe(model, reduction="mean") as probe:
        for lengths in ([3, 1, 2], [2, 2, 1, 4]):
            x, targets = torch.randn(sum(lengths), 4).double(), torch.arange(len(lengths)) % 3
            with probe.paused():
                for part, n, target in zip(x.split(lengths), lengths, targets, strict=True):
                    loss = F.cross_entropy(model(part, kind([n])), target[None])
                    found.append(dict(zip(dict(model.named_parameters()), gradients(loss, model), strict=True)))
            F.cross_entropy(model(x, kind(lengths)), targets).backward()
        expected = fisher_of({name: torch.stack([one[name] for one in found]) for name in found[0]})
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        expected = fisher_of({name: torch.stack([one[name] for one in found[3:]]) for name in found[0]})
        one_shot = probe.fisher_diagonal(F.cross_entropy, (x, kind(lengths)), targets)
        assert_all_close(one_shot.by_parameter(), expected)


def gradients(loss: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))
