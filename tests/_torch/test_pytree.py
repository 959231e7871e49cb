"""Nested inputs and outputs, in containers and objects of any kind."""

import types
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from secorder._torch.pytree import Shared, call_model, elements, map_tensors, once_each, tensors_in

from ..helpers import Label

Point = namedtuple("Point", "x y")


def numbered(number: int) -> Tensor:
    return torch.full((2,), float(number))


@dataclass
class Output:
    logits: Tensor
    name: str = "logits"


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    y: Tensor


@dataclass
class Derived:
    x: Tensor
    y: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.y = self.x + 1


class Batch:
    """No more than attributes, and an ``__init__`` that others can't call."""

    def __init__(self, x: Tensor, y: Tensor, secret: object) -> None:
        assert secret is not None
        self.x, self.rest = x, {"y": [y]}


class Hidden:
    __slots__ = ("__x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.__x, self.y = x, y


class Validated(dict):  # type: ignore[type-arg]
    """A dict that another one cannot be made from, and that holds more than its items."""

    def __init__(self, source: str, **items: Tensor) -> None:
        super().__init__(items)
        self.source = source


class Items(UserDict):  # type: ignore[type-arg]
    def __init__(self, items: dict[str, Tensor], encoding: str) -> None:
        super().__init__(items)
        self.encoding = encoding


@pytest.mark.parametrize(
    "kind",
    [
        lambda a, b: [a, b],
        lambda a, b: (a, "text", b),
        lambda a, b: {"b": a, "a": b},
        lambda a, b: OrderedDict(b=a, a=b),
        lambda a, b: defaultdict(list, b=a, a=b),
        lambda a, b: deque([a, b], maxlen=2),
        lambda a, b: types.MappingProxyType({"b": a, "a": b}),
        lambda a, b: UserDict(b=a, a=b),
        lambda a, b: UserList([a, b]),
        lambda a, b: Items({"b": a, "a": b}, "utf-8"),
        lambda a, b: Validated("web", b=a, a=b),
        Point,
        Frozen,
        Slotted,
        lambda a, b: Derived(a),
        lambda a, b: Batch(a, b, "secret"),
        Hidden,
        lambda a, b: [Output(a), {"rest": (b, None)}],
        lambda a, b: torch.return_types.max((a, b)),
    ],
)
def test_structures_are_kept(kind: Callable[[Tensor, Tensor], Any]) -> None:
    tree = kind(numbered(0), numbered(1))
    assert [t[0].item() for t in tensors_in(tree)] == [0, 1]
    order: list[float] = []

    def doubled(tensor: Tensor) -> Tensor:
        order.append(tensor[0].item())
        return 2 * tensor + 10

    other = map_tensors(doubled, tree)
    assert order == [0, 1]
    assert [t[0].item() for t in tensors_in(other)] == [10, 12]
    assert [t[0].item() for t in tensors_in(tree)] == [0, 1], "the user's own has changed"
    assert type(other) is type(tree)
    if not hasattr(tree, "__slots__"):
        assert getattr(other, "__dict__", {}).keys() == getattr(tree, "__dict__", {}).keys()


def test_what_else_an_object_holds_is_kept() -> None:
    other = map_tensors(lambda t: t + 1, Items({"x": numbered(0)}, "utf-8"))
    assert other.encoding == "utf-8"
    assert other["x"][0] == 1
    assert map_tensors(lambda t: t + 1, Validated("web", x=numbered(0))).source == "web"
    assert map_tensors(lambda t: t + 1, Output(numbered(0), "name")).name == "name"
    assert map_tensors(lambda t: t + 1, defaultdict(list, x=numbered(0)))["new"] == []


def test_batches_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": numbered(0), "attention_mask": numbered(1)})
    assert [t[0].item() for t in tensors_in(encoding)] == [0, 1]
    other = map_tensors(lambda t: t + 1, encoding)
    assert isinstance(other, transformers.BatchEncoding)
    assert other.input_ids[0] == 1
    assert other["attention_mask"][0] == 2
    assert encoding.input_ids[0] == 0


def test_packed_sequences() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    other = map_tensors(torch.clone, packed)
    assert type(other) is type(packed)
    assert torch.equal(other.batch_sizes, packed.batch_sizes)


class Holder:
    def __init__(self, content: Any) -> None:
        self.content = content


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (Output(numbered(0)), 1),
        ({"a": Output(numbered(0)), "b": [numbered(1)]}, 2),
        ([numbered(0), (numbered(1),)], 2),
        ([Output(numbered(0)), numbered(1)], 1),
        ({"a": [Output(numbered(0))]}, 0),
    ],
)
def test_objects_of_an_object_are_taken_apart_but_for_lists_of_them(content: Any, count: int) -> None:
    """The layers of a cache, say: the model's output holds its tensors, which are no outputs."""
    tree = [Holder(content)]
    seen: list[Tensor] = []
    map_tensors(seen.append, tree)
    assert len(seen) == len(list(tensors_in(tree))) == count


class Node:
    def __init__(self, x: Tensor | None) -> None:
        self.x, self.other = x, self


def test_cycles_and_what_is_in_a_structure_twice() -> None:
    parent, child = Node(numbered(0)), Node(None)
    parent.other, child.other = child, parent
    assert len(list(tensors_in([parent, child]))) == 1
    new_parent, new_child = map_tensors(lambda t: t + 1, [parent, child])
    assert new_parent is not parent
    assert new_parent.other is new_child
    assert new_child.other is new_parent
    assert new_parent.x[0] == 1
    assert parent.x is not None
    assert parent.x[0] == 0
    inside: list[Any] = [numbered(3)]
    inside.append(inside)
    assert len(list(tensors_in(inside))) == 1
    assert map_tensors(lambda t: t + 1, inside)[0][0] == 4
    shared = Output(numbered(0))
    first, (second, number) = map_tensors(lambda t: t + 1, [shared, (shared, 3)])
    assert first is second
    assert number == 3


class Uncopied:
    def __init__(self, x: Tensor, inner: Any = None) -> None:
        self.x, self.inner = x, inner

    def __copy__(self) -> "Uncopied":
        raise RuntimeError("not to be copied")


class Lying:
    """Says that it is something else, and raises at every look."""

    __class__ = property(lambda self: dict)  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = numbered(0)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Uncopied(numbered(0)),
        Lying,
        Module,
        lambda: Output,
        lambda: numbered,
        lambda: torch,
        lambda: Module().forward,
        lambda: (number for number in range(2)),
        object,
        lambda: 3,
        lambda: None,
    ],
)
def test_what_cannot_be_taken_apart_is_a_leaf(made: Callable[[], object]) -> None:
    leaf = made()
    assert list(tensors_in([leaf])) == []
    assert map_tensors(lambda t: t + 1, [leaf])[0] is leaf


def test_both_functions_go_by_the_same_order_where_some_cannot_be_copied() -> None:
    inner = Output(numbered(1))
    tree = [Uncopied(numbered(0), inner), inner, numbered(2)]
    seen: list[Tensor] = []
    map_tensors(seen.append, tree)
    assert [t[0].item() for t in seen] == [t[0].item() for t in tensors_in(tree)]


def test_how_models_are_called() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor | float = 0.0) -> Tensor:
            return x + y

    x, y = numbered(1), numbered(2)
    assert call_model(Sum(), x)[0] == 1
    assert call_model(Sum(), (x, y))[0] == 3
    assert call_model(Sum(), UserDict(y=y, x=x))[0] == 3


def test_what_is_one_tensor_stays_one() -> None:
    x, y = numbered(1), numbered(1)
    found = map_tensors(once_each(torch.clone), {"query": x, "key": [x, y]})
    assert found["query"] is found["key"][0] is not x
    assert found["key"][1] is not found["query"]


def test_shared_arguments_are_hidden_until_the_model_is_called() -> None:
    hidden, calls = Shared({"mask": torch.ones(2)}), list[Any]()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, other: Any) -> None:
            calls.append(other["mask"].add_(1))

    x = torch.zeros(1)
    assert list(tensors_in([x, hidden])) == [x]
    assert map_tensors(torch.neg, [x, hidden])[1] is hidden
    call_model(Model(), (x, hidden))
    call_model(Model(), {"x": x, "other": hidden})
    assert [c.tolist() for c in calls] == [[2, 2], [2, 2]]  # of copies


def test_what_a_container_holds_whatever_its_type_makes_of_it() -> None:
    assert elements(Label((1, 2))) == [1, 2]
    assert elements({3}) == [3]
