"""Guest physical memory as a page walk sees it: pieces of buffers at guest physical addresses, read in place.

Nothing is copied: an entry is read from the buffer each time.  What is in no piece is what KVM finds no memslot for.
"""

from __future__ import annotations

from bisect import bisect_right

from ..arch.number import number
from ..errors import ArgumentError, ArgumentTypeError, ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Literal

    from typing_extensions import Buffer

    Code = Literal["Q", "I"]
    Piece = tuple[int, Buffer] | tuple[int, Buffer, bool]

__all__ = ["GuestMemory"]

_LAST = (1 << 52) - 1


class GuestMemory:
    """Guest physical memory: `pieces` of (gpa, buffer) or (gpa, buffer, writable), which do not overlap.

    A piece is writable where its buffer is, unless it says otherwise; in one that is not, walks leave A and D alone, as
    KVM does in a read-only memslot.  `write`: what stores there (gpa, bytes); default: into the buffer.

    ArgumentError: an empty buffer, pieces that overlap, addresses above 2**52-1.  ArgumentTypeError.
    Threads: as the buffers.

    Views of the buffers are held until close(), or until nobody has this any more.

    >>> memory = GuestMemory([(0x1000, bytes(0x1000))])
    >>> memory.entry(0x1ff8), memory.entry(0x2000), memory.is_writable(0x1ff8)
    (0, None, False)
    """

    __slots__ = ("__weakref__", "_closed", "_out", "_pieces", "_starts", "_write")

    def __init__(self, pieces: Iterable[Piece], *, write: Callable[[int, bytes], object] | None = None) -> None:
        call = "GuestMemory"
        found: list[tuple[int, int, memoryview, bool]] = []
        for piece in pieces:
            gpa, buffer, *rest = piece
            number(call, "gpa", gpa, _LAST)
            view = _bytes(call, buffer)
            if not view.nbytes or gpa + view.nbytes > _LAST + 1:
                raise ArgumentError(call, "pieces", (gpa, view.nbytes), "at least one byte, all below 2**52")
            found.append((gpa, gpa + view.nbytes, view, bool(rest[0]) if rest else not view.readonly))
        found.sort(key=lambda piece: piece[0])
        end = 0
        for start, stop, _, _ in found:
            if start < end:
                raise ArgumentError(call, "pieces", (start, stop), "pieces that do not overlap")
            end = stop
        self._pieces = found
        self._starts = [piece[0] for piece in found]
        self._write = write
        self._closed = False
        self._out: list[dict[int, memoryview | None]] = []  # where compiled walks keep tables

    @classmethod
    def of(cls, call: str, memory: object) -> GuestMemory:
        """A GuestMemory as it is, an image (bytes, bytearray, memoryview, mmap) at gpa 0, or pieces."""
        if isinstance(memory, cls):
            return memory
        if isinstance(memory, (bytes, bytearray, memoryview)) or not hasattr(memory, "__iter__"):
            return cls([(0, _bytes(call, memory))])
        from itertools import chain  # an mmap iterates over its bytes

        pieces = iter(memory)
        first = next(pieces, None)
        if isinstance(first, tuple):
            return cls(chain([first], pieces))
        return cls([(0, _bytes(call, memory))])

    def close(self) -> None:
        """Let go of all views; what walks here raises ClosedError then.  May be called again."""
        self._closed = True
        for tables in self._out:
            for view in tables.values():
                if view is not None:
                    view.release()
            tables.clear()
        for _, _, view, _ in self._pieces:
            view.release()
        self._pieces.clear()
        self._starts.clear()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def check_open(self, call: str) -> None:
        """ClosedError where it is closed."""
        if self._closed:
            raise ClosedError(call, repr(self))

    def pieces(self) -> list[tuple[int, int, bool]]:
        """(gpa, size, writable) of each piece, in the order of the addresses."""
        return [(start, end - start, writable) for start, end, _, writable in self._pieces]

    def view(self, at: int) -> tuple[int, memoryview] | None:
        """The piece that holds the byte at `at`: its gpa and its bytes; None where there is none."""
        place = bisect_right(self._starts, at) - 1
        if place < 0 or at >= self._pieces[place][1]:
            self.check_open("GuestMemory.view")
            return None
        return self._pieces[place][0], self._pieces[place][2]

    def table(self, gpa: int, size: int, code: Code) -> memoryview | None:
        """`size` bytes at `gpa` as items of the format `code` ("Q", "I"), in place; None: not all in one piece."""
        found = self.view(gpa)
        if found is None or gpa - found[0] + size > found[1].nbytes:
            return None
        return found[1][gpa - found[0] : gpa - found[0] + size].cast(code)

    def entry(self, gpa: int, size: int = 8) -> int | None:
        """The page table entry of `size` bytes (4 or 8) at `gpa`; None where not all of it is in one piece."""
        found = self.view(gpa)
        if found is None:
            return None
        data = found[1][gpa - found[0] : gpa - found[0] + size]
        return int.from_bytes(data, "little") if len(data) == size else None

    def is_writable(self, gpa: int) -> bool:
        """Whether the byte at `gpa` is in a piece that may be written."""
        place = bisect_right(self._starts, gpa) - 1
        return place >= 0 and gpa < self._pieces[place][1] and self._pieces[place][3]

    def store(self, gpa: int, value: int, size: int = 8) -> bool:
        """Write an entry; False, and nothing done, where the piece may not be written."""
        if not self.is_writable(gpa):
            return False
        data = value.to_bytes(size, "little")
        if self._write is not None:
            self._write(gpa, data)
            return True
        found = self.view(gpa)
        assert found is not None
        found[1][gpa - found[0] : gpa - found[0] + size] = data
        return True

    def keep(self, tables: dict[int, memoryview | None]) -> None:
        """Release the views in this dict too, when this is closed."""
        self._out.append(tables)

    def __repr__(self) -> str:
        if self._closed:
            return "<GuestMemory closed>"
        held = ", ".join(f"[{start:#x}, {end:#x})" for start, end, _, _ in self._pieces)
        return f"<GuestMemory {held}>"


def _bytes(call: str, buffer: object) -> memoryview:
    try:
        return memoryview(buffer).cast("B")  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        raise ArgumentTypeError(call, "memory", buffer, "an image, (gpa, buffer) pieces or a GuestMemory") from None
