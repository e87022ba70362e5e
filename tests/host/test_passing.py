from __future__ import annotations

import errno
import fcntl
import os
import pickle
import resource
import socket
from collections.abc import Iterator

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.host import MemFd, PassingError, receive_fds, send_fds
from hvmodel.host.passing import DATA_MAX
from tests.host.held import nothing_leaks


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM], ids=["stream", "seq", "dgram"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    with nothing_leaks():
        here, there = socket.socketpair(socket.AF_UNIX, request.param)
        with here, there:
            yield here, there


@pytest.fixture
def streams() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def test_a_descriptor_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    with MemFd("passed", "64K") as memfd:
        send_fds(here, [memfd, memfd.fd], b"two of the same")
        data, fds = receive_fds(there, 2)
        assert data == b"two of the same"
        assert len(set(fds)) == 2
        for fd in fds:
            assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:passed (deleted)"
            assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
            os.pwrite(fd, b"hello", 0)
            os.close(fd)
        assert os.pread(memfd.fd, 5, 0) == b"hello"


def test_bytes_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    send_fds(here, [], b"x" * 1000)
    assert receive_fds(there, 0) == (b"x" * 1000, [])


def test_to_another_process(streams: tuple[socket.socket, socket.socket]) -> None:
    here, there = streams
    child = os.fork()
    if not child:
        code = 1
        try:
            _, (fd,) = receive_fds(there)
            os.pwrite(fd, b"from the child", 0)
            code = 0
        finally:
            os._exit(code)
    with MemFd("passed", "64K") as memfd:
        send_fds(here, [memfd])
        assert os.waitpid(child, 0)[1] == 0
        assert os.pread(memfd.fd, 14, 0) == b"from the child"


def test_too_many_are_refused_and_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    for nr_sent, nr_taken in ((2, 1), (1, 0), (40, 3)):
        send_fds(here, [here] * nr_sent)
        with pytest.raises(PassingError, match=r"came, and at most|were lost"):
            receive_fds(there, nr_taken)


def test_too_many_bytes_of_a_message(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    send_fds(here, [here], b"x" * 11)
    with pytest.raises(PassingError, match="more than 10 bytes"):
        receive_fds(there, 1, 10)


def test_the_longest_message_is_one(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    message = os.urandom(DATA_MAX)
    send_fds(here, [here], message)
    data, (fd,) = receive_fds(there)
    os.close(fd)
    assert data == message


def test_a_socket_with_little_room(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # 8192 for the kernel: 4032 bytes in one buffer
    with pytest.raises(ArgumentError, match="at most 4032, or a socket with a larger SO_SNDBUF"):
        send_fds(here, [here], b"x" * 4033)
    send_fds(here, [here], b"x" * 4032)
    data, (fd,) = receive_fds(there)
    os.close(fd)
    assert len(data) == 4032


def test_the_other_side_hangs_up(streams: tuple[socket.socket, socket.socket]) -> None:
    here, there = streams
    there.close()
    with pytest.raises(HostError) as caught:
        send_fds(here, [here])
    assert (caught.value.call, caught.value.errno) == ("sendmsg", errno.EPIPE)
    with pytest.raises(PassingError, match="hung up"):
        receive_fds(here)
    error = pickle.loads(pickle.dumps(PassingError("receive_fds", "why")))
    assert (error.call, error.why) == ("receive_fds", "why")


def test_nobody_sends(streams: tuple[socket.socket, socket.socket]) -> None:
    streams[0].setblocking(False)
    with pytest.raises(HostError) as caught:
        receive_fds(streams[0])
    assert caught.value.errno == errno.EAGAIN
    streams[0].settimeout(0.001)
    with pytest.raises(HostError) as caught:
        receive_fds(streams[0])
    assert caught.value.errno == errno.EAGAIN

    def fill() -> None:
        for _ in range(1000):  # 1 MB: more than the socket takes
            send_fds(streams[0], [], b"x" * 1000)

    with pytest.raises(HostError) as caught:
        fill()
    assert (caught.value.call, caught.value.errno) == ("sendmsg", errno.EAGAIN)


def test_no_room_for_descriptors(streams: tuple[socket.socket, socket.socket]) -> None:
    here, there = streams
    with nothing_leaks():
        send_fds(here, [here, there])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        top = os.dup(0)
        os.close(top)
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, hard))
        try:
            with pytest.raises(PassingError, match="RLIMIT_NOFILE"):
                receive_fds(there, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_refused(streams: tuple[socket.socket, socket.socket]) -> None:
    here, there = streams
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(HostError) as caught:
        send_fds(here, [closed])
    assert (caught.value.errno, caught.value.field) == (errno.EBADF, "fds")
    for fds in ([-1], [1 << 40], [here] * 254):
        with pytest.raises(ArgumentError):
            send_fds(here, fds)
    for fds in (["0"], [True], [None], [1.0]):
        with pytest.raises(ArgumentTypeError):
            send_fds(here, fds)
    for data in (b"", b"x" * 32769):
        with pytest.raises(ArgumentError, match="len"):
            send_fds(here, [], data)
    for max_fds, max_data in ((-1, 1), (254, 1), (1, 0), (1, 32769)):
        with pytest.raises(ArgumentError):
            receive_fds(there, max_fds, max_data)
    with pytest.raises(ArgumentTypeError):
        send_fds(here, [], "text")
    with pytest.raises(ArgumentTypeError):
        receive_fds(here.fileno())
    with socket.socket(socket.AF_INET) as inet, pytest.raises(ArgumentError, match="AF_UNIX"):
        send_fds(inet, [])
    with pytest.raises(ArgumentTypeError, match="fds"):
        send_fds(here, 5)
    here.close()
    with pytest.raises(ClosedError):
        send_fds(here, [])
    with pytest.raises(ClosedError):
        receive_fds(here)
