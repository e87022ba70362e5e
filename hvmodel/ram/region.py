"""Memory regions: `MemoryRegion`, a node of the tree from which an address space is rendered, and `MemoryRegionOps`,
the callbacks of those that are no memory.

    kind          shows                                     size
    container     its subregions only                       given
    ram, rom      the bytes of a RamBlock                   the block's
    rom_device    a RamBlock for reads, callbacks for       the block's
                  writes; with romd off, callbacks for both
    io            callbacks                                 given
    alias         a part of another region, wherever        given
                  that one is

A region has subregions, each at an offset and with a priority; where they overlap the higher priority shows, and of
equal ones the one added last.  What no subregion covers shows the region itself, unless it is a container.  A region
is in one container at most; by aliases it shows in many places.

Source: struct MemoryRegion, include/exec/memory.h@v7.2 of QEMU (`unmergeable`: v8.2); softmmu/memory.c@v7.2.
"""

from __future__ import annotations

from _bisect import bisect_left
from _weakref import ref

from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .topology import _the_one as _topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Literal

    from .block import RamBlock

__all__ = [
    "ADDRESS_END",
    "DIRTY_MEMORY_CODE",
    "DIRTY_MEMORY_MIGRATION",
    "DIRTY_MEMORY_VGA",
    "MemoryRegion",
    "MemoryRegionOps",
    "resize",
    "seen_from",
]

ADDRESS_END = 1 << 64
"""First address behind every address space, and the largest size of a region."""

DIRTY_MEMORY_VGA, DIRTY_MEMORY_CODE, DIRTY_MEMORY_MIGRATION = 0, 1, 2
"""Clients of dirty logging: bit numbers of `MemoryRegion.dirty_log_mask`."""

_ACCESS_SIZES = (0, 1, 2, 4, 8)
_ENDIANNESS = ("little", "big", "native")


class MemoryRegionOps(Value):
    """What a region does with accesses.

    `read(addr, size)` gives an int, of which the low `size` bytes count; `write(addr, value, size)` gives nothing.
    `addr` is the offset in the region.  One that is None refuses its accesses.  Either may raise MemTxError.
    `valid_min`, `valid_max`: sizes in bytes (1, 2, 4, 8) that are let through, 0: all; `valid_unaligned`: whether an
    address that is no multiple of the size is.  Others are decode errors, as are those for which
    `accepts(addr, size, is_write)`, where it is given, is false.
    `impl_min`, `impl_max`: sizes for which the callbacks are made, 0: 1 and 4.  Other accesses are put together from
    these.  `impl_unaligned`: whether an unaligned access comes as it is; otherwise it is split at its alignment.
    `endianness`: "little", "big", or "native", which on x86 is little.

    Source: struct MemoryRegionOps, include/exec/memory.h@v7.2 of QEMU.
    """

    read: Callable[[int, int], int] | None = None
    write: Callable[[int, int, int], object] | None = None
    valid_min: int = 0
    valid_max: int = 0
    valid_unaligned: bool = False
    impl_min: int = 0
    impl_max: int = 0
    impl_unaligned: bool = False
    endianness: Literal["little", "big", "native"] = "native"
    accepts: Callable[[int, int, bool], bool] | None = None


def _check_ops(ops: object, call: str) -> MemoryRegionOps:
    if not isinstance(ops, MemoryRegionOps):
        raise ArgumentTypeError(call, "ops", ops, "a MemoryRegionOps")
    for field in ("read", "write", "accepts"):
        function = getattr(ops, field)
        if function is not None and not callable(function):
            raise ArgumentTypeError(call, f"ops.{field}", function, "a function or None")
    for field in ("valid_min", "valid_max", "impl_min", "impl_max"):
        size = getattr(ops, field)
        if isinstance(size, bool) or size not in _ACCESS_SIZES:
            raise ArgumentError(call, f"ops.{field}", size, "0 (the default), 1, 2, 4 or 8 bytes")
    if ops.valid_max and ops.valid_min > ops.valid_max:
        raise ArgumentError(call, "ops.valid_min", ops.valid_min, f"at most valid_max, {ops.valid_max}")
    if (ops.impl_min or 1) > (ops.impl_max or 4):
        raise ArgumentError(call, "ops.impl_min", ops.impl_min, f"at most impl_max, {ops.impl_max or 4}")
    if ops.endianness not in _ENDIANNESS:
        raise ArgumentError(call, "ops.endianness", ops.endianness, '"little", "big" or "native"')
    return ops


_UNASSIGNED = MemoryRegionOps()  # refuses all


def _int(value: object, call: str, field: str, low: int, high: int, what: str) -> int:
    # An int of low <= value <= high, which `what` says in words.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(call, field, value, "an int")
    if not low <= value <= high:
        raise ArgumentError(call, field, value, what)
    return int(value)


def _size(value: object, call: str) -> int:
    return _int(value, call, "size", 0, ADDRESS_END, "0 to 2**64 bytes")


def _address(value: object, call: str, field: str, size: int) -> int:
    # Where a range of `size` bytes begins that ends at 2**64 at most.
    last = min(ADDRESS_END - size, ADDRESS_END - 1)
    if type(value) is int and 0 <= value <= last:
        return value
    return _int(value, call, field, 0, last, f"0 to {last:#x}: {field} + size, {size:#x}, is at most 2**64")


def _flag(value: object, call: str) -> bool:
    if not isinstance(value, bool):
        raise ArgumentTypeError(call, call.rpartition(".")[2], value, "True or False")
    return value


class MemoryRegion:
    """A region; made by `container`, `ram`, `rom`, `rom_device`, `io` and `alias`.

    `name` is any text and need not be unique.  A `size` is 0 to 2**64 bytes; a region of size 0 shows nothing (QEMU's
    q35 has such ones, for TSEG).  Changes are transactions, see `transaction`; they raise ArgumentError and
    ArgumentTypeError, and what listeners raise, and then nothing has changed.

    Regions are alive as long as somebody has them: a container has its subregions, an alias its target, a view what it
    shows.  The RamBlock stays its maker's, who closes it after the region has gone from every address space.

    Threads: any for changes, one at a time by the lock of `transaction`; reading an attribute takes no lock.

    >>> system = MemoryRegion.container("system", 1 << 64)
    >>> pci = MemoryRegion.container("pci", 1 << 64)
    >>> system.add_subregion(0, pci, priority=-1)
    >>> vga = MemoryRegion.alias("smram-region", pci, 0xA0000, 0x20000)
    >>> system.add_subregion(0xA0000, vga, priority=1)
    >>> [region.name for region in system.subregions]
    ['smram-region', 'pci']
    >>> pci.add_subregion(0, system)
    Traceback (most recent call last):
    hvmodel.errors.ArgumentError: MemoryRegion.add_subregion: region=<MemoryRegion system container size=2**64>: it \
shows <MemoryRegion pci container size=2**64 addr=0x0 priority=-1>, and so would show itself; accepted: a region that \
does not contain this one, nor is it, also not by aliases
    """

    __slots__ = (
        "__weakref__",
        "_addr",
        "_alias",
        "_alias_offset",
        "_aliases",
        "_block",
        "_container",
        "_dirty_log_mask",
        "_enabled",
        "_name",
        "_nonvolatile",
        "_ops",
        "_owner",
        "_priority",
        "_ram",
        "_readonly",
        "_rom_device",
        "_romd",
        "_size",
        "_subregions",
        "_terminates",
        "_unmergeable",
    )

    def __init__(self, name: str, size: int, *, owner: str | None = None) -> None:
        call = "MemoryRegion"
        for field, text in (("name", name), ("owner", owner)):
            if not isinstance(text, str) and not (field == "owner" and text is None):
                raise ArgumentTypeError(call, field, text, "text")
        self._name, self._owner = name, owner
        self._size = _size(size, call)
        self._addr = self._priority = self._alias_offset = self._dirty_log_mask = 0
        self._container: MemoryRegion | None = None
        self._alias: MemoryRegion | None = None
        self._aliases: list[ref[MemoryRegion]] = []  # those that show this one, and some that are gone
        self._subregions: list[MemoryRegion] = []  # the one that shows first
        self._block: RamBlock | None = None
        self._ops = _UNASSIGNED
        self._enabled = self._romd = True
        self._ram = self._rom_device = self._terminates = False
        self._readonly = self._nonvolatile = self._unmergeable = False

    # ---- kinds ----

    @classmethod
    def container(cls, name: str, size: int, *, owner: str | None = None) -> MemoryRegion:
        """A region that shows its subregions, and nothing between them.

        `owner`: what `info mtree -o` says of it, such as "owner:{dev id=vga0}"; None: an orphan.
        """
        return cls(name, size, owner=owner)

    @classmethod
    def ram(
        cls, name: str, block: RamBlock, *, readonly: bool = False, nonvolatile: bool = False, owner: str | None = None
    ) -> MemoryRegion:
        """RAM: all of `block`, [0, used_length)."""
        region = cls._of_block(name, block, owner, "MemoryRegion.ram")
        region._ram = True
        region._readonly = _flag(readonly, "MemoryRegion.ram.readonly")
        region._nonvolatile = _flag(nonvolatile, "MemoryRegion.ram.nonvolatile")
        return region

    @classmethod
    def rom(cls, name: str, block: RamBlock, *, owner: str | None = None) -> MemoryRegion:
        """ROM: RAM that is read-only to the guest."""
        region = cls._of_block(name, block, owner, "MemoryRegion.rom")
        region._ram = region._readonly = True
        return region

    @classmethod
    def rom_device(cls, name: str, block: RamBlock, ops: MemoryRegionOps, *, owner: str | None = None) -> MemoryRegion:
        """A device such as a flash: read as memory while `romd` is on, and otherwise, as all writes, by `ops`."""
        ops = _check_ops(ops, "MemoryRegion.rom_device")
        region = cls._of_block(name, block, owner, "MemoryRegion.rom_device")
        region._rom_device, region._ops = True, ops
        return region

    @classmethod
    def io(cls, name: str, size: int, ops: MemoryRegionOps | None = None, *, owner: str | None = None) -> MemoryRegion:
        """Registers, served by `ops`; None: it covers what is below, and refuses all accesses."""
        region = cls(name, size, owner=owner)
        region._ops = _UNASSIGNED if ops is None else _check_ops(ops, "MemoryRegion.io")
        region._terminates = True
        return region

    @classmethod
    def alias(
        cls, name: str, target: MemoryRegion, offset: int, size: int, *, owner: str | None = None
    ) -> MemoryRegion:
        """The part [offset, offset + size) of `target`, also where that is in no container, or not enabled as a whole.

        A part that is not in the target shows nothing.
        """
        call = "MemoryRegion.alias"
        if not isinstance(target, MemoryRegion):
            raise ArgumentTypeError(call, "target", target, "a MemoryRegion")
        region = cls(name, size, owner=owner)
        region._alias_offset = _address(offset, call, "offset", region._size)
        region._alias = target
        with _topology:
            known = target._aliases
            known.append(ref(region))
            if len(known) >= 16 and not len(known) & (len(known) - 1):  # now and then: at 16, 32, 64, ...
                target._aliases = [alias for alias in known if alias() is not None]
        return region

    @classmethod
    def _of_block(cls, name: str, block: RamBlock, owner: str | None, call: str) -> MemoryRegion:
        size = getattr(block, "used_length", None)
        if not isinstance(size, int):
            raise ArgumentTypeError(call, "block", block, "a RamBlock")
        region = cls(name, size, owner=owner)
        region._block = block
        region._terminates = True
        if getattr(block, "_show", None) is not None:
            block._show(region)
        return region

    # ---- what it is ----

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def owner(self) -> str | None:
        """What `info mtree -o` says of its owner, or None."""
        return self._owner

    @property
    def block(self) -> RamBlock | None:
        """The RamBlock of ram, rom and rom_device."""
        return self._block

    @property
    def ops(self) -> MemoryRegionOps:
        """Its callbacks; those of a region that has none refuse every access."""
        return self._ops

    @property
    def terminates(self) -> bool:
        """Whether it shows itself where no subregion does: all but containers and aliases."""
        return self._terminates

    @property
    def is_ram(self) -> bool:
        """Whether it is ram or rom."""
        return self._ram

    @property
    def is_rom_device(self) -> bool:
        """Whether it is a rom_device, whatever its mode."""
        return self._rom_device

    @property
    def kind(self) -> str:
        """As `info mtree` says it: "ram", "rom", "romd" or "i/o"; an alias is what its target is."""
        region = self
        while region._alias is not None:
            region = region._alias
        if region._rom_device and region._romd:
            return "romd"
        if region._ram:
            return "rom" if region._readonly else "ram"
        return "i/o"

    @property
    def target(self) -> MemoryRegion | None:
        """The region of which an alias shows a part; None where it is no alias."""
        return self._alias

    @property
    def parent(self) -> MemoryRegion | None:
        """The region in which it is, or None."""
        return self._container

    @property
    def subregions(self) -> tuple[MemoryRegion, ...]:
        """Its subregions: higher priorities first, of equal ones the last added first."""
        return tuple(self._subregions)

    @property
    def priority(self) -> int:
        """Its priority among the subregions of its container."""
        return self._priority

    # ---- the tree ----

    def add_subregion(self, offset: int, region: MemoryRegion, priority: int | None = None) -> None:
        """Puts `region` at `offset`: QEMU's memory_region_add_subregion, and with a priority ..._overlap.

        `priority`: -2**31 to 2**31 - 1, higher ones show first; None: 0, for who expects no overlap.
        ArgumentError: offset + the region's size is above 2**64 (it may be outside of this region, and shows nothing
        there); the region is in a container already; it is this one, or contains or shows it; this one is an alias.
        """
        call = "MemoryRegion.add_subregion"
        if not isinstance(region, MemoryRegion):
            raise ArgumentTypeError(call, "region", region, "a MemoryRegion")
        if priority is None:
            priority = 0
        priority = _int(priority, call, "priority", -(1 << 31), (1 << 31) - 1, "-2**31 to 2**31 - 1, or None")
        with _topology:
            offset = _address(offset, call, "offset", region._size)
            if self._alias is not None:
                raise ArgumentError(call, "self", self, "a region that is no alias", "an alias shows its target only")
            if region._container is not None:
                where = f"it is in {region._container!r} already, at {region._addr:#x}"
                raise ArgumentError(call, "region", region, "a region that is in no container", where)
            # What shows nothing but itself is no cycle.
            shows = region._subregions or region._alias is not None
            if region is self or (shows and region in seen_from((self,))):
                why = "it is the region itself" if region is self else f"it shows {self!r}, and so would show itself"
                accepted = "a region that does not contain this one, nor is it, also not by aliases"
                raise ArgumentError(call, "region", region, accepted, why)
            before = region._addr, region._priority
            region._addr, region._priority = offset, priority
            self._link(region)
            _topology._note(lambda: self._unlink(region, *before), self, region)

    def del_subregion(self, region: MemoryRegion) -> None:
        """Takes `region` out.  It can be put somewhere else then.  ArgumentError: it is not in this one."""
        call = "MemoryRegion.del_subregion"
        if not isinstance(region, MemoryRegion):
            raise ArgumentTypeError(call, "region", region, "a MemoryRegion")
        with _topology:
            if region._container is not self:
                raise ArgumentError(call, "region", region, f"one of the {len(self._subregions)} subregions")
            index = self._subregions.index(region)
            self._unlink(region, region._addr, region._priority)
            _topology._note(lambda: self._link(region, index), self, region)

    # Before the first one whose priority is not higher, or where it was.
    def _link(self, region: MemoryRegion, index: int | None = None) -> None:
        if index is None:
            index = bisect_left(self._subregions, -region._priority, key=lambda other: -other._priority)
        self._subregions.insert(index, region)
        region._container = self

    def _unlink(self, region: MemoryRegion, addr: int, priority: int) -> None:
        self._subregions.remove(region)
        region._container, region._addr, region._priority = None, addr, priority

    # ---- what can change ----

    # Of a setter: `slot` becomes `value`; seen where the region is, unless it is not enabled.
    def _set(self, slot: str, value: object) -> None:
        with _topology:
            old = getattr(self, slot)
            if old != value:
                setattr(self, slot, value)
                _topology._note(lambda: setattr(self, slot, old), self)

    @property
    def addr(self) -> int:
        """Its offset in its container.  Set: it moves there, and shows before others of its priority.

        ArgumentError: it is in no container; addr + size is above 2**64.
        """
        return self._addr

    @addr.setter
    def addr(self, addr: int) -> None:
        call = "MemoryRegion.addr"
        with _topology:
            addr = _address(addr, call, "addr", self._size)
            container = self._container
            if container is None:
                raise ArgumentError(call, "addr", addr, "only of a region that is in a container", f"{self!r} is not")
            if addr != self._addr:
                priority = self._priority
                container.del_subregion(self)
                container.add_subregion(addr, self, priority)

    @property
    def size(self) -> int:
        """Its size in bytes, 0 to 2**64.  That of all of a RamBlock changes with it, see `RamBlock.resize`.

        Set: ArgumentError: addr + size or, of an alias, alias_offset + size is above 2**64; more than its block has.
        """
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        call = "MemoryRegion.size"
        with _topology:
            size = _size(size, call)
            self._check_end(size, call, "size")
            if self._block is not None and size > self._block.used_length:
                longest = self._block.used_length
                raise ArgumentError(call, "size", size, f"0 to {longest:#x}, the used_length of its block")
            self._set("_size", size)

    def _check_end(self, size: int, call: str, field: str) -> None:
        start = max(self._addr if self._container is not None else 0, self._alias_offset)
        if start + size > ADDRESS_END:
            raise ArgumentError(call, field, size, f"0 to {ADDRESS_END - start:#x}: it begins at {start:#x}")

    @property
    def enabled(self) -> bool:
        """Whether it shows, with all that is in it; True from the start."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._set("_enabled", _flag(enabled, "MemoryRegion.enabled"))

    @property
    def readonly(self) -> bool:
        """Whether the guest may only read RAM in it; also of an alias or a container, for what shows through it."""
        return self._readonly

    @readonly.setter
    def readonly(self, readonly: bool) -> None:
        self._set("_readonly", _flag(readonly, "MemoryRegion.readonly"))

    @property
    def nonvolatile(self) -> bool:
        """Whether what shows in it is non-volatile, as an NVDIMM."""
        return self._nonvolatile

    @nonvolatile.setter
    def nonvolatile(self, nonvolatile: bool) -> None:
        self._set("_nonvolatile", _flag(nonvolatile, "MemoryRegion.nonvolatile"))

    @property
    def unmergeable(self) -> bool:
        """Whether what shows in it is kept apart from its neighbours, which may be parts of the same block."""
        return self._unmergeable

    @unmergeable.setter
    def unmergeable(self, unmergeable: bool) -> None:
        self._set("_unmergeable", _flag(unmergeable, "MemoryRegion.unmergeable"))

    @property
    def romd(self) -> bool:
        """Whether a rom_device is read as memory.  Set: ArgumentError where it is no rom_device."""
        return self._romd

    @romd.setter
    def romd(self, romd: bool) -> None:
        call = "MemoryRegion.romd"
        romd = _flag(romd, call)
        if not self._rom_device:
            raise ArgumentError(call, "romd", romd, "only of a rom_device", f"{self!r} is none")
        self._set("_romd", romd)

    @property
    def alias_offset(self) -> int:
        """Where in its target the part begins that an alias shows.

        Set: ArgumentError where it is no alias, or alias_offset + size is above 2**64.
        """
        return self._alias_offset

    @alias_offset.setter
    def alias_offset(self, offset: int) -> None:
        call = "MemoryRegion.alias_offset"
        with _topology:
            offset = _address(offset, call, "alias_offset", self._size)
            if self._alias is None:
                raise ArgumentError(call, "alias_offset", offset, "only of an alias", f"{self!r} is none")
            self._set("_alias_offset", offset)

    @property
    def dirty_log_mask(self) -> int:
        """Clients who want its writes logged: bits 1 << DIRTY_MEMORY_...; not 0 gives its memslots LOG_DIRTY_PAGES."""
        return self._dirty_log_mask

    @dirty_log_mask.setter
    def dirty_log_mask(self, mask: int) -> None:
        self._set("_dirty_log_mask", _int(mask, "MemoryRegion.dirty_log_mask", "mask", 0, 7, "0 to 7"))

    def set_log(self, log: bool, client: int = DIRTY_MEMORY_VGA) -> None:
        """Whether `client`, a DIRTY_MEMORY_..., wants the writes logged."""
        call = "MemoryRegion.set_log"
        if not isinstance(log, bool):
            raise ArgumentTypeError(call, "log", log, "True or False")
        client = _int(client, call, "client", 0, 2, "DIRTY_MEMORY_VGA, DIRTY_MEMORY_CODE or DIRTY_MEMORY_MIGRATION")
        with _topology:
            mask = self._dirty_log_mask & ~(1 << client) | log << client
            self._set("_dirty_log_mask", mask)

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be copied or pickled: it is a node of a tree")

    def __repr__(self) -> str:
        if self._alias is not None:
            what = f"alias of {self._alias._name}"
        else:
            what = self.kind if self._terminates else "container"
        text = f"<MemoryRegion {self._name} {what} size="
        text += "2**64" if self._size == ADDRESS_END else f"{self._size:#x}"
        if self._container is not None:
            text += f" addr={self._addr:#x}"
        if self._priority:
            text += f" priority={self._priority}"
        return text + ("" if self._enabled else " disabled") + ">"


def resize(block: RamBlock, regions: Iterable[MemoryRegion], used_length: int) -> None:
    """The part of `RamBlock.resize` that is a transaction: those of `regions` that show all of the block go on to.

    Those that show more than it has left are cut.

    Source: memory_region_set_size in qemu_ram_resize, softmmu/physmem.c@v7.2 of QEMU.
    """
    with _topology:
        before = block.used_length
        following = [region for region in regions if region._size == before or region._size > used_length]
        for region in following:
            region._check_end(used_length, "RamBlock.resize", "used_length")
        block._use(used_length)
        _topology._note(lambda: block._use(before), *following)
        for region in following:
            region.size = used_length


def seen_from(regions: Iterable[MemoryRegion]) -> set[MemoryRegion]:
    """`regions`, and all that show them: their containers, their aliases, the containers of these, and so on."""
    todo = list(regions)
    seen = set(todo)
    while todo:
        region = todo.pop()
        above = [alias for known in region._aliases if (alias := known()) is not None]
        if region._container is not None:
            above.append(region._container)
        for other in above:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen
