"""sync: what the registers cost that are looked at at every exit, against the same exit without.

    nothing       Vcpu.run() per exit; the registers come along (KVM_CAP_SYNC_REGS), nobody looks
    rip and rax   cpu.rip and cpu.rax
    values        cpu.regs and cpu.sregs, kept as values
    all fields    the same, and every field of both looked at

"to one without" holds a way against "nothing"; the other rows hold it against C, which does the same with the kvm_run
page.  The guest writes a byte to a port for ever: in real mode, and from CPL3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from . import harness
from .guests import assemble
from .harness import BenchmarkError, FloorVm, Pace, Result
from .subject import Subject

__all__ = ["run"]

NOTHING, TWO, ALL = 0, 1, 2  # of floor/sync.c


class Case(NamedTuple):
    """One guest: its name in the results, its source, exits per turn."""

    name: str
    guest: str
    exits: int


CASES = (Case("real mode", "pio", 2_000), Case("CPL3", "user", 800))
BARS = {"rip and rax": 1.05, "values": 1.15, "all fields": None}


def run(pace: Pace) -> list[Result]:
    """Both guests, one after the other; the ways take turns within each."""
    lib = harness.load_floor("sync")
    lib.floor_sync.restype = ctypes.c_int64
    lib.floor_sync.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    return [result for case in CASES for result in _case(lib, pace, case)]


def _case(lib: ctypes.CDLL, pace: Pace, case: Case) -> list[Result]:
    from hvmodel.machine import Cpu

    image, cpuid = assemble(case.guest), case.guest == "user"
    exits = pace.count(case.exits)
    with ExitStack() as stack:
        floor = stack.enter_context(FloorVm(lib, image, cpuid=cpuid))

        def cpu() -> Cpu:
            return Cpu(stack.enter_context(Subject(image, cpuid=cpuid)).vcpu, lambda _gpa, _size: b"")

        def c(what: int) -> Callable[[], object]:
            return lambda: harness.checked(lib.floor_sync(floor.address, exits, what), "the C floor")

        one = cpu()
        ways: dict[str, Callable[[], object]] = {
            "C nothing": c(NOTHING),
            "nothing": lambda: _nothing(one, exits),
            "C rip and rax": c(TWO),
            "rip and rax": lambda: _two(one, exits),
            "C values": c(ALL),
            "values": lambda: _values(one, exits),
            "all fields": lambda: _fields(one, exits),
        }
        _compare(case.name, one)
        best = harness.interleave(pace, {way: _timed(work, exits) for way, work in ways.items()})
    rows = [harness.against_floor(f"{case.name}, nothing", best["nothing"], "us/exit", best["C nothing"], None)]
    for way, bar in BARS.items():
        name = f"{case.name}, {way}"
        rows.append(harness.against_floor(f"{name}, to one without", best[way], "us/exit", best["nothing"], bar))
        if f"C {way}" in best:
            rows.append(harness.against_floor(name, best[way], "us/exit", best[f"C {way}"], None))
    return rows


def _timed(work: Callable[[], object], exits: int) -> Callable[[], float]:
    return lambda: harness.per_item_us(work, exits)


def _compare(name: str, cpu: Any) -> None:
    # What is timed is what KVM_GET_REGS and KVM_GET_SREGS say.
    from hvmodel._ffi import ffi

    for _ in range(3):
        cpu.kvm.run()
        ours = bytes(cpu.regs), bytes(cpu.sregs), cpu.rip, cpu.rax
        regs, sregs = cpu.kvm.regs, cpu.kvm.sregs
        if ours != (bytes(ffi.buffer(regs)), bytes(ffi.buffer(sregs)), regs.rip, regs.rax):
            raise BenchmarkError(f"{name}: the registers of an exit are not those that KVM_GET_REGS gives")


def _nothing(cpu: Any, exits: int) -> None:
    enter = cpu.kvm.run
    for _ in range(exits):
        enter()


def _two(cpu: Any, exits: int) -> object:
    enter = cpu.kvm.run
    rip = rax = None
    for _ in range(exits):
        enter()
        rip, rax = cpu.rip, cpu.rax
    return rip, rax


def _values(cpu: Any, exits: int) -> object:
    enter = cpu.kvm.run
    regs = sregs = None
    for _ in range(exits):
        enter()
        regs, sregs = cpu.regs, cpu.sregs
    return regs, sregs


def _fields(cpu: Any, exits: int) -> object:
    enter = cpu.kvm.run
    seen = None
    for _ in range(exits):
        enter()
        seen = list(cpu.regs.items()), list(cpu.sregs.items())
    return seen
