"""Sparse gradients of tables."""

import torch
from torch import nn

from secorder._torch.sparse import dense_gradients, entries, gives_sparse_gradients, looked_up


def test_what_a_table_gives() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([3, 0, 3])).sum().backward()
    assert table.weight.grad is not None
    ids, values = looked_up(table.weight.grad)
    assert torch.zeros(5, 2).index_add(0, ids, values).equal(table.weight.grad.to_dense())
    assert entries(table.weight.grad).sum() == 6
    assert entries(torch.ones(2)).equal(torch.ones(2))


def test_dense_inside() -> None:
    modules = nn.ModuleList([nn.Embedding(5, 2, sparse=True), nn.EmbeddingBag(5, 2), nn.Linear(2, 2)])
    assert [gives_sparse_gradients(module) for module in modules] == [True, False, False]
    with dense_gradients(modules):
        assert not any(map(gives_sparse_gradients, modules))
    assert [gives_sparse_gradients(module) for module in modules] == [True, False, False]
