"""Exceptions, NMIs and interrupts put into a live vCPU.  What arrives is seen in the guest: its handler, its stack."""

from __future__ import annotations

import errno
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.errors import (
    ArgumentError,
    ArgumentTypeError,
    BusyError,
    ClosedError,
    KvmError,
    UnansweredError,
    UnsupportedError,
)
from hvmodel.kvm import Kvm, Vcpu, Vm
from hvmodel.state import ExceptionEvent, InterruptEvent, NmiEvent, TripleFaultEvent, VcpuEvents, events
from hvmodel.state.events import EventQueue, inject_exception, inject_interrupt, inject_nmi, queue
from hvmodel.witness import check_exceptions
from hvmodel.witness.check_exceptions import _Guest as LongMode
from tests.kvm.guest import CODE, Guest
from tests.need import need, need_cap

HLT, SPIN = b"\xf4", b"\xeb\xfe"
RF, IF = 1 << 16, 1 << 9


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    need("kvm")
    with Kvm() as kvm:
        yield kvm


@pytest.fixture(params=[True, False], ids=["payload", "plain"])
def long(request: pytest.FixtureRequest) -> Iterator[LongMode]:
    """64-bit code at CPL0 whose handlers are one HLT; with KVM_CAP_EXCEPTION_PAYLOAD, and without."""
    need("kvm")
    with LongMode(payload=request.param, triple_fault=False) as guest:
        guest.start(HLT)
        yield guest


@pytest.fixture
def plain() -> Iterator[LongMode]:
    need("kvm")
    with LongMode(payload=False, triple_fault=False) as guest:
        guest.start(HLT)
        yield guest


def state_of(vcpu: Vcpu) -> list[bytes]:
    return [
        bytes(ffi.buffer(getattr(vcpu, name))) for name in ("regs", "sregs", "debugregs", "vcpu_events", "mp_state")
    ]


# ---- exceptions ----


@pytest.mark.parametrize("vector", [v for v in range(32) if v not in (2, 3, 4)])
def test_every_exception_reaches_its_handler(long: LongMode, vector: int) -> None:
    code = 0x18 if vector in (8, 10, 11, 12, 13, 14, 17) else None  # SDM vol. 3 table 7-1
    waits = inject_exception(long.vcpu, vector, code)
    assert waits.exception
    assert (waits.exception.vector, waits.exception.has_error_code) == (vector, code is not None)
    assert (waits.exception.pending, waits.exception.injected) == (long.payload, not long.payload)
    assert long.vcpu.run(10) == hv.Hlt()
    taken = long.taken()
    assert taken
    is_fault = vector not in (1, 8, 18)
    assert (taken.vector, taken.error_code, taken.rflags) == (vector, code, 2 | (RF if is_fault else 0))
    assert not queue(long.vcpu)


def test_a_page_fault_brings_its_address(long: LongMode) -> None:
    inject_exception(long.vcpu, 14, 2, 0x123456)
    assert long.vcpu.run(10) == hv.Hlt()
    taken = long.taken()
    assert taken
    assert (taken.vector, taken.error_code) == (14, 2)
    assert long.vcpu.sregs.cr2 == 0x123456


def test_a_page_fault_without_an_address_leaves_cr2(long: LongMode) -> None:
    before = long.vcpu.sregs.cr2
    inject_exception(long.vcpu, 14, 2)
    assert long.vcpu.run(10) == hv.Hlt()
    assert long.vcpu.sregs.cr2 == before


def test_a_debug_exception_brings_its_bits(long: LongMode) -> None:
    long.start(HLT, dr6=0xFFFF0FF2, dr7=0x2400)  # B1 of before; general detect
    inject_exception(long.vcpu, 1, payload=0x4001)
    assert long.vcpu.run(10) == hv.Hlt()
    debug = long.vcpu.debugregs
    assert (debug.dr6, debug.dr7) == (0xFFFF4FF1, 0x400)  # BS and B0 instead of B1; GD cleared


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((13, 0), (11, 0x18), (8, 0)),
        ((14, 2), (14, 0), (8, 0)),
        ((14, 2), (13, 0), (8, 0)),
        ((13, 0), (14, 2), (14, 2)),
        ((6, None), (13, 0), (13, 0)),
        ((13, 0), (6, None), (6, None)),
    ],
)
def test_two_are_merged(
    long: LongMode, first: tuple[int, int | None], second: tuple[int, int | None], expected: tuple[int, int | None]
) -> None:
    inject_exception(long.vcpu, *first)
    waits = inject_exception(long.vcpu, *second)
    assert waits.exception
    assert waits.exception.vector == expected[0]
    assert long.vcpu.run(10) == hv.Hlt()
    taken = long.taken()
    assert taken
    assert (taken.vector, taken.error_code) == expected


def test_a_third_is_a_triple_fault_where_that_can_be_put(long: LongMode) -> None:
    inject_exception(long.vcpu, 8, 0)
    before = state_of(long.vcpu)
    with pytest.raises(BusyError, match="KVM_CAP_X86_TRIPLE_FAULT_EVENT"):
        inject_exception(long.vcpu, 6)
    assert state_of(long.vcpu) == before
    need_cap(long.vcpu.vm, "X86_TRIPLE_FAULT_EVENT")
    long.vcpu.vm.enable_cap(lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    waits = inject_exception(long.vcpu, 6)
    assert waits.triple_fault is True
    assert waits.exception
    assert waits.exception.vector == 8
    assert long.vcpu.run(10) == hv.Shutdown()


def test_what_else_waits_is_kept(long: LongMode) -> None:
    vcpu = long.vcpu
    shadow = vcpu.vcpu_events
    shadow.interrupt.shadow, shadow.nmi.pending, shadow.nmi.masked = 2, 1, 1
    shadow.interrupt.injected, shadow.interrupt.nr = 1, 0x40
    vcpu.vcpu_events = shadow
    waits = inject_exception(vcpu, 6)
    assert (waits.interrupt_shadow, waits.nmi_pending, waits.nmi_masked, waits.interrupt) == (2, 1, True, 0x40)


def test_an_nmi_that_comes_meanwhile_is_not_lost(long: LongMode, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(vcpu: Vcpu) -> VcpuEvents:
        found = right(vcpu)
        if not sent:
            vcpu.nmi()  # as another thread may, between the get and the put
            sent.append(None)
        return found

    sent: list[None] = []
    right = events._get
    monkeypatch.setattr(events, "_get", get)
    waits = inject_exception(long.vcpu, 6)
    assert (len(sent), waits.nmi_pending, str(waits).count("#UD")) == (1, 1, 1)


@pytest.mark.parametrize("payload", [True, False])
def test_real_mode(kvm: Kvm, payload: bool) -> None:
    with Guest(kvm, HLT) as guest:
        if payload:
            need_cap(guest.vm, "EXCEPTION_PAYLOAD")
            guest.vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
        guest.install(13, bytes.fromhex("b047 e610 cf"))  # mov al, 0x47; out 0x10, al; iret
        inject_exception(guest.vcpu, 13)
        assert guest.run() == hv.IoOut(0x10, 1, 1, b"\x47")
        assert guest.run() == hv.Hlt()  # back where it was
        assert guest.vcpu.regs.rip == CODE + 1
        with pytest.raises(ArgumentError, match="real mode") as caught:
            inject_exception(guest.vcpu, 13, 0)
        assert caught.value.field == "error_code"


@pytest.mark.parametrize("payload", [True, False])
def test_a_halted_vcpu_wakes(kvm: Kvm, payload: bool) -> None:
    with Guest(kvm, HLT, irqchip=True) as guest:
        if payload:
            need_cap(guest.vm, "EXCEPTION_PAYLOAD")
            guest.vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
        guest.install(6, bytes.fromhex("e611 cf"))
        assert guest.vcpu.run(0.02) == hv.Interrupted("timeout")
        assert guest.vcpu.mp_state.mp_state == lib.KVM_MP_STATE_HALTED
        inject_exception(guest.vcpu, 6)
        assert guest.run() == hv.IoOut(0x11, 1, 1, b"\0")


ERRORS: list[tuple[dict[str, Any], type[Exception], str, str]] = [
    ({"vector": 2}, ArgumentError, "vector", "inject_nmi"),
    ({"vector": 32}, ArgumentError, "vector", "inject_interrupt"),
    ({"vector": 255}, ArgumentError, "vector", "inject_interrupt"),
    ({"vector": -1}, ArgumentError, "vector", "0 to 31"),
    ({"vector": 1 << 40}, ArgumentError, "vector", "0 to 31"),
    ({"vector": "13"}, ArgumentTypeError, "vector", "an int"),
    ({"vector": True}, ArgumentTypeError, "vector", "an int"),
    ({"vector": None}, ArgumentTypeError, "vector", "an int"),
    ({"vector": 13}, ArgumentError, "error_code", "#GP pushes one"),
    ({"vector": 6, "error_code": 0}, ArgumentError, "error_code", "#UD pushes none"),
    ({"vector": 13, "error_code": -1}, ArgumentError, "error_code", "0xffffffff"),
    ({"vector": 13, "error_code": 1 << 32}, ArgumentError, "error_code", "0xffffffff"),
    ({"vector": 13, "error_code": 1.0}, ArgumentTypeError, "error_code", "an int or None"),
    ({"vector": 13, "error_code": 0, "payload": 1}, ArgumentError, "payload", "#GP"),
    ({"vector": 14, "error_code": 0, "payload": 1 << 64}, ArgumentError, "payload", "0xffffffffffffffff"),
    ({"vector": 14, "error_code": 0, "payload": -1}, ArgumentError, "payload", "0xffffffffffffffff"),
    ({"vector": 14, "error_code": 0, "payload": b""}, ArgumentTypeError, "payload", "an int or None"),
    *[({"vector": 1, "payload": 1 << bit}, ArgumentError, "payload", "0x1f80f") for bit in (4, 10, 17, 31, 32, 63)],
]


@pytest.mark.parametrize(("arguments", "kind", "field", "text"), ERRORS)
def test_what_cannot_be(
    long: LongMode, arguments: dict[str, Any], kind: type[Exception], field: str, text: str
) -> None:
    before = state_of(long.vcpu)
    with pytest.raises(kind, match=text) as caught:
        inject_exception(long.vcpu, **arguments)
    assert caught.value.call == "inject_exception"  # type: ignore[attr-defined]
    assert caught.value.field == field  # type: ignore[attr-defined]
    assert state_of(long.vcpu) == before


def test_the_vendors_exceptions_go_with_and_without_a_code(long: LongMode) -> None:
    for vector in (21, 29, 30):
        for code in (None, 5):
            long.start(HLT)
            waits = inject_exception(long.vcpu, vector, code)
            assert waits.exception
            assert waits.exception.has_error_code == (code is not None)


@pytest.mark.parametrize("refuses", ["debugregs", "sregs", "vcpu_events"])
def test_registers_are_put_back_where_the_kernel_refuses(
    plain: LongMode, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    # Without the capability registers and events are put one after the other.
    item = Vcpu.__dict__[refuses]
    calls = []

    def once(self: object, handle: object, value: object) -> int:
        calls.append(value)
        return -errno.EINVAL if len(calls) == 1 else right(handle, value)

    right = item._store
    before = state_of(plain.vcpu)
    monkeypatch.setattr(type(item), "_store", lambda self, *a: once(self, *a) if self is item else RIGHT(self, *a))
    with pytest.raises(KvmError):
        inject_exception(plain.vcpu, 1, payload=0x4001) if refuses != "sregs" else inject_exception(
            plain.vcpu, 14, 2, 0x5000
        )
    assert calls
    assert state_of(plain.vcpu) == before


RIGHT = type(Vcpu.__dict__["regs"])._store


def test_registers_that_kvm_gives_and_does_not_take(plain: LongMode) -> None:
    # KVM_SET_MSRS clears EFER.LME under paging and keeps LMA; KVM_SET_SREGS, for CR2, refuses the two together.
    plain.start(HLT)
    plain.vcpu.set_msrs({0xC0000080: 0})
    assert plain.vcpu.sregs.efer == 0x400
    before = state_of(plain.vcpu)
    with pytest.raises(KvmError, match="KVM_SET_SREGS") as caught:
        inject_exception(plain.vcpu, 14, 2, 0x5000)
    assert any(note.startswith("sregs could not be put back") for note in caught.value.__notes__)
    assert state_of(plain.vcpu) == before


def test_an_exception_that_waited_is_put_back_too(plain: LongMode, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel's own #PF is pending, and KVM_SET_REGS, for RFLAGS.RF of the #UD to come, drops what is pending.
    (page_fault,) = [second for second in check_exceptions._SECONDS if second.vector == 14]
    assert check_exceptions._raise_second(plain, page_fault, None)
    before = queue(plain.vcpu)
    assert before.exception
    item = Vcpu.__dict__["vcpu_events"]
    calls: list[object] = []

    def once(self: object, handle: object, value: object) -> int:
        calls.append(value)
        return -errno.EINVAL if len(calls) == 1 else RIGHT(item, handle, value)

    monkeypatch.setattr(type(item), "_store", lambda self, *a: once(self, *a) if self is item else RIGHT(self, *a))
    with pytest.raises(KvmError):
        inject_exception(plain.vcpu, 6)
    monkeypatch.undo()
    waits = queue(plain.vcpu)
    assert waits.exception
    assert (waits.exception.vector, waits.exception.error_code) == (14, before.exception.error_code)
    assert plain.vcpu.run(10) == hv.Hlt()
    taken = plain.taken()
    assert taken
    assert (taken.vector, taken.error_code) == (14, 2)


def test_at_an_unanswered_read(kvm: Kvm) -> None:
    with Guest(kvm, bytes.fromhex("e410 f4")) as guest:  # in al, 0x10; hlt
        assert guest.run() == hv.IoIn(0x10, 1, 1)
        for call in (lambda: inject_exception(guest.vcpu, 6), lambda: inject_interrupt(guest.vcpu, 0x20)):
            with pytest.raises(UnansweredError):
                call()
        assert not queue(guest.vcpu)
        guest.vcpu.answer(0x5A)
        inject_exception(guest.vcpu, 6)
        assert guest.vcpu.regs.rip == CODE + 2  # behind the IN, where the handler returns to
        assert guest.vcpu.regs.rax & 0xFF == 0x5A


def test_looking_does_not_finish_the_exit(kvm: Kvm) -> None:
    with Guest(kvm, bytes.fromhex("e410 f4")) as guest:
        assert guest.run() == hv.IoIn(0x10, 1, 1)
        assert not queue(guest.vcpu)
        assert guest.vcpu.has_exit_pending
        with pytest.raises(UnansweredError):
            guest.run()


def test_while_another_thread_runs_it(kvm: Kvm) -> None:
    with Guest(kvm, SPIN) as guest:
        runner = threading.Thread(target=lambda: guest.vcpu.run(20))
        runner.start()
        try:
            while guest.vcpu._c.state != 2:  # HV_STATE_RUNNING
                time.sleep(0.001)
            for call in (lambda: inject_exception(guest.vcpu, 6), lambda: inject_interrupt(guest.vcpu, 0x20)):
                with pytest.raises(BusyError):
                    call()
        finally:
            guest.vcpu.kick()
            runner.join()


def test_closed(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.close()
        for call in (
            lambda: inject_exception(vcpu, 6),
            lambda: inject_nmi(vcpu),
            lambda: inject_interrupt(vcpu, 0x20),
            lambda: queue(vcpu),
        ):
            with pytest.raises(ClosedError):
                call()


# ---- NMIs ----


def test_nmis(kvm: Kvm) -> None:
    # The guest spins: where KVM emulates it, one NMI after another comes late, and a HLT would exit before.
    with Guest(kvm, SPIN) as guest:
        guest.install(2, bytes.fromhex("e611 cf"))  # out 0x11, al; iret
        for _ in range(5):
            inject_nmi(guest.vcpu)
        assert queue(guest.vcpu).nmi_pending == 2  # one is taken at once, one more can wait
        for _ in range(2):
            assert guest.run() == hv.IoOut(0x11, 1, 1, b"\0")
        assert not queue(guest.vcpu)
        assert guest.vcpu.run(0.05) == hv.Interrupted("timeout")


def test_an_nmi_of_another_thread(kvm: Kvm) -> None:
    # KVM takes it up between two KVM_RUN: the sender waits until the timeout has this one return.
    with Guest(kvm, SPIN) as guest:
        guest.install(2, bytes.fromhex("e611 cf"))
        sender = threading.Thread(target=inject_nmi, args=(guest.vcpu,))
        sender.start()
        while (exit := guest.vcpu.run(0.01)) == hv.Interrupted("timeout"):
            pass
        sender.join()
        assert exit == hv.IoOut(0x11, 1, 1, b"\0")


def test_an_nmi_waits_for_the_handler_of_another(kvm: Kvm) -> None:
    with Guest(kvm, SPIN) as guest:
        guest.install(2, bytes.fromhex("e611 e612 cf"))  # out 0x11; out 0x12; iret
        inject_nmi(guest.vcpu)
        assert guest.run() == hv.IoOut(0x11, 1, 1, b"\0")
        waits = queue(guest.vcpu)
        assert (waits.nmi_masked, waits.nmi_pending) == (True, 0)
        inject_nmi(guest.vcpu)
        inject_nmi(guest.vcpu)
        assert queue(guest.vcpu).nmi_pending == 1
        assert [guest.run() for _ in range(3)] == [hv.IoOut(port, 1, 1, b"\0") for port in (0x12, 0x11, 0x12)]
        assert not queue(guest.vcpu)


# ---- interrupts ----


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[Guest]:
    with Guest(kvm, HLT) as guest:
        guest.install(0x20, bytes.fromhex("e611 cf"))
        yield guest


def enable_interrupts(guest: Guest) -> None:
    regs = guest.vcpu.regs
    regs.rflags |= IF
    guest.vcpu.regs = regs


def test_an_interrupt(guest: Guest) -> None:
    enable_interrupts(guest)
    inject_interrupt(guest.vcpu, 0x20)
    waits = queue(guest.vcpu)
    assert (waits.interrupt, str(waits)) == (0x20, "interrupt 0x20 injected")
    assert guest.run() == hv.IoOut(0x11, 1, 1, b"\0")
    assert guest.run() == hv.Hlt()
    assert queue(guest.vcpu).interrupt is None


def test_none_with_interrupts_disabled(guest: Guest) -> None:
    before = state_of(guest.vcpu)
    with pytest.raises(BusyError, match=r"RFLAGS\.IF.*request_interrupt_window"):
        inject_interrupt(guest.vcpu, 0x20)
    assert state_of(guest.vcpu) == before
    assert guest.run() == hv.Hlt()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"interrupt": {"shadow": 1}}, "SS"),
        ({"interrupt": {"shadow": 2}}, "STI"),
        ({"interrupt": {"injected": 1, "nr": 0x30}}, "interrupt 0x30 waits"),
        ({"nmi": {"injected": 1}}, "NMI"),
        ({"exception": {"injected": 1, "nr": 6}}, "#UD waits"),
    ],
)
def test_none_while_something_is_in_the_way(guest: Guest, changes: dict[str, dict[str, int]], text: str) -> None:
    enable_interrupts(guest)
    put = guest.vcpu.vcpu_events
    for name, fields in changes.items():
        for field, value in fields.items():
            setattr(getattr(put, name), field, value)
    guest.vcpu.vcpu_events = put
    before = state_of(guest.vcpu)
    with pytest.raises(BusyError, match=text):
        inject_interrupt(guest.vcpu, 0x20)
    assert state_of(guest.vcpu) == before


def test_a_masked_or_pending_nmi_is_not_in_the_way(guest: Guest) -> None:
    enable_interrupts(guest)
    put = guest.vcpu.vcpu_events
    put.nmi.masked = put.nmi.pending = 1
    guest.vcpu.vcpu_events = put
    inject_interrupt(guest.vcpu, 0x20)
    assert guest.run() == hv.IoOut(0x11, 1, 1, b"\0")


def test_the_window(guest: Guest) -> None:
    # sti; nop; jmp $: as the error says, ask for the window and run on.
    guest.load(bytes.fromhex("fb 90 ebfe"))
    with pytest.raises(BusyError):
        inject_interrupt(guest.vcpu, 0x20)
    guest.vcpu.request_interrupt_window = 1
    assert guest.run() == hv.IrqWindowOpen()
    guest.vcpu.request_interrupt_window = 0
    inject_interrupt(guest.vcpu, 0x20)
    assert guest.run() == hv.IoOut(0x11, 1, 1, b"\0")


@pytest.mark.parametrize("vector", [-1, 256, 1 << 32])
def test_vectors_that_are_none(guest: Guest, vector: int) -> None:
    with pytest.raises(ArgumentError, match="0 to 255") as caught:
        inject_interrupt(guest.vcpu, vector)
    assert caught.value.field == "vector"


@pytest.mark.parametrize("vector", ["32", 32.0, None, True])
def test_types_that_are_none(guest: Guest, vector: Any) -> None:
    with pytest.raises(ArgumentTypeError):
        inject_interrupt(guest.vcpu, vector)


def test_with_an_in_kernel_controller(kvm: Kvm) -> None:
    with Guest(kvm, HLT, irqchip=True) as guest, pytest.raises(UnsupportedError, match="irq_line") as caught:
        inject_interrupt(guest.vcpu, 0x20)
    assert caught.value.errno == errno.ENXIO


def test_with_a_split_one_the_kernel_waits_for_the_window(kvm: Kvm) -> None:
    def split(vm: Vm) -> None:
        need_cap(vm, "SPLIT_IRQCHIP")
        vm.enable_cap(lib.KVM_CAP_SPLIT_IRQCHIP, 24)

    with Guest(kvm, HLT, before=split) as guest:
        inject_interrupt(guest.vcpu, 0x20)  # IF is clear
        with pytest.raises(BusyError, match="another external interrupt"):
            inject_interrupt(guest.vcpu, 0x21)


# ---- the value ----


@pytest.mark.parametrize(
    ("said", "waits", "text"),
    [
        (VcpuEvents(flags=0x1D), False, "nothing waits"),
        (VcpuEvents(flags=0x1D, exception=ExceptionEvent(nr=13, has_error_code=1)), False, "nothing waits"),
        (VcpuEvents(flags=0x1D, exception=ExceptionEvent(injected=1, nr=6)), True, "#UD injected"),
        (
            VcpuEvents(
                flags=0x1D,
                exception=ExceptionEvent(pending=1, nr=14, has_error_code=1, error_code=0x12),
                exception_has_payload=1,
                exception_payload=0x5000,
            ),
            True,
            "#PF pending, error code 0x12, payload 0x5000",
        ),
        (VcpuEvents(flags=0x1D, nmi=NmiEvent(pending=2, masked=1)), True, "2 NMI pending"),
        (VcpuEvents(flags=0x1D, nmi=NmiEvent(injected=1)), True, "an NMI injected"),
        (VcpuEvents(flags=0x1D, nmi=NmiEvent(masked=1)), False, "nothing waits"),
        (VcpuEvents(flags=0x1D, interrupt=InterruptEvent(injected=1, nr=0)), True, "interrupt 0x0 injected"),
        (VcpuEvents(flags=0x1D, interrupt=InterruptEvent(nr=9, shadow=1)), False, "nothing waits"),
        (VcpuEvents(flags=0x3D, triple_fault=TripleFaultEvent(pending=1)), True, "a triple fault"),
    ],
)
def test_event_queues(said: VcpuEvents, waits: bool, text: str) -> None:
    found = EventQueue.of(said)
    assert (bool(found), str(found)) == (waits, text)
    assert found.events == said
    assert pickle.loads(pickle.dumps(found)) == found
    assert found.triple_fault is (None if said.flags == 0x1D else True)


# ---- on a machine ----


def test_on_a_machine() -> None:
    need("kvm")
    with hv.Machine(ram="64K") as m:
        m.load(0x7C00, HLT)
        m.load(0x7000, bytes.fromhex("e610 cf"))
        for vector in (2, 6, 0x20):
            m.write(4 * vector, (0x7000).to_bytes(4, "little"))
        m.vcpu.real_mode(entry=0x7C00)
        assert not m.vcpu.event_queue()
        raised: list[Callable[[], object]] = [lambda: m.vcpu.inject_exception(6), m.vcpu.inject_nmi]
        for inject in raised:
            inject()
            assert m.vcpu.event_queue()
            assert m.vcpu.kvm.run(10) == hv.IoOut(0x10, 1, 1, b"\0")
        with pytest.raises(BusyError):
            m.vcpu.inject_interrupt(0x20)
        inject_exception(m.vcpu.kvm, 6)
        m.vcpu.real_mode(entry=0x7C00)  # a new start drops what waits
        assert not m.vcpu.event_queue()
    assert events.__doc__
