"""Views: memory that is handed out without copying; owns the record of what is out, and what keeps its mapping alive.

A view is a memoryview over a cffi buffer made for it alone.  Whatever is derived from it (slices, casts, numpy arrays)
keeps that buffer alive, and a weak reference to it tells when the last of them is gone.
"""

from __future__ import annotations

from _weakref import ref

from ..errors import BusyError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .access import Access

__all__ = ["Export", "ViewError", "Writable", "keep_alive"]


class ViewError(HvError, BufferError):
    """Memory cannot be handed out as a view, or cannot be taken away because a view of it is alive.

    Attributes: `call`, `owner` (its repr), `why`.
    """

    def __init__(self, call: str, owner: str, why: str) -> None:
        self.call, self.owner, self.why = call, owner, why
        super().__init__(f"{call}: {owner}: {why}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.owner, self.why)


class Export(ref):  # type: ignore[type-arg]
    """A view that is out: a weak reference to its buffer.  Compared by identity, for buffers compare by content."""

    __slots__ = ("offset", "size", "writable")
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    offset: int
    size: int
    writable: bool

    def overlaps(self, offset: int, end: int) -> bool:
        """Whether it is alive and has a byte of [offset, end)."""
        return self.offset < end and offset < self.offset + self.size and self() is not None


keep_alive: dict[Export, Access] = {}
"""What is handed out keeps its mapping alive, even when nobody else does.

An entry goes with the buffer: the callback of the weak reference is this dict's own `pop`, which no signal handler can
interrupt, as it could a Python function.
"""


class Writable:
    """What `Mapping.writable` returns: a context manager for one `with` at a time.

    Threads: one at a time.
    """

    __slots__ = ("_mapping", "_offset", "_size", "_view")

    def __init__(self, mapping: Access, offset: int, size: int) -> None:
        self._mapping, self._offset, self._size = mapping, offset, size
        self._view: memoryview | None = None

    def __enter__(self) -> memoryview:
        if self._view is not None:
            raise BusyError("Writable.__enter__", repr(self), "its `with` is still open")
        self._view = memoryview(self._mapping._export("writable", self._offset, self._size, True))
        return self._view

    def __exit__(self, *_: object) -> None:
        view, self._view = self._view, None
        if view is not None:
            try:  # noqa: SIM105
                view.release()
            except BufferError:
                pass  # something made from it lives on, and keeps the range open
            del view
        self._mapping._reap()

    def __repr__(self) -> str:
        return f"Writable({self._mapping!r}, offset={self._offset:#x}, size={self._size:#x})"
