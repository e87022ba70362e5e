"""Numbers that fit, and what is said of those that do not."""

from __future__ import annotations

from typing import Any

import pytest

from hvmodel.arch.number import ALL, number
from hvmodel.arch.registers import CR0
from hvmodel.errors import ArgumentError, ArgumentTypeError


def test_what_fits_is_a_plain_int() -> None:
    for value, last, first in ((0, 0, 0), (3, 3, 0), (32, 52, 32), (52, 52, 32), (ALL, ALL, 0), (CR0.PG, ALL, 0)):
        found = number("call", "field", value, last, first)
        assert (found, type(found)) == (value, int)
    assert [number("call", "field", bit, 1) for bit in (False, True)] == [0, 1]


@pytest.mark.parametrize(
    ("value", "last", "first", "accepted"),
    [
        (-1, 3, 0, "0 to 3"),
        (4, 3, 0, "0 to 3"),
        (31, 52, 32, "32 to 52"),
        (256, 0xFF, 0, "0 to 0xff"),
        (1 << 64, ALL, 0, "0 to 2**64-1"),
    ],
)
def test_what_does_not_fit(value: int, last: int, first: int, accepted: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        number("call", "field", value, last, first)
    error = caught.value
    assert (error.call, error.field, error.value, error.accepted) == ("call", "field", value, accepted)


@pytest.mark.parametrize(("value", "last"), [("1", 3), (1.0, 3), (None, 3), (True, 3), (False, 0), (True, ALL)])
def test_what_is_none(value: Any, last: int) -> None:
    with pytest.raises(ArgumentTypeError):
        number("call", "field", value, last)


def test_all_is_64_ones() -> None:
    assert ALL == 0xFFFF_FFFF_FFFF_FFFF


def test_from_100_on_a_limit_is_said_in_hex() -> None:
    for last, accepted in ((99, "0 to 99"), (100, "0 to 0x64")):
        with pytest.raises(ArgumentError) as caught:
            number("call", "field", -1, last)
        assert caught.value.accepted == accepted
