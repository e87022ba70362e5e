"""The state of a vCPU: all parts of it as one value, got and put in one call of C.

Putting.  KVM takes a state part by part, and may refuse one when others are in already.  So that a refusal leaves the
vCPU as it was, native/state.c first gets all that is there, and puts all of it back then: also what was not to be put,
for a part may change others (KVM_SET_REGS drops a pending exception, KVM_SET_SREGS writes mp_state and the APIC).
That doubles the calls; so a whole state that this very vCPU has given, or has taken before, is put without it.  KVM
takes it again as long as what it goes by is the same:

    CPUID                       the leaves are the same, or come with the state, and then are refused first
    capabilities, memory slots  Vm._changes is the same (an MSR that points into memory is refused where there is none)
    KVM_RUN                     was not called for the first time (it fixes CPUID and the feature MSRs)
    other doors                 the vCPU's fd was not handed out; Vcpu drops all that is known of it (Vcpu._state) where
                                it changes what a state may be
"""

from __future__ import annotations

import errno

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, ChangedStateError, HvError, PartialError
from ..kvm import Vcpu, vendor_module
from .block import Layout, State, _note_lost, _set_known, get_call, take
from .msrs import Msrs, _blank, more_indices, msr_indices
from .parts import Part, part, vcpu_parts
from .values import Sregs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol, Self

    from .cpuid import CpuidTable
    from .nested import NestedState
    from .values import DebugRegs, Fpu, Lapic, MpState, Regs, Sregs2, VcpuEvents, Xcrs
    from .xsave import Xsave

    class Cpu(Protocol):
        """A machine's vcpu: it has the Vcpu underneath."""

        @property
        def kvm(self) -> Vcpu: ...


__all__ = ["VcpuState"]

_put_all = lib.hv_state_put
_NULL = ffi.NULL
_CR0 = Sregs._fields["cr0"].offset
_EFER = Sregs._fields["efer"].offset
_PG, _LME = 1 << 31, 1 << 8
_XSAVE_LEAST = 4096
_HEAD = 8  # of kvm_msrs and kvm_cpuid2
_MSR_ENTRY = 16


class _Plan:
    # How some parts of a vCPU are got: their layout, the block as it is before (with the MSRs' indices), and both as
    # `take` wants them.
    __slots__ = ("arguments", "blank", "layout")

    def __init__(self, sizes: dict[str, int], msrs: bytes) -> None:
        self.layout = Layout.of(sizes.items())
        blank = bytearray(self.layout.size)
        if "msrs" in sizes:
            _, begin, end = self.layout.at["msrs"]
            blank[begin:end] = msrs
        self.blank = bytes(blank)
        self.arguments = (self.layout.get_address, self.layout.nr, self.blank, self.layout)


class _Taken:
    # A mark on states that a vCPU has given or taken, under the CPUID leaves that it had then.
    __slots__ = ("era",)

    def __init__(self, era: object) -> None:
        self.era = era  # of _Known


class _Known:
    # What is known of a vCPU: the parts that it has, their sizes, the plans that were made, the mark of the states that
    # it takes, and what KVM goes by when it takes them.
    __slots__ = (
        "changes", "cpuid", "era", "has_run", "indices", "is_exposed", "key", "last", "msrs", "parts", "plans",
        "request", "sizes", "taken",
    )  # fmt: skip

    def __init__(self, vcpu: Vcpu) -> None:
        self.plans: dict[tuple[tuple[str, ...], bytes], _Plan] = {}
        # There is a capability of the in-kernel APIC, and none for whether this VM has one.
        has_lapic = lib.kvm_get_lapic(vcpu._settled(), ffi.new("struct kvm_lapic_state *")) == 0
        self.indices: dict[int, int | None] = dict.fromkeys(
            more_indices(vcpu) + msr_indices(vcpu.vm.kvm, has_lapic=has_lapic)
        )
        self.msrs = _blank(self.indices)
        found = ((row.name, self._size(vcpu, row)) for row in vcpu_parts() if has_lapic or row.name != "lapic")
        self.sizes = {name: size for name, size in found if size is not None}
        self.begin(vcpu)

    def begin(self, vcpu: Vcpu) -> None:
        # What KVM goes by is another (see the module's text): no state is known to be taken.
        self.changes, self.has_run, self.is_exposed = vcpu.vm._changes, vcpu._c.runs > 0, vcpu._is_exposed
        self.era = object()
        self.taken = _Taken(self.era)
        self.cpuid = b""  # of the last state with CPUID that was put; and the block of the last that got the mark
        self.last: bytes | None = None
        self.renew()

    def holds(self, vcpu: Vcpu) -> bool:
        # Whether KVM goes by the same as when it began.
        return (
            self.changes == vcpu.vm._changes
            and (self.has_run or vcpu._c.runs == 0)
            and self.is_exposed is vcpu._is_exposed
        )

    def _size(self, vcpu: Vcpu, row: Part) -> int | None:
        # Bytes of a part as far as they are known before the first get; None: this vCPU does not have it.
        has = vcpu.vm.check_extension
        cap = has(getattr(lib, row.capability)) if row.capability else 1
        if cap <= 0:
            return None
        if row.name == "cpuid":
            return _HEAD
        if row.name == "msrs":
            return len(self.msrs)
        if row.name == "xsave":
            return max(has(lib.KVM_CAP_XSAVE2), _XSAVE_LEAST)
        if row.name == "nested_state":
            return cap
        if row.name == "tsc_khz":
            return 4 if lib.kvm_get_tsc_khz(vcpu._settled()) > 0 else None  # EIO: the host's TSC is not stable
        return int(row.record.SIZE)  # type: ignore[attr-defined]  # the others are Records

    def note_cpuid(self, state: State) -> None:
        # After a put: other leaves allow other states.
        self.last = None
        cpuid = state.part_bytes("cpuid")
        if cpuid != self.cpuid:
            self.cpuid, self.taken = cpuid, _Taken(self.era)
            self.renew()

    def renew(self) -> None:
        # What a get of all parts asks of `take`.
        self.key = (self.all_parts(), self.msrs)
        self.parts = frozenset(self.key[0])
        plan = self.plans.get(self.key) or self.plan(self.key)
        self.request = (*plan.arguments, self.taken)

    def all_parts(self) -> tuple[str, ...]:
        # sregs and fpu are also in sregs2 and xsave.
        double = {"sregs": "sregs2", "fpu": "xsave"}
        return tuple([name for name in self.sizes if double.get(name) not in self.sizes])

    def plan(self, key: tuple[tuple[str, ...], bytes]) -> _Plan:
        # The plan for parts of these names, and MSRs of these indices.
        names, msrs = key
        sizes = {name: self.sizes[name] for name in names}
        if "msrs" in sizes:
            sizes["msrs"] = len(msrs)
        if len(self.plans) >= 64:
            self.plans.clear()
        plan = self.plans[key] = _Plan(sizes, msrs)
        return plan

    def resize(self, layout: Layout, stop: _Stop) -> None:
        # A get found that a part has another size.
        self.sizes[layout.getting[stop.at]] = stop.done
        self.plans.clear()
        self.renew()


class _Stop:
    # Why a get or put stopped: the word of native/state.h.
    __slots__ = ("at", "done", "error")

    def __init__(self, word: int) -> None:
        self.at = word >> lib.HV_STATE_AT_SHIFT & 0xFF
        self.error = word >> lib.HV_STATE_ERROR_SHIFT & 0xFFFF
        self.done = word >> lib.HV_STATE_DONE_SHIFT

    @staticmethod
    def is_resized(word: int) -> bool:
        return word > 0 and word & 0xFF == lib.HV_STATE_RESIZED


def _vcpu_of(call: str, vcpu: Vcpu | Cpu) -> Vcpu:
    found = vcpu if isinstance(vcpu, Vcpu) else getattr(vcpu, "kvm", None)
    if not isinstance(found, Vcpu):
        raise ArgumentTypeError(call, "vcpu", vcpu, "a hvmodel.kvm.Vcpu, or a machine's vcpu")
    return found


def _known_of(call: str, vcpu: Vcpu) -> _Known:
    if vcpu._c.dirty:  # hvmodel.state.sync has the state
        vcpu._flush()
    known: _Known | None = vcpu._state
    if known is None:
        # The ioctls below would wait for who runs it.
        rc = lib.hv_claim(vcpu._c)
        if rc == 0:
            lib.hv_unclaim(vcpu._c)
        elif rc != lib.HV_DIRTY:
            raise vcpu._run_error(rc, call)
        known = vcpu._state = _Known(vcpu)
    elif not known.holds(vcpu):
        known.begin(vcpu)
    return known


def _is_taken(known: _Known, state: State) -> bool:
    # Whether the vCPU takes this state: it had it, and the CPUID leaves are the same, or come with it.
    mark = state._known
    if mark is not known.taken and not (isinstance(mark, _Taken) and mark.era is known.era and "cpuid" in state):
        return False
    return not known.is_exposed  # who has the fd may have changed anything


class VcpuState(State):
    """The state of a vCPU, or some parts of it; `VcpuState.get(vcpu)` takes it, `put(vcpu)` sets it.

    A part is looked at by its name, and decoded then; a state need not have all of them (`parts`, `"lapic" in state`).
    `cpu` may be a hvmodel.kvm.Vcpu or a machine's vcpu.

        state = VcpuState.get(vcpu)
        state.replace(**{"regs.rip": 0x7C00}).put(vcpu)
    """

    __slots__ = ()
    SCOPE = "vcpu"
    _MOVING = {"msrs": ("[0x10]",), "lapic": ("regs[0x390]",)}  # noqa: RUF012  # as in State

    @classmethod
    def get(cls, vcpu: Vcpu | Cpu, parts: Iterable[str] | None = None, *, msrs: Iterable[int] | None = None) -> Self:
        """Take the state: these parts by name, or all that this vCPU has.

        First finishes the instruction of the last exit, as Vcpu.complete_io does.  `msrs`: indices, by default those
        of hvmodel.state.more_indices and msr_indices.  With sregs2 and xsave there, all parts are without sregs and
        fpu.

        ArgumentError: no such part, or this vCPU does not have it.  UnansweredError: the last exit is a read without an
        answer.  BusyError: another thread runs the vCPU.  PartialError names an MSR that cannot be read, KvmError
        another refusal; ForkedError, VmDeadError, ClosedError.

        Ioctls: a KVM_GET_… for each part, in the order of hvmodel.state.parts.
        """
        if parts is None and msrs is None:
            try:
                taken = take(cls, vcpu._address, vcpu._state.request)  # type: ignore[union-attr]
            except AttributeError:  # a Cpu, or one that nothing is known of
                taken = 0
            if taken.__class__ is not int:
                return taken  # type: ignore[no-any-return]  # it is a cls
        return cls._get(vcpu, parts, msrs)

    @classmethod
    def _get(cls, vcpu: Vcpu | Cpu, parts: Iterable[str] | None, msrs: Iterable[int] | None) -> Self:
        call = "VcpuState.get"
        vcpu = _vcpu_of(call, vcpu)
        known = _known_of(call, vcpu)
        names = known.key[0] if parts is None else cls._names(call, known, parts)
        key = (names, known.msrs if msrs is None else _blank(msrs))
        while True:
            plan = known.plans.get(key) or known.plan(key)
            taken = take(cls, vcpu._address, (*plan.arguments, known.taken if key == known.key else None))
            if not isinstance(taken, int):
                return taken  # type: ignore[no-any-return]  # it is a cls
            if not _Stop.is_resized(taken):
                raise _get_error(vcpu, taken, plan.layout, plan.blank)
            known.resize(plan.layout, _Stop(taken))

    @classmethod
    def _names(cls, call: str, known: _Known, parts: Iterable[str]) -> tuple[str, ...]:
        if isinstance(parts, str):
            parts = (parts,)
        try:
            names = tuple(parts)
        except TypeError:
            raise ArgumentTypeError(call, "parts", parts, "names of parts") from None
        for name in names:
            cls._part_row(call, name)
            if name not in known.sizes:
                have = ", ".join(known.sizes)
                raise ArgumentError(call, "parts", name, have, _why_not(name))
        if len(set(names)) != len(names):
            again = next(name for at, name in enumerate(names) if name in names[:at])
            raise ArgumentError(call, "parts", again, "every part once")
        return names

    def put(self, vcpu: Vcpu | Cpu, parts: Iterable[str] | None = None) -> None:
        """Set the vCPU's state: these parts of this value, or all that it has.

        First finishes the instruction of the last exit, as Vcpu.complete_io does.  What is refused leaves the vCPU as
        it was, but that its TSC may have lost the microseconds between.  Should anything else not be as it was, a note
        of the error says what.

        RefusedStateError says which part, which field of it and why.  ChangedStateError: KVM took it and keeps another
        value, where hosts are known to (CR0.PG without EFER.LME).  ArgumentError: the state has a part that this vCPU
        does not have, or the value does not have one of `parts`.  Others as `get`.

        Ioctls: a KVM_SET_… for each part, in the order of hvmodel.state.parts; before them, but for a state that the
        vCPU is known to take (see the module's text), a KVM_GET_… for each part that it has.
        """
        call = "VcpuState.put"
        if type(vcpu) is not Vcpu:
            vcpu = _vcpu_of(call, vcpu)
        known = _known_of(call, vcpu)
        vcpu._calm = None
        state = self if parts is None else self.only(*self._names(call, known, parts))
        if _is_taken(known, state) or not any(part(name).can_fail for name in state.parts):
            layout = state._layout
            word = _put_all(vcpu._c, layout.put, layout.nr, state._block, _NULL)
            if word:
                vcpu._state = None  # CPUID may be other leaves
                raise _put_error(vcpu, word, state, is_undone=False)
        else:
            state = state._fitted(call, known)
            before = state._put_undoable(vcpu, known)
            drops = state._may_be_dropped()
            if drops is not None:
                _refuse_dropped(vcpu, state, drops, before)
        if known.last is not state._block:
            if "cpuid" in state:
                known.note_cpuid(state)
            if state is self and known.parts <= self._layout.at.keys():
                known.last = self._block
                _set_known(self, known.taken)

    def _put_undoable(self, vcpu: Vcpu, known: _Known) -> Self:
        # Puts this state, or what was there before: all of it.  Returns what was there before.
        layout = self._layout
        key = known.key
        own = self.part("msrs").to_dict() if "msrs" in self else {}
        if not known.parts >= self._layout.at.keys() or not known.indices.keys() >= own.keys():
            names = tuple([row.name for row in vcpu_parts() if row.name in self or row.name in known.parts])
            key = names, _blank(own | known.indices)  # its own first: see below
        while True:
            plan = known.plans.get(key) or known.plan(key)
            there = plan.layout
            block = ffi.new("uint8_t[]", plan.blank)
            undo = ffi.new("struct hv_state_undo *", {"get": there.get, "put": there.put, "block": block})
            undo.nr = there.nr
            word = _put_all(vcpu._c, layout.put, layout.nr, self._block, undo)
            if not word:
                return self._of(there, bytes(ffi.buffer(block, there.size)), known.taken)
            if not _Stop.is_resized(word):
                break
            known.resize(there, _Stop(word))
        if word > 0 and not undo.got:
            stop = _Stop(word)
            if there.getting[stop.at] != "msrs" or stop.error or stop.done >= len(own):
                raise _get_error(vcpu, word, there, plan.blank)
            # An MSR that cannot be read can be set neither: as if the put had come to it.
            at = 1 << lib.HV_STATE_AT_SHIFT
            raise _put_error(vcpu, word + (layout.names.index("msrs") - stop.at) * at, self)
        error = _put_error(vcpu, word, self)
        if word > 0:
            self._see_undone(vcpu, _Stop(word), self._of(there, bytes(ffi.buffer(block, there.size)), None), error)
        raise error

    def _see_undone(self, vcpu: Vcpu, stop: _Stop, before: Self, error: BaseException) -> None:
        # After what was before was put back.
        drops = self._may_be_dropped()
        if drops is not None and self.parts.index(drops) < stop.at and vendor_module() == "kvm_pvm":
            from ..kvm.triple_fault import drop_triple_fault

            drop_triple_fault(vcpu)
        _note_lost(error, before, lambda: self.get(vcpu, before.parts, msrs=before.msrs))

    def _fitted(self, call: str, known: _Known) -> Self:
        # The state as this vCPU can take it: with an XSAVE area of the size that KVM reads.
        for name in self.parts:
            if name not in known.sizes:
                raise ArgumentError(call, "part", name, ", ".join(known.sizes), _why_not(name))
        if "xsave" not in self:
            return self
        area = self.part_bytes("xsave")
        size = known.sizes["xsave"]
        if any(area[size:]):
            detail = "the area has components that this vCPU has no room for"
            raise ArgumentError(call, "xsave", len(area), f"up to {size} bytes in use", detail)
        if len(area) == size:
            return self
        return self.replace(xsave=part("xsave").record.from_bytes(area[:size].ljust(size, b"\0")))

    def _may_be_dropped(self) -> str | None:
        # The part that a host may take and not keep: paging of 32-bit modes, which kvm_pvm does not have.
        at = self._layout.at
        name = "sregs2" if "sregs2" in at else "sregs" if "sregs" in at else None
        if name is None:
            return None
        begin, block = at[name][1], self._block
        paging = block[begin + _CR0 + 3] & 0x80
        return name if paging and not block[begin + _EFER + 1] & 1 else None

    # ---- the parts ----

    @property
    def regs(self) -> Regs:
        """General registers."""
        return self.part("regs")  # type: ignore[no-any-return]  # the record of the part

    @property
    def sregs(self) -> Sregs | Sregs2:
        """Segments and control registers: Sregs2 where the state has them, else Sregs."""
        return self.part("sregs2" if "sregs2" in self else "sregs")  # type: ignore[no-any-return]

    @property
    def sregs2(self) -> Sregs2:
        """Segments and control registers, with the PDPTRs."""
        return self.part("sregs2")  # type: ignore[no-any-return]

    @property
    def fpu(self) -> Fpu:
        """x87 and SSE, of a host without XSAVE or where asked for."""
        return self.part("fpu")  # type: ignore[no-any-return]

    @property
    def xsave(self) -> Xsave:
        """The XSAVE area."""
        return self.part("xsave")  # type: ignore[no-any-return]

    @property
    def xcrs(self) -> Xcrs:
        """XCR0."""
        return self.part("xcrs")  # type: ignore[no-any-return]

    @property
    def debugregs(self) -> DebugRegs:
        """DR0 to DR3, DR6, DR7."""
        return self.part("debugregs")  # type: ignore[no-any-return]

    @property
    def msrs(self) -> Msrs:
        """MSRs by index."""
        return self.part("msrs")  # type: ignore[no-any-return]

    @property
    def cpuid(self) -> CpuidTable:
        """CPUID as KVM keeps it."""
        return self.part("cpuid")  # type: ignore[no-any-return]

    @property
    def events(self) -> VcpuEvents:
        """What is pending and injected."""
        return self.part("events")  # type: ignore[no-any-return]

    @property
    def mp_state(self) -> MpState:
        """Whether it runs, is halted, or waits for an INIT or SIPI."""
        return self.part("mp_state")  # type: ignore[no-any-return]

    @property
    def lapic(self) -> Lapic:
        """The local APIC's registers; only with an in-kernel one."""
        return self.part("lapic")  # type: ignore[no-any-return]

    @property
    def nested_state(self) -> NestedState:
        """The state of a guest that runs guests; only where KVM_CAP_NESTED_STATE is."""
        return self.part("nested_state")  # type: ignore[no-any-return]

    @property
    def tsc_khz(self) -> int:
        """The TSC's frequency in kHz."""
        return self.part("tsc_khz").khz  # type: ignore[no-any-return]


def _why_not(name: str) -> str:
    row = part(name)
    if name == "lapic":
        return "this VM has no in-kernel APIC"
    if name == "tsc_khz":
        return "the host's TSC is not stable"
    return f"this KVM does not have {row.capability}"


def _get_error(vcpu: Vcpu, word: int, layout: Layout, blank: bytes) -> BaseException:
    # What a get that stopped means.
    if word < 0:
        return vcpu._run_error(word, "VcpuState.get")
    stop = _Stop(word)
    name = layout.getting[stop.at]
    row = part(name)
    _, begin, end = layout.at[name]
    if stop.error:
        return vcpu._refusal(get_call(row, end - begin), stop.error, None, None, None, f"part {name}")
    indices = Msrs._of(blank[begin:end]).keys()
    return PartialError(errno.EINVAL, row.get, stop.done, len(indices), indices[stop.done], "index")


def _put_error(vcpu: Vcpu, word: int, state: VcpuState, *, is_undone: bool = True) -> BaseException:
    # What a put that stopped means.
    from . import refusals

    if word < 0:
        return vcpu._run_error(word, "VcpuState.put")
    stop = _Stop(word)
    name = state.parts[stop.at]
    data = state.part_bytes(name)
    if name == "msrs":
        index = state.msrs.keys()[stop.done]
        data = bytes(Msrs({index: state.msrs[index]}))
    among = {earlier: state.part_bytes(earlier) for earlier in state.parts[: stop.at]}
    error = refusals.explain(vcpu, name, data, stop.error or errno.EINVAL, part(name).put, among=among)
    if not is_undone:
        done = [*state.parts[: stop.at], *([f"{stop.done} MSRs"] if stop.done else [])]
        error.add_note(f"the vCPU took the same state before, so nothing is undone; put are: {', '.join(done) or None}")
    return error


def _refuse_dropped(vcpu: Vcpu, state: VcpuState, name: str, before: VcpuState) -> None:
    # Raises where KVM took CR0.PG and does not keep it, with the state put back.
    from . import refusals

    changed: ChangedStateError | None = refusals.dropped(vcpu, name, state.part_bytes(name))
    if changed is None:
        return
    try:
        before.put(vcpu)
    except HvError as error:
        changed.add_note(f"the state could not be put back: {error}")
    raise changed
