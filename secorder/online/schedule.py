"""Which of many batches something dear is done at: now and then, in step with no period of the user's own."""

__all__ = ["now_and_then"]

#: The fractional part of the golden ratio: of all numbers the worst to approximate by fractions.
GOLDEN = 0.6180339887498949


def now_and_then(count: int, one_in: int) -> bool:
    """Whether it is the turn of batch ``count``: of one in ``one_in``, and of as many of every second, third, … batch.

    The multiples of an irrational number are evenly spread over [0, 1), and so are those at every k-th place. It is no
    draw by chance, so that the ranks of a process group decide alike, and a run that is resumed as if it had gone on.

    Source: Weyl (1916), "Über die Gleichverteilung von Zahlen mod. Eins".
    """
    return count * GOLDEN % 1.0 < 1.0 / one_in
