"""A struct of the kernel as a value: the bytes that the kernel gave, decoded where they are looked at.

`Packed` is what all of them have in common; those whose size varies (MSRs, CPUID, …) stand on it alone.

A subclass of `Record` names the struct it is made of and lists its fields as annotations, in the order of the struct:

    class DTable(Record, struct="kvm_dtable"):
        base: int
        limit: int
        padding: tuple[int, ...]

Names, offsets and sizes are those of native/kvm_uapi.h.  An int is read from its bytes each time; an array of uint8_t
is bytes, another array a tuple, a struct within the struct a record of its own.  Padding and reserved fields are fields
too: nothing that the kernel said is lost.
"""

from __future__ import annotations

import sys
from struct import Struct

from .._ffi import ffi
from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, ClassVar, Self

    from typing_extensions import Buffer

__all__ = ["Difference", "Packed", "Record", "bits_named"]

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_new = object.__new__


def bits_named(kind: str, names: tuple[str, ...]) -> Callable[[int], tuple[str, ...]]:
    """A function that names the bits which are set in a number: bit n by names[n], or "KIND bit n" where that is "".

    >>> bits_named("MXCSR", ("IE", "", "ZE"))(0b1110)
    ('MXCSR bit 1', 'MXCSR.ZE', 'MXCSR bit 3')
    """
    table = [f"{kind} bit {at}" for at in range(64)]
    for at, known in enumerate(names):
        if known:
            table[at] = f"{kind}.{known}"

    def name(bits: int) -> tuple[str, ...]:
        return tuple([table[at] for at in range(64) if bits >> at & 1])

    return name


class Difference(Value):
    """One field that two values differ in.

    `path`: the field, "cs.base", or "msrs[0x10]".  `before`, `after`: its two values, None where one has no such field.
    `bits`: the names of the bits that differ, as ("CR0.PG", "CR0.WP"), or "CR0 bit 40" where one has no name; () where
    the field is no set of bits.
    """

    path: str
    before: object
    after: object
    bits: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = [hex(side) if type(side) is int else repr(side) for side in (self.before, self.after)]
        text = f"{self.path}: {shown[0]} -> {shown[1]}"
        return f"{text} ({', '.join(self.bits)})" if self.bits else text


class _Field:
    # One field of a record: where it is, how it is read, how a value becomes its bytes.
    __slots__ = ("count", "is_bytes", "name", "offset", "owner", "pack", "record", "size", "unpack")

    def __init__(self, owner: type[Record], name: str, offset: int, ctype: Any, record: type[Record] | None) -> None:
        self.owner, self.name, self.offset, self.record = owner, name, offset, record
        self.count: int | None = None
        self.size: int = ffi.sizeof(ctype)
        item = ctype
        while item.kind == "array":
            self.count = (self.count or 1) * item.length
            item = item.item
        self.is_bytes = self.count is not None and item.cname in ("uint8_t", "unsigned char", "char")
        if record is None and not self.is_bytes:
            code = Struct(f"<{self.count or ''}{_CODES[ffi.sizeof(item)]}")
            self.unpack, self.pack = code.unpack_from, code.pack

    def __get__(self, value: Record | None, owner: type) -> Any:
        if value is None:
            return self
        data, offset = value._data, self.offset
        if self.record is not None:
            return self._records(data)
        if self.is_bytes:
            return data[offset : offset + self.size]
        numbers = self.unpack(data, offset)
        return numbers[0] if self.count is None else numbers

    def _records(self, data: bytes) -> Any:
        assert self.record is not None
        if self.count is None:
            return self.record._of(data[self.offset : self.offset + self.size])
        step = self.record.SIZE
        ends = range(self.offset, self.offset + self.size, step)
        return tuple([self.record._of(data[at : at + step]) for at in ends])

    def __set__(self, value: Record, new: object) -> None:
        raise AttributeError(f"{type(value).__name__} is frozen: cannot set {self.name}; use replace({self.name}=…)")

    def encode(self, new: Any) -> bytes:
        # The bytes of a new value, or the error that names it.
        call, name = self.owner.__name__, self.name
        if self.record is not None:
            rows = (new,) if self.count is None else new
            if not isinstance(rows, tuple | list) or not all(isinstance(row, self.record) for row in rows):
                many = "" if self.count is None else f"{self.count} of "
                raise ArgumentTypeError(call, name, new, f"{many}{self.record.__name__}")
            if self.count is not None and len(rows) != self.count:
                raise ArgumentError(call, name, len(rows), f"{self.count} of {self.record.__name__}", "how many")
            return b"".join([bytes(row) for row in rows])
        if self.is_bytes:
            if not isinstance(new, bytes | bytearray | memoryview):
                raise ArgumentTypeError(call, name, new, f"{self.size} bytes")
            if len(bytes(new)) != self.size:
                raise ArgumentError(call, name, bytes(new), f"{self.size} bytes", f"{len(bytes(new))} bytes")
            return bytes(new)
        bits = 8 * self.size // (self.count or 1)
        numbers = (new,) if self.count is None else new
        if not isinstance(numbers, tuple | list):
            raise ArgumentTypeError(call, name, new, f"{self.count} ints")
        if self.count is not None and len(numbers) != self.count:
            raise ArgumentError(call, name, len(numbers), f"{self.count} ints", "how many")
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int):
                raise ArgumentTypeError(call, name, number, "an int")
            if not 0 <= number < 1 << bits:
                raise ArgumentError(call, name, number, f"0 to {(1 << bits) - 1:#x}", f"it has {bits} bits")
        return self.pack(*numbers)


class _RecordMeta(type):
    def __new__(mcls, name: str, bases: tuple[type, ...], ns: dict[str, Any], **options: Any) -> _RecordMeta:
        ns.setdefault("__slots__", ())  # the bytes are all that a value has
        return super().__new__(mcls, name, bases, ns, **options)


class Packed(metaclass=_RecordMeta):
    """Base of the values that are bytes of the kernel's, of whatever size; `Record` is one of fixed size.

    Two are equal where they are of one class and all their bytes are equal, padding too.  They are frozen, hashable and
    can be pickled.
    """

    __slots__ = ("_data",)
    _data: bytes
    STRUCT = ""
    """Name of the kernel's struct."""

    def __init__(self) -> None:
        # For those that have no constructor of their own.
        raise ArgumentTypeError(type(self).__name__, "data", None, f"a struct {self.STRUCT}, by from_bytes()")

    @classmethod
    def _of(cls, data: bytes) -> Self:
        # Of bytes that are known to be right.
        self = _new(cls)
        _set_data(self, data)
        return self

    @classmethod
    def _checked(cls, data: bytes) -> None:
        # Raises where these bytes are no such value.
        raise NotImplementedError

    @classmethod
    def from_bytes(cls, data: Buffer) -> Self:
        """The value that these bytes are, as KVM has them.  ArgumentError: they are too few, too many, or at odds."""
        try:
            copy = bytes(memoryview(data))
        except TypeError:
            raise ArgumentTypeError(f"{cls.__name__}.from_bytes", "data", data, f"a struct {cls.STRUCT}") from None
        cls._checked(copy)
        return cls._of(copy)

    def __bytes__(self) -> bytes:
        return self._data

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """All leaves by their paths: ints, or bytes."""
        raise NotImplementedError

    def _named(self, path: str, bits: int) -> tuple[str, ...]:  # noqa: ARG002  # of a base class
        # Names of the bits that are set in `bits`, of a leaf which is a set of bits; () of any other.
        return ()

    def diff(self, other: Self) -> list[Difference]:
        """The fields in which `other` differs, self's value first; [] where they are equal.

        A field that only one of them has is None in the other.  ArgumentTypeError: `other` is of another class.
        """
        if type(other) is not type(self):
            raise ArgumentTypeError(f"{type(self).__name__}.diff", "other", other, type(self).__name__)
        if self._data == other._data:
            return []
        mine, theirs = dict(self.items()), dict(other.items())
        found = []
        for path in mine | theirs:
            before, after = mine.get(path), theirs.get(path)
            if before != after:
                bits: tuple[str, ...] = ()
                if isinstance(before, int) and isinstance(after, int):
                    bits = self._named(path, before ^ after)
                found.append(Difference(path, before, after, bits))
        return found

    def to_json(self) -> Any:
        """What json.dumps takes: ints, bytes as hex digits, arrays as lists, structs as objects."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """The value that `to_json()` gave."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self._data == other._data

    def __hash__(self) -> int:
        return hash((type(self), self._data))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name}; use replace({name}=…)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot delete {name}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).from_bytes, (self._data,)


_set_data: Callable[[Packed, bytes], None] = vars(Packed)["_data"].__set__


class Record(Packed):
    """Base of the values that are a struct of the kernel; see the module's text.

    The constructor takes fields by name, and zero for the others.  Two are equal where they are of one class and all
    their bytes are equal, padding too.  They are frozen, hashable and can be pickled.

    ArgumentError, ArgumentTypeError: a field that is not there, or a value that does not fit it.

    >>> from hvmodel.state import Regs
    >>> regs = Regs(rip=0x7C00, rflags=2)
    >>> regs.replace(rax=7)
    Regs(rax=0x7, rip=0x7c00, rflags=0x2)
    >>> len(bytes(regs)), regs == Regs.from_bytes(bytes(regs))
    (144, True)
    """

    if TYPE_CHECKING:
        SIZE: ClassVar[int]
        _fields: ClassVar[dict[str, _Field]]
        _bits: ClassVar[dict[str, Callable[[int], tuple[str, ...]]]]

    def __init_subclass__(cls, struct: str | None = None) -> None:
        super().__init_subclass__()
        if struct is None:
            return
        ctype = ffi.typeof(f"struct {struct}")
        known = vars(sys.modules[cls.__module__])
        cls.STRUCT, cls.SIZE, cls._fields = struct, ffi.sizeof(ctype), {}
        for name, at in ctype.fields or ():
            kind = cls.__annotations__.get(name)
            if kind is None:
                raise TypeError(f"{cls.__name__}: struct {struct} has a field {name!r}, the class has none")
            word = kind.removeprefix("tuple[").removesuffix(", ...]")
            record = None if word in ("int", "bytes") else known[word]
            field = cls._fields[name] = _Field(cls, name, at.offset, at.type, record)
            setattr(cls, name, field)

    def __init__(self, **fields: Any) -> None:
        cls = type(self)
        data = bytearray(cls.SIZE)
        _update(cls, data, fields)
        object.__setattr__(self, "_data", bytes(data))

    @classmethod
    def _checked(cls, data: bytes) -> None:
        if len(data) != cls.SIZE:
            accepted = f"{cls.SIZE} bytes, a struct {cls.STRUCT}"
            raise ArgumentError(f"{cls.__name__}.from_bytes", "data", data, accepted, f"{len(data)} bytes")

    def replace(self, **fields: Any) -> Self:
        """The same value but for these fields; a field of a field by its path, `replace(**{"cs.base": 0})`."""
        data = bytearray(self._data)
        _update(type(self), data, fields)
        return self._of(bytes(data))

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """Names of the fields, in the order of the struct."""
        return tuple(cls._fields)

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """All leaves by their paths: ("cs.base", 0), …; an array of numbers as "db[0]", an array of bytes as bytes."""
        for name in self._fields:
            value = getattr(self, name)
            if isinstance(value, Record):
                for path, leaf in value.items():
                    yield f"{name}.{path}", leaf
            elif isinstance(value, tuple):
                for at, item in enumerate(value):
                    if isinstance(item, Record):
                        for path, leaf in item.items():
                            yield f"{name}[{at}].{path}", leaf
                    else:
                        yield f"{name}[{at}]", item
            else:
                yield name, value

    def _named(self, path: str, bits: int) -> tuple[str, ...]:
        return self._bits[path](bits) if path in self._bits else ()

    _bits = {}  # noqa: RUF012  # path -> a function that names the bits which are set in a number

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them: ints, bytes as hex digits, arrays as lists, structs as objects."""
        return {name: _to_json(getattr(self, name)) for name in self._fields}

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The value that `to_json()` gave; a field that is not there is zero."""
        if not isinstance(document, dict):
            raise ArgumentTypeError(f"{cls.__name__}.from_json", "document", document, "an object (dict)")
        if not all(isinstance(name, str) for name in document):
            raise ArgumentTypeError(f"{cls.__name__}.from_json", "document", document, "an object with names of fields")
        return cls(**{name: _from_json(cls, name, value) for name, value in document.items()})

    def __repr__(self) -> str:
        shown = []
        for name in self._fields:
            value = getattr(self, name)
            if isinstance(value, Record):
                if any(value._data):
                    shown.append(f"{name}={value!r}")
            elif isinstance(value, tuple):
                if any(any(item._data) if isinstance(item, Record) else item for item in value):
                    shown.append(f"{name}={value!r}")
            elif isinstance(value, bytes):
                if any(value):
                    shown.append(f"{name}={value.hex()}")
            elif value:
                shown.append(f"{name}={value:#x}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _update(cls: type[Record], data: bytearray, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        first, _, rest = name.partition(".")
        field = cls._fields.get(first)
        if field is None or (rest and (field.record is None or field.count is not None)):
            raise ArgumentError(cls.__name__, name, value, f"one of {', '.join(cls._fields)}", "there is no such field")
        if rest:
            assert field.record is not None
            inner = data[field.offset : field.offset + field.size]
            _update(field.record, inner, {rest: value})
            data[field.offset : field.offset + field.size] = inner
        else:
            data[field.offset : field.offset + field.size] = field.encode(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _from_json(cls: type[Record], name: str, value: Any) -> Any:
    field = cls._fields.get(name)
    if field is None:
        return value  # the constructor says that there is no such field
    if field.record is not None:
        if field.count is None:
            return field.record.from_json(value)
        return [field.record.from_json(row) for row in value] if isinstance(value, list) else value
    if field.is_bytes and isinstance(value, str):
        try:
            return bytes.fromhex(value)
        except ValueError:
            raise ArgumentError(f"{cls.__name__}.from_json", name, value, f"{field.size} bytes in hex digits") from None
    return value
