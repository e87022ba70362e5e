"""QEMU's text about memory, as values: `info mtree`, `info mtree -f`, `info ramblock`; and the flat view computed from
the text of `info mtree` alone.

    info mtree                  address-space: NAME     one line for every space of this root, then the tree
                                  START-END (prio P, KIND): NAME[ [disabled]]
                                  START-END (prio P, KIND): alias NAME @TARGET START-END[ [disabled]]
                                memory-region: NAME     the tree of every alias's target
    info mtree -f               FlatView #N, its spaces, its root, and lines START-END (prio P, KIND): NAME[ @OFFSET]

The text leaves out what QEMU knows.  `flat_ranges` fills that in by these rules:

    depth      A line two levels below the one it stands under is a child of a region that is disabled and not shown:
               it is not in the view.  A tree whose first line is missing has a disabled root.
    container  "i/o" is a device, or a container, which shows nothing itself.  A container is: what has 4 GiB or more;
               what has ram, rom, or an alias right below it; `device-memory`.
    order      Of two siblings with the same priority the one with the higher start lies above, for devices are put on
               top of RAM that is larger; with the same start too, the one printed first, for QEMU prints those in the
               order in which it renders them.  But `tseg-blackhole` lies above all of its priority: every write of its
               register takes it out and puts it back.
    target     An alias's target is the first memory-region of that name.
    read-only  An alias shows the kind of its target, and not whether it is read-only itself: `pam-rom` is.
    size       A line whose end is its start has one byte: QEMU prints a size of 0 in the same way.

Sources: mtree_print_mr, mtree_print_flatview, softmmu/memory.c of QEMU v7.2; ram_block_format, softmmu/physmem.c.
"""

from __future__ import annotations

import re

from ..errors import ArgumentError
from ..units import GiB, KiB, MiB
from ..value import Value
from .ringbuffer import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "FlatText",
    "FlatLine",
    "Mtree",
    "RamBlockLine",
    "Tree",
    "TreeLine",
    "flat_ranges",
    "parse_flat",
    "parse_mtree",
    "parse_ramblock",
]


class TreeLine(Value):
    """A line of `info mtree`: a region at [start, end], `depth` levels below the name of its tree (the root has 1).

    `kind`: "ram", "rom", "ramd", "romd" or "i/o".  An alias has the name of its `target`, and which bytes of that it
    shows: [target_start, target_end].
    """

    depth: int
    start: int
    end: int
    priority: int
    kind: str
    name: str
    target: str | None = None
    target_start: int | None = None
    target_end: int | None = None
    disabled: bool = False
    nonvolatile: bool = False


class Tree(Value):
    """The lines below `names`: several for address spaces that have the same root."""

    names: tuple[str, ...]
    lines: tuple[TreeLine, ...]


class Mtree(Value):
    """The text of `info mtree`: `spaces` are the address spaces, `regions` the targets of aliases."""

    spaces: tuple[Tree, ...]
    regions: tuple[Tree, ...]

    def space(self, name: str) -> Tree:
        """The tree of the address space `name`.  Raises ArgumentError."""
        return _named(self.spaces, name)

    def region(self, name: str) -> Tree:
        """The first tree of a region `name`.  Raises ArgumentError."""
        return _named(self.regions, name)


def _named(trees: Iterable[Tree], name: str) -> Tree:
    known: list[str] = []
    for tree in trees:
        if name in tree.names:
            return tree
        known += tree.names
    raise ArgumentError("Mtree", "name", name, ", ".join(sorted(known)))


class FlatLine(Value):
    """A range of `info mtree -f`: the bytes [start, end] are those from `offset` on of the region `name`.

    `kvm`: whether a memslot backs it.
    """

    start: int
    end: int
    priority: int
    kind: str
    name: str
    offset: int = 0
    nonvolatile: bool = False
    kvm: bool = False


class FlatText(Value):
    """A flat view of `info mtree -f`: `spaces` that show it, each (name, root, alias of the root or None).

    `root` is None, and `ranges` is empty, where QEMU says "No rendered FlatView".
    """

    spaces: tuple[tuple[str, str, str | None], ...]
    root: str | None
    ranges: tuple[FlatLine, ...]


class RamBlockLine(Value):
    """A line of `info ramblock`: sizes and the offset in bytes."""

    idstr: str
    page_size: int
    offset: int
    used_length: int
    max_length: int


_RANGE = r"(?P<start>[0-9a-f]{16})-(?P<end>[0-9a-f]{16}) \(prio (?P<priority>-?\d+), (?P<nv>nv-)?(?P<kind>[a-z/]+)\): "
_TREE_LINE = re.compile(
    r"(?:\[DETECTED OVERFLOW!\] )?(?P<indent>(?:  )+)"
    + _RANGE
    + r"(?:alias (?P<alias>.+) @(?P<target>.+) (?P<from>[0-9a-f]{16})-(?P<to>[0-9a-f]{16})"
    r"|(?P<name>.+?))(?P<disabled> \[disabled\])?(?: (?:owner|parent):.*)?"
)
_TREE_NAME = re.compile(r"(?P<what>address-space|memory-region): (?P<name>.*)")
_FLAT_LINE = re.compile(
    r"  " + _RANGE + r"(?P<name>.+?)(?: @(?P<offset>[0-9a-f]{16}))?(?P<kvm> KVM)?(?: (?:owner|parent):.*)?"
)
_FLAT_SPACE = re.compile(r' AS "(?P<name>.*)", root: (?P<root>.*?)(?:, alias (?P<alias>.*))?')
_FLAT_ROOT = " Root memory region: "
_BLOCK = re.compile(
    r"\s*(?P<idstr>\S.*?)\s+(?P<count>\d+) (?P<unit>[KMG]iB)\s+(?P<offset>0x[0-9a-f]+)\s+(?P<used>0x[0-9a-f]+)"
    r"\s+(?P<total>0x[0-9a-f]+).*"
)
_UNITS = {"KiB": KiB, "MiB": MiB, "GiB": GiB}


def parse_mtree(text: str) -> Mtree:
    r"""The values of what `info mtree` (with -D, -o too) prints.  FormatError for a line of another form.

    >>> text = "address-space: I/O\n  0000000000000000-000000000000ffff (prio 0, i/o): io\n\n"
    >>> parse_mtree(text).space("I/O").lines
    (TreeLine(depth=1, start=0, end=0xffff, priority=0, kind='i/o', name='io', target=None, target_start=None,
        target_end=None, disabled=False, nonvolatile=False),)
    """
    trees: dict[str, list[Tree]] = {"address-space": [], "memory-region": []}
    what = ""
    names: list[str] = []
    lines: list[TreeLine] = []

    def end() -> None:
        if names:
            trees[what].append(Tree(tuple(names), tuple(lines)))
        names.clear()
        lines.clear()

    for text_line in text.splitlines():
        if match := _TREE_NAME.fullmatch(text_line):
            if lines or match["what"] != what:
                end()
            what = match["what"]
            names.append(match["name"])
        elif match := _TREE_LINE.fullmatch(text_line):
            if not names:
                raise FormatError("info mtree", f"a region before any tree: {text_line!r}")
            lines.append(_tree_line(match))
        elif text_line.strip():
            raise FormatError("info mtree", f"not a line of a tree: {text_line!r}")
        else:
            end()
    end()
    return Mtree(tuple(trees["address-space"]), tuple(trees["memory-region"]))


def _tree_line(match: re.Match[str]) -> TreeLine:
    target = match["target"]
    return TreeLine(
        len(match["indent"]) // 2,
        int(match["start"], 16),
        int(match["end"], 16),
        int(match["priority"]),
        match["kind"],
        match["name"] if target is None else match["alias"],
        target,
        None if target is None else int(match["from"], 16),
        None if target is None else int(match["to"], 16),
        match["disabled"] is not None,
        match["nv"] is not None,
    )


def parse_flat(text: str) -> tuple[FlatText, ...]:
    """The values of what `info mtree -f` prints.  FormatError for a line of another form."""
    views: list[FlatText] = []
    spaces: list[tuple[str, str, str | None]] = []
    ranges: list[FlatLine] = []
    root: str | None = None
    inside = False

    def end() -> None:
        if inside:
            views.append(FlatText(tuple(spaces), root, tuple(ranges)))
        spaces.clear()
        ranges.clear()

    for line in text.splitlines():
        if line.startswith("FlatView #"):
            end()
            inside, root = True, None
        elif match := _FLAT_SPACE.fullmatch(line):
            spaces.append((match["name"], match["root"], match["alias"]))
        elif line.startswith(_FLAT_ROOT):
            root = line.removeprefix(_FLAT_ROOT)
            root = None if root == "(none)" else root
        elif match := _FLAT_LINE.fullmatch(line):
            ranges.append(_flat_line(match))
        elif line.strip() not in ("", "No rendered FlatView"):
            raise FormatError("info mtree -f", f"not a line of a flat view: {line!r}")
    end()
    return tuple(views)


def _flat_line(match: re.Match[str]) -> FlatLine:
    return FlatLine(
        int(match["start"], 16),
        int(match["end"], 16),
        int(match["priority"]),
        match["kind"],
        match["name"],
        int(match["offset"] or "0", 16),
        match["nv"] is not None,
        match["kvm"] is not None,
    )


def parse_ramblock(text: str) -> tuple[RamBlockLine, ...]:
    """The lines of what `info ramblock` prints, in its order.  FormatError for a line of another form.

    >>> parse_ramblock("                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000")
    (RamBlockLine(idstr='pc.ram', page_size=0x1000, offset=0, used_length=0x8000000, max_length=0x8000000),)
    """
    blocks = []
    for line in text.splitlines():
        if not line.strip() or line.split()[:2] == ["Block", "Name"]:
            continue
        match = _BLOCK.fullmatch(line)
        if match is None:
            raise FormatError("info ramblock", f"not a block: {line!r}")
        size = int(match["count"]) * _UNITS[match["unit"]]
        blocks.append(RamBlockLine(match["idstr"], size, *(int(match[at], 16) for at in ("offset", "used", "total"))))
    return tuple(blocks)


# ---- the flat view, from the text ----


class _Node:
    # A region of a tree: its line, what is right below it, and where its first byte is in the text.
    __slots__ = ("children", "line")

    def __init__(self, line: TreeLine) -> None:
        self.line = line
        self.children: list[_Node] = []

    @property
    def stop(self) -> int:
        # The end is printed modulo 2 ** 64: QEMU says "[DETECTED OVERFLOW!]" then.
        return self.line.end + 1 + (1 << 64 if self.line.end < self.line.start else 0)

    def order(self) -> tuple[int, bool, int]:
        return -self.line.priority, self.line.name != "tseg-blackhole", -self.line.start

    def is_container(self) -> bool:
        if self.line.kind != "i/o":
            return False
        if self.stop - self.line.start >= 4 * GiB or self.line.name == "device-memory":
            return True
        return any(child.line.kind in ("ram", "rom") or child.line.target is not None for child in self.children)


def _root(tree: Tree) -> _Node | None:
    # The tree without what is disabled; None where that is all of it.
    root: _Node | None = None
    above: list[_Node | None] = []  # by depth, the last region of it; None: disabled, or not shown
    for line in tree.lines:
        del above[line.depth - 1 :]
        above += [None] * (line.depth - 1 - len(above))
        node = None if line.disabled or (line.depth > 1 and above[-1] is None) else _Node(line)
        above.append(node)
        if node is not None:
            if line.depth == 1:
                root = node
            else:
                parent = above[-2]
                if parent is not None:
                    parent.children.append(node)
    return root


class _View:
    # The ranges so far: (start, stop, node, offset, readonly, nonvolatile), sorted, disjoint.
    def __init__(self, regions: dict[str, _Node | None]) -> None:
        self.regions = regions
        self.ranges: list[tuple[int, int, _Node, int, bool, bool]] = []

    def render(self, node: _Node, shift: int, start: int, stop: int, readonly: bool, nonvolatile: bool) -> None:
        # Show `node`, whose text is `shift` bytes below where it is seen, in the holes of [start, stop).
        line = node.line
        start, stop = max(start, line.start + shift), min(stop, node.stop + shift)
        if start >= stop:
            return
        nonvolatile = nonvolatile or line.nonvolatile
        if line.target is not None:
            target = self.regions.get(line.target)
            if target is not None and line.target_start is not None:
                # What is at target_start of the target is seen at the alias's start.
                shift += line.start - (target.line.start + line.target_start)
                self.render(target, shift, start, stop, readonly or line.name == "pam-rom", nonvolatile)
            return
        # sorted() keeps the order of the text between equals.
        for child in sorted(node.children, key=_Node.order):
            self.render(child, shift, start, stop, readonly, nonvolatile)
        if not node.is_container():
            self._fill(node, line.start + shift, start, stop, readonly, nonvolatile)

    def _fill(self, node: _Node, base: int, start: int, stop: int, readonly: bool, nonvolatile: bool) -> None:
        filled, at = [], start
        for range_start, range_stop, *_ in self.ranges:
            if range_stop <= at:
                continue
            if range_start >= stop:
                break
            if range_start > at:
                filled.append((at, range_start, node, at - base, readonly, nonvolatile))
            at = range_stop
        if at < stop:
            filled.append((at, stop, node, at - base, readonly, nonvolatile))
        self.ranges = sorted([*self.ranges, *filled], key=lambda found: found[0])


def flat_ranges(mtree: Mtree, space: str) -> tuple[FlatLine, ...]:
    """The flat view of the address space `space`, computed from the text of `info mtree`: what `info mtree -f` prints.

    Where the text is ambiguous the rules of the module's text decide.  Raises ArgumentError for an unknown space.
    """
    regions: dict[str, _Node | None] = {}
    for tree in mtree.regions:
        for name in tree.names:
            regions.setdefault(name, _root(tree))
    root = _root(mtree.space(space))
    view = _View(regions)
    if root is not None:
        view.render(root, 0, 0, 1 << 64, False, False)
    found: list[FlatLine] = []
    for start, stop, node, offset, readonly, nonvolatile in view.ranges:
        kind = "rom" if readonly else node.line.kind
        line = FlatLine(start, stop - 1, node.line.priority, kind, node.line.name, offset, nonvolatile)
        last = found[-1] if found else None
        if last is not None and _continues(last, line):
            found[-1] = FlatLine(last.start, line.end, last.priority, last.kind, last.name, last.offset, nonvolatile)
        else:
            found.append(line)
    return tuple(found)


def _continues(last: FlatLine, line: FlatLine) -> bool:
    # Whether `line` goes on where `last` ends, in the address space and in the region.
    return (
        last.end + 1 == line.start
        and last.offset + (last.end + 1 - last.start) == line.offset
        and (last.name, last.kind, last.priority) == (line.name, line.kind, line.priority)
        and last.nonvolatile == line.nonvolatile
    )
