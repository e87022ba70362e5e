"""A device in Python: a port that counts its reads.

Each read exit is answered before the guest goes on; forgetting it is an error that says so.

Prints:

    010203
    UnansweredError
"""

from __future__ import annotations

import hvmodel as hv

GUEST = bytes.fromhex(
    "b90300"  #      mov cx, 3
    "e420"  #   l:   in  al, 0x20
    "e621"  #        out 0x21, al
    "e2fa"  #        loop l
    "f4"  #          hlt
)

with hv.Machine(ram="1M") as m:
    m.load(0x7C00, GUEST)
    m.vcpu.real_mode(entry=0x7C00)
    reads, written = 0, b""
    for exit in m.exits(timeout=10):
        match exit:
            case hv.IoIn(port=0x20):
                reads += 1
                m.answer(reads)
            case hv.IoOut(port=0x21, data=data):
                written += data
            case hv.Hlt():
                break
    print(written.hex())

    m.vcpu.real_mode(entry=0x7C00)
    try:
        for _ in m.exits(timeout=10):
            pass  # the first exit is the read, and nobody answers it
    except hv.UnansweredError as error:
        print(type(error).__name__)
    m.answer(0)
