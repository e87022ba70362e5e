"""Memslots: which ranges of guest physical memory are backed by which host memory.

Owns the VM's own record of its slots (the kernel cannot be asked), the lookup by gpa, and the explanation of a refused
KVM_SET_USER_MEMORY_REGION, for which the kernel says only EINVAL.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from operator import itemgetter

from .._ffi import ffi, lib, run
from ..units import PAGE_SIZE
from ..value import Value

__all__ = ["MemSlot", "explain_region"]

_first = itemgetter(0)
_USER_END = (1 << 47) - PAGE_SIZE  # of a process without LA57 addresses
_MAX_PAGES = (1 << 31) - 1
_MIN_PHYS_BITS = 36  # guest physical addresses that every host maps
_FLAGS = {"KVM_MEM_LOG_DIRTY_PAGES": 1, "KVM_MEM_READONLY": 2}


class MemSlot(Value):
    """One memslot: `slot` id (address space in bits 31:16), `gpa`, `size` in bytes, `hva`, `flags` (KVM_MEM_*)."""

    slot: int
    gpa: int
    size: int
    hva: int
    flags: int

    @property
    def end(self) -> int:
        """First gpa behind the slot."""
        return self.gpa + self.size

    @property
    def readonly(self) -> bool:
        """Whether guest writes exit as MMIO (KVM_MEM_READONLY)."""
        return bool(self.flags & 2)


class _SlotMap:
    # The slots of address space 0 in order of gpa, twice: for Python, which reads without a lock (both tuples are
    # replaced together, in one store), and for the run loop in C, which has a copy behind a lock of its own.
    def __init__(self) -> None:
        self.slots: dict[int, MemSlot] = {}
        self.native = ffi.gc(ffi.new("struct hv_slots *"), lib.hv_slots_drop)
        self._sorted: tuple[tuple[int, ...], tuple[MemSlot, ...]] = ((), ())

    def put(self, slot: MemSlot) -> None:
        self.slots[slot.slot] = slot
        self._sort()

    def drop(self, slot: int) -> None:
        if self.slots.pop(slot, None) is not None:
            self._sort()

    def _sort(self) -> None:
        ordered = sorted([(s.gpa, s) for s in self.slots.values() if s.slot < 1 << 16], key=_first)
        self._sorted = (tuple([gpa for gpa, _ in ordered]), tuple([s for _, s in ordered]))
        table = ffi.new("struct hv_slot[]", [(s.gpa, s.end, s.readonly, 0) for _, s in ordered])
        if lib.hv_slots_set(self.native, table, len(ordered)) < 0:
            raise MemoryError
        run.forget_mmio()

    def at(self, gpa: int) -> MemSlot | None:
        starts, ordered = self._sorted
        index = bisect_right(starts, gpa) - 1
        if index >= 0 and gpa < ordered[index].end:
            return ordered[index]
        return None


def explain_region(
    vm_fd: int, slots: dict[int, MemSlot], slot: int, gpa: int, size: int, hva: int, flags: int, err: int = 0
) -> tuple[str, object, str, str] | None:
    """Which field of a refused memslot is at fault: (field, value, accepted, detail), or None where none is found.

    `err`: the errno, if known; EINVAL is never an overlap.  Follows the order in which the kernel checks, but for what
    depends on the processor, which comes last.  Source:
    linux:virt/kvm/kvm_main.c kvm_set_memory_region@v6.18.
    """
    old = slots.get(slot)
    allowed = 1
    if lib.kvm_check_extension(vm_fd, lib.KVM_CAP_READONLY_MEM) > 0:
        allowed |= 2
    if flags & ~allowed:
        known = ", ".join(f"{name} ({bit})" for name, bit in _FLAGS.items() if bit & allowed)
        return "flags", flags, f"of {known}", "a flag that this ioctl does not have here"
    if size % PAGE_SIZE:
        return "size", size, f"a multiple of {PAGE_SIZE} bytes", "not a whole number of pages"
    if gpa % PAGE_SIZE:
        return "gpa", gpa, f"a multiple of {PAGE_SIZE}", "not page-aligned"
    if hva % PAGE_SIZE:
        return "hva", hva, f"a multiple of {PAGE_SIZE}", "not page-aligned"
    nr_slots = max(lib.kvm_check_extension(vm_fd, lib.KVM_CAP_NR_MEMSLOTS), 1)
    if slot >> 16:
        spaces = max(lib.kvm_check_extension(vm_fd, lib.KVM_CAP_MULTI_ADDRESS_SPACE), 1)
        if slot >> 16 >= spaces:
            return "slot", slot, f"address space (bits 31:16) below {spaces}", "no such address space"
    if slot & 0xFFFF >= nr_slots:
        return "slot", slot, f"0 to {nr_slots - 1}", "no such slot"
    if size == 0:
        if old is None:
            return "slot", slot, f"a slot that exists: {sorted(slots)}", "there is no such slot to delete"
        return ("hva", hva, "an address of this process, or 0", "not a user address") if hva > _USER_END else None
    if gpa + size >= 1 << 64:
        return "gpa", gpa, "gpa + size below 2**64", "the range wraps around"
    if size // PAGE_SIZE > _MAX_PAGES:
        return "size", size, f"up to {_MAX_PAGES} pages", "too large for one slot"
    if old is not None:
        if size != old.size:
            return "size", size, f"{old.size:#x}, as it is", "a slot cannot be resized: delete it, then make it anew"
        if hva != old.hva:
            return "hva", hva, f"{old.hva:#x}, as it is", "a slot's memory cannot be changed: delete it first"
        if (flags ^ old.flags) & 2:
            return "flags", flags, "KVM_MEM_READONLY as it is", "READONLY cannot be toggled: delete the slot first"
    for other in slots.values() if err != errno.EINVAL else ():
        if other.slot != slot and other.slot >> 16 == slot >> 16 and gpa < other.end and other.gpa < gpa + size:
            return (
                "gpa",
                gpa,
                "a range that no other slot covers",
                f"[{gpa:#x}, {gpa + size:#x}) overlaps slot {other.slot} [{other.gpa:#x}, {other.end:#x})",
            )
    # What is left depends on the processor and the vendor module: these are where the kernel refused.
    if hva + size > _USER_END:
        return "hva", hva, "an address of this process", "not a user address"
    if gpa + size > 1 << _MIN_PHYS_BITS:
        return "gpa", gpa, "a guest physical address the vendor module can map", "beyond the guest's address width"
    return None
