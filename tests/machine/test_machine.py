"""Machine: memory, running, what nobody claims, and arguments that cannot be right.

Expected: what the bytes of the guests say by the manuals, and arithmetic.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.kvm import exits as kinds
from hvmodel.ram import RamBlock
from tests.cases import cases
from tests.guests import assemble
from tests.host.held import nothing_leaks
from tests.need import need, need_cap

Boot = Callable[..., hv.Machine]
PAGE = 0x1000
SPIN = "ebfe"
ENDLESS = hv.Interrupted("timeout")


# ---- memory ----


def test_ram_is_one_sealed_block_in_slot_0(boot: Boot) -> None:
    machine = boot(ram="2M")
    assert (machine.ram.idstr, machine.ram.used_length) == ("pc.ram", 2 << 20)
    assert [(s.slot, s.gpa, s.size, s.hva, s.flags) for s in machine.vm.memslots.values()] == [
        (0, 0, 2 << 20, machine.ram.host, 0)
    ]


def test_what_was_loaded_is_what_the_guest_reads_and_the_host(boot: Boot) -> None:
    # mov al, [0x9000]; out 0x10, al; mov byte [0x9001], 0x5a; hlt
    machine = boot("a00090 e610 c60601905a f4")
    machine.load(0x9000, b"\xa5")
    assert next(machine.exits(10)) == hv.IoOut(0x10, 1, 1, b"\xa5")
    assert next(machine.exits(10)) == hv.Hlt()
    assert machine.read(0x9000, 2) == b"\xa5\x5a"
    assert bytes(machine.view(0x9000, 2)) == b"\xa5\x5a"


@pytest.mark.parametrize("data", [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(b"a.b.c.")[::2]])
def test_load_and_write_take_any_buffer(boot: Boot, data: Any) -> None:
    machine = boot()
    if not memoryview(data).contiguous:
        for call in (machine.load, machine.write):
            with pytest.raises(hv.ArgumentTypeError, match="contiguous buffer"):
                call(0x1000, data)
        return
    machine.load(0x1000, data)
    machine.write(0x2000, data)
    assert machine.read(0x1000, 3) == machine.read(0x2000, 3) == b"abc"


def test_views_are_the_memory(boot: Boot) -> None:
    machine = boot()
    with machine.view(0x3000, 4) as view, machine.writable(0x3000, 4) as out:
        assert view.readonly
        assert not out.readonly
        out[1:3] = b"xy"
        assert bytes(view) == b"\0xy\0"
        with pytest.raises(TypeError):
            view[0] = 1  # type: ignore[index]


SIZE = 1 << 20


@pytest.mark.parametrize(
    ("gpa", "size", "fits"),
    [
        (0, 1, True),
        (0, SIZE, True),
        (SIZE - 1, 1, True),
        (SIZE - 1, 0, True),
        (SIZE - 1, 2, False),
        (SIZE, 1, False),
        (0, SIZE + 1, False),
        (-1, 1, False),
        (1, -1, False),
        ((1 << 64) - 1, 2, False),
        (1 << 64, 1, False),
        (0xD0000000, 4, False),
    ],
)
def test_bounds_of_every_way_into_memory(boot: Boot, gpa: int, size: int, fits: bool) -> None:
    machine = boot()
    ways: list[tuple[str, Callable[[], object]]] = [
        ("read", lambda: machine.read(gpa, size)),
        ("view", lambda: machine.view(gpa, size)),
        ("writable", lambda: machine.writable(gpa, size)),
    ]
    if size >= 0:
        ways.append(("write", lambda: machine.write(gpa, bytes(size))))
    if size > 0:
        ways.append(("load", lambda: machine.load(gpa, bytes(size))))
    for name, call in ways:
        if fits:
            call()
            continue
        with pytest.raises(hv.ArgumentError) as caught:
            call()
        assert (caught.value.call, caught.value.field, caught.value.value) == (f"Machine.{name}", "gpa", gpa)
        assert "[0x0, 0x100000)" in str(caught.value)
        assert "not in RAM" in str(caught.value)


def test_the_host_marks_what_it_writes(boot: Boot) -> None:
    machine = boot()
    ram = machine.ram
    assert ram.take_host_dirty() == [range(7, 8)]  # boot's load at 0x7c00
    machine.load(0x1FFF, b"ab")
    machine.write(0x5000, bytes(PAGE + 1))
    machine.write(0x9000, b"")
    assert ram.take_host_dirty() == [range(1, 3), range(5, 7)]
    with machine.writable(0x20000, 1):
        assert ram.host_dirty() == [range(0x20, 0x21)]
        assert ram.take_host_dirty() == [range(0x20, 0x21)]
    assert ram.take_host_dirty() == [range(0x20, 0x21)]
    machine.read(0x30000, 100)
    machine.view(0x40000, 100)
    machine.run(10)
    assert ram.take_host_dirty() == []


@contextmanager
def big_machine(size: int) -> Iterator[hv.Machine]:
    """A machine with that much RAM, or a skip: pages cost nothing until they are touched, but the size must fit."""
    from hvmodel.ram import host_memory

    need("kvm")
    if host_memory() < size:
        pytest.skip(f"needs a host with {size >> 20} MiB, has {host_memory() >> 20}")
    with hv.Machine(ram=size) as machine:
        yield machine


def test_ram_above_3_gib_continues_at_4_gib() -> None:
    with big_machine((3 << 30) + (2 << 20)) as machine:
        host = machine.ram.host
        assert [(s.gpa, s.size, s.hva) for s in machine.vm.memslots.values()] == [
            (0, 3 << 30, host),
            (4 << 30, 2 << 20, host + (3 << 30)),
        ]
        machine.write((4 << 30) + 5, b"above")
        assert machine.ram.read((3 << 30) + 5, 5) == b"above"
        assert machine.read((4 << 30) + 5, 5) == b"above"
        for gpa, size in ((3 << 30, 1), ((4 << 30) - 1, 1), ((3 << 30) - 1, 2), ((4 << 30) + (2 << 20), 1)):
            with pytest.raises(hv.ArgumentError, match=r"\[0x0, 0xc0000000\), \[0x100000000, 0x100200000\)"):
                machine.read(gpa, size)


def test_a_guest_reads_above_4_gib_what_the_host_wrote_and_the_reverse() -> None:
    need("gcc")
    above = 1 << 32
    with big_machine((3 << 30) + (2 << 20)) as machine:
        # user.S in long mode writes 0x55 to the second GiB of its addresses, which modes.h maps to 0xd0000000.
        machine.load(0x7C00, assemble("user", MMIO=1))
        machine.vcpu.real_mode()
        assert next(machine.exits(10)) == hv.MmioWrite(0xD0000000, b"\x55")
        # Its page directory for that (modes.h: PD_MMIO) is made to point above 4 GiB, and the TLB is emptied.
        entry = int.from_bytes(machine.read(0x13000, 8), "little")
        assert entry & ~0xFFF == 0xD0000000
        machine.write(0x13000, (above | entry & 0xFFF).to_bytes(8, "little"))
        rip = machine.vcpu.location().rip
        machine.write(rip, bytes.fromhex("c6470166 8a07 ee"))  # mov byte [rdi+1], 0x66; mov al, [rdi]; out dx, al
        machine.write(above, b"\xa7")
        machine.vcpu.sregs = machine.vcpu.sregs
        assert next(machine.exits(10)) == hv.IoOut(0x10, 1, 1, b"\xa7")
        assert machine.read(above, 2) == b"\xa7\x66"


def test_exactly_3_gib_is_one_slot() -> None:
    with big_machine(3 << 30) as machine:
        assert [(s.gpa, s.size) for s in machine.vm.memslots.values()] == [(0, 3 << 30)]


# ---- exits ----


def test_exits_gives_each_one_and_goes_on_after_a_halt(boot: Boot) -> None:
    # inc al; out 0x10, al; hlt; jmp
    machine = boot("fec0 e610 f4 ebf9")
    seen = []
    for exit in machine.exits(10):
        seen.append(exit)
        if len(seen) == 6:
            break
    halt = hv.Hlt()
    one, two, three = (hv.IoOut(0x10, 1, 1, bytes([n])) for n in (1, 2, 3))
    assert seen == [one, halt, two, halt, three, halt]


def test_exits_ends_with_the_timeout_and_can_be_called_again(boot: Boot) -> None:
    machine = boot("e610 ebfe")
    assert list(machine.exits(0.02)) == [hv.IoOut(0x10, 1, 1, b"\0"), ENDLESS]
    assert list(machine.exits(0)) == [ENDLESS]


def test_the_timeout_of_exits_is_for_the_whole_loop(boot: Boot) -> None:
    machine = boot("e610 ebfc")  # out for ever
    began = time.monotonic()
    seen = list(machine.exits(0.05))
    assert time.monotonic() - began >= 0.05
    assert seen[-1] == ENDLESS
    assert set(seen[:-1]) == {hv.IoOut(0x10, 1, 1, b"\0")}


@pytest.mark.parametrize(("name", "kind"), [("triple", hv.Shutdown), ("internal_error", hv.InternalError)])
def test_exits_ends_after_what_would_repeat(boot: Boot, name: str, kind: type) -> None:
    need("gcc")
    machine = boot(assemble(name))
    for _ in range(2):
        seen = list(machine.exits(10))
        if seen and isinstance(seen[0], hv.MmioRead):
            pytest.skip("this host's KVM can do popcnt")
        assert [type(exit) for exit in seen] == [kind]


def test_a_read_is_answered_through_the_machine(boot: Boot) -> None:
    # in eax, 0x60 (16-bit code: 66 e5 60); out 0x10, eax; hlt
    machine = boot("66e560 66e710 f4")
    for exit in machine.exits(10):
        match exit:
            case hv.IoIn(port=0x60, size=4, count=1):
                machine.answer(0x89ABCDEF)
            case hv.IoOut(port=0x10, value=value):
                assert value == 0x89ABCDEF
            case hv.Hlt():
                return
            case other:
                pytest.fail(repr(other))


def test_an_unanswered_read_on_a_strict_machine(boot: Boot) -> None:
    machine = boot("e460 f4")
    loop = machine.exits(10)
    assert next(loop) == hv.IoIn(0x60, 1, 1)
    with pytest.raises(hv.UnansweredError, match="port=0x60"):
        next(loop)
    with pytest.raises(hv.UnansweredError, match="port=0x60"):
        machine.run(10)
    machine.answer(1)
    assert machine.run(10).halted


def test_an_unanswered_read_on_an_open_bus_gets_ones(boot: Boot) -> None:
    # in eax, 0x60; out 0x10, eax; in ax, 0x60; out; in al, 0x60; out; hlt, with eax 0 at first
    machine = boot("66e560 66e710 6631c0 e560 66e710 6631c0 e460 66e710 f4", unclaimed="open_bus")
    seen = []
    for exit in machine.exits(10):
        seen.append(exit)
        if exit == hv.Hlt():
            break
    assert [e.value for e in seen if isinstance(e, hv.IoOut)] == [0xFFFFFFFF, 0xFFFF, 0xFF]
    assert [type(e).__name__ for e in seen] == ["IoIn", "IoOut"] * 3 + ["Hlt"]


def test_an_answer_without_a_question(boot: Boot) -> None:
    with pytest.raises(hv.ArgumentError, match="no read exit waits"):
        boot().answer(0)


def test_every_element_of_rep_ins_reads_ones_on_an_open_bus(boot: Boot) -> None:
    need("gcc")
    for run in (hv.Machine.run, lambda machine, timeout: list(zip(range(50), machine.exits(timeout), strict=False))):
        machine = boot(assemble("ins", PORT=0x30, SIZE=2, COUNT=1500), unclaimed="open_bus")
        run(machine, 0.2)
        assert machine.read(0x8000, 3000) == b"\xff" * 3000


# ---- run, and why it comes back ----


def test_halted(boot: Boot) -> None:
    stop = boot("f4").run(10)
    assert stop == hv.Stop("halted", hv.Hlt(), None)
    assert (stop.halted, stop.value, stop.report) == (True, None, None)


@pytest.mark.parametrize("unclaimed", ["strict", "open_bus"])
@pytest.mark.parametrize(
    ("code", "size", "value"),
    [
        # mov eax, 0x44332211; out 0xf4, al | ax | eax
        ("66b811223344 e6f4", 1, 0x11),
        ("66b811223344 e7f4", 2, 0x2211),
        ("66b811223344 66e7f4", 4, 0x44332211),
    ],
)
def test_debug_exit(boot: Boot, code: str, size: int, value: int, unclaimed: str) -> None:
    machine = boot(code + "f4", debug_exit=0xF4, unclaimed=unclaimed)
    stop = machine.run(10)
    assert stop == hv.Stop("debug-exit", hv.IoOut(0xF4, size, 1, value.to_bytes(size, "little")))
    assert (stop.value, stop.halted) == (value, False)
    assert machine.run(10).halted  # it can go on


@pytest.mark.parametrize("port", [0, 0xFFFD, 0xFFFF])
@pytest.mark.parametrize("unclaimed", ["strict", "open_bus"])
def test_debug_exit_at_any_port(boot: Boot, port: int, unclaimed: str) -> None:
    # mov dx, port; mov al, 5; out dx, al
    code = b"\xba" + port.to_bytes(2, "little") + b"\xb0\x05\xee\xf4"
    assert boot(code, debug_exit=port, unclaimed=unclaimed).run(10).value == 5


def test_debug_exit_beside_other_rules(boot: Boot) -> None:
    machine = boot("b005 e6f4 b006 e6f5 e6f3 f4", debug_exit=0xF4, unclaimed="open_bus")
    out = hv.Capture()
    machine.batch.pio(0xF5, 1, write=out)
    assert [machine.run(10).reason, machine.run(10).reason] == ["debug-exit", "halted"]
    assert out.read() == b"\x06"


@pytest.mark.parametrize("port", [0xE6, 0x3F5, 0x401])
def test_debug_exit_close_to_the_console(boot: Boot, port: int) -> None:
    # A debug-exit port takes writes of 4 bytes, which would reach into the console's ports.
    # mov al, 7; mov dx, port; out dx, al; mov dx, 0x3f8; out dx, al; hlt
    code = b"\xb0\x07\xba" + port.to_bytes(2, "little") + bytes.fromhex("ee baf803 ee f4")
    machine = boot(code, debug_exit=port, unclaimed="open_bus")
    assert machine.run(10).value == 7
    serial = machine.console.serial
    assert machine.run(10).halted
    machine.vcpu.real_mode()
    assert machine.run(10).value == 7
    assert machine.run(10).halted
    assert serial.read() == b"\x07\x07"


def test_a_console_whose_ports_are_taken_takes_none(boot: Boot) -> None:
    machine = boot()
    machine.batch.pio(0x3FD, 1, read=0)
    for _ in range(2):
        with pytest.raises(hv.ArgumentError, match=r"\[0x3fd, 0x3fe\) has a rule"):
            machine.console  # noqa: B018
    machine.batch.remove("pio", 0x3FD)
    assert machine.console.serial.read() == b""


def test_reading_the_debug_exit_port_is_no_exit(boot: Boot) -> None:
    assert boot("e4f4 e610 f4", debug_exit=0xF4, unclaimed="open_bus").run(10).halted
    with pytest.raises(hv.GuestAccessError, match="read from port 0xf4"):
        boot("e4f4 f4", debug_exit=0xF4).run(10)


def test_shutdown(boot: Boot) -> None:
    need("gcc")
    assert boot(assemble("triple")).run(10) == hv.Stop("shutdown", hv.Shutdown())


def test_internal_error(boot: Boot) -> None:
    need("gcc")
    stop = boot(assemble("internal_error", FETCH=1)).run(10)
    assert stop.reason == "internal-error"
    assert isinstance(stop.exit, hv.InternalError)
    assert stop.exit.suberror == 1  # KVM_INTERNAL_ERROR_EMULATION


@pytest.mark.parametrize("unclaimed", ["strict", "open_bus"])
def test_timeout(boot: Boot, unclaimed: str) -> None:
    machine = boot(SPIN, unclaimed=unclaimed)
    for timeout in (0, 0.01, 1e-9):
        began = time.monotonic()
        assert machine.run(timeout) == hv.Stop("timeout", ENDLESS)
        assert time.monotonic() - began >= timeout


def test_the_timeout_ends_a_guest_that_c_serves_for_ever(boot: Boot) -> None:
    machine = boot("e610 ebfc", unclaimed="open_bus")
    assert machine.run(0.05) == hv.Stop("timeout", ENDLESS)


@pytest.mark.parametrize("unclaimed", ["strict", "open_bus"])
def test_a_kick_before_and_during_a_run(boot: Boot, unclaimed: str) -> None:
    machine = boot(SPIN, unclaimed=unclaimed)
    assert machine.kick() is False  # pending
    assert machine.run(10) == hv.Stop("interrupted", hv.Interrupted("kick"))
    stops: list[hv.Stop] = []
    runner = threading.Thread(target=lambda: stops.append(machine.run(60)))
    runner.start()
    while machine.vcpu.kvm._c.state != 2:
        time.sleep(1e-4)
    machine.vcpu.kick()
    runner.join()
    assert stops == [hv.Stop("interrupted", hv.Interrupted("kick"))]


def test_a_kick_is_an_exit_of_exits_and_the_loop_goes_on(boot: Boot) -> None:
    machine = boot("e610 f4")
    machine.kick()
    loop = machine.exits(10)
    assert [next(loop), next(loop), next(loop)] == [
        hv.Interrupted("kick"),
        hv.IoOut(0x10, 1, 1, b"\0"),
        hv.Hlt(),
    ]


@contextmanager
def alarm(handler: Callable[..., object], after: float = 0.02, again: float = 0) -> Iterator[None]:
    """SIGALRM for the block after so many seconds, and `again` and again."""
    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, after, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_a_signal_interrupts_after_its_handler(boot: Boot) -> None:
    machine = boot(SPIN)
    seen: list[int] = []
    with alarm(lambda number, _frame: seen.append(number), again=0.5):  # a busy host may be late to run the guest
        assert machine.run(30) == hv.Stop("interrupted", hv.Interrupted("signal"))
    assert set(seen) == {signal.SIGALRM}


def test_what_a_handler_raises_comes_out(boot: Boot) -> None:
    machine = boot("e610 ebfc", unclaimed="open_bus")
    with alarm(signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        machine.run(30)
    assert machine.run(0.01).reason == "timeout"  # nothing is lost


def test_a_host_fault_is_not_open_bus(boot: Boot) -> None:
    need("gcc")
    machine = boot(assemble("mmio", GPA=0x80000), unclaimed="open_bus")
    machine.write(0x80000, b"real")
    machine.batch.pio(0x11, 4, write="stop")
    assert lib.hv_mprotect(machine.ram.host + 0x80000, PAGE, 0) == 0
    fault = hv.HostFault(0x80000, 4, False, None, 0)
    try:
        assert machine.run(10) == hv.Stop("host-fault", fault)
        # Nor is it answered with ones when it is run again.
        with pytest.raises(hv.UnansweredError):
            machine.run(10)
        with pytest.raises(hv.UnansweredError):
            next(machine.exits(10))
    finally:
        assert lib.hv_mprotect(machine.ram.host + 0x80000, PAGE, 3) == 0
    machine.answer(machine.read(0x80000, 4))
    assert next(machine.exits(10)) == hv.IoOut(0x11, 4, 1, b"real")


def test_a_write_to_an_inaccessible_page_is_not_dropped(boot: Boot) -> None:
    need("gcc")
    machine = boot(assemble("mmio", GPA=0x80000, WRITE=1), unclaimed="open_bus")
    assert lib.hv_mprotect(machine.ram.host + 0x80000, PAGE, 0) == 0
    try:
        stop = machine.run(10)
    finally:
        assert lib.hv_mprotect(machine.ram.host + 0x80000, PAGE, 3) == 0
    assert stop == hv.Stop("host-fault", hv.HostFault(0x80000, 4, True, b"\x11\x22\x33\x44", 0))


def test_a_write_to_rom_is_dropped_on_an_open_bus_and_an_error_on_a_strict_machine(boot: Boot) -> None:
    need("gcc")
    rom = b"\x90" * 0x10000
    for unclaimed in ("open_bus", "strict"):
        machine = boot(assemble("mmio", GPA=0xFFFF0000, WRITE=1), unclaimed=unclaimed)
        machine.load_bios(rom)
        if unclaimed == "open_bus":
            assert machine.run(10).halted
        else:
            with pytest.raises(hv.GuestAccessError, match="wrote 11223344 to address 0xffff0000"):
                machine.run(10)
        assert machine.read(0xFFFF0000, 4) == b"\x90" * 4


def test_any_other_exit(boot: Boot) -> None:
    machine = boot("90 f4")
    need_cap(machine.vm, "SET_GUEST_DEBUG")
    debug = ffi.new("struct kvm_guest_debug *", {"control": lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP})
    machine.vcpu.kvm.guest_debug = debug
    stop = machine.run(10)
    assert stop.reason == "exit"
    assert isinstance(stop.exit, hv.Debug)
    assert stop.exit.pc == 0x7C01


def test_an_msr_of_a_strict_machine_is_an_exit_and_of_an_open_bus_raises_gp(boot: Boot) -> None:
    need("gcc")
    for unclaimed in ("strict", "open_bus"):
        machine = boot(assemble("msr", MSR=0x12345), unclaimed=unclaimed)
        need_cap(machine.vm, "X86_USER_SPACE_MSR")
        machine.vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
        assert machine.run(10) == hv.Stop("exit", hv.RdMsr(0x12345, lib.KVM_MSR_EXIT_REASON_UNKNOWN))
        if unclaimed == "strict":
            with pytest.raises(hv.UnansweredError, match="RdMsr"):
                machine.run(10)
        else:
            # msr.S: its handler writes the vector of #GP to port 0x10.
            assert next(machine.exits(10)) == hv.IoOut(0x10, 1, 1, b"\x0d")


class _Runner:
    """In the place of a kvm Vcpu: gives exits that this host does not."""

    def __init__(self, vcpu: hv.Vcpu, *exits: object) -> None:
        self._c = vcpu._c
        self._exits = iter(exits)

    def run_until(self, _deadline: int) -> object:
        return next(self._exits)


@pytest.mark.parametrize(
    ("exit", "reason"),
    [
        (hv.FailEntry(0x80000021, 1), "fail-entry"),
        (hv.MemoryFault(0x5000, 0x1000, 8, 14), "memory-fault"),
        (hv.HostFault(), "host-fault"),
        (hv.SystemEvent(1, ()), "system-event"),
        (hv.Unknown(99, b""), "exit"),
        (kinds.SetTpr(), "exit"),
    ],
)
@pytest.mark.parametrize("unclaimed", ["strict", "open_bus"])
def test_reasons_that_take_an_injected_exit(
    boot: Boot, monkeypatch: pytest.MonkeyPatch, exit: Any, reason: str, unclaimed: str
) -> None:
    machine = boot(unclaimed=unclaimed)
    assert machine.batch is not None
    with monkeypatch.context() as patch:
        patch.setattr(machine.vcpu, "kvm", _Runner(machine.vcpu.kvm, hv.Again(), exit))
        assert machine.exits() is not None
        if unclaimed == "open_bus":
            patch.setattr(machine, "_serve_unclaimed", lambda policy: None)
        assert machine.run(10) == hv.Stop(reason, exit)


# ---- what nobody claims ----


# Code at 0x7c00, then of the access: port, size, data (None: a read), IP of the instruction, its length.
PORT_ACCESSES = [
    ("b0a5 e610", 0x10, 1, b"\xa5", 0x7C02, 2),
    ("b8a55a e710", 0x10, 2, b"\xa5\x5a", 0x7C03, 2),
    ("66b8a55aa55a 66e710", 0x10, 4, b"\xa5\x5a\xa5\x5a", 0x7C06, 3),
    ("ba3412 b0a5 ee", 0x1234, 1, b"\xa5", 0x7C05, 1),
    ("ba3412 b8a55a ef", 0x1234, 2, b"\xa5\x5a", 0x7C06, 1),
    ("ba3412 66b8a55aa55a 66ef", 0x1234, 4, b"\xa5\x5a\xa5\x5a", 0x7C09, 2),
    ("e410", 0x10, 1, None, 0x7C00, 2),
    ("e510", 0x10, 2, None, 0x7C00, 2),
    ("66e510", 0x10, 4, None, 0x7C00, 3),
    ("ba3412 ec", 0x1234, 1, None, 0x7C03, 1),
    ("ba3412 ed", 0x1234, 2, None, 0x7C03, 1),
    ("ba3412 66ed", 0x1234, 4, None, 0x7C03, 2),
    # What stands before the instruction looks like a part of it.
    ("b066 ee", 0x0, 1, b"\x66", 0x7C02, 1),  # mov al, 0x66; out dx, al
    ("b066 90 ef", 0x0, 2, b"\x66\x00", 0x7C03, 1),
    ("b0e6 ee", 0x0, 1, b"\xe6", 0x7C02, 1),
    ("baee00 b0e7 e6ee", 0xEE, 1, b"\xe7", 0x7C05, 2),
    ("ba34e6 b0ee e7ef", 0xEF, 2, b"\xee\x00", 0x7C05, 2),
    ("e6ee", 0xEE, 1, b"\0", 0x7C00, 2),  # out 0xee, al
    ("e6ef", 0xEF, 1, b"\0", 0x7C00, 2),
    # Strings, from ds:si = 0: the interrupt table, which is all zeros.
    ("6e", 0, 1, b"\0", 0x7C00, 1),
    ("6f", 0, 2, b"\0\0", 0x7C00, 1),
    ("666f", 0, 4, bytes(4), 0x7C00, 2),
]


@pytest.mark.parametrize(("code", "port", "size", "data", "ip", "length"), PORT_ACCESSES)
def test_a_strict_machine_names_the_port_and_the_instruction(
    boot: Boot, code: str, port: int, size: int, data: bytes | None, ip: int, length: int
) -> None:
    image = bytes.fromhex(code) + b"\xf4" + bytes(range(0x80, 0x90))
    machine = boot(image)
    with pytest.raises(hv.GuestAccessError) as caught:
        machine.run(10)
    error = caught.value
    assert (error.space, error.address, error.size, error.count) == ("port", port, size, 1)
    assert (error.is_write, error.data) == (data is not None, data or b"")
    assert (error.cs, error.rip) == (0, ip)
    assert error.insn == image[ip - 0x7C00 :][:15].ljust(15, b"\0")
    assert error.insn[length:].startswith(b"\xf4")
    what = f"wrote {data.hex()} to" if data is not None else "read from"
    assert f"{what} port {port:#x} (1 x {size} bytes)" in str(error)
    assert f"at CS:IP 0000:{ip:04x} (instruction bytes: {error.insn.hex(' ')})" in str(error)
    if data is None:
        machine.answer(0)
    assert machine.run(10).halted  # the next instruction, once


def test_the_first_byte_of_a_segment_and_of_memory(boot: Boot) -> None:
    for cs, entry in ((0x1000, 0x10000), (0, 0), (0, 1)):
        machine = boot("eef4", entry=entry)
        machine.vcpu.real_mode(entry=entry, cs=cs)
        with pytest.raises(hv.GuestAccessError) as caught:
            machine.run(10)
        assert (caught.value.cs, caught.value.rip, caught.value.insn[:2]) == (cs, entry - (cs << 4), b"\xee\xf4")


@st.composite
def port_code(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """Code of port writes and harmless instructions: its bytes, and (offset, length) of each write."""
    code, writes = b"", []
    dx = 0
    for _ in range(draw(st.integers(1, 12))):
        byte = draw(st.one_of(st.sampled_from([0x66, 0xE6, 0xE7, 0xEE, 0xEF, 0x6E]), st.integers(0, 255)))
        kind = draw(st.sampled_from(["al", "cl", "dx", "imm", "by dx"]))
        prefix, opcode = draw(st.sampled_from([(b"", 0), (b"", 1), (b"\x66", 1)]))
        if kind == "al":
            code += bytes([0xB0, byte])
        elif kind == "cl":
            code += bytes([0xB1, byte])
        elif kind == "dx":
            dx = byte << 8 | 0x34
            code += b"\xba" + dx.to_bytes(2, "little")
        elif kind == "imm":
            instruction = prefix + bytes([0xE6 | opcode, byte])
            writes.append((len(code), len(instruction)))
            code += instruction
        else:
            # DX ends in 0x34: with 0xee the bytes e6 ee could be one instruction or the ends of two.
            instruction = prefix + bytes([0xEE | opcode])
            writes.append((len(code), len(instruction)))
            code += instruction
    return code, writes


@settings(max_examples=cases(80, 3000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(port_code())
def test_every_write_is_named_where_it_is(open_machine: hv.Machine, drawn: tuple[bytes, list[tuple[int, int]]]) -> None:
    code, writes = drawn
    machine = open_machine
    machine.write(0x7C00, (code + b"\xf4").ljust(200, b"\0"))
    machine.vcpu.real_mode(0x7C00)
    for offset, _length in writes:
        with pytest.raises(hv.GuestAccessError) as caught:
            machine.run(10)
        assert caught.value.rip - 0x7C00 == offset
        assert caught.value.insn == machine.read(0x7C00 + offset, 15)
    assert machine.run(10).halted


def test_rep_outs_is_named_where_it_is(boot: Boot) -> None:
    machine = boot("b90300 f36e f4")  # mov cx, 3; rep outsb
    with pytest.raises(hv.GuestAccessError) as caught:
        machine.run(10)
    assert (caught.value.rip, caught.value.insn[:3]) == (0x7C03, b"\xf3\x6e\xf4")


def test_the_operand_size_of_32_bit_code_is_the_other_way_round(boot: Boot) -> None:
    # As modes.h: mmio.S stands in protected mode at its one access; put port accesses there instead.
    need("gcc")
    image = assemble("mmio")
    at = boot(image)
    with pytest.raises(hv.GuestAccessError) as caught:
        at.run(10)
    access = caught.value.rip - 0x7C00
    assert image[access : access + 2] == b"\x8b\x07"  # mov (%edi), %eax
    for code, size, length in (("b066 ef f4", 4, 1), ("66ef f4", 2, 2), ("90 ee f4", 1, 1), ("9090 66e710f4", 2, 3)):
        out = bytes.fromhex(code)
        machine = boot(image[:access] + out + image[access + len(out) :])
        with pytest.raises(hv.GuestAccessError) as caught:
            machine.run(10)
        assert caught.value.size == size
        assert (caught.value.cs, caught.value.rip) == (8, 0x7C00 + access + len(out) - 1 - length)
        assert caught.value.insn[:length] == out[-1 - length : -1]


@pytest.mark.parametrize(
    ("code", "nr", "port", "at_exit", "completed", "start", "insn"),
    [
        # The emulator moves RIP before the exit, and completing it does nothing.
        ("e610 e610 f4", 2, 0x10, 0x7C04, 0x7C04, 0x7C02, "e610f4"),
        # kvm_fast_pio_out: RIP stays at the OUT, and completing the exit moves it.  An equal OUT comes before it.
        ("e610 e610 f4", 2, 0x10, 0x7C02, 0x7C04, 0x7C02, "e610f4"),
        ("ba1000 ee ee f4", 2, 0x10, 0x7C04, 0x7C05, 0x7C04, "eef4"),
        # The same of port 0x7e (KVM_X86_QUIRK_OUT_7E_INC_RIP): RIP is moved first, and completing does nothing.
        ("e67e e67e f4", 2, 0x7E, 0x7C04, 0x7C04, 0x7C02, "e67ef4"),
        ("e67e 90 f4", 1, 0x7E, 0x7C02, 0x7C02, 0x7C00, "e67e90f4"),
    ],
)
def test_an_out_of_either_shape(
    boot: Boot,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    nr: int,
    port: int,
    at_exit: int,
    completed: int,
    start: int,
    insn: str,
) -> None:
    # Vendor modules differ, and so do emulated modes: the state of such an exit is made by hand.
    machine = boot(code)
    loop = machine.exits(10)
    exit = [next(loop) for _ in range(nr)][-1]
    assert isinstance(exit, hv.IoOut)
    assert exit.port == port
    vcpu = machine.vcpu.kvm
    vcpu.complete_io()

    def at(rip: int) -> None:
        regs = vcpu.regs
        regs.rip = rip
        vcpu.regs = regs

    at(at_exit)
    monkeypatch.setattr(hv.Vcpu, "complete_io", lambda self: at(completed))
    error = machine._unclaimed_error(exit)
    assert (error.rip, error.at_insn, error.before) == (start, True, b"")
    assert error.insn.startswith(bytes.fromhex(insn))


def test_an_out_that_jumped_away_is_not_made_up(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = boot("90 90 e610 f4")
    exit = next(machine.exits(10))
    assert isinstance(exit, hv.IoOut)
    machine.vcpu.kvm.complete_io()
    regs = machine.vcpu.kvm.regs
    regs.rip = 0x7C01  # where no OUT stands before it
    machine.vcpu.kvm.regs = regs
    error = machine._unclaimed_error(exit)
    assert (error.rip, error.at_insn, error.insn[:3]) == (0x7C01, False, b"\x90\xe6\x10")
    assert error.before == machine.read(0x7C01 - 15, 15)


@pytest.mark.parametrize(
    ("code", "size", "gpas"),
    [
        # mov ax, 0xa000; mov es, ax; mov di, 0x10; mov cx, 3
        ("b800a0 8ec0 bf1000 b90300 f3aa", 1, [0xA0010, 0xA0011, 0xA0012]),  # rep stosb
        ("b800a0 8ec0 bf1000 b90300 f3ab", 2, [0xA0010, 0xA0012, 0xA0014]),  # rep stosw
        ("b800a0 8ec0 bf1000 b90300 66f3ab", 4, [0xA0010, 0xA0014, 0xA0018]),  # rep stosd
        ("b800a0 8ec0 bf1000 b90300 fd f3aa", 1, [0xA0010, 0xA000F, 0xA000E]),  # std; rep stosb
        ("b800a0 8ec0 bf1000 b90300 f2a4", 1, [0xA0010, 0xA0011, 0xA0012]),  # repne movsb
        ("b800a0 8ec0 66bf10000000 66b903000000 67f3aa", 1, [0xA0010, 0xA0011, 0xA0012]),  # addr32 rep stosb
    ],
)
def test_a_rep_string_write_is_named_where_it_is(boot: Boot, code: str, size: int, gpas: list[int]) -> None:
    image = bytes.fromhex(code)
    start = 0x7C00 + image.rindex(bytes.fromhex(code.split()[-1]))
    machine = boot(image + b"\xf4", ram="64K")
    for gpa in gpas:
        with pytest.raises(hv.GuestAccessError) as caught:
            machine.run(10)
        error = caught.value
        assert (error.address, error.size, error.at_insn, error.rip) == (gpa, size, True, start)
        assert error.insn == machine.read(start, 15)
    assert machine.run(10).halted


def test_a_write_before_a_rep_string_instruction_is_not_taken_for_it(boot: Boot) -> None:
    # mov ax, 0xa000; mov es, ax; mov [es:0x10], al; rep stosb (with DI = 0)
    machine = boot("b800a0 8ec0 26a21000 f3aa f4", ram="64K")
    with pytest.raises(hv.GuestAccessError) as caught:
        machine.run(10)
    assert (caught.value.at_insn, caught.value.rip) == (False, 0x7C09)
    assert caught.value.before.endswith(bytes.fromhex("26a21000"))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_strict_machine_names_the_address(boot: Boot, size: int) -> None:
    need("gcc")
    machine = boot(assemble("mmio", SIZE=size))
    with pytest.raises(hv.GuestAccessError) as caught:
        machine.run(10)
    error = caught.value
    assert (error.space, error.address, error.size, error.count) == ("address", 0xD0000000, size, 1)
    assert (error.is_write, error.data, error.cs) == (False, b"", 8)
    # mov (%edi), %al | %ax | %eax; movq (%edi), %mm0
    assert error.insn.startswith({1: b"\x8a\x07", 2: b"\x66\x8b\x07", 4: b"\x8b\x07", 8: b"\x0f\x6f\x07"}[size])
    assert error.insn == machine.read(error.rip, 15)

    machine = boot(assemble("mmio", SIZE=size, WRITE=1))
    with pytest.raises(hv.GuestAccessError) as caught:
        machine.run(10)
    error = caught.value
    data = bytes.fromhex("1122334455667788")[:size]
    assert (error.space, error.address, error.size, error.is_write) == ("address", 0xD0000000, size, True)
    assert (error.data, error.cs) == (data, 8)
    # KVM has moved RIP past the write: the bytes before it are mov %al|%ax|%eax, (%edi) or movq %mm0, (%edi).
    code = {1: b"\x88\x07", 2: b"\x66\x89\x07", 4: b"\x89\x07", 8: b"\x0f\x7f\x07"}[size]
    assert machine.read(error.rip - len(code), len(code)) == code
    assert error.insn == machine.read(error.rip, 15)
    assert (error.at_insn, error.before) == (False, machine.read(error.rip - 15, 15))
    said = f"behind the instruction, at CS:IP 0008:{error.rip:04x} (bytes before it: {error.before.hex(' ')})"
    assert said in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))
    assert machine.run(10).halted


def test_open_bus_reads_ones_of_every_size_and_drops_writes(boot: Boot) -> None:
    need("gcc")
    for size in (1, 2, 4):
        machine = boot(assemble("mmio", SIZE=size, REPORT=0x11), unclaimed="open_bus")
        out = hv.Capture()
        machine.batch.pio(0x11, 4, write=out)
        assert machine.run(10).halted
        assert out.read() == (b"\xff" * size + b"\xaa" * 4)[:4]
        assert boot(assemble("mmio", SIZE=size, WRITE=1), unclaimed="open_bus").run(10).halted


def test_exits_gives_what_nobody_claims_on_an_open_bus_too(boot: Boot) -> None:
    machine = boot("e610 e611 f4", unclaimed="open_bus")
    machine.batch.pio(0x10, 1, write="ignore")
    loop = machine.exits(10)
    assert [next(loop), next(loop)] == [hv.IoOut(0x11, 1, 1, b"\0"), hv.Hlt()]
    machine.vcpu.real_mode()
    assert machine.run(10).halted
    machine.vcpu.real_mode()
    assert next(machine.exits(10)) == hv.IoOut(0x11, 1, 1, b"\0")


def test_a_rule_serves_its_port_on_a_strict_machine(boot: Boot) -> None:
    machine = boot("e460 e610 e611 f4")
    out = hv.Capture()
    machine.batch.pio(0x60, 1, read=0x42)
    machine.batch.pio(0x10, 1, write=out)
    with pytest.raises(hv.GuestAccessError, match="wrote 42 to port 0x11"):
        machine.run(10)
    assert out.read() == b"\x42"
    assert machine.run(10).halted


def test_after_an_error_a_read_wants_its_answer(boot: Boot) -> None:
    machine = boot("e460 e6f4", debug_exit=0xF4)
    with pytest.raises(hv.GuestAccessError):
        machine.run(10)
    with pytest.raises(hv.UnansweredError):
        machine.run(10)
    machine.answer(0x2A)
    assert machine.run(10).value == 0x2A


def test_registers_ride_along_with_every_exit(boot: Boot) -> None:
    # KVM_CAP_SYNC_REGS: so the page, and a record, know RIP without an ioctl.  An IN leaves it at the instruction.
    machine = boot("90 e460 f4")
    need_cap(machine.vm, "SYNC_REGS")
    machine.batch.record(10)
    assert next(machine.exits(10)) == hv.IoIn(0x60, 1, 1)
    page = machine.vcpu.kvm._kvm_run
    assert page.kvm_valid_regs == lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS
    assert (page.s.regs.regs.rip, page.s.regs.sregs.cs.selector) == (0x7C01, 0)
    assert [record.rip for record in hv.kvm.iter_records(machine.batch.take_records())] == [0x7C01]


def test_the_location_in_long_mode_is_found_through_its_page_tables(boot: Boot) -> None:
    need("gcc")
    machine = boot(assemble("user", PORT=0x10))
    assert next(machine.exits(10)) == hv.IoOut(0x10, 1, 1, b"\x55")
    where = machine.vcpu.location()
    assert where.linear == where.rip  # all segments begin at 0
    assert where.insn == machine.read(where.rip, 15)
    assert where.insn[:2] == b"\xeb\xfd"  # behind `out %al, %dx`, at the `jmp` back to it
    # Where nothing is mapped, nothing is read: modes.h maps 2 MiB at 0 and at 1 GiB.
    assert machine.vcpu._fetch(0x1FFFFE, 15) == b""  # beyond this machine's RAM
    assert machine.vcpu._fetch(0xFFFFE, 15) == machine.read(0xFFFFE, 2)
    assert machine.vcpu._fetch(0x80000000, 15) == b""


def test_only_one_thread_runs_it(boot: Boot) -> None:
    machine = boot(SPIN)
    runner = threading.Thread(target=lambda: machine.run(60))
    runner.start()
    while machine.vcpu.kvm._c.state != 2:
        time.sleep(1e-4)
    try:
        for call in (
            lambda: machine.run(1),
            lambda: next(machine.exits(1)),
            lambda: machine.answer(0),
            lambda: machine.vcpu.real_mode(),
            lambda: machine.batch,
        ):
            with pytest.raises(hv.BusyError):
                call()
    finally:
        machine.kick()
        runner.join()
    assert machine.run(0.01).reason == "timeout"


# ---- firmware ----


def test_load_bios_that_is_interrupted_leaves_nothing(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = boot()

    def interrupted(_vm: hv.Vm, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, nothing_leaks():
        patch.setattr(hv.Vm, "change_memory_regions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            machine.load_bios(bytes(64 << 10))
    assert list(machine.vm.memslots) == [0]
    assert [region.name for region in machine.memory.root.subregions] == ["ram-below-4g"]
    with pytest.raises(hv.ArgumentError, match="not in RAM"):
        machine.read(0xFFFF0000, 1)
    machine.load_bios(b"\x90" * (64 << 10))
    assert machine.read(0xFFFF0000, 1) == b"\x90"


def test_a_rom_whose_slot_nobody_knows_of_is_let_go_with_the_machine(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = boot()
    change = hv.Vm.change_memory_regions

    def interrupted(vm: hv.Vm, **named: Any) -> None:
        change(vm, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hv.Vm, "change_memory_regions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            machine.load_bios(bytes(64 << 10))
    machine.close()  # which lets go of the ROM, or the test ends with a ResourceWarning


def test_load_bios_that_kvm_refuses_leaves_nothing(boot: Boot) -> None:
    machine = boot()
    with hv.Mapping(None, PAGE) as other:
        machine.vm.set_user_memory_region(1, (4 << 30) - PAGE, other)
        with nothing_leaks(), pytest.raises(hv.KvmError):
            machine.load_bios(bytes(64 << 10))
        machine.vm.delete_memory_region(1)
    machine.load_bios(bytes(64 << 10))


# ---- closing ----


def test_everything_of_a_closed_machine_says_that_it_is_closed() -> None:
    need("kvm")
    machine = hv.Machine(ram="1M")
    machine.close()
    machine.close()
    assert machine.closed
    assert repr(machine) == "<Machine closed>"
    calls = (
        lambda: machine.run(1),
        lambda: machine.exits(1),
        machine.kick,
        lambda: machine.answer(0),
        lambda: machine.read(0, 1),
        lambda: machine.write(0, b"x"),
        lambda: machine.load(0, b"x"),
        lambda: machine.view(0, 1),
        lambda: machine.writable(0, 1),
        lambda: machine.load_bios(bytes(64 << 10)),
        lambda: machine.vcpu.regs,
        lambda: machine.vcpu.sregs,
        lambda: machine.vcpu.location(),
        lambda: machine.vcpu.real_mode(),
        lambda: machine.vcpu.reset(),
        lambda: machine.batch,
        lambda: machine.console,
    )
    with nothing_leaks():
        for call in calls:
            with pytest.raises(hv.ClosedError):
                call()


def test_an_iteration_begun_before_close(boot: Boot) -> None:
    machine = boot("e610 ebfc")
    loop = machine.exits(10)
    next(loop)
    machine.close()
    with pytest.raises(hv.ClosedError):
        next(loop)


def test_a_view_keeps_the_memory_until_it_is_gone() -> None:
    need("kvm")
    with nothing_leaks():
        machine = hv.Machine(ram="1M")
        machine.write(0x1000, b"kept")
        view = machine.view(0x1000, 4)
        with pytest.raises(BufferError, match="1 views"):
            machine.close()
        assert machine.closed
        assert machine.vm.closed
        assert bytes(view) == b"kept"
        del view
        machine.close()
        assert machine.ram.closed


def test_close_from_outside_ends_a_run(boot: Boot) -> None:
    machine = boot(SPIN)
    ends: list[object] = []

    def runner() -> None:
        try:
            ends.append(machine.run(60))
        except hv.ClosedError as error:
            ends.append(error)

    thread = threading.Thread(target=runner)
    thread.start()
    while machine.vcpu.kvm._c.state != 2:
        time.sleep(1e-4)
    machine.close()
    thread.join()
    assert isinstance(ends[0], hv.ClosedError) or ends == [hv.Stop("interrupted", hv.Interrupted("kick"))]


def test_a_kvm_that_was_given_stays_open() -> None:
    need("kvm")
    with hv.Kvm() as kvm:
        with hv.Machine(ram="1M", kvm=kvm) as machine:
            assert machine.kvm is kvm
        assert not kvm.closed
        with hv.Machine(ram="1M", kvm=kvm) as machine:
            machine.load(0x7C00, b"\xf4")
            machine.vcpu.real_mode()
            assert machine.run(10).halted


def test_two_machines_do_not_share(boot: Boot) -> None:
    one, two = boot("b041 e610 f4"), boot("b042 e610 f4")
    assert [next(one.exits(10)), next(two.exits(10))] == [hv.IoOut(0x10, 1, 1, b"A"), hv.IoOut(0x10, 1, 1, b"B")]
    one.write(0x5000, b"one")
    assert two.read(0x5000, 3) == bytes(3)


# ---- arguments ----


BAD = [
    ({"ram": 0}, hv.ArgumentError, "ram"),
    ({"ram": -4096}, hv.ArgumentError, "ram"),
    ({"ram": 1}, hv.ArgumentError, "ram"),
    ({"ram": 4097}, hv.ArgumentError, "ram"),
    ({"ram": "0"}, hv.ArgumentError, "ram"),
    ({"ram": "lots"}, hv.ArgumentError, "ram"),
    ({"ram": "16X"}, hv.ArgumentError, "ram"),
    ({"ram": "-1M"}, hv.ArgumentError, "ram"),
    ({"ram": "1"}, hv.ArgumentError, "ram"),
    ({"ram": "1024T"}, hv.ArgumentError, "ram"),
    ({"ram": 1 << 70}, hv.ArgumentError, "ram"),
    ({"ram": None}, hv.ArgumentTypeError, "ram"),
    ({"ram": True}, hv.ArgumentTypeError, "ram"),
    ({"ram": 1.5e6}, hv.ArgumentTypeError, "ram"),
    ({"ram": b"16M"}, hv.ArgumentTypeError, "ram"),
    ({"unclaimed": "maybe"}, hv.ArgumentError, "unclaimed"),
    ({"unclaimed": None}, hv.ArgumentError, "unclaimed"),
    ({"unclaimed": []}, hv.ArgumentError, "unclaimed"),
    ({"debug_exit": -1}, hv.ArgumentError, "debug_exit"),
    ({"debug_exit": 0x10000}, hv.ArgumentError, "debug_exit"),
    ({"debug_exit": True}, hv.ArgumentTypeError, "debug_exit"),
    ({"debug_exit": "0xF4"}, hv.ArgumentTypeError, "debug_exit"),
    ({"kvm": 3}, hv.ArgumentTypeError, "kvm"),
    ({"kvm": "/dev/kvm"}, hv.ArgumentTypeError, "kvm"),
]


@pytest.mark.parametrize(("arguments", "kind", "field"), BAD)
def test_arguments_of_the_constructor(arguments: dict[str, Any], kind: type, field: str) -> None:
    with nothing_leaks(), pytest.raises(kind) as caught:
        hv.Machine(**arguments)
    assert (caught.value.call, caught.value.field) == ("Machine", field)
    value = arguments[field]
    if kind is hv.ArgumentError:
        assert caught.value.value == (value if value != [] else "[]")
    assert str(caught.value).startswith(f"Machine: {field}")
    assert caught.value.accepted


def test_more_ram_than_the_host_has() -> None:
    pages = os.sysconf("SC_PHYS_PAGES")
    with nothing_leaks(), pytest.raises(hv.ArgumentError, match=f"this host has {pages * 4096 >> 20} MiB"):
        hv.Machine(ram=(pages + 1) * 4096)


def test_dev_kvm_that_is_not_there_or_not_allowed_or_no_kvm(tmp_path: Path) -> None:
    missing = tmp_path / "kvm"
    with nothing_leaks(), pytest.raises(hv.HostError) as caught:
        hv.Machine(kvm=hv.Kvm(missing))
    assert (caught.value.errno, caught.value.field, caught.value.value) == (2, "path", str(missing))
    with nothing_leaks(), pytest.raises(hv.ArgumentError, match="not a KVM device"):
        hv.Machine(kvm=hv.Kvm("/dev/null"))


def test_a_closed_kvm() -> None:
    need("kvm")
    kvm = hv.Kvm()
    kvm.close()
    with nothing_leaks(), pytest.raises(hv.ClosedError):
        hv.Machine(kvm=kvm)


@pytest.mark.parametrize("image", [b"", bytearray(), memoryview(b"")])
def test_an_empty_image(boot: Boot, image: Any) -> None:
    with pytest.raises(hv.ArgumentError, match="it is empty") as caught:
        boot().load(0x7C00, image)
    assert (caught.value.call, caught.value.field) == ("Machine.load", "image")


@pytest.mark.parametrize("image", [None, "text", 5, [1, 2], object()])
def test_an_image_that_is_none(boot: Boot, image: Any) -> None:
    machine = boot()
    for call, field in ((machine.load, "image"), (machine.write, "data")):
        with pytest.raises(hv.ArgumentTypeError) as caught:
            call(0, image)
        assert (caught.value.call, caught.value.field) == (f"Machine.{call.__name__}", field)
    with pytest.raises(hv.ArgumentTypeError, match=r"Machine\.load_bios: image"):
        machine.load_bios(image)


@pytest.mark.parametrize("gpa", [None, "0x7C00", 1.0, True, b"\0"])
def test_addresses_of_other_types(boot: Boot, gpa: Any) -> None:
    machine = boot()
    for name, call in (
        ("read", lambda: machine.read(gpa, 1)),
        ("write", lambda: machine.write(gpa, b"x")),
        ("load", lambda: machine.load(gpa, b"x")),
        ("view", lambda: machine.view(gpa, 1)),
        ("writable", lambda: machine.writable(gpa, 1)),
    ):
        with pytest.raises(hv.ArgumentTypeError) as caught:
            call()
        assert (caught.value.call, caught.value.field) == (f"Machine.{name}", "gpa")
    with pytest.raises(hv.ArgumentTypeError, match=r"Machine\.read: size"):
        machine.read(0, gpa)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), -0.5])
def test_timeouts_out_of_range(boot: Boot, timeout: float) -> None:
    machine = boot()
    for call in (machine.run, machine.exits):
        with pytest.raises(hv.ArgumentError) as caught:
            call(timeout)
        assert (caught.value.call, caught.value.field) == (f"Machine.{call.__name__}", "timeout")


@pytest.mark.parametrize("timeout", ["1", True, b"", [], 1j])
def test_timeouts_of_other_types(boot: Boot, timeout: Any) -> None:
    machine = boot()
    for call in (machine.run, machine.exits):
        with pytest.raises(hv.ArgumentTypeError) as caught:
            call(timeout)
        assert (caught.value.call, caught.value.field) == (f"Machine.{call.__name__}", "timeout")


# ---- any arguments at all ----

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 0x110000),
    st.integers(),
    st.sampled_from([0, 0x7C00, SIZE - 1, SIZE, 1 << 32, (1 << 63) - 1, 1 << 64]),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=40),
    st.binary(max_size=4).map(bytearray),
    st.lists(st.integers(), max_size=2),
)
# No guest runs for long here: what is run is a HLT or a page of zeros, and all timeouts but None are kept short.
SHORT = st.one_of(ANYTHING.filter(lambda x: x is not None and not (isinstance(x, int | float) and x > 0.01)))


@settings(max_examples=cases(150, 3000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_arguments_do_worse_than_an_error_that_says_so(open_machine: hv.Machine, data: st.DataObject) -> None:
    machine = open_machine
    call = data.draw(
        st.sampled_from(
            [
                machine.read,
                machine.write,
                machine.load,
                machine.view,
                machine.writable,
                machine.load_bios,
                machine.answer,
                machine.run,
                machine.exits,
                machine.vcpu.answer,
                machine.vcpu.real_mode,
            ]
        )
    )
    strategy = SHORT if call in (machine.run, machine.exits) else ANYTHING
    nr = {"read": 2, "write": 2, "load": 2, "view": 2, "writable": 2}.get(call.__name__, 1)
    arguments = [data.draw(strategy) for _ in range(nr)]
    named = {}
    if call.__name__ == "real_mode":
        named = data.draw(st.dictionaries(st.sampled_from(["cs", "sp"]), ANYTHING))
    error = error_of(lambda: call(*arguments, **named))
    if error is not None:
        assert isinstance(error, hv.HvError), error
        assert str(error)
        if isinstance(error, hv.ArgumentError | hv.ArgumentTypeError):
            assert error.field
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
    assert not machine.closed


def error_of(call: Callable[[], object]) -> Exception | None:
    """What `call` raises, which only an argument may have caused."""
    try:
        call()
    except (hv.HvError, TypeError, ValueError) as error:
        return error
    return None


@pytest.fixture
def open_machine(boot: Boot) -> Iterator[hv.Machine]:
    """One machine for all examples; what they leave behind fails the test."""
    machine = boot()
    with nothing_leaks():
        yield machine


@settings(max_examples=cases(60, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ram=ANYTHING.filter(lambda x: not isinstance(x, int) or x < 1 << 24),
    unclaimed=st.one_of(st.just("strict"), ANYTHING),
    debug_exit=st.one_of(st.none(), ANYTHING),
)
@pytest.mark.usefixtures("open_machine")
def test_no_arguments_of_the_constructor_leave_anything_open(ram: Any, unclaimed: Any, debug_exit: Any) -> None:
    error = error_of(lambda: hv.Machine(ram, unclaimed=unclaimed, debug_exit=debug_exit).close())
    if error is not None:
        assert isinstance(error, hv.ArgumentError | hv.ArgumentTypeError)
        assert error.call == "Machine"
        assert error.field in ("ram", "unclaimed", "debug_exit")


# ---- values ----


@pytest.mark.parametrize(
    "value",
    [
        hv.Stop("halted", hv.Hlt()),
        hv.Stop("debug-exit", hv.IoOut(0xF4, 1, 1, b"\x05")),
        hv.Stop("shutdown", hv.Shutdown(), "a report"),
        hv.Stop("host-fault", hv.HostFault(0x1000, 4, True, b"abcd", 0)),
        hv.Stop("interrupted", hv.Interrupted("kick")),
        hv.machine.Location(0xF000, 0xFFF0, 0xFFFFFFF0, b"\xea"),
    ],
)
def test_stops_and_exits_pickle_compare_and_are_frozen(value: Any) -> None:
    again = pickle.loads(pickle.dumps(value))
    assert again == value
    assert (hash(again), repr(again)) == (hash(value), repr(value))
    assert value != hv.Stop("exit", hv.Hlt())
    with pytest.raises(AttributeError, match="frozen"):
        value.reason = "other"


def test_a_stop_matches() -> None:
    match hv.Stop("debug-exit", hv.IoOut(0xF4, 1, 1, b"\x05")):
        case hv.Stop("debug-exit", hv.IoOut(value=value), report=None):
            assert value == 5
        case other:
            pytest.fail(repr(other))


def test_the_errors_of_a_machine_pickle(boot: Boot) -> None:
    machine = boot("e610 f4")
    caught = []
    for call in (lambda: machine.run(10), lambda: machine.load(SIZE, b"x"), lambda: machine.run("x")):
        with pytest.raises(hv.HvError) as error:
            call()
        caught.append(error.value)
    for error_ in caught:
        again = pickle.loads(pickle.dumps(error_))
        assert (type(again), str(again), vars(again)) == (type(error_), str(error_), vars(error_))


def test_errors_pickle_whatever_was_handed_in() -> None:
    for arguments in ({"unclaimed": lambda: 0}, {"ram": ffi.NULL}, {"kvm": ffi.new("int *")}, {"debug_exit": [1]}):
        with pytest.raises(hv.HvError) as caught:
            hv.Machine(**arguments)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), vars(again)) == (str(caught.value), vars(caught.value))


def test_a_machine_does_not_pickle(boot: Boot) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(boot())


def test_repr(boot: Boot) -> None:
    machine = boot(unclaimed="open_bus")
    assert repr(machine) == "<Machine ram=0x100000 unclaimed=open_bus>"
    assert repr(machine.vcpu) == "<Cpu 0>"
    assert isinstance(machine.ram, RamBlock)
