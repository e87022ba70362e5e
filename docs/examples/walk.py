"""A walk through a live guest's page tables: every entry, what a forbidden access gets, A and D, many at once.

Prints:

    Walk 0x400123 -> 0x9123, level 1, access 5
      level 4  0x000000100000  0x0000000000101007
      level 3  0x000000101000  0x0000000000102007
      level 2  0x000000102010  0x0000000000103007
      level 1  0x000000103000  0x0000000000009005
      sets A at 0x100000: 0x101007 -> 0x101027
      sets A at 0x101000: 0x102007 -> 0x102027
      sets A at 0x102010: 0x103007 -> 0x103027
      sets A at 0x103000: 0x9005 -> 0x9025
    Fault(error_code=7, address=0x400123, nested=False, exit_qualification=None)
    True 0x9123 0x27
    0 updates left
    ['0x9000', '0xffffffffffffffff'] [-1, 0]
"""

from __future__ import annotations

import hvmodel as hv
from hvmodel.arch.paging import PageTables
from hvmodel.mmu import PFERR_USER_MASK, PFERR_WRITE_MASK
from hvmodel.ram.walk import walk_many

tables = PageTables(0x10_0000)
tables.map(0x40_0000, 0x9000, 0x1000, user=True, writable=False)

with hv.Machine(ram="16M") as m:
    m.vcpu.long_mode(entry=0x1000)
    m.write(tables.cr3, tables.image())
    m.vcpu.sregs = m.vcpu.sregs.replace(cr3=tables.cr3)

    print(m.walk(0x40_0123, PFERR_USER_MASK))
    print(m.walk(0x40_0123, PFERR_USER_MASK | PFERR_WRITE_MASK).fault)

    # KVM_TRANSLATE walks as the supervisor, and sets A in the guest's tables.
    said = m.vcpu.kvm.translate(0x40_0123)
    print(said.valid, hex(said.gpa), hex(m.read(tables.cr3, 1)[0]))
    print(len(m.walk(0x40_0123).updates), "updates left")

    walker = m.walker()  # the registers as they are now; RAM as it is at each walk
    found = walk_many(walker, [0x40_0000, 0x40_1000])
    print([hex(gpa) for gpa in found.gpa], found.error_code.tolist())
