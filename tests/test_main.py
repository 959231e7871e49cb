"""The command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secorder.__main__ import main

from .helpers import ROOT

FACTORY = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def factory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(10, 4), torch.randint(3, (10,)))

def loader():
    model, loss_fn, data = factory()
    return model, loss_fn, DataLoader(TensorDataset(*data), batch_size=5)

def uneven():
    model, loss_fn, data = factory()
    return model, loss_fn, (data[0], data[1][:3])

def wrong():
    return 3

def nan():
    model, loss_fn, data = factory()
    return model, loss_fn, (data[0] * float("nan"), data[1])
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_for_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("made_for_test", None)
    torch.set_default_dtype(torch.float32)
    return "made_for_test:factory"


def test_command_line(factory: str, tmp_path: Path) -> None:
    files = ["--json", "out.json", "--logdir", "runs", "--html", "table.html", "--svg", "table.svg"]
    command = [sys.executable, "-m", "secorder", "diagnose", factory, "--batch-size", "4", *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # of this checkout, from another folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tr F" in done.stdout
    assert "10 samples" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written["statistics"]) == {"fisher", "hessian"}
    assert set(written["statistics"]["fisher"]) == {"0", "2"}
    assert list((tmp_path / "runs").glob("events.*"))
    assert (tmp_path / "table.svg").exists()
    assert (tmp_path / "table.html").exists()


def test_command_line_options(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "made_for_test:loader", "--layers", "2", "--method", "hutchinson", "--json", "-"]) == 0
    assert list(json.loads(capsys.readouterr().out)["statistics"]["hessian"]) == ["2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made_for_test"], "package.module:function"),
        (["made_for_test:missing"], "has no function 'missing'"),
        (["no_such_module:factory"], "No module named 'no_such_module'"),
        (["made_for_test:wrong"], "must return (model, loss_fn, data), got int"),
        (["made_for_test:uneven"], "inputs hold 10 samples and targets 3"),
        (["made_for_test:nan"], "the loss is nan"),
        (["made_for_test:factory", "--batch-size", "0"], "at least 1"),
        (["made_for_test:factory", "--layers", "fc9"], "'fc9'"),
    ],
)
def test_bad_input_is_one_line_and_not_zero(
    factory: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
