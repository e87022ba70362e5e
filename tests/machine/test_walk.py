"""`Machine.walk` and `Machine.walker`: live RAM, in place; KVM_TRANSLATE says where addresses lead."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import hvmodel as hv
from hvmodel.arch.paging import PageTables
from hvmodel.errors import ArgumentError, BusyError, ClosedError
from hvmodel.mmu.walk import Walker
from hvmodel.ram import MemoryRegion, RamBlock
from hvmodel.ram.walk import INVALID_GPA, walk_many

from ..cases import cases
from ..need import need

W, U, F = 2, 4, 16
ENTRY = 0x1000


@pytest.fixture
def machine() -> Iterator[hv.Machine]:
    need("kvm")
    with hv.Machine(ram="16M") as machine:
        machine.load(ENTRY, b"\xf4")
        yield machine


def tables_at(machine: hv.Machine, tables: PageTables) -> None:
    machine.vcpu.long_mode(entry=ENTRY)
    machine.write(tables.cr3, tables.image())
    machine.vcpu.sregs = machine.vcpu.sregs.replace(cr3=tables.cr3)


def some_tables() -> PageTables:
    rng = random.Random(1)
    tables = PageTables(0x10_0000)
    tables.map(0, 0, 2 << 20, page_size=4096)
    at = 0x1_0000_0000
    for _ in range(60):
        at += rng.randrange(1, 1 << 12) << 21
        large = rng.random() < 0.3
        gpa = rng.randrange(1 << 9) << 21
        tables.map(at, gpa if large else gpa + 0x3000, 2 << 20 if large else 0x4000, user=rng.random() < 0.5)
    return tables


def test_kvm_leads_there_too(machine: hv.Machine) -> None:
    tables = some_tables()
    tables_at(machine, tables)
    walker, rng = machine.walker(), random.Random(2)
    gvas = []
    for start, _, size in tables.ranges():
        gvas += [start + rng.randrange(size), start + size, max(start - 1, 0)]
    gvas += [rng.getrandbits(47) for _ in range(cases(50, 5000))]
    found = walk_many(walker, np.array(gvas, np.uint64))
    for at, gva in enumerate(gvas):
        walk, said = walker.walk(gva), machine.vcpu.kvm.translate(gva)
        assert walk.gpa == (said.gpa if said.valid else None), hex(gva)
        assert found.gpa[at] == (said.gpa if said.valid else INVALID_GPA)
    assert any(walk.gpa is None for walk in map(walker.walk, gvas))


def test_kvm_sets_the_bits_that_the_walk_said(machine: hv.Machine) -> None:
    tables = some_tables()
    tables_at(machine, tables)
    walker = machine.walker()
    for start, _, _ in tables.ranges():
        before = machine.read(tables.cr3, tables.size)
        walk = walker.walk(start)
        machine.vcpu.kvm.translate(start)  # a read by the supervisor, which sets A
        expected = bytearray(before)
        for update in walk.updates:
            at = update.gpa - tables.cr3
            expected[at : at + 8] = update.new.to_bytes(8, "little")
        assert machine.read(tables.cr3, tables.size) == expected
        assert walker.walk(start).updates == ()


def test_m_walk(machine: hv.Machine) -> None:
    tables_at(machine, some_tables())
    walk = machine.walk(0x1234)
    assert (walk.gpa, walk.level, len(walk.entries)) == (0x1234, 1, 4)
    assert machine.walk(0x1234, U).error_code is None or machine.walk(0x1234, U).error_code == 5
    assert machine.walk(3 << 45).error_code == 0
    assert machine.walk(0x1234, W, update=True).updates[-1].dirty
    assert machine.walk(0x1234, W).updates == ()
    with pytest.raises(ArgumentError):
        machine.walk(-1)
    machine.vcpu.real_mode(entry=ENTRY)
    assert machine.walk(0x1234).entries == ()  # no paging


def test_ram_is_seen_as_it_is(machine: hv.Machine) -> None:
    tables = some_tables()
    tables_at(machine, tables)
    walker = machine.walker()
    last = walker.walk(0x3123).entries[-1]
    assert walker.walk(0x3123).gpa == 0x3123
    machine.write(last.gpa, (0xABC_D003).to_bytes(8, "little"))
    assert walker.walk(0x3123).gpa == 0xABC_D123
    assert walk_many(walker, [0x3123]).gpa.tolist() == [0xABC_D123]


def test_what_it_writes_counts_as_written_by_the_host(machine: hv.Machine) -> None:
    tables_at(machine, some_tables())
    machine.ram.take_host_dirty()
    walk = machine.walk(0x3123, W, update=True)
    pages = {page for span in machine.ram.take_host_dirty() for page in span}
    assert pages == {update.gfn for update in walk.updates}
    assert len(pages) == 4


def test_tables_in_rom_are_left_alone() -> None:
    need("kvm")
    with RamBlock("rom", 0x10_0000) as block, hv.Machine(ram="16M") as machine:
        machine.load(ENTRY, b"\xf4")
        tables = PageTables(0x4000_0000, max_size=0x10_0000)
        tables.map(0, 0, 1 << 20, page_size=4096)
        block.write(0, tables.image())
        region = MemoryRegion.rom("rom", block)
        machine.memory.root.add_subregion(tables.cr3, region)
        machine.vcpu.long_mode(entry=ENTRY)
        machine.vcpu.sregs = machine.vcpu.sregs.replace(cr3=tables.cr3)
        walk = machine.walk(0x3123, W, update=True)
        assert (walk.gpa, len(walk.updates)) == (0x3123, 4)
        assert block.read(0, tables.size) == tables.image()
        assert machine.vcpu.kvm.translate(0x3123).gpa == 0x3123
        assert block.read(0, tables.size) == tables.image()  # KVM leaves it alone too
        machine.memory.root.del_subregion(region)
        assert machine.walk(0x3123).missing == tables.cr3


def test_registers_are_those_of_the_vcpu(machine: hv.Machine) -> None:
    tables = PageTables(0x10_0000)
    tables.map(0, 0, 2 << 20, page_size=4096, user=True, writable=False)
    tables_at(machine, tables)
    assert machine.walk(0x1000, W).error_code == 3
    sregs = machine.vcpu.sregs
    machine.vcpu.sregs = sregs.replace(cr0=sregs.cr0 & ~(1 << 16))
    assert machine.walk(0x1000, W).ok
    machine.vcpu.sregs = sregs.replace(cr4=sregs.cr4 | 1 << 21)
    assert machine.walk(0x1000).error_code == 1
    machine.vcpu.rflags |= 1 << 18
    assert machine.walk(0x1000).ok
    cpuid = [entry for entry in machine.vcpu.kvm.get_cpuid2() if entry.function == 0x80000008]
    width = cpuid[0].eax & 0xFF
    last = machine.walk(0x1000).entries[-1]
    machine.write(last.gpa, (last.value | 1 << width).to_bytes(8, "little"))
    assert machine.walk(0x1000).error_code == 9
    assert not machine.vcpu.kvm.translate(0x1000).valid


def test_a_walker_does_not_keep_a_machine_from_closing() -> None:
    need("kvm")
    with hv.Machine(ram="16M") as machine:
        machine.vcpu.long_mode(entry=ENTRY)
        walkers = [machine.walker() for _ in range(3)]
        for walker in walkers:
            assert walker.walk(ENTRY).ok
            walk_many(walker, [ENTRY])
        machine.walk(ENTRY)
    for walker in walkers:
        with pytest.raises(ClosedError):
            walker.walk(ENTRY)
        with pytest.raises(ClosedError):
            walk_many(walker, [ENTRY])
    for call in (machine.walker, lambda: machine.walk(ENTRY)):
        with pytest.raises(ClosedError):
            call()


def test_ram_can_go_once_the_walker_is_closed() -> None:
    need("kvm")
    block = RamBlock("mine", "4M")
    with hv.Machine(ram=block) as machine:
        machine.vcpu.long_mode(entry=ENTRY)
        walker = machine.walker()
        assert walker.walk(ENTRY).ok
        walker.close()
        gc.disable()
        try:
            other = machine.walker()
            assert other.walk(ENTRY).ok
            del other
        finally:
            gc.enable()
    block.close()


def one_page_of_it(machine: hv.Machine, block: RamBlock, region: MemoryRegion, at: int) -> PageTables:
    """Tables in a block that `region` shows at `at`."""
    tables = PageTables(at, max_size=0x10_0000)
    tables.map(0, 0, 1 << 20, page_size=4096)
    block.write(0, tables.image())
    machine.memory.root.add_subregion(at, region)
    machine.vcpu.long_mode(entry=ENTRY)
    machine.vcpu.sregs = machine.vcpu.sregs.replace(cr3=at)
    return tables


def test_a_walker_does_not_outlive_what_memory_was_where(machine: hv.Machine) -> None:
    tables_at(machine, some_tables())
    with RamBlock("over", 0x1000) as block:
        root, region = machine.memory.root, MemoryRegion.ram("over", block)
        changes: tuple[Callable[[], None], ...] = (
            lambda: root.add_subregion(0x10_0000, region, priority=1),  # over the root table
            lambda: setattr(region, "readonly", True),
            lambda: root.del_subregion(region),
        )
        for change in changes:
            walker = machine.walker()
            function = walker.function(W)
            before = walker.walk(0x3123).ok
            assert (function(0x3123).ok, walk_many(walker, [0x3123]).ok[0]) == (before, before)
            change()
            with pytest.raises(ClosedError, match="other memory"):
                walker.walk(0x3123)
            with pytest.raises(ClosedError, match="other memory"):
                walk_many(walker, [0x3123])
            with pytest.raises(ClosedError):
                walker.memory.entry(0)
            with pytest.raises(ClosedError):
                function(0x3123)
        assert machine.walk(0x3123).ok
        block.write(0, bytes(0x1000))
    # What does not move a slot leaves walkers alone: registers of a device, logging.
    walker = machine.walker()
    root.add_subregion(1 << 32, MemoryRegion.io("device", 0x1000))
    assert walker.walk(0x3123).ok


def test_where_a_slot_is_read_only_is_what_kvm_says(machine: hv.Machine) -> None:
    # RAM through a read-only alias has a slot that may be written: KVM sets A there.
    with RamBlock("tables", 0x10_0000) as block:
        shown = MemoryRegion.alias("shown", MemoryRegion.ram("hidden", block), 0, 0x10_0000)
        shown.readonly = True
        tables = one_page_of_it(machine, block, shown, 0x4000_0000)
        before = block.read(0, tables.size)
        assert machine.walk(0x3123, update=True).gpa == 0x3123
        set_by_us = block.read(0, tables.size)
        block.write(0, before)
        machine.vcpu.kvm.translate(0x3123)
        assert block.read(0, tables.size) == set_by_us != before
        machine.memory.root.del_subregion(shown)


def test_whole_pages_of_a_region_that_begins_within_one(machine: hv.Machine) -> None:
    with RamBlock("tables", 0x10_0000) as block:
        # A device's registers hide the last bytes of the region: its slot is a page shorter.
        tables = one_page_of_it(machine, block, MemoryRegion.ram("ram", block), 0x4000_0000)
        machine.memory.root.add_subregion(0x400F_FF00, MemoryRegion.io("device", 0x100), priority=1)
        assert (0x4000_0000, 0xF_F000, True) in machine.walker().memory.pieces()
        for gva in (0x3123, 1 << 20):
            said = machine.vcpu.kvm.translate(gva)
            assert machine.walk(gva).gpa == (said.gpa if said.valid else None)
        assert machine.walk(0x3123).entries[0].gpa == tables.cr3
        for region in machine.memory.root.subregions[:]:
            if region.addr >= 0x4000_0000:
                machine.memory.root.del_subregion(region)


def test_a_walker_walks_while_the_vcpu_runs(machine: hv.Machine) -> None:
    machine.load(ENTRY, b"\xeb\xfe")
    machine.vcpu.long_mode(entry=ENTRY)
    walker = machine.walker()
    thread = threading.Thread(target=lambda: machine.run(timeout=20))
    thread.start()
    try:
        for _ in range(50):
            assert walker.walk(ENTRY).gpa == ENTRY
            assert walk_many(walker, [ENTRY]).gpa.tolist() == [ENTRY]
    finally:
        machine.kick()
        thread.join()


def test_while_another_thread_runs_it(machine: hv.Machine) -> None:
    machine.load(ENTRY, b"\xeb\xfe")  # jmp to itself
    machine.vcpu.long_mode(entry=ENTRY)
    machine.walk(ENTRY)
    thread = threading.Thread(target=lambda: machine.run(timeout=20))
    thread.start()
    try:
        raised = False
        for _ in range(2000):
            try:
                machine.walk(ENTRY)
            except BusyError:
                raised = True
                break
        assert raised
    finally:
        machine.kick()
        thread.join()
    assert isinstance(machine.walker(), Walker)
