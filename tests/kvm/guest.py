"""A guest for a test of one ioctl: a megabyte of RAM, one vCPU in real mode, and a few bytes of code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from hvmodel.host import Mapping
from hvmodel.kvm import Kvm, Vcpu, Vm
from hvmodel.kvm.exits import Exit, Interrupted

__all__ = ["CODE", "HANDLER", "Guest"]

CODE = 0x1000  # where the code is put and entered
HANDLER = 0x2000  # where install() puts an interrupt handler
_STACK = 0x8000


class Guest:
    """`kvm`, `vm`, `vcpu` and `ram` (a Mapping at gpa 0, slot 0, `flags`); real mode, CS:IP 0:CODE, interrupts off.

    `before` is called with the VM before the vCPU is made, for what must come first.  With `irqchip`, HLT does not
    exit.
    """

    def __init__(
        self,
        kvm: Kvm,
        code: bytes = b"\xf4",
        *,
        irqchip: bool = False,
        flags: int = 0,
        size: int = 1 << 20,
        before: Callable[[Vm], object] | None = None,
    ) -> None:
        self.kvm = kvm
        self.ram = Mapping(None, size)
        self.vm: Vm = kvm.create_vm()
        self.vm.set_tss_addr(0xFFFBD000)
        self.vm.set_user_memory_region(0, 0, self.ram, flags=flags)
        if irqchip:
            self.vm.create_irqchip()
        if before is not None:
            before(self.vm)
        self.vcpu: Vcpu = self.vm.create_vcpu(0)
        self.load(code)

    def load(self, code: bytes, at: int = CODE) -> None:
        """Put `code` at `at` and start there next."""
        self.ram.write(at, code)
        sregs = self.vcpu.sregs
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.sregs = sregs
        regs = self.vcpu.regs
        regs.rip, regs.rsp, regs.rflags = at, _STACK, 2
        self.vcpu.regs = regs

    def install(self, vector: int, handler: bytes) -> None:
        """Put a handler behind entry `vector` of the real-mode interrupt table."""
        self.ram.write(HANDLER, handler)
        self.ram.write(4 * vector, HANDLER.to_bytes(4, "little"))

    def run(self, timeout: float = 10.0) -> Exit:
        """The next exit; a guest that gives none fails the test."""
        exit = self.vcpu.run(timeout)
        assert exit != Interrupted("timeout"), f"no exit within {timeout} s"
        return exit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.vm.close()
        self.ram.close()
