"""Accounting of memory: what a range of a process's addresses costs, as `pmap -x` tells it for whole mappings.

The kernel accounts by VMA, a range of addresses of one kind: /proc/PID/smaps has the numbers of each.  `account` adds
those of the VMAs in a range.  A VMA that reaches out of the range is counted page by page, by PAGEMAP_SCAN, the pagemap
and /proc/kpagecount (`PageMap`); what page tables do not tell is None then: `dirty`, because nobody shows their dirty
bits, and `pss` without root.

    rss      pages in memory and mapped here          shared, private   of rss: mapped elsewhere too, or here only
    pss      each divided by how often it is mapped   dirty             of rss: written since it was made or cleaned
    anon     of rss: anonymous, or private copies     huge              of rss: mapped by huge page-table entries
    hugetlb  pages of hugetlbfs; in none of the others   swapped        in a swap area

All are bytes.  Pages that a memory file has but that are not mapped here are in none of them.

Source: fs/proc/task_mmu.c, Documentation/filesystems/proc.rst@v6.18.
"""

from __future__ import annotations

import errno
import os
import re

from ..errors import ArgumentError, ArgumentTypeError, HostError
from ..units import PAGE_SIZE, Hva, KiB
from ..value import Value
from .mapping import index
from .pagemap import RANGE_MAX, Category, PageMap, open_proc, page_range

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, BinaryIO, Protocol

    class Addressed(Protocol):
        """What has addresses: a Mapping."""

        @property
        def hva(self) -> int:
            """The first address."""

        @property
        def size(self) -> int:
            """Bytes."""

    class Mapped(Protocol):
        """What has a mapping: a RamBlock."""

        @property
        def mapping(self) -> Addressed:
            """The mapping."""

    Target = Addressed | Mapped | tuple[int, int]

__all__ = ["Accounting", "Vma", "account", "read_smaps", "smaps_rollup", "target_range"]

# Lines of smaps that are amounts -> field of Vma.  Lines that a later kernel adds are left out.
_AMOUNTS = {
    b"KernelPageSize": "page_size",
    b"Rss": "rss",
    b"Pss": "pss",
    b"Shared_Clean": "shared_clean",
    b"Shared_Dirty": "shared_dirty",
    b"Private_Clean": "private_clean",
    b"Private_Dirty": "private_dirty",
    b"Referenced": "referenced",
    b"Anonymous": "anonymous",
    b"KSM": "ksm",
    b"LazyFree": "lazy_free",
    b"AnonHugePages": "anon_huge_pages",
    b"ShmemPmdMapped": "shmem_pmd_mapped",
    b"FilePmdMapped": "file_pmd_mapped",
    b"Shared_Hugetlb": "shared_hugetlb",
    b"Private_Hugetlb": "private_hugetlb",
    b"Swap": "swap",
    b"SwapPss": "swap_pss",
    b"Locked": "locked",
}

# "7f1c00000000-7f1c00010000 rw-s 00000000 00:01 2049    /memfd:pc.ram (deleted)"
_HEAD = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-])([sp]) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([0-9]+) *(.*)\n", re.DOTALL
)
_LINES = re.compile(rb"^(\w+): +(.*)$", re.MULTILINE)


class Vma(Value):
    """One VMA with its numbers from smaps, in bytes; those that this kernel does not tell are 0.

    `prot` is text such as "rw-"; `shared` whether writes go to the file; `offset` that in the file; `device` text such
    as "fe:00" and `inode` are 0 for anonymous memory; `path` is the kernel's text, "" for none; `flags` are the
    two-letter VmFlags, such as "dc" for MADV_DONTFORK.
    """

    start: Hva
    end: Hva
    prot: str
    shared: bool
    offset: int
    device: str
    inode: int
    path: str
    flags: tuple[str, ...] = ()
    page_size: int = 0
    rss: int = 0
    pss: int = 0
    shared_clean: int = 0
    shared_dirty: int = 0
    private_clean: int = 0
    private_dirty: int = 0
    referenced: int = 0
    anonymous: int = 0
    ksm: int = 0
    lazy_free: int = 0
    anon_huge_pages: int = 0
    shmem_pmd_mapped: int = 0
    file_pmd_mapped: int = 0
    shared_hugetlb: int = 0
    private_hugetlb: int = 0
    swap: int = 0
    swap_pss: int = 0
    locked: int = 0

    @property
    def size(self) -> int:
        """Bytes of addresses."""
        return self.end - self.start


_NEAR = 2 << 20  # pages no farther apart are counted together
_FIELDS = ("mapped", "rss", "pss", "shared", "private", "dirty", "anon", "huge", "hugetlb", "swapped")


class Accounting(Value):
    """What a range costs, in bytes; the module's text says what each is.

    `mapped` bytes of the `size` are mapped at all, by `vmas` VMAs.  `cut` tells that a VMA reached out of the range and
    was counted by pages: `dirty` is None then, and so are `pss` without root and `swapped` for shared memory on a host
    that swaps, because its page tables forget what was swapped out.
    """

    start: Hva
    size: int
    mapped: int
    rss: int
    pss: int | None
    shared: int
    private: int
    dirty: int | None
    anon: int
    huge: int
    hugetlb: int
    swapped: int | None
    vmas: int
    cut: bool

    @classmethod
    def of(cls, vmas: Iterable[Vma]) -> Accounting:
        """The sums over these VMAs; from the first's start to the last's end, with what lies between.

        >>> Accounting.of([]).rss
        0
        """
        whole = list(vmas)
        start = whole[0].start if whole else Hva(0)
        return _sum(start, whole[-1].end - start if whole else 0, [_of_vma(vma) for vma in whole], False)

    @property
    def resident(self) -> int:
        """Bytes in memory, of whatever kind: `rss` and `hugetlb`."""
        return self.rss + self.hugetlb


def read_smaps(pid: int | None = None, start: int = 0, end: int | None = None) -> Iterator[Vma]:
    """The VMAs of process `pid` (None: this one) that overlap [start, end), ascending (end None: all from `start`).

    The kernel walks the page tables of each VMA, up to the last one wanted: about 20 ms for each GiB in pages of 4 KiB.
    VMAs that are changed meanwhile are told as they were or as they are, never twice.

    Raises ArgumentError, ArgumentTypeError; HostError of open: ENOENT (no such process), EACCES, EPERM (not to be
    looked at).  A process that has ended has no VMAs, and one that ends while it is read has no more.  Threads: any.
    """
    first = index(start, "read_smaps", "start")
    last = None if end is None else index(end, "read_smaps", "end")
    # A file, and not its number: an iterator that nobody begins closes that when it goes.
    return _select(os.fdopen(open_proc("read_smaps", "smaps", pid), "rb", buffering=1 << 16), first, last)


def _select(file: BinaryIO, first: int, last: int | None) -> Iterator[Vma]:
    with file:
        for vma in _parse(file):
            if last is not None and vma.start >= last:
                return
            if vma.end > first:
                yield vma


def _parse(lines: Iterable[bytes]) -> Iterator[Vma]:
    # A VMA is its head line and the lines up to the next one; those have names that begin with a capital.
    head: list[Any] = []
    found: dict[str, Any] = {}
    try:
        for line in lines:
            name, colon, rest = line.partition(b":")
            if colon and name[:1].isupper():
                field = _AMOUNTS.get(name)
                if field is not None:
                    found[field] = int(rest.split()[0]) * KiB
                elif name == b"VmFlags":
                    found["flags"] = tuple(rest.decode("ascii").split())
                continue
            if head:
                yield Vma(*head, **found)
            match = _HEAD.fullmatch(line)
            if match is None:
                raise HostError(errno.EPROTO, "read", "line", line, "a line of smaps")
            begin, end, prot, kind, offset, device, inode, path = match.groups()
            # The kernel writes a newline in a path as \012, and nothing else so.
            head = [
                Hva(int(begin, 16)),
                Hva(int(end, 16)),
                prot.decode(),
                kind == b"s",
                int(offset, 16),
                device.decode(),
                int(inode),
                os.fsdecode(path.replace(b"\\012", b"\n")),
            ]
            found = {}
    except ProcessLookupError:
        pass  # the process has gone; what it had then was told
    if head:
        yield Vma(*head, **found)


def smaps_rollup(pid: int | None = None) -> dict[str, int]:
    """The kernel's own sums over all VMAs of process `pid` (None: this one): name, as smaps_rollup has it -> bytes.

    Raises as `read_smaps`; HostError ESRCH where the process has no memory any more.

    >>> rollup = smaps_rollup()
    >>> 0 < rollup["Pss"] <= rollup["Rss"]
    True
    """
    fd = open_proc("smaps_rollup", "smaps_rollup", pid)
    try:
        with os.fdopen(fd, "rb") as file:
            text = file.read()
    except ProcessLookupError:
        raise HostError(errno.ESRCH, "read", "path", f"/proc/{pid}/smaps_rollup", "a process that is alive") from None
    return {name.decode(): int(rest.split()[0]) * KiB for name, rest in _LINES.findall(text)}


def target_range(call: str, target: Target, offset: int, size: int | None) -> tuple[int, int]:
    """(hva, size) of `size` bytes (None: all the rest) of `target` from `offset`, whole pages; errors name `call`.

    `target` is a Mapping, something with a `mapping` such as a RamBlock, or a tuple (hva, size).
    """
    if isinstance(target, tuple) and len(target) == 2:
        start, whole = page_range(call, *target)
    else:
        target = getattr(target, "mapping", target)
        try:
            start, whole = target.hva, target.size  # type: ignore[union-attr]  # asked for, not assumed
        except AttributeError:
            raise ArgumentTypeError(call, "target", target, "a Mapping, a RamBlock, or (hva, size)") from None
    offset = index(offset, call, "offset")
    if offset % PAGE_SIZE or not 0 <= offset <= whole:
        raise ArgumentError(call, "offset", offset, f"a multiple of {PAGE_SIZE} from 0 to {whole:#x}")
    size = whole - offset if size is None else index(size, call, "size")
    if size % PAGE_SIZE or not 0 <= size <= whole - offset:
        raise ArgumentError(call, "size", size, f"a multiple of {PAGE_SIZE} from 0 to {whole - offset:#x}")
    return start + offset, size


def account(target: Target, offset: int = 0, size: int | None = None, *, pid: int | None = None) -> Accounting:
    """What `size` bytes (None: all the rest) of `target` from `offset` cost process `pid` (None: this one).

    `target` is a Mapping, a RamBlock, or (hva, size), the only one that makes sense with a `pid`; whole pages.

    Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of open (ENOENT, EACCES, EPERM) and, where a VMA is
    to be cut, of ioctl PAGEMAP_SCAN (ENOTTY before Linux 6.7).  Threads: any; what changes meanwhile is counted as it
    was or as it is.

    >>> from hvmodel.host import Mapping
    >>> with Mapping(None, "64K", shared=True) as memory:
    ...     memory.write(0x1000, bytes(0x3000))
    ...     found = account(memory)
    >>> found.rss, found.dirty, found.swapped
    (12288, 12288, 0)
    """
    start, size = target_range("account", target, offset, size)
    end = start + size
    parts: list[dict[str, int | None]] = []
    cut = False
    for vma in read_smaps(pid, start, end):
        if start <= vma.start and vma.end <= end:
            parts.append(_of_vma(vma))
        else:
            cut = True
            parts.append(_of_pages(vma, max(start, vma.start), min(end, vma.end), pid))
    return _sum(start, size, parts, cut)


def _sum(start: int, size: int, parts: list[dict[str, int | None]], cut: bool) -> Accounting:
    # The sum of something unknown and anything is unknown.
    found: dict[str, Any] = {}
    for field in _FIELDS:
        values = [part[field] for part in parts]
        found[field] = None if None in values else sum(value or 0 for value in values)
    return Accounting(Hva(start), size, **found, vmas=len(parts), cut=cut)


def _of_vma(vma: Vma) -> dict[str, int | None]:
    # The numbers of a whole VMA, from smaps.
    return {
        "mapped": vma.size,
        "rss": vma.rss,
        "pss": vma.pss,
        "shared": vma.shared_clean + vma.shared_dirty,
        "private": vma.private_clean + vma.private_dirty,
        "dirty": vma.shared_dirty + vma.private_dirty,
        "anon": vma.anonymous,
        "huge": vma.anon_huge_pages + vma.shmem_pmd_mapped + vma.file_pmd_mapped,
        "hugetlb": vma.shared_hugetlb + vma.private_hugetlb,
        "swapped": vma.swap,
    }


def _of_pages(vma: Vma, start: int, end: int, pid: int | None) -> dict[str, int | None]:
    # The numbers of [start, end) in `vma`, by its pages.
    found: dict[str, int | None] = dict.fromkeys(("rss", "shared", "private", "anon", "huge", "hugetlb", "swapped"), 0)
    found |= {"mapped": end - start, "pss": 0, "dirty": None}
    if "pf" in vma.flags:
        return found  # page frames that are no memory: smaps counts none of them either
    there = Category.PRESENT | Category.SWAPPED
    wanted = there | Category.FILE | Category.HUGE | Category.PFNZERO
    rss = anon = huge = swapped = private = 0
    pss: float | None = 0.0
    spans: list[tuple[int, int]] = []  # where there is something, for the counts
    with PageMap(pid) as pages:
        for region in pages.scan(start, end, anyof=there, returned=wanted).regions:
            if spans and region.start - spans[-1][1] <= _NEAR:
                spans[-1] = (spans[-1][0], region.end)
            else:
                spans.append((region.start, region.end))
            if not region.categories & Category.PRESENT or region.categories & Category.PFNZERO:
                continue  # the zero page is nobody's
            size = region.end - region.start
            rss += size
            anon += 0 if region.categories & Category.FILE else size
            huge += size if region.categories & Category.HUGE else 0
        if "ht" in vma.flags:
            return found | {"hugetlb": rss}
        for first, last in spans:
            for at in range(first, last, RANGE_MAX):
                piece = min(last - at, RANGE_MAX)
                counts = pages.count(at, piece)
                swapped += counts.swapped * PAGE_SIZE
                private += counts.exclusive * PAGE_SIZE
                try:
                    pss = pss + pages.pss(at, piece) if pss is not None else None
                except HostError as error:
                    if error.errno not in (errno.EACCES, errno.EPERM):
                        raise
                    pss = None
    found |= {"rss": rss, "anon": anon, "huge": huge, "private": private, "shared": rss - private}
    found["swapped"] = None if vma.shared and vma.inode and _host_swaps() else swapped
    found["pss"] = None if pss is None else round(pss)
    return found


def _host_swaps() -> bool:
    # Whether there is a swap area; the first line of /proc/swaps is a heading.
    with open("/proc/swaps", encoding="utf-8", errors="replace") as file:
        return len(file.readlines()) > 1
