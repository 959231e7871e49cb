"""What goes to TensorBoard: read back from the files, from the real server, and from its pages in a browser."""

import json
import math
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from secorder import CurvatureProbe, CurvatureRecorder
from secorder.monitor.log import PICTURES, CurvatureLog
from secorder.monitor.sinks.tensorboard import TensorBoardSink

from ...helpers import Recording, make


def train(folder: Path, steps: int = 6) -> dict[str, list[float]]:
    """Log a training, and return the history."""
    model, inputs, targets = make(), torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    every: dict[str, int] = {"log_every": 1, "norms_every": 1, "histograms_every": 1, "hessian_every": 3}
    with SummaryWriter(str(folder)) as writer, CurvatureProbe(model, reduction="mean") as probe:
        batch = inputs[:8], targets[:8]
        recorder = CurvatureRecorder(
            probe, writer, loss_fn=F.cross_entropy, batch=batch, on_finding=lambda change: None, **every
        )
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    return recorder.history.to_dict()


FISHER = {f"fisher_{key}" for key in ("mean", "max", "trace")}
HESSIAN = {f"hessian_{key}" for key in ("mean", "max", "trace", "negative")}
NORMS = {"gradient_norm", "weight_norm", "update_to_weight"}


def test_everything_is_in_the_files(tmp_path: Path) -> None:
    history = train(tmp_path)
    log = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    log.Reload()
    tags: Any = log.Tags()
    groups = {tag.partition("/")[0] for tag in tags["scalars"] if not tag.partition("/")[0].endswith("_log10")}
    assert groups >= FISHER | HESSIAN | NORMS | {"model"}
    assert set(tags["histograms"]) == {
        f"{kind}_histogram_log10/{layer}" for kind in ("fisher", "hessian") for layer in "02"
    }
    assert set(tags["images"]) == {f"{PICTURES}/fisher_trace", f"{PICTURES}/hessian_trace"}
    assert "custom_scalars__config__" in tags["tensors"]
    assert [e.step for e in log.Scalars("fisher_mean/0")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in log.Scalars("hessian_negative/2")] == [3, 6]
    for name in ("fisher_trace/2", "model/loss", "update_to_weight/0"):
        assert log.Scalars(name)[-1].value == pytest.approx(history[name][-1], rel=1e-6)
    histogram = log.Histograms("fisher_histogram_log10/0")[-1].histogram_value
    assert histogram.num == 25
    assert histogram.max == pytest.approx(math.log10(history["fisher_max/0"][-1]))
    assert sum(histogram.bucket) == 25


def test_a_writer_that_only_has_add_scalar() -> None:
    class Writer:
        def __init__(self) -> None:
            self.written: dict[str, float] = {}

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.written[tag] = value

    writer = Writer()
    log = CurvatureLog(writer, strict=True)
    for step in range(3):
        log.diagonals("fisher", {"a": torch.ones(3), "b": torch.full((3,), 2.0)}, step)
    log.text("findings", "none", 3)
    log.close()
    assert writer.written["fisher_trace/b"] == 6.0


def test_what_spans_a_decade_has_a_twin() -> None:
    writer = Recording()
    sink = TensorBoardSink(writer)
    sink.scalars(1, {"near/a": 1.0, "near/b": 2.0, "far/a": 1e-3, "far/b": 1.0, "far/c": -5.0, "model/x": 1e9})
    sink.scalars(2, {"far/a": 1.0, "far/b": 1.0, "far/c": 0.0})
    written = [(args[0], args[1]) for name, (args, _) in writer.calls if name == "add_scalar"]
    twins = [(name, value) for name, value in written if "_log10" in name]
    assert twins == [("far_log10/a", -3.0), ("far_log10/b", 0.0), ("far_log10/a", 0.0), ("far_log10/b", 0.0)]
    layouts = [args[0] for name, (args, _) in writer.calls if name == "add_custom_scalars"]
    assert len(layouts) == 1  # nothing new at the second point
    assert list(layouts[0]) == ["near", "far_log10", "far"]


def test_all_who_write_to_a_writer_share_its_layout() -> None:
    writer = Recording()
    for sink, name in ((TensorBoardSink(writer), "a"), (TensorBoardSink(writer), "b")):
        sink.scalars(1, {f"near/{name}": 1.0})
    layouts = [args[0] for called, (args, _) in writer.calls if called == "add_custom_scalars"]
    assert layouts[-1] == {"near": {"all layers": ["Multiline", ["^near/a$", "^near/b$"]]}}


def test_another_writer_does_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    writer = Recording()
    TensorBoardSink(writer).scalars(1, {"near/a": 1.0})
    assert ("add_scalar", (("near/a", 1.0, 1), {})) in writer.calls


# ---- the real server


NAMES = [f"model.layers.{i}.{part}" for i in range(50) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def fill(folder: Path, layers: int) -> None:
    """A log of as many layers, over four decades."""
    log = CurvatureLog(folder, strict=True)
    for step in range(8):
        traces = {name: 10.0 ** (-4 * place / layers) / (1 + step) for place, name in enumerate(NAMES[:layers])}
        log.numbers({"fisher_trace": traces, "model": {"loss": 2.0 - 0.1 * step}}, 10 * step)
    log.text("findings", "- [dead] model.layers.0.mlp.fc1: dead units", 70)
    log.close()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard server that has read the log ``run`` of a folder."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = next(word for line in process.stderr for word in line.split() if word.startswith("http://127"))
        deadline = time.monotonic() + 60
        while "run" not in get(address, "images/tags") and time.monotonic() < deadline:
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def get(address: str, path: str) -> Any:
    with urllib.request.urlopen(f"{address}data/plugin/{path}", timeout=30) as answer:
        return json.load(answer)


_TEXT_OF_PAGE = """
function text(node) {
  let all = '';
  for (const child of node.childNodes) {
    if (child.nodeType == 3) all += child.data + ' ';
    else if (child.nodeType == 1 && child.tagName != 'STYLE' && child.tagName != 'SCRIPT')
      all += (child.shadowRoot ? text(child.shadowRoot) : '') + text(child);
  }
  return all;
}
return text(document.body);
"""


@contextmanager
def browsing(profile: Path) -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("Chromium is missing")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in (*flags.split(), "disable-component-update", "disable-sync", "window-size=1500,1100"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.mark.parametrize(
    "layers", [12, pytest.param(75, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.slow)]
)
def test_the_server_and_its_pages_show_the_charts(tmp_path: Path, layers: int) -> None:
    fill(tmp_path / "runs" / "run", layers)
    first, last = NAMES[0], NAMES[layers - 1]
    wanted = {
        "scalars": ["fisher_trace", f"fisher_trace/{first}", "fisher_trace_log10", "model"],
        "custom_scalars": ["fisher_trace_log10", f"Matches ({min(layers, 12)})"],
        "images": [PICTURES, f"{PICTURES}/fisher_trace"],
        "text": ["findings", "[dead] model.layers.0.mlp.fc1: dead units"],
    }
    with serving(tmp_path / "runs") as address:
        assert {f"fisher_trace/{last}", f"fisher_trace_log10/{last}", "model/loss"} <= set(
            get(address, "scalars/tags")["run"]
        )
        pages = get(address, "custom_scalars/layout")["category"]
        lines = [len(chart["multiline"]["tag"]) for page in pages for chart in page["chart"]]
        assert max(lines) <= 12
        assert sum(lines) == 2 * layers  # of the statistic and of its twin
        with browsing(tmp_path / "profile") as browser:
            for page, texts in wanted.items():
                browser.get("about:blank")
                browser.get(f"{address}#{page}")
                deadline, shown = time.monotonic() + 30, ""
                while not all(text in shown for text in texts) and time.monotonic() < deadline:
                    time.sleep(0.3)
                    shown = " ".join(browser.execute_script(_TEXT_OF_PAGE).split())
                assert all(text in shown for text in texts), (page, shown[:2000])
