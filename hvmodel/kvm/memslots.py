"""Memslots: which ranges of guest physical memory are backed by which host memory.

Owns the VM's own record of its slots (the kernel cannot be asked) and the lookup by gpa.  What the kernel takes and
refuses is in `slotrules`, the change of many slots at once in `slotchange`.
"""

from __future__ import annotations

from _bisect import bisect_left, bisect_right

from .._ffi import ffi, lib, run
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..host import Mapping

__all__ = ["MemSlot", "SlotMemory"]

_ROW: int = ffi.sizeof("struct hv_slot")


class MemSlot(Value):
    """One memslot: `slot` id (address space in bits 31:16), `gpa`, `size` in bytes, `hva`, `flags` (KVM_MEM_*).

    With KVM_MEM_GUEST_MEMFD also `guest_memfd`, the descriptor it was bound by, and `guest_memfd_offset` in it.
    """

    slot: int
    gpa: int
    size: int
    hva: int
    flags: int
    guest_memfd: int | None = None
    guest_memfd_offset: int = 0

    @property
    def end(self) -> int:
        """First gpa behind the slot."""
        return self.gpa + self.size

    @property
    def readonly(self) -> bool:
        """Whether guest writes exit as MMIO (KVM_MEM_READONLY)."""
        return bool(self.flags & 2)


class SlotMemory(Value):
    """What a new slot is to be made of: `size` bytes of `memory` from `offset` on, at `gpa`, with `flags` (KVM_MEM_*).

    `memory` is a hvmodel.host.Mapping; all but the flags are whole pages.
    """

    gpa: int
    memory: Mapping
    offset: int
    size: int
    flags: int = 0


class _SlotMap:
    # The slots of address space 0 in order of gpa, twice: for Python, which reads without a lock (both lists are
    # replaced together, in one store, and never changed), and for the run loop in C, which has a copy behind a lock of
    # its own.
    def __init__(self) -> None:
        self.slots: dict[int, MemSlot] = {}
        self.native = ffi.gc(ffi.new("struct hv_slots *"), lib.hv_slots_drop)
        self._sorted: tuple[list[int], list[MemSlot]] = ([], [])
        self._table = bytearray()  # the same, as an array of struct hv_slot

    def put(self, slot: MemSlot) -> None:
        self.replace(self.slots | {slot.slot: slot}, (slot.slot,))

    def drop(self, slot: int) -> None:
        if slot in self.slots:
            slots = self.slots.copy()
            del slots[slot]
            self.replace(slots, (slot,))

    def replace(self, slots: dict[int, MemSlot], ids: Iterable[int]) -> None:
        # By a dict in which no more than these ids differ.  They are taken out of the order, and put into it: to sort
        # and to pack all would be what costs.
        ids = set(ids)
        gone = [self.slots[id] for id in ids if id in self.slots]
        come = [slots[id] for id in ids if id in slots]
        gpas, ordered, table = self._sorted[0].copy(), self._sorted[1].copy(), self._table.copy()
        for entry in gone:
            if entry.slot < 1 << 16:
                at = bisect_left(gpas, entry.gpa)
                del gpas[at], ordered[at], table[at * _ROW : (at + 1) * _ROW]
        come = [entry for entry in come if entry.slot < 1 << 16]
        if len(come) > 64:
            ordered = sorted(ordered + come, key=lambda entry: entry.gpa)
            gpas = [entry.gpa for entry in ordered]
            table = bytearray(b"".join([_row(entry) for entry in ordered]))
        else:
            for entry in come:
                at = bisect_left(gpas, entry.gpa)
                gpas.insert(at, entry.gpa)
                ordered.insert(at, entry)
                table[at * _ROW : at * _ROW] = _row(entry)
        if lib.hv_slots_set(self.native, ffi.from_buffer("struct hv_slot[]", table), len(ordered)) < 0:
            raise MemoryError
        self.slots, self._sorted, self._table = slots, (gpas, ordered), table
        run.forget_mmio()

    def at(self, gpa: int) -> MemSlot | None:
        starts, ordered = self._sorted
        index = bisect_right(starts, gpa) - 1
        if index >= 0 and gpa < ordered[index].end:
            return ordered[index]
        return None


def _row(slot: MemSlot) -> bytes:
    # struct hv_slot: start, end, readonly, padding.
    return (slot.gpa | slot.end << 64 | slot.readonly << 128).to_bytes(_ROW, "little")
