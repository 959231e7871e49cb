"""Every Python block of the documentation runs, page by page, top to bottom."""

import re
from pathlib import Path

import pytest
import torch

from .helpers import ROOT

PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
PAGES = ["README.md", *(page for page in PAGES if "```python" in (ROOT / page).read_text())]


def test_the_command_that_runs_the_tests_is_one_line() -> None:
    """A line of its own in the README, which is run as it stands on a clean checkout."""
    commands = re.findall(r"^.* -m pytest$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"]


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    if "sklearn" in "".join(blocks):
        pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
