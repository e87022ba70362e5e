"""What the kernel says about a range of this process: lines of maps, VmFlags and counts of smaps."""

from __future__ import annotations

import re
from pathlib import Path

HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ")
PROT = {"r": 1, "w": 2, "x": 4}


def vmas(address: int, size: int) -> list[tuple[int, int, str]]:
    """(start, end, permissions) of what is mapped in the range, cut to it."""
    found = []
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        m = HEAD.match(line)
        assert m
        start, end = max(int(m[1], 16), address), min(int(m[2], 16), address + size)
        if start < end:
            found.append((start, end, m[3]))
    return found


def prot_of(permissions: str) -> int:
    """PROT_* of "rw-p"."""
    return sum(bit for char, bit in PROT.items() if char in permissions)


def smaps(address: int) -> dict[str, str]:
    """The fields of the smaps entry that begins at `address`."""
    fields: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if m := HEAD.match(line):
            inside = int(m[1], 16) == address
        elif inside:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    assert fields, f"no mapping begins at {address:#x}"
    return fields


def flags(address: int) -> set[str]:
    """Its VmFlags, such as {"rd", "wr", "dc"} (Documentation/filesystems/proc.rst)."""
    return set(smaps(address)["VmFlags"].split())


def rss(address: int) -> int:
    """Bytes of it that are in memory and in the page tables."""
    return int(smaps(address)["Rss"].split()[0]) * 1024
