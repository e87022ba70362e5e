"""Accesses: how a read or a write of an address space reaches RAM, or the callbacks of a region.

    RAM, ROM, rom_device in romd mode    read from the block, up to the end of the range
    RAM                                  written to the block; a read-only one drops the write
    everything else                      cut into accesses of 1, 2, 4 or 8 bytes: at most valid_max (4, if that is 0),
                                         at most what is left, and aligned in the region unless impl_unaligned
      not valid (see MemoryRegionOps)    MEMTX_DECODE_ERROR, reads as 0
      smaller than impl_min              one callback of impl_min bytes, of which the low ones count
      larger than impl_max               callbacks of impl_max bytes each, put together by the region's endianness
    nothing                              MEMTX_DECODE_ERROR, reads as 0, in accesses of up to 4 bytes

An access to registers is not cut at the end of a range: a 4-byte access to port 0xCF8 is one of the PCI host even
where another device has 0xCF9.  The results of all pieces are or-ed.  What a decode error means, open bus or an error,
is up to who made the access.

Where QEMU's address_space_write differs: a write to ROM is a decode error there and dropped without one here, as by the
CPU; and through a read-only alias or container it goes into the RAM (so that a DMA, and under KVM a CPU, can write to
a BIOS that PAM protects), where its CPU in software drops it, as does this.

Source: flatview_read_continue, flatview_write_continue, memory_access_size, softmmu/physmem.c@v7.2 of QEMU;
memory_region_access_valid, memory_region_dispatch_read and _write, access_with_adjusted_size, softmmu/memory.c@v7.2.
"""

from __future__ import annotations

from ..errors import ArgumentError, ArgumentTypeError, HostError, HvError
from ..host.mapping import index
from ..units import MiB
from .region import _UNASSIGNED, ADDRESS_END

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

    from typing_extensions import Buffer

    from .block import RamBlock
    from .flatview import FlatView
    from .region import MemoryRegion, MemoryRegionOps

__all__ = ["MEMTX_DECODE_ERROR", "MEMTX_ERROR", "MEMTX_OK", "MemTxError", "load", "read", "store", "write", "write_rom"]

MEMTX_OK = 0
"""Every part of an access was served."""
MEMTX_ERROR = 1 << 0
"""A region's callback refused a part of it."""
MEMTX_DECODE_ERROR = 1 << 1
"""Nobody is there for a part of it, or a region does not let accesses of that size or alignment through."""

_RESULTS = {MEMTX_ERROR: "MEMTX_ERROR", MEMTX_DECODE_ERROR: "MEMTX_DECODE_ERROR"}
_LARGE = 64 * MiB  # from here on it is asked whether there is memory for a copy


class MemTxError(HvError):
    """An access failed: `call`, `addr`, `size`, `result` (MEMTX_ERROR, MEMTX_DECODE_ERROR or both).

    A region's callback raises it to refuse an access; the result of that becomes one of the access as a whole.
    """

    def __init__(self, call: str, addr: int, size: int, result: int = MEMTX_ERROR) -> None:
        self.call, self.addr, self.size, self.result = call, addr, size, result
        names = "|".join([name for bit, name in _RESULTS.items() if result & bit]) or str(result)
        super().__init__(f"{call}: not all of the {size:#x} bytes at {addr:#x} could be accessed: {names}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.addr, self.size, self.result)


def load(view: FlatView, addr: int, size: int) -> tuple[int, int]:
    """Reads `size` bytes, 1 to 8, at `addr`: their value, little-endian, and a MEMTX_ result.

    >>> from hvmodel.ram.flatview import render
    >>> from hvmodel.ram.region import MemoryRegion, MemoryRegionOps
    >>> seen = []
    >>> ops = MemoryRegionOps(read=lambda addr, size: seen.append((addr, size)) or addr)
    >>> value, result = load(render(MemoryRegion.io("registers", 16, ops)), 1, 7)
    >>> f"{value:014x}", result, seen
    ('00000004000201', 0, [(1, 1), (2, 2), (4, 4)])
    """
    addr, size = _range(addr, size, "load")
    if not 1 <= size <= 8:
        raise ArgumentError("load", "size", size, "1 to 8 bytes")
    row = view._row(addr)
    if row is not None and not row[2]._ram:
        region, offset = row[2], addr - row[0] + row[3]
        if _access_size(region._ops, size, offset) == size and not (region._rom_device and row[5]):
            return _read_region(region, offset, size)
    data, result = read(view, addr, size)
    return int.from_bytes(data, "little"), result


def store(view: FlatView, addr: int, value: int, size: int) -> int:
    """Writes the low `size` bytes, 1 to 8, of `value` at `addr`, little-endian; gives a MEMTX_ result."""
    addr, size = _range(addr, size, "store")
    if not 1 <= size <= 8:
        raise ArgumentError("store", "size", size, "1 to 8 bytes")
    value = index(value, "store", "value") & ((1 << 8 * size) - 1)
    row = view._row(addr)
    if row is not None and not row[2]._ram:
        region, offset = row[2], addr - row[0] + row[3]
        if _access_size(region._ops, size, offset) == size:
            return _write_region(region, offset, value, size)
    return write(view, addr, value.to_bytes(size, "little"))


def read(view: FlatView, addr: int, size: int) -> tuple[bytes, int]:
    """Reads [addr, addr + size): the bytes, 0 where a part failed, and a MEMTX_ result.

    ArgumentError: the range does not end at 2**64 or before.  HostError (ENOMEM): more than this host or cgroup has
    memory for.  Raises what callbacks raise (but MemTxError) and RamBlock.read: ClosedError.
    """
    addr, size = _range(addr, size, "read")
    row = view._row(addr)
    if row is not None and row[2]._ram and addr + size <= row[0] + row[1]:
        return _block(row[2]).read(addr - row[0] + row[3], size), MEMTX_OK
    if size >= _LARGE:
        _check_memory(addr, size)
    parts: list[bytes] = []
    result, end = MEMTX_OK, addr + size
    while addr < end:
        row = view._row(addr)
        if row is None:
            length = _hole(view, addr, end)
            parts.append(bytes(length))
            result |= MEMTX_DECODE_ERROR
        else:
            start, room, region, offset = row[:4]
            offset += addr - start
            if region._ram or (region._rom_device and row[5]):
                length = min(end, start + room) - addr
                parts.append(_block(region).read(offset, length))
            else:
                length = _access_size(region._ops, end - addr, offset)
                value, failed = _read_region(region, offset, length)
                parts.append(value.to_bytes(length, "little"))
                result |= failed
        addr += length
    return parts[0] if len(parts) == 1 else b"".join(parts), result


def write(view: FlatView, addr: int, data: Buffer) -> int:
    """Writes `data` at `addr`; gives a MEMTX_ result.

    Raises as `read` does, but needs no memory; what comes before the piece that raises is written by then.
    """
    left = _buffer(data, "write")
    addr, size = _range(addr, left.nbytes, "write")
    result, end = MEMTX_OK, addr + size
    while addr < end:
        row = view._row(addr)
        if row is None:
            length = _hole(view, addr, end)
            result |= MEMTX_DECODE_ERROR
        else:
            start, room, region, offset, readonly = row[:5]
            offset += addr - start
            if region._ram:
                length = min(end, start + room) - addr
                if not readonly:
                    _block(region).write(offset, left[:length])
            else:
                length = _access_size(region._ops, end - addr, offset)
                result |= _write_region(region, offset, int.from_bytes(left[:length], "little"), length)
        addr += length
        left = left[length:]
    return result


def write_rom(view: FlatView, addr: int, data: Buffer) -> None:
    """Writes `data` at `addr` where there is RAM, ROM, or a rom_device in romd mode; leaves out what is neither."""
    left = _buffer(data, "write_rom")
    addr, size = _range(addr, left.nbytes, "write_rom")
    for start, room, region, offset, _, romd, *_ in view._rows:
        first, last = max(start, addr), min(start + room, addr + size)
        if first < last and (region._ram or (region._rom_device and romd)):
            _block(region).write(offset + first - start, left[first - addr : last - addr])


def _range(addr: SupportsIndex, size: SupportsIndex, call: str) -> tuple[int, int]:
    addr, size = index(addr, call, "addr"), index(size, call, "size")
    if not 0 <= addr < ADDRESS_END:
        raise ArgumentError(call, "addr", addr, "0 to 2**64 - 1")
    if not 0 <= size <= ADDRESS_END - addr:
        raise ArgumentError(call, "size", size, f"0 to {ADDRESS_END - addr:#x} bytes: addr + size is at most 2**64")
    return addr, size


def _buffer(data: Buffer, call: str) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError:
        raise ArgumentTypeError(call, "data", data, "bytes or another buffer") from None
    if not view.c_contiguous:
        raise ArgumentError(call, "data", data, "a C-contiguous buffer")
    return view.cast("B")


def _check_memory(addr: int, size: int) -> None:
    from errno import ENOMEM

    from ..host.limits import available_memory

    room = available_memory() // 2  # for the pieces, and for what they are joined to
    if size > room:
        raise HostError(ENOMEM, "read", "size", size, f"at most {room:#x} bytes, half of what is left", f"{addr=:#x}")


def _block(region: MemoryRegion) -> RamBlock:
    block = region._block
    assert block is not None  # of a region that is RAM or a rom_device
    return block


# Bytes from `addr`, where nothing is, that are read or written as nothing: what accesses of up to 4 bytes, aligned,
# reach from there on.  The last of them may go beyond the hole.
def _hole(view: FlatView, addr: int, end: int) -> int:
    length = _access_size(_UNASSIGNED, end - addr, addr)
    if length == 4:
        return min(end, view._next(addr)) - addr & -4 or length
    return length


# The next piece of an access of `left` bytes.  Source: memory_access_size.
def _access_size(ops: MemoryRegionOps, left: int, offset: int) -> int:
    largest = ops.valid_max or 4
    if not ops.impl_unaligned:
        alignment = offset & -offset
        if alignment and alignment < largest:
            largest = alignment
    if left > largest:
        return largest
    return 1 << left.bit_length() - 1


# Source: memory_region_access_valid.
def _valid(ops: MemoryRegionOps, offset: int, size: int, is_write: bool) -> bool:
    if ops.accepts is not None and not ops.accepts(offset, size, is_write):
        return False
    if not ops.valid_unaligned and offset & (size - 1):
        return False
    return not ops.valid_max or ops.valid_min <= size <= ops.valid_max


# The value of an access of 1, 2, 4 or 8 bytes, and a result.  Source: access_with_adjusted_size.
def _read_region(region: MemoryRegion, offset: int, size: int) -> tuple[int, int]:
    ops = region._ops
    callback = ops.read
    if callback is None or not _valid(ops, offset, size, False):
        return 0, MEMTX_DECODE_ERROR
    step = max(min(size, ops.impl_max or 4), ops.impl_min or 1)
    big = ops.endianness == "big"
    value, result = 0, MEMTX_OK
    for done in range(0, size, step):
        try:
            part = index(callback(offset + done, step), f"read of {region._name}", "its value")
        except MemTxError as error:
            result |= error.result
            continue
        part &= (1 << 8 * step) - 1
        if not big:
            value |= part << 8 * done
        elif step <= size:
            value |= part << 8 * (size - step - done)
        else:
            value |= part >> 8 * (step - size)
    value &= (1 << 8 * size) - 1
    if big:
        value = int.from_bytes(value.to_bytes(size, "big"), "little")
    return value, result


def _write_region(region: MemoryRegion, offset: int, value: int, size: int) -> int:
    ops = region._ops
    callback = ops.write
    if callback is None or not _valid(ops, offset, size, True):
        return MEMTX_DECODE_ERROR
    step = max(min(size, ops.impl_max or 4), ops.impl_min or 1)
    big = ops.endianness == "big"
    if big:
        value = int.from_bytes(value.to_bytes(size, "little"), "big")
    result = MEMTX_OK
    for done in range(0, size, step):
        if not big:
            part = value >> 8 * done
        elif step <= size:
            part = value >> 8 * (size - step - done)
        else:
            part = value << 8 * (step - size)
        try:
            callback(offset + done, part & ((1 << 8 * step) - 1), step)
        except MemTxError as error:
            result |= error.result
    return result
