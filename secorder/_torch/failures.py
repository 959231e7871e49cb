"""The meaning of a ``RuntimeError`` that PyTorch raised."""

import dis
import os
import re
from pathlib import Path

import torch

_NOT_THE_USERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent))
_VMAP = re.compile(r"vmap|batching|functorch")
_MISSING_GRAPH = re.compile(r"not have been used in the graph|does not require grad|requires_grad|inside a function")
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory did not suffice, of an accelerator or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)) is not None


def is_vmap_failure(error: RuntimeError) -> bool:
    """Whether what failed under vmap may work without it: unless the user's own code raised for reasons of its own."""
    return not is_users_own(error) or _VMAP.search(str(error)) is not None


def is_missing_graph(error: RuntimeError) -> bool:
    """Whether a derivative was asked for of, or with respect to, a tensor that is not of the graph."""
    return _MISSING_GRAPH.search(str(error)) is not None


def is_users_own(error: BaseException) -> bool:
    """Whether a ``raise`` of Python code of neither PyTorch nor the library, such as a custom backward, made the error.

    One that a call of an operator in such code made is PyTorch's.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raises = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raises and not code.co_filename.startswith(_NOT_THE_USERS)
