"""Guest physical memory as a page walk sees it: pieces of buffers at guest physical addresses, read in place.

Nothing is copied: an entry is read from the buffer each time.  What is in no piece is what KVM finds no memslot for.
"""

from __future__ import annotations

from _bisect import bisect_right
from _weakref import ref

from ..arch.number import number
from ..errors import ArgumentError, ArgumentTypeError, ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Literal

    from typing_extensions import Buffer

    Code = Literal["Q", "I"]
    Piece = tuple[int, Buffer] | tuple[int, Buffer, bool]

__all__ = ["GuestMemory", "Tables"]

_LAST = (1 << 52) - 1


class GuestMemory:
    """Guest physical memory: `pieces` of (gpa, buffer) or (gpa, buffer, writable), which do not overlap.

    A piece is writable where its buffer is, unless it says otherwise; in one that is not, walks leave A and D alone, as
    KVM does in a read-only memslot.  `write`: what stores there (gpa, bytes); default: into the buffer.

    ArgumentError: an empty buffer, pieces that overlap, addresses above 2**52-1, a writable piece of a read-only buffer
    without `write`.  ArgumentTypeError.
    Threads: as the buffers; close() in any.

    Views of the buffers are held until close(), or until nobody has this any more.

    >>> memory = GuestMemory([(0x1000, bytes(0x1000))])
    >>> memory.entry(0x1ff8), memory.entry(0x2000), memory.is_writable(0x1ff8)
    (0, None, False)
    """

    __slots__ = ("__weakref__", "_closed", "_held", "_out", "_why", "_write")

    def __init__(self, pieces: Iterable[Piece], *, write: Callable[[int, bytes], object] | None = None) -> None:
        call = "GuestMemory"
        found: list[tuple[int, int, memoryview, bool]] = []
        if not hasattr(pieces, "__iter__"):
            raise ArgumentTypeError(call, "pieces", pieces, "pieces, each (gpa, buffer) or (gpa, buffer, writable)")
        given: Iterable[object] = pieces
        for piece in given:
            if not isinstance(piece, tuple) or len(piece) not in (2, 3):
                raise ArgumentTypeError(call, "pieces", piece, "(gpa, buffer) or (gpa, buffer, writable)")
            gpa = number(call, "gpa", piece[0], _LAST)
            view = _bytes(call, piece[1])
            if not view.nbytes or gpa + view.nbytes > _LAST + 1:
                raise ArgumentError(call, "pieces", (gpa, view.nbytes), "at least one byte, all below 2**52")
            writable = bool(piece[2]) if len(piece) == 3 else not view.readonly
            if writable and view.readonly and write is None:
                accepted = "writable only where the buffer is, or with `write`"
                raise ArgumentError(call, "pieces", (gpa, view.nbytes, True), accepted, "its buffer is read-only")
            found.append((gpa, gpa + view.nbytes, view, writable))
        found.sort(key=lambda piece: piece[:2])
        end = 0
        for start, stop, _, _ in found:
            if start < end:
                raise ArgumentError(call, "pieces", (start, stop), "pieces that do not overlap")
            end = stop
        self._held = [piece[0] for piece in found], found  # together: another thread may close this
        self._write = write
        self._closed, self._why = False, ""
        self._out: set[ref[Tables]] = set()  # of the compiled walks that there are

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

    def close(self, why: str = "") -> None:
        """Let go of all views; what walks here raises ClosedError then.  May be called again.

        `why`: what the errors say besides.  A walk_many that is under way in another thread has its views to its end.
        """
        if not self._closed:
            self._closed, self._why = True, why
        for known in list(self._out):
            if (tables := known()) is not None:
                tables.release()
        (_, pieces), self._held = self._held, ([], [])
        for _, _, view, _ in pieces:
            _release(view)

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
        return [(start, end - start, writable) for start, end, _, writable in self._held[1]]

    def view(self, at: int) -> tuple[int, memoryview] | None:
        """The piece that holds the byte at `at`: its gpa and its bytes; None where there is none."""
        piece = self._piece(at)
        if piece is None:
            self.check_open("GuestMemory.view")
            return None
        return piece[0], piece[2]

    def _piece(self, at: int) -> tuple[int, int, memoryview, bool] | None:
        starts, pieces = self._held
        place = bisect_right(starts, at) - 1
        return pieces[place] if place >= 0 and at < pieces[place][1] else None

    def table(self, gpa: int, size: int, code: Code) -> memoryview | None:
        """`size` bytes at `gpa` as items of the format `code` ("Q", "I"), in place; None: not all in one piece."""
        found = self.view(gpa)
        if found is None or gpa - found[0] + size > found[1].nbytes:
            return None
        try:
            return found[1][gpa - found[0] : gpa - found[0] + size].cast(code)
        except ValueError:
            self.check_open("GuestMemory.table")  # meanwhile
            raise

    def entry(self, gpa: int, size: int = 8) -> int | None:
        """The page table entry of `size` bytes (4 or 8) at `gpa`; None where not all of it is in one piece."""
        found = self.view(gpa)
        if found is None:
            return None
        try:
            data = bytes(found[1][gpa - found[0] : gpa - found[0] + size])
        except ValueError:
            self.check_open("GuestMemory.entry")  # meanwhile
            raise
        return int.from_bytes(data, "little") if len(data) == size else None

    def is_writable(self, gpa: int) -> bool:
        """Whether the byte at `gpa` is in a piece that may be written."""
        piece = self._piece(gpa)
        if piece is None:
            self.check_open("GuestMemory.is_writable")
            return False
        return piece[3]

    def store(self, gpa: int, value: int, size: int = 8) -> bool:
        """Write an entry; False, and nothing done, where not all of it is in one piece that may be written."""
        number("GuestMemory.store", "value", value, (1 << 8 * size) - 1)
        piece = self._piece(gpa)
        if piece is None:
            self.check_open("GuestMemory.store")
            return False
        start, end, view, writable = piece
        if not writable or gpa + size > end:
            return False
        data = value.to_bytes(size, "little")
        if self._write is not None:
            self._write(gpa, data)
        else:
            view[gpa - start : gpa - start + size] = data
        return True

    def exchange(self, gpa: int, old: int, new: int, size: int = 8) -> bool:
        """Make an entry that is `old` `new`; False, and nothing done, where it is another one by now.

        What may not be written stays as it is, and that is True.  Not atomic: what a running vCPU writes into the entry
        between the look and the write is lost.
        """
        if not self.is_writable(gpa):
            return True
        return self.entry(gpa, size) == old and self.store(gpa, new, size)

    def keep(self, tables: Tables) -> None:
        """Release these too, when this is closed; they are not kept alive."""
        self._out.add(ref(tables, self._out.discard))

    def __repr__(self) -> str:
        if self._closed:
            return f"<GuestMemory closed: {self._why}>" if self._why else "<GuestMemory closed>"
        held = ", ".join(f"[{start:#x}, {end:#x})" for start, end, _, _ in self._held[1])
        return f"<GuestMemory {held}>"


class Tables:
    """What a compiled walk knows of its memory: by level, the table that an entry's value leads to, or None.

    `level`: of the root table, which `root` is a view of, if there is one.  Entries of level 1 lead to no table.
    """

    __slots__ = ("__weakref__", "levels", "root")

    def __init__(self, level: int, root: memoryview | None) -> None:
        self.levels: dict[int, dict[int, memoryview | None]] = {at: {} for at in range(level, 1, -1)}
        self.root = root

    def release(self) -> None:
        """Let go of them all."""
        for known in self.levels.values():
            for view in list(known.values()):
                if view is not None:
                    _release(view)
            known.clear()
        if self.root is not None:
            _release(self.root)


def _release(view: memoryview) -> None:
    try:  # noqa: SIM105 (not worth importing contextlib)
        view.release()
    except BufferError:
        pass  # an array is made from it; it goes with that


def _bytes(call: str, buffer: object) -> memoryview:
    try:
        return memoryview(buffer).cast("B")  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        raise ArgumentTypeError(call, "memory", buffer, "an image, (gpa, buffer) pieces or a GuestMemory") from None
