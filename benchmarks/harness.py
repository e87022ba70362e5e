"""How a benchmark is run: C floors built and loaded, variants interleaved, results judged and printed.

Owns the JSON object of `--json`, the text beside it and the rule of measurement: every variant is warmed up once, then
all take turns, and each is represented by the best of them.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

__all__ = [
    "FLOOR_CPUID",
    "FLOOR_MACHINE",
    "RAM_SIZE",
    "BenchmarkError",
    "Curve",
    "Findings",
    "FloorVm",
    "Pace",
    "Result",
    "against_floor",
    "ceiling",
    "checked",
    "document",
    "host",
    "interleave",
    "load_floor",
    "median_us",
    "per_item_us",
    "rate_against_floor",
    "report",
]

FLOOR = Path(__file__).resolve().parent / "floor"
CFLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", "-shared", "-fPIC")
RAM_SIZE = 16 << 20
FLOOR_CPUID, FLOOR_MACHINE = 1, 2  # of floor/vm.h


class BenchmarkError(RuntimeError):
    """What a benchmark needs is not there, or a guest did something else than it should."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is done: `rounds` of `turns` turns each of every variant; `count` scales what one turn repeats."""

    rounds: int = 7
    turns: int = 10
    short: bool = False

    def count(self, full: int) -> int:
        """`full` repetitions, or a hundredth (at least 3) for a run that only shows that all works."""
        return max(3, full // 100) if self.short else full


@dataclass(frozen=True, slots=True)
class Result:
    """`value` and `floor` in `unit`, `ratio` = value / floor; `bar` limits the ratio, or without a floor the value.

    The bar is the most that holds; of a rate (a `unit` that ends in "/s") it is the least.
    """

    name: str
    value: float
    unit: str
    floor: float | None
    ratio: float | None
    bar: float | None
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot's panel: what `way` reached by size, and C; (bytes, value) each.  `panel` has the unit."""

    panel: str
    way: str
    points: list[tuple[int, float]]
    floor: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a benchmark found.  `lacks`: what could not be measured, and what the host lacks for it."""

    results: list[Result]
    lacks: dict[str, str] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)


def against_floor(name: str, value: float, unit: str, floor: float, bar: float | None) -> Result:
    """A result judged by its ratio to C."""
    ratio = value / floor
    return Result(name, value, unit, floor, ratio, bar, None if bar is None else ratio <= bar)


def rate_against_floor(name: str, value: float, unit: str, floor: float, bar: float | None) -> Result:
    """A rate (a `unit` that ends in "/s"), judged by how much of C's it reaches."""
    assert unit.endswith("/s"), unit
    ratio = value / floor
    return Result(name, value, unit, floor, ratio, bar, None if bar is None else ratio >= bar)


def ceiling(name: str, value: float, unit: str, bar: float | None) -> Result:
    """A result judged by its value."""
    return Result(name, value, unit, None, None, bar, None if bar is None else value <= bar)


def interleave(pace: Pace, variants: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Warm every variant up, then run A B C A B C ...; the least of each one's turns.

    A turn is short (some milliseconds), so that on a busy host each variant has turns that nothing interrupts.
    """
    for variant in variants.values():
        variant()
    turns = [{name: variant() for name, variant in variants.items()} for _ in range(pace.rounds * pace.turns)]
    return {name: min(figures[name] for figures in turns) for name in variants}


def per_item_us(work: Callable[[], object], items: int) -> float:
    """Microseconds that `work` takes for each of its items."""
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / items / 1000


def median_us(latencies_ns: Iterable[int]) -> float:
    """The median of nanoseconds, in microseconds."""
    return statistics.median(latencies_ns) / 1000


def load_floor(name: str) -> ctypes.CDLL:
    """Build benchmarks/floor/NAME.c with the VM it stands on and load it; the file is gone when this returns."""
    with tempfile.TemporaryDirectory(prefix="floor-") as build:
        library = Path(build, f"{name}.so")
        command = ["gcc", *CFLAGS, "-o", str(library), str(FLOOR / f"{name}.c"), str(FLOOR / "vm.c")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise BenchmarkError("gcc is not there: the C floors are built with it (apt install gcc)") from None
        if done.returncode != 0:
            raise BenchmarkError(f"the C floor {name!r} does not build: {' '.join(command)}\n{done.stderr}")
        lib = ctypes.CDLL(str(library), use_errno=True)
    lib.floor_new.restype = ctypes.c_void_p
    lib.floor_new.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    lib.floor_free.restype = None
    lib.floor_free.argtypes = [ctypes.c_void_p]
    return lib


class FloorVm:
    """A VM of the C side with a guest at 0x7C00; `with` closes it."""

    def __init__(self, lib: ctypes.CDLL, image: bytes, *, cpuid: bool = False) -> None:
        self._lib = lib
        self.address: int | None = lib.floor_new(image, len(image), RAM_SIZE, FLOOR_CPUID if cpuid else 0)
        if not self.address:
            raise BenchmarkError(f"the C floor cannot make a VM: {os.strerror(ctypes.get_errno())}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.address:
            self._lib.floor_free(self.address)
        self.address = None


def checked(rc: int, what: str) -> int:
    """`rc` of a floor's function, or the error that a negative one stands for."""
    if rc < 0:
        raise BenchmarkError(f"{what}: {os.strerror(-rc)}")
    return rc


def host() -> dict[str, object]:
    """The machine the figures are true for."""
    from hvmodel.kvm import vendor_module

    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "kernel": platform.release(),
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "vendor_module": vendor_module(),
        "python": platform.python_version(),
    }


def document(name: str, found: Findings) -> dict[str, object]:
    """The JSON object of a benchmark; `host` has a key "lacks" where there was something to leave out."""
    machine = {**host(), "lacks": found.lacks} if found.lacks else host()
    return {"benchmark": name, "host": machine, "results": [asdict(result) for result in found.results]}


def report(name: str, found: Findings) -> None:
    """Print a table for people."""
    machine = host()
    print(f"{name}: Linux {machine['kernel']}, {machine['vendor_module']}, Python {machine['python']}")
    print(f"  on {machine['cpu']} x {machine['cpus']}; C: the floor; x: ratio to it")
    width = max((len(result.name) for result in found.results), default=0)
    for result in found.results:
        print(f"  {result.name:<{width}}  {_line(result)}")
    for what, why in found.lacks.items():
        print(f"  not measured: {what}: {why}")


def _line(result: Result) -> str:
    text = f"{result.value:9.2f} {result.unit}"
    if result.floor is not None:
        text += f"   C {result.floor:9.2f}   x {result.ratio:.3f}"
    if result.bar is not None:
        least = "at least " if result.unit.endswith("/s") else ""
        text += f"   bar {least}{result.bar:g}   {'holds' if result.holds else 'MISSED'}"
    return text
