"""The state of a vCPU as one value: taken, compared, kept as JSON, changed, put back, and refused.

Prints:

    regs.rax: 0x0 -> 0x2a
    regs.rip: 0x7c00 -> 0x7c05
    the same after JSON: True
    rax in the guest: 7
    EFER, bits that differ: ('EFER.SCE',)
    refused: events, vector 40
    as before: True
"""

from __future__ import annotations

import json

import hvmodel as hv
from hvmodel.state import VcpuState

GUEST = bytes.fromhex(
    "b82a00"  #  mov ax, 42
    "e610"  #    out 0x10, al
    "e611"  #    out 0x11, al
    "f4"  #      hlt
)

with hv.Machine(ram="1M") as m:
    m.load(0x7C00, GUEST)
    m.vcpu.real_mode(entry=0x7C00, sp=0)
    before = VcpuState.get(m.vcpu)
    for _ in m.exits(timeout=10):
        break  # the first OUT
    after = VcpuState.get(m.vcpu)  # finishes the OUT first
    for change in before.diff(after, time=False):
        if change.path.startswith("regs."):
            print(change)

    again = VcpuState.from_json(json.loads(json.dumps(after.to_json())))
    print("the same after JSON:", again == after)

    again.replace(**{"regs.rax": 7}).put(m.vcpu)
    for exit in m.exits(timeout=10):
        match exit:
            case hv.IoOut(port=0x11, data=data):
                print("rax in the guest:", data[0])
            case hv.Hlt():
                break

    changed = after.replace(sregs2=after.sregs2.replace(efer=after.sregs2.efer ^ 1))
    print("EFER, bits that differ:", after.diff(changed)[0].bits)

    before = VcpuState.get(m.vcpu)
    events = before.events.replace(**{"exception.nr": 40, "exception.injected": 1})
    try:
        before.replace(events=events, **{"regs.rax": 0x1234}).put(m.vcpu)
    except hv.RefusedStateError as error:
        print(f"refused: {error.part}, vector {error.value}")
    print("as before:", before.diff(VcpuState.get(m.vcpu), time=False) == [])
