"""QEMU's text about memory: read as values, and the flat view that follows from it, rule by rule."""

from __future__ import annotations

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.witness.mtree import (
    FlatLine,
    RamBlockLine,
    TreeLine,
    flat_ranges,
    parse_flat,
    parse_mtree,
    parse_ramblock,
)
from hvmodel.witness.ringbuffer import FormatError

END = (1 << 64) - 1


def line(depth: int, start: int, end: int, text: str) -> str:
    """As QEMU prints it: two spaces per level, 16 digits."""
    return f"{'  ' * depth}{start:016x}-{end:016x} {text}\n"


def tree(name: str, *lines: str, what: str = "address-space") -> str:
    return f"{what}: {name}\n{''.join(lines)}\n"


SYSTEM = line(1, 0, END, "(prio 0, i/o): system")


def view(text: str, name: str = "memory") -> list[tuple[int, int, str, str, int]]:
    return [
        (found.start, found.end, found.kind, found.name, found.offset) for found in flat_ranges(parse_mtree(text), name)
    ]


# ---- values ----


def test_a_tree_of_several_spaces() -> None:
    text = "address-space: cpu-memory-0\n" + tree(
        "memory",
        SYSTEM,
        line(2, 0, 0xFFF, "(prio -1, nv-ram): alias low memory @pc ram 0000000000001000-0000000000001fff"),
        line(2, 0x2000, 0x2FFF, "(prio 1, romd): flash [disabled]"),
    )
    (space,) = parse_mtree(text).spaces
    assert space.names == ("cpu-memory-0", "memory")
    assert space.lines == (
        TreeLine(1, 0, END, 0, "i/o", "system"),
        TreeLine(2, 0, 0xFFF, -1, "ram", "low memory", "pc ram", 0x1000, 0x1FFF, False, True),
        TreeLine(2, 0x2000, 0x2FFF, 1, "romd", "flash", disabled=True),
    )
    assert parse_mtree(text).space("memory") == space


def test_spaces_and_regions_are_kept_apart() -> None:
    text = tree("x", SYSTEM) + tree("y") + tree("x", SYSTEM, what="memory-region")
    found = parse_mtree(text)
    assert [space.names for space in found.spaces] == [("x",), ("y",)]
    assert found.space("y").lines == ()
    assert found.region("x").lines == found.space("x").lines
    with pytest.raises(ArgumentError, match="x, y"):
        found.space("z")


def test_owners_are_left_out() -> None:
    text = tree("m", line(1, 0, 0xFFF, "(prio 0, ram): pc.ram owner:{obj path=/objects/pc.ram}"))
    assert parse_mtree(text).space("m").lines[0].name == "pc.ram"


@pytest.mark.parametrize(
    "text", ["nonsense\n", line(1, 0, 1, "(prio 0, ram): x"), "address-space: m\n  0-1 (prio 0): x\n"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_mtree(text)


def test_flat_views() -> None:
    text = (
        'FlatView #0\n AS "memory", root: system\n AS "cpu 0", root: bus, alias sys\n Root memory region: system\n'
        + line(1, 0, 0xBFFFF, "(prio 0, ram): pc.ram KVM")
        + line(1, 0xE0000, 0xFFFFF, "(prio 0, rom): pc.bios @0000000000020000 KVM")
        + line(1, 0x100000, 0x100FFF, "(prio 0, nv-ram): nv @0000000000001000")
        + '\nFlatView #1\n AS "x", root: y\n Root memory region: (none)\n  No rendered FlatView\n\n'
    )
    first, second = parse_flat(text)
    assert first.spaces == (("memory", "system", None), ("cpu 0", "bus", "sys"))
    assert first.root == "system"
    assert first.ranges == (
        FlatLine(0, 0xBFFFF, 0, "ram", "pc.ram", kvm=True),
        FlatLine(0xE0000, 0xFFFFF, 0, "rom", "pc.bios", 0x20000, kvm=True),
        FlatLine(0x100000, 0x100FFF, 0, "ram", "nv", 0x1000, nonvolatile=True),
    )
    assert (second.spaces, second.root, second.ranges) == ((("x", "y", None),), None, ())
    with pytest.raises(FormatError):
        parse_flat("nonsense\n")


def test_blocks_of_both_forms() -> None:
    # 7.2; and since 8.1, with columns for read-only and the host's address.
    old = (
        "              Block Name    PSize              Offset               Used              Total\n"
        "    /rom@etc/acpi/tables    4 KiB  0x0000000008080000 0x0000000000020000 0x0000000000200000\n"
    )
    new = (
        "              Block Name    PSize              Offset               Used              Total"
        "                HVA  RO\n"
        "                     mem    2 MiB  0x0000000000000000 0x0000000040000000 0x0000000040000000"
        " 0x00007f0000000000  rw\n"
    )
    assert parse_ramblock(old + "\n") == (RamBlockLine("/rom@etc/acpi/tables", 4096, 0x8080000, 0x20000, 0x200000),)
    assert parse_ramblock(new) == (RamBlockLine("mem", 2 << 20, 0, 1 << 30, 1 << 30),)
    with pytest.raises(FormatError):
        parse_ramblock("pc.ram 0x0 0x1 0x1\n")


# ---- the flat view ----


def test_higher_priority_lies_above_and_cuts() -> None:
    text = tree(
        "memory",
        SYSTEM,
        line(2, 0, 0xFFFF, "(prio 0, ram): low"),
        line(2, 0x4000, 0x4FFF, "(prio 1, i/o): device"),
        line(2, 0x8000, 0x1FFFF, "(prio -1, rom): rom"),
    )
    assert view(text) == [
        (0, 0x3FFF, "ram", "low", 0),
        (0x4000, 0x4FFF, "i/o", "device", 0),
        (0x5000, 0xFFFF, "ram", "low", 0x5000),
        (0x10000, 0x1FFFF, "rom", "rom", 0x8000),
    ]


def test_alias_shows_a_part_of_its_target_wherever_that_is() -> None:
    text = tree(
        "memory",
        SYSTEM,
        line(2, 0x100000000, 0x100000FFF, "(prio 0, ram): alias high @mem 0000000000003000-0000000000003fff"),
    ) + tree("mem", line(1, 0x40000000, 0x4000FFFF, "(prio 0, ram): mem"), what="memory-region")
    assert view(text) == [(0x100000000, 0x100000FFF, "ram", "mem", 0x3000)]


def test_what_the_target_does_not_have_is_not_shown() -> None:
    text = tree(
        "memory",
        SYSTEM,
        line(2, 0, 0xFFFF, "(prio 0, ram): alias big @mem 0000000000001000-0000000000010fff"),
    ) + tree("mem", line(1, 0, 0x1FFF, "(prio 0, ram): mem"), what="memory-region")
    assert view(text) == [(0, 0xFFF, "ram", "mem", 0x1000)]


def test_neighbours_of_one_region_are_one() -> None:
    text = tree(
        "memory",
        SYSTEM,
        line(2, 0, 0xFFF, "(prio 0, ram): alias a @mem 0000000000000000-0000000000000fff"),
        line(2, 0x1000, 0x1FFF, "(prio 0, ram): alias b @mem 0000000000001000-0000000000001fff"),
        line(2, 0x2000, 0x2FFF, "(prio 0, ram): alias c @mem 0000000000000000-0000000000000fff"),
    ) + tree("mem", line(1, 0, 0xFFFF, "(prio 0, ram): mem"), what="memory-region")
    assert view(text) == [(0, 0x1FFF, "ram", "mem", 0), (0x2000, 0x2FFF, "ram", "mem", 0)]


def test_rule_depth_children_of_what_is_not_shown() -> None:
    # QEMU leaves out the disabled region and prints its children one level deeper.
    text = tree("I/O", line(1, 0, 0xFFFF, "(prio 0, i/o): io"), line(3, 0, 3, "(prio 0, i/o): acpi-evt"))
    assert view(text, "I/O") == [(0, 0xFFFF, "i/o", "io", 0)]
    rootless = tree("memory", line(2, 0, 0xFFF, "(prio 0, ram): alias low @mem 0000000000000000-0000000000000fff"))
    assert view(rootless + tree("mem", line(1, 0, 0xFFF, "(prio 0, ram): mem"), what="memory-region")) == []


def test_rule_depth_disabled_with_all_below() -> None:
    text = tree(
        "memory",
        SYSTEM,
        line(2, 0, 0xFFFF, "(prio 1, i/o): off [disabled]"),
        line(3, 0, 0xFFF, "(prio 0, ram): below"),
        line(2, 0x2000, 0x2FFF, "(prio 0, ram): beside"),
    )
    assert view(text) == [(0x2000, 0x2FFF, "ram", "beside", 0)]


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ([line(2, 0, 0xFFFFFFFF, "(prio 0, i/o): smram")], []),  # 4 GiB
        ([line(2, 0, 0xFFFFFFFE, "(prio 0, i/o): device")], ["device"]),
        ([line(2, 0, 0xFFF, "(prio 0, i/o): c"), line(3, 0, 0xFF, "(prio 0, ram): r")], ["r"]),
        ([line(2, 0, 0xFFF, "(prio 0, i/o): c"), line(3, 0, 0xFF, "(prio 0, i/o): d")], ["d", "c"]),
        ([line(2, 0, 0xFFF, "(prio 0, i/o): device-memory")], []),
        ([line(2, 0, 0xFFF, "(prio 0, ram): r"), line(3, 0, 0xFF, "(prio 0, rom): s")], ["s", "r"]),
    ],
)
def test_rule_container(lines: list[str], shown: list[str]) -> None:
    assert [name for *_, name, _ in view(tree("memory", SYSTEM, *lines))] == shown


def test_rule_order_of_equal_priority() -> None:
    inner = tree("memory", SYSTEM, line(2, 0, 0xFFFF, "(prio 0, ram): r"), line(2, 0xF000, 0xFFFF, "(prio 0, i/o): d"))
    assert view(inner) == [(0, 0xEFFF, "ram", "r", 0), (0xF000, 0xFFFF, "i/o", "d", 0)]
    same = tree("memory", SYSTEM, line(2, 0, 0xFFF, "(prio 0, ram): first"), line(2, 0, 0xFFF, "(prio 0, ram): second"))
    assert view(same) == [(0, 0xFFF, "ram", "first", 0)]
    tseg = tree(
        "memory",
        SYSTEM,
        line(2, 0, 0x7FFFFF, "(prio 1, i/o): tseg-blackhole"),
        line(2, 0xC0000, 0xC3FFF, "(prio 1, ram): pam"),
    )
    assert view(tseg) == [(0, 0x7FFFFF, "i/o", "tseg-blackhole", 0)]


def test_rule_read_only_alias() -> None:
    target = tree("mem", line(1, 0, 0xFFFFF, "(prio 0, ram): mem"), what="memory-region")
    for name, kind in (("pam-rom", "rom"), ("pam-ram", "ram")):
        alias = f"(prio 1, ram): alias {name} @mem 00000000000c0000-00000000000c3fff"
        text = tree("memory", SYSTEM, line(2, 0xC0000, 0xC3FFF, alias)) + target
        assert view(text) == [(0xC0000, 0xC3FFF, kind, "mem", 0xC0000)]


def test_overflow() -> None:
    # What q35 prints for a TSEG of 8 MiB with 1 MiB of RAM: only what is below 2**64 shows.
    text = tree("memory", SYSTEM, "[DETECTED OVERFLOW!] " + line(2, END - 0x6FFFFF, 0xFFFFF, "(prio 1, i/o): tseg"))
    assert view(text) == [(END - 0x6FFFFF, END, "i/o", "tseg", 0)]
