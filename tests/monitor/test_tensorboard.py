"""What goes to TensorBoard: read back from the files, from the real server, and from its pages in a browser."""

import json
import math
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from secorder import CurvatureProbe, CurvatureRecorder
from secorder.monitor.tensorboard import CurvatureLog, log_diagonals

from ..helpers import Recording, make


def train(folder: Path, steps: int = 6) -> CurvatureProbe:
    torch.manual_seed(0)
    model, inputs, targets = make(), torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SummaryWriter(str(folder)) as writer, CurvatureProbe(model) as probe:
        batch = inputs[:8], targets[:8]
        recorder = CurvatureRecorder(probe, writer, every=1, hessian_every=3, loss_fn=F.cross_entropy, batch=batch)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            recorder.step()
    return probe


FISHER = ("mean", "std", "max", "min", "trace")
SCALARS = {f"fisher/{key}/{layer}" for key in FISHER for layer in "02"} | {
    f"hessian/{key}/{layer}" for key in (*FISHER, "negative") for layer in "02"
}


def test_everything_is_in_the_files(tmp_path: Path) -> None:
    probe = train(tmp_path)
    log = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    log.Reload()
    tags: Any = log.Tags()
    assert set(tags["scalars"]) == SCALARS
    assert set(tags["histograms"]) == {f"{kind}/log10/{layer}" for kind in ("fisher", "hessian") for layer in "02"}
    assert set(tags["images"]) == {"fisher/layers over steps", "hessian/layers over steps"}
    assert "custom_scalars__config__" in tags["tensors"]
    assert [e.step for e in log.Scalars("fisher/mean/0")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in log.Scalars("hessian/negative/2")] == [3, 6]
    last = log.Scalars("fisher/trace/2")[-1].value
    assert last == pytest.approx(probe.fisher_diagonal()["2"].sum().item())
    histogram = log.Histograms("fisher/log10/0")[-1].histogram_value
    assert histogram.num == 25
    assert histogram.max == pytest.approx(probe.fisher_diagonal()["0"].max().log10().item())
    assert sum(histogram.bucket) == 25


def test_values_that_are_not_finite_are_logged_and_crash_nothing() -> None:
    writer = Recording()
    diagonals = {
        "nan": torch.tensor([1.0, torch.nan]),
        "inf": torch.tensor([1.0, torch.inf, 2.0]),
        "zero": torch.zeros(3),
        "none": torch.zeros(0),
    }
    log = CurvatureLog(writer)
    for step in range(3):
        log.log("hessian", diagonals, step)
    scalars = {args[0]: args[1] for name, (args, _) in writer.calls if name == "add_scalar"}
    assert math.isnan(scalars["hessian/mean/nan"])
    assert math.isinf(scalars["hessian/max/inf"])
    assert scalars["hessian/nonfinite/nan"] == 0.5
    assert scalars["hessian/nonfinite/inf"] == pytest.approx(1 / 3)
    assert "hessian/nonfinite/zero" not in scalars
    histograms = {args[0]: kwargs for name, (args, kwargs) in writer.calls if name == "add_histogram_raw"}
    assert set(histograms) == {"hessian/log10/nan", "hessian/log10/inf"}
    assert histograms["hessian/log10/inf"]["num"] == 2


def test_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    for name in ("tolist", "item", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, original: Any = original) -> Any:
            transfers.append(self.shape)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    log_diagonals(Recording(), {str(i): torch.rand(7) for i in range(20)}, 0, "fisher")
    assert len(transfers) == 1


def test_many_layers_are_listed_in_a_text() -> None:
    writer = Recording()
    log = CurvatureLog(writer)
    for step in range(2):
        log.log("fisher", {f"layer{i}": torch.rand(3) for i in range(100)}, step)
    texts = [args for name, (args, _) in writer.calls if name == "add_text"]
    assert len(texts) == 1
    assert "100. layer99" in texts[0][1]


def test_history_is_bounded() -> None:
    log = CurvatureLog(Recording())
    log.COLUMNS = 8
    for step in range(100):
        log.log("fisher", {"a": torch.rand(3)}, step)
    assert len(log._history["fisher"]) <= 9
    images = [1 for name, _ in log.writer.calls if name == "add_image"]  # type: ignore[attr-defined]
    assert len(images) < 50


# ---- the real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "run")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = next(word for line in process.stderr for word in line.split() if word.startswith("http://127"))
        deadline = time.monotonic() + 60
        while "run" not in get(address, "scalars/tags") and time.monotonic() < deadline:
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def get(address: str, path: str) -> Any:
    with urllib.request.urlopen(f"{address}data/plugin/{path}", timeout=30) as answer:
        return json.load(answer)


def test_the_server_has_scalars_histograms_images_and_the_layout(server: str) -> None:
    assert set(get(server, "scalars/tags")["run"]) == SCALARS
    points = get(server, "scalars/scalars?run=run&tag=fisher/mean/0")
    assert [step for _, step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert "hessian/log10/2" in get(server, "histograms/tags")["run"]
    assert get(server, "histograms/histograms?run=run&tag=hessian/log10/2")[-1][1] == 6
    assert "fisher/layers over steps" in get(server, "images/tags")["run"]
    layout = {group["title"]: group["chart"] for group in get(server, "custom_scalars/layout")["category"]}
    assert [chart["title"] for chart in layout["hessian"]] == [*FISHER, "negative"]
    assert layout["fisher"][0]["multiline"]["tag"] == ["^fisher/mean/.*"]


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


@pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("chromedriver"), reason="Chromium is missing")
def test_the_pages_show_the_charts(server: str, tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in (*flags.split(), "disable-component-update", "disable-sync", "window-size=1500,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    wanted = {
        "scalars": ["fisher/mean/0", "fisher/mean/2"],
        "custom_scalars": ["Matches (2)", "fisher/mean/2 (run)", "hessian"],
        "histograms": ["fisher/log10/0", "hessian/log10/2"],
        "images": ["fisher/layers over steps", "hessian/layers over steps"],
    }
    try:
        for page, texts in wanted.items():
            browser.get("about:blank")
            browser.get(f"{server}#{page}")
            deadline, shown = time.monotonic() + 30, ""
            while not all(text in shown for text in texts) and time.monotonic() < deadline:
                time.sleep(0.3)
                shown = " ".join(browser.execute_script(_TEXT_OF_PAGE).split())
            assert all(text in shown for text in texts), (page, shown[:2000])
    finally:
        browser.quit()
