"""Finding by trying which field of a part KVM refuses: a scratch vCPU that resembles the refused one, and `search`.

What no rule explains is tried: on a vCPU of a VM of its own, with the same CPUID, interrupt controller, capabilities,
MSRs and registers, so that the vCPU at hand is never touched.  A field is at fault where KVM takes the value once that
field alone is another one; tried are, for each field in turn, first those that differ from what the vCPU has:

    what the vCPU has now        zero        the value with one bit the other way round

Where no single field is enough, fields are put back one after the other until KVM takes the value, and then those that
were not needed are taken out again; the first of the rest is named, with the others.

MSRs are many, but KVM takes them one after the other up to the first that it refuses.  That one is found by bisecting,
what it is together with by leaving out the others, and its value by trying with these alone; then it goes on behind it.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack, suppress

from .._ffi import ffi, lib
from ..errors import HvError
from ..value import Value
from .facts import RECORDS, decode
from .msr_rules import msr_field
from .parts import part as part_row
from .rules import CPUID_FIELDS, cpuid_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, Self

    from ..kvm import Vcpu
    from .record import Record

__all__ = ["MAX_TRIALS", "Leaf", "Scratch", "Suspect", "get_part", "leaves", "put_part", "search"]

MAX_TRIALS = 4096  # puts; each takes some 5 µs, and another 5 to put back what was before
_MAX_MSRS = 255  # of one KVM_GET_MSRS or KVM_SET_MSRS; more are E2BIG
_MAX_NAMED = 8  # MSRs that are refused, each for itself

# Fields of the XSAVE area and of struct kvm_nested_state: name, offset, size.
_XSAVE = (
    ("fcw", 0, 2), ("fsw", 2, 2), ("ftw", 4, 1), ("fop", 6, 2), ("fip", 8, 8), ("fdp", 16, 8), ("mxcsr", 24, 4),
    ("mxcsr_mask", 28, 4), ("xstate_bv", 512, 8), ("xcomp_bv", 520, 8), ("region[528:576]", 528, 48),
)  # fmt: skip
_NESTED = (("flags", 0, 2), ("format", 2, 2), ("size", 4, 4))
_ROW = 16  # bytes of what has no names is cut into rows

_PAYLOAD, _TRIPLE_FAULT = 0x10, 0x20  # KVM_VCPUEVENT_VALID_*
_EXTD, _ID = 0x400, 0x20  # x2APIC mode, and the register of the id
# What a scratch vCPU gets, in this order; MSRs one by one.  Not mp_state: KVM_GET_MP_STATE lets a pending INIT in, and
# that would reset the vCPU at hand.
_COPIED = ("sregs", "xsave", "xcrs", "regs", "msrs", "lapic", "debugregs", "events")


class Leaf(Value):
    """A field of a part's bytes: its path, where it is."""

    path: str
    offset: int
    size: int

    def of(self, data: bytes) -> bytes:
        """Its bytes."""
        return data[self.offset : self.offset + self.size]

    def set(self, data: bytes, new: bytes) -> bytes:
        """The part's bytes with these instead of its own."""
        return data[: self.offset] + new + data[self.offset + self.size :]

    def value(self, data: bytes) -> int | bytes:
        """Its value: a number where it has up to 8 bytes."""
        found = self.of(data)
        return int.from_bytes(found, "little") if self.size <= 8 else found


class Suspect(Value):
    """A field that KVM refuses: `field`, its `value`, a value that KVM takes (`fix`), and fields at fault with it.

    `fix` None: an MSR of which no value that was tried is taken, such as one that there is not.
    """

    field: str
    value: int | bytes
    fix: int | bytes | None
    together: tuple[str, ...] = ()


def leaves(part: str, data: bytes) -> list[Leaf]:
    """The fields of a part's bytes, by the paths that errors name them by."""
    record = RECORDS.get(part)
    if part == "lapic":
        rows = [(f"regs[{at:#x}]", at, 4) for at in range(0, len(data), 16)]
        return [Leaf(*row) for row in _with_rest("regs", rows, len(data))]
    if record is not None:
        return list(_record_leaves(record, "", 0))
    if part == "xsave":
        return [Leaf(*row) for row in _with_rest("region", list(_XSAVE), len(data))]
    if part == "nested_state":
        return [Leaf(*row) for row in _with_rest("data", list(_NESTED), len(data))]
    if part == "msrs":
        return [Leaf(msr_field(_u32(data, at)), at + 8, 8) for at in range(8, len(data), 16)]
    if part == "cpuid":
        paths = cpuid_fields(decode("cpuid", data))
        return [leaf for at, path in enumerate(paths) for leaf in _entry_leaves(at, path)]
    return [Leaf(part, 0, len(data))]


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _with_rest(name: str, rows: list[tuple[str, int, int]], size: int) -> Iterator[tuple[str, int, int]]:
    # The named fields, and what is between and behind them in rows.
    yield from rows
    at = 0
    for _, begin, length in [*sorted(rows, key=lambda row: row[1]), ("", size, 0)]:
        while at < begin:
            end = min(begin, (at // _ROW + 1) * _ROW)
            yield f"{name}[{at}:{end}]", at, end - at
            at = end
        at = begin + length


def _entry_leaves(at: int, path: str) -> Iterator[Leaf]:
    for place, name in enumerate(CPUID_FIELDS):
        yield Leaf(f"{path}.{name}" if place > 2 else f"entries[{at}].{name}", 8 + 40 * at + 4 * place, 4)


def _record_leaves(record: type[Record], before: str, start: int) -> Iterator[Leaf]:
    for name, field in record._fields.items():
        count = field.count or 1
        step, path = field.size // count, before + name
        if field.is_bytes:
            for row in _with_rest(path, [], field.size):
                yield Leaf(row[0], start + field.offset + row[1], row[2])
            continue
        for at in range(count):
            one = path if field.count is None else f"{path}[{at}]"
            offset = start + field.offset + at * step
            if field.record is None:
                yield Leaf(one, offset, step)
            else:
                yield from _record_leaves(field.record, one + ".", offset)


# ---- the ioctls ----


def put_part(vcpu: Vcpu, part: str, data: bytes) -> int:
    """Put the bytes of a part by its ioctl alone: 0, or the errno; EINVAL where an MSR was refused.

    A refused value may have been taken in part: events without SMM, MSRs before the refused one.
    """
    row = part_row(part)
    call: Callable[..., int] = getattr(lib, row.put.lower())
    number = part == "tsc_khz"
    value = _u32(data, 0) if number else ffi.from_buffer(f"struct {row.record.STRUCT} *", bytearray(data))
    with vcpu._changing():
        rc = call(vcpu._open_fd(), value)
    if part == "msrs" and 0 <= rc < _u32(data, 0):
        return errno.EINVAL
    return -min(rc, 0)


def get_part(vcpu: Vcpu, part: str, like: bytes) -> bytes:
    """The bytes of a part as the vCPU has it; of MSRs those of `like`, zero where KVM does not let one read.

    KvmError: KVM refuses to tell.
    """
    if part == "tsc_khz":
        return vcpu.tsc_khz.to_bytes(4, "little")
    if part == "xsave":
        return bytes(ffi.buffer(vcpu.xsave))
    if part == "msrs":
        data = bytearray(like)
        for at, value in enumerate(_read_msrs(vcpu, [_u32(like, at) for at in range(8, len(like), 16)])):
            data[16 * at + 16 : 16 * at + 24] = value.to_bytes(8, "little")
        return bytes(data)
    row = part_row(part)
    if part == "cpuid":
        table = ffi.new("struct kvm_cpuid2 *", {"nent": 1024, "entries": 1024})
        vcpu._check(row.get, lib.kvm_get_cpuid2(vcpu._settled(), table))
        return bytes(ffi.buffer(table))[: 8 + 40 * table.nent]
    record = RECORDS.get(part)
    area = bytearray(len(like) if record is None else record.SIZE)
    call: Callable[..., int] = getattr(lib, row.get.lower())
    with vcpu._changing():  # getting events delivers a payload
        vcpu._check(row.get, call(vcpu._settled(), ffi.from_buffer(f"struct {row.record.STRUCT} *", area)))
    return bytes(area)


def _read_msr(vcpu: Vcpu, index: int) -> int | None:
    table = ffi.new("struct kvm_msrs *", {"nmsrs": 1, "entries": 1})
    table.entries[0].index = index
    return table.entries[0].data if lib.kvm_get_msrs(vcpu._settled(), table) == 1 else None


def _read_msrs(vcpu: Vcpu, indices: list[int]) -> list[int]:
    # Their values; 0 of what KVM does not let one read, at which each KVM_GET_MSRS stops.
    values: list[int] = []
    while len(values) < len(indices):
        some = indices[len(values) : len(values) + _MAX_MSRS]
        table = ffi.new("struct kvm_msrs *", {"nmsrs": len(some), "entries": [{"index": index} for index in some]})
        done = max(lib.kvm_get_msrs(vcpu._settled(), table), 0)
        values += [table.entries[at].data for at in range(done)]
        values += [0] * (done < len(some))
    return values


def _one_msr(index: int, value: int) -> bytes:
    return b"".join([n.to_bytes(4, "little") for n in (1, 0, index, 0)]) + value.to_bytes(8, "little")


class Scratch:
    """A vCPU like another one, in a VM of its own; `with` closes it.  One thread at a time.

    What cannot be seen from outside is left as a new VM has it: quirks, MSR filters, memory, whether the vCPU has run.
    """

    def __init__(self, vcpu: Vcpu, among: Mapping[str, bytes] | None = None) -> None:
        """`among`: bytes of parts that it has instead of the vCPU's."""
        self._stack = ExitStack()
        self.trials = 0
        try:
            self.vcpu = self._made_like(vcpu, among or {})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the VM.  May be called again."""
        self._stack.close()

    def __repr__(self) -> str:
        return f"<Scratch {self.vcpu!r} {self.trials} trials>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _made_like(self, original: Vcpu, among: Mapping[str, bytes]) -> Vcpu:
        vm = self._stack.enter_context(original.vm.kvm.create_vm())
        lapic = ffi.new("struct kvm_lapic_state *")
        has_lapic = lib.kvm_get_lapic(original._settled(), lapic) == 0
        if has_lapic and original.sregs.apic_base & _EXTD and _u32(bytes(ffi.buffer(lapic)), _ID) == original.id:
            self._enable(vm, lib.KVM_CAP_X2APIC_API, lib.KVM_X2APIC_API_USE_32BIT_IDS)
        if has_lapic:
            chip = ffi.new("struct kvm_irqchip *")
            if lib.kvm_get_irqchip(original.vm.fd, chip) == 0:
                vm.ioctl("KVM_CREATE_IRQCHIP")
            else:
                self._enable(vm, lib.KVM_CAP_SPLIT_IRQCHIP, 24)
        flags = original.vcpu_events.flags
        if flags & _PAYLOAD:
            self._enable(vm, lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
        if flags & _TRIPLE_FAULT:
            self._enable(vm, lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
        vcpu = self._stack.enter_context(vm.create_vcpu(original.id))
        put_part(vcpu, "cpuid", among.get("cpuid") or get_part(original, "cpuid", b""))
        for part in _COPIED:
            if part == "msrs":
                for index in original.vm.kvm.msr_index_list():
                    value = _read_msr(original, index)
                    if value is not None:
                        put_part(vcpu, "msrs", _one_msr(index, value))
            elif part != "lapic" or has_lapic:
                put_part(vcpu, part, among.get(part) or get_part(original, part, b""))
        return vcpu

    @staticmethod
    def _enable(vm: Any, cap: int, *args: int) -> None:
        # A capability that the other VM has: a kernel that does not let us have it makes a worse copy, no error.
        with suppress(HvError):
            vm.enable_cap(cap, *args)

    def takes(self, part: str, data: bytes) -> bool:
        """Whether KVM takes these bytes; what it took is undone."""
        self.trials += 1
        before = get_part(self.vcpu, part, data)
        taken = put_part(self.vcpu, part, data) == 0
        put_part(self.vcpu, part, before)
        return taken


def search(scratch: Scratch, part: str, bad: bytes, *, most: int = MAX_TRIALS) -> Suspect | None:
    """The field for which KVM refuses `bad`; None where the scratch vCPU takes it, or after `most` trials."""
    end = scratch.trials + most
    if scratch.takes(part, bad):
        return None
    return _search_msrs(scratch, bad, end) if part == "msrs" else _search_fields(scratch, part, bad, end)


def _search_fields(scratch: Scratch, part: str, bad: bytes, end: int) -> Suspect | None:
    # As said above; `bad` is refused.
    good = get_part(scratch.vcpu, part, bad)
    fields = leaves(part, bad)
    differing = [leaf for leaf in fields if len(good) == len(bad) and leaf.of(good) != leaf.of(bad)]
    others = [leaf for leaf in fields if leaf not in differing]
    for leaf in differing:
        if scratch.trials < end and scratch.takes(part, leaf.set(bad, leaf.of(good))):
            return Suspect(leaf.path, leaf.value(bad), _nearest(scratch, part, bad, leaf, leaf.value(good), end))
    for leaf in differing + others:
        for fix in _fixes(leaf, bad):
            if scratch.trials >= end:
                break
            if scratch.takes(part, leaf.set(bad, fix)):
                return Suspect(leaf.path, leaf.value(bad), leaf.value(leaf.set(bad, fix)))
    return _several(scratch, part, bad, good, differing, end)


def _fixes(leaf: Leaf, bad: bytes) -> Iterator[bytes]:
    # What a field could have been instead.
    zeros = bytes(leaf.size)
    if leaf.of(bad) != zeros:
        yield zeros
    if leaf.size <= 8:
        value = int.from_bytes(leaf.of(bad), "little")
        for bit in range(8 * leaf.size):
            yield (value ^ 1 << bit).to_bytes(leaf.size, "little")


def _nearest(scratch: Scratch, part: str, bad: bytes, leaf: Leaf, good: int | bytes, end: int) -> int | bytes:
    # Of a number, the refused value without the one bit that is at fault, if it is one.
    value = leaf.value(bad)
    if isinstance(value, int) and isinstance(good, int):
        for bit in range(8 * leaf.size):
            near = value ^ 1 << bit
            if scratch.trials >= end or not (value ^ good) >> bit & 1:
                continue
            if scratch.takes(part, leaf.set(bad, near.to_bytes(leaf.size, "little"))):
                return near
    return good


def _several(scratch: Scratch, part: str, bad: bytes, good: bytes, differing: list[Leaf], end: int) -> Suspect | None:
    # Fields that are at fault together.
    data, undone = bad, []
    for leaf in differing:
        data = leaf.set(data, leaf.of(good))
        undone.append(leaf)
        if scratch.trials >= end:
            return None
        if scratch.takes(part, data):
            break
    else:
        return None
    for leaf in undone[:-1]:
        tried = leaf.set(data, leaf.of(bad))
        if scratch.trials < end and scratch.takes(part, tried):
            data = tried
            undone.remove(leaf)
    first, *more = undone
    return Suspect(first.path, first.value(bad), first.value(good), tuple([leaf.path for leaf in more]))


# ---- MSRs ----


def _search_msrs(scratch: Scratch, bad: bytes, end: int) -> Suspect | None:
    # The first MSR that is refused, with those that are too once it is another value, or away.
    rows = [bad[at : at + 16] for at in range(8, len(bad), 16)]
    found: Suspect | None = None
    while len(rows) <= _MAX_MSRS:
        at = _first_refused(scratch, rows, end)
        few = None if at is None else _at_fault(scratch, rows[: at + 1], end)
        if at is None or few is None:
            break
        suspect = _search_fields(scratch, "msrs", _msrs(few), end)
        path = msr_field(_u32(rows[at], 0))
        if suspect is None:
            others = tuple([msr_field(_u32(row, 0)) for row in few[:-1]])
            suspect = Suspect(path, int.from_bytes(rows[at][8:], "little"), None, others)
        names = (suspect.field, *suspect.together)
        if found is None:
            found = suspect
        else:
            new = tuple([name for name in names if name not in (found.field, *found.together)])
            found = Suspect(found.field, found.value, found.fix, found.together + new)
            if not new or len(found.together) >= _MAX_NAMED:
                break
        # What is behind it is asked without it: nothing depends on an MSR that KVM does not take.
        del rows[at]
        if scratch.trials >= end or scratch.takes("msrs", _msrs(rows)):
            break
    return found


def _msrs(rows: list[bytes]) -> bytes:
    return len(rows).to_bytes(8, "little") + b"".join(rows)


def _first_refused(scratch: Scratch, rows: list[bytes], end: int) -> int | None:
    # Of MSRs that are refused; None: too few trials.
    taken, refused = 0, len(rows)
    while refused - taken > 1:
        if scratch.trials >= end:
            return None
        middle = (taken + refused) // 2
        if scratch.takes("msrs", _msrs(rows[:middle])):
            taken = middle
        else:
            refused = middle
    return refused - 1


def _at_fault(scratch: Scratch, rows: list[bytes], end: int) -> list[bytes] | None:
    # The last one, which is refused, and those before it without which it is not; None: too few trials.
    *others, last = rows
    size = len(others)
    while size:
        for begin in reversed(range(0, len(others), size)):
            if scratch.trials >= end:
                return None
            fewer = others[:begin] + others[begin + size :]
            if not scratch.takes("msrs", _msrs([*fewer, last])):
                others = fewer
        size = min(size // 2, len(others))
    return [*others, last]
