"""The backward pass of recorded forwards: entered with the first gradient, left when the engine has done its work."""

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._torch.engine import accumulate_node, after_backward, current_backward, first_gradient_hook, will_accumulate
from .audit import Vectors, actual
from .fisher import AUDITED, quietly
from .record import Backward, ForwardRecord

if TYPE_CHECKING:
    from .hooks import Attachment

__all__ = ["enter", "leave"]


def enter(attachment: "Attachment", record: ForwardRecord) -> bool:
    """A gradient has come to a record's forward; False where that is a second backward, through the same graph."""
    number = current_backward()
    if number is None:
        return False
    fisher = attachment.fisher
    if record.backward is not None:
        # A checkpoint of the reentrant kind runs a backward of its own inside of the one that is on its way.
        return not record.closed and (record.backward.number == number or record.recomputes)
    if record.closed:
        return False
    backward = fisher.backwards.get(number)
    if backward is None:
        backward = fisher.backwards[number] = Backward(number)
        after_backward(partial(leave, attachment, backward))
    record.backward = backward
    fisher.check_together(backward, record)
    backward.records.append(record)
    _watch(attachment, backward, record)
    if record.recomputes:
        attachment.register(record)
    return True


def _watch(attachment: "Attachment", backward: Backward, record: ForwardRecord) -> None:
    """See the whole gradients of parameters that are audited, and of all whose layers have no call to explain any."""
    fisher = attachment.fisher
    audited = fisher.signs.some([layer.name for layer in fisher.layers], AUDITED)
    captured = {name for name, _ in record.hooked}
    for layer in fisher.layers:
        if layer.name not in audited and layer.name in captured:
            continue
        graph = record.parameters(layer)
        for local, parameter in layer.parameters.items():
            if not parameter.requires_grad or id(parameter) in backward.vectors:
                continue
            vectors = backward.vectors[id(parameter)] = fisher.signs.vectors(graph[local])
            node = accumulate_node(graph[local])
            saw = partial(_saw, backward, id(parameter), vectors, node)
            if layer.sharded:
                backward.handles.append(node.register_prehook(partial(_first, saw)))
            else:
                backward.handles.append(first_gradient_hook(parameter, saw))


def _first(saw: Callable[[Tensor], None], gradients: tuple[Tensor | None, ...]) -> None:
    if gradients[0] is not None:
        saw(gradients[0])


def _saw(backward: Backward, key: int, vectors: Vectors, node: Any, gradient: Tensor) -> None:
    """The whole gradient of a parameter: what is compared with what the captured calls explain."""
    if backward.ended or not _runs(backward) or not will_accumulate(node):
        return
    value = actual(gradient.detach(), vectors)
    backward.actual[key] = backward.actual[key] + value if key in backward.actual else value


def _runs(backward: Backward) -> bool:
    """Whether it is this backward that runs now, and no other thread's; those of reentrant checkpoints belong to it."""
    inner = any(record.recomputes for record in backward.records) and backward.thread == threading.get_ident()
    return inner or current_backward() == backward.number


def leave(attachment: "Attachment", backward: Backward) -> None:
    """The backward has ended: close its records."""
    fisher = attachment.fisher
    fisher.let_go(backward)
    if attachment.pauses:
        return
    reached = [record for record in backward.records if _reached(record, backward)]
    for record in backward.records:
        if record not in reached:  # torch.autograd.grad, or a backward that stopped before the parameters
            record.backward = None
    fisher.guarded(None, list(fisher.sums), quietly, fisher.close, backward, reached)


def _reached(record: ForwardRecord, backward: Backward) -> bool:
    return bool(record.received or record.captured or record.modules or record.parts or backward.actual)
