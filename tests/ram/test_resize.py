from __future__ import annotations

import os

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from hvmodel.kvm import Kvm, Vm
from hvmodel.ram import AddressSpace, MemoryListener, MemoryRegion, MemoryRegionSection, MemTxError, RamBlock
from hvmodel.ram.kvm_listener import KvmMemoryListener
from hvmodel.ram.ramflags import RAM_RESIZEABLE, RAM_SHARED
from tests.host.held import maps, nothing_leaks
from tests.need import need

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


def test_only_pages_of_the_guest_are_dirty(block: RamBlock) -> None:
    block.resize(2 * M)
    block.take_host_dirty()
    block.write(M - 1, b"ab")
    with block.writable(64 * K, 1), block.writable(M + 64 * K, 1), block.writable(124 * K, 8 * K):
        block.resize(128 * K)
        assert block.host_dirty() == [range(32)]
        assert block.take_host_dirty() == [range(32)]
        assert block.take_host_dirty() == [range(16, 17), range(31, 32)]  # under views; a third one ends behind them
    block.take_host_dirty()
    block.resize(2 * M)
    assert block.take_host_dirty() == [range(512)]


def kvm_slots(vm: Vm) -> list[tuple[int, int]]:
    return [(slot.gpa, slot.size) for slot in vm.memslots.values()]


def test_regions_and_slots_follow() -> None:
    need("kvm")
    system = MemoryRegion.container("system", 1 << 64)
    with (
        nothing_leaks(),
        RamBlock("tables", 128 * K, max_length=2 * M) as block,
        Kvm() as kvm,
        kvm.create_vm() as vm,
        AddressSpace(system, "memory") as space,
    ):
        whole, part = MemoryRegion.ram("whole", block), MemoryRegion.rom("part", block)
        part.size = 64 * K
        with pytest.raises(ArgumentError, match="used_length of its block"):
            whole.size = 129 * K
        system.add_subregion(16 * M, whole)
        system.add_subregion(32 * M, part)
        space.add_listener(KvmMemoryListener(vm))
        for size, cut in ((2 * M, 64 * K), (4 * K, 4 * K), (128 * K, 128 * K)):
            block.resize(size)
            assert (whole.size, part.size) == (size, cut)
            assert sorted(kvm_slots(vm)) == [(16 * M, size), (32 * M, cut)]
            space.write(16 * M + size - 4, b"last")
            with pytest.raises(MemTxError):
                space.read(16 * M + size, 1)


def test_a_resize_that_is_refused_changes_nothing() -> None:
    class No(MemoryListener):
        def region_add(self, section: MemoryRegionSection) -> None:
            if section.size > 128 * K:
                raise RuntimeError("too large")
            with pytest.raises(BusyError):
                tables.resize(M)

    told: list[int] = []
    system = MemoryRegion.container("system", 1 << 64)
    with (
        RamBlock("tables", 128 * K, max_length=2 * M, resized=lambda *args: told.append(args[1])) as tables,
        AddressSpace(system, "memory") as space,
    ):
        whole = MemoryRegion.ram("whole", tables)
        system.add_subregion(0, whole)
        space.add_listener(No())
        with pytest.raises(RuntimeError, match="too large"):
            tables.resize(M)
        assert (tables.used_length, whole.size, len(tables.view()), told) == (128 * K, 128 * K, 128 * K, [])
        system.del_subregion(whole)
        system.add_subregion((1 << 64) - M, whole)
        with pytest.raises(ArgumentError, match=r"RamBlock.resize: used_length=.*it begins at"):
            tables.resize(2 * M)
        assert (tables.used_length, whole.size, told) == (128 * K, 128 * K, [])
        del whole
        system.del_subregion(system.subregions[0])
        tables.resize(2 * M)  # nobody shows it any more
        assert told == [2 * M]
