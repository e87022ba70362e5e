"""The file behind a memory-backend-file: `BackingFile` owns its descriptor.

    mem-path names        what is opened
    an existing file      that file, as it is; it must have as many bytes as the memory, or be empty
    nothing               a new file, mode 0644, which stays when all is over
    a directory           a new file in it, mode 0600, whose name is removed at once: qemu_back_mem.ID.XXXXXX

An empty file is made as long as the memory (ftruncate).  A file that is too short is refused, for touching memory
behind the end of a file is SIGBUS.

Anybody who may write the file may also cut it off, now or later: it has no seals.  So memory over it is never handed
out as a view; reading and writing it by copy works, and gives an error where the file has ended.

Source: file_ram_open and qemu_ram_alloc_from_fd, softmmu/physmem.c@v7.2 of QEMU.
"""

from __future__ import annotations

import errno
import os
import stat

from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from ..finalizer import Finalizer
from ..host.memfd import fd_page_size, fd_what

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

__all__ = ["BackingFile", "check_path"]

_ACCEPTED = "a regular file, a name for a new one, or a directory"
_KINDS = {
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}


def _leaked(fd: int, path: str) -> None:
    # The finalizer of a BackingFile that nobody closed.  The warning comes last, because it may be made an exception.
    import warnings

    os.close(fd)
    warnings.warn(f"unclosed BackingFile({path!r}, fd={fd})", ResourceWarning, stacklevel=2)


def check_path(path: str, call: str, field: str) -> None:
    """That `path` can be a path; ArgumentError and ArgumentTypeError, naming `call` and `field`, where it cannot."""
    if not isinstance(path, str):
        raise ArgumentTypeError(call, field, path, "a str")
    if not path or "\0" in path:
        raise ArgumentError(call, field, path, "a path, not empty and without NUL")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ArgumentError(call, field, path, "a path", "it has no encoding as a file name") from None


class BackingFile:
    """The open file `path`, of at least `size` bytes from `offset`; owns its descriptor.  See the module's text.

    `size` and `offset` are bytes.  `readonly` opens it for reading only; then it must be there.  `name` is what a file
    in a directory is called by.

    Raises HostError of open (ENOENT, EACCES, ...), ftruncate (ENOSPC, EFBIG); ArgumentError for what is no regular file
    and for a file of another size.  Nothing is left open then, and a file that was made is removed.

    Calls: openat(2), fstat(2), fstatfs(2), ftruncate(2), unlink(2).  Threads: any, but for `close`.
    """

    __slots__ = ("__weakref__", "_created", "_fd", "_finalizer", "_page_size", "_path")

    def __init__(
        self,
        path: str,
        size: int,
        *,
        offset: int = 0,
        readonly: bool = False,
        name: str = "mem",
        call: str = "BackingFile",
    ) -> None:
        self._fd = -1
        check_path(path, call, "path")
        fd, self._created = _open(path, readonly, name)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
                raise ArgumentError(call, "mem_path", path, _ACCEPTED, f"{kind}: {fd_what(fd)}")
            self._page_size = fd_page_size(fd)
            have = status.st_size
            if have and have < offset + size:
                detail = f"backing store size {have:#x} does not match 'size' option {size:#x}"
                detail += f" from offset {offset:#x}" if offset else ""
                raise ArgumentError(call, "size", size, f"at most {max(have - offset, 0):#x}, or an empty file", detail)
            if not have:
                if readonly:
                    accepted = f"a file of at least {offset + size:#x} bytes"
                    raise ArgumentError(call, "mem_path", path, accepted, "it is empty, and readonly=on")
                try:
                    os.ftruncate(fd, offset + size)
                except OSError as error:
                    raise HostError(error.errno or 0, "ftruncate", "size", offset + size) from None
        except BaseException:
            os.close(fd)
            self.remove()
            raise
        self._fd, self._path = fd, path
        self._finalizer = Finalizer(self, _leaked, fd, path)

    @property
    def path(self) -> str:
        """Its name, or the directory that it was made in, as given."""
        return self._path

    @property
    def fd(self) -> int:
        """The file descriptor, which stays this object's.  Raises ClosedError."""
        if self._fd < 0:
            raise ClosedError("BackingFile.fd", "BackingFile")
        return self._fd

    def fileno(self) -> int:
        """The file descriptor, so that os and select functions take this object."""
        return self.fd

    @property
    def size(self) -> int:
        """Size of the file in bytes, as fstat(2) says now."""
        return os.fstat(self.fd).st_size

    @property
    def page_size(self) -> int:
        """Bytes of one of its pages: 4096, or on hugetlbfs that of the mount."""
        return self._page_size

    @property
    def created(self) -> bool:
        """Whether the file was made, under a name that it still has."""
        return self._created is not None

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._fd < 0

    def remove(self) -> None:
        """Removes the name of a file that was made: for who could not use it after all.  Twice is fine."""
        created, self._created = self._created, None
        if created is not None:
            try:  # noqa: SIM105 (not worth importing contextlib)
                os.unlink(created)
            except OSError:
                pass  # somebody else was faster

    def close(self) -> None:
        """Closes the descriptor; mappings of the file live on, and so does the file.  Closing twice is fine."""
        if self._fd >= 0 and self._finalizer.detach():
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be copied or pickled: it owns a file descriptor of this process")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<BackingFile closed>"
        return f"BackingFile({self._path!r}, fd={self._fd}, size={self.size:#x})"


# The descriptor, and the name of the file if it was made.  O_NONBLOCK is for a pipe, which would wait for a writer;
# a regular file does not know it.
def _open(path: str, readonly: bool, name: str) -> tuple[int, str | None]:
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    while True:
        try:
            return os.open(path, flags), None
        except OSError as error:
            if error.errno == errno.EISDIR:
                return _open_in(path, name), None
            if error.errno != errno.ENOENT or readonly:
                accepted = "a file that is there, because readonly=on" if readonly else _ACCEPTED
                raise HostError(error.errno or 0, "open", "mem_path", path, accepted) from None
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), path
        except FileExistsError:
            if os.path.islink(path):  # a link to nothing: neither there nor free
                raise HostError(
                    errno.ENOENT, "open", "mem_path", path, _ACCEPTED, "a link that leads nowhere"
                ) from None
        except OSError as error:
            raise HostError(error.errno or 0, "open", "mem_path", path, _ACCEPTED) from None


def _open_in(path: str, name: str) -> int:
    from tempfile import mkstemp

    try:
        fd, made = mkstemp(prefix=f"qemu_back_mem.{name.replace('/', '_')}.", dir=path)
    except OSError as error:
        raise HostError(error.errno or 0, "mkstemp", "mem_path", path, _ACCEPTED) from None
    try:
        os.unlink(made)
    except BaseException:
        os.close(fd)
        raise
    return fd
