"""Breakpoints, single steps, and what this host can do of them.

Prints:

    Breakpoint(address=0x7c05, kind='hardware') after 1 turns
    Breakpoint(address=0x7c05, kind='hardware') after 2 turns
    a step: 0x7c06
    the guest's own bytes: b903004149
    Breakpoint(address=0x7c08, kind='hlt')
    halted
"""

from __future__ import annotations

import hvmodel as hv
from hvmodel.machine.qualify import qualify

CODE = 0x7C00

with hv.Machine(ram="1M") as m:
    # mov cx, 3; L: inc cx; dec cx; nop; loop L; hlt
    m.load(CODE, bytes.fromhex("b90300 41 49 90 e2fb f4"))
    m.vcpu.real_mode(entry=CODE)

    # A host that cannot do it says so, with what it can do in this mode.
    known = qualify()
    assert known.works("real", "hardware"), known

    nop = m.vcpu.add_breakpoint(CODE + 5)
    for turn in (1, 2):
        stop = m.run(timeout=5)
        assert stop.reason == "breakpoint"
        assert isinstance(stop.exit, hv.Debug)
        print(stop.exit.hits[0], "after", turn, "turns")

    exit = m.vcpu.step()
    assert isinstance(exit, hv.Debug)
    print(f"a step: {exit.pc:#x}")

    # HLT, planted in the RAM while the guest runs, and only then.
    m.vcpu.remove_breakpoint(nop)
    m.vcpu.add_breakpoint(CODE + 8, "hlt")
    exit = m.run(timeout=5).exit
    print("the guest's own bytes:", m.read(CODE, 5).hex())
    assert isinstance(exit, hv.Debug)
    print(*exit.hits)
    print(m.run(timeout=5).reason)
