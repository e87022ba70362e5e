from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError
from hvmodel.ram import RamBlock, RamList, find_ram_offset
from hvmodel.ram.ramlist import OFFSET_ALIGN, RAM_ADDR_MAX
from tests.need import need

K, M = 1 << 10, 1 << 20

# `info ramblock` of QEMU 7.2.22, -accel tcg -m 64M -nodefaults -vga none.
INFO = """\
              Block Name    PSize              Offset               Used              Total
                     mem    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000
                  pc.rom    4 KiB  0x0000000004040000 0x0000000000020000 0x0000000000020000
   /rom@etc/table-loader    4 KiB  0x0000000004280000 0x0000000000001000 0x0000000000010000
      /rom@etc/acpi/rsdp    4 KiB  0x00000000042c0000 0x0000000000001000 0x0000000000001000
"""
# The same blocks as QEMU makes them, one after the other: (name, used_length, max_length).
CREATED = [
    ("mem", 64 * M, 64 * M),
    ("pc.bios", 256 * K, 256 * K),
    ("pc.rom", 128 * K, 128 * K),
    ("/rom@etc/acpi/tables", 128 * K, 2 * M),
    ("/rom@etc/table-loader", 4 * K, 64 * K),
    ("/rom@etc/acpi/rsdp", 4 * K, 4 * K),
]


def blocks(created: list[tuple[str, int, int]]) -> list[RamBlock]:
    return [RamBlock(name, used, max_length=longest if longest != used else None) for name, used, longest in created]


def test_the_text_is_qemus() -> None:
    made = blocks(CREATED)
    try:
        listed = RamList(made)
        assert listed.info_ramblock() == INFO
        assert listed.ram_addr_end == 0x42C0000 + 4 * K
    finally:
        for block in made:
            block.close()
    assert len(listed) == 0


def test_of_a_running_qemu() -> None:
    need("qemu")
    from hvmodel.witness.qemu import Qemu

    with Qemu("-m", "100M", machine="q35") as qemu:
        text = qemu.monitor("info ramblock")
    rows = [line.rsplit(maxsplit=5) for line in text.splitlines()[1:]]
    found = {row[0].strip(): (int(row[3], 16), int(row[4], 16), int(row[5], 16)) for row in rows}
    assert len(found) >= 6
    # It lists them by max_length; it made them by the first free offsets of a list that only grew at the end, but for
    # the tables, which leave a gap behind what was there before.
    created = sorted(found, key=lambda name: found[name][0])
    made = blocks([(name, found[name][1], found[name][2]) for name in created])
    try:
        listed = RamList(made)
        assert {block.idstr: block.offset for block in listed} == {name: row[0] for name, row in found.items()}
        assert listed.info_ramblock() == text
    finally:
        for block in made:
            block.close()


# ---- the search ----


def by_definition(known: list[tuple[int, int]], size: int) -> int | None:
    """Every candidate tried against every block, as the words of QEMU's comment say."""
    if not known:
        return 0
    gaps = []
    for order, (offset, length) in enumerate(known):
        candidate = offset + length
        while candidate % OFFSET_ALIGN:
            candidate += 4096 - candidate % 4096
        following = [other for other, _ in known if other >= candidate]
        end = min(following, default=(1 << 64) - 1)
        if end - candidate >= size and end - candidate < (1 << 64) - 1:
            gaps.append((end - candidate, order, candidate))
    return min(gaps)[2] if gaps else None


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int]]:
    known, end = [], 0
    for _ in range(draw(st.integers(0, 6))):
        start = end + draw(st.sampled_from([0, OFFSET_ALIGN, 2 * OFFSET_ALIGN, 5 * OFFSET_ALIGN]))
        length = 4096 * draw(st.integers(1, 200))
        known.append((start, length))
        end = -(-(start + length) // OFFSET_ALIGN) * OFFSET_ALIGN
    return draw(st.permutations(known))


@settings(deadline=None)
@given(layouts(), st.integers(1, 600).map(lambda n: n * 4096))
def test_the_offset_is_that_of_the_definition(known: list[tuple[int, int]], size: int) -> None:
    offset = find_ram_offset(known, size)
    assert offset == by_definition(known, size)
    assert offset % OFFSET_ALIGN == 0
    assert all(offset + size <= other or other + length <= offset for other, length in known)


def test_a_block_goes_into_the_smallest_gap() -> None:
    # Gaps behind the blocks: 3 units, 1 unit, no end.  A unit is 256 KiB.
    unit = OFFSET_ALIGN
    known = [(0, unit), (4 * unit, unit), (6 * unit, unit)]
    assert find_ram_offset(known, unit) == 5 * unit
    assert find_ram_offset(known, 2 * unit) == unit
    assert find_ram_offset(known, 4 * unit) == 7 * unit


def test_of_gaps_of_one_size_the_first_in_the_list_wins() -> None:
    unit = OFFSET_ALIGN
    known = [(0, unit), (2 * unit, unit), (4 * unit, unit)]
    assert find_ram_offset(known, unit) == unit
    assert find_ram_offset(known[::-1], unit) == 3 * unit


def test_no_room() -> None:
    with pytest.raises(ArgumentError, match="no gap"):
        find_ram_offset([(0, RAM_ADDR_MAX - OFFSET_ALIGN)], 1 << 30)
    for size in (0, -1):
        with pytest.raises(ArgumentError, match="at least 1 byte"):
            find_ram_offset([], size)
    with pytest.raises(ArgumentTypeError):
        find_ram_offset([], "1M")


# ---- the list ----


def test_the_largest_comes_first_and_of_equals_the_older() -> None:
    sizes = [("a", M, M), ("b", 2 * M, 2 * M), ("c", M, M), ("d", 4 * K, 3 * M), ("e", 64 * K, 64 * K)]
    made = blocks(sizes)
    listed = RamList(made)
    assert [block.idstr for block in listed] == ["d", "b", "a", "c", "e"]
    assert [block.max_length for block in listed] == sorted([block.max_length for block in made], reverse=True)
    assert listed.version == 5
    assert repr(listed) == "<RamList of d, b, a, c, e>"
    for one, other in itertools.combinations(made, 2):
        assert one.offset + one.max_length <= other.offset or other.offset + other.max_length <= one.offset
    for block in made:
        block.close()


def test_addresses_and_names_lead_to_blocks() -> None:
    with RamBlock("ram", M) as ram, RamBlock("rom", 4 * K) as rom:
        listed = RamList([ram, rom])
        assert listed.named("rom") is rom
        assert listed.at(M - 1) == (ram, M - 1)
        assert listed.at(M) == (rom, 0)
        for nowhere in (-1, M + 4 * K, RAM_ADDR_MAX, 1 << 70):
            with pytest.raises(ArgumentError, match=r"RamList.at: ram_addr"):
                listed.at(nowhere)
        with pytest.raises(ArgumentError, match="accepted: ram, rom"):
            listed.named("other")


def test_a_block_that_leaves_makes_room() -> None:
    with RamBlock("a", M) as a, RamBlock("b", M) as b, RamBlock("c", M) as c, RamBlock("d", M) as d:
        listed = RamList([a, b, c])
        listed.remove(b)
        assert (b.ram_list, b.offset, listed.blocks, listed.version) == (None, 0, (a, c), 4)
        assert listed.add(d) == M
        a.close()
        assert listed.blocks == (c, d)
        assert listed.add(b) == 3 * M  # what begins at 0 is behind no block
        with pytest.raises(ArgumentError, match=r"RamList.remove"):
            RamList().remove(b)


def test_what_may_not_join() -> None:
    with RamBlock("ram", M) as ram, RamBlock("ram", 2 * M) as same, RamBlock("closed", M) as closed:
        closed.close()
        listed = RamList([ram])
        with pytest.raises(ArgumentError, match="already registered"):
            listed.add(same)
        with pytest.raises(BusyError, match="in a list"):
            RamList().add(ram)
        with pytest.raises(ClosedError):
            listed.add(closed)
        for wrong in (None, "ram", M):
            with pytest.raises(ArgumentTypeError):
                listed.add(wrong)
        assert listed.blocks == (ram,)
        assert listed.version == 1


def test_what_is_no_list_of_blocks() -> None:
    with pytest.raises(ArgumentTypeError, match="blocks"):
        RamList(2.5)  # type: ignore[arg-type]
