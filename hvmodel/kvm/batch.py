"""Exits that C serves: rules per range of ports and addresses, counts, and a record of every exit.

Attach a `Batch` to a vCPU (`vcpu.batch = batch`) and `Vcpu.run()` returns only for exits that no rule serves.  This
is how serial output and exit traces cost no Python per exit.

    read  "stop" give it to Python | "ignore" all ones | an int: that value | a Feed: the next bytes of it
    write "stop" give it to Python | "ignore" drop it  | a Capture: append the bytes
"""

from __future__ import annotations

import errno
from _thread import RLock
from struct import Struct
from struct import error as StructError
from weakref import ref

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, HostError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Literal, TypeAlias

    from .vcpu import Vcpu

    Write: TypeAlias = "Literal['stop', 'ignore'] | Capture"
    Read: TypeAlias = "Literal['stop', 'ignore'] | int | Feed"

__all__ = ["RECORD_DTYPE", "Batch", "Capture", "ExitRecord", "Feed", "iter_records"]

# numpy: `np.frombuffer(batch.take_records(), dtype=RECORD_DTYPE)`; the layout of struct hv_record in native/run.h.
RECORD_DTYPE = [
    ("time_ns", "<u8"),
    ("rip", "<u8"),
    ("address", "<u8"),
    ("data", "<u8"),
    ("reason", "<u4"),
    ("count", "<u4"),
    ("size", "u1"),
    ("is_write", "u1"),
    ("policy", "u1"),
    ("pad", "V5"),
]
_RECORD = Struct("<QQQQIIBBB5x")
_POLICIES = {"stop": 0, "ignore": 1}
_POLICY_NAMES = ("stop", "ignore", "constant", "capture", "feed")
_MIN_RING = 8192  # so that a ring that is not full can take one exit (4096 bytes)


def _ring_capacity(call: str, capacity: object) -> int:
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise ArgumentTypeError(call, "capacity", capacity, "bytes")
    if not _MIN_RING <= capacity <= 1 << 40 or capacity & (capacity - 1):
        raise ArgumentError(call, "capacity", capacity, f"a power of two from {_MIN_RING} bytes on")
    return capacity


def _allocate(call: str, ctype: str, capacity: int) -> Any:
    try:
        return ffi.new(ctype, capacity)
    except MemoryError:
        raise HostError(errno.ENOMEM, call, "capacity", capacity, "what the host's memory has room for") from None


class _Ring:
    # struct hv_ring and its bytes.
    __slots__ = ("_batch", "_bytes", "_lock", "_ring")

    def __init__(self, capacity: int) -> None:
        call = type(self).__name__
        self._bytes = _allocate(call, "uint8_t[]", _ring_capacity(call, capacity))
        self._ring = ffi.new("struct hv_ring *", {"data": self._bytes, "capacity": capacity})
        # The ring has one producer and one consumer: C, in the one batch that uses it, and we, in one thread at a time.
        self._batch: ref[Batch] | None = None
        self._lock = RLock()  # a signal handler may call read() within read()

    @property
    def capacity(self) -> int:
        """Bytes it holds."""
        return int(self._ring.capacity)

    def __len__(self) -> int:
        return int(self._ring.head - self._ring.tail)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)} of {self.capacity} bytes>"


class Capture(_Ring):
    """Collects what the guest writes to the ranges it is the `write` of; `read()` takes it out.

    Bytes are in the order of the guest's writes.  A full ring loses nothing: the run loop empties it into memory of
    this object's own and goes on.

    Thread safety: any thread may call read(), also while the guest runs.
    """

    __slots__ = ("_spilled",)

    def __init__(self, capacity: int = 1 << 16) -> None:
        super().__init__(capacity)
        self._spilled = bytearray()

    def read(self) -> bytes:
        """Take everything captured since the last call."""
        with self._lock:
            self._drain()
            data = bytes(self._spilled)
            self._spilled.clear()
        return data

    def _spill(self) -> None:
        # Make room; the run loop calls this when the ring is full.
        with self._lock:
            self._drain()

    def _drain(self) -> None:
        ring = self._ring
        tail, end = ring.tail, ring.head
        if tail == end:
            return
        at, size = tail & (ring.capacity - 1), end - tail
        chunk = ffi.buffer(self._bytes)[at : at + size]
        chunk += ffi.buffer(self._bytes)[: size - len(chunk)]
        # Both or none: without a call in between, no signal handler can raise there.
        self._spilled += chunk
        ring.tail = end

    def __len__(self) -> int:
        return len(self._spilled) + int(self._ring.head - self._ring.tail)


class Feed(_Ring):
    """Answers the guest's reads of the ranges it is the `read` of, from bytes that `write()` puts in.

    `on_empty`: what a read gets that finds fewer bytes than it wants: "stop" (the exit goes to Python), "ignore" (all
    ones) or an int.

    Thread safety: any thread may call write(), also while the guest runs.
    """

    __slots__ = ("on_empty",)

    def __init__(
        self,
        data: bytes | bytearray | memoryview = b"",
        *,
        capacity: int = 1 << 16,
        on_empty: Literal["stop", "ignore"] | int = "stop",
    ) -> None:
        super().__init__(capacity)
        _policy("Feed", "on_empty", on_empty)
        self.on_empty = on_empty
        if isinstance(data, memoryview):
            data = bytes(data)
        if self.write(data) != len(data):
            raise ArgumentError("Feed", "data", len(data), f"up to capacity={capacity} bytes")

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data`; how many bytes had room."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ArgumentTypeError("Feed.write", "data", data, "bytes")
        if isinstance(data, memoryview) and not data.c_contiguous:
            data = bytes(data)
        with self._lock, ffi.from_buffer("uint8_t[]", data) as source:
            return lib.hv_ring_write(self._ring, source, len(source))


def _policy(call: str, field: str, value: object) -> tuple[int, int]:
    # (policy, constant) of "stop", "ignore" or an int.
    if isinstance(value, str) and value in _POLICIES:
        return _POLICIES[value], 0
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < 1 << 64:
            raise ArgumentError(call, field, value, "0 to 2**64-1")
        return lib.HV_CONSTANT, value
    raise ArgumentTypeError(call, field, value, '"stop", "ignore" or an int')


class ExitRecord(Value):
    """One recorded exit.

    `time_ns`: CLOCK_MONOTONIC, or 0 without timestamps; `rip`: at or behind the instruction (docs/exits.md), 0 where
    registers are not synced; `address`: port, gpa or MSR; `data`: the first 8 bytes, little-endian (of an exit left to
    Python only what was written); `reason`: KVM_EXIT_*; `count` elements of `size` bytes; `is_write`; `policy`: what
    was done ("stop": given to Python).
    """

    time_ns: int
    rip: int
    address: int
    data: int
    reason: int
    count: int
    size: int
    is_write: bool
    policy: str


def iter_records(records: bytes | bytearray | memoryview) -> Iterator[ExitRecord]:
    """The exits in a buffer from `Batch.take_records()`, without numpy."""
    try:
        rows = _RECORD.iter_unpack(records)
    except (TypeError, BufferError):
        raise ArgumentTypeError("iter_records", "records", records, "bytes") from None
    except StructError:
        accepted = f"whole records of {_RECORD.size} bytes"
        raise ArgumentError("iter_records", "records", len(records), accepted) from None
    for time_ns, rip, address, data, reason, count, size, is_write, policy in rows:
        if policy >= len(_POLICY_NAMES):
            raise ArgumentError("iter_records", "records", policy, "records of a Batch", "no such policy")
        yield ExitRecord(time_ns, rip, address, data, reason, count, size, bool(is_write), _POLICY_NAMES[policy])


class Batch:
    """Rules by which C serves a vCPU's exits.

    `unclaimed_pio`, `unclaimed_mmio`: what happens to an access that no rule covers, "stop" or "ignore".
    `max_exits`: a run ends with Interrupted("limit") when it has served so many; 0: no limit.

    Thread safety: change it from one thread, while its vCPU is not running (else BusyError).  Captures and feeds are
    free of that.

    >>> out = Capture()
    >>> batch = Batch()
    >>> batch.pio(0x3F8, 1, write=out, read=0)
    >>> batch.pio(0x3FD, 1, read=0x60)
    """

    def __init__(
        self,
        *,
        unclaimed_pio: Literal["stop", "ignore"] = "stop",
        unclaimed_mmio: Literal["stop", "ignore"] = "stop",
        max_exits: int = 0,
    ) -> None:
        self._batch = ffi.new("struct hv_batch *")
        self._rules: dict[str, list[tuple[int, int, Any, Any]]] = {"pio": [], "mmio": []}
        self._keep: list[Any] = []  # what the C side points at
        self._records: Any = None
        self._capacity = 0
        self._timestamps = False
        self._vcpu: Vcpu | None = None
        self._unclaimed = {"unclaimed_pio": "stop", "unclaimed_mmio": "stop"}
        self._max_exits = 0
        self.configure(unclaimed_pio=unclaimed_pio, unclaimed_mmio=unclaimed_mmio, max_exits=max_exits)

    # ---- rules ----

    def configure(
        self,
        *,
        unclaimed_pio: Literal["stop", "ignore"] | None = None,
        unclaimed_mmio: Literal["stop", "ignore"] | None = None,
        max_exits: int | None = None,
    ) -> None:
        """Change the defaults given to the constructor; None leaves one as it is."""
        unclaimed = dict(self._unclaimed)
        given: dict[str, object] = {"unclaimed_pio": unclaimed_pio, "unclaimed_mmio": unclaimed_mmio}
        for field, value in given.items():
            if value is not None:
                if not isinstance(value, str) or value not in _POLICIES:
                    raise ArgumentError("Batch", field, value, '"stop" or "ignore"')
                unclaimed[field] = value
        if max_exits is not None:
            if isinstance(max_exits, bool) or not isinstance(max_exits, int):
                raise ArgumentTypeError("Batch", "max_exits", max_exits, "a number of exits")
            if not 0 <= max_exits < 1 << 64:
                raise ArgumentError("Batch", "max_exits", max_exits, "0 to 2**64-1")
        old = self._unclaimed, self._max_exits
        self._unclaimed = unclaimed
        self._max_exits = self._max_exits if max_exits is None else max_exits
        try:
            self._publish()
        except BusyError:
            self._unclaimed, self._max_exits = old
            raise

    def pio(self, port: int, size: int, *, read: Read = "stop", write: Write = "stop") -> None:
        """Serve accesses that lie in ports [port, port + size); what lies there in part goes to Python.

        ArgumentError: the range is empty, beyond 0x10000, or overlaps another rule.
        """
        self._add("pio", "port", port, size, 1 << 16, read, write)

    def mmio(self, gpa: int, size: int, *, read: Read = "stop", write: Write = "stop") -> None:
        """Serve MMIO exits that lie in [gpa, gpa + size)."""
        self._add("mmio", "gpa", gpa, size, 1 << 64, read, write)

    def _add(self, kind: str, field: str, start: object, size: object, limit: int, read: object, write: object) -> None:
        call = f"Batch.{kind}"
        for name, value in ((field, start), ("size", size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(call, name, value, "an int")
        assert isinstance(start, int) and isinstance(size, int)
        if start < 0 or size < 1 or start + size > limit:
            raise ArgumentError(call, field, start, f"a range of at least one, up to {limit:#x}", f"size={size:#x}")
        if not isinstance(read, Feed):
            _policy(call, "read", read)
        if not isinstance(write, Capture) and not (isinstance(write, str) and write in _POLICIES):
            raise ArgumentTypeError(call, "write", write, '"stop", "ignore" or a Capture')
        for ring in (read, write):
            if isinstance(ring, _Ring) and ring._batch is not None and ring._batch() not in (None, self):
                raise BusyError(call, repr(ring), "it is used by another Batch")
        for other in self._rules[kind]:
            if start < other[1] and other[0] < start + size:
                raise ArgumentError(
                    call, field, start, "a range of its own", f"[{other[0]:#x}, {other[1]:#x}) has a rule"
                )
        self._rules[kind].append((start, start + size, read, write))
        self._rules[kind].sort(key=lambda rule: rule[0])
        try:
            self._publish()
        except BusyError:
            self._rules[kind].remove((start, start + size, read, write))
            raise

    def remove(self, kind: Literal["pio", "mmio"], start: int) -> None:
        """Drop the rule whose range starts at `start`.  ArgumentError: there is none."""
        given: object = kind
        rules = self._rules.get(given) if isinstance(given, str) else None
        if rules is None:
            raise ArgumentError("Batch.remove", "kind", kind, '"pio" or "mmio"')
        old = [rule for rule in rules if rule[0] == start]
        if not old:
            raise ArgumentError("Batch.remove", "start", start, f"one of {[hex(rule[0]) for rule in rules]}")
        rules.remove(old[0])
        try:
            self._publish()
        except BusyError:
            rules.append(old[0])
            rules.sort(key=lambda rule: rule[0])
            raise

    def _publish(self) -> None:
        # Hand the rules to C in one step, while the vCPU is not running.
        keep: list[Any] = []
        tables = {}
        for kind, rules in self._rules.items():
            table = ffi.new("struct hv_rule[]", max(len(rules), 1))
            for at, (start, end, read, write) in enumerate(rules):
                row = table[at]
                row.start, row.end = start, end & ((1 << 64) - 1) if end < 1 << 64 else (1 << 64) - 1
                if isinstance(read, Feed):
                    row.read, row.feed = lib.HV_FEED, read._ring
                    row.on_empty, row.value = _policy("Feed", "on_empty", read.on_empty)
                    keep.append(read)
                else:
                    row.read, row.value = _policy("Batch", "read", read)
                if isinstance(write, Capture):
                    row.write, row.capture = lib.HV_CAPTURE, write._ring
                    keep.append(write)
                else:
                    row.write = _POLICIES[write]
            tables[kind] = table
        following = ffi.new(
            "struct hv_batch *",
            {
                "pio": tables["pio"],
                "mmio": tables["mmio"],
                "nr_pio": len(self._rules["pio"]),
                "nr_mmio": len(self._rules["mmio"]),
                "unclaimed_pio": _POLICIES[self._unclaimed["unclaimed_pio"]],
                "unclaimed_mmio": _POLICIES[self._unclaimed["unclaimed_mmio"]],
                "max_exits": self._max_exits,
                "timestamps": self._timestamps,
                "records": self._records if self._records is not None else ffi.NULL,
                "records_capacity": self._capacity,
            },
        )
        # What C points at is kept at every moment, whatever exception a signal handler raises.
        old = self._keep
        new = [*keep, *tables.values(), self._records]
        self._keep = [*old, *new]
        rc = lib.hv_batch_update(self._running(), self._batch, following)
        if rc == lib.HV_CLOSED:
            rc = lib.hv_batch_update(ffi.NULL, self._batch, following)
        if rc == lib.HV_BUSY:
            self._keep = old
            raise BusyError("Batch", "its rules", "the vCPU runs; kick it first")
        for part in old:
            if isinstance(part, _Ring):
                part._batch = None
        for part in keep:
            part._batch = ref(self)
        self._keep = new

    def _stop_ignoring(self) -> None:
        # From the next exit on, also while the vCPU runs: C reads each of these words once per exit.
        self._unclaimed = dict.fromkeys(self._unclaimed, "stop")
        self._batch.unclaimed_pio = self._batch.unclaimed_mmio = _POLICIES["stop"]

    def _running(self) -> Any:
        return ffi.NULL if self._vcpu is None else self._vcpu._c

    def _spill(self) -> None:
        # Empty every capture ring; the run loop calls this when one is full.
        for part in self._keep:
            if isinstance(part, Capture):
                part._spill()
        self._batch.ring_full = 0

    # ---- counts and records ----

    @property
    def nr_exits(self) -> int:
        """Exits seen so far, served or not."""
        return int(self._batch.nr_exits)

    @property
    def nr_served(self) -> int:
        """Exits that C served."""
        return int(self._batch.nr_served)

    @property
    def counts(self) -> dict[int, int]:
        """Exits by reason (KVM_EXIT_*); reasons above 62 are counted under 63."""
        return {reason: n for reason, n in enumerate(self._batch.counts) if n}

    def record(self, capacity: int, *, timestamps: bool = False) -> None:
        """From now on record every exit, up to `capacity` (then the run ends with Interrupted("records")); 0: stop
        recording.

        48 bytes each.  `timestamps` reads the clock at every exit.  What was recorded and not taken is dropped.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise ArgumentTypeError("Batch.record", "capacity", capacity, "a number of records")
        if not 0 <= capacity <= 1 << 32:
            raise ArgumentError("Batch.record", "capacity", capacity, "0 to 2**32 records")
        old = self._records, self._capacity, self._timestamps
        self._records = _allocate("Batch.record", "struct hv_record[]", capacity) if capacity else None
        self._capacity, self._timestamps = capacity, bool(timestamps)
        try:
            self._publish()
        except BusyError:
            self._records, self._capacity, self._timestamps = old
            raise

    def take_records(self) -> bytearray:
        """The recorded exits, taken out: rows of RECORD_DTYPE, for numpy.frombuffer or iter_records()."""
        nr = int(self._batch.nr_records)
        taken = bytearray(nr * _RECORD.size)
        if nr:
            with ffi.from_buffer("struct hv_record[]", taken, require_writable=True) as target:
                got = lib.hv_take_records(self._running(), self._batch, target, nr)
            if got == lib.HV_BUSY:
                raise BusyError("Batch.take_records", "the record", "the vCPU runs; kick it first")
        return taken

    def __repr__(self) -> str:
        return f"<Batch pio={len(self._rules['pio'])} mmio={len(self._rules['mmio'])} exits={self.nr_exits}>"
