"""Walkers of a live machine: `Machine.walker`, by the vCPU's registers and CPUID, in the RAM as it is, without a copy.

RAM and ROM of the machine's memory are seen where the guest sees them; in ROM, and in RAM whose memslot is read-only, a
walk leaves A and D alone, as KVM does.

Source: kernel arch/x86/kvm/mmu/mmu.c kvm_calc_cpu_role, reset_guest_rsvds_bits_mask (what of CPUID counts)@v6.18.
"""

from __future__ import annotations

from _weakref import ref

from .._ffi import ffi
from ..arch.cpuid import has_feature, max_phys_bits, vendor_of
from ..mmu.guest_memory import GuestMemory
from ..mmu.walk import Walker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["guest_memory", "walker"]

_PKE, _PG, _PAE, _LMA = 1 << 22, 1 << 31, 1 << 5, 1 << 10
_PKRU = 9  # component of the XSAVE area
_PDPTRS_VALID = 1


def guest_memory(machine: Machine) -> GuestMemory:
    """RAM and ROM of the machine, in place; what is stored there counts as written by the host.

    BufferError and what else RamBlock.view raises.  The machine closes it with itself.
    """
    pieces = []
    for at in machine.memory.flatview:
        block, kind = at.region.block, at.region.kind
        # What is no whole page is in no memslot; nor is a rom_device that is not in romd mode.
        if block is not None and kind != "i/o" and not (at.start | at.size) % 4096:
            pieces.append((at.start, block.view(at.offset_in_region, at.size), kind == "ram"))
    memory = GuestMemory(pieces, write=machine.write)
    machine._walked = [known for known in machine._walked if known() is not None]
    machine._walked.append(ref(memory))
    return memory


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
        cr3=sregs.cr3,
        cr4=sregs.cr4,
        efer=sregs.efer,
        rflags=rflags,
        pkru=_pkru(machine) if sregs.cr4 & _PKE else 0,
        maxphyaddr=max_phys_bits(cpuid),
        gbpages=has_feature(cpuid, "GBPAGES"),
        amd=vendor_of(cpuid) in ("AuthenticAMD", "HygonGenuine"),
        pdptrs=pdptrs,
    )
