"""A machine is strict unless told otherwise: an access that nobody claims is an error with all there is to know.

The guest writes 0x41 to port 0x99 with `out 0x99, al` at 0000:7C02, after a `mov al, 0x41` of two bytes.

Prints:

    port 0x99: 41 at 0000:7c02, e6 99
"""

from __future__ import annotations

import hvmodel as hv

with hv.Machine(ram="1M") as m:
    m.load(0x7C00, bytes.fromhex("b041 e699 f4"))
    m.vcpu.real_mode(entry=0x7C00)
    try:
        m.run(timeout=10)
    except hv.GuestAccessError as e:
        print(f"{e.space} {e.address:#x}: {e.data.hex()} at {e.cs:04x}:{e.rip:04x}, {e.insn[:2].hex(' ')}")
