"""Listeners: from the flat views of random trees to the slots of a real VM, refusals and their undoing, and QEMU's own
slots for the same tree."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, KvmError
from hvmodel.kvm import Interrupted, Kvm, MemSlot, MmioRead, MmioWrite, Vm
from hvmodel.kvm import slotchange as slotchange_module
from hvmodel.kvm import vm as vm_module
from hvmodel.ram import (
    AddressSpace,
    KvmMemoryListener,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemoryRegionSection,
    RamBlock,
    info_mtree,
    transaction,
)
from hvmodel.ram.kvm_listener import align_section
from tests.cases import cases
from tests.need import need, need_cap

PAGE = 4096
LOG, READONLY = 1, 2
EVERYTHING = 1 << 64
NR_PAGES = 16


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock("test.ram", NR_PAGES * PAGE) as block:
        yield block


@pytest.fixture
def vm(block: RamBlock) -> Iterator[Vm]:
    """A VM that is closed before the memory in its slots is."""
    need("kvm")
    with Kvm() as kvm, kvm.create_vm() as vm:
        yield vm


@pytest.fixture
def root() -> MemoryRegion:
    return MemoryRegion.container("system", EVERYTHING)


@pytest.fixture
def space(root: MemoryRegion, vm: Vm) -> Iterator[AddressSpace]:
    with AddressSpace(root, "memory") as space:
        yield space


@pytest.fixture
def listener(vm: Vm, space: AddressSpace) -> KvmMemoryListener:
    listener = KvmMemoryListener(vm)
    space.add_listener(listener)
    return listener


def shown(vm: Vm) -> list[tuple[int, int, int, int]]:
    """(id, first page, pages, flags) of every slot, by address."""
    slots = sorted(vm.memslots.values(), key=lambda slot: slot.gpa)
    return [(slot.slot, slot.gpa // PAGE, slot.size // PAGE, slot.flags) for slot in slots]


def occupied(vm: Vm, page: int, memory: int) -> bool:
    """Whether the kernel has a slot at that page: a slot of our own does not fit there.  Nothing of it stays."""
    region = ffi.new("struct kvm_userspace_memory_region *", [30000, 0, page * PAGE, PAGE, memory])
    rc = lib.kvm_set_user_memory_region(vm.fd, region)
    if rc == -errno.EEXIST:
        return True
    assert rc == 0
    region.memory_size = 0
    assert lib.kvm_set_user_memory_region(vm.fd, region) == 0
    return False


# ---- whole pages of a section ----


@given(start=st.integers(0, 5 * PAGE), size=st.integers(1, 5 * PAGE), high=st.sampled_from([0, 1 << 40]))
def test_a_slot_is_the_whole_pages_of_a_section(start: int, size: int, high: int) -> None:
    whole = [p for p in range(11) if start <= p * PAGE and (p + 1) * PAGE <= start + size]
    gpa, length = align_section(high + start, size)
    assert gpa % PAGE == length % PAGE == 0
    assert [(gpa - high) // PAGE + i for i in range(length // PAGE)] == whole
    assert gpa >= high + start
    assert gpa - (high + start) < PAGE


def test_sections_at_the_end_of_the_space() -> None:
    assert align_section(EVERYTHING - 2 * PAGE, 2 * PAGE) == (EVERYTHING - 2 * PAGE, 2 * PAGE)
    assert align_section(EVERYTHING - 100, 100)[1] == align_section(EVERYTHING - 100, 50)[1] == 0
    assert align_section(0, EVERYTHING) == (0, EVERYTHING)


# ---- the base class ----


def test_a_listener_need_do_nothing(root: MemoryRegion) -> None:
    class Commits(MemoryListener):
        count = 0

        def commit(self) -> None:
            self.count += 1

    listener = Commits()
    with AddressSpace(root, "memory") as space:
        space.add_listener(listener)
        io = MemoryRegion.io("io", PAGE)
        root.add_subregion(0, io)
        io.dirty_log_mask = 1
        io.dirty_log_mask = 0
        root.del_subregion(io)
        space.remove_listener(listener)
        assert listener.count == 6


def test_a_section_says_where_it_ends(space: AddressSpace) -> None:
    region = MemoryRegion.io("io", EVERYTHING)
    assert MemoryRegionSection(space, region, 0, 0x1000, 0x234).end == 0x1234
    section = MemoryRegionSection(space, region, 0, 0, EVERYTHING)
    assert section.end == EVERYTHING
    assert not (section.readonly)
    assert not (section.romd)
    assert not (section.nonvolatile)
    assert not (section.unmergeable)


# ---- which region has which slot ----


def test_ram_rom_and_io(vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener) -> None:
    need_cap(vm, "READONLY_MEM")
    root.add_subregion(0, MemoryRegion.ram("ram", block))
    root.add_subregion(0x100000, MemoryRegion.rom("rom", block))
    root.add_subregion(0x200000, MemoryRegion.io("io", 0x10000))
    root.add_subregion(0x300000, MemoryRegion.ram("rom2", block, readonly=True))
    assert shown(vm) == [(0, 0, 16, 0), (1, 0x100, 16, READONLY), (2, 0x300, 16, READONLY)]
    assert listener.memslots == tuple(vm.memslots.values())
    assert {slot.hva for slot in listener.memslots} == {block.host}
    space = space_of(listener)
    assert listener.has_memory(space, 0x100000, 16 * PAGE)
    assert not listener.has_memory(space, 0x100000, PAGE)
    with AddressSpace(root, "other") as other:
        assert not listener.has_memory(other, 0x100000, 16 * PAGE)
    text = info_mtree([space], flatview=True, kvm_backed=listener.has_memory)
    marked = re.findall(r"^ .*\): (\w+)( KVM)?$", text, re.M)
    assert marked == [("ram", " KVM"), ("rom", " KVM"), ("io", ""), ("rom2", " KVM")]
    section = listener.section_of(1)
    assert section is not None
    assert section.region.name == "rom"
    assert listener.section_of(7) is None


def test_a_rom_device_has_a_slot_while_it_is_read_as_memory(
    vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener
) -> None:
    need_cap(vm, "READONLY_MEM")
    flash = MemoryRegion.rom_device("flash", block, MemoryRegionOps())
    root.add_subregion(0x1000, flash)
    assert shown(vm) == [(0, 1, 16, READONLY)]
    flash.romd = False
    assert shown(vm) == []
    flash.romd = True
    assert shown(vm) == [(0, 1, 16, READONLY)]


def test_a_read_only_alias_is_as_qemu_has_it(vm: Vm, root: MemoryRegion, block: RamBlock) -> None:
    need_cap(vm, "READONLY_MEM")
    root.add_subregion(0, MemoryRegion.ram("ram", block))
    alias = MemoryRegion.alias("pam-rom", root.subregions[0], 4 * PAGE, 2 * PAGE)
    alias.readonly = True
    root.add_subregion(4 * PAGE, alias, priority=1)
    with AddressSpace(root, "memory") as space:
        for protects, flags in ((False, 0), (True, READONLY)):
            listener = KvmMemoryListener(vm, readonly_sections=protects)
            space.add_listener(listener)
            assert shown(vm) == [(0, 0, 4, 0), (1, 4, 2, flags), (2, 6, 10, 0)]
            space.remove_listener(listener)
            assert shown(vm) == []


def test_sub_page_ends_have_no_slot(vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener) -> None:
    ram = MemoryRegion.ram("ram", block)
    window = MemoryRegion.alias("window", ram, 5 * PAGE + 0x800, 3 * PAGE)
    root.add_subregion(0x800, window)
    [slot] = vm.memslots.values()
    assert (slot.gpa, slot.size, slot.hva) == (PAGE, 2 * PAGE, block.host + 6 * PAGE)
    assert [occupied(vm, page, block.host) for page in range(5)] == [False, True, True, False, False]
    window.size = PAGE  # [0x800, 0x1800) has no whole page
    assert vm.memslots == {}
    assert space_of(listener).read(0x800, 4) == bytes(4)  # but it is memory all the same


def test_a_section_off_its_page_is_refused_by_name(
    vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener
) -> None:
    # QEMU aborts: the kernel takes whole pages of the host for whole pages of the guest.
    ram = MemoryRegion.ram("ram", block)
    with pytest.raises(KvmError) as error:
        root.add_subregion(0x800, ram)
    assert (error.value.errno, error.value.field, error.value.value) == (errno.EINVAL, "hva", block.host + 0x800)
    assert root.subregions == ()
    assert vm.memslots == {}
    assert listener.memslots == ()
    root.add_subregion(0x1000, ram)
    assert shown(vm) == [(0, 1, 16, 0)]


def space_of(listener: KvmMemoryListener) -> AddressSpace:
    section = listener._space
    assert section is not None
    return section


# ---- logging ----


def test_logging_follows_the_clients(vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener) -> None:
    ram = MemoryRegion.ram("ram", block)
    root.add_subregion(0, ram)
    with pytest.raises(KvmError):
        vm.get_dirty_log(0)
    ram.set_log(True)
    ram.set_log(True, 2)
    assert shown(vm) == [(0, 0, 16, LOG)]
    assert vm.get_dirty_log(0) == bytes(8)
    ram.set_log(False)
    assert shown(vm) == [(0, 0, 16, LOG)]  # migration still wants it
    ram.set_log(False, 2)
    assert shown(vm) == [(0, 0, 16, 0)]
    ram.dirty_log_mask = 2
    root.del_subregion(ram)
    root.add_subregion(0, ram)
    assert shown(vm) == [(0, 0, 16, LOG)]
    assert listener.memslots == tuple(vm.memslots.values())


def test_what_was_logged_is_taken_before_a_slot_goes(vm: Vm, root: MemoryRegion, block: RamBlock) -> None:
    taken: list[tuple[MemSlot, bytes]] = []
    ram = MemoryRegion.ram("ram", block)
    ram.set_log(True)
    root.add_subregion(0, ram)
    with AddressSpace(root, "memory") as space:
        space.add_listener(KvmMemoryListener(vm, take_log=lambda slot, bitmap: taken.append((slot, bytes(bitmap)))))
        [slot] = vm.memslots.values()
        # mov byte [0x3000], al; mov byte [0x7000], al; hlt
        block.write(0x1000, bytes.fromhex("a20030 a20070 f4"))
        run_to_hlt(vm, 0x1000)
        root.enabled = False
        assert taken == [(slot, (1 << 3 | 1 << 7).to_bytes(8, "little"))]
        root.enabled = True
        ram.set_log(False)
        root.enabled = False
        assert len(taken) == 1


def run_to_hlt(vm: Vm, entry: int) -> None:
    with vm.create_vcpu(0) as vcpu:
        sregs, regs = vcpu.sregs, vcpu.regs
        sregs.cs.base = sregs.cs.selector = 0
        regs.rip, regs.rflags = entry, 2
        vcpu.sregs, vcpu.regs = sregs, regs
        exit = vcpu.run(10.0)
        assert type(exit).__name__ == "Hlt", exit


# ---- what a guest sees ----


def test_a_guest_sees_what_the_flat_view_shows(
    vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener
) -> None:
    need_cap(vm, "READONLY_MEM")
    with RamBlock("rom", PAGE) as image:
        image.write(0, b"\x42")
        flash = MemoryRegion.rom_device("flash", image, MemoryRegionOps())
        flash.enabled = False
        root.add_subregion(0, MemoryRegion.ram("ram", block))
        root.add_subregion(0x3000, flash, priority=1)
        # again: mov al, [0x3000]; mov [0x4000], al; mov byte [0x3000], 0x55; hlt; jmp again
        block.write(0x1000, bytes.fromhex("a00030 a20040 c606003055 f4 ebf2"))
        vcpu = vm.create_vcpu(0)
        sregs, regs = vcpu.sregs, vcpu.regs
        sregs.cs.base = sregs.cs.selector = 0
        regs.rip, regs.rflags = 0x1000, 2
        vcpu.sregs, vcpu.regs = sregs, regs

        def exits() -> list[str]:
            # Until HLT, as kind and, of MMIO, address.
            found: list[str] = []
            while not found or found[-1] != "Hlt":
                exit = vcpu.run(10.0)
                kind = type(exit).__name__
                found.append(f"{kind} {exit.gpa:#x}" if isinstance(exit, MmioRead | MmioWrite) else kind)
                if isinstance(exit, MmioRead):
                    vcpu.answer(0x77)
            return found

        assert exits() == ["Hlt"]
        assert block.read(0x3000, 1) == b"\x55"
        flash.enabled = True  # read as memory, written by exits
        assert exits() == ["MmioWrite 0x3000", "Hlt"]
        assert (block.read(0x4000, 1), image.read(0, 1)) == (b"\x42", b"\x42")
        flash.romd = False  # all by exits
        assert exits() == ["MmioRead 0x3000", "MmioWrite 0x3000", "Hlt"]
        assert block.read(0x4000, 1) == b"\x77"
        flash.enabled = False
        assert exits() == ["Hlt"]
        assert block.read(0x4000, 1) == b"\x55"
        vm.close()


def test_a_running_guest_does_not_notice_the_slots_that_stay(
    vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener
) -> None:
    ram = MemoryRegion.ram("ram", block)
    root.add_subregion(0, MemoryRegion.alias("low", ram, 0, 8 * PAGE))
    high = MemoryRegion.alias("high", ram, 8 * PAGE, 8 * PAGE)
    root.add_subregion(0x100000, high)
    block.write(0x1000, bytes.fromhex("66ff060020 ebf9"))  # again: inc dword [0x2000]; jmp again
    vcpu = vm.create_vcpu(0)
    sregs, regs = vcpu.sregs, vcpu.regs
    sregs.cs.base = sregs.cs.selector = 0
    regs.rip, regs.rflags = 0x1000, 2
    vcpu.sregs, vcpu.regs = sregs, regs
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(vcpu.run(30.0)))
    thread.start()
    try:
        for _ in range(cases(30, 300)):
            before = block.read(0x2000, 4)
            high.enabled = not high.enabled
            for _ in range(10_000):  # until the guest has gone on
                if block.read(0x2000, 4) != before or found:
                    break
                time.sleep(0.001)
            assert block.read(0x2000, 4) != before
    finally:
        vcpu.kick()
        thread.join()
    assert found == [Interrupted("kick")]
    vm.close()


# ---- which ids, which calls ----


def test_ids_are_the_first_that_are_free(
    vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener
) -> None:
    mine = vm.set_user_memory_region(1, 0x900 * PAGE, block.mapping, size=PAGE)
    ram = MemoryRegion.ram("ram", block)
    views = [MemoryRegion.alias(f"view{i}", ram, 0, PAGE) for i in range(4)]
    for at, view in enumerate(views):
        root.add_subregion(at * 0x100 * PAGE, view)
    assert shown(vm) == [(0, 0, 1, 0), (2, 0x100, 1, 0), (3, 0x200, 1, 0), (4, 0x300, 1, 0), (1, 0x900, 1, 0)]
    with transaction():  # deleted first: their ids are free for what is added
        root.del_subregion(views[1])
        root.del_subregion(views[2])
        root.add_subregion(0x400 * PAGE, views[1])
    assert shown(vm) == [(0, 0, 1, 0), (4, 0x300, 1, 0), (2, 0x400, 1, 0), (1, 0x900, 1, 0)]
    assert mine not in listener.memslots
    assert len(listener.memslots) == 3


_COUNTED = """
import os
from hvmodel.kvm import Kvm
from hvmodel.ram import AddressSpace, KvmMemoryListener, MemoryRegion, RamBlock, transaction

def mark(name):
    os.path.exists("/mark/" + name)

root = MemoryRegion.container("system", 1 << 64)
with RamBlock("ram", 1 << 20) as block, Kvm() as kvm, kvm.create_vm() as vm, AddressSpace(root, "memory") as space:
    ram = MemoryRegion.ram("ram", block)
    views = [MemoryRegion.alias(f"view{i}", ram, i * 4096, 4096) for i in range(100)]
    with transaction():
        for at, view in enumerate(views):
            root.add_subregion(at * 8192, view)
    mark("add")
    space.add_listener(KvmMemoryListener(vm))
    mark("one")
    views[50].enabled = False
    mark("none")
    root.add_subregion(1 << 40, MemoryRegion.io("io", 4096))
    with transaction():
        views[3].enabled = False
        views[3].enabled = True
    with transaction():  # other regions, the same bytes at the same place
        root.del_subregion(views[7])
        root.add_subregion(7 * 8192, MemoryRegion.alias("other", ram, 7 * 4096, 4096))
    mark("split")
    root.add_subregion(4 * 8192, MemoryRegion.io("hole", 4096), 1)
    mark("log")
    ram.set_log(True)
    mark("move")
    views[60].addr = 1 << 30
    mark("end")
"""


def test_slots_that_stay_get_no_ioctl(tmp_path: Path) -> None:
    need("kvm", "strace")
    log = tmp_path / "log"
    command = ["strace", "-f", "-e", "trace=ioctl,stat,newfstatat", "-o", str(log)]
    subprocess.run([*command, sys.executable, "-c", _COUNTED], check=True, timeout=60)
    calls: dict[str, list[str]] = {}
    phase = "start"
    for line in log.read_text().splitlines():
        if found := re.search(r'"/mark/(\w+)"', line):
            phase = found[1]
        elif "KVM_SET_USER_MEMORY_REGION" in line:
            slot, size = re.search(r"slot=(\d+).*memory_size=(\d+)", line).groups()  # type: ignore[union-attr]
            calls.setdefault(phase, []).append(("-" if size == "0" else "+") + slot)
    calls.pop("end", None)  # closing the space deletes its slots
    assert calls == {
        "add": [f"+{slot}" for slot in range(100)],
        "one": ["-50"],
        "split": ["-4"],
        "log": [f"+{slot}" for slot in range(100) if slot not in (4, 50)],  # each with its flags
        "move": ["-60", "+4"],
    }


# ---- the slots of random trees ----

_RANGES = st.tuples(st.integers(0, 24 * 8), st.integers(1, 10 * 8))  # in units of 512 bytes
_VIEWS = st.lists(
    st.tuples(_RANGES, st.integers(0, 6), st.sampled_from(["ram", "rom", "io"]), st.integers(-1, 1)),
    min_size=1,
    max_size=6,
)
_CHANGES = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["enabled", "addr", "readonly", "size", "log", "offset"]),
            st.integers(0, 200),
        ),
        min_size=1,
        max_size=4,
    ),
    max_size=6,
)


def expected(space: AddressSpace) -> list[tuple[int, int, int, int]]:
    """(gpa, size, offset in the block, flags) by QEMU's rules, from the flat view alone."""
    slots = []
    for r in space.flatview.ranges:
        whole = [
            p for p in range(r.start // PAGE, r.end // PAGE + 1) if r.start <= p * PAGE and (p + 1) * PAGE <= r.end
        ]
        if r.region.is_ram and whole:
            flags = (READONLY if r.region.readonly else 0) | (LOG if r.region.dirty_log_mask else 0)
            slots.append((whole[0] * PAGE, len(whole) * PAGE, r.offset_in_region + whole[0] * PAGE - r.start, flags))
    return slots


@settings(max_examples=cases(60, 600), deadline=None)
@given(views=_VIEWS, changes=_CHANGES)
def test_slots_are_the_flat_view(views: list[Any], changes: list[list[tuple[int, str, int]]]) -> None:
    need("kvm")
    with ExitStack() as stack:
        block = stack.enter_context(RamBlock("test.ram", NR_PAGES * PAGE))
        vm = stack.enter_context(stack.enter_context(Kvm()).create_vm())
        root = MemoryRegion.container("system", EVERYTHING)
        kinds = {
            "ram": MemoryRegion.ram("ram", block),
            "rom": MemoryRegion.rom("rom", block),
            "io": MemoryRegion.io("io", NR_PAGES * PAGE),
        }
        space = stack.enter_context(AddressSpace(root, "memory"))
        listener = KvmMemoryListener(vm)
        space.add_listener(listener)
        # Offset and address go together modulo a page, but for some, which the kernel refuses.
        regions = []
        for (start, size), page, kind, priority in views:
            offset = page * PAGE + start * 512 % PAGE
            regions.append(MemoryRegion.alias("view", kinds[kind], offset, size * 512))
            root.add_subregion(start * 512, regions[-1], priority)
        follow(vm, space, listener, block)
        for steps in changes:
            before = vm.memslots, listener.memslots, [(r.addr, r.size, r.enabled) for r in regions]
            try:
                with transaction():
                    for which, what, value in steps:
                        adjust(regions[which % len(regions)], kinds["ram"], what, value)
            except KvmError as error:
                assert (error.errno, error.field) == (errno.EINVAL, "hva")  # noqa: PT017  # it need not come
                assert before == (vm.memslots, listener.memslots, [(r.addr, r.size, r.enabled) for r in regions])
            follow(vm, space, listener, block)


def adjust(region: MemoryRegion, ram: MemoryRegion, what: str, value: int) -> None:
    if what == "enabled":
        region.enabled = not region.enabled
    elif what == "addr":
        region.addr = value * 512 if value > 150 else value // 8 * PAGE + region.addr % PAGE
    elif what == "readonly":
        region.readonly = not region.readonly
    elif what == "size":
        region.size = value * 512
    elif what == "log":
        ram.set_log(not ram.dirty_log_mask)
    else:
        region.alias_offset = value // 32 * PAGE + region.alias_offset % PAGE


def follow(vm: Vm, space: AddressSpace, listener: KvmMemoryListener, block: RamBlock) -> None:
    slots = listener.memslots
    assert [(s.gpa, s.size, s.hva - block.host, s.flags) for s in slots] == expected(space)
    assert vm.memslots == {slot.slot: slot for slot in slots}
    pages = {gpa // PAGE + i for gpa, size, _, _ in expected(space) for i in range(size // PAGE)}
    assert [page for page in range(42) if occupied(vm, page, block.host)] == sorted(pages)


# ---- refusals ----


@pytest.fixture
def tree(root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener) -> list[MemoryRegion]:
    """Four views of two pages each, at pages 0, 0x10, 0x20, 0x30; the last one not enabled."""
    ram = MemoryRegion.ram("ram", block)
    views = [MemoryRegion.alias(f"view{i}", ram, 2 * i * PAGE, 2 * PAGE) for i in range(4)]
    views[3].enabled = False
    for at, view in enumerate(views):
        root.add_subregion(at * 0x10 * PAGE, view)
    assert listener.vm.memslots.keys() == {0, 1, 2}
    return views


def test_a_slot_in_the_way_is_named_and_all_put_back(
    vm: Vm, root: MemoryRegion, block: RamBlock, tree: list[MemoryRegion], listener: KvmMemoryListener
) -> None:
    def change() -> None:
        with transaction():
            root.del_subregion(tree[0])
            tree[1].addr = 0x100 * PAGE
            tree[3].enabled = True

    vm.set_user_memory_region(9, 0x31 * PAGE, block.mapping, size=PAGE)
    before, mine = vm.memslots, listener.memslots
    with pytest.raises(KvmError, match=r"overlaps slot 9 \[0x31000, 0x32000\)") as error:
        change()
    assert (error.value.errno, error.value.field, error.value.value) == (errno.EEXIST, "gpa", 0x30 * PAGE)
    assert vm.memslots == before
    assert listener.memslots == mine
    assert not hasattr(error.value, "__notes__")
    assert [occupied(vm, page, block.host) for page in (0, 0x10, 0x20, 0x30, 0x31, 0x100)] == [1, 1, 1, 0, 1, 0]
    assert tree[0] in root.subregions
    assert (tree[1].addr, tree[3].enabled) == (0x10 * PAGE, False)
    vm.delete_memory_region(9)
    change()
    assert shown(vm) == [(2, 0x20, 2, 0), (0, 0x30, 2, 0), (1, 0x100, 2, 0)]


class _Refusing:
    # The library, whose `at`-th change of a slot from now on is refused, or interrupted before or after it is made.
    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how

    def __getattr__(self, name: str) -> Any:
        return self.set if name == "kvm_set_user_memory_region" else getattr(lib, name)

    def set(self, fd: int, region: Any) -> int:
        self.at -= 1
        if self.at == 0 and self.how == "refused":
            return -errno.ENOMEM
        if self.at == 0 and self.how == "before":
            raise KeyboardInterrupt
        rc = int(lib.kvm_set_user_memory_region(fd, region))
        if self.at == 0:
            raise KeyboardInterrupt
        return rc


@pytest.mark.parametrize("how", ["refused", "before", "after"])
@pytest.mark.parametrize("at", range(1, 7))
def test_a_change_that_stops_anywhere_is_put_back(
    vm: Vm,
    root: MemoryRegion,
    block: RamBlock,
    tree: list[MemoryRegion],
    listener: KvmMemoryListener,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    how: str,
) -> None:
    ram = tree[0].target
    assert ram is not None

    def change() -> None:
        with transaction():
            root.del_subregion(tree[0])  # 1: deleted
            tree[1].addr = 0x100 * PAGE  # 2: deleted, 5: made
            ram.set_log(True)  # 3: its flags
            tree[3].enabled = True  # 4: made
            tree[2].readonly = False

    before = vm.memslots
    monkeypatch.setattr(vm_module, "lib", _Refusing(at, how))
    if at <= 5:
        with pytest.raises(KvmError if how == "refused" else KeyboardInterrupt) as error:
            change()
        if how == "refused":
            assert error.value.errno == errno.ENOMEM  # type: ignore[attr-defined]
        assert not hasattr(error.value, "__notes__")
        assert vm.memslots == before
        assert listener.memslots == tuple(before.values())
        places = [occupied(vm, page, block.host) for page in (0, 0x10, 0x20, 0x30, 0x100)]
        assert places == [True, True, True, False, False]
        monkeypatch.undo()
        for slot in before:
            with pytest.raises(KvmError):
                vm.get_dirty_log(slot)  # it is not logged: its flags are what they were
    change()
    assert shown(vm) == [(2, 0x20, 2, LOG), (0, 0x30, 2, LOG), (1, 0x100, 2, LOG)]
    vm.close()
    block.close()  # no pin is left


def test_a_change_interrupted_while_it_is_told_is_forgotten(
    vm: Vm,
    root: MemoryRegion,
    space: AddressSpace,
    tree: list[MemoryRegion],
    listener: KvmMemoryListener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touch, before = KvmMemoryListener._touch, vm.memslots

    def interrupted(self: KvmMemoryListener, *args: Any) -> None:
        touch(self, *args)
        raise KeyboardInterrupt

    for change in (lambda: root.del_subregion(tree[0]), lambda: setattr(tree[3], "enabled", True)):
        monkeypatch.setattr(KvmMemoryListener, "_touch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            change()
        monkeypatch.undo()
        assert vm.memslots == before
    tree[2].enabled = False
    assert shown(vm) == [(0, 0, 2, 0), (1, 0x10, 2, 0)]
    space.remove_listener(listener)
    assert vm.memslots == {}


def test_a_change_interrupted_when_all_was_made_is_put_back(
    vm: Vm,
    root: MemoryRegion,
    space: AddressSpace,
    block: RamBlock,
    tree: list[MemoryRegion],
    listener: KvmMemoryListener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unpin, before = slotchange_module._unpin, shown(vm)

    def interrupted(*args: Any) -> None:
        unpin(*args)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(slotchange_module, "_unpin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        root.del_subregion(tree[0])
    assert tree[0] in root.subregions
    assert shown(vm) == before
    assert set(listener.memslots) == set(vm.memslots.values())
    space.remove_listener(listener)
    assert vm.memslots == {}
    block.close()  # no pin is left


def test_more_slots_than_the_kernel_has(
    vm: Vm, tree: list[MemoryRegion], block: RamBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vm, "_extension", lambda _self, _cap: 3)
    monkeypatch.setattr(slotchange_module, "_LEAST_SLOTS", 3)
    before = vm.memslots
    with pytest.raises(ArgumentError, match="up to 3 slots in an address space") as error:
        tree[3].enabled = True
    assert error.value.field == "add"
    assert vm.memslots == before
    assert not tree[3].enabled
    with transaction():  # one goes, one comes
        tree[0].enabled = False
        tree[3].enabled = True
    assert shown(vm) == [(1, 0x10, 2, 0), (2, 0x20, 2, 0), (0, 0x30, 2, 0)]


def test_a_closed_block_is_refused(vm: Vm, root: MemoryRegion, tree: list[MemoryRegion]) -> None:
    with RamBlock("gone", PAGE) as gone:
        region = MemoryRegion.ram("gone", gone)
    before = vm.memslots
    with pytest.raises(ClosedError):
        root.add_subregion(0x200 * PAGE, region)
    assert vm.memslots == before
    assert region not in root.subregions


def test_a_block_in_a_slot_cannot_be_closed(
    vm: Vm, root: MemoryRegion, block: RamBlock, tree: list[MemoryRegion]
) -> None:
    with pytest.raises(BusyError, match="memslot 0 of"):
        block.close()
    root.enabled = False
    assert vm.memslots == {}
    block.close()
    assert block.closed


def test_a_slot_that_was_deleted_by_hand_is_made_again_with_its_section(
    vm: Vm, root: MemoryRegion, tree: list[MemoryRegion], listener: KvmMemoryListener
) -> None:
    vm.delete_memory_region(1)
    tree[3].enabled = True  # which takes its id
    assert shown(vm) == [(0, 0, 2, 0), (2, 0x20, 2, 0), (1, 0x30, 2, 0)]
    tree[1].enabled = False
    assert shown(vm) == [(0, 0, 2, 0), (2, 0x20, 2, 0), (1, 0x30, 2, 0)]
    tree[1].enabled = True
    assert shown(vm) == [(0, 0, 2, 0), (3, 0x10, 2, 0), (2, 0x20, 2, 0), (1, 0x30, 2, 0)]
    assert len(listener.memslots) == 4


def test_a_closed_vm_is_no_longer_followed(
    vm: Vm, space: AddressSpace, tree: list[MemoryRegion], listener: KvmMemoryListener
) -> None:
    vm.close()
    tree[3].enabled = True
    assert listener.memslots == ()
    space.remove_listener(listener)


def test_leaving_deletes_what_was_made(
    vm: Vm, space: AddressSpace, block: RamBlock, tree: list[MemoryRegion], listener: KvmMemoryListener
) -> None:
    by_hand = vm.set_user_memory_region(5, 0x500 * PAGE, block.mapping, size=PAGE)
    space.remove_listener(listener)
    assert vm.memslots == {5: by_hand}
    assert listener.memslots == ()
    tree[3].enabled = True
    assert vm.memslots == {5: by_hand}
    space.add_listener(listener)
    assert len(listener.memslots) == 4


def test_what_cannot_be_a_listener_s(vm: Vm) -> None:
    spaces = max(vm.check_extension(lib.KVM_CAP_MULTI_ADDRESS_SPACE), 1)
    for bad in (spaces, -1):
        with pytest.raises(ArgumentError, match="address_space_id"):
            KvmMemoryListener(vm, bad)
    for bad_type in (True, "0", None):
        with pytest.raises(ArgumentTypeError):
            KvmMemoryListener(vm, bad_type)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="vm"):
        KvmMemoryListener(object())  # type: ignore[arg-type]


# ---- QEMU's own slots ----

# Values written to the first PAM register of the i440FX, configuration byte 0x59: 0xF0000 to 0xFFFFF is RAM for reads
# (bit 4) and writes (bit 5).
_PAM = (0x10, 0x30, 0x20, 0x00, 0x30)


@pytest.fixture(scope="module")
def qemu_slots(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """KVM_SET_USER_MEMORY_REGION as QEMU calls it: from its start on, then for each value of _PAM."""
    need("kvm", "qemu", "strace")
    log = tmp_path_factory.mktemp("qemu") / "log"
    qemu = ["qemu-system-x86_64", "-accel", "kvm", "-machine", "pc,smm=off", "-m", "64M", "-nodefaults", "-vga", "none"]
    command = [
        "strace",
        "-f",
        "-e",
        "trace=ioctl",
        "-o",
        str(log),
        *qemu,
        "-display",
        "none",
        "-S",
        "-monitor",
        "stdio",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:

            def tell(line: str) -> None:
                # The prompt comes back when it is done.
                if line:
                    process.stdin.write(line.encode() + b"\n")  # type: ignore[union-attr]
                    process.stdin.flush()  # type: ignore[union-attr]
                seen = b""
                while not seen.endswith(b"(qemu) "):
                    more = process.stdout.read1(4096)  # type: ignore[union-attr]
                    if not more:
                        pytest.skip(f"QEMU does not run with KVM here: {seen.decode(errors='replace')}")
                    seen += more

            tell("")
            tell("info pic")  # its KVM_GET_IRQCHIP marks the end of a phase
            tell("o/4 0xcf8 0x80000058")
            for value in _PAM:
                tell(f"o/1 0xcfd {value:#x}")
                tell("info pic")
            process.stdin.write(b"quit\n")
            process.stdin.flush()
            process.wait(20)
        finally:
            process.kill()
    lines = log.read_text().splitlines()
    marks = [at for at, line in enumerate(lines) if "KVM_GET_IRQCHIP" in line]
    each, rest = divmod(len(marks), len(_PAM) + 1)
    assert each
    assert not rest
    starts = [0, *marks[each - 1 :: each]]
    phases = ["\n".join(lines[start:end]) for start, end in pairwise(starts)]
    return [re.findall(r"KVM_SET_USER_MEMORY_REGION, \{(.*?)\}\) = 0", phase) for phase in phases]


def _as_qemu(line: str, blocks: dict[str, int]) -> tuple[int, int, int, int, int]:
    # (id, flags, gpa, size, offset of the address from the slot's own block, or 0 where it is deleted)
    fields = dict(field.split("=") for field in line.split(", "))
    flags = {"0": 0, "KVM_MEM_READONLY": READONLY, "KVM_MEM_LOG_DIRTY_PAGES": LOG}[fields["flags"]]
    size, gpa, hva = (int(fields[name], 0) for name in ("memory_size", "guest_phys_addr", "userspace_addr"))
    if not size:
        return int(fields["slot"]), 0, 0, 0, 0
    base = next(at for at in sorted(blocks.values(), reverse=True) if at <= hva)
    return int(fields["slot"]), flags, gpa, size, hva - base


def test_the_slots_are_qemu_s(qemu_slots: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    # The board's tree, as `info mtree` shows it: RAM, ROM over it, PAM aliases over both.  QEMU's blocks are told apart
    # by what its slots say: the first slot of each of them begins it.
    theirs, last = [], {}
    for line in qemu_slots[0]:
        fields = dict(field.split("=") for field in line.split(", "))
        last[int(fields["slot"])] = line
    by_gpa = {}
    for line in last.values():
        fields = dict(field.split("=") for field in line.split(", "))
        if fields["memory_size"] != "0":
            by_gpa[int(fields["guest_phys_addr"], 0)] = int(fields["userspace_addr"], 0)
    bases = {"ram": by_gpa[0], "rom": by_gpa[0xC0000], "bios": by_gpa[0xFFFC0000]}
    theirs = [[_as_qemu(line, bases) for line in lines] for lines in qemu_slots]
    start = {slot: row for slot, *row in theirs[0]}

    issued: list[tuple[int, int, int, int, int]] = []
    with ExitStack() as stack:
        ram, rom, bios = (
            stack.enter_context(RamBlock(name, size))
            for name, size in (("pc.ram", "64M"), ("pc.rom", "128K"), ("pc.bios", "256K"))
        )
        vm = stack.enter_context(stack.enter_context(Kvm()).create_vm())
        ours = {"ram": int(ram.host), "rom": int(rom.host), "bios": int(bios.host)}

        class Watching:
            def __getattr__(self, name: str) -> Any:
                return self.set if name == "kvm_set_user_memory_region" else getattr(lib, name)

            def set(self, fd: int, region: Any) -> int:
                row = 0, 0, 0, 0
                if region.memory_size:
                    base = next(at for at in sorted(ours.values(), reverse=True) if at <= region.userspace_addr)
                    row = region.flags, region.guest_phys_addr, region.memory_size, region.userspace_addr - base
                issued.append((region.slot, *row))
                return int(lib.kvm_set_user_memory_region(fd, region))

        monkeypatch.setattr(vm_module, "lib", Watching())
        system = MemoryRegion.container("system", EVERYTHING)
        pci = MemoryRegion.container("pci", EVERYTHING)
        pc_ram = MemoryRegion.ram("pc.ram", ram)
        pc_bios = MemoryRegion.rom("pc.bios", bios)
        isa_bios = MemoryRegion.alias("isa-bios", pc_bios, 0x20000, 0x20000)
        isa_bios.readonly = True
        space = stack.enter_context(AddressSpace(system, "memory"))
        space.add_listener(KvmMemoryListener(vm))
        # In the order in which the board of QEMU is put together, a transaction each.
        system.add_subregion(0, MemoryRegion.alias("ram-below-4g", pc_ram, 0, 64 << 20))
        system.add_subregion(0, pci, priority=-1)
        with transaction():
            pci.add_subregion(0xE0000, isa_bios, priority=1)
            pci.add_subregion(0xFFFC0000, pc_bios)
        pams: list[dict[int, MemoryRegion]] = []
        with transaction():
            pci.add_subregion(0xC0000, MemoryRegion.rom("pc.rom", rom), priority=1)
            starts = [0xF0000, *range(0xC0000, 0xF0000, 0x4000)]
            for at in starts:
                size = 0x10000 if at == 0xF0000 else 0x4000
                modes = {
                    0: MemoryRegion.alias("pam-pci", pci, at, size),
                    1: MemoryRegion.alias("pam-rom", pc_ram, at, size),
                    2: MemoryRegion.alias("pam-pci", pc_ram, at, size),  # so it is in QEMU
                    3: MemoryRegion.alias("pam-ram", pc_ram, at, size),
                }
                modes[1].readonly = True
                for mode, region in modes.items():
                    region.enabled = mode == 0
                    system.add_subregion(at, region, priority=1)
                pams.append(modes)
        assert {slot: [s.flags, s.gpa, s.size] for slot, s in vm.memslots.items()} == {
            slot: row[:3] for slot, row in start.items() if row[2]
        }
        for value, calls in zip(_PAM, theirs[1:], strict=True):
            issued.clear()
            with transaction():
                for mode, region in pams[0].items():
                    region.enabled = mode == value >> 4
            assert issued == calls, hex(value)


# ---- many ----


@pytest.mark.parametrize("count", [cases(2000, 32764)])
def test_as_many_slots_as_the_kernel_has(
    vm: Vm, root: MemoryRegion, block: RamBlock, listener: KvmMemoryListener, count: int
) -> None:
    if count == 32764:
        count = vm.check_extension(lib.KVM_CAP_NR_MEMSLOTS)
    ram = MemoryRegion.ram("ram", block)
    views = [MemoryRegion.alias("view", ram, 0, PAGE) for _ in range(count)]
    with transaction():
        for at, view in enumerate(views):
            root.add_subregion(at * 2 * PAGE, view)
    assert len(vm.memslots) == count == len(listener.memslots)
    if count > 30000:
        with pytest.raises(ArgumentError, match="slots in an address space"):
            root.add_subregion(1 << 40, MemoryRegion.alias("one more", ram, 0, PAGE))
    views[7].enabled = False
    assert vm.memslot(7) is None
    assert len(vm.memslots) == count - 1
    vm.close()  # a deletion by itself costs a grace period
