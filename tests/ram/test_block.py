from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from hvmodel.ram import RAM_SHARED, RamBlock, host_memory, ram_size
from tests.host.held import fds, maps, nothing_leaks

PAGE = 4096
MiB = 1 << 20


@pytest.fixture
def block():
    with nothing_leaks(), RamBlock("pc.ram", "1M") as block:
        yield block


def test_a_block_is_what_the_kernel_shows(block: RamBlock) -> None:
    (line,) = maps("pc.ram")
    addresses, prot, offset, *_ = line.split()
    assert prot == "rw-s"
    assert int(offset, 16) == block.fd_offset
    assert addresses == f"{block.host:x}-{block.host + MiB:x}"
    assert os.readlink(f"/proc/self/fd/{block.fd}") == "/memfd:pc.ram (deleted)"
    assert os.fstat(block.fd).st_size == block.used_length == block.max_length == MiB
    assert os.fstat(block.fd).st_blksize == block.page_size == PAGE
    assert block.memfd.fd == block.fd
    assert block.mapping.hva == block.host


def test_seals_are_the_kernels(block: RamBlock) -> None:
    assert fcntl.fcntl(block.fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    for size in (0, MiB - PAGE, MiB + PAGE):
        with pytest.raises(PermissionError) as caught:
            os.ftruncate(block.fd, size)
        assert caught.value.errno == errno.EPERM
    # Writing past the end would grow it.
    with pytest.raises(PermissionError):
        os.pwrite(block.fd, b"x", MiB)
    assert os.fstat(block.fd).st_size == MiB


def test_qemus_fields(block: RamBlock) -> None:
    assert (block.idstr, block.offset, block.fd_offset, block.flags) == ("pc.ram", 0, 0, RAM_SHARED)
    assert RAM_SHARED == 2  # include/system/memory.h of QEMU: (1 << 1)
    assert repr(block) == (
        f"RamBlock('pc.ram', used_length=0x100000, max_length=0x100000, page_size=0x1000, fd={block.fd}, flags=SHARED)"
    )


def test_bytes_are_the_files(block: RamBlock) -> None:
    block.write(PAGE - 1, b"ab")
    with block.writable(MiB - 2) as view:
        view[:] = b"yz"
    assert os.pread(block.fd, 2, PAGE - 1) == block.read(PAGE - 1, 2) == bytes(block.view(PAGE - 1, 2)) == b"ab"
    assert os.pread(block.fd, 2, MiB - 2) == b"yz"
    assert np.frombuffer(block.view(), np.uint8).ctypes.data == block.host
    assert block.read(0, MiB) == bytes(PAGE - 1) + b"ab" + bytes(MiB - PAGE - 3) + b"yz"


def test_a_view_keeps_the_block(block: RamBlock) -> None:
    array = np.frombuffer(block.view(), np.uint8)[PAGE:]
    with pytest.raises(BufferError, match="views of it are alive"):
        block.close()
    block.write(PAGE, b"\7")
    assert array[0] == 7
    assert block.fd >= 0
    del array
    block.close()


def test_a_slot_keeps_the_block(block: RamBlock) -> None:
    block.mapping.pin("memslot 0")
    with pytest.raises(BusyError, match="memslot 0"):
        block.close()
    assert block.read(0, 1) == b"\0"
    block.mapping.unpin("memslot 0")


def test_close_is_idempotent_and_final(block: RamBlock) -> None:
    block.close()
    block.close()
    assert block.closed
    assert repr(block) == "<RamBlock pc.ram closed>"
    assert not maps("pc.ram")
    for use in (
        lambda: block.host,
        lambda: block.fd,
        lambda: block.view(),
        lambda: block.writable(),
        lambda: block.read(0, 1),
        lambda: block.write(0, b"1"),
    ):
        with pytest.raises(ClosedError):
            use()


def test_errors_name_the_call(block: RamBlock) -> None:
    for use, text in (
        (lambda: block.read(MiB, 1), "RamBlock.read: size=1; accepted: 0 <= size <= 0x0"),
        (lambda: block.write(-1, b""), "RamBlock.write: offset=-1; accepted: 0 <= offset <= 0x100000"),
        (lambda: block.write(MiB - 1, b"ab"), "RamBlock.write: len(data)=2; accepted: 0 <= len(data) <= 0x1,"),
        (lambda: block.view(1 << 64, 1), "RamBlock.view: offset=0x10000000000000000; accepted"),
        (lambda: block.writable(0, MiB + 1), "RamBlock.writable: size=0x100001; accepted: 0 <= size <= 0x100000"),
        (lambda: block.mark_host_dirty(0, MiB + 1), "RamBlock.mark_host_dirty: size=0x100001; accepted"),
        (lambda: block.mark_host_dirty(-1, 1), "RamBlock.mark_host_dirty: offset=-1; accepted"),
    ):
        with pytest.raises(ArgumentError) as caught:
            use()
        assert str(caught.value).startswith(text)
    with pytest.raises(ArgumentTypeError, match=r"RamBlock.mark_host_dirty: size"):
        block.mark_host_dirty(0, "1")


# Pages the host has written


def test_writes_are_remembered(block: RamBlock) -> None:
    assert block.host_dirty() == []
    block.write(PAGE - 1, b"ab")
    block.write(10 * PAGE, bytes(3 * PAGE))
    block.write(0, b"")
    block.mark_host_dirty(20 * PAGE, 1)
    block.read(30 * PAGE, 1)
    block.view(31 * PAGE, 1)
    assert block.host_dirty() == [range(2), range(10, 13), range(20, 21)]
    assert block.take_host_dirty() == [range(2), range(10, 13), range(20, 21)]
    assert block.host_dirty() == block.take_host_dirty() == []


def test_open_writable_pages_are_dirty(block: RamBlock) -> None:
    with block.writable(5 * PAGE, 2 * PAGE) as view:
        assert block.host_dirty() == [range(5, 7)]
        assert block.take_host_dirty() == [range(5, 7)]
        block.write(7 * PAGE, b"x")
        assert block.take_host_dirty() == [range(5, 8)]
        assert block.take_host_dirty() == [range(5, 7)]
        array = np.frombuffer(view, np.uint8)[PAGE:]
    # The array made from it can still be written.
    assert block.take_host_dirty() == [range(5, 7)]
    array[0] = 1
    assert block.take_host_dirty() == [range(5, 7)]
    array[0] = 2
    del array, view
    # Gone, but written since the last answer.
    assert block.host_dirty() == [range(5, 7)]
    assert block.take_host_dirty() == [range(5, 7)]
    assert block.take_host_dirty() == []


def test_writable_of_nothing_is_clean(block: RamBlock) -> None:
    with block.writable(PAGE, 0) as view:
        assert len(view) == 0
        assert block.host_dirty() == []
    assert block.take_host_dirty() == []


def test_writes_through_the_mapping_are_remembered(block: RamBlock) -> None:
    block.mapping.write(3 * PAGE, b"x")
    with block.mapping.writable(9 * PAGE, 1):
        pass
    assert block.take_host_dirty() == [range(3, 4), range(9, 10)]


def test_a_large_write_is_one_mark() -> None:
    with RamBlock("pc.ram", "64M") as block:
        data = bytes(64 * MiB)
        calls = 0

        def count(frame: object, event: str, arg: object) -> None:
            nonlocal calls
            calls += event in {"call", "c_call"}

        sys.setprofile(count)
        try:
            block.write(0, data)
        finally:
            sys.setprofile(None)
        assert calls < 30  # and not one for each of 16384 pages
        assert block.take_host_dirty() == [range(16384)]


def test_no_write_is_lost_to_a_take_in_another_thread() -> None:
    # After the writer's last write and one more take, every page written was in some answer since it was written.
    with RamBlock("pc.ram", "1M") as block:
        taken: list[range] = []
        stop = threading.Event()

        def take() -> None:
            while not stop.is_set():
                taken.extend(block.take_host_dirty())

        thread = threading.Thread(target=take)
        thread.start()
        try:
            for page in range(256):
                block.write(page * PAGE, b"x")
                with block.writable(page * PAGE + 1, 1) as view:
                    view[0] = 1
        finally:
            stop.set()
            thread.join()
        taken.extend(block.take_host_dirty())
        assert {page for pages in taken for page in pages} == set(range(256))


# What is refused


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, -PAGE, 1 << 64, "0", "0M", "1", "640", "-1M", "x", ""])
def test_sizes_refused(size: int | str) -> None:
    with nothing_leaks(), pytest.raises(ArgumentError) as caught:
        RamBlock("pc.ram", size)
    assert (caught.value.call, caught.value.field, caught.value.value) == ("RamBlock", "size", size)


def test_more_than_the_host_has() -> None:
    # /proc/meminfo and sysconf tell the same number.
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert host_memory() == int(total.split()[1]) * 1024
    with nothing_leaks(), pytest.raises(ArgumentError, match=f"this host has {host_memory() // MiB} MiB"):
        RamBlock("pc.ram", host_memory() + PAGE)
    with pytest.raises(ArgumentError, match="Machine: ram='64T'; accepted: a multiple of 4096 bytes") as caught:
        ram_size("64T", "Machine", "ram")
    assert (caught.value.call, caught.value.field) == ("Machine", "ram")
    assert ram_size(host_memory()) == host_memory()


@pytest.mark.parametrize(
    ("field", "idstr", "size"),
    [
        ("idstr", None, PAGE),
        ("idstr", b"pc.ram", PAGE),
        ("idstr", 5, PAGE),
        ("size", "pc.ram", 4096.0),
        ("size", "pc.ram", None),
        ("size", "pc.ram", True),
        ("size", "pc.ram", b"16M"),
    ],
)
def test_types_refused(field: str, idstr: object, size: object) -> None:
    with nothing_leaks(), pytest.raises(ArgumentTypeError) as caught:
        RamBlock(idstr, size)
    assert (caught.value.call, caught.value.field) == ("RamBlock", field)


@pytest.mark.parametrize("idstr", ["", "x" * 250, "a\0b"])
def test_names_refused(idstr: str) -> None:
    with nothing_leaks(), pytest.raises(ArgumentError) as caught:
        RamBlock(idstr, PAGE)
    assert (caught.value.call, caught.value.field) == ("RamBlock", "idstr")


def test_refused_mmap_closes_the_file() -> None:
    # 256 MiB are too many for the address space that is left.
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    with nothing_leaks():
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MiB, hard))
        try:
            with pytest.raises(HostError) as caught:
                RamBlock("pc.ram", "256M")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert (caught.value.call, caught.value.errno, caught.value.field) == ("mmap", errno.ENOMEM, "size")


def test_no_descriptor_left() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = os.dup(0)
    os.close(top)
    with nothing_leaks():
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
        try:
            with pytest.raises(HostError) as caught:
                RamBlock("pc.ram", "1M")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (caught.value.call, caught.value.errno) == ("memfd_create", errno.EMFILE)


# Owners


def test_unclosed_warns_and_releases() -> None:
    with nothing_leaks():
        block = RamBlock("pc.ram", "1M")
        assert fds()["/memfd:pc.ram (deleted)"] == len(maps("pc.ram")) == 1
        with pytest.warns(ResourceWarning, match="unclosed"):
            del block


def test_nothing_leaks_over_many() -> None:
    def once(fail: bool) -> None:
        with RamBlock("pc.ram", "1M") as block:
            block.write(0, b"x")
            with block.writable() as view:
                view[0] = 1
                if fail:
                    raise KeyError
            block.take_host_dirty()

    once(False)
    with nothing_leaks():
        for i in range(200):
            if i % 2:
                with pytest.raises(KeyError):
                    once(True)
            else:
                once(False)


def test_fork_releases_only_the_childs_copy(block: RamBlock) -> None:
    block.write(0, b"parent")
    child = os.fork()
    if not child:
        code = 1
        try:
            block.close()
            code = 0 if not maps("pc.ram") and "/memfd:pc.ram (deleted)" not in fds() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert block.read(0, 6) == os.pread(block.fd, 6, 0) == b"parent"
    assert block.host_dirty() == [range(1)]


integers = st.one_of(st.integers(-(1 << 65), 1 << 65), st.integers(-2, MiB + 2))
anything = st.one_of(integers, st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.binary(max_size=3))


@settings(deadline=None)
@given(idstr=anything, size=st.one_of(anything, st.integers(-1, 1 << 12).map(lambda n: n * PAGE)))
def test_any_block_works_or_raises_ours(idstr: object, size: object) -> None:
    try:
        block = RamBlock(idstr, size)
    except (ArgumentError, ArgumentTypeError, HostError):
        return
    with block:
        assert (block.idstr, block.used_length) == (idstr, size)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, MiB), st.binary(max_size=3 * PAGE)), max_size=8))
def test_writes_are_a_bytearrays(writes: list[tuple[int, bytes]]) -> None:
    model, pages = bytearray(MiB), set()
    with RamBlock("pc.ram", MiB) as block:
        for offset, data in writes:
            if offset + len(data) <= MiB:
                block.write(offset, data)
                model[offset : offset + len(data)] = data
                pages |= {(offset + i) // PAGE for i in range(len(data))}
            else:
                with pytest.raises(ArgumentError):
                    block.write(offset, data)
        assert block.view() == model
        assert {page for part in block.take_host_dirty() for page in part} == pages


@settings(deadline=None)
@given(offset=anything, size=anything, data=anything)
def test_any_arguments_work_or_raise_ours(offset: object, size: object, data: object) -> None:
    with RamBlock("pc.ram", MiB) as block:
        for use in (
            lambda: block.read(offset, size),
            lambda: block.view(offset, size),
            lambda: block.writable(offset, size).__enter__(),
            lambda: block.write(offset, data),
            lambda: block.mark_host_dirty(offset, size),
        ):
            with contextlib.suppress(ArgumentError, ArgumentTypeError):
                use()


def test_repr_where_the_file_was_closed_by_itself() -> None:
    with RamBlock("pc.ram", MiB) as block:
        assert f"fd={block.fd}," in repr(block)
        assert block.memfd is not None
        block.memfd.close()
        assert "fd=-1," in repr(block)
