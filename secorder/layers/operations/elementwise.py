"""Operations that go element by element, with broadcasting: what one sample brings is summed over its own elements."""

from ..per_sample import PerSample
from .call import OperationCall
from .registry import operation_rule


@operation_rule("AddBackward0")
def add(call: OperationCall, index: int) -> PerSample | None:
    """z = a + α b: a position table, a bias, a class token's place."""
    return _scaled(call, index, float(call.saved("alpha")) if index else 1.0)


@operation_rule("SubBackward0")
def sub(call: OperationCall, index: int) -> PerSample | None:
    """z = a - α b."""
    return _scaled(call, index, -float(call.saved("alpha")) if index else 1.0)


def _scaled(call: OperationCall, index: int, scale: float) -> PerSample | None:
    found = call.of_samples(call.g, call.shape(index))
    return found if found is None or scale == 1 else found * scale


@operation_rule("MulBackward0")
def mul(call: OperationCall, index: int) -> PerSample | None:
    """z = a ⊙ b: the weight of a norm that is written by hand, a gate, a layer's scale."""
    other = call.saved("self" if index else "other")
    return call.of_samples(call.g * other, call.shape(index))


@operation_rule("DivBackward0")
def div(call: OperationCall, index: int) -> PerSample | None:
    """z = a / b, of a."""
    return None if index else call.of_samples(call.g / call.saved("other"), call.shape(index))


@operation_rule("ExpandBackward0")
def expand(call: OperationCall, index: int) -> PerSample | None:
    """One token for all samples."""
    return call.of_samples(call.g, call.shape(index))
