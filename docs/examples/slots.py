"""From a flat view to memslots: a listener, a change that moves two slots, and one that KVM refuses.

Prints:

    slot 0: 0x0 + 0x40000
    slot 0: 0x0 + 0x10000
    slot 1: 0x10000 + 0x1000, read-only
    slot 2: 0x11000 + 0x2f000
    gpa=0x100000: [0x100000, 0x140000) overlaps slot 9 [0x13f000, 0x140000)
    slot 0: 0x0 + 0x10000
    slot 1: 0x10000 + 0x1000, read-only
    slot 2: 0x11000 + 0x2f000
"""

from __future__ import annotations

from hvmodel import KvmError
from hvmodel.kvm import Kvm
from hvmodel.ram import AddressSpace, KvmMemoryListener, MemoryRegion, RamBlock


def show(listener: KvmMemoryListener) -> None:
    for slot in listener.memslots:
        print(f"slot {slot.slot}: {slot.gpa:#x} + {slot.size:#x}{', read-only' if slot.readonly else ''}")


with RamBlock("ram", "256K") as block, RamBlock("rom", "4K") as image, Kvm() as kvm, kvm.create_vm() as vm:
    ram, rom = MemoryRegion.ram("ram", block), MemoryRegion.rom("rom", image)
    system = MemoryRegion.container("system", 1 << 64)
    system.add_subregion(0, ram)
    with AddressSpace(system, "memory") as space:
        listener = KvmMemoryListener(vm)
        space.add_listener(listener)
        show(listener)

        system.add_subregion(0x10000, rom, priority=1)  # the RAM's slot is deleted, three are made: one transaction
        show(listener)

        vm.set_user_memory_region(9, 0x13F000, image.mapping)  # by hand: left alone
        try:
            ram.addr = 0x100000
        except KvmError as error:
            print(f"{error.field}={error.value:#x}: {error.detail}")
        show(listener)  # as they were, and so is the tree
