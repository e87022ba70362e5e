"""Guest memory that comes when it is touched: from Python, then from a file in C; and the pages that the guest wrote.

Needs: userfaultfd

Prints:

    asked for page 0x20
    the guest read b'P'
    the guest read b'F'
    written: [range(48, 49)]
"""

from __future__ import annotations

import os

import hvmodel as hv
from hvmodel.host import Fault, MemFd, UserFaultFd

PAGE = 4096


def run(m: hv.Machine, page: int) -> None:
    # mov ax, SEGMENT; mov ds, ax; mov al, [0]; out 0x10, al; mov byte [1], 'W'; hlt
    segment = (page * PAGE // 16).to_bytes(2, "little")
    m.load(0x7C00, b"\xb8" + segment + bytes.fromhex("8ed8 a00000 e610 c606010057 f4"))
    m.vcpu.real_mode(entry=0x7C00)
    for exit in m.exits(timeout=10):
        if not isinstance(exit, hv.IoOut):
            return
        print("the guest read", exit.data)


def answer(fault: Fault) -> bytes:
    print(f"asked for page {fault.page // PAGE:#x}")
    return b"P" * PAGE


with hv.Machine(ram="1M") as m, MemFd("image", m.ram.used_length) as image, UserFaultFd() as uffd:
    ram = m.ram.mapping
    os.pwrite(image.fd, b"F" * PAGE, 0x30 * PAGE)

    uffd.register(ram, 0x20 * PAGE, PAGE, "missing")
    uffd.serve(answer)  # in a thread of Python
    run(m, 0x20)
    uffd.stop()

    uffd.register(ram, 0x30 * PAGE, 0x10 * PAGE, ["missing", "wp"])
    uffd.serve_native(image)  # in a thread of C
    run(m, 0x30)
    print("written:", uffd.take_written(ram, 0x30 * PAGE, 0x10 * PAGE))
