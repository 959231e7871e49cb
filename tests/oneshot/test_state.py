"""What is kept in Python objects is found and put back."""

import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secorder.oneshot.state import State


class Slotted:
    __slots__ = ("count", "inner")
    shared = 0

    def __init__(self) -> None:
        self.count, self.inner = 0, [0]

    def __call__(self) -> None:
        self.count += 1
        self.inner.append(1)
        Slotted.shared += 1


class Logged:
    log: list[int] = []  # noqa: RUF012

    @classmethod
    def loss(cls) -> None:
        cls.log.append(1)


def with_attribute() -> None:
    with_attribute.count = getattr(with_attribute, "count", 0) + 1  # type: ignore[attr-defined]


def by_closure(value: Any, change: Callable[[Any], None]) -> Callable[[], None]:
    return lambda: change(value)


def in_place(t: torch.Tensor) -> None:
    t.add_(1)


def with_gradient(t: torch.Tensor) -> None:
    t.add_(torch.ones(2, requires_grad=True))


def by_data(t: torch.Tensor) -> None:
    t.data.mul_(2)


teacher = nn.Linear(2, 2)


def moving_average() -> None:
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(0.5)


CASES: dict[str, tuple[Any, Callable[[], Any]]] = {}


def case(name: str, call: Any, look: Callable[[], Any]) -> None:
    CASES[name] = call, look


slotted = Slotted()
case("slots_and_class", slotted, lambda: (slotted.count, slotted.inner, Slotted.shared))
case("classmethod", Logged.loss, lambda: Logged.log)
case("function_attribute", with_attribute, lambda: getattr(with_attribute, "count", None))
case("moving_average", moving_average, lambda: [p.tolist() for p in teacher.parameters()])
for name, value, change in (
    ("list", [1], lambda x: x.append(2)),
    ("list_of_list", [[1]], lambda x: x[0].clear()),
    ("dict", {"a": 1}, lambda x: x.update(b=2, a=3)),
    ("ordered", OrderedDict(a=1, b=2), lambda x: x.move_to_end("a")),
    ("defaultdict", defaultdict(list), lambda x: x["new"].append(1)),
    ("counter", Counter("aab"), lambda x: x.update("b")),
    ("deque", deque([1, 2], maxlen=2), lambda x: x.append(3)),
    ("set", {1}, lambda x: x.add(2)),
    ("tuple_of_list", ([1],), lambda x: x[0].append(2)),
    ("bytearray", bytearray(b"ab"), lambda x: x.extend(b"c")),
    ("array", np.zeros(2), lambda x: x.__iadd__(1)),
    ("tensor", torch.zeros(2), in_place),
    ("tensor_with_gradient", torch.zeros(2), with_gradient),
    ("tensor_data", torch.ones(2), by_data),
    ("long_list", list(range(20_000)), lambda x: x.append(1)),
    ("generator", torch.Generator().manual_seed(0), lambda x: torch.rand(2, generator=x)),
    ("random", random.Random(0), lambda x: x.random()),
    ("numpy_generator", np.random.default_rng(0), lambda x: x.random()),
    ("numpy_state", np.random.RandomState(0), lambda x: x.rand()),
    ("module", nn.BatchNorm1d(2).double(), lambda x: x(torch.randn(3, 2, dtype=torch.float64))),
    ("module_attribute", nn.Module(), lambda x: setattr(x, "kept", [1])),
):

    def look(value: Any = value) -> Any:
        if isinstance(value, torch.Generator):
            return value.get_state().tolist()
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, np.random.Generator):
            return value.bit_generator.state
        if isinstance(value, np.random.RandomState):
            return value.get_state()[1].tolist()
        if isinstance(value, nn.Module):
            return [b.tolist() for b in value.buffers()], sorted(vars(value))
        return (list(value), value) if isinstance(value, OrderedDict) else value

    case(name, by_closure(value, change), look)


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial, lambda f: functools.wraps(f)(lambda: f())])
@pytest.mark.parametrize("name", CASES)
def test_state_is_put_back(name: str, wrap: Callable[[Any], Any]) -> None:
    call, look = CASES[name]
    before = repr(look())
    function = wrap(call) if not isinstance(call, Slotted) or wrap is functools.partial else call
    state = State([function])
    again = State([function], base=state)
    for _ in range(2):
        function()
        assert repr(look()) != before
        assert again.restore()
        assert repr(look()) == before
    function()
    assert state.restore()
    assert repr(look()) == before


def test_what_nobody_changed_is_not_told_to_be_changed() -> None:
    kept, box = torch.zeros(2), {"a": [1], "b": {2}, "c": deque([3])}
    weights, generator = np.array([1.0, np.nan]), torch.Generator()
    state = State([lambda: (kept, box, weights, generator), slotted, teacher])
    assert not state.restore()


def test_cells_and_globals_that_are_assigned() -> None:
    number = 0

    def count() -> None:
        nonlocal number
        number += 1

    space: dict[str, Any] = {"total": 0}
    exec("def add():\n    global total\n    total += 1", space)
    state = State([count, space["add"]])
    count()
    space["add"]()
    state.restore()
    assert (number, space["total"]) == (0, 0)


def test_tensors_are_exchanged_where_they_are_held() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    box, held = {"a": a, "list": [a]}, a
    function = lambda: (held, box["a"], box["list"][0])  # noqa: E731
    state = State([function])
    with state.exchanged({id(a): b}):
        assert all(t is b for t in function())
        state.restore()
        assert all(t is b for t in function())
    assert all(t is a for t in function())


def test_far_objects_are_left_alone_where_levels_are_told() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.queue = [1]

    trainer, log = Trainer(), {"by_name": [0]}

    class Callback:
        def __init__(self) -> None:
            self.trainer, self.log, self.count = trainer, log, 0

        def hook(self) -> None: ...

    callback = Callback()
    state = State([callback.hook], levels=3)
    trainer.queue.append(2)
    log["by_name"].append(1)
    callback.count = 1
    state.restore()
    assert (callback.count, log, trainer.queue) == (0, {"by_name": [0]}, [1, 2])


def test_what_a_function_remembers_is_forgotten() -> None:
    calls = []

    @functools.cache
    def mask(size: int) -> int:
        calls.append(size)
        return size

    mask(1)
    state = State([lambda: mask(2)])
    assert (mask(1), mask(2), calls) == (1, 2, [1, 2])
    assert state.restore()
    assert (mask(2), calls) == (2, [1, 2])
