"""Parameters that operations take, and no layer with a rule does: as transformers and their adapters have them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, DoubleBackwardError
from secorder._torch.graph import tells_recomputation

from .case import N, case, classes

T, WIDTH = 3, 4


class Rows(nn.Module):
    """A function of rows (N, T, WIDTH) and of parameters of these shapes, between layers."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.own = nn.ParameterDict({name: nn.Parameter(torch.randn(shape) * 0.5) for name, shape in shapes.items()})
        self.words, self.head = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.function(self.words(ids), **self.own)).mean(1))


def rows(
    name: str,
    function: Callable[..., Tensor],
    options: dict[str, Any] | None = None,
    refused: dict[str, Any] | None = None,
    **shapes: Any,
) -> None:
    def make() -> Any:
        return Rows(function, **shapes), nn.CrossEntropyLoss(), torch.randint(5, (N, T)), classes()

    case(name, options=options or {}, refused=refused or {})(make)


def conv1d(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """As transformers write GPT-2's."""
    return torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], -1)


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def with_token(x: Tensor, token: Tensor, places: Tensor) -> Tensor:
    return torch.cat([token.expand(len(x), -1, -1), x], 1) + places


def relative(x: Tensor, table: Tensor) -> Tensor:
    """A bias on the scores of attention by how far two places are apart, for two heads."""
    distance = torch.arange(T)[:, None] - torch.arange(T)[None] + T - 1
    q = x.view(-1, T, 2, 2).transpose(1, 2)
    scores = q @ q.transpose(-1, -2) + table[distance].permute(2, 0, 1).unsqueeze(0)
    return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


def cross(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The packed projection of nn.MultiheadAttention, of which parts serve different inputs."""
    q, kv = w.split([WIDTH, 2 * WIDTH])
    bq, bkv = b.split([WIDTH, 2 * WIDTH])
    query, (key, value) = F.linear(x, q, bq), F.linear(x.flip(1), kv, bkv).chunk(2, -1)
    return F.scaled_dot_product_attention(query, key, value)


def experts(x: Tensor, w: Tensor, gate: Tensor) -> Tensor:
    """Every expert sees every token, weighed by a gate."""
    weights = F.linear(x, gate).softmax(-1)
    return torch.einsum("nte,nteo->nto", weights, torch.einsum("nti,eio->nteo", x, w))


def low_rank(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + 0.5 * F.linear(F.linear(x, a), b)


def dora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    whole = w + b @ a
    return F.linear(x, m[:, None] * whole / whole.norm(dim=1, keepdim=True))


def pooled(x: Tensor, mix: Tensor, scale: Tensor) -> Tensor:
    """A weighted sum of layers' outputs, as ELMo's."""
    weights = mix.softmax(0)
    return scale * (weights[0] * x + weights[1] * torch.sin(x))


def distances_twice_differentiable() -> bool:
    """Whether the backward of PyTorch's distances has one itself."""
    x = torch.randn(2, 2, generator=torch.Generator(), requires_grad=True)
    (g,) = torch.autograd.grad(torch.cdist(x, 2 * x.detach()).square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(g.sum(), x)
    except RuntimeError:
        return False
    return True


rows("conv1d", conv1d, w=(WIDTH, WIDTH), b=(WIDTH,))
rows("norm_by_hand", lambda x, w: w * normed(x), w=(WIDTH,))
rows("norm_of_one_plus_weight", lambda x, w: normed(x) * (1.0 + w), w=(WIDTH,))
rows("token_and_places", with_token, token=(1, 1, WIDTH), places=(1, T + 1, WIDTH))
rows("places_as_a_table", lambda x, table: x + F.embedding(torch.arange(T), table), table=(T + 2, WIDTH))
rows("as_many_places_as_samples", lambda x, table: torch.cat([x, x[:, :1]], 1) + table, table=(N, WIDTH))
rows("relative_bias", relative, table=(2 * T - 1, 2))
rows("layer_scale", lambda x, gamma, shift: x + gamma * torch.sin(x) - shift, gamma=(WIDTH,), shift=(1, 1, WIDTH))
rows("cross_attention", cross, w=(3 * WIDTH, WIDTH), b=(3 * WIDTH,))
rows("experts", experts, w=(2, WIDTH, WIDTH), gate=(2, WIDTH))
rows(
    "experts_of_places",
    lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1),
    w=(T, WIDTH, WIDTH),
)
rows("matrix_in_a_vector", lambda x, w: F.linear(x, w.view(WIDTH, WIDTH)), w=(WIDTH * WIDTH,))
rows("low_rank", low_rank, w=(WIDTH, WIDTH), a=(2, WIDTH), b=(WIDTH, 2))
rows("dora", dora, w=(WIDTH, WIDTH), a=(2, WIDTH), b=(WIDTH, 2), m=(WIDTH,))
rows("mixed_layers", pooled, mix=(2,), scale=())
rows(
    "distances",
    lambda x, w: torch.exp(-torch.cdist(x, w).square()),
    refused={} if distances_twice_differentiable() else {"hessian": DoubleBackwardError},
    w=(WIDTH, WIDTH),
)
rows(
    "spectrum",
    lambda x, re, im: torch.fft.ifft(torch.fft.fft(x) * torch.complex(re, im)).real,
    re=(WIDTH,),
    im=(WIDTH,),
)
rows("used_three_times", lambda x, w: torch.tanh(x @ w) @ w.t() + w[0], w=(WIDTH, WIDTH))
rows("convolution", lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b, padding=1).transpose(1, 2), w=(4, 4, 3), b=(4,))
rows(
    "by_hand_from_the_left",
    lambda x, w: torch.stack([(w @ row.t()).t() for row in x.unbind(1)], 1),
    w=(WIDTH, WIDTH),
)


class ReturnsLoss(Rows):
    """The model returns the loss, as that of transformers does where labels are given."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(ids), labels)


#: Where PyTorch does not tell what a saved tensor is unpacked by.
UNTOLD: dict[str, type[Exception]] = (
    {} if tells_recomputation() else {"online": AttributionError, "norms": AttributionError}
)


@case(
    skip={"hessian": "one-shot calls see one loss alone", "fisher": "one-shot calls see one loss alone"},
    refused=UNTOLD,
)
def model_that_returns_its_loss() -> Any:
    model = ReturnsLoss(lambda x, w, places: normed(x + places) * w, w=(WIDTH,), places=(T, WIDTH))
    return model, lambda loss, _: loss, (torch.randint(5, (N, T)), classes()), torch.zeros(N)


@case("checkpoint_reentrant", True, refused=UNTOLD)
@case("checkpoint", False)
def checkpointed(reentrant: bool) -> Any:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return torch.sin(conv1d(x, w, b))

        found: Tensor = checkpoint(inner, x, use_reentrant=reentrant)
        return found

    return Rows(function, w=(WIDTH, WIDTH), b=(WIDTH,)), nn.CrossEntropyLoss(), torch.randint(5, (N, T)), classes()


@case(by_slices=True)
def dropout() -> Any:
    """The same random numbers for a sample wherever it is: brute force takes slices of the batch's output."""
    model = Rows(lambda x, w: F.dropout(w * normed(x), 0.5), w=(WIDTH,))
    return model, nn.CrossEntropyLoss(), torch.randint(5, (N, T)), classes()
