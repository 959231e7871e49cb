"""A logger of Lightning, a real one."""

from pathlib import Path

import pytest

from secorder.monitor.sinks.lightning import LightningSink


def test_csv_logger(tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(str(tmp_path))
    sink = LightningSink(logger)
    sink.scalars(1, {"fisher_trace/a": 0.5})
    sink.scalars(2, {"fisher_trace/a": 0.25, "hessian_trace/a": 1.0})
    logger.save()
    assert "0.25" in Path(logger.log_dir, "metrics.csv").read_text()
