"""CPUID leaves as KVM hands them around: struct kvm_cpuid2 and its entries."""

from __future__ import annotations

import errno

from .._ffi import ffi
from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .handle import _rows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = ["KVM_MAX_CPUID_ENTRIES", "CpuidEntry"]

KVM_MAX_CPUID_ENTRIES = 256  # linux:arch/x86/include/asm/kvm_host.h@v6.18


class CpuidEntry(Value):
    """One CPUID leaf: `function` (EAX), `index` (ECX, if flag 1 says it counts), `flags`, and the four registers."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


def _unpack(table: Any) -> list[CpuidEntry]:
    # The entries of a struct kvm_cpuid2.
    return [
        CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
        for e in (table.entries[i] for i in range(table.nent))
    ]


def _pack(call: str, entries: Iterable[CpuidEntry]) -> Any:
    # A struct kvm_cpuid2 of the entries.
    rows = _rows(call, "entries", entries, "CpuidEntry values")
    if len(rows) > KVM_MAX_CPUID_ENTRIES:
        raise ArgumentError(call, "entries", len(rows), f"up to {KVM_MAX_CPUID_ENTRIES} entries", "too many")
    table = ffi.new("struct kvm_cpuid2 *", {"nent": len(rows), "entries": len(rows)})
    for at, row in enumerate(rows):
        if not isinstance(row, CpuidEntry):
            raise ArgumentTypeError(call, f"entries[{at}]", row, "a CpuidEntry")
        entry = table.entries[at]
        for field in CpuidEntry.fields():
            value = getattr(row, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
                raise ArgumentError(call, f"entries[{at}].{field}", value, "0 to 0xffffffff")
            setattr(entry, field, value)
    return table


def _fetch(call: Callable[[Any], int]) -> tuple[int, Any]:
    # Ask with a table that is large enough; (return value, table).
    nent = KVM_MAX_CPUID_ENTRIES
    while True:
        table = ffi.new("struct kvm_cpuid2 *", {"nent": nent, "entries": nent})
        rc = call(table)
        if rc != -errno.E2BIG or nent >= 1 << 16:
            return rc, table
        nent *= 2
