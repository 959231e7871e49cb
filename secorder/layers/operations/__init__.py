"""Per-sample gradients of what an operation takes, one rule a node of the autograd graph: a file a family.

A parameter that no layer's rule is for is followed through the graph to the operations in which it meets samples. A
rule is a function ``rule(call, index) -> per-sample gradient`` of one input of such an operation, entered with
:func:`operation_rule`; what leads from the parameter to there (a transpose, a slice, a norm of the weight) is entered
with :func:`parameter_map`, or run by the graph's own nodes.
"""

from . import convolution, elementwise, maps, normalisation, products, recurrent, tables
from .call import OperationCall
from .registry import MAPS, OPERATIONS, TOGETHER, operation_rule, parameter_map, per_sample_gradient

__all__ = [
    "MAPS", "OPERATIONS", "TOGETHER", "OperationCall", "convolution", "elementwise", "maps", "normalisation",
    "operation_rule", "parameter_map", "per_sample_gradient", "products", "recurrent", "tables",
]  # fmt: skip
