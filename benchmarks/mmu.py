"""mmu: walks of a live machine's page tables, one by one and many at once; what `import hvmodel.mmu` costs.

A machine whose tables map 2 GiB by pages of 4 KiB (1,024 page tables, 4 MiB of them), at addresses of a kernel, and
2 GiB more by pages of 2 MiB; addresses at random, others in each turn (of arrays, the next of four).  A walk reads
every entry from the machine's RAM, each time: before anything is timed, all answers are checked, and that a changed
entry is seen by the next walk.

    walk           Walker.walk(gva), the Walk with its address
    walk_many      an array of addresses to arrays of answers
    import         whole processes: every public name of hvmodel.mmu, with the extension and as if it were not built
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from . import harness, imports
from .harness import BenchmarkError, Pace, Result

__all__ = ["run"]

RAM = 256 << 20
ROOT = 1 << 20
KERNEL = 0xFFFF_8880_0000_0000
LARGE = KERNEL + (1 << 39)  # another entry of the root
HOLE = KERNEL + (1 << 38)
SPAN = 2 << 30
WALKS = 4_000  # of a turn; the next turn takes the next of
POOL = 200_000
MANY = 250_000
ARRAYS = 4

WALK_BAR = 500_000
MANY_BAR = 20_000_000
IMPORT_BAR_MS = 40.0

NOTHING = "pass"
NAMED = "import hvmodel.mmu as mmu; [getattr(mmu, name) for name in mmu.__all__]"
UNBUILT = f"import sys; sys.modules['hvmodel._native'] = None; {NAMED}; assert 'hvmodel._ffi' not in sys.modules"


def run(pace: Pace) -> list[Result]:
    """Walks, then imports."""
    return [*_walks(pace), *_imports(pace)]


def _walks(pace: Pace) -> list[Result]:
    import numpy as np

    from hvmodel import Machine
    from hvmodel.arch.paging import PageTables
    from hvmodel.ram.walk import INVALID_GPA, walk_many

    with ExitStack() as stack:
        machine = stack.enter_context(Machine(ram=RAM))
        tables = PageTables(ROOT, maxphyaddr=40, accessed=True, dirty=True)
        for at in range(0, SPAN, RAM):
            tables.map(KERNEL + at, 0, RAM, page_size=4096, nx=True)
            tables.map(LARGE + at, 0, RAM, nx=True)
        machine.write(tables.cr3, tables.image())
        machine.vcpu.long_mode(entry=0x1000)
        machine.vcpu.sregs = machine.vcpu.sregs.replace(cr3=tables.cr3)
        walker = machine.walker()
        rng = random.Random(1)
        bits = np.random.default_rng(1)
        small = [KERNEL + rng.randrange(SPAN) for _ in range(pace.count(POOL))]
        large = [LARGE + rng.randrange(SPAN) for _ in range(pace.count(POOL))]
        holes = [HOLE + rng.randrange(SPAN) for _ in range(pace.count(WALKS))]
        many, mixed = [], []
        for _ in range(ARRAYS):
            many.append(np.uint64(KERNEL) + bits.integers(0, SPAN, pace.count(MANY), dtype=np.uint64))
            mixed.append(many[-1] + bits.choice(np.array([0, LARGE - KERNEL], np.uint64), len(many[-1])))

        for gvas, levels in ((small, 4), (large, 3)):
            for gva in gvas:
                walk = walker.walk(gva)
                if walk.gpa != (gva & SPAN - 1) % RAM or len(walk.entries) != levels:
                    raise BenchmarkError(f"a wrong walk: {walk}")
        for array in (*many, *mixed):
            if not (walk_many(walker, array).gpa == (array & np.uint64(RAM - 1))).all():
                raise BenchmarkError("walk_many leads elsewhere than the tables")
        if any(walker.walk(gva).error_code != 0 for gva in holes) or walk_many(walker, holes).ok.any():
            raise BenchmarkError("a walk leads somewhere where nothing is mapped")
        leaf = walker.walk(small[0]).entries[-1]
        machine.write(leaf.gpa, bytes(8))
        if walker.walk(small[0]).ok or walk_many(walker, small[:1]).gpa[0] != INVALID_GPA:
            raise BenchmarkError("a walk does not see what memory is now")
        machine.write(leaf.gpa, leaf.value.to_bytes(8, "little"))

        def each(gvas: list[int]) -> Callable[[], float]:
            slices = [gvas[at : at + WALKS] for at in range(0, len(gvas), WALKS)]

            def work(some: list[int]) -> None:
                walk = walker.walk
                for gva in some:
                    walk(gva)

            def turn() -> float:
                slices.append(slices.pop(0))
                return harness.per_item_us(lambda: work(slices[-1]), len(slices[-1]))

            return turn

        def at_once(arrays: list[Any]) -> Callable[[], float]:
            def turn() -> float:
                arrays.append(arrays.pop(0))
                return harness.per_item_us(lambda: walk_many(walker, arrays[-1]), len(arrays[-1]))

            return turn

        best = harness.interleave(
            pace,
            {
                "small": each(small),
                "large": each(large),
                "holes": each(holes),
                "many": at_once(many),
                "mixed": at_once(mixed),
            },
        )
    return [
        _rate("walk: 4 levels", best["small"], WALK_BAR),
        _rate("walk: 3 levels, to a page of 2 MiB", best["large"], None),
        _rate("walk: to a fault", best["holes"], None),
        _rate("walk_many: 4 levels", best["many"], MANY_BAR),
        _rate("walk_many: both kinds of pages mixed", best["mixed"], None),
    ]


def _rate(name: str, us: float, bar: float | None) -> Result:
    rate = 1e6 / us
    return Result(name, rate, "walks/s", None, None, bar, None if bar is None else rate >= bar)


def _imports(pace: Pace) -> list[Result]:
    def start(code: str) -> Callable[[], float]:
        return lambda: imports._start_ms(code)

    best = harness.interleave(pace, {code: start(code) for code in (NOTHING, NAMED, UNBUILT)})
    return [
        harness.ceiling("python -c pass", best[NOTHING], "ms", None),
        harness.ceiling("all names of hvmodel.mmu, over that", best[NAMED] - best[NOTHING], "ms", IMPORT_BAR_MS),
        harness.ceiling("the same without the extension", best[UNBUILT] - best[NOTHING], "ms", IMPORT_BAR_MS),
    ]
