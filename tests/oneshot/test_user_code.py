"""What the user's code refers to beyond its arguments."""

from typing import Any

from torch import nn

from secorder.oneshot.user_code import code_of, global_names


def test_code_is_the_users_own() -> None:
    class Own(nn.Linear):
        @property
        def scale(self) -> int:
            return 2

        @staticmethod
        def fixed() -> int:
            return 3

    own = vars(Own)
    assert code_of([nn.Linear(2, 2), Own(2, 2)]) == [Own, own["scale"].fget, own["fixed"].__func__]


def test_names_of_variables_that_are_read_and_assigned() -> None:
    space: dict[str, Any] = {}
    exec("def outer():\n    def inner():\n        global total\n        total += step\n    return inner", space)
    names, assigned = global_names(space["outer"].__code__)
    assert {"total", "step"} <= names
    assert assigned == {"total"}
