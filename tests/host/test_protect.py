from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel._ffi import lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from hvmodel.host import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_SHRINK,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Mapping,
    MemFd,
    ViewError,
)
from tests.cases import cases
from tests.host.held import nothing_leaks
from tests.host.smaps import prot_of, vmas

PAGE = 4096
PAGES = 16
SIZE = PAGES * PAGE
RW = PROT_READ | PROT_WRITE
ROOT = Path(__file__).parents[2]


@pytest.fixture
def mapping():
    with nothing_leaks(), MemFd("prot", SIZE, seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, SIZE) as mapping:
        yield mapping


ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(0, PAGES - 1)).map(lambda p: (min(p), max(p) + 1))


@settings(deadline=None, max_examples=cases(60, 1000))
@given(changes=st.lists(st.tuples(ranges, st.integers(0, 7)), max_size=8), shared=st.booleans())
def test_protections_are_the_kernels(changes: list[tuple[tuple[int, int], int]], shared: bool) -> None:
    with MemFd("model", SIZE, seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, SIZE, shared=shared) as mapping:
        want = [RW] * PAGES
        for (start, end), prot in changes:
            mapping.protect(start * PAGE, (end - start) * PAGE, prot)
            want[start:end] = [prot] * (end - start)
        kernel = [
            prot_of(permissions)
            for start, end, permissions in vmas(mapping.hva, SIZE)
            for _ in range((end - start) // PAGE)
        ]
        assert kernel == want
        assert [mapping.prot_at(page * PAGE + 5) for page in range(PAGES)] == want
        # What can be touched follows from it, page by page.
        for page, prot in enumerate(want):
            offset = page * PAGE
            if prot & PROT_READ:
                assert mapping.read(offset, 4) == bytes(mapping.view(offset, 4))
            else:
                with pytest.raises(ViewError, match="PROT_READ"):
                    mapping.view(offset, 4)
            if prot & RW == RW:
                with mapping.writable(offset, 4) as view:
                    view[:] = b"view"
            else:
                with pytest.raises(ViewError, match="PROT_"):
                    mapping.writable(offset, 4).__enter__()
            if prot & PROT_WRITE:
                mapping.write(offset, b"data")
            else:
                with pytest.raises(HostError) as caught:
                    mapping.write(offset, b"data")
                assert caught.value.errno == errno.EFAULT
        # A range is as good as its worst page.
        if all(prot & PROT_READ for prot in want):
            mapping.view()
        else:
            with pytest.raises(ViewError):
                mapping.view()


def test_a_copy_over_an_inaccessible_page_names_it(mapping: Mapping) -> None:
    mapping.write(0, b"\1" * SIZE)
    mapping.protect(2 * PAGE, PAGE, PROT_NONE)
    with pytest.raises(HostError) as caught:
        mapping.read(PAGE, 3 * PAGE)
    assert (caught.value.errno, caught.value.value) == (errno.EFAULT, 2 * PAGE)
    mapping.protect(2 * PAGE, PAGE, PROT_READ)
    assert mapping.read(0, SIZE) == b"\1" * SIZE
    with pytest.raises(HostError) as refused:
        mapping.write(PAGE, b"\2" * (3 * PAGE))
    assert refused.value.value == 2 * PAGE
    assert mapping.read(PAGE, 2 * PAGE) == b"\2" * PAGE + b"\1" * PAGE


@pytest.mark.parametrize("prot", range(8))
@pytest.mark.parametrize("writable", [False, True])
def test_a_view_keeps_the_access_that_it_needs(mapping: Mapping, writable: bool, prot: int) -> None:
    if writable:
        with mapping.writable(PAGE, 2 * PAGE) as view:
            kept = np.frombuffer(view, np.uint8)
    else:
        view = mapping.view(PAGE, 2 * PAGE)
        kept = np.frombuffer(view, np.uint8)
    needs = RW if writable else PROT_READ
    mapping.protect(0, PAGE, PROT_NONE)
    mapping.protect(3 * PAGE, None, PROT_NONE)
    for offset, size in ((PAGE, PAGE), (2 * PAGE, 5 * PAGE), (0, None)):
        if needs & ~prot:
            before = vmas(mapping.hva, SIZE)
            with pytest.raises(BufferError, match="1 views of the range are alive") as caught:
                mapping.protect(offset, size, prot)
            assert isinstance(caught.value, ViewError)
            assert vmas(mapping.hva, SIZE) == before
            assert mapping.prot_at(PAGE) == RW
        else:
            mapping.protect(offset, size, prot)
    assert kept.sum() == 0
    if writable:
        kept[:] = 1
    del kept, view
    mapping.protect(0, None, PROT_NONE)


def test_a_view_that_is_gone_is_in_nobodys_way(mapping: Mapping) -> None:
    with mapping.writable(0, 10), pytest.raises(ViewError):
        mapping.protect(0, PAGE, PROT_READ)
    mapping.protect(0, PAGE, PROT_READ)
    view = mapping.view(0, 10)
    mapping.protect(0, PAGE, PROT_READ | PROT_EXEC)
    mapping.protect(PAGE, PAGE, PROT_NONE)
    del view
    mapping.protect(0, None, PROT_NONE)
    with pytest.raises(ViewError):
        mapping.view(SIZE - 1, 1)
    mapping.protect(0, None, RW)
    assert mapping.view().nbytes == SIZE


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("offset", (1, PAGE, 3)),
        ("offset", (-PAGE, PAGE, 3)),
        ("offset", (SIZE + PAGE, PAGE, 3)),
        ("offset", (1 << 64, PAGE, 3)),
        ("size", (0, 1, 3)),
        ("size", (0, 0, 3)),
        ("size", (SIZE, None, 3)),
        ("size", (0, -PAGE, 3)),
        ("size", (PAGE, SIZE, 3)),
        ("size", (PAGE, (1 << 64) - PAGE, 3)),
        ("size", (0, 1 << 64, 3)),
        ("prot", (0, PAGE, 8)),
        ("prot", (0, PAGE, -1)),
        ("prot", (0, PAGE, 1 << 40)),
    ],
)
def test_arguments_refused(mapping: Mapping, field: str, arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ArgumentError) as caught:
        mapping.protect(*arguments)
    assert (caught.value.call, caught.value.field) == ("Mapping.protect", field)
    assert vmas(mapping.hva, SIZE) == [(mapping.hva, mapping.hva + SIZE, "rw-s")]


def test_types_refused(mapping: Mapping) -> None:
    for arguments in (("0", PAGE, 3), (0, "4K", 3), (0, PAGE, "rw"), (0, PAGE, None), (0, PAGE, True), (0.0, PAGE, 3)):
        with pytest.raises(ArgumentTypeError):
            mapping.protect(*arguments)
    with pytest.raises(ArgumentError):
        mapping.prot_at(SIZE)
    mapping.close()
    for use in (lambda: mapping.protect(0, PAGE, 3), lambda: mapping.prot_at(0)):
        with pytest.raises(ClosedError):
            use()


def test_what_the_file_forbids() -> None:
    with MemFd("sealed", SIZE) as memfd:
        memfd.add_seals(F_SEAL_FUTURE_WRITE)
        readonly = os.open(f"/proc/self/fd/{memfd.fd}", os.O_RDONLY)
        try:
            for source in (memfd, readonly):
                with Mapping(source, SIZE, prot=PROT_READ) as mapping:
                    with pytest.raises(HostError, match="its seals allow") as caught:
                        mapping.protect(0, PAGE, RW)
                    assert (caught.value.call, caught.value.errno) == ("mprotect", errno.EACCES)
                    assert (caught.value.field, caught.value.value) == ("prot", RW)
                    assert mapping.prot_at(0) == PROT_READ
        finally:
            os.close(readonly)


def test_a_change_refused_half_way_is_taken_back() -> None:
    # The second half of the range is of a file that cannot be written: the kernel changes the first, then refuses.
    with nothing_leaks(), MemFd("half", SIZE) as memfd, Mapping(memfd, SIZE, prot=PROT_READ) as mapping:
        readonly = os.open(f"/proc/self/fd/{memfd.fd}", os.O_RDONLY)
        half = mapping.hva + SIZE // 2
        fixed = mmap.MAP_SHARED | 0x10
        assert lib.hv_mmap(half, SIZE // 2, PROT_READ, fixed, readonly, SIZE // 2) == half
        os.close(readonly)
        assert lib.hv_mprotect(mapping.hva, SIZE, RW) == -errno.EACCES
        assert vmas(mapping.hva, SIZE)[0][2] == "rw-s"  # so it does
        assert lib.hv_mprotect(mapping.hva, SIZE // 2, PROT_READ) == 0
        with pytest.raises(HostError):
            mapping.protect(0, None, RW)
        assert [each[2] for each in vmas(mapping.hva, SIZE)] == ["r--s", "r--s"]
        assert [mapping.prot_at(0), mapping.prot_at(SIZE - 1)] == [PROT_READ, PROT_READ]


def test_the_limit_of_mappings() -> None:
    # In a process of its own: at the limit its allocator gets no memory either.
    script = """
import os, hvmodel as hv
from hvmodel._ffi import lib
from pathlib import Path
limit = int(Path("/proc/sys/vm/max_map_count").read_text())
if limit > 200_000:
    print("ENOMEM (0, 3, 3)"); raise SystemExit
spare = [bytearray(1 << 20) for _ in range(8)]
m = hv.Mapping(None, (limit + 100) * 8192, shared=False, noreserve=True)
error = n = 0
while not error:
    error = lib.hv_mprotect(m.hva + (2 * n + 4) * 4096, 4096, 1)
    n += 1
del spare
try:
    m.protect(4096, 4096, 0)
except hv.HostError as refused:
    print({12: "ENOMEM"}.get(refused.errno), (m.prot_at(4096) - 3, m.prot_at(0), m.prot_at(8192)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ENOMEM (0, 3, 3)\n"), done.stderr


# The hook of those who make access fault


def test_a_bar_keeps_pointers_off(mapping: Mapping) -> None:
    mapping.write(0, b"\5" * SIZE)
    view = mapping.view(PAGE, 10)
    with pytest.raises(ViewError, match="1 views"):
        mapping._forbid(0, 2 * PAGE, "a test")
    below = mapping._forbid(0, PAGE, "a test")
    del view
    above = mapping._forbid(PAGE, 2 * PAGE, "another test")
    for offset, size, why in (
        (0, 1, "a test"),
        (PAGE - 1, 2, "a test"),
        (2 * PAGE, 1, "another test"),
        (0, SIZE, "test"),
    ):
        with pytest.raises(ViewError, match=why):
            mapping.view(offset, size)
        with pytest.raises(ViewError, match=why):
            mapping.writable(offset, size).__enter__()
        assert mapping.read(offset, size) == b"\5" * size
        mapping.write(offset, b"\5" * size)
    assert mapping.view(3 * PAGE).nbytes == SIZE - 3 * PAGE
    mapping._allow(below)
    mapping._allow(below)
    assert mapping.view(0, PAGE)[0] == 5
    with pytest.raises(ViewError):
        mapping.view(0, PAGE + 1)
    mapping._allow(above)
    assert mapping.view().nbytes == SIZE
    for arguments in ((1, PAGE), (0, 0), (0, SIZE + PAGE)):
        with pytest.raises(ArgumentError):
            mapping._forbid(*arguments, "a test")
    mapping.close()
    mapping._allow(above)
    with pytest.raises(ClosedError):
        mapping._forbid(0, PAGE, "a test")


def test_whoever_copies_is_waited_for(mapping: Mapping) -> None:
    # `written` is called between the two halves of a write: there, a change of the same thread must not wait for ever.
    called = []

    def written(offset: int, size: int) -> None:
        if not called:
            called.append(offset)
            other.protect(0, PAGE, PROT_READ)

    with Mapping(None, SIZE, written=written) as other:
        with pytest.raises(HostError):
            other.write(0, b"late")
        assert other.prot_at(0) == PROT_READ
        assert other.read(0, 4) == bytes(4)


def test_two_threads_change_and_two_copy() -> None:
    # A memcpy into a page that loses its access would be SIGSEGV: so in a process of its own.
    script = f"""
import threading, time, hvmodel as hv
from hvmodel.host import F_SEAL_SHRINK, MemFd, Mapping, ViewError
seen, stop = set(), []
m = Mapping(MemFd("race", 16 * 4096, seals=F_SEAL_SHRINK), 16 * 4096)
def copy():
    while not stop:
        for use in (lambda: m.read(0, 8 * 4096), lambda: m.write(0, bytes(32768)), lambda: bytes(m.view(4096, 4096))):
            try:
                use(); seen.add("done")
            except (hv.HostError, ViewError, hv.BusyError) as error:
                seen.add(type(error).__name__)
def change(first, word):
    while not stop:
        for what in (lambda: m.protect(first, 4 * 4096, 0), lambda: m.protect(first, 4 * 4096, 3),
                     lambda: m.advise(word, first, 4096), lambda: m.advise("guard_remove", first, 4096)):
            try:
                what(); seen.add("changed")
            except (ViewError, hv.BusyError):
                pass
threads = [threading.Thread(target=copy) for _ in range(2)]
threads += [threading.Thread(target=change, args=a) for a in ((0, "guard_install"), (4 * 4096, "dontneed"))]
for t in threads: t.start()
time.sleep({cases(1, 20)})
stop.append(1)
for t in threads: t.join()
m.protect(0, None, 3); m.view(); m.close()
print(sorted(seen & {{"done", "changed", "HostError", "ViewError"}}))
"""
    code = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "['HostError', 'ViewError', 'changed', 'done']\n"), done.stderr


def test_closing_while_another_thread_changes() -> None:
    for _ in range(cases(3, 50)):
        mapping = Mapping(None, SIZE)
        seen: list[object] = []

        def change(mapping: Mapping = mapping, seen: list[object] = seen) -> None:
            try:
                while True:
                    mapping.protect(0, PAGE, PROT_NONE)
                    mapping.protect(0, PAGE, RW)
            except ClosedError:
                seen.append("closed")
            except BaseException as error:  # noqa: BLE001
                seen.append(error)

        thread = threading.Thread(target=change)
        thread.start()
        while not mapping.closed:
            with contextlib.suppress(BusyError):
                mapping.close()
        thread.join()
        assert seen == ["closed"]
