"""The terminal: bytes to descriptors, and tables.

On a terminal a table is drawn; into a pipe go plain aligned columns, a header line first, for grep and awk.
"""

from __future__ import annotations

import errno
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["STDERR", "STDOUT", "OutputError", "ReaderGoneError", "line", "say", "table", "write"]

STDOUT, STDERR = 1, 2


class ReaderGoneError(Exception):
    """Whoever read the output has gone (EPIPE)."""


class OutputError(Exception):
    """The output cannot be written, for the reason in the text."""


def write(fd: int, data: bytes | bytearray) -> None:
    """Write all of `data` to descriptor `fd`, unbuffered.

    ReaderGoneError: EPIPE.  OutputError: any other refusal, such as a full disk.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select([], [fd], [])  # somebody made the terminal non-blocking
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise ReaderGoneError from None
            raise OutputError(f"cannot write to descriptor {fd}: {error.strerror}") from None


def line(text: str) -> None:
    """Write `text` and a newline to stdout."""
    write(STDOUT, (text + "\n").encode(errors="replace"))


def say(text: str) -> None:
    """Write "hvmodel: " and `text`, as one line, to stderr; nothing where stderr takes none."""
    try:
        write(STDERR, f"hvmodel: {' '.join(text.split())}\n".encode(errors="replace"))
    except (OutputError, ReaderGoneError):
        return  # there is nobody to tell


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under these columns: drawn on a terminal, plain elsewhere.  An empty cell is "-" in plain columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    if os.isatty(STDOUT):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(*columns)
        for row in cells:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    plain = [list(columns), *([cell or "-" for cell in row] for row in cells)]
    widths = [max(len(row[at]) for row in plain) for at in range(len(columns) - 1)]
    for row in plain:
        line("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
