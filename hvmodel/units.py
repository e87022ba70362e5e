"""Sizes, pages and the words for addresses.

A size is in bytes unless its name says otherwise.  A range is `[start, start + size)`.

    gpa   guest physical address          gfn = gpa >> 12   guest frame number
    hva   host virtual address            pfn = hpa >> 12   page frame number (host)
    gva   guest virtual (linear) address
"""

from __future__ import annotations

from .errors import ArgumentError, ArgumentTypeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NewType

    Gpa = NewType("Gpa", int)
    Gva = NewType("Gva", int)
    Hva = NewType("Hva", int)
    Gfn = NewType("Gfn", int)
    Pfn = NewType("Pfn", int)
else:
    Gpa = Gva = Hva = Gfn = Pfn = int  # typing costs 5 ms at import; a NewType is the identity at run time

__all__ = [
    "GiB",
    "Gfn",
    "Gpa",
    "Gva",
    "Hva",
    "KiB",
    "MiB",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "Pfn",
    "TiB",
    "align_down",
    "align_up",
    "is_aligned",
    "parse_size",
]

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

_SUFFIXES = {"": 1, "B": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}


def align_down(value: int, alignment: int) -> int:
    """Largest multiple of `alignment` (a power of two) that is <= `value`.

    >>> hex(align_down(0x1fff, 0x1000))
    '0x1000'
    """
    return value & -alignment


def align_up(value: int, alignment: int) -> int:
    """Smallest multiple of `alignment` (a power of two) that is >= `value`.

    >>> hex(align_up(0x1001, 0x1000))
    '0x2000'
    """
    return -(-value & -alignment)


def is_aligned(value: int, alignment: int) -> bool:
    """Whether `value` is a multiple of `alignment` (a power of two)."""
    return not value & (alignment - 1)


def parse_size(size: int | str, call: str = "parse_size", field: str = "size") -> int:
    """A size in bytes from an int, or from text with QEMU's binary suffixes: "16M", "1G", "640K", "0x1000".

    Raises ArgumentError (naming `call` and `field`) for text that is no size, for negative sizes and for sizes that
    are not a whole number of bytes; ArgumentTypeError for other types.

    >>> parse_size("16M")
    16777216
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ArgumentTypeError(call, field, size, 'a size in bytes, or text such as "16M"')
    if isinstance(size, int):
        value = size
    else:
        text = size.strip().upper().removesuffix("IB")
        suffix = text[-1:] if text[-1:] in ("K", "M", "G", "T") else ""
        if not suffix and not text.startswith("0X"):
            text = text.removesuffix("B")
        digits = text.removesuffix(suffix)
        try:
            value = int(digits, 0) * _SUFFIXES[suffix]
        except ValueError:
            raise ArgumentError(call, field, size, 'a number of bytes, or text such as "640K", "16M", "1G"') from None
    if value < 0:
        raise ArgumentError(call, field, size, "a size of at least 0 bytes")
    return value
