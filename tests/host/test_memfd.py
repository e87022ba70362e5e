from __future__ import annotations

import copy
import errno
import fcntl
import os
import pickle
import resource
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel._ffi import lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.host import (
    F_SEAL_EXEC,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    PROT_READ,
    Mapping,
    MemFd,
    seal_names,
)
from tests.host.held import fds, nothing_leaks
from tests.need import need

PAGE = 4096


def test_constants_are_the_systems() -> None:
    assert F_SEAL_SEAL == fcntl.F_SEAL_SEAL
    assert F_SEAL_SHRINK == fcntl.F_SEAL_SHRINK
    assert F_SEAL_GROW == fcntl.F_SEAL_GROW
    assert F_SEAL_WRITE == fcntl.F_SEAL_WRITE
    assert (F_SEAL_FUTURE_WRITE, F_SEAL_EXEC) == (0x10, 0x20)  # include/uapi/linux/fcntl.h; Python 3.11 lacks them


def test_a_memfd_is_what_the_kernel_shows() -> None:
    with nothing_leaks(), MemFd("a name", "64K") as memfd:
        assert os.readlink(f"/proc/self/fd/{memfd.fd}") == "/memfd:a name (deleted)"
        assert os.fstat(memfd.fd).st_size == memfd.size == 65536
        assert fcntl.fcntl(memfd.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert fcntl.fcntl(memfd.fd, fcntl.F_GET_SEALS) == memfd.seals == 0
        assert memfd.fileno() == memfd.fd
        assert repr(memfd) == f"MemFd('a name', fd={memfd.fd}, size=0x10000)"


def test_seals_are_the_kernels() -> None:
    with MemFd("sealed", 2 * PAGE, seals=F_SEAL_GROW | F_SEAL_SHRINK) as memfd:
        assert fcntl.fcntl(memfd.fd, fcntl.F_GET_SEALS) == memfd.seals == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
        for size in (PAGE, 3 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(memfd.fd, size)
        memfd.add_seals(F_SEAL_SEAL)
        with pytest.raises(HostError, match="no seal can be added") as caught:
            memfd.add_seals(F_SEAL_WRITE)
        assert caught.value.errno == errno.EPERM
        assert (caught.value.call, caught.value.field) == ("fcntl(F_ADD_SEALS)", "seals")
        assert caught.value.value == F_SEAL_WRITE


def test_write_seal_is_busy_while_a_writable_mapping_lives() -> None:
    with nothing_leaks(), MemFd("busy", PAGE, seals=F_SEAL_SHRINK) as memfd:
        with Mapping(memfd, PAGE):
            with pytest.raises(HostError, match="shared writable mapping of this memfd is alive") as caught:
                memfd.add_seals(F_SEAL_WRITE)
            assert caught.value.errno == errno.EBUSY
            assert "F_SEAL_FUTURE_WRITE" in str(caught.value)
            assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
            memfd.add_seals(F_SEAL_FUTURE_WRITE)
        memfd.add_seals(F_SEAL_WRITE)
        with pytest.raises(HostError, match="sealed with WRITE") as refused:
            Mapping(memfd, PAGE)
        assert refused.value.errno == errno.EPERM
        with pytest.raises(PermissionError):
            os.pwrite(memfd.fd, b"x", 0)
        assert memfd.seals == F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE | F_SEAL_WRITE
        with Mapping(memfd, PAGE, shared=False) as private:
            private.write(0, b"mine")
            assert private.read(0, 4) == b"mine"
            assert os.pread(memfd.fd, 4, 0) == bytes(4)


def test_seal_names() -> None:
    assert seal_names(0) == "0"
    assert seal_names(0x3F) == "SEAL|SHRINK|GROW|WRITE|FUTURE_WRITE|EXEC"


def test_names() -> None:
    # memfd_create(2): NAME_MAX (255) less "memfd:".
    for name in ("", "x" * 249, "ü" * 124, "\udcff"):
        with MemFd(name, PAGE) as memfd:
            assert os.readlink(f"/proc/self/fd/{memfd.fd}") == f"/memfd:{name} (deleted)"
            assert memfd.name == name
    for name in ("x" * 250, "ü" * 125, "a\0b", "\ud800"):
        with nothing_leaks(), pytest.raises(ArgumentError, match="at most 249 bytes without NUL") as caught:
            MemFd(name, PAGE)
        assert (caught.value.field, caught.value.value) == ("name", name)
    # The kernel agrees about the limit.
    os.close(os.memfd_create("x" * 249))
    with pytest.raises(OSError):
        os.memfd_create("x" * 250)


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, -PAGE, 1 << 63, 1 << 64, "0", "1", "5K", "", "x", "-4K"])
def test_sizes_refused(size: int | str) -> None:
    with nothing_leaks(), pytest.raises(ArgumentError) as caught:
        MemFd("size", size)
    assert (caught.value.call, caught.value.field) == ("MemFd", "size")


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("name", (b"bytes", PAGE, 0)),
        ("name", (None, PAGE, 0)),
        ("size", ("n", 4096.0, 0)),
        ("size", ("n", None, 0)),
        ("size", ("n", True, 0)),
        ("seals", ("n", PAGE, "GROW")),
        ("seals", ("n", PAGE, None)),
        ("seals", ("n", PAGE, True)),
    ],
)
def test_types_refused(field: str, arguments: tuple[object, object, object]) -> None:
    name, size, seals = arguments
    with nothing_leaks(), pytest.raises(ArgumentTypeError) as caught:
        MemFd(name, size, seals=seals)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("seals", [0x40, -1, 1 << 40])
def test_unknown_seals_refused(seals: int) -> None:
    with nothing_leaks(), pytest.raises(ArgumentError, match="SHRINK"):
        MemFd("n", PAGE, seals=seals)
    with MemFd("n", PAGE) as memfd, pytest.raises(ArgumentError, match="SHRINK"):
        memfd.add_seals(seals)


def test_refused_calls_leave_nothing_open() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with nothing_leaks():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
            with pytest.raises(HostError) as caught:
                MemFd("big", 2 << 20)
            assert (caught.value.call, caught.value.errno) == ("ftruncate", errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


def test_no_descriptor_left() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = os.dup(0)
    os.close(top)
    resource.setrlimit(resource.RLIMIT_NOFILE, (top, limits[1]))
    try:
        with pytest.raises(HostError) as caught:
            MemFd("n", PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (caught.value.call, caught.value.errno) == ("memfd_create", errno.EMFILE)


def test_close_is_idempotent_and_final() -> None:
    memfd = MemFd("n", PAGE)
    memfd.close()
    memfd.close()
    assert repr(memfd) == "<MemFd closed>"
    for use in (
        lambda: memfd.fd,
        lambda: memfd.size,
        lambda: memfd.seals,
        memfd.fileno,
        lambda: memfd.add_seals(F_SEAL_SEAL),
        lambda: Mapping(memfd, PAGE),
    ):
        with pytest.raises(ClosedError, match="MemFd"):
            use()


def test_unclosed_warns_and_closes() -> None:
    with nothing_leaks():
        memfd = MemFd("forgotten", PAGE)
        assert fds()["/memfd:forgotten (deleted)"] == 1
        with pytest.warns(ResourceWarning, match="unclosed MemFd.'forgotten'"):
            del memfd


def test_readonly_descriptor_is_refused_by_mmap() -> None:
    with MemFd("ro", PAGE, seals=F_SEAL_SHRINK) as memfd:
        fd = os.open(f"/proc/self/fd/{memfd.fd}", os.O_RDONLY)
        try:
            with pytest.raises(HostError) as caught:
                Mapping(fd, PAGE)
            assert (caught.value.call, caught.value.field, caught.value.errno) == ("mmap", "prot", errno.EACCES)
            with Mapping(fd, PAGE, prot=PROT_READ) as mapping:
                assert bytes(mapping.view(0, 4)) == bytes(4)
        finally:
            os.close(fd)


anything = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=300), st.binary(max_size=9))


@given(name=anything, size=anything, seals=anything)
def test_any_arguments_work_or_raise_ours(name: object, size: object, seals: object) -> None:
    try:
        memfd = MemFd(name, size, seals=seals)  # type: ignore[arg-type]
    except (ArgumentError, ArgumentTypeError, HostError):
        return
    with memfd:
        assert (memfd.size, memfd.seals) == (size, seals)


@given(pages=st.integers(1, 1 << 20), seals=st.integers(0, 0x3F))
def test_good_arguments_work(pages: int, seals: int) -> None:
    with MemFd("good", pages * PAGE, seals=seals) as memfd:
        assert memfd.size == pages * PAGE
        # EXEC of a file with execute mode bits brings the four that fix its contents: memfd.c, memfd_add_seals.
        assert memfd.seals == seals | (0x1E if seals & F_SEAL_EXEC else 0)


# Flags


def mode_of(memfd: MemFd) -> int:
    return os.fstat(memfd.fd).st_mode & 0o777


def test_execute_bits() -> None:
    # memfd_create(2): mode 0777, or 0666 and F_SEAL_EXEC with MFD_NOEXEC_SEAL, which implies MFD_ALLOW_SEALING.
    with MemFd("n", PAGE, exec=True) as memfd:
        assert (mode_of(memfd), memfd.seals) == (0o777, 0)
    with MemFd("n", PAGE, exec=False) as memfd:
        assert (mode_of(memfd), memfd.seals) == (0o666, F_SEAL_EXEC)
        with pytest.raises(PermissionError):
            os.fchmod(memfd.fd, 0o777)
        memfd.add_seals(F_SEAL_GROW)
    with MemFd("n", PAGE) as memfd:
        if Path("/proc/sys/vm/memfd_noexec").read_text().strip() == "0":
            assert mode_of(memfd) == 0o777


def test_without_sealing() -> None:
    with MemFd("n", PAGE, allow_sealing=False) as memfd:
        assert fcntl.fcntl(memfd.fd, fcntl.F_GET_SEALS) == memfd.seals == F_SEAL_SEAL
        with pytest.raises(HostError) as caught:
            memfd.add_seals(F_SEAL_GROW)
        assert caught.value.errno == errno.EPERM
    for arguments in ({"seals": F_SEAL_GROW, "allow_sealing": False}, {"exec": False, "allow_sealing": False}):
        with nothing_leaks(), pytest.raises(ArgumentError):
            MemFd("n", PAGE, **arguments)


def huge_sizes() -> list[int]:
    root = "/sys/kernel/mm/hugepages"
    return [int(name.split("-")[1][:-2]) << 10 for name in os.listdir(root)] if os.path.isdir(root) else []


def test_huge_pages() -> None:
    if not huge_sizes():
        pytest.skip("this kernel has no hugetlb")
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Hugepagesize"))
    default = int(line.split()[1]) << 10
    # A file takes no page from the pool before it is mapped.
    with nothing_leaks(), MemFd("huge", 3 * default, hugetlb=True, seals=F_SEAL_SHRINK) as memfd:
        assert (memfd.page_size, memfd.hugetlb, memfd.size) == (default, True, 3 * default)
        assert os.fstatvfs(memfd.fd).f_bsize == default
        assert memfd.seals == F_SEAL_SHRINK
        with pytest.raises(ArgumentError, match="multiple of") as caught:
            memfd.resize(default + PAGE)
        assert caught.value.field == "size"
        with MemFd.from_fd(memfd.fd) as again:
            assert (again.page_size, again.hugetlb) == (default, True)
    for size in huge_sizes():
        with MemFd("huge", size, hugetlb=True, hugetlbsize=size) as memfd:
            assert memfd.page_size == os.fstatvfs(memfd.fd).f_bsize == size
    with MemFd("small", PAGE) as memfd:
        assert (memfd.page_size, memfd.hugetlb) == (PAGE, False)


def test_huge_pages_refused() -> None:
    sizes = huge_sizes()
    if not sizes:
        pytest.skip("this kernel has no hugetlb")
    strange = 1 << 16
    while strange in sizes:
        strange <<= 1
    with nothing_leaks(), pytest.raises(HostError) as caught:
        MemFd("n", strange, hugetlb=True, hugetlbsize=strange)
    assert (caught.value.errno, caught.value.field, caught.value.value) == (errno.ENODEV, "hugetlbsize", strange)
    assert f"{min(sizes) >> 10} KiB" in str(caught.value)
    for field, size, arguments in (
        ("size", PAGE, {"hugetlb": True}),
        ("size", max(sizes) + min(sizes) // 2, {"hugetlb": True, "hugetlbsize": max(sizes)}),
        ("hugetlbsize", 2 << 20, {"hugetlb": True, "hugetlbsize": 3 << 20}),
        ("hugetlbsize", 2 << 20, {"hugetlb": True, "hugetlbsize": 0}),
        ("hugetlbsize", 2 << 20, {"hugetlb": True, "hugetlbsize": -4096}),
        ("hugetlbsize", 2 << 20, {"hugetlb": True, "hugetlbsize": 1 << 64}),
        ("hugetlbsize", 2 << 20, {"hugetlb": True, "hugetlbsize": "2 pages"}),
        ("hugetlbsize", 2 << 20, {"hugetlbsize": "2M"}),
    ):
        with nothing_leaks(), pytest.raises(ArgumentError) as refused:
            MemFd("n", size, **arguments)
        assert refused.value.field == field


@pytest.mark.parametrize("exec", [1, "yes", 0])
def test_exec_is_a_choice_of_three(exec: object) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        MemFd("n", PAGE, exec=exec)
    assert caught.value.field == "exec"


def test_resize() -> None:
    with MemFd("n", 2 * PAGE) as memfd:
        os.pwrite(memfd.fd, b"x", PAGE)
        memfd.resize("64K")
        assert memfd.size == os.fstat(memfd.fd).st_size == 65536
        memfd.resize(PAGE)
        memfd.resize(2 * PAGE)
        assert os.pread(memfd.fd, 1, PAGE) == b"\0"
        for size in (0, -PAGE, 1, PAGE + 1, 1 << 63, 1 << 64):
            with pytest.raises(ArgumentError) as caught:
                memfd.resize(size)
            assert caught.value.field == "size"
        memfd.add_seals(F_SEAL_GROW)
        with pytest.raises(HostError, match="F_SEAL_GROW is set") as refused:
            memfd.resize(3 * PAGE)
        assert (refused.value.errno, refused.value.field) == (errno.EPERM, "size")
        memfd.resize(PAGE)
        memfd.add_seals(F_SEAL_SHRINK)
        memfd.resize(PAGE)
        memfd.add_seals(F_SEAL_SEAL)
        with pytest.raises(HostError, match="F_SEAL_GROW is set"):
            memfd.resize(2 * PAGE)
        assert memfd.size == PAGE
    with MemFd("n", 2 * PAGE, seals=F_SEAL_SHRINK) as memfd:
        with pytest.raises(HostError, match="F_SEAL_SHRINK is set"):
            memfd.resize(PAGE)
        memfd.resize(3 * PAGE)
    with pytest.raises(ClosedError):
        memfd.resize(PAGE)


# Descriptors from elsewhere


def test_from_fd_is_a_duplicate() -> None:
    with nothing_leaks(), MemFd("theirs", 4 * PAGE, seals=F_SEAL_SHRINK) as theirs:
        mine = MemFd.from_fd(theirs.fd, size=2 * PAGE, seals=F_SEAL_SHRINK)
        assert mine.fd != theirs.fd
        assert (mine.name, mine.size, mine.seals, mine.page_size) == ("theirs", 4 * PAGE, F_SEAL_SHRINK, PAGE)
        assert fcntl.fcntl(mine.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        with Mapping(mine, PAGE) as mapping:
            mapping.write(0, b"seen")
            assert os.pread(theirs.fd, 4, 0) == b"seen"
            assert bytes(mapping.view(0, 4)) == b"seen"
        mine.close()
        assert theirs.size == 4 * PAGE
        with pytest.warns(ResourceWarning, match="unclosed MemFd.'theirs'"):
            MemFd.from_fd(theirs.fd)


def test_from_fd_takes_files_of_tmpfs() -> None:
    import tempfile

    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        if lib.hv_get_seals(file.fileno()) < 0:
            pytest.skip("/dev/shm is no tmpfs")
        file.truncate(PAGE)
        with MemFd.from_fd(file.fileno()) as memfd:
            assert (memfd.size, memfd.seals) == (PAGE, F_SEAL_SEAL)
        file.truncate(100)
        with nothing_leaks(), pytest.raises(ArgumentError, match="whole pages"):
            MemFd.from_fd(file.fileno())


def kvm_gmem() -> int:
    need("kvm")
    from hvmodel import Kvm

    with Kvm() as kvm, kvm.create_vm() as vm:
        return vm.create_guest_memfd(65536)


FOREIGN = {
    "a socket": lambda: socket.socketpair()[0].detach(),
    "a directory": lambda: os.open("/", os.O_RDONLY),
    "a character device": lambda: os.open("/dev/null", os.O_RDWR),
    "a pipe": lambda: os.pipe()[0],
    "a file, which has no seals": lambda: os.open("/proc/version", os.O_RDONLY),
    "an anonymous inode": lambda: os.eventfd(0),
    "a guest_memfd": kvm_gmem,
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("what", FOREIGN)
def test_from_fd_refuses_other_things_by_name(what: str) -> None:
    made = FOREIGN[what]()
    fd = made.fd if hasattr(made, "fd") else made
    try:
        with pytest.raises(ArgumentError, match=what) as caught:
            MemFd.from_fd(fd)
        assert (caught.value.call, caught.value.field, caught.value.value) == ("MemFd.from_fd", "fd", fd)
        assert os.readlink(f"/proc/self/fd/{fd}") in str(caught.value)
    finally:
        os.close(fd) if made is fd else made.close()


def test_from_fd_refuses_kvm_by_name() -> None:
    need("kvm")
    fd = os.open("/dev/kvm", os.O_RDWR)
    try:
        with nothing_leaks(), pytest.raises(ArgumentError, match="character device, which has no seals: /dev/kvm"):
            MemFd.from_fd(fd)
    finally:
        os.close(fd)


def test_from_fd_checks() -> None:
    with MemFd("theirs", 2 * PAGE, seals=F_SEAL_GROW) as theirs:
        for fd in (-1, 1 << 20, 1 << 40):
            with nothing_leaks(), pytest.raises(HostError) as bad:
                MemFd.from_fd(fd)
            assert bad.value.errno == errno.EBADF
        for fd in ("3", None, True, 3.0):
            with pytest.raises(ArgumentTypeError):
                MemFd.from_fd(fd)
        with nothing_leaks(), pytest.raises(ArgumentError, match="at least 0x3000 bytes long"):
            MemFd.from_fd(theirs.fd, size=3 * PAGE)
        with nothing_leaks(), pytest.raises(ArgumentError, match="it has GROW, not SHRINK") as caught:
            MemFd.from_fd(theirs.fd, seals=F_SEAL_SHRINK | F_SEAL_GROW)
        assert caught.value.field == "seals"
        readonly = os.open(f"/proc/self/fd/{theirs.fd}", os.O_RDONLY)
        path = os.open(f"/proc/self/fd/{theirs.fd}", os.O_PATH)
        try:
            with nothing_leaks(), pytest.raises(ArgumentError, match="not opened for reading and writing"):
                MemFd.from_fd(readonly)
            with nothing_leaks(), pytest.raises(ArgumentError):
                MemFd.from_fd(path)
        finally:
            os.close(readonly)
            os.close(path)
    empty = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
    try:
        with nothing_leaks(), pytest.raises(ArgumentError, match="has 0x0 bytes"):
            MemFd.from_fd(empty)
    finally:
        os.close(empty)


def test_it_cannot_be_pickled_or_copied() -> None:
    # A copy that is closed would leave the number of a descriptor that is none, or somebody else's.
    with MemFd("once", PAGE) as memfd:
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be copied"):
                way(memfd)


def test_a_repr_is_no_error() -> None:
    memfd = MemFd("shown", PAGE)
    other = os.dup(memfd.fd)
    os.close(memfd.fd)
    assert repr(memfd).endswith("size=?)")
    os.dup2(other, memfd.fd)
    os.close(other)
    assert repr(memfd).endswith("size=0x1000)")
    memfd.close()
