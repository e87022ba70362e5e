"""The memory of a PC, and what its registers do to it: our q35 beside QEMU's.

Needs: qemu

Prints:

    f0000  pc.bios  read-only
    f0000  pc.ram   writable
    q35 has the flat view of QEMU's: True
"""

from __future__ import annotations

from hvmodel.machine.layouts import Q35Layout
from hvmodel.ram import info_mtree
from hvmodel.witness import Qemu
from hvmodel.witness.mtree import parse_flat

PAM0, READ_AND_WRITE_RAM = 0x90, 0x30  # of Q35's host bridge; the segment 0xf0000


def memory(text: str) -> list[object]:
    """The ranges of the address space "memory"."""
    return [view.ranges for view in parse_flat(text) if "memory" in [name for name, _, _ in view.spaces]]


with Q35Layout("128M", devices=True) as board, Qemu("-m", "128M", machine="q35") as qemu:
    for value in (0, READ_AND_WRITE_RAM):
        board.config_write(PAM0, value)  # as the guest does it
        qemu.config_write(PAM0, value)
        found = board.memory.at(0xF0000)
        assert found is not None
        print(f"f0000  {found.region.name:7}  {'read-only' if found.readonly else 'writable'}")
    same = memory(info_mtree(board.spaces, flatview=True)) == memory(qemu.monitor("info mtree -f"))
    print(f"q35 has the flat view of QEMU's: {same}")
