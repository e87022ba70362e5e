"""Ask QEMU's page walker: a 4 MiB page of 32-bit paging, a mode that the machine at hand need not have.

Needs: qemu

Prints:

    load       value 0x12345678
    store      exception 14, error code 3, CR2 0x1400000
    user load  exception 14, error code 5, CR2 0x1400000
    the entry: 0x014000a1
"""

from __future__ import annotations

from hvmodel.arch.registers import CR0, CR4
from hvmodel.witness import TcgAccess, TcgWalks
from hvmodel.witness.tcg import DONE, FREE

PAGE = 0x140_0000
ENTRY = FREE + (PAGE >> 22) * 4


def access(op: str, *, user: bool = False) -> TcgAccess:
    """An access to the page, with paging, WP and PSE, at CPL 0 or 3."""
    return TcgAccess(PAGE, op, CR0.PE | CR0.PG | CR0.WP, FREE, int(CR4.PSE), 0, user=user)


with TcgWalks() as tcg:
    tcg.set_root("2-level", FREE)  # entry 0 is QEMU's guest's; the others are ours
    tcg.ram[ENTRY : ENTRY + 4] = (PAGE | 0x81).to_bytes(4, "little")  # present, a page; not writable, not for CPL 3
    tcg.ram[PAGE : PAGE + 4] = (0x12345678).to_bytes(4, "little")
    accesses = {"load": access("load"), "store": access("store"), "user load": access("load", user=True)}
    for name, result in zip(accesses, tcg.run(accesses.values()), strict=True):
        if result.vector == DONE:
            print(f"{name:10} value {result.value:#x}")
        else:
            print(f"{name:10} exception {result.vector}, error code {result.error}, CR2 {result.cr2:#x}")
    print(f"the entry: {int.from_bytes(tcg.ram[ENTRY : ENTRY + 4], 'little'):#010x}")
