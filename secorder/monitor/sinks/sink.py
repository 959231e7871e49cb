"""The interface of sinks, and the sink for a given writer, logger or path."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..._arguments import require_path
from ...errors import InvalidArgumentError, InvalidTypeError

__all__ = ["Sink", "sink_of"]

#: What ends the name of a file, not of a folder.
_NO_FOLDERS = (".json", ".log", ".tsv", ".txt")


@runtime_checkable
class Sink(Protocol):
    """Anything that takes numbers.

    Where it also has them, these are called:

    - ``histogram(step, name, edges, counts)``: ``len(counts) + 1`` edges of equal bins;
    - ``image(step, name, pixels)``: a NumPy array of shape ``(height, width, 3)`` and dtype uint8;
    - ``text(step, name, text)``: Markdown;
    - ``close()``: nothing more will come; of sinks that the recorder made itself.

    Example:
        >>> class Printing:
        ...     def scalars(self, step, numbers):
        ...         print(step, numbers)
        >>> from secorder.monitor.sinks.sink import sink_of
        >>> sink_of(Printing()).scalars(3, {"loss": 0.5})
        3 {'loss': 0.5}
    """

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a step by their names, ``"fisher_trace/conv1"``: statistic and layer."""


def sink_of(given: Any) -> Sink:
    """The sink for what was given.

    Args:
        given: a :class:`Sink`; a ``SummaryWriter``, or another writer that has ``add_scalar``; a Lightning logger
            (``log_metrics``); a run of Weights & Biases; or a path: of JSON lines (``"run.jsonl"``), of a table
            (``"run.csv"``), else of a folder for TensorBoard.

    Raises:
        InvalidTypeError: it is none of these.
        InvalidArgumentError: a path cannot be written to, or names a file of another kind.

    Example:
        >>> import tempfile
        >>> from secorder.monitor.sinks.sink import sink_of
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = sink_of(f"{folder}/run.csv")
        ...     sink.scalars(10, {"fisher_trace/fc1": 1.5})
    """
    check_sink(given)
    if isinstance(given, (str, PathLike)):
        try:
            return _of_path(Path(given))
        except OSError as error:
            raise InvalidArgumentError(f"{given} cannot be written to ({error}): pass another path.") from error
    if isinstance(given, Sink):
        return given
    if hasattr(given, "add_scalar"):
        from .tensorboard import TensorBoardSink

        return TensorBoardSink(given)
    if hasattr(given, "log_metrics"):
        return _of_logger(given)
    from .wandb import WandbSink

    return WandbSink(given)


def check_sink(given: Any) -> None:
    """Raise unless a sink can be made of it, without making one: paths are not opened."""
    if isinstance(given, (str, PathLike)):
        require_path("a sink", given)
        if Path(given).suffix in _NO_FOLDERS and not Path(given).is_dir():
            raise InvalidArgumentError(
                f"a sink is the path {given}: pass one that ends in .jsonl or .csv, or a folder for TensorBoard."
            )
    elif isinstance(given, type):
        raise InvalidTypeError(f"a sink is the class {given.__name__}, not made yet: pass {given.__name__}(…).")
    elif not (
        isinstance(given, Sink)
        or hasattr(given, "add_scalar")
        or hasattr(given, "log_metrics")
        or (hasattr(given, "log") and hasattr(given, "define_metric"))
    ):
        raise InvalidTypeError(
            "a sink has scalars(step, {name: number}), or is a SummaryWriter, a Lightning logger, a run of wandb or a "
            f"path (run.jsonl, run.csv, or a folder for TensorBoard), got {type(given).__name__}."
        )


def _of_path(path: Path) -> Sink:
    if path.suffix == ".jsonl":
        from .json_lines import JSONLinesSink

        return JSONLinesSink(path)
    if path.suffix == ".csv":
        from .csv import CSVSink

        return CSVSink(path)
    from .tensorboard import TensorBoardSink

    return TensorBoardSink(path)


def _of_logger(logger: Any) -> Sink:
    """Of a logger of Lightning: that of what it logs to, if this takes more than numbers."""
    experiment = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_scalar") or hasattr(experiment, "define_metric"):
        return sink_of(experiment)
    from .lightning import LightningSink

    return LightningSink(logger)


def sinks_of(given: Any) -> list[Sink]:
    """The sinks of one, or of several (a list or tuple, perhaps empty); see :func:`sink_of`."""
    return [sink_of(one) for one in several(given)]


def several(given: Any) -> Sequence[Any]:
    """What sinks are made of, one or several, as a sequence."""
    return given if isinstance(given, (list, tuple)) else [given]


def give(sinks: Sequence[Sink], what: str, *arguments: Any) -> None:
    """Call a method of each sink that has it."""
    for sink in sinks:
        method = getattr(sink, what, None)
        if method is not None:
            method(*arguments)
