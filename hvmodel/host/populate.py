"""Populating: giving pages their memory before they are touched, in pieces, by one thread or several.

A piece is 32 MiB: small enough for Ctrl-C and for a progress bar, large enough for the system call to cost nothing.
Threads take the next piece when they are done with one, so that none waits for a slow one.

What is checked before the first piece: how much memory the range lacks, against hvmodel.host.limits.

    private, written    every page that is not already a copy of its own (/proc/self/pagemap)
    a file of memory    every page that the file does not have yet (mincore), for a private mapping as well: the
                        kernel gives the file its page, and then copies it
    besides             a page table of 4 KiB for every 2 MiB
    none                a private mapping of nothing that is read (one page of zeros serves all); a file on a disk,
                        whose pages can be dropped again; huge pages, which come from a pool: without a free one the
                        kernel answers EFAULT and kills nobody

Source: madvise_populate, mm/madvise.c@v6.18; do_touch_pages, util/oslib-posix.c@v7.2 of QEMU.
"""

from __future__ import annotations

import errno
from _queue import SimpleQueue

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError, HostError
from ..units import PAGE_SIZE, MiB
from .limits import limits
from .memfd import index
from .pieces import within

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator, Iterator

    from .mapping import Mapping

__all__ = ["MAX_THREADS", "PIECE", "populate"]

PIECE = 32 * MiB
MAX_THREADS = 256

_REFUSED = {
    errno.EFAULT: "a page cannot be had: it lies past the end of the file, is guarded, or no huge page is left",
    errno.ENOMEM: "the host or the cgroup has no memory left",
    errno.EINVAL: "this kernel does not have it: it came with Linux 5.14",
    133: "a page's memory is broken",  # EHWPOISON, which errno does not have
}


def populate(
    mapping: Mapping,
    call: str,
    offset: int,
    size: int,
    write: bool,
    threads: int,
    progress: Callable[[int, int], object] | None,
    piece: int | None = None,
) -> None:
    """What `Mapping.populate` does, whose range was checked; the caller keeps the mapping from being closed."""
    nr_threads = index(threads, call, "threads")
    if not 1 <= nr_threads <= MAX_THREADS:
        raise ArgumentError(call, "threads", threads, f"1 to {MAX_THREADS}")
    step = PIECE if piece is None else index(piece, call, "piece")
    if step < 1 or step % mapping.page_size:
        raise ArgumentError(call, "piece", piece, f"a multiple of {mapping.page_size} bytes, or None")
    if progress is not None and not callable(progress):
        raise ArgumentTypeError(call, "progress", progress, "None, or a callable (done, total)")
    bit, word = (lib.HV_PROT_WRITE, "PROT_WRITE") if write else (lib.HV_PROT_READ, "PROT_READ")
    for start, _, prot in within(mapping._prots, offset, offset + size):
        if not prot & bit:
            detail = f"the page at offset {start:#x} is not mapped with {word}"
            raise ArgumentError(call, "write", write, "what the protection allows", detail)
    _check_room(mapping, call, offset, size, write)
    advice = lib.HV_MADV_POPULATE_WRITE if write else lib.HV_MADV_POPULATE_READ
    pieces = iter(range(offset, offset + size, step))  # whose next() is atomic
    end = offset + size

    def do(start: int) -> tuple[int, int, int]:
        length = min(step, end - start)
        while (error := -lib.hv_madvise(mapping._hva + start, length, advice)) in (errno.EINTR, errno.EAGAIN):
            pass
        return start, length, error

    nr_threads = min(nr_threads, -(-size // step))
    work = (do(start) for start in pieces) if nr_threads == 1 else _spread(mapping, do, pieces, nr_threads)
    done = 0
    try:
        for start, length, error in work:
            if error:
                name = "MADV_POPULATE_WRITE" if write else "MADV_POPULATE_READ"
                raise HostError(error, f"madvise({name})", "offset", start, None, _REFUSED.get(error))
            done += length
            if progress is not None:
                progress(done, size)
    finally:
        work.close()  # which stops the threads


def _spread(
    mapping: Mapping, do: Callable[[int], tuple[int, int, int]], pieces: Iterator[int], nr_threads: int
) -> Generator[tuple[int, int, int]]:
    # The answers of all pieces, worked on by threads that are gone when this generator is.
    import threading

    answers: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()
    stop: list[bool] = []
    # A thread that starts maps its stack, and would wait for the first one's system call to end: none begins before
    # all are there.
    begin = threading.Event()

    def run(_: object) -> None:
        try:
            begin.wait()
            for start in pieces:
                if stop:
                    break
                answers.put(do(start))
        finally:
            answers.put(None)

    running: list[threading.Thread] = []
    try:
        for _ in range(nr_threads):
            # Each keeps the mapping from being closed, should Ctrl-C come before it is known to have started.
            thread = threading.Thread(target=run, args=(mapping._inside,), name="hvmodel-populate", daemon=True)
            running.append(thread)  # first, for Ctrl-C may come in `start`
            try:
                thread.start()
            except RuntimeError:
                raise HostError(errno.EAGAIN, "pthread_create", "threads", nr_threads, "fewer threads") from None
        begin.set()
        ended = 0
        while ended < nr_threads:
            answer = answers.get()
            if answer is None:
                ended += 1
            else:
                yield answer
    finally:
        stop.append(True)
        begin.set()
        _join(running)


def _join(threads: list[threading.Thread]) -> None:
    # All of them, though Ctrl-C may come meanwhile: a thread that goes on would touch what its owner unmaps.
    interrupted: BaseException | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted


def _check_room(mapping: Mapping, call: str, offset: int, size: int, write: bool) -> None:
    copies = write and not mapping.shared
    if mapping.page_size != PAGE_SIZE or (mapping.source is None and not mapping.shared and not write):
        return
    if not mapping._in_memory and not copies:
        return
    limit = limits()[0]
    if _with_tables(2 * size) <= limit.room:
        return
    address = mapping._hva + offset
    lacking = _missing(address, size, True) if copies else 0
    if mapping._in_memory and (mapping.source is not None or mapping.shared):
        lacking += _missing(address, size, False)
    if _with_tables(lacking) > limit.room:
        detail = f"{lacking} bytes of it have no memory yet; {limit.room} bytes are left ({limit.what})"
        accepted = "a range that lacks less than is left"
        raise HostError(errno.ENOMEM, call, "size", size, accepted, detail)


def _missing(address: int, size: int, copies: bool) -> int:
    nr_pages = lib.hv_nr_missing(address, size, copies)
    return size if nr_pages < 0 else nr_pages * PAGE_SIZE


def _with_tables(size: int) -> int:
    # A page table of 4 KiB for every 2 MiB.
    return size + size // 512
