"""Model-specific registers: an ordered mapping of index to value, as the struct kvm_msrs that KVM reads.

     0         4         8
    +---------+---------+--------------------------------+--
    | nmsrs   | 0       | index, 0, data (16 bytes)      | …
    +---------+---------+--------------------------------+--

Owns the order in which MSRs are put: KVM's own, but those last that depend on others.
"""

from __future__ import annotations

from struct import Struct

from ..arch.number import number
from ..errors import ArgumentError, ArgumentTypeError, PartialError
from ..kvm.handle import _rows as _list
from .record import Packed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any, Self

    from ..kvm import Kvm, Vcpu

__all__ = ["TSC", "TSC_DEADLINE", "Msrs", "more_indices", "msr_indices"]

TSC = 0x10
"""IA32_TIME_STAMP_COUNTER, which runs on between two gets."""
TSC_DEADLINE = 0x6E0
"""IA32_TSC_DEADLINE."""

# TSC_DEADLINE is compared with TSC when it is written.  MSR_KVM_ASYNC_PF_EN switches on what MSR_KVM_ASYNC_PF_INT says.
_LAST = (0x4B564D02, TSC_DEADLINE)

# MSR_KVM_ASYNC_PF_INT: without an in-kernel APIC it reads as 0, and KVM refuses even to set that
# (linux:arch/x86/kvm/x86.c kvm_pv_enable_async_pf_int@v6.18).
_OF_LAPIC = (0x4B564D06,)

# MTRRdefType; the fixed ranges of 64 KiB, 16 KiB, 4 KiB; base and mask of the variable ones.
_MTRRS = (0x2FF, 0x250, 0x258, 0x259, *range(0x268, 0x270), *range(0x200, 0x210))
_MCG_CAP, _MC0_CTL, _MC0_CTL2 = 0x179, 0x400, 0x280  # a bank has CTL, STATUS, ADDR, MISC, and apart from them CTL2

_HEAD = Struct("<II")
_ENTRY = Struct("<IIQ")
_MAX_32 = (1 << 32) - 1


def msr_indices(kvm: Kvm, *, has_lapic: bool = True) -> tuple[int, ...]:
    """The MSRs of a vCPU's state that KVM lists (KVM_GET_MSR_INDEX_LIST), in the order in which they are put.

    KVM's order, but MSR_KVM_ASYNC_PF_EN and TSC_DEADLINE at the end; without MSR_KVM_ASYNC_PF_INT where the vCPU has no
    in-kernel APIC (`has_lapic`), for then it is always 0 and cannot be set.  `more_indices` are the others.  EFER, FS
    and GS base and the APIC base are in neither: they are in sregs.
    """
    found = [index for index in kvm.msr_index_list() if has_lapic or index not in _OF_LAPIC]
    return tuple([index for index in found if index not in _LAST] + [index for index in _LAST if index in found])


def more_indices(vcpu: Vcpu) -> tuple[int, ...]:
    """The MSRs of a vCPU's state that KVM_GET_MSR_INDEX_LIST leaves out: the MTRRs, and as many machine-check banks as
    MCG_CAP says.  Those of them that this vCPU lets read.

    Ioctl: KVM_GET_MSRS.  Source: linux:arch/x86/kvm/x86.c emulated_msrs_all, kvm_get_msr_common@v6.18.
    """
    nr_banks = sum(_read(vcpu, [_MCG_CAP]).values()) & 0xFF
    banks = (*range(_MC0_CTL, _MC0_CTL + 4 * nr_banks), *range(_MC0_CTL2, _MC0_CTL2 + nr_banks))
    return tuple(_read(vcpu, [*_MTRRS, *banks]))


def _read(vcpu: Vcpu, indices: list[int]) -> dict[int, int]:
    # Those MSRs that can be read.
    while True:
        try:
            return vcpu.get_msrs(indices)
        except PartialError as error:
            indices.remove(error.first_failed)  # type: ignore[arg-type]  # it is one of them


class Msrs(Packed):
    """MSRs by index, in the order in which they are put; a mapping of int to int.

    >>> msrs = Msrs({0x10: 5, 0xC0000082: 0x1000})
    >>> msrs[0x10], len(msrs), list(msrs)
    (5, 2, [16, 3221225602])
    >>> [str(change) for change in msrs.diff(msrs.replace({0x10: 6}))]
    ['[0x10]: 0x5 -> 0x6']
    """

    STRUCT = "kvm_msrs"

    def __init__(self, values: Mapping[int, int] | Iterable[tuple[int, int]] = ()) -> None:
        """ArgumentTypeError, ArgumentError: an index of more than 32 bits or twice, a value of more than 64."""
        call = "Msrs"
        try:
            pairs: list[tuple[int, int]]
            mapping: Any = values
            pairs = [(index, mapping[index]) for index in mapping] if hasattr(values, "keys") else list(values)
            rows = dict(pairs)
        except (TypeError, ValueError):
            raise ArgumentTypeError(call, "values", values, "a mapping of MSR index to value") from None
        if len(rows) != len(pairs):
            raise ArgumentError(call, "values", len(pairs), "every index once")
        data = [_HEAD.pack(len(rows), 0)]
        for index, value in rows.items():
            _index(call, index)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(call, f"msrs[{index:#x}]", value, "an int")
            if not 0 <= value < 1 << 64:
                raise ArgumentError(call, f"msrs[{index:#x}]", value, "0 to 0xffffffffffffffff", "it has 64 bits")
            data.append(_ENTRY.pack(index, 0, value))
        object.__setattr__(self, "_data", b"".join(data))

    @classmethod
    def _checked(cls, data: bytes) -> None:
        call = "Msrs.from_bytes"
        if len(data) < _HEAD.size:
            raise ArgumentError(call, "data", data, "at least 8 bytes, a struct kvm_msrs", f"{len(data)} bytes")
        nr = _HEAD.unpack_from(data)[0]
        if len(data) != _HEAD.size + nr * _ENTRY.size:
            size = _HEAD.size + nr * _ENTRY.size
            raise ArgumentError(call, "nmsrs", nr, f"{size} bytes for so many", f"{len(data)} bytes")
        if len({index for index, _, _ in _ENTRY.iter_unpack(data[_HEAD.size :])}) != nr:
            raise ArgumentError(call, "data", data, "every index once")

    @classmethod
    def get(cls, vcpu: Vcpu, indices: Iterable[int] | None = None) -> Self:
        """These MSRs of a vCPU; by default those of `more_indices()` and `msr_indices()`.

        PartialError names the first that KVM does not know or let read.  Further errors as those of VcpuState.get,
        which this is, of one part.  Ioctl: KVM_GET_MSRS (4.18), up to 255 in each.
        """
        from .vcpu_state import VcpuState

        msrs: Self = VcpuState.get(vcpu, ("msrs",), msrs=indices).msrs  # type: ignore[assignment]
        return msrs

    def put(self, vcpu: Vcpu) -> None:
        """Set them, in their order; see VcpuState.put: all of them or none.  Ioctl: KVM_SET_MSRS (4.19)."""
        from .vcpu_state import VcpuState

        VcpuState(msrs=self).put(vcpu)

    # ---- the mapping ----

    def _rows(self) -> Iterator[tuple[int, int, int]]:
        return _ENTRY.iter_unpack(self._data[_HEAD.size :])

    def __len__(self) -> int:
        return (len(self._data) - _HEAD.size) // _ENTRY.size

    def __iter__(self) -> Iterator[int]:
        return iter([index for index, _, _ in self._rows()])

    def keys(self) -> tuple[int, ...]:
        """The indices, in their order."""
        return tuple(self)

    def values(self) -> tuple[int, ...]:
        """The values, in the order of the indices."""
        return tuple([value for _, _, value in self._rows()])

    def __contains__(self, index: object) -> bool:
        return any(row[0] == index for row in self._rows())

    def __getitem__(self, index: int) -> int:
        """KeyError: it is not among them."""
        for found, _, value in self._rows():
            if found == index:
                return value
        raise KeyError(index)

    def to_dict(self) -> dict[int, int]:
        """A dict of index to value."""
        return {index: value for index, _, value in self._rows()}

    def replace(self, values: Mapping[int, int]) -> Self:
        """The same MSRs with these values; those that are not among them come after the others."""
        return type(self)(self.to_dict() | Msrs(values).to_dict())

    def only(self, indices: Iterable[int]) -> Self:
        """Those of these indices, in this value's order."""
        wanted = set(_indices("Msrs.only", indices))
        return type(self)({index: value for index, value in self.to_dict().items() if index in wanted})

    @property
    def _pad(self) -> int:
        return int(_HEAD.unpack_from(self._data)[1])

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """Index, as the path "[0x10]", and value of each; "pad" and "[0x10].reserved" where that is not 0."""
        if self._pad:
            yield "pad", self._pad
        for index, reserved, value in self._rows():
            yield f"[{index:#x}]", value
            if reserved:
                yield f"[{index:#x}].reserved", reserved

    def _named(self, path: str, bits: int) -> tuple[str, ...]:
        from ..arch import msr

        if not path.endswith("]"):  # padding
            return ()
        return msr.bit_names(int(path[1:-1], 16), bits)

    def to_json(self) -> dict[str, Any]:
        """An object of index, in hexadecimal, to value.

        Padding, which KVM neither reads nor sets, is in it where it is not 0: {"pad": 1, "0x10": {"data": 5,
        "reserved": 2}}.
        """
        document: dict[str, Any] = {"pad": self._pad} if self._pad else {}
        for index, reserved, value in self._rows():
            document[f"{index:#x}"] = {"data": value, "reserved": reserved} if reserved else value
        return document

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The value that `to_json()` gave."""
        if not isinstance(document, dict):
            raise ArgumentTypeError("Msrs.from_json", "document", document, "an object (dict)")
        call = "Msrs.from_json"
        rows: list[tuple[int, Any]] = []
        padding: dict[int, int] = {}
        for name, row in document.items():
            if name == "pad":
                continue
            try:
                index = int(name, 0)
            except (TypeError, ValueError):
                raise ArgumentError(call, "document", document, "indices as text, such as '0x10'") from None
            if isinstance(row, dict):
                if row.keys() != {"data", "reserved"}:
                    raise ArgumentTypeError(call, f"document[{name!r}]", row, "an int, or an object of data, reserved")
                padding[len(rows)] = number(call, f"document[{name!r}].reserved", row["reserved"], _MAX_32)
                row = row["data"]  # noqa: PLW2901  # the value
            rows.append((index, row))
        data = bytearray(bytes(cls(rows)))
        _HEAD.pack_into(data, 0, len(rows), number(call, "pad", document.get("pad", 0), _MAX_32))
        for at, reserved in padding.items():
            index, _, value = _ENTRY.unpack_from(data, _HEAD.size + at * _ENTRY.size)
            _ENTRY.pack_into(data, _HEAD.size + at * _ENTRY.size, index, reserved, value)
        return cls._of(bytes(data))

    def __repr__(self) -> str:
        return f"Msrs({{{', '.join(f'{index:#x}: {value:#x}' for index, _, value in self._rows())}}})"


def _index(call: str, index: object) -> int:
    if isinstance(index, bool) or not isinstance(index, int):
        raise ArgumentTypeError(call, "index", index, "an int")
    if not 0 <= index < 1 << 32:
        raise ArgumentError(call, "index", index, "0 to 0xffffffff")
    return int(index)


def _indices(call: str, indices: Iterable[int]) -> list[int]:
    return [_index(call, index) for index in _list(call, "indices", indices, "MSR indices")]


def _blank(indices: Iterable[int]) -> bytes:
    # A struct kvm_msrs to be filled by KVM.
    rows = _indices("KVM_GET_MSRS", indices)
    return bytes(Msrs([(index, 0) for index in rows])) if len(set(rows)) == len(rows) else _twice(rows)


def _twice(rows: list[int]) -> bytes:
    again = next(index for at, index in enumerate(rows) if index in rows[:at])
    raise ArgumentError("KVM_GET_MSRS", "indices", again, "every index once")
