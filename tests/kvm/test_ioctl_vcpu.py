"""Every ioctl of a vCPU's fd, for its effect or against a second source."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, KvmError, PartialError
from hvmodel.kvm import CpuidEntry, Kvm, Vcpu, Vm
from hvmodel.kvm.exits import Debug, Hlt, IoOut
from hvmodel.witness import Stats
from tests.kvm.guest import CODE, HANDLER, Guest
from tests.kvm.rows import excused, exercises, vm_with

GuestMaker = Callable[..., Guest]

NOPS = b"\x90" * 8
OUT_AND_HALT = bytes.fromhex("b041 e610 f4")  # mov al, 'A'; out 0x10, al; hlt
HANDLER_OUT = bytes.fromhex("b048 e611 cf")  # mov al, 'H'; out 0x11, al; iret
SPIN = bytes.fromhex("ebfe")  # jmp $

STAR = 0xC0000081
LSTAR = 0xC0000082


def raw(struct: Any) -> bytes:
    """The bytes of what a pointer made by ffi.new points at."""
    return bytes(ffi.buffer(struct))


def address_of(cdata: object) -> int:
    return int(ffi.cast("uintptr_t", cdata))


# ---- running ----


@exercises("KVM_RUN")
def test_run_comes_back_with_what_the_guest_did(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)
    assert g.run() == IoOut(0x10, 1, 1, b"A")
    assert g.run() == Hlt()
    assert g.vcpu.regs.rip == CODE + len(OUT_AND_HALT)


@exercises("KVM_SET_SIGNAL_MASK")
def test_the_signal_mask_of_a_vcpu_is_that_of_kvm_run(guest: GuestMaker) -> None:
    g = guest(SPIN)
    everything = ffi.new("struct kvm_signal_mask *", {"len": 8, "sigset": 8})
    nothing = ffi.new("struct kvm_signal_mask *", {"len": 8, "sigset": [0xFF] * 8})
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        os.kill(os.getpid(), signal.SIGUSR2)  # pending, for it is blocked everywhere but in KVM_RUN
        g.vcpu.ioctl("KVM_SET_SIGNAL_MASK", everything)
        assert lib.kvm_run(g.vcpu.fd) == -errno.EINTR
        assert signal.SIGUSR2 in signal.sigpending()
        g.load(OUT_AND_HALT)
        g.vcpu.ioctl("KVM_SET_SIGNAL_MASK", nothing)
        assert lib.kvm_run(g.vcpu.fd) == 0
        assert g.vcpu._kvm_run.exit_reason == lib.KVM_EXIT_IO
    finally:
        assert signal.sigwait({signal.SIGUSR2}) == signal.SIGUSR2
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@exercises("KVM_SET_GUEST_DEBUG", cap="SET_GUEST_DEBUG")
def test_single_stepping_stops_behind_each_instruction(guest: GuestMaker) -> None:
    g = guest(NOPS)
    g.vcpu.guest_debug = ffi.new(
        "struct kvm_guest_debug *", {"control": lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP}
    )
    for step in (1, 2, 3):
        exit = g.run()
        assert isinstance(exit, Debug)
        assert exit.pc == CODE + step
    g.vcpu.guest_debug = ffi.new("struct kvm_guest_debug *")


@exercises("KVM_GET_STATS_FD", on="vcpu", cap="BINARY_STATS_FD")
def test_the_statistics_of_a_vcpu_count_its_exits(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)
    with Stats(g.vcpu.stats_fd()) as stats:
        assert stats.id == f"kvm-{os.getpid()}/vcpu-0"
        before = stats.read()["exits"]
        g.run()
        after = stats.read()["exits"]
    assert isinstance(before, int)
    assert isinstance(after, int)
    assert after > before


# ---- events ----


@exercises("KVM_INTERRUPT")
def test_an_injected_interrupt_runs_its_handler(guest: GuestMaker) -> None:
    g = guest(NOPS + b"\xf4")
    g.install(0x30, HANDLER_OUT)
    g.vcpu.interrupt(0x30)
    assert g.run() == IoOut(0x11, 1, 1, b"H")
    assert g.run() == Hlt()
    with pytest.raises(KvmError) as refused:
        g.vcpu.interrupt(256)
    assert (refused.value.errno, refused.value.field) == (errno.EINVAL, "vector")


@exercises("KVM_NMI", cap="USER_NMI")
def test_an_nmi_runs_the_handler_of_vector_2(guest: GuestMaker) -> None:
    g = guest(NOPS + b"\xf4")
    g.install(2, HANDLER_OUT)
    g.vcpu.nmi()
    assert g.run() == IoOut(0x11, 1, 1, b"H")
    assert g.run() == Hlt()


@exercises("KVM_SMI", cap="X86_SMM")
def test_an_smi_waits_for_the_next_entry(vcpu: Vcpu) -> None:
    vcpu.smi()
    events = vcpu.vcpu_events
    assert events.flags & lib.KVM_VCPUEVENT_VALID_SMM
    assert events.smi.pending == 1


@exercises("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", cap="VCPU_EVENTS")
def test_pending_events_are_delivered(guest: GuestMaker) -> None:
    g = guest(NOPS + b"\xf4")
    g.install(2, HANDLER_OUT)
    events = g.vcpu.vcpu_events
    assert events.nmi.pending == 0
    events.flags |= lib.KVM_VCPUEVENT_VALID_NMI_PENDING
    events.nmi.pending = 1
    g.vcpu.vcpu_events = events
    assert g.vcpu.vcpu_events.nmi.pending == 1
    assert g.run() == IoOut(0x11, 1, 1, b"H")
    assert g.vcpu.vcpu_events.nmi.pending == 0


@exercises("KVM_X86_SETUP_MCE", "KVM_X86_SET_MCE", cap="MCE")
def test_a_machine_check_is_in_its_bank(vcpu: Vcpu) -> None:
    banks, mcg_cap = 10, 1 << 8  # MCG_CTL_P
    vcpu.ioctl("KVM_X86_SETUP_MCE", mcg_cap | banks)
    assert vcpu.get_msrs([0x179]) == {0x179: mcg_cap | banks}  # IA32_MCG_CAP
    status = 1 << 63 | 0x9F  # valid, corrected
    vcpu.ioctl("KVM_X86_SET_MCE", ffi.new("struct kvm_x86_mce *", {"status": status, "addr": 0x1234, "bank": 2}))
    assert vcpu.get_msrs([0x400 + 4 * 2 + 1, 0x400 + 4 * 2 + 2]) == {0x409: status, 0x40A: 0x1234}
    with pytest.raises(KvmError):
        vcpu.ioctl("KVM_X86_SET_MCE", ffi.new("struct kvm_x86_mce *", {"status": status, "bank": banks}))


# ---- registers ----


@exercises("KVM_GET_REGS", "KVM_SET_REGS")
def test_registers_keep_what_was_set_and_the_guest_sees_them(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("e610 f4"))  # out 0x10, al; hlt
    regs = g.vcpu.regs
    for at, name in enumerate(("rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))):
        setattr(regs, name, 0x1111111111111111 * (at + 1))
    regs.rax = 0x5A
    g.vcpu.regs = regs
    assert raw(g.vcpu.regs) == raw(regs)
    assert g.run() == IoOut(0x10, 1, 1, b"\x5a")


@exercises("KVM_GET_SREGS", "KVM_SET_SREGS")
def test_segments_keep_what_was_set_and_the_guest_uses_them(guest: GuestMaker) -> None:
    g = guest(bytes.fromhex("a00000 e610 f4"))  # mov al, [0]; out 0x10, al; hlt
    g.ram.write(0x6000, b"\x66")
    sregs = g.vcpu.sregs
    sregs.ds.selector, sregs.ds.base = 0x600, 0x6000
    sregs.gdt.base, sregs.gdt.limit = 0x12000, 0x7F
    g.vcpu.sregs = sregs
    assert raw(g.vcpu.sregs) == raw(sregs)
    assert g.run() == IoOut(0x10, 1, 1, b"\x66")


@exercises("KVM_GET_SREGS2", "KVM_SET_SREGS2", cap="SREGS2")
def test_sregs2_shows_what_sregs_shows(vcpu: Vcpu) -> None:
    sregs2 = vcpu.sregs2
    sregs2.es.selector, sregs2.es.base, sregs2.cr2 = 0x700, 0x7000, 0xABCDEF000
    vcpu.sregs2 = sregs2
    assert raw(vcpu.sregs2) == raw(sregs2)
    sregs = vcpu.sregs
    assert (sregs.es.selector, sregs.es.base, sregs.cr2) == (0x700, 0x7000, 0xABCDEF000)


@exercises("KVM_GET_FPU", "KVM_SET_FPU")
@exercises("KVM_GET_XSAVE", "KVM_SET_XSAVE", cap="XSAVE")
def test_fpu_and_xsave_are_two_views_of_one_state(vcpu: Vcpu) -> None:
    # FXSAVE's layout: FCW at 0, ST(n) at 32 + 16 n, XMM(n) at 160 + 16 n; at 512 XSTATE_BV says what is not initial.
    area = vcpu.xsave
    data = ffi.buffer(area.region)
    data[0:2] = (0x27F).to_bytes(2, "little")
    data[48:58] = bytes(range(0xA0, 0xAA))
    data[208:224] = bytes(range(16))
    data[512:520] = (int.from_bytes(data[512:520], "little") | 3).to_bytes(8, "little")  # x87 and SSE
    vcpu.xsave = area
    fpu = vcpu.fpu
    assert fpu.fcw == 0x27F
    assert bytes(ffi.buffer(fpu.fpr[1]))[:10] == bytes(range(0xA0, 0xAA))
    assert bytes(ffi.buffer(fpu.xmm[3])) == bytes(range(16))
    fpu.fcw = 0x37E
    ffi.buffer(fpu.xmm[3])[:] = bytes(range(16, 32))
    vcpu.fpu = fpu
    assert raw(vcpu.fpu) == raw(fpu)
    data = ffi.buffer(vcpu.xsave.region)
    assert data[0:2] == (0x37E).to_bytes(2, "little")
    assert data[208:224] == bytes(range(16, 32))


@exercises("KVM_GET_XSAVE2", cap="XSAVE2")
def test_xsave2_begins_as_xsave(vcpu: Vcpu) -> None:
    size = vcpu.vm.check_extension(lib.KVM_CAP_XSAVE2)
    assert size >= ffi.sizeof("struct kvm_xsave")
    area = ffi.new("uint8_t[]", size)
    vcpu.ioctl("KVM_GET_XSAVE2", ffi.cast("struct kvm_xsave *", area))
    assert bytes(ffi.buffer(area, ffi.sizeof("struct kvm_xsave"))) == raw(vcpu.xsave)


@exercises("KVM_GET_XCRS", "KVM_SET_XCRS", cap="XCRS")
def test_xcr0_keeps_what_was_set(kvm: Kvm, vcpu: Vcpu) -> None:
    vcpu.set_cpuid2(kvm.supported_cpuid_table())
    xcrs = vcpu.xcrs
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 1)
    xcrs.xcrs[0].value = 3  # x87 and SSE, which every processor with XSAVE has
    vcpu.xcrs = xcrs
    assert vcpu.xcrs.xcrs[0].value == 3
    xcrs.xcrs[0].value = 2  # SSE without x87: SDM vol. 1 section 13.3
    with pytest.raises(KvmError):
        vcpu.xcrs = xcrs


@exercises("KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS", cap="DEBUGREGS")
def test_debug_registers_keep_what_was_set(vcpu: Vcpu) -> None:
    debugregs = vcpu.debugregs
    assert debugregs.dr7 == 0x400
    for at in range(4):
        debugregs.db[at] = 0x1000 * (at + 1)
    debugregs.dr7 = 0x455
    vcpu.debugregs = debugregs
    assert raw(vcpu.debugregs) == raw(debugregs)


@exercises("KVM_GET_MP_STATE", "KVM_SET_MP_STATE", cap="MP_STATE")
def test_a_halted_vcpu_can_be_made_runnable(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT, irqchip=True)
    assert g.vcpu.mp_state.mp_state == lib.KVM_MP_STATE_RUNNABLE
    for state in (lib.KVM_MP_STATE_HALTED, lib.KVM_MP_STATE_RUNNABLE):
        g.vcpu.mp_state = ffi.new("struct kvm_mp_state *", [state])
        assert g.vcpu.mp_state.mp_state == state
    assert g.run() == IoOut(0x10, 1, 1, b"A")


@exercises("KVM_GET_LAPIC", "KVM_SET_LAPIC", cap="IRQCHIP")
def test_the_local_apic_keeps_what_was_set(guest: GuestMaker) -> None:
    g = guest(irqchip=True)
    lapic = g.vcpu.lapic
    regs = ffi.buffer(lapic.regs)
    assert regs[0x30][0] & 0xF0 == 0x10  # version register: an integrated APIC (SDM vol. 3 section 11.4.8)
    regs[0x80:0x84] = (0x50).to_bytes(4, "little")  # task priority
    g.vcpu.lapic = lapic
    assert bytes(ffi.buffer(g.vcpu.lapic.regs)[0x80:0x84]) == (0x50).to_bytes(4, "little")
    assert g.vcpu.sregs.cr8 == 5  # the same register, seen from the processor


@exercises("KVM_GET_MSRS", on="vcpu")
@exercises("KVM_SET_MSRS")
def test_msrs_keep_what_was_set(vcpu: Vcpu) -> None:
    values = {STAR: 0x0023001000000000, LSTAR: 0xFFFF800000001234, 0x174: 0x10}
    vcpu.set_msrs(values)
    assert vcpu.get_msrs(values) == values
    with pytest.raises(PartialError) as refused:
        vcpu.set_msrs({STAR: 1, 0x12345678: 2, LSTAR: 3})
    assert (refused.value.done, refused.value.requested, refused.value.first_failed) == (1, 3, 0x12345678)
    assert vcpu.get_msrs([STAR, LSTAR]) == {STAR: 1, LSTAR: values[LSTAR]}


def msr_register(index: int) -> int:
    """The id of an MSR as a register (linux:arch/x86/include/uapi/asm/kvm.h struct kvm_x86_reg_id@v6.18)."""
    return lib.KVM_REG_X86 | lib.KVM_REG_SIZE_U64 | lib.KVM_X86_REG_TYPE_MSR << 32 | index


@exercises("KVM_GET_ONE_REG", "KVM_SET_ONE_REG", cap="ONE_REG")
def test_one_register_is_the_msr_it_names(vcpu: Vcpu) -> None:
    value = ffi.new("uint64_t *", 0xFFFF800000005678)
    register = ffi.new("struct kvm_one_reg *", {"id": msr_register(LSTAR), "addr": address_of(value)})
    vcpu.ioctl("KVM_SET_ONE_REG", register)
    assert vcpu.get_msrs([LSTAR]) == {LSTAR: 0xFFFF800000005678}
    vcpu.set_msrs({LSTAR: 0x1234})
    vcpu.ioctl("KVM_GET_ONE_REG", register)
    assert value[0] == 0x1234


@exercises("KVM_GET_REG_LIST", cap="ONE_REG")
def test_every_listed_register_can_be_read(vcpu: Vcpu) -> None:
    table = ffi.new("struct kvm_reg_list *", {"n": 64, "reg": 64})
    vcpu.ioctl("KVM_GET_REG_LIST", table)
    assert table.n <= 64
    value = ffi.new("uint64_t *")
    for at in range(table.n):
        vcpu.ioctl("KVM_GET_ONE_REG", ffi.new("struct kvm_one_reg *", {"id": table.reg[at], "addr": address_of(value)}))


@exercises("KVM_TRANSLATE")
def test_without_paging_an_address_translates_to_itself(guest: GuestMaker) -> None:
    where = guest().vcpu.translate(0x1234)
    assert (where.gpa, where.valid) == (0x1234, True)


# ---- CPUID ----


@exercises("KVM_SET_CPUID2", "KVM_GET_CPUID2", cap="EXT_CPUID")
def test_the_guest_sees_the_cpuid_that_was_set(guest: GuestMaker) -> None:
    # mov eax, 0x40000100; cpuid; out 0x10, ebx; hlt
    g = guest(bytes.fromhex("66b800010040 0fa2 6689d8 66e710 f4"))
    mine = CpuidEntry(0x40000100, 0, 0, 0x40000100, 0x11223344, 0x55667788, 0x99AABBCC)
    g.vcpu.set_cpuid2([*g.kvm.supported_cpuid(), mine])
    assert mine in g.vcpu.get_cpuid2()
    assert g.run() == IoOut(0x10, 4, 1, (0x11223344).to_bytes(4, "little"))


@exercises("KVM_SET_CPUID")
def test_the_first_kind_of_cpuid_list_is_one_of_the_second(vcpu: Vcpu) -> None:
    table = ffi.new("struct kvm_cpuid *", {"nent": 1, "entries": [{"function": 0x40000100, "ebx": 0x1234}]})
    vcpu.ioctl("KVM_SET_CPUID", table)
    assert [(e.function, e.ebx) for e in vcpu.get_cpuid2()] == [(0x40000100, 0x1234)]


@exercises("KVM_GET_SUPPORTED_HV_CPUID", on="vcpu", cap="HYPERV_CPUID")
def test_hyperv_cpuid_of_a_vcpu(vcpu: Vcpu) -> None:
    table = ffi.new("struct kvm_cpuid2 *", {"nent": 64, "entries": 64})
    vcpu.ioctl("KVM_GET_SUPPORTED_HV_CPUID", table)
    assert 0x40000000 in {table.entries[at].function for at in range(table.nent)}


@exercises("KVM_ENABLE_CAP", on="vcpu", cap="ENFORCE_PV_FEATURE_CPUID")
def test_enable_cap_of_a_vcpu_takes_paravirtual_msrs_away(guest: GuestMaker) -> None:
    # mov ecx, 0x4b564d00 (MSR_KVM_WALL_CLOCK_NEW); rdmsr; hlt; without CPUID saying so it must raise #GP.
    code = bytes.fromhex("66b9004d564b 0f32 f4")
    g = guest(code)
    g.install(13, HANDLER_OUT)
    assert g.run() == Hlt()
    g.vcpu.enable_cap(lib.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    g.load(code)
    assert g.run() == IoOut(0x11, 1, 1, b"H")
    with pytest.raises(KvmError):
        g.vcpu.enable_cap(lib.KVM_CAP_SPLIT_IRQCHIP, 24)  # a VM's


# ---- time ----


@exercises("KVM_GET_TSC_KHZ", on="vcpu", cap="GET_TSC_KHZ")
def test_the_tsc_runs_at_its_frequency(vcpu: Vcpu) -> None:
    def sample() -> tuple[int, int, int]:
        return time.monotonic_ns(), vcpu.get_msrs([0x10])[0x10], time.monotonic_ns()

    first = sample()
    time.sleep(0.02)
    second = sample()
    ticks = second[1] - first[1]
    # Between the inner and the outer distance of the two readings, with 0.5 % for a clock that is being disciplined.
    assert (second[0] - first[2]) * 0.995 <= ticks * 1e6 / vcpu.tsc_khz <= (second[2] - first[0]) * 1.005


@exercises("KVM_SET_TSC_KHZ", on="vcpu")
def test_the_tsc_frequency_can_be_set_to_what_it_is(vcpu: Vcpu) -> None:
    khz = vcpu.tsc_khz
    vcpu.tsc_khz = khz
    assert vcpu.tsc_khz == khz
    with pytest.raises(ArgumentError, match="tsc_khz"):  # KVM takes it, and KVM_GET_TSC_KHZ returns it as an int
        vcpu.tsc_khz = 1 << 31
    assert vcpu.tsc_khz == khz
    if vcpu.vm.check_extension(lib.KVM_CAP_TSC_CONTROL):
        vcpu.tsc_khz = khz // 2
        assert vcpu.tsc_khz == khz // 2
    else:
        with pytest.raises(KvmError, match="KVM_CAP_TSC_CONTROL"):
            vcpu.tsc_khz = khz // 2


@exercises("KVM_HAS_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR", on="vcpu", cap="VCPU_ATTRIBUTES")
@exercises("KVM_SET_DEVICE_ATTR", on="vcpu", cap="VCPU_ATTRIBUTES")
def test_the_tsc_offset_moves_the_tsc(vcpu: Vcpu) -> None:
    value = ffi.new("uint64_t *")
    attr = ffi.new(
        "struct kvm_device_attr *",
        {"group": lib.KVM_VCPU_TSC_CTRL, "attr": lib.KVM_VCPU_TSC_OFFSET, "addr": address_of(value)},
    )
    vcpu.ioctl("KVM_HAS_DEVICE_ATTR", attr)
    vcpu.ioctl("KVM_GET_DEVICE_ATTR", attr)
    old, before = value[0], vcpu.get_msrs([0x10])[0x10]
    distance = 1 << 50
    value[0] = (old + distance) % (1 << 64)
    vcpu.ioctl("KVM_SET_DEVICE_ATTR", attr)
    after = vcpu.get_msrs([0x10])[0x10]
    vcpu.ioctl("KVM_GET_DEVICE_ATTR", attr)
    moved = (value[0] - old) % (1 << 64)
    assert moved in (0, distance)  # 0: a host that gives its own TSC to guests
    assert moved <= after - before < moved + (1 << 40)  # some minutes of ticks are room enough


@exercises("KVM_KVMCLOCK_CTRL", cap="KVMCLOCK_CTRL")
def test_kvmclock_tells_the_guest_that_it_was_stopped(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)
    with pytest.raises(KvmError) as refused:
        g.vcpu.ioctl("KVM_KVMCLOCK_CTRL")  # the guest has no kvmclock yet
    assert refused.value.errno == errno.EINVAL
    g.vcpu.set_msrs({0x4B564D01: 0x5000 | 1})  # MSR_KVM_SYSTEM_TIME_NEW: at 0x5000, enabled
    assert g.run() == IoOut(0x10, 1, 1, b"A")
    flags = 0x5000 + 29  # struct pvclock_vcpu_time_info: u32 version, pad; u64 tsc, time; u32 mul; s8 shift; u8 flags
    assert g.ram.read(flags, 1)[0] & 2 == 0
    g.vcpu.ioctl("KVM_KVMCLOCK_CTRL")
    assert g.run() == Hlt()
    assert g.ram.read(flags, 1)[0] & 2  # PVCLOCK_GUEST_STOPPED


# ---- TPR ----


@exercises("KVM_TPR_ACCESS_REPORTING", cap="VAPIC")
def test_tpr_access_reporting_has_no_flags(vcpu: Vcpu) -> None:
    control = ffi.new("struct kvm_tpr_access_ctl *", {"enabled": 1})
    vcpu.ioctl("KVM_TPR_ACCESS_REPORTING", control)
    control.flags = 1
    with pytest.raises(KvmError) as refused:
        vcpu.ioctl("KVM_TPR_ACCESS_REPORTING", control)
    assert refused.value.errno == errno.EINVAL


@exercises("KVM_SET_VAPIC_ADDR", cap="VAPIC")
def test_the_vapic_page_lies_in_a_slot(guest: GuestMaker) -> None:
    g = guest(irqchip=True)
    g.vcpu.ioctl("KVM_SET_VAPIC_ADDR", ffi.new("struct kvm_vapic_addr *", [0x3000]))
    with pytest.raises(KvmError):
        g.vcpu.ioctl("KVM_SET_VAPIC_ADDR", ffi.new("struct kvm_vapic_addr *", [1 << 32]))
    with pytest.raises(KvmError):
        guest().vcpu.ioctl("KVM_SET_VAPIC_ADDR", ffi.new("struct kvm_vapic_addr *", [0x3000]))  # no local APIC


# ---- nested, Xen, encrypted, pre-faulted ----


@exercises("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE", cap="NESTED_STATE")
def test_nested_state_can_be_set_to_what_it_is(kvm: Kvm, vcpu: Vcpu) -> None:
    size = vcpu.vm.check_extension(lib.KVM_CAP_NESTED_STATE)
    vcpu.set_cpuid2(kvm.supported_cpuid_table())
    room = ffi.new("uint8_t[]", size)
    state = ffi.cast("struct kvm_nested_state *", room)
    state.size = size
    vcpu.ioctl("KVM_GET_NESTED_STATE", state)
    assert ffi.sizeof("struct kvm_nested_state") <= state.size <= size
    vcpu.ioctl("KVM_SET_NESTED_STATE", state)


@exercises("KVM_XEN_VCPU_SET_ATTR", "KVM_XEN_VCPU_GET_ATTR", cap="XEN_HVM")
def test_xen_attributes_of_a_vcpu_keep_what_was_set(guest: GuestMaker) -> None:
    g = guest()
    config = {"flags": lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, "msr": 0x40000000}
    g.vm.ioctl("KVM_XEN_HVM_CONFIG", ffi.new("struct kvm_xen_hvm_config *", config))
    attr = ffi.new("struct kvm_xen_vcpu_attr *", {"type": lib.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, "u": {"gpa": 0x4000}})
    g.vcpu.ioctl("KVM_XEN_VCPU_SET_ATTR", attr)
    attr.u.gpa = 0
    g.vcpu.ioctl("KVM_XEN_VCPU_GET_ATTR", attr)
    assert attr.u.gpa == 0x4000


@excused("KVM_MEMORY_ENCRYPT_OP", on="vcpu")
def test_only_a_tdx_vcpu_takes_commands(vcpu: Vcpu) -> str:
    # A TDX vCPU exists on a TDX VM only, which takes the platform's TDX module.
    with pytest.raises(KvmError) as refused:
        vcpu.ioctl("KVM_MEMORY_ENCRYPT_OP", ffi.new("uint64_t[8]"))
    name = errno.errorcode[refused.value.errno or 0]
    assert name in ("ENOTTY", "EINVAL")
    return f"takes a TDX vCPU; a plain one answers {name}"


@exercises("KVM_PRE_FAULT_MEMORY", cap="PRE_FAULT_MEMORY")
def test_pre_faulting_goes_through_the_range(kvm: Kvm) -> None:
    vm: Vm | None = vm_with(kvm, "PRE_FAULT_MEMORY")
    assert vm is not None
    with Guest(kvm) as g:
        arg = ffi.new("struct kvm_pre_fault_memory *", {"gpa": 0, "size": 0x10000})
        g.vcpu.ioctl("KVM_PRE_FAULT_MEMORY", arg)
        assert (arg.gpa, arg.size) == (0x10000, 0)
    vm.close()


def test_the_handler_lies_where_the_table_says(guest: GuestMaker) -> None:
    g = guest()
    g.install(0x21, b"\xcf")
    assert g.ram.read(4 * 0x21, 4) == HANDLER.to_bytes(4, "little")
