"""`info mtree`: for trees read from QEMU's own text, our text of them is the same again, and so is that of -f."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from hvmodel.errors import ArgumentTypeError
from hvmodel.ram.address_space import AddressSpace
from hvmodel.ram.mtree import info_mtree
from hvmodel.ram.region import ADDRESS_END, MemoryRegion, MemoryRegionOps
from tests.need import need


class Block:
    """In the place of a RamBlock."""

    def __init__(self, size: int) -> None:
        self.used_length = self.max_length = size


def ram(name: str, size: int) -> MemoryRegion:
    return MemoryRegion.ram(name, Block(size))  # type: ignore[arg-type]


# ---- from QEMU's text to regions ----

LINE = re.compile(
    r"(?P<indent> +)(?P<start>\w{16})-(?P<end>\w{16}) \(prio (?P<prio>-?\d+), (?P<nv>nv-)?(?P<kind>[^)]+)\): "
    r"(?:alias (?P<alias>.+) @(?P<target>.+) (?P<offset>\w{16})-\w{16}|(?P<name>.+?))(?P<disabled> \[disabled\])?"
)


class Entry(NamedTuple):
    """A line of a tree, with what is in it."""

    name: str
    start: int
    size: int
    line: re.Match[str]
    children: list[Entry]


def blocks(text: str) -> list[tuple[list[str], list[str]]]:
    """The blocks of the text: the names in the lines before each tree, and the tree's lines."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        heads = [line for line in lines if not line.startswith(" ")]
        found.append((heads, lines[len(heads) :]))
    return found


def parse(lines: list[str]) -> Entry | None:
    # Roots that are not enabled are not there without -D; the text here is with it.
    stack: list[Entry] = []
    root = None
    for line in lines:
        match = LINE.fullmatch(line)
        assert match is not None, line
        depth = len(match["indent"]) // 2 - 1
        start, end = int(match["start"], 16), int(match["end"], 16)
        size = end - start + 1
        entry = Entry(match["alias"] or match["name"], start, size, match, [])
        del stack[depth:]
        if stack:
            stack[-1].children.append(entry)
        else:
            root = entry
        stack.append(entry)
    return root


class Builder:
    """Makes regions of the entries; those that aliases show are made once, by their name."""

    def __init__(self, text: str, flat: str) -> None:
        self.targets = {
            heads[0].partition(": ")[2]: parse(lines) for heads, lines in blocks(text) if "region" in heads[0]
        }
        self.made: dict[str, MemoryRegion] = {}
        # The text says "i/o" of containers, too.  What shows itself in a flat view is none.
        self.shown = set(re.findall(r"\): (.+?)(?: @\w{16})?$", flat, re.MULTILINE))

    def region(self, entry: Entry) -> MemoryRegion:
        name = entry.name
        if name in self.targets and name in self.made and entry.line["alias"] is None:
            return self.made[name]
        line, kind = entry.line, entry.line["kind"]
        if line["alias"] is not None:
            region = MemoryRegion.alias(name, self.target(line["target"]), int(line["offset"], 16), entry.size)
        elif kind in ("ram", "rom"):
            region = ram(name, entry.size)
            region.readonly = kind == "rom"
        elif kind == "romd":
            region = MemoryRegion.rom_device(name, Block(entry.size), MemoryRegionOps())  # type: ignore[arg-type]
        elif name in self.shown:
            region = MemoryRegion.io(name, entry.size)
        else:
            region = MemoryRegion.container(name, entry.size)
        region.enabled = line["disabled"] is None
        region.nonvolatile = line["nv"] is not None
        if name in self.targets and line["alias"] is None:
            self.made[name] = region
        # Of equal address and priority the first line is the newest; of equal priority only, it is not known.
        for child in reversed(entry.children):
            sub = self.region(child)
            if sub.parent is None:
                region.add_subregion(child.start - entry.start, sub, int(child.line["prio"]))
        return region

    def target(self, name: str) -> MemoryRegion:
        if name not in self.made:
            entry = self.targets[name]
            assert entry is not None, name
            self.region(entry)
        return self.made[name]


def sections(text: str) -> list[list[str]]:
    """The blocks of a text in an order of their own: QEMU's is that of a hash table.

    Of a view, its number goes, and its spaces are sorted: QEMU has them in the order in which they were made.
    """
    found = []
    for block in text.strip().split("\n\n"):
        lines = re.sub(r"^FlatView #\d+\n", "", block).splitlines()
        spaces = [line for line in lines if line.startswith(" AS ")]
        found.append([*sorted(spaces), *lines[len(spaces) :]])
    return sorted(found)


@pytest.mark.parametrize("machine", ["pc", "q35", "pc,smm=off", "q35,max-ram-below-4g=64M", "isapc", "microvm"])
def test_the_same_text_as_qemu(machine: str) -> None:
    need("qemu")
    from hvmodel.witness.qemu import Qemu

    with Qemu("-m", "128M", machine=machine) as qemu:
        text, flat = (qemu.monitor(line) for line in ("info mtree -D", "info mtree -f"))
        without = qemu.monitor("info mtree")
    builder = Builder(text, flat)
    spaces = []
    for heads, lines in blocks(text):
        if "address-space" not in heads[0]:
            continue
        entry = parse(lines)
        assert entry is not None
        region = builder.region(entry)
        spaces += [AddressSpace(region, head.partition(": ")[2]) for head in heads]
    assert len(spaces) > 3
    assert sections(info_mtree(spaces, disabled=True)) == sections(text)
    assert sections(info_mtree(spaces)) == sections(without)
    assert sections(info_mtree(spaces, flatview=True)) == sections(flat)
    for space in spaces:
        space.close()


# ---- by hand ----


def text_of(root: MemoryRegion, **options: bool) -> list[str]:
    with AddressSpace(root, "memory") as space:
        return info_mtree([space], **options).splitlines()  # type: ignore[arg-type]


def test_disabled_regions_are_hidden_and_what_is_in_them_is_not() -> None:
    root, inner = MemoryRegion.container("system", ADDRESS_END), MemoryRegion.container("inner", 0x100)
    root.add_subregion(0x1000, inner, priority=3)
    inner.add_subregion(0x10, MemoryRegion.io("regs", 0x10))
    inner.enabled = False
    line = "    0000000000001000-00000000000010ff (prio 3, i/o): inner [disabled]"
    assert text_of(root) == [
        "address-space: memory",
        "  0000000000000000-ffffffffffffffff (prio 0, i/o): system",
        "      0000000000001010-000000000000101f (prio 0, i/o): regs",
        "",
    ]
    assert text_of(root, disabled=True)[2] == line
    # The flat view of -f is the same with both.
    assert text_of(root, flatview=True, disabled=True) == [
        "FlatView #0",
        ' AS "memory", root: system',
        " Root memory region: (none)",
        "  No rendered FlatView",
        "",
    ]


def test_sizes_and_kinds() -> None:
    # A region of size 0 ends where it begins; nv- is the region's own in a tree, and what shows in a flat view.
    root = MemoryRegion.container("system", ADDRESS_END)
    nvdimm = ram("nvdimm", 0x100)
    nvdimm.nonvolatile = True
    flash = MemoryRegion.rom_device("flash", Block(0x10), MemoryRegionOps())  # type: ignore[arg-type]
    for n, region in enumerate((MemoryRegion.io("none", 0), nvdimm, flash, MemoryRegion.alias("a", nvdimm, 0x80, 0))):
        root.add_subregion(n * 0x100, region)
    assert text_of(root)[2:] == [
        "    0000000000000000-0000000000000000 (prio 0, i/o): none",
        "    0000000000000100-00000000000001ff (prio 0, nv-ram): nvdimm",
        "    0000000000000200-000000000000020f (prio 0, romd): flash",
        "    0000000000000300-0000000000000300 (prio 0, ram): alias a @nvdimm 0000000000000080-0000000000000080",
        "",
        "memory-region: nvdimm",
        "  0000000000000100-00000000000001ff (prio 0, nv-ram): nvdimm",
        "",
    ]
    flash.romd = False
    root.readonly = True
    assert text_of(root, flatview=True)[3:] == [
        "  0000000000000100-00000000000001ff (prio 0, nv-rom): nvdimm",
        "  0000000000000200-000000000000020f (prio 0, rom): flash",  # so QEMU says of all that is readonly
        "",
    ]


def test_order_of_siblings() -> None:
    root = MemoryRegion.container("io", 0x100)
    for name, addr, priority in (("d", 8, 0), ("c", 8, 0), ("e", 8, -1), ("a", 4, -7), ("b", 8, 1)):
        root.add_subregion(addr, MemoryRegion.io(name, 1), priority)
    assert [line[-1] for line in text_of(root)[2:-1]] == ["a", "b", "c", "d", "e"]


def test_spaces_with_one_root_are_one_tree() -> None:
    system, other = MemoryRegion.container("system", ADDRESS_END), MemoryRegion.container("other", 0x10)
    window = MemoryRegion.alias("window", system, 0, ADDRESS_END)
    for n in range(2):
        system.add_subregion(n, MemoryRegion.io(f"{n}", 1))
    spaces = [AddressSpace(system, "memory"), AddressSpace(other, "b"), AddressSpace(system, "cpu-memory-0")]
    spaces.append(AddressSpace(window, "cpu-smm-0"))
    heads = [line for line in info_mtree(spaces).splitlines() if line and not line.startswith(" ")]
    assert heads == [
        *("address-space: cpu-memory-0", "address-space: memory"),
        *("address-space: b", "address-space: cpu-smm-0", "memory-region: system"),
    ]
    flat = info_mtree(spaces, flatview=True).splitlines()
    assert flat[:5] == [
        "FlatView #0",
        ' AS "memory", root: system',
        ' AS "cpu-memory-0", root: system',
        ' AS "cpu-smm-0", root: window, alias system',
        " Root memory region: system",
    ]
    assert flat[8] == "FlatView #1"
    for space in spaces:
        space.close()


def test_what_ends_behind_the_space() -> None:
    # Each is within 2**64 in its container; both together are not.
    root, inner = MemoryRegion.container("system", ADDRESS_END), MemoryRegion.container("inner", 0x100)
    root.add_subregion(ADDRESS_END - 0x100, inner)
    inner.add_subregion(0x80, MemoryRegion.io("wide", 0x100))
    assert text_of(root)[3] == "[DETECTED OVERFLOW!]       ffffffffffffff80-000000000000007f (prio 0, i/o): wide"
    assert text_of(root, flatview=True)[3] == "  ffffffffffffff80-ffffffffffffffff (prio 0, i/o): wide"


def test_owners_and_slots() -> None:
    root = MemoryRegion.container("system", 0x100, owner="owner:{obj path=/machine}")
    for n in range(2):
        root.add_subregion(0x10 * n, ram(f"{n}", 0x10))
    assert text_of(root, owner=True)[1:3] == [
        "  0000000000000000-00000000000000ff (prio 0, i/o): system owner:{obj path=/machine}",
        "    0000000000000000-000000000000000f (prio 0, ram): 0 orphan",
    ]
    with AddressSpace(root, "a") as a, AddressSpace(root, "b") as b:
        asked: list[tuple[AddressSpace, int, int]] = []

        def backed(space: AddressSpace, start: int, size: int) -> bool:
            asked.append((space, start, size))
            return start == 0 or space is b

        text = info_mtree([a, b], flatview=True, kvm_backed=backed, owner=True).splitlines()
        assert text[4:6] == [
            "  0000000000000000-000000000000000f (prio 0, ram): 0 orphan KVM KVM",
            "  0000000000000010-000000000000001f (prio 0, ram): 1 orphan KVM",
        ]
        assert asked == [(a, 0, 16), (b, 0, 16), (a, 16, 16), (b, 16, 16)]


def test_a_very_deep_tree() -> None:
    root = inner = MemoryRegion.container("r", ADDRESS_END)
    for _ in range(3000):
        child = MemoryRegion.container("c", 0x10)
        inner.add_subregion(0, child)
        inner = child
    lines = text_of(root)
    assert (len(lines), lines[-2].index("0")) == (3003, 2 * 3001)


def test_what_is_no_space() -> None:
    with pytest.raises(ArgumentTypeError):
        info_mtree([MemoryRegion.container("system", 1)])  # type: ignore[list-item]
    with pytest.raises(ArgumentTypeError, match="spaces"):
        info_mtree(5)  # type: ignore[arg-type]
    assert info_mtree([]) == info_mtree([], flatview=True) == ""


def test_a_name_without_an_encoding() -> None:
    with AddressSpace(MemoryRegion.container("system", 1), "\ud800") as space:
        assert info_mtree([space]).startswith("address-space: \ud800\n")
