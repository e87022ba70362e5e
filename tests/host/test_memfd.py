from __future__ import annotations

import errno
import fcntl
import os
import pickle
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
