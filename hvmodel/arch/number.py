"""Whether a number fits where it is to go: the one check of the arguments of this package."""

from __future__ import annotations

from ..errors import ArgumentError, ArgumentTypeError

__all__ = ["ALL", "number"]

ALL = (1 << 64) - 1
"""64 ones: the highest value of a register."""


def number(call: str, field: str, value: object, last: int = ALL, first: int = 0) -> int:
    """`value` as a plain int (of a member of an enum, its number), from `first` to `last`.

    ArgumentError: it is not in that range.  ArgumentTypeError: it is no int; True and False are, of one bit.

    >>> number("call", "rpl", 4, 3)
    Traceback (most recent call last):
    hvmodel.errors.ArgumentError: call: rpl=4; accepted: 0 to 3
    """
    if not isinstance(value, int) or (isinstance(value, bool) and (first, last) != (0, 1)):
        raise ArgumentTypeError(call, field, value, "an int")
    if not first <= value <= last:
        accepted = "2**64-1" if last == ALL else f"{last}" if last < 100 else f"{last:#x}"
        raise ArgumentError(call, field, value, f"{first} to {accepted}")
    return int(value)
