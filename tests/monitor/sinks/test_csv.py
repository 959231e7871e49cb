"""A table as CSV."""

import csv
from pathlib import Path

from secorder.monitor.sinks.csv import CSVSink


def test_rows_are_appended_whatever_comes(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    CSVSink(path).scalars(1, {"fisher_trace/a,b": 0.5, "model/loss": float("nan")})
    CSVSink(path).scalars(2, {"hessian_trace/a,b": -1e-30})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["statistic"] for row in rows] == ["fisher_trace", "model", "hessian_trace"]
    assert rows[0]["layer"] == "a,b"
    assert [float(row["value"]) for row in rows][::2] == [0.5, -1e-30]
    assert rows[2]["step"] == "2"


def test_what_a_run_that_was_cut_off_left_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("step,statistic,layer,value\r\n1,fisher_tr")
    CSVSink(path).scalars(2, {"fisher_trace/a": 0.5})
    assert path.read_text().splitlines()[1:] == ["1,fisher_tr", "2,fisher_trace,a,0.5"]
