"""The stance of ``torch.compile``: compiled functions run eagerly while somebody needs it."""

import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakSet, finalize

from .saved_tensors import checkpoint_section


class _Stance:
    """What the compiler asks whenever a compiled function is called: in place from the first who needs it to the last.

    What runs as it was written does so, too, when a checkpoint computes it again in a backward, where it is to save as
    many tensors as at first: until that is over, or can no longer come, this stays in place, and answers all others as
    the stance before. It lies where it is turned at each recorded step, since ``torch.compiler.set_stance`` makes much
    of a turn.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a section may go at any time
        self.inside = 0
        self.sections: Collection[Any] = ()  # weakly, once there is any
        self.before: Any = None  # what this has taken the place of
        self.displaced: Any = None  # the same, or what lay there when someone came inside

    @cached_property
    def compiler(self) -> Any:
        """What holds the stance; it is loaded where it is asked for first."""
        from torch._dynamo import eval_frame

        return eval_frame

    @property
    def stance(self) -> str:
        """How the function that is called runs."""
        section = checkpoint_section()
        if self.inside and section is not None and section not in self.sections:
            finalize(section, self.leave, 0).atexit = False
            with self.lock:
                self.sections = WeakSet((*self.sections, section))
        known = section is not None and section in self.sections
        return "force_eager" if self.inside or known else str(self.before.stance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.displaced, self.compiler._stance = self.compiler._stance, self
                if self.displaced is not self and not self.sections:
                    self.before = self.displaced
            self.inside += 1

    def leave(self, leaving: int = 1) -> None:
        """As it was before, unless someone is inside, or a checkpoint may compute again what was."""
        with self.lock:
            self.inside -= leaving
            if self.inside or self.compiler._stance is not self:
                return
            displaced = self.displaced
            if displaced is not self and displaced is not self.before:  # the user's, in the midst of a section
                self.displaced, self.compiler._stance = self, displaced
            elif not self.sections:
                self.compiler._stance = self.before


_STANCE = _Stance()


#: Until :func:`leave_eager`, compiled functions run as they were written, in every thread; several may overlap.
enter_eager = _STANCE.enter

#: As it was before, unless someone else is inside.
leave_eager = _STANCE.leave


@contextmanager
def eager() -> Iterator[None]:
    """Inside, compiled functions run as they were written: what they compile to has no second derivative.

    Where the compiler is not loaded yet, nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    enter_eager()
    try:
        yield
    finally:
        leave_eager()
