from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, HostError
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
    seal_order,
    who_maps,
)
from hvmodel.host.seals import seal_error, seals_after
from tests.host.held import nothing_leaks

PAGE = 4096
SEALS = (F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_EXEC)


def kernel_adds(have: int, add: int, executable: bool, mapped: bool) -> tuple[int, int]:
    """(errno or 0, the seals afterwards) of adding `add` to a memfd that has `have`."""
    fd = os.memfd_create("pair", os.MFD_ALLOW_SEALING)
    held = None
    try:
        os.ftruncate(fd, PAGE)
        if not executable:
            os.fchmod(fd, 0o666)
        if mapped:
            held = mmap.mmap(fd, PAGE)
        if have:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, have)
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, add)
            error = 0
        except OSError as refused:
            error = refused.errno or -1
        return error, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    finally:
        if held is not None:
            held.close()
        os.close(fd)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("executable", [False, True])
def test_every_set_of_seals_added_to_every_other(executable: bool, mapped: bool) -> None:
    # The rules against the kernel: 64 x 64 sets, with and without a writable mapping, executable or not.
    seen = set()
    for have, add in itertools.product(range(64), range(64)):
        had = seals_after(0, have, executable=executable)
        if mapped and had & F_SEAL_WRITE:
            continue  # there cannot be a writable mapping then
        error, after = kernel_adds(have, add, executable, mapped)
        assert error == seal_error(had, add, executable=executable, mapped=mapped), (have, add)
        assert after == (had if error else seals_after(had, add, executable=executable)), (have, add)
        seen.add(error)
    assert seen == ({0, errno.EPERM, errno.EBUSY} if mapped else {0, errno.EPERM})


@pytest.mark.parametrize("first", SEALS)
@pytest.mark.parametrize("second", SEALS)
@pytest.mark.parametrize("mapped", [False, True])
def test_the_order_of_each_pair(first: int, second: int, mapped: bool) -> None:
    # Where there is an order, it works one by one; where there is none, neither of the two works.
    with nothing_leaks(), MemFd("order", PAGE) as memfd:
        held = Mapping(memfd, PAGE) if mapped else None
        try:
            order = seal_order(first | second, mapped=mapped)
        except ArgumentError:
            for pair in ((first, second), (second, first)):
                with MemFd("again", PAGE) as again, Mapping(again, PAGE), pytest.raises(HostError):
                    [again.add_seals(seal) for seal in pair]
            assert mapped
        else:
            assert set(order) == {first, second}
            for seal in order:
                memfd.add_seals(seal)
            assert memfd.seals & (first | second) == first | second
        finally:
            if held is not None:
                held.close()


def test_orders() -> None:
    assert seal_order(0) == ()
    assert seal_order(0x3F)[-1] == F_SEAL_SEAL
    assert seal_order(F_SEAL_GROW | F_SEAL_SHRINK, have=F_SEAL_GROW) == (F_SEAL_SHRINK,)
    assert seal_order(F_SEAL_GROW, have=F_SEAL_GROW | F_SEAL_SEAL) == ()
    assert seal_order(F_SEAL_EXEC, executable=False, mapped=True) == (F_SEAL_EXEC,)
    with pytest.raises(ArgumentError, match="no seal can be added"):
        seal_order(F_SEAL_GROW, have=F_SEAL_SEAL)
    with pytest.raises(ArgumentError, match="FUTURE_WRITE"):
        seal_order(F_SEAL_WRITE, mapped=True)
    for bad in (0x40, -1):
        with pytest.raises(ArgumentError):
            seal_order(bad)
    for wrong in ("GROW", True):
        with pytest.raises(ArgumentTypeError):
            seal_order(0, have=wrong)


def test_busy_names_this_process_and_the_address() -> None:
    with nothing_leaks(), MemFd("mine", 4 * PAGE) as memfd, Mapping(memfd, PAGE, offset=PAGE) as mapping:
        with pytest.raises(HostError, match=f"this process at {mapping.hva:#x}") as caught:
            memfd.add_seals(F_SEAL_WRITE | F_SEAL_SHRINK)
        assert (caught.value.errno, caught.value.field) == (errno.EBUSY, "seals")
        assert memfd.seals == 0  # none of them was added
        assert who_maps(memfd.fd) == {os.getpid(): [(mapping.hva, PAGE)]}


def test_busy_names_another_process() -> None:
    with nothing_leaks(), MemFd("theirs", PAGE) as memfd:
        mapping = Mapping(memfd, PAGE)
        wake, hold = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hold)
            os.read(wake, 1)  # until the other end is gone
            os._exit(0)
        os.close(wake)
        try:
            address = mapping.hva
            mapping.close()
            with pytest.raises(HostError, match=f"process {child} at {address:#x}") as caught:
                memfd.add_seals(F_SEAL_WRITE)
            assert caught.value.errno == errno.EBUSY
            assert who_maps(memfd.fd) == {child: [(address, PAGE)]}
        finally:
            os.close(hold)
            os.waitpid(child, 0)
        memfd.add_seals(F_SEAL_WRITE)


def test_a_mapping_that_could_become_writable_is_as_good_as_writable() -> None:
    with MemFd("could", PAGE) as memfd:
        with Mapping(memfd, PAGE, prot=PROT_READ) as mapping:
            with pytest.raises(HostError, match=f"{mapping.hva:#x}") as caught:
                memfd.add_seals(F_SEAL_WRITE)
            assert caught.value.errno == errno.EBUSY
        with Mapping(memfd, PAGE, shared=False):
            assert who_maps(memfd.fd) == {}
            assert set(who_maps(memfd.fd, shared=False)) == {os.getpid()}
            memfd.add_seals(F_SEAL_WRITE)
        with Mapping(memfd, PAGE, prot=PROT_READ) as mapping, pytest.raises(HostError) as refused:
            mapping.protect(0, None, 3)
        assert refused.value.errno == errno.EACCES


def test_pages_that_are_pinned_are_busy_without_a_mapping() -> None:
    # vmsplice without SPLICE_F_GIFT keeps a reference to the page in the pipe.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with MemFd("pinned", PAGE) as memfd:
        reader, writer = os.pipe()
        try:
            with Mapping(memfd, PAGE) as mapping:
                mapping.write(0, b"x")
                iovec = (ctypes.c_uint64 * 2)(mapping.hva, PAGE)
                assert libc.vmsplice(writer, ctypes.byref(iovec), ctypes.c_ulong(1), 0) == PAGE
            with pytest.raises(HostError, match="pinned for I/O") as caught:
                memfd.add_seals(F_SEAL_WRITE)
            assert caught.value.errno == errno.EBUSY
        finally:
            os.close(reader)
            os.close(writer)
        memfd.add_seals(F_SEAL_WRITE)


def test_why_not_permitted() -> None:
    with MemFd("ro", PAGE) as memfd:
        fd = os.open(f"/proc/self/fd/{memfd.fd}", os.O_RDONLY)
        try:
            from hvmodel.host.seals import add_seals

            with pytest.raises(HostError, match="not opened for writing") as caught:
                add_seals(fd, F_SEAL_GROW)
            assert caught.value.errno == errno.EPERM
        finally:
            os.close(fd)
        memfd.add_seals(F_SEAL_SEAL)
        with pytest.raises(HostError, match="F_SEAL_SEAL is set"):
            memfd.add_seals(F_SEAL_GROW)
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(HostError, match="has no seals"):
            add_seals(fd, F_SEAL_GROW)
        assert who_maps(fd) == {}
    finally:
        os.close(fd)
    with pytest.raises(HostError) as gone:
        who_maps(1 << 20)
    assert gone.value.errno == errno.EBADF


def test_exec_of_an_executable_file_brings_the_rest() -> None:
    with MemFd("x", PAGE) as memfd:
        memfd.add_seals(F_SEAL_EXEC)
        assert seal_names(memfd.seals) == "SHRINK|GROW|WRITE|FUTURE_WRITE|EXEC"
    with MemFd("nx", PAGE, exec=False) as memfd, Mapping(memfd, PAGE):
        assert memfd.seals == F_SEAL_EXEC
        memfd.add_seals(F_SEAL_FUTURE_WRITE)
