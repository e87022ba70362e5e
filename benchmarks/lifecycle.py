"""lifecycle: open /dev/kvm, VM, RAM and its slot, vCPU, the first exit (HLT), close; the whole of it, once per life.

By two doors: hvmodel.kvm and hvmodel.ram by hand, and hvmodel.Machine.  The floor makes the same calls of KVM in C,
with the same guest and the same kind of slot; for Machine with CPUID where Machine sets it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from . import harness
from .guests import assemble
from .harness import BenchmarkError, Pace, Result
from .subject import ENTRY

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

    def in_c(*, cpuid: bool) -> None:
        reason = harness.checked(lib.floor_lifecycle(image, len(image), harness.RAM_SIZE, cpuid), "the C floor")
        if reason != KVM_EXIT_HLT:
            raise BenchmarkError(f"the C floor's guest left with exit reason {reason}, not with HLT")

    def by_hand() -> None:
        # The floor's calls, in its order of making; the vCPU and the VM go before the memory of the slot.
        with Kvm() as kvm, RamBlock("pc.ram", harness.RAM_SIZE) as block, kvm.create_vm() as vm:
            vm.set_identity_map_addr(0xFFFB_C000)
            vm.set_tss_addr(0xFFFB_D000)
            vm.set_user_memory_region(0, 0, block.mapping)
            block.write(ENTRY, image)
            vcpu = vm.create_vcpu(0)
            sregs = vcpu.sregs
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.sregs = sregs
            vcpu.regs = ffi.new("struct kvm_regs *", {"rip": ENTRY, "rflags": 2})
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
            "c": least(lambda: in_c(cpuid=False)),
            "kvm": least(by_hand),
            "c, CPUID": least(lambda: in_c(cpuid=True)),
            "Machine": least(by_machine),
        },
    )
    return [
        harness.against_floor("real mode, hvmodel.kvm", best["kvm"], "us", best["c"], BAR),
        harness.against_floor("real mode, hvmodel.Machine", best["Machine"], "us", best["c, CPUID"], BAR),
    ]


def _expect_halt(left: object) -> None:
    from hvmodel.kvm import Hlt

    if not isinstance(left, Hlt):
        raise BenchmarkError(f"the guest left with {left!r}, not with HLT")
