"""Exceptions raised in a guest: its handler runs; two make a double fault; the same by the model, without a guest.

Prints:

    #GP injected
    IoOut(port=0x10, size=1, count=1, data=b'\\r')
    Hlt()
    #DF injected
    BusyError: inject_interrupt: the interrupt window is busy: RFLAGS.IF is clear
    the model: #DF, error code 0
"""

from __future__ import annotations

import hvmodel as hv
from hvmodel.arch.exceptions import ExceptionQueue
from hvmodel.arch.vectors import Vector, vector_name

HANDLER = bytes.fromhex("b00d e610 cf")  # mov al, 13; out 0x10, al; iret

with hv.Machine(ram="1M") as m:
    m.load(0x7C00, b"\xf4")  # hlt
    m.load(0x7000, HANDLER)
    m.write(4 * Vector.GP, (0x7000).to_bytes(4, "little"))
    m.vcpu.real_mode(entry=0x7C00)

    print(m.vcpu.inject_exception(Vector.GP))  # real mode pushes no error code
    for exit in m.exits(timeout=10):
        print(exit)
        if exit == hv.Hlt():
            break

    m.vcpu.real_mode(entry=0x7C00)
    m.vcpu.inject_exception(Vector.GP)
    print(m.vcpu.inject_exception(Vector.NP))

    m.vcpu.real_mode(entry=0x7C00)
    try:
        m.vcpu.inject_interrupt(0x20)
    except hv.BusyError as error:
        print(f"BusyError: {error}".partition(";")[0])

queue = ExceptionQueue()
queue.queue(Vector.PF, error_code=2, payload=0x5000)
queue.queue(Vector.PF, error_code=0, payload=0x6000)
injection = queue.enter()
assert injection is not None
print(f"the model: {vector_name(injection.vector)}, error code {injection.error_code}")
