"""What VcpuState and VmState have in common: one block of bytes, and the layout that says where each part is.

    +----------+------+------------+--     every part begins at a multiple of 8 and has the size that KVM gave it;
    | cpuid    | regs | xsave      | …     they lie in the order in which they are put
    +----------+------+------------+--

A part is decoded when it is looked at.  The layout has the tables that native/state.c walks; layouts are kept, so that
the states of one vCPU share theirs.
"""

from __future__ import annotations

from .._ffi import IOCTLS, _load, ffi
from ..errors import ArgumentError, ArgumentTypeError, HvError
from .parts import PARTS, Part, part
from .record import Difference, Packed
from .values import TscKhz

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, ClassVar, Self

__all__ = ["Layout", "State", "get_call", "take"]

_FORMAT = 1  # of the JSON document
_RANK = {row.name: at for at, row in enumerate(PARTS)}

_native = _load("_state")
Block: Any = _native.Block  # has the places _block, _layout, _known; native/pystate.c
take = _native.take
"""take(cls, vcpu, request) of native/pystate.c."""
_new = Block.__new__


class Layout:
    """Where the parts of a state are; made by `of`.

    `rows`: ((name, offset, size), …) in the order in which they are put; `names` in that order, `getting` in the order
    in which they are got; `at`: name -> (record, begin, end).  `put`, `get`: the tables of native/state.h.
    """

    __slots__ = ("at", "get", "get_address", "getting", "names", "nr", "put", "rows", "size")
    _known: ClassVar[dict[tuple[tuple[str, int], ...], Layout]] = {}

    @classmethod
    def of(cls, sizes: Iterable[tuple[str, int]]) -> Layout:
        """The layout of parts of these names and sizes, in whatever order."""
        key = tuple(sorted(sizes, key=lambda row: _RANK[row[0]]))
        found = cls._known.get(key)
        if found is None:
            if len(cls._known) >= 1024:
                cls._known.clear()
            found = cls._known[key] = cls(key)
        return found

    def __init__(self, sizes: tuple[tuple[str, int], ...]) -> None:
        rows, offset = [], 0
        for name, size in sizes:
            rows.append((name, offset, size))
            offset += (size + 7) & ~7
        self.rows, self.size, self.nr = tuple(rows), offset, len(rows)
        self.names = tuple([name for name, _ in sizes])
        self.at = {name: (part(name).record, offset, offset + size) for name, offset, size in rows}
        self.getting = tuple(sorted(self.names, key=lambda name: part(name).turn))
        self.put = self._table(self.names, putting=True)
        self.get = self._table(self.getting, putting=False)
        self.get_address = int(ffi.cast("uintptr_t", self.get))

    def _table(self, names: tuple[str, ...], *, putting: bool) -> Any:
        table = ffi.new("struct hv_part[]", max(len(names), 1))
        for row, name in zip(table, names, strict=False):
            one = part(name)
            _, begin, end = self.at[name]
            call = one.put if putting else get_call(one, end - begin)
            row.request, row.kind, row.argument = IOCTLS[call].request, one.kind, one.argument
            row.offset, row.size = begin, end - begin
        return table


def get_call(row: Part, size: int) -> str:
    """Name of the get ioctl of a part of this size: KVM_GET_XSAVE where this kernel has no KVM_GET_XSAVE2."""
    if row.name == "xsave" and size == 4096 and not _has_xsave2():
        return "KVM_GET_XSAVE"
    return row.get


_xsave2: bool | None = None


def _has_xsave2() -> bool:
    # Whether this kernel has KVM_GET_XSAVE2 (since v5.17); asked once.
    global _xsave2
    if _xsave2 is None:
        from .._ffi import lib
        from ..kvm import Kvm

        try:
            with Kvm() as kvm:
                _xsave2 = kvm.check_extension(lib.KVM_CAP_XSAVE2) > 0
        except HvError:
            return True  # no KVM here: nothing is got anyhow
    return _xsave2


def _path_of(name: str, path: str) -> str:
    # The path of a part's leaf: "regs.rip", "msrs[0x10]", "tsc_khz".
    return name + path if not path or path.startswith("[") else f"{name}.{path}"


def _record_of(call: str, name: str, value: Any) -> Packed:
    # A part's value as its record.
    wanted = part(name).record
    if wanted is TscKhz and isinstance(value, int):
        return TscKhz.of(value)
    if type(value) is not wanted:
        raise ArgumentTypeError(call, name, value, wanted.__name__)
    return value


class State(Block):  # type: ignore[misc]  # of a C module
    """A state in parts: a frozen value.  See VcpuState and VmState, which are its two kinds.

    Two are equal where they have the same parts and all bytes of them are equal.  They are hashable; they pickle with
    all that belongs to them; `to_json()` and `from_json()` go by the names of parts and fields.

    Thread safety: any thread.
    """

    __slots__ = ()
    if TYPE_CHECKING:
        SCOPE: ClassVar[str]
        _block: bytes
        _layout: Layout
        _known: object

    def __init__(self, **parts: Any) -> None:
        """The state of these parts, by their names.

        ArgumentError: no such part; ArgumentTypeError: a value of another class than the part's.
        """
        call = type(self).__name__
        for name in parts:
            self._part_row(call, name)
        values = {name: bytes(_record_of(call, name, value)) for name, value in parts.items()}
        layout = Layout.of((name, len(data)) for name, data in values.items())
        _fill(self, layout, b"".join([_padded(values[name]) for name in layout.names]), None)

    @classmethod
    def _of(cls, layout: Layout, block: bytes, known: object) -> Self:
        self: Self = _new(cls)
        _fill(self, layout, block, known)
        return self

    @classmethod
    def _part_row(cls, call: str, name: object) -> Part:
        row = next((row for row in PARTS if row.name == name and row.scope == cls.SCOPE), None)
        if row is None:
            have = ", ".join(row.name for row in PARTS if row.scope == cls.SCOPE)
            if not isinstance(name, str):
                raise ArgumentTypeError(call, "part", name, f"a name: {have}")
            raise ArgumentError(call, "part", name, have)
        return row

    # ---- parts ----

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that it has, in the order in which they are put."""
        return self._layout.names

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._layout.at

    def part(self, name: str) -> Any:
        """The value of a part.  ArgumentError: it has none of that name."""
        try:
            record, begin, end = self._layout.at[name]
        except (KeyError, TypeError, ValueError):  # whatever has no hash
            self._part_row(f"{type(self).__name__}.part", name)
            have = ", ".join(self.parts) or "it has none"
            raise ArgumentError(f"{type(self).__name__}.part", "part", name, have, "it is not in this state") from None
        return record._of(self._block[begin:end])

    def part_bytes(self, name: str) -> bytes:
        """The bytes of a part, as KVM gave or will get them; see `part`."""
        return bytes(self.part(name))

    def only(self, *names: str) -> Self:
        """The state of these parts alone.  ArgumentError: it does not have one of them."""
        values = {name: self.part_bytes(name) for name in names}
        layout = Layout.of((name, len(data)) for name, data in values.items())
        return self._of(layout, b"".join([_padded(values[name]) for name in layout.names]), None)

    def replace(self, **changes: Any) -> Self:
        """The same state with other values of these parts, or of a field: `replace(**{"regs.rip": 0x7C00})`.

        A part that it does not have is added.  A field may be one of a part that has fields by name, and `msrs[0x10]`.
        """
        call = f"{type(self).__name__}.replace"
        records: dict[str, Packed] = {}
        for key, value in changes.items():
            name, _, rest = key.partition(".")
            if not rest and name.endswith("]"):
                name, _, rest = name.partition("[")
            self._part_row(call, name)
            if rest:
                record = records[name] if name in records else self.part(name)
                records[name] = _replaced(call, record, key, rest, value)
            else:
                records[name] = _record_of(call, name, value)
        data = {name: self._block[begin:end] for name, (_, begin, end) in self._layout.at.items()}
        data |= {name: bytes(record) for name, record in records.items()}
        layout = Layout.of((name, len(raw)) for name, raw in data.items())
        # What KVM cannot refuse may be replaced, and still all is known to be taken.
        known = None if any(part(name).can_fail or name not in self for name in records) else self._known
        return self._of(layout, b"".join([_padded(data[name]) for name in layout.names]), known)

    # ---- comparing ----

    # Leaves that run on between two gets of a vCPU or VM that does not run: their parts, and their paths.
    _MOVING: ClassVar[dict[str, tuple[str, ...]]] = {}

    def diff(self, other: Self, *, time: bool = True) -> list[Difference]:
        """All leaves in which `other` differs, self's value first, with the names of the bits where it is one of bits.

        `time` False leaves out what runs on by itself: the TSC and the APIC timer's current count; of a VM the clock,
        and when the timer's counters were loaded.
        """
        call = f"{type(self).__name__}.diff"
        if type(other) is not type(self):
            raise ArgumentTypeError(call, "other", other, type(self).__name__)
        found = []
        for name in sorted({*self.parts, *other.parts}, key=lambda name: _RANK[name]):
            if name not in self or name not in other:
                there = (self if name in self else other).part(name)
                found.append(Difference(name, *((there, None) if name in self else (None, there))))
                continue
            mine, theirs = self.part(name), other.part(name)
            if mine != theirs:
                moving = () if time else self._MOVING.get(name, ())
                for change in mine.diff(theirs):
                    if change.path not in moving:
                        path = _path_of(name, change.path)
                        found.append(Difference(path, change.before, change.after, change.bits))
        return found

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """All leaves of all parts by their paths: ("regs.rax", 0), ("msrs[0x10]", 5), …"""
        for name in self.parts:
            for path, leaf in self.part(name).items():
                yield _path_of(name, path), leaf

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self._layout.rows == other._layout.rows and self._block == other._block

    def __hash__(self) -> int:
        return hash((type(self), self._block))

    # ---- keeping ----

    def to_json(self) -> dict[str, Any]:
        """An object that json.dumps takes: {"format": 1, "parts": {name: the part's own to_json()}}."""
        return {"format": _FORMAT, "parts": {name: self.part(name).to_json() for name in self.parts}}

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The state that `to_json()` gave.  ArgumentError: another format, no such part, a value that does not fit."""
        call = f"{cls.__name__}.from_json"
        if not isinstance(document, dict) or not isinstance(document.get("parts"), dict):
            raise ArgumentTypeError(call, "document", document, "an object of format and parts")
        if document.get("format") != _FORMAT:
            raise ArgumentError(call, "format", document.get("format"), str(_FORMAT))
        rows = {name: cls._part_row(call, name) for name in document["parts"]}
        values = {name: row.record.from_json(document["parts"][name]) for name, row in rows.items()}
        return cls(**values)

    def __reduce__(self) -> tuple[object, ...]:
        return _unpickled, (type(self), tuple((name, size) for name, _, size in self._layout.rows), self._block)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name}; use replace({name}=…)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot delete {name}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {', '.join(self.parts) or 'nothing'}>"


_set_block, _set_layout, _set_known = (vars(Block)[name].__set__ for name in ("_block", "_layout", "_known"))


def _fill(state: State, layout: Layout, block: bytes, known: object) -> None:
    _set_block(state, block)
    _set_layout(state, layout)
    _set_known(state, known)


def _note_lost(error: BaseException, before: Any, get: Callable[[], Any]) -> None:
    # Notes what is not as it was, after `before` was put back.
    try:
        changes = before.diff(get(), time=False)
    except HvError as failed:
        error.add_note(f"whether all is as it was could not be seen: {failed}")
        return
    if changes:
        error.add_note(f"not as before: {'; '.join(map(str, changes))}")


def _padded(data: bytes) -> bytes:
    return data.ljust((len(data) + 7) & ~7, b"\0")


def _unpickled(cls: type[State], sizes: tuple[tuple[str, int], ...], block: bytes) -> State:
    # Unpickles; every part's bytes are checked, for a state is read by the kernel.
    values: dict[str, Packed] = {}
    call, offset = f"{cls.__name__} (pickle)", 0
    if type(block) is not bytes:
        raise ArgumentTypeError(call, "block", block, "bytes")
    for name, size in sizes:
        row = cls._part_row(call, name)
        if type(size) is not int or size < 0:
            raise ArgumentTypeError(call, "sizes", size, "sizes of parts")
        values[name] = row.record.from_bytes(block[offset : offset + size])
        offset += (size + 7) & ~7
    return cls(**values)


def _replaced(call: str, record: Any, key: str, rest: str, value: Any) -> Packed:
    # One field of a record, or one MSR.
    if hasattr(record, "to_dict"):
        try:
            return record.replace({int(rest.rstrip("]"), 0): value})  # type: ignore[no-any-return]  # Msrs
        except ValueError as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(call, key, value, "msrs[INDEX], such as msrs[0x10]") from None
    try:
        return record.replace(**{rest: value})  # type: ignore[no-any-return]  # one of the same class
    except (AttributeError, TypeError) as error:
        if isinstance(error, ArgumentTypeError):
            raise
        raise ArgumentError(call, key, value, f"a whole {type(record).__name__}", "it has no fields by name") from None
