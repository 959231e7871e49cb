"""Which of a callback's keywords belong to the probe and which to the recorder."""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import skip_init

from ..errors import InvalidArgumentError
from ..layers.selection import check_selection
from ..monitor.recorder import CurvatureRecorder
from ..monitor.sinks.sink import check_sink, several
from ..online.samples.hypotheses import check_sample_dim
from ..probe import CurvatureProbe

#: The options by which callbacks of one trainer accumulate different numbers.
_APART = ("module", "layer_types", "layers", "frozen", "accumulate", "every", "decay", "precision", "on_nonfinite")


def _keywords(function: Any) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def divided(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of :class:`secorder.CurvatureProbe`, and those of :class:`secorder.CurvatureRecorder`.

    ``strict`` goes to both; what neither has is an option of the recorder's measurements, which checks it.
    """
    probe, recorder = _keywords(CurvatureProbe), _keywords(CurvatureRecorder)
    of_probe = {key: list(x) if isinstance(x, Iterator) else x for key, x in options.items() if key in probe}
    of_recorder = {key: value for key, value in options.items() if key in recorder or key not in probe}
    return of_probe, of_recorder


def try_options(of_probe: Mapping[str, Any], of_recorder: Mapping[str, Any], sinks: Any = None) -> None:
    """Refuse now what a probe or a recorder would when training begins: both are made, of a layer of one number.

    Of what needs the model, or writes, the kind alone is looked at.
    """
    check_selection(of_probe.get("layer_types"), of_probe.get("layers"))
    check_sample_dim(of_probe.get("sample_dim"))
    for sink in () if sinks is None else several(sinks):
        check_sink(sink)
    of_any_model = {key: value for key, value in of_probe.items() if key not in ("layer_types", "layers", "sample_dim")}
    with CurvatureProbe(skip_init(nn.Linear, 1, 1), **of_any_model) as probe:
        CurvatureRecorder(probe, **of_recorder)


def told_apart(options: Mapping[str, Any]) -> str:
    """What tells the states of several callbacks of one trainer apart; empty if none of these options is given.

    A set has another order in each process.
    """
    given = {key: options[key] for key in _APART if options.get(key) is not None}
    each = {key: x if isinstance(x, Iterable) and not isinstance(x, str) else [x] for key, x in given.items()}
    told = {key: sorted(getattr(x, "__qualname__", str(x)) for x in some) for key, some in each.items()}
    return str(told or "")


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The submodule of a dotted name; where there is none, the error names those that there are."""
    names = [name for name, _ in model.named_modules() if name]
    if path and path not in names:
        raise InvalidArgumentError(f"{type(model).__name__} has no module {path!r}: it has {_some(path, names)}.")
    return model.get_submodule(path)


def _some(path: str, names: Iterable[str]) -> str:
    """Names that are like it, then the outermost ones."""
    known = list(names)
    close = difflib.get_close_matches(path, known, n=3)
    outermost = [name for name in known if "." not in name]
    some = list(dict.fromkeys([*close, *outermost]))
    return ", ".join(some[:12]) + (" …" if len(some) > 12 else "") if some else "none"
