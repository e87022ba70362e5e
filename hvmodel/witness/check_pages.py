"""Checks of hvmodel.host.pagemap and smaps: different files of the kernel about the same pages must agree.

What is looked at are processes of our own that are stopped, so that nothing of theirs changes between two looks: each
maps and touches pages of all kinds at random places (`_SCRIPT`), and sleeps.  How many other processes map a library's
pages does change; what depends on that is compared only where two looks, before and after, were equal.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager

from ..host.pageframe import PageFlags, kpagecount, kpageflags
from ..host.pagemap import ADDRESSES, Category, PageMap
from ..host.smaps import Accounting, account, read_smaps, smaps_rollup
from ..units import PAGE_SIZE
from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..host.pagemap import PageEntry, PageRegion
    from ..host.smaps import Vma
    from .result import Tally

__all__ = ["check_accounting", "check_page_frames", "check_pagemap_scan", "check_smaps_sums"]

# Anonymous memory, private and shared, written and only read; a memory file, shared, and private with some pages
# copied; one page of it mapped twice; huge pages where the host gives them; a guard region where it has those.
_SCRIPT = """
import mmap, os, random, sys
random.seed(int(sys.argv[1]))
P, S = mmap.MAP_PRIVATE, mmap.MAP_SHARED
A = mmap.MAP_ANONYMOUS
kept = []
def touch(m, write):
    for page in random.sample(range(len(m) // 4096), random.randrange(len(m) // 4096)):
        if write:
            m[page * 4096] = 1
        else:
            m[page * 4096]
for flags in (P, S, P, S):
    m = mmap.mmap(-1, 4096 * random.randrange(1, 300), flags=flags | A)
    touch(m, random.random() < 0.7)
    touch(m, random.random() < 0.3)
    kept.append(m)
fd = os.memfd_create("checked")
os.truncate(fd, 200 * 4096)
for flags in (S, P, P):
    m = mmap.mmap(fd, 200 * 4096, flags=flags)
    touch(m, False)
    touch(m, random.random() < 0.6)
    kept.append(m)
kept.append(mmap.mmap(fd, 4096, flags=S))
m = mmap.mmap(-1, 6 << 20, flags=P | A)
try:
    m.madvise(mmap.MADV_HUGEPAGE)
except OSError:
    pass
m[random.randrange(6 << 20)] = 1
kept.append(m)
m = mmap.mmap(-1, 64 * 4096, flags=P | A)
touch(m, True)
try:
    m.madvise(102, 16 * 4096, 8 * 4096)
except OSError:
    pass
kept.append(m)
print("ready", flush=True)
input()
"""


@contextmanager
def _stopped(seed: int) -> Iterator[int]:
    # The number of such a process, stopped.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SCRIPT, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            if process.stdout is None or process.stdout.readline() != b"ready\n":
                raise Lacking("the process that is looked at did not start")
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            yield process.pid
        finally:
            process.kill()


def _vmas(pid: int) -> list[Vma]:
    # All VMAs but the page at the top of the kernel's addresses, which belongs to no process.
    return [vma for vma in read_smaps(pid) if vma.end <= ADDRESSES]


@check("sums over smaps", "smaps_rollup and statm", cases=3, slow=30)
def check_smaps_sums(tally: Tally, cases: int) -> None:
    """The sums of what was read from smaps are the kernel's own, of `cases` processes; Pss to 1 KiB for each VMA."""
    for seed in range(cases):
        with _stopped(seed) as pid:
            vmas, rollup = _steady(pid)
            with open(f"/proc/{pid}/statm", encoding="ascii") as file:
                size, resident, shared = (int(word) * PAGE_SIZE for word in file.read().split()[:3])
        total = Accounting.of(vmas)
        # smaps_rollup's word -> ours.
        sums = {
            "Rss": total.rss,
            "Anonymous": total.anon,
            "Shared_Clean": sum(vma.shared_clean for vma in vmas),
            "Shared_Dirty": sum(vma.shared_dirty for vma in vmas),
            "Private_Clean": sum(vma.private_clean for vma in vmas),
            "Private_Dirty": sum(vma.private_dirty for vma in vmas),
            "AnonHugePages": sum(vma.anon_huge_pages for vma in vmas),
            "Swap": sum(vma.swap for vma in vmas),
            "Locked": sum(vma.locked for vma in vmas),
        }
        for name, ours in sums.items():
            tally.compare(f"process {seed}: {name}", ours, rollup[name])
        close = 0 <= rollup["Pss"] - (total.pss or 0) <= len(vmas) * 1024  # each was rounded down
        tally.compare(f"process {seed}: Pss {total.pss} is near {rollup['Pss']}", close, True)
        tally.compare(f"process {seed}: size", sum(vma.size for vma in vmas), size)
        # Before Linux 6.17 statm is what counters of each processor have told so far.
        if _kernel() >= (6, 17):
            tally.compare(f"process {seed}: statm resident", total.rss, resident)
            tally.compare(f"process {seed}: statm shared", total.rss - total.anon, shared)
        else:
            tally.lack("statm is approximate before Linux 6.17")


def _steady(pid: int) -> tuple[list[Vma], dict[str, int]]:
    # Its VMAs, and the kernel's sums over them that were the same before and after.
    rollup = smaps_rollup(pid)
    for _ in range(20):
        vmas, before, rollup = _vmas(pid), rollup, smaps_rollup(pid)
        if before == rollup:
            return vmas, rollup
    raise Lacking("other processes that map and unmap the same libraries all the time")


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


@check("accounting by pages", "smaps", cases=3, slow=30)
def check_accounting(tally: Tally, cases: int) -> None:
    """A VMA cut in two, each part counted by its pages: the sums are what smaps says of the whole VMA."""
    for seed in range(cases):
        dice = random.Random(seed)
        with _stopped(seed) as pid:
            for vma in _vmas(pid):
                if vma.size < 2 * PAGE_SIZE:
                    continue
                at = dice.randrange(1, vma.size // PAGE_SIZE) * PAGE_SIZE
                parts = [
                    account((vma.start, at), pid=pid),
                    account((vma.start + at, vma.size - at), pid=pid),
                ]
                whole = Accounting.of([vma])
                # Others map the pages of a file of the disk too.
                alone = not vma.inode or vma.path.startswith(("/memfd:", "/dev/zero"))
                where = f"process {seed}, {vma.path or 'anonymous'} at {vma.start:#x}, cut at {at:#x}"
                fields = ["mapped", "rss", "anon", "huge", "hugetlb", "swapped"]
                for field in [*fields, "shared", "private"] if alone else fields:
                    values = [getattr(part, field) for part in parts]
                    if None in values:
                        tally.lack(f"{field} of shared memory, for this host swaps")
                        continue
                    tally.compare(f"{where}: {field}", sum(values), getattr(whole, field))
                shares = [part.pss for part in parts]
                if None in shares:
                    tally.lack("pss by pages takes root")
                if None in shares or not alone:
                    continue
                near = abs(sum(share or 0 for share in shares) - (whole.pss or 0)) <= 1024 + len(parts)
                tally.compare(f"{where}: pss {shares} is near {whole.pss}", near, True)


@check("PAGEMAP_SCAN regions", "pagemap words", cases=200, slow=5000)
def check_pagemap_scan(tally: Tally, cases: int) -> None:
    """Random masks: the pages in our regions are those whose words match, and the regions are as long as can be."""
    said: dict[Category, Callable[[PageEntry], bool]] = {
        Category.PRESENT: lambda entry: entry.present,
        Category.SWAPPED: lambda entry: entry.swap_type is not None,
        Category.FILE: lambda entry: entry.file,
        Category.GUARD: lambda entry: entry.guard,
    }
    known = Category(sum(said))
    done = 0
    seed = 0
    while done < cases:
        dice = random.Random(seed)
        with _stopped(seed) as pid, PageMap(pid) as pages:
            vmas = [vma for vma in _vmas(pid) if not {"pf", "io"} & set(vma.flags)]
            for _ in range(min(50, cases - done)):
                vma = dice.choice(vmas)
                mask, anyof, inverted, returned = (Category(dice.randrange(512)) & known for _ in range(4))
                if dice.random() < 0.5:
                    mask = Category(0)
                try:
                    found = pages.scan(vma.start, vma.end, mask=mask, anyof=anyof, inverted=inverted, returned=returned)
                except OSError as error:
                    if error.errno == errno.ENOTTY and not tally.compared:
                        raise Lacking("PAGEMAP_SCAN needs Linux 6.7") from None
                    raise
                theirs: list[tuple[int, int, int]] = []
                for number, entry in enumerate(pages.entries(vma.start, vma.size)):
                    have = sum(int(category) for category, test in said.items() if test(entry))
                    flipped = have ^ inverted
                    if flipped & mask != mask or (anyof and not flipped & anyof):
                        continue
                    start = vma.start + number * PAGE_SIZE
                    if theirs and theirs[-1][1] == start and theirs[-1][2] == have & returned:
                        theirs[-1] = (theirs[-1][0], start + PAGE_SIZE, have & returned)
                    else:
                        theirs.append((start, start + PAGE_SIZE, have & returned))
                case = f"process {seed}, {vma.start:#x}: mask={mask!r} anyof={anyof!r} inverted={inverted!r}"
                tally.compare(case, [_plain(region) for region in found.regions], theirs)
                done += 1
        seed += 1


def _plain(region: PageRegion) -> tuple[int, int, int]:
    return region.start, region.end, int(region.categories)


@check("pagemap entries", "kpagecount and kpageflags", cases=200, slow=5000)
def check_page_frames(tally: Tally, cases: int) -> None:
    """Of a page that is present: exclusive where it is mapped once, file or anonymous, and huge as its frame says."""
    done = seed = 0
    while done < cases:
        dice = random.Random(seed)
        with _stopped(seed) as pid, PageMap(pid) as pages:
            vmas = [vma for vma in _vmas(pid) if vma.rss]
            for _ in range(min(100, cases - done)):
                vma = dice.choice(vmas)
                entries = [entry for entry in pages.entries(vma.start, vma.size) if entry.present]
                if not entries:
                    continue
                entry = dice.choice(entries)
                if entry.pfn is None:
                    raise Lacking("page frame numbers take root")
                count, flags = kpagecount(entry.pfn), kpageflags(entry.pfn)
                if entry not in pages.entries(vma.start, vma.size):
                    continue  # another process has mapped or unmapped it meanwhile
                case = f"process {seed}, page frame {entry.pfn:#x}"
                done += 1
                if flags & PageFlags.ZERO_PAGE:
                    tally.compare(f"{case}, the zero page", (entry.exclusive, entry.file), (False, False))
                    continue
                tally.compare(f"{case}: exclusive", entry.exclusive, count == 1)
                tally.compare(f"{case}: file", entry.file, not flags & PageFlags.ANON)
                tally.compare(f"{case}: mapped", True, bool(flags & PageFlags.MMAP))
        seed += 1
