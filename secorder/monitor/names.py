"""Names of logged numbers: statistic and layer, ``"fisher_trace/conv1"``."""

from collections.abc import Mapping

#: Statistic → layer → number.
Numbers = Mapping[str, Mapping[str, float]]

#: The statistic under which numbers of the whole model go: ``"model/loss"``.
WHOLE_MODEL = "model"


def shown(name: str) -> str:
    """How a layer is called: the model itself has no name."""
    return name or "model"


def flat(numbers: Numbers) -> dict[str, float]:
    """Numbers by one name each: ``{"fisher_trace": {"fc1": 0.5}}`` as ``{"fisher_trace/fc1": 0.5}``."""
    return {f"{statistic}/{shown(layer)}": x for statistic, values in numbers.items() for layer, x in values.items()}
