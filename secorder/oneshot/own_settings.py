"""The settings of PyTorch that passes of our own run under, whatever those of the user's code are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch.autocast import autocast_enabled, no_autocast
from .._torch.checkpoint import plain_checkpoints
from .._torch.collectives import has_ranks
from .._torch.cudnn import differentiable_recurrence
from .._torch.ddp import within_rank
from .._torch.float32 import full_float32
from .._torch.lone_norms import contiguous_gradients
from .._torch.modules import modules_in
from .._torch.own_hooks import suspended
from .._torch.stance import eager
from .._torch.surroundings import parametrizations_computed_anew, unseen


@contextmanager
def own_settings(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The settings of PyTorch that passes of our own run under, perhaps in the middle of the user's (``training``)."""
    with ExitStack() as stack:
        stack.enter_context(suspended(model))
        if has_ranks():
            stack.enter_context(within_rank(modules_in(model)))
        if training:
            stack.enter_context(unseen())
        else:
            stack.enter_context(full_float32())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(eager())
        if autocast_enabled():
            stack.enter_context(no_autocast())
        yield


@contextmanager
def as_written(model: nn.Module, *, training: bool) -> Iterator[None]:
    """What a chain of PyTorch's own modules has none of is computed as it was written, and can be differentiated."""
    with ExitStack() as stack:
        stack.enter_context(parametrizations_computed_anew())
        if not training:
            stack.enter_context(differentiable_recurrence(model))
            stack.enter_context(contiguous_gradients())
        stack.enter_context(plain_checkpoints())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
