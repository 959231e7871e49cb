"""Weights & Biases, the real package, offline."""

from pathlib import Path

import numpy as np
import pytest

from secorder import InvalidArgumentError
from secorder.monitor.sinks.sink import sink_of
from secorder.monitor.sinks.wandb import WandbSink


@pytest.mark.slow  # the service behind takes seconds to start
def test_a_run_has_what_was_logged_at_steps_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(InvalidArgumentError, match="no active run of wandb"):
        WandbSink()
    with wandb.init(mode="offline", dir=str(tmp_path), project="test") as run:
        run.log({"training": 1.0}, step=1000)  # the training's own steps are far ahead
        sink = sink_of(run)
        assert isinstance(sink, WandbSink)
        sink.scalars(10, {"fisher_trace/a": 0.5, "model/loss": 2.0})
        sink.scalars(20, {"fisher_trace/a": 0.25})
        sink.histogram(20, "fisher_histogram/a", [0.0, 1.0, 2.0], [3.0, 4.0])
        sink.image(20, "picture", np.zeros((4, 4, 3), dtype=np.uint8))
        sink.text(20, "findings", "nothing")
        assert run.summary["fisher_trace/a"] == 0.25
        assert run.summary[WandbSink.STEP] == 20
        assert run.summary["fisher_histogram/a"]["values"] == [3.0, 4.0]
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert list(folder.glob("*.wandb"))
