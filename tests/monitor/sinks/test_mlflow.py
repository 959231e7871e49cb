"""MLflow, the real package, on a local folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secorder import InvalidArgumentError
from secorder.monitor.log import PICTURES
from secorder.monitor.sinks.mlflow import MLflowSink


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    yield mlflow
    mlflow.set_tracking_uri(before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_metrics_of_a_run(mlflow: Any) -> None:
    with mlflow.start_run() as run:
        sink = MLflowSink()
        for step in (1, 2):
            sink.scalars(step, {f"fisher_trace/layer.{i}": 0.5 * step for i in range(1200)})
        sink.text(2, "findings", "nothing")
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.info.run_id, "fisher_trace/layer.1199")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 1.0)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "findings")] == ["findings/2.md"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_names_of_any_characters_and_pictures(mlflow: Any) -> None:
    with mlflow.start_run() as run:
        sink = MLflowSink()
        sink.scalars(1, {"fisher_trace/conv(3×3)": 0.5, "model/loss": 1.0})
        sink.image(1, f"{PICTURES}/fisher_trace", np.zeros((4, 4, 3), np.uint8))
    client = mlflow.MlflowClient()
    metrics = client.get_run(run.info.run_id).data.metrics
    assert metrics == {"fisher_trace/conv_3_3_": 0.5, "model/loss": 1.0}
    assert any("fisher_trace" in file.path for file in client.list_artifacts(run.info.run_id, "images"))


def test_without_a_run(mlflow: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="no active run of MLflow"):
        MLflowSink()
