"""Make the pictures of the README and the documentation again: ``python docs/make_pictures.py``.

Trains the digits example, exports its table as SVG, and takes pictures of the TensorBoard pages with Debian's Chromium
(``apt-get install chromium chromium-driver``, ``pip install selenium``).
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

from digits import DigitsNet, load_data  # noqa: E402

from secorder import CurvatureProbe, CurvatureRecorder, report  # noqa: E402

#: Clicks the first large picture, also inside of shadow trees.
CLICK = """
function picture(root) {
  for (const node of root.querySelectorAll('*')) {
    if (node.id == 'main-image-container' || node.tagName == 'IMG' && node.naturalWidth > 500) return node;
    const inside = node.shadowRoot && picture(node.shadowRoot);
    if (inside) return inside;
  }
}
const found = picture(document);
if (found) found.click();
"""


def train(logdir: Path) -> None:
    """Train with a recorder, and export the table."""
    torch.manual_seed(0)
    data, test = load_data()
    model = DigitsNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = tuple(tensor[:64] for tensor in test.tensors)
    with SummaryWriter(str(logdir)) as writer, CurvatureProbe(model, reduction="mean") as probe:
        recorder = CurvatureRecorder(
            probe,
            writer,
            log_every=5,
            hessian_every=20,
            loss_fn=F.cross_entropy,
            batch=(batch[0], batch[1]),
            optimizer=optimizer,
            on_finding=print,
        )
        for _ in range(10):
            for images, labels in DataLoader(data, batch_size=64, shuffle=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                recorder.step(loss=loss)
        hessian = probe.hessian_diagonal(F.cross_entropy, *batch)
        table = report(probe.fisher_diagonal(), hessian, title="digits, after 10 epochs")
        table.save_svg(DOCS / "pictures" / "report.svg", width=150)


def photograph(logdir: Path) -> None:
    """Pictures of the Custom Scalars and the Images page."""
    from selenium import webdriver

    # By its name alone, which the page shows.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=logdir.parent)
    assert server.stderr is not None
    address = next(word for line in server.stderr for word in line.split() if word.startswith("http://127"))
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
    for flag in (*flags.split(), "disable-component-update", "window-size=1400,1000"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        time.sleep(5)  # until the server has read the log
        for page, name in (("custom_scalars", "tensorboard.png"), ("images", "heat_map.png")):
            browser.get("about:blank")
            browser.get(f"{address}#{page}")
            time.sleep(8)
            if page == "images":
                browser.execute_script(CLICK)
                time.sleep(2)
            browser.save_screenshot(str(DOCS / "pictures" / name))
    finally:
        browser.quit()
        server.terminate()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "runs" / "digits")
        photograph(Path(folder) / "runs")
