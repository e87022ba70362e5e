"""Descriptor tables, task-state segments and interrupt vectors, built: what a processor reads from memory, as bytes.

    DescriptorTable    GDT or LDT: segment descriptors of 8 bytes, system descriptors of 16 in long mode
    Idt                gates by vector: 16- and 32-bit gates of 8 bytes, 64-bit ones of 16
    Ivt                real mode's interrupt vectors: offset and segment, 2 bytes each
    tss16, tss32, tss64    a task-state segment, the latter two with an I/O permission bitmap

Each gives its bytes by `bytes()`; the limit that goes with a table into GDTR, IDTR, LDTR or TR is their number - 1.

A task-state segment, by offset:

          16-bit                          32-bit                          64-bit
    0x00  link                            link                            -
    0x02  sp0, ss0, sp1, ss1, sp2, ss2    0x04 esp0, ss0, esp1, ss1, ...  0x04 rsp0, rsp1, rsp2 (8 bytes each)
    0x0e  ip, flags                       0x1c cr3, eip, eflags           0x24 ist1 ... ist7 (8 bytes each)
    0x12  ax ... di                       0x28 eax ... edi
    0x22  es, cs, ss, ds, ldt             0x48 es, cs, ss, ds, fs, gs, ldt
    0x2c                                  0x64 trap (bit 0), 0x66 iomap   0x66 iomap
    0x68                                  I/O permission bitmap           I/O permission bitmap

A port is open to code above IOPL, and to virtual-8086 mode, where its bit in the bitmap is 0.  The processor reads the
bits of a port and of the next one as a word: a byte of ones follows the bitmap.  Ports beyond the limit are closed.

Sources: Intel SDM vol. 3 sections 3.5 (descriptor tables), 7.10 to 7.14 (IDT, gates), 8.2.1 (32-bit TSS), 8.6 (16-bit
TSS), 8.7 (64-bit TSS), 21.1.4 (IVT); vol. 1 section 20.5.2 (I/O permission bitmap).
"""

from __future__ import annotations

from ..errors import ArgumentError, ArgumentTypeError
from .number import number
from .segment import Gate, SystemType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal, SupportsBytes

    Ports = bool | Iterable[int | range]

__all__ = ["DescriptorTable", "Idt", "Ivt", "io_bitmap", "tss16", "tss32", "tss64"]

_VECTORS = 256
_PORTS = 0x10000


# ---- task-state segments ----

# (name, offset, bytes)
_TSS16 = tuple(
    (name, 2 * at, 2)
    for at, name in enumerate(
        "link sp0 ss0 sp1 ss1 sp2 ss2 ip flags ax cx dx bx sp bp si di es cs ss ds ldt".split()  # noqa: SIM905
    )
)
_TSS32 = (
    ("link", 0, 2),
    *((f"esp{n}", 4 + 8 * n, 4) for n in range(3)),
    *((f"ss{n}", 8 + 8 * n, 2) for n in range(3)),
    *(
        (name, 0x1C + 4 * at, 4)
        for at, name in enumerate(("cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"))
    ),
    *((name, 0x48 + 4 * at, 2) for at, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs", "ldt"))),
    ("trap", 0x64, 2),
)
_TSS64 = (
    *((f"rsp{n}", 4 + 8 * n, 8) for n in range(3)),
    *((f"ist{n}", 0x24 + 8 * (n - 1), 8) for n in range(1, 8)),
)
_IOMAP = 0x66  # where both have the bitmap's offset
_TSS_SIZE = 0x68


def tss16(**fields: int) -> bytes:
    """A 16-bit task-state segment, 44 bytes; `fields` as the module's text names them, 0 by default.

    ArgumentError: no such field, or a value that does not fit it.  ArgumentTypeError: not an int.

    >>> tss16(sp0=0x7C00, ss0=0x10).hex(" ", 2)[:14]
    '0000 007c 1000'
    """
    return bytes(_tss("tss16", _TSS16, _TSS16[-1][1] + 2, fields))


def tss32(ports: Ports = False, **fields: int) -> bytes:
    """A 32-bit task-state segment, 104 bytes and the I/O permission bitmap; `fields` as the module's text names them.

    `ports`: those that are open, see io_bitmap().  ArgumentError: no such field, or a value that does not fit it.

    >>> tss = tss32(esp0=0x9000, ss0=0x10, ports=[0x10])
    >>> tss[4:10].hex(" ", 2), tss[0x66:].hex(" ", 2)
    ('0090 0000 1000', '6800 ffff feff')
    """
    return _with_ports(_tss("tss32", _TSS32, _TSS_SIZE, fields), "tss32", ports)


def tss64(ports: Ports = False, **fields: int) -> bytes:
    """A 64-bit task-state segment, 104 bytes and the I/O permission bitmap; `fields`: rsp0 to rsp2, ist1 to ist7.

    `ports`: those that are open, see io_bitmap().  ArgumentError: no such field, or a value that does not fit it.

    >>> len(tss64(rsp0=0xFFFF_8000_0000_0000)), len(tss64(ports=True))
    (104, 8297)
    """
    return _with_ports(_tss("tss64", _TSS64, _TSS_SIZE, fields), "tss64", ports)


def _tss(call: str, layout: tuple[tuple[str, int, int], ...], size: int, fields: dict[str, int]) -> bytearray:
    data = bytearray(size)
    places = {name: (offset, width) for name, offset, width in layout}
    for name, value in fields.items():
        if name not in places:
            raise ArgumentError(call, name, value, ", ".join(places), "there is no such field")
        offset, width = places[name]
        number(call, name, value, (1 << 8 * width) - 1)
        data[offset : offset + width] = value.to_bytes(width, "little")
    return data


def _with_ports(data: bytearray, call: str, ports: Ports) -> bytes:
    bitmap = io_bitmap(ports, call)
    data[_IOMAP:] = _TSS_SIZE.to_bytes(2, "little")  # of no bitmap: the first offset beyond the limit
    return bytes(data) + bitmap


def io_bitmap(ports: Ports, call: str = "io_bitmap") -> bytes:
    """An I/O permission bitmap, with the byte of ones behind it: up to the last open port, b"" where none is open.

    `ports`: True for all, False for none, or ports and ranges of ports, 0 to 0xffff.
    ArgumentError, ArgumentTypeError: what is no port.

    >>> io_bitmap([0, range(8, 16)]).hex(" ")
    'fe 00 ff'
    """
    if isinstance(ports, bool):
        return bytes(_PORTS // 8) + b"\xff" if ports else b""
    try:
        rows = list(ports)
    except TypeError:
        raise ArgumentTypeError(call, "ports", ports, "True, False, or ports and ranges of ports") from None
    bitmap, size = bytearray(b"\xff" * (_PORTS // 8)), 0
    for at, row in enumerate(rows):
        field = f"ports[{at}]"
        if not isinstance(row, range):
            number(call, field, row, _PORTS - 1)
        elif row and not (0 <= row[0] < _PORTS and 0 <= row[-1] < _PORTS):
            raise ArgumentError(call, field, row, f"ports: 0 to {_PORTS - 1:#x}")
        for port in row if isinstance(row, range) else (row,):
            bitmap[port // 8] &= ~(1 << port % 8)
            size = max(size, port // 8 + 1)
    return bytes(bitmap[:size]) + b"\xff" if size else b""


# ---- descriptor tables ----


class DescriptorTable:
    """A GDT or an LDT that grows: `add()` gives each descriptor the next place and answers with its selector.

    A descriptor is bytes, or an object that has them, 8 or (a system descriptor of long mode) 16; see
    hvmodel.arch.segment.  `ldt`: the selectors have TI, and place 0 may be used; a GDT begins with the null descriptor,
    whose place it is.  Its bytes are the table, `len(bytes(table)) - 1` is its limit.

    Thread safety: one thread at a time.

    >>> gdt = DescriptorTable()
    >>> hex(gdt.add(bytes.fromhex("ffff0000009bcf00")))         # flat 32-bit code
    '0x8'
    >>> len(bytes(gdt)), gdt.limit
    (16, 15)
    """

    def __init__(self, *, ldt: bool = False) -> None:
        self._ti = 4 * bool(ldt)
        self._data = bytearray() if ldt else bytearray(8)

    @property
    def limit(self) -> int:
        """What goes into the limit of GDTR or LDTR: the number of bytes - 1.  An empty LDT has none: -1."""
        return len(self._data) - 1

    def add(self, descriptor: SupportsBytes | bytes, rpl: int = 0) -> int:
        """Append a descriptor; its selector, with `rpl`.

        ArgumentError: not 8 or 16 bytes, `rpl` above 3, the table has its 65536 bytes.  ArgumentTypeError.
        """
        call = "DescriptorTable.add"
        data = _descriptor(call, descriptor)
        number(call, "rpl", rpl, 3)
        if len(self._data) + len(data) > 0x10000:
            raise ArgumentError(call, "descriptor", data, "up to 8192 places of 8 bytes", "the table is full")
        selector = len(self._data) | self._ti | rpl
        self._data += data
        return selector

    def set(self, selector: int, descriptor: SupportsBytes | bytes) -> None:
        """Put a descriptor in the place of `selector` (RPL and TI do not count); the table grows up to there.

        ArgumentError: as add(), place 0 of a GDT, a selector above 0xffff.  ArgumentTypeError.
        """
        call = "DescriptorTable.set"
        data = _descriptor(call, descriptor)
        number(call, "selector", selector, 0xFFFF)
        at = selector & ~7
        if at == 0 and not self._ti:
            raise ArgumentError(call, "selector", selector, "8 to 0xffff", "the first place of a GDT is never used")
        if at + len(data) > 0x10000:
            raise ArgumentError(call, "selector", selector, f"up to {0x10000 - len(data):#x}")
        self._data += bytes(max(0, at + len(data) - len(self._data)))
        self._data[at : at + len(data)] = data

    def __bytes__(self) -> bytes:
        return bytes(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"<DescriptorTable {'LDT' if self._ti else 'GDT'}, {len(self._data)} bytes>"


def _descriptor(call: str, descriptor: object) -> bytes:
    if isinstance(descriptor, int | str) or not hasattr(descriptor, "__bytes__"):
        raise ArgumentTypeError(call, "descriptor", descriptor, "8 or 16 bytes, or an object that has them")
    data = bytes(descriptor)
    if len(data) not in (8, 16):
        raise ArgumentError(call, "descriptor", data, "8 or 16 bytes", f"{len(data)} bytes")
    return data


# ---- interrupt descriptor and vector tables ----

# Those of 16 bits; with bit 3, of 32 or 64.
_GATES = {"interrupt": int(SystemType.INTERRUPT16), "trap": int(SystemType.TRAP16)}
_IDT_BITS = (16, 32, 64)


class Idt:
    """An interrupt descriptor table with 16-, 32- or 64-bit gates (`bits`); see hvmodel.arch.segment.Gate.

    `vectors`: how many it has room for, 1 to 256; those without a gate are not present (#NP, or a double fault).

    Thread safety: one thread at a time.

    >>> idt = Idt(64)
    >>> idt.gate(14, 0xFFFF_8000_1234_5678, 0x08, ist=1)
    >>> bytes(idt)[14 * 16 : 15 * 16].hex(" ", 2)
    '7856 0800 018e 3412 0080 ffff 0000 0000'
    """

    def __init__(self, bits: Literal[16, 32, 64], vectors: int = _VECTORS) -> None:
        if bits not in _IDT_BITS or not isinstance(bits, int):
            raise ArgumentError("Idt", "bits", bits, "16, 32 or 64")
        number("Idt", "vectors", vectors, _VECTORS, 1)
        self._bits, self._width = bits, 16 if bits == 64 else 8
        self._data = bytearray(vectors * self._width)

    @property
    def bits(self) -> int:
        """What its gates are: 16, 32 or 64 bits."""
        return self._bits

    @property
    def limit(self) -> int:
        """What goes into the limit of IDTR: the number of bytes - 1."""
        return len(self._data) - 1

    def gate(
        self,
        vector: int,
        offset: int,
        selector: int,
        *,
        kind: Literal["interrupt", "trap"] = "interrupt",
        dpl: int = 0,
        ist: int = 0,
    ) -> None:
        """Let `vector` lead to `selector`:`offset`.

        `kind`: "interrupt" clears RFLAGS.IF, "trap" does not.  `dpl`: the least privileged CPL whose INT n may use it.
        `ist`: in 64-bit mode the stack of the TSS to change to, 1 to 7; 0: none, or RSP0 to RSP2 by the privilege.

        ArgumentError: a number out of its range (`offset` has `bits` bits, `ist` is of 64 bits only); no such vector.
        """
        call = "Idt.gate"
        self._check_vector(call, vector)
        number(call, "offset", offset, (1 << self._bits) - 1)
        number(call, "selector", selector, 0xFFFF)
        if kind not in _GATES:
            raise ArgumentError(call, "kind", kind, '"interrupt" or "trap"')
        number(call, "dpl", dpl, 3)
        number(call, "ist", ist, 7 if self._bits == 64 else 0)
        wide = self._bits == 64
        gate_type = _GATES[kind] if self._bits == 16 else _GATES[kind] | 8
        data = bytes(Gate(selector, offset, gate_type, dpl, ist=ist, wide=wide))
        self._put(vector, data)

    def task_gate(self, vector: int, selector: int, *, dpl: int = 0) -> None:
        """Let `vector` switch to the task whose TSS `selector` names.  ArgumentError: as gate(), and 64-bit tables."""
        call = "Idt.task_gate"
        self._check_vector(call, vector)
        number(call, "selector", selector, 0xFFFF)
        number(call, "dpl", dpl, 3)
        if self._bits == 64:
            raise ArgumentError(call, "bits", self._bits, "16 or 32", "long mode has no task gates")
        self._put(vector, bytes(Gate(selector, 0, SystemType.TASK, dpl, wide=False)))

    def clear(self, vector: int) -> None:
        """Take the gate of `vector` away: it is not present.  ArgumentError: no such vector."""
        self._check_vector("Idt.clear", vector)
        self._put(vector, bytes(self._width))

    def _check_vector(self, call: str, vector: object) -> None:
        number(call, "vector", vector, len(self._data) // self._width - 1)

    def _put(self, vector: int, data: bytes) -> None:
        self._data[vector * self._width : (vector + 1) * self._width] = data

    def __bytes__(self) -> bytes:
        return bytes(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        gates = range(len(self._data) // self._width)
        present = sum(self._data[at * self._width + 5] >> 7 for at in gates)
        return f"<Idt {self._bits}-bit, {len(gates)} vectors, {present} gates>"


class Ivt:
    """Real mode's interrupt vector table, 1024 bytes, which the processor expects at address 0 (at IDTR's base).

    Thread safety: one thread at a time.

    >>> ivt = Ivt()
    >>> ivt.set(0x10, 0xF000, 0x1234)
    >>> bytes(ivt)[0x40:0x44].hex(" ", 2)
    '3412 00f0'
    """

    def __init__(self) -> None:
        self._data = bytearray(4 * _VECTORS)

    @property
    def limit(self) -> int:
        """What goes into the limit of IDTR: 0x3ff."""
        return len(self._data) - 1

    def set(self, vector: int, cs: int, ip: int) -> None:
        """Let `vector` (0 to 255) lead to `cs`:`ip`.  ArgumentError: a number out of its range.  ArgumentTypeError."""
        number("Ivt.set", "vector", vector, _VECTORS - 1)
        number("Ivt.set", "cs", cs, 0xFFFF)
        number("Ivt.set", "ip", ip, 0xFFFF)
        self._data[4 * vector : 4 * vector + 4] = (cs << 16 | ip).to_bytes(4, "little")

    def __bytes__(self) -> bytes:
        return bytes(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        nr = sum(any(self._data[at : at + 4]) for at in range(0, len(self._data), 4))
        return f"<Ivt, {nr} vectors>"


# ---- arguments ----
