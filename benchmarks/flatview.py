"""flatview: what one change of a memory topology costs, listeners and slots included, and how that grows with it.

    a machine with 1,000 regions: 500 of RAM, each a memslot, and 500 of registers, in an address space with
        a KvmMemoryListener       which keeps the slots of a VM
        a listener in Python      which hears of everything, also of what stays
    one change: a region is disabled, enabled, moved; outside of a transaction, so that it is one

One change must take one ioctl, or two for what moves, whatever else there is.  How a commit grows is measured without
KVM, whose own cost grows with the slots: 10 to 10,000 regions, half of them overlapped by the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from . import harness
from .harness import BenchmarkError, Findings, Pace, Result

__all__ = ["run"]

REGIONS = 1_000
SIZES = (10, 100, 1_000, 10_000)
PAGE = 0x1000
COMMIT_BAR_MS = 5.0
GROWTH_BAR = 4.0  # of time over n log2 n, 10,000 regions to the best of 100 and 1,000; n * n gives 7.5 to 50


def run(pace: Pace) -> Findings:
    """Changes of one machine, by kind; then machines of all sizes."""
    return Findings([*_changes(pace), *_growth(pace)])


def _changes(pace: Pace) -> list[Result]:
    from hvmodel.kvm import Kvm
    from hvmodel.ram import AddressSpace, MemoryRegion, RamBlock, transaction
    from hvmodel.ram.kvm_listener import KvmMemoryListener

    with ExitStack() as stack:
        block = stack.enter_context(RamBlock("bench", REGIONS // 2 * PAGE))
        vm = stack.enter_context(stack.enter_context(Kvm()).create_vm())
        system = MemoryRegion.container("system", 1 << 64)
        space = stack.enter_context(AddressSpace(system, "memory"))
        ram = MemoryRegion.ram("ram", block)
        with transaction():
            regions = []
            for n in range(REGIONS // 2):
                regions.append(MemoryRegion.alias(f"ram{n}", ram, n * PAGE, PAGE))
                regions.append(MemoryRegion.io(f"io{n}", PAGE))
            for n, region in enumerate(regions):
                system.add_subregion(2 * n * PAGE, region)
        listener = _listener()
        space.add_listener(KvmMemoryListener(vm))
        space.add_listener(listener)
        memory, registers = regions[REGIONS // 2], regions[REGIONS // 2 + 1]
        if len(vm.memslots) != REGIONS // 2 or len(space.flatview) != REGIONS:
            raise BenchmarkError(f"{len(vm.memslots)} slots and {len(space.flatview)} ranges of {REGIONS} regions")

        def toggle(region: Any) -> Callable[[], None]:
            def change() -> None:
                region.enabled = not region.enabled

            return change

        def move(region: Any) -> Callable[[], None]:
            def change() -> None:
                region.addr ^= PAGE

            return change

        ways = {
            "registers enabled or disabled": (toggle(registers), 0),
            "registers moved": (move(registers), 0),
            "RAM enabled or disabled": (toggle(memory), 1),
            "RAM moved": (move(memory), 2),
        }
        for name, (change, ioctls) in ways.items():
            listener.heard = 0
            for _ in range(2):
                with _slot_ioctls() as seen:
                    change()
                if len(seen) != ioctls:
                    raise BenchmarkError(f"{name}: {len(seen)} slots got an ioctl, not {ioctls}: {seen}")
            if listener.heard < 2 * (REGIONS - 1):
                raise BenchmarkError(f"{name}: the listener heard of {listener.heard} ranges in 2 commits")
        best = harness.interleave(pace, {name: _timed(change) for name, (change, _) in ways.items()})
    names = f"one of {REGIONS} regions"
    return [harness.ceiling(f"{names}: {name}", ms, "ms", COMMIT_BAR_MS) for name, ms in best.items()]


def _listener() -> Any:
    from hvmodel.ram import MemoryListener

    class Hears(MemoryListener):
        heard = 0

        def region_add(self, section: Any) -> None:
            self.heard += section.size > 0

        def region_del(self, section: Any) -> None:
            self.heard += section.size > 0

        def region_nop(self, section: Any) -> None:
            self.heard += section.size > 0

    return Hears()


@contextmanager
def _slot_ioctls() -> Iterator[list[int]]:
    # The slot of every KVM_SET_USER_MEMORY_REGION that the block makes.
    vm: Any = import_module("hvmodel.kvm.vm")
    seen: list[int] = []
    lib = vm.lib

    class Counted:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def kvm_set_user_memory_region(self, fd: int, argument: Any) -> int:
            seen.append(argument.slot)
            return int(lib.kvm_set_user_memory_region(fd, argument))

    vm.lib = Counted()
    try:
        yield seen
    finally:
        vm.lib = lib


def _timed(work: Callable[[], None]) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter_ns()
        work()
        return (time.perf_counter_ns() - start) / 1e6

    return once


def _growth(pace: Pace) -> list[Result]:
    from hvmodel.ram import AddressSpace

    with ExitStack() as stack:
        sizes = SIZES[:-1] if pace.short else SIZES
        works: dict[str, Callable[[], float]] = {}
        for n in sizes:
            system, region = _tree(n)
            space = stack.enter_context(AddressSpace(system, f"{n}"))
            if len(space.flatview) < n:
                raise BenchmarkError(f"{len(space.flatview)} ranges of {n} regions")

            def change(region: Any = region) -> None:
                region.enabled = not region.enabled

            works[str(n)] = _timed(change)
        best = harness.interleave(pace, works)
    results = [harness.ceiling(f"a commit with {n:,} regions", best[str(n)], "ms", None) for n in sizes]
    # From 100 regions on; below, what every commit costs is most of it.  The caches' share grows, too.
    unit = {n: best[str(n)] * 1e6 / (n * math.log2(n)) for n in sizes if n >= 100}
    results += [harness.ceiling(f"  over n log2 n, n = {n:,}", ns, "ns", None) for n, ns in unit.items()]
    growth = unit[sizes[-1]] / min(unit.values())
    results.append(harness.ceiling("  the last of these, to the least", growth, "x", GROWTH_BAR))
    return results


def _tree(n: int) -> tuple[Any, Any]:
    # Half of the regions stand over the edges of the other half.
    from hvmodel.ram import MemoryRegion, transaction

    system = MemoryRegion.container("system", 1 << 64)
    regions = [MemoryRegion.io(f"{number}", 16) for number in range(n)]
    with transaction():
        for number, region in enumerate(regions):
            system.add_subregion(12 * number, region, priority=number % 2)
    return system, regions[n // 2]
