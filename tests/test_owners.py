"""Samples that no dimension holds."""

import torch

from secorder.owners import Grouping, owned_by_entries, owned_by_index, take_owned


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
