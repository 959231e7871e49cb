"""Estimates of the Hessian of real architectures at small sizes, trained for a while: ours and those of the peers.

Diagonals and top eigenvalues of all layers and traces of single ones, at equal time or to equal tolerance. Errors are
those against the exact Hessian in float64, of some layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, LENGTH, WIDTH, LAYERS, WORDS, LABELS = 4, 12, 96, 3, 200, 5
STEPS = 40


class _Logits(nn.Module):
    """A model of transformers that returns logits alone, as peers want it."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.core(ids).logits
        return found


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of a language model."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@dataclass
class Trained:
    """A model, its loss and a batch.

    Attributes:
        name: as it is shown.
        model: trained for a while.
        loss_fn: of the logits and targets.
        inputs: of one batch.
        targets: of it.
        layers: those whose Hessian is known exactly.
    """

    name: str
    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    layers: Sequence[str]


def _sentences(count: int) -> Tensor:
    """Words of which each is one of four that may follow the one before."""
    generator = torch.Generator().manual_seed(0)
    following = torch.randint(WORDS, (WORDS, 4), generator=generator)
    words = [torch.randint(WORDS, (count,))]
    for _ in range(LENGTH - 1):
        words.append(following[words[-1], torch.randint(4, (count,))])
    return torch.stack(words, 1)


def _trained(name: str, core: nn.Module, layers: Sequence[str], *, labels: bool) -> Trained:
    """After some steps of Adam."""
    model = _Logits(core)
    loss_fn = F.cross_entropy if labels else next_token

    def batch(count: int) -> tuple[Tensor, Tensor]:
        ids = _sentences(count)
        return ids, ids[:, 0] % LABELS if labels else ids

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS):
        inputs, targets = batch(32)
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
    return Trained(name, model.eval(), loss_fn, *batch(BATCH), layers)


def gpt2() -> Trained:
    """transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    core = GPT2LMHeadModel(GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=WORDS, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        use_cache=False, attn_implementation="eager",
    ))  # fmt: skip
    block = "core.transformer.h.1."
    return _trained("GPT-2", core, [block + "attn.c_proj", block + "mlp.c_proj", block + "ln_2"], labels=False)


def llama() -> Trained:
    """transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    core = LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=256, vocab_size=WORDS,
        bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation="eager",
    ))  # fmt: skip
    block = "core.model.layers.1."
    layers = [block + "self_attn.v_proj", block + "mlp.down_proj", block + "input_layernorm"]
    return _trained("Llama", core, layers, labels=False)


def bert() -> Trained:
    """transformers' BERT, as a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    core = BertForSequenceClassification(BertConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=4 * WIDTH,
        vocab_size=WORDS, num_labels=LABELS, attn_implementation="eager",
    ))  # fmt: skip
    block = "core.bert.encoder.layer.1."
    layers = [block + "attention.self.value", block + "output.dense", block + "attention.output.LayerNorm"]
    return _trained("BERT", core, layers, labels=True)


MODELS: dict[str, Callable[[], Trained]] = {"GPT-2": gpt2, "Llama": llama, "BERT": bert}
