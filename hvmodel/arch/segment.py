"""Segments: selectors, the descriptors and gates of GDT, LDT and IDT, and the hidden part of a segment register.

    selector         15              3  2 1 0
                     |     index      |TI|RPL|

    descriptor       63       56 55 54 53 52  51   48 47 46 45 44 43  40 39        16 15        0
    (8 bytes)        |base 31:24|G |DB|L |AVL|lim19:16|P |DPL |S |type  |base 23:0   |limit 15:0 |
    16 bytes (LDT and TSS of long mode): bits 95:64 are base 63:32, the others 0

    gate             63          48 47 46 45 44 43  40 39 37 36    32 31      16 15         0
    (8 bytes)        |offset 31:16 |P |DPL |0 |type  |      |count/IST|selector |offset 15:0 |
    16 bytes (long mode): bits 95:64 are offset 63:32, the others 0

    type, S = 1      data: 4 expand down, 2 writable, 1 accessed      code: 8, 4 conforming, 2 readable, 1 accessed
    type, S = 0      see `SystemType`

    access rights    16       15 14 13 12  11   8 7 6  5 4  3   0      as VMX keeps them, and LAR (shifted by 8)
                     |unusable|G|DB|L |AVL|      |P|DPL|S|type |

A limit is in bytes here, as in struct kvm_segment: the last offset that may be touched.  With G the 20 bits of a
descriptor count pages, and the last 12 bits are ones.

Source: Intel SDM volume 3: 3.4 (segments), and on call gates, IDT descriptors, task-state segments, and the guest
registers of a VMCS (access rights); linux:arch/x86/include/asm/desc_defs.h@v6.18.
"""

from __future__ import annotations

from enum import IntEnum

from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .number import ALL
from .number import number as _number
from .registers import Bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

__all__ = [
    "CodeType",
    "DataType",
    "Descriptor",
    "Gate",
    "Selector",
    "SystemType",
    "access_rights",
    "decode",
    "kvm_segment",
    "null_segment",
    "real_mode_segment",
]

_PAGES = 0xFFF
_MAX_SMALL = 0xFFFFF  # the highest limit that is counted in bytes
_UNUSABLE = 1 << 16
# fields of struct kvm_segment beside base, limit and selector -> first bit in the access rights, width
_RIGHTS = {
    "type": (0, 4), "s": (4, 1), "dpl": (5, 2), "present": (7, 1), "avl": (12, 1), "l": (13, 1), "db": (14, 1),
    "g": (15, 1), "unusable": (16, 1),
}  # fmt: skip


class DataType(Bits):
    """Type of a data segment (S = 1); bit 3 is clear."""

    ACCESSED = 1
    WRITABLE = 2
    EXPAND_DOWN = 4


class CodeType(Bits):
    """Type of a code segment (S = 1); CODE, bit 3, is always set."""

    ACCESSED = 1
    READABLE = 2
    CONFORMING = 4
    CODE = 8


class SystemType(IntEnum):
    """Type of a system descriptor (S = 0).  In long mode those of 32 bits are of 64, and those of 16 are reserved."""

    TSS16 = 1
    LDT = 2
    BUSY_TSS16 = 3
    CALL16 = 4
    TASK = 5
    INTERRUPT16 = 6
    TRAP16 = 7
    TSS = 9
    BUSY_TSS = 11
    CALL = 12
    INTERRUPT = 14
    TRAP = 15


_GATES = {4, 5, 6, 7, 12, 14, 15}
_WIDE = {0, 2, 9, 11, 12, 14, 15}  # system types that may have 16 bytes in long mode; 0 is none


def _bytes(call: str, data: object) -> bytes:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ArgumentTypeError(call, "data", data, "8 or 16 bytes")
    copy = bytes(data)
    if len(copy) not in (8, 16):
        raise ArgumentError(call, "data", copy, "8 or 16 bytes", f"{len(copy)} bytes")
    return copy


class Selector(Value):
    """What a segment register names: entry `index` of the GDT, or of the LDT with `ldt`; `rpl` 0 to 3.

    >>> int(Selector(5, rpl=3)), Selector.of(0x1F)
    (43, Selector(index=3, ldt=True, rpl=3))
    """

    index: int
    ldt: bool = False
    rpl: int = 0

    @classmethod
    def of(cls, value: int) -> Self:
        """The selector that these 16 bits are."""
        number = _number("Selector.of", "value", value, 0xFFFF)
        return cls(number >> 3, bool(number & 4), number & 3)

    def __int__(self) -> int:
        index = _number("Selector", "index", self.index, 0x1FFF)
        return index << 3 | bool(self.ldt) << 2 | _number("Selector", "rpl", self.rpl, 3)

    __index__ = __int__

    @property
    def is_null(self) -> bool:
        """Whether it names nothing: index 0 of the GDT, with any RPL."""
        return self.index == 0 and not self.ldt


class Descriptor(Value):
    """A segment descriptor: code or data (`s` 1), or LDT or TSS (`s` 0); bytes() are its 8 bytes, 16 where `wide`.

    `base`: 32 bits, 64 where `wide`.  `limit`: in bytes, up to 0xFFFFF, or up to 0xFFFFFFFF with the last 12 bits set.
    `g`: whether the limit counts pages, None: as the limit needs it.  `type`: 0 to 15, see DataType, CodeType,
    SystemType.

    ArgumentError, when it becomes bytes: a field that does not fit.

    >>> flat = Descriptor.code(32)
    >>> bytes(flat).hex(), hex(flat.limit)
    ('ffff0000009bcf00', '0xffffffff')
    >>> decode(bytes(flat)) == flat.replace(g=1)
    True
    """

    base: int = 0
    limit: int = 0
    type: int = 0
    s: int = 1
    dpl: int = 0
    present: int = 1
    avl: int = 0
    l: int = 0  # noqa: E741  # the manual's name
    db: int = 0
    g: int | None = None
    wide: bool = False

    @classmethod
    def code(cls, bits: int = 64, *, base: int = 0, limit: int = 0xFFFFFFFF, dpl: int = 0) -> Self:
        """A code segment of 16, 32 or 64 bits, readable and accessed; flat by default (16 bits: 64 KiB).

        ArgumentError: other bits.
        """
        if bits not in (16, 32, 64):
            raise ArgumentError("Descriptor.code", "bits", bits, "16, 32 or 64")
        if bits == 16 and limit == 0xFFFFFFFF:
            limit = 0xFFFF
        kind = int(CodeType.CODE | CodeType.READABLE | CodeType.ACCESSED)
        return cls(base, limit, kind, dpl=dpl, l=int(bits == 64), db=int(bits == 32))

    @classmethod
    def data(cls, bits: int = 32, *, base: int = 0, limit: int = 0xFFFFFFFF, dpl: int = 0) -> Self:
        """A data segment, writable and accessed; `bits`: 16 or 32, of its stack pointer where it is the stack.

        Flat by default (16 bits: 64 KiB).  ArgumentError: other bits.
        """
        if bits not in (16, 32):
            raise ArgumentError("Descriptor.data", "bits", bits, "16 or 32 (32 in long mode too)")
        if bits == 16 and limit == 0xFFFFFFFF:
            limit = 0xFFFF
        kind = int(DataType.WRITABLE | DataType.ACCESSED)
        return cls(base, limit, kind, dpl=dpl, db=int(bits == 32))

    @classmethod
    def tss(cls, base: int, limit: int = 0x67, *, bits: int = 64, busy: bool = False, dpl: int = 0) -> Self:
        """A task-state segment of 16, 32 or 64 bits; `limit`: its size - 1, with its I/O permission bitmap.

        ArgumentError: other bits.
        """
        if bits not in (16, 32, 64):
            raise ArgumentError("Descriptor.tss", "bits", bits, "16, 32 or 64")
        kind = int(SystemType.TSS16 if bits == 16 else SystemType.TSS) | (2 if busy else 0)
        return cls(base, limit, kind, 0, dpl, wide=bits == 64)

    @classmethod
    def ldt(cls, base: int, limit: int, *, long: bool = False) -> Self:
        """A local descriptor table; `limit`: its size - 1; with `long` as long mode has it, 16 bytes."""
        return cls(base, limit, int(SystemType.LDT), 0, wide=long)

    def replace(self, **fields: Any) -> Self:
        """The same descriptor but for these fields."""
        _known("Descriptor", type(self), fields)
        return type(self)(**{name: fields.get(name, getattr(self, name)) for name in self.fields()})

    @property
    def scaled(self) -> tuple[int, int]:
        """G, and the 20 bits that stand for the limit.  ArgumentError: there are none for it."""
        limit = _number("Descriptor", "limit", self.limit, 0xFFFFFFFF)
        pages = limit > _MAX_SMALL if self.g is None else bool(_number("Descriptor", "g", self.g, 1))
        if pages and limit & _PAGES != _PAGES:
            accepted = f"{limit | _PAGES:#x}, or up to 0xfffff without G"
            raise ArgumentError("Descriptor", "limit", limit, accepted, "it counts pages: the last 12 bits are set")
        if not pages and limit > _MAX_SMALL:
            raise ArgumentError("Descriptor", "limit", limit, "up to 0xfffff, or G set", "it counts bytes")
        return int(pages), limit >> 12 if pages else limit

    def __bytes__(self) -> bytes:
        call = "Descriptor"
        g, limit = self.scaled
        base = _number(call, "base", self.base, ALL if self.wide else 0xFFFFFFFF)
        number = limit & 0xFFFF | (base & 0xFFFFFF) << 16 | (limit >> 16) << 48 | (base >> 24 & 0xFF) << 56 | g << 55
        for field, shift, width in (("type", 40, 4), ("s", 44, 1), ("dpl", 45, 2), ("present", 47, 1), ("avl", 52, 1)):
            number |= _number(call, field, getattr(self, field), (1 << width) - 1) << shift
        number |= _number(call, "l", self.l, 1) << 53 | _number(call, "db", self.db, 1) << 54
        if not self.wide:
            return number.to_bytes(8, "little")
        if self.s or self.type not in _WIDE:
            raise ArgumentError(call, "wide", self.wide, "False", "only LDTs and TSSs of long mode have 16 bytes")
        return (number | base >> 32 << 64).to_bytes(16, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The descriptor that these 8 or 16 bytes are.  ArgumentError: it is a gate; 16 bytes, and no
        LDT or TSS, or bits 127:96 are set.
        """
        copy = _bytes("Descriptor.from_bytes", data)
        number = int.from_bytes(copy, "little")
        kind, s = number >> 40 & 15, number >> 44 & 1
        if not s and kind in _GATES:
            raise ArgumentError("Descriptor.from_bytes", "data", copy, "type 0, 1, 2, 3, 9 or 11", "it is a gate")
        wide = len(copy) == 16
        if number >> 96:
            raise ArgumentError("Descriptor.from_bytes", "data", copy, "bits 127:96 clear", "they are reserved")
        if wide and (s or kind not in _WIDE):
            raise ArgumentError("Descriptor.from_bytes", "data", copy, "8 bytes", "no LDT or TSS of long mode")
        g = number >> 55 & 1
        limit = number & 0xFFFF | (number >> 48 & 15) << 16
        base = number >> 16 & 0xFFFFFF | (number >> 56 & 0xFF) << 24 | number >> 64 << 32
        return cls(
            base,
            limit << 12 | _PAGES if g else limit,
            kind,
            s,
            number >> 45 & 3,
            number >> 47 & 1,
            number >> 52 & 1,
            number >> 53 & 1,
            number >> 54 & 1,
            g,
            wide,
        )

    def to_kvm(self, selector: int) -> dict[str, int]:
        """The fields of struct kvm_segment after this descriptor was loaded by `selector` (16 bits).

        ArgumentError: it does not become bytes.

        >>> Descriptor.data(dpl=3).to_kvm(0x2B)["dpl"]
        3
        """
        bytes(self)
        g, _ = self.scaled
        number = _number("Descriptor.to_kvm", "selector", selector, 0xFFFF)
        names = ("type", "present", "dpl", "db", "s", "l", "avl")
        found = {"base": self.base, "limit": self.limit, "selector": number}
        return found | {name: getattr(self, name) for name in names} | {"g": g, "unusable": int(not self.present)}

    @classmethod
    def from_kvm(cls, segment: Any, *, wide: bool = False) -> Self:
        """The descriptor that a segment register was loaded from: of a struct kvm_segment, or a dict of its fields.

        A limit that no descriptor has is kept, and refused when it becomes bytes.
        """
        names = ("base", "limit", "type", "s", "dpl", "present", "avl", "l", "db", "g")
        values = {name: _field("Descriptor.from_kvm", segment, name) for name in names}
        return cls(**values, wide=wide)


class Gate(Value):
    """A gate of IDT, GDT or LDT: the code at `selector`:`offset`; bytes() are its 8 bytes, 16 where it is `wide`.

    `type`: see SystemType; interrupt gates clear RFLAGS.IF; a task gate has a selector and no offset.  `dpl`: the least
    privilege that may use it by INT or CALL.
    `ist`: 64-bit, the stack of the TSS to change to, 1 to 7, or 0.  `count`: call gates of 16 and 32 bits, how many
    parameters are copied.

    ArgumentError, when it becomes bytes: a field that does not fit.

    >>> bytes(Gate(8, 0x123456789A, ist=1)).hex()
    '9a780800018e56341200000000000000'
    """

    selector: int
    offset: int
    type: int = 14
    dpl: int = 0
    present: int = 1
    ist: int = 0
    count: int = 0
    wide: bool = True

    def replace(self, **fields: Any) -> Self:
        """The same gate but for these fields."""
        _known("Gate", type(self), fields)
        return type(self)(**{name: fields.get(name, getattr(self, name)) for name in self.fields()})

    def __bytes__(self) -> bytes:
        call = "Gate"
        kind = _number(call, "type", self.type, 0xF)
        if kind not in _GATES or (self.wide and kind not in _WIDE):
            accepted = "12, 14 or 15" if self.wide else "4, 5, 6, 7, 12, 14 or 15"
            raise ArgumentError(call, "type", kind, accepted, "a gate of long mode" if self.wide else "a gate")
        bits = 64 if self.wide else 0 if kind == SystemType.TASK else 16 if kind < 8 else 32
        offset = _number(call, "offset", self.offset, (1 << bits) - 1)
        low = _number(call, "selector", self.selector, 0xFFFF) << 16 | offset & 0xFFFF
        high = (offset >> 16 & 0xFFFF) << 16 | kind << 8
        high |= _number(call, "dpl", self.dpl, 3) << 13 | _number(call, "present", self.present, 1) << 15
        if self.wide:
            if self.count:
                raise ArgumentError(call, "count", self.count, "0", "64-bit call gates copy no parameters")
            high |= _number(call, "ist", self.ist, 7)
            return (low | high << 32 | offset >> 32 << 64).to_bytes(16, "little")
        if self.ist:
            raise ArgumentError(call, "ist", self.ist, "0", "only gates of long mode have a stack of their own")
        if self.count and kind not in (SystemType.CALL16, SystemType.CALL):
            raise ArgumentError(call, "count", self.count, "0", "only call gates copy parameters")
        return (low | (high | _number(call, "count", self.count, 0x1F)) << 32).to_bytes(8, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The gate that these 8 or 16 bytes are.  ArgumentError: it is none, or reserved bits are set."""
        call = "Gate.from_bytes"
        copy = _bytes(call, data)
        number, wide = int.from_bytes(copy, "little"), len(copy) == 16
        kind = number >> 40 & 15
        if number >> 44 & 1 or kind not in _GATES or (wide and kind not in _WIDE):
            raise ArgumentError(call, "data", copy, "the type of a gate, and S clear", f"type {kind}")
        is_call = kind in (SystemType.CALL16, SystemType.CALL)
        reserved = 0xF8 << 32 | 0xFFFFFFFF << 96 if wide else (0xE0 if is_call else 0xFF) << 32
        if kind < 8:
            reserved |= 0xFFFF << 48 | (0xFFFF if kind == SystemType.TASK else 0)
        if number & reserved:
            raise ArgumentError(call, "data", copy, f"none of the bits {reserved:#x}", "reserved bits are set")
        offset = number & 0xFFFF | (number >> 48 & 0xFFFF) << 16 | number >> 64 << 32
        extra = number >> 32 & 0x1F
        return cls(
            number >> 16 & 0xFFFF,
            offset,
            kind,
            number >> 45 & 3,
            number >> 47 & 1,
            extra if wide else 0,
            0 if wide else extra,
            wide,
        )


def _known(name: str, cls: type[Value], fields: dict[str, Any]) -> None:
    for field, value in fields.items():
        if field not in cls.fields():
            raise ArgumentError(f"{name}.replace", field, value, ", ".join(cls.fields()), "there is no such field")


def decode(data: bytes) -> Descriptor | Gate:
    """What these 8 or 16 bytes of a descriptor table are.  ArgumentError: not as many, or reserved bits are set.

    >>> decode(bytes(8)).present, decode(bytes(Gate(8, 0x1000, wide=False))).offset
    (0, 4096)
    """
    copy = _bytes("decode", data)
    is_gate = not copy[5] & 0x10 and copy[5] & 15 in _GATES
    return Gate.from_bytes(copy) if is_gate else Descriptor.from_bytes(copy)


def _field(call: str, segment: Any, name: str) -> int:
    value = segment.get(name, 0) if isinstance(segment, dict) else getattr(segment, name, None)
    if not isinstance(value, int):
        raise ArgumentTypeError(call, name, value, "an int, as in struct kvm_segment")
    return value


def access_rights(segment: Any) -> int:
    """The access rights of a struct kvm_segment, or a dict of its fields, as VMX keeps them: 17 bits.

    A segment that is not present is unusable (linux:arch/x86/kvm/vmx/vmx.c vmx_segment_access_rights@v6.18).

    >>> hex(access_rights(Descriptor.code(64).to_kvm(8)))
    '0xa09b'
    """
    found = 0
    for name, (shift, width) in _RIGHTS.items():
        found |= _number("access_rights", name, _field("access_rights", segment, name), (1 << width) - 1) << shift
    return found if found >> 7 & 1 else found | _UNUSABLE


def kvm_segment(base: int, limit: int, selector: int, rights: int) -> dict[str, int]:
    """The fields of struct kvm_segment, of base, limit in bytes, selector, and access rights (17 bits).

    >>> kvm_segment(0, 0xFFFF, 0x10, 0x93)["type"]
    3
    """
    call = "kvm_segment"
    number = _number(call, "rights", rights, 0x1FFFF)
    found = {
        "base": _number(call, "base", base, ALL),
        "limit": _number(call, "limit", limit, 0xFFFFFFFF),
        "selector": _number(call, "selector", selector, 0xFFFF),
    }
    return found | {name: number >> shift & (1 << width) - 1 for name, (shift, width) in _RIGHTS.items()}


def null_segment(selector: int = 0) -> dict[str, int]:
    """The fields of struct kvm_segment of a register that was loaded with a null selector: unusable."""
    return kvm_segment(0, 0, selector, _UNUSABLE)


def real_mode_segment(selector: int, *, code: bool = False) -> dict[str, int]:
    """The fields of struct kvm_segment that real mode gives a segment register: base 16 * selector, 64 KiB.

    `code`: of CS, executable and readable, as it is after a reset.

    >>> hex(real_mode_segment(0xF000)["base"])
    '0xf0000'
    """
    number = _number("real_mode_segment", "selector", selector, 0xFFFF)
    return kvm_segment(number << 4, 0xFFFF, number, 0x9B if code else 0x93)
