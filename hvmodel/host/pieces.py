"""Pieces: what differs from page to page of a range, as runs of equal pages: ((start, end, value), ...).

Pieces are ascending, leave no gap, and no two neighbours are equal.  They are immutable: who changes them makes new
ones, and who reads them needs no lock.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Pieces = tuple[tuple[int, int, int], ...]

__all__ = ["change", "within"]


def change(pieces: Pieces, start: int, end: int, new: Callable[[int], int]) -> Pieces:
    """The pieces in which each value of [start, end) has become `new(value)`.

    >>> change(((0, 9, 1),), 3, 5, lambda value: value + 1)
    ((0, 3, 1), (3, 5, 2), (5, 9, 1))
    """
    cut: list[tuple[int, int, int]] = []
    for first, last, value in pieces:
        for low, high, now in (
            (first, min(last, start), value),
            (max(first, start), min(last, end), new(value)),
            (max(first, end), last, value),
        ):
            if low >= high:
                continue
            if cut and cut[-1][2] == now:
                cut[-1] = cut[-1][0], high, now
            else:
                cut.append((low, high, now))
    return tuple(cut)


def within(pieces: Pieces, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The pieces of [start, end), cut to it.

    >>> list(within(((0, 3, 1), (3, 9, 2)), 2, 5))
    [(2, 3, 1), (3, 5, 2)]
    """
    for first, last, value in pieces:
        if max(first, start) < min(last, end):
            yield max(first, start), min(last, end), value
