"""File descriptors passed to another process: `send_fds` and `receive_fds`, over a unix socket.

A descriptor that is passed is a second one of the same open file: same memory, same seals, same offset.  What the
receiver may do with it was decided when the file was opened.  The sender keeps its own.

A unix socket carries descriptors beside bytes (SCM_RIGHTS), and hands them out with the first byte they came with.
So there is always at least one byte.  A message is sent and received as one: a stream does that with what it can keep
in one buffer, and so that is the most.

Source: net/core/scm.c, net/unix/af_unix.c@v6.18; unix(7), sendmsg(2), recvmsg(2).
"""

from __future__ import annotations

import errno
import os
import socket
from array import array

from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HostError, HvError
from .mapping import index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .memfd import MemFd

__all__ = ["DATA_MAX", "FDS_MAX", "PassingError", "receive_fds", "send_fds"]

FDS_MAX = 253
"""As many descriptors as one message may have: SCM_MAX_FD of the kernel."""

DATA_MAX = 32 << 10
"""As many bytes as one message may have: a stream cuts what is longer, and the first part takes the descriptors."""


class PassingError(HvError):
    """What came is not what was to come: the other side hung up, or sent too much or too little.  `call`, `why`."""

    def __init__(self, call: str, why: str) -> None:
        self.call, self.why = call, why
        super().__init__(f"{call}: {why}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.why)


def send_fds(sock: socket.socket, fds: Iterable[int | MemFd], data: bytes = b"\0") -> None:
    """Sends `data` (1 to 32768 bytes) and the descriptors `fds` (at most 253) as one message.

    `sock` is a unix socket: of SOCK_SEQPACKET or SOCK_DGRAM, or a stream on which nothing else is under way.  The
    descriptors stay open here.

    Raises ArgumentError (also for more `data` than half of the socket's SO_SNDBUF has room for), ArgumentTypeError,
    ClosedError; HostError of sendmsg: EBADF for a descriptor that is not open, EPIPE, EAGAIN for a socket whose timeout
    is over, ETOOMANYREFS.

    Calls: sendmsg(2) with SCM_RIGHTS.  Threads: any; messages of two threads on one stream may mix.
    """
    call = "send_fds"
    _check_socket(call, sock)
    if not isinstance(data, bytes):
        raise ArgumentTypeError(call, "data", data, "bytes")
    if not 1 <= len(data) <= DATA_MAX:
        raise ArgumentError(call, "len(data)", len(data), f"1 to {DATA_MAX} bytes")
    room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2 - 64  # a stream would cut it, see DATA_MAX
    if len(data) > room:
        raise ArgumentError(call, "len(data)", len(data), f"at most {room}, or a socket with a larger SO_SNDBUF")
    if not hasattr(fds, "__iter__"):
        raise ArgumentTypeError(call, "fds", fds, "file descriptors, or MemFds")
    numbers = [_number(fd) for fd in fds]
    if len(numbers) > FDS_MAX:
        raise ArgumentError(call, "len(fds)", len(numbers), f"at most {FDS_MAX}")
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", numbers))] if numbers else []
    try:
        sock.sendmsg([data], beside, socket.MSG_NOSIGNAL)
    except OSError as error:
        field = "fds" if error.errno == errno.EBADF else "sock"
        raise HostError(error.errno or errno.EAGAIN, "sendmsg", field, numbers if field == "fds" else None) from None


def receive_fds(sock: socket.socket, max_fds: int = 1, max_data: int = DATA_MAX) -> tuple[bytes, list[int]]:
    """One message: its bytes, and its descriptors, which are close-on-exec and the caller's to close.

    `max_fds` and `max_data` are the most that are taken.  What is more is refused: all that came is closed then.

    Raises ArgumentError, ArgumentTypeError, ClosedError; PassingError where the other side has hung up, or has sent
    more than `max_fds` descriptors or `max_data` bytes, or where this process has no descriptors left for them;
    HostError of recvmsg (EAGAIN for a socket whose timeout is over).

    Calls: recvmsg(2) with MSG_CMSG_CLOEXEC.  Threads: one reader of a socket at a time.

    >>> here, there = socket.socketpair()
    >>> with here, there:
    ...     send_fds(here, [here], b"hello")
    ...     data, (fd,) = receive_fds(there)
    ...     os.close(fd)
    ...     data
    b'hello'
    """
    call = "receive_fds"
    _check_socket(call, sock)
    max_fds, max_data = index(max_fds, call, "max_fds"), index(max_data, call, "max_data")
    if not 0 <= max_fds <= FDS_MAX:
        raise ArgumentError(call, "max_fds", max_fds, f"0 to {FDS_MAX}")
    if not 1 <= max_data <= DATA_MAX:
        raise ArgumentError(call, "max_data", max_data, f"1 to {DATA_MAX} bytes")
    fds: array[int] = array("i")
    try:
        # Room for one more descriptor and byte, so that too many are seen, and not cut off in silence.
        room = socket.CMSG_SPACE((max_fds + 1) * fds.itemsize)
        data, beside, flags, _ = sock.recvmsg(max_data + 1, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in beside:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    except OSError as error:
        _close(fds)
        raise HostError(error.errno or errno.EAGAIN, "recvmsg", "sock", None) from None
    except BaseException:
        _close(fds)
        raise
    why = None
    if len(fds) > max_fds:
        why = f"{len(fds)} descriptors came, and at most {max_fds} are taken"
    elif flags & socket.MSG_CTRUNC:
        why = "descriptors were lost: too many came, or this process cannot have more (RLIMIT_NOFILE)"
    elif flags & socket.MSG_TRUNC or len(data) > max_data:
        why = f"more than {max_data} bytes came"
    elif not data:
        why = "the other side has hung up"
    if why is not None:
        _close(fds)
        raise PassingError(call, why)
    return data, fds.tolist()


def _number(fd: int | MemFd) -> int:
    value = fd.fileno() if not isinstance(fd, int) and hasattr(fd, "fileno") else fd
    number = index(value, "send_fds", "fds", "file descriptors, or MemFds")  # type: ignore[arg-type]
    if not 0 <= number < 1 << 31:
        raise ArgumentError("send_fds", "fds", number, "open file descriptors")
    return number


def _check_socket(call: str, sock: socket.socket) -> None:
    if not isinstance(sock, socket.socket):
        raise ArgumentTypeError(call, "sock", sock, "a unix socket")
    if sock.family != socket.AF_UNIX:
        raise ArgumentError(call, "sock", str(sock.family), "a unix socket (AF_UNIX): no other carries descriptors")
    if sock.fileno() < 0:
        raise ClosedError(call, "the socket")


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
