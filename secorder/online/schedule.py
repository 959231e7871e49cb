"""Which batches an expensive check is made on."""

#: The fractional part of the golden ratio: of all numbers the worst to approximate by fractions.
GOLDEN = 0.6180339887498949


def now_and_then(count: int, one_in: int) -> bool:
    """Whether batch ``count`` is chosen: one in ``one_in`` is, also of every second, third, … batch.

    The multiples of an irrational number are evenly spread over [0, 1), and so is every k-th of them: the choice keeps
    step with no period in the user's data. It is deterministic, so that all ranks of a process group choose alike, and
    so does a run that is resumed.

    Source: Weyl (1916), "Über die Gleichverteilung von Zahlen mod. Eins".
    """
    return count * GOLDEN % 1.0 < 1.0 / one_in
