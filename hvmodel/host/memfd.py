"""Memory files: `MemFd` owns a file descriptor of memfd_create(2); for its seals see hvmodel.host.seals.

    flags   CLOEXEC 1         always
            ALLOW_SEALING 2   without it the file has SEAL from the start, and gets no others
            HUGETLB 4         pages of hugetlbfs, of the size whose log2 is in bits 26 to 31, or of the host's default
            NOEXEC_SEAL 8     mode 0666 and the seal EXEC, and sealing is allowed
            EXEC 16           mode 0777, as without either flag unless the sysctl vm.memfd_noexec says otherwise

Source: mm/memfd.c, mm/shmem.c, fs/hugetlbfs/inode.c@v6.18; memfd_create(2).
"""

from __future__ import annotations

import errno
import os

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from ..finalizer import Finalizer
from ..units import PAGE_SIZE, parse_size
from .seals import (
    F_SEAL_EXEC,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    add_seals,
    check_seals,
    get_seals,
    seal_names,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self, SupportsIndex

__all__ = [
    "F_SEAL_EXEC",
    "F_SEAL_FUTURE_WRITE",
    "F_SEAL_GROW",
    "F_SEAL_SEAL",
    "F_SEAL_SHRINK",
    "F_SEAL_WRITE",
    "NAME_MAX",
    "SIZE_MAX",
    "MemFd",
    "fd_page_size",
    "fd_what",
    "file_name",
    "file_size",
    "get_seals",
    "hugetlb_flags",
    "index",
    "page_multiple",
    "seal_names",
]

NAME_MAX = 249  # NAME_MAX of the kernel (255) less its "memfd:"
SIZE_MAX = (1 << 63) - PAGE_SIZE  # the last whole page under loff_t's limit

_EXEC_FLAGS = {
    None: 0,
    True: lib.HV_MFD_EXEC,
    False: lib.HV_MFD_NOEXEC_SEAL,
}


def index(value: SupportsIndex, call: str, field: str, accepted: str = "an int") -> int:
    """The int that `value` is or stands for (numpy's, too, but not bool); errors name `call` and `field`."""
    if isinstance(value, bool):
        raise ArgumentTypeError(call, field, value, accepted)
    try:
        return value.__index__()
    except (AttributeError, TypeError):
        raise ArgumentTypeError(call, field, value, accepted) from None


def file_name(name: str, call: str, field: str) -> bytes:
    """The bytes of a memfd's name: at most 249 of them, none of them NUL; errors name `call` and `field`."""
    if not isinstance(name, str):
        raise ArgumentTypeError(call, field, name, "a str")
    accepted = f"a name of at most {NAME_MAX} bytes without NUL"
    try:
        text = os.fsencode(name)
    except UnicodeEncodeError:
        raise ArgumentError(call, field, name, accepted, "it has no encoding as a file name") from None
    if len(text) > NAME_MAX:
        raise ArgumentError(call, field, name, accepted, f"it has {len(text)} bytes")
    if 0 in text:
        raise ArgumentError(call, field, name, accepted, "it has a NUL in it")
    return text


def page_multiple(
    size: int | str, call: str, field: str, limit: int = SIZE_MAX, why: str = "", page_size: int = PAGE_SIZE
) -> int:
    """A size in bytes that is whole pages, at least one, at most `limit`; errors name `call`, `field` and `why`."""
    value = parse_size(size, call, field)
    if value % page_size or not page_size <= value <= limit:
        raise ArgumentError(call, field, size, f"a multiple of {page_size} bytes from {page_size} to {limit:#x}{why}")
    return value


def hugetlb_flags(hugetlbsize: int | str | None, call: str = "MemFd", field: str = "hugetlbsize") -> int:
    """The flags of memfd_create for pages of `hugetlbsize` bytes, a power of two, or of the host's default size (None).

    Raises ArgumentError and ArgumentTypeError, naming `call` and `field`.

    >>> hex(hugetlb_flags("2M")), hex(hugetlb_flags(None))
    ('0x54000004', '0x4')
    """
    flags: int = lib.HV_MFD_HUGETLB
    if hugetlbsize is None:
        return flags
    size = parse_size(hugetlbsize, call, field)
    if size < PAGE_SIZE or size & (size - 1) or size >> 63:
        raise ArgumentError(call, field, hugetlbsize, "a power of two: the size of a page in bytes", _huge_sizes())
    return flags | (size.bit_length() - 1) << lib.HV_MFD_HUGE_SHIFT


def _leaked(fd: int, name: str) -> None:
    # The finalizer of a MemFd that nobody closed.  The warning comes last, because it may be made an exception.
    import warnings

    os.close(fd)
    warnings.warn(f"unclosed MemFd({name!r}, fd={fd})", ResourceWarning, stacklevel=2)


class MemFd:
    """An anonymous memory file of `size` bytes, close-on-exec, to which seals can be added; owns its descriptor.

    `name` is what /proc/self/maps and /proc/self/fd show (`/memfd:NAME (deleted)`): at most 249 bytes without NUL, not
    necessarily unique.  `size` is whole pages, as bytes or as text such as "16M"; `seals` are added once the size is
    set.  All pages read as zero and cost nothing until they are written.

    `hugetlb` True makes it of huge pages, of `hugetlbsize` bytes each (a power of two that the host has: "2M", "1G") or
    of the host's default size; `size` is then whole ones of these.  `exec` False makes it not executable
    (MFD_NOEXEC_SEAL: mode 0666, and the seal EXEC), True executable (MFD_EXEC), None as the host's sysctl
    vm.memfd_noexec says.  `allow_sealing` False makes a file with the one seal SEAL.

    Raises ArgumentError, ArgumentTypeError; HostError of memfd_create (EMFILE, ENFILE, ENOMEM; ENODEV for a
    `hugetlbsize` that the host does not have; EINVAL for an `exec` that the kernel does not know; EACCES where
    vm.memfd_noexec forbids it), ftruncate (EFBIG) and F_ADD_SEALS.  Nothing is left open then.

    Calls: memfd_create(2), ftruncate(2), fcntl(2) F_ADD_SEALS.
    See: qemu_memfd_create, util/memfd.c@v10.1.
    Threads: any, but for `close`, which must not race with a use of `fd`.

    >>> with MemFd("doc", "64K", seals=F_SEAL_SHRINK | F_SEAL_GROW) as memfd:
    ...     memfd.size, seal_names(memfd.seals)
    (65536, 'SHRINK|GROW')
    >>> memfd
    <MemFd closed>
    """

    __slots__ = ("__weakref__", "_fd", "_finalizer", "_hugetlb", "_name", "_page_size", "_sealed")

    _sealed: int  # seals that are known to be there, without asking the kernel; there may be more

    def __init__(
        self,
        name: str,
        size: int | str,
        *,
        seals: int = 0,
        hugetlb: bool = False,
        hugetlbsize: int | str | None = None,
        exec: bool | None = None,
        allow_sealing: bool = True,
    ) -> None:
        self._fd = -1
        text = file_name(name, "MemFd", "name")
        value = page_multiple(size, "MemFd", "size")
        check_seals("MemFd", seals)
        if exec is not None and not isinstance(exec, bool):
            raise ArgumentTypeError("MemFd", "exec", exec, "None, True or False")
        if seals and not allow_sealing:
            raise ArgumentError("MemFd", "seals", seals, "0 with allow_sealing=False", "such a file takes no seals")
        if exec is False and not allow_sealing:
            raise ArgumentError("MemFd", "allow_sealing", False, "True with exec=False, which is a seal itself")
        if hugetlbsize is not None and not hugetlb:
            raise ArgumentError("MemFd", "hugetlbsize", hugetlbsize, "None, or hugetlb=True with it")
        flags = lib.HV_MFD_CLOEXEC | _EXEC_FLAGS[exec]
        if allow_sealing:
            flags |= lib.HV_MFD_ALLOW_SEALING
        if hugetlb:
            flags |= hugetlb_flags(hugetlbsize)
        fd = lib.hv_memfd_create(text, flags)
        if fd < 0:
            raise _creation_error(-fd, name, hugetlb, hugetlbsize, exec)
        try:
            self._page_size = fd_page_size(fd) if hugetlb else PAGE_SIZE
            if hugetlb:
                page_multiple(size, "MemFd", "size", page_size=self._page_size)
            error = lib.hv_ftruncate(fd, value)
            if error < 0:
                raise HostError(-error, "ftruncate", "size", value)
            if seals:
                add_seals(fd, seals)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._name, self._hugetlb = fd, name, bool(hugetlb)
        self._sealed = seals
        self._finalizer = Finalizer(self, _leaked, fd, name)

    @classmethod
    def from_fd(cls, fd: int, *, size: int | str | None = None, seals: int = 0) -> Self:
        """A MemFd over a duplicate of descriptor `fd`, which was handed to this process and stays the caller's.

        Checked before it is trusted: it is a regular file that has seals (a memfd, or a file of tmpfs or hugetlbfs),
        opened for reading and writing, of whole pages and at least `size` bytes, with at least the `seals` set.  With
        F_SEAL_SHRINK among them nobody can take memory away under a mapping of it; with F_SEAL_WRITE nobody can change
        it while it is looked at.

        Raises ArgumentError that says what the descriptor is or which seals are missing, ArgumentTypeError; HostError
        EBADF where it is not open, EMFILE.

        Calls: fcntl(2) F_DUPFD_CLOEXEC, F_GETFL, F_GET_SEALS; fstat(2), fstatfs(2).

        >>> with MemFd("doc", "64K", seals=F_SEAL_SHRINK) as mine:
        ...     with MemFd.from_fd(mine.fd, size="64K", seals=F_SEAL_SHRINK) as theirs:
        ...         theirs.name, theirs.size, theirs.fd != mine.fd
        ('doc', 65536, True)
        """
        call = "MemFd.from_fd"
        number = index(fd, call, "fd", "a file descriptor")
        check_seals(call, seals)
        least = PAGE_SIZE if size is None else page_multiple(size, call, "size")
        try:
            own = os.dup(number)
        except (OSError, OverflowError) as error:
            err = getattr(error, "errno", None) or errno.EBADF
            raise HostError(err, "dup", "fd", number, "an open descriptor of a memfd") from None
        try:
            name = _check_file(own, call, number, least, seals)
            page_size = fd_page_size(own)
        except BaseException:
            os.close(own)
            raise
        memfd = cls.__new__(cls)
        memfd._fd, memfd._name = own, name
        memfd._page_size, memfd._hugetlb = page_size, page_size != PAGE_SIZE
        memfd._sealed = seals
        memfd._finalizer = Finalizer(memfd, _leaked, own, name)
        return memfd

    @property
    def name(self) -> str:
        """Its name, as given; of one that `from_fd` made, what /proc/self/fd shows, without "/memfd:"."""
        return self._name

    @property
    def fd(self) -> int:
        """The file descriptor, which stays this object's.  Raises ClosedError."""
        if self._fd < 0:
            raise ClosedError("MemFd.fd", f"MemFd({self._name!r})")
        return self._fd

    def fileno(self) -> int:
        """The file descriptor, so that os and select functions take this object."""
        return self.fd

    @property
    def size(self) -> int:
        """Size in bytes, as fstat(2) says now."""
        return file_size(self.fd)

    @property
    def page_size(self) -> int:
        """Bytes of one of its pages: 4096, or with hugetlb the huge page's."""
        return self._page_size

    @property
    def hugetlb(self) -> bool:
        """Whether it is of huge pages from the host's pool (hugetlbfs)."""
        return self._hugetlb

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._fd < 0

    @property
    def seals(self) -> int:
        """The seals, F_SEAL_* or-ed, as the kernel says now (F_GET_SEALS)."""
        return get_seals(self.fd)

    def add_seals(self, seals: int) -> None:
        """Adds the seals F_SEAL_* or-ed in `seals` (F_ADD_SEALS): all of them, or after an error none.

        Raises HostError: EBUSY for F_SEAL_WRITE while a shared writable mapping is alive, naming the processes that can
        be seen to have one (F_SEAL_EXEC of a file with execute mode bits, as `exec` None makes it, brings F_SEAL_WRITE
        with it); EPERM once F_SEAL_SEAL is set; EINVAL for a seal that this kernel does not know.  In which order seals
        can be added: hvmodel.host.seals.
        """
        fd = self.fd
        check_seals("MemFd.add_seals", seals)
        add_seals(fd, seals)
        self._sealed |= seals

    def resize(self, size: int | str) -> None:
        """Makes the file `size` bytes long, whole pages (ftruncate): what is cut off is lost, what is new is zero.

        Raises ArgumentError, ArgumentTypeError; HostError EPERM where F_SEAL_GROW or F_SEAL_SHRINK forbids it, EFBIG.
        """
        fd = self.fd
        value = page_multiple(size, "MemFd.resize", "size", page_size=self._page_size)
        error = -lib.hv_ftruncate(fd, value)
        if error > 0:
            detail, accepted = None, None
            if error == errno.EPERM:
                now = file_size(fd)
                seal = "F_SEAL_GROW" if value > now else "F_SEAL_SHRINK"
                detail, accepted = f"{seal} is set", f"its size, {now:#x}"
            raise HostError(error, "ftruncate", "size", value, accepted, detail)

    def close(self) -> None:
        """Closes the descriptor; mappings of the file live on.  Closing twice is fine."""
        if self._fd >= 0 and self._finalizer.detach():
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<MemFd closed>"
        try:
            size = f"{self.size:#x}"
        except HostError:
            size = "?"  # somebody else has closed the descriptor, and errors show this
        return f"MemFd({self._name!r}, fd={self._fd}, size={size})"

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be copied or pickled: it owns a file descriptor of this process")


def file_size(fd: int) -> int:
    """Size in bytes of any file descriptor's file; HostError where it has none."""
    try:
        return os.fstat(fd).st_size
    except OSError as error:
        raise HostError(error.errno or 0, "fstat", "fd", fd) from None


def fd_page_size(fd: int) -> int:
    """Bytes of a page of any file descriptor's file: of hugetlbfs its own, else the host's (fstatfs)."""
    size = lib.hv_fd_page_size(fd)
    if size < 0:
        raise HostError(-size, "fstatfs", "fd", fd)
    return size


def fd_what(fd: int) -> str:
    """What /proc/self/fd says that an open descriptor is: "/memfd:x (deleted)", "socket:[123]", "/dev/kvm"."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        return f"nothing that can be named ({error.strerror})"


# Checks a descriptor that came from elsewhere, and returns its name.  `own` is looked at, `fd` is what errors show.
def _check_file(own: int, call: str, fd: int, least: int, seals: int) -> str:
    import fcntl
    import stat

    accepted = "a memfd, or a file of tmpfs or hugetlbfs"
    status, what = os.fstat(own), fd_what(own)
    have = lib.hv_get_seals(own)
    if not stat.S_ISREG(status.st_mode) or have < 0:
        kinds = {stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFREG: "a file"}
        kinds |= {stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device", stat.S_IFLNK: "a link"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "an anonymous inode")
        if "[kvm-gmem]" in what:
            kind = "a guest_memfd"
        raise ArgumentError(call, "fd", fd, accepted, f"{kind}, which has no seals: {what}")
    if fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ArgumentError(call, "fd", fd, "one opened with O_RDWR", f"{what} was not opened for reading and writing")
    if seals & ~have:
        detail = f"it has {seal_names(have)}, not {seal_names(seals & ~have)}"
        raise ArgumentError(call, "seals", seals, "seals that the file has", detail)
    page_size = fd_page_size(own)
    if status.st_size < least or status.st_size % page_size:
        accepted = f"a file of whole pages ({page_size} bytes), at least {least:#x} bytes long"
        raise ArgumentError(call, "fd", fd, accepted, f"{what} has {status.st_size:#x} bytes")
    return what.removeprefix("/memfd:").removesuffix(" (deleted)")


def _huge_sizes() -> str:
    try:
        names = os.listdir("/sys/kernel/mm/hugepages")
    except OSError:
        names = []
    sizes = sorted(int(name.split("-")[1].removesuffix("kB")) for name in names)
    return f"this host has huge pages of {', '.join(f'{size} KiB' for size in sizes)}" if sizes else "it has none"


def _creation_error(
    error: int, name: str, hugetlb: bool, hugetlbsize: int | str | None, exec: bool | None
) -> HostError:
    call = "memfd_create"
    if error == errno.ENODEV and hugetlb:
        return HostError(error, call, "hugetlbsize", hugetlbsize, "a size of huge pages of this host", _huge_sizes())
    if error == errno.EACCES:
        detail = "the sysctl vm.memfd_noexec is 2: executable memory files are forbidden"
        return HostError(error, call, "exec", exec, "False", detail)
    if error == errno.EINVAL and exec is not None:
        return HostError(error, call, "exec", exec, "None", "this kernel does not know it: it came with Linux 6.3")
    return HostError(error, call, "name", name)
