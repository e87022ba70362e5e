"""Cpu's registers: what is read at an exit is what KVM_GET_REGS and KVM_GET_SREGS say, and what is written arrives.

Expected: the ioctls themselves, asked behind the attributes; what the guest then does; struct kvm_regs of the kernel.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.machine import Cpu
from hvmodel.state import Regs, Sregs, VcpuEvents, VcpuState
from tests.cases import cases
from tests.need import need, need_cap

Boot = Callable[..., hv.Machine]

NAMES = [name for name, _ in ffi.typeof("struct kvm_regs").fields or ()]


def of_kernel(cpu: Cpu) -> tuple[bytes, bytes]:
    """What the two ioctls say; reading them does not change what the attributes would do."""
    kvm = cpu.kvm
    return bytes(ffi.buffer(kvm.regs)), bytes(ffi.buffer(kvm.sregs))


def ours(cpu: Cpu) -> tuple[bytes, bytes]:
    """The same by the attributes."""
    return bytes(cpu.regs), bytes(cpu.sregs)


def is_free(cpu: Cpu) -> bool:
    """Whether all registers are at hand, without an ioctl."""
    c, both = cpu.kvm._c, lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS
    fresh = c.fresh if c.begun == c.seen else 0
    return bool((fresh | c.written) & both == both)


# mov al, 'A'; again: out 0x10, al; in al, 0x20; out 0x11, al; inc byte [0x9000]; hlt; jmp again
MANY = bytes.fromhex("b041 e610 e420 e611 fe060090 f4 ebf3")


def test_the_registers_of_every_exit_are_those_of_the_kernel(boot: Boot) -> None:
    machine = boot(MANY)
    need_cap(machine.vm, "SYNC_REGS")
    cpu = machine.vcpu
    exits = machine.exits(20)
    seen = set()
    for turn in range(60):
        exit = next(exits)
        seen.add(type(exit).__name__)
        assert is_free(cpu), exit
        mine = ours(cpu)
        each = [getattr(cpu, name) for name in NAMES]
        assert is_free(cpu)
        assert mine == of_kernel(cpu)
        assert each == list(memoryview(mine[0]).cast("Q"))
        if isinstance(exit, hv.IoIn):
            assert cpu.rip == 0x7C04  # at the instruction
            machine.answer(turn)
            assert ours(cpu) == of_kernel(cpu)
    assert seen == {"IoOut", "IoIn", "Hlt"}


def test_an_interrupted_guest_s_registers(boot: Boot) -> None:
    machine = boot("e610 40 ebfd")  # out 0x10, al; again: inc ax; jmp again
    exits = machine.exits(20)
    next(exits)
    for _ in range(5):
        machine.kick()
        assert next(exits) == hv.Interrupted("kick")
        assert ours(machine.vcpu) == of_kernel(machine.vcpu)
    # An interruption before anything has run.
    machine.vcpu.real_mode(0x7C00)
    machine.kick()
    assert next(exits) == hv.Interrupted("kick")
    assert machine.vcpu.rip == 0x7C00
    assert ours(machine.vcpu) == of_kernel(machine.vcpu)


def test_a_pending_interrupt_does_not_stay_in_the_page(boot: Boot) -> None:
    # KVM sets its bit in sregs.interrupt_bitmap of the page and clears none (x86.c __get_sregs@v6.18).
    machine = boot("fb e610 e611 f4")
    machine.write(4 * 0x21, (0x8000).to_bytes(4, "little"))
    machine.write(0x8000, bytes.fromhex("e612 cf"))  # out 0x12, al; iret
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.kvm.interrupt(0x21)
    machine.kick()
    assert next(exits) == hv.Interrupted("kick")
    assert cpu.sregs.interrupt_bitmap == (1 << 0x21, 0, 0, 0)
    assert ours(cpu) == of_kernel(cpu)
    assert next(exits) == hv.IoOut(0x12, 1, 1, b"\0")
    assert cpu.sregs.interrupt_bitmap == (0, 0, 0, 0)
    assert ours(cpu) == of_kernel(cpu)


@pytest.mark.parametrize("name", NAMES)
def test_a_register_that_is_written_is_the_guest_s(boot: Boot, name: str) -> None:
    machine = boot("e610 e610 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    value = {"rip": 0x7C02, "rflags": 0x246}.get(name, 0x123456789ABCDEF0)
    setattr(cpu, name, value)
    assert getattr(cpu, name) == value  # before KVM has it
    before = cpu.regs
    assert getattr(before, name) == value
    assert bytes(before) == of_kernel(cpu)[0]  # the ioctl gives it to KVM first
    assert isinstance(next(exits), hv.IoOut)
    at_exit = {"rip": 0x7C04}.get(name, value)
    assert getattr(cpu, name) == at_exit
    assert ours(cpu) == of_kernel(cpu)


def test_what_is_written_goes_with_the_next_run(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    need_cap(machine.vm, "SYNC_REGS")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.kvm.complete_io()
    cpu.rax, cpu.rbx = 0x55, 7
    assert cpu.kvm._c.written == lib.KVM_SYNC_X86_REGS
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x55")
    assert (cpu.kvm._c.written, cpu.kvm.kvm_dirty_regs, cpu.rbx) == (0, 0, 7)


def test_all_registers_at_once(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    regs = cpu.regs
    cpu.regs = regs.replace(rax=0x77, r15=1 << 63)
    assert (regs.rax, cpu.rax, cpu.r15) == (0, 0x77, 1 << 63)  # a value stays what it was
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x77")
    assert regs == pickle.loads(pickle.dumps(regs))
    with pytest.raises(hv.ArgumentTypeError, match=r"Cpu\.regs: value: expected a hvmodel\.state\.Regs"):
        cpu.regs = cpu.sregs  # type: ignore[assignment]
    with pytest.raises(hv.ArgumentTypeError, match=r"Cpu\.sregs: value: expected a hvmodel\.state\.Sregs"):
        cpu.sregs = cpu.kvm.sregs  # type: ignore[assignment]


def test_sregs_are_set_at_once(boot: Boot) -> None:
    machine = boot("e610 8a07 e611 f4")  # out; mov al, [bx]; out
    cpu, exits = machine.vcpu, machine.exits(20)
    machine.write(0x12340, b"\x99")
    next(exits)
    cpu.rbx = 0
    cpu.sregs = cpu.sregs.replace(**{"ds.base": 0x12340, "ds.selector": 0x1234})
    assert cpu.kvm.sregs.ds.base == 0x12340
    assert cpu.sregs.ds.selector == 0x1234
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x99")


def test_a_refused_sregs_leaves_the_vcpu_as_it_was(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.rax = 0x21
    before = of_kernel(cpu)
    with pytest.raises(hv.RefusedStateError) as refused:
        cpu.sregs = cpu.sregs.replace(cr4=1 << 63)
    assert (refused.value.errno, refused.value.field) == (errno.EINVAL, "cr4")
    assert of_kernel(cpu) == before == ours(cpu)
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x21")


def test_cr8_outlasts_the_next_entry(boot: Boot) -> None:
    # Without an in-kernel APIC KVM_RUN loads CR8 from kvm_run (x86.c kvm_arch_vcpu_ioctl_run@v6.18).
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    for put in (
        lambda value: setattr(cpu, "sregs", cpu.sregs.replace(cr8=value)),
        lambda value: VcpuState(sregs=cpu.sregs.replace(cr8=value)).put(cpu),
    ):
        machine.vcpu.real_mode(0x7C00)
        next(exits)
        put(5)
        next(exits)
        assert cpu.sregs.cr8 == cpu.kvm.sregs.cr8 == cpu.kvm.cr8 == 5
        put(0)


def test_a_cr8_that_kvm_ignores_is_not_given_to_the_next_entry(boot: Boot) -> None:
    # KVM_SET_SREGS takes 4 bits or nothing, KVM_RUN refuses more of the page (x86.c kvm_set_cr8@v6.18).
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)

    def by_struct() -> None:
        sregs = cpu.kvm.sregs
        sregs.cr8 = 0x10
        cpu.kvm.sregs = sregs

    def set_cr8(value: int) -> None:
        cpu.sregs = cpu.sregs.replace(cr8=value)

    def by_state() -> None:
        VcpuState(sregs=cpu.sregs.replace(cr8=0x10)).put(cpu)

    for put in (lambda: set_cr8(0x10), lambda: set_cr8(1 << 63), by_struct, by_state):
        cpu.real_mode(0x7C00)
        next(exits)
        set_cr8(5)
        put()
        assert cpu.sregs.cr8 == 5
        assert next(exits) == hv.IoOut(0x11, 1, 1, b"\0")
        assert cpu.sregs.cr8 == cpu.kvm.sregs.cr8 == 5


# ---- exits that are not finished ----


def test_an_unanswered_read_can_be_looked_at_but_not_changed(boot: Boot) -> None:
    machine = boot("b401 e420 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    assert next(exits) == hv.IoIn(0x20, 1, 1)
    before = ours(cpu)
    changes: list[Callable[[], object]] = [
        lambda: setattr(cpu, "rax", 1),
        lambda: setattr(cpu, "rflags", 2),
        lambda: setattr(cpu, "regs", Regs()),
        lambda: setattr(cpu, "sregs", cpu.sregs),
    ]
    for change in changes:
        with pytest.raises(hv.UnansweredError, match="IoIn"):
            change()
        assert ours(cpu) == before == of_kernel(cpu)
    machine.answer(0x66)
    cpu.rbx = 1  # finishes the read, and then is written
    assert (cpu.rax, cpu.rip) == (0x166, 0x7C04)
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x66")
    assert cpu.rbx == 1


def test_the_second_half_of_a_read_must_be_answered_first(boot: Boot) -> None:
    # A 16-byte load is two exits: written in between, registers would be lost when the instruction ends.
    need("gcc")
    from tests.guests import assemble

    machine = boot(assemble("mmio", GPA=0xD0000000, SIZE=16))
    cpu, exits = machine.vcpu, machine.exits(20)
    assert next(exits) == hv.MmioRead(0xD0000000, 8)
    machine.answer(b"abcdefgh")
    with pytest.raises(hv.UnansweredError, match="0xd0000008"):
        cpu.rcx = 5
    assert next(exits) == hv.MmioRead(0xD0000008, 8)
    machine.answer(b"ijklmnop")
    cpu.rcx = 5
    assert cpu.kvm.regs.rcx == 5


def test_an_exit_that_a_signal_s_handler_kept_back(boot: Boot) -> None:
    machine = boot("e610 e420 f4")
    cpu = machine.vcpu
    exits = machine.exits(20)
    next(exits)
    lib.hv_unread(cpu.kvm._c)  # as after a handler that raised: the next run answers it again
    assert (cpu.rip, ours(cpu)) == (0x7C02, of_kernel(cpu))
    assert next(exits) == hv.IoOut(0x10, 1, 1, b"\0")
    assert next(exits) == hv.IoIn(0x20, 1, 1)
    lib.hv_unread(cpu.kvm._c)
    with pytest.raises(hv.UnansweredError):
        cpu.rax = 1


# ---- events ----


def test_registers_that_are_written_leave_a_pending_exception(boot: Boot) -> None:
    # KVM_SET_REGS and kvm_dirty_regs drop it (x86.c __set_regs@v6.18); writing a register does not.
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    machine.write(4 * 6, (0x8000).to_bytes(4, "little"))
    machine.write(0x8000, bytes.fromhex("e612 f4"))
    for write in (
        lambda: setattr(cpu, "rax", 0x31),
        lambda: setattr(cpu, "regs", cpu.regs.replace(rax=0x31)),
    ):
        cpu.real_mode(0x7C00)
        next(exits)
        cpu.kvm.complete_io()
        events = cpu.kvm.vcpu_events
        events.exception.injected, events.exception.nr = 1, 6
        cpu.kvm.vcpu_events = events
        write()
        assert cpu.rax == 0x31
        assert next(exits) == hv.IoOut(0x12, 1, 1, b"\x31")


@pytest.mark.parametrize("name", ["rax", "rflags", "regs"])
def test_the_trap_with_which_hlt_exits_is_kept(boot: Boot, name: str) -> None:
    # With RFLAGS.TF its #DB waits behind HLT, and at this exit no instruction is to be finished.
    machine = boot("f4 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    machine.write(4 * 1, (0x8000).to_bytes(4, "little"))
    machine.write(0x8000, bytes.fromhex("e612 f4"))
    cpu.rflags = 0x102
    assert next(exits) == hv.Hlt()
    setattr(cpu, name, {"rax": 0x31, "rflags": 2, "regs": cpu.regs.replace(rax=0x31)}[name])
    assert next(exits) == hv.IoOut(0x12, 1, 1, b"\0" if name == "rflags" else b"\x31")


def test_a_payload_that_is_pending_survives_too(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    need_cap(machine.vm, "EXCEPTION_PAYLOAD")
    machine.vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.kvm.complete_io()
    events = cpu.kvm.vcpu_events
    events.flags |= lib.KVM_VCPUEVENT_VALID_PAYLOAD
    events.exception.pending, events.exception.nr = 1, 1
    events.exception_has_payload, events.exception_payload = 1, 0x4000
    cpu.kvm.vcpu_events = events
    before = VcpuEvents.from_bytes(ffi.buffer(cpu.kvm.vcpu_events))
    assert before.exception.pending
    cpu.rbx = 3
    cpu.rcx = 4
    assert VcpuEvents.from_bytes(ffi.buffer(cpu.kvm.vcpu_events)) == before
    assert (cpu.rbx, cpu.rcx, cpu.kvm.regs.rcx) == (3, 4, 4)


@pytest.mark.parametrize("rflags", [0, 2, 8, 0x8000, 0x20002, 0x10002, 0x40002, (1 << 64) - 1, 0x3000, 0xED7])
def test_flags_that_kvm_does_not_keep_are_not_made_up(boot: Boot, rflags: int) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.rflags = rflags
    assert cpu.rflags == cpu.kvm.regs.rflags
    assert cpu.rflags & 2


# ---- other ways to the state ----


def ways(cpu: Cpu) -> dict[str, Callable[[], object]]:
    """Calls that change a vCPU's state, each past the attributes."""
    kvm = cpu.kvm

    def regs() -> None:
        value = kvm.regs
        value.rdx = 0xABC
        kvm.regs = value

    def raw() -> None:
        value = kvm.regs
        value.rdx = 0xABC
        kvm.ioctl("KVM_SET_REGS", value)

    def page() -> None:
        value = kvm.sync_regs
        value.regs.rdx = 0xABC
        kvm.sync_regs = value
        kvm.kvm_dirty_regs = lib.KVM_SYNC_X86_REGS

    def state() -> None:
        VcpuState.get(kvm).replace(**{"regs.rdx": 0xABC}).put(kvm)

    def by_fd() -> None:
        value = ffi.new("struct kvm_regs *")
        assert lib.kvm_get_regs(kvm.fd, value) == 0
        value.rdx = 0xABC
        assert lib.kvm_set_regs(kvm.fd, value) == 0

    return {"regs": regs, "ioctl": raw, "page": page, "state": state, "fd": by_fd}


@pytest.mark.parametrize("way", ["regs", "ioctl", "page", "state", "fd"])
@pytest.mark.parametrize("written", [False, True])
def test_nothing_old_is_seen_whatever_way_the_state_changed(boot: Boot, way: str, written: bool) -> None:
    machine = boot("e610 e611 e612 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.kvm.complete_io()
    if written:
        cpu.rax, cpu.rsi = 0x44, 0x45
    ways(cpu)[way]()
    assert cpu.rdx == 0xABC
    if written:
        assert (cpu.rax, cpu.rsi) == (0x44, 0x45)
    next(exits)
    assert cpu.rdx == 0xABC
    assert ours(cpu) == of_kernel(cpu)
    cpu.rdi = 9
    next(exits)
    assert (cpu.rdx, cpu.rdi) == (0xABC, 9)


def test_a_descriptor_that_was_handed_out_is_never_trusted(boot: Boot) -> None:
    machine = boot("e610 e611 e612 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    fd = cpu.kvm.fileno()
    value = ffi.new("struct kvm_regs *")
    for rbp in range(3):
        next(exits)
        lib.kvm_get_regs(fd, value)
        value.rbp = 0x100 + rbp
        lib.kvm_set_regs(fd, value)
        assert cpu.rbp == 0x100 + rbp
        cpu.rbx = rbp + 1
        lib.kvm_get_regs(fd, value)
        assert (value.rbx, value.rbp) == (rbp + 1, 0x100 + rbp)


def test_msrs_and_events_that_show_in_sregs(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.kvm.complete_io()
    assert cpu.sregs.efer == 0
    cpu.kvm.set_msrs({0xC0000080: 0x100})  # EFER.LME
    assert cpu.sregs.efer == 0x100
    cpu.kvm.set_msrs({0xC0000080: 0})
    cpu.kvm.interrupt(0x30)
    assert cpu.sregs.interrupt_bitmap[0] == 1 << 0x30
    cpu.reset()
    assert cpu.sregs.interrupt_bitmap[0] == of_kernel(cpu)[1][-32] == 0
    assert (cpu.rip, cpu.sregs.cs.base) == (0xFFF0, 0xFFFF0000)


def test_a_host_without_sync_regs(boot: Boot) -> None:
    # As before Linux 4.17: no bit of it may be used, and all is asked and set by ioctls.
    machine = boot("e610 e611 e612 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    cpu.kvm.kvm_valid_regs = 0
    cpu.kvm._c.sync = 0
    for at in range(3):
        next(exits)
        assert not is_free(cpu)
        assert cpu.rip == 0x7C02 + 2 * at
        assert ours(cpu) == of_kernel(cpu)
        cpu.rax = at + 1
        assert (cpu.rax, cpu.kvm.regs.rax) == (at + 1, at + 1)
        cpu.rax = at + 1
    assert isinstance(next(exits), hv.Hlt)
    assert cpu.rax == 3


def test_registers_beside_a_batch(boot: Boot) -> None:
    machine = boot("40 e610 ebfb")  # again: inc ax; out 0x10, al; jmp again
    machine.batch.pio(0x10, 1, write="ignore")
    machine.batch.configure(max_exits=100)
    cpu = machine.vcpu
    for turn in range(1, 4):
        assert cpu.kvm.run(10) == hv.Interrupted("limit")
        assert ours(cpu) == of_kernel(cpu)
        assert cpu.rax == 100 * turn + (turn - 1) * 1000
        cpu.rax += 1000


# ---- wrong ----


@pytest.mark.parametrize("value", [-1, 1 << 64, "1", 1.0, None, True, b"\0"])
def test_wrong_values(boot: Boot, value: Any) -> None:
    cpu = boot().vcpu
    before = ours(cpu)
    for name in ("rax", "rip", "rflags"):
        with pytest.raises((hv.ArgumentError, hv.ArgumentTypeError), match=f"Cpu.{name}"):
            setattr(cpu, name, value)
        with pytest.raises(AttributeError):
            delattr(cpu, name)
    assert ours(cpu) == before == of_kernel(cpu)


def test_a_closed_machine_s_registers(boot: Boot) -> None:
    machine = boot()
    cpu = machine.vcpu
    regs, sregs = cpu.regs, cpu.sregs
    machine.close()
    calls: list[Callable[[], object]] = [
        lambda: cpu.rip,
        lambda: cpu.regs,
        lambda: cpu.sregs,
        lambda: setattr(cpu, "rax", 1),
        lambda: setattr(cpu, "regs", regs),
        lambda: setattr(cpu, "sregs", sregs),
    ]
    for call in calls:
        with pytest.raises(hv.ClosedError):
            call()
    # The C side's structs are used again: another vCPU in the same place is another one.
    with hv.Machine(ram="64K") as other:
        assert other.vcpu.rip == 0xFFF0
        for call in calls:
            with pytest.raises(hv.ClosedError):
                call()


def test_a_forked_child_gets_nothing(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    regs = cpu.regs
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            calls: list[Callable[[], object]] = [
                lambda: cpu.rip,
                lambda: cpu.regs,
                lambda: setattr(cpu, "rax", 1),
                lambda: setattr(cpu, "regs", regs),
                lambda: cpu.kvm.cr8,
                lambda: setattr(cpu.kvm, "cr8", 1),
            ]
            for call in calls:
                with pytest.raises(hv.ForkedError):
                    call()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert cpu.regs == regs
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\0")


# ---- threads ----


@pytest.fixture
def spinning(boot: Boot) -> Iterator[hv.Machine]:
    """A machine that another thread runs."""
    machine = boot("ebfe")
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(machine.run(30)))
    thread.start()
    while machine.vcpu.kvm._c.runs == 0:
        pass
    yield machine
    while thread.is_alive():
        machine.kick()
        thread.join(0.01)
    assert getattr(found[0], "reason", None) == "interrupted"


def test_another_thread_s_vcpu_is_busy(spinning: hv.Machine) -> None:
    cpu = spinning.vcpu
    calls: list[Callable[[], object]] = [
        lambda: cpu.rip,
        lambda: cpu.regs,
        lambda: cpu.sregs,
        lambda: setattr(cpu, "rax", 1),
        lambda: setattr(cpu, "regs", Regs()),
        lambda: VcpuState.get(cpu),
    ]
    for call in calls:
        with pytest.raises(hv.BusyError, match="another thread runs it"):
            call()


def test_who_holds_the_gil_does_not_wait_for_who_looks(boot: Boot) -> None:
    # The other thread may need it to be done.
    cpu = boot("e610 f4").vcpu
    c, number, idle = cpu.kvm._c, ffi.new("uint64_t *"), cpu.kvm._c.state
    cpu.kvm.run(10)
    assert lib.hv_reg_read(c, 0, number) == 0
    try:
        c.state = 3  # HV_STATE_BRIEF of run.c
        assert lib.hv_reg_read(c, 0, number) == lib.HV_STALE
        assert lib.hv_regs_read(c, ffi.new("struct kvm_regs *")) == lib.HV_STALE
        assert lib.hv_regs_write(c, 0, ffi.cast("uint8_t *", number), 8, 0) == lib.HV_STALE
    finally:
        c.state = idle


@pytest.fixture
def between(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[hv.Machine, Callable[[], None]]]:
    """A machine whose run goes on as soon as its thread's Python has looked at something, and what lets it go on."""
    machine = boot("ebfe")
    kvm, inside, go_on = machine.vcpu.kvm, threading.Event(), threading.Event()

    def stay(self: object, word: int) -> None:
        inside.set()
        go_on.wait(30)

    monkeypatch.setattr(type(kvm), "_between", stay)
    thread = threading.Thread(target=kvm.run, args=(30,))
    thread.start()
    assert inside.wait(30)  # the heartbeat
    yield machine, go_on.set
    go_on.set()
    while thread.is_alive():
        kvm.kick()
        thread.join(0.01)


def test_a_run_that_goes_on_keeps_the_vcpu(between: tuple[hv.Machine, Callable[[], None]]) -> None:
    machine, go_on = between
    cpu = machine.vcpu
    assert cpu.kvm._c.state != 2  # HV_STATE_RUNNING
    calls: list[Callable[[], object]] = [
        lambda: cpu.kvm.run(1),
        lambda: cpu.rip,
        lambda: setattr(cpu, "rax", 1),
        lambda: VcpuState.get(cpu),
        cpu.kvm.complete_io,
        lambda: setattr(cpu.kvm, "cr8", 1),
    ]
    for call in calls:
        with pytest.raises(hv.BusyError, match="another thread runs it"):
            call()
    go_on()


def test_a_run_that_an_error_ended_gives_the_vcpu_back(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    kvm = boot("ebfe").vcpu.kvm
    found: list[object] = []

    def fail(self: object, word: int) -> None:
        raise KeyError(word)

    def run() -> None:
        try:
            kvm.run(30)
        except KeyError as error:
            found.append(error)

    monkeypatch.setattr(type(kvm), "_between", fail)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert isinstance(found[0], KeyError)
    monkeypatch.undo()
    kvm.kick()
    assert kvm.run(30) == hv.Interrupted("kick")


def test_a_child_forked_while_a_run_goes_on(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    kvm = boot("ebfe").vcpu.kvm
    pids: list[int] = []

    def fork(self: object, word: int) -> None:
        if not pids:
            pids.append(os.fork())
        kvm.kick()

    monkeypatch.setattr(type(kvm), "_between", fork)
    status = 1
    try:
        exit = kvm.run(30)
    except hv.ForkedError:
        status = 0
    finally:
        if pids == [0]:
            os._exit(status)
    assert exit == hv.Interrupted("kick")
    assert os.waitpid(pids[0], 0)[1] == 0


def test_a_thread_that_looks_does_not_disturb_the_one_that_runs(boot: Boot) -> None:
    # Looking takes the vCPU for a moment: the runner waits that moment, and never gets BusyError.
    machine = boot("40 e610 ebfb")
    cpu, stop = machine.vcpu, threading.Event()
    looked: list[int] = []

    def look() -> None:
        while not stop.is_set():
            try:
                looked.append(cpu.rip)
                cpu.kvm.cr8  # noqa: B018  # by cffi, without the GIL
            except hv.BusyError:
                pass

    thread = threading.Thread(target=look)
    thread.start()
    try:
        run = cpu.kvm.run
        for _ in range(cases(1500, 20000)):
            assert isinstance(run(), hv.IoOut)
    finally:
        stop.set()
        thread.join()
    assert set(looked) <= {0x7C00, 0x7C03}


def test_an_ioctl_that_waited_for_the_runner_is_seen(boot: Boot) -> None:
    # Set by another thread while KVM_RUN lasts, it takes effect behind it: the exit's registers are old then.
    machine = boot("e610 ebfe f4")
    cpu = machine.vcpu
    kvm = cpu.kvm
    assert isinstance(kvm.run(10), hv.IoOut)
    value = kvm.regs
    for turn in range(cases(10, 100)):
        runs = kvm._c.runs
        done = threading.Event()

        def set_rdx(turn: int = turn, done: threading.Event = done) -> None:
            value.rdx = 0x1000 + turn
            kvm.regs = value
            done.set()

        runner = threading.Thread(target=lambda: kvm.run(10))
        runner.start()
        while kvm._c.runs == runs:
            pass
        setter = threading.Thread(target=set_rdx)
        setter.start()
        kvm.kick()
        setter.join()
        while runner.is_alive():
            kvm.kick()
            runner.join(0.001)
        assert done.is_set()
        assert cpu.rdx == 0x1000 + turn
        assert ours(cpu) == of_kernel(cpu)


def test_what_was_written_is_seen_by_a_get_of_another_thread(boot: Boot) -> None:
    # Also by one that comes before the runner has given it to KVM: such a get waits.
    machine = boot("e610 ebfe")
    cpu = machine.vcpu
    kvm = cpu.kvm
    kvm.run(10)
    for turn in range(cases(20, 200)):
        cpu.rsi = turn
        found: list[int] = []
        runner = threading.Thread(target=lambda: kvm.run(10))
        getter = threading.Thread(target=lambda found=found: found.append(kvm.regs.rsi))
        runner.start()
        getter.start()
        while runner.is_alive():
            kvm.kick()
            runner.join(0.001)
        getter.join()
        assert found == [turn]


def test_random_ways_in_any_order(boot: Boot) -> None:
    # A model of the registers, and every way to read and write them.
    rng = random.Random(4)
    machine = boot(bytes.fromhex("e610") * 4000 + b"\xeb\xfe", ram="1M")
    cpu = machine.vcpu
    kvm, exits = cpu.kvm, machine.exits(60)
    model = {"rbx": 0, "rcx": 0, "rdx": 0, "rdi": 0}
    reads: list[Callable[[str], int]] = [
        lambda name: int(getattr(cpu, name)),
        lambda name: int(getattr(cpu.regs, name)),
        lambda name: int(getattr(kvm.regs, name)),
        lambda name: int(VcpuState.get(cpu).part("regs").to_json()[name]),
    ]

    def by_struct(name: str, value: int) -> None:
        regs = kvm.regs
        setattr(regs, name, value)
        kvm.regs = regs

    writes: list[Callable[[str, int], None]] = [
        lambda name, value: setattr(cpu, name, value),
        lambda name, value: setattr(cpu, "regs", cpu.regs.replace(**{name: value})),
        by_struct,
        lambda name, value: VcpuState.get(cpu).replace(**{f"regs.{name}": value}).put(cpu),
    ]
    next(exits)
    for _ in range(cases(600, 6000)):
        name = rng.choice(list(model))
        match rng.randrange(5):
            case 0:
                if cpu.rip < 0x7C00 + 7900:
                    assert isinstance(next(exits), hv.IoOut)
                else:
                    cpu.rip = 0x7C00
            case 1:
                cpu.sregs = cpu.sregs.replace(cr2=rng.getrandbits(48))
            case 2:
                model[name] = rng.getrandbits(64)
                rng.choice(writes)(name, model[name])
            case _:
                assert rng.choice(reads)(name) == model[name]
    assert ours(cpu) == of_kernel(cpu)


def test_a_class_of_values_for_the_c_side() -> None:
    # native/pyrun.c makes them by hand: it checks that they are what it takes them for.
    from hvmodel._ffi import run

    class Other:
        __slots__ = ("_data", "more")

    with pytest.raises(SystemError, match="one slot"):
        run.install_values(Other, Other)
    run.install_values(Regs, Sregs)
