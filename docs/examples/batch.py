"""Exits served in C: a fed input port, a captured output port, counts, and a record of every exit.

The guest copies 5 bytes from port 0x20 to port 0x21 and halts: 10 port exits, and one HLT, which alone comes to Python.

Prints:

    Hlt() b'hello'
    {2: 10, 5: 1} 10
    in 0x20 b'h' feed
    out 0x21 b'h' capture
"""

from __future__ import annotations

import hvmodel as hv
from hvmodel.kvm import iter_records

GUEST = bytes.fromhex(
    "b90500"  #      mov cx, 5
    "e420"  #   l:   in  al, 0x20
    "e621"  #        out 0x21, al
    "e2fa"  #        loop l
    "f4"  #          hlt
)

with hv.Machine(ram="1M") as m:
    m.load(0x7C00, GUEST)
    m.vcpu.real_mode(entry=0x7C00)
    source, sink = hv.Feed(b"hello"), hv.Capture()
    m.batch.pio(0x20, 1, read=source)
    m.batch.pio(0x21, 1, write=sink)
    m.batch.record(1000)  # 48 bytes each; numpy reads them with RECORD_DTYPE
    exit = next(m.exits(timeout=10))
    print(exit, sink.read())
    # By KVM_EXIT_*: 2 is IO, 5 is HLT.
    print(m.batch.counts, m.batch.nr_served)
    for record in list(iter_records(bytes(m.batch.take_records())))[:2]:
        data = record.data.to_bytes(8, "little")[: record.size]
        print("out" if record.is_write else "in", hex(record.address), data, record.policy)
