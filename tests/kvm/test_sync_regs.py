"""The registers of kvm_run as Vcpu hands them out: the raw fields, and the order of what is given to KVM.

Expected: the kernel's own answers, and linux:arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_run, sync_regs@v6.18.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ForkedError, KvmError
from hvmodel.kvm import Kvm
from hvmodel.kvm.exits import Again, Hlt, IoOut
from hvmodel.machine import Cpu
from tests.kvm.guest import CODE, Guest
from tests.need import need_cap

GuestMaker = Callable[..., Guest]
REGS, SREGS = lib.KVM_SYNC_X86_REGS, lib.KVM_SYNC_X86_SREGS


def cpu_of(guest: Guest) -> Cpu:
    return Cpu(guest.vcpu, lambda _gpa, _size: b"")


def test_the_page_s_own_way(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("e610 e611 f4"))
    need_cap(g.vm, "SYNC_REGS")
    g.vcpu.kvm_valid_regs = REGS
    g.run()
    regs = g.vcpu.sync_regs
    assert regs.regs.rip == g.vcpu.regs.rip == CODE + 2
    regs.regs.rax = 0x12
    g.vcpu.sync_regs = regs
    g.vcpu.kvm_dirty_regs = REGS
    assert g.vcpu.regs.rax == 0  # KVM is given it at the entry, not before
    assert g.run() == IoOut(0x11, 1, 1, b"\x12")
    assert g.vcpu.kvm_dirty_regs == 0


def test_what_nobody_asked_for_stays_in_the_page(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("e610 e611 f4"))
    need_cap(g.vm, "SYNC_REGS")
    g.vcpu.kvm_valid_regs = REGS
    regs = g.vcpu.sync_regs
    regs.sregs.cr2 = 0x1234
    g.vcpu.sync_regs = regs
    for rip in (CODE + 2, CODE + 4):
        g.run()
        assert (g.vcpu.sync_regs.regs.rip, g.vcpu.sync_regs.sregs.cr2) == (rip, 0x1234)


def test_a_register_of_cpu_and_then_the_page_by_hand(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("e610 e611 f4"))
    need_cap(g.vm, "SYNC_REGS")
    cpu = cpu_of(g)
    g.run()
    cpu.rbx = 7
    regs = g.vcpu.sync_regs
    assert regs.regs.rbx == 7
    regs.regs.rax = 0x13
    g.vcpu.sync_regs = regs  # gives KVM what cpu wrote, and then the page is its user's
    assert g.vcpu.regs.rbx == 7
    assert cpu.rax == 0  # nobody has said that it is dirty
    assert g.run() == IoOut(0x11, 1, 1, b"\0")


def test_sregs_of_the_page_that_kvm_refuses(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("e610 e611 f4"))
    need_cap(g.vm, "SYNC_REGS")
    cpu = cpu_of(g)
    g.run()
    cpu.rax = 0x14
    regs = g.vcpu.sync_regs
    regs.sregs.cr4 = 1 << 63
    g.vcpu.sync_regs = regs
    g.vcpu.kvm_dirty_regs = SREGS
    with pytest.raises(KvmError):
        g.vcpu.run(1.0)
    g.vcpu.kvm_dirty_regs = 0
    assert (cpu.rax, cpu.sregs.cr4) == (0x14, g.vcpu.sregs.cr4)
    assert g.run() == IoOut(0x11, 1, 1, b"\x14")


def test_what_was_written_survives_an_entry_that_is_refused(guest: GuestMaker) -> None:
    # An unknown bit of kvm_valid_regs: KVM_RUN fails, and puts KVM's registers over those in the page.
    g = guest(bytes.fromhex("e610 e611 f4"))
    need_cap(g.vm, "SYNC_REGS")
    cpu = cpu_of(g)
    g.run()
    cpu.rax = 0x15
    valid = g.vcpu.kvm_valid_regs
    g.vcpu._kvm_run.kvm_valid_regs = valid | 1 << 40
    with pytest.raises(KvmError):
        g.vcpu.run(1.0)
    g.vcpu._kvm_run.kvm_valid_regs = valid
    assert cpu.rax == g.vcpu.regs.rax == 0x15
    assert g.run() == IoOut(0x11, 1, 1, b"\x15")


def test_a_vcpu_that_waits_for_its_sipi(kvm: Kvm) -> None:
    # Its KVM_RUN takes nothing from the page and puts KVM's registers there (x86.c, KVM_MP_STATE_UNINITIALIZED).
    with Guest(kvm, irqchip=True) as g, g.vm.create_vcpu(1) as second:
        cpu = Cpu(second, lambda _gpa, _size: b"")
        assert second.mp_state.mp_state == lib.KVM_MP_STATE_UNINITIALIZED
        cpu.rbx, cpu.rcx = 0x51, 0x52
        second.kick()
        second.run(1.0)
        assert (cpu.rbx, cpu.rcx, second.regs.rbx) == (0x51, 0x52, 0x51)
        cpu.rdx = 0x53
        assert second.ioctl("KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", [lib.KVM_MP_STATE_RUNNABLE])) == 0
        g.ram.write(0x3000, bytes.fromhex("e610 f4"))
        sregs = second.sregs
        sregs.cs.base = sregs.cs.selector = 0
        second.sregs = sregs
        cpu.rip = 0x3000
        cpu.rax = 0x54
        exit = second.run(10)
        while isinstance(exit, Again):
            exit = second.run(10)
        assert exit == IoOut(0x10, 1, 1, b"\x54")
        assert (cpu.rbx, cpu.rcx, cpu.rdx) == (0x51, 0x52, 0x53)


def test_the_page_of_a_parent_is_not_the_child_s(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("e610 e611 f4"))
    cpu = cpu_of(g)
    g.run()
    cpu.rax = 0x16
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for call in (
                lambda: g.vcpu.sync_regs,
                lambda: setattr(g.vcpu, "kvm_dirty_regs", 0),
                lambda: g.vcpu.regs,
                lambda: cpu.rax,
            ):
                with pytest.raises(ForkedError):
                    call()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert g.run() == IoOut(0x11, 1, 1, b"\x16")
    assert g.run() == Hlt()


def test_cr8_of_sregs_outlasts_the_next_entry(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("e610 e611 e612 f4"))
    g.run()
    for cr8, item in ((5, "sregs"), (3, "sregs2")):
        if item == "sregs2":
            need_cap(g.vm, "SREGS2")
        sregs = getattr(g.vcpu, item)
        sregs.cr8 = cr8
        setattr(g.vcpu, item, sregs)
        g.run()
        assert (g.vcpu.sregs.cr8, g.vcpu.cr8) == (cr8, cr8)


def test_what_is_written_when_it_is_closed(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("e610 f4"))
    cpu = cpu_of(g)
    g.run()
    cpu.rax = 1
    g.vcpu.close()
    assert g.vcpu.closed
