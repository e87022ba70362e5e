"""A guest that never exits: ended by a timeout, and by a kick from another thread.

Prints:

    timeout
    Interrupted(cause='kick')
    interrupted Interrupted(cause='kick')
"""

from __future__ import annotations

import threading

import hvmodel as hv

with hv.Machine(ram="1M") as m:
    m.load(0x7C00, bytes.fromhex("ebfe"))  # jmp $
    m.vcpu.real_mode(entry=0x7C00)
    print(m.run(timeout=0.05).reason)

    # A kick that finds nobody running is kept for the next run.
    m.kick()
    print(next(m.exits(timeout=10)))

    threading.Timer(0.05, m.kick).start()
    stop = m.run(timeout=10)
    print(stop.reason, stop.exit)
