"""Parameters that several layers share: their gradients are put together, sample by sample, before they are squared."""

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import CurvatureProbe, CurvatureWarning
from secorder._torch.graph import tells_recomputation

from .helpers import no_warnings
from .reference import fisher_by_sample

N, TOKENS, WORDS, WIDTH = 4, 5, 7, 3


class Decoder(nn.Module):
    """Words in, words out, by one table; ``penalty`` uses the table once more, outside of any layer's call."""

    def __init__(self, bias: bool = False, penalty: bool = False) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        self.head.weight = self.embedding.weight
        self.penalty = penalty

    def forward(self, words: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(words)))
        hidden = hidden + torch.tanh(self.body(hidden))
        logits = self.head(hidden)
        return logits + F.linear(hidden, self.embedding.weight) if self.penalty else logits


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets)


def batch() -> tuple[Tensor, Tensor]:
    words = torch.randint(WORDS, (N, TOKENS + 1))
    return words[:, :-1], words[:, 1:]


def expected(model: nn.Module, probe: CurvatureProbe, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    found = [fisher_by_sample(model, language_loss, x, y, len(x)) for x, y in batches]
    total = sum(len(x) for x, _ in batches)
    mean = {k: sum(f[k] * len(x) for f, (x, _) in zip(found, batches, strict=True)) / total for k in found[0]}
    names = dict(model.named_modules())
    return {
        layer: torch.cat([mean[f"{layer}.{local}"].flatten() for local, _ in names[layer].named_parameters()])
        for layer in probe.layer_names
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layers", [None, "embedding", ["embedding", "head"], "*"])
def test_each_selection_is_exact_without_running_the_model_again(layers: Any, bias: bool) -> None:
    model = Decoder(bias)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    batches = [batch() for _ in range(3)]
    batches.append((batches[0][0][:2], batches[0][1][:2]))
    with no_warnings(), CurvatureProbe(model, layers=layers, sample_dim=0, reduction="mean") as probe:
        for index, (x, y) in enumerate(batches):
            if index == 3:
                model.body.register_forward_hook(count)
            language_loss(model(x), y).backward()
        assert probe.num_samples == 3 * N + 2
        found = probe.fisher_diagonal()
    for name, diagonal in expected(model, probe, batches).items():
        torch.testing.assert_close(found[name], diagonal, rtol=1e-10, atol=1e-12)


def test_a_use_outside_of_all_layers_is_followed_and_stays_exact() -> None:
    model, (x, y) = Decoder(penalty=True), batch()
    with CurvatureProbe(model, reduction="mean") as probe:
        with no_warnings() if tells_recomputation() else nullcontext():  # nothing runs again
            language_loss(model(x), y).backward()
        found = probe.fisher_diagonal()
    for name, diagonal in expected(model, probe, [(x, y)]).items():
        torch.testing.assert_close(found[name], diagonal, rtol=1e-10, atol=1e-12)


class WithHolder(Decoder):
    """A module without a rule holds the bias too, and does not use it; places are rows that all samples share."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.bias = self.head.bias
        self.places = nn.Embedding(TOKENS, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.inner = Inner(self.embedding, self.places, self.body)

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.inner(words))
        return {"loss": language_loss(logits, words), "logits": logits}


class Inner(nn.Module):
    def __init__(self, embedding: nn.Module, places: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.places, self.body = embedding, places, body

    def forward(self, words: Tensor) -> Tensor:
        return self.body(self.embedding(words) + self.places(torch.arange(TOKENS)))


def test_a_holder_without_a_rule_and_a_row_that_all_samples_share() -> None:
    """As in the language models of transformers, which also return their loss, a scalar, with the logits."""
    model, (x, _) = WithHolder(), batch()
    with CurvatureProbe(model, layers=["embedding", "places", "head"], reduction="mean") as probe:
        with no_warnings() if tells_recomputation() else nullcontext():
            model(x)["loss"].backward()
        found = probe.fisher_diagonal().by_parameter()
    expected = fisher_by_sample(model, lambda output, _: output["loss"], x, torch.zeros(N), N)
    for name, diagonal in found.items():
        torch.testing.assert_close(diagonal, expected[name], rtol=1e-10, atol=1e-12)


def test_only_one_of_them_called() -> None:
    model = Decoder(bias=True)
    x, y = torch.randn(N, TOKENS, WIDTH), batch()[1]
    both = nn.ModuleDict({"embedding": model.embedding, "head": model.head})

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = both

        def forward(self, x: Tensor) -> Tensor:
            return both["head"](x)

    whole = Head()
    with CurvatureProbe(whole, "all", decay=0.5, reduction="mean") as probe:
        for _ in range(2):
            language_loss(whole(x), y).backward()
        found = probe.fisher_diagonal()
    fisher = fisher_by_sample(whole, language_loss, x, y, N)
    torch.testing.assert_close(found["both.embedding"], fisher["both.head.weight"].flatten())
    torch.testing.assert_close(
        found["both.head"], torch.cat([fisher["both.head.weight"].flatten(), fisher["both.head.bias"]])
    )


def test_a_bad_gradient_at_one_of_them_leaves_the_batch_out_of_all() -> None:
    model, (x, y) = Decoder(), batch()

    def spoil(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(lambda g: g * torch.nan)

    with CurvatureProbe(model, layers=["embedding", "head"], reduction="mean") as probe:
        for _ in range(2):
            language_loss(model(x), y).backward()
        handle = model.body.register_forward_hook(spoil)
        language_loss(model(batch()[0]), y).backward()
        handle.remove()
        language_loss(model(x), y).backward()
        assert probe.num_skipped == {"embedding": 1, "head": 1}  # the head's own gradient was finite
        found = probe.fisher_diagonal()
    for name, diagonal in expected(model, probe, [(x, y)]).items():
        torch.testing.assert_close(found[name], diagonal, rtol=1e-10, atol=1e-12)


def test_states_of_tied_layers_resume() -> None:
    model, (x, y) = Decoder(), batch()
    with CurvatureProbe(model, layers="*", reduction="mean") as probe:
        language_loss(model(x), y).backward()
        state = probe.state_dict()
        language_loss(model(x), y).backward()
        whole = probe.fisher_diagonal()
    with CurvatureProbe(model, layers="*", reduction="mean") as resumed:
        resumed.load_state_dict(state)
        language_loss(model(x), y).backward()
        for name, diagonal in resumed.fisher_diagonal().items():
            assert torch.equal(diagonal, whole[name])


class Scaled(nn.Embedding):
    """An embedding that no rule is for, since its forward is its own."""

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words) * 3.0


class Backbone(nn.Module):
    def __init__(self, table: type[nn.Embedding], reentrant: bool) -> None:
        super().__init__()
        self.embedding, self.body = table(WORDS, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embedding(words)
        return hidden + checkpoint(self.body, hidden, use_reentrant=self.reentrant)


class LanguageModel(nn.Module):
    def __init__(self, table: type[nn.Embedding], reentrant: bool) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(table, reentrant), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.backbone.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.backbone(words))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("table", [nn.Embedding, Scaled])
def test_a_table_in_a_backbone_with_checkpoints_tied_to_a_head_outside(
    table: type[nn.Embedding], reentrant: bool
) -> None:
    model = LanguageModel(table, reentrant)
    batches = [batch() for _ in range(3)]
    with CurvatureProbe(model, "all", reduction="mean", sample_dim=0) as probe:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)  # exact and slow
            for words, targets in batches:
                language_loss(model(words), targets).backward()
        found = probe.fisher_diagonal()
    for name, value in expected(model, probe, batches).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
