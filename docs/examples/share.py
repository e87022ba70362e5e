"""Guest RAM that another process maps too: the descriptor goes over a unix socket, the memory is the same.

The other process is this script again, with one argument: the number of its end of the socket.  It writes a guest into
the memory; this one runs it.

Prints:

    the same 1048576 bytes, called pc.ram
    the guest wrote b'hi'
    the other process sees b'done'
"""

from __future__ import annotations

import socket
import subprocess
import sys

import hvmodel as hv
from hvmodel.ram import receive_block, send_block

#        mov dx, 0x3f8   mov al, 'h'  out dx, al  mov al, 'i'  out dx, al  hlt
GUEST = bytes.fromhex("baf803 b068 ee b069 ee f4")


def other(sock: socket.socket) -> None:
    with sock, receive_block(sock) as ram:  # refused if it could be cut off under our feet
        print(f"the same {ram.used_length} bytes, called {ram.idstr}", flush=True)
        ram.write(0x7C00, GUEST)
        sock.send(b"run it")
        sock.recv(16)
        print("the other process sees", bytes(ram.view(0x1000, 4)), flush=True)


def main() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, hv.Machine(ram="1M") as m:
        command = [sys.executable, __file__, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]):
            send_block(ours, m.ram)
            ours.recv(16)
            m.vcpu.real_mode(entry=0x7C00)
            written = b""
            for exit in m.exits(timeout=5.0):
                match exit:
                    case hv.IoOut(port=0x3F8, data=data):
                        written += data
                    case hv.Hlt():
                        break
            print("the guest wrote", written, flush=True)
            m.write(0x1000, b"done")
            ours.send(b"look")


if len(sys.argv) > 1:
    other(socket.socket(fileno=int(sys.argv[1])))
else:
    main()
