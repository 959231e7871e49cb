"""Random vectors that an audit looks at parameters with: drawn once, and taken from random places."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch.random_state import fresh_generator
from ...layers.one_by_one import Vectors
from ...layers.side_by_side import Frame, frame_of
from ..constants import Constants

#: Elements of a parameter and its layer's outputs above which only a block of its rows is looked at, and rows of it.
WHOLE_ELEMENTS = 1 << 19
BLOCK = 64
#: Output and input channels of convolutions that are looked at: activations cost more to read than parameters there.
OUT_CHANNELS, IN_CHANNELS = 16, 4
#: Random vectors that parameters of one shape are looked at with in turn (seldom is seven the period of a penalty),
#: and backward passes after which others are drawn.
IN_TURN, KEPT = 7, 112
#: Sets of layers whose frames are kept.
FRAMES = 16


class Directions:
    """Random numbers, drawn once and looked at from random places: a private stream that costs nothing."""

    def __init__(self) -> None:
        self._generator = fresh_generator()
        self._places = random.Random(self._generator.initial_seed())
        self._pool: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._kept = Kept()
        self.constants = Constants()
        self._passes = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Directions, ()  # a copy draws numbers of its own

    def _take(self, size: int, parameter: Tensor) -> Tensor:
        """Random numbers where a parameter is, and of its dtype, in float32 at least."""
        key = (parameter.device, parameter.dtype)
        pool = self._pool.get(key)
        if pool is None or pool.shape[0] < 2 * size:
            numbers = torch.randn(max(2 * size, 1 << 13), generator=self._generator, device="cpu")
            pool = self._pool[key] = numbers.to(key[0], torch.promote_types(key[1], torch.float32))
        return pool.narrow(0, self._below(pool.shape[0] - size + 1), size)

    def _below(self, end: int) -> int:
        """A place from 0 to below ``end``."""
        return int(self._places.random() * end)

    def begin(self) -> None:
        """A backward begins."""
        self._passes += 1
        if self._passes % KEPT == 0:
            self._kept = Kept()

    def vectors(self, parameter: Tensor, outputs: int = 0) -> Vectors:
        """Those of one parameter, for one backward; the same for parameters of one shape that are looked at whole.

        Cotangents are read with it, so that the elements of what the layer returns count, too.
        """
        found = self._in_turn(self._kept, parameter, outputs)
        return self._drawn(parameter, *_rows(parameter, outputs)) if found is None else found[self._passes % IN_TURN]

    def _in_turn(self, kept: "Kept", parameter: Tensor, outputs: int = 0) -> list[Vectors] | None:
        """Those of all parameters of one shape; None of one of which a block is looked at."""
        rows, block = _rows(parameter, outputs)
        if block < rows:
            return None
        key = (parameter.shape, parameter.dtype, parameter.device)
        found = kept.vectors.get(key)
        if found is None:
            found = kept.vectors[key] = [self._drawn(parameter, rows, block) for _ in range(IN_TURN)]
        return found

    def _drawn(self, parameter: Tensor, rows: int, block: int) -> Vectors:
        columns = parameter.numel() // max(rows, 1) if parameter.dim() > 1 else 1
        start, r = self._below(rows - block + 1), self._take(block, parameter)
        if parameter.dim() > 2:
            channels = parameter.shape[1]
            size, few = columns // max(channels, 1), min(channels, IN_CHANNELS)
            channel, place = self._below(channels - few + 1), self._below(max(size, 1))
            s = r.new_zeros(columns)
            s.view(channels, -1)[channel : channel + few, place] = self._take(few, parameter)
            return Vectors(r, s, start, rows, channel, place)
        s = self._take(columns, parameter) if parameter.dim() > 1 else r.new_ones(1)
        return Vectors(r, s, start, rows)

    def frame(self, parameters: Sequence[Tensor], of: Sequence[Vectors] | None, flags: Sequence[float]) -> Frame | None:
        """The frame of several layers, kept as long as their vectors are; None where only a block of one is looked at.

        Nor is there one where the vectors that they are looked at with are not those of now. A flag is one where a
        layer has a bias, else zero.
        """
        kept, turn = self._kept, self._passes % IN_TURN  # another thread's backward may begin meanwhile
        for p, vectors in zip(parameters, of, strict=True) if of is not None else ():
            found = self._in_turn(kept, p)
            if found is None or vectors is not found[turn]:
                return None  # another backward has begun since
        key = (parameters[0].dtype, parameters[0].device, *flags, *[p.shape for p in parameters])
        frames = kept.frames.get(key)
        if frames is None:
            if len(kept.frames) >= FRAMES:
                kept.frames.clear()
            in_turn = [found for found in [self._in_turn(kept, p) for p in parameters] if found is not None]
            if len(in_turn) < len(parameters):
                return None
            with_bias = self.constants.vector(flags, in_turn[0][0].r)
            frames = [frame_of([(own.r, own.s) for own in every], with_bias) for every in zip(*in_turn, strict=True)]
            kept.frames[key] = frames
        return frames[turn]


class Kept:
    """What is drawn for some backward passes: vectors in turn, by parameters' shapes, and frames made of them."""

    def __init__(self) -> None:
        self.vectors: dict[tuple[Any, ...], list[Vectors]] = {}
        self.frames: dict[tuple[Any, ...], list[Frame]] = {}


def _rows(parameter: Tensor, outputs: int) -> tuple[int, int]:
    """Those of a parameter, and of how many in a row its block is."""
    rows = parameter.shape[0] if parameter.dim() else 1
    block = rows if parameter.numel() + outputs <= WHOLE_ELEMENTS or parameter.dim() < 2 else min(rows, BLOCK)
    return rows, block if parameter.dim() < 3 else min(block, OUT_CHANNELS)
