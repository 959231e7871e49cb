"""Attention as it is used: causal, padded, both, across, over what is cached, with a head that is tied."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import N, case, classes

T, WIDTH, WORDS = 3, 4, 5


def lengths(most: int = T) -> Tensor:
    """True where a sample of another length than its neighbours' has ended, (N, most)."""
    return torch.arange(most) >= (torch.arange(N)[:, None] % most + 1)


def causal(size: int = T) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size).to(torch.get_default_dtype())


class Encoder(nn.Module):
    """PyTorch's own, behind a table of words and one of positions."""

    def __init__(self, *, is_causal: bool, batch_first: bool, norm_first: bool = False) -> None:
        super().__init__()
        how: dict[str, Any] = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 5, **how)
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.places = nn.Parameter(torch.randn(T, WIDTH))
        self.is_causal, self.batch_first = is_causal, batch_first

    def forward(self, ids: Tensor, ended: Tensor | None = None) -> Tensor:
        x = self.words(ids) + self.places
        x = x if self.batch_first else x.transpose(0, 1)
        mask = causal().to(x) if self.is_causal else None
        padding = None if ended is None else torch.zeros(ended.shape).to(x).masked_fill(ended, -torch.inf)
        x = self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.is_causal)
        x = x if self.batch_first else x.transpose(0, 1)
        kept = torch.ones_like(x) if ended is None else (~ended).unsqueeze(-1).to(x)
        found: Tensor = self.head((x * kept).sum(1) / kept.sum(1))
        return found


@case("causal", True, False, True)
@case("padded", False, True, True)
@case("causal_and_padded", True, True, True)
@case("causal_and_padded_time_first", True, True, False)
def encoder(is_causal: bool, padded: bool, batch_first: bool) -> Any:
    model = Encoder(is_causal=is_causal, batch_first=batch_first, norm_first=padded)
    ids = torch.randint(WORDS, (N, T))
    return model, nn.CrossEntropyLoss(), (ids, lengths()) if padded else ids, classes()


class Decoder(nn.Module):
    """PyTorch's decoder over what an encoder would have left, words tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 5, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor, memory: Tensor, ended: Tensor) -> Tensor:
        x = self.words(ids)
        padding = torch.zeros(ended.shape).to(x).masked_fill(ended, -torch.inf)
        x = self.layer(x, memory, tgt_mask=causal().to(x), memory_key_padding_mask=padding, tgt_is_causal=True)
        found: Tensor = self.head(x).transpose(1, 2)
        return found


@case()
def decoder_with_tied_head() -> Any:
    ids, memory = torch.randint(WORDS, (N, T)), torch.randn(N, 2, WIDTH)
    return Decoder(), nn.CrossEntropyLoss(), (ids, memory, lengths(2)), classes(WORDS, T)


class Cached(nn.Module):
    """Attention of new words over keys and values of earlier ones, packed as GPT-2 packs them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3)
        self.w, self.b = nn.Parameter(0.5 * torch.randn(WIDTH, 3 * WIDTH)), nn.Parameter(torch.randn(3 * WIDTH))
        self.places = nn.Embedding(2 * T, WIDTH)

    def forward(self, ids: Tensor, past: tuple[Tensor, Tensor]) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(T) + past[0].shape[2])
        packed = torch.addmm(self.b, x.view(-1, WIDTH), self.w).view(*x.shape[:-1], -1)
        q, k, v = (part.view(*x.shape[:-1], 2, -1).transpose(1, 2) for part in packed.split(WIDTH, 2))
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = torch.ones(T, k.shape[2], dtype=torch.bool).tril(k.shape[2] - T)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        found: Tensor = self.head(x.mean(1))
        return found


@case()
def cached_past() -> Any:
    past = torch.randn(N, 2, 2, WIDTH // 2), torch.randn(N, 2, 2, WIDTH // 2)
    return Cached(), nn.CrossEntropyLoss(), (torch.randint(WORDS, (N, T)), past), classes()
