"""ram: blocks of guest RAM created and populated, and bytes copied in and out, against the same work in C.

Fill: a new block of 1 GiB, all of its pages there at the end.  The time is of making the block (memfd, size, seals,
reserve, map, advice) and of filling it; taking it down is not in it.

    touch             a byte of each 4 KiB page stored (here: one assignment to a slice of a view with a step)
    populate          Mapping.populate(): MADV_POPULATE_WRITE
    prealloc-threads  the backend's own prealloc=on, with as many threads as there are CPUs, but one per 64 MiB
    write             RamBlock.write() of a buffer of 64 MiB, again and again; in C memcpy
    pwrite            the same with pwrite(2) to the file

    4K                memory-backend-memfd
    THP               memory-backend-ram: anonymous memory, which huge pages are asked for by madvise; a memfd gets them
                      only where shmem_enabled says so
    hugetlb           memory-backend-memfd with hugetlb=on,hugetlbsize=2M, where the pool has free pages

Copies: to and from the same addresses as C's memcpy, for both ends; that is proved before anything is measured.

    m.write           Machine.write(), or RamBlock.write() where there is no KVM
    view              a new view each time, and one assignment to all of it; out of the block: from it
    numpy             numpy.copyto() to or from an array over a view; the arrays are made once
    read              RamBlock.read(), against malloc, memcpy and free in C

Bars hold for fills of 1 GiB, and for copies from 64 MiB on but `read`; other sizes are measured for the plot, and less
often: a fill of another size twice, one of 4 GiB once; copies of 4 GiB in half of the rounds.

What the machine's own host has taken back of its memory costs seconds per GiB when it is used again.  So as much memory
as a fill needs is taken and freed before the first of its size, and each after that uses what the last one has freed.
No global setting is changed: what the host does not give by itself is told as lacking.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, NamedTuple

from . import harness
from .harness import BenchmarkError, Curve, Findings, Pace, Result
from .plot import size_text

if TYPE_CHECKING:
    from types import ModuleType

    from hvmodel.ram import RamBlock

__all__ = ["run"]

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
PAGE, HUGE_PAGE = 4 * KiB, 2 * MiB
SIZES = tuple(4 * KiB << 2 * step for step in range(11))  # 4 KiB .. 4 GiB
SHORT_SIZES = (4 * KiB, 1 * MiB, 64 * MiB)
SPARE = 1 * GiB  # of memory, left to all others

FILL_BAR = 1.03
FILL_SIZE, SHORT_FILL_SIZE = 1 * GiB, 64 * MiB
CHUNK = 64 * MiB  # of `write` and `pwrite`
COPY_BAR = 0.95  # of C's bandwidth
COPY_BAR_FROM = 64 * MiB
READ_UP_TO = 64 * MiB  # each read takes as much new memory
LOW_RAM, HIGH_RAM = 3 * GiB, 4 * GiB  # what a Machine has of its RAM at 0; where the rest begins

# Of floor/ram.c.
MEMFD, ANON, HUGETLB = 0, 1, 2
TOUCH, POPULATE, WRITE, PWRITE = range(4)


def run(pace: Pace) -> Findings:
    """First the fills, then the copies."""
    lib = _floor()
    found = Findings([])
    _fills(lib, pace, found)
    _copies(lib, pace, found)
    return found


class _Fill(ctypes.Structure):
    # struct floor_fill
    _fields_ = (
        ("method", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("data_size", ctypes.c_uint64),
    )


def _floor() -> ctypes.CDLL:
    lib = harness.load_floor("ram")
    u64, pointer = ctypes.c_uint64, ctypes.c_void_p
    for name, restype, *argtypes in (
        ("floor_block_new", pointer, u64, ctypes.c_int, ctypes.POINTER(_Fill)),
        ("floor_block_free", None, pointer),
        ("floor_block_host", u64, pointer),
        ("floor_warm", ctypes.c_int, u64),
        ("floor_copy", None, u64, u64, u64, u64),
        ("floor_read", ctypes.c_int, u64, u64, u64),
        ("floor_mark", None, u64, u64, u64),
        ("floor_unmarked", u64, u64, u64, u64),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


def _buffer(size: int) -> memoryview:
    # Memory that is not hvmodel's: the other end of the copies, in huge pages if the host has some.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _address(buffer: Any) -> int:
    from hvmodel._ffi import ffi

    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def _enough(need: int) -> str | None:
    # What the host lacks for `need` bytes, or None.
    from hvmodel.host.limits import available_memory

    have = available_memory()
    if have >= need + SPARE:
        return None
    return f"it takes {size_text(need)} and {size_text(SPARE)} to spare, and the host has {have >> 20} MiB available"


# ---- fills ----


class Kind(NamedTuple):
    """What a block is made of: its name in the results, the floor's flags, and how hvmodel makes it."""

    name: str
    flags: int
    make: Callable[..., RamBlock]  # (size, **options of the backend)


class Method(NamedTuple):
    """A way to populate: its name, the floor's, how hvmodel does it; None: its backend does, in several threads."""

    name: str
    floor: int
    work: Callable[[RamBlock, memoryview], None] | None

    def threads(self, size: int) -> int:
        """One, or as many as QEMU starts: one per CPU, per 64 MiB, 16."""
        return 1 if self.work else max(1, min(len(os.sched_getaffinity(0)), size // (64 * MiB), 16))


def _touch(block: RamBlock, _: memoryview) -> None:
    with block.writable() as view:
        view[::PAGE] = bytes(len(view) // PAGE)


def _populate(block: RamBlock, _: memoryview) -> None:
    block.mapping.populate()


def _write(block: RamBlock, data: memoryview) -> None:
    for at in range(0, block.used_length, len(data)):
        block.write(at, data)


def _pwrite(block: RamBlock, data: memoryview) -> None:
    for at in range(0, block.used_length, len(data)):
        os.pwrite(block.fd, data, at)


METHODS = (
    Method("touch", TOUCH, _touch),
    Method("populate", POPULATE, _populate),
    Method("prealloc-threads", POPULATE, None),
    Method("write", WRITE, _write),
    Method("pwrite", PWRITE, _pwrite),
)
CURVES = ("touch", "populate", "write")  # shown over all sizes


def _memfd(size: int, **options: Any) -> RamBlock:
    from hvmodel.ram import RamBlock
    from hvmodel.ram.backend import MemoryBackendMemfd

    return RamBlock("bench.ram", backend=MemoryBackendMemfd(size, **options))


def _hugetlb(size: int, **options: Any) -> RamBlock:
    return _memfd(size, hugetlb=True, hugetlbsize=HUGE_PAGE, **options)


def _anonymous(size: int, **options: Any) -> RamBlock:
    from hvmodel.ram import RamBlock
    from hvmodel.ram.backend import MemoryBackendRam

    return RamBlock("bench.ram", backend=MemoryBackendRam(size, **options))


def _fills(lib: ctypes.CDLL, pace: Pace, found: Findings) -> None:
    size = SHORT_FILL_SIZE if pace.short else FILL_SIZE
    if why := _enough(size):
        found.lacks["fills"] = why
        return
    data = _buffer(CHUNK)
    lib.floor_mark(_address(data), CHUNK, 0)
    for kind in _kinds(lib, size, data, found):
        _fills_of(lib, pace, kind, size, data, found)


def _kinds(lib: ctypes.CDLL, size: int, data: memoryview, found: Findings) -> Iterator[Kind]:
    # What the host gives is seen, not believed: hvmodel's and C's blocks both must have the pages.
    memfd = Kind("memfd", MEMFD, _memfd)
    huge = _huge_share(lib, memfd, size, data)
    setting = _setting("shmem_enabled")
    if huge == 0:
        yield memfd._replace(name="4K")
        found.lacks["fill of a memfd in THP"] = f"shmem_enabled is {setting}: the memfd got no huge page"
    elif huge == 1:
        yield memfd._replace(name="THP memfd")
        found.lacks["fill of a memfd in 4K"] = f"shmem_enabled is {setting}: the memfd got huge pages"
    else:
        found.lacks["fill of a memfd"] = f"shmem_enabled is {setting}: {huge:.0%} of the memfd is huge pages"
    anonymous = Kind("THP", ANON, _anonymous)
    huge = _huge_share(lib, anonymous, size, data)
    if huge == 1:
        yield anonymous
    else:
        why = f"transparent_hugepage/enabled is {_setting('enabled')}: {huge:.0%} of the block is huge pages"
        found.lacks["fill of anonymous memory in THP"] = why
    free = _free_huge_pages()
    if free * HUGE_PAGE >= size:
        yield Kind("hugetlb", HUGETLB, _hugetlb)
    else:
        found.lacks["fill of a memfd in hugetlb"] = (
            f"{size_text(size)} takes {size // HUGE_PAGE} pages of 2 MiB, and the pool has {free} free"
        )


def _setting(name: str) -> str:
    # "always [madvise] never": the one in brackets.
    try:
        text = Path(f"/sys/kernel/mm/transparent_hugepage/{name}").read_text()
    except OSError:
        return "not there"
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else text.strip()


def _free_huge_pages() -> int:
    # Those that nobody has, and that are not promised to anybody.
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    try:
        return int((pool / "free_hugepages").read_text()) - int((pool / "resv_hugepages").read_text())
    except OSError:
        return 0


def _huge_share(lib: ctypes.CDLL, kind: Kind, size: int, data: memoryview) -> float:
    # The least part of a populated block that is mapped by huge pages, of hvmodel's and C's.
    with kind.make(size) as block:
        block.mapping.populate()
        ours = _huge_bytes(block.host, size)
    floor = _floor_block(lib, kind, METHODS[1], size, data)
    theirs = _huge_bytes(lib.floor_block_host(floor), size)
    lib.floor_block_free(floor)
    if (ours == 0) != (theirs == 0):
        raise BenchmarkError(f"{kind.name}: of {size:#x} bytes hvmodel has {ours:#x} in huge pages, C {theirs:#x}")
    return min(ours, theirs) / size


def _huge_bytes(address: int, size: int) -> int:
    huge, inside = 0, False
    with Path("/proc/self/smaps").open() as smaps:
        for line in smaps:
            if vma := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(vma[1], 16) < address + size and address < int(vma[2], 16)
            elif inside and line.startswith(("AnonHugePages:", "ShmemPmdMapped:")):
                huge += int(line.split()[1]) * KiB
    return huge


def _fills_of(lib: ctypes.CDLL, pace: Pace, kind: Kind, size: int, data: memoryview, found: Findings) -> None:
    methods = [method for method in METHODS if method.floor != PWRITE or kind.flags == MEMFD]
    if len(methods) < len(METHODS):
        found.lacks[f"fill in {kind.name}, pwrite"] = (
            "hugetlbfs has no write()" if kind.flags == HUGETLB else "it has no file"
        )
    full = _fill_turns(lib, replace(pace, turns=1 if pace.short else 3), kind, size, methods, data, FILL_BAR)
    points: dict[str, dict[int, Result]] = {method.name: {size: full[method.name]} for method in methods}
    found.results.extend(full.values())
    if kind.flags == HUGETLB:
        return  # how many pages the pool has is known for the one size only
    curves = [method for method in methods if method.name in CURVES]
    for other in SHORT_SIZES if pace.short else SIZES:
        if other == size or (other < HUGE_PAGE and kind.name != "4K"):
            continue
        if why := _enough(other):
            found.lacks[f"fill of {size_text(other)} in {kind.name}"] = why
            continue
        # Of what takes seconds only one way, and that once: all of it has run with less memory.
        some = [method for method in curves if other < size or method.name == "populate"]
        turns = 0 if other > size else 1 if pace.short else 2
        for name, result in _fill_turns(lib, Pace(1, turns, pace.short), kind, other, some, data, None).items():
            points[name][other] = result
            found.results.append(result)
    for method in curves:
        ordered = sorted(points[method.name].items())
        ours = [(at, at / GiB / (result.value / 1000)) for at, result in ordered]
        theirs = [(at, at / GiB / (result.floor / 1000)) for at, result in ordered if result.floor]
        found.curves.append(Curve(f"create and fill, {kind.name}", method.name, ours, theirs))


def _fill_turns(
    lib: ctypes.CDLL, pace: Pace, kind: Kind, size: int, methods: list[Method], data: memoryview, bar: float | None
) -> dict[str, Result]:
    def ours(method: Method) -> Callable[[], float]:
        options = {} if method.work else {"prealloc": True, "prealloc_threads": method.threads(size)}
        some = data[: min(size, CHUNK)]

        def work() -> float:
            start = perf_counter_ns()
            block = kind.make(size, **options)
            if method.work:
                method.work(block, some)
            end = perf_counter_ns()
            block.close()
            return (end - start) / 1e6

        return work

    def theirs(method: Method) -> Callable[[], float]:
        def work() -> float:
            start = perf_counter_ns()
            block = _floor_block(lib, kind, method, size, data)
            end = perf_counter_ns()
            lib.floor_block_free(block)
            return (end - start) / 1e6

        return work

    variants: dict[str, Callable[[], float]] = {}
    for method in methods:
        variants[method.name] = ours(method)
        variants[f"c, {method.name}"] = theirs(method)
    harness.checked(lib.floor_warm(size), "memory to warm up with")
    once = not pace.turns
    best = {name: work() for name, work in variants.items()} if once else harness.interleave(pace, variants)
    return {
        method.name: harness.against_floor(
            f"fill {size_text(size)}, {kind.name}, {method.name}",
            best[method.name],
            "ms",
            best[f"c, {method.name}"],
            bar,
        )
        for method in methods
    }


def _floor_block(lib: ctypes.CDLL, kind: Kind, method: Method, size: int, data: memoryview) -> int:
    how = _Fill(method.floor, method.threads(size), _address(data), min(size, CHUNK))
    block: int | None = lib.floor_block_new(size, kind.flags, ctypes.byref(how))
    if not block:
        raise BenchmarkError(f"the C floor's block, {kind.name}, {method.name}: {os.strerror(ctypes.get_errno())}")
    return block


# ---- copies ----


class Write(NamedTuple):
    """What copies to the beginning of the block, and its name in the results."""

    name: str
    copy: Callable[[memoryview], None]


class Way(NamedTuple):
    """A way to copy; `direction` is seen from the guest's memory, `copies(count)` does it and returns the last copy."""

    name: str
    direction: str
    copies: Callable[[int], object]


def _copies(lib: ctypes.CDLL, pace: Pace, found: Findings) -> None:
    sizes = []
    for size in SHORT_SIZES if pace.short else SIZES:
        if why := _enough(2 * size):
            found.lacks[f"copies of {size_text(size)}"] = why
        else:
            sizes.append(size)
    if not sizes:
        return
    numpy = _numpy(found)
    best: dict[tuple[str, str], dict[int, Result]] = {}
    buffer = _buffer(max(sizes))
    with ExitStack() as stack:
        block, write = _guest_memory(stack, max(sizes), found)
        for size in sizes:
            try:
                for way, result in _copies_of(lib, pace, block, write, buffer[:size], numpy).items():
                    best.setdefault(way, {})[size] = result
                    found.results.append(result)
            except BaseException as error:
                clear_frames(error.__traceback__)  # they have views, and the block would not close
                raise
    if max(sizes) > READ_UP_TO:
        found.lacks[f"read of more than {size_text(READ_UP_TO)}"] = "each takes as much new memory as it copies"
    for (direction, name), results in best.items():
        ours = [(size, result.value) for size, result in results.items()]
        theirs = [(size, result.floor) for size, result in results.items() if result.floor]
        found.curves.append(Curve(f"copy {direction}", name, ours, theirs))


def _numpy(found: Findings) -> ModuleType | None:
    try:
        import numpy as np
    except ImportError:
        found.lacks["copies with numpy"] = "numpy is not there: pip install 'hvmodel[numpy]'"
        return None
    return np


def _guest_memory(stack: ExitStack, size: int, found: Findings) -> tuple[RamBlock, Write]:
    # The block, and the way that is not one of its own methods.
    import hvmodel as hv
    from hvmodel.errors import HostError
    from hvmodel.ram import RamBlock

    try:
        machine = stack.enter_context(hv.Machine(ram=size))
    except HostError as error:
        found.lacks["copies with Machine.write"] = f"{error}; RamBlock.write is measured in its place"
        block = stack.enter_context(RamBlock("bench.ram", size))
        return block, Write("write", lambda data: block.write(0, data))

    def write(data: memoryview) -> None:
        if len(data) <= LOW_RAM:
            machine.write(0, data)
        else:
            machine.write(0, data[:LOW_RAM])
            machine.write(HIGH_RAM, data[LOW_RAM:])

    return machine.ram, Write("m.write", write)


def _copies_of(
    lib: ctypes.CDLL, pace: Pace, block: RamBlock, write: Write, data: memoryview, numpy: ModuleType | None
) -> dict[tuple[str, str], Result]:
    size, ours, theirs = len(data), block.host, _address(data)
    ways = [Way(write.name, "in", _times(lambda: write.copy(data))), *_block_ways(block, data)]
    if numpy is not None:
        ways += _numpy_ways(block, data, numpy)
    if size <= READ_UP_TO:
        ways.append(Way("read", "out", _times(lambda: block.read(0, size))))
    for mark, way in enumerate(ways, 1):
        _prove(lib, block, data, way, mark)
    count = max(1, min(4000, 16 * MiB // size))
    work: dict[str, Callable[[], object]] = {
        "c, in": lambda: lib.floor_copy(ours, theirs, size, count),
        "c, out": lambda: lib.floor_copy(theirs, ours, size, count),
        "c, read": lambda: harness.checked(lib.floor_read(ours, size, count), "the C floor's malloc"),
    }
    for way in ways:
        work[f"{way.direction}, {way.name}"] = lambda copies=way.copies: copies(count)  # type: ignore[misc]
    if size > READ_UP_TO:
        del work["c, read"]

    def rate(copies: Callable[[], object]) -> Callable[[], float]:
        # Seconds per GiB: the least is the best.  What the caches hold before is the same for all.
        def turn() -> float:
            if size < 128 * MiB:
                lib.floor_copy(ours, theirs, size, 1)
            start = perf_counter_ns()
            copies()
            return (perf_counter_ns() - start) / 1e9 / (size * count / GiB)

        return turn

    best = harness.interleave(_copy_pace(pace, size), {name: rate(copies) for name, copies in work.items()})
    return {
        (way.direction, way.name): harness.rate_against_floor(
            f"copy {way.direction}, {size_text(size)}, {way.name}",
            1 / best[f"{way.direction}, {way.name}"],
            "GiB/s",
            1 / best["c, read" if way.name == "read" else f"c, {way.direction}"],
            COPY_BAR if size >= COPY_BAR_FROM and way.name != "read" else None,
        )
        for way in ways
    }


def _copy_pace(pace: Pace, size: int) -> Pace:
    # Turns of some milliseconds, or of one copy; the fewer, the longer they are.
    if pace.short:
        return pace
    if size > 1 * GiB:
        return replace(pace, rounds=-(-pace.rounds // 2), turns=1)
    return replace(pace, turns=4 if size <= 64 * MiB else 2 if size <= 256 * MiB else 1)


def _times(copy: Callable[[], object]) -> Callable[[int], object]:
    def copies(count: int) -> object:
        last = None
        for _ in range(count):
            last = None  # a copy is gone before the next is made, as in C
            last = copy()
        return last

    return copies


def _block_ways(block: RamBlock, data: memoryview) -> list[Way]:
    size = len(data)

    def view_in() -> None:
        with block.writable(0, size) as view:
            view[:] = data

    def view_out() -> None:
        data[:] = block.view(0, size)

    _same(block.host, _address(block.view(0, size)), "a view")
    with block.writable(0, size) as view:
        _same(block.host, _address(view), "a writable view")
    return [Way("view", "in", _times(view_in)), Way("view", "out", _times(view_out))]


def _numpy_ways(block: RamBlock, data: memoryview, numpy: ModuleType) -> list[Way]:
    # The array keeps the view alive when its `with` is over.
    with block.writable(0, len(data)) as view:
        memory = numpy.frombuffer(view, numpy.uint8)
    array = numpy.frombuffer(data, numpy.uint8)
    _same(block.host, memory.ctypes.data, "the array over the block")
    _same(_address(data), array.ctypes.data, "the array over the buffer")
    return [
        Way("numpy", "in", _times(lambda: numpy.copyto(memory, array))),
        Way("numpy", "out", _times(lambda: numpy.copyto(array, memory))),
    ]


def _same(expected: int, address: int, what: str) -> None:
    if address != expected:
        raise BenchmarkError(f"{what} begins at {address:#x}, and C copies at {expected:#x}")


def _prove(lib: ctypes.CDLL, block: RamBlock, data: memoryview, way: Way, mark: int) -> None:
    # C marks each page of the one end, at the address that it copies from, and looks for the marks at the other.
    size, ours, theirs = len(data), block.host, _address(data)
    source, target = (theirs, ours) if way.direction == "in" else (ours, theirs)
    mark = mark << 56 | size
    lib.floor_mark(source, size, mark)
    copy = way.copies(1)
    missing = lib.floor_unmarked(target if copy is None else _address(copy), size, mark)
    if missing:
        raise BenchmarkError(f"copy {way.direction}, {way.name}: {missing} of {size // PAGE} pages did not arrive")
