"""Guest memory in pieces, read in place."""

from __future__ import annotations

import array
import mmap
from collections.abc import Callable

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError
from hvmodel.mmu.guest_memory import GuestMemory
from hvmodel.mmu.walk import NestedWalker, Walker

from ..guest_tables import four_levels

PG, PE = 1 << 31, 1


def test_entries_at_the_edges_of_pieces() -> None:
    low, high = bytearray(range(16)), bytearray(range(16, 32))
    memory = GuestMemory([(0x110, high), (0x100, low)])
    assert memory.pieces() == [(0x100, 16, True), (0x110, 16, True)]
    assert memory.entry(0x100) == int.from_bytes(range(8), "little")
    assert memory.entry(0x108, 4) == int.from_bytes(range(8, 12), "little")
    assert memory.entry(0x118) == int.from_bytes(range(24, 32), "little")
    for gpa, size in ((0xFF, 8), (0xF8, 8), (0x10C, 8), (0x11C, 8), (0x120, 8), (0x11D, 4)):
        assert memory.entry(gpa, size) is None
    assert [memory.is_writable(gpa) for gpa in (0xFF, 0x100, 0x10F, 0x110, 0x11F, 0x120)] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert memory.view(0xFF) is None
    assert memory.view(0x11F) == (0x110, memoryview(high))
    assert memory.view(0x120) is None
    assert repr(memory) == "<GuestMemory [0x100, 0x110), [0x110, 0x120)>"


def test_tables_are_views() -> None:
    held = bytearray(0x3000)
    memory = GuestMemory([(0x1000, held)])
    table = memory.table(0x2000, 4096, "Q")
    assert table is not None
    assert (len(table), table.itemsize) == (512, 8)
    held[0x1008] = 5
    assert table[1] == 5
    narrow = memory.table(0x2000, 4096, "I")
    assert narrow is not None
    assert (len(narrow), narrow[2]) == (1024, 5)
    for gpa in (0xFF8, 0x3008, 0x4000, 0):
        assert memory.table(gpa, 4096, "Q") is None
    assert memory.table(0x3000, 4096, "Q") is not None


def test_what_is_stored_where() -> None:
    held, seen = bytearray(32), []
    memory = GuestMemory([(0, memoryview(held)[:16]), (16, memoryview(held)[16:], False), (32, bytes(16))])
    assert memory.store(8, 0x1122334455667788)
    assert memory.store(0, 0xAABBCCDD, 4)
    assert not memory.store(16, 5)
    assert not memory.store(32, 5)
    assert not memory.store(48, 5)
    assert held.hex() == "ddccbbaa00000000" + "8877665544332211" + "00" * 16
    told = GuestMemory([(0, held)], write=lambda gpa, data: seen.append((gpa, data)))
    assert told.store(4, 7, 4)
    assert seen == [(4, bytes([7, 0, 0, 0]))]
    assert held[4] == 0


def test_closed() -> None:
    held = bytearray(16)
    memory = GuestMemory([(0, held)])
    before = memory.closed
    memory.check_open("call")
    memory.close()
    held.clear()
    assert (before, memory.closed) == (False, True)
    for call in (lambda: memory.check_open("call"), lambda: memory.entry(0), lambda: memory.table(0, 8, "Q")):
        with pytest.raises(ClosedError):
            call()


def test_the_last_address() -> None:
    memory = GuestMemory([((1 << 52) - 8, bytes(range(8)))])
    assert memory.entry((1 << 52) - 8) == int.from_bytes(range(8), "little")
    with pytest.raises(ArgumentError):
        GuestMemory([((1 << 52) - 8, bytes(9))])


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, b"")],
        [(0, bytes(16)), (8, bytes(8))],
        [(8, bytes(8)), (8, bytes(8))],
        [(-1, bytes(8))],
        [((1 << 52) - 4, bytes(8))],
    ],
)
def test_memory_that_is_none(pieces: list[tuple[int, bytes]]) -> None:
    with pytest.raises(ArgumentError):
        GuestMemory(pieces)


@pytest.mark.parametrize("pieces", [5, None, [5], [(0,)], [[0, bytes(8)]], [(0, bytes(8), True, 1)], [("0", bytes(8))]])
def test_pieces_of_another_type(pieces: object) -> None:
    with pytest.raises(ArgumentTypeError):
        GuestMemory(pieces)  # type: ignore[arg-type]  # is what is asked


def test_a_read_only_buffer_is_not_writable() -> None:
    with pytest.raises(ArgumentError) as caught:
        GuestMemory([(0, bytes(8), True)])
    assert caught.value.field == "pieces"
    seen: list[int] = []
    told = GuestMemory([(0, bytes(8), True)], write=lambda gpa, data: seen.append(gpa))
    assert told.store(0, 5)
    assert seen == [0]


def test_exchange() -> None:
    held = bytearray(16)
    memory = GuestMemory([(0, memoryview(held)[:12]), (12, bytes(4))])
    assert memory.exchange(0, 0, 7)
    assert not memory.exchange(0, 0, 9)
    assert memory.exchange(12, 1, 9, 4)  # may not be written: stays
    assert not memory.store(8, 5)  # reaches over the piece's end
    assert held.hex() == "07" + "00" * 15
    with pytest.raises(ArgumentError):
        memory.store(0, 1 << 32, 4)


def test_walkers_that_are_gone_leave_nothing_behind() -> None:
    tables = four_levels(0x9007)
    memory = GuestMemory([(0, tables)])
    for _ in range(5):
        walker = Walker(memory, cr3=0x1000)
        assert walker.walk(0x123).ok
        assert walker.walk(0x123, 2).ok
        function = walker.function(4)
        assert function(0x123).ok
        del walker
        assert len(memory._out) == 1  # of the function
        del function
        assert not memory._out


def test_closing_under_an_array() -> None:
    np = pytest.importorskip("numpy")
    held = bytearray(16)
    memory = GuestMemory([(0, held)])
    found = memory.view(0)
    assert found is not None
    array = np.frombuffer(found[1], np.uint8)
    del found
    memory.close("gone elsewhere")
    assert repr(memory) == "<GuestMemory closed: gone elsewhere>"
    with pytest.raises(ClosedError):
        memory.is_writable(0)
    with pytest.raises(ClosedError):
        memory.store(0, 1)
    with pytest.raises(BufferError):
        held.clear()
    del array
    held.clear()


@pytest.mark.parametrize("memory", [5, None, [1, 2], "text", [(0, 5)]])
def test_memory_of_another_type(memory: object) -> None:
    with pytest.raises(ArgumentTypeError):
        Walker(memory)  # type: ignore[arg-type]  # is what is asked


def test_kinds_of_memory() -> None:
    tables = four_levels(0x9007)
    file = mmap.mmap(-1, len(tables))
    file[:] = bytes(tables)
    kinds: list[Callable[[], object]] = [
        lambda: bytes(tables),
        lambda: tables,
        lambda: memoryview(tables),
        lambda: memoryview(tables).cast("Q"),
        lambda: file,
        lambda: array.array("Q", bytes(tables)),
        lambda: [(0, tables)],
        lambda: iter([(0, tables)]),
        lambda: GuestMemory([(0x1000, memoryview(tables)[0x1000:])]),
    ]
    for kind in kinds:
        assert Walker(kind(), cr3=0x1000).walk(0x123).gpa == 0x9123  # type: ignore[arg-type]  # of all kinds
    with pytest.raises(ArgumentTypeError):
        Walker.of(tables, "mmu")  # type: ignore[arg-type]  # is what is asked
    with pytest.raises(ArgumentTypeError):
        NestedWalker(tables)  # type: ignore[arg-type]  # is what is asked
    with pytest.raises(ArgumentError):
        NestedWalker(Walker(tables, cr0=PG | PE, cr4=0, efer=0))


@pytest.mark.parametrize("size", [4, 8])
def test_an_entry_takes_the_last_value_of_its_size(size: int) -> None:
    held = bytearray(16)
    memory, last = GuestMemory([(0, held)]), (1 << 8 * size) - 1
    assert memory.store(8 - size, last, size)
    assert held == bytes(8 - size) + b"\xff" * size + bytes(8)
    for value in (last + 1, -1):
        with pytest.raises(ArgumentError, match="value="):
            memory.store(0, value, size)
    # The whole entry has to be in the piece.
    assert memory.store(16 - size, 1, size)
    assert not memory.store(17 - size, 1, size)
