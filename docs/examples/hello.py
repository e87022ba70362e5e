"""A guest that writes on its serial port and halts.

Prints:

    hello, world
    halted
"""

from __future__ import annotations

import hvmodel as hv

GUEST = bytes.fromhex(
    "be0f7c"  # 7c00     mov si, 0x7c0f
    "baf803"  # 7c03     mov dx, 0x3f8
    "ac"  #     7c06 l:  lodsb
    "84c0"  #   7c07     test al, al
    "7403"  #   7c09     jz  7c0e
    "ee"  #     7c0b     out dx, al
    "ebf8"  #   7c0c     jmp l
    "f4"  #     7c0e     hlt
)  #            7c0f     the text

with hv.Machine(ram="1M") as m:
    console = m.console  # claims the serial port and the debug ports: C captures what the guest writes there
    m.load(0x7C00, GUEST + b"hello, world\n\0")
    m.vcpu.real_mode(entry=0x7C00)
    stop = m.run(timeout=10)
    print(console.serial.read().decode(), end="")
    print(stop.reason)
