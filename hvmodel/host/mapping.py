"""Mappings: `Mapping` owns a range of this process's addresses, and hands out its bytes without copying.

No access through this class raises SIGSEGV or SIGBUS:

    memory that cannot fault   readable, and anonymous or of a memfd that is sealed against SHRINK and reaches to the
                               end of the mapping: views are handed out, `read` and `write` are a memcpy
    all other memory           no views; `read` and `write` go through process_vm_readv/writev, which return errors and
                               let other threads run meanwhile
    memory handed out          stays mapped and accessible: every view keeps the mapping alive; `close`, and what takes
                               access away from the range of a view, refuse

Which is which is known by page range.  Other memory is where `protect` took access away, guards were installed, a
userfaultfd is registered, huge pages need not be there (private or noreserve hugetlb), or the file can shrink.

Who takes access away from a range first bars it, so that no new view or memcpy begins there, and waits for the memcpy
that is under way in another thread; then looks at the views.

    with `align`, as QEMU maps its RAM:

    reserve   |.............. size + align bytes, PROT_NONE ..............|
    activate  |.....|<============= size, MAP_FIXED =============>|.......|     at a multiple of align
    trim            |<===========================================>|G|           G: a page that stays inaccessible

Source: qemu_ram_mmap, util/mmap-alloc.c@v7.2 and v10.1; ram_block_discard_range, softmmu/physmem.c@v7.2.
"""

from __future__ import annotations

import errno
import os
from _weakref import ref

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from ..finalizer import Finalizer
from ..units import PAGE_SIZE, Hva, parse_size
from .access import PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE, Access, Inside
from .changes import Bar, Change
from .memfd import MemFd, fd_page_size, index, page_multiple
from .pieces import change, within
from .views import Export, ViewError, Writable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from .pieces import Pieces

__all__ = ["PROT_EXEC", "PROT_NONE", "PROT_READ", "PROT_WRITE", "Bar", "Mapping", "ViewError", "Writable", "index"]

_PROTS = {PROT_READ: "r", PROT_WRITE: "w", PROT_EXEC: "x"}
_ALL_PROTS = sum(_PROTS)
_RW = PROT_READ | PROT_WRITE
_ADDRESSES = 1 << 47  # of a process, without LA57
_CHARS = ffi.typeof("char *")
_OVERCOMMIT = "/proc/sys/vm/overcommit_memory"

_POOL = "huge pages of it were given back to the host's pool, which may have none left for the next touch"

# What a refusal of mmap means: (field, accepted).
_REFUSED = {
    errno.EBADF: ("source", "an open file descriptor"),
    errno.EACCES: ("prot", "what the file was opened for"),
    errno.EPERM: ("prot", "no shared PROT_WRITE: the memfd is sealed with WRITE or FUTURE_WRITE"),
    errno.ENODEV: ("source", "a file that can be mapped"),
    errno.ENOMEM: ("size", "a size that this process's addresses and the host's memory have room for"),
}


# The finalizer of a Mapping that nobody closed.  The warning comes last, because it may be made an exception.
def _leaked(address: int, size: int, guard_size: int) -> None:
    import warnings

    lib.hv_munmap(address, size + guard_size)
    warnings.warn(f"unclosed Mapping(hva={address:#x}, size={size:#x})", ResourceWarning, stacklevel=2)


class Mapping(Access):
    """A mapping of `size` bytes of a memfd from `offset`, or with source None of anonymous memory; owns the addresses.

    `source` is a MemFd, the number of a descriptor that the caller owns, or None.  `size` (bytes, or text such as
    "16M") and `offset` are whole pages, of a hugetlb file its own; `prot` is PROT_NONE or of PROT_READ, PROT_WRITE,
    PROT_EXEC; `shared` False makes a private (copy-on-write) mapping.

    `align` (a power of two, at least a page of the source) asks for an address that is a multiple of it, and for an
    inaccessible page behind the memory; None is a plain mmap.  `noreserve` (MAP_NORESERVE) lets the memory, or huge
    pages, not be there once it is touched.  `sync` (MAP_SYNC) wants writes to persistent memory to be durable once they
    have left the CPU's caches; where the file cannot have that the mapping is made without, as `synced` tells, and with
    a RuntimeWarning; a private mapping leaves it out.

    `owner` is the name that errors use.  `written(offset, size)`, if given, is called for every range that was or may
    have been written through this object: before and after a `write` and what else changes bytes, and once a writable
    view is gone.

    Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of mmap with its errno: EBADF, EACCES, ENODEV,
    ENOMEM, EPERM (a shared writable mapping of a memfd with F_SEAL_WRITE or F_SEAL_FUTURE_WRITE), and EOPNOTSUPP for
    `noreserve` where the host's vm.overcommit_memory is 2.  Nothing is left mapped then.

    Calls: mmap(2), munmap(2); process_vm_readv(2), process_vm_writev(2); and those of the methods.
    Threads: any.  `close` against a view, a read or a write in another thread raises one of its errors or wins.

    >>> from hvmodel.host import F_SEAL_SHRINK, MemFd
    >>> with MemFd("doc", "64K", seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, "64K") as mapping:
    ...     mapping.write(0x1000, b"hello")
    ...     with mapping.writable(0x1004, 1) as view:
    ...         view[0] = ord("!")
    ...     mapping.read(0x1000, 5), mapping.view(0x1000, 5).readonly
    (b'hell!', True)
    """

    __slots__ = (
        "_align",
        "_file",
        "_finalizer",
        "_forks",
        "_guard_size",
        "_in_memory",
        "_prot",
        "_synced",
    )

    def __init__(
        self,
        source: MemFd | int | None,
        size: int | str,
        *,
        offset: int = 0,
        prot: int = PROT_READ | PROT_WRITE,
        shared: bool = True,
        align: int | str | None = None,
        noreserve: bool = False,
        sync: bool = False,
        owner: str = "Mapping",
        written: Callable[[int, int], None] | None = None,
    ) -> None:
        # The one buffer over all of it.  Whoever copies by pointer holds it meanwhile; see `_quiesce` and `close`.
        self._base = None
        self._inside = None
        self._owner = owner
        fd, self._file, self._in_memory = -1, (0, 0), True
        page_size = PAGE_SIZE
        if isinstance(source, MemFd):
            fd, page_size = source.fd, source.page_size
        elif source is not None:
            fd = index(source, owner, "source", "a MemFd, a file descriptor, or None")
            if not 0 <= fd < 1 << 31:
                raise ArgumentError(owner, "source", source, "a MemFd, an open file descriptor, or None")
        size = page_multiple(size, owner, "size", _ADDRESSES, page_size=page_size)
        offset = index(offset, owner, "offset")
        accepted = f"a multiple of {page_size} from 0, ending below 2**63"
        if offset < 0 or offset % page_size or offset >= (1 << 63) - size:
            raise ArgumentError(owner, "offset", offset, accepted)
        _check_prot(owner, prot)
        if source is not None and not isinstance(source, MemFd):
            # Of a mere number only what is found now is known: later it may be another file's.
            try:
                status = os.fstat(fd)
            except OSError as error:
                raise HostError(error.errno or 0, "mmap", "source", source, "an open file descriptor") from None
            self._file, self._in_memory = (status.st_dev, status.st_ino), lib.hv_get_seals(fd) >= 0
            page_size = fd_page_size(fd)
            if page_size != PAGE_SIZE:
                page_multiple(size, owner, "size", _ADDRESSES, page_size=page_size)
                if offset % page_size:
                    raise ArgumentError(owner, "offset", offset, accepted.replace(str(PAGE_SIZE), str(page_size)))
        align = _check_align(owner, align, page_size, size)
        flags = (lib.HV_MAP_SHARED_VALIDATE | lib.HV_MAP_SYNC) if sync and shared else lib.HV_MAP_SHARED
        if not shared:
            flags = lib.HV_MAP_PRIVATE
        if source is None:
            flags |= lib.HV_MAP_ANONYMOUS
        if noreserve:
            accountable = page_size == PAGE_SIZE and bool(prot & PROT_WRITE) and (source is None or not shared)
            if accountable and _never_overcommits():
                detail = f"{_OVERCOMMIT} is 2, so that the kernel reserves memory for every page"
                raise HostError(errno.EOPNOTSUPP, "mmap", "noreserve", True, "False", detail)
            flags |= lib.HV_MAP_NORESERVE
        unsynced = ffi.new("int *")
        address = lib.hv_ram_mmap(size, align, prot, flags, fd, offset, unsynced)
        if address < 0:
            field, accepted_ = _REFUSED.get(-address, ("source", None))
            value = {"size": size, "prot": prot}.get(field, source)
            why = None
            if address == -errno.EINVAL and not shared:
                field, value, accepted_ = "shared", shared, "True: this file, as a guest_memfd, is mapped shared only"
            if address == -errno.ENOMEM and page_size != PAGE_SIZE:
                why = f"the host's pool has too few free huge pages of {page_size} bytes, or addresses are used up"
            raise HostError(-address, "mmap", field, value, accepted_, why)
        guard_size = PAGE_SIZE if align else 0
        self._finalizer = Finalizer(self, _leaked, address, size, guard_size)
        # Not at exit: memory that is still handed out then must stay, and the kernel takes it back anyway.
        self._finalizer.atexit = False
        try:
            self._hva, self._size, self._source, self._offset = address, size, source, offset
            self._prot, self._shared, self._written = prot, bool(shared), written
            self._page_size, self._align, self._guard_size = page_size, align, guard_size
            self._noreserve, self._synced = bool(noreserve), bool(flags & lib.HV_MAP_SYNC) and not unsynced[0]
            self._exports = []
            self._reap_at = 16
            self._pins = []
            self._prots = ((0, size, prot),)
            self._bars = {}
            self._changes = {}
            self._forks: Pieces = ((0, size, True),)
            self._start = ffi.cast(_CHARS, address)
            self._base = ffi.buffer(self._start, size)
            self._inside = Inside()
            self._fault = self._find_fault()
            self._direct = 0
            self._settle()
            if unsynced[0] == errno.EOPNOTSUPP:
                _warn_unsynced(owner, source)
        except BaseException:
            self._base = self._inside = None
            self._finalizer.detach()
            lib.hv_munmap(address, size + guard_size)
            raise

    @property
    def hva(self) -> Hva:
        """The address of the first byte, in this process.  Raises ClosedError.

        An address keeps nothing alive: who gives it to somebody (a memslot) pins the mapping.
        """
        if self._base is None:
            raise ClosedError(f"{self._owner}.hva", self._owner)
        return Hva(self._hva)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    @property
    def offset(self) -> int:
        """Where in the file the first byte lies."""
        return self._offset

    @property
    def page_size(self) -> int:
        """Bytes of a page of what is mapped: 4096, or of a hugetlb file its own.  Changes are by whole ones."""
        return self._page_size

    @property
    def guard_size(self) -> int:
        """Bytes behind the memory that belong to it and are inaccessible: a page with `align`, else 0."""
        return self._guard_size

    @property
    def align(self) -> int | None:
        """What `hva` was to be a multiple of, or None."""
        return self._align or None

    @property
    def noreserve(self) -> bool:
        """Whether it was made with MAP_NORESERVE."""
        return self._noreserve

    @property
    def synced(self) -> bool:
        """Whether it was made with MAP_SYNC."""
        return self._synced

    @property
    def prot(self) -> int:
        """The protection that it was made with, PROT_* or-ed; what a page has now: `prot_at`."""
        return self._prot

    @property
    def shared(self) -> bool:
        """Whether writes go to the file (True) or to private copies."""
        return self._shared

    @property
    def source(self) -> MemFd | int | None:
        """What is mapped, as given."""
        return self._source

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._base is None

    # ---- what is done to the memory ----

    def protect(self, offset: int, size: int | None, prot: int) -> None:
        """Gives the pages [offset, offset + size) the protection `prot`, PROT_* or-ed (mprotect); None is all the rest.

        `offset` and `size` are multiples of `page_size`.  Raises ArgumentError, ArgumentTypeError, ClosedError;
        ViewError, with nothing changed, where access is taken away that a view needs; HostError: EACCES (the file was
        not opened for that, or is sealed against writing), ENOMEM (the limit of mappings), with the range as it was.

        KVM does not see this object's views: a guest that touches a page it may not access makes an exit or EFAULT.
        """
        offset, size = self._pages("protect", offset, size)
        _check_prot(f"{self._owner}.protect", prot, "prot")
        call = f"{self._owner}.protect"

        def needs(export: Export) -> bool:
            return bool((_RW if export.writable else PROT_READ) & ~prot)

        with Change(self, call, offset, size, "its protection is being changed", needs):
            before = tuple(within(self._prots, offset, offset + size))
            error = -lib.hv_mprotect(self._hva + offset, size, prot)
            if error > 0:
                # It may have done the first part of it.
                back = [lib.hv_mprotect(self._hva + start, end - start, value) for start, end, value in before]
                if any(back):
                    self._prots = change(self._prots, offset, offset + size, lambda value: value & prot)
                accepted = {
                    errno.EACCES: "what the file was opened for, and its seals allow",
                    errno.ENOMEM: "fewer ranges with protections of their own: /proc/sys/vm/max_map_count",
                }
                raise HostError(error, "mprotect", "prot", prot, accepted.get(error))
            self._prots = change(self._prots, offset, offset + size, lambda _: prot)

    def advise(self, advice: str, offset: int = 0, size: int | None = None) -> None:
        """Tells the kernel `advice` about the pages [offset, offset + size) (madvise); None is all the rest.

        The words and what they do: hvmodel.host.advice.  `offset` and `size` are multiples of `page_size`.  "dontneed",
        "remove" and "guard_install" take bytes away: they raise ViewError where a view is alive.  With "guard_install"
        the range has no views, and `read` and `write` raise EFAULT there, until "guard_remove".  A child of os.fork
        finds the mapping closed, if a range of it is "dontfork"; views that live on there show zeros.

        "hugepage" for a memfd is accepted by every kernel with huge pages, and does nothing where
        /sys/kernel/mm/transparent_hugepage/shmem_enabled says so ("never" or "deny"); "collapse", after `populate`,
        makes huge pages of a memfd there too ("never").

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError, with what the errno means for this advice.
        """
        from .advice import ADVICE, GUARDED, LOSES, advice_error, inherit_not

        call = f"{self._owner}.advise"
        if not isinstance(advice, str):
            raise ArgumentTypeError(call, "advice", advice, f"one of {', '.join(ADVICE)}")
        if advice not in ADVICE:
            raise ArgumentError(call, "advice", advice, ", ".join(ADVICE))
        offset, size = self._pages("advise", offset, size)
        end = offset + size
        loses = advice in LOSES
        with Change(self, call, offset, size if loses else 0, f"{advice} is under way"):
            if advice == "dontfork":
                self._forks = change(self._forks, offset, end, lambda _: False)
                inherit_not(self)
            if advice == "guard_install":
                # Before they are there; after an error some may be.
                guard = Bar(offset, end, GUARDED)
                self._bars[guard] = None
            if advice == "remove":
                self._give_back()
            try:
                if loses and self._written is not None:
                    self._written(offset, size)
                error = -lib.hv_madvise(self._hva + offset, size, ADVICE[advice])
            finally:
                if loses and self._written is not None:
                    self._written(offset, size)
            if error > 0:
                if advice == "guard_install" and error == errno.EINVAL:
                    del self._bars[guard]  # refused before anything was done
                raise advice_error(error, advice, offset)
            if advice == "dofork":
                self._forks = change(self._forks, offset, end, lambda _: True)
            if advice == "guard_remove":
                for bar in [bar for bar in self._bars if bar.why == GUARDED]:
                    for low, high in ((bar.offset, min(bar.end, offset)), (max(bar.offset, end), bar.end)):
                        if low < high:
                            self._bars[Bar(low, high, GUARDED)] = None
                    del self._bars[bar]

    def discard(self, offset: int, size: int | None = None) -> None:
        """Gives the memory of the pages [offset, offset + size) back; they read as zero then, for everybody.

        As QEMU does for a balloon or after migration: a hole is punched in the file (fallocate) where there is one, and
        the pages are taken from this process (madvise: DONTNEED, or REMOVE for shared anonymous memory); pages of
        hugetlb files go with the hole.  Of a private mapping of a file the private copies go too.

        Raises ArgumentError, ArgumentTypeError, ClosedError (also where the MemFd was closed); ViewError where a view
        is alive; HostError: EPERM where the file is sealed against writing, EBADF where a descriptor number has become
        another file's.
        """
        offset, size = self._pages("discard", offset, size)
        call = f"{self._owner}.discard"
        with Change(self, call, offset, size, "it is being discarded"):
            try:
                if self._written is not None:
                    self._written(offset, size)
                self._give_back()
                if self._source is not None:
                    punch = lib.HV_FALLOC_FL_PUNCH_HOLE | lib.HV_FALLOC_FL_KEEP_SIZE
                    error = -lib.hv_fallocate(self._fd_now(call), punch, self._offset + offset, size)
                    if error > 0:
                        sealed = "the memfd is sealed with WRITE or FUTURE_WRITE" if error == errno.EPERM else None
                        raise HostError(error, "fallocate", "offset", offset, None, sealed)
                if self._page_size == PAGE_SIZE:
                    remove = self._source is None and self._shared
                    advice = lib.HV_MADV_REMOVE if remove else lib.HV_MADV_DONTNEED
                    error = -lib.hv_madvise(self._hva + offset, size, advice)
                    if error > 0:
                        raise HostError(error, "madvise", "offset", offset)
            finally:
                if self._written is not None:
                    self._written(offset, size)

    def sync(self, offset: int = 0, size: int | None = None) -> None:
        """Writes the pages [offset, offset + size) of a shared mapping to their file, and waits (msync MS_SYNC).

        For a file on a disk; a memfd has nowhere to be written to, and this does nothing.  Raises ArgumentError,
        ArgumentTypeError, ClosedError; HostError EIO where the file could not be written.
        """
        offset, size = self._pages("sync", offset, size)
        inside = self._enter("sync")
        try:
            error = -lib.hv_msync(self._hva + offset, size)
        finally:
            del inside
        if error > 0:
            raise HostError(error, "msync", "offset", offset)

    def populate(
        self,
        offset: int = 0,
        size: int | None = None,
        *,
        write: bool = True,
        threads: int = 1,
        progress: Callable[[int, int], object] | None = None,
        piece: int | None = None,
    ) -> None:
        """Gives the pages [offset, offset + size) their memory now; see hvmodel.host.populate.

        `write`: as if each had been written (MADV_POPULATE_WRITE), else as if read (MADV_POPULATE_READ); the bytes stay
        as they are.  `threads` (1 to 256) threads share the work.  `progress(done, total)`, both in bytes, is called in
        this thread after each piece of it; what it raises stops the work and is raised here.  `piece`: the bytes of one
        system call, a multiple of `page_size`; None is 32 MiB.

        Refuses before it begins where the host or a cgroup has less memory left than the pages lack, because the kernel
        would kill for it.  Raises ArgumentError, ArgumentTypeError, ClosedError; HostError ENOMEM, EFAULT (past the end
        of the file; no huge page left), EINVAL (a kernel before 5.14).  The pages that were done stay.
        """
        from .populate import populate

        call = f"{self._owner}.populate"
        offset, size = self._pages("populate", offset, size)
        inside = self._enter("populate")
        try:
            populate(self, call, offset, size, bool(write), threads, progress, piece)
        finally:
            del inside

    # ---- life ----

    def close(self) -> None:
        """Unmaps it.  Closing twice is fine.

        Raises ViewError (a BufferError) while a view is alive, BusyError while it is pinned or another thread is in one
        of its methods; then nothing has changed.  In a child of os.fork it unmaps the child's copy only.
        """
        if self._base is None:
            return
        call = f"{self._owner}.close"
        if nr_views := self._nr_views():
            raise ViewError(call, repr(self), f"{nr_views} views of it are alive (or arrays made from them)")
        if self._pins:
            raise BusyError(call, repr(self), f"in use by {', '.join(self._pins)}")
        change = Change(self, call, 0, 0, "it is being closed")
        if not change.begin(1):
            raise BusyError(call, repr(self), "another thread is in one of its methods")
        try:
            base, inside = self._base, self._inside
            if inside is None:
                return  # another thread was faster
            holders = ref(base), ref(inside)
            del base, inside
            # From here on every access finds a closed mapping.  One that was faster holds one of the two, or has made
            # a view.
            self._base = self._inside = None
            if any(holder() is not None for holder in holders) or self._nr_views():
                self._base = holders[0]() or ffi.buffer(self._start, self._size)
                self._inside = holders[1]() or Inside()
                raise BusyError(call, repr(self), "another thread is in one of its methods")
            if self._finalizer.detach():
                error = lib.hv_munmap(self._hva, self._size + self._guard_size)
                if error < 0:
                    raise HostError(-error, "munmap", "hva", self._hva)
        finally:
            change.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._base is None:
            return "<Mapping closed>"
        prot = "".join(char if self._prot & bit else "-" for bit, char in _PROTS.items())
        kind = "shared" if self._shared else "private"
        return f"Mapping({self._source!r}, hva={self._hva:#x}, size={self._size:#x}, {prot}, {kind})"

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be copied or pickled: it owns addresses of this process")

    # A hole in a file of huge pages gives up their reservation too.
    def _give_back(self) -> None:
        if self._page_size != PAGE_SIZE and not any(bar.why == _POOL for bar in self._bars):
            self._bars[Bar(0, self._size, _POOL)] = None

    # The descriptor of the file, of which a mere number is only so as long as it is still the same file.
    def _fd_now(self, call: str) -> int:
        if isinstance(self._source, MemFd):
            return self._source.fd
        fd = self._source if self._source is not None else -1
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == self._file:
                return fd
        except OSError:
            pass
        raise HostError(errno.EBADF, call, "source", fd, None, "the descriptor is not that of the mapped file any more")

    # In a child of fork that has not inherited all of it.
    def _lose(self) -> None:
        if self._base is None or all(inherited for _, _, inherited in self._forks):
            return
        self._base = self._inside = None
        self._finalizer.detach()
        for start, end, inherited in self._forks:
            if not inherited:
                lib.hv_mmap_stand_in(self._hva + start, end - start)


def _check_prot(call: str, prot: int, field: str = "prot") -> None:
    if isinstance(prot, bool) or not isinstance(prot, int):
        raise ArgumentTypeError(call, field, prot, "an int, PROT_* or-ed")
    if prot & ~_ALL_PROTS:
        raise ArgumentError(call, field, prot, "PROT_NONE, or a combination of PROT_READ, PROT_WRITE, PROT_EXEC")


# The alignment in bytes, or 0 for none.
def _check_align(owner: str, align: int | str | None, page_size: int, size: int) -> int:
    if align is None:
        return 0
    value = parse_size(align, owner, "align")
    if value < page_size or value & (value - 1) or value + size > _ADDRESSES:
        accepted = f"None, or a power of two from {page_size}, with size at most {_ADDRESSES:#x} bytes"
        raise ArgumentError(owner, "align", align, accepted)
    return value


def _never_overcommits() -> bool:
    try:
        with open(_OVERCOMMIT) as file:
            return file.read().strip() == "2"
    except OSError:
        return False


def _warn_unsynced(owner: str, source: object) -> None:
    import warnings

    text = (
        f"{owner}: sync: {source!r} cannot be mapped with MAP_SYNC: after a crash of the host its data may be corrupt"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=3)
