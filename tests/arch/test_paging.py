"""Page tables: their bytes by the manual, what QEMU's CPU and KVM read from them, and what is refused.

Expected: Intel SDM vol. 3 chapter 5; a dictionary of pages; QEMU's `info tlb` and `gva2gpa`; KVM_TRANSLATE.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hvmodel as hv
from hvmodel.arch.paging import PAGING_MODES, Leaf, PageTables
from hvmodel.errors import ArgumentError, ArgumentTypeError
from tests.arch.qemu_cpu import FIRMWARE, RAM_SIZE, QemuCpu, qemu_cpu, set_registers
from tests.cases import cases
from tests.need import need

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
ROOT = 0x100000
BITS = {"32bit": 32, "pae": 32, "4level": 48, "5level": 57}
LARGE = {"32bit": 4 * MiB, "pae": 2 * MiB, "4level": 2 * MiB, "5level": 2 * MiB}
HIGH = 0xFFFF_8000_0000_0000

# CR4.PSE 4, PAE 5, LA57 12; EFER.LME 8, NXE 11; CR0.PE 0, ET 4, WP 16, PG 31
REGISTERS = {
    "32bit": {"cr4": 0x10},
    "pae": {"cr4": 0x20, "efer": 0x800},
    "4level": {"cr4": 0x20, "efer": 0x900},
    "5level": {"cr4": 0x1020, "efer": 0x900},
}
CR0 = 0x80010011


def qwords(data: bytes) -> dict[int, int]:
    """The entries of 8 bytes that are not 0, by index."""
    return {at: entry for at, entry in enumerate(struct.unpack(f"<{len(data) // 8}Q", data)) if entry}


def dwords(data: bytes) -> dict[int, int]:
    return {at: entry for at, entry in enumerate(struct.unpack(f"<{len(data) // 4}I", data)) if entry}


# ---- the bytes ----


def test_four_levels_of_a_small_page() -> None:
    tables = PageTables(0x10000)
    # 0x8080604000 is index 1, 2, 3, 4 of PML4, PDPT, PD and PT: 1<<39 | 2<<30 | 3<<21 | 4<<12
    tables.map(1 << 39 | 2 << 30 | 3 << 21 | 4 << 12, 0xABC000, 0x1000)
    pages = tables.pages()
    assert list(pages) == [0x10000, 0x11000, 0x12000, 0x13000]
    assert [qwords(page) for page in pages.values()] == [
        {1: 0x11000 | 7},  # P, R/W, U/S: the last entry alone decides
        {2: 0x12000 | 7},
        {3: 0x13000 | 7},
        {4: 0xABC000 | 3},  # P, R/W
    ]
    assert tables.image() == b"".join(pages.values())
    assert (tables.cr3, tables.size, tables.mode) == (0x10000, 0x4000, "4level")


def test_each_flag_is_its_bit() -> None:
    for flags, bits in (
        ({}, 0x3),
        ({"writable": False}, 0x1),
        ({"user": True}, 0x7),
        ({"nx": True}, 0x3 | 1 << 63),
        ({"global_": True}, 0x3 | 1 << 8),
        ({"pwt": True}, 0x3 | 1 << 3),
        ({"pcd": True}, 0x3 | 1 << 4),
        ({"pat": True}, 0x3 | 1 << 7),
    ):
        tables = PageTables(0)
        tables.map(0, 0x5000, 0x1000, **flags)
        assert qwords(tables.pages()[0x3000]) == {0: 0x5000 | bits}, flags
        # A larger page: PS in bit 7, PAT in bit 12.
        tables = PageTables(0)
        tables.map(0, 0x400000, 0x200000, **flags)
        large = bits | 1 << 7 if "pat" not in flags else 0x3 | 1 << 7 | 1 << 12
        assert qwords(tables.pages()[0x2000]) == {0: 0x400000 | large}, flags


def test_sizes_of_pages_by_level() -> None:
    tables = PageTables(0, "5level")
    tables.map(0, GiB, GiB, page_size=GiB)
    tables.map(GiB, 0, 4 * MiB)
    assert [qwords(page) for page in tables.pages().values()] == [
        {0: 0x1007},
        {0: 0x2007},
        {0: GiB | 0x83, 1: 0x3007},
        {0: 0x83, 1: 2 * MiB | 0x83},
    ]


def test_pae_has_four_entries_at_the_top_with_reserved_bits() -> None:
    tables = PageTables(0x2000, "pae", accessed=True, dirty=True)
    tables.map(0xC0000000, 0x1_0000_0000, 2 * MiB)  # above 4 GiB
    tables.map(0x1000, 0x7000, 0x1000, nx=True, writable=False)
    assert [qwords(page) for page in tables.pages().values()] == [
        {0: 0x4001, 3: 0x3001},  # P alone: R/W, U/S, A are reserved here
        {0: 0x1_0000_0000 | 0xE3},  # P, R/W, A, D, PS
        {0: 0x5000 | 0x27},
        {1: 0x7000 | 0x21 | 1 << 63},  # not writable: A without D
    ]


def test_32_bit_paging_and_its_addresses_of_40_bits() -> None:
    tables = PageTables(0, "32bit")
    tables.map(0x400000, 0x12_3440_0000, 4 * MiB)
    tables.map(0x3000, 0xFFFFF000, 0x1000, user=True)
    # PSE-36: address bits 39:32 in bits 20:13
    assert dwords(tables.pages()[0]) == {0: 0x1007, 1: 0x34400000 | 0x12 << 13 | 0x83}
    assert dwords(tables.pages()[0x1000]) == {3: 0xFFFFF007}
    assert tables.translate(0x412345) == 0x12_3441_2345


def test_pages_are_as_large_as_fits() -> None:
    for mode in PAGING_MODES:
        large, tables = LARGE[mode], PageTables(0, mode)
        tables.map(large - 0x2000, 3 * large - 0x2000, 2 * large + 0x3000)
        sizes = [leaf.size for leaf in tables.leaves()]
        assert sizes == [0x1000] * 2 + [large] * 2 + [0x1000], mode
        assert tables.uses_large_pages
        # The two addresses are not alike modulo the large page: small ones all over.
        tables = PageTables(0, mode)
        tables.map(large, 0x1000, large)
        assert {leaf.size for leaf in tables.leaves()} == {0x1000}
        assert not tables.uses_large_pages
        # No page that is larger than the range.
        tables = PageTables(0, mode)
        tables.map(0, 0, large - 0x1000)
        assert {leaf.size for leaf in tables.leaves()} == {0x1000}


def test_what_was_mapped() -> None:
    tables = PageTables(0)
    tables.map(HIGH, 0x5000, 0x2000, nx=True)
    tables.map(0x7000, 0x9000, 0x1000, user=True, writable=False)
    assert tables.ranges() == [(0x7000, 0x9000, 0x1000), (HIGH, 0x5000, 0x2000)]
    assert list(tables.leaves()) == [
        Leaf(0x7000, 0x9000, 0x1000, 0x9005),
        Leaf(HIGH, 0x5000, 0x1000, 0x5003 | 1 << 63),
        Leaf(HIGH + 0x1000, 0x6000, 0x1000, 0x6003 | 1 << 63),
    ]
    low, high = tables.find(0x7FFF), tables.find(HIGH)
    assert low is not None
    assert high is not None
    assert (low.user, low.writable, low.nx) == (True, False, False)
    assert (high.user, high.writable, high.nx) == (False, True, True)
    assert (tables.find(0x6FFF), tables.find(0x8000), tables.translate(HIGH + 0x2000)) == (None, None, None)
    assert (tables.uses_nx, PageTables(0).uses_nx) == (True, False)
    assert repr(tables) == "<PageTables 4level at 0x0, 7 tables>"


def test_the_last_addresses() -> None:
    tables = PageTables(0)
    tables.map(2**64 - 0x1000, 2**52 - 0x1000, 0x1000)
    tables.map(2**47 - 0x1000, 0x1000, 0x1000)
    assert tables.translate(2**64 - 1) == 2**52 - 1
    assert tables.translate(2**47 - 1) == 0x1FFF
    assert tables.ranges()[-1] == (2**64 - 0x1000, 2**52 - 0x1000, 0x1000)
    tables.map(2**46 - 0x1000, 0x10000, 0x2000)  # a quarter is no end
    assert tables.translate(2**46) == 0x11000
    for mode in ("32bit", "pae"):
        middle = PageTables(0, mode)
        middle.map(2**31 - 0x1000, 0, 0x2000)  # 32 bits are no halves
        assert middle.translate(2**31) == 0x1000
        narrow = PageTables(0, mode)
        narrow.map(2**32 - 0x1000, 2**32 - 0x1000, 0x1000)
        assert narrow.translate(2**32 - 1) == 2**32 - 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("mode", "gva", "gpa", "size", "options", "field", "says"),
    [
        ("4level", 1, 0, 0x1000, {}, "gva", "a multiple of 0x1000"),
        ("4level", 0, 1, 0x1000, {}, "gpa", "a multiple of 0x1000"),
        ("4level", 0, 0, 0x1001, {}, "size", "a multiple of 0x1000"),
        ("4level", 0, 0, 0, {}, "size", "at least one page"),
        ("4level", 0, 0, -0x1000, {}, "size", "a multiple of 0x1000"),
        ("4level", 0, 0, 1 << 65, {}, "size", "a multiple of 0x1000, up to 0x10000000000000000"),
        ("4level", 0, -0x1000, 0x1000, {}, "gpa", "up to 0xffffffffff000"),
        ("4level", -0x1000, 0, 0x1000, {}, "gva", "0 to 2**64-1"),
        ("4level", 1 << 64, 0, 0x1000, {}, "gva", "0 to 2**64-1"),
        ("4level", 1 << 47, 0, 0x1000, {}, "gva", "a canonical address: 0 to 0x7fffffffffff"),
        ("4level", HIGH - 0x1000, 0, 0x1000, {}, "gva", "or 0xffff800000000000 to 0xffffffffffffffff"),
        ("5level", 1 << 56, 0, 0x1000, {}, "gva", "0 to 0xffffffffffffff, or 0xff00000000000000"),
        ("4level", (1 << 47) - 0x1000, 0, 0x2000, {}, "size", "up to 0x1000"),
        ("4level", (1 << 64) - 0x1000, 0, 0x2000, {}, "size", "up to 0x1000"),
        ("pae", 1 << 32, 0, 0x1000, {}, "gva", "0 to 0xffffffff"),
        ("32bit", 0xFFFFF000, 0, 0x2000, {}, "size", "up to 0x1000"),
        ("4level", 0, (1 << 52) - 0x1000, 0x2000, {}, "size", "physical addresses have 52 bits"),
        ("4level", 0, 1 << 52, 0x1000, {}, "gpa", "up to"),
        ("32bit", 0, 1 << 40, 4 * MiB, {}, "gpa", "up to"),
        ("32bit", 0, 1 << 32, 0x1000, {}, "gpa", "below 4 GiB"),
        ("32bit", 0, (1 << 32) - 0x1000, 0x2000, {}, "gpa", "below 4 GiB"),
        ("32bit", 0, 0, 0x1000, {"nx": True}, "nx", "entries of 4 bytes have no NX"),
        ("4level", 0, 0, 0x1000, {"page_size": 0x2000}, "page_size", "0x1000, 0x200000, 0x40000000, or None"),
        ("pae", 0, 0, GiB, {"page_size": GiB}, "page_size", "0x1000, 0x200000, or None"),
        ("32bit", 0, 0, 2 * MiB, {"page_size": 2 * MiB}, "page_size", "0x1000, 0x400000, or None"),
        ("4level", 0x1000, 0, 2 * MiB, {"page_size": 2 * MiB}, "gva", "a multiple of 0x200000"),
        ("4level", 0, 0x1000, 2 * MiB, {"page_size": 2 * MiB}, "gpa", "a multiple of 0x200000"),
        ("4level", 0, 0, 0x1000, {"page_size": 2 * MiB}, "size", "a multiple of 0x200000"),
        ("4level", 1 << 41, 0, 1 << 40, {"page_size": 0x1000}, "size", "see max_size"),
        ("4level", 1 << 46, 0, 1 << 45, {}, "size", "see max_size"),
        ("4level", 0x10000, 0, 0x1000, {}, "gva", "[0x10000, 0x12000) is mapped to 0x40000"),
        ("4level", 0x11000, 0, 0x1000, {}, "gva", "is mapped"),
        ("4level", 0xF000, 0, 0x2000, {}, "gva", "is mapped"),
        ("4level", 0x0, 0, GiB, {"page_size": GiB}, "gva", "is mapped"),
        ("4level", HIGH, 0, 0x1000, {}, "gva", "[0xffff800000000000, 0xffff800000001000) is mapped"),
    ],
)
def test_what_cannot_be_mapped(
    mode: Any, gva: int, gpa: int, size: int, options: dict[str, Any], field: str, says: str
) -> None:
    tables = PageTables(ROOT, mode)
    tables.map(0x10000, 0x40000, 0x2000)
    if BITS[mode] > 32:
        tables.map(HIGH, 0x40000, 0x1000)
    before = tables.image(), tables.ranges()
    with pytest.raises(ArgumentError) as error:
        tables.map(gva, gpa, size, **options)
    assert (error.value.call, error.value.field) == ("PageTables.map", field)
    assert says in str(error.value)
    assert (tables.image(), tables.ranges()) == before


@pytest.mark.parametrize(
    ("arguments", "options", "field"),
    [
        (("0", 0, 0x1000), {}, "gva"),
        ((0, 0.5, 0x1000), {}, "gpa"),
        ((0, 0, None), {}, "size"),
        ((True, 0, 0x1000), {}, "gva"),
        ((0, 0, 0x1000), {"page_size": "4K"}, "page_size"),
    ],
)
def test_types_of_map(arguments: Any, options: Any, field: str) -> None:
    with pytest.raises(ArgumentTypeError) as error:
        PageTables(0).map(*arguments, **options)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("root", "mode", "options", "field"),
    [
        (1, "4level", {}, "root_gpa"),
        (-0x1000, "4level", {}, "root_gpa"),
        (1 << 52, "4level", {}, "root_gpa"),
        (1 << 46, "4level", {"maxphyaddr": 46}, "root_gpa"),
        (1 << 32, "pae", {}, "root_gpa"),
        (1 << 32, "32bit", {}, "root_gpa"),
        (0, "3level", {}, "mode"),
        (0, "4level", {"maxphyaddr": 31}, "maxphyaddr"),
        (0, "4level", {"maxphyaddr": 53}, "maxphyaddr"),
        (0, "4level", {"max_size": 0}, "max_size"),
        (0, "4level", {"max_size": 0x1800}, "max_size"),
    ],
)
def test_roots_and_modes_that_are_none(root: int, mode: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError) as error:
        PageTables(root, mode, **options)
    assert (error.value.call, error.value.field) == ("PageTables", field)


def test_types_of_the_constructor() -> None:
    for arguments, options in ((("0",), {}), ((0, 4), {}), ((0,), {"maxphyaddr": "52"}), ((0,), {"max_size": None})):
        with pytest.raises(ArgumentTypeError):
            PageTables(*arguments, **options)
    for gva in (1 << 47, -1, 1 << 64):
        with pytest.raises(ArgumentError):
            PageTables(0).find(gva)


def test_max_size_is_what_the_tables_take() -> None:
    tables = PageTables(0, max_size=0x4000)
    tables.map(0, 0, 0x1000)  # root, PDPT, PD, PT
    assert tables.size == 0x4000
    tables.map(0x1000, 0x1000, 0x1FF000, page_size=0x1000)  # in the same PT
    with pytest.raises(ArgumentError, match="max_size"):
        tables.map(0x200000, 0, 0x1000)
    # The tables end where the addresses that an entry of 4 bytes holds do.
    tables = PageTables((1 << 32) - 0x2000, "32bit")
    tables.map(0, 0, 0x1000)
    with pytest.raises(ArgumentError, match="2 tables"):
        tables.map(4 * MiB, 0, 0x1000)
    assert PageTables(0, max_size=0x1000, mode="32bit").size == 0x1000


# ---- against a dictionary of pages ----

Range = tuple[int, int, int, dict[str, Any]]


@st.composite
def ranges(draw: Callable[..., Any], mode: str, gpas: int) -> list[Range]:
    """Ranges to be mapped, which may overlap: near the ends of the halves and of large pages."""
    large, bits = LARGE[mode], BITS[mode]
    half = 1 << (bits if bits == 32 else bits - 1)
    anchors = [0, 1 << 30, large, half - 4 * large] + ([1 << 39] if bits > 32 else [3 << 30])
    found = []
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.sampled_from(anchors)) + draw(st.sampled_from([0, large]))
        pages = draw(st.integers(0, 600)) * 0x1000 if draw(st.booleans()) else 0
        gva = at + pages
        gpa = draw(st.integers(0, gpas // large - 8)) * large + draw(st.sampled_from([pages, pages, 0, 0x1000]))
        size = draw(st.one_of(st.integers(1, 8), st.integers(1, 1100))) * 0x1000
        if bits > 32 and draw(st.booleans()):
            gva |= (1 << 64) - half
        options = {name: draw(st.booleans()) for name in ("writable", "user", "global_", "pwt", "pcd")}
        if mode != "32bit":
            options["nx"] = draw(st.booleans())
        page_size = draw(st.sampled_from([None, None, 0x1000, large]))
        if page_size == large:
            gva, gpa, size = gva & -large, gpa & -large, 2 * large
        options["page_size"] = page_size
        found.append((gva, gpa, size, options))
    return found


def build(tables: PageTables, wanted: list[Range], known: dict[int, tuple[int, dict[str, Any]]]) -> None:
    """Maps what can be; `known` gets every 4 KiB page of it.  What cannot overlaps, or wraps."""
    end = {32: 1 << 32}.get(BITS[tables.mode], 1 << 64)
    for gva, gpa, size, options in wanted:
        pages = range(gva, gva + size, 0x1000)
        half = 1 << BITS[tables.mode] - 1
        wraps = gva + size > end or (end > 1 << 32 and gva < half < gva + size)
        if wraps or any(page in known for page in pages):
            with pytest.raises(ArgumentError):
                tables.map(gva, gpa, size, **options)
        else:
            tables.map(gva, gpa, size, **options)
            known.update((page, (gpa + page - gva, options)) for page in pages)


@pytest.mark.parametrize("mode", PAGING_MODES)
@settings(max_examples=cases(15, 300), deadline=None)
@given(data=st.data())
def test_every_page_leads_where_it_was_mapped_to(mode: Any, data: st.DataObject) -> None:
    tables = PageTables(ROOT, mode)
    known: dict[int, tuple[int, dict[str, Any]]] = {}
    build(tables, data.draw(ranges(mode, 1 << 32)), known)
    for page, (gpa, options) in known.items():
        leaf = tables.find(page)
        assert leaf is not None
        assert tables.translate(page + 0x123) == gpa + 0x123
        assert (leaf.writable, leaf.user, leaf.nx) == (
            options["writable"],
            options["user"],
            options.get("nx", False),
        )
    for page in known:
        for near in (page - 0x1000, page + 0x1000):
            if near not in known and 0 <= near < 1 << min(BITS[mode], 47):
                assert tables.translate(near) is None
    assert sum(leaf.size for leaf in tables.leaves()) == 0x1000 * len(known)


# ---- against QEMU's CPU ----


@pytest.fixture(scope="module")
def qemus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], QemuCpu]]:
    """By mode: QEMU, which runs with tables at ROOT that map the firmware."""
    need("qemu")
    running: dict[str, QemuCpu] = {}
    with ExitStack() as stack:

        def get(mode: Any) -> QemuCpu:
            if mode not in running:
                tables = PageTables(ROOT, mode)
                tables.map(FIRMWARE, FIRMWARE, 0x10000)
                code = set_registers(cr0=CR0, cr3=ROOT, **REGISTERS[mode])
                directory = tmp_path_factory.mktemp(mode)
                running[mode] = stack.enter_context(qemu_cpu(directory, code, {ROOT: tables.image()}))
            return running[mode]

        yield get


@pytest.mark.parametrize("mode", PAGING_MODES)
def test_a_cpu_runs_with_the_tables(qemus: Any, mode: str) -> None:
    # It has halted, at an address that they map: it would have shut down otherwise.
    state = qemus(mode).registers()
    efer = REGISTERS[mode].get("efer", 0)
    efer |= (efer & 0x100) << 2  # LMA
    assert f"CR0={CR0:08x}" in state
    assert f"EFER={efer:016x}" in state
    assert "HLT=1" in state


@pytest.mark.parametrize("mode", PAGING_MODES)
@settings(max_examples=cases(15, 200), deadline=None)
@given(data=st.data())
def test_qemu_reads_the_same_pages(qemus: Any, mode: Any, data: st.DataObject) -> None:
    cpu: QemuCpu = qemus(mode)
    accessed, dirty = data.draw(st.booleans()), data.draw(st.booleans())
    tables = PageTables(ROOT, mode, accessed=accessed, dirty=dirty)
    known: dict[int, tuple[int, dict[str, Any]]] = {}
    build(tables, data.draw(ranges(mode, 1 << 32)), known)
    image = tables.image()
    assert ROOT + len(image) <= RAM_SIZE
    cpu.write(ROOT, image)
    expected: dict[int, tuple[int, str]] = {}
    for gva, (gpa, options) in known.items():
        page = options["page_size"]
        leaf = tables.find(gva)
        assert leaf is not None
        if leaf.gva != gva:
            continue
        large = leaf.size != 0x1000
        assert page is None or page == leaf.size
        bits = [options.get("nx"), options["global_"], large, dirty and options["writable"], accessed]
        bits += [options["pcd"], options["pwt"], options["user"], options["writable"]]
        expected[gva] = gpa, "".join(c if bit else "-" for c, bit in zip("XGPDACTUW", bits, strict=True))
    assert cpu.leaves() == expected
    pages = sorted(known)
    for gva in {pages[0], pages[-1], *pages[:: max(1, len(pages) // 8)]} if pages else ():
        assert cpu.translate(gva + 0x234) == known[gva][0] + 0x234
        if gva - 0x1000 not in known and gva & 0xFFFFFFFF:
            assert cpu.translate(gva - 1) is None


def test_qemu_reads_pages_of_1_gib_and_36_bit_addresses(qemus: Any) -> None:
    for mode in ("4level", "5level"):
        tables = PageTables(ROOT, mode)
        tables.map(7 * GiB, 3 * GiB, 2 * GiB, page_size=GiB)
        cpu = qemus(mode)
        cpu.write(ROOT, tables.image())
        assert cpu.translate(8 * GiB + 0x12345) == 4 * GiB + 0x12345
        assert cpu.translate(9 * GiB) is None
    tables = PageTables(ROOT, "32bit")
    tables.map(0xC0000000, 0xAB_4040_0000, 4 * MiB)
    cpu = qemus("32bit")
    cpu.write(ROOT, tables.image())
    assert cpu.translate(0xC0012345) == 0xAB_4041_2345


@pytest.mark.parametrize("mode", PAGING_MODES)
@pytest.mark.parametrize(("accessed", "dirty"), [(False, True), (True, False), (True, True)])
def test_no_walk_writes_to_tables_with_all_bits_set(mode: Any, accessed: bool, dirty: bool, tmp_path: Path) -> None:
    need("qemu")
    tables = PageTables(ROOT, mode, accessed=accessed, dirty=dirty)
    tables.map(FIRMWARE, FIRMWARE, 0x10000)
    tables.map(0, 0, 0x1000)
    code = set_registers(cr0=CR0, cr3=ROOT, **REGISTERS[mode]) + b"\x6a\x00"  # push 0: a write
    with qemu_cpu(tmp_path, bytes.fromhex("31c08ed0bc0010") + code, {ROOT: tables.image()}) as cpu:
        found, image = cpu.read(ROOT, tables.size), tables.image()
    # QEMU sets A in the four entries at the top of PAE paging too, where the manual reserves the bit.
    first = 0x1000 if mode == "pae" else 0
    assert (found[first:] != image[first:]) is not (accessed and dirty)


# ---- against KVM ----


def test_kvm_translates_the_same() -> None:
    need("kvm")
    with hv.Machine(ram="16M") as machine:
        kvm = machine.vcpu.kvm
        tables = PageTables(ROOT, accessed=True, dirty=True)
        tables.map(0, 0, 4 * MiB)
        tables.map(HIGH, 0x5000, 0x3000)
        tables.map(1 << 46, 0x600000, 2 * MiB, page_size=0x1000)
        # Where CPUID has no pages of 1 GiB, PS is a reserved bit there.
        has_1g = any(e.function == 0x80000001 and e.edx >> 26 & 1 for e in kvm.get_cpuid2())
        tables.map(5 * GiB, 3 * GiB, GiB, page_size=GiB)
        machine.write(ROOT, tables.image())
        sregs = kvm.sregs
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0, ROOT, 0x20, 0x500
        sregs.cs.l, sregs.cs.db = 1, 0
        kvm.sregs = sregs
        for leaf in tables.leaves():
            for offset in (0, 0x123, leaf.size - 1):
                where = kvm.translate(leaf.gva + offset)
                if leaf.size == GiB and not has_1g:
                    assert not where.valid
                else:
                    assert (where.valid, where.gpa) == (True, leaf.gpa + offset), hex(leaf.gva)
        for gva in (4 * MiB, HIGH + 0x3000, 6 * GiB, 1 << 45):
            assert tables.translate(gva) is None
            assert not kvm.translate(gva).valid
