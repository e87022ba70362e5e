"""The VM of hvmodel that the benchmarks hold against the floor's: same RAM, same kind of slot, same guest."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from . import harness

if TYPE_CHECKING:
    from hvmodel.kvm import Vcpu

__all__ = ["ENTRY", "IDENTITY_MAP", "TSS", "Subject", "real_mode"]

ENTRY = 0x7C00
IDENTITY_MAP, TSS = 0xFEFF_C000, 0xFEFF_D000  # the floor's, and Machine's


def real_mode(vcpu: Vcpu) -> None:
    """Put a new vCPU to 0000:7C00, with the calls that the floor makes."""
    sregs = vcpu.sregs
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.sregs = sregs
    regs = vcpu.regs
    regs.rip, regs.rsp, regs.rflags = ENTRY, ENTRY, 2
    vcpu.regs = regs


class Subject:
    """One vCPU made with hvmodel.kvm, a guest at 0x7C00; `with` closes it."""

    def __init__(self, image: bytes, *, cpuid: bool = False) -> None:
        from hvmodel.kvm import Kvm
        from hvmodel.ram import RamBlock

        with ExitStack() as stack:
            kvm = stack.enter_context(Kvm())
            block = stack.enter_context(RamBlock("pc.ram", harness.RAM_SIZE))
            vm = stack.enter_context(kvm.create_vm())
            vm.set_identity_map_addr(IDENTITY_MAP)
            vm.set_tss_addr(TSS)
            vm.set_user_memory_region(0, 0, block.mapping)
            block.write(ENTRY, image)
            self.vcpu = stack.enter_context(vm.create_vcpu(0))
            if cpuid:
                self.vcpu.set_cpuid2(kvm.supported_cpuid())
            real_mode(self.vcpu)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
