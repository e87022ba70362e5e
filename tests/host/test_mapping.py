from __future__ import annotations

import contextlib
import copy
import errno
import gc
import mmap
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from hvmodel.host import (
    F_SEAL_GROW,
    F_SEAL_SHRINK,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Mapping,
    MemFd,
    ViewError,
)
from hvmodel.host.changes import Change
from tests.host.held import maps, nothing_leaks

PAGE = 4096
SIZE = 16 * PAGE
ROOT = Path(__file__).parents[2]


@pytest.fixture
def mapping():
    with (
        nothing_leaks(),
        MemFd("map", SIZE, seals=F_SEAL_SHRINK | F_SEAL_GROW) as memfd,
        Mapping(memfd, SIZE) as mapping,
    ):
        yield mapping


def test_constants_are_the_systems() -> None:
    assert (PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC) == (0, mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC)
    assert lib.HV_MAP_SHARED == mmap.MAP_SHARED
    assert lib.HV_MAP_PRIVATE == mmap.MAP_PRIVATE
    assert lib.HV_MAP_ANONYMOUS == mmap.MAP_ANONYMOUS


def test_a_mapping_is_what_the_kernel_shows(mapping: Mapping) -> None:
    (line,) = maps("map")
    found = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) ", line)
    assert found
    assert (int(found[1], 16), int(found[2], 16)) == (mapping.hva, mapping.hva + SIZE)
    assert (found[3], int(found[4], 16)) == ("rw-s", 0)
    assert f"hva={mapping.hva:#x}, size=0x10000, rw-, shared" in repr(mapping)


def test_part_of_a_file() -> None:
    with MemFd("part", SIZE, seals=F_SEAL_SHRINK) as memfd:
        os.pwrite(memfd.fd, b"third", 2 * PAGE)
        with Mapping(memfd, PAGE, offset=2 * PAGE, prot=PROT_READ) as part:
            assert part.read(0, 5) == b"third"
            assert maps("part")[0].split()[1:3] == ["r--s", "00002000"]
            assert (part.offset, part.prot, part.shared, part.source) == (2 * PAGE, PROT_READ, True, memfd)


def test_bytes_are_the_files(mapping: Mapping) -> None:
    fd = mapping.source.fd
    mapping.write(PAGE - 2, b"across")
    assert os.pread(fd, 6, PAGE - 2) == mapping.read(PAGE - 2, 6) == bytes(mapping.view(PAGE - 2, 6)) == b"across"
    os.pwrite(fd, b"ACR", PAGE - 2)
    assert mapping.read(PAGE - 2, 6) == b"ACRoss"
    with mapping.writable(SIZE - 1) as view:
        view[0] = 7
    assert os.pread(fd, 1, SIZE - 1) == b"\7"
    mapping.write(SIZE, b"")
    assert mapping.read(SIZE, 0) == bytes(mapping.view(SIZE)) == b""


def test_view_is_the_same_memory_and_readonly(mapping: Mapping) -> None:
    view = mapping.view(PAGE, 8)
    assert view.readonly
    assert (view.format, view.nbytes) == ("B", 8)
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1
    mapping.write(PAGE, b"seen")
    assert view[:4] == b"seen"
    assert np.frombuffer(view, np.uint8).ctypes.data == mapping.hva + PAGE
    assert not np.frombuffer(view, np.uint8).flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        b"\1\2\3\4\5\6\7\10",
        bytearray(b"\1\2\3\4\5\6\7\10"),
        memoryview(b"\1\2\3\4\5\6\7\10"),
        np.frombuffer(b"\1\2\3\4\5\6\7\10", np.uint32),
        np.frombuffer(b"\1\2\3\4\5\6\7\10", np.uint8).reshape(2, 4),
        ffi.buffer(ffi.new("char[8]", b"\1\2\3\4\5\6\7\10")),
    ],
)
def test_write_takes_any_contiguous_buffer(mapping: Mapping, data: object) -> None:
    mapping.write(3, data)
    assert mapping.read(2, 10) == b"\0\1\2\3\4\5\6\7\10\0"


@pytest.mark.parametrize("data", ["text", 5, None, [1, 2], memoryview(b"12345678")[::2], np.zeros((4, 4)).T[:2]])
def test_write_refuses_other_things(mapping: Mapping, data: object) -> None:
    with pytest.raises(ArgumentTypeError, match="C-contiguous") as caught:
        mapping.write(0, data)
    assert caught.value.field == "data"


def test_write_may_overlap_its_source(mapping: Mapping) -> None:
    whole = bytes(range(256)) * 32
    mapping.write(0, whole)
    view = mapping.view(0, len(whole))
    mapping.write(100, view)
    assert mapping.read(100, len(whole)) == whole
    del view


# Exports


DERIVED = {
    "slice": lambda view: view[10:20],
    "cast": lambda view: view.cast("Q"),
    "memoryview": lambda view: memoryview(view),
    "frombuffer": lambda view: np.frombuffer(view, np.uint8),
    "numpy view": lambda view: np.frombuffer(view, np.uint8)[8:16].view(np.uint64),
    "asarray": lambda view: np.asarray(view),
    "ndarray": lambda view: np.ndarray((64,), np.uint8, buffer=view),
    "ffi": lambda view: ffi.from_buffer(view),
}


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_whatever_is_made_of_a_view_keeps_the_mapping(mapping: Mapping, derive, writable: bool) -> None:
    if writable:
        with mapping.writable(PAGE, PAGE) as view:
            kept = derive(view)
    else:
        view = mapping.view(PAGE, PAGE)
        kept = derive(view)
    del view
    with pytest.raises(BufferError, match="1 views of it are alive") as caught:
        mapping.close()
    assert isinstance(caught.value, ViewError)
    assert pickle.loads(pickle.dumps(caught.value)).why == caught.value.why
    mapping.write(PAGE + 10, b"still there")
    assert len(maps("map")) == 1
    del kept
    mapping.close()
    assert not maps("map")


def test_copies_keep_nothing(mapping: Mapping) -> None:
    kept = [mapping.view().tobytes(), mapping.read(0, SIZE), np.array(mapping.view()), copy.copy(mapping.hva)]
    mapping.close()
    assert kept


def test_released_view_keeps_nothing(mapping: Mapping) -> None:
    with mapping.view(0, 10):
        pass
    with mapping.writable(0, 10) as view:
        view[:] = b"0123456789"
    mapping.close()
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_view_outlives_the_owner() -> None:
    # Nobody holds the mapping any more, but what was handed out does, and it goes when that goes.
    with nothing_leaks():
        memfd = MemFd("orphan", SIZE, seals=F_SEAL_SHRINK)
        array = np.frombuffer(Mapping(memfd, SIZE).view(), np.uint8)
        memfd.close()
        del memfd
        gc.collect()
        assert len(maps("orphan")) == 1
        assert array.sum() == 0
        with pytest.warns(ResourceWarning, match="unclosed Mapping"):
            del array
        assert not maps("orphan")


def test_view_outlives_the_interpreters_exit() -> None:
    # Arrays are still read after weakref.finalize has cleaned up; the kernel takes the memory back.
    script = """
import atexit, weakref, numpy as np
from hvmodel.host import F_SEAL_SHRINK, Mapping, MemFd

class Late:
    def __del__(self):
        print(self.array.sum())

late = Late()
atexit.register(late.__del__)
late.array = np.frombuffer(Mapping(MemFd("late", 4096, seals=F_SEAL_SHRINK), 4096).view(), np.uint8)
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (0, "0\n0\n"), done.stderr
    assert "unclosed MemFd('late'" in done.stderr


def test_many_views_are_forgotten(mapping: Mapping) -> None:
    kept = [mapping.view(i * PAGE, PAGE) for i in range(10)]
    for _ in range(1000):
        mapping.view()
    assert len(mapping._exports) < 100
    with pytest.raises(ViewError, match="10 views"):
        mapping.close()
    del kept


def test_exception_with_a_view_in_its_traceback(mapping: Mapping) -> None:
    # Our own frames hold nothing, so a kept traceback does not keep the mapping from being closed.
    kept = []
    for use in (
        lambda: mapping.read(SIZE, 1),
        lambda: mapping.view(-1),
        lambda: mapping.write(0, "text"),
        lambda: mapping.writable(0, SIZE + 1),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
            use()
        kept.append(caught)
    mapping.close()


def test_writable_is_entered_once_at_a_time(mapping: Mapping) -> None:
    door = mapping.writable(0, 4)
    with door as view:
        view[:] = b"once"
        with pytest.raises(BusyError), door:
            pass
    with door as view:
        assert view == b"once"
        view[:] = b"more"
    assert mapping.read(0, 4) == b"more"


def test_written_is_told_of_every_write() -> None:
    told: list[tuple[int, int]] = []
    with Mapping(None, SIZE, written=lambda offset, size: told.append((offset, size))) as mapping:
        mapping.write(5, b"12")
        assert set(told) == {(5, 2)}
        del told[:]
        with mapping.writable(PAGE, 10) as view:
            array = np.frombuffer(view, np.uint8)
            assert mapping.open_writable() == [(PAGE, 10)]
        assert (told, mapping.open_writable()) == ([], [(PAGE, 10)])
        del array, view
        assert (mapping.open_writable(), told) == ([], [(PAGE, 10)])
        mapping.view(0, 5)
        assert mapping.open_writable() == []
        with pytest.raises(ArgumentError):
            mapping.write(SIZE, b"1")
        assert told == [(PAGE, 10)]


# Memory that could fault


def test_unsealed_has_no_views_and_does_not_die() -> None:
    with nothing_leaks(), MemFd("unsealed", SIZE) as memfd, Mapping(memfd, SIZE) as mapping:
        mapping.write(PAGE - 2, b"abcd")
        assert mapping.read(PAGE - 2, 4) == b"abcd"
        with pytest.raises(ViewError, match="F_SEAL_SHRINK"):
            mapping.view(0, 1)
        with pytest.raises(ViewError, match="F_SEAL_SHRINK"):
            mapping.writable(0, 1).__enter__()
        os.ftruncate(memfd.fd, PAGE)
        assert mapping.read(PAGE - 2, 2) == b"ab"
        for offset, where in ((PAGE, PAGE), (PAGE - 2, PAGE), (SIZE - 1, SIZE - 1)):
            with pytest.raises(HostError, match="past the end") as caught:
                mapping.read(offset, SIZE - offset)
            assert (caught.value.errno, caught.value.call) == (errno.EFAULT, "process_vm_readv")
            assert (caught.value.field, caught.value.value) == ("offset", where)
        with pytest.raises(HostError) as refused:
            mapping.write(PAGE - 2, b"wxyz")
        assert (refused.value.errno, refused.value.value) == (errno.EFAULT, PAGE)
        assert mapping.read(PAGE - 2, 2) == b"wx"
        # Sealed, but too late for the part that is gone.
        memfd.add_seals(F_SEAL_SHRINK)
        with pytest.raises(ViewError, match="past the end of its file"):
            mapping.view(0, 1)
        os.ftruncate(memfd.fd, SIZE)
        assert bytes(mapping.view(PAGE - 2, 4)) == b"wx\0\0"


def test_a_seal_that_comes_later_is_noticed() -> None:
    with MemFd("later", PAGE) as memfd, Mapping(memfd, PAGE) as mapping:
        with pytest.raises(ViewError):
            mapping.view()
        memfd.add_seals(F_SEAL_SHRINK)
        assert mapping.view().nbytes == PAGE


def test_a_descriptor_number_is_not_trusted_later() -> None:
    fd = os.memfd_create("number", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        with Mapping(fd, PAGE) as mapping:
            with MemFd("other", PAGE, seals=F_SEAL_SHRINK) as other:
                os.dup2(other.fd, fd)
            with pytest.raises(ViewError):
                mapping.view()
            mapping.write(0, b"ok")
            assert mapping.read(0, 2) == b"ok"
    finally:
        os.close(fd)


@pytest.mark.parametrize("source", ["memfd", "anonymous"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prot", range(8))
def test_protections(source: str, shared: bool, prot: int) -> None:
    with nothing_leaks(), MemFd("prot", PAGE, seals=F_SEAL_SHRINK) as memfd:
        os.pwrite(memfd.fd, b"file", 0)
        was = b"file" if source == "memfd" else bytes(4)
        with Mapping(memfd if source == "memfd" else None, PAGE, prot=prot, shared=shared) as mapping:
            if prot & PROT_READ:
                assert mapping.read(0, 4) == bytes(mapping.view(0, 4)) == was
            else:
                with pytest.raises(ViewError, match="PROT_READ"):
                    mapping.view(0, 4)
                with pytest.raises(HostError, match="not accessible"):
                    mapping.read(0, 4)
            if prot & PROT_READ and prot & PROT_WRITE:
                with mapping.writable(0, 4) as view:
                    view[:] = b"view"
                assert mapping.read(0, 4) == b"view"
            else:
                with pytest.raises(ViewError, match="PROT_"):
                    mapping.writable(0, 4).__enter__()
            if prot & PROT_WRITE:
                mapping.write(0, b"more")
            else:
                with pytest.raises(HostError) as caught:
                    mapping.write(0, b"more")
                assert (caught.value.call, caught.value.errno) == ("process_vm_writev", errno.EFAULT)
            reaches_file = source == "memfd" and shared and prot & PROT_WRITE
            assert os.pread(memfd.fd, 4, 0) == (b"more" if reaches_file else b"file")


def test_mapping_past_the_end_of_the_file() -> None:
    with MemFd("short", PAGE, seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, 2 * PAGE) as mapping:
        with pytest.raises(ViewError, match="past the end of its file"):
            mapping.view(0, 1)
        assert mapping.read(0, PAGE) == bytes(PAGE)
        with pytest.raises(HostError):
            mapping.read(0, PAGE + 1)


def test_checked_copies_larger_than_one_call_moves() -> None:
    # process_vm_readv moves MAX_RW_COUNT at most, 2 GiB less a page.  3 GiB of addresses over one file of 4 MiB.
    piece, size = 4 << 20, 3 << 30
    with nothing_leaks(), MemFd("piece", piece) as memfd, Mapping(None, size, prot=PROT_READ) as whole:
        for offset in range(0, size, piece):
            flags = mmap.MAP_SHARED | 0x10  # MAP_FIXED
            assert lib.hv_mmap(whole.hva + offset, piece, 3, flags, memfd.fd, 0) == whole.hva + offset
        data = ffi.cast("char *", whole.hva)
        assert lib.hv_vm_read(whole.hva, data, size) == size
        assert lib.hv_vm_write(whole.hva, data, size) == size
        assert lib.hv_mprotect(whole.hva + size - piece, piece, PROT_NONE) == 0
        assert lib.hv_vm_read(whole.hva, data, size) == size - piece
        assert lib.hv_vm_read(whole.hva + size - piece, data, 1) == -errno.EFAULT


# Owners


def test_pins(mapping: Mapping) -> None:
    mapping.pin("memslot 0")
    mapping.pin("memslot 0")
    mapping.pin("memslot 1")
    mapping.unpin("memslot 0")
    with pytest.raises(BusyError, match="memslot 0, memslot 1"):
        mapping.close()
    assert mapping.read(0, 1) == b"\0"
    mapping.unpin("memslot 1")
    mapping.unpin("memslot 0")
    with pytest.raises(ArgumentError):
        mapping.unpin("memslot 0")


def test_close_is_idempotent_and_final(mapping: Mapping) -> None:
    door = mapping.writable(0, 1)
    mapping.close()
    mapping.close()
    assert mapping.closed
    assert repr(mapping) == "<Mapping closed>"
    for use in (
        lambda: mapping.hva,
        lambda: mapping.view(),
        lambda: mapping.writable(),
        door.__enter__,
        lambda: mapping.read(0, 1),
        lambda: mapping.write(0, b"1"),
        lambda: mapping.pin("late"),
    ):
        with pytest.raises(ClosedError, match="Mapping is closed"):
            use()


def test_unclosed_warns_and_unmaps() -> None:
    with nothing_leaks(), MemFd("forgotten", PAGE) as memfd:
        mapping = Mapping(memfd, PAGE)
        assert len(maps("forgotten")) == 1
        with pytest.warns(ResourceWarning, match="unclosed Mapping"):
            del mapping


def test_the_file_may_be_closed_first() -> None:
    with nothing_leaks():
        memfd = MemFd("first", PAGE, seals=F_SEAL_SHRINK)
        with Mapping(memfd, PAGE) as mapping:
            memfd.close()
            mapping.write(0, b"here")
            assert bytes(mapping.view(0, 4)) == b"here"
            assert repr(mapping).startswith("Mapping(<MemFd closed>, hva=")
        memfd = MemFd("first", PAGE)
        with Mapping(memfd, PAGE) as mapping:
            memfd.close()
            with pytest.raises(ViewError, match="closed before it was sealed"):
                mapping.view()


def test_refused_mmap_leaves_nothing() -> None:
    with nothing_leaks():
        with pytest.raises(HostError) as caught:
            Mapping(None, 1 << 47)
        assert (caught.value.call, caught.value.errno, caught.value.field) == ("mmap", errno.ENOMEM, "size")
        with pytest.raises(HostError) as caught:
            Mapping(1 << 20, PAGE)
        assert (caught.value.errno, caught.value.field, caught.value.value) == (errno.EBADF, "source", 1 << 20)
        directory = os.open("/", os.O_RDONLY)
        try:
            with pytest.raises(HostError) as caught:
                Mapping(directory, PAGE, prot=PROT_READ)
        finally:
            os.close(directory)
        assert caught.value.errno == errno.ENODEV


def test_fork_releases_only_the_childs_copy(mapping: Mapping) -> None:
    mapping.write(0, b"parent")
    child = os.fork()
    if not child:
        code = 1
        try:
            mapping.write(PAGE, b"child")
            mapping.close()
            mapping.source.close()
            code = 0 if not maps("map") else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mapping.read(0, 6) + mapping.read(PAGE, 5) == b"parentchild"
    assert mapping.source.size == SIZE


def test_close_against_readers() -> None:
    # Whoever wins, nobody touches memory that is gone: the others get errors.
    data = os.urandom(PAGE)
    for _ in range(30):
        mapping = Mapping(None, SIZE)
        mapping.write(0, data)
        seen: list[object] = []

        def use(mapping: Mapping = mapping, seen: list[object] = seen) -> None:
            try:
                for _ in range(100_000):
                    if mapping.read(0, PAGE) != data or mapping.view(0, PAGE) != data:
                        seen.append("other bytes")
                    mapping.write(0, data)
            except ClosedError:
                return
            seen.append("never closed")

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        while not mapping.closed:
            with contextlib.suppress(BusyError, ViewError):
                mapping.close()
        for thread in threads:
            thread.join()
        assert seen == []


def test_close_sees_who_came_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    # Between the first look of `close` and its turn another thread has changed something, and a third is in a memcpy.
    mapping = Mapping(None, SIZE)
    inside: list[object] = []
    begin = Change.begin

    def later(change: Change, patience: float) -> bool:
        monkeypatch.setattr(Change, "begin", begin)
        mapping.protect(0, PAGE, PROT_READ)
        inside.append(mapping._hold("read"))
        return begin(change, patience)

    monkeypatch.setattr(Change, "begin", later)
    with pytest.raises(BusyError, match="another thread"):
        mapping.close()
    inside.clear()
    assert mapping.read(0, 1) == b"\0"
    mapping.close()


def test_it_cannot_be_pickled_or_copied(mapping: Mapping) -> None:
    # A copy would not keep the memory, nor know that it was unmapped.
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied"):
            way(mapping)


@pytest.mark.parametrize("seals", [0, F_SEAL_SHRINK])  # through the kernel, and by memcpy
def test_a_source_cannot_shrink_while_it_is_written(seals: int) -> None:
    data = bytearray(b"x" * SIZE)
    refused: list[object] = []

    def written(offset: int, size: int) -> None:
        try:
            data.clear()
        except BufferError as error:
            refused.append(str(error))

    with MemFd("map", SIZE, seals=seals) as memfd, Mapping(memfd, SIZE, written=written) as mapping:
        mapping.write(0, data)
        assert mapping.read(0, SIZE) == b"x" * SIZE
    assert len(refused) == 2
    data.clear()


# Arguments


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("size", {"size": 0}),
        ("size", {"size": 1}),
        ("size", {"size": -PAGE}),
        ("size", {"size": 1 << 64}),
        ("size", {"size": (1 << 64) + PAGE}),
        ("offset", {"offset": 1}),
        ("offset", {"offset": -PAGE}),
        ("offset", {"offset": (1 << 63) - PAGE}),
        ("offset", {"offset": 1 << 64}),
        ("prot", {"prot": 8}),
        ("prot", {"prot": -1}),
        ("source", {"source": -1}),
        ("source", {"source": 1 << 31}),
    ],
)
def test_arguments_refused(field: str, arguments: dict[str, object]) -> None:
    with nothing_leaks(), pytest.raises(ArgumentError) as caught:
        Mapping(**({"source": None, "size": PAGE} | arguments))
    assert (caught.value.call, caught.value.field) == ("Mapping", field)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("source", {"source": "file"}),
        ("source", {"source": True}),
        ("size", {"size": 4096.0}),
        ("size", {"size": None}),
        ("offset", {"offset": "0"}),
        ("offset", {"offset": False}),
        ("prot", {"prot": "rw"}),
    ],
)
def test_types_refused(field: str, arguments: dict[str, object]) -> None:
    with nothing_leaks(), pytest.raises(ArgumentTypeError) as caught:
        Mapping(**({"source": None, "size": PAGE} | arguments))
    assert caught.value.field == field


integers = st.one_of(st.integers(-(1 << 65), 1 << 65), st.integers(-2, SIZE + 2), st.just(1 << 64))
anything = st.one_of(integers, st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.binary(max_size=3))


@settings(deadline=None)
@given(offset=integers, size=integers)
def test_ranges_are_exactly_those_inside(offset: int, size: int) -> None:
    inside = offset >= 0 and size >= 0 and offset + size <= SIZE
    with Mapping(None, SIZE) as mapping:
        for use in (mapping.read, mapping.view, mapping.writable):
            if inside:
                use(offset, size)
            else:
                with pytest.raises(ArgumentError) as caught:
                    use(offset, size)
                assert caught.value.field in {"offset", "size"}
                assert caught.value.value == {"offset": offset, "size": size}[caught.value.field]
        if 0 <= size <= 2 * SIZE:
            if inside:
                mapping.write(offset, bytes(size))
            else:
                with pytest.raises(ArgumentError):
                    mapping.write(offset, bytes(size))


@settings(deadline=None)
@given(offset=anything, size=anything, data=anything)
def test_any_arguments_work_or_raise_ours(offset: object, size: object, data: object) -> None:
    with Mapping(None, SIZE) as mapping:
        for use in (
            lambda: mapping.read(offset, size),
            lambda: mapping.view(offset, size),
            lambda: mapping.writable(offset, size).__enter__(),
            lambda: mapping.write(offset, data),
        ):
            with contextlib.suppress(ArgumentError, ArgumentTypeError):
                use()


def test_numpy_integers_are_integers(mapping: Mapping) -> None:
    mapping.write(np.int64(PAGE), b"x")
    assert mapping.read(np.uint32(PAGE), np.int8(1)) == b"x"
    assert mapping.view(np.int64(PAGE), np.int64(1)) == b"x"


def test_nothing_leaks_over_many() -> None:
    def once() -> None:
        with MemFd("many", SIZE, seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, SIZE) as mapping:
            with mapping.writable() as view:
                view[0] = 1
            with pytest.raises(ArgumentError):
                Mapping(memfd, 1)

    once()
    with nothing_leaks():
        for _ in range(200):
            once()
    assert not Path("/proc/self/maps").read_text().count("memfd:many")
