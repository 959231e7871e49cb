"""``secorder``: measure the curvature of a model from the command line, or watch a run."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import secorder

from .batch import NO_BATCH
from .core.diagnosis import diagnose
from .errors import InvalidArgumentError, InvalidTypeError, SecorderError
from .monitor.findings import Diagnosis
from .monitor.table import SortKey
from .monitor.terminal import Console
from .monitor.watch import watch
from .oneshot.data_set import inputs_and_targets
from .oneshot.hessian.budget import HessianMethod
from .oneshot.loss import losses

#: Width of what goes into a file or another program, unless ``COLUMNS`` says it.
WIDE = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; by default those of the process.

    Returns:
        0, or 2 after a message of one line on standard error.
    """
    options = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no blocks gets question marks
    try:
        if options.command == "watch":
            console = _console()
            watch(options.run, console, once=options.once or not console.is_terminal, interval=options.interval)
        else:
            _diagnose(options)
    except KeyboardInterrupt:
        return 0 if options.command == "watch" else 130
    except BrokenPipeError:  # whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SecorderError, OSError) as error:
        print(f"secorder: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _console() -> Console:
    """A console that knows how wide it is, or has room."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="secorder", description="Per-layer curvature of a PyTorch model.")
    parser.add_argument("--version", action="version", version=f"secorder {secorder.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("diagnose", help="Fisher and Hessian diagonals of a data set, and what stands out")
    command.add_argument("factory", help="package.module:function that returns (model, loss_fn, data)")
    command.add_argument("--batch-size", type=int, default=64, help="samples measured at a time (default: 64)")
    command.add_argument("--layers", nargs="*", help="names or patterns of layers (default: Linear and Conv2d)")
    command.add_argument("--all-layers", action="store_true", help="every layer with parameters")
    command.add_argument("--method", choices=get_args(HessianMethod), default="auto", help="of the Hessian")
    command.add_argument("--num-draws", type=int, help="draws of an estimated Hessian")
    command.add_argument("--reduction", choices=("mean", "sum"), help="of the loss (default: found out)")
    command.add_argument("--sort-by", choices=get_args(SortKey))
    command.add_argument("--depth", type=int, help="parts of a name: layers that begin alike share one row")
    command.add_argument("--json", metavar="FILE", help="write statistics and findings; - for standard output")
    command.add_argument("--logdir", type=Path, help="write TensorBoard logs to this folder")
    command.add_argument("--html", type=Path, help="write the table as a page")
    command.add_argument("--svg", type=Path, help="write the table as a picture")
    command = commands.add_parser("watch", help="the latest numbers of a run, from its JSON lines, while it goes on")
    command.add_argument("run", help="file of JSON lines that a CurvatureRecorder writes, or a folder that holds one")
    command.add_argument("--once", action="store_true", help="show them once, as where the output is no terminal")
    command.add_argument("--interval", type=float, default=1.0, help="seconds between two updates (default: 1)")
    return parser


# ---- diagnose


def _diagnose(options: argparse.Namespace) -> None:
    """Everything that can fail is tried before the work: folders, the factory, the model's loss on the first batch."""
    for file in (options.json if options.json != "-" else None, options.html, options.svg):
        if file is not None and not Path(file).parent.is_dir():
            raise InvalidArgumentError(f"there is no folder {Path(file).parent} for {Path(file).name}.")
        if file is not None and Path(file).is_dir():
            raise InvalidArgumentError(f"{file} is a folder: name a file in it.")
    if options.depth is not None and options.depth < 1:
        raise InvalidArgumentError(f"--depth must be at least 1, got {options.depth}.")
    if options.logdir is not None:
        options.logdir.mkdir(parents=True, exist_ok=True)
    # What the user's code prints is no JSON.
    with redirect_stdout(sys.stderr) if options.json == "-" else nullcontext():
        model, loss_fn, data = _made(options.factory)
        batches = _tried(model, loss_fn, _loader(data, options.batch_size))
        diagnosis = diagnose(
            model,
            loss_fn,
            batches,
            layer_types="all" if options.all_layers else None,
            layers=options.layers or None,
            method=options.method,
            num_draws=options.num_draws,
            reduction=options.reduction,
            progress=sys.stderr.isatty(),
        )
    _show(diagnosis, options)


def _made(path: str) -> tuple[nn.Module, Callable[[Any, Any], Tensor], Any]:
    module_name, _, name = path.partition(":")
    if not name or module_name.endswith(".py"):
        hint = ": modules are named without .py" * module_name.endswith(".py")
        raise InvalidArgumentError(f"the factory must be given as package.module:function, got {path!r}{hint}.")
    sys.path.insert(0, os.getcwd())
    try:
        factory = attrgetter(name)(importlib.import_module(module_name))
    except AttributeError as error:
        if error.name not in name.split("."):  # of the module's own
            raise InvalidArgumentError(f"{module_name} cannot be imported: {_in_words(error)}") from error
        factory = None
    except (Exception, SystemExit) as error:
        raise InvalidArgumentError(f"{module_name} cannot be imported: {_in_words(error)}") from error
    if not callable(factory):
        raise InvalidArgumentError(f"module {module_name!r} has no function {name!r}.")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise InvalidArgumentError(f"{path} failed: {_in_words(error)}") from error
    if not isinstance(made, tuple) or len(made) != 3:
        got = f"{len(made)} of them" if isinstance(made, tuple) else type(made).__name__
        hint = ": inputs and targets are one, (model, loss_fn, (inputs, targets))" if got == "4 of them" else ""
        raise InvalidTypeError(f"{path} must return (model, loss_fn, data), got {got}{hint}.")
    if not isinstance(made[0], nn.Module):
        raise InvalidTypeError(f"{path} must return a module first, got {type(made[0]).__name__}.")
    return made


def _in_words(error: BaseException) -> str:
    """An exception in one sentence, with the line where it was raised."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        where = where if file.startswith("<") else f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{where}"


def _loader(data: Any, size: int) -> Iterable[Any]:
    """Batches of what a factory gave: a loader as it is, a data set or ``(inputs, targets)`` cut into batches."""
    if size < 1:
        raise InvalidArgumentError(f"--batch-size must be at least 1, got {size}.")
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(x, Tensor) for x in data):
        if len(data[0]) != len(data[1]):
            raise InvalidArgumentError(f"inputs hold {len(data[0])} samples and targets {len(data[1])}.")
        data = TensorDataset(*data)
    elif isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Mapping) and isinstance(data[1], Tensor):
        return DataLoader(_samples(*data), batch_size=size)
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=size)
    if isinstance(data, (Tensor, dict, str)) or not isinstance(data, Iterable):
        raise InvalidTypeError(
            f"data must be a DataLoader, a data set, or (inputs, targets) as tensors, got {type(data).__name__}."
        )
    return data


def _samples(inputs: Mapping[str, Tensor], targets: Tensor) -> Any:
    """One by one the samples of a batch whose inputs have names."""
    sizes = {name: len(x) for name, x in inputs.items()}
    if different := [name for name, size in sizes.items() if size != len(targets)]:
        held = ", ".join(f"{name} {sizes[name]}" for name in different)
        raise InvalidArgumentError(f"targets hold {len(targets)} samples, and of the inputs {held}.")
    return [({name: x[i] for name, x in inputs.items()}, target) for i, target in enumerate(targets)]


def _tried(model: nn.Module, loss_fn: Any, data: Iterable[Any]) -> Iterable[Any]:
    """The same batches, after the loss of the first one."""
    try:
        begun: Iterator[Any] = iter(data)
        first = next(begun, None)
    except Exception as error:
        raise InvalidArgumentError(f"the data cannot be read: {_in_words(error)}") from error
    if first is None:
        raise InvalidArgumentError(NO_BATCH)
    try:
        losses(model, loss_fn, [inputs_and_targets(first)])
    except SecorderError:
        raise
    except Exception as error:
        raise InvalidArgumentError(f"the loss of the first batch failed: {_in_words(error)}") from error
    return data if begun is not data else chain([first], begun)


def _show(diagnosis: Diagnosis, options: argparse.Namespace) -> None:
    table = diagnosis.report(sort_by=options.sort_by, depth=options.depth)
    if options.json == "-":
        print(diagnosis.to_json(indent=2))
    else:
        console = _console()
        console.print(table)
        for finding in diagnosis.findings:
            console.print(f"• {finding}", markup=False, highlight=False)
        if not diagnosis.findings:
            console.print("Nothing stands out.")
    if options.json and options.json != "-":
        Path(options.json).write_text(diagnosis.to_json(indent=2) + "\n")
    if options.html:
        table.save_html(options.html)
    if options.svg:
        table.save_svg(options.svg)
    if options.logdir:
        from .monitor.log import CurvatureLog

        log = CurvatureLog(options.logdir, strict=True)
        if diagnosis.fisher is not None:
            log.diagonals("fisher", diagnosis.fisher, 0)
        log.diagonals("hessian", diagnosis.hessian, 0)
        log.text("findings", "\n".join(f"- {finding}" for finding in diagnosis.findings), 0)
        log.close()


if __name__ == "__main__":
    sys.exit(main())
