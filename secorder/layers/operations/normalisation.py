"""Layer normalisation, as a function."""

from ..per_sample import PerSample
from .call import OperationCall
from .registry import operation_rule


@operation_rule("NativeLayerNormBackward0")
def layer_norm(call: OperationCall, index: int) -> PerSample | None:
    """z = γ ⊙ x̂ + β, x̂ by the mean and the inverse standard deviation that the operation saved."""
    if index == 0:
        return None
    values = call.g
    if index == 1:
        values = values * ((call.saved("input") - call.saved("result1")) * call.saved("result2"))
    return call.of_samples(values, call.shape(index))
