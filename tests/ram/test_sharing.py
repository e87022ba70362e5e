from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.host import F_SEAL_FUTURE_WRITE, F_SEAL_SHRINK, F_SEAL_WRITE, MemFd, PassingError, ViewError, send_fds
from hvmodel.ram import (
    MemoryBackendFile,
    MemoryBackendMemfd,
    MemoryBackendRam,
    RamBlock,
    receive_block,
    send_block,
)
from hvmodel.ram.ramflags import RAM_READONLY, RAM_SHARED
from tests.cases import cases
from tests.host.held import maps, nothing_leaks

PAGE, M = 4096, 1 << 20
MAGIC = b"hvblock1"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with nothing_leaks():
        here, there = socket.socketpair()
        with here, there:
            yield here, there


def test_both_have_the_same_memory(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    for made in (RamBlock("pc.ram", M), RamBlock("pc.ram", backend=MemoryBackendMemfd(M))):
        with made as block:
            block.write(0, b"before")
            send_block(here, block)
            with receive_block(there) as same:
                assert (same.idstr, same.used_length, same.max_length, same.fd_offset) == ("pc.ram", M, M, 0)
                assert same.flags == RAM_SHARED
                assert same.fd != block.fd
                assert os.fstat(same.fd).st_ino == os.fstat(block.fd).st_ino
                assert same.read(0, 6) == b"before"
                same.write(PAGE, b"theirs")
                with block.writable(2 * PAGE, 4) as view:
                    view[:] = b"ours"
                assert block.read(PAGE, 6) == b"theirs"
                assert bytes(same.view(2 * PAGE, 4)) == b"ours"
                # Each remembers what it has written itself.
                assert (same.host_dirty(), block.host_dirty()) == ([range(1, 2)], [range(1), range(2, 3)])
            assert block.read(0, 6) == b"before"


CHILD = """
import socket, sys
import hvmodel as hv
from hvmodel.ram import receive_block
sock = socket.socket(fileno=int(sys.argv[1]))
with sock, receive_block(sock) as block:
    assert bytes(block.view(0, 5)) == b"hello"
    block.write(0x1000, b"from another process")
    sock.send(str(len(open("/proc/self/maps").read().split("/memfd:pc.ram"))).encode())
"""


def test_another_process_maps_it(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    with RamBlock("pc.ram", M) as block:
        block.write(0, b"hello")
        with subprocess.Popen([sys.executable, "-c", CHILD, str(there.fileno())], pass_fds=[there.fileno()]) as child:
            send_block(here, block)
            assert here.recv(10) == b"2"
            assert child.wait() == 0
        assert block.read(0x1000, 20) == b"from another process"
        assert len(maps("pc.ram")) == 1


def test_a_resizeable_block_comes_as_it_is(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    with RamBlock("tables", 2 * PAGE, max_length=M) as block:
        send_block(here, block)
        with receive_block(there) as same:
            assert (same.used_length, same.max_length) == (2 * PAGE, 2 * PAGE)
            block.resize(M)
            assert same.used_length == 2 * PAGE


def test_readonly(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    with RamBlock("pc.ram", M) as block:
        send_block(here, block)
        with receive_block(there, readonly=True) as same:
            assert same.flags == RAM_SHARED | RAM_READONLY
            with pytest.raises(HostError):
                same.write(0, b"x")
            with pytest.raises(ViewError), same.writable():
                pass
            block.write(0, b"x")
            assert bytes(same.view(0, 1)) == b"x"


def test_what_cannot_be_shared(pair: tuple[socket.socket, socket.socket]) -> None:
    here, _ = pair
    for backend, why in (
        (MemoryBackendRam(M), "no memfd"),
        (MemoryBackendFile(M, "/dev/shm", share=True), "no memfd"),
        (MemoryBackendMemfd(M, share=False), "private"),
    ):
        with RamBlock("ram", backend=backend) as block, pytest.raises(ArgumentError, match=why):
            send_block(here, block)
    with pytest.raises(ArgumentTypeError):
        send_block(here, None)
    closed = RamBlock("ram", M)
    closed.close()
    with pytest.raises(ClosedError):
        send_block(here, closed)


# ---- what must not be believed ----


def header(used: int = M, longest: int = M, offset: int = 0, idstr: bytes = b"ram", magic: bytes = MAGIC) -> bytes:
    return struct.pack("<8sQQQ", magic, used, longest, offset) + idstr


def sealed(seals: int = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK) -> MemFd:
    return MemFd("sent", M, seals=seals)


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        header(magic=b"hvblock2"),
        header(idstr=b""),
        header(used=0),
        header(used=M + PAGE),
        header(used=PAGE + 1),
        header(offset=1),
        header(used=(1 << 64) - PAGE, longest=(1 << 64) - PAGE),
        header(offset=(1 << 64) - PAGE),
        header(offset=M),
        header(used=2 * M, longest=2 * M),
        header(offset=PAGE),
        header(idstr=b"a\0b"),
        header(idstr=b"x" * 250),
        header(idstr=b"x" * 2000),
    ],
    ids=range(15),
)
def test_a_header_that_lies(data: bytes, pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    with sealed() as memfd:
        send_fds(here, [memfd], data)
        with pytest.raises((PassingError, ArgumentError)):
            receive_block(there)


def test_a_part_of_the_file(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    with sealed() as memfd:
        os.pwrite(memfd.fd, b"hello", 3 * PAGE)
        send_fds(here, [memfd], header(used=2 * PAGE, longest=2 * PAGE, offset=3 * PAGE))
        with receive_block(there) as block:
            assert (block.fd_offset, block.used_length, block.read(0, 5)) == (3 * PAGE, 2 * PAGE, b"hello")


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK])
def test_a_file_that_could_be_cut_off(seals: int, pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    with sealed(seals) as memfd:
        send_fds(here, [memfd], header())
        with pytest.raises(ArgumentError, match=r"it has (SHRINK|GROW|0), not"):
            receive_block(there)


def test_a_file_that_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    pipe, other = os.pipe()
    try:
        for fd in (here.fileno(), pipe, os.open("/dev/null", os.O_RDWR), os.open("/", os.O_RDONLY)):
            send_fds(here, [fd], header())
            with pytest.raises(ArgumentError, match="no seals"):
                receive_block(there)
            if fd not in (here.fileno(), pipe):
                os.close(fd)
        for fds in ([], [pipe, other]):
            send_fds(here, fds, header())
            with pytest.raises(PassingError):
                receive_block(there)
    finally:
        os.close(pipe)
        os.close(other)


@settings(max_examples=cases(25, 200), deadline=None)
@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda tail: MAGIC + tail))
def test_any_message(data: bytes) -> None:
    before = os.listdir("/proc/self/fd")
    here, there = socket.socketpair()
    with here, there, sealed() as memfd:
        send_fds(here, [memfd], data or b"\0")
        with pytest.raises((PassingError, ArgumentError)):
            receive_block(there).close()
    assert os.listdir("/proc/self/fd") == before


# ---- nobody changes what was checked ----


def test_write_sealed_memory_stays_what_it_is(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    every = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
    with sealed(0) as memfd:
        os.pwrite(memfd.fd, b"checked", 0)
        memfd.add_seals(every)
        send_fds(here, [memfd], header())
        with receive_block(there, readonly=True, seals=every) as block:
            view = block.view(0, 7)
            with pytest.raises(PermissionError):
                os.pwrite(memfd.fd, b"CHANGED", 0)
            with pytest.raises(HostError) as caught:
                RamBlock.from_fd("writer", memfd.fd)
            assert caught.value.errno == errno.EPERM
            assert bytes(view) == b"checked"
            view.release()
            del view


def test_future_write_is_not_enough(pair: tuple[socket.socket, socket.socket]) -> None:
    # Whoever mapped it before goes on writing.
    here, there = pair
    with RamBlock("ram", M) as block:
        block.memfd.add_seals(F_SEAL_FUTURE_WRITE)
        with pytest.raises(HostError) as caught:
            block.memfd.add_seals(F_SEAL_WRITE)
        assert caught.value.errno == errno.EBUSY
        send_block(here, block)
        with pytest.raises(ArgumentError, match="not WRITE"):
            receive_block(there, readonly=True, seals=F_SEAL_SHRINK | F_SEAL_WRITE)
        send_block(here, block)
        with receive_block(there, readonly=True, seals=F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE) as same:
            assert same.read(0, 4) == bytes(4)
            block.write(0, b"late")
            assert same.read(0, 4) == b"late"


# ---- from_fd ----


def test_from_fd() -> None:
    with nothing_leaks(), sealed() as memfd, RamBlock.from_fd("ram", memfd.fd, "64K", offset="128K") as block:
        assert (block.used_length, block.fd_offset) == (64 << 10, 128 << 10)
        memfd.close()  # the block has its own
        block.write(0, b"x")
        assert os.pread(block.fd, 1, 128 << 10) == b"x"


@pytest.mark.parametrize("seals", [0, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE])
def test_huge_pages_that_others_can_take_away(seals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemFd, "hugetlb", True)  # a host without a pool cannot map real ones
    with nothing_leaks(), sealed() as memfd:
        os.pwrite(memfd.fd, b"huge", 0)
        if seals:
            memfd.add_seals(seals)
        with RamBlock.from_fd("ram", memfd.fd, readonly=True) as block:
            assert block.read(0, 4) == b"huge"
            if seals:
                assert block.view(0, 4) == b"huge"
            else:
                with pytest.raises(ViewError, match="punch holes"):
                    block.view(0, 4)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"idstr": ""}, "idstr"),
        ({"idstr": "x" * 250}, "idstr"),
        ({"size": 0}, "size"),
        ({"size": M + PAGE}, "size"),
        ({"size": PAGE + 1}, "size"),
        ({"size": 1 << 64}, "size"),
        ({"offset": M}, "offset"),
        ({"offset": 100}, "offset"),
        ({"offset": -PAGE}, "offset"),
        ({"offset": PAGE, "size": M}, "size"),
        ({"seals": fcntl.F_SEAL_WRITE}, "seals"),
        ({"seals": 1 << 20}, "seals"),
    ],
)
def test_from_fd_refused(arguments: dict, field: str) -> None:
    with nothing_leaks(), sealed() as memfd:
        with pytest.raises(ArgumentError) as caught:
            RamBlock.from_fd(**{"idstr": "ram", "fd": memfd.fd} | arguments)
        assert caught.value.field == field
    with pytest.raises(HostError) as refused:
        RamBlock.from_fd("ram", 12345)
    assert refused.value.errno == errno.EBADF
    for wrong in ("5", None, True):
        with pytest.raises(ArgumentTypeError):
            RamBlock.from_fd("ram", wrong)
