"""What an address space tells those who follow it: `MemoryListener`, the calls, and `MemoryRegionSection`, their
argument.

    begin()                     a transaction's outermost exit has rendered a new flat view
      region_del, log_stop      of what is gone or has changed, from the highest priority of a listener to the lowest
      region_add, region_nop,   of what is new, of what stays as it was, of what is logged from now on:
      log_start                 from the lowest priority to the highest
    commit()                    all of it was told

Source: struct MemoryListener, include/exec/memory.h@v7.2 of QEMU; address_space_update_topology_pass,
softmmu/memory.c@v7.2.
"""

from __future__ import annotations

from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .address_space import AddressSpace
    from .region import MemoryRegion

__all__ = ["MemoryListener", "MemoryRegionSection"]


class MemoryRegionSection(Value):
    """A range of an address space that one region backs: one range of a flat view, as a listener is told of it.

    `offset_within_region` and `offset_within_address_space` are in bytes, and so is `size`, 1 to 2**64.  `readonly`,
    `romd` (a rom device that is read as memory), `nonvolatile` and `unmergeable` are the range's own: a read-only alias
    makes a read-only range of a writable region.
    """

    address_space: AddressSpace
    region: MemoryRegion
    offset_within_region: int
    offset_within_address_space: int
    size: int
    readonly: bool = False
    romd: bool = False
    nonvolatile: bool = False
    unmergeable: bool = False

    @property
    def end(self) -> int:
        """First address behind the section, at most 2**64."""
        return self.offset_within_address_space + self.size


class MemoryListener:
    """Base of those who follow an address space: each method does nothing, until a subclass says otherwise.

    `AddressSpace.add_listener` tells a new listener all of the flat view as region_add, between begin and commit.

    Threads: the methods are called in the thread whose transaction ends, under the lock of the memory API.
    """

    priority: int = 0
    """Among the listeners of a space: lower ones are told first of what is added, and last of what is deleted."""

    def begin(self) -> None:
        """A new flat view is about to be told."""

    def commit(self) -> None:
        """All of the new flat view was told."""

    def region_add(self, section: MemoryRegionSection) -> None:
        """A section that was not there, or was there with another region, offset, size or mode."""

    def region_del(self, section: MemoryRegionSection) -> None:
        """A section that is no longer there as it was."""

    def region_nop(self, section: MemoryRegionSection) -> None:
        """A section that stays as it was; who logs its writes may have changed: then log_start or log_stop follows."""

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """Clients were added to those who want the writes to the section logged: masks of clients before and after."""

    def log_stop(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """Clients were taken from those who want the writes to the section logged."""
