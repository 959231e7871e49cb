"""Operations that go element by element, with broadcasting: what one sample brings is summed over its own elements."""

from ..per_sample import PerSample
from .call import OperationCall
from .registry import operation_rule


@operation_rule("AddBackward0", "SubBackward0", "ExpandBackward0")
def add(call: OperationCall, index: int) -> PerSample | None:
    """z = a ± α b: a position table, a bias, a class token's place; or one token for all samples."""
    found = call.of_samples(call.g, call.shape(index))
    if found is None or not index:
        return found
    scale = float(call.saved("alpha")) * (-1 if call.node.name() == "SubBackward0" else 1)
    return found if scale == 1 else found * scale


@operation_rule("MulBackward0")
def mul(call: OperationCall, index: int) -> PerSample | None:
    """z = a ⊙ b: the weight of a norm that is written by hand, a gate, a layer's scale."""
    other = call.saved("self" if index else "other")
    return call.of_samples(call.g * other, call.shape(index))


@operation_rule("DivBackward0")
def div(call: OperationCall, index: int) -> PerSample | None:
    """z = a / b, of a."""
    return None if index else call.of_samples(call.g / call.saved("other"), call.shape(index))
