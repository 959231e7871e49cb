"""Real architectures at small sizes: a bare training step against one with a probe attached, of each kind of batch.

And against a bare step with the products that no probe can do without.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.layers.contraction import contract
from secorder.layers.per_sample import Outer
from secorder.online.audit.audited import EACH

from .timing import Results, alternate

BATCH, LENGTH, WIDTH, LAYERS, WORDS = 8, 64, 192, 4, 1000

#: Steady steps that are timed at once: some are audited, and a median of single ones would pass over these.
STEPS = 8

#: The model, and the loss of one batch.
Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def _tokens() -> Tensor:
    return torch.randint(WORDS, (BATCH, LENGTH))


def _next_token(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gpt2() -> Made:
    """transformers' GPT-2: Conv1D, a position table, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=6, vocab_size=WORDS, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    ids = _tokens()
    return GPT2LMHeadModel(config), lambda model: _next_token(model(ids).logits, ids)


def llama() -> Made:
    """transformers' Llama: norms that are written by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=6, intermediate_size=512, vocab_size=WORDS,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    ids = _tokens()
    return LlamaForCausalLM(config), lambda model: _next_token(model(ids).logits, ids)


def qwen2() -> Made:
    """transformers' Qwen2: shared keys and values, biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=512, vocab_size=WORDS, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    ids = _tokens()
    return Qwen2ForCausalLM(config), lambda model: _next_token(model(ids).logits, ids)


def bert() -> Made:
    """transformers' BERT: position and token-type tables."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=6, intermediate_size=4 * WIDTH,
        vocab_size=WORDS, num_labels=5,
    )  # fmt: skip
    ids, labels = _tokens(), torch.randint(5, (BATCH,))
    return BertForSequenceClassification(config), lambda model: F.cross_entropy(model(ids).logits, labels)


def vit() -> Made:
    """transformers' ViT: a class token and a position table as bare parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=6, intermediate_size=4 * WIDTH,
        image_size=56, patch_size=8, num_labels=5,
    )  # fmt: skip
    images, labels = torch.randn(BATCH, 3, 56, 56), torch.randint(5, (BATCH,))
    return ViTForImageClassification(config), lambda model: F.cross_entropy(model(images).logits, labels)


def t5() -> Made:
    """transformers' T5: relative positions, cross attention."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=LAYERS // 2, d_model=WIDTH, num_heads=6, d_kv=32, d_ff=4 * WIDTH, vocab_size=WORDS,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    ids, targets = _tokens(), _tokens()

    def loss(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, decoder_input_ids=targets).logits
        return _next_token(logits, targets)

    return T5ForConditionalGeneration(config), loss


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(self.words(ids) + self.positions).mean(1))
        return found


def encoder() -> Made:
    """PyTorch's own encoder, behind a position table."""
    ids, labels = _tokens(), torch.randint(5, (BATCH,))
    return _Encoder(), lambda model: F.cross_entropy(model(ids), labels)


class _VisionTransformer(nn.Module):
    """As torchvision writes it: nn.MultiheadAttention, a class token, a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 50, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 6, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x)[:, 0])
        return found


def vision_transformer() -> Made:
    """torchvision's ViT."""
    images, labels = torch.randn(BATCH, 3, 56, 56), torch.randint(5, (BATCH,))
    return _VisionTransformer(), lambda model: F.cross_entropy(model(images), labels)


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 160)
        self.core = kind(160, 160, num_layers=3, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(160, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.core(self.words(ids))[0])
        return found


def _recurrent(kind: type[nn.RNNBase]) -> Made:
    ids = torch.randint(WORDS, (2 * BATCH, LENGTH))
    return _Recurrent(kind), lambda model: _next_token(model(ids), ids)


def lstm() -> Made:
    """nn.LSTM of three layers."""
    return _recurrent(nn.LSTM)


def gru() -> Made:
    """nn.GRU of three layers."""
    return _recurrent(nn.GRU)


ARCHITECTURES: dict[str, Callable[[], Made]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "Qwen2": qwen2,
    "BERT": bert,
    "ViT (transformers)": vit,
    "ViT (torchvision)": vision_transformer,
    "T5": t5,
    "nn.TransformerEncoder": encoder,
    "LSTM": lstm,
    "GRU": gru,
}


def _step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss(model).backward()

    return step


def _products(model: nn.Module, count: int, positions: int) -> Callable[[], None]:
    """Each sample's product for each matrix, squared and added up, of random factors: the work that nothing spares.

    Args:
        count: number of samples.
        positions: of each, at which every matrix is taken to be used; tables that are only looked up are left out.
    """
    matrices = {
        id(p): p
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
        if p.dim() in (2, 4)
    }
    shapes = [(p.shape[0], p[0].numel()) for p in matrices.values()]
    outers = [Outer(*(torch.randn(count, 1, positions, n) for n in (wide, high))) for high, wide in shapes]
    sums = [torch.zeros(high * wide) for high, wide in shapes]

    def products() -> None:
        for outer, total in zip(outers, sums, strict=True):
            contract(outer, numel=total.numel(), out=total, beta=0.0)

    return products


def _bare_with_products(name: str, make: Callable[[], Made]) -> Callable[[], None]:
    """A bare step, and behind it the products of :func:`_products`: what a recorded step can at best come to."""
    model, loss = make()
    positions = 50 if "ViT" in name else LENGTH
    step = _step(model, loss)
    products = _products(model, 2 * BATCH if isinstance(model, _Recurrent) else BATCH, positions)

    def both() -> None:
        step(), products()

    return both


def _several(step: Callable[[], None]) -> Callable[[], None]:
    def several() -> None:
        for _ in range(STEPS):
            step()

    return several


class _Watched:
    """A model with a probe: steps of which each is a steady one, a batch that is looked at, or the first of all."""

    def __init__(self, make: Callable[[], Made], layer_types: Any) -> None:
        torch.manual_seed(0)
        self.model, self.loss = make()
        self.step = _step(self.model, self.loss)
        self.probe = CurvatureProbe(self.model, layer_types, reduction="mean")

    def settle(self) -> None:
        """Take the batches 1, 2, 4, 8, 16, which are looked at; passes that follow are audited as after many."""
        for _ in range(16):
            self.step()
        self.probe._fisher.audited._passes = EACH

    def first(self) -> None:
        """As the first batch."""
        self.probe._attributions.forget()
        self.step()

    def checked(self) -> None:
        """As a batch that is looked at again."""
        looks = self.probe._attributions
        scheduled = looks.scheduled
        looks.scheduled = lambda *batch: scheduled(*batch) or True  # type: ignore[method-assign]
        try:
            self.step()
        finally:
            del looks.scheduled


def architectures(results: Results, repeats: int, only: str = "") -> None:
    """The cost of a training step of each architecture, with default layer types and with all."""
    for name, make in ARCHITECTURES.items():
        if only and only.lower() not in name.lower():
            continue
        torch.manual_seed(0)
        try:
            bare = _step(*make())
        except ImportError as error:  # transformers is no dependency
            results.show("Online Fisher of an architecture", name, {}, refused={"bare step": str(error)})
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Each has a model of its own: after a first batch, those that follow are looked at for a while.
            default, steady, looked_at, first = (_Watched(make, types) for types in (None, "all", "all", "all"))
            contestants = {
                "bare step": _several(bare),
                "products alone": _bare_with_products(name, make),
                "default types": _several(default.step),
                "all": _several(steady.step),
                "all, verification batch": looked_at.checked,
                "all, the first": first.first,
            }
            for watched in (default, steady, looked_at):
                watched.settle()
            times = alternate(contestants, repeats, warm_up=1)
            for steps in ("bare step", "default types", "all"):
                times[steps] /= STEPS
            results.show("Online Fisher of an architecture", name, times)
        for watched in (default, steady, looked_at, first):
            watched.probe.detach()


if __name__ == "__main__":
    import sys

    from rich.console import Console

    torch.set_num_threads(2)
    architectures(Results(Console()), 7, *sys.argv[1:])
