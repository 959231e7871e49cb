"""Transforms of ``torch.func``."""

from collections.abc import Callable

import torch

#: What runs the innermost ``torch.func`` transform (vmap, grad, …) now; None outside of any.
inside_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
