"""QEMU's flags of a RAM block: `RAM_*`, and their names.

    13       12           11           10        9           8          7          6                5
    PRIVATE  GUEST_MEMFD  READONLY_FD  READONLY  NAMED_FILE  PROTECTED  NORESERVE  UF_WRITEPROTECT  PMEM
    4           3            2           1       0
    MIGRATABLE  UF_ZEROPAGE  RESIZEABLE  SHARED  PREALLOC

Source: include/exec/memory.h@v7.2 (bits 0 to 8), include/system/memory.h@v10.1 of QEMU.
"""

from __future__ import annotations

__all__ = [
    "RAM_GUEST_MEMFD",
    "RAM_MIGRATABLE",
    "RAM_NAMED_FILE",
    "RAM_NORESERVE",
    "RAM_PMEM",
    "RAM_PREALLOC",
    "RAM_PRIVATE",
    "RAM_PROTECTED",
    "RAM_READONLY",
    "RAM_READONLY_FD",
    "RAM_RESIZEABLE",
    "RAM_SHARED",
    "RAM_UF_WRITEPROTECT",
    "RAM_UF_ZEROPAGE",
    "flag_names",
]

RAM_PREALLOC = 1 << 0
"""The caller brought the memory."""

RAM_SHARED = 1 << 1
"""Writes go to the block's file, where others who map it see them."""

RAM_RESIZEABLE = 1 << 2
"""Only the first used_length of max_length bytes are used, and that can change."""

RAM_UF_ZEROPAGE = 1 << 3
"""UFFDIO_ZEROPAGE works on it (set during postcopy migration)."""

RAM_MIGRATABLE = 1 << 4
"""Migration sends it."""

RAM_PMEM = 1 << 5
"""Persistent memory (pmem=on)."""

RAM_UF_WRITEPROTECT = 1 << 6
"""A background snapshot has write-protected it by userfaultfd."""

RAM_NORESERVE = 1 << 7
"""Mapped with MAP_NORESERVE (reserve=off)."""

RAM_PROTECTED = 1 << 8
"""Not accessible to QEMU: memory of an SGX enclave."""

RAM_NAMED_FILE = 1 << 9
"""Its file has, or had, a name (memory-backend-file)."""

RAM_READONLY = 1 << 10
"""Mapped without PROT_WRITE."""

RAM_READONLY_FD = 1 << 11
"""Its file was opened for reading only."""

RAM_GUEST_MEMFD = 1 << 12
"""A guest_memfd goes with it."""

RAM_PRIVATE = 1 << 13
"""Mapped privately although a file would allow sharing (QEMU 10.0: aux-ram-share)."""

_NAMES = {value: name.removeprefix("RAM_") for name, value in sorted(globals().items()) if name.startswith("RAM_")}


def flag_names(flags: int) -> str:
    """The flags as text, in the order of their bits.

    >>> flag_names(RAM_SHARED | RAM_RESIZEABLE)
    'SHARED|RESIZEABLE'
    """
    return "|".join(_NAMES[bit] for bit in sorted(_NAMES) if flags & bit) or "0"
