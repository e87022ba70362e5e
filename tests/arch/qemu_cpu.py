"""QEMU's own CPU (TCG) as a second reader of tables: RAM that the test writes, and registers that a few bytes of
firmware load before they halt.

The firmware is 64 KiB at 0xf0000 (and at the reset vector); with paging on it goes on there, so that the tables must
map that page to itself.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvmodel.witness.qemu import Qemu

__all__ = ["FIRMWARE", "RAM_SIZE", "QemuCpu", "qemu_cpu", "set_registers"]

FIRMWARE = 0xF0000
RAM_SIZE = 64 << 20

_RESET_VECTOR = bytes.fromhex("ea 0000 00f0")  # ljmp $0xf000, $0


def set_registers(*, cr0: int, cr3: int = 0, cr4: int = 0, efer: int = 0) -> bytes:
    """16-bit code that loads them, CR0 last."""
    code = b"\x66\xb8" + struct.pack("<I", cr4) + b"\x0f\x22\xe0"  # mov eax, cr4; mov cr4, eax
    code += b"\x66\xb8" + struct.pack("<I", cr3) + b"\x0f\x22\xd8"  # mov cr3, eax
    if efer:  # mov ecx, 0xc0000080; xor edx, edx; mov eax, efer; wrmsr
        code += b"\x66\xb9\x80\x00\x00\xc0\x66\x31\xd2\x66\xb8" + struct.pack("<I", efer) + b"\x0f\x30"
    return code + b"\x66\xb8" + struct.pack("<I", cr0) + b"\x0f\x22\xc0"  # mov cr0, eax


class QemuCpu:
    """A QEMU whose guest has halted; its RAM is `ram`."""

    def __init__(self, qemu: Qemu, ram: mmap.mmap) -> None:
        self.qemu, self.ram = qemu, ram

    def write(self, gpa: int, data: bytes) -> None:
        self.ram[gpa : gpa + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        return self.ram[gpa : gpa + size]

    def leaves(self) -> dict[int, tuple[int, str]]:
        """`info tlb`: linear address -> (what the entry leads to, its flags as QEMU writes them)."""
        found = {}
        for line in self.qemu.monitor("info tlb").splitlines():
            gva, gpa, flags = line.split()
            # Of PAE paging it prints NX as a bit of the address too.
            found[int(gva.rstrip(":"), 16)] = int(gpa, 16) & ~(1 << 63), flags
        return found

    def translate(self, gva: int) -> int | None:
        """`gva2gpa`: QEMU's page walk."""
        answer = self.qemu.monitor(f"gva2gpa {gva:#x}").strip()
        return None if answer == "Unmapped" else int(answer.removeprefix("gpa: "), 16)

    def registers(self) -> str:
        return self.qemu.monitor("info registers")


@contextmanager
def qemu_cpu(directory: Path, code: bytes, memory: dict[int, bytes]) -> Iterator[QemuCpu]:
    """QEMU with `memory` in its RAM, which has run 16-bit `code` at f000:0000 up to a HLT."""
    code = (code + b"\xfa\xf4\xeb\xfd").ljust(0xFFF0, b"\0")  # cli; hlt; jmp to the hlt
    (directory / "firmware").write_bytes((code + _RESET_VECTOR).ljust(0x10000, b"\0"))
    backing = directory / "ram"
    backing.write_bytes(b"")
    with backing.open("r+b") as file:
        file.truncate(RAM_SIZE)
        with mmap.mmap(file.fileno(), RAM_SIZE) as ram:
            for gpa, data in memory.items():
                ram[gpa : gpa + len(data)] = data
            backend = f"memory-backend-file,id=ram,size={RAM_SIZE},share=on,mem-path={backing}"
            options = ("-cpu", "max", "-bios", str(directory / "firmware"), "-object", backend, "-m", f"{RAM_SIZE}B")
            with Qemu(*options, "-no-reboot", machine="pc,memory-backend=ram") as qemu:
                qemu.execute("cont")
                end = time.monotonic() + 30
                while "HLT=1" not in (state := qemu.monitor("info registers")):
                    assert time.monotonic() < end, state
                    time.sleep(0.005)
                yield QemuCpu(qemu, ram)
