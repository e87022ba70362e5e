"""The modes that a vCPU starts in: what guests report from there, and that a refused one leaves no trace.

Expected: Intel SDM vol. 3 (what the same bytes are in 16-, 32- and 64-bit code, frames of exceptions, error codes),
the places that hvmodel.machine.modes documents, and QEMU's own CPU, which runs on the tables that were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.arch.modes import Mode, mode_of_sregs
from hvmodel.arch.paging import PageTables
from hvmodel.arch.tables import Idt, Ivt
from hvmodel.errors import ArgumentError, ArgumentTypeError, ChangedStateError
from hvmodel.kvm import Kvm
from hvmodel.kvm.triple_fault import drop_triple_fault
from hvmodel.machine import Cpu
from hvmodel.machine.modes import SELECTORS, ModeTables
from hvmodel.state import VcpuState
from hvmodel.state.sync import synchronizer
from tests.arch.qemu_cpu import QemuCpu, qemu_cpu, set_registers
from tests.guests import assemble
from tests.need import need

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
ENTRY = 0x7C00
RAM = 2 * MiB
HIGH = 0xFFFF_8000_0000_0000
TRIPLE_FAULT = lib.KVM_VCPUEVENT_VALID_TRIPLE_FAULT

# Bytes that are other instructions in each width:
#               64-bit              32-bit                  16-bit
#   31 c0       xor eax, eax        xor eax, eax            xor ax, ax
#   40 90       rex nop             inc eax; nop            inc ax; nop
#   b9 00 00    mov ecx, 0x2eb0000  mov ecx, 0x2eb0000      mov cx, 0
#   eb 02                                                   jmp over the add
#   04 10       add al, 0x10        add al, 0x10            -
#   e6 10       out 0x10, al: 0x10  0x11                    0x01
WIDTH = {64: 0x10, 32: 0x11, 16: 0x01}
WHERE = bytes.fromhex(
    "31c0 4090 b90000eb02 0410 e610"
    "8cc8 e611"  # mov eax, cs; out 0x11, al
    "0f01e0 e612"  # smsw ax; out 0x12, al
    "6a5a 58 e613"  # push 0x5a; pop eax; out 0x13, al
    "f4"  # hlt: #GP at CPL 3, and there are no handlers
)


@pytest.fixture
def machine() -> Iterator[hv.Machine]:
    need("kvm")
    with hv.Machine(ram=RAM) as machine:
        yield machine


def outs(machine: hv.Machine) -> tuple[dict[int, int], object]:
    """What the guest writes to ports, by port, and the exit that ends it."""
    written: dict[int, int] = {}
    for exit in machine.exits(timeout=10):
        if not isinstance(exit, hv.IoOut):
            return written, exit
        written[exit.port] = exit.value
    pytest.fail("the guest did not end")


def everything(machine: hv.Machine) -> tuple[object, ...]:
    """RAM and the state that a mode sets."""
    cpu = machine.vcpu
    kvm = cpu.kvm
    others = [bytes(ffi.buffer(value)) for value in (kvm.vcpu_events, kvm.mp_state)]
    return machine.read(0, RAM), cpu.sregs, cpu.regs, *others


MODES: dict[str, tuple[Callable[..., ModeTables], dict[str, Any], int, int]] = {
    # the call, its arguments, width of the code, CS
    "protected": (Cpu.protected_mode, {}, 32, 0x08),
    "protected, CPL 3": (Cpu.protected_mode, {"user": True}, 32, 0x1B),
    "protected, 16-bit": (Cpu.protected_mode, {"bits": 16}, 16, 0x38),
    "protected, 16-bit, CPL 3": (Cpu.protected_mode, {"bits": 16, "user": True}, 16, 0x4B),
    "32-bit paging": (Cpu.protected_mode, {"paging": "32bit"}, 32, 0x08),
    "32-bit paging, CPL 3": (Cpu.protected_mode, {"paging": "32bit", "user": True}, 32, 0x1B),
    "PAE": (Cpu.protected_mode, {"paging": "pae"}, 32, 0x08),
    "PAE, CPL 3": (Cpu.protected_mode, {"paging": "pae", "user": True}, 32, 0x1B),
    "long": (Cpu.long_mode, {}, 64, 0x08),
    "long, CPL 3": (Cpu.long_mode, {"user": True}, 64, 0x2B),
    "long, 5 levels": (Cpu.long_mode, {"levels": 5}, 64, 0x08),
    "long, 5 levels, CPL 3": (Cpu.long_mode, {"levels": 5, "user": True}, 64, 0x2B),
    "compatibility": (Cpu.long_mode, {"bits": 32}, 32, 0x30),
    "compatibility, CPL 3": (Cpu.long_mode, {"bits": 32, "user": True}, 32, 0x1B),
    "compatibility, 16-bit": (Cpu.long_mode, {"bits": 16}, 16, 0x38),
    "compatibility, 16-bit, CPL 3": (Cpu.long_mode, {"bits": 16, "user": True}, 16, 0x4B),
    "virtual-8086": (Cpu.vm86_mode, {}, 16, 0),
}


def enter(machine: hv.Machine, mode: str, entry: int = ENTRY, **more: Any) -> ModeTables:
    """Starts in a mode; skips where this KVM does not page outside long mode, or the guest has no LA57."""
    call, arguments, _, _ = MODES[mode]
    try:
        return call(machine.vcpu, entry, **arguments, **more)
    except ChangedStateError as error:
        assert error.field == ("cr0" if arguments.get("paging") else "rflags")  # noqa: PT017
        assert arguments.get("paging") or mode == "virtual-8086"
        pytest.skip(str(error))
    except ArgumentError as error:
        if arguments.get("levels") != 5 or error.field != "levels":
            raise
        assert "LA57" in str(error)  # noqa: PT017
        pytest.skip(str(error))


# ---- every mode by its own word ----


@pytest.mark.parametrize("mode", MODES)
def test_a_guest_says_in_which_mode_it_is(machine: hv.Machine, mode: str) -> None:
    _, _, width, cs = MODES[mode]
    machine.load(ENTRY, WHERE)
    tables = enter(machine, mode)
    stack = machine.vcpu.rsp
    assert stack == (tables.start if width != 16 else ENTRY)
    written, end = outs(machine)
    assert written[0x10] == WIDTH[width]
    if mode == "long, CPL 3":
        assert written[0x11] & 3 == 3  # kvm_pvm shows CPL 3 the host's CS
    else:
        assert written[0x11] == cs & 0xFF
    assert written[0x12] & 1  # CR0.PE
    assert written[0x13] == 0x5A
    word = {64: 8, 32: 4, 16: 2}[width]
    assert machine.read(stack - word, word) == (0x5A).to_bytes(word, "little")
    is_user = cs & 3 == 3 or mode == "virtual-8086"
    assert isinstance(end, hv.Shutdown if is_user else hv.Hlt)


@pytest.mark.parametrize("mode", MODES)
def test_the_registers_of_a_mode(machine: hv.Machine, mode: str) -> None:
    _, arguments, width, cs = MODES[mode]
    cpu = machine.vcpu
    machine.load(0x1000, b"\xfb\xf4")
    cpu.real_mode(0x1000)
    machine.run(10)  # leaves interrupts on
    machine.load(ENTRY, WHERE)
    apic_base = cpu.sregs.apic_base
    tables = enter(machine, mode)
    regs, sregs = cpu.regs, cpu.sregs
    vm86 = mode == "virtual-8086"
    assert (regs.rip, regs.rflags) == (ENTRY, 0x23002 if vm86 else 2)
    assert not any(value for name, value in regs.items() if name not in ("rip", "rsp", "rflags"))
    is_long = "long" in mode or "compat" in mode
    is_paged = tables.cr3 is not None
    # PE, MP, ET, NE; WP, PG
    assert sregs.cr0 == 0x33 | is_paged << 16 | is_paged << 31
    assert sregs.cr3 == (tables.cr3 or 0)
    assert bool(sregs.cr4 & 0x20) == (is_long or arguments.get("paging") == "pae")
    assert bool(sregs.cr4 & 0x10) == (arguments.get("paging") == "32bit")
    assert sregs.cr4 & 0x600 == 0x600  # SSE: every processor with KVM has it
    assert sregs.efer & 0x500 == 0x500 * is_long
    assert (sregs.apic_base, sregs.cr2, sregs.cr8) == (apic_base, 0, 0)
    assert (sregs.cs.selector, sregs.cs.base, sregs.cs.dpl) == (cs, 0, 3 if vm86 else cs & 3)
    assert (sregs.cs.l, sregs.cs.db) == (width == 64, width == 32)
    for name in ("ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        assert (segment.base, segment.type, segment.present, segment.s) == (0, 3, 1, 1)
        assert segment.limit == (0xFFFF if width == 16 else 0xFFFFFFFF)
        assert segment.dpl == sregs.cs.dpl
    assert (sregs.tr.selector, sregs.tr.base, sregs.tr.type, sregs.tr.present) == (0x58, tables.tss, 0xB, 1)
    assert sregs.ldt.unusable
    assert (sregs.gdt.base, sregs.idt.limit) == (tables.gdt, 0)
    assert (cpu.kvm.mp_state.mp_state, cpu.kvm.vcpu_events.exception.pending) == (0, 0)
    assert cpu.location().linear == ENTRY
    kinds = {(16, True): Mode.COMPAT16, (32, True): Mode.COMPAT32, (64, True): Mode.LONG}
    kinds |= {(16, False): Mode.VM86 if vm86 else Mode.PROTECTED16, (32, False): Mode.PROTECTED32}
    assert mode_of_sregs(sregs, regs.rflags) == kinds[width, is_long]


def test_the_places_of_the_tables(machine: hv.Machine) -> None:
    machine.load(ENTRY, WHERE)
    at = machine.vcpu.protected_mode(ENTRY, handlers={0: ENTRY})
    assert at == ModeTables(0x1FA000, 0x6000, 0x1FA000, 0x1FB000, 0x1FC000, 0x200000, None)
    at = machine.vcpu.long_mode(ENTRY, tables=0x40000, handlers={0: ENTRY})
    # PML4, PDPT, a PD for each of 4 GiB
    assert at == ModeTables(0x40000, 0xC000, 0x40000, 0x41000, 0x42000, 0x46000, 0x46000)
    # CPL 3 may not touch the tables: two PTs more, for their ends.
    assert machine.vcpu.long_mode(ENTRY, user=True).size == 0xE000
    # "code" is 64-bit, the TSS has 16 bytes
    gdt = machine.read(0x40000, 0x68)
    assert gdt[0x08:0x10] == bytes.fromhex("ffff0000009baf00")
    assert gdt[0x58:0x68] == bytes.fromhex("6820002004890000 0000000000000000")


def test_a_hostile_place_of_the_stack_and_other_ends(machine: hv.Machine) -> None:
    machine.load(ENTRY, WHERE)
    for call in (machine.vcpu.protected_mode, machine.vcpu.long_mode):
        for stack in (0x1000, 0x1008, RAM - 0x10000):
            call(ENTRY, stack=stack)
            assert machine.vcpu.rsp == stack
            written, end = outs(machine)
            assert (written[0x13], end) == (0x5A, hv.Hlt())
    machine.vcpu.protected_mode(ENTRY, bits=16, stack=0x10000)
    assert outs(machine)[0][0x13] == 0x5A
    assert machine.read(0xFFFE, 2) == b"\x5a\0"


def test_from_every_mode_into_every_mode(machine: hv.Machine) -> None:
    machine.load(ENTRY, WHERE)
    possible = []
    for mode in MODES:
        try:
            enter(machine, mode)
        except pytest.skip.Exception:
            continue
        possible.append(mode)
    assert {"protected", "long", "compatibility, CPL 3"} <= set(possible)
    for first in possible:
        for second in possible:
            enter(machine, first)
            outs(machine)
            enter(machine, second)
            assert outs(machine)[0][0x10] == WIDTH[MODES[second][2]], (first, second)
    machine.vcpu.real_mode(ENTRY)
    written, end = outs(machine)
    assert (written[0x10], written[0x12] & 1, end) == (WIDTH[16], 0, hv.Hlt())


def test_virtual_8086_segments(machine: hv.Machine) -> None:
    # mov ax, 0x1234; mov ds, ax; mov al, [0x10]; out 0x10, al; mov ax, cs; out 0x11, ax; pushf; pop ax; out 0x12, ax
    machine.load(0x20010, bytes.fromhex("b83412 8ed8 a01000 e610 8cc8 e711 9c 58 e712"))
    machine.write(0x12350, b"\x99")
    enter(machine, "virtual-8086", 0x20010, cs=0x2000, sp=0x1000)
    written, _ = outs(machine)
    assert written == {0x10: 0x99, 0x11: 0x2000, 0x12: 0x3002}  # IOPL 3
    assert machine.vcpu.sregs.cs.base == 0x20000
    # With IOPL 0 PUSHF is a #GP.
    machine.vcpu.vm86_mode(0x20010, iopl=0)
    written, end = outs(machine)
    assert (0x12 in written, end) == (False, hv.Shutdown())


def test_real_mode_goes_by_the_vector_table(machine: hv.Machine) -> None:
    ivt = Ivt()
    ivt.set(0x21, 0x0900, 0x0010)
    machine.write(0, bytes(ivt))
    machine.load(ENTRY, bytes.fromhex("cd21 e611 f4"))  # int 0x21; out 0x11, al; hlt
    machine.load(0x9010, bytes.fromhex("8cc8 e710 b077 cf"))  # mov ax, cs; out 0x10, ax; mov al, 0x77; iret
    machine.vcpu.real_mode(ENTRY)
    assert outs(machine) == ({0x10: 0x0900, 0x11: 0x77}, hv.Hlt())


def test_the_ram_above_4_gib_is_mapped() -> None:
    need("kvm")
    with hv.Machine(ram="3074M") as machine:  # 3 GiB, and 2 MiB from 4 GiB on
        # mov rbx, 0x1001ffff8; mov [rbx], rbx; hlt
        machine.load(ENTRY, bytes.fromhex("48bb f8ff1f0001000000 48891b f4"))
        machine.vcpu.long_mode(ENTRY)
        assert machine.run(10).halted
        assert machine.read(0x1001FFFF8, 8) == (0x1001FFFF8).to_bytes(8, "little")


# ---- exceptions ----


@pytest.mark.parametrize(
    ("mode", "trap"),
    [
        (mode, trap)
        for mode in ("protected, CPL 3", "long, CPL 3", "compatibility, CPL 3", "virtual-8086")
        for trap in (0, 3, 6, 13, 14)
        if trap != 14 or "long" in mode or "compatibility" in mode  # there is no page fault without paging
    ],
)
def test_handlers_of_cpl_3(machine: hv.Machine, mode: str, trap: int) -> None:
    need("gcc")
    _, _, width, cs = MODES[mode]
    wide = 32 if "protected" in mode or mode == "virtual-8086" else 64
    vector = trap
    far = 0x80000000
    if trap == 14:
        far = RAM - 0x1000  # of the tables, which CPL 3 may not read
    machine.load(ENTRY, assemble("handlers", BITS=width, WIDE=wide, TRAP=trap, FAR=far))
    handlers = {v: 0x7D00 + 16 * v for v in range(32)}
    at = enter(machine, mode, handlers=handlers)
    assert at.start + at.size == RAM
    written, end = outs(machine)
    assert isinstance(end, hv.Hlt)
    if trap == 3 and mode != "long, CPL 3" and written[0x20] == 6:
        pytest.skip("this KVM emulates CPL 3 here, and INT3 is a #UD for its emulator")
    assert written[0x20] == vector
    # Of #PF: present, of CPL 3.  A hlt of CPL 3: 0.
    assert written[0x21] == (5 if trap == 14 else 0)
    assert written[0x22] == cs
    if trap == 14:
        assert written[0x24] == far
    # SS, SP, FLAGS, CS, IP; of virtual-8086 mode GS, FS, DS, ES too; the error code
    words = 5 + (4 if mode == "virtual-8086" else 0) + (trap in (13, 14))
    assert written[0x23] == at.kernel_stack - words * wide // 8


@pytest.mark.parametrize("mode", ["protected", "long", "compatibility"])
def test_handlers_of_cpl_0(machine: hv.Machine, mode: str) -> None:
    need("gcc")
    call, arguments, width, cs = MODES[mode]
    wide = 32 if mode == "protected" else 64
    machine.load(ENTRY, assemble("handlers", BITS=width, WIDE=wide, TRAP=6))
    call(machine.vcpu, ENTRY, **arguments, stack=0x9000, handlers={6: 0x7D60})
    written, end = outs(machine)
    assert (written[0x20], written[0x21], written[0x22], end) == (6, 0, cs, hv.Hlt())
    # Long mode aligns the stack to 16 bytes and pushes SS:RSP always; else FLAGS, CS, IP.
    assert written[0x23] == 0x9000 - (5 * 8 if wide == 64 else 3 * 4)


def test_an_exception_without_handlers_shuts_down(machine: hv.Machine) -> None:
    machine.load(ENTRY, b"\x0f\x0b")  # ud2
    for mode in ("protected", "long", "long, CPL 3"):
        enter(machine, mode)
        assert outs(machine)[1] == hv.Shutdown(), mode


def test_a_table_of_gates_of_your_own(machine: hv.Machine) -> None:
    need("gcc")
    idt = Idt(64, 8)
    idt.gate(6, 0x7D00 + 16 * 6, SELECTORS["code"], kind="trap", ist=0)
    machine.load(ENTRY, assemble("handlers"))
    at = machine.vcpu.long_mode(ENTRY, user=True, handlers=idt)
    assert at.idt is not None
    assert machine.read(at.idt, 128) == bytes(idt)
    assert machine.vcpu.sregs.idt.limit == 127
    assert outs(machine)[0][0x20] == 6


@pytest.mark.parametrize("mode", ["protected, CPL 3", "long, CPL 3", "compatibility, CPL 3", "virtual-8086"])
def test_ports_of_cpl_3(machine: hv.Machine, mode: str) -> None:
    need("gcc")
    width = MODES[mode][2]
    wide = 32 if "protected" in mode or mode == "virtual-8086" else 64
    handlers = {v: 0x7D00 + 16 * v for v in range(32)}
    for port, ports, is_open in (
        (0x345, True, True),
        (0xFFFF, True, True),
        (0x345, False, False),
        (0x345, [0x345], True),
        (0x346, [0x345], False),
        (0x344, [0x345], False),
        (0x7FFF, [0x345], False),  # beyond the bitmap
        (0x355, [range(0x350, 0x360)], True),
        (0x360, [range(0x350, 0x360)], False),
        (0x345, iter([0x345]), True),
    ):
        machine.load(ENTRY, assemble("handlers", BITS=width, WIDE=wide, TRAP=6, OUT=port))
        enter(machine, mode, handlers=handlers, ports=ports)
        written, _ = outs(machine)
        assert (port in written, written[0x20]) == (is_open, 6 if is_open else 13), (port, ports)


# ---- page tables of one's own ----


def own_pages(root: int = 0x100000, base: int = HIGH) -> PageTables:
    pages = PageTables(root, "4level")
    pages.map(base, 0x8000, 0x2000, user=True, writable=False)  # code
    pages.map(base + 0x10000, 0x20000, 0x1000, user=True, nx=True)  # stack
    pages.map(0x1FA000, 0x1FA000, 0x6000)  # where the tables go by default
    return pages


@pytest.mark.parametrize(("user", "base"), [(False, HIGH), (True, 0x5555_0000_0000)])
def test_your_own_page_tables(machine: hv.Machine, user: bool, base: int) -> None:
    # CPL 3 in the low half: kvm_pvm runs it natively, and the high half is the host's.
    machine.load(0x8C00, WHERE)
    pages = own_pages(base=base)
    entry, stack = base + 0xC00, base + 0x11000
    at = machine.vcpu.long_mode(entry, stack=stack, user=user, pages=pages)
    assert (at.cr3, at.size, at.start) == (0x100000, 0x6000, 0x1FA000)
    assert machine.read(0x100000, pages.size) == pages.image()
    written, _ = outs(machine)
    assert (written[0x10], written[0x13]) == (WIDTH[64], 0x5A)
    assert machine.read(0x20FF8, 8) == b"\x5a".ljust(8, b"\0")


def test_what_own_page_tables_must_do(machine: hv.Machine) -> None:
    machine.load(0x8C00, WHERE)
    entry, stack = HIGH + 0xC00, HIGH + 0x11000
    for options, field, says in (
        ({"entry": HIGH + 0x2000}, "entry", "do not map 0xffff800000002000"),
        ({"entry": HIGH + 0x10000}, "entry", "no instruction is fetched"),
        ({"entry": 0x1FA000, "user": True}, "entry", "CPL 3 may not use 0x1fa000"),
        ({"entry": 0x1FA000}, "entry", "the tables are there"),
        ({"entry": 1 << 47}, "entry", "a canonical address"),
        ({"stack": HIGH}, "stack", "a canonical address"),
        ({"stack": HIGH + 0x1000}, "stack", "cannot be written"),
        ({"stack": HIGH + 0x9000}, "stack", "do not map 0xffff800000008fff"),
        ({"tables": 0x30000}, "pages", "map(0x30000, 0x30000, 0x6000)"),
        ({"tables": 0x100000}, "tables", "the page tables are at [0x100000,"),
        ({"pages": own_pages(RAM)}, "pages", "not in RAM"),
        ({"pages": own_pages(0x8000)}, "entry", "the page tables are there"),
        ({"pages": PageTables(0, "pae")}, "pages", "'4level' or '5level'"),
    ):
        arguments: dict[str, Any] = {"entry": entry, "stack": stack, "pages": own_pages()} | options
        before = everything(machine)
        with pytest.raises(ArgumentError) as error:
            machine.vcpu.long_mode(**arguments)
        assert error.value.field == field, options
        assert says in str(error.value)
        assert everything(machine) == before


# ---- refusals ----


@pytest.mark.parametrize(
    ("mode", "arguments", "field", "says"),
    [
        ("protected_mode", {"entry": RAM}, "entry", "[0x0, 0x200000)"),
        ("protected_mode", {"entry": 1 << 32}, "entry", "0 to 0xffffffff"),
        ("protected_mode", {"entry": -1}, "entry", "0 to 0xffffffff"),
        ("protected_mode", {"entry": 0x1FA123}, "entry", "the tables are there"),
        ("protected_mode", {"entry": 0x10000, "bits": 16}, "entry", "0 to 0xffff"),
        ("protected_mode", {"bits": 64}, "bits", "32, 16"),
        ("protected_mode", {"stack": 0}, "stack", "below which the stack grows"),
        ("protected_mode", {"stack": RAM + 1}, "stack", "RAM below it"),
        ("protected_mode", {"stack": 0x1FA001}, "stack", "the tables are there"),
        ("protected_mode", {"stack": 0x10001, "bits": 16}, "stack", "0 to 0x10000"),
        ("protected_mode", {"tables": 0x1001}, "tables", "a multiple of 0x1000"),
        ("protected_mode", {"tables": RAM - 0x5000}, "tables", "0x6000 bytes within one of [0x0, 0x200000)"),
        ("protected_mode", {"tables": RAM}, "tables", "not in RAM"),
        ("protected_mode", {"tables": -0x1000}, "tables", "0 to"),
        ("protected_mode", {"tables": ENTRY & ~0xFFF}, "entry", "the tables are there"),
        ("protected_mode", {"paging": "4level"}, "paging", "None, '32bit', 'pae'"),
        ("protected_mode", {"handlers": {256: 0}}, "handlers", "0 to 0xff"),
        ("protected_mode", {"handlers": {6: 1 << 32}}, "handlers[6]", "0 to 0xffffffff"),
        ("protected_mode", {"handlers": Idt(64)}, "handlers", "32- or 16-bit gates"),
        ("protected_mode", {"ports": [0x10000]}, "ports[0]", "0 to 0xffff"),
        ("protected_mode", {"ports": [range(0xFFFF, 0x10001)]}, "ports[0]", "0 to 0xffff"),
        ("long_mode", {"handlers": {6: 1 << 47}}, "handlers[6]", "a canonical address"),
        ("long_mode", {"handlers": Idt(32)}, "handlers", "64-bit gates"),
        ("long_mode", {"entry": 1 << 47}, "entry", "a canonical address"),
        ("long_mode", {"entry": 0x80000000}, "entry", "not in RAM"),
        ("long_mode", {"entry": 1 << 40}, "entry", "do not map"),
        ("long_mode", {"levels": 3}, "levels", "4, 5"),
        ("long_mode", {"levels": True}, "levels", "4, 5"),
        ("long_mode", {"levels": 4.0}, "levels", "4, 5"),
        ("long_mode", {"levels": 5, "pages": PageTables(0x40000, "4level")}, "levels", "4, as `pages`"),
        ("long_mode", {"bits": 8}, "bits", "64, 32, 16"),
        ("long_mode", {"bits": 64.0}, "bits", "64, 32, 16"),
        ("long_mode", {"user": "no"}, "user", "False, True"),
        ("protected_mode", {"user": 1}, "user", "False, True"),
        ("vm86_mode", {"entry": 0x10FFF0}, "entry", "0 to 0x10ffef"),
        ("vm86_mode", {"cs": 0x7C1}, "cs", "within 64 KiB"),
        ("vm86_mode", {"sp": 0x10000}, "sp", "0 to 0xffff"),
        ("vm86_mode", {"iopl": 4}, "iopl", "0 to 3"),
    ],
)
def test_arguments_that_are_refused(
    machine: hv.Machine, mode: str, arguments: dict[str, Any], field: str, says: str
) -> None:
    machine.load(ENTRY, WHERE)
    machine.vcpu.protected_mode(ENTRY, user=True)  # something to be kept
    before = everything(machine)
    with pytest.raises(ArgumentError) as error:
        getattr(machine.vcpu, mode)(**({"entry": ENTRY} | arguments))
    assert error.value.field == field
    assert says in str(error.value)
    assert everything(machine) == before


@pytest.mark.parametrize(
    ("mode", "arguments", "field"),
    [
        ("protected_mode", {"entry": "0x7c00"}, "entry"),
        ("protected_mode", {"entry": True}, "entry"),
        ("protected_mode", {"stack": 1.0}, "stack"),
        ("protected_mode", {"tables": "1M"}, "tables"),
        ("protected_mode", {"handlers": [1]}, "handlers"),
        ("protected_mode", {"handlers": {"6": 0}}, "handlers"),
        ("protected_mode", {"handlers": {6: None}}, "handlers[6]"),
        ("protected_mode", {"ports": 5}, "ports"),
        ("protected_mode", {"ports": ["5"]}, "ports[0]"),
        ("long_mode", {"pages": b""}, "pages"),
        ("vm86_mode", {"cs": "0"}, "cs"),
        ("vm86_mode", {"iopl": None}, "iopl"),
    ],
)
def test_types_that_are_refused(machine: hv.Machine, mode: str, arguments: dict[str, Any], field: str) -> None:
    machine.load(ENTRY, WHERE)
    before = everything(machine)
    with pytest.raises(ArgumentTypeError) as error:
        getattr(machine.vcpu, mode)(**({"entry": ENTRY} | arguments))
    assert error.value.field == field
    assert everything(machine) == before


def test_too_little_ram() -> None:
    need("kvm")
    with hv.Machine(ram="32K") as machine:
        machine.load(0x1000, WHERE)
        machine.vcpu.protected_mode(0x1000)
        assert outs(machine)[0][0x10] == WIDTH[32]
        with pytest.raises(ArgumentError, match="0xc000 bytes of RAM in one piece"):
            machine.vcpu.long_mode(0x1000)


def test_paging_that_kvm_drops_leaves_no_trace(machine: hv.Machine) -> None:
    machine.load(ENTRY, WHERE)
    machine.vcpu.long_mode(ENTRY, user=True)
    before = everything(machine)
    for paging in ("32bit", "pae"):
        try:
            machine.vcpu.protected_mode(ENTRY, paging=paging, tables=0x40000, handlers={0: ENTRY})  # type: ignore[arg-type]
        except ChangedStateError as error:
            assert (error.part, error.field, error.value >> 31, error.became >> 31) == ("sregs", "cr0", 1, 0)  # type: ignore[operator]  # noqa: PT017
            assert "CR0.PG" in str(error)  # noqa: PT017
        else:
            pytest.skip("this KVM pages outside long mode")
        assert everything(machine) == before
    written, end = outs(machine)  # and it runs
    assert (written[0x10], end) == (WIDTH[64], hv.Shutdown())


def test_virtual_8086_mode_that_kvm_drops_leaves_no_trace(machine: hv.Machine) -> None:
    machine.load(ENTRY, WHERE)
    machine.vcpu.long_mode(ENTRY, user=True)
    before = everything(machine)
    try:
        machine.vcpu.vm86_mode(ENTRY, tables=0x40000)
    except ChangedStateError as error:
        assert (error.part, error.field, error.value, error.became) == ("regs", "rflags", 0x23002, 0x3002)  # noqa: PT017
    else:
        pytest.skip("this KVM has virtual-8086 mode")
    assert everything(machine) == before
    assert outs(machine)[0][0x10] == WIDTH[64]


PG = 1 << 31


def dropped_by_cpu(machine: hv.Machine) -> None:
    sregs = machine.vcpu.sregs
    machine.vcpu.sregs = sregs.replace(cr0=sregs.cr0 | PG)


def dropped_by_state(machine: hv.Machine) -> None:
    state = VcpuState.get(machine.vcpu)
    state.replace(**{"sregs2.cr0": state.sregs2.cr0 | PG}).put(machine.vcpu)


def dropped_by_one_part(machine: hv.Machine) -> None:
    state = VcpuState.get(machine.vcpu, ["sregs"])
    state.replace(**{"sregs.cr0": state.sregs.cr0 | PG}).put(machine.vcpu)


def dropped_by_synchronizer(machine: hv.Machine) -> None:
    sync = synchronizer(machine.vcpu)
    sync.env = (env := sync.synchronize_state()).replace(**{"sregs2.cr0": env.sregs2.cr0 | PG})
    try:
        sync.flush()
    finally:
        assert sync.vcpu_dirty
        sync.env = env


def dropped_by_mode(machine: hv.Machine) -> None:
    machine.vcpu.protected_mode(ENTRY, paging="32bit")


DROPS = [dropped_by_cpu, dropped_by_state, dropped_by_one_part, dropped_by_synchronizer, dropped_by_mode]


@pytest.mark.parametrize("drop", DROPS)
def test_paging_that_kvm_drops_leaves_a_vcpu_that_runs(machine: hv.Machine, drop: Callable[[hv.Machine], None]) -> None:
    # kvm_pvm has a triple fault waiting then, which nothing shows.
    machine.load(ENTRY, WHERE)
    machine.vcpu.protected_mode(ENTRY)
    sregs, events = machine.vcpu.sregs, bytes(ffi.buffer(machine.vcpu.kvm.vcpu_events))
    try:
        drop(machine)
    except ChangedStateError as error:
        assert (error.field, error.value) == ("cr0", error.became | PG)  # type: ignore[operator]  # noqa: PT017
    else:
        pytest.skip("this KVM pages outside long mode")
    assert machine.vcpu.sregs == sregs
    assert bytes(ffi.buffer(machine.vcpu.kvm.vcpu_events)) == events
    assert outs(machine)[1] == hv.Hlt()


START: dict[str, Callable[[Cpu], object]] = {
    "reset": lambda cpu: (cpu.reset(), cpu.real_mode(ENTRY)),
    "real_mode": lambda cpu: cpu.real_mode(ENTRY),
    "protected_mode": lambda cpu: cpu.protected_mode(ENTRY),
    "long_mode": lambda cpu: cpu.long_mode(ENTRY),
}


@pytest.mark.parametrize("start", START)
def test_a_state_to_start_in_has_no_triple_fault_waiting(machine: hv.Machine, start: str) -> None:
    # One that is put as such, and the one of kvm_pvm behind the library's back.
    cpu, vm = machine.vcpu, machine.vm
    machine.load(ENTRY, WHERE)
    machine.write(0xFFF0, b"\xf4")
    cpu.protected_mode(ENTRY)
    raw = cpu.kvm.sregs
    raw.cr0 |= PG
    cpu.kvm.sregs = raw
    START[start](cpu)
    assert not cpu.kvm.vcpu_events.flags & TRIPLE_FAULT  # the capability is as it was
    assert outs(machine)[1] == hv.Hlt()
    if vm.check_extension(lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT) <= 0:
        pytest.skip("needs KVM_CAP_X86_TRIPLE_FAULT_EVENT")
    vm.enable_cap(lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    for is_dropped in (False, True):
        cpu.real_mode(ENTRY)
        events = cpu.kvm.vcpu_events
        events.triple_fault.pending = 1
        cpu.kvm.vcpu_events = events
        if is_dropped:
            START[start](cpu)
            assert cpu.kvm.vcpu_events.flags & TRIPLE_FAULT
        assert outs(machine)[1] == (hv.Hlt() if is_dropped else hv.Shutdown())


def test_a_kernel_that_does_not_show_triple_faults_gets_the_events(
    machine: hv.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvm = machine.vcpu.kvm
    monkeypatch.setattr(type(machine.vm), "_open_fd", lambda vm: -1)  # KVM_ENABLE_CAP: EBADF
    events = kvm.vcpu_events
    events.nmi.masked = 1
    drop_triple_fault(kvm, events)
    assert kvm.vcpu_events.nmi.masked == 1
    drop_triple_fault(kvm)
    assert kvm.vcpu_events.nmi.masked == 1


@pytest.mark.parametrize("field", ["regs", "vcpu_events", "mp_state"])
def test_a_late_refusal_leaves_no_trace(machine: hv.Machine, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    # No host refuses these: what is set is spoiled on its way.
    from hvmodel.machine import cpu as of_cpu
    from hvmodel.machine import modes

    cpu = machine.vcpu
    machine.load(ENTRY, WHERE)
    cpu.protected_mode(ENTRY, user=True)
    before = everything(machine)
    if field == "regs":
        monkeypatch.setattr(modes, "Regs", lambda **_: "no registers")
    elif field == "vcpu_events":
        monkeypatch.setattr(cpu, "_no_events", ["no events"])
    else:
        monkeypatch.setattr(of_cpu, "_RUNNABLE", None)
    with pytest.raises((TypeError, hv.HvError)):
        cpu.long_mode(ENTRY, handlers={0: ENTRY})
    monkeypatch.undo()
    assert everything(machine) == before


def test_what_cannot_be_put_back_is_told_of(machine: hv.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    # KVM_SET_MSRS clears EFER.LME under paging and keeps LMA; KVM_SET_SREGS refuses the two together.
    from hvmodel.machine import modes

    cpu = machine.vcpu
    machine.load(ENTRY, WHERE)
    cpu.long_mode(ENTRY)
    cpu.kvm.set_msrs({0xC0000080: 0})
    assert cpu.sregs.efer == 0x400
    regs, memory = cpu.regs, machine.read(0, RAM)
    monkeypatch.setattr(modes, "Regs", lambda **_: "no registers")
    with pytest.raises(ArgumentTypeError) as caught:
        cpu.vm86_mode(ENTRY, tables=0x40000)
    monkeypatch.undo()
    (note,) = caught.value.__notes__
    assert note.startswith("sregs could not be put back")
    assert "EFER.LMA" in note
    assert (cpu.regs, machine.read(0, RAM)) == (regs, memory)


def test_an_unanswered_read_comes_first(machine: hv.Machine) -> None:
    machine.load(ENTRY, bytes.fromhex("e410 f4"))
    machine.vcpu.real_mode(ENTRY)
    assert next(machine.exits(10)) == hv.IoIn(0x10, 1, 1)
    memory = machine.read(0, RAM)
    for enter_mode in (machine.vcpu.protected_mode, machine.vcpu.long_mode, machine.vcpu.vm86_mode):
        with pytest.raises(hv.UnansweredError):
            enter_mode(ENTRY)
        assert machine.read(0, RAM) == memory
    machine.answer(1)
    machine.load(ENTRY, WHERE)
    machine.vcpu.long_mode(ENTRY)
    assert outs(machine)[0][0x10] == WIDTH[64]


def test_a_vcpu_without_a_machine() -> None:
    need("kvm")
    with Kvm() as kvm, kvm.create_vm() as vm:
        cpu = Cpu(vm.create_vcpu(0), lambda _gpa, _size: b"")
        with pytest.raises(ArgumentError, match="it has no RAM"):
            cpu.long_mode(0x1000)


def test_a_cpuid_without_long_mode(machine: hv.Machine) -> None:
    kvm = machine.vcpu.kvm
    machine.load(ENTRY, WHERE)
    kvm.set_cpuid2([entry for entry in kvm.get_cpuid2() if entry.function < 0x80000001])
    with pytest.raises(ArgumentError, match="no LM"):
        machine.vcpu.long_mode(ENTRY)


def test_tables_are_written_by_the_host(machine: hv.Machine) -> None:
    machine.load(ENTRY, WHERE)
    machine.ram.take_host_dirty()
    at = machine.vcpu.long_mode(ENTRY)
    written = {page for pages in machine.ram.take_host_dirty() for page in pages}
    # GDT, TSS with its bitmap (three pages), PML4, PDPT, four PDs
    start = at.start >> 12
    assert written == {start + n for n in (0, 2, 3, 4, 6, 7, 8, 9, 10, 11)}


# ---- QEMU's CPU on our tables ----


def flags_of(word: int) -> int:
    """The second dword of a descriptor without its base and its accessed bit."""
    return word & 0x00F0FE00


@pytest.mark.parametrize("is_long", [False, True])
def test_qemu_loads_the_descriptors(machine: hv.Machine, tmp_path: Path, is_long: bool) -> None:
    need("qemu")
    machine.load(ENTRY, WHERE)
    call = machine.vcpu.long_mode if is_long else machine.vcpu.protected_mode
    at = call(ENTRY)
    memory = {at.start: machine.read(at.start, at.size)}
    names = [name for name in SELECTORS if name not in ("task", "data", "user_code64")]
    limits = {True: 0xFFFF, False: 0xFFFFFFFF}
    for first in range(0, len(names), 4):
        loaded = dict(zip(("ES", "FS", "GS", "DS"), names[first : first + 4], strict=False))
        # lgdt [cs:pointer]; into protected mode; selectors into segments; ltr; 16-bit code all along
        code = bytes.fromhex("662e0f0116 0010") + set_registers(cr0=0x11)
        for segment, name in loaded.items():
            opcode = {"ES": "8ec0", "FS": "8ee0", "GS": "8ee8", "DS": "8ed8"}[segment]
            code += b"\xb8" + SELECTORS[name].to_bytes(2, "little") + bytes.fromhex(opcode)
        code += b"\xb8\x58\x00" + bytes.fromhex("0f00d8") if not is_long else b""
        pointer = (0x67).to_bytes(2, "little") + at.gdt.to_bytes(4, "little")
        code = (code + b"\xfa\xf4").ljust(0x1000, b"\x90") + pointer
        with qemu_cpu(tmp_path, code, memory) as cpu:
            rows = rows_of(cpu)
            task = cpu.read(at.gdt + 0x58, 8)
        for segment, name in loaded.items():
            bits = 16 if name.endswith("16") else 64 if name == "code" and is_long else 32
            is_code, dpl = "code" in name, SELECTORS[name] & 3
            kind = (0xA if is_code else 0x2) | 0x10 | dpl << 5 | 0x80
            flags = (bits == 64) << 21 | (bits == 32) << 22 | (bits != 16) << 23
            limit = limits[bits == 16]
            flags |= (limit >> 12 if bits != 16 else limit) & 0xF0000
            selector, base, got, word = rows[segment]
            assert (selector, base, got) == (SELECTORS[name], 0, limit), name
            assert flags_of(word) == flags_of(kind << 8 | flags), name
        if not is_long:
            selector, base, limit, word = rows["TR"]
            assert (selector, base, limit) == (0x58, at.tss, 0x2068)
            # A 32-bit TSS: LTR takes an available one, and marks it busy in the table.
            assert word >> 8 & 0xFF in (0x89, 0x8B)
            assert task[5] == 0x8B


def rows_of(cpu: QemuCpu) -> dict[str, tuple[int, int, int, int]]:
    """`info registers`: selector, base, limit and attributes of the segments."""
    rows = {}
    for line in cpu.registers().splitlines():
        name, _, rest = line.partition("=")
        words = rest.split()
        if name.strip() in ("ES", "CS", "SS", "DS", "FS", "GS", "LDT", "TR"):
            selector, base, limit, word = (int(text, 16) for text in words[:4])
            rows[name.strip()] = selector, base, limit, word
    return rows


def test_qemu_runs_on_the_tables(machine: hv.Machine, tmp_path: Path) -> None:
    # Into long mode and to CPL 3 with our GDT, IDT, TSS and page tables; a #PF comes back on RSP0.
    need("qemu", "gcc")
    machine.load(ENTRY, WHERE)
    # mov [0x1ff000], al at CPL 3; the handler: mov rax, cr2; push rax; cli; hlt
    user, handler = bytes.fromhex("88042500f01f00"), bytes.fromhex("0f20d0 50 fa f4")
    at = machine.vcpu.long_mode(ENTRY, user=True, handlers={14: 0x9000})
    assert at.cr3 is not None
    assert at.idt is not None
    frame = b"".join(  # RIP, CS, RFLAGS, RSP, SS
        value.to_bytes(8, "little") for value in (0xA000, SELECTORS["user_code64"], 2, 0x8000, SELECTORS["user_data"])
    )
    pointers = (0x67).to_bytes(2, "little") + at.gdt.to_bytes(4, "little") + bytes(2)
    pointers += (0xFFF).to_bytes(2, "little") + at.idt.to_bytes(8, "little")
    # 64-bit: lidt [0x6008]; mov ax, 0x58; ltr ax; mov rsp, 0x6100; iretq
    long_code = bytes.fromhex("0f011c2508600000 66b85800 0f00d8 48c7c400610000 48cf")
    memory = {at.start: machine.read(at.start, at.size), 0x6000: pointers, 0x6100: frame}
    memory |= {0x5000: long_code, 0x9000: handler, 0xA000: user}
    # 16-bit: lgdt [0x6000]; the registers; ljmpl $0x08, $0x5000
    code = bytes.fromhex("660f0116 0060") + set_registers(cr0=0x80010011, cr3=at.cr3, cr4=0x20, efer=0x900)
    code += bytes.fromhex("66ea 00500000 0800")
    with qemu_cpu(tmp_path, code, memory) as cpu:
        state, rows = cpu.registers(), rows_of(cpu)
        saved = cpu.read(at.kernel_stack - 56, 56)
    assert "CPL=0" in state
    assert rows["TR"][:3] == (0x58, at.tss, 0x2068)
    assert rows["CS"][0] == SELECTORS["code"]
    words = [int.from_bytes(saved[offset : offset + 8], "little") for offset in range(0, 56, 8)]
    # CR2; error code: present, write, of CPL 3; RIP, CS, RFLAGS (RF and fixed), RSP, SS
    assert words[:4] == [0x1FF000, 7, 0xA000, SELECTORS["user_code64"]]
    assert words[4] & 0x3202 == 2
    assert words[5:] == [0x8000, SELECTORS["user_data"]]
