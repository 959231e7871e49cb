"""JSON lines."""

import json
import math
from pathlib import Path

from secorder.monitor.sinks.json_lines import JSONLinesSink, points
from secorder.monitor.watch import Run


def test_every_line_is_json_and_every_number_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = JSONLinesSink(path)
    sink.scalars(1, {"a/x": 0.1, "a/nan": math.nan, "a/inf": math.inf, "a/low": -math.inf})
    sink.text(1, "findings", "nothing\nelse")
    with path.open("a") as file:
        file.write('{"step": 2, "a/x"')  # is being written
    whole = path.read_text().splitlines()[:2]
    assert [json.loads(line, parse_constant=None)["step"] for line in whole] == [1, 1]
    assert "NaN" not in whole[0]
    assert "Infinity" not in whole[0]
    first, second = points(path)
    assert first["a/x"] == 0.1
    assert math.isnan(first["a/nan"])
    assert (first["a/inf"], first["a/low"]) == (math.inf, -math.inf)
    assert second["findings"] == "nothing\nelse"


def test_what_a_run_that_was_cut_off_left_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    JSONLinesSink(path).scalars(1, {"fisher_trace/a": 0.5})
    path.write_text(path.read_text() + '{"step": 2, "fisher_tr')
    JSONLinesSink(path).scalars(2, {"fisher_trace/a": 0.25})
    assert [(point["step"], point["fisher_trace/a"]) for point in points(path)] == [(1, 0.5), (2, 0.25)]
    run = Run(path)
    assert run.read()
    assert run.step == 2
