"""From a flat view to memslots: `KvmMemoryListener` follows an address space and keeps the slots of a VM in step.

    section of the flat view                    memslot
    ram                                         read-write
    rom; rom_device in romd mode                KVM_MEM_READONLY
    io; rom_device not in romd mode             none: every access exits
    dirty_log_mask of the region not 0          KVM_MEM_LOG_DIRTY_PAGES besides

    section    |--|=====|=====|=====|-|         from its first page boundary to its last: KVM maps whole pages.
    slot          |=================|           The ends, and sections without a boundary pair, exit.

All that a transaction changes is collected, and done at its commit: deletions, then changes of flags, then additions,
each with the first free id.  A slot that stays as it is gets no ioctl.

Source: kvm_align_section, kvm_mem_flags, kvm_set_phys_mem, kvm_region_commit, accel/kvm/kvm-all.c@v10.1 of QEMU.
"""

from __future__ import annotations

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError
from ..kvm.memslots import MemSlot, SlotMemory
from ..kvm.vm import Vm
from ..units import PAGE_SIZE
from .listener import MemoryListener, MemoryRegionSection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .address_space import AddressSpace
    from .region import MemoryRegion

    Key = tuple[int, int, MemoryRegion, int]

__all__ = ["KvmMemoryListener", "align_section"]

_LOG_DIRTY, _READONLY = 1, 2  # KVM_MEM_*


def align_section(start: int, size: int) -> tuple[int, int]:
    """The whole pages of [start, start + size): (gpa, size) with gpa the page boundary at or behind start; size may
    be 0.

    >>> [(hex(gpa), hex(size)) for gpa, size in (align_section(0xF00, 0x2200), align_section(0x10, 0x1FE0))]
    [('0x1000', '0x2000'), ('0x1000', '0x0')]
    """
    gpa = (start + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
    if gpa - start > size:
        return gpa, 0
    return gpa, (size - (gpa - start)) // PAGE_SIZE * PAGE_SIZE


class KvmMemoryListener(MemoryListener):
    """Keeps the memslots of `vm` in address space `address_space_id` as the flat view of an AddressSpace.

    `space.add_listener(listener)` makes the slots, `space.remove_listener(listener)` deletes them; it can be added to
    one space at a time.  Slots that were set by hand stay as they are, and their ids are not used.  The mapping of a
    block that is in a slot is pinned: closing it raises BusyError.  Once the VM is closed, changes are no longer
    followed.

    `take_log(slot, bitmap)`, if given, gets what KVM has logged of a slot (see Vm.get_dirty_log) before it is deleted;
    QEMU does so, and for what a running vCPU writes in between, it is too late there too.

    `readonly_sections`: QEMU gives a slot KVM_MEM_READONLY where the region is read-only, not where it only shows
    through a read-only alias or container; so, under QEMU with KVM, a guest can write to the shadowed BIOS that its PAM
    registers protect.  False does as QEMU does; True makes the slots of read-only sections read-only, as they are on
    the board.

    A change that cannot be made raises in the thread that changes the topology, with the slots as they were before it:
    ArgumentError where the VM would need more slots, or a slot more pages, than KVM has (before any ioctl); ClosedError
    for a closed block; else the KvmError of the slot that the kernel refused, which names the field.

    Calls: KVM_SET_USER_MEMORY_REGION (and KVM_GET_DIRTY_LOG for `take_log`).
    Threads: under the lock of the memory API.  A vCPU that runs while slots are replaced at its addresses may exit
    there, as where no memory is; QEMU holds all vCPUs meanwhile.
    """

    priority = 10

    def __init__(
        self,
        vm: Vm,
        address_space_id: int = 0,
        *,
        readonly_sections: bool = False,
        take_log: Callable[[MemSlot, bytearray], object] | None = None,
    ) -> None:
        call = "KvmMemoryListener"
        if not isinstance(vm, Vm):
            raise ArgumentTypeError(call, "vm", vm, "a Vm")
        if isinstance(address_space_id, bool) or not isinstance(address_space_id, int):
            raise ArgumentTypeError(call, "address_space_id", address_space_id, "an int")
        spaces = max(vm.check_extension(lib.KVM_CAP_MULTI_ADDRESS_SPACE), 1) if address_space_id else 1
        if not 0 <= address_space_id < spaces:
            detail = f"KVM_CAP_MULTI_ADDRESS_SPACE is {spaces}"
            raise ArgumentError(call, "address_space_id", address_space_id, f"below {spaces}", detail)
        self.vm, self.address_space_id = vm, address_space_id
        self._readonly_sections, self._take_log = bool(readonly_sections), take_log
        self._space: AddressSpace | None = None
        self._sections: dict[Key, MemoryRegionSection] = {}  # as told, of those that can have a slot
        self._slots: dict[Key, MemSlot] = {}  # as made, by us
        self._touched: dict[Key, MemoryRegionSection | None] = {}  # since the last commit, with what was there then

    # ---- what is asked of it ----

    @property
    def memslots(self) -> tuple[MemSlot, ...]:
        """The slots that it has made, by gpa."""
        return tuple(sorted(self._slots.values(), key=lambda slot: slot.gpa))

    def has_memory(self, space: AddressSpace, start: int, size: int) -> bool:
        """Whether it follows `space` and one of its slots is exactly [start, start + size).

        What `info mtree -f` marks with "KVM": `info_mtree(..., kvm_backed=listener.has_memory)`.
        """
        slots = self._slots.values() if space is self._space else ()
        return any(slot.gpa == start and slot.size == size for slot in slots)

    def section_of(self, slot: int) -> MemoryRegionSection | None:
        """The section that slot number `slot` was made of, or None where it is not one of its slots."""
        for key, entry in self._slots.items():
            if entry.slot == slot:
                return self._sections.get(key)
        return None

    # ---- what it is told ----

    def begin(self) -> None:
        """Forgets what it was told of a change that did not come to its commit."""
        self._forget()

    def region_add(self, section: MemoryRegionSection) -> None:
        """Notes the section, which may need a slot.  ArgumentError: it is of a second address space."""
        if self._space is not section.address_space:
            if self._space is not None and self._sections:
                why = f"it follows {self._space!r}"
                raise ArgumentError("KvmMemoryListener", "address_space", section.address_space, "only one", why)
            self._space = section.address_space
        self._touch(section, section)

    def region_del(self, section: MemoryRegionSection) -> None:
        """Notes that the section is gone, and with it the slot it may have had."""
        self._touch(section, None)

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """Notes that the slot's writes are logged from now on, if they were not."""
        if not old and new:
            self._touch(section, section)

    def log_stop(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """Notes that the slot's writes are no longer logged, if nobody is left who wants it."""
        if old and not new:
            self._touch(section, section)

    def _touch(self, section: MemoryRegionSection, now: MemoryRegionSection | None) -> None:
        region = section.region
        if region.block is None:
            return  # can never have a slot
        key = (section.offset_within_address_space, section.size, region, section.offset_within_region)
        self._touched.setdefault(key, self._sections.get(key))
        # At its end, so that the slots are made in the order in which the sections were told.
        self._touched[key] = self._touched.pop(key)
        if now is None:
            self._sections.pop(key, None)
        else:
            self._sections[key] = now

    def commit(self) -> None:
        """Makes the slots those of the sections; with an error, leaves them as they were, and forgets the change."""
        touched, before = list(self._touched), self._slots
        if touched and self.vm.closed:
            self._slots = {}
        elif touched:
            try:
                self._change(touched)
            except BaseException:
                self._forget()
                if self._slots is not before:  # an interruption came when all was done
                    self._change(touched)
                raise
        self._touched = {}

    def _forget(self) -> None:
        # The sections as they were at the last commit.
        for key, section in self._touched.items():
            if section is None:
                self._sections.pop(key, None)
            else:
                self._sections[key] = section
        self._touched = {}

    def _change(self, touched: list[Key]) -> None:
        kept, gone, wanted = self._slots.copy(), {}, {}
        for key in touched:
            entry = kept.pop(key, None)
            # One that somebody has changed or deleted by hand is no longer ours.
            if entry is not None and self.vm.memslot(entry.slot) == entry:
                gone[entry.gpa] = entry
            section = self._sections.get(key)
            row = None if section is None else self._slot_of(section)
            if row is not None:
                wanted[key] = row
        flags, add = {}, {}
        for key, row in wanted.items():
            entry = gone.get(row.gpa)
            hva = row.memory.hva + row.offset
            # The same memory at the same place: at most its logging changes.
            if entry is None or (entry.size, entry.hva) != (row.size, hva) or (entry.flags ^ row.flags) & ~_LOG_DIRTY:
                add[key] = row
                continue
            del gone[row.gpa]
            kept[key] = entry
            if entry.flags != row.flags:
                flags[entry.slot] = row.flags
                kept[key] = MemSlot(entry.slot, entry.gpa, entry.size, entry.hva, row.flags)
        delete = [entry.slot for entry in gone.values()]
        if delete or flags or add:
            self._take_logs(list(gone.values()))

            def done(made: list[MemSlot]) -> None:
                self._slots = kept | dict(zip(add, made, strict=True))

            self.vm.change_memory_regions(
                delete=delete, flags=flags, add=add.values(), address_space=self.address_space_id, done=done
            )
        else:
            self._slots = kept

    def _slot_of(self, section: MemoryRegionSection) -> SlotMemory | None:
        # What the slot of a section is made of, or None where it has none.
        region = section.region
        romd = region.is_rom_device and section.romd
        if not (region.is_ram or (romd and self._has_readonly())):
            return None
        gpa, size = align_section(section.offset_within_address_space, section.size)
        block = region.block
        if not size or block is None:
            return None
        flags = _LOG_DIRTY if region.dirty_log_mask else 0
        # What is read-only itself shows read-only too.
        readonly = romd or (section.readonly and (self._readonly_sections or region.readonly))
        if readonly and self._has_readonly():
            flags |= _READONLY
        offset = section.offset_within_region + gpa - section.offset_within_address_space
        return SlotMemory(gpa, block.mapping, offset, size, flags)

    def _has_readonly(self) -> bool:
        return self.vm.check_extension(lib.KVM_CAP_READONLY_MEM) > 0

    def _take_logs(self, slots: list[MemSlot]) -> None:
        for slot in slots if self._take_log is not None else ():
            if slot.flags & _LOG_DIRTY and self._take_log is not None:
                self._take_log(slot, self.vm.get_dirty_log(slot.slot))

    def __repr__(self) -> str:
        return f"<KvmMemoryListener of {self.vm!r}, {len(self._slots)} slots>"
