"""Gradients of tables that are kept as the rows that were looked up (``nn.Embedding(sparse=True)``)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from .surroundings import assigned

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


def dense_gradients(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Inside, tables give dense gradients, which may be differentiated once more; outputs are the same."""
    return assigned(list(filter(gives_sparse_gradients, modules)), sparse=False)
