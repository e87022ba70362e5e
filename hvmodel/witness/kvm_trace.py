"""KVM's MMU trace events as typed records, and the walks of guest page tables they tell of.

Owns the list of events that the MMU's models are held against (`EVENTS`), one class for each, named as the event
without "kvm_" and "mmu_", and `KvmTrace`: a trace of one thread, read whole or not at all.

A record has the fields of its event's format file.  The kernel's formats differ by version: a field that the running
kernel does not have is None, a field of its that no class has is left out, and an event that it does not have never
comes.  Numbers are raw: a role is its 32-bit word, a pferr the bits PFERR_*.

The MMU's events come in groups.  Each walk of guest page tables begins with PagetableWalk; what follows up to the next
one belongs to it: PagingElement for each entry read, SetAccessed and SetDirty for what it wrote to them, WalkerError
if it failed; then what a page fault that began with this walk did: GetPage, SpteRequested, SetSpte, …  `walks` groups.

Sources: linux:arch/x86/kvm/mmu/mmutrace.h, linux:arch/x86/kvm/trace.h, linux:include/trace/events/kvm.h@v6.18.
"""

from __future__ import annotations

import os
import threading
from io import FileIO
from struct import Struct

from ..errors import ArgumentError, ClosedError, HvError
from ..value import Value
from .result import Lacking
from .tracefs import Tracefs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType
    from typing import Any, Self

    from .ringbuffer import EventFormat, Record

__all__ = [
    "EVENTS",
    "AgeHva",
    "CheckMmioSpte",
    "EmulateInsn",
    "Event",
    "FastPageFault",
    "GetPage",
    "HandleMmioPageFault",
    "InjException",
    "KvmTrace",
    "MarkMmioSpte",
    "Mmio",
    "PageFault",
    "PagetableWalk",
    "PagingElement",
    "Pio",
    "PrepareZapPage",
    "SetAccessed",
    "SetDirty",
    "SetSpte",
    "SplitHugePage",
    "SpteRequested",
    "SyncPage",
    "TdpMmuSpteChanged",
    "TestAgeHva",
    "TraceLost",
    "TracedWalk",
    "UnmapHvaRange",
    "UnsyncPage",
    "UserspaceExit",
    "VcpuMatchMmio",
    "WalkerError",
    "ZapAllFast",
    "typed",
    "walks",
]


class TraceLost(HvError):
    """Records of a trace are missing: what was read proves nothing.  `lost`: how many, None where the kernel cannot
    say.  What was traced is to be done again."""

    def __init__(self, lost: int | None, detail: str) -> None:
        self.lost, self.detail = lost, detail
        super().__init__(f"{'some' if lost is None else lost} trace records lost: {detail}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.lost, self.detail)


class Event(Value):
    """Base of the typed records: one event of KVM.  Thread and time are not kept: lists are in order of time."""


# ---- events of a walk of guest page tables (kvmmmu) ----


class PagetableWalk(Event):
    """kvm_mmu_pagetable_walk: a walk begins, for `addr`, with the access `pferr` (bits PFERR_*: W 1, U 2, F 4)."""

    addr: int
    pferr: int


class PagingElement(Event):
    """kvm_mmu_paging_element: the entry `pte` was read at `level` (4 is the PML4)."""

    pte: int
    level: int


class SetAccessed(Event):
    """kvm_mmu_set_accessed_bit: the walk sets A in the entry at `gpa`."""

    gpa: int


class SetDirty(Event):
    """kvm_mmu_set_dirty_bit: the walk sets D in the entry at `gpa`."""

    gpa: int


class WalkerError(Event):
    """kvm_mmu_walker_error: the walk ends in a #PF with the error code `pferr`."""

    pferr: int


# ---- events of shadow pages and their entries (kvmmmu) ----


class GetPage(Event):
    """kvm_mmu_get_page: a shadow page of `gfn` and `role` (a word) was found, or `created`."""

    gfn: int
    role: int
    root_count: int | None = None
    unsync: int | None = None
    created: int | None = None
    mmu_valid_gen: int | None = None


class SyncPage(Event):
    """kvm_mmu_sync_page: an unsynchronised shadow page is brought up to date."""

    gfn: int
    role: int
    root_count: int | None = None
    unsync: int | None = None
    mmu_valid_gen: int | None = None


class UnsyncPage(Event):
    """kvm_mmu_unsync_page: the guest may write to this page table; its shadow page is out of date from now on."""

    gfn: int
    role: int
    root_count: int | None = None
    unsync: int | None = None
    mmu_valid_gen: int | None = None


class PrepareZapPage(Event):
    """kvm_mmu_prepare_zap_page: a shadow page is taken away."""

    gfn: int
    role: int
    root_count: int | None = None
    unsync: int | None = None
    mmu_valid_gen: int | None = None


class ZapAllFast(Event):
    """kvm_mmu_zap_all_fast: all shadow pages of the VM are made obsolete."""

    mmu_valid_gen: int | None = None
    mmu_used_pages: int | None = None


class SpteRequested(Event):
    """kvm_mmu_spte_requested: a fault will map `gfn` to the host's frame `pfn` at `level`."""

    gfn: int
    pfn: int | None = None
    level: int | None = None


class SetSpte(Event):
    """kvm_mmu_set_spte: `spte` now stands at `sptep`, of `level`; `r`, `x`, `u` (-1: unknown) are what it permits."""

    gfn: int
    spte: int
    sptep: int
    level: int
    r: int | None = None
    x: int | None = None
    u: int | None = None


class MarkMmioSpte(Event):
    """mark_mmio_spte: the entry at `sptep` says that nothing is at `gfn`."""

    sptep: int
    gfn: int
    access: int
    gen: int | None = None


class HandleMmioPageFault(Event):
    """handle_mmio_page_fault: an entry made by mark_mmio_spte was hit."""

    addr: int
    gfn: int
    access: int


class CheckMmioSpte(Event):
    """check_mmio_spte: such an entry's generation against that of the memory slots."""

    kvm_gen: int
    spte_gen: int
    spte: int | None = None


class FastPageFault(Event):
    """fast_page_fault: a fault handled without the MMU lock.  `ret`: RET_PF_*; `new_spte`: what is in the entry now."""

    cr2_or_gpa: int
    error_code: int
    sptep: int
    old_spte: int
    new_spte: int
    ret: int | None = None
    vcpu_id: int | None = None


class SplitHugePage(Event):
    """kvm_mmu_split_huge_page: a large mapping was split for dirty logging."""

    gfn: int
    spte: int
    level: int
    errno: int | None = None


class TdpMmuSpteChanged(Event):
    """kvm_tdp_mmu_spte_changed: an entry of the TDP MMU."""

    as_id: int
    gfn: int
    level: int
    old_spte: int
    new_spte: int


# ---- events of kvm ----


class PageFault(Event):
    """kvm_page_fault: a vCPU's fault reaches KVM."""

    fault_address: int
    error_code: int
    guest_rip: int | None = None
    vcpu_id: int | None = None


class InjException(Event):
    """kvm_inj_exception: `exception` (a vector) is injected into the guest."""

    exception: int
    has_error: int
    error_code: int
    reinjected: int | None = None


class EmulateInsn(Event):
    """kvm_emulate_insn: the emulator takes the instruction at `csbase` + `rip`; `insn` are the bytes it has of it."""

    rip: int
    csbase: int
    len: int
    insn: bytes
    flags: int
    failed: int


class Mmio(Event):
    """kvm_mmio: an access where no memory is.  `type`: 0 read that waits, 1 read, 2 write."""

    type: int
    len: int
    gpa: int
    val: int


class VcpuMatchMmio(Event):
    """vcpu_match_mmio: the vCPU's one-entry cache of the last such access was hit: no walk took place."""

    gva: int
    gpa: int
    write: int
    gpa_match: int | None = None


class Pio(Event):
    """kvm_pio: a port is read (`rw` 0) or written (1)."""

    rw: int
    port: int
    size: int
    count: int
    val: int | None = None


class UserspaceExit(Event):
    """kvm_userspace_exit: KVM_RUN returns; `reason` is KVM_EXIT_*, `errno` what the ioctl gives, negative."""

    reason: int
    errno: int


class UnmapHvaRange(Event):
    """kvm_unmap_hva_range: the host takes these addresses away (its munmap, not the guest; of all of the process)."""

    start: int
    end: int


class AgeHva(Event):
    """kvm_age_hva: the host asks whether the guest used these addresses."""

    start: int
    end: int


class TestAgeHva(Event):
    """kvm_test_age_hva: the same, changing nothing."""

    hva: int


# Class by event.
_TYPES: dict[str, type[Event]] = {
    "kvmmmu:kvm_mmu_pagetable_walk": PagetableWalk,
    "kvmmmu:kvm_mmu_paging_element": PagingElement,
    "kvmmmu:kvm_mmu_set_accessed_bit": SetAccessed,
    "kvmmmu:kvm_mmu_set_dirty_bit": SetDirty,
    "kvmmmu:kvm_mmu_walker_error": WalkerError,
    "kvmmmu:kvm_mmu_get_page": GetPage,
    "kvmmmu:kvm_mmu_sync_page": SyncPage,
    "kvmmmu:kvm_mmu_unsync_page": UnsyncPage,
    "kvmmmu:kvm_mmu_prepare_zap_page": PrepareZapPage,
    "kvmmmu:kvm_mmu_zap_all_fast": ZapAllFast,
    "kvmmmu:kvm_mmu_spte_requested": SpteRequested,
    "kvmmmu:kvm_mmu_set_spte": SetSpte,
    "kvmmmu:mark_mmio_spte": MarkMmioSpte,
    "kvmmmu:handle_mmio_page_fault": HandleMmioPageFault,
    "kvmmmu:check_mmio_spte": CheckMmioSpte,
    "kvmmmu:fast_page_fault": FastPageFault,
    "kvmmmu:kvm_mmu_split_huge_page": SplitHugePage,
    "kvmmmu:kvm_tdp_mmu_spte_changed": TdpMmuSpteChanged,
    "kvm:kvm_page_fault": PageFault,
    "kvm:kvm_inj_exception": InjException,
    "kvm:kvm_emulate_insn": EmulateInsn,
    "kvm:kvm_mmio": Mmio,
    "kvm:vcpu_match_mmio": VcpuMatchMmio,
    "kvm:kvm_pio": Pio,
    "kvm:kvm_userspace_exit": UserspaceExit,
    "kvm:kvm_unmap_hva_range": UnmapHvaRange,
    "kvm:kvm_age_hva": AgeHva,
    "kvm:kvm_test_age_hva": TestAgeHva,
}

EVENTS: tuple[str, ...] = tuple(_TYPES)
"""The events that have a class here, "system:name"."""

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}

# Without these a kernel shows nothing of the MMU.
_NEEDED = (*tuple(_TYPES)[:5], "kvm:kvm_userspace_exit")


def _maker(kind: type[Event], event: str) -> Callable[[Record], Event]:
    required = [name for name in kind.fields() if name not in kind._defaults]
    optional = [name for name in kind.fields() if name in kind._defaults]

    def make(record: Record) -> Event:
        values = record.values
        try:
            return kind(*[values[name] for name in required], *[values.get(name) for name in optional])
        except KeyError as error:
            raise Lacking(f"{event} has no field {error} in this kernel") from None

    return make


_MAKERS = {event: _maker(kind, event) for event, kind in _TYPES.items()}


def typed(record: Record) -> Event | None:
    """The record as one of this module's classes; None for an event that has none.

    `Lacking` where the running kernel's format has not what the class must have.

    >>> from hvmodel.witness.ringbuffer import Record
    >>> typed(Record("kvmmmu:kvm_mmu_paging_element", 0, 1, 7, {"pte": 0x2027, "level": 4}))
    PagingElement(pte=0x2027, level=4)
    """
    make = _MAKERS.get(record.event)
    return None if make is None else make(record)


class TracedWalk(Value):
    """One walk of guest page tables as the kernel tells it, and what followed it.

    `addr`, `pferr`: what was asked.  `entries`: (level, entry) as read, from the root on.  `accessed`, `dirty`: gpas of
    entries that got A or D, in order.  `error`: error code of the #PF it ended in, or None.  `after`: the other records
    up to the next walk, in order.  An update that is traced is not always made: KVM leaves a read-only slot alone.
    """

    addr: int
    pferr: int
    entries: tuple[tuple[int, int], ...]
    accessed: tuple[int, ...]
    dirty: tuple[int, ...]
    error: int | None
    after: tuple[Event, ...] = ()

    def events(self, kind: type[Any]) -> tuple[Any, ...]:
        """The records of `after` of one class."""
        return tuple(event for event in self.after if type(event) is kind)


def walks(events: Iterable[Event]) -> list[TracedWalk]:
    """Group records into walks, in order; those before the first walk are left out.

    >>> [walk] = walks([PagetableWalk(0x1000, 4), PagingElement(0x2007, 4), SetAccessed(0x8000), WalkerError(4)])
    >>> walk.entries, walk.accessed, walk.error
    (((4, 8199),), (32768,), 4)
    """
    found: list[TracedWalk] = []
    now: list[Event] | None = None
    for event in events:
        if type(event) is PagetableWalk:
            if now is not None:
                found.append(_walk(now))
            now = [event]
        elif now is not None:
            now.append(event)
    if now is not None:
        found.append(_walk(now))
    return found


def _walk(events: Sequence[Event]) -> TracedWalk:
    entries, accessed, dirty, after, error = [], [], [], [], None
    first: Any = events[0]
    for event in events[1:]:
        kind = type(event)
        if kind is PagingElement:
            entries.append((event.level, event.pte))  # type: ignore[attr-defined]
        elif kind is SetAccessed:
            accessed.append(event.gpa)  # type: ignore[attr-defined]
        elif kind is SetDirty:
            dirty.append(event.gpa)  # type: ignore[attr-defined]
        elif kind is WalkerError:
            error = event.pferr  # type: ignore[attr-defined]
        else:
            after.append(event)
    return TracedWalk(first.addr, first.pferr, tuple(entries), tuple(accessed), tuple(dirty), error, tuple(after))


class _Raw:
    # A record not yet decoded.
    __slots__ = ("cpu", "data", "timestamp_ns")

    def __init__(self, cpu: int, timestamp_ns: int, data: bytes) -> None:
        self.cpu, self.timestamp_ns, self.data = cpu, timestamp_ns, data

    @property
    def id(self) -> int:
        return self.data[0] | self.data[1] << 8


def _raw_maker(format: EventFormat) -> Callable[[bytes], Event]:
    # From a record's bytes to its class, by the running kernel's format.
    kind = _TYPES[format.event]
    fields = {field.name: field for field in format.layout}
    missing = [name for name in kind.fields() if name not in kind._defaults and name not in fields]
    if missing:
        raise Lacking(f"{format.event} has no field {', '.join(missing)} in this kernel")
    here = sorted((fields[name] for name in kind.fields() if name in fields), key=lambda field: field.offset)
    code, at = "<", 0
    for field in here:
        letter = _CODES.get(field.size) if field.array is None else None
        letter = f"{field.size}s" if letter is None else letter.lower() if field.signed else letter
        code += f"{field.offset - at}x{letter}"
        at = field.offset + field.size
    unpack = Struct(code).unpack_from
    found = [field.name for field in here]
    if tuple(found) == kind.fields():
        return lambda data: kind(*unpack(data))
    places = [found.index(name) if name in fields else None for name in kind.fields()]

    def make(data: bytes) -> Event:
        values = unpack(data)
        return kind(*[None if place is None else values[place] for place in places])

    return make


class KvmTrace:
    """A private trace of KVM's events in one thread (by default the caller's), complete or not at all.

    `events`: names of `EVENTS`, by default all; those that the running kernel lacks are left out.  `buffer_size`: bytes
    per CPU.  `tid`: of a thread of this process or another's; threads that it makes are not traced.  It records from
    the start.  Private: no other trace, and no other guest's, changes or is changed (a tracefs instance with
    set_event_pid), and nothing of it stays behind, SIGKILL included.

    HostError without root or tracefs; `Lacking` where the kernel has no such events.  ArgumentError: an event has no
    class here.  Close it, best by `with`.  Threads: one at a time may call; the traced one runs freely.
    """

    def __init__(
        self, events: Iterable[str] | None = None, *, tid: int | None = None, buffer_size: int = 8 << 20
    ) -> None:
        wanted = EVENTS if events is None else tuple(events)
        for event in wanted:
            if event not in _TYPES:
                raise ArgumentError("KvmTrace", "events", event, "names of EVENTS")
        # As files, so that those of a forgotten trace are closed.
        self._files: list[FileIO] = []
        self._tracefs = Tracefs()
        try:
            present = _present(self._tracefs)
            #: The events recorded.
            self.events = tuple(event for event in wanted if event in present)
            missing = [event for event in _NEEDED if event in wanted and event not in present]
            if missing or not self.events:
                raise Lacking(f"the kernel has no event {', '.join(missing or wanted)}")
            #: The thread that is traced.
            self.tid = threading.get_native_id() if tid is None else tid
            formats = [self._tracefs.format(event) for event in self.events]
            self._makers = {format.id: _raw_maker(format) for format in formats}
            #: The running kernel's number of each event, by which `read_raw` tells them apart.
            self.ids = {format.event: format.id for format in formats}
            self._instance = self._tracefs.instance(self.events, [self.tid], follow=False, buffer_size=buffer_size)
            # Decoded later, and only what is wanted.
            self._instance._decoders = dict.fromkeys(self._makers, _Raw)  # type: ignore[arg-type]
            path = f"instances/{self._instance.name}"
            self._switch = self._open(f"{path}/tracing_on", os.O_WRONLY)
            cpus = [name for name in self._tracefs.listdir(f"{path}/per_cpu") if name.startswith("cpu")]
            self._stats = [self._open(f"{path}/per_cpu/{cpu}/stats", os.O_RDONLY) for cpu in cpus]
            self._lost = self._nr_lost()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<KvmTrace of thread {self.tid}>" if self._files else "<KvmTrace closed>"

    def _open(self, path: str, flags: int) -> int:
        fd = self._tracefs.open(path, flags)
        self._files.append(FileIO(fd, "r" if flags == os.O_RDONLY else "w"))
        return fd

    def close(self) -> None:
        """Remove the trace.  Any number of calls."""
        while self._files:
            self._files.pop().close()
        self._tracefs.close()

    def _check_open(self, call: str) -> None:
        if not self._files:
            raise ClosedError(f"KvmTrace.{call}", "KvmTrace")

    def pause(self) -> None:
        """Record nothing until resume().  ClosedError."""
        self._check_open("pause")
        os.write(self._switch, b"0")

    def resume(self) -> None:
        """Record again.  ClosedError."""
        self._check_open("resume")
        os.write(self._switch, b"1")

    def filter(self, event: str, text: str) -> None:
        """Record of `event` only what this filter says (kernel Documentation/trace/events.rst); "0": all of them.

        What it leaves out counts as lost nowhere.  ArgumentError: not one of `events`.  HostError: no filter.
        ClosedError.
        """
        self._check_open("filter")
        if event not in self.events:
            raise ArgumentError("KvmTrace.filter", "event", event, ", ".join(self.events))
        self._instance.set(f"events/{event.replace(':', '/')}/filter", text)

    def _nr_lost(self) -> int:
        # Overwritten, refused, and lost to a nested writer, of all CPUs since the trace was made.
        lost = 0
        for fd in self._stats:
            for line in os.pread(fd, 4096, 0).split(b"\n"):
                name, _, count = line.partition(b":")
                if name in (b"overrun", b"commit overrun", b"dropped events"):
                    lost += int(count)
        return lost

    def read_raw(self) -> list[_Raw]:
        """All that was recorded since the last call, in order of time, not decoded.  TraceLost, ClosedError."""
        self._check_open("read")
        found = self._instance.read()
        lost, gaps = self._nr_lost(), len(self._instance.gaps)
        if lost != self._lost or gaps:
            new, self._lost = lost - self._lost, lost
            self._instance.gaps.clear()
            self._instance._held.clear()
            raise TraceLost(new or None, f"the buffer of thread {self.tid} was full, or an interrupt was nested")
        return found  # type: ignore[return-value]

    def event(self, raw: _Raw) -> Event:
        """One of `read_raw` decoded."""
        return self._makers[raw.data[0] | raw.data[1] << 8](raw.data)

    def read(self) -> list[Event]:
        """All that was recorded since the last call, as typed records in order of time.

        TraceLost: something of it is missing, and all of it is dropped.  ClosedError.
        """
        makers = self._makers
        return [makers[raw.data[0] | raw.data[1] << 8](raw.data) for raw in self.read_raw()]


def _present(tracefs: Tracefs) -> set[str]:
    # The events of KVM that this kernel has.
    found: set[str] = set()
    for system in ("kvm", "kvmmmu"):
        try:
            found.update(tracefs.events(f"{system}:*"))
        except ArgumentError:
            continue  # no KVM, or none that traces
    return found
