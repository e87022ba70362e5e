"""The kernel's trace ring buffer: raw sub-buffers and event formats, turned into records.

Owns nothing: text and bytes in, values out.  `tracefs` reads the files.

A sub-buffer, as a read of per_cpu/cpuN/trace_pipe_raw returns it (events/header_page names the offsets):

    0   u64   timestamp the first event's delta counts from
    8   u64   commit: bits 0..29 bytes of event data; bit 30: the number of missed events stands behind the data;
              bit 31: events were missed before this sub-buffer
    16  ...   events, each 4-byte aligned

An event (events/header_event):

    bits 0..4 type_len, bits 5..31 time_delta, then u32 array[]
    type_len 1..28   data of 4 * type_len bytes in array[]
    0                array[0] = bytes from array[0] on; the data is array[1...]
    29 padding       time_delta 0: nothing more in this sub-buffer; else array[0] = bytes to skip behind the header
    30 time extend   time += array[0] << 27 | time_delta
    31 time stamp    time = array[0] << 27 | time_delta (59 bits; the 5 above are those of the time so far)

Sources: kernel kernel/trace/ring_buffer.c, include/linux/ring_buffer.h, Documentation/trace/ftrace.rst @6.18.
"""

from __future__ import annotations

import re
import struct

from ..errors import HvError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Item = int | str | bytes | tuple[int, ...]

__all__ = [
    "EventFormat",
    "Field",
    "FormatError",
    "PageLayout",
    "Record",
    "SubBuffer",
    "decoder",
    "parse_format",
    "parse_header_page",
    "parse_subbuffer",
]

_MISSED_EVENTS = 1 << 31
_MISSED_STORED = 1 << 30
_COMMIT_MASK = _MISSED_STORED - 1

_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_TIME_SHIFT = 27
_TIME_STAMP_BITS = 59

_FIELD = re.compile(r"^\s*field:\s*(.+);\s*offset:(\d+);\s*size:(\d+);\s*signed:([01]);", re.M)
_DECLARATION = re.compile(r"^(?P<type>.*?)\s*(?P<name>\w+)(?P<array>\[[^\]]*\])?$")

_COMMON_HEADER = struct.Struct("<HBBi")  # common_type, common_flags, common_preempt_count, common_pid

# Element sizes where the format file gives only the type's name: in arrays whose length is no part of the format.
_ELEMENT_SIZES = {
    "char": 1, "bool": 1, "u8": 1, "__u8": 1, "s8": 1, "unsigned char": 1, "uint8_t": 1,
    "u16": 2, "__u16": 2, "s16": 2, "short": 2, "unsigned short": 2, "uint16_t": 2,
    "u32": 4, "__u32": 4, "s32": 4, "int": 4, "unsigned int": 4, "unsigned": 4, "uint32_t": 4,
    "u64": 8, "__u64": 8, "s64": 8, "long": 8, "unsigned long": 8, "uint64_t": 8, "cpumask_t": 8,
    "unsigned long long": 8, "long long": 8,
}  # fmt: skip
_SIGNED = frozenset({"s8", "s16", "short", "s32", "int", "s64", "long", "long long"})
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


class FormatError(HvError):
    """Trace data or a format file that is not what the kernel documents: `what`, `why`."""

    def __init__(self, what: str, why: str) -> None:
        self.what, self.why = what, why
        super().__init__(f"{what}: {why}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.what, self.why)


class Field(Value):
    """One field of an event's format: C type without the array part, byte offset and size in the record.

    `array` is the text between the brackets ("16", "", …), or None for a field that is no array.
    """

    name: str
    type: str
    offset: int
    size: int
    signed: bool
    array: str | None = None


class EventFormat(Value):
    """An event's `format` file: `event` is "system:name", `id` is what common_type holds; `layout` lacks common_*."""

    event: str
    id: int
    layout: tuple[Field, ...]


class PageLayout(Value):
    """events/header_page: byte offsets in a sub-buffer, and `size`, a sub-buffer's bytes with its header."""

    timestamp: int
    commit: int
    data: int
    size: int


class Record(Value):
    """One event: `event` is "system:name", `timestamp_ns` counts on the trace clock, `pid` is the thread's id.

    `values` maps field names to raw values: int (signed where the kernel says so), str for characters,
    bytes for bytes and structures, tuple of int for other arrays.  `record["reason"]` is `record.values["reason"]`.
    """

    event: str
    cpu: int
    timestamp_ns: int
    pid: int
    values: Mapping[str, Item]

    def __getitem__(self, name: str) -> Item:
        return self.values[name]

    def __hash__(self) -> int:
        return hash((self.event, self.cpu, self.timestamp_ns, self.pid))


class SubBuffer(Value):
    """A parsed sub-buffer: `events` are (timestamp_ns, data) pairs in order.

    `missed` counts the events lost before the first one: 0 is none, None is some but the kernel had no room to say.
    """

    timestamp_ns: int
    missed: int | None
    events: tuple[tuple[int, bytes], ...]


def _parse_fields(text: str, what: str) -> dict[str, Field]:
    found = {}
    for declared, offset, size, signed in _FIELD.findall(text):
        loc = re.match(r"(__(?:data|rel)_loc)\s+(.*?)(\[\])?\s+(\w+)$", declared)
        if loc:
            kind, element, array, name = loc.groups()
            field = Field(name, f"{kind} {element}", int(offset), int(size), signed == "1", array and "")
        else:
            split = _DECLARATION.match(declared)
            if split is None:
                raise FormatError(what, f"cannot split the declaration {declared!r}")
            array = split["array"]
            field = Field(split["name"], split["type"], int(offset), int(size), signed == "1", array and array[1:-1])
        found[field.name] = field
    return found


def parse_header_page(text: str) -> PageLayout:
    """The layout of a sub-buffer from the text of events/header_page.  FormatError where a field is missing."""
    found = _parse_fields(text, "events/header_page")
    missing = {"timestamp", "commit", "data"} - found.keys()
    if missing:
        raise FormatError("events/header_page", f"no field {', '.join(sorted(missing))}")
    data = found["data"]
    return PageLayout(found["timestamp"].offset, found["commit"].offset, data.offset, data.offset + data.size)


def parse_format(text: str, system: str) -> EventFormat:
    """An event's format from the text of events/SYSTEM/NAME/format.  FormatError where name or ID is missing."""
    name, number = re.search(r"^name:\s*(\S+)", text, re.M), re.search(r"^ID:\s*(\d+)", text, re.M)
    if name is None or number is None:
        raise FormatError(f"format of an event of {system}", "no name or ID line")
    event = f"{system}:{name[1]}"
    layout = tuple(f for f in _parse_fields(text, event).values() if not f.name.startswith("common_"))
    return EventFormat(event, int(number[1]), layout)


def parse_subbuffer(page: bytes, layout: PageLayout) -> SubBuffer:
    """The events in a sub-buffer as read from trace_pipe_raw.  FormatError where it is cut short."""
    try:
        return _parse_subbuffer(page, layout)
    except struct.error as error:
        raise FormatError("sub-buffer", f"cut short: {error}") from None


def _parse_subbuffer(page: bytes, layout: PageLayout) -> SubBuffer:
    (time,) = struct.unpack_from("<Q", page, layout.timestamp)
    (commit,) = struct.unpack_from("<Q", page, layout.commit)
    at, end = layout.data, layout.data + (commit & _COMMIT_MASK)
    if end > len(page):
        raise FormatError("sub-buffer", f"{end} bytes committed, {len(page)} read")
    missed: int | None = 0
    if commit & _MISSED_EVENTS:
        missed = struct.unpack_from("<Q", page, end)[0] if commit & _MISSED_STORED else None
    start, events, word = time, [], struct.Struct("<I").unpack_from
    while at < end:
        (head,) = word(page, at)
        kind, delta = head & 31, head >> 5
        at += 4
        if 1 <= kind < _PADDING:
            time += delta
            events.append((time, page[at : at + 4 * kind]))
            at += 4 * kind
            continue
        if kind == _PADDING and delta == 0:
            break
        (first,) = word(page, at)
        if kind == _TIME_EXTEND:
            time += first << _TIME_SHIFT | delta
            at += 4
        elif kind == _TIME_STAMP:
            stamp = first << _TIME_SHIFT | delta | time >> _TIME_STAMP_BITS << _TIME_STAMP_BITS
            time = stamp if stamp >= time else stamp + (1 << _TIME_STAMP_BITS)
            at += 4
        else:
            time += delta
            if kind == 0:
                events.append((time, page[at + 4 : at + first]))
            at += first
    if at > end:
        raise FormatError("sub-buffer", f"its last event ends at {at}, its data at {end}")
    return SubBuffer(start, missed, tuple(events))


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _array(data: bytes, element: str, size: int, signed: bool) -> Item:
    # Characters are text, bytes and structures stay bytes, other numbers are a tuple.
    if element in ("char", "const char"):
        return _text(data)
    code = _CODES.get(size) if size > 1 else None
    if code is None or len(data) % size:
        return data
    return struct.unpack(f"<{len(data) // size}{code.lower() if signed else code}", data)


def _item(field: Field) -> Callable[[bytes], Item]:
    # How to read one field that is no plain integer.
    start, end = field.offset, field.offset + field.size
    kind, _, element = field.type.partition(" ")
    if kind in ("__data_loc", "__rel_loc"):
        # A u32: low half the data's offset, high half its bytes; __rel_loc counts the offset from behind this u32.
        base, size, signed = (end if kind == "__rel_loc" else 0), _ELEMENT_SIZES.get(element, 1), element in _SIGNED

        def located(data: bytes) -> Item:
            word = int.from_bytes(data[start:end], "little")
            offset = base + (word & 0xFFFF)
            return _array(data[offset : offset + (word >> 16)], element, size, signed)

        return located
    if field.size == 0:  # a flexible array fills the rest of the record
        size = _ELEMENT_SIZES.get(field.type, 1)
        return lambda data: _array(data[start:], field.type, size, field.signed)
    count = int(field.array) if field.array and field.array.isdigit() else 0
    # A length may be given as a name; then the element's type tells.
    size = field.size // count if count else _ELEMENT_SIZES.get(field.type, 1)
    return lambda data: _array(data[start:end], field.type, size, field.signed)


def decoder(format: EventFormat) -> Callable[[int, int, bytes], Record]:
    """A function (cpu, timestamp_ns, data) -> Record for one event; `data` begins with common_type."""
    # All plain integers are taken by one struct; the rest one by one.
    plain, others, code, at = [], [], "<", 0
    for field in sorted(format.layout, key=lambda f: f.offset):
        letter = _CODES.get(field.size)
        if field.array is None and letter and "_loc " not in field.type and field.offset >= at:
            code += f"{field.offset - at}x{letter.lower() if field.signed else letter}"
            at = field.offset + field.size
            plain.append(field.name)
        else:
            others.append((field.name, _item(field)))
    unpack, size, event = struct.Struct(code).unpack_from, at, format.event
    order = [f.name for f in format.layout]
    shuffle = bool(others) or plain != order

    def decode(cpu: int, timestamp_ns: int, data: bytes) -> Record:
        if len(data) < max(size, _COMMON_HEADER.size):
            raise FormatError(event, f"record of {len(data)} bytes, its format needs {size}")
        values: dict[str, Item] = dict(zip(plain, unpack(data), strict=True))
        for name, item in others:
            values[name] = item(data)
        if shuffle:
            values = {name: values[name] for name in order}
        return Record(event, cpu, timestamp_ns, _COMMON_HEADER.unpack_from(data)[3], values)

    return decode
