"""Address spaces: `AddressSpace`, what a CPU or a device sees of a tree of regions, and who is told when that changes.

Owns the list of all spaces of the process and what happens at the end of a transaction:

    begin                      to the listeners of the spaces that are rendered again, by priority
    region_del, log_stop       space by space: ranges that went, from the last listener to the first
    region_add, region_nop,    then those that came or stayed, from the first to the last
    log_start
    commit                     to all of them, when every space has its new view

Only spaces that reach a changed region are rendered, and told; QEMU renders all.  Spaces with the same
`flatview_root` share one view, as in QEMU.

Source: memory_region_transaction_commit, address_space_set_flatview, address_space_update_topology_pass,
memory_listener_register, softmmu/memory.c@v7.2 of QEMU.
"""

from __future__ import annotations

from _weakref import ref
from itertools import count

from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError
from . import dispatch
from .flatview import FlatView, flatview_root, render
from .listener import MemoryListener, MemoryRegionSection
from .region import MemoryRegion, seen_from
from .topology import _the_one as _topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from typing_extensions import Buffer

    from .flatview import FlatRange, Row

__all__ = ["AddressSpace", "address_spaces"]

_EMPTY = FlatView(None, [])

_serial = count()
_spaces: dict[int, ref[AddressSpace]] = {}  # in the order in which they were made
_joined = count()  # orders listeners of equal priority


def address_spaces() -> tuple[AddressSpace, ...]:
    """All open address spaces of this process, in the order in which they were made."""
    return tuple([space for space in [known() for known in list(_spaces.values())] if space is not None])


class AddressSpace:
    """A space of 2**64 addresses that shows the region `root`; `name` is any text ("memory", "I/O").

    The view is there at once, and changes at the end of transactions; BusyError: made within one that has changed
    regions, for it would show what may be taken back.  The space has its root; nobody has the space
    but its maker: one that is forgotten is gone, without telling its listeners.  Close it to tell them.

    `read`, `write`, `load` and `store` are accesses of a guest's CPU or device; see hvmodel.ram.dispatch.

    Threads: any.  An access uses the view that was there when it began.

    >>> from hvmodel.ram.region import MemoryRegionOps
    >>> regs = MemoryRegion.io("scratch", 8, MemoryRegionOps(read=lambda addr, size: addr))
    >>> with AddressSpace(MemoryRegion.container("system", 1 << 64), "memory") as memory:
    ...     memory.root.add_subregion(0x1000, regs)
    ...     memory.flatview.at(0x1003).region.name, memory.load(0x1004, 4), memory.load(0x2000, 1)
    ('scratch', (4, 0), (0, 2))
    """

    __slots__ = ("__weakref__", "_closed", "_listeners", "_name", "_root", "_sections", "_serial", "_view")

    def __init__(self, root: MemoryRegion, name: str) -> None:
        if not isinstance(root, MemoryRegion):
            raise ArgumentTypeError("AddressSpace", "root", root, "a MemoryRegion")
        if not isinstance(name, str):
            raise ArgumentTypeError("AddressSpace", "name", name, "text")
        self._closed = False
        self._root, self._name = root, name
        self._view: FlatView
        self._listeners: list[tuple[int, int, MemoryListener]] = []  # by priority, then by when they joined
        self._sections: dict[int, MemoryRegionSection] = {}  # of ranges that stay, by their start
        with _topology._lock:
            if _topology._changed:
                why = "regions have been changed in it, and the change may be refused; make the space before or after"
                raise BusyError("AddressSpace", "the transaction", why)
            self._view = _view_of(root, {space._view.root: space._view for space in address_spaces()})
            self._serial = next(_serial)
            _spaces[self._serial] = ref(self, _Forget(self._serial))

    @property
    def root(self) -> MemoryRegion:
        """The region it shows."""
        return self._root

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def flatview(self) -> FlatView:
        """The ranges as they are now; within a transaction, and in a listener but for `commit`, as they were before.

        Raises ClosedError.
        """
        if self._closed:
            raise ClosedError("AddressSpace.flatview", repr(self))
        return self._view

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def listeners(self) -> tuple[MemoryListener, ...]:
        """Who is told of changes, lower priorities first, of equal ones the first that joined first."""
        return tuple([listener for _, _, listener in self._listeners])

    # ---- listeners ----

    def add_listener(self, listener: MemoryListener) -> None:
        """Tells `listener` of every change from now on, and at once of all that is there.

        Calls: begin, region_add of every range, log_start of those that are logged, commit.  What they raise comes
        out of here, and the listener has not joined.  ArgumentError: it has joined, this space or another one.
        BusyError: within a listener.
        """
        call = "AddressSpace.add_listener"
        if not isinstance(listener, MemoryListener):
            raise ArgumentTypeError(call, "listener", listener, "a MemoryListener")
        with _topology:
            self._check_open(call)
            for space in address_spaces():
                if listener in [*space.listeners]:
                    raise ArgumentError(call, "listener", listener, "one that has joined no space", f"it is in {space}")
            _tell_all(self, listener, adding=True)
            self._listeners.append((listener.priority, next(_joined), listener))
            self._listeners.sort(key=lambda entry: entry[:2])

    def remove_listener(self, listener: MemoryListener) -> None:
        """Tells `listener` that all goes away, and of nothing from then on.

        Calls: begin, log_stop and region_del of every range, commit.  Where one raises, it stays in.
        ArgumentError: it is not in this space.
        """
        call = "AddressSpace.remove_listener"
        with _topology:
            self._check_open(call)
            found = [entry for entry in self._listeners if entry[2] is listener]
            if not found:
                raise ArgumentError(call, "listener", listener, f"one of {len(self._listeners)} that have joined")
            _tell_all(self, listener, adding=False)
            self._listeners.remove(found[0])

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise ClosedError(call, repr(self))

    # ---- accesses ----

    def at(self, addr: int) -> FlatRange | None:
        """The range that has `addr`, or None; see `FlatView.at`."""
        return self.flatview.at(addr)

    def load(self, addr: int, size: int) -> tuple[int, int]:
        """Reads `size` bytes, 1 to 8, little-endian: the value and a MEMTX_ result; see `dispatch.load`."""
        return dispatch.load(self.flatview, addr, size)

    def store(self, addr: int, value: int, size: int) -> int:
        """Writes the low `size` bytes, 1 to 8, of `value`, little-endian: a MEMTX_ result; see `dispatch.store`."""
        return dispatch.store(self.flatview, addr, value, size)

    def try_read(self, addr: int, size: int) -> tuple[bytes, int]:
        """Reads [addr, addr + size): the bytes and a MEMTX_ result; see `dispatch.read`."""
        return dispatch.read(self.flatview, addr, size)

    def try_write(self, addr: int, data: Buffer) -> int:
        """Writes `data` at `addr`: a MEMTX_ result; see `dispatch.write`."""
        return dispatch.write(self.flatview, addr, data)

    def read(self, addr: int, size: int) -> bytes:
        """As `try_read`; MemTxError where the result is not MEMTX_OK."""
        data, result = dispatch.read(self.flatview, addr, size)
        if result:
            raise dispatch.MemTxError("AddressSpace.read", addr, size, result)
        return data

    def write(self, addr: int, data: Buffer) -> None:
        """As `try_write`; MemTxError where the result is not MEMTX_OK: then what could be written was."""
        result = dispatch.write(self.flatview, addr, data)
        if result:
            raise dispatch.MemTxError("AddressSpace.write", addr, memoryview(data).nbytes, result)

    def write_rom(self, addr: int, data: Buffer) -> None:
        """Writes `data` at `addr` into RAM and ROM, as a loader does; what is neither is left out.

        Source: address_space_write_rom, softmmu/physmem.c@v7.2 of QEMU.
        """
        dispatch.write_rom(self.flatview, addr, data)

    # ---- life ----

    def close(self) -> None:
        """Removes the listeners, as `remove_listener` does, and lets go of the view.  May be called again.

        Raises what a listener raises; that one and those after it stay in then, and the space open.
        """
        if self._closed:
            return
        with _topology:
            for listener in self.listeners:
                self.remove_listener(listener)
            self._closed = True
            self._view = _EMPTY
            _spaces.pop(self._serial, None)

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be copied or pickled: it is one of this process")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return f"<AddressSpace {self._name} closed>"
        return f"<AddressSpace {self._name}: {self._root._name}, {len(self._view)} ranges>"


class _Forget:
    # Of a space that was forgotten: a weak reference's callback that holds nothing of it.
    __slots__ = ("_serial",)

    def __init__(self, serial: int) -> None:
        self._serial = serial

    def __call__(self, _: object) -> None:
        _spaces.pop(self._serial, None)


def _view_of(root: MemoryRegion, known: dict[MemoryRegion | None, FlatView]) -> FlatView:
    # The view for a space with this root, one of the `known` if it may be, and known from then on.
    region = flatview_root(root)
    if region is None:
        return _EMPTY
    view = known.get(region)
    if view is None:
        view = known[region] = render(region)
    return view


# ---- what is told ----


def _section(space: AddressSpace, row: Row) -> MemoryRegionSection:
    start, size, region, offset, readonly, romd, nonvolatile, unmergeable, _ = row
    return MemoryRegionSection(space, region, offset, start, size, readonly, romd, nonvolatile, unmergeable)


def _tell_all(space: AddressSpace, listener: MemoryListener, adding: bool) -> None:
    # A new listener of all that is there, or one that leaves of the same.
    _topology._telling = True
    try:
        listener.begin()
        for row in space._view._rows:
            section, mask = _section(space, row), row[8]
            if adding:
                listener.region_add(section)
                if mask:
                    listener.log_start(section, 0, mask)
            else:
                if mask:
                    listener.log_stop(section, mask, 0)
                listener.region_del(section)
        listener.commit()
    finally:
        _topology._telling = False


class _Telling:
    # One transaction's news: who was told what, so that a refusal can be followed by the way back.

    def __init__(self) -> None:
        self.begun: list[MemoryListener] = []
        self.committed: list[MemoryListener] = []
        self.told: list[tuple[MemoryListener, str, MemoryRegionSection, int, int]] = []
        self.current: MemoryListener | None = None  # the one at whose call we are

    def begin(self, listeners: list[MemoryListener]) -> None:
        for listener in listeners:
            self.current = listener
            self.begun.append(listener)
            listener.begin()
        self.current = None

    def commit(self, listeners: list[MemoryListener]) -> None:
        for listener in listeners:
            self.current = listener
            listener.commit()
            self.committed.append(listener)
        self.current = None

    # The order is QEMU's: a first pass over both views for what goes, a second one for what comes or stays.
    def space(self, space: AddressSpace, new: FlatView) -> None:
        forward = [listener for _, _, listener in space._listeners]
        backward = forward[::-1]
        nop = [one for one in forward if type(one).region_nop is not MemoryListener.region_nop]
        gone, rest = _difference(space._view._rows, new._rows, bool(nop))
        kept = space._sections
        for row in gone:
            kept.pop(row[0], None)
            self.region(backward, "region_del", _section(space, row))
        for row, old in rest:
            if old is None:
                self.region(forward, "region_add", _section(space, row))
                continue
            section = kept.get(row[0])
            if section is None:
                section = kept[row[0]] = _section(space, row)
            for listener in nop:
                self.current = listener
                listener.region_nop(section)
            self.current = None
            before, after = old[8], row[8]
            if after & ~before:
                self.log(forward, "log_start", section, before, after)
            if before & ~after:
                self.log(backward, "log_stop", section, before, after)

    def region(self, listeners: list[MemoryListener], what: str, section: MemoryRegionSection) -> None:
        for listener in listeners:
            self.current = listener
            getattr(listener, what)(section)
            self.told.append((listener, what, section, 0, 0))
        self.current = None

    def log(self, listeners: list[MemoryListener], what: str, section: MemoryRegionSection, old: int, new: int) -> None:
        for listener in listeners:
            self.current = listener
            getattr(listener, what)(section, old, new)
            self.told.append((listener, what, section, old, new))
        self.current = None

    # All but the one that refused are told the opposite of what they were told, the last first; those that were not yet
    # told of a commit go on from where they are.  What they raise then is added to `error` as a note.
    def take_back(self, error: BaseException) -> None:
        refused = self.current
        back = [listener for listener in self.begun if listener is not refused]

        def call(listener: MemoryListener, what: str, *arguments: object) -> None:
            try:
                getattr(listener, what)(*arguments)
            except Exception as more:  # noqa: BLE001  # the others are to be told all the same
                error.add_note(f"and {listener!r}.{what}, told of the way back, raised {type(more).__name__}: {more}")

        for listener in self.committed:
            call(listener, "begin")
        for listener, what, section, old, new in reversed(self.told):
            if listener is refused:
                continue
            if what == "region_add":
                call(listener, "region_del", section)
            elif what == "region_del":
                call(listener, "region_add", section)
            elif what == "log_start":
                call(listener, "log_stop", section, new, old)
            else:
                call(listener, "log_start", section, new, old)
        for listener in back:
            call(listener, "commit")


def _difference(old: list[Row], new: list[Row], nop: bool) -> tuple[list[Row], list[tuple[Row, Row | None]]]:
    # The rows that went; and those that came (with None) or stayed (with the old one), these only where somebody is
    # to hear of them: `nop`, or who logs them has changed.  Rows are equal but for the last, dirty_log_mask.
    gone: list[Row] = []
    rest: list[tuple[Row, Row | None]] = []
    i = j = 0
    nr_old, nr_new = len(old), len(new)
    while i < nr_old and j < nr_new:
        was, now = old[i], new[j]
        if was == now:
            if nop:
                rest.append((now, was))
            i += 1
            j += 1
        elif was[0] > now[0]:
            rest.append((now, None))
            j += 1
        elif was[:8] == now[:8]:
            rest.append((now, was))
            i += 1
            j += 1
        else:
            gone.append(was)
            i += 1
    gone += old[i:]
    rest += [(row, None) for row in new[j:]]
    return gone, rest


def _update(changed: Iterable[MemoryRegion], take_back: Callable[[], None]) -> None:
    # The end of a transaction; under its lock.  An exception leaves regions (by `take_back`) and views as they were.
    spaces = address_spaces()
    if not spaces:
        return
    telling, before = _Telling(), [(space, space._view) for space in spaces]
    try:
        news = _render_again(spaces, seen_from(changed))
        told = sorted([entry for space, _ in news for entry in space._listeners], key=lambda entry: entry[:2])
        listeners = [listener for _, _, listener in told]
        telling.begin(listeners)
        for space, view in news:
            if space._listeners:
                telling.space(space, view)
            else:
                space._sections.clear()
            space._view = view
        telling.commit(listeners)
    except BaseException as error:
        take_back()
        for space, view in before:
            space._view = view
            space._sections.clear()
        telling.take_back(error)
        raise


def _render_again(spaces: Iterable[AddressSpace], reached: set[MemoryRegion]) -> list[tuple[AddressSpace, FlatView]]:
    # The spaces that get a new view, and that.
    known: dict[MemoryRegion | None, FlatView] = {}
    touched: list[AddressSpace] = []
    for space in spaces:
        if space._root in reached:
            touched.append(space)
            # Where only what leads to its flatview_root has changed, the view may be used again.
            if space._view.root not in reached:
                known.setdefault(space._view.root, space._view)
        else:
            known[space._view.root] = space._view
    news = [(space, _view_of(space._root, known)) for space in touched]
    return [(space, view) for space, view in news if view is not space._view]


_topology._update = _update
