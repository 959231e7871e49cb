"""The command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secorder
from secorder.__main__ import main
from secorder.monitor.sinks.json_lines import JSONLinesSink

from .helpers import ROOT

FACTORY = """
import sys
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

def failing():
    raise ValueError("no data\\nhere")

def broken_later():
    import no_such_dependency

def no_module():
    return 3, nn.CrossEntropyLoss(), (torch.randn(10, 4), torch.randint(3, (10,)))

def loss_class():
    model, _, data = factory()
    return model, nn.CrossEntropyLoss, data

def float_targets():
    model, loss_fn, data = factory()
    return model, loss_fn, (data[0], data[1].float())

def wrong_width():
    model, loss_fn, data = factory()
    return model, loss_fn, (torch.randn(10, 5), data[1])

def dicts():
    model, loss_fn, data = factory()
    return model, loss_fn, DataLoader([{"x": x, "y": y} for x, y in zip(*data)])

class Returning(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.fc(x), labels)

    @staticmethod
    def made():
        print("loading")
        data = [{"x": x, "labels": y} for x, y in zip(*factory()[2])]
        return Returning(), lambda loss, _: loss, DataLoader(data, batch_size=5)

def exiting():
    sys.exit("usage: train.py")

def triples():
    model, loss_fn, data = factory()
    return model, loss_fn, DataLoader(TensorDataset(*data, data[0]))

def one_dict():
    model, loss_fn, data = factory()
    return model, loss_fn, {"x": data[0]}

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, ids, mask):
        return self.fc(ids) * mask[:, None]

def named():
    _, loss_fn, data = factory()
    return Named(), loss_fn, ({"ids": data[0], "mask": torch.ones(10)}, data[1])

def uneven_names():
    model, loss_fn, (inputs, targets) = named()
    return model, loss_fn, ({**inputs, "mask": torch.ones(4)}, targets)

def four():
    model, loss_fn, data = factory()
    return model, loss_fn, *data

def generator():
    model, loss_fn, data = factory()
    return model, loss_fn, ((data[0][i : i + 5], data[1][i : i + 5]) for i in (0, 5))

def nothing():
    model, loss_fn, _ = factory()
    return model, loss_fn, []

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


def piped() -> dict[str, str]:
    """The environment of a command whose output goes into a pipe: of this checkout, from another folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    environment.pop("COLUMNS", None)
    return environment


def test_command_line(factory: str, tmp_path: Path) -> None:
    files = ["--json", "out.json", "--logdir", "runs", "--html", "table.html", "--svg", "table.svg"]
    command = [sys.executable, "-m", "secorder", "diagnose", factory, "--batch-size", "4", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=piped())
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "tr F" in done.stdout
    assert "max H" in done.stdout  # all columns
    assert "10 samples" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written["statistics"]) == {"fisher", "hessian"}
    assert set(written["statistics"]["fisher"]) == {"0", "2"}
    assert list((tmp_path / "runs").glob("events.*"))
    assert (tmp_path / "table.svg").exists()
    assert (tmp_path / "table.html").exists()


def test_a_generator_is_measured_whole(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The batch that was tried is no batch less."""
    assert main(["diagnose", "made_for_test:generator", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 10


def test_a_method_whose_batches_hold_the_labels_and_which_prints(
    factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", "made_for_test:Returning.made", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 10


def test_inputs_with_names_are_cut_into_batches(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "made_for_test:named", "--batch-size", "5"]) == 0
    assert "10 samples" in capsys.readouterr().out


def test_the_command_is_installed_under_its_name() -> None:
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"secorder": "secorder.__main__:main"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"secorder {secorder.__version__}\n"


def test_a_pipe_may_end_early(factory: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m secorder diagnose {factory} | head -n 1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=piped())
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr


def test_watching_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    JSONLinesSink(tmp_path / "run.jsonl").scalars(3, {"fisher_trace/fc1": 0.125})
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "0.125" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "missing")]) == 2
    assert "there is no run" in capsys.readouterr().err


def test_command_line_options(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "made_for_test:loader", "--layers", "2", "--method", "hutchinson", "--json", "-"]) == 0
    assert list(json.loads(capsys.readouterr().out)["statistics"]["hessian"]) == ["2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made_for_test"], "package.module:function"),
        (
            ["made_for_test.py:factory"],
            "as package.module:function, got 'made_for_test.py:factory': modules are named without .py.",
        ),
        (["made_for_test:missing"], "has no function 'missing'"),
        (["no_such_module:factory"], "No module named 'no_such_module'"),
        (["made_for_test:wrong"], "must return (model, loss_fn, data), got int"),
        (["made_for_test:four"], "got 4 of them: inputs and targets are one, (model, loss_fn, (inputs, targets))"),
        (["made_for_test:uneven_names"], "targets hold 10 samples, and of the inputs mask 4"),
        (["made_for_test:uneven"], "inputs hold 10 samples and targets 3"),
        (["made_for_test:nan"], "the loss is nan"),
        (["made_for_test:factory", "--batch-size", "0"], "at least 1"),
        (["made_for_test:factory", "--layers", "fc9"], "'fc9'"),
        (["made_for_test:failing"], "made_for_test:failing failed: ValueError: no data here (made_for_test.py, line"),
        (["made_for_test:broken_later"], "No module named 'no_such_dependency'"),
        (["made_for_test:no_module"], "must return a module first, got int"),
        (["made_for_test:loss_class"], "pass CrossEntropyLoss()"),
        (["made_for_test:float_targets"], "the loss of the first batch failed: RuntimeError"),
        (["made_for_test:wrong_width"], "the loss of the first batch failed: RuntimeError"),
        (["made_for_test:dicts"], "the call failed without targets: pass targets. (Sequential.forward()"),
        (["made_for_test:Returning.missing"], "has no function 'Returning.missing'"),
        (["made_for_test:exiting"], "made_for_test:exiting failed: SystemExit: usage: train.py"),
        (["made_for_test:triples"], "must yield (inputs, targets), got 3 things"),
        (["made_for_test:one_dict"], "data must be a DataLoader"),
        (["made_for_test:nothing"], "holds no batch"),
        (["made_for_test:factory", "--json", "missing/out.json"], "there is no folder missing for out.json"),
        (["made_for_test:factory", "--html", "missing/out.html"], "there is no folder missing"),
        (["made_for_test:factory", "--svg", "missing/out.svg"], "there is no folder missing"),
        (["made_for_test:broken_later", "--json", "."], ". is a folder: name a file in it."),
        (["made_for_test:factory", "--logdir", "/dev/null/logs"], "Not a directory: '/dev/null/logs'"),
        (["made_for_test:factory", "--depth", "0"], "--depth must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_not_zero(
    factory: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but what only the measurement can see is told before the work."""
    if "--layers" not in arguments:
        monkeypatch.setattr("secorder.__main__.diagnose", lambda *args, **kwargs: pytest.fail("the work was begun"))
    assert main(["diagnose", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
