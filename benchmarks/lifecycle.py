"""lifecycle: open /dev/kvm, VM, RAM and its slot, vCPU, the first exit (HLT), close; the whole of it, once per life.

By two doors, each against C that makes the same calls with the same arguments, for the same guest:

    both       memfd sealed against GROW and SHRINK, mapped shared, one slot at 0; identity map and TSS; vCPU and its
               kvm_run; GET_SREGS, SET_SREGS, SET_REGS; KVM_RUN until HLT
    kvm        hvmodel.kvm and hvmodel.ram by hand: that is all
    Machine    KVM_CAP_SYNC_REGS switched on, SET_CPUID2 with a table that was asked for in an earlier life (C keeps it
               too), SET_VCPU_EVENTS, SET_MP_STATE
    closing    munmap kvm_run, close vCPU, close VM, munmap RAM, close memfd, close /dev/kvm; no slot is removed

Calls that hvmodel makes and C need not are its own cost: KVM_GET_API_VERSION, KVM_CHECK_EXTENSION, F_GET_SEALS, fstat
of /dev/kvm and of the memfd, sysinfo, the signal dispositions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from . import harness
from .guests import assemble
from .harness import BenchmarkError, Pace, Result
from .subject import ENTRY, IDENTITY_MAP, TSS

__all__ = ["run"]

BAR = 1.15
LIVES = 4
KVM_EXIT_HLT = 5


def run(pace: Pace) -> list[Result]:
    """The least life counts: what the kernel does late (RCU) comes on top of some lives and not of others."""
    import hvmodel as hv
    from hvmodel.kvm import Kvm, ffi
    from hvmodel.ram import RamBlock

    image = assemble("halt")
    lib = harness.load_floor("lifecycle")
    lib.floor_lifecycle.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    lives = pace.count(LIVES)

    def in_c(flags: int) -> None:
        reason = harness.checked(lib.floor_lifecycle(image, len(image), harness.RAM_SIZE, flags), "the C floor")
        if reason != KVM_EXIT_HLT:
            raise BenchmarkError(f"the C floor's guest left with exit reason {reason}, not with HLT")

    def by_hand() -> None:
        # The floor's calls, in its order; a VM closes its vCPUs, and goes before the memory of the slot.
        with Kvm() as kvm, RamBlock("pc.ram", harness.RAM_SIZE) as block, kvm.create_vm() as vm:
            vm.set_identity_map_addr(IDENTITY_MAP)
            vm.set_tss_addr(TSS)
            vm.set_user_memory_region(0, 0, block.mapping)
            block.write(ENTRY, image)
            vcpu = vm.create_vcpu(0)
            sregs = vcpu.sregs
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.sregs = sregs
            vcpu.regs = ffi.new("struct kvm_regs *", {"rip": ENTRY, "rsp": ENTRY, "rflags": 2})
            _expect_halt(vcpu.run())

    def by_machine() -> None:
        with hv.Machine(ram=harness.RAM_SIZE) as machine:
            machine.load(ENTRY, image)
            machine.vcpu.real_mode(entry=ENTRY)
            _expect_halt(machine.run(timeout=1.0).exit)

    def least(life: Callable[[], None]) -> Callable[[], float]:
        return lambda: min(harness.per_item_us(life, 1) for _ in range(lives))

    best = harness.interleave(
        pace,
        {
            "c": least(lambda: in_c(0)),
            "kvm": least(by_hand),
            "c, Machine": least(lambda: in_c(harness.FLOOR_CPUID | harness.FLOOR_MACHINE)),
            "Machine": least(by_machine),
        },
    )
    return [
        harness.against_floor("real mode, hvmodel.kvm", best["kvm"], "us", best["c"], BAR),
        harness.against_floor("real mode, hvmodel.Machine", best["Machine"], "us", best["c, Machine"], BAR),
    ]


def _expect_halt(left: object) -> None:
    from hvmodel.kvm import Hlt

    if not isinstance(left, Hlt):
        raise BenchmarkError(f"the guest left with {left!r}, not with HLT")
