"""`info mtree`: the trees of address spaces, and their flat views, as QEMU's monitor prints them.

    address-space: memory
      0000000000000000-ffffffffffffffff (prio 0, i/o): system
        0000000000000000-0000000007ffffff (prio 0, ram): alias ram-below-4g @pc.ram 0000000000000000-0000000007ffffff

    FlatView #0
     AS "memory", root: system
     Root memory region: system
      0000000000000000-0000000007ffffff (prio 0, ram): pc.ram

Source: mtree_info, mtree_print_mr and mtree_print_flatview, softmmu/memory.c@v7.2 of QEMU.
"""

from __future__ import annotations

from ..errors import ArgumentTypeError
from .address_space import AddressSpace
from .region import ADDRESS_END, MemoryRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .flatview import FlatView

    Backed = Callable[[AddressSpace, int, int], bool]

__all__ = ["info_mtree"]

_MASK = ADDRESS_END - 1


def info_mtree(
    spaces: Iterable[AddressSpace],
    *,
    flatview: bool = False,
    disabled: bool = False,
    owner: bool = False,
    kvm_backed: Backed | None = None,
) -> str:
    """The text of `info mtree` for these spaces, and with `flatview` that of `info mtree -f`; each line ends with \\n.

    `disabled` (-D) shows regions that are not enabled; without it, what is in them is shown all the same.
    `owner` (-o) adds every region's `MemoryRegion.owner`.  Neither changes a flat view but for the owner.
    `kvm_backed(space, start, size)` says whether one memslot backs a range: " KVM" is added to its line of a flat view,
    once for every space of the view.

    QEMU prints trees and views in the order of a hash table; here it is that of `spaces`, by the first of each.
    Spaces with the same root are one tree, their names sorted.
    """
    if not hasattr(spaces, "__iter__"):
        raise ArgumentTypeError("info_mtree", "spaces", spaces, "AddressSpaces")
    spaces = list(spaces)
    for space in spaces:
        if not isinstance(space, AddressSpace):
            raise ArgumentTypeError("info_mtree", "spaces", space, "AddressSpaces")
    if flatview:
        return "".join(_flatviews(spaces, owner, kvm_backed))
    return "".join(_trees(spaces, disabled, owner))


def _trees(spaces: list[AddressSpace], disabled: bool, owner: bool) -> list[str]:
    by_root: dict[MemoryRegion, list[str]] = {}
    for space in spaces:
        by_root.setdefault(space.root, []).append(space.name)
    text: list[str] = []
    targets: dict[MemoryRegion, None] = {}  # of aliases, in the order in which they were met
    for root, names in by_root.items():
        text += [f"address-space: {name}\n" for name in sorted(names, key=_bytes)]
        text += _tree(root, disabled, owner, targets)
        text.append("\n")
    done = 0
    while done < len(targets):  # it grows
        region = list(targets)[done]
        text.append(f"memory-region: {region.name}\n")
        text += _tree(region, disabled, owner, targets)
        text.append("\n")
        done += 1
    return text


def _tree(root: MemoryRegion, disabled: bool, owner: bool, targets: dict[MemoryRegion, None]) -> list[str]:
    # Addresses are of 64 bits and may wrap, where a region begins outside of its container.
    text: list[str] = []
    todo = [(root, 1, 0)]
    while todo:
        region, level, base = todo.pop()
        start = base + region.addr & _MASK
        end = _last(start, region.size)
        if start < base or end < start:
            text.append("[DETECTED OVERFLOW!] ")
        target = region.target
        if target is not None:
            targets.setdefault(target)
        if region.enabled or disabled:
            text.append(f"{'  ' * level}{start:016x}-{end:016x} (prio {region.priority}, ")
            text.append(f"{'nv-' if region.nonvolatile else ''}{region.kind}): ")
            if target is None:
                text.append(region.name)
            else:
                first = region.alias_offset
                text.append(f"alias {region.name} @{target.name} {first:016x}-{_last(first, region.size):016x}")
            text.append("" if region.enabled else " [disabled]")
            if owner:
                text.append(_owner(region))
            text.append("\n")
        # By address, then by priority; what is equal in both as they stand.
        children = sorted(region.subregions, key=lambda child: (child.addr, -child.priority))
        todo += [(child, level + 1, start) for child in reversed(children)]
    return text


# What strcmp compares; a name is any text, which may have no encoding.
def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogatepass")


def _last(start: int, size: int) -> int:
    return start + max(size - 1, 0) & _MASK


def _owner(region: MemoryRegion) -> str:
    return " orphan" if region.owner is None else f" {region.owner}"


def _flatviews(spaces: list[AddressSpace], owner: bool, backed: Backed | None) -> list[str]:
    by_view: dict[FlatView, list[AddressSpace]] = {}
    for space in spaces:
        by_view.setdefault(space.flatview, []).append(space)
    text: list[str] = []
    for number, (view, sharers) in enumerate(by_view.items()):
        text.append(f"FlatView #{number}\n")
        for space in sharers:
            target = space.root.target
            alias = "" if target is None else f", alias {target.name}"
            text.append(f' AS "{space.name}", root: {space.root.name}{alias}\n')
        text.append(f" Root memory region: {'(none)' if view.root is None else view.root.name}\n")
        if not len(view):
            text.append("  No rendered FlatView\n\n")
            continue
        for shown in view:
            region = shown.region
            text.append(f"  {shown.start:016x}-{shown.end - 1:016x} (prio {region.priority}, ")
            text.append(f"{'nv-' if shown.nonvolatile else ''}{shown.kind}): {region.name}")
            if shown.offset_in_region:
                text.append(f" @{shown.offset_in_region:016x}")
            if owner:
                text.append(_owner(region))
            if backed is not None:
                text += [" KVM" for space in sharers if backed(space, shown.start, shown.size)]
            text.append("\n")
        text.append("\n")
    return text
