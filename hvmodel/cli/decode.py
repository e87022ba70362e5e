"""Words of the MMU in plain text, as `hvmodel decode` shows them: a table for one value, a line each for many, JSON.

All is pure: no KVM is asked, no extension is needed.
"""

from __future__ import annotations

import json
import os
import re
import select

from ..errors import ArgumentError
from .status import MISMATCH, OK
from .terminal import STDOUT, line, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..mmu.bits import Decoded

__all__ = ["KINDS", "Options", "number_of", "show", "words_of"]

KINDS = (
    "spte",
    "ept",
    "eptp",
    "role",
    "cpu-role",
    "pfec",
    "exit-reason",
    "qualification",
    "vmx-ept-cap",
)
"""What can be decoded."""

_MAX_DIGITS = 100
_STDIN = 0
_CHUNK = 65536


class Options:
    """What the command line says beside the kind and the values; None: not said."""

    def __init__(
        self,
        *,
        level: int | None = None,
        reason: str | None = None,
        vector: int | None = None,
        flavour: str | None = None,
        kernel: str | None = None,
        phys_bits: int | None = None,
        capability: str | None = None,
        ad: bool | None = None,
        exec_only: bool | None = None,
        mbec: bool | None = None,
    ) -> None:
        self.level, self.reason, self.vector, self.flavour, self.kernel = level, reason, vector, flavour, kernel
        self.phys_bits, self.capability, self.ad, self.exec_only = phys_bits, capability, ad, exec_only
        self.mbec = mbec


def number_of(text: str, what: str = "VALUE", call: str = "decode") -> int:
    """A number as people write it: 0x1783, 6019; also 0o and 0b, and decimal with leading zeros.  ArgumentError."""
    try:
        if len(text) > _MAX_DIGITS:
            raise ValueError(text)
        if not text.isascii():
            raise ValueError(text)
        return int(text, 10) if text.isdecimal() else int(text, 0)
    except ValueError:
        shown = text if len(text) <= _MAX_DIGITS else text[:_MAX_DIGITS] + "…"
        raise ArgumentError(call, what, shown, "a number such as 0x1783 or 6019") from None


def _spte(options: Options) -> Callable[[int], Decoded]:
    from ..mmu.masks import reset_all_pte_masks
    from ..mmu.spte import decode_spte

    version = options.kernel or "6.18"
    flavour = options.flavour or "shadow"
    for name in ("ad", "exec_only"):
        if getattr(options, name) is not None and flavour != "ept":
            raise ArgumentError("decode spte", _OPTIONS[name], getattr(options, name), "not given, or --ept with it")
    masks = reset_all_pte_masks(
        46 if options.phys_bits is None else options.phys_bits, npt=flavour == "npt", version=version
    )
    if flavour == "ept":
        masks = masks.set_ept_masks(options.ad is not False, options.exec_only is not False)
    level = 1 if options.level is None else options.level
    return lambda value: decode_spte(value, masks, level)


def _ept(options: Options) -> Callable[[int], Decoded]:
    from ..mmu.ept import EptControls, decode_ept_entry

    controls = EptControls(
        maxphyaddr=52 if options.phys_bits is None else options.phys_bits,
        exec_only=options.exec_only is not False,
        mbec=bool(options.mbec),
    )
    level = 1 if options.level is None else options.level
    return lambda value: decode_ept_entry(value, level, controls)


def _eptp(options: Options) -> Callable[[int], Decoded]:
    from ..mmu.ept import decode_eptp

    capability = None if options.capability is None else number_of(options.capability, "--cap")
    width = 52 if options.phys_bits is None else options.phys_bits
    return lambda value: decode_eptp(value, capability=capability, maxphyaddr=width)


def _role(options: Options) -> Callable[[int], Decoded]:
    from ..mmu.role import decode_role

    return lambda value: decode_role(value, version=options.kernel or "6.18")


def _cpu_role(options: Options) -> Callable[[int], Decoded]:
    from ..mmu.role import decode_cpu_role

    return lambda value: decode_cpu_role(value, version=options.kernel or "6.18")


def _pfec(_: Options) -> Callable[[int], Decoded]:
    from ..mmu.fault import decode_pfec

    return decode_pfec


def _exit_reason(_: Options) -> Callable[[int], Decoded]:
    from ..mmu.exit_reason import decode_exit_reason

    return decode_exit_reason


def _qualification(options: Options) -> Callable[[int], Decoded]:
    from ..mmu.exit_reason import exit_reason_number
    from ..mmu.qualification import decode_qualification, qualification_layout

    if options.reason is None:
        raise ArgumentError("decode qualification", "--reason", None, "the exit reason, by number or name")
    text = options.reason
    reason = number_of(text, "--reason") if text[:1].isdigit() else exit_reason_number(text)
    qualification_layout(reason, options.vector)  # says what is wrong with them before any value
    return lambda value: decode_qualification(reason, value, options.vector)


def _vmx_ept_cap(_: Options) -> Callable[[int], Decoded]:
    from ..mmu.vmx_capability import decode_ept_vpid_cap

    return decode_ept_vpid_cap


# Kind: (its decoder, the options that mean something for it).
_DECODERS: dict[str, tuple[Callable[[Options], Callable[[int], Decoded]], frozenset[str]]] = {
    "spte": (_spte, frozenset({"level", "flavour", "kernel", "phys_bits", "ad", "exec_only"})),
    "ept": (_ept, frozenset({"level", "phys_bits", "exec_only", "mbec"})),
    "eptp": (_eptp, frozenset({"phys_bits", "capability"})),
    "role": (_role, frozenset({"kernel"})),
    "cpu-role": (_cpu_role, frozenset({"kernel"})),
    "pfec": (_pfec, frozenset()),
    "exit-reason": (_exit_reason, frozenset()),
    "qualification": (_qualification, frozenset({"reason", "vector"})),
    "vmx-ept-cap": (_vmx_ept_cap, frozenset()),
}
_OPTIONS = {
    "level": "--level",
    "reason": "--reason",
    "vector": "--vector",
    "flavour": "--ept or --npt",
    "kernel": "--kernel",
    "phys_bits": "--phys-bits",
    "capability": "--cap",
    "ad": "--ad or --no-ad",
    "exec_only": "--exec-only or --no-exec-only",
    "mbec": "--mbec",
}


def words_of(values: tuple[str, ...]) -> Iterator[str]:
    """The values in order; "-" stands for the words of stdin, and so does having none.  There "#" begins a comment.

    Words of stdin come as soon as they are read.  One that is too long for a number comes cut off, so that no more
    than that is ever kept.  ArgumentError: stdin cannot be read.
    """
    for value in values or ("-",):
        if value == "-":
            yield from _words_of_stdin()
        else:
            yield value


def _words_of_stdin() -> Iterator[str]:
    # Bytes of words that end somewhere behind what was read; whether what comes next is in a comment.
    begun, comment = b"", False
    while chunk := _read_stdin():
        for piece in re.split(rb"(\n|#)", chunk):
            if piece == b"\n":
                yield from _split(begun)
                begun, comment = b"", False
            elif piece == b"#":
                comment = True
            elif not comment:
                *whole, begun = re.split(rb"[\s,]", begun + piece)
                for word in whole:
                    yield from _split(word)
                if len(begun) > 4 * _MAX_DIGITS:
                    yield from _split(begun)
                    begun = b""
    yield from _split(begun)


def _split(word: bytes) -> list[str]:
    return [word.decode("utf-8", "replace")] if word else []


def _read_stdin() -> bytes:
    while True:
        try:
            return os.read(_STDIN, _CHUNK)
        except BlockingIOError:
            select.select([_STDIN], [], [])
        except OSError as error:
            raise ArgumentError("stdin", "VALUE", "-", None, f"it cannot be read: {error.strerror}") from None


def show(kind: str, values: tuple[str, ...], options: Options, *, as_json: bool, as_table: bool | None = None) -> int:
    """Print the values by their bits; the exit status: 0, or 1 where some value has a problem.

    One value of the command line is a table, more are a line each; `as_table` says otherwise.  Each is printed as it is
    read, the objects of JSON too, whose array ends before what is wrong.  Raises ArgumentError that names option or
    value.
    """
    make, known = _DECODERS[kind]
    call = f"decode {kind}"
    for name, option in _OPTIONS.items():
        if getattr(options, name) is not None and name not in known:
            raise ArgumentError(call, option, getattr(options, name), "not given", "it has no meaning here")
    decode = make(options)
    drawn = (len(values) == 1 and values[0] != "-") if as_table is None else as_table
    status, first = OK, True
    try:
        for word in words_of(values):
            decoded = decode(number_of(word, call=call))
            if decoded.problems:
                status = MISMATCH
            if as_json:
                write(STDOUT, (("[" if first else ", ") + json.dumps(decoded.to_json())).encode())
            else:
                if drawn and not first:
                    line("")
                line(decoded.table() if drawn else str(decoded))
            first = False
    except ArgumentError:
        if as_json and not first:
            line("]")
        raise
    if as_json:
        line("[]" if first else "]")
    return status
