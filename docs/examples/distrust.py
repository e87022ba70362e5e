"""Shared memory with a peer that must not be trusted: what is checked must be what is used.

The peer puts a message (its length, then its bytes) into a memfd and passes it.  Whoever checks the length and then
reads it again has lost: meanwhile the peer has changed it.  Two ways out: copy once and look at the copy only, or take
nothing but memory that is sealed against writing, which may be used in place for as long as one likes.

The peer is this script again, with one argument: the number of its end of the socket.

Prints:

    looked at twice: checked 4, used 4096
    copied once: checked 4, used 4
    not sealed against writing: refused
    sealed while the peer can write: Device or resource busy
    sealed: checked 4, used 4, and the peer got: Operation not permitted
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys

import hvmodel as hv
from hvmodel.host import F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_WRITE, Mapping, MemFd, receive_fds, send_fds
from hvmodel.ram import RamBlock

LENGTH = struct.Struct("<I")
FIXED = F_SEAL_SHRINK | F_SEAL_GROW  # it cannot be cut off: touching it is never SIGBUS
SEALED = FIXED | F_SEAL_WRITE  # and what it says cannot change


def length(message: memoryview | bytes) -> int:
    (nr_bytes,) = LENGTH.unpack_from(message)
    return int(nr_bytes)


# ---- the peer: does as it is told, and the worst it can ----


def peer(sock: socket.socket) -> None:
    with sock, MemFd("message", "64K", seals=FIXED) as memfd:
        mapping = Mapping(memfd, "64K")
        mapping.write(0, LENGTH.pack(4) + b"spam")
        send_fds(sock, [memfd])
        while command := sock.recv(16):
            answer = "done"
            try:
                match command:
                    case b"lie":
                        mapping.write(0, LENGTH.pack(4096))
                    case b"do not lie":
                        mapping.write(0, LENGTH.pack(4))
                    case b"seal":
                        memfd.add_seals(F_SEAL_WRITE)
                    case b"unmap":
                        mapping.close()
                    case b"write":
                        os.pwrite(memfd.fd, LENGTH.pack(4096), 0)
            except OSError as error:
                answer = error.strerror or "?"
            sock.send(answer.encode())


# ---- who must not be fooled ----


def main(sock: socket.socket) -> None:
    def tell(command: str) -> str:
        sock.send(command.encode())
        return sock.recv(100).decode()

    _, (fd,) = receive_fds(sock)
    with RamBlock.from_fd("message", fd, readonly=True, seals=FIXED) as block:
        view = block.view(0, 64)
        checked = length(view)
        tell("lie")
        print(f"looked at twice: checked {checked}, used {length(view)}")
        view.release()

        tell("do not lie")
        copy = block.read(0, 64)
        checked = length(copy)
        tell("lie")
        print(f"copied once: checked {checked}, used {length(copy)}")

    try:
        RamBlock.from_fd("message", fd, readonly=True, seals=SEALED)
    except hv.ArgumentError:
        print("not sealed against writing: refused")

    tell("do not lie")
    print("sealed while the peer can write:", tell("seal"))  # the kernel knows who has it mapped
    tell("unmap")
    tell("seal")
    with RamBlock.from_fd("message", fd, readonly=True, seals=SEALED) as block:
        view = block.view(0, 64)
        checked = length(view)
        answer = tell("write")
        print(f"sealed: checked {checked}, used {length(view)}, and the peer got: {answer}")
        view.release()
    os.close(fd)


if len(sys.argv) > 1:
    peer(socket.socket(fileno=int(sys.argv[1])))
else:
    ours, theirs = socket.socketpair()
    with subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]):
        theirs.close()
        with ours:
            main(ours)
