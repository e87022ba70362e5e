"""Page tables as the kernel shows them: every bit is made to be seen by doing what sets it."""

from __future__ import annotations

import copy
import ctypes
import errno
import mmap
import os
import pickle
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel._ffi import lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.host import F_SEAL_SHRINK, Mapping, MemFd
from hvmodel.host import pagemap as pagemap_module
from hvmodel.host.pageframe import PageFlags, kpagecount, kpageflags
from hvmodel.host.pagemap import ADDRESSES, Category, PageCounts, PageEntry, PageMap, mincore
from tests.host.held import nothing_leaks
from tests.need import need

PAGE = 4096
MADV_GUARD_INSTALL = 102
MADV_PAGEOUT = 21

libc = ctypes.CDLL(None, use_errno=True)


def madvise(mapping: Mapping, offset: int, size: int, advice: int) -> None:
    """The system call, so that these tests hang on no method of ours."""
    if libc.madvise(ctypes.c_void_p(mapping.hva + offset), ctypes.c_size_t(size), advice):
        pytest.skip(f"needs madvise {advice}: {os.strerror(ctypes.get_errno())}")


def raw(hva: int, nr: int) -> list[int]:
    """The words of this process's pagemap, read without our code."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(hva // PAGE * 8)
        return list(struct.unpack(f"={nr}Q", file.read(nr * 8)))


# ---- words ----


def test_words_are_the_files() -> None:
    with Mapping(None, 64 * PAGE) as memory, PageMap() as pages:
        for page in (0, 1, 5, 63):
            memory.write(page * PAGE, b"x")
        words = pages.words(memory.hva, memory.size)
        assert (words.format, len(words)) == ("Q", 64)
        assert list(words) == raw(memory.hva, 64)
        assert [page for page in range(64) if words[page] >> 63] == [0, 1, 5, 63]
        assert pages.words(memory.hva, 0).nbytes == 0


def test_a_long_range_is_read_whole() -> None:
    # More than the kernel walks at a time (2 MiB) and than C has buffer for.
    with Mapping(None, "9M") as memory, PageMap() as pages:
        touched = [0, 511, 512, 513, 1023, 2047, 9 * 256 - 1]
        for page in touched:
            memory.write(page * PAGE, b"x")
        assert [n for n, word in enumerate(pages.words(memory.hva, memory.size)) if word >> 63] == touched
        assert pages.count(memory.hva, memory.size).present == len(touched)


# Bits of Documentation/admin-guide/mm/pagemap.rst, written out here.
BITS = {"present": 63, "file": 61, "guard": 58, "uffd_wp": 57, "exclusive": 56, "soft_dirty": 55}


@given(st.integers(0, (1 << 64) - 1))
def test_decoding(word: int) -> None:
    entry = PageEntry(word)
    for name, bit in BITS.items():
        assert getattr(entry, name) is bool(word & 1 << bit), name
    low = word % (1 << 55)
    if word & 1 << 62:
        assert (entry.swap_type, entry.swap_offset) == (low % 32, low // 32)
    else:
        assert (entry.swap_type, entry.swap_offset, entry.swapped) == (None, None, False)
    assert entry.pfn == (low or None if word & 1 << 63 else None)
    assert all(name in repr(entry) for name in BITS if getattr(entry, name))


def test_repr() -> None:
    assert repr(PageEntry(0)) == "PageEntry(nothing)"
    assert repr(PageEntry(0x4200000000000045)) == "PageEntry(swap uffd_wp swap_type=5 swap_offset=0x2)"


def test_kinds_of_memory() -> None:
    with (
        MemFd("kinds", 2 * PAGE, seals=F_SEAL_SHRINK) as memfd,
        Mapping(memfd, 2 * PAGE) as shared,
        Mapping(memfd, 2 * PAGE, shared=False) as private,
        Mapping(None, 2 * PAGE, shared=False) as anonymous,
        PageMap() as pages,
    ):
        shared.write(0, b"ab")
        shared.write(PAGE, b"cd")
        private.read(0, 1)
        private.write(PAGE, b"copied")
        anonymous.write(0, b"x")
        found = {
            name: (entry.present, entry.file, entry.exclusive)
            for name, entry in {
                "mapped twice": pages.entry(shared.hva),
                "mapped here too": pages.entry(private.hva + 5),  # any address of the page
                "mapped once": pages.entry(shared.hva + PAGE),
                "a private copy": pages.entry(private.hva + PAGE),
                "anonymous": pages.entry(anonymous.hva),
                "not touched": pages.entry(anonymous.hva + PAGE),
            }.items()
        }
        assert found == {
            "mapped twice": (True, True, False),
            "mapped here too": (True, True, False),
            "mapped once": (True, True, True),
            "a private copy": (True, False, True),
            "anonymous": (True, False, True),
            "not touched": (False, False, False),
        }


def test_page_frames() -> None:
    need("root")
    with (
        MemFd("frames", 2 * PAGE, seals=F_SEAL_SHRINK) as memfd,
        Mapping(memfd, 2 * PAGE) as one,
        Mapping(memfd, 2 * PAGE) as other,
        Mapping(None, 2 * PAGE, shared=False) as anonymous,
        PageMap() as pages,
    ):
        one.write(0, b"ab")
        other.read(0, 1)
        one.write(PAGE, b"cd")  # only now, for a read maps the file's pages around it too
        anonymous.write(0, b"x")
        anonymous.read(PAGE, 1)  # the zero page
        first, second = (pages.entry(one.hva + offset).pfn for offset in (0, PAGE))
        assert first == pages.entry(other.hva).pfn
        assert first != second
        assert (kpagecount(first), kpagecount(second)) == (2, 1)
        memfd_flags = kpageflags(first)
        assert memfd_flags & (PageFlags.MMAP | PageFlags.SWAPBACKED) == PageFlags.MMAP | PageFlags.SWAPBACKED
        assert not memfd_flags & (PageFlags.ANON | PageFlags.ZERO_PAGE | PageFlags.NOPAGE)
        assert kpageflags(pages.entry(anonymous.hva).pfn) & PageFlags.ANON
        zero = pages.entry(anonymous.hva + PAGE)
        assert kpageflags(zero.pfn) & PageFlags.ZERO_PAGE
        assert not zero.exclusive


def test_a_page_that_is_locked_is_unevictable() -> None:
    need("root")
    with Mapping(None, PAGE, shared=False) as memory, PageMap() as pages:
        memory.write(0, b"x")
        assert not kpageflags(pages.entry(memory.hva).pfn) & PageFlags.UNEVICTABLE
        assert libc.mlock(ctypes.c_void_p(memory.hva), ctypes.c_size_t(PAGE)) == 0
        flags = kpageflags(pages.entry(memory.hva).pfn)
        assert flags & PageFlags.UNEVICTABLE or flags & 1 << 33  # KPF_MLOCKED; the lists may lag behind


def test_kpage_refuses() -> None:
    need("root")
    for call in (kpagecount, kpageflags):
        for bad in (-1, 1 << 52):
            with pytest.raises(ArgumentError, match=f"{call.__name__}: pfn="):
                call(bad)
        with pytest.raises(ArgumentError, match="below the end of this host's memory"):
            call((1 << 52) - 1)
        with pytest.raises(ArgumentTypeError):
            call("1")


def test_page_frames_are_hidden_from_others() -> None:
    # As another user: page frame numbers read as 0, and kpagecount is not to be opened.
    need("root")
    code = (
        "import ctypes, os\n"
        "from hvmodel.errors import HostError\n"
        "from hvmodel.host import Mapping, PageMap, account, kpagecount\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: its own /proc/self again\n"
        "with Mapping(None, 65536) as memory, PageMap() as pages:\n"
        "    memory.write(0, b'x')\n"
        "    entry = pages.entry(memory.hva)\n"
        "    print(entry.present, entry.pfn)\n"
        "    for call in (lambda: kpagecount(1), lambda: pages.pss(memory.hva, 4096)):\n"
        "        try: call()\n"
        "        except HostError as error: print(error.errno, error.accepted)\n"
        "    found = account(memory, 0, 8192)\n"
        "    print(found.cut, found.rss, found.pss, found.dirty)\n"
        "try: PageMap(1)\n"
        "except HostError as error: print(error.errno, error.call, error.value, error.accepted)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "True None",
        "13 root (CAP_SYS_ADMIN)",
        "13 root (CAP_SYS_ADMIN)",
        "True 4096 None None",
        "13 open /proc/1/pagemap a process of this user that may be traced (ptrace(2)), or CAP_SYS_PTRACE",
    ], done.stderr


def test_guard_regions() -> None:
    with Mapping(None, 8 * PAGE, shared=False) as memory, PageMap() as pages:
        memory.write(0, b"x" * (8 * PAGE))
        madvise(memory, 2 * PAGE, 3 * PAGE, MADV_GUARD_INSTALL)
        entries = pages.entries(memory.hva, memory.size)
        assert [entry.guard for entry in entries] == [False] * 2 + [True] * 3 + [False] * 3
        # They look like swap, and are none.
        assert entries[2].swap_type is not None
        assert not entries[2].swapped
        assert pages.count(memory.hva, memory.size) == PageCounts(
            pages=8, present=5, swapped=0, marked=3, file=0, exclusive=5, soft_dirty=0, uffd_wp=0, guard=3
        )
        (region,) = pages.scan(memory.hva, memory.hva + memory.size, mask=Category.GUARD).regions
        assert (region.start, region.end) == (memory.hva + 2 * PAGE, memory.hva + 5 * PAGE)


@given(st.lists(st.tuples(st.integers(0, 63), st.booleans()), max_size=20))
def test_count_is_what_the_entries_say(touches: list[tuple[int, bool]]) -> None:
    with Mapping(None, 64 * PAGE, shared=False) as memory, PageMap() as pages:
        for page, write in touches:
            memory.write(page * PAGE, b"x") if write else memory.read(page * PAGE, 1)
        entries = pages.entries(memory.hva, memory.size)
        counts = pages.count(memory.hva, memory.size)
        assert counts.pages == 64
        assert counts.present == len({page for page, _ in touches})
        for field in ("present", "swapped", "file", "exclusive", "soft_dirty", "uffd_wp", "guard"):
            assert getattr(counts, field) == sum(getattr(entry, field) for entry in entries), field


# ---- PAGEMAP_SCAN ----


@pytest.fixture
def striped():
    """32 pages: of each four one written, one read (the zero page), two not touched."""
    with Mapping(None, 32 * PAGE, shared=False) as memory, PageMap() as pages:
        for page in range(0, 32, 4):
            memory.write(page * PAGE, b"x")
            memory.read((page + 1) * PAGE, 1)
        try:
            pages.scan(memory.hva, memory.hva)
            pages.scan(memory.hva, memory.hva + memory.size)
        except HostError as error:
            assert error.errno == errno.ENOTTY  # noqa: PT017
            pytest.skip("needs PAGEMAP_SCAN")
        yield memory, pages


def pages_of(memory: Mapping, scan: pagemap_module.Scan) -> list[int]:
    return [(start - memory.hva) // PAGE for region in scan.regions for start in range(region.start, region.end, PAGE)]


def test_scan(striped: tuple[Mapping, PageMap]) -> None:
    memory, pages = striped
    start, end = memory.hva, memory.hva + memory.size
    written, zero = list(range(0, 32, 4)), list(range(1, 32, 4))
    present = pages.scan(start, end, mask=Category.PRESENT)
    assert pages_of(memory, present) == sorted(written + zero)
    assert (present.nr_pages, present.walk_end) == (16, end)
    # Neighbours of equal categories are one region; `returned` decides which are equal.
    assert {region.nr_pages for region in present.regions} == {2}
    apart = pages.scan(start, end, mask=Category.PRESENT, returned=Category.PRESENT | Category.PFNZERO)
    assert [region.categories for region in apart.regions] == [
        Category.PRESENT,
        Category.PRESENT | Category.PFNZERO,
    ] * 8
    assert pages_of(memory, pages.scan(start, end, mask=Category.PFNZERO)) == zero
    both = Category.PRESENT | Category.PFNZERO
    assert pages_of(memory, pages.scan(start, end, mask=both, inverted=Category.PFNZERO)) == written
    absent = pages.scan(start, end, mask=Category.PRESENT, inverted=Category.PRESENT)
    assert pages_of(memory, absent) == [page for page in range(32) if page % 4 > 1]
    assert pages_of(memory, pages.scan(start, end, anyof=Category.PFNZERO | Category.HUGE)) == zero
    assert pages_of(memory, pages.scan(start, end)) == list(range(32))


def test_scan_up_to_so_many_pages(striped: tuple[Mapping, PageMap]) -> None:
    memory, pages = striped
    start, end = memory.hva, memory.hva + memory.size
    found = pages.scan(start, end, mask=Category.PRESENT, max_pages=5)
    assert pages_of(memory, found) == [0, 1, 4, 5, 8]
    assert found.walk_end == memory.hva + 9 * PAGE
    rest = pages.scan(found.walk_end, end, mask=Category.PRESENT)
    assert found.nr_pages + rest.nr_pages == 16


def test_scan_with_more_regions_than_one_call_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    nr = 2 * pagemap_module._MAX_REGIONS + 10
    with Mapping(None, 2 * nr * PAGE, shared=False) as memory, PageMap() as pages:
        for page in range(0, 2 * nr, 2):
            memory.write(page * PAGE, b"x")
        end = memory.hva + memory.size
        found = pages.scan(memory.hva, end, mask=Category.PRESENT)
        assert pages_of(memory, found) == list(range(0, 2 * nr, 2))
        assert len(found.regions) == nr
        # What a call had to break off is joined with what the next one found.
        monkeypatch.setattr(pagemap_module, "_MAX_REGIONS", 1)
        assert pages.scan(memory.hva, end, mask=Category.PRESENT).regions == found.regions
        assert len(pages.scan(memory.hva, end, returned=0).regions) == 1


def test_scan_of_huge_pages() -> None:
    size = 4 << 20
    with Mapping(None, size, shared=False) as memory, PageMap() as pages:
        madvise(memory, 0, size, mmap.MADV_HUGEPAGE)
        huge = (memory.hva + (2 << 20) - 1) & -(2 << 20)
        memory.write(huge - memory.hva, b"x")
        counts = pages.count(huge, 2 << 20)
        if counts.present != 512:
            pytest.skip("needs huge pages for anonymous memory")
        (region,) = pages.scan(memory.hva, memory.hva + size, mask=Category.HUGE).regions
        assert (region.start, region.end) == (huge, huge + (2 << 20))


def test_scan_write_protects_what_it_finds() -> None:
    # A userfaultfd in mode wp-async, by the bare system calls of linux/userfaultfd.h.
    features = 1 << 15 | 1 << 13  # WP_ASYNC | WP_UNPOPULATED
    with Mapping(None, 16 * PAGE, shared=False) as memory, PageMap() as pages:
        memory.write(0, b"x" * (16 * PAGE))
        start, end = memory.hva, memory.hva + memory.size
        # Not registered: left out, or with check_wp_async refused.
        assert pages.scan(start, end, mask=Category.WRITTEN, write_protect=True).nr_pages in (0, 16)
        with pytest.raises(HostError, match="wp-async") as caught:
            pages.scan(start, end, mask=Category.WRITTEN, write_protect=True, check_wp_async=True)
        assert (caught.value.errno, caught.value.field) == (errno.EPERM, "check_wp_async")
        fd = libc.syscall(323, os.O_CLOEXEC)
        if fd < 0:
            pytest.skip(f"needs userfaultfd: {os.strerror(ctypes.get_errno())}")
        try:
            api = struct.pack("=QQQ", 0xAA, features, 0)
            if libc.ioctl(fd, 0xC018AA3F, api):
                pytest.skip("needs userfaultfd's wp-async (Linux 6.7)")
            register = struct.pack("=QQQQ", start, memory.size, 2, 0)
            assert libc.ioctl(fd, 0xC020AA00, register) == 0
            named = {"mask": Category.WRITTEN, "write_protect": True, "check_wp_async": True}
            pages.scan(start, end, **named)
            assert pages.count(start, memory.size).uffd_wp == 16
            assert pages.scan(start, end, **named).regions == ()
            memory.write(3 * PAGE, b"y")
            memory.write(9 * PAGE, b"y" * (2 * PAGE))
            assert [entry.uffd_wp for entry in pages.entries(start + 2 * PAGE, 2 * PAGE)] == [True, False]
            assert pages_of(memory, pages.scan(start, end, **named)) == [3, 9, 10]
            assert pages.scan(start, end, **named).regions == ()
            assert pages.scan(start, end, mask=Category.WPALLOWED).nr_pages == 16
        finally:
            os.close(fd)


@pytest.mark.parametrize(
    ("named", "field"),
    [
        ({"mask": 1 << 9}, "mask"),
        ({"anyof": -1}, "anyof"),
        ({"inverted": 1 << 63}, "inverted"),
        ({"returned": 1 << 20}, "returned"),
        ({"max_pages": -1}, "max_pages"),
        ({"start": 1}, "start"),
        ({"start": -PAGE}, "start"),
        ({"end": 0}, "end"),
        ({"end": ADDRESSES + PAGE}, "end"),
        ({"end": 0x7000_0000_0001}, "end"),
    ],
)
def test_scan_refuses(named: dict[str, int], field: str) -> None:
    with PageMap() as pages, pytest.raises(ArgumentError) as caught:
        pages.scan(**{"start": 0x10000, "end": 0x20000, **named})
    assert (caught.value.call, caught.value.field) == ("PageMap.scan", field)


@pytest.mark.parametrize("field", ["mask", "anyof", "inverted", "returned", "start", "end", "max_pages"])
def test_scan_refuses_types(field: str) -> None:
    with PageMap() as pages, pytest.raises(ArgumentTypeError) as caught:
        pages.scan(**{"start": 0x10000, "end": 0x20000, field: "1"})
    assert caught.value.field == field


def test_constants_of_the_scan() -> None:
    # include/uapi/linux/fs.h: PAGE_IS_* are bits 0 to 8 in this order.
    names = ["WPALLOWED", "WRITTEN", "FILE", "PRESENT", "SWAPPED", "PFNZERO", "HUGE", "SOFT_DIRTY", "GUARD"]
    assert [(category.name, int(category)) for category in Category] == [(n, 1 << bit) for bit, n in enumerate(names)]
    assert [flag.bit_length() - 1 for flag in PageFlags] == list(range(27))


# ---- the owner ----


def test_another_process() -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as child,
        PageMap(child.pid) as pages,
    ):
        with open(f"/proc/{child.pid}/maps") as file:
            stack = next(line for line in file if "[stack]" in line)
        start, end = (int(word, 16) for word in stack.split()[0].split("-"))
        assert pages.count(start, end - start).present > 0
        assert repr(pages) == f"PageMap(pid={child.pid}, fd={pages.fd})"
        child.kill()
        child.wait()
        with pytest.raises(HostError, match="gone") as caught:
            pages.count(start, end - start)
        assert caught.value.errno == errno.ESRCH
        with pytest.raises(HostError) as caught:
            pages.words(start, PAGE)
        assert caught.value.errno == errno.ESRCH
        try:
            assert pages.scan(start, end).regions == ()
        except HostError as error:
            assert error.errno in (errno.ESRCH, errno.ENOTTY)  # noqa: PT017
    with pytest.raises(HostError, match="no such process") as caught:
        PageMap(child.pid)
    assert (caught.value.errno, caught.value.call) == (errno.ENOENT, "open")


@pytest.mark.parametrize("pid", [0, -1, 1 << 31])
def test_no_pid(pid: int) -> None:
    with pytest.raises(ArgumentError, match="pid"):
        PageMap(pid)


@pytest.mark.parametrize("pid", ["1", 1.0, True])
def test_pid_of_a_wrong_type(pid: object) -> None:
    with pytest.raises(ArgumentTypeError, match="pid"):
        PageMap(pid)


def test_closing() -> None:
    with nothing_leaks():
        pages = PageMap()
        assert os.readlink(f"/proc/self/fd/{pages.fileno()}").endswith("/pagemap")
        assert not os.get_inheritable(pages.fd)
        assert pages.pid is None
        pages.close()
        pages.close()
        assert repr(pages) == "<PageMap closed>"
    for use in (
        lambda: pages.fd,
        lambda: pages.words(0, PAGE),
        lambda: pages.entry(0),
        lambda: pages.count(0, PAGE),
        lambda: pages.pss(0, PAGE),
        lambda: pages.scan(0, PAGE),
    ):
        with pytest.raises(ClosedError):
            use()


@pytest.mark.parametrize("method", ["words", "entries", "count", "pss"])
@pytest.mark.parametrize(
    ("hva", "size", "field"),
    [
        (1, PAGE, "hva"),
        (-PAGE, PAGE, "hva"),
        (ADDRESSES, 0, "hva"),
        (0, 1, "size"),
        (0, -PAGE, "size"),
        (PAGE, ADDRESSES, "size"),
        (1 << 64, PAGE, "hva"),
    ],
)
def test_ranges_are_refused(method: str, hva: int, size: int, field: str) -> None:
    with PageMap() as pages, pytest.raises(ArgumentError) as caught:
        getattr(pages, method)(hva, size)
    assert caught.value.field == field


def test_no_call_takes_all_of_the_memory_for_its_answer() -> None:
    # One byte or eight for each page of 2**47 would be 32 or 256 GiB.
    with PageMap() as pages:
        for call in (pages.words, pages.entries, pages.count, pages.pss, mincore):
            with pytest.raises(ArgumentError) as caught:
                call(0, ADDRESSES)
            assert caught.value.field == "size"
        assert pages.scan(0, ADDRESSES, mask=Category.PRESENT).nr_pages > 100


def test_nothing_mapped_is_nothing_present() -> None:
    with PageMap() as pages:
        assert pages.words(ADDRESSES - 2 * PAGE, PAGE)[0] >> 63 == 0
        assert pages.entry(0) == PageEntry(0)
        with pytest.raises(ArgumentError):
            pages.entry(ADDRESSES)


# ---- mincore ----


def test_mincore_of_a_file_is_the_page_cache() -> None:
    with MemFd("core", 8 * PAGE, seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, 8 * PAGE) as memory, PageMap() as pages:
        os.pwrite(memfd.fd, b"x", 2 * PAGE)  # in the file, not mapped
        memory.write(5 * PAGE, b"x")
        assert mincore(memory.hva, memory.size) == bytes([0, 0, 1, 0, 0, 1, 0, 0])
        assert [entry.present for entry in pages.entries(memory.hva, memory.size)].count(True) == 1
        assert mincore(memory.hva + 2 * PAGE, PAGE) == b"\1"
        assert mincore(memory.hva, 0) == b""


def test_mincore_refuses() -> None:
    with Mapping(None, 4 * PAGE) as memory:
        hva = memory.hva
        lib.hv_munmap(hva + 2 * PAGE, PAGE)
        with pytest.raises(HostError, match="all of which is mapped") as caught:
            mincore(hva, 4 * PAGE)
        assert caught.value.errno == errno.ENOMEM
        assert mincore(hva, 2 * PAGE) == b"\0\0"
        with pytest.raises(ArgumentError, match="hva"):
            mincore(hva + 1, PAGE)
        with pytest.raises(ArgumentTypeError):
            mincore(hva, "4096")


def test_it_cannot_be_pickled_or_copied() -> None:
    with PageMap() as pages:
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be copied"):
                way(pages)
