"""``rich``, imported without a change to the state of Python's ``random``, from which it draws at import."""

import random

_state = random.getstate()

from rich.cells import cell_len  # noqa: E402
from rich.console import Console, ConsoleOptions, Group, RenderResult  # noqa: E402
from rich.live import Live  # noqa: E402
from rich.measure import Measurement  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

random.setstate(_state)

__all__ = [
    "BarColumn", "Console", "ConsoleOptions", "Group", "Live", "Measurement", "MofNCompleteColumn", "Progress",
    "ProgressColumn", "RenderResult", "Table", "Task", "Text", "TextColumn", "TimeRemainingColumn", "cell_len",
]  # fmt: skip
