"""``python -m secorder diagnose package.module:factory``: measure the curvature of a model from the command line."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .core.diagnosis import diagnose
from .errors import InvalidArgumentError, InvalidTypeError, SecorderError
from .monitor.findings import Diagnosis
from .monitor.terminal import Console

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; by default those of the process.

    Returns:
        0, or 2 after a message of one line on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        model, loss_fn, data = _made(options.factory)
        diagnosis = diagnose(
            model,
            loss_fn,
            _loader(data, options.batch_size),
            layer_types="all" if options.all_layers else None,
            layers=options.layers or None,
            method=options.method,
            num_draws=options.num_draws,
            reduction=options.reduction,
            progress=sys.stderr.isatty(),
        )
    except (SecorderError, ImportError, OSError) as error:
        print(f"secorder: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    _show(diagnosis, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m secorder", description="Per-layer curvature of a PyTorch model.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "diagnose", help="Fisher and Hessian diagonals of a data set, and what stands out"
    )
    command.add_argument("factory", help="package.module:function that returns (model, loss_fn, data)")
    command.add_argument("--batch-size", type=int, default=64, help="samples measured at a time (default: 64)")
    command.add_argument("--layers", nargs="*", help="names or patterns of layers (default: Linear and Conv2d)")
    command.add_argument("--all-layers", action="store_true", help="every layer with parameters")
    command.add_argument("--method", choices=("auto", "exact", "hutchinson"), default="auto", help="of the Hessian")
    command.add_argument("--num-draws", type=int, help="draws of an estimated Hessian")
    command.add_argument("--reduction", choices=("mean", "sum"), help="of the loss (default: found out)")
    command.add_argument("--sort-by", choices=("name", "parameters", "trace", "mean", "std", "max", "negative"))
    command.add_argument("--json", metavar="FILE", help="write statistics and findings; - for standard output")
    command.add_argument("--logdir", type=Path, help="write TensorBoard logs to this folder")
    command.add_argument("--html", type=Path, help="write the table as a page")
    command.add_argument("--svg", type=Path, help="write the table as a picture")
    return parser


def _made(path: str) -> tuple[nn.Module, Callable[[Any, Any], Tensor], Any]:
    module_name, _, name = path.partition(":")
    if not name:
        raise InvalidArgumentError(f"the factory must be given as package.module:function, got {path!r}.")
    sys.path.insert(0, os.getcwd())
    factory = getattr(importlib.import_module(module_name), name, None)
    if not callable(factory):
        raise InvalidArgumentError(f"module {module_name!r} has no function {name!r}.")
    made = factory()
    if not isinstance(made, tuple) or len(made) != 3:
        raise InvalidTypeError(f"{path} must return (model, loss_fn, data), got {type(made).__name__}.")
    return made


def _loader(data: Any, size: int) -> Iterable[Any]:
    """Batches of what a factory gave: a loader as it is, a data set or ``(inputs, targets)`` cut into batches."""
    if size < 1:
        raise InvalidArgumentError(f"--batch-size must be at least 1, got {size}.")
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(x, Tensor) for x in data):
        if len(data[0]) != len(data[1]):
            raise InvalidArgumentError(f"inputs hold {len(data[0])} samples and targets {len(data[1])}.")
        data = TensorDataset(*data)
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=size)
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise InvalidTypeError(
            f"data must be a DataLoader, a data set, or (inputs, targets) as tensors, got {type(data).__name__}."
        )
    return data


def _show(diagnosis: Diagnosis, options: argparse.Namespace) -> None:
    table = diagnosis.report(sort_by=options.sort_by)
    if options.json == "-":
        print(diagnosis.to_json(indent=2))
    else:
        console = Console()
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
