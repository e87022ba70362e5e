"""The text of QEMU's -object option: how it is split, and how the values in it are read.

    memory-backend-memfd,id=mem,size=1G,host-nodes=0-1
    |                    |      |
    type (qom-type=)     name   option=value ...          a comma in a value is doubled

Source: util/qemu-option.c (opts_do_parse), util/cutils.c (do_strtosz), qapi/opts-visitor.c@v7.2 of QEMU.
"""

from __future__ import annotations

from ..errors import ArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["join", "split", "to_bool", "to_nodes", "to_number", "to_size"]

_BOOLS = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}
_SHIFTS = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_MAX_RANGE = 65536  # numbers in one range of nodes


def split(call: str, text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """The type, the name and the options (name, value) in their order; errors name `call`.

    >>> split("doc", "memory-backend-ram,id=m,size=1M,noshare,mem-path=a,,b")
    ('memory-backend-ram', 'm', [('size', '1M'), ('share', 'off'), ('mem-path', 'a,b')])
    """
    kind = id = None
    options: list[tuple[str, str]] = []
    for number, word in enumerate(_words(text)):
        option, equals, value = word.partition("=")
        if not equals:
            if number == 0:
                option, value = "qom-type", word
            elif not word:
                continue
            elif word.startswith("no"):
                option, value = word[2:], "off"
            else:
                value = "on"
        if option == "qom-type":
            kind = value
        elif option == "id":
            id = value if id is None else id
        else:
            options.append((option, value))
    if kind is None:
        raise ArgumentError(call, "qom-type", None, "the name of a type at the beginning", "Parameter is missing")
    if id is None:
        raise ArgumentError(call, "id", None, "id=NAME", "Parameter is missing")
    if not id or id[0] not in _LETTERS or id.strip(_LETTERS + _DIGITS + "-._"):
        raise ArgumentError(call, "id", id, "letters, digits, '-', '.', '_', beginning with a letter")
    return kind, id, options


def _words(text: str) -> list[str]:
    words = [""]
    at = 0
    while at < len(text):
        if text[at] != ",":
            words[-1] += text[at]
        elif text[at + 1 : at + 2] == ",":
            words[-1] += ","
            at += 1
        else:
            words.append("")
        at += 1
    return words


def join(words: Iterable[str]) -> str:
    """The text of an option from its words: commas in them are doubled.

    >>> join(["memory-backend-file", "mem-path=a,b"])
    'memory-backend-file,mem-path=a,,b'
    """
    return ",".join(word.replace(",", ",,") for word in words)


def to_bool(call: str, option: str, text: str) -> bool:
    """on, yes, true, y: True; off, no, false, n: False.  ArgumentError for all else, naming `call` and `option`."""
    if text not in _BOOLS:
        raise ArgumentError(call, option, text, "'on' or 'off'")
    return _BOOLS[text]


def to_number(call: str, option: str, text: str) -> int:
    """A number, in decimal, octal (010) or hexadecimal (0x8), at least 0 and below 2**64."""
    value = _integer(text)
    if value is None:
        raise ArgumentError(call, option, text, "a number from 0")
    return value


def to_size(call: str, option: str, text: str) -> int:
    """Bytes: a decimal number, perhaps with a fraction, and a suffix B, K, M, G, T, P or E (powers of 1024); or 0x....

    >>> to_size("doc", "size", "1.5M")
    1572864
    """
    accepted = "a number of bytes, or with a suffix: 640K, 1.5M, 1G; below 2**64"
    digits = text.removeprefix("+")
    value = None
    if digits[:2] in ("0x", "0X"):
        value = _integer(text)
    else:
        suffix = digits[-1:].upper() if digits and digits[-1] not in _DIGITS + "." else ""
        whole, point, part = digits[: len(digits) - len(suffix)].partition(".")
        if suffix in _SHIFTS and whole and not whole.strip(_DIGITS) and not part.strip(_DIGITS):
            unit = 1 << _SHIFTS[suffix]
            # A part of a unit is rounded to whole bytes.
            value = int(whole) * unit + (2 * int(part or "0") * unit + 10 ** len(part)) // (2 * 10 ** len(part))
            if point and unit == 1 and int(part or "0"):
                value = None
    if value is None or value >> 64:
        raise ArgumentError(call, option, text, accepted)
    return value


def to_nodes(call: str, option: str, text: str) -> list[int]:
    """Numbers of nodes: "2", or a range "0-3".

    >>> to_nodes("doc", "host-nodes", "0-2")
    [0, 1, 2]
    """
    first, dash, last = text.partition("-")
    low, high = _integer(first), _integer(last if dash else first)
    if low is None or high is None or low > high or high - low >= _MAX_RANGE:
        raise ArgumentError(call, option, text, "a number, or a range such as 0-3")
    return list(range(low, high + 1))


# What C's strtoull with base 0 reads, all of it, or None.
def _integer(text: str) -> int | None:
    digits = text.removeprefix("+")
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[:1] == "0" and len(digits) > 1 else 10
    if not digits or not digits[0].isdigit() or not digits.isascii() or "_" in digits:
        return None
    try:
        value = int(digits, base)
    except ValueError:
        return None
    return value if value < 1 << 64 else None
