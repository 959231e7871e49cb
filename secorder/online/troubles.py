"""Why numbers cannot be given: training goes on, and the reason is raised when the number is read."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .._arguments import listed
from .._caution import caution
from .._torch.saved_tensors import stops_recomputation
from .._torch.surroundings import count_modes, out_of_sight
from ..errors import AttributionError, CouplingError, NonFiniteError, SecorderError
from ..layers.selection import Layer
from .record import ForwardRecord
from .samples.attribution import Attribution
from .samples.relation import Shape
from .samples.sample_dimension import LISTED

#: Why a layer has no online Fisher where its whole gradient is not what its calls bring.
_OUTSIDE = (
    "a part of the gradient comes from outside of the layer's calls and belongs to no single sample ({}), so that "
    "what was accumulated since the last passed check may be wrong: {}leave the layer out with layers=, or measure it "
    "with a one-shot call."
)
OUTSIDE = _OUTSIDE.format(
    "such as a weight penalty in the loss, a tied weight, F.linear(x, layer.weight), a call of the layer, or of a "
    "method such as get_value(x), outside the model's forward, a derivative of the model's output in the loss, or a "
    "second backward through one forward",
    'pass penalty="shared" if it is a penalty in the loss, ',
)

OPEN = (
    "the loss, or another number that the model returns, is made of more than the outputs that hold samples (a penalty "
    "of weights, an auxiliary loss), so that these do not tell its per-sample gradients: let the model return what the "
    'rest is made of, pass penalty="shared" if that is a penalty of weights, leave the layer out with layers=, or '
    "measure it with a one-shot call."
)

#: What it is most likely, by what the hooks saw at the layer, the surest first; and what to do.
OUTSIDE_CAUSES = {
    "second": ("another loss in a second backward through one forward", "add the losses and call backward once, "),
    "derivative": (
        "a derivative of the model's output in the loss, such as a gradient penalty",
        "let the model itself return the terms whose mean is the loss, ",
    ),
    "uncalled": (
        "a method such as get_value(x) called in place of the model, a weight penalty, or a running average of other "
        "weights, since no recorded forward has called the layer",
        'attach to the module that is called, pass penalty="shared" if it is a penalty in the loss, ',
    ),
}

#: Why a batch is left out of a layer whose input is no longer there.
OVERWRITTEN = (
    "its input was overwritten in place before backward: use an out-of-place operation after it, or leave the layer "
    "out with layers=."
)

#: What may be behind it where nothing is accumulated, by what the hooks saw.
CAUSES = {
    "compiled": (
        "The model was compiled with what is around it (fullgraph=True, or a compiled training step), so that no hook "
        "can run: attach to what torch.compile returned for the model, or run every k-th step uncompiled."
    ),
    "traced": "The model was traced or exported while the probe was attached, which is not recorded.",
    "transformed": "The model was called inside a transform (torch.func.grad, vmap, jvp), which is not recorded.",
    "no grad": "The model was called under torch.no_grad or in inference mode.",
    "computed": "The model was called with parameters that are computed from others (torch.func.functional_call).",
    "paused": "The model was called inside probe.paused().",
    "no gradient": (
        "The model's output held no tensor that depends on a parameter that requires a gradient (frozen ones, or an "
        "iterator or a function, which computes only when it is used: let the model return tensors)."
    ),
    "forward": (
        "The model was called, but no backward has come through its output since (torch.autograd.grad does not count)."
    ),
    "empty": "A batch was empty.",
    "verification failed": "Running the model to see where samples are failed; see the warning.",
    "not finite": "The model's output held nan or inf.",
    "listed": f"Perhaps {LISTED}.",
    "other threads": (
        "Other threads ran the model without end while a batch was to be verified: let them wait during the first step."
    ),
    "one sample": (
        "The first batch held one sample, which cannot show where samples are: such batches were left out; pass "
        "sample_dim=."
    ),
}

#: Those beside which gradients that have come to parameters all the same are another call's.
BESIDE_OTHERS = frozenset(("no grad", "no gradient"))

_IN_ITS_PLACE = (
    "hooks run only when the module itself is called, as model(x), and not for its methods (model.forward(x), "
    "policy.evaluate_actions(x)), for a parent that calls its parts, or for a copy: attach to the modules that are "
    "called{}, or to one of your own whose forward calls the method. If it is compiled, attach to what torch.compile "
    "returned; if the whole training step is compiled (fullgraph=True), run every k-th step uncompiled."
)
_NEVER_CALLED = f"The model that the probe is attached to was not called: {_IN_ITS_PLACE}"
_BY_OTHERS = f"Its parameters got gradients, or other values, all the same. If they were trained: {_IN_ITS_PLACE}"

_RUN_AGAIN = (
    "its calls do not tell its per-sample gradients, and {}, which would run again for them, returned {} for a batch "
    "of {} samples, without a dimension that holds them, such as the loss of a batch: compute the loss from what the "
    "model returns, leave the layer out with layers=, or measure it with a one-shot call."
)


class Troubles:
    """What happened to each layer that keeps its number from being told; raised at once where the probe is strict."""

    def __init__(self, names: Sequence[str], strict: bool) -> None:
        self._names = frozenset(names)
        self.strict = strict
        #: By layer, why what was accumulated is not to be told.
        self.marks: dict[str, str] = {}
        #: By layer, why its batches were left out.
        self.left_out: dict[str, str] = {}
        #: Why it was not seen whether the loss couples samples, to be said where numbers are read; else empty.
        self.unseen = ""
        self._causes: set[str] = set()
        self._at: dict[str, set[str]] = {}
        self._warned: set[str] = set()

    def mark(self, names: Iterable[str], reason: str) -> None:
        """Tell these layers no more, for a reason that is warned of once, and raised when they are read (or now)."""
        new = [name for name in names if name in self._names and name not in self.marks]
        self.marks.update(dict.fromkeys(new, reason))
        if self.strict and new:
            raise AttributionError(sentence(new, reason))
        if new:
            self.warn(sentence(new, reason))

    def leave_out(self, record: ForwardRecord | None, names: Iterable[str], reason: str) -> None:
        """Leave this batch out of layers' means, and warn of it once (or raise, if strict)."""
        names = [name for name in names if name in self._names]
        new = [name for name in names if self.left_out.get(name) != reason]
        self.left_out.update(dict.fromkeys(new, reason))
        if record is not None:
            record.leave_out(names)
        if self.strict and names:
            raise AttributionError(sentence(names, reason))
        if new:
            self.warn(f"{sentence(new, reason)} This batch is left out of it.")

    def warn(self, message: str) -> None:
        """Warn once."""
        if message not in self._warned:
            self._warned.add(message)
            caution(message)

    def outside(self, name: str) -> str:
        """Why a layer's whole gradient is not what its calls bring, by what the hooks saw."""
        likely = [OUTSIDE_CAUSES[cause] for cause in OUTSIDE_CAUSES if name in self._at.get(cause, ())]
        reason = _OUTSIDE.format(f"most likely {likely[0][0]}", likely[0][1]) if likely else OUTSIDE
        return f"{reason} {CAUSES['computed']}" if "computed" in self._causes else reason

    def saw_derivative(self, name: str) -> bool:
        """Whether a derivative of the model's output was taken through a layer that may be a part of the loss."""
        return name in self._at.get("derivative", ())

    def saw_at(self, cause: str, names: Iterable[str]) -> None:
        """Take note of what may bring these layers gradient from outside: a key of :data:`OUTSIDE_CAUSES`."""
        self._at.setdefault(cause, set()).update(names)

    def saw(self, cause: str) -> None:
        """Take note of what keeps a forward from being recorded, or that one was: a key of :data:`CAUSES`."""
        self._causes.add(cause)

    def has_seen(self, cause: str) -> bool:
        """Whether note was taken of a key of :data:`CAUSES`."""
        return cause in self._causes

    def guarded(
        self, record: ForwardRecord | None, names: Iterable[str], work: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Do work of ours inside of the user's pass, which goes on whatever happens to it: then the batch is left out.

        What the work raised is raised where the probe is strict, or is to raise on non-finite gradients.
        """
        try:
            return out_of_sight(work, *arguments) if count_modes() else work(*arguments)
        except NonFiniteError:  # asked for by on_nonfinite="raise"
            raise
        except Exception as error:
            if stops_recomputation(error) or self.strict:
                raise
            own = isinstance(error, SecorderError)
            reason = str(error) if own else f"analysing it failed ({type(error).__name__}: {error})."
            self.leave_out(record, names, reason)
            return None

    def nothing_accumulated(self, model: nn.Module, trained: Sequence[str]) -> str:
        """Why nothing is accumulated, by what the hooks saw; ``trained`` are layers that learnt all the same."""
        told = [text for key, text in CAUSES.items() if key in self._causes]
        if not told or (trained and self._causes <= BESIDE_OTHERS):
            children = {name.split(".")[0] for name in trained}
            lists = (nn.ModuleList, nn.ModuleDict)
            called = [name for name, x in model.named_children() if name in children and not isinstance(x, lists)]
            others = f" (perhaps {', '.join(map(repr, called))})" if called else ""
            told.append((_BY_OTHERS if told else _NEVER_CALLED).format(others))
        return (
            "nothing is accumulated yet: call the model and then backward() with the probe attached, or pass loss_fn, "
            f"inputs and targets for a one-shot measurement. {' '.join(told)}"
        )


def sentence(names: Sequence[str], reason: str) -> str:
    """A reason, with the layers that it is of."""
    return f"layer{'s' * (len(names) > 1)} {listed(names)}: {reason}"


def tell_normalised(troubles: Troubles, names: Sequence[str], *, quantised: bool = False) -> None:
    """Say that samples are coupled by batch normalisation, or fake quantisation, whose statistics are taken as is."""
    by, instead = "batch normalisation in train mode", "put the normalisations into eval mode"
    if quantised:
        by = "observers of fake quantisation"
        instead = "call model.apply(torch.ao.quantization.disable_observer) once they have settled"
    message = (
        f"the samples of a batch influence one another by {by}, so that the numbers of layers {listed(names)} are made "
        "of what each sample contributes to the batch's gradient, its influence on the others included: to have them "
        f"without it, {instead}, or measure by one-shot calls in eval mode."
    )
    if troubles.strict:
        raise CouplingError(message)
    troubles.warn(message)


def coupled(troubles: Troubles, found: Attribution, shapes: Sequence[Shape]) -> str:
    """That samples influence one another, and what may be told; raised at once where the probe is strict."""
    reason = (
        f"no dimension of the model's arguments, of shapes {list(shapes)}, holds samples that do not influence one "
        "another in its outputs: pass sample_dim=, a dimension or a mapping of argument names to dimensions (None "
        "for an argument without samples; for all of them where each call is one sample, such as one graph whose "
        "nodes are classified), or measure the layers with one-shot calls."
    )
    if found.separable is not None:
        reason = (
            "the dimension given as sample_dim= does not separate the samples in the model, and dim "
            f"{found.separable} of its arguments, of shapes {list(shapes)}, does: pass sample_dim={found.separable}."
        )
    if troubles.strict:
        raise CouplingError(reason)
    return reason


def no_dimension(record: ForwardRecord, layer: Layer) -> str:
    """That of the calls of a layer, or of the module that would run again for it, no dimension holds the samples."""
    shapes = [shape for call in record.layers[layer.name].calls for shape in call]
    if layer.enclosing is not layer.module:
        return _RUN_AGAIN.format(type(layer.enclosing).__name__, shapes, record.num_samples)
    return (
        f"it returned {shapes} for a batch of {record.num_samples} samples, and no dimension of it holds them (a row "
        "that all samples share, rows that depend on data, samples in another dimension of the model's inputs, or in "
        "none: see sample_dim): leave the layer out with layers=, or measure it with a one-shot call."
    )
