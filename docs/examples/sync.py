"""Registers at every exit, and a state that is changed the way QEMU does it.

Prints:

    1 0x7c03 1
    2 0x7c03 2
    3 0x7c03 3
    101 3 rax: 0x3 -> 0x65
    True 41
    42 False
"""

from __future__ import annotations

import hvmodel as hv

# again: inc ax; out 0x10, al; jmp again
CODE = bytes.fromhex("40 e610 ebfb")

with hv.Machine(ram="1M") as m:
    m.load(0x7C00, CODE)
    m.vcpu.real_mode(entry=0x7C00)
    exits = m.exits(timeout=5.0)

    for _ in range(3):
        exit = next(exits)
        print(exit.value, hex(m.vcpu.rip), m.vcpu.rax)  # no ioctl
    before = m.vcpu.regs  # a value: it stays what it is
    m.vcpu.rax = 100  # the guest goes on with this
    print(next(exits).value, before.rax, before.diff(m.vcpu.regs)[0])

    sync = m.vcpu.sync
    env = sync.synchronize_state()
    sync.env = env.replace(**{"regs.rax": 41})
    print(sync.vcpu_dirty, m.vcpu.rax)  # not KVM's yet, but ours
    print(next(exits).value, sync.vcpu_dirty)  # put before the run
