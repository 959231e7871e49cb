"""Structures of inputs, outputs, targets and losses."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import DoubleBackwardError

from ..helpers import Net
from .case import PASSIVE_REFUSES, N, case, classes


@dataclass
class Output:
    """As Hugging Face models return them."""

    logits: Tensor
    hidden: Tensor
    note: str = "text"


Pair = namedtuple("Pair", ["logits", "hidden"])


def two_headed(pack: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        hidden = torch.tanh(m.a(x))
        return pack(m.b(hidden), hidden)

    return Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))


_STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {
    "dict": (lambda f, h: {"logits": f, "hidden": h}, lambda o: o["logits"], lambda o: o["hidden"]),
    "tuple": (lambda f, h: (f, h), lambda o: o[0], lambda o: o[1]),
    "dataclass": (Output, lambda o: o.logits, lambda o: o.hidden),
    "namedtuple": (Pair, lambda o: o.logits, lambda o: o.hidden),
    "nested": (lambda f, h: {"out": [f, {"h": h}]}, lambda o: o["out"][0], lambda o: o["out"][1]["h"]),
}


def logits_used(pack: Any, logits: Any) -> Any:
    return two_headed(pack), lambda o, t: F.cross_entropy(logits(o), t), torch.randn(N, 3), classes()


def logits_and_hidden_used(pack: Any, logits: Any, hidden: Any) -> Any:
    def loss_fn(o: Any, t: Tensor) -> Tensor:
        return F.cross_entropy(logits(o), t) + (hidden(o) ** 4).sum(1).mean()

    return two_headed(pack), loss_fn, torch.randn(N, 3), classes()


for _name, (_pack, _logits, _hidden) in _STRUCTURES.items():
    case(f"output_{_name}", _pack, _logits)(logits_used)
    case(f"output_{_name}_both_used", _pack, _logits, _hidden)(logits_and_hidden_used)


@case()
def inputs_tuple() -> Any:
    model = Net(lambda m, x, y: m.a(x).tanh() * m.b(y), a=nn.Linear(3, 3), b=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 3), torch.randn(N, 2)), classes()


@case()
def inputs_dict() -> Any:
    model = Net(lambda m, x, scale: m.b(torch.tanh(m.a(x) * scale)), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), {"x": torch.randn(N, 3), "scale": torch.tensor(0.7)}, classes()


@case()
def loss_inside() -> Any:
    def forward(m: Any, x: Tensor, labels: Tensor) -> Any:
        logits = m.b(torch.tanh(m.a(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, lambda o, _: o["loss"], {"x": torch.randn(N, 3), "labels": classes()}, None


@case()
def loss_alone_inside() -> Any:
    model = Net(
        lambda m, x, labels: F.cross_entropy(m.b(torch.tanh(m.a(x))), labels), a=nn.Linear(3, 4), b=nn.Linear(4, 3)
    )
    return model, lambda loss, _: loss, {"x": torch.randn(N, 3), "labels": classes()}, None


@case()
def targets_dict() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    targets = {"labels": classes(), "weight": torch.rand(N)}

    def loss_fn(f: Tensor, t: Any) -> Tensor:
        return (F.cross_entropy(f, t["labels"], reduction="none") * t["weight"]).mean()

    return model, loss_fn, torch.randn(N, 3), targets


@case()
def dense_outputs() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 1, 3, 3), classes(3, 3, 3)


@case("conditioning_row_first_not_selected", options={"layers": ["a", "b"]})
@case()
def conditioning_row_first() -> Any:
    model = Net(
        lambda m, c, x: m.b(torch.tanh(m.a(x)) * m.shift(c)),
        a=nn.Linear(3, 4),
        shift=nn.Linear(2, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), (torch.randn(1, 2), torch.randn(N, 3)), classes()


@case()
def positions_first() -> Any:
    model = Net(
        lambda m, p, x: m.b(torch.tanh(m.a(x) + p[:, None]).prod(1)),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), (torch.randn(5), torch.randn(N, 5, 3)), classes()


@case(skip={"online": ""})
def flattened_outputs_and_targets() -> Any:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))).flatten(0, 1), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 2, 3), torch.randint(3, (2 * N,))


@case(refused={"hessian": DoubleBackwardError})
def ctc_loss() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LogSoftmax(-1))

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        lengths = torch.full((len(f),), 5), torch.full((len(f),), 2)
        return F.ctc_loss(f.transpose(0, 1), t, *lengths)

    return model, loss_fn, torch.randn(N, 5, 3), torch.randint(1, 4, (N, 2))


@case(refused=PASSIVE_REFUSES)
def adaptive_softmax_inside() -> Any:
    model = Net(
        lambda m, x, y: m.out(torch.tanh(m.a(x)), y).loss,
        a=nn.Linear(3, 4),
        out=nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2.0),
    )
    return model, lambda loss, _: loss, (torch.randn(N, 3), torch.tensor([0, 3, 5, 1])), None


@case()
def masked_logits_infinite() -> Any:
    model = Net(
        lambda m, x: m.b(torch.tanh(m.a(x))).masked_fill(torch.tensor([False, True, False]), -torch.inf),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), torch.tensor([0, 2, 2, 0])
