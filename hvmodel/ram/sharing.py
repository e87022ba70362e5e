"""RAM blocks passed to another process: `send_block` and `receive_block`, over a unix socket.

One message carries the descriptor of the block's memfd and what is to be known about the block:

    |0  magic|8  used_length|16  max_length|24  fd_offset|32  idstr ...        little endian, 8 bytes each

Both processes then have the same memory; neither sees what the other remembers of its own writes (`host_dirty`).

The receiver believes nothing that it can check: the lengths must fit the file, and the file must be sealed so that the
sender cannot cut it off under the receiver's feet.  What the bytes in it say can still change at any time, unless the
file is sealed with WRITE: docs/ram.md.
"""

from __future__ import annotations

import os
import struct

from ..errors import ArgumentError, ArgumentTypeError
from ..host.memfd import F_SEAL_GROW, F_SEAL_SHRINK
from ..host.passing import PassingError, receive_fds, send_fds
from ..units import PAGE_SIZE
from .block import RamBlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket

__all__ = ["receive_block", "send_block"]

_MAGIC = b"hvblock1"
_HEADER = struct.Struct("<8sQQQ")


def send_block(sock: socket, block: RamBlock) -> None:
    """Sends `block` to the other end of a unix socket; it stays open here.  `receive_block` takes it there.

    Raises ArgumentTypeError; ArgumentError for a block that has no memfd (there is nothing that could be shared, or
    nothing that could be sealed), or is mapped privately; ClosedError; and what `send_fds` does.
    """
    if not isinstance(block, RamBlock):
        raise ArgumentTypeError("send_block", "block", block, "a RamBlock")
    memfd = block.memfd
    if memfd is None or not block.mapping.shared:
        why = "it has no memfd" if memfd is None else "its writes go to private copies"
        raise ArgumentError("send_block", "block", block, "a block of a memfd, with share=on", why)
    header = _HEADER.pack(_MAGIC, block.used_length, block.max_length, block.fd_offset)
    send_fds(sock, [memfd], header + os.fsencode(block.idstr))


def receive_block(sock: socket, *, readonly: bool = False, seals: int = F_SEAL_SHRINK | F_SEAL_GROW) -> RamBlock:
    """A block that the other end of a unix socket has sent: the same memory, mapped here too.

    `readonly` maps it without PROT_WRITE.  `seals` are those that its file must have: with SHRINK touching it is never
    SIGBUS.  Of a resizeable block this has what is used now; it does not follow the sender's `resize`.

    Raises PassingError for a message that is no block, or none; ArgumentError for a file that is no memfd, lacks a
    seal, or is shorter than what the sender says; HostError of recvmsg and mmap.  Nothing is left open then.

    >>> import socket
    >>> here, there = socket.socketpair()
    >>> with here, there, RamBlock("pc.ram", "1M") as block:
    ...     send_block(here, block)
    ...     with receive_block(there) as same:
    ...         same.write(0, b"hello")
    ...         block.read(0, 5), same.idstr
    (b'hello', 'pc.ram')
    """
    call = "receive_block"
    data, fds = receive_fds(sock, 1, _HEADER.size + 1024)
    try:
        if len(data) <= _HEADER.size or not data.startswith(_MAGIC) or len(fds) != 1:
            raise PassingError(call, f"{len(data)} bytes and {len(fds)} descriptors came, which are no block")
        _, used_length, max_length, offset = _HEADER.unpack_from(data)
        if not 0 < used_length <= max_length or (used_length | offset) % PAGE_SIZE:
            raise PassingError(call, f"a block of {used_length:#x} bytes, at most {max_length:#x}, from {offset:#x}")
        idstr = os.fsdecode(data[_HEADER.size :])
        return RamBlock.from_fd(idstr, fds[0], used_length, offset=offset, readonly=readonly, seals=seals)
    finally:
        for fd in fds:
            os.close(fd)
