"""A run that goes on, in the terminal."""

import io
import json
import math
import os
from pathlib import Path

import pytest

from secorder import InvalidArgumentError
from secorder.monitor.sinks.json_lines import JSONLinesSink
from secorder.monitor.terminal import Console
from secorder.monitor.watch import Run, file_of, watch


def shown(run: Run, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as captured:
        console.print(run)
    return captured.get()


def test_the_latest_numbers_of_every_statistic(tmp_path: Path) -> None:
    sink = JSONLinesSink(tmp_path / "run.jsonl")
    run = Run(sink.path)
    for step in range(1, 9):
        sink.scalars(step, {"fisher_trace/a.0": 10.0**step, "fisher_trace/a.1": math.nan, "model/loss": 1 / step})
    sink.scalars(9, {"hessian_trace/a.0": -5.0})
    sink.text(9, "findings", "- [dead] a.1: dead units")
    assert run.read()
    assert not run.read()
    text = shown(run)
    assert "step 9" in text
    assert "loss 0.125" in text
    assert "1e+08" in text
    assert "-5" in text
    assert "▁▁▂▃▄▅▆▇█"[1:] in text or "▁▂▃▄▅▆▇█" in text
    assert "[dead] a.1" in text
    assert max(map(len, shown(run, 50).splitlines())) <= 50


def test_a_file_that_grows_is_followed_and_one_begun_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = JSONLinesSink(path)
    sink.scalars(1, {"fisher_trace/a": 1.0})
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    looks = iter(range(3))

    def until() -> bool:
        look = next(looks)
        if look == 0:
            with path.open("a") as file:
                file.write(json.dumps({"step": 2, "fisher_trace/a": 2.5}))
        elif look == 1:
            with path.open("a") as file:
                file.write("\n")
        return look == 2

    watch(str(path), console, interval=0.0, until=until)
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "2.5" in file.getvalue()
    run = Run(path)
    run.read()
    path.write_text(json.dumps({"step": 1, "x/b": 1.0}) + "\n")
    assert run.read()
    assert run.step == 1
    assert "2.5" not in shown(run)


def test_an_interval_below_zero_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text("")
    for interval in (-1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="interval must be zero or positive"):
            watch(str(tmp_path), Console(file=io.StringIO()), interval=interval)


def test_the_newest_run_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no file of JSON lines"):
        file_of(str(tmp_path))
    for age, name in enumerate(("new.jsonl", "old.jsonl")):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert file_of(str(tmp_path)).name == "new.jsonl"


@pytest.mark.parametrize("line", ["no json", "[1, 2]", "{}", '{"step": 1, "a/b": "c"}'])
def test_what_is_no_run(tmp_path: Path, line: str) -> None:
    (tmp_path / "run.jsonl").write_text(line + "\n")
    with pytest.raises(InvalidArgumentError, match="holds no points of a run, as its line 1 shows"):
        Run(tmp_path / "run.jsonl").read()


def test_a_run_that_has_only_begun_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text("")
    run = Run(tmp_path / "run.jsonl")
    run.read()
    assert shown(run, 400).strip().endswith("run.jsonl holds no point yet.")
