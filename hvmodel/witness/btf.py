"""BTF: the layout of the running kernel's own types, as the kernel tells it.

Owns the decoding of /sys/kernel/btf/*; needs no tool and no debug package.  The format is that of the kernel's
Documentation/bpf/btf.rst:

    header   magic 0xeb9f, version, flags, hdr_len; offset and length of the type and the string section
    type     name_off u32 | info u32 | size or type u32 | what the kind adds
             info: kind_flag in bit 31, kind in bits 28-24, vlen in bits 15-0

Type 0 is void, types are numbered as they come.  A module's file is *split*: it goes on where vmlinux ends, in type
numbers and in string offsets alike.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from ..errors import HostError, HvError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

__all__ = ["Btf", "BtfError", "BtfField", "BtfLookupError", "BtfStruct"]

MAGIC = 0xEB9F
VMLINUX = "/sys/kernel/btf/vmlinux"

_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_PARAMETER = struct.Struct("<II")

# Kinds, by the numbers of btf.rst.
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FWD, _TYPEDEF, _VOLATILE, _CONST, _RESTRICT = range(1, 12)
_FUNC, _FUNC_PROTO, _VAR, _DATASEC, _FLOAT, _DECL_TAG, _TYPE_TAG, _ENUM64 = range(12, 20)

_NAMED = (_STRUCT, _UNION, _ENUM, _TYPEDEF, _ENUM64)
_INDEXED = (*_NAMED, _FUNC)  # what can be found by its name
_ALIASES = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG)
_FIXED_EXTRA = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}  # bytes after the common 12
_PER_ITEM_EXTRA = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}  # times vlen
_POINTER_SIZE = 8
_TAGS = {_STRUCT: "struct ", _UNION: "union ", _ENUM: "enum ", _ENUM64: "enum "}
_DEPTH = 64  # of aliases and arrays; a longer chain is a loop


class BtfError(HvError, ValueError):
    """Bytes that are not BTF, or BTF that is broken: the text says where."""


class BtfLookupError(HvError, LookupError):
    """The kernel's BTF has no type of this name: `kind` ("struct", "enum", "function"), `name`, `source` (the file)."""

    def __init__(self, kind: str, name: str, source: str) -> None:
        self.kind, self.name, self.source = kind, name, source
        super().__init__(f"{source} has no {kind} {name}: this kernel was built without it, or it lives in a module")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.kind, self.name, self.source)


class BtfField(Value):
    """A member: where it starts (bits from the start of the outermost struct), its size in bits, its type in words.

    >>> field = BtfField(91, 5, "u8")  # a bit-field
    >>> field.offset, field.size
    (11, 1)
    """

    bit_offset: int
    bit_size: int
    type: str

    @property
    def offset(self) -> int:
        """Offset in bytes, rounded down for a bit-field."""
        return self.bit_offset // 8

    @property
    def size(self) -> int:
        """Size in bytes, rounded up for a bit-field; 0 for a flexible array."""
        return -(-self.bit_size // 8)


class BtfStruct(NamedTuple):
    """A struct or union: `kind`, `name`, `size` in bytes, and `fields` by path, in the order of declaration.

    A path is what C would write: "cs.base", "channels[0].gate".  Members without a name are left out of the path;
    of an array of structs, element 0 is taken apart.  The parts follow the whole.
    """

    kind: str
    name: str
    size: int
    fields: dict[str, BtfField]


class Btf:
    """A BTF file; immutable, any thread may use it.

    Opening reads the file and checks the header; the index (0.1 s for a whole kernel) is made at the first look-up.
    """

    def __init__(self, data: bytes, base: Btf | None = None, source: str = "BTF data") -> None:
        """Decode `data`; `base` is what split BTF goes on from.  BtfError for what is not BTF."""
        self.source = source
        self.base = base
        self._data = data
        if len(data) < _HEADER.size:
            raise BtfError(f"{source}: {len(data)} bytes are too few for a BTF header ({_HEADER.size})")
        magic, version, _flags, header, type_at, type_size, string_at, string_size = _HEADER.unpack_from(data)
        if magic != MAGIC:
            swapped = "; it was made for a big-endian machine" if magic == 0x9FEB else ""
            raise BtfError(f"{source}: magic is {magic:#06x}, not {MAGIC:#06x}{swapped}")
        if version != 1:
            raise BtfError(f"{source}: BTF version {version}; version 1 is the one known here")
        for what, at, size in (("type", type_at, type_size), ("string", string_at, string_size)):
            if header + at + size > len(data):
                raise BtfError(f"{source}: the {what} section ends at byte {header + at + size} of {len(data)}")
        self._types = (header + type_at, header + type_at + type_size)
        self._strings = data[header + string_at : header + string_at + string_size]
        if not self._strings.endswith(b"\0"):
            raise BtfError(f"{source}: the string section does not end with a zero byte")
        self._offsets: list[int] = []  # of each type in _data, from _first_id on
        self._by_name: dict[int, list[int]] = {}  # offset of a name -> ids of _INDEXED

    @classmethod
    def from_kernel(cls, path: str | os.PathLike[str] = VMLINUX, base: Btf | None = None) -> Self:
        """Read the kernel's own BTF (or another file).

        HostError as open(2) or read(2) refuse; ENOENT means a kernel without CONFIG_DEBUG_INFO_BTF.  BtfError for
        bytes that are not BTF.
        """
        path = os.fspath(path)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            detail = None
            if path == VMLINUX and not os.path.exists(path):
                detail = "the running kernel was built without CONFIG_DEBUG_INFO_BTF"
            raise HostError(error.errno or 0, "open", "path", path, None, detail) from None
        return cls(data, base, path)

    @classmethod
    def for_module(cls, module: str) -> Self:
        """The types of a module ("kvm"), and below them vmlinux's; just vmlinux where the module is built in.

        Errors as `from_kernel`.
        """
        vmlinux = cls.from_kernel()
        path = f"{os.path.dirname(VMLINUX)}/{module}"
        return cls.from_kernel(path, vmlinux) if os.path.exists(path) else vmlinux

    def __repr__(self) -> str:
        return f"Btf({self.source!r})"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(True for _ in self._named(name, _NAMED))

    def struct(self, name: str) -> BtfStruct:
        """The struct or union `name`, also by way of a typedef.  BtfLookupError when there is none.

        Where the kernel has several of one name, the first one.
        """
        for named in self._named(name, (_STRUCT, _UNION, _TYPEDEF)):
            ident = self._strip(named)
            kind = self._kind(ident)
            if kind in (_STRUCT, _UNION):
                fields: dict[str, BtfField] = {}
                self._flatten(ident, "", 0, fields)
                size = self._header(ident)[3]
                return BtfStruct("struct" if kind == _STRUCT else "union", name, size, fields)
        raise BtfLookupError("struct", name, self.source)

    def enum(self, name: str) -> dict[str, int]:
        """The enumerators of the enum `name`, in the order of declaration.  BtfLookupError when there is none."""
        for named in self._named(name, (_ENUM, _ENUM64, _TYPEDEF)):
            ident = self._strip(named)
            if self._kind(ident) in (_ENUM, _ENUM64):
                return dict(self._enumerators(ident))
        raise BtfLookupError("enum", name, self.source)

    def function(self, name: str) -> dict[str, str]:
        """The parameters of the function `name`, in order: name -> type in words.  BtfLookupError when there is none.

        The kernel has those of functions that it did not inline everywhere.
        """
        for found in self._named(name, (_FUNC,)):
            proto = self._header(found)[3]
            at, kind, count, _, _, _ = self._header(proto)
            if kind != _FUNC_PROTO:
                raise BtfError(f"{self.source}: function {name} is of type {proto}, which is no function's")
            data = self._owner(proto)._data
            pairs = [_PARAMETER.unpack_from(data, at + _TYPE.size + i * _PARAMETER.size) for i in range(count)]
            return {self._string(word): self._words(ident) for word, ident in pairs}
        raise BtfLookupError("function", name, self.source)

    def enumerators(self) -> dict[str, int]:
        """Every enumerator of every enum, named or not, base included: name -> value.  Takes 0.3 s for a kernel."""
        found = self.base.enumerators() if self.base else {}
        for ident in range(self._first_id, self._first_id + len(self._indexed())):
            if self._kind(ident) in (_ENUM, _ENUM64):
                found.update(self._enumerators(ident))
        return found

    # ------------------------------------------------------------------------------------------------- the index

    @property
    def _first_id(self) -> int:
        return self.base._next_id if self.base else 1

    @property
    def _next_id(self) -> int:
        return self._first_id + len(self._indexed())

    @property
    def _strings_start(self) -> int:
        return self.base._strings_start + len(self.base._strings) if self.base else 0

    # Offsets of all types.  One pass over the section, since a type's size depends on its kind.
    def _indexed(self) -> list[int]:
        if self._offsets:
            return self._offsets
        data, (at, end) = self._data, self._types
        unpack, fixed, per_item = _TYPE.unpack_from, _FIXED_EXTRA.get, _PER_ITEM_EXTRA.get
        offsets: list[int] = []
        by_name: dict[int, list[int]] = {}
        ident = self._first_id
        while at < end:
            if end - at < _TYPE.size:
                raise BtfError(f"{self.source}: type {ident} at byte {at} is cut off")
            name, info, _ = unpack(data, at)
            kind = info >> 24 & 0x1F
            if not 1 <= kind <= _ENUM64:
                raise BtfError(f"{self.source}: type {ident} at byte {at} has kind {kind}, unknown here")
            offsets.append(at)
            if name and kind in _INDEXED:
                by_name.setdefault(name, []).append(ident)
            at += _TYPE.size + fixed(kind, 0) + per_item(kind, 0) * (info & 0xFFFF)
            ident += 1
        if at != end:
            raise BtfError(f"{self.source}: the last type ends at byte {at}, its section at {end}")
        # Both at once complete: another thread sees all or nothing, and at worst does the work again.
        self._by_name = by_name
        self._offsets = offsets
        return offsets

    # Ids of the types of a name and one of these kinds, here, then in the base.
    def _named(self, name: str, kinds: tuple[int, ...]) -> Iterator[int]:
        if not name:
            return
        wanted = name.encode() + b"\0"
        self._indexed()
        start = self._strings_start
        at = self._strings.find(wanted)
        while at >= 0:
            for ident in self._by_name.get(start + at, ()):
                if self._kind(ident) in kinds:
                    yield ident
            at = self._strings.find(wanted, at + 1)
        if self.base:
            # Split BTF may name its types by strings of the base.
            at = self.base._strings.find(wanted)
            while at >= 0:
                yield from (i for i in self._by_name.get(at, ()) if self._kind(i) in kinds)
                at = self.base._strings.find(wanted, at + 1)
            yield from self.base._named(name, kinds)

    # ------------------------------------------------------------------------------------------------- one type

    # (offset, kind, vlen, size or type, kind_flag, name) of a type.
    def _header(self, ident: int) -> tuple[int, int, int, int, bool, str]:
        owner = self._owner(ident)
        at = owner._offsets[ident - owner._first_id]
        name, info, size = _TYPE.unpack_from(owner._data, at)
        return at, info >> 24 & 0x1F, info & 0xFFFF, size, bool(info >> 31), self._string(name) if name else ""

    # Its kind; 0 for void.
    def _kind(self, ident: int) -> int:
        return self._header(ident)[1] if ident else 0

    def _owner(self, ident: int) -> Btf:
        if self.base and ident < self._first_id:
            return self.base._owner(ident)
        if not 1 <= ident < self._next_id:
            raise BtfError(f"{self.source}: a type refers to type {ident}; there are {self._next_id - 1}")
        return self

    def _string(self, offset: int) -> str:
        start = self._strings_start
        if offset < start and self.base:
            return self.base._string(offset)
        offset -= start
        end = self._strings.find(b"\0", offset)
        if end < 0:
            raise BtfError(f"{self.source}: a name at byte {offset} of {len(self._strings)} bytes of strings")
        return self._strings[offset:end].decode(errors="replace")

    # What a chain of typedefs and qualifiers stands for; 0 is void.
    def _strip(self, ident: int) -> int:
        for _ in range(_DEPTH):
            if not ident:
                return 0
            _, kind, _, target, _, _ = self._header(ident)
            if kind not in _ALIASES:
                return ident
            ident = target
        raise BtfError(f"{self.source}: the typedefs from type {ident} on do not end")

    # (element type, number of elements) of an array.
    def _array(self, ident: int) -> tuple[int, int]:
        element, _index, length = _TYPE.unpack_from(self._owner(ident)._data, self._header(ident)[0] + _TYPE.size)
        return element, length

    # Size in bytes.
    def _size(self, ident: int) -> int:
        count = 1
        for _ in range(_DEPTH):
            ident = self._strip(ident)
            if not ident:
                return 0
            _, kind, _, size, _, _ = self._header(ident)
            if kind == _ARRAY:
                ident, length = self._array(ident)
                count *= length
                continue
            if kind == _PTR:
                return count * _POINTER_SIZE
            return count * size if kind not in (_FWD, _FUNC, _FUNC_PROTO) else 0
        raise BtfError(f"{self.source}: the arrays from type {ident} on do not end")

    # The type in words, as in C but for the place of the dimensions: "struct page *[16]".
    def _words(self, ident: int, depth: int = 0) -> str:
        if not ident:
            return "void"
        if depth > _DEPTH:
            raise BtfError(f"{self.source}: type {ident} does not end")
        _, kind, _, target, is_union, name = self._header(ident)
        if kind == _ARRAY:
            element, length = self._array(ident)
            text = self._words(element, depth + 1)
            outer, bracket, inner = text.partition("[")
            return f"{outer}[{length or ''}]{bracket}{inner}"
        if kind == _PTR:
            text = self._words(target, depth + 1)
            return f"{text}*" if text.endswith("*") else f"{text} *"
        if kind in (_VOLATILE, _CONST, _RESTRICT, _TYPE_TAG):
            return self._words(target, depth + 1)
        if kind == _FUNC_PROTO:
            return "function"
        if kind == _FWD:
            return f"{'union' if is_union else 'struct'} {name}"
        return f"{_TAGS.get(kind, '')}{name}".rstrip()

    # `around` are the structs that this one is a part of.
    def _flatten(
        self, ident: int, prefix: str, base: int, fields: dict[str, BtfField], around: tuple[int, ...] = ()
    ) -> None:
        if ident in around:
            raise BtfError(f"{self.source}: type {ident} contains itself")
        at, _, vlen, _, has_bits, _ = self._header(ident)
        data = self._owner(ident)._data
        for i in range(vlen):
            name_at, member, where = _TYPE.unpack_from(data, at + _TYPE.size * (i + 1))
            bits = where >> 24 if has_bits else 0
            start = base + (where & 0xFFFFFF if has_bits else where)
            name = self._string(name_at) if name_at else ""
            path = prefix + name
            if name:
                fields[path] = BtfField(start, bits or 8 * self._size(member), self._words(member))
            inner = self._strip(member)
            for _ in range(_DEPTH):
                if self._kind(inner) != _ARRAY:
                    break
                inner, path = self._strip(self._array(inner)[0]), f"{path}[0]"
            if self._kind(inner) in (_STRUCT, _UNION):
                self._flatten(inner, f"{path}." if name else prefix, start, fields, (*around, ident))

    def _enumerators(self, ident: int) -> Iterator[tuple[str, int]]:
        at, kind, vlen, _, signed, _ = self._header(ident)
        data = self._owner(ident)._data
        item = struct.Struct("<Ii" if signed else "<II") if kind == _ENUM else struct.Struct("<III")
        for i in range(vlen):
            name, value, *high = item.unpack_from(data, at + _TYPE.size + i * item.size)
            if high:
                value |= high[0] << 32
                if signed and value >> 63:
                    value -= 1 << 64
            yield self._string(name), value
