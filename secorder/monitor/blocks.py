"""The layers of a deep model in blocks that fit one chart, by the names that they share."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

#: Lines that can be told apart in one chart.
AT_MOST = 12


def common_prefix(names: Sequence[str]) -> str:
    """What all names begin with, in whole parts, with its last dot: ``"model.layers."``; "" for fewer than two.

    Example:
        >>> from secorder.monitor.blocks import common_prefix
        >>> common_prefix(["model.layers.0.fc", "model.layers.1.fc"])
        'model.layers.'
    """
    if len(names) < 2:
        return ""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared])


def shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """Names without what they share, and what that is, in words.

    What all begin with is left out, and of what is left ``…`` stands for what most begin with.

    Example:
        >>> from secorder.monitor.blocks import shortened
        >>> shortened(["model.layers.0.fc", "model.layers.1.fc"])
        ('names without model.layers.', ['0.fc', '1.fc'])
        >>> shortened(["net.layers.0.fc", "net.layers.1.fc", "net.layers.2.fc", "net.head"])
        ('names without net., … is layers.', ['…0.fc', '…1.fc', '…2.fc', 'head'])
    """
    shared = common_prefix(names)
    rest = [name.removeprefix(shared) for name in names]
    counts: Counter[str] = Counter()
    for name in rest:
        parts = name.split(".")[:-1]
        counts.update(".".join(parts[: depth + 1]) + "." for depth in range(len(parts)))
    most = [prefix for prefix, count in counts.items() if 3 * count >= 2 * len(rest) and count > 1]
    prefix = max(most, key=len, default="")
    told = f"names without {shared}" if shared else ""
    if len(prefix) < 3:  # the mark takes what it saves
        return told, rest
    told += f"{', ' if told else ''}… is {prefix}"
    return told, [f"…{name.removeprefix(prefix)}" if name.startswith(prefix) else name for name in rest]


def blocks(names: Sequence[str], at_most: int = AT_MOST) -> dict[str, list[str]]:
    """Neighbouring layers together, as many as fit and as belong together: title → names.

    The tree of dotted names is cut where it must be, and small neighbours are put together again.
    """
    return {_title(block, names): block for block in _cut(list(names), 0, at_most)}


def _cut(names: list[str], depth: int, at_most: int) -> list[list[str]]:
    if len(names) <= at_most:
        return [names]
    pieces: list[list[str]] = []
    for _, group in groupby(names, key=lambda name: name.split(".")[: depth + 1]):
        inside = list(group)
        deeper = any(name.count(".") > depth for name in inside)
        whole = _cut(inside, depth + 1, at_most) if deeper else [[name] for name in inside]
        for piece in whole:
            if pieces and len(pieces[-1]) + len(piece) <= at_most:
                pieces[-1] = pieces[-1] + piece
            else:
                pieces.append(piece)
    return pieces


def _title(block: Sequence[str], names: Sequence[str]) -> str:
    if len(block) == len(names):
        return "all layers"
    if len(block) == 1:
        return block[0]
    inside = set(block)
    outside = [name for name in names if name not in inside]
    prefix = common_prefix(block)
    if prefix and not any(f"{name}.".startswith(prefix) for name in outside):
        return prefix.rstrip(".")
    return f"{_own_part(block[0], outside)} … {_own_part(block[-1], outside)}"


def _own_part(name: str, outside: Sequence[str]) -> str:
    """The shortest beginning of a name, in whole parts, that no layer outside of the block has."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        start = ".".join(parts[:depth])
        if not any(other == start or other.startswith(f"{start}.") for other in outside):
            return start
    return name
