"""Accounting: what was touched is what it costs, and pmap says the same."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel import RamBlock
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.host import F_SEAL_SHRINK, Mapping, MemFd
from hvmodel.host import smaps as smaps_module
from hvmodel.host.smaps import Accounting, Vma, account, read_smaps, smaps_rollup
from tests.need import need

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)


def touch(memory: Mapping, *pages: int) -> None:
    for page in pages:
        memory.write(page * PAGE, b"x")


# ---- whole mappings ----


def test_a_memory_file() -> None:
    with MemFd("whole", 64 * PAGE, seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, 64 * PAGE) as memory:
        assert account(memory) == Accounting(
            start=memory.hva, size=64 * PAGE, mapped=64 * PAGE, rss=0, pss=0, shared=0, private=0, dirty=0, anon=0,
            huge=0, hugetlb=0, swapped=0, vmas=1, cut=False,
        )  # fmt: skip
        touch(memory, 1, 2, 50)
        found = account(memory)
        assert (found.rss, found.pss, found.private, found.shared, found.dirty) == (3 * PAGE,) * 3 + (0, 3 * PAGE)
        assert (found.anon, found.resident, found.cut) == (0, 3 * PAGE, False)
        # Only in the file: of another process, say.
        os.pwrite(memfd.fd, b"x", 30 * PAGE)
        assert account(memory).rss == 3 * PAGE
        with Mapping(memfd, 64 * PAGE) as other:
            touch(other, 2)
            # A write maps its own page alone.
            assert account(other).shared == PAGE
            found = account(memory)
            assert (found.rss, found.shared, found.private, found.pss) == (3 * PAGE, PAGE, 2 * PAGE, 5 * PAGE // 2)


def test_private_copies_are_anonymous() -> None:
    with MemFd("copies", 16 * PAGE, seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, 16 * PAGE, shared=False) as memory:
        touch(memory, 3, 4)
        found = account(memory)
        assert (found.rss, found.anon, found.dirty, found.private) == (2 * PAGE,) * 4


def test_reading_makes_no_anonymous_memory() -> None:
    with Mapping(None, 16 * PAGE, shared=False) as memory:
        memory.read(0, 16 * PAGE)  # all of it the zero page
        assert (account(memory).rss, account(memory, 0, 8 * PAGE).rss) == (0, 0)


def test_a_ram_block() -> None:
    with RamBlock("pc.ram", 64 * PAGE) as block:
        block.write(5 * PAGE, b"x")
        assert (account(block).rss, account(block).dirty) == (PAGE, PAGE)
        assert account(block) == account(block.mapping)
        assert account(block, 5 * PAGE, PAGE).rss == PAGE
        assert account(block, 6 * PAGE).rss == 0


def test_huge_pages() -> None:
    with Mapping(None, "6M", shared=False) as memory:
        if libc.madvise(ctypes.c_void_p(memory.hva), ctypes.c_size_t(memory.size), mmap.MADV_HUGEPAGE):
            pytest.skip("needs huge pages")
        huge = (memory.hva + (2 << 20) - 1) & -(2 << 20)
        memory.write(huge - memory.hva, b"x")
        found = account(memory)
        if found.rss != 2 << 20:
            pytest.skip("needs huge pages for anonymous memory")
        assert (found.huge, found.anon) == (2 << 20, 2 << 20)
        half = account((huge, 1 << 20))
        assert (half.cut, half.rss, half.huge, half.anon, half.private) == (True, *[1 << 20] * 4)


# ---- parts ----


@settings(max_examples=40, deadline=None)
@given(
    writes=st.sets(st.integers(0, 63), max_size=30),
    cut=st.tuples(st.integers(0, 64), st.integers(0, 64)).map(sorted),
    kind=st.sampled_from(["file", "private", "anonymous"]),
)
def test_a_part_is_counted_by_pages(writes: set[int], cut: list[int], kind: str) -> None:
    first, last = cut
    with MemFd("part", 64 * PAGE, seals=F_SEAL_SHRINK) as memfd:
        source = None if kind == "anonymous" else memfd
        with Mapping(source, 64 * PAGE, shared=kind == "file") as memory:
            touch(memory, *writes)
            found = account(memory, first * PAGE, (last - first) * PAGE)
            expected = sum(first <= page < last for page in writes) * PAGE
            assert (found.mapped, found.rss, found.private) == ((last - first) * PAGE, expected, expected)
            assert found.anon == (0 if kind == "file" else expected)
            # A neighbour of the same kind may be of the same VMA, so that all of a mapping can be a part of one.
            assert found.cut or (first, last) in ((0, 64), (first, first))
            assert found.dirty == (None if found.cut else expected)


def test_pss_of_a_part() -> None:
    need("root")
    with (
        MemFd("share", 16 * PAGE, seals=F_SEAL_SHRINK) as memfd,
        Mapping(memfd, 16 * PAGE) as one,
        Mapping(memfd, 16 * PAGE) as two,
        Mapping(memfd, 16 * PAGE) as three,
    ):
        touch(one, 1, 2, 3)
        touch(two, 2, 3)
        touch(three, 3)
        found = account(one, PAGE, 8 * PAGE)
        # 1 alone, 2 by two, 3 by three.
        assert (found.cut, found.pss) == (True, round(PAGE + PAGE / 2 + PAGE / 3))
        assert (found.private, found.shared) == (PAGE, 2 * PAGE)
        assert account(one).pss == (PAGE + PAGE // 2 + PAGE // 3) // 1024 * 1024  # smaps has KiB


def test_a_range_of_several_vmas_and_holes() -> None:
    with Mapping(None, 64 * PAGE, shared=False) as memory:
        touch(memory, 0, 10, 20, 30)
        assert libc.mprotect(ctypes.c_void_p(memory.hva + 8 * PAGE), ctypes.c_size_t(4 * PAGE), mmap.PROT_READ) == 0
        assert libc.munmap(ctypes.c_void_p(memory.hva + 16 * PAGE), ctypes.c_size_t(8 * PAGE)) == 0
        found = account(memory)
        assert (found.vmas, found.mapped, found.rss) == (4, 56 * PAGE, 3 * PAGE)
        assert [vma.prot for vma in read_smaps(None, memory.hva, memory.hva + 16 * PAGE)] == ["rw-", "r--", "rw-"]
        gone = account((memory.hva + 16 * PAGE, 8 * PAGE))
        assert (gone.vmas, gone.mapped, gone.rss, gone.cut) == (0, 0, 0, False)


def test_a_part_of_more_than_one_call_counts() -> None:
    # 200 GiB of addresses: the parts between the pages are left out, and the counts of more than 64 GiB are divided.
    with Mapping(None, 200 << 30, shared=False, noreserve=True) as memory:
        touch(memory, 1, 600, 70 << 18, 199 << 18)
        found = account(memory, 0, 199 << 30)
        assert (found.cut, found.rss, found.private, found.anon, found.swapped) == (True, *[3 * PAGE] * 3, 0)
        assert found.pss in (3 * PAGE, None)


# ---- smaps itself ----

SMAPS = b"""\
7f0000000000-7f0000200000 rw-s 00001000 00:01 4242                       /memfd:two words\\012 (deleted)
Size:               2048 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                 100 kB
Pss:                  50 kB
Pss_Dirty:            25 kB
Shared_Clean:          1 kB
Shared_Dirty:          2 kB
Private_Clean:         3 kB
Private_Dirty:         4 kB
Referenced:            5 kB
Anonymous:             6 kB
KSM:                   7 kB
LazyFree:              8 kB
AnonHugePages:         9 kB
ShmemPmdMapped:       10 kB
FilePmdMapped:        11 kB
Shared_Hugetlb:       12 kB
Private_Hugetlb:      13 kB
Swap:                 14 kB
SwapPss:              15 kB
Locked:               16 kB
SomethingNew:         17 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd wr sh dc hg
7f0000300000-7f0000301000 ---p 00000000 00:00 0
Size:                  4 kB
Rss:                   4 kB
VmFlags: mr
"""


def test_parsing() -> None:
    first, second = smaps_module._parse(iter(SMAPS.splitlines(keepends=True)))
    assert first == Vma(
        0x7F0000000000, 0x7F0000200000, "rw-", True, 0x1000, "00:01", 4242, "/memfd:two words\n (deleted)",
        ("rd", "wr", "sh", "dc", "hg"), 4 << 10,
        *(kib << 10 for kib in (100, 50, *range(1, 17))),
    )  # fmt: skip
    assert (second.prot, second.shared, second.path, second.rss, second.flags) == ("---", False, "", 4096, ("mr",))
    assert (first.size, second.size) == (2 << 20, 4096)
    assert Accounting.of([first, second]) == Accounting(
        start=0x7F0000000000, size=0x301000, mapped=(2 << 20) + 4096, rss=104 << 10, pss=50 << 10, shared=3 << 10,
        private=7 << 10, dirty=6 << 10, anon=6 << 10, huge=30 << 10, hugetlb=25 << 10, swapped=14 << 10, vmas=2,
        cut=False,
    )  # fmt: skip
    assert Accounting.of([first]).resident == 125 << 10


def test_a_name_with_a_newline_that_looks_like_a_line() -> None:
    with MemFd("x\nRss: 99 kB", PAGE, seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, PAGE) as memory:
        (vma,) = read_smaps(None, memory.hva, memory.hva + PAGE)
        assert (vma.path, vma.rss, vma.inode) == ("/memfd:x\nRss: 99 kB (deleted)", 0, os.fstat(memfd.fd).st_ino)


def test_vmas_are_those_of_maps() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as child:
        wait_until_it_reads(child.pid)
        with open(f"/proc/{child.pid}/maps") as file:
            lines = file.read().splitlines()
        vmas = list(read_smaps(child.pid))
        for line, vma in zip(lines, vmas, strict=True):
            words = line.split(maxsplit=5)
            assert words[0] == f"{vma.start:08x}-{vma.end:08x}"
            assert words[1] == vma.prot + ("s" if vma.shared else "p")
            assert (int(words[2], 16), words[3], int(words[4])) == (vma.offset, vma.device, vma.inode)
            assert (words[5] if len(words) > 5 else "") == vma.path
        # From one in the middle to another.
        assert list(read_smaps(child.pid, vmas[3].start, vmas[6].start + 1)) == vmas[3:7]
        assert list(read_smaps(child.pid, vmas[3].end - 1, vmas[4].start)) == vmas[3:4]
        child.kill()


def wait_until_it_reads(pid: int) -> None:
    # Its memory changes no more: it is in read(2), system call 0.
    while True:
        with open(f"/proc/{pid}/syscall") as file:
            if file.read().startswith("0 0x0 "):
                return


def test_pmap_says_the_same() -> None:
    need("pmap")
    code = "import mmap\nm = mmap.mmap(-1, 1 << 20)\nm[4096:20480] = bytes(16384)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as child:
        wait_until_it_reads(child.pid)
        done = subprocess.run(["pmap", "-x", str(child.pid)], capture_output=True, text=True, check=True)
        theirs = {}
        for line in done.stdout.splitlines():
            words = line.split()
            if words and len(words[0]) == 16 and all(word.isdecimal() for word in words[1:4]):
                theirs[int(words[0], 16)] = [int(word) * 1024 for word in words[1:4]]
        ours = {}
        for vma in read_smaps(child.pid):
            found = account((vma.start, vma.size), pid=child.pid) if vma.end < 1 << 47 else Accounting.of([vma])
            ours[vma.start] = [found.size, found.rss, found.dirty]
        assert [1 << 20, 16384, 16384] in ours.values()
        assert ours == theirs
        child.kill()


def test_rollup() -> None:
    # A process that just began to wait, so that its numbers stand still.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as child:
        wait_until_it_reads(child.pid)
        rollup = smaps_rollup(child.pid)
        assert rollup["Rss"] == sum(vma.rss for vma in read_smaps(child.pid))
        assert rollup["Rss"] >= rollup["Pss"] > 0
        child.kill()
        # Dead, not yet waited for: /proc still has it, and it has no memory.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(HostError, match="it has ended") as caught:
            smaps_rollup(child.pid)
        assert (caught.value.errno, caught.value.call) == (errno.ESRCH, "open")
        assert list(read_smaps(child.pid)) == []


def test_a_process_that_ends_while_it_is_looked_at() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as child:
        wait_until_it_reads(child.pid)
        vmas = read_smaps(child.pid)
        first = next(vmas)
        child.kill()
        child.wait()
        # The buffer has some more; then there are none.
        assert all(vma.start >= first.end for vma in vmas)


# ---- what is refused ----


def test_bad_targets() -> None:
    with Mapping(None, 4 * PAGE) as memory:
        for bad in (None, 5, "text", (1, 2, 3), [memory.hva, PAGE], object()):
            with pytest.raises(ArgumentTypeError, match="target"):
                account(bad)
        for offset, size, field in [
            (1, None, "offset"), (-PAGE, None, "offset"), (5 * PAGE, None, "offset"),
            (0, 1, "size"), (0, -PAGE, "size"), (0, 5 * PAGE, "size"), (4 * PAGE, PAGE, "size"),
        ]:  # fmt: skip
            with pytest.raises(ArgumentError) as caught:
                account(memory, offset, size)
            assert (caught.value.call, caught.value.field) == ("account", field)
        with pytest.raises(ArgumentTypeError):
            account(memory, "0")
        with pytest.raises(ArgumentError, match="hva"):
            account((memory.hva + 1, PAGE))
        assert account(memory, 4 * PAGE).size == 0
    with pytest.raises(ClosedError):
        account(memory)


def test_no_such_process() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    for call in (lambda: list(read_smaps(child.pid)), lambda: smaps_rollup(child.pid)):
        with pytest.raises(HostError, match="no such process") as caught:
            call()
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(ArgumentError, match="pid"):
        account((0, PAGE), pid=-5)


def test_an_iterator_that_nobody_begins_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the file
        for _ in range(3):
            read_smaps()
        gc.collect()
    assert os.listdir("/proc/self/fd") == before
