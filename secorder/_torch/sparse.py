"""Gradients of tables that are kept as the rows that were looked up (``nn.Embedding(sparse=True)``)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: Modules that may give such gradients, by their attribute ``sparse``.
TABLES = (nn.Embedding, nn.EmbeddingBag)


def gives_sparse_gradients(module: nn.Module) -> bool:
    """Whether it is a table of this kind."""
    return isinstance(module, TABLES) and module.sparse


def entries(gradient: Tensor) -> Tensor:
    """The numbers of a gradient; of a sparse one, of the rows that it holds, some perhaps in several parts."""
    return gradient._values() if gradient.is_sparse else gradient


def looked_up(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Of a sparse gradient which rows it holds, and their numbers; a row may come in several parts."""
    return gradient._indices()[0], gradient._values()


@contextmanager
def dense_gradients(modules: Iterable[Any]) -> Iterator[None]:
    """Inside, tables give dense gradients, which may be differentiated once more; outputs are the same."""
    tables = [m for m in modules if isinstance(m, TABLES) and gives_sparse_gradients(m)]
    try:
        for table in tables:
            table.sparse = False
        yield
    finally:
        for table in tables:
            table.sparse = True
