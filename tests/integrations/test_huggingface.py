"""The Hugging Face callback, in a real training."""

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning

from ..helpers import no_warnings, run_ranks
from ..reference import assert_all_close, fisher_by_sample


def scalars(folder: Path) -> set[str]:
    (events,) = {path.parent for path in folder.rglob("events.*") if "curvature" in str(path)}
    log = EventAccumulator(str(events))
    log.Reload()
    return {tag for tag in log.Tags()["scalars"] if "/" in tag}


def test_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from secorder.integrations.huggingface import CurvatureCallback

    torch.set_default_dtype(torch.float32)
    sizes: dict[str, Any] = {"initializer_range": 0.5}
    sizes |= {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(
        vocab_size=20, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    model = transformers.BertForSequenceClassification(config)
    data = [
        {
            "input_ids": torch.randint(20, (5,)),
            "attention_mask": torch.ones(5, dtype=int),
            "labels": torch.tensor(i % 3),
        }
        for i in range(8)
    ]
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    callback = CurvatureCallback(
        log_every=1, norms_every=1, hessian_every=2, batch=batch, loss_scale=1.0, on_finding=print
    )
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=0.0,
        report_to=["tensorboard"],
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
    assert callback.probe is not None
    assert not callback.probe.attached
    assert callback.probe.num_samples == 8
    model.cpu().eval()
    expected = fisher_by_sample(model, lambda output, _: output.loss, batch, None, 8)
    found = callback.probe.fisher_diagonal()
    # By layer: the gradient of a key's bias is zero but for rounding.
    by_layer = {name: torch.cat([expected[f"{name}.{p}"].flatten() for p in ("weight", "bias")]) for name in found}
    assert_all_close(found, by_layer, 1e-4)
    assert {"fisher_mean/classifier", "hessian_trace/classifier", "gradient_norm/classifier"} <= scalars(tmp_path)
    assert callback.recorder is not None
    history = callback.recorder.history.to_dict()
    assert history["step"] == [1, 2]  # a point a step, not a micro-batch
    assert history["model/loss"] == [row["loss"] for row in trainer.state.log_history if "loss" in row]


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_positions": 16, "n_embd": 12, "n_layer": 1, "n_head": 2}),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"tie_word_embeddings": True, "max_position_embeddings": 16},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20},
    ),
}


@pytest.mark.parametrize(
    ("name", "layers"),
    [(name, layers) for layers in (None, "*") for name in MODELS],
)
def test_language_models_with_tied_embeddings(name: str, layers: str | None) -> None:
    """As they are: the loss from inside the model, normalisation in float32, one table for embedding and head."""
    transformers = pytest.importorskip("transformers")
    torch.set_default_dtype(torch.float32)
    config, kind, options = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=50, **options)).eval()
    words = torch.randint(50, (4, 7))
    probe = CurvatureProbe(model, layers=layers, reduction="mean")
    with probe, no_warnings() if layers is None else nullcontext():
        # Of all layers, tables of positions are rows that all samples share; the linear ones take no second run.
        for _ in range(2):
            model(input_ids=words, labels=words).loss.backward()
        found = probe.fisher_diagonal().by_parameter()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = {key: torch.zeros_like(parameters[key]) for key in found}
    for row in words:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for key, total in expected.items():
            total += parameters[key].grad ** 2 / 4
    largest = max(t.max().item() for t in expected.values())  # some are zero in exact arithmetic (biases of keys)
    for key, total in expected.items():
        torch.testing.assert_close(found[key], total, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_language_model_with_padding_and_accumulation_is_told_by_itself(tmp_path: Path, steps: int) -> None:
    """Token means, the number of items that the trainer divides by, and the scale of micro-batches."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from secorder.integrations.huggingface import CurvatureCallback

    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(13, (8, 6))
    labels = ids.clone()
    for n, length in enumerate((6, 3, 4, 2, 6, 5, 2, 4)):
        labels[n, length:] = -100
    rows = [{"input_ids": i, "labels": one} for i, one in zip(ids, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=steps, num_train_epochs=1,
        learning_rate=0.0, max_grad_norm=0.0, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = CurvatureCallback(layers="*.c_fc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
        assert callback.probe is not None
        found = callback.probe.fisher_diagonal().by_parameter()
    model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in found}
    for n in range(8):
        model.zero_grad()
        model(input_ids=ids[n : n + 1], labels=labels[n : n + 1]).loss.backward()
        for name, p in model.named_parameters():
            if name in found:
                total[name] += p.grad**2 / 8
    assert_all_close(found, total, 1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_model_with_a_loss_of_its_own_is_told_by_itself(tmp_path: Path, steps: int) -> None:
    """It ignores the number of labels that the trainer passes: each micro-batch is a mean over its own tokens."""
    transformers = pytest.importorskip("transformers")
    from secorder.integrations.huggingface import CurvatureCallback

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    config = transformers.BertConfig(vocab_size=13, max_position_embeddings=8, num_labels=3, **sizes, **still)
    model = transformers.BertForTokenClassification(config).double()
    labels = torch.randint(3, (8, 6))
    for n, length in enumerate((6, 3, 4, 2, 6, 5, 2, 4)):
        labels[n, length:] = -100
    ids = torch.randint(13, (8, 6))
    rows = [{"input_ids": i, "labels": one} for i, one in zip(ids, labels, strict=True)]
    callback = CurvatureCallback(layers=["*.intermediate.dense", "classifier"])
    run(tmp_path, model, rows, callback, learning_rate=0.0, gradient_accumulation_steps=steps)
    found = callback.probe.fisher_diagonal().by_parameter()

    def loss(output: Any, _: Any) -> torch.Tensor:
        return output.loss  # type: ignore[no-any-return]

    assert_all_close(found, fisher_by_sample(model, loss, {"input_ids": ids, "labels": labels}, None, 8))


def test_a_loss_outside_of_the_model_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secorder.integrations import huggingface

    told: list[str] = []
    monkeypatch.setattr(huggingface, "caution", told.append)
    model, rows = tiny()
    run(tmp_path, model, rows, huggingface.CurvatureCallback(layers="*.c_fc"), label_smoothing_factor=0.1)
    assert [text.partition("(")[0] for text in told] == ["the model is called without labels "]


def tiny() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A language model and eight texts of it."""
    transformers = pytest.importorskip("transformers")
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 13, "n_positions": 8}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout))
    ids = torch.randint(13, (8, 6))
    return model, [{"input_ids": row, "labels": row.clone()} for row in ids]


def run(folder: Path, model: Any, rows: Any, *callbacks: Any, resume: str | None = None, **options: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    given: dict[str, Any] = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "use_cpu": True}
    given |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(str(folder), **given)
        made = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))
        made.train(resume_from_checkpoint=resume)


def test_a_run_that_is_resumed_has_everything(tmp_path: Path) -> None:
    """The checkpoint holds what was accumulated and logged, and its JSON what it can of the callback's arguments."""
    pytest.importorskip("transformers")
    from secorder.integrations.huggingface import CurvatureCallback

    def callback() -> Any:
        return CurvatureCallback(layers="*.c_fc", log_every=2, on_finding=print)

    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, second = callback(), callback()
    model, rows = tiny()
    run(tmp_path, model, rows, whole, **saving)
    model, rows = tiny()
    run(tmp_path, model, rows, second, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert second.probe.num_samples == whole.probe.num_samples == 8
    for name, diagonal in whole.probe.fisher_diagonal().items():
        assert torch.equal(diagonal, second.probe.fisher_diagonal()[name])
    assert second.recorder.history.to_dict() == whole.recorder.history.to_dict()
    kept = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["CurvatureCallback"]["args"] == {"layers": "*.c_fc", "log_every": 2}
    again = callback()
    model, rows = tiny()
    run(
        tmp_path, model, rows, again, resume=str(tmp_path / "checkpoint-3"),
        restore_callback_states_from_checkpoint=True, **saving,
    )  # fmt: skip


def test_several_callbacks_of_one_trainer(tmp_path: Path) -> None:
    """Each finds its own state in the checkpoint."""
    pytest.importorskip("transformers")
    from secorder.integrations.huggingface import CurvatureCallback

    for resume, recorded in ((None, 8), (str(tmp_path / "checkpoint-4"), 16)):
        callbacks = [
            CurvatureCallback(layers="*.c_fc"),
            CurvatureCallback(layers="*.c_fc", every=2, accumulate="trace"),
        ]
        model, rows = tiny()
        epochs = recorded // 8
        run(tmp_path, model, rows, *callbacks, resume=resume, save_strategy="epoch", num_train_epochs=epochs)
        found = [callback.probe for callback in callbacks]
        assert [(p.accumulate, p.num_samples) for p in found if p] == [("diagonal", recorded), ("trace", recorded // 2)]


def test_what_is_not_in_a_checkpoint_is_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    transformers = pytest.importorskip("transformers")
    from secorder.integrations.huggingface import CurvatureCallback

    model, rows = tiny()
    run(tmp_path, model, rows, transformers.TrainerCallback(), save_strategy="steps", save_steps=3)
    callback = CurvatureCallback(on_finding=print)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    made = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    with pytest.warns(CurvatureWarning, match=r"there is no curvature\.pt in .*checkpoint-3"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_what_is_causal_goes_by_the_loss_and_not_by_the_name() -> None:
    """Models of pictures and words are called as those that translate are, whose labels are not shifted."""
    transformers = pytest.importorskip("transformers")
    from secorder.integrations.huggingface import _ByLabels

    class CaptionsForConditionalGeneration(transformers.LlamaForCausalLM):
        pass

    model = CaptionsForConditionalGeneration(transformers.LlamaConfig(vocab_size=50, **MODELS["llama"][2])).eval()
    labels = torch.tensor([[5, 6, 7, 8], [9, -100, -100, 4]])
    weights = _ByLabels(model)(input_ids=labels.clamp(min=0), labels=labels)
    assert weights is not None
    whole, parts = (model(input_ids=rows.clamp(min=0), labels=rows).loss for rows in (labels, labels[:1]))
    other = model(input_ids=labels[1:].clamp(min=0), labels=labels[1:]).loss
    torch.testing.assert_close(whole.double(), weights[0] * parts + weights[1] * other)


def test_a_model_of_ones_own_may_call_its_loss_as_it_likes() -> None:
    from secorder.integrations.huggingface import _ByLabels

    def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    class Own(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return loss_function(x, labels)

    labels = torch.tensor([[5, 6, 7], [9, -100, -100]])
    weights = _ByLabels(Own())(labels=labels)
    assert weights is not None
    assert weights.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_low_rank_adapters(tmp_path: Path, task: str | None) -> None:
    """Adapters are told, the frozen matrices beside them are not."""
    peft = pytest.importorskip("peft")
    from secorder.integrations.huggingface import CurvatureCallback

    model, rows = tiny()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_fc"], fan_in_fan_out=True, task_type=task)
    adapted = peft.get_peft_model(model, config)
    callback = CurvatureCallback(layers="*lora_*.default", log_every=1, on_finding=print)
    run(tmp_path, adapted, rows, callback, learning_rate=0.0, max_grad_norm=0.0)
    found = callback.probe.fisher_diagonal().by_parameter()
    adapted.eval()
    total = {name: torch.zeros_like(p) for name, p in adapted.named_parameters() if name in found}
    assert len(total) == 2
    for row in rows:
        adapted.zero_grad()
        adapted(**{key: value[None] for key, value in row.items()}).loss.backward()
        for name, p in adapted.named_parameters():
            if name in found:
                total[name] += p.grad**2 / 8
    assert_all_close(found, total, 1e-4)
    everything = CurvatureCallback(log_every=1, on_finding=print)
    run(tmp_path, peft.get_peft_model(tiny()[0], config), rows, everything)
    names = set(everything.recorder.history.points("fisher_trace")[-1][1])
    assert {name.split(".")[-2] for name in names} == {"lora_A", "lora_B"}


@pytest.mark.slow
def test_a_model_that_the_trainer_compiles(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from secorder.integrations.huggingface import CurvatureCallback

    model, rows = tiny()
    callback = CurvatureCallback(layers="*.c_fc", log_every=1, on_finding=print)
    run(tmp_path, model, rows, callback, torch_compile=True, torch_compile_backend="aot_eager", learning_rate=0.0)
    plain, rows = tiny()
    expected = CurvatureCallback(layers="*.c_fc", log_every=1, on_finding=print)
    run(tmp_path, plain, rows, expected, learning_rate=0.0)
    assert callback.probe.num_samples == 8
    assert_all_close(
        callback.probe.fisher_diagonal().by_parameter(), expected.probe.fisher_diagonal().by_parameter(), 1e-4
    )


@pytest.mark.slow
def test_ranks_log_what_one_process_logs_of_all_samples() -> None:
    run_ranks("trainer", 2)
