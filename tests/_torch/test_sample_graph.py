"""Where samples lie in the tensors of a graph, held against the derivatives themselves."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder._torch.sample_graph import inner_size, samples_in_leaves, samples_in_nodes

N = 3


def attention(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads.tanh(), heads).transpose(1, 2).flatten(2)


class Relu(torch.autograd.Function):
    """Of another name than PyTorch's own node, though only by a number; it mixes the samples' gradients."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g.flip(0)


LSTM = nn.LSTM(4, 4, batch_first=True, bidirectional=True, dtype=torch.float32)
GRU = nn.GRU(4, 4, batch_first=True, bidirectional=True, dtype=torch.float32)
LINEAR, CONVOLUTION = nn.Linear(4, 4, dtype=torch.float32), nn.Conv1d(6, 2, 1, dtype=torch.float32)

#: Functions of a leaf of shape (N, 6, 4), with samples in dim 0, that the graph tells everything of.
TOLD: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": lambda x: (torch.tanh(x) * x + 2).sigmoid() / (1 + x**2).sqrt(),
    "broadcast": lambda x: (
        x * x[:, :1] + x.mean(1, keepdim=True) + torch.ones(4, dtype=torch.float32, requires_grad=True)
    ),
    "rows": lambda x: LINEAR(x.flatten(0, 1)).relu().unflatten(0, (N, 6)),
    "columns": lambda x: (
        x.permute(1, 2, 0).reshape(24, N).t() @ torch.ones(24, 2, dtype=torch.float32, requires_grad=True)
    ),
    "time first": lambda x: LINEAR(x.transpose(0, 1).flatten(0, 1)).view(6, N, 4).transpose(0, 1),
    "attention": attention,
    "softmax and norms": lambda x: F.layer_norm(x, (6, 4)).softmax(1).log_softmax(-1),
    "cut and joined": lambda x: torch.cat([*x.chunk(2, 1), x[:, 1:3], torch.stack(x.unbind(1)[:2], 1)], 1).flip(1),
    "convolution": lambda x: F.max_pool1d(CONVOLUTION(x), 2).squeeze(-1).unsqueeze(1).mean((-1, -2)),
    "recurrent": lambda x: LSTM(x)[0][:, -1],
    "recurrent, operation by operation": lambda x: GRU(x)[0][:, -1],
    "products of matrices": lambda x: torch.einsum("nij,nkj->nik", x, x).sum(-1).expand(2, N, 6).movedim(1, 0),
}

#: Functions of it that mix samples, or that it cannot tell of.
UNTOLD: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0),
    "one of the others": lambda x: x + x[:1],
    "turned around": lambda x: x.flip(0),
    "softmax": lambda x: x.softmax(0),
    "statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "flattened wrongly": lambda x: x.transpose(0, 1).reshape(N, -1),
    "matrix of samples": lambda x: x.flatten(1) @ x.flatten(1).t(),
    "cumulative": lambda x: x.cumsum(0),
    "norm of images": lambda x: F.layer_norm(x, (N, 6, 4)),
    "custom function": Relu.apply,
    "both ways": lambda x: torch.stack([x, x.flip(0)]).sum(0),
}


def blocks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Whether output row n depends on input row m: (N, N), from the gradients."""
    output = function(x)
    rows = [torch.autograd.grad(output[n].sum().pow(2), x, retain_graph=True)[0] for n in range(N)]
    return torch.stack([(row.flatten(1) != 0).any(1) for row in rows])


def told(function: Callable[[Tensor], Tensor], x: Tensor) -> int | None:
    output = function(x)
    return samples_in_leaves(samples_in_nodes([output], N), [x])[id(x)]


@pytest.mark.parametrize("name", TOLD)
def test_what_the_graph_tells_is_so(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 6, 4, dtype=torch.float32, requires_grad=True)
    assert told(TOLD[name], x) == 24
    assert torch.equal(blocks(TOLD[name], x), torch.eye(N, dtype=torch.bool))


@pytest.mark.parametrize("name", UNTOLD)
def test_what_mixes_samples_is_not_told_to_be_in_dim_0(name: str) -> None:
    torch.manual_seed(0)
    assert told(UNTOLD[name], torch.randn(N, 6, 4, dtype=torch.float32, requires_grad=True)) != 24


def test_samples_in_other_places() -> None:
    for shape, dim, step in (((6, N), 1, 1), ((N * 2, 4), 0, 2), ((2 * N, 4), 0, 1)):
        x = torch.randn(*shape, requires_grad=True)
        rows = x.t() if dim else x.view(N, 2, 4) if step == 2 else x.view(2, N, 4).transpose(0, 1)
        found = samples_in_leaves(samples_in_nodes([rows.tanh()], N), [x])
        assert found == {id(x): inner_size(x.shape, dim, step)}


def test_a_leaf_without_influence_is_missing() -> None:
    x, y = torch.randn(N, 2, requires_grad=True), torch.randn(N, 2, requires_grad=True)
    assert samples_in_leaves(samples_in_nodes([x.tanh()], N), [x, y]) == {id(x): 2}
