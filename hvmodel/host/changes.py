"""Changes: who takes access away from a range of a mapping, and how nobody's pointer is there then.

    begin   wait for one's turn; bar the range, so that no view and no memcpy begins there
            wait for the memcpy that is under way in another thread
            look at the views: one in the range, and nothing happens
    ...     mprotect, madvise, ioctl
    end     what can be touched is known afresh

Owns the bars (`Bar`) and the turns (`Change`).
"""

from __future__ import annotations

from _weakref import ref
from time import monotonic, sleep

from ..errors import BusyError, ClosedError
from .views import ViewError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .access import Access
    from .views import Export

__all__ = ["PATIENCE", "Bar", "Change"]

PATIENCE = 30
"""Seconds that one waits for another thread, before BusyError."""


class Bar:
    """What keeps pointers off [offset, end) of a mapping, and why: the answer to `Mapping._forbid`."""

    __slots__ = ("__weakref__", "end", "offset", "why")
    signals = False
    """Whether a guest's touch is SIGBUS for the thread of its vCPU, so that no memslot may have the mapping."""

    def __init__(self, offset: int, end: int, why: str) -> None:
        self.offset, self.end, self.why = offset, end, why


class Change:
    """One at a time changes what can be touched: `with` waits for its turn, bars the range, and settles at the end.

    `needs` says which of the range's views stand in the way (None: all); a `size` of 0 bars nothing.  `call` is the
    name that errors use: BusyError, ClosedError, ViewError, of which none leaves anything behind.
    """

    # A turn is a place in a dict of weak references, of which the first has it.  A bar that dies takes its place out
    # without any Python code, which Ctrl-C could keep from running.
    __slots__ = ("_bar", "_call", "_mapping", "_needs", "_place")

    def __init__(
        self,
        mapping: Access,
        call: str,
        offset: int,
        size: int,
        why: str,
        needs: Callable[[Export], bool] | None = None,
    ) -> None:
        self._mapping, self._call, self._needs = mapping, call, needs
        self._bar: Bar | None = Bar(offset, offset + size, why)
        self._place: ref[Bar] | None = None

    def begin(self, patience: float) -> bool:
        """Waits for the turn, at most `patience` seconds; whether it came.  For who needs no bar."""
        changes = self._mapping._changes
        assert self._bar is not None
        self._place = ref(self._bar, changes.pop)
        changes[self._place] = None
        until = None
        while list(changes)[0] is not self._place:  # noqa: RUF015  # the list is made at once, an iterator is not
            until = monotonic() + patience if until is None else until
            if monotonic() >= until:
                self._leave()
                return False
            sleep(0.001)
        return True

    def end(self) -> None:
        """Settles what can be touched now, and lets the next one begin."""
        self._mapping._settle()
        self._leave()

    def _leave(self) -> None:
        # Nobody else pops: another thread may hold the place, whose callback would find nothing then.
        self._place = self._bar = None

    def __enter__(self) -> None:
        mapping, bar = self._mapping, self._bar
        assert bar is not None
        try:
            if not self.begin(PATIENCE):
                raise BusyError(self._call, repr(mapping), "another thread is changing it, and does not come to an end")
            if mapping._base is None:
                raise ClosedError(self._call, mapping._owner)
            if bar.offset == bar.end:
                return
            mapping._direct = 0
            mapping._quiesce(self._call)
            nr_views = sum(
                export.overlaps(bar.offset, bar.end) and (self._needs is None or self._needs(export))
                for export in mapping._exports[:]
            )
            if nr_views:
                why = f"{nr_views} views of the range are alive (or arrays made from them)"
                raise ViewError(self._call, repr(mapping), why)
        except BaseException:
            if self._place is not None:
                self.end()
            del bar
            raise

    def __exit__(self, *_: object) -> None:
        self.end()
