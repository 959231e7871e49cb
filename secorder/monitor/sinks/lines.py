"""Files that lines are added to, a run's after another's."""

import os
from os import PathLike
from pathlib import Path

from ..._arguments import require_path


def file_at(path: str | PathLike[str]) -> Path:
    """The file of a path, whose folders are made where they are missing."""
    require_path("path", path)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def append_lines(path: Path, lines: str) -> None:
    """Write whole lines to the end of a file; the part of one that a run which was cut off left is ended first."""
    with path.open("ab") as file:
        if path.is_file() and file.tell():
            with path.open("rb") as read:
                read.seek(-1, os.SEEK_END)
                if read.read() != b"\n":
                    lines = f"\n{lines}"
        file.write(lines.encode())
