"""The XSAVE area: x87, SSE, AVX and what came later, in the standard format of the XSAVE instruction.

       0: the legacy region, as FXSAVE writes it (512 bytes)
     512: the header: XSTATE_BV, XCOMP_BV (0: standard format), 48 bytes of 0
     576: extended components, each where CPUID leaf 0xd says: AVX (bit 2) always first; 4096 bytes in all, or more
          where KVM_CAP_XSAVE2 says so

A component whose bit in XSTATE_BV is clear is in its initial state, whatever its bytes are.  KVM's area has the
software's words of the legacy region (bytes 464 to 511) in use: the first eight of them are the features of the host.

Sources: Intel SDM vol. 1 chapter 13 (10.5.1 for the legacy region); linux:arch/x86/kernel/fpu/core.c@v6.18.
"""

from __future__ import annotations

from struct import Struct

from ..arch.number import number as _number
from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .cpuid import CpuidTable
from .record import Packed, bits_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, Self

    from ..kvm import CpuidEntry

__all__ = ["COMPONENTS", "LEGACY_SIZE", "Component", "Xsave", "components"]

LEGACY_SIZE = 576
"""Bytes of the legacy region and the header."""
_LEAST, _MOST = 4096, 1 << 20  # struct kvm_xsave; what from_json() believes (all of Intel's components are 11 KiB)

_LEGACY = {
    "fcw": (0, "<H"),
    "fsw": (2, "<H"),
    "ftw": (4, "<B"),
    "fop": (6, "<H"),
    "fip": (8, "<Q"),
    "fdp": (16, "<Q"),
    "mxcsr": (24, "<I"),
    "mxcsr_mask": (28, "<I"),
    "xstate_bv": (512, "<Q"),
    "xcomp_bv": (520, "<Q"),
}
_ST, _NR_ST = 32, 8
_XMM, _NR_XMM = 160, 16
_KNOWN = ((5, 6), (31, 32), (416, 464), (464, 512), (528, 576))  # reserved bytes, and those for software

COMPONENTS = {
    0: "x87",
    1: "SSE",
    2: "AVX",
    3: "BNDREGS",
    4: "BNDCSR",
    5: "opmask",
    6: "ZMM_Hi256",
    7: "Hi16_ZMM",
    8: "PT",
    9: "PKRU",
    10: "PASID",
    11: "CET_U",
    12: "CET_S",
    13: "HDC",
    14: "UINTR",
    15: "LBR",
    16: "HWP",
    17: "XTILECFG",
    18: "XTILEDATA",
    19: "APX",
}
"""Names of the state components by their bit in XSTATE_BV and XCR0 (Intel SDM vol. 1, 13.1)."""


_FLAGS = ("IE", "DE", "ZE", "OE", "UE", "PE")  # of the exceptions; their masks
_MASKS = ("IM", "DM", "ZM", "OM", "UM", "PM")
_BITS = {
    "fcw": bits_named("FCW", (*_MASKS, "", "", "PC[0]", "PC[1]", "RC[0]", "RC[1]", "X")),
    "fsw": bits_named("FSW", (*_FLAGS, "SF", "ES", "C0", "C1", "C2", "TOP[0]", "TOP[1]", "TOP[2]", "C3", "B")),
    "mxcsr": bits_named("MXCSR", (*_FLAGS, "DAZ", *_MASKS, "RC[0]", "RC[1]", "FZ")),
    "xstate_bv": bits_named("XSTATE_BV", tuple(COMPONENTS.values())),
    "xcomp_bv": bits_named("XCOMP_BV", tuple(COMPONENTS.values())),
}


class Component(Value):
    """Where a component is in the area: `number` (bit in XSTATE_BV), `name`, `offset` and `size` in bytes."""

    number: int
    name: str
    offset: int
    size: int


_AVX = Component(2, "AVX", 576, 256)


def components(cpuid: Iterable[CpuidEntry]) -> tuple[Component, ...]:
    """The extended components of these CPUID entries, by number: leaf 0xd, subleaves 2 and up (EAX size, EBX offset).

    Those that the supervisor saves (ECX bit 0) have no place in the standard format, and are left out.  The entries
    must be those of the host that the area is from: KVM lays it out as the host's processor does.
    """
    found = []
    for entry in CpuidTable(cpuid):
        if entry.function == 0xD and entry.index >= 2 and entry.eax and not entry.ecx & 1:
            name = COMPONENTS.get(entry.index, f"component {entry.index}")
            found.append(Component(entry.index, name, entry.ebx, entry.eax))
    return tuple(sorted(found, key=lambda one: one.number))


class Xsave(Packed):
    """The XSAVE area: 4096 bytes or more.

    Legacy fields by name (`fcw`, `mxcsr`, …), `st` and `xmm` as tuples of bytes; others by `component()`.

    >>> area = Xsave.initial()
    >>> hex(area.fcw), hex(area.mxcsr), area.xstate_bv
    ('0x37f', '0x1f80', 0)
    >>> area.replace(mxcsr=0x1FA0).diff(area)
    [Difference(path='mxcsr', before=0x1fa0, after=0x1f80, bits=('MXCSR.PE',))]
    """

    STRUCT = "kvm_xsave"

    @classmethod
    def initial(cls, size: int = _LEAST) -> Self:
        """The area of initial state: FCW 0x37f, MXCSR 0x1f80, all else zero (SDM vol. 1, 13.6)."""
        return cls.from_bytes(bytes(_number("Xsave.initial", "size", size, _MOST))).replace(fcw=0x37F, mxcsr=0x1F80)

    @classmethod
    def _checked(cls, data: bytes) -> None:
        if len(data) < _LEAST or len(data) % 4:
            accepted = f"{_LEAST} bytes, or a multiple of 4 above"
            raise ArgumentError("Xsave.from_bytes", "data", data, accepted, f"{len(data)} bytes")

    if TYPE_CHECKING:
        fcw: int
        fsw: int
        ftw: int
        fop: int
        fip: int
        fdp: int
        mxcsr: int
        mxcsr_mask: int
        xstate_bv: int
        xcomp_bv: int

    @property
    def st(self) -> tuple[bytes, ...]:
        """ST0 to ST7, 16 bytes each, of which 10 are the number."""
        return tuple([self._data[_ST + 16 * at : _ST + 16 * at + 16] for at in range(_NR_ST)])

    @property
    def xmm(self) -> tuple[bytes, ...]:
        """XMM0 to XMM15, 16 bytes each."""
        return tuple([self._data[_XMM + 16 * at : _XMM + 16 * at + 16] for at in range(_NR_XMM)])

    def is_initial(self, number: int) -> bool:
        """Whether component `number` is in its initial state: its bit in XSTATE_BV is clear."""
        return not self.xstate_bv >> _number("Xsave.is_initial", "number", number, 63) & 1

    def component(self, which: Component = _AVX) -> bytes:
        """The bytes of an extended component; by default AVX: the upper halves of YMM0 to YMM15, 16 bytes each.

        ArgumentError: it ends behind the area.  Where others are, `components()` says.
        """
        if not isinstance(which, Component):
            raise ArgumentTypeError("Xsave.component", "which", which, "a Component of components()")
        for field, last in (("number", 63), ("offset", _MOST), ("size", _MOST)):
            _number("Xsave.component", field, getattr(which, field), last)
        if which.offset + which.size > len(self._data):
            raise ArgumentError("Xsave.component", "which", which.name, f"one within {len(self._data)} bytes")
        return self._data[which.offset : which.offset + which.size]

    def replace(self, **fields: Any) -> Self:
        """The same area but for these legacy fields, `st` or `xmm` (all of them).

        A component whose bit in XSTATE_BV is clear is not read from the area: set `xstate_bv` too.
        """
        data = bytearray(self._data)
        call = "Xsave.replace"
        for name, value in fields.items():
            if name in _CODES:
                offset, code = _CODES[name]
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ArgumentTypeError(call, name, value, "an int")
                if not 0 <= value < 1 << 8 * code.size:
                    raise ArgumentError(call, name, value, f"0 to {(1 << 8 * code.size) - 1:#x}")
                code.pack_into(data, offset, value)
            elif name in ("st", "xmm"):
                at, nr = (_ST, _NR_ST) if name == "st" else (_XMM, _NR_XMM)
                rows = list(value) if isinstance(value, tuple | list) else []
                if len(rows) != nr or not all(isinstance(row, bytes) and len(row) == 16 for row in rows):
                    raise ArgumentTypeError(call, name, value, f"{nr} times 16 bytes")
                data[at : at + 16 * nr] = b"".join(rows)
            else:
                raise ArgumentError(call, name, value, ", ".join([*_CODES, "st", "xmm"]), "there is no such field")
        return self._of(bytes(data))

    def replace_component(self, which: Component, data: object) -> Self:
        """The same area with these bytes as an extended component, and its bit in XSTATE_BV set."""
        old = self.component(which)
        if not isinstance(data, bytes) or len(data) != len(old):
            raise ArgumentTypeError("Xsave.replace_component", "data", data, f"{len(old)} bytes")
        area = self._data[: which.offset] + data + self._data[which.offset + which.size :]
        return self._of(area).replace(xstate_bv=self.xstate_bv | 1 << which.number)

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """The legacy fields, st[0], …, xmm[0], …, and all other bytes by 16 as region[576:592] where not zero."""
        for name in _CODES:
            yield name, getattr(self, name)
        for at, row in enumerate(self.st):
            yield f"st[{at}]", row
        for at, row in enumerate(self.xmm):
            yield f"xmm[{at}]", row
        for begin, end in _KNOWN:
            if any(self._data[begin:end]):
                yield f"region[{begin}:{end}]", self._data[begin:end]
        for begin in range(LEGACY_SIZE, len(self._data), 16):
            row = self._data[begin : begin + 16]
            if any(row):
                yield f"region[{begin}:{begin + 16}]", row

    def _named(self, path: str, bits: int) -> tuple[str, ...]:
        names = _BITS.get(path)
        return names(bits) if names else ()

    def to_json(self) -> str:
        """All bytes as hex digits, but for the zeros at the end of the 4096 or more: "SIZE:DIGITS"."""
        return f"{len(self._data)}:{self._data.rstrip(bytes(1)).hex()}"

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The value that `to_json()` gave."""
        call = "Xsave.from_json"
        try:
            words, digits = document.split(":")  # type: ignore[attr-defined]  # whatever is no text is refused
            size, data = int(words), bytes.fromhex(digits)
        except (AttributeError, TypeError, ValueError):
            raise ArgumentError(call, "document", document, "text: size, colon, hex digits") from None
        if not len(data) <= size <= _MOST:
            raise ArgumentError(call, "document", document, f"a size of {len(data)} (the digits) to {_MOST}")
        return cls.from_bytes(data.ljust(size, b"\0"))

    def __repr__(self) -> str:
        live = [name for at, name in COMPONENTS.items() if not self.is_initial(at)]
        return f"<Xsave {len(self._data)} bytes, in use: {', '.join(live) or 'nothing'}>"


_CODES = {name: (offset, Struct(code)) for name, (offset, code) in _LEGACY.items()}


def _legacy(name: str) -> property:
    offset, code = _CODES[name]
    return property(lambda area: code.unpack_from(area._data, offset)[0], doc=f"{code.size} bytes at {offset}.")


for _name in _CODES:
    setattr(Xsave, _name, _legacy(_name))
