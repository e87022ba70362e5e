"""Walkers of a live machine: `Machine.walker`, by the vCPU's registers and CPUID, in the RAM as it is, without a copy.

A walk sees what KVM's walker sees: the memslots that the machine has for its RAM and ROM, of whole pages; where a slot
is read-only, it leaves A and D alone.  Slots that were set by hand (`m.vm`) are not seen.

    flat view -> KvmMemoryListener -> memslots -> pieces of a GuestMemory -> Walker
    it changes -> _Watch, told after it: other slots -> the GuestMemory is closed, and walks there raise ClosedError

Source: kernel arch/x86/kvm/mmu/mmu.c kvm_calc_cpu_role, reset_guest_rsvds_bits_mask (what of CPUID counts)@v6.18.
"""

from __future__ import annotations

from _weakref import ref

from .._ffi import ffi
from ..arch.cpuid import has_feature, max_phys_bits, vendor_of
from ..errors import BusyError
from ..mmu.guest_memory import GuestMemory
from ..mmu.walk import Walker
from ..ram.kvm_listener import KvmMemoryListener
from ..ram.listener import MemoryListener
from ..ram.topology import _the_one as _topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .machine import Machine

    Slot = tuple[int, int, int, bool]  # gpa, size, hva, readonly

__all__ = ["guest_memory", "walker"]

_PKE, _PG, _PAE, _LMA = 1 << 22, 1 << 31, 1 << 5, 1 << 10
_PKRU = 9  # component of the XSAVE area
_PDPTRS_VALID = 1


class _Watch(MemoryListener):
    # Closes what walks where the slots are no longer those that it was made of.
    priority = KvmMemoryListener.priority + 1

    def __init__(self, machine: Machine) -> None:
        self._machine = ref(machine)
        self._slots = _slots(machine)

    def commit(self) -> None:
        machine = self._machine()
        if machine is None or self._slots == (slots := _slots(machine)):
            return
        self._slots = slots
        walked, machine._walked = machine._walked, []
        for known in walked:
            if (memory := known()) is not None:
                memory.close("the machine shows other memory now")


def _listeners(machine: Machine) -> list[KvmMemoryListener]:
    found = [one for one in machine.memory.listeners if isinstance(one, KvmMemoryListener)]
    return [one for one in found if one.vm is machine.vm and one.address_space_id == 0]


def _slots(machine: Machine) -> list[Slot]:
    # Their ids do not matter, nor whether their writes are logged.
    found = [slot for one in _listeners(machine) for slot in one.memslots]
    return [(slot.gpa, slot.size, slot.hva, slot.readonly) for slot in found]


def guest_memory(machine: Machine) -> GuestMemory:
    """RAM and ROM of the machine, in place; what is stored there counts as written by the host.

    BufferError and what else RamBlock.view raises; BusyError in a listener.  The machine closes it with itself, and
    where the slots change.  Threads: waits for a transaction in another one.
    """
    with _topology._lock:
        if not any(isinstance(one, _Watch) for one in machine.memory.listeners):
            machine.memory.add_listener(_Watch(machine))
        memory = GuestMemory(_pieces(machine), write=machine.write)
        machine._walked = [known for known in machine._walked if known() is not None]
        machine._walked.append(ref(memory))
        return memory


def _pieces(machine: Machine) -> list[tuple[int, memoryview, bool]]:
    found = []
    for listener in _listeners(machine):
        for slot in listener.memslots:
            section = listener.section_of(slot.slot)
            if section is None or section.region.block is None:
                raise BusyError("Machine.walker", "the machine's memory", "this is a listener of a change of it")
            block = section.region.block
            offset = section.offset_within_region + slot.gpa - section.offset_within_address_space
            found.append((slot.gpa, block.view(offset, slot.size), not (slot.readonly or block.readonly)))
    return found


def _pkru(machine: Machine) -> int:
    # 0 where KVM has no PKRU, or it is in its initial state.
    from ..state.xsave import Xsave, components

    where = next((part for part in components(machine.kvm.supported_cpuid()) if part.number == _PKRU), None)
    area = Xsave.from_bytes(bytes(ffi.buffer(machine.vcpu.kvm.xsave)))
    if where is None or area.is_initial(_PKRU):
        return 0
    return int.from_bytes(area.component(where)[:4], "little")


def walker(machine: Machine) -> Walker:
    """A walker by the registers, the PKRU and the CPUID that the vCPU has now; see Machine.walker."""
    machine._check_open("Machine.walker")
    cpu = machine.vcpu
    sregs, rflags = cpu.sregs, cpu.rflags
    cpuid = cpu.kvm.get_cpuid2()
    pdptrs = None
    if sregs.cr0 & _PG and sregs.cr4 & _PAE and not sregs.efer & _LMA:
        held = cpu.kvm.sregs2
        if held.flags & _PDPTRS_VALID:
            pdptrs = (held.pdptrs[0], held.pdptrs[1], held.pdptrs[2], held.pdptrs[3])
    return Walker(
        guest_memory(machine),
        cr0=sregs.cr0,
        # Below long mode bits 63:32 are ignored (Intel SDM volume 3, tables 5-3 and 5-7).
        cr3=sregs.cr3 if sregs.efer & _LMA else sregs.cr3 & 0xFFFFFFFF,
        cr4=sregs.cr4,
        efer=sregs.efer,
        rflags=rflags,
        pkru=_pkru(machine) if sregs.cr4 & _PKE else 0,
        maxphyaddr=max_phys_bits(cpuid),
        gbpages=has_feature(cpuid, "GBPAGES"),
        amd=vendor_of(cpuid) in ("AuthenticAMD", "HygonGenuine"),
        pdptrs=pdptrs,
    )
