"""Changes of the memory topology: `transaction()` owns the lock around them, how deep they are nested, and what has
changed since the outermost one began.

    with transaction():                one lock, of the whole process, taken again by the same thread
        region.enabled = False         noted: the region, and how to take the change back
        with transaction():            nested: nothing is rendered at its end
            region.addr = 0x1000
    # the outermost end: address spaces that reach a noted region are rendered, and their listeners told, once

Source: memory_region_transaction_begin and _commit, softmmu/memory.c@v7.2 of QEMU.
"""

from __future__ import annotations

from _thread import RLock

from ..errors import BusyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from .region import MemoryRegion

    Update = Callable[[Iterable[MemoryRegion], Callable[[], None]], None]

__all__ = ["Transaction", "transaction"]


class Transaction:
    """What `transaction()` gives: a context manager, the same one for all.

    Threads: any; a thread waits while another is within one.
    """

    __slots__ = ("_changed", "_depth", "_lock", "_telling", "_undo", "_update")

    def __init__(self) -> None:
        self._lock = RLock()
        self._depth = 0
        self._telling = False  # whether listeners are being told
        self._changed: dict[MemoryRegion, None] = {}  # in the order of their changes
        self._undo: list[Callable[[], object]] = []
        self._update: Update | None = None  # of address_space, as long as it is not loaded there is no space

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._telling:
            self._lock.release()
            raise BusyError(
                "transaction", "the memory topology", "listeners are being told of a change; change it afterwards"
            )
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._depth -= 1
            if not self._depth:
                self._commit()
        finally:
            self._lock.release()

    # Of a setter, within a transaction: these regions show otherwise from now on, and `undo` takes that back.
    def _note(self, undo: Callable[[], object], *regions: MemoryRegion) -> None:
        for region in regions:
            self._changed[region] = None
        self._undo.append(undo)

    # Under the lock.  Where a listener refuses the change, `_update` has the whole transaction taken back, and raises.
    def _commit(self) -> None:
        changed, undo = self._changed, self._undo
        self._changed, self._undo = {}, []
        if not changed or self._update is None:
            return

        def take_back() -> None:
            for step in reversed(undo):
                step()

        self._telling = True
        try:
            self._update(changed, take_back)
        finally:
            self._telling = False


_the_one = Transaction()


def transaction() -> Transaction:
    """A context manager around changes of regions: what they change is rendered, and listeners are told, at the end of
    the outermost one; there too when its body raises, for what was changed until then stays changed.

    A single change outside of any is a transaction by itself.  Where a listener refuses (raises), every change since
    the outermost one began is taken back, those listeners that know of it are told the way back, and its exception
    comes out of the outermost end.  BusyError: in a listener, which must not change what it is being told.

    >>> from hvmodel.ram.region import MemoryRegion
    >>> system, rom = MemoryRegion.container("system", 1 << 64), MemoryRegion.io("flash", 0x1000)
    >>> with transaction():
    ...     system.add_subregion(0xFFFFF000, rom)
    ...     rom.readonly = True
    """
    return _the_one
