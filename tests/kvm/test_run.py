"""Vcpu.run(): every exit that this host can give, from guests that cause it; reads and their answers.

Expected: what the guest's source says it does, the processor's manuals, and arithmetic.
"""

from __future__ import annotations

import errno
import mmap
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.errors import VmDeadError
from hvmodel.host import Mapping
from hvmodel.kvm import Exit, handle
from hvmodel.kvm import exits as kinds
from hvmodel.kvm.exits import decode
from tests.cases import cases
from tests.guests import assemble
from tests.kvm.guest import CODE, Guest
from tests.need import need, need_cap

Boot = Callable[..., hv.Machine]
PAGE = 0x1000


@pytest.fixture
def boot() -> Iterator[Boot]:
    """`boot("name", DEFINE=value)`: a machine with that guest, about to run it."""
    need("kvm", "gcc")
    machines = []

    def start(name: str, *, ram: str = "16M", **defines: int) -> hv.Machine:
        machine = hv.Machine(ram=ram)
        machines.append(machine)
        machine.load(0x7C00, assemble(name, **defines))
        machine.vcpu.real_mode(entry=0x7C00)
        return machine

    yield start
    for machine in machines:
        machine.close()


def run(machine: hv.Machine, timeout: float = 20.0) -> Exit:
    """The next exit as the binding gives it; none at all fails the test."""
    exit = machine.vcpu.kvm.run(timeout)
    assert exit != hv.Interrupted("timeout"), "the guest gave no exit"
    return exit


# ---- ports ----


@pytest.mark.parametrize("size", [1, 2, 4])
def test_out_of_every_size(boot: Boot, size: int) -> None:
    machine = boot("out", PORT=0x1234, SIZE=size, VALUE=0xFFFFFFFE, COUNT=4)
    values = [(0xFFFFFFFE + n) % 2 ** (8 * size) for n in range(4)]
    got = [run(machine) for _ in values]
    assert got == [hv.IoOut(0x1234, size, 1, value.to_bytes(size, "little")) for value in values]
    assert [exit.value for exit in got if isinstance(exit, hv.IoOut)] == values
    assert run(machine) == hv.Hlt()


def test_equal_exits_are_equal_and_match(boot: Boot) -> None:
    machine = boot("out", PORT=0x10, VALUE=0x41, COUNT=1)
    match run(machine):
        case hv.IoOut(port=0x10, size=1, count=1, data=b"A", value=0x41):
            pass
        case other:
            pytest.fail(repr(other))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0xFF, 0x1234, 0x8000, 0xFFFF, 0x89ABCDEF, 0xFFFFFFFF])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_in_gets_what_was_answered(guest: Callable[..., Guest], size: int, value: int, as_bytes: bool) -> None:
    value %= 2 ** (8 * size)
    # mov eax, 0xaaaaaaaa; in al|ax|eax, 0x10; hlt
    g = guest(bytes.fromhex("66b8aaaaaaaa") + {1: b"\xe4", 2: b"\xe5", 4: b"\x66\xe5"}[size] + b"\x10\xf4")
    assert g.run() == hv.IoIn(0x10, size, 1)
    g.vcpu.answer(value.to_bytes(size, "little") if as_bytes else value)
    assert g.run() == hv.Hlt()
    untouched = 0xAAAAAAAA >> (8 * size) << (8 * size) if size < 4 else 0
    assert g.vcpu.regs.rax & 0xFFFFFFFF == untouched | value


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rep_outs_gives_every_element_in_order(boot: Boot, size: int) -> None:
    machine = boot("outs", PORT=0x20, SIZE=size, COUNT=40)
    data, elements = b"", 0
    while (exit := run(machine)) != hv.Hlt():
        assert isinstance(exit, hv.IoOut)
        assert (exit.port, exit.size, len(exit.data)) == (0x20, size, size * exit.count)
        data, elements = data + exit.data, elements + exit.count
    assert (data, elements) == (bytes(n + 1 for n in range(40 * size)), 40)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 5, 3000])
def test_rep_ins_takes_bytes_for_all_elements(boot: Boot, size: int, count: int) -> None:
    machine = boot("ins", PORT=0x30, SIZE=size, COUNT=count)
    wanted = bytes(n * 7 % 251 for n in range(size * count))
    given = 0
    while (exit := run(machine)) != hv.Hlt():
        assert isinstance(exit, hv.IoIn)
        assert (exit.port, exit.size) == (0x30, size)
        chunk = wanted[given : given + size * exit.count]
        machine.answer(chunk)
        given += len(chunk)
    assert given == len(wanted)
    assert machine.read(0x8000, len(wanted)) == wanted


def test_an_int_answers_every_element_of_rep_ins(boot: Boot) -> None:
    machine = boot("ins", PORT=0x30, SIZE=2, COUNT=1500)
    while isinstance(run(machine), hv.IoIn):
        machine.answer(0xBEEF)
    assert machine.read(0x8000, 3000) == b"\xef\xbe" * 1500


# ---- what may be answered ----


def test_an_unanswered_read_is_an_error_that_names_it(boot: Boot) -> None:
    machine = boot("in", PORT=0x60, SIZE=1)
    vcpu = machine.vcpu.kvm
    exit = run(machine)
    for _ in range(2):
        with pytest.raises(hv.UnansweredError, match=r"IoIn\(port=0x60, size=1, count=1\)") as caught:
            vcpu.run()
        assert (caught.value.call, caught.value.exit) == ("KVM_RUN", repr(exit))
    with pytest.raises(hv.UnansweredError, match="port=0x60"):
        vcpu.complete_io()
    # A kick changes nothing of that, and waits.
    vcpu.kick()
    with pytest.raises(hv.UnansweredError):
        vcpu.run()
    vcpu.answer(0x5A)
    assert vcpu.run(10) == hv.Interrupted("kick")
    assert run(machine) == hv.IoOut(0x11, 4, 1, b"\x5a\xaa\xaa\xaa")


@pytest.mark.parametrize("data", [-1, 256, 1 << 64, b"", b"12", bytearray(3)])
def test_answers_that_do_not_fit_are_refused_and_leave_the_read_pending(boot: Boot, data: object) -> None:
    machine = boot("in", PORT=0x60, SIZE=1)
    run(machine)
    with pytest.raises(hv.ArgumentError) as caught:
        machine.answer(data)
    assert (caught.value.call, caught.value.field) == ("Vcpu.answer", "data")
    with pytest.raises(hv.UnansweredError):
        machine.vcpu.kvm.run()
    machine.answer(7)
    assert run(machine) == hv.IoOut(0x11, 4, 1, b"\x07\xaa\xaa\xaa")


@pytest.mark.parametrize("data", [None, True, 1.0, "A", [1]])
def test_answers_of_other_types_are_refused(boot: Boot, data: object) -> None:
    machine = boot("in")
    run(machine)
    with pytest.raises(hv.ArgumentTypeError, match=r"Vcpu\.answer: data: expected an int or bytes"):
        machine.answer(data)


def test_the_last_answer_counts_until_the_guest_runs(boot: Boot) -> None:
    machine = boot("in", PORT=0x60, SIZE=1)
    run(machine)
    machine.answer(1)
    with pytest.raises(hv.ArgumentError, match="no read exit waits for data"):
        machine.answer(2)
    assert run(machine) == hv.IoOut(0x11, 4, 1, b"\x01\xaa\xaa\xaa")


def test_a_write_takes_no_answer(boot: Boot) -> None:
    machine = boot("out")
    for answer in (machine.answer, lambda _: machine.vcpu.kvm.fail_msr()):
        with pytest.raises(hv.ArgumentError):
            answer(0)
        run(machine)
        with pytest.raises(hv.ArgumentError):
            answer(0)


@settings(max_examples=cases(60, 2000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from([1, 2, 4]), data=st.one_of(st.integers(-2, 1 << 33), st.binary(max_size=6)))
def test_an_answer_is_taken_exactly_when_it_fits(in_guest: Guest, size: int, data: int | bytes) -> None:
    g = in_guest
    g.load(bytes.fromhex("66b8aaaaaaaa") + {1: b"\xe4", 2: b"\xe5", 4: b"\x66\xe5"}[size] + b"\x10\xf4")
    g.run()
    fits = 0 <= data < 1 << (8 * size) if isinstance(data, int) else len(data) == size
    if fits:
        g.vcpu.answer(data)
        value = data if isinstance(data, int) else int.from_bytes(data, "little")
    else:
        with pytest.raises(hv.ArgumentError):
            g.vcpu.answer(data)
        g.vcpu.answer(0)
        value = 0
    assert g.run() == hv.Hlt()
    assert g.vcpu.regs.rax % (1 << (8 * size)) == value


@pytest.fixture
def in_guest(guest: Callable[..., Guest]) -> Guest:
    """One guest for all examples of a property."""
    return guest()


# ---- memory ----

MMIO_BYTES = bytes(0x11 * (n + 1) % 256 for n in range(15)) + b"\0"  # as in mmio.S


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_mmio_write_of_every_size(boot: Boot, size: int) -> None:
    machine = boot("mmio", GPA=0xD0000000, SIZE=size, WRITE=1)
    data = {}
    while (exit := run(machine)) != hv.Hlt():
        assert isinstance(exit, hv.MmioWrite)
        assert exit.size == len(exit.data) <= 8
        assert exit.value == int.from_bytes(exit.data, "little")
        data |= {exit.gpa + at: byte for at, byte in enumerate(exit.data)}
    assert data == {0xD0000000 + at: byte for at, byte in enumerate(MMIO_BYTES[:size])}


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_mmio_read_of_every_size(boot: Boot, size: int) -> None:
    machine = boot("mmio", GPA=0xD0000100, SIZE=size)
    memory = bytes(range(0xC0, 0xC0 + 16))
    reported, asked = b"", 0
    while (exit := run(machine)) != hv.Hlt():
        if isinstance(exit, hv.IoOut):
            reported += exit.data
            continue
        assert isinstance(exit, hv.MmioRead)
        with pytest.raises(hv.UnansweredError, match=f"MmioRead.gpa={exit.gpa:#x}"):
            machine.vcpu.kvm.run()
        at = exit.gpa - 0xD0000100
        machine.answer(memory[at : at + exit.size])
        asked += exit.size
    assert asked == size
    assert reported == (memory[:size] + b"\xaa" * 4)[: max(size, 4)]


def test_a_read_only_slot_gives_its_writes_as_mmio(boot: Boot) -> None:
    machine = boot("mmio", GPA=0x2000000, SIZE=4, WRITE=1)
    with Mapping(None, PAGE) as rom:
        machine.vm.set_user_memory_region(9, 0x2000000, rom, flags=lib.KVM_MEM_READONLY)
        assert run(machine) == hv.MmioWrite(0x2000000, MMIO_BYTES[:4])
        assert rom.read(0, 8) == bytes(8)
        machine.vm.delete_memory_region(9)


# ---- a host page that is not accessible ----


def protect(machine: hv.Machine, gpa: int, prot: int) -> None:
    """mprotect of the page behind `gpa`."""
    assert lib.hv_mprotect(machine.ram.host + gpa, PAGE, prot) == 0


READ_WRITE = 3


@pytest.mark.parametrize("size", [1, 4])
def test_an_emulated_write_to_an_inaccessible_page(boot: Boot, size: int) -> None:
    machine = boot("mmio", GPA=0x400000, SIZE=size, WRITE=1)
    protect(machine, 0x400000, 0)
    exit = run(machine)
    assert exit == hv.HostFault(0x400000, size, True, MMIO_BYTES[:size], 0)
    protect(machine, 0x400000, READ_WRITE)
    assert isinstance(exit, hv.HostFault)
    machine.write(exit.gpa, exit.data)  # the guest's write is carried out, and it runs on
    assert run(machine) == hv.Hlt()
    assert machine.read(0x400000, size) == MMIO_BYTES[:size]


def test_an_emulated_read_of_an_inaccessible_page(boot: Boot) -> None:
    machine = boot("mmio", GPA=0x400000, SIZE=4)
    machine.write(0x400000, b"real")
    protect(machine, 0x400000, 0)
    exit = run(machine)
    assert exit == hv.HostFault(0x400000, 4, False, None, 0)
    with pytest.raises(hv.UnansweredError):
        machine.vcpu.kvm.run()
    protect(machine, 0x400000, READ_WRITE)
    machine.answer(machine.read(0x400000, 4))
    assert run(machine) == hv.IoOut(0x11, 4, 1, b"real")


def test_a_native_access_to_an_inaccessible_page_loses_nothing(boot: Boot) -> None:
    machine = boot("user", MMIO=1, MMIO_GPA=0x400000)
    vcpu = machine.vcpu.kvm
    protect(machine, 0x400000, 0)
    exit = run(machine)
    if isinstance(exit, hv.HostFault) and exit.gpa is not None:
        pytest.skip("this host emulates CPL3")
    assert exit == hv.HostFault(None, None, None, None, None)
    assert run(machine) == exit  # again and again, until something is done
    protect(machine, 0x400000, READ_WRITE)
    assert vcpu.run(0.05) == hv.Interrupted("timeout")
    assert machine.read(0x400000, 1) == b"\x55"


def test_what_an_mmio_exit_is_follows_the_slots(guest: Callable[..., Guest]) -> None:
    # The same access, again and again: no slot, a slot that cannot be reached, a read-only one, none again.
    g = guest(bytes.fromhex("b800a0 8ed8 a30000 a10000 ebf8"), size=64 << 10)
    write, read = hv.MmioWrite(0xA0000, b"\x00\xa0"), hv.MmioRead(0xA0000, 2)

    def both() -> list[Exit]:
        first = g.run()
        second = g.run()
        g.vcpu.answer(0xA000)
        return [first, second]

    assert both() == both() == [write, read]
    with Mapping(None, PAGE) as memory:
        assert lib.hv_mprotect(memory.hva, PAGE, 0) == 0
        g.vm.set_user_memory_region(1, 0xA0000, memory)
        faults = [hv.HostFault(0xA0000, 2, True, b"\x00\xa0", 1), hv.HostFault(0xA0000, 2, False, None, 1)]
        assert both() == both() == faults
        g.vm.delete_memory_region(1)
        assert both() == [write, read]
        g.vm.set_user_memory_region(1, 0xA0000, memory, flags=lib.KVM_MEM_READONLY)
        assert both() == [write, faults[1]]
        g.vm.delete_memory_region(1)
    assert both() == [write, read]


# ---- model-specific registers ----

MSR_REASONS = ("UNKNOWN", "FILTER", "INVAL")


@pytest.fixture
def msr(boot: Boot) -> Boot:
    """As boot("msr", …), with accesses to unknown MSRs given to us."""

    def start(**defines: int) -> hv.Machine:
        machine = boot("msr", **defines)
        need_cap(machine.vm, "X86_USER_SPACE_MSR")
        machine.vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
        return machine

    return start


def test_rdmsr_with_an_answer(msr: Boot) -> None:
    machine = msr(MSR=0x12345)
    assert run(machine) == hv.RdMsr(0x12345, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
    with pytest.raises(hv.UnansweredError, match="RdMsr"):
        machine.vcpu.kvm.run()
    with pytest.raises(hv.ArgumentError, match="the size of RdMsr"):
        machine.answer(b"1234")
    machine.answer(0x1122334455667788)
    assert [run(machine), run(machine)] == [
        hv.IoOut(0x10, 4, 1, b"\x88\x77\x66\x55"),
        hv.IoOut(0x10, 4, 1, b"\x44\x33\x22\x11"),
    ]


def test_rdmsr_refused(msr: Boot) -> None:
    machine = msr(MSR=0x12345)
    run(machine)
    machine.vcpu.kvm.fail_msr()
    assert run(machine) == hv.IoOut(0x10, 1, 1, b"\x0d")  # the guest's #GP handler


def test_wrmsr(msr: Boot) -> None:
    machine = msr(MSR=0x12345, WRITE=1, VALUE=0x89ABCDEF)
    assert run(machine) == hv.WrMsr(0x12345, 0x89ABCDEF, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
    assert run(machine) == hv.Hlt()


def test_wrmsr_refused(msr: Boot) -> None:
    machine = msr(MSR=0x12345, WRITE=1)
    run(machine)
    machine.vcpu.kvm.fail_msr()
    assert run(machine) == hv.IoOut(0x10, 1, 1, b"\x0d")


def test_a_later_answer_takes_a_refusal_of_before_back(msr: Boot) -> None:
    # The `error` of one exit must not stay for the next.
    machine = msr(MSR=0x12345)
    run(machine)
    machine.vcpu.kvm.fail_msr()
    run(machine)
    machine.vcpu.real_mode(entry=0x7C00)
    assert isinstance(run(machine), hv.RdMsr)
    machine.answer(5)
    assert run(machine) == hv.IoOut(0x10, 4, 1, b"\x05\0\0\0")


# ---- ends ----


def test_hlt_may_be_run_on_from(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xf4\xf4\xe6\x10")
    assert [g.run(), g.run(), g.run()] == [hv.Hlt(), hv.Hlt(), hv.IoOut(0x10, 1, 1, b"\0")]


def test_shutdown_repeats_until_the_state_is_set(boot: Boot) -> None:
    machine = boot("triple")
    assert [run(machine), run(machine)] == [hv.Shutdown(), hv.Shutdown()]
    machine.load(0x7C00, b"\xf4")
    machine.vcpu.real_mode(entry=0x7C00)
    assert run(machine) == hv.Hlt()


def test_internal_error_with_the_instruction(boot: Boot) -> None:
    machine = boot("internal_error")
    exit = run(machine)
    if exit == hv.MmioRead(0xD0000000, 4):
        pytest.skip("this host's KVM can do popcnt")
    assert isinstance(exit, hv.InternalError)
    assert exit.suberror == 1
    assert exit.insn.startswith(bytes.fromhex("f30fb807"))  # as assembled
    assert len(exit.insn) <= 15


def test_internal_error_without_the_instruction(boot: Boot) -> None:
    exit = run(boot("internal_error", FETCH=1))
    assert isinstance(exit, hv.InternalError)
    assert (exit.suberror, exit.insn) == (1, b"")
    assert all(isinstance(word, int) for word in exit.data)


# ---- interrupts, debugging, dirty ring ----


def test_interrupt_window(boot: Boot) -> None:
    machine = boot("interrupts")
    vcpu = machine.vcpu.kvm
    page = vcpu._kvm_run
    page.request_interrupt_window = 1
    seen = [run(machine)]
    while not isinstance(seen[-1], kinds.IrqWindowOpen):
        assert seen[-1] == hv.IoOut(0x10, 1, 1, b"\xff")
        seen.append(run(machine))
    assert page.ready_for_interrupt_injection == 1
    page.request_interrupt_window = 0
    vcpu.interrupt(0x21)
    assert run(machine) == hv.IoOut(0x10, 1, 1, b"\x21")


def test_single_step(guest: Callable[..., Guest]) -> None:
    g = guest(b"\x90\x90\xf4")
    control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP
    g.vcpu.guest_debug = ffi.new("struct kvm_guest_debug *", {"control": control})
    steps = [g.run(), g.run()]
    assert [(step.exception, step.pc) for step in steps if isinstance(step, hv.Debug)] == [(1, CODE + 1), (1, CODE + 2)]
    assert all(step.dr6 & 1 << 14 for step in steps if isinstance(step, hv.Debug))  # BS: single-step
    g.vcpu.guest_debug = ffi.new("struct kvm_guest_debug *")
    assert g.run() == hv.Hlt()


def test_hardware_breakpoint(guest: Callable[..., Guest]) -> None:
    g = guest(b"\x90\x90\x90\xf4")
    debug = ffi.new("struct kvm_guest_debug *", {"control": lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP})
    debug.arch.debugreg[0], debug.arch.debugreg[7] = CODE + 2, 0x402  # G0, execute; bit 10 is always 1
    g.vcpu.guest_debug = debug
    exit = g.run()
    assert isinstance(exit, hv.Debug)
    assert (exit.exception, exit.pc, exit.dr6 & 0xF) == (1, CODE + 2, 1)


RING_BYTES = 1 << 16  # 4096 entries of 16 bytes


def test_dirty_ring_full_until_it_is_harvested(guest: Callable[..., Guest]) -> None:
    need("gcc")
    ring_cap = lib.KVM_CAP_DIRTY_LOG_RING_ACQ_REL

    def before(vm: hv.Vm) -> None:
        need_cap(vm, "DIRTY_LOG_RING_ACQ_REL")
        vm.enable_cap(ring_cap, RING_BYTES)

    g = guest(size=32 << 20, flags=lib.KVM_MEM_LOG_DIRTY_PAGES, before=before)
    pages = 5000
    g.load(assemble("touch", START=0x100000, COUNT=pages), at=0x7C00)
    seen: set[int] = set()
    fulls = index = 0
    ring = mmap.mmap(g.vcpu.fd, RING_BYTES, offset=lib.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE)
    while (exit := g.run()) != hv.Hlt():
        assert exit == hv.DirtyRingFull()
        fulls += 1
        while True:
            at = index % (RING_BYTES // 16) * 16
            flags, slot, offset = struct.unpack_from("<IIQ", ring, at)
            if not flags & 1:  # KVM_DIRTY_GFN_F_DIRTY
                break
            assert slot == 0
            seen.add(offset)
            struct.pack_into("<I", ring, at, 2)  # KVM_DIRTY_GFN_F_RESET
            index += 1
        assert g.vm.reset_dirty_rings() > 0
    ring.close()
    assert fulls >= 1
    assert len(seen) >= pages - RING_BYTES // 16
    touched = range(0x100000 >> 12, (0x100000 >> 12) + pages)
    assert {page for page in seen if page >= 0x100} <= set(touched)


# ---- INIT and SIPI ----


def test_an_ap_says_again_for_init_and_sipi(guest: Callable[..., Guest]) -> None:
    # With DS at the local APIC: ICR = INIT to APIC id 1, then start-up with page 3; out 0x11, al.
    g = guest(
        bytes.fromhex("66c7061003 00000001 66c7060003 00450000 66c7060003 03460000 e611"),
        irqchip=True,
    )
    sregs = g.vcpu.sregs
    sregs.ds.base = 0xFEE00000
    g.vcpu.sregs = sregs
    g.ram.write(0x3000, b"\xb0\x42\xe6\x10\xf4")  # mov al, 0x42; out 0x10, al; hlt
    ap = g.vm.create_vcpu(1)
    ap.lapic = ap.lapic  # KVM looks for who has which APIC id when one is set
    assert ap.mp_state.mp_state == lib.KVM_MP_STATE_UNINITIALIZED
    exits: list[Exit] = []

    def runner() -> None:
        while not exits or isinstance(exits[-1], kinds.Again):
            exits.append(ap.run(20))

    thread = threading.Thread(target=runner)
    thread.start()
    assert g.run() == hv.IoOut(0x11, 1, 1, b"\0")
    thread.join(30)
    assert not thread.is_alive()
    assert exits[-1] == hv.IoOut(0x10, 1, 1, b"\x42")
    assert hv.Again() in exits


# ---- the registers that ride along ----


def test_synced_registers_are_those_of_the_exit(boot: Boot) -> None:
    machine = boot("out", PORT=0x10, SIZE=4, VALUE=0x11223344)
    vcpu = machine.vcpu.kvm
    if not need_cap(machine.vm, "SYNC_REGS") & lib.KVM_SYNC_X86_REGS:
        pytest.skip("KVM_CAP_SYNC_REGS has no general registers")
    run(machine)
    synced, asked = vcpu._kvm_run.s.regs.regs, vcpu.regs
    assert bytes(ffi.buffer(ffi.addressof(synced))) == bytes(ffi.buffer(asked))
    assert synced.rax == 0x11223344


def test_registers_can_be_set_by_the_page(boot: Boot) -> None:
    machine = boot("out", PORT=0x10, SIZE=4, VALUE=0, COUNT=2)
    vcpu = machine.vcpu.kvm
    if not need_cap(machine.vm, "SYNC_REGS") & lib.KVM_SYNC_X86_REGS:
        pytest.skip("KVM_CAP_SYNC_REGS has no general registers")
    assert run(machine) == hv.IoOut(0x10, 4, 1, bytes(4))
    page = vcpu._kvm_run
    page.s.regs.regs.rax = 0x41
    page.kvm_dirty_regs = lib.KVM_SYNC_X86_REGS
    assert run(machine) == hv.IoOut(0x10, 4, 1, b"\x42\0\0\0")  # and one added by the guest
    assert page.kvm_dirty_regs == 0


def test_an_invalid_valid_bit_is_refused_by_kvm_run(guest: Callable[..., Guest]) -> None:
    g = guest()
    g.vcpu._kvm_run.kvm_valid_regs = 1 << 63
    with pytest.raises(hv.KvmError, match="kvm_valid_regs") as caught:
        g.run()
    assert (caught.value.errno, caught.value.call) == (errno.EINVAL, "KVM_RUN")
    g.vcpu._kvm_run.kvm_valid_regs = 0
    assert g.run() == hv.Hlt()


# ---- an exit's instruction finished without running on ----


def test_complete_io_finishes_a_read(guest: Callable[..., Guest]) -> None:
    g = guest(bytes.fromhex("e410 e611 f4"))  # in al, 0x10; out 0x11, al; hlt
    assert g.run() == hv.IoIn(0x10, 1, 1)
    assert g.vcpu.has_exit_pending
    assert g.vcpu.regs.rip == CODE
    g.vcpu.answer(0x77)
    g.vcpu.complete_io()
    assert not g.vcpu.has_exit_pending
    regs = g.vcpu.regs
    assert (regs.rip, regs.rax & 0xFF) == (CODE + 2, 0x77)
    g.vcpu.complete_io()  # nothing left to do
    assert g.run() == hv.IoOut(0x11, 1, 1, b"\x77")


def test_state_set_after_complete_io_is_not_overwritten(guest: Callable[..., Guest]) -> None:
    g = guest(bytes.fromhex("e410 e611 f4"))
    g.run()
    g.vcpu.answer(0x77)
    g.vcpu.complete_io()
    g.load(b"\xe6\x22\xf4", at=0x3000)  # a new program, al = 0x77 no more
    regs = g.vcpu.regs
    regs.rax = 0x99
    g.vcpu.regs = regs
    assert g.run() == hv.IoOut(0x22, 1, 1, b"\x99")


def test_complete_io_keeps_the_second_half_of_an_access(boot: Boot) -> None:
    machine = boot("mmio", GPA=0xD0000000, SIZE=16, WRITE=1)
    assert run(machine) == hv.MmioWrite(0xD0000000, MMIO_BYTES[:8])
    machine.vcpu.kvm.complete_io()
    assert machine.vcpu.kvm.has_exit_pending
    machine.vcpu.kvm.complete_io()
    assert run(machine) == hv.MmioWrite(0xD0000008, MMIO_BYTES[8:16])
    assert run(machine) == hv.Hlt()


def test_complete_io_keeps_the_second_half_of_a_read(boot: Boot) -> None:
    machine = boot("mmio", GPA=0xD0000000, SIZE=16)
    assert run(machine) == hv.MmioRead(0xD0000000, 8)
    machine.answer(b"abcdefgh")
    machine.vcpu.kvm.complete_io()
    assert run(machine) == hv.MmioRead(0xD0000008, 8)
    with pytest.raises(hv.UnansweredError):
        machine.vcpu.kvm.complete_io()
    machine.answer(b"ijklmnop")
    assert b"".join(run(machine).data for _ in range(4)) == b"abcdefghijklmnop"


def test_rep_ins_completed_bit_by_bit(boot: Boot) -> None:
    machine = boot("ins", PORT=0x30, SIZE=1, COUNT=2000)
    given = 0
    while isinstance(exit := run(machine), hv.IoIn):
        machine.answer(bytes((given + n) % 256 for n in range(exit.count)))
        given += exit.count
        machine.vcpu.kvm.complete_io()
    assert machine.read(0x8000, 2000) == bytes(n % 256 for n in range(2000))


# ---- exits from the page alone ----


def page(reason: int, **fields: object) -> object:
    """A struct kvm_run with this exit in it."""
    run = ffi.new("struct kvm_run *", {"exit_reason": reason})
    for path, value in fields.items():
        *way, last = path.split("__")
        target = run
        for name in way:
            target = getattr(target, name)
        setattr(target, last, value)
    return run


@pytest.mark.parametrize("reason", [0, 7, 13, 38, 62, 255, 256 + 6, 0x2005, 0xFFFFFFFF])
def test_unknown_reasons_are_kept_with_their_data(reason: int) -> None:
    run = page(reason)
    raw = bytes(range(256))
    ffi.memmove(ffi.cast("uint8_t *", run) + ffi.offsetof("struct kvm_run", "hw"), raw, 256)
    assert decode(run) == hv.Unknown(reason, raw)


def test_every_reason_has_the_number_of_the_header() -> None:
    # What is decoded by number, against the header's names.
    names = {
        "EXCEPTION": kinds.Exception_,
        "IO": hv.IoIn,
        "HYPERCALL": hv.Hypercall,
        "DEBUG": hv.Debug,
        "MMIO": hv.MmioRead,
        "FAIL_ENTRY": hv.FailEntry,
        "SET_TPR": kinds.SetTpr,
        "TPR_ACCESS": kinds.TprAccess,
        "INTERNAL_ERROR": hv.InternalError,
        "SYSTEM_EVENT": hv.SystemEvent,
        "IOAPIC_EOI": kinds.IoApicEoi,
        "X86_RDMSR": hv.RdMsr,
        "X86_WRMSR": hv.WrMsr,
        "DIRTY_RING_FULL": hv.DirtyRingFull,
        "X86_BUS_LOCK": kinds.X86BusLock,
        "XEN": kinds.Xen,
        "NOTIFY": kinds.Notify,
    }
    for name, kind in names.items():
        assert type(decode(page(getattr(lib, f"KVM_EXIT_{name}")))) is kind, name


def test_exits_that_this_host_does_not_give() -> None:
    assert decode(page(1, ex__exception=14, ex__error_code=2)) == kinds.Exception_(14, 2)
    assert decode(page(3, hypercall__nr=12, hypercall__args=[1, 2, 3, 4, 5, 6], hypercall__flags=1)) == hv.Hypercall(
        12, (1, 2, 3, 4, 5, 6), 1
    )
    assert decode(page(9, fail_entry__hardware_entry_failure_reason=0x80000021, fail_entry__cpu=3)) == hv.FailEntry(
        0x80000021, 3
    )
    assert decode(page(12, tpr_access__rip=0x1000, tpr_access__is_write=1)) == kinds.TprAccess(0x1000, True)
    event = page(24, system_event__type=2, system_event__ndata=2)
    event.system_event.data[0], event.system_event.data[1] = 7, 8
    assert decode(event) == hv.SystemEvent(2, (7, 8))
    event.system_event.ndata = 1 << 31  # a count that cannot be is not believed
    assert len(decode(event).data) == 16
    assert decode(page(26, eoi__vector=0x31)) == kinds.IoApicEoi(0x31)
    assert decode(page(37, notify__flags=1)) == kinds.Notify(1)
    xen = decode(page(34, xen__type=1, xen__u__hcall__input=29, xen__u__hcall__params=[1, 2, 3, 4, 5, 6]))
    assert (xen.type, xen.input, xen.params) == (1, 29, (1, 2, 3, 4, 5, 6))


def test_an_internal_error_believes_no_count() -> None:
    run = page(17, internal__suberror=3, internal__ndata=1 << 31)
    assert len(decode(run).data) == 16


# ---- who may run ----


def spinning(g: Guest) -> tuple[threading.Thread, list[object]]:
    """A thread that runs the guest until it is interrupted, and what it got."""
    got: list[object] = []

    def runner() -> None:
        try:
            got.append(g.vcpu.run(60))
        except BaseException as error:  # noqa: BLE001
            got.append(error)

    thread = threading.Thread(target=runner)
    thread.start()
    while g.vcpu._c.state != 2:
        time.sleep(1e-4)
    return thread, got


def test_a_second_runner_and_all_that_changes_the_vcpu_are_refused(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xeb\xfe")
    thread, got = spinning(g)
    try:
        batch = hv.Batch()
        for call in (
            g.vcpu.run,
            lambda: g.vcpu.run(0.01),
            lambda: g.vcpu.run_until(1),
            g.vcpu.complete_io,
            lambda: g.vcpu.answer(0),
            lambda: g.vcpu.answer(b"0"),
            g.vcpu.fail_msr,
            lambda: setattr(g.vcpu, "batch", batch),
        ):
            with pytest.raises(hv.BusyError, match="another thread runs it"):
                call()
        assert g.vcpu.batch is None
    finally:
        g.vcpu.kick()
        thread.join()
    assert got == [hv.Interrupted("kick")]
    g.vcpu.batch = batch
    assert g.vcpu.run(0.01) == hv.Interrupted("timeout")


def test_close_stops_a_runner(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xeb\xfe")
    thread, got = spinning(g)
    g.vcpu.close()
    thread.join()
    assert got == [hv.Interrupted("kick")] or isinstance(got[0], hv.ClosedError)
    for call in (g.vcpu.run, g.vcpu.kick, g.vcpu.complete_io, lambda: g.vcpu.answer(0), lambda: g.vcpu.regs):
        with pytest.raises(hv.ClosedError):
            call()
    assert g.vcpu.closed
    g.vcpu.close()


def test_closing_while_exits_are_being_looked_at(kvm: hv.Kvm) -> None:
    # mov [0xa0000], al; jmp: exits that are read from memory after the vCPU has been left.
    code = bytes.fromhex("b800a0 8ed8 a20000 ebfb")
    kept = {hv.MmioWrite(0xA0000, b"\0"), hv.Interrupted("kick")}
    for _ in range(cases(60, 2000)):
        with Guest(kvm, code, size=64 << 10) as g:
            bad: list[object] = []
            started = threading.Event()

            def runner(g: Guest = g, bad: list[object] = bad, started: threading.Event = started) -> None:
                try:
                    while True:
                        exit = g.vcpu.run()
                        if exit not in kept:
                            bad.append(exit)
                        started.set()
                except hv.ClosedError:
                    pass
                except BaseException as error:  # noqa: BLE001
                    bad.append(error)

            thread = threading.Thread(target=runner)
            thread.start()
            started.wait()
            g.vcpu.close()
            thread.join()
            assert not bad


def test_a_dead_vm_has_an_error_of_its_own(guest: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing known kills a VM of this KVM: the errno is injected, as its KVM_RUN and KVM_CHECK_EXTENSION would give it.
    g = guest()

    class Dead:
        @staticmethod
        def kvm_check_extension(fd: int, cap: int) -> int:
            return -errno.EIO

        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

    monkeypatch.setattr(handle, "lib", Dead())
    with pytest.raises(VmDeadError) as caught:
        g.vcpu._exit(-errno.EIO)
    assert (caught.value.errno, caught.value.call) == (errno.EIO, "KVM_RUN")


def test_a_memory_fault_is_an_exit(guest: Callable[..., Guest]) -> None:
    # KVM_RUN answers EFAULT or EHWPOISON with this reason in the page; nothing here makes it do so.
    g = guest()
    kept = g.vcpu._c.exit
    kept.exit_reason = lib.KVM_EXIT_MEMORY_FAULT
    kept.memory_fault.gpa, kept.memory_fault.size, kept.memory_fault.flags = 0x5000, 0x1000, 8
    assert g.vcpu._exit(-errno.EFAULT) == hv.MemoryFault(0x5000, 0x1000, 8, errno.EFAULT)
    assert g.vcpu._exit(-133) == hv.MemoryFault(0x5000, 0x1000, 8, 133)


# ---- bad arguments ----


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("inf"), 1e10])
def test_timeouts_out_of_range(guest: Callable[..., Guest], timeout: float) -> None:
    with pytest.raises(hv.ArgumentError) as caught:
        guest().vcpu.run(timeout)
    assert (caught.value.call, caught.value.field) == ("Vcpu.run", "timeout")


@pytest.mark.parametrize("timeout", ["1", b"1", True, [], 1j])
def test_timeouts_of_other_types(guest: Callable[..., Guest], timeout: object) -> None:
    with pytest.raises(hv.ArgumentTypeError, match=r"Vcpu\.run: timeout: expected seconds, or None"):
        guest().vcpu.run(timeout)


def test_arguments_of_run_and_run_until(guest: Callable[..., Guest]) -> None:
    vcpu = guest().vcpu
    for call in (
        lambda: vcpu.run(1, 2),
        lambda: vcpu.run(limit=1),
        lambda: vcpu.run(1, timeout=1),
        lambda: vcpu.run_until(),
        lambda: vcpu.run_until("x"),
        lambda: vcpu.run_until(1.5),
        lambda: vcpu.run_until(True),
        lambda: vcpu.kick(1),
    ):
        with pytest.raises(TypeError):
            call()
    for deadline in (-1, 1 << 63, 1 << 64):
        with pytest.raises(hv.ArgumentError) as caught:
            vcpu.run_until(deadline)
        assert (caught.value.call, caught.value.field) == ("Vcpu.run_until", "deadline_ns")
    assert vcpu.run(timeout=None) == hv.Hlt()
