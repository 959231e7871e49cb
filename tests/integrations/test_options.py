"""Keywords of callbacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secorder import InvalidArgumentError, InvalidTypeError, SecorderError
from secorder.integrations.options import divided, submodule, told_apart, try_options


def test_keywords_find_their_owner() -> None:
    of_probe, of_recorder = divided({"every": 2, "log_every": 10, "strict": True, "method": "exact", "decay": 0.5})
    assert of_probe == {"every": 2, "strict": True, "decay": 0.5}
    assert of_recorder == {"log_every": 10, "strict": True, "method": "exact"}


def test_names_of_layers_that_come_one_by_one_are_kept() -> None:
    of_probe, _ = divided({"layers": iter(["0"])})
    try_options(of_probe, {})
    assert "0" in told_apart(of_probe)
    assert list(of_probe["layers"]) == ["0"]


def test_callbacks_that_accumulate_different_numbers_are_told_apart() -> None:
    some: list[dict[str, Any]] = [{}, {"layers": "0"}, {"layers": "2"}, {"every": 2}, {"every": 5}, {"decay": 0.5}]
    some += [{"accumulate": "trace"}, {"layer_types": "all"}, {"layer_types": nn.Linear}]
    some += [{"layer_types": (nn.Linear, nn.Conv2d)}, {"precision": "bfloat16"}, {"on_nonfinite": "keep"}]
    assert len(set(map(told_apart, some))) == len(some)
    assert told_apart({"layers": None, "strict": True}) == ""
    named = [told_apart({"layers": x}) for x in (("0", "2"), {"2", "0"}, {"2": 1, "0": 1}.keys())]
    assert len(set(named)) == 1


def test_a_misspelt_module_is_told_which_there_are() -> None:
    model = nn.Module()
    model.encoder, model.head = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    assert submodule(model, "encoder.0") is model.encoder[0]
    assert submodule(model, "") is model
    with pytest.raises(InvalidArgumentError, match=r"Module has no module 'encodr': it has encoder, encoder\.0, head"):
        submodule(model, "encodr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_evry": 3}, "no option 'log_evry': did you mean 'log_every'?"),
        ({"log_every": 0}, "log_every must be at least 1, got 0."),
        ({"every": "3"}, "every must be an integer, got '3'."),
        ({"reduction": "none"}, "reduction must be"),
        ({"hessian_every": 5}, "hessian_every needs loss_fn= and batch="),
        ({"method": "quick"}, "method must be"),
        ({"rtol": -0.1}, "rtol must be zero or positive, got -0.1."),
        ({"max_iterations": 2.5}, "max_iterations must be an integer, got 2.5."),
        ({"layers": 3}, "layers must hold module names, got int."),
        ({"layers": ["fc1", 3]}, "layers must hold module names, got int."),
        ({"sample_dim": "first"}, "sample_dim must be an integer of at least 0"),
    ],
)
def test_an_option_is_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SecorderError) as refused:
        try_options(*divided(options))
    assert message in str(refused.value)


def test_what_is_no_type_of_layers_is_refused_before_training() -> None:
    with pytest.raises(InvalidTypeError, match=r"layer_types must hold subclasses of torch.nn.Module, got 3\."):
        try_options({"layer_types": [3]}, {})


@pytest.mark.parametrize("sinks", [42, [42], [[]], torch.optim.SGD])
def test_what_is_no_sink_is_refused_before_training(sinks: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"^a sink "):
        try_options({}, {}, sinks)


def test_paths_of_sinks_are_not_opened_before_training(tmp_path: Path) -> None:
    try_options({}, {}, [tmp_path / "run.jsonl", str(tmp_path / "run.csv"), tmp_path / "events"])
    assert not list(tmp_path.iterdir())


def test_to_try_options_draws_nothing_and_takes_what_needs_a_model() -> None:
    state = torch.get_rng_state()
    try_options(*divided({"layers": "encoder.*", "sample_dim": {"ids": 1}, "accumulate": "trace", "log_every": 5}))
    assert torch.equal(torch.get_rng_state(), state)
