"""SeaBIOS as Debian ships it: mapped as on a PC, started at the reset vector, its banner on debug port 0x402.

Needs: seabios

Prints:

    SeaBIOS (version
"""

from __future__ import annotations

from pathlib import Path

import hvmodel as hv

with hv.Machine(ram="16M", unclaimed="open_bus") as m:
    console = m.console
    m.load_bios(Path("/usr/share/seabios/bios.bin").read_bytes())
    m.vcpu.reset()
    text = b""
    while b"\n" not in text:
        m.run(timeout=0.05)
        text += console.debug.read()
    print(text[: text.index(b"version") + 7].decode())
