"""Steps, breakpoints and watchpoints of a machine's vCPU, mode by mode.

Expected: the addresses that the guests' own text gives; QEMU's TCG, which executes the same guest instruction by
instruction; and what the guest itself reports.
"""

from __future__ import annotations

import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.machine import debug, qualify
from hvmodel.machine.debug import Breakpoint, Watchpoint
from hvmodel.machine.qualify import KINDS, MODES, Verdict
from hvmodel.state.sync import synchronizer
from tests.guests import ORG, assemble
from tests.need import need

Boot = Callable[..., hv.Machine]
CODE = ORG
BS = 0x4000  # DR6: single step
TF = 0x100


@pytest.fixture(autouse=True)
def _debugging() -> None:
    need("kvm")
    with hv.Kvm() as kvm:
        if kvm.check_extension(lib.KVM_CAP_SET_GUEST_DEBUG) <= 0:
            pytest.skip("needs KVM_CAP_SET_GUEST_DEBUG")


def works(mode: str, kind: str) -> None:
    """Skip the test where this host does not have `kind` in `mode`."""
    verdict = qualify.qualify().verdict(mode, kind)
    if not verdict.works:
        pytest.skip(f"needs {kind} in mode {mode}: it gave {verdict.saw}")


def pc_of(exit: object) -> int:
    assert isinstance(exit, hv.Debug), exit
    return exit.pc


def hits_of(exit: object) -> tuple[object, ...]:
    assert isinstance(exit, hv.Debug), exit
    return exit.hits


def clear(cpu: hv.Cpu) -> None:
    for point in cpu.breakpoints:
        if isinstance(point, Breakpoint):
            cpu.remove_breakpoint(point)
        else:
            cpu.remove_watchpoint(point)


# ---- in every mode ----


@pytest.fixture
def guest() -> Iterator[Callable[[str], hv.Machine]]:
    """`guest(mode)`: a machine with the tiny guest of hvmodel.machine.qualify, in that mode at its first nop."""
    machines: list[hv.Machine] = []

    def make(mode: str) -> hv.Machine:
        machine = hv.Machine(ram="64K")
        machines.append(machine)
        memory, _, _ = qualify._image(mode, b"\x90")
        machine.write(0, memory)
        qualify._enter_mode(machine.vcpu.kvm, mode)
        return machine

    yield make
    for machine in machines:
        machine.close()


def end(machine: hv.Machine) -> object:
    """Run the tiny guest to its end, the write of one byte to END."""
    exit = next(machine.exits(5))
    assert isinstance(exit, hv.MmioWrite), exit
    assert (exit.gpa, exit.size) == (qualify._END, 1)
    return exit


CALLS = {
    "step": lambda cpu, named: cpu.step(),
    "hardware": lambda cpu, named: cpu.add_breakpoint(qualify._STOP, **named),
    "software": lambda cpu, named: cpu.add_breakpoint(qualify._STOP, "software", **named),
    "hlt": lambda cpu, named: cpu.add_breakpoint(qualify._STOP, "hlt", **named),
    "watch-w": lambda cpu, named: cpu.add_watchpoint(qualify._DATA, 4, **named),
    "watch-rw": lambda cpu, named: cpu.add_watchpoint(qualify._DATA, 4, "rw", **named),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_kind_in_every_mode(guest: Callable[[str], hv.Machine], mode: str, kind: str) -> None:
    # Either it stops where it should, each time, and the guest goes on as if nothing had been; or it is refused.
    machine = guest(mode)
    cpu = machine.vcpu
    memory, loaded, stored = qualify._image(mode, b"\x90")
    verdict = qualify.qualify().verdict(mode, kind)
    if "cannot be set" in verdict.saw:
        # On kvm_pvm vm86: it drops RFLAGS.VM, and then this is protected mode of 16 bits at CPL 3.
        assert qualify.mode_name(cpu.kvm.regs, cpu.kvm.sregs) != mode
        mode_then = {"mode": mode}
    else:
        assert qualify.mode_name(cpu.kvm.regs, cpu.kvm.sregs) == mode
        mode_then = {}
    if not verdict.works:
        if kind == "step" and mode_then:
            return
        says = rf"'{kind}' does not work in mode '{mode}' on this host"
        with pytest.raises(hv.UnqualifiedError, match=says) as caught:
            CALLS[kind](cpu, mode_then)
        assert (caught.value.mode, caught.value.kind) == (mode, kind)
        assert cpu.breakpoints == ()
        end(machine)
        return
    for _ in range(2):
        if kind == "step":
            assert [pc_of(cpu.step()) for _ in range(3)] == [qualify._CODE + n for n in (1, 2, 3)]
            assert pc_of(cpu.step(2)) == loaded
            assert pc_of(cpu.step()) == stored
        else:
            point = CALLS[kind](cpu, {})
            stops = {"watch-w": [stored], "watch-rw": [loaded, stored]}.get(kind, [qualify._STOP])
            for pc in stops:
                stop = machine.run(5)
                assert (stop.reason, pc_of(stop.exit)) == ("breakpoint", pc)
                assert hits_of(stop.exit) == (point,)
                assert machine.read(0, qualify._PML4) == memory[: qualify._PML4]  # the page tables get accessed bits
        end(machine)
        assert machine.read(qualify._CODE, 0x100) == memory[qualify._CODE : qualify._CODE + 0x100]
        clear(cpu)
        qualify._enter_mode(cpu.kvm, mode)
    end(machine)


def test_a_breakpoint_for_a_mode_to_come(guest: Callable[[str], hv.Machine]) -> None:
    machine = guest("real")
    for verdict in qualify.qualify():
        if verdict.kind != "hardware":
            continue
        if verdict.works:
            machine.vcpu.add_breakpoint(0x2000, mode=verdict.mode)
            machine.vcpu.remove_breakpoint(0x2000)
        else:
            with pytest.raises(hv.UnqualifiedError, match=verdict.mode):
                machine.vcpu.add_breakpoint(0x2000, mode=verdict.mode)


# ---- against QEMU's TCG ----


def traced(image: bytes, low: int, high: int, tmp_path: Path, *more: str) -> list[int]:
    """Linear addresses of the instructions that QEMU executes in [low, high], booting `image` from a floppy."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.write_bytes(image)
    command = f"qemu-system-x86_64 -accel tcg -display none -m 16 -no-reboot -singlestep -d exec,nochain -D {log}"
    command += f" -dfilter {low:#x}..{high:#x} -drive file={disk},format=raw,if=floppy -boot a"
    command += " -device isa-debug-exit,iobase=0xf4,iosize=4"
    done = subprocess.run([*command.split(), *more], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr  # 0 written to isa-debug-exit
    return [int(pc, 16) for pc in re.findall(r"^Trace .*\[[0-9a-f]+/([0-9a-f]+)/", log.read_text(), re.M)]


def once(pcs: list[int]) -> list[int]:
    """Without repetitions: how often a REP instruction is stepped is the host's affair."""
    return [pc for at, pc in enumerate(pcs) if not at or pcs[at - 1] != pc]


def stepped(machine: hv.Machine, last: int = 0xF4) -> list[int]:
    """Linear addresses of all instructions up to the write to port `last`, or up to where no step works."""
    machine.vcpu.real_mode(CODE)
    pcs = [CODE]
    while True:
        try:
            exit = machine.vcpu.step(timeout=10)
        except hv.UnqualifiedError:
            return pcs
        if isinstance(exit, hv.IoOut):
            assert exit.port == last
            return pcs
        pcs.append(pc_of(exit))


@pytest.mark.parametrize(("guest", "push"), [("steps", b"\x55\x89\xe5"), ("steps64", b"\x55\x48\x89\xe5")])
def test_every_step_is_one_that_qemu_makes(boot: Boot, tmp_path: Path, guest: str, push: bytes) -> None:
    # steps64 begins in real mode, and goes through protected mode to long mode.
    need("gcc", "qemu")
    for mode in ("real",) if guest == "steps" else ("real", "protected", "long"):
        works(mode, "step")
    image = assemble(guest)
    theirs = traced(image, CODE, CODE + 0x1FF, tmp_path)
    machine = boot(image)
    machine.batch.pio(0x80, 1, write="ignore")
    ours = stepped(machine)
    # The instruction behind MOV SS is in one block with it for TCG, and has no trap on a processor.  The step of UD2,
    # which faults, ends behind the handler's first instruction, a PUSH of the frame pointer.
    left_out = {CODE + at.end() for at in re.finditer(rb"\x8e\xd0", image)} | {CODE + image.index(push)}
    assert len(theirs) > 50
    assert all(theirs.count(pc) <= 1 for pc in left_out)
    assert once([pc for pc in ours if pc not in left_out]) == once([pc for pc in theirs if pc not in left_out])


@pytest.mark.parametrize("guest", ["steps", "steps64"])
def test_what_is_stepped_comes_to_the_same_as_what_is_run(boot: Boot, guest: str) -> None:
    need("gcc")
    for mode in ("real",) if guest == "steps" else ("real", "protected", "long"):
        works(mode, "step")
    results = []
    for is_stepped in (True, False):
        machine = boot(assemble(guest))
        machine.batch.pio(0x80, 1, write="ignore")
        if is_stepped:
            stepped(machine)
        else:
            assert next(machine.exits(10)) == hv.IoOut(0xF4, 1, 1, b"\0")
        machine.vcpu.kvm.complete_io()
        results.append((bytes(ffi.buffer(machine.vcpu.kvm.regs)), machine.read(0, 0x10000)))
    # Nor does the trap flag of the step show in the flags that the guest pushes.
    assert results[0] == results[1]


@pytest.mark.parametrize("guest", ["steps", "steps64"])
@pytest.mark.parametrize("kind", ["hardware", "software", "hlt"])
def test_a_breakpoint_on_every_instruction(boot: Boot, kind: str, guest: str) -> None:
    # Each in its turn stops as often as a step comes by, whatever the instruction is.
    need("gcc")
    for mode in ("real",) if guest == "steps" else ("real", "protected", "long"):
        works(mode, kind)
        works(mode, "step")
    image = assemble(guest)
    machine = boot(image)
    machine.batch.pio(0x80, 1, write="ignore")
    machine.batch.pio(0xF4, 1, write="stop")
    path = once(stepped(machine))
    gdt = image.find(bytes.fromhex("ffff0000009bcf00"))  # where the guest makes its TSS busy
    code_size = gdt if gdt > 0 else len(image)
    for address in sorted(set(path)):
        machine.write(0, bytes(0x1000))
        machine.load(CODE, image)
        machine.vcpu.real_mode(CODE)
        point = machine.vcpu.add_breakpoint(address, kind)
        pcs = []
        for exit in machine.exits(10):
            if isinstance(exit, hv.IoOut):
                break
            assert isinstance(exit, hv.Debug), hex(address)
            pcs.append(exit.pc)
            assert exit.hits == (point,)
            assert machine.read(CODE, code_size) == image[:code_size]
        assert pcs == [pc for pc in path if pc == address], hex(address)
        assert machine.read(CODE, code_size) == image[:code_size]
        # The guest reads its own code while it runs: there it sees what was planted.
        copied = bytearray(image[:6])
        if address < CODE + 6 and kind != "hardware":
            copied[address - CODE] = {"software": 0xCC, "hlt": 0xF4}[kind]
        assert machine.read(0x600, 5) == copied[:5]
        machine.vcpu.remove_breakpoint(point)


# ---- instructions that exit ----


@pytest.fixture
def counting() -> Iterator[Callable[[str], tuple[hv.Machine, list[int]]]]:
    """`counting(code)`: a machine with a device at port 0x20, 4 ports: it keeps what is written, and reads 0x5a."""
    machines: list[hv.Machine] = []

    def make(code: str) -> tuple[hv.Machine, list[int]]:
        machine = hv.Machine(ram="64K")
        machines.append(machine)
        written: list[int] = []
        ops = hv.MemoryRegionOps(
            read=lambda addr, size: 0x5A, write=lambda addr, value, size: written.append(value), impl_max=1
        )
        machine.io.root.add_subregion(0x20, hv.MemoryRegion.io("kept", 4, ops))
        machine.load(CODE, bytes.fromhex(code))
        machine.vcpu.real_mode(CODE)
        return machine, written

    yield make
    for machine in machines:
        machine.close()


Counting = Callable[[str], tuple[hv.Machine, list[int]]]


def test_a_device_serves_while_it_is_stepped(counting: Counting) -> None:
    works("real", "step")
    machine, written = counting("b041 e620 e421 e620 90 f4")  # mov al,'A'; out; in al,0x21; out; nop; hlt
    assert [pc_of(machine.vcpu.step()) - CODE for _ in range(5)] == [2, 4, 6, 8, 9]
    assert written == [0x41, 0x5A]
    assert machine.vcpu.step() == hv.Hlt()
    machine.vcpu.real_mode(CODE)
    assert pc_of(machine.vcpu.step(4)) == CODE + 8
    assert written == [0x41, 0x5A, 0x41, 0x5A]


def test_rules_serve_while_it_is_stepped(boot: Boot) -> None:
    works("real", "step")
    machine = boot("b041 e630 e431 e630 90 f4")
    capture = hv.Capture()
    machine.batch.pio(0x30, 1, write=capture)
    machine.batch.pio(0x31, 1, read=0x5A)
    machine.batch.configure(max_exits=7)
    assert [pc_of(machine.vcpu.step()) - CODE for _ in range(5)] == [2, 4, 6, 8, 9]
    assert capture.read() == b"\x41\x5a"
    assert machine.batch._max_exits == 7


def test_an_exit_comes_back_and_the_next_step_is_the_next_instruction(boot: Boot) -> None:
    works("real", "step")
    machine = boot("b041 e630 e431 88c3 e632 90 f4")
    cpu = machine.vcpu
    assert pc_of(cpu.step()) == CODE + 2
    assert cpu.step() == hv.IoOut(0x30, 1, 1, b"A")
    assert cpu.step() == hv.IoIn(0x31, 1, 1)
    with pytest.raises(hv.UnansweredError):
        cpu.step()
    machine.answer(0x5A)
    assert pc_of(cpu.step()) == CODE + 8  # mov bl, al
    assert cpu.kvm.regs.rbx == 0x5A
    assert cpu.step(5) == hv.IoOut(0x32, 1, 1, b"\x5a")
    # A run goes on behind it, and no trap of the steps is left.
    assert next(machine.exits(5)) == hv.Hlt()


@pytest.mark.parametrize("kind", ["hardware", "hlt", "software"])
def test_breakpoints_at_instructions_that_exit(counting: Counting, kind: str) -> None:
    works("real", kind)
    works("real", "step")
    # mov al,'A'; L: out; in al,0x21; mov si,0x7c00; mov cx,3; mov dx,0x22; rep outsb; hlt; jmp L
    machine, written = counting("b041 e620 e421 be007c b90300 ba2200 f36e f4 ebee")
    cpu = machine.vcpu
    at = [CODE + n for n in (2, 4, 6, 9, 12, 15, 17, 18)]
    out, read, outs, hlt = at[0], at[1], at[5], at[6]
    points = {pc: cpu.add_breakpoint(pc, kind) for pc in (out, read, outs, hlt)}
    for turn in range(3):
        for pc in (out, read, outs, hlt):
            exit = machine.run(5).exit
            assert (pc_of(exit), hits_of(exit)) == (pc, (points[pc],)), (turn, hex(pc))
            assert cpu.location().linear == pc
        assert machine.run(5).halted  # the guest's own HLT
        assert machine.read(CODE, 20).hex() == "b041e620e421be007cb90300ba2200f36ef4ebee"
    assert written == [0x41, 0xB0, 0x41, 0xE6, 0x5A, 0xB0, 0x41, 0xE6, 0x5A, 0xB0, 0x41, 0xE6]


def test_a_string_instruction_that_repeats_is_passed_as_a_whole(boot: Boot) -> None:
    works("real", "hardware")
    works("real", "step")
    # mov si,0x7c00; mov di,0x800; mov cx,5; L: rep movsb; jmp L
    machine = boot("be007c bf0008 b90500 f3a4 ebfc")
    machine.vcpu.add_breakpoint(CODE + 9)
    assert pc_of(machine.run(5).exit) == CODE + 9
    assert machine.vcpu.kvm.regs.rcx == 5
    assert pc_of(machine.run(5).exit) == CODE + 9
    assert machine.vcpu.kvm.regs.rcx == 0
    assert machine.read(0x800, 5) == machine.read(CODE, 5)


@pytest.mark.parametrize("kind", ["hardware", "hlt", "software"])
def test_a_loop_of_one_instruction_stops_each_time(boot: Boot, kind: str) -> None:
    works("real", kind)
    works("real", "step")
    machine = boot("41 ebfd")  # L: inc cx; jmp L
    point = machine.vcpu.add_breakpoint(CODE, kind)
    for turn in range(5):
        assert hits_of(machine.run(5).exit) == (point,)
        assert machine.vcpu.kvm.regs.rcx == turn
    machine.write(CODE, b"\xeb\xfe")  # jmp to itself
    assert [hits_of(machine.run(5).exit) for _ in range(3)] == [(point,)] * 3


# ---- the guest's own bytes ----

PLANTED = ["hlt", "software"]
SPIN = "90 90 ebfc"  # nop; L: nop; jmp L: the breakpoints stand behind it


@pytest.mark.parametrize("kind", PLANTED)
def test_the_bytes_are_put_back_whatever_ends_a_run(boot: Boot, kind: str) -> None:
    works("real", kind)
    machine = boot(SPIN)
    cpu = machine.vcpu
    machine.write(0x5000, b"\x11\x22\x33")
    for address in (0x5000, 0x5001):
        cpu.add_breakpoint(address, kind)

    def untouched() -> bool:
        return machine.read(0x5000, 3) == b"\x11\x22\x33" and machine.read(CODE, 4) == bytes.fromhex(SPIN)

    assert machine.run(0.01).reason == "timeout"
    assert untouched()
    cpu.kick()
    assert machine.run(5).reason == "interrupted"
    assert untouched()

    def stop(signum: int, frame: object) -> None:
        raise InterruptedError("stop")

    old = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(InterruptedError, match="stop"):
            machine.run(5)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert untouched()
    thread = threading.Timer(0.05, machine.close)
    ram = machine.ram
    host = ram.mapping
    thread.start()
    assert machine.run(5).reason == "interrupted"
    thread.join()
    assert host.closed


@pytest.mark.parametrize("kind", PLANTED)
def test_a_byte_that_cannot_be_put_back_stays_known(boot: Boot, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where memory has run out for good, the run ends with that, and the byte is put back as soon as it can be.
    works("real", kind)
    machine = boot(SPIN)
    cpu, trap = machine.vcpu, {"hlt": b"\xf4", "software": b"\xcc"}[kind]
    machine.write(0x5000, b"\x11\x22\x33")
    for address in (0x5000, 0x5001, 0x5002):
        cpu.add_breakpoint(address, kind)
    write, failed = type(machine.ram).write, []

    def full(block: Any, offset: int, data: bytes) -> None:
        if (offset, data) == (0x5001, b"\x22"):
            failed.append(offset)
            raise MemoryError
        write(block, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(type(machine.ram), "write", full)
        with pytest.raises(MemoryError):
            machine.run(0.01)
        assert machine.read(0x5000, 3) == b"\x11" + trap + b"\x33"  # the others are
        so_far = len(failed)
        assert 1 < so_far < 1000
        with pytest.raises(MemoryError):  # before the guest runs
            machine.run(0.01)
        assert len(failed) > so_far
        clear(cpu)
        with pytest.raises(MemoryError):  # also where no breakpoint is left
            machine.run(0.01)
    assert machine.read(0x5000, 3) == b"\x11" + trap + b"\x33"
    assert machine.run(0.01).reason == "timeout"
    assert machine.read(0x5000, 3) == b"\x11\x22\x33"


@pytest.mark.parametrize("is_late", [False, True])
def test_a_handler_that_raises_while_bytes_are_put_back(
    boot: Boot, is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before each byte, and behind it: that one is put back once more.
    works("real", "hlt")
    machine = boot(SPIN)
    for address in (0x5000, 0x5001):
        machine.vcpu.add_breakpoint(address, "hlt")
    own, write, raised = machine.read(0x5000, 2), type(machine.ram).write, []

    def interrupted(block: Any, offset: int, data: bytes) -> None:
        is_first = data != b"\xf4" and offset not in raised
        if is_late or not is_first:
            write(block, offset, data)
        if is_first:
            raised.append(offset)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(machine.ram), "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            machine.run(0.01)
    assert sorted(raised) == [0x5000, 0x5001]
    assert machine.read(0x5000, 2) == own
    assert machine.run(0.01).reason == "timeout"


def test_a_block_that_outlives_the_machine_has_its_own_bytes() -> None:
    works("real", "hlt")
    with hv.RamBlock("pc.ram", "64K") as block:
        machine = hv.Machine(ram=block)
        machine.load(CODE, bytes.fromhex(SPIN))
        machine.vcpu.real_mode(CODE)
        machine.vcpu.add_breakpoint(0x5000, "hlt")
        thread = threading.Timer(0.05, machine.close)
        thread.start()
        assert machine.run(5).reason == "interrupted"
        thread.join()
        assert block.read(0x5000, 1) == b"\0"


@pytest.mark.parametrize("kind", PLANTED)
def test_what_the_guest_writes_over_a_breakpoint_stays(boot: Boot, kind: str) -> None:
    works("real", kind)
    # mov byte [0x7c0a],0x41; jmp 0x7c0a; …; 0x7c0a: nop, which becomes inc cx; hlt
    machine = boot("c6060a7c41 eb03 909090 90 f4")
    machine.vcpu.add_breakpoint(CODE + 10, kind)
    stop = machine.run(5)
    assert stop.halted  # it is the guest's own byte that was executed
    assert machine.vcpu.kvm.regs.rcx == 1
    assert machine.read(CODE + 10, 1) == b"\x41"
    machine.vcpu.real_mode(CODE + 10)
    assert machine.run(5).reason == "breakpoint"  # at the next run it is there again


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_breakpoint_is_met_at_every_address_of_its_byte(
    guest: Callable[[str], hv.Machine], kind: str
) -> None:
    works("long", kind)
    machine = guest("long")
    pdpt = qualify._PML4 + 0x1000
    machine.write(pdpt + 8, machine.read(pdpt, 8))  # the second GiB shows what the first does
    point = machine.vcpu.add_breakpoint(qualify._STOP, kind)
    regs = machine.vcpu.kvm.regs
    regs.rip += 1 << 30
    machine.vcpu.kvm.regs = regs
    exit = machine.run(5).exit
    assert (pc_of(exit), hits_of(exit)) == (qualify._STOP + (1 << 30), (point,))
    end(machine)
    with pytest.raises(hv.ArgumentError, match="address=0x80000000: the guest's page tables do not map it"):
        machine.vcpu.add_breakpoint(1 << 31, kind)


def test_only_ram_can_have_one(boot: Boot) -> None:
    works("real", "hlt")
    machine = boot("f4", ram="64K")
    with pytest.raises(hv.ArgumentError, match=r"address=0xf0000: it leads to 0xf0000; accepted: the address of an"):
        machine.vcpu.add_breakpoint(0xF0000, "hlt")
    assert machine.vcpu.breakpoints == ()


# ---- int3 and watchpoints, where the host has none ----


class StandIn:
    """A vCPU where int3 exits: HLT does it, and the exits are made to look like those of int3."""

    def __init__(self, kvm: Any) -> None:
        self.__dict__["kvm"] = kvm
        self.__dict__["asked"] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kvm, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "guest_debug":
            self.asked.append((value.control, *value.arch.debugreg))
        setattr(self.kvm, name, value)

    def run_until(self, deadline: int) -> Any:
        exit = self.kvm.run_until(deadline)
        if exit == hv.Hlt():
            regs = self.kvm.regs
            regs.rip -= 1  # an exit by int3 leaves RIP at it
            self.kvm.regs = regs
            return hv.Debug(3, regs.rip, 0, 0)
        return exit


@pytest.fixture
def with_int3(monkeypatch: pytest.MonkeyPatch) -> Callable[[hv.Machine], StandIn]:
    """Makes a machine's debugger believe that int3 and watchpoints work in real mode."""
    works("real", "hlt")
    works("real", "step")
    known = qualify.Qualification()
    for kind in KINDS:
        known._verdicts["real", kind] = Verdict("real", kind, True, "made up")
    monkeypatch.setattr(debug, "qualify", lambda: known)
    monkeypatch.setattr(debug, "_TRAPS", {"software": 0xF4})

    def make(machine: hv.Machine) -> StandIn:
        debugger = debug.debugger(machine.vcpu)
        debugger._kvm = stand_in = StandIn(machine.vcpu.kvm)  # type: ignore[assignment]
        return stand_in

    return make


def test_int3_as_a_breakpoint(boot: Boot, with_int3: Callable[[hv.Machine], StandIn]) -> None:
    machine = boot("41 41 42 ebfb")  # L: inc cx; inc cx; inc dx; jmp L
    stand_in = with_int3(machine)
    point = machine.vcpu.add_breakpoint(CODE + 1, "software")
    for turn in range(3):
        exit = machine.run(5).exit
        assert exit == hv.Debug(3, CODE + 1, 0, 0, (point,))
        assert machine.vcpu.kvm.regs.rcx == 2 * turn + 1
        assert machine.read(CODE, 5).hex() == "414142ebfb"
    # ENABLE | USE_SW_BP for the runs, ENABLE | SINGLESTEP between them.
    assert {control & 0x1FFFF & ~0x10 for control, *_ in stand_in.asked} == {0x10001, 3}


def test_an_int3_of_the_guests_own_goes_to_the_guest(boot: Boot, with_int3: Callable[[hv.Machine], StandIn]) -> None:
    machine = boot("90 f4 90")
    machine.write(4 * 3, (0x7D00).to_bytes(4, "little"))
    machine.load(0x7D00, bytes.fromhex("e610 ebfe"))  # its handler: out 0x10, al; jmp $
    stand_in = with_int3(machine)
    machine.vcpu.add_breakpoint(0x5000, "software")
    assert next(machine.exits(5)) == hv.IoOut(0x10, 1, 1, b"\0")
    assert stand_in.asked[-1][0] == 0x10001 | lib.KVM_GUESTDBG_INJECT_BP


def test_what_the_debug_registers_get(boot: Boot, with_int3: Callable[[hv.Machine], StandIn]) -> None:
    # Intel SDM vol. 3 figure 18-1: G0 bit 1, G1 bit 3, …; RW0 bits 16-17, LEN0 18-19, RW1 20-21, …
    machine = boot("ebfe")
    stand_in = with_int3(machine)
    cpu = machine.vcpu
    first = cpu.add_watchpoint(0x3000)
    second = cpu.add_watchpoint(0x3008, 8, "rw")
    cpu.add_breakpoint(0x5000)
    last = cpu.add_watchpoint(0x3004, 4)
    assert cpu.breakpoints == (first, second, Breakpoint(0x5000, "hardware"), last)
    assert machine.run(0.01).reason == "timeout"
    rw_len = (0b00_01, 0b10_11, 0b00_00, 0b11_01)
    dr7 = 0x600 | 0b10101010 | sum(bits << 16 + 4 * n for n, bits in enumerate(rw_len))
    assert stand_in.asked[0] == (0x20001, 0x3000, 0x3008, 0x5000, 0x3004, 0, 0, 0, dr7)
    # What DR6 says of them; a hit of both is one exit.
    stand_in.__dict__["run_until"] = lambda deadline: hv.Debug(1, CODE + 1, 0xFFFF0FF9, 0)
    assert machine.run(5).exit == hv.Debug(1, CODE + 1, 0xFFFF0FF9, 0, (first, last))
    cpu.remove_watchpoint(0x3000)
    cpu.remove_watchpoint(second)
    assert list(cpu.breakpoints) == [Breakpoint(0x5000, "hardware"), last]


# ---- what the guest does itself with flags and debug registers ----

# Handler of #DB at 0x7d00: inc byte [0x700]; iret.
COUNTER = "fe060007 cf"


def test_a_guest_that_steps_itself_takes_its_own_traps(boot: Boot) -> None:
    works("real", "step")
    counts = []
    for is_stepped in (False, True):
        # pushf; pop ax; or ah,1; push ax; popf; then six nops with TF, and hlt
        machine = boot("9c 58 80cc01 50 9d 909090909090 f4")
        machine.write(4 * 1, (0x7D00).to_bytes(4, "little"))
        machine.load(0x7D00, bytes.fromhex(COUNTER))
        cpu = machine.vcpu
        if is_stepped:
            while cpu.step() != hv.Hlt():
                assert cpu.kvm.regs.rip < 0x8000
        else:
            assert machine.run(5).halted
        counts.append(machine.read(0x700, 1)[0])
    assert counts == [6, 6]


def test_the_guests_own_debug_registers_are_kept(boot: Boot) -> None:
    # Whether they act while ours do is the host's affair: KVM's emulator looks at both, a processor has but ours.
    works("real", "hardware")
    works("real", "step")
    # mov ax,0x7c30; movzx eax,ax; mov dr0,eax; mov ax,0x402; mov dr7,eax; L: mov ebx,dr0; nop; nop; inc cx; jmp L
    machine = boot("b8307c 660fb7c0 0f23c0 b80204 0f23f8 0f21c3 9090 41 ebf8")
    machine.write(4 * 1, (0x7D00).to_bytes(4, "little"))
    machine.load(0x7D00, bytes.fromhex(COUNTER))
    cpu = machine.vcpu
    inc = cpu.add_breakpoint(CODE + 0x15)
    for turn in range(3):
        assert hits_of(machine.run(5).exit) == (inc,)
        regs, registers = cpu.kvm.regs, cpu.kvm.debugregs
        assert (regs.rbx & 0xFFFF, regs.rcx) == (CODE + 0x30, turn)
        assert (registers.db[0], registers.dr7) == (CODE + 0x30, 0x402)
    cpu.remove_breakpoint(inc)
    assert machine.read(0x700, 1) == b"\0"
    regs = cpu.kvm.regs
    regs.rip = CODE + 0x30
    cpu.kvm.regs = regs
    machine.run(0.3)
    assert machine.read(0x700, 1) != b"\0"  # without ours they certainly do


def step_on(cpu: hv.Cpu) -> None:
    while True:
        cpu.step()


def test_a_step_into_a_mode_without_steps_is_refused_before_it_is_made(boot: Boot) -> None:
    need("gcc")
    for mode in ("real", "protected", "long"):
        works(mode, "step")
    image = assemble("climb")
    machine = boot(image, unclaimed="open_bus")
    if qualify.qualify().works("long-user", "step"):
        pytest.skip("this host steps CPL 3 too")
    with pytest.raises(hv.UnqualifiedError, match="'step' does not work in mode 'long-user'") as caught:
        step_on(machine.vcpu)
    assert caught.value.mode == "long-user"
    assert machine.vcpu.location().insn[:2] == b"\x48\xcf"  # at the IRETQ, which was not executed
    stages = [exit.value for exit in machine.exits(5) if isinstance(exit, hv.IoOut) and exit.port == 0x10]
    assert stages[0] == 4  # and the guest goes on in CPL 3


# ---- registers that were written, and a state that is not KVM's ----


@pytest.mark.parametrize("kind", ["hardware", "hlt"])
def test_a_written_rip_counts(boot: Boot, kind: str) -> None:
    works("real", kind)
    works("real", "step")
    machine = boot("40 40 40 40 40 f4")  # inc ax, five times
    cpu = machine.vcpu
    point = cpu.add_breakpoint(CODE + 2, kind)
    assert hits_of(machine.run(5).exit) == (point,)
    cpu.rip, cpu.rax = CODE + 3, 100  # not at the breakpoint any more: nothing is passed
    assert pc_of(cpu.step()) == CODE + 4
    assert (cpu.rip, cpu.rax) == (CODE + 4, 101)
    cpu.rip = CODE + 1
    assert hits_of(machine.run(5).exit) == (point,)
    assert (cpu.rip, cpu.rax) == (CODE + 2, 102)
    assert machine.run(5).halted
    assert cpu.rax == 105


@pytest.mark.parametrize("kind", ["hardware", "hlt"])
def test_a_state_that_is_ours_counts(boot: Boot, kind: str) -> None:
    works("real", kind)
    works("real", "step")
    machine = boot("40 40 40 40 40 f4")
    cpu = machine.vcpu
    point = cpu.add_breakpoint(CODE + 2, kind)
    sync = synchronizer(cpu)
    for start, stop in ((CODE, CODE + 2), (CODE + 2, None), (CODE + 1, CODE + 2)):
        sync.env = sync.synchronize_state().replace(**{"regs.rip": start, "regs.rax": 7})
        assert sync.vcpu_dirty
        exit = machine.run(5).exit
        # At CODE + 2 it was reported, and is passed.
        assert exit == hv.Hlt() if stop is None else (pc_of(exit), hits_of(exit)) == (stop, (point,))
        assert cpu.rax == 7 + (CODE + 5 if stop is None else stop) - start
    sync.env = sync.synchronize_state().replace(**{"regs.rip": CODE + 3})
    assert pc_of(cpu.step()) == CODE + 4
    assert not sync.vcpu_dirty


def test_a_state_to_start_in_starts_anew(boot: Boot) -> None:
    works("real", "hardware")
    machine = boot("40 f4")
    point = machine.vcpu.add_breakpoint(CODE)
    for _ in range(2):  # the second time it would be passed, had it been reported
        machine.vcpu.real_mode(CODE)
        assert hits_of(machine.run(5).exit) == (point,)


# ---- arguments, life ----


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda cpu: cpu.step(0), hv.ArgumentError, "n=0; accepted: at least 1"),
        (lambda cpu: cpu.step(-1), hv.ArgumentError, "n=-1"),
        (lambda cpu: cpu.step(True), TypeError, "a number of instructions"),
        (lambda cpu: cpu.step("1"), TypeError, "a number of instructions"),
        (lambda cpu: cpu.step(1, timeout=-1), hv.ArgumentError, "timeout=-1"),
        (lambda cpu: cpu.add_breakpoint(-1), hv.ArgumentError, "a canonical linear address"),
        (lambda cpu: cpu.add_breakpoint(1 << 64), hv.ArgumentError, "a canonical linear address"),
        (lambda cpu: cpu.add_breakpoint(1 << 60), hv.ArgumentError, "a canonical linear address"),
        (lambda cpu: cpu.add_breakpoint("main"), TypeError, "an int"),
        (lambda cpu: cpu.add_breakpoint(0, "int3"), hv.ArgumentError, "one of hardware, software, hlt"),
        (lambda cpu: cpu.add_breakpoint(0, mode="ring3"), hv.ArgumentError, "one of real, vm86"),
        (lambda cpu: cpu.add_breakpoint(0x5000), hv.ArgumentError, "it has Breakpoint"),
        (lambda cpu: cpu.add_breakpoint(0x5000, "hlt"), hv.ArgumentError, "it has Breakpoint"),
        (lambda cpu: cpu.add_watchpoint(0x3000, 3), hv.ArgumentError, "1, 2, 4 or 8 bytes"),
        (lambda cpu: cpu.add_watchpoint(0x3000, "1"), TypeError, "an int"),
        (lambda cpu: cpu.add_watchpoint(0x3002, 4), hv.ArgumentError, "a multiple of size=4"),
        (lambda cpu: cpu.add_watchpoint(0x3000, 4, "r"), hv.ArgumentError, '"w" or "rw"'),
        (lambda cpu: cpu.add_watchpoint(0x3000, 4, ["w"]), hv.ArgumentError, '"w" or "rw"'),
        (lambda cpu: cpu.add_breakpoint(0, ["hlt"]), hv.ArgumentError, "one of hardware, software, hlt"),
        (lambda cpu: cpu.remove_breakpoint(0x4000), hv.ArgumentError, "there is no such one.*Breakpoint"),
        (lambda cpu: cpu.remove_breakpoint(None), TypeError, "a Breakpoint or its address"),
        (lambda cpu: cpu.remove_watchpoint(0x5000), hv.ArgumentError, "there is no such one"),
        (lambda cpu: cpu.remove_watchpoint(Breakpoint(0x5000, "hardware")), TypeError, "a Watchpoint or its address"),
    ],
)
def test_bad_arguments(boot: Boot, call: Callable[[hv.Cpu], object], error: type[Exception], match: str) -> None:
    works("real", "hardware")
    machine = boot("90 f4")
    point = machine.vcpu.add_breakpoint(0x5000)
    with pytest.raises(error, match=match):
        call(machine.vcpu)
    assert machine.vcpu.breakpoints == (point,)
    assert machine.run(5).halted


def test_there_are_four_debug_registers(boot: Boot) -> None:
    works("real", "hardware")
    machine = boot("41 41 41 41 41 f4")
    cpu = machine.vcpu
    points = [cpu.add_breakpoint(CODE + n) for n in range(4)]
    with pytest.raises(hv.BusyError, match="DR0 to DR3 is busy: they stand for Breakpoint"):
        cpu.add_breakpoint(CODE + 4)
    assert cpu.breakpoints == tuple(points)
    assert [hits_of(machine.run(5).exit) for _ in range(4)] == [(point,) for point in points]
    assert machine.run(5).halted
    cpu.remove_breakpoint(points[1])
    cpu.remove_breakpoint(CODE + 3)
    points[1:] = [points[2], cpu.add_breakpoint(CODE + 4)]
    cpu.real_mode(CODE)
    assert [hits_of(machine.run(5).exit) for _ in range(3)] == [(point,) for point in points]


def test_hlt_needs_that_it_exits(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    works("real", "hlt")
    machine = boot("90 f4")
    debugger = debug.debugger(machine.vcpu)
    assert not debugger._has_irqchip()
    monkeypatch.setattr(debugger, "_has_irqchip", lambda: True)
    with pytest.raises(hv.UnsupportedError, match="the VM has an irqchip there; accepted: another kind"):
        machine.vcpu.add_breakpoint(CODE, "hlt")
    assert machine.vcpu.breakpoints == ()
    with hv.Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            debugger._kvm = vcpu
            monkeypatch.undo()
            assert debugger._has_irqchip()


def test_nothing_is_left_of_it(boot: Boot) -> None:
    works("real", "hardware")
    works("real", "step")
    machine = boot("41 41 41 f4")
    cpu = machine.vcpu
    assert cpu.breakpoints == ()
    cpu.add_breakpoint(CODE + 1)
    cpu.step()
    clear(cpu)
    assert cpu.kvm.run(5) == hv.Hlt()  # past the machine: KVM knows of none any more
    assert cpu.kvm.regs.rflags & TF == 0


def test_a_run_with_a_limit_ends_on_time(boot: Boot) -> None:
    works("real", "step")
    machine = boot("ebfe")
    assert machine.vcpu.step(1 << 40, timeout=0.05) == hv.Interrupted("timeout")
    threading.Timer(0.05, machine.kick).start()
    assert machine.vcpu.step(1 << 40, timeout=10) == hv.Interrupted("kick")


class Interrupting:
    """A vCPU whose next exit Python cannot take: a signal's handler raises in that moment."""

    def __init__(self, kvm: Any) -> None:
        self.__dict__["kvm"] = kvm
        self.__dict__["is_due"] = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kvm, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.kvm, name, value)

    def run_until(self, deadline: int) -> Any:
        exit = self.kvm.run_until(deadline)
        if self.is_due:
            self.__dict__["is_due"] = False
            assert lib.hv_unread(self.kvm._c) == 0
            raise KeyboardInterrupt
        return exit


@pytest.mark.parametrize("kind", ["hardware", "hlt", "software"])
@pytest.mark.parametrize("is_second", [False, True])
def test_a_stop_that_a_signal_interrupts_is_not_lost(boot: Boot, kind: str, is_second: bool) -> None:
    works("real", kind)
    works("real", "step")
    machine = boot("41 41 42 ebfb")  # L: inc cx; inc cx; inc dx; jmp L
    cpu = machine.vcpu
    point = cpu.add_breakpoint(CODE + 1, kind)
    if is_second:  # then the instruction of the breakpoint is to be passed first
        assert hits_of(machine.run(5).exit) == (point,)
    debugger = debug.debugger(cpu)
    debugger._kvm = Interrupting(cpu.kvm)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        machine.run(5)
    assert machine.read(CODE, 5).hex() == "414142ebfb"
    exit = machine.run(5).exit
    if is_second:  # it was the step past the breakpoint that was interrupted
        assert (pc_of(exit), hits_of(exit)) == (CODE + 2, ())
        exit = machine.run(5).exit
    assert hits_of(exit) == (point,)
    assert cpu.kvm.regs.rcx == (3 if is_second else 1)


def test_a_step_that_a_signal_interrupts_is_not_lost(boot: Boot) -> None:
    works("real", "hardware")
    works("real", "step")
    machine = boot("41 41 42 ebfb")
    cpu = machine.vcpu
    cpu.add_breakpoint(0x5000)
    debug.debugger(cpu)._kvm = Interrupting(cpu.kvm)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        cpu.step()
    assert [pc_of(cpu.step()) for _ in range(4)] == [CODE + n for n in (1, 2, 3, 0)]


class Handler:
    """Has KeyboardInterrupt raised at the start of the `nth` function of hvmodel.machine.debug that is called.

    There, behind calls of C, and in loops CPython calls the handlers of signals.
    """

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.raised: str | None = None

    def __call__(self, frame: Any, event: str, argument: object) -> None:
        if frame.f_code.co_filename == debug.__file__ and self.raised is None:
            self.nth -= 1
            if not self.nth:
                self.raised = frame.f_code.co_name
                raise KeyboardInterrupt


def in_order(cpu: hv.Cpu) -> bool:
    """Of L: inc cx; inc dx; inc bx; inc ax; jmp L: whether each was executed, none twice."""
    counts = [cpu.rcx, cpu.rdx, cpu.rbx, cpu.rax]
    total = sum(counts)
    places = (CODE, CODE + 4) if total % 4 == 0 else (CODE + total % 4,)
    return counts == [(total + 3 - at) // 4 for at in range(4)] and cpu.rip in places


@pytest.mark.parametrize("kind", ["hardware", "hlt"])
@pytest.mark.parametrize("call", ["run", "step"])
def test_a_handler_that_raises_anywhere(boot: Boot, kind: str, call: str) -> None:
    # Then the guest has its own bytes, has executed each instruction once, and every stop is still to come.
    works("real", kind)
    works("real", "hlt")
    works("real", "step")
    code, traced = "41 42 43 40 ebfa", sys.gettrace()
    seen = set()
    for nr_before in range(3):
        handler = Handler(0)
        for nth in range(1, 1000):
            machine = boot(code)
            cpu, handler = machine.vcpu, Handler(nth)
            cpu.add_breakpoint(CODE + 1, kind)
            cpu.add_breakpoint(CODE + 2, "hlt")
            for _ in range(nr_before):
                machine.run(5)
            sys.settrace(handler)
            try:
                machine.run(5) if call == "run" else cpu.step()
            except KeyboardInterrupt:
                assert handler.raised
            finally:
                sys.settrace(traced)
            where = (nr_before, nth, handler.raised)
            assert machine.read(CODE, 6) == bytes.fromhex(code), where
            assert in_order(cpu), where
            exits = [machine.run(5).exit for _ in range(5)]
            hits = [hit for exit in exits for hit in hits_of(exit)]
            assert len(hits) >= 4, where  # one may be the step that was interrupted
            assert all(hit != after for hit, after in pairwise(hits)), where
            assert in_order(cpu), where
            clear(cpu)
            assert cpu.kvm.run(0.005) == hv.Interrupted("timeout"), where
            machine.close()
            if handler.raised is None:
                break
            seen.add(handler.raised)
        assert handler.raised is None
    assert {"run_until", "_enter", "_arm", "_put_back", "_where"} <= seen


def test_one_thread_at_a_time(boot: Boot) -> None:
    works("real", "hardware")
    machine = boot("ebfe")
    cpu = machine.vcpu
    cpu.add_breakpoint(0x5000)
    thread = threading.Thread(target=machine.run, args=(10,))
    thread.start()
    try:
        while not debug.debugger(cpu)._lock.locked():
            time.sleep(0.001)
        with pytest.raises(hv.BusyError):
            cpu.add_breakpoint(0x6000)
        with pytest.raises(hv.BusyError):
            cpu.remove_breakpoint(0x5000)
        with pytest.raises(hv.BusyError):
            cpu.step()
        with pytest.raises(hv.BusyError):
            machine.run(1)
    finally:
        machine.kick()
        thread.join()


def test_a_closed_machine(boot: Boot) -> None:
    works("real", "hardware")
    machine = boot("f4")
    point = machine.vcpu.add_breakpoint(0x5000)
    machine.close()
    with pytest.raises(hv.ClosedError):
        machine.vcpu.step()
    with pytest.raises(hv.ClosedError):
        machine.vcpu.add_breakpoint(0x6000)
    assert machine.vcpu.breakpoints == (point,)
    machine.vcpu.remove_breakpoint(point)


# ---- the qualification ----


def test_a_kind_is_tried_once_for_the_process() -> None:
    known = qualify.qualify()
    assert known is qualify.qualify()
    assert known.verdict("real", "step") is known.verdict("real", "step")
    with hv.Kvm() as kvm:
        fresh = qualify.qualify(kvm)
        assert fresh is not known
        assert [verdict.works for verdict in fresh] == [verdict.works for verdict in known]
        assert not kvm.closed
    assert [(row["mode"], row["kind"]) for row in known.to_json()] == [(m, k) for m in MODES for k in KINDS]
    assert [line.split()[0] for line in str(known).splitlines()] == ["mode", *MODES]
    for mode in MODES:
        assert known.kinds(mode) == tuple(kind for kind in KINDS if known.works(mode, kind))
    for field, args in (("mode", ("smm", "step")), ("kind", ("real", "int3"))):
        with pytest.raises(hv.ArgumentError, match=f"{field}="):
            known.verdict(*args)
    with pytest.raises(TypeError, match="a Kvm or None"):
        qualify.qualify("kvm")  # type: ignore[arg-type]


def test_signals_do_not_make_a_kind_one_that_does_not_work() -> None:
    known = qualify.qualify()
    expected = [verdict.works for verdict in known]
    came = []
    old = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        assert [verdict.works for verdict in qualify.Qualification()] == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert came


def test_the_error_says_what_there_is_and_pickles() -> None:
    error = hv.UnqualifiedError("add_breakpoint", "long", "software", "Shutdown()", ("step", "hlt"))
    assert str(error) == (
        "add_breakpoint: 'software' does not work in mode 'long' on this host (tried, it gave: Shutdown()); "
        "accepted: in this mode: step, hlt [ENOTSUP: Operation not supported]"
    )
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.mode, again.kind) == (hv.UnqualifiedError, str(error), "long", "software")
    assert isinstance(error, hv.UnsupportedError)
    assert pickle.loads(pickle.dumps(Watchpoint(8, 4, "rw"))) == Watchpoint(8, 4, "rw")
