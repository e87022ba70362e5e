"""Memory-mapped I/O: an access where there is no RAM is an exit with address and data.

A machine with 640K has none at 0xA0000.

Prints:

    MmioWrite(gpa=0xa0000, data=b'A')
    MmioRead(gpa=0xa0001, size=1)
    IoOut(port=0x10, size=1, count=1, data=b'Z')
    Hlt()
"""

from __future__ import annotations

import hvmodel as hv

GUEST = bytes.fromhex(
    "b800a0"  #      mov ax, 0xa000
    "8ed8"  #        mov ds, ax
    "c606000041"  #  mov byte [0], 'A'
    "a00100"  #      mov al, [1]
    "e610"  #        out 0x10, al
    "f4"  #          hlt
)

with hv.Machine(ram="640K") as m:
    m.load(0x7C00, GUEST)
    m.vcpu.real_mode(entry=0x7C00)
    for exit in m.exits(timeout=10):
        print(exit)
        match exit:
            case hv.MmioRead():
                m.answer(b"Z")
            case hv.Hlt():
                break
