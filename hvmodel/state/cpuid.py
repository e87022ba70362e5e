"""CPUID as a vCPU has it: the struct kvm_cpuid2 that KVM keeps, which need not be the one that was set.

 0         4         8
+---------+---------+-------------------------------------------------------------------------+--
| nent    | 0       | function, index, flags, eax, ebx, ecx, edx, three times 0 (40 bytes)    | …
+---------+---------+-------------------------------------------------------------------------+--
"""

from __future__ import annotations

from struct import Struct

from ..arch.number import number as _number
from ..errors import ArgumentError, ArgumentTypeError
from ..kvm.cpuid import KVM_MAX_CPUID_ENTRIES, CpuidEntry
from .record import Difference, Packed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, Self

    from ..kvm import Vcpu

__all__ = ["CpuidTable"]

_HEAD = Struct("<II")
_ENTRY = Struct("<10I")
_REGISTERS = ("eax", "ebx", "ecx", "edx")
_MAX = (1 << 32) - 1
_BY_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX


def _leaf(entry: tuple[int, ...]) -> str:
    # The path of an entry: "[0x1]", or "[0x7, 0]" where the subleaf counts.
    function, index, flags = entry[:3]
    return f"[{function:#x}, {index:#x}]" if flags & _BY_INDEX else f"[{function:#x}]"


class CpuidTable(Packed):
    """The CPUID leaves of a vCPU: a sequence of `hvmodel.kvm.CpuidEntry`.

    >>> table = CpuidTable([CpuidEntry(0x80000001, edx=1 << 29)])
    >>> table.has("LM"), table.leaf(0x80000001).edx == 1 << 29
    (True, True)
    >>> [str(change) for change in table.diff(CpuidTable([CpuidEntry(0x80000001)]))]
    ['[0x80000001].edx: 0x20000000 -> 0x0 (LM)']
    """

    STRUCT = "kvm_cpuid2"

    def __init__(self, entries: Iterable[CpuidEntry] = ()) -> None:
        """ArgumentError: more than 256 entries (E2BIG for KVM), or a field of more than 32 bits."""
        call = "CpuidTable"
        try:
            rows = list(entries)
        except TypeError:
            raise ArgumentTypeError(call, "entries", entries, "an iterable of CpuidEntry values") from None
        if len(rows) > KVM_MAX_CPUID_ENTRIES:
            raise ArgumentError(call, "entries", len(rows), f"up to {KVM_MAX_CPUID_ENTRIES} entries", "too many")
        data = [_HEAD.pack(len(rows), 0)]
        for at, row in enumerate(rows):
            if not isinstance(row, CpuidEntry):
                raise ArgumentTypeError(call, f"entries[{at}]", row, "a CpuidEntry")
            numbers = [_number(call, f"entries[{at}].{name}", getattr(row, name), _MAX) for name in CpuidEntry.fields()]
            data.append(_ENTRY.pack(*numbers, 0, 0, 0))
        object.__setattr__(self, "_data", b"".join(data))

    @classmethod
    def _checked(cls, data: bytes) -> None:
        call = "CpuidTable.from_bytes"
        if len(data) < _HEAD.size:
            raise ArgumentError(call, "data", data, "at least 8 bytes, a struct kvm_cpuid2", f"{len(data)} bytes")
        nr = _HEAD.unpack_from(data)[0]
        if len(data) != _HEAD.size + nr * _ENTRY.size or nr > KVM_MAX_CPUID_ENTRIES:
            accepted = f"up to {KVM_MAX_CPUID_ENTRIES}, of 40 bytes each"
            raise ArgumentError(call, "nent", nr, accepted, f"there are {len(data)} bytes")

    @classmethod
    def get(cls, vcpu: Vcpu) -> Self:
        """The leaves as KVM keeps them; see VcpuState.get.  Ioctl: KVM_GET_CPUID2."""
        from .vcpu_state import VcpuState

        table: Self = VcpuState.get(vcpu, ("cpuid",)).cpuid  # type: ignore[assignment]
        return table

    def put(self, vcpu: Vcpu) -> None:
        """Set them; see VcpuState.put.  KVM may keep others: see `changes`.  Ioctl: KVM_SET_CPUID2."""
        from .vcpu_state import VcpuState

        VcpuState(cpuid=self).put(vcpu)

    def changes(self, asked: CpuidTable | Iterable[CpuidEntry]) -> list[Difference]:
        """What KVM changed behind your back: `asked` is what was set, self what it keeps (`get`).

        Each difference names the features.  KVM itself keeps some bits up to date: OSXSAVE and OSPKE (from CR4), APIC
        (from the APIC base), MWAIT, the size of the XSAVE area in leaf 0xd; kvm_pvm also sets all features that it
        cannot hide from user mode.
        """
        before = asked if isinstance(asked, CpuidTable) else CpuidTable(asked)
        return CpuidTable(before).diff(CpuidTable(self))

    # ---- the sequence ----

    def _rows(self) -> Iterator[tuple[int, ...]]:
        return _ENTRY.iter_unpack(self._data[_HEAD.size :])

    def __len__(self) -> int:
        return (len(self._data) - _HEAD.size) // _ENTRY.size

    def __iter__(self) -> Iterator[CpuidEntry]:
        return iter([CpuidEntry(*row[:7]) for row in self._rows()])

    def __getitem__(self, at: int) -> CpuidEntry:
        if not isinstance(at, int):
            raise ArgumentTypeError("CpuidTable", "at", at, "an int")
        if not -len(self) <= at < len(self):
            raise IndexError(f"there are {len(self)} entries")
        return CpuidEntry(*_ENTRY.unpack_from(self._data, _HEAD.size + at % len(self) * _ENTRY.size)[:7])

    def _find(self, function: int, index: int) -> int | None:
        # Where the entry of a leaf begins.
        for at, row in enumerate(self._rows()):
            if row[0] == function and (row[1] == index or not row[2] & _BY_INDEX):
                return _HEAD.size + at * _ENTRY.size
        return None

    def leaf(self, function: int, index: int = 0) -> CpuidEntry | None:
        """The entry of a leaf, and of a subleaf where those count; None where there is none."""
        at = self._find(function, index)
        return None if at is None else CpuidEntry(*_ENTRY.unpack_from(self._data, at)[:7])

    def has(self, feature: str) -> bool:
        """Whether a feature is announced, by its name in hvmodel.arch.cpuid."""
        from ..arch.cpuid import has_feature

        return has_feature(self, feature)

    def replace(self, function: int, index: int = 0, **registers: int) -> Self:
        """The same table with these of eax, ebx, ecx, edx in one leaf.  ArgumentError: there is no such leaf."""
        call = "CpuidTable.replace"
        at = self._find(function, index)
        if at is None:
            have = ", ".join(dict.fromkeys(_leaf(row) for row in self._rows()))
            raise ArgumentError(call, "function", function, have, "there is no such leaf")
        row = list(_ENTRY.unpack_from(self._data, at))
        for name, value in registers.items():
            if name not in _REGISTERS:
                raise ArgumentError(call, name, value, ", ".join(_REGISTERS))
            row[3 + _REGISTERS.index(name)] = _number(call, name, value, _MAX)
        return self._of(self._data[:at] + _ENTRY.pack(*row) + self._data[at + _ENTRY.size :])

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """The registers as ("[0x7, 0x0].ebx", 5), and the flags; a leaf that is there again with "#2" behind it.

        "padding", and "[0x7, 0x0].padding[0]", where it is not 0.
        """
        if self._padding:
            yield "padding", self._padding
        seen: dict[str, int] = {}
        for row in self._rows():
            path = _leaf(row)
            seen[path] = seen.get(path, 0) + 1
            if seen[path] > 1:
                path += f"#{seen[path]}"
            yield f"{path}.flags", row[2]
            for name, value in zip(_REGISTERS, row[3:7], strict=True):
                yield f"{path}.{name}", value
            for at, value in enumerate(row[7:]):
                if value:
                    yield f"{path}.padding[{at}]", value

    @property
    def _padding(self) -> int:
        return int(_HEAD.unpack_from(self._data)[1])

    def _named(self, path: str, bits: int) -> tuple[str, ...]:
        from ..arch.cpuid import feature_names

        leaf, _, register = path.rpartition(".")
        if register not in _REGISTERS:
            return ()
        numbers = [int(word, 16) for word in leaf.partition("]")[0][1:].split(", ")]
        return feature_names(numbers[0], numbers[1] if len(numbers) > 1 else 0, register, bits)

    def to_json(self) -> list[dict[str, Any]]:
        """A list of objects, one for each entry.

        Padding, which KVM keeps as it was set, is in it where it is not 0: as {"padding": [0, 0, 1]} of an entry, and
        {"padding": 1}, the first object, of the table.
        """
        document: list[dict[str, Any]] = [{"padding": self._padding}] if self._padding else []
        for row in self._rows():
            entry: dict[str, Any] = dict(zip(CpuidEntry.fields(), row[:7], strict=True))
            document.append(entry | {"padding": list(row[7:])} if any(row[7:]) else entry)
        return document

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The value that `to_json()` gave."""
        call = "CpuidTable.from_json"
        if not isinstance(document, list):
            raise ArgumentTypeError(call, "document", document, "a list of objects")
        rows: list[CpuidEntry] = []
        padding: dict[int, list[int]] = {}
        of_table = 0
        for at, row in enumerate(document):
            where = f"document[{at}]"
            if at == 0 and isinstance(row, dict) and row.keys() == {"padding"}:
                of_table = _number(call, f"{where}.padding", row["padding"], _MAX)
                continue
            names = {*CpuidEntry.fields(), "padding"}
            if not isinstance(row, dict) or not row.keys() <= names or "function" not in row:
                raise ArgumentTypeError(call, where, row, f"an object of {', '.join(CpuidEntry.fields())}")
            words = row.get("padding", [0, 0, 0])
            if not isinstance(words, list) or len(words) != 3:
                raise ArgumentTypeError(call, f"{where}.padding", words, "a list of 3 ints")
            padding[len(rows)] = [_number(call, f"{where}.padding[{i}]", word, _MAX) for i, word in enumerate(words)]
            rows.append(CpuidEntry(**{name: value for name, value in row.items() if name != "padding"}))
        data = bytearray(bytes(cls(rows)))
        _HEAD.pack_into(data, 0, len(rows), of_table)
        for at, words in padding.items():
            begin = _HEAD.size + at * _ENTRY.size
            _ENTRY.pack_into(data, begin, *_ENTRY.unpack_from(data, begin)[:7], *words)
        return cls._of(bytes(data))

    def __repr__(self) -> str:
        return f"CpuidTable({list(self)!r})"
