"""The machine's vCPU: the states it starts in, any real-mode address, and where it is.

Expected: Intel SDM vol. 3 table 10-1 and section 21.1, and what the guest itself reports.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import hvmodel as hv
from hvmodel._ffi import lib
from hvmodel.kvm import triple_fault
from hvmodel.machine import Cpu, Location
from hvmodel.state import VcpuState
from tests.cases import cases
from tests.need import need

END = 0x10FFF0  # first address that no CS:IP reaches


@pytest.fixture
def machine() -> Iterator[hv.Machine]:
    need("kvm")
    with hv.Machine(ram="2M") as machine:
        yield machine


# call 1f; 1: pop ax; out 0x10, ax; mov ax, cs; out 0x11, ax; hlt
WHERE = bytes.fromhex("e80000 58 e710 8cc8 e711 f4")


def reported(machine: hv.Machine, entry: int) -> tuple[int, int]:
    """CS and IP as the guest sees them at its first instruction."""
    out: dict[int, int] = {}
    for exit in machine.exits(timeout=10):
        if exit == hv.Hlt():
            return out[0x11], out[0x10] - 3
        assert isinstance(exit, hv.IoOut), exit
        out[exit.port] = exit.value
    pytest.fail("no hlt")


@settings(max_examples=cases(100, 3000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entry=st.integers(0, END - 1 - len(WHERE)), sp=st.sampled_from([0x7C00, 0, 0x500, 0xFFFE]))
@example(0x7C00, 0x7C00)
@example(0, 0x7C00)
@example(0xFFFF0, 0x7C00)
@example(0x100000, 0x7C00)
@example(END - 1 - len(WHERE), 0x7C00)
@example(0x10000, 0x7C00)
def test_real_mode_anywhere(machine: hv.Machine, entry: int, sp: int) -> None:
    stack = ((sp - 2) % 0x10000, (sp - 2) % 0x10000 + 2)
    assume(not (entry < stack[1] and stack[0] < entry + len(WHERE)))
    # As documented: 0 in the first 64 KiB, then the 64 KiB before the entry, 0xffff above 1 MiB.
    cs = 0xFFFF if entry >= 0x100000 else entry >> 16 << 12
    assume(entry - (cs << 4) + len(WHERE) <= 0x10000)  # or IP would wrap
    machine.load(entry, WHERE)
    machine.vcpu.real_mode(entry, sp=sp)
    assert machine.vcpu.location() == Location(cs, entry - (cs << 4), entry, machine.read(entry, 15))
    assert reported(machine, entry) == (cs, entry - (cs << 4))
    assert machine.vcpu.regs.rsp == sp
    machine.write(entry, bytes(len(WHERE)))


@settings(max_examples=cases(100, 3000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cs=st.integers(0, 0xFFFF), ip=st.integers(0, 0xFFFF - len(WHERE)))
@example(0x07C0, 0)
@example(0xFFFF, 0)
@example(0xF000, 0xFFF0)
def test_real_mode_by_any_selector(machine: hv.Machine, cs: int, ip: int) -> None:
    entry = (cs << 4) + ip
    assume(not (entry < 0x7C00 and entry + len(WHERE) > 0x7BFE))
    machine.load(entry, WHERE)
    machine.vcpu.real_mode(entry, cs=cs)
    assert reported(machine, entry) == (cs, ip)
    machine.write(entry, bytes(len(WHERE)))


def test_the_registers_that_real_mode_sets(machine: hv.Machine) -> None:
    machine.load(0x7C00, b"\xfb\xf4")
    machine.vcpu.real_mode(0x7C00)
    machine.run(10)  # leaves interrupts on, and the vCPU elsewhere
    machine.vcpu.real_mode(0x12345, sp=0x1234)
    regs, sregs = machine.vcpu.regs, machine.vcpu.sregs
    assert (regs.rip, regs.rsp, regs.rflags) == (0x2345, 0x1234, 2)
    assert not any((regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.r8, regs.r15))
    assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0x1000, 0x10000, 0xFFFF)
    for name in ("ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        assert (segment.selector, segment.base, segment.limit, segment.present) == (0, 0, 0xFFFF, 1), name
    assert (sregs.idt.base, sregs.idt.limit, sregs.cr0 & 1, sregs.cr0 >> 31, sregs.efer) == (0, 0xFFFF, 0, 0, 0)
    assert machine.vcpu.kvm.mp_state.mp_state == lib.KVM_MP_STATE_RUNNABLE


def test_reset_is_at_the_reset_vector(machine: hv.Machine) -> None:
    machine.vcpu.real_mode(0x7C00)
    machine.vcpu.reset()
    regs, sregs = machine.vcpu.regs, machine.vcpu.sregs
    assert (sregs.cs.selector, sregs.cs.base, regs.rip) == (0xF000, 0xFFFF0000, 0xFFF0)
    assert (regs.rflags, sregs.cr0) == (2, 0x60000010)
    assert machine.vcpu.location().linear == 0xFFFFFFF0


def test_a_state_is_set_from_every_mode(machine: hv.Machine) -> None:
    # A triple fault in protected mode, and back to real mode.
    from tests.guests import assemble

    need("gcc")
    machine.load(0x7C00, assemble("triple"))
    machine.vcpu.real_mode(0x7C00)
    assert machine.run(10).reason == "shutdown"
    machine.load(0x8000, WHERE)
    machine.vcpu.real_mode(0x8000)
    assert reported(machine, 0x8000) == (0, 0x8000)


def test_setting_state_finishes_the_exit_first(machine: hv.Machine) -> None:
    machine.load(0x7C00, bytes.fromhex("e410 f4"))
    machine.vcpu.real_mode(0x7C00)
    assert next(machine.exits(10)) == hv.IoIn(0x10, 1, 1)
    regs, sregs = machine.vcpu.regs, machine.vcpu.sregs
    for change in (
        machine.vcpu.real_mode,
        machine.vcpu.reset,
        lambda: setattr(machine.vcpu, "regs", regs),
        lambda: setattr(machine.vcpu, "sregs", sregs),
    ):
        with pytest.raises(hv.UnansweredError):
            change()
    assert machine.vcpu.location() == Location(0, 0x7C00, 0x7C00, machine.read(0x7C00, 15))
    machine.vcpu.answer(0x99)
    machine.load(0x9000, bytes.fromhex("e611 f4"))
    machine.vcpu.real_mode(0x9000)
    assert next(machine.exits(10)) == hv.IoOut(0x11, 1, 1, b"\0")  # AL is the new state's, not the read's


def test_instruction_bytes_as_far_as_there_is_ram(machine: hv.Machine) -> None:
    machine.write(0x1FFFF0, bytes(range(16)))
    machine.vcpu.sregs = machine.vcpu.sregs.replace(**{"cs.base": 0x1F0000, "cs.selector": 0x1F00})
    for offset, insn in ((0xFFF0, bytes(range(15))), (0xFFFA, bytes(range(10, 16))), (0xFFFF, b"\x0f")):
        machine.vcpu.rip = offset
        assert machine.vcpu.location().insn == insn


CR0_PE_PG, CR4_PAE, EFER_LME_LMA = 0x80000001, 0x20, 0x500


@pytest.mark.parametrize(
    ("long_mode", "cs_l", "base", "rip", "linear"),
    [
        (False, 0, 0x1000, 0x234, 0x1234),
        (False, 0, 0xFFFFF000, 0x2345, 0x1345),  # 32 bits
        (True, 1, 0, 0xFFFFFFFF80000000, 0xFFFFFFFF80000000),
        (True, 1, 0x1000, 0x234, 0x234),  # the base of CS does not count in 64-bit code
        (True, 0, 0x1000, 0x234, 0x1234),  # compatibility mode
        (True, 0, 0xFFFFF000, 0x2345, 0x1345),
    ],
)
def test_the_linear_address_of_every_mode(
    machine: hv.Machine, long_mode: bool, cs_l: int, base: int, rip: int, linear: int
) -> None:
    # Intel SDM vol. 3 section 3.4.4; linux:arch/x86/kvm/x86.c kvm_get_linear_rip.
    machine.vcpu.real_mode(0x7C00)
    kvm = machine.vcpu.kvm
    sregs, regs = kvm.sregs, kvm.regs
    if long_mode:
        sregs.cr3, sregs.cr4, sregs.efer = 0x10000, CR4_PAE, EFER_LME_LMA
        sregs.cr0 |= CR0_PE_PG
        sregs.cs.selector, sregs.cs.type, sregs.cs.l, sregs.cs.db = 8, 0xB, cs_l, 1 - cs_l
    sregs.cs.base = base
    regs.rip = rip
    kvm.sregs, kvm.regs = sregs, regs
    where = machine.vcpu.location()
    assert (where.rip, where.linear) == (rip, linear)


@pytest.mark.parametrize("smm", [0, 1])
def test_a_state_to_start_in_is_out_of_smm_where_there_is_smm(smm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # KVM_CAP_X86_SMM is asked for once; its flag makes KVM take events.smi, all zeros.
    asked, events = [], []

    class Fake:
        """What a new Cpu asks of a Vcpu."""

        id = 0
        _c = SimpleNamespace()
        _address = 0
        mp_state = None

        @property
        def vm(self) -> Any:
            return self

        def _note_calm(self) -> None:
            pass

        def check_extension(self, cap: int) -> int:
            asked.append(cap)
            return smm if cap == lib.KVM_CAP_X86_SMM else 0

    fake: Any = Fake()
    cpu = Cpu(fake, lambda _gpa, _size: b"")
    monkeypatch.setattr(
        triple_fault, "drop_triple_fault", lambda _, new: events.append((new.flags, new.smi.smm, new.smi.pending))
    )
    cpu._begin()
    cpu._begin()
    assert asked.count(117) == 1
    want = 0x1 | 0x4 | (0x8 if smm else 0)  # KVM_VCPUEVENT_VALID_NMI_PENDING, _SHADOW, _SMM
    assert events == [(want, 0, 0)] * 2


def test_a_state_to_start_in_looks_for_a_triple_fault_only_where_one_can_wait(
    boot: Callable[..., hv.Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = boot("f4")  # which has called real_mode()
    cpu, kvm = machine.vcpu, machine.vcpu.kvm
    looked, drop = [], triple_fault.drop_triple_fault

    def drops(*args: Any) -> None:
        looked.append(args)
        drop(*args)

    monkeypatch.setattr(triple_fault, "drop_triple_fault", drops)

    def put_events() -> None:
        kvm.vcpu_events = kvm.vcpu_events

    def put_sregs() -> None:
        kvm.sregs = kvm.sregs

    def sync() -> None:
        cpu.sync.synchronize_state()
        cpu.sync.flush()

    def read() -> None:
        machine.load(0x7C00, b"\xf4")
        assert cpu.rip in (0x7C00, 0xFFF0)
        assert cpu.sregs.cs.base in (0, 0xFFFF0000)

    changes: list[Callable[[], object]] = [
        lambda: machine.run(5),
        put_events,
        put_sregs,
        sync,
        lambda: VcpuState.get(cpu, ["events"]).put(cpu),
        lambda: kvm.ioctl("KVM_NMI"),
        lambda: cpu.inject_exception(6),
    ]
    for start in (cpu.real_mode, cpu.reset, lambda: cpu.protected_mode(0x7C00)):
        for change in changes:
            start()
            looked.clear()
            read()
            cpu.real_mode()
            assert not looked
            change()
            start()
            assert len(looked) == 1
    for _ in range(2):
        assert kvm.fd  # who has it may do anything, at any time
        looked.clear()
        cpu.real_mode()
        assert len(looked) == 1


def test_what_real_mode_costs() -> None:
    # On a vCPU that has not run: the registers, no events, runnable.  The APIC base is kept, so sregs are read.
    need("kvm", "strace")
    script = """
import os, hvmodel as hv
with hv.Machine(ram="64K") as machine:
    machine.load(0x7C00, bytes([0xF4]))
    for run in (False, False, True):
        os.getppid()
        machine.vcpu.real_mode()
        os.getppid()
        if run:
            machine.run(5)
            os.getppid()
            machine.vcpu.reset()
            os.getppid()
"""
    done = subprocess.run(
        ["strace", "-qq", "-e", "trace=ioctl,getppid", "-e", "signal=none", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    _, first, _, second, _, third, _, again, _ = re.split(r"^getppid.*$", done.stderr, flags=re.MULTILINE)
    calls = [re.findall(r"KVM_\w+", part) for part in (first, second, third, again)]
    least = ["KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_SET_REGS", "KVM_SET_VCPU_EVENTS", "KVM_SET_MP_STATE"]
    assert calls[:3] == [least] * 3
    # A guest may have left a triple fault.
    assert [name for name in calls[3] if name not in ("KVM_ENABLE_CAP", "KVM_GET_VCPU_EVENTS")] == least
    assert calls[3].count("KVM_ENABLE_CAP") in (0, 2)


@pytest.mark.parametrize("entry", [-1, END, 1 << 32, 1 << 70])
def test_entries_that_real_mode_does_not_reach(machine: hv.Machine, entry: int) -> None:
    with pytest.raises(hv.ArgumentError) as caught:
        machine.vcpu.real_mode(entry)
    assert (caught.value.call, caught.value.field, caught.value.value) == ("real_mode", "entry", entry)


@pytest.mark.parametrize(
    ("named", "field"),
    [
        ({"cs": -1}, "cs"),
        ({"cs": 0x10000}, "cs"),
        ({"cs": 0x7C1}, "cs"),  # begins behind the entry
        ({"entry": 0x20000, "cs": 0x1000}, "cs"),  # 64 KiB away
        ({"sp": -1}, "sp"),
        ({"sp": 0x10000}, "sp"),
    ],
)
def test_selectors_and_stacks_that_cannot_be(machine: hv.Machine, named: dict[str, int], field: str) -> None:
    with pytest.raises(hv.ArgumentError) as caught:
        machine.vcpu.real_mode(**named)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["entry", "cs", "sp"])
@pytest.mark.parametrize("value", ["0x7c00", 1.0, True, b"x"])
def test_arguments_of_other_types(machine: hv.Machine, field: str, value: object) -> None:
    with pytest.raises(hv.ArgumentTypeError, match=f"real_mode: {field}: expected an int"):
        machine.vcpu.real_mode(**{field: value})
