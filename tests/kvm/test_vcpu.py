"""Vcpu: what its methods of state do beyond issuing their ioctl, and how their refusals are explained."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, KvmError, PartialError
from hvmodel.kvm import CpuidEntry, Kvm, Translation, Vcpu
from hvmodel.kvm.exits import Hlt, IoOut
from tests.host.held import nothing_leaks
from tests.kvm.guest import Guest
from tests.need import need_cap

GuestMaker = Callable[..., Guest]

STAR, LSTAR = 0xC0000081, 0xC0000082
OUT_AND_HALT = bytes.fromhex("b041 e610 f4")  # mov al, 'A'; out 0x10, al; hlt


# ---- MSRs ----


def test_more_msrs_than_the_kernel_takes_at_once(kvm: Kvm, vcpu: Vcpu) -> None:
    # The kernel takes fewer than 256; as many as there are, again and again, come to more.
    known = kvm.msr_index_list()
    many = (known * (600 // len(known) + 1))[:600]
    assert vcpu.get_msrs(many).keys() == set(known)
    vcpu.set_msrs({STAR: 5})
    with pytest.raises(PartialError) as refused:
        vcpu.get_msrs([*[STAR] * 500, 0x12345678, STAR])
    error = refused.value
    assert (error.done, error.requested, error.first_failed, error.call) == (500, 502, 0x12345678, "KVM_GET_MSRS")
    assert "only the first 500 of 502" in str(error)


def test_msrs_are_set_up_to_the_first_that_is_refused(vcpu: Vcpu) -> None:
    with pytest.raises(PartialError) as refused:
        vcpu.set_msrs({STAR: 7, LSTAR: 1 << 63, 0x174: 9})  # LSTAR takes canonical addresses only
    assert (refused.value.done, refused.value.first_failed) == (1, LSTAR)
    assert vcpu.get_msrs([STAR, LSTAR, 0x174]) == {STAR: 7, LSTAR: 0, 0x174: 0}
    vcpu.set_msrs({})
    assert vcpu.get_msrs([]) == {}


def test_wrong_msrs(vcpu: Vcpu) -> None:
    for indices in (None, 5, [-1], [1 << 32], ["x"], [None], [1.0], [True]):
        with pytest.raises((ValueError, TypeError)):
            vcpu.get_msrs(indices)
    entries = ({-1: 0}, {1 << 32: 0}, {"x": 0}, {0x10: -1}, {0x10: 1 << 64}, {0x10: "x"})
    for values in (None, 5, "x", [], [(1, 2)], *entries):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            vcpu.set_msrs(values)


# ---- CPUID ----


def test_cpuid_of_entries_of_one_s_own(vcpu: Vcpu) -> None:
    mine = [CpuidEntry(0x40000100 + at, 0, 0, at, 2 * at, 3 * at, 4 * at) for at in range(5)]
    vcpu.set_cpuid2(iter(mine))
    assert vcpu.get_cpuid2() == mine
    vcpu.set_cpuid2([])
    assert vcpu.get_cpuid2() == []


def test_wrong_cpuid(vcpu: Vcpu) -> None:
    with pytest.raises(ArgumentError, match="up to 256 entries"):
        vcpu.set_cpuid2([CpuidEntry(at) for at in range(257)])
    for row in (CpuidEntry(-1), CpuidEntry(1 << 32), CpuidEntry(0, eax="x"), CpuidEntry(0, ebx=True), CpuidEntry(None)):
        with pytest.raises(ArgumentError, match=r"entries\[0\]\."):
            vcpu.set_cpuid2([row])
    for entries in (None, 5, [5], [None], ["text"], [(1, 2, 3, 4, 5, 6, 7)], ffi.new("struct kvm_regs *")):
        with pytest.raises((ValueError, TypeError)):
            vcpu.set_cpuid2(entries)


def test_cpuid_cannot_change_once_the_guest_has_run(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)
    entries = g.kvm.supported_cpuid()
    g.vcpu.set_cpuid2(entries)
    g.run()
    with pytest.raises(KvmError) as refused:
        g.vcpu.set_cpuid2([CpuidEntry(0x40000100, 0, 0, 1, 2, 3, 4)])
    assert (refused.value.errno, refused.value.call) == (errno.EINVAL, "KVM_SET_CPUID2")
    assert "has run" in str(refused.value)


def test_cpuid_with_another_address_width_is_refused(vcpu: Vcpu) -> None:
    for bits in (0, 48, 57):
        vcpu.set_cpuid2([CpuidEntry(0x80000008, eax=bits << 8 | 36)])
    with pytest.raises(KvmError, match="48 or 57 bits of virtual address"):
        vcpu.set_cpuid2([CpuidEntry(0x80000008, eax=40 << 8 | 36)])


# ---- events ----


def test_interrupts_are_the_irqchip_s_where_there_is_one(guest: GuestMaker) -> None:
    g = guest(irqchip=True)
    with pytest.raises(KvmError) as refused:
        g.vcpu.interrupt(0x30)
    assert refused.value.errno == errno.ENXIO
    for wrong in (-1, 1 << 32, None, "x", 1.0, True):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            g.vcpu.interrupt(wrong)


def test_an_interrupt_is_injected_though_the_guest_has_them_off(guest: GuestMaker) -> None:
    # Nothing checks RFLAGS.IF but the caller, as the docstring says.
    g = guest(b"\x90\xf4")
    g.install(0x20, bytes.fromhex("e611 f4"))
    assert g.vcpu.regs.rflags & 0x200 == 0
    g.vcpu.interrupt(0x20)
    assert g.run() == IoOut(0x11, 1, 1, b"\0")


# ---- translation ----


def test_translation_follows_the_guest_s_page_tables(guest: GuestMaker) -> None:
    g = guest()
    # PML4 at 0x10000, PDPT, PD, PT behind it; one page: gva 0xffff800000402000 -> gpa 0x5000, writable.
    gva = 0xFFFF800000402000
    tables = [0x10000, 0x11000, 0x12000, 0x13000]
    for level, table in enumerate(tables):
        index = gva >> (39 - 9 * level) & 511
        entry = (tables[level + 1] if level < 3 else 0x5000) | 3
        g.ram.write(table + 8 * index, entry.to_bytes(8, "little"))
    g.vcpu.set_cpuid2(g.kvm.supported_cpuid_table())
    sregs = g.vcpu.sregs
    sregs.cr3, sregs.cr4, sregs.efer, sregs.cr0 = 0x10000, 0x20, 0x500, 0x80000011  # PAE; LME, LMA; PG, ET, PE
    sregs.cs.l, sregs.cs.db, sregs.cs.type, sregs.cs.g = 1, 0, 0xB, 1
    g.vcpu.sregs = sregs
    where = g.vcpu.translate(gva + 0x123)
    assert isinstance(where, Translation)
    assert (where.gpa, where.valid) == (0x5123, True)
    assert not g.vcpu.translate(gva + 0x1000).valid
    assert not g.vcpu.translate(0x5000).valid
    for wrong in (-1, 1 << 64, None, "x", 1.0):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            g.vcpu.translate(wrong)


# ---- time ----


def test_wrong_frequencies(vcpu: Vcpu) -> None:
    khz = vcpu.tsc_khz
    for wrong in (-1, 1 << 32, None, "x", 1.5, True):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            vcpu.tsc_khz = wrong
    assert vcpu.tsc_khz == khz


# ---- the kvm_run page ----


def test_the_page_shows_the_exit(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)
    g.run()
    run = g.vcpu._kvm_run
    assert (run.exit_reason, run.io.port, run.io.size) == (lib.KVM_EXIT_IO, 0x10, 1)
    assert g.vcpu.has_exit_pending
    g.vcpu.complete_io()
    assert not g.vcpu.has_exit_pending
    assert g.run() == Hlt()


def test_registers_come_along_where_they_are_synced(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)
    need_cap(g.vm, "SYNC_REGS")
    run = g.vcpu._kvm_run
    run.kvm_valid_regs = lib.KVM_SYNC_X86_REGS
    g.run()
    assert run.s.regs.regs.rip == g.vcpu.regs.rip
    assert run.s.regs.regs.rax & 0xFF == 0x41
    run.kvm_valid_regs = 1 << 40
    with pytest.raises(KvmError, match="kvm_valid_regs has a bit"):
        g.vcpu.run(1.0)


# ---- closed ----


def test_a_closed_vcpu_says_so(vcpu: Vcpu) -> None:
    vcpu.close()
    with nothing_leaks():
        for call in (
            vcpu.run,
            lambda: vcpu.run(1.0),
            lambda: vcpu.run_until(0),
            vcpu.kick,
            lambda: vcpu.answer(0),
            lambda: vcpu.answer(b""),
            vcpu.fail_msr,
            vcpu.complete_io,
            lambda: vcpu._kvm_run,
            lambda: vcpu.tsc_khz,
            lambda: setattr(vcpu, "tsc_khz", 5),
            lambda: vcpu.get_msrs([1]),
            lambda: vcpu.set_msrs({1: 1}),
            lambda: vcpu.set_cpuid2([]),
            vcpu.get_cpuid2,
            lambda: vcpu.interrupt(0),
            vcpu.nmi,
            vcpu.smi,
            lambda: vcpu.translate(0),
            lambda: vcpu.enable_cap(0),
            vcpu.stats_fd,
        ):
            with pytest.raises(ClosedError):
                call()
    assert not vcpu.has_exit_pending
