"""From CPL 3 to CPL 0 and out: a user program in long mode, a page fault, and the handler that tells of it.

The program may use all memory but the tables, which lie at the end of the RAM.  It reads there: the #PF handler runs at
CPL 0 on the stack of the TSS, and writes to ports the error code (present 1, user 4) and CR2.

Prints:

    code at CPL 3: 0x1000, handler at CPL 0: 0x2000
    tables: [0xf2000, 0x100000)
    error code 0x5 at 0xff000
    halted at CPL 0
"""

from __future__ import annotations

import hvmodel as hv

with hv.Machine(ram="1M") as m:
    m.load(0x1000, bytes.fromhex("8b042500f00f00"))  # mov eax, [0xff000]
    m.load(0x2000, bytes.fromhex("58 e710 0f20d0 e711 f4"))  # pop rax; out 0x10, eax; mov rax, cr2; out 0x11, eax; hlt
    tables = m.vcpu.long_mode(entry=0x1000, user=True, handlers={14: 0x2000})
    print("code at CPL 3: 0x1000, handler at CPL 0: 0x2000")
    print(f"tables: [{tables.start:#x}, {tables.start + tables.size:#x})")

    told = {}
    for exit in m.exits(timeout=5.0):
        match exit:
            case hv.IoOut(port=port):
                told[port] = exit.value
            case hv.Hlt():
                break
            case other:
                raise SystemExit(f"unexpected: {other}")
    print(f"error code {told[0x10]:#x} at {told[0x11]:#x}")
    print(f"halted at CPL {m.vcpu.sregs.cs.dpl}")
