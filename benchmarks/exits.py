"""exits: what one exit costs, in C and in three ways from Python, with the same guest doing the same exit for ever.

    C batch       one call; C serves all exits and captures the bytes
    run()         Vcpu.run() per exit, the answer dropped
    typed         Vcpu.run() per exit, matched as IoOut or MmioWrite, its byte added up as the floor does

The guest writes the same byte each time; "every byte new" is the typed way where no exit is like the last.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from . import harness
from .guests import assemble
from .harness import BenchmarkError, FloorVm, Pace, Result
from .subject import Subject

__all__ = ["run"]

PORT = 0x10
MMIO_GPA = 0xD000_0000
BYTE = 0x55


class Bars(NamedTuple):
    """Bars of one guest; None: reported only."""

    batch: float | None = None
    run: float | None = None
    typed: float | None = None


class Case(NamedTuple):
    """One guest: its name in the results, source and defines, exits per turn, bars."""

    name: str
    guest: str
    defines: dict[str, int]
    exits: int
    bars: Bars


CASES = (
    Case("real mode", "pio", {}, 2_000, Bars(1.03, 1.08, 1.17)),
    Case("real mode, every byte new", "pio", {"CHANGE": 1}, 2_000, Bars()),
    Case("CPL3", "user", {}, 800, Bars(1.03, 1.05, 1.08)),
    Case("CPL3 MMIO", "user", {"MMIO": 1}, 800, Bars()),
)


def run(pace: Pace) -> list[Result]:
    """All guests, one after the other; the ways to handle an exit take turns within each."""
    lib = harness.load_floor("exits")
    lib.floor_exits.restype = ctypes.c_int64
    lib.floor_exits.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    return [result for case in CASES for result in _case(lib, pace, case)]


def _case(lib: ctypes.CDLL, pace: Pace, case: Case) -> list[Result]:
    image = assemble(case.guest, **case.defines)
    exits = pace.count(case.exits)
    cpuid = case.guest == "user"
    mmio = "MMIO" in case.defines
    with (
        FloorVm(lib, image, cpuid=cpuid) as floor,
        Subject(image, cpuid=cpuid) as batched,
        Subject(image, cpuid=cpuid) as stepped,
        Subject(image, cpuid=cpuid) as matched,
    ):
        batch_all = _batch(batched.vcpu, exits, mmio)
        sums = _mmio_sum if mmio else _pio_sum
        ways: dict[str, Callable[[], object]] = {
            "c": lambda: harness.checked(lib.floor_exits(floor.address, exits), "the C floor"),
            "batch": batch_all,
            "run": lambda: _step(stepped.vcpu, exits),
            "typed": lambda: sums(matched.vcpu, exits),
        }
        if "CHANGE" not in case.defines:
            for way in ("c", "batch", "typed"):
                if ways[way]() != exits * BYTE:
                    raise BenchmarkError(f"{case.name}: {way} did not see the bytes that the guest wrote")
        best = harness.interleave(pace, {way: _timed(work, exits) for way, work in ways.items()})
    c = best["c"]
    return [
        harness.against_floor(f"{case.name}, C batch", best["batch"], "us/exit", c, case.bars.batch),
        harness.against_floor(f"{case.name}, run()", best["run"], "us/exit", c, case.bars.run),
        harness.against_floor(f"{case.name}, typed", best["typed"], "us/exit", c, case.bars.typed),
    ]


def _timed(work: Callable[[], object], exits: int) -> Callable[[], float]:
    return lambda: harness.per_item_us(work, exits)


def _batch(vcpu: Any, exits: int, mmio: bool) -> Callable[[], int]:
    from hvmodel.kvm import Batch, Capture, Interrupted

    capture = Capture()
    batch = Batch(max_exits=exits)
    if mmio:
        batch.mmio(MMIO_GPA, 1, write=capture)
    else:
        batch.pio(PORT, 1, write=capture)
    vcpu.batch = batch

    def work() -> int:
        left = vcpu.run()
        data = capture.read()
        if left != Interrupted("limit") or len(data) != exits:
            raise BenchmarkError(f"the batch ended with {left!r} after {len(data)} bytes, not after {exits}")
        return sum(data)

    return work


def _step(vcpu: Any, exits: int) -> None:
    enter = vcpu.run
    for _ in range(exits):
        enter()


def _pio_sum(vcpu: Any, exits: int) -> int:
    from hvmodel.kvm import IoOut

    total = 0
    for _ in range(exits):
        match vcpu.run():
            case IoOut(port=0x10, data=data):
                total += data[0]
            case other:
                raise BenchmarkError(f"the guest left with {other!r}, not with a write to port {PORT:#x}")
    return total


def _mmio_sum(vcpu: Any, exits: int) -> int:
    from hvmodel.kvm import MmioWrite

    total = 0
    for _ in range(exits):
        match vcpu.run():
            case MmioWrite(gpa=0xD000_0000, data=data):
                total += data[0]
            case other:
                raise BenchmarkError(f"the guest left with {other!r}, not with a write to {MMIO_GPA:#x}")
    return total
