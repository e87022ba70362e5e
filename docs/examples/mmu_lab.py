"""Look at KVM's MMU at work: two accesses of a guest at CPL 3, and what the kernel traced of each.

Needs: tracefs, root

Prints:

    load   value 0x1000000; each walk read 4 entries, the last 0x1000005: True
    store  exception 14, error code 7, CR2 0x400008
    the entry afterwards: 0x1000025
"""

from __future__ import annotations

from hvmodel.units import MiB
from hvmodel.witness import Access, MmuLab

PAGE = 0x40_0000

with MmuLab() as lab:  # 32 MiB of memory at 16 MiB; each page begins with its own address
    where = lab.map(PAGE, 16 * MiB, 0x5)  # present, for CPL 3, not writable
    load, store = lab.run([Access(PAGE), Access(PAGE + 8, "store")])
    # With EPT or NPT there are no walks: `own` is empty.
    walks = [walk.entries for walk in load.own]
    right = all(len(entries) == 4 and entries[-1] == (1, 16 * MiB + 5) for entries in walks)
    print(f"load   value {load.value:#x}; each walk read 4 entries, the last {16 * MiB + 5:#x}: {right}")
    fault = store.fault
    assert fault is not None
    print(f"store  exception {fault.vector}, error code {fault.error_code}, CR2 {fault.cr2:#x}")
    print(f"the entry afterwards: {lab.read_entry(where):#x}")  # A is set
