from __future__ import annotations

import os

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.ram import RamBlock
from hvmodel.ram.ramflags import RAM_RESIZEABLE, RAM_SHARED
from tests.host.held import maps, nothing_leaks

K, M = 1 << 10, 1 << 20


@pytest.fixture
def block():
    with nothing_leaks(), RamBlock("tables", 128 * K, max_length=2 * M) as block:
        yield block


def test_all_of_it_is_mapped_and_the_first_part_used(block: RamBlock) -> None:
    assert (block.used_length, block.max_length, block.flags) == (128 * K, 2 * M, RAM_SHARED | RAM_RESIZEABLE)
    (line,) = maps("tables")
    assert line.split()[0] == f"{block.host:x}-{block.host + 2 * M:x}"
    assert os.fstat(block.fd).st_size == 2 * M
    assert "flags=SHARED|RESIZEABLE" in repr(block)
    assert len(block.view()) == 128 * K
    for use in (
        lambda: block.read(128 * K, 1),
        lambda: block.view(128 * K - 1, 2),
        lambda: block.view(128 * K + 1),
        lambda: block.write(128 * K - 1, b"ab"),
        lambda: block.writable(0, 129 * K),
        lambda: block.mark_host_dirty(128 * K, 1),
    ):
        with pytest.raises(ArgumentError, match=r"^RamBlock\.\w+: (offset|size|len\(data\))="):
            use()
    with pytest.raises(ArgumentTypeError, match="data"):
        block.write(0, 5)


def test_it_grows_to_max_length_and_shrinks_again(block: RamBlock) -> None:
    block.write(0, b"first")
    block.take_host_dirty()
    block.resize("2M")
    assert block.used_length == 2 * M
    assert block.host_dirty() == [range(512)]
    block.write(2 * M - 4, b"last")
    assert os.pread(block.fd, 4, 2 * M - 4) == b"last"
    view = block.view(M, 16)
    block.resize(4 * K)
    assert (block.read(0, 5), len(block.view()), bytes(view)) == (b"first", 4 * K, bytes(16))
    with pytest.raises(ArgumentError):
        block.read(M, 1)
    with pytest.raises(BufferError):
        block.close()
    view.release()
    del view
    block.resize(2 * M)
    assert block.read(2 * M - 4, 4) == b"last"  # kept


def test_the_callback_is_told_each_change() -> None:
    told: list[tuple[str, int, int]] = []
    with RamBlock("tables", 4 * K, max_length=M, resized=lambda *args: told.append(args)) as block:
        block.resize(8 * K)
        block.resize(8 * K)
        block.resize(M)
        assert told == [("tables", 8 * K, block.host), ("tables", M, block.host)]


def test_refused(block: RamBlock) -> None:
    with pytest.raises(ArgumentError, match="Size too large: tables; accepted: at most max_length, 0x200000"):
        block.resize(2 * M + 4 * K)
    for size in (0, -4096, 1, 4097, 1 << 64, "x"):
        with pytest.raises(ArgumentError, match=r"RamBlock.resize: used_length"):
            block.resize(size)
    with pytest.raises(ArgumentTypeError):
        block.resize(None)
    assert block.used_length == 128 * K
    with RamBlock("fixed", M) as fixed:
        fixed.resize(M)
        with pytest.raises(ArgumentError, match="Size mismatch: fixed"):
            fixed.resize(2 * M)
    with pytest.raises(ClosedError):
        fixed.resize(M)


@pytest.mark.parametrize("longest", [0, 64 * K, 128 * K + 1, 1 << 64, "64T"])
def test_max_length_refused(longest: int | str) -> None:
    with nothing_leaks(), pytest.raises((ArgumentError, HostError)) as caught:
        RamBlock("tables", 128 * K, max_length=longest)
    assert caught.value.field == "max_length"
    with pytest.raises(ArgumentTypeError, match="resized"):
        RamBlock("tables", 128 * K, resized=5)


def test_the_file_cannot_be_cut_off(block: RamBlock) -> None:
    for size in (0, 128 * K, 4 * M):
        with pytest.raises(PermissionError):
            os.ftruncate(block.fd, size)
