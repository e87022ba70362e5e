"""Nested virtualisation: what KVM knows of a guest that runs guests, as struct kvm_nested_state.

 0       2        4         8                          128
+-------+--------+---------+--------------------------+--------------------------------------+
| flags | format | size    | header, by the format    | VMCS12s (8 KiB) or VMCB12 (4 KiB)    |
+-------+--------+---------+--------------------------+--------------------------------------+
"""

from __future__ import annotations

from struct import Struct

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError
from .record import Packed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

__all__ = ["NestedState"]

_HEAD = Struct("<HHI")
_VMX = Struct("<QQHHIQ")  # vmxon_pa, vmcs12_pa, smm.flags, pad, flags, preemption_timer_deadline
_SVM = Struct("<Q")  # vmcb_pa
_DATA = 128
_FORMATS = {lib.KVM_STATE_NESTED_FORMAT_VMX: "vmx", lib.KVM_STATE_NESTED_FORMAT_SVM: "svm"}
_HEADERS = {
    "vmx": (_VMX, ("vmxon_pa", "vmcs12_pa", "smm_flags", "pad", "vmx_flags", "preemption_timer_deadline")),
    "svm": (_SVM, ("vmcb_pa",)),
}
_NAMES = tuple([name for _, names in _HEADERS.values() for name in names])


class NestedState(Packed):
    """The nested state: `flags` KVM_STATE_NESTED_*, `format` "vmx" or "svm", the header's fields, and `data`.

    Its size varies: 128 bytes, and with a current VMCS or VMCB those.  KVM tells it where KVM_CAP_NESTED_STATE is.

    >>> NestedState.make("svm", vmcb_pa=0x1000).header
    {'vmcb_pa': 4096}
    """

    STRUCT = "kvm_nested_state"

    @classmethod
    def make(cls, format: str, flags: int = 0, data: bytes = b"", **header: int) -> Self:
        """The state of these; header fields by name, and zero for the others.

        ArgumentError: no such format or field, a number that does not fit.
        """
        call = "NestedState.make"
        if format not in tuple(_HEADERS):  # whatever it is, a dict would want it hashable
            raise ArgumentError(call, "format", format, " or ".join(_HEADERS))
        code, names = _HEADERS[format]
        for name, value in {"flags": flags, **header}.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(call, name, value, "an int")
            if not 0 <= value < 1 << 64:
                raise ArgumentError(call, name, value, "0 to 0xffffffffffffffff")
        unknown = next((name for name in header if name not in names), None)
        if unknown is not None:
            raise ArgumentError(call, unknown, header[unknown], ", ".join(names), "there is no such field")
        number = next(number for number, name in _FORMATS.items() if name == format)
        values = [header.get(name, 0) for name in names]
        for name, value, size in zip(names, values, _sizes(format), strict=True):
            if value >> (8 * size):
                raise ArgumentError(call, name, value, f"{8 * size} bits")
        if flags >> 16:
            raise ArgumentError(call, "flags", flags, "16 bits")
        head = _HEAD.pack(flags, number, _DATA + len(data)) + code.pack(*values)
        return cls._of(head.ljust(_DATA, b"\0") + bytes(data))

    @classmethod
    def _checked(cls, data: bytes) -> None:
        call = "NestedState.from_bytes"
        if len(data) < _DATA:
            raise ArgumentError(call, "data", data, f"at least {_DATA} bytes", f"{len(data)} bytes")
        _, number, size = _HEAD.unpack_from(data)
        if size != len(data):
            raise ArgumentError(call, "size", size, f"{len(data)}, as many bytes as there are")
        if number not in _FORMATS:
            raise ArgumentError(call, "format", number, "0 (VMX) or 1 (SVM)")

    @property
    def flags(self) -> int:
        """KVM_STATE_NESTED_*: 1 in guest mode, 2 about to enter it, 4 eVMCS, 0x100 GIF set (SVM)."""
        return int(_HEAD.unpack_from(self._data)[0])

    @property
    def format(self) -> str:
        """ "vmx" or "svm": the processor's."""
        return _FORMATS[_HEAD.unpack_from(self._data)[1]]

    @property
    def header(self) -> dict[str, int]:
        """The header of its format: where the VMXON region and the VMCS are, or the VMCB."""
        code, names = _HEADERS[self.format]
        return dict(zip(names, code.unpack_from(self._data, _HEAD.size), strict=True))

    @property
    def data(self) -> bytes:
        """The VMCS12s or the VMCB12 as KVM caches them; b"" where there is none."""
        return self._data[_DATA:]

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """flags, format, the header's fields, and the data as one bytes."""
        yield "flags", self.flags
        yield "format", _HEAD.unpack_from(self._data)[1]
        for name, value in self.header.items():
            yield f"header.{name}", value
        if any(self._rest()):
            yield "header.rest", self._rest()
        yield "data", self.data

    def _rest(self) -> bytes:
        # What the header has behind the fields of its format.
        return self._data[_HEAD.size + _HEADERS[self.format][0].size : _DATA]

    def to_json(self) -> dict[str, object]:
        """The fields as an object, `data` as hex digits; so is `rest`, what the header has behind its fields."""
        document = {"format": self.format, "flags": self.flags, "header": self.header, "data": self.data.hex()}
        return document | ({"rest": self._rest().hex()} if any(self._rest()) else {})

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The value that `to_json()` gave."""
        call, names = "NestedState.from_json", {"format", "flags", "header", "data"}
        if not isinstance(document, dict) or document.keys() - {"rest"} != names:
            raise ArgumentTypeError(call, "document", document, f"an object of {sorted(names)}")
        if not isinstance(document["format"], str):
            raise ArgumentTypeError(call, "format", document["format"], " or ".join(_HEADERS))
        if not isinstance(document["header"], dict):
            raise ArgumentTypeError(call, "header", document["header"], "an object (dict)")
        unknown = next((name for name in document["header"] if name not in _NAMES), None)
        if unknown is not None:
            raise ArgumentError(call, "header", unknown, ", ".join(_NAMES), "there is no such field")
        try:
            data, rest = bytes.fromhex(document["data"]), bytes.fromhex(document.get("rest", ""))
        except (TypeError, ValueError):
            raise ArgumentError(call, "data", document["data"], "hex digits") from None
        made = cls.make(document["format"], document["flags"], data, **document["header"])
        room = len(made._rest())
        if len(rest) > room:
            raise ArgumentError(call, "rest", rest, f"up to {room} bytes")
        return cls._of(made._data[: _DATA - room] + rest.ljust(room, b"\0") + data)

    def __repr__(self) -> str:
        return f"<NestedState {self.format} flags={self.flags:#x} {self.header} and {len(self.data)} bytes>"


def _sizes(format: str) -> tuple[int, ...]:
    return (8, 8, 2, 2, 4, 8) if format == "vmx" else (8,)
