"""QEMU's synchronisation: who has a vCPU's state, KVM or we, and what is put when it goes back.

    KVM has it ── synchronize_state: get ──> we have it (vcpu_dirty), as `env`
               ── synchronize_pre_loadvm ──>     (without a get)
               <─ run: put RUNTIME ─────────
               <─ synchronize_post_reset: put RESET
               <─ synchronize_post_init: put FULL, of a new machine or a loaded state

Owns the order of the ioctls, the MSRs that each level puts, and which event flags.  That is QEMU's own knowledge, other
than the table of hvmodel.state.parts: what KVM changes by itself while a guest runs (the TSC, the pages shared with
KVM, mp_state) is not put back at every run.  QEMU's vCPUs are dirty from the beginning, for QEMU makes up their state;
ours begin with the state that KVM gave them.

Not here, for there is nothing of them in a vCPU of hvmodel: Xen, SEV, SGX, Hyper-V, FRED, CET, LBR.

Sources: qemu:accel/kvm/kvm-all.c kvm_cpu_synchronize_state and behind it; target/i386/kvm/kvm.c
kvm_arch_put_registers, kvm_arch_get_registers, kvm_put_msrs, kvm_get_msrs, kvm_put_vcpu_events@v7.2.  docs/sync.md says
what v10.1 does otherwise.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from weakref import ref

from .._ffi import IOCTLS, ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, ClosedError
from ..kvm import Vcpu
from .block import Layout, get_call
from .cpuid import CpuidTable
from .msrs import TSC, TSC_DEADLINE, Msrs, _blank
from .parts import part
from .values import Regs, Sregs, Sregs2, VcpuEvents
from .vcpu_state import VcpuState, _get_error, _known_of, _vcpu_of
from .vm_state import _vm_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, Protocol

    from ..kvm import CpuidEntry, Vm
    from .vcpu_state import Cpu

    class Machine(Protocol):
        """A machine: it has a VM."""

        @property
        def vm(self) -> Vm: ...


__all__ = [
    "PutLevel",
    "VcpuSync",
    "get_msr_indices",
    "put_msr_indices",
    "synchronize_all_post_init",
    "synchronize_all_post_reset",
    "synchronize_all_pre_loadvm",
    "synchronize_all_states",
    "synchronizer",
]


class PutLevel(IntEnum):
    """How much of a state is put: QEMU's KVM_PUT_RUNTIME_STATE, KVM_PUT_RESET_STATE, KVM_PUT_FULL_STATE.

    Source: qemu:include/sysemu/kvm.h@v7.2.
    """

    RUNTIME = 1
    RESET = 2
    FULL = 3


# ---- which MSRs ----

_STAR, _LSTAR, _CSTAR, _FMASK, _KERNEL_GS_BASE = 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102
_FEATURE_CONTROL, _APIC_BASE, _MCG_CAP = 0x3A, 0x1B, 0x179
_MCG_LMCE_P = 1 << 27

_ALWAYS = (0x174, 0x175, 0x176, 0x277)  # SYSENTER_CS, _ESP, _EIP, PAT

# In their order, where KVM_GET_MSR_INDEX_LIST has them.
_LISTED = (
    _STAR,
    0xC0010117,  # VM_HSAVE_PA
    0xC0000103,  # TSC_AUX
    0x3B,  # TSC_ADJUST
    TSC_DEADLINE,  # got here; put alone, behind all others
    0x1A0,  # MISC_ENABLE
    0x9E,  # SMBASE
    0x34,  # SMI_COUNT
    _FEATURE_CONTROL,  # got here, of CPUs with VMX, SMX, SGX or LMCE; put alone, before all others
    0x6E1,  # PKRS
    0xD90,  # BNDCFGS
    0xDA0,  # XSS
    0xE1,  # UMWAIT_CONTROL
    0x48,  # SPEC_CTRL
    0xC0000104,  # TSC_RATIO
    0x122,  # TSX_CTRL
    0xC001011F,  # VIRT_SSBD
)

_LONG_MODE = (_CSTAR, _KERNEL_GS_BASE, _FMASK, _LSTAR)

# Bit of CPUID 0x40000001.EAX, and the MSRs that come with it.  Both bits of the clock mean the same MSRs here, as in
# QEMU; KVM serves them with either.
_PARAVIRT: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1 << 0 | 1 << 3, (0x12, 0x11)),  # KVM_SYSTEM_TIME, KVM_WALL_CLOCK
    (1 << 14, (0x4B564D06,)),  # ASYNC_PF_INT
    (1 << 4, (0x4B564D02,)),  # ASYNC_PF_EN
    (1 << 6, (0x4B564D04,)),  # PV_EOI_EN
    (1 << 5, (0x4B564D03,)),  # STEAL_TIME
    (1 << 12, (0x4B564D05,)),  # POLL_CONTROL
)
_ASYNC_PF_INT = 0x4B564D06

_FIXED_CTR_CTRL, _GLOBAL_STATUS, _GLOBAL_CTRL, _GLOBAL_OVF_CTRL = 0x38D, 0x38E, 0x38F, 0x390
_FIXED_CTR0, _PERFCTR0, _EVNTSEL0 = 0x309, 0xC1, 0x186

_NR_MTRR_VAR = 8
_MTRR = (
    *(0x2FF, 0x250, 0x258, 0x259, *range(0x268, 0x270)),  # the default type, 64 KiB, 16 KiB, 4 KiB
    *(0x200 + at for at in range(2 * _NR_MTRR_VAR)),
)
_RTIT = (0x570, 0x571, 0x560, 0x561, 0x572)  # CTL, STATUS, OUTPUT_BASE, OUTPUT_MASK, CR3_MATCH
_RTIT_ADDR = 0x580
_SGX_HASHES = (0x8C, 0x8D, 0x8E, 0x8F)
_XFD = (0x1C4, 0x1C5)  # XFD, XFD_ERR


class _Features:
    # What decides which MSRs a vCPU has in QEMU: its CPUID leaves, KVM's list, and its machine-check banks.
    def __init__(self, vcpu: Vcpu, cpuid: tuple[CpuidEntry, ...] | None = None) -> None:
        rows = vcpu.get_cpuid2() if cpuid is None else cpuid
        self.leaves = {(row.function, row.index): row for row in rows}
        self.listed = frozenset(vcpu.vm.kvm.msr_index_list())
        self.has_lapic = lib.kvm_get_lapic(vcpu._settled(), ffi.new("struct kvm_lapic_state *")) == 0
        try:
            self.mcg_cap = vcpu.get_msrs([_MCG_CAP])[_MCG_CAP]
        except OSError:  # this KVM has none
            self.mcg_cap = 0

    def leaf(self, function: int, register: str, index: int = 0) -> int:
        row = self.leaves.get((function, index))
        return 0 if row is None else int(getattr(row, register))

    @property
    def has_feature_control(self) -> bool:
        # VMX, SMX, SGX, local machine checks
        return bool(
            self.leaf(1, "ecx") & (1 << 5 | 1 << 6) or self.leaf(7, "ebx") & 1 << 2 or self.mcg_cap & _MCG_LMCE_P
        )

    def head(self, *, getting: bool) -> Iterator[int]:
        yield from _ALWAYS
        for index in _LISTED:
            if index == _FEATURE_CONTROL:
                if getting and self.has_feature_control:
                    yield index
            elif index in self.listed and (getting or index != TSC_DEADLINE):
                yield index

    def paravirt(self) -> Iterator[int]:
        features = self.leaf(0x40000001, "eax")
        for bits, indices in _PARAVIRT:
            # Without an in-kernel APIC KVM refuses to set ASYNC_PF_INT: QEMU stops there.
            if features & bits and (self.has_lapic or _ASYNC_PF_INT not in indices):
                yield from indices

    def pmu(self, *, getting: bool) -> Iterator[int]:
        version = self.leaf(0xA, "eax") & 0xFF
        if not version:
            return
        nr_general = min(self.leaf(0xA, "eax") >> 8 & 0xFF, 18)
        nr_fixed = min(self.leaf(0xA, "edx") & 0x1F, 3) if version > 1 else 0
        if version > 1:
            yield from (_FIXED_CTR_CTRL, _GLOBAL_CTRL)  # put: 0, it stands still
            if getting:
                yield from (_GLOBAL_STATUS, _GLOBAL_OVF_CTRL)
        yield from (_FIXED_CTR0 + at for at in range(nr_fixed))
        for at in range(nr_general):
            yield from (_PERFCTR0 + at, _EVNTSEL0 + at)
        if version > 1 and not getting:
            yield from (_GLOBAL_STATUS, _GLOBAL_OVF_CTRL, _FIXED_CTR_CTRL, _GLOBAL_CTRL)  # and it runs

    def machine_check(self) -> Iterator[int]:
        if self.mcg_cap:
            yield from (0x17A, 0x17B)  # MCG_STATUS, MCG_CTL
            if self.mcg_cap & _MCG_LMCE_P:
                yield 0x4D0  # MCG_EXT_CTL
            yield from range(0x400, 0x400 + 4 * (self.mcg_cap & 0xFF))

    def tail(self) -> Iterator[int]:
        if self.leaf(1, "edx") & 1 << 12:
            yield from _MTRR
        if self.leaf(7, "ebx") & 1 << 25:
            yield from _RTIT
            yield from (_RTIT_ADDR + at for at in range(self.leaf(0x14, "eax", 1) & 7))
        if self.leaf(7, "ecx") & 1 << 30:
            yield from _SGX_HASHES
        if self.leaf(0xD, "eax", 1) & 1 << 4:
            yield from _XFD


def get_msr_indices(vcpu: Vcpu | Cpu, *, tsc: bool = True) -> tuple[int, ...]:
    """The MSRs that QEMU gets of this vCPU, in its order.

    `tsc`: with the TSC, as at the first get since the machine ran; QEMU does not ask again while it is stopped.

    They depend on the vCPU's CPUID leaves, on KVM_GET_MSR_INDEX_LIST, and on the machine-check banks (MCG_CAP).
    Source: qemu:target/i386/kvm/kvm.c kvm_get_msrs@v7.2.
    """
    return _get_indices(_Features(_vcpu_of("get_msr_indices", vcpu)), tsc)


def _get_indices(has: _Features, tsc: bool) -> tuple[int, ...]:
    return (
        *has.head(getting=True),
        *((TSC,) if tsc else ()),
        *_LONG_MODE,
        *has.paravirt(),
        *has.pmu(getting=True),
        *has.machine_check(),
        *has.tail(),
    )


def put_msr_indices(vcpu: Vcpu | Cpu, level: PutLevel) -> tuple[int, ...]:
    """The MSRs that QEMU puts at `level` in one call, in its order; an index that stands there twice is written twice.

    FEATURE_CONTROL is put before (from RESET on), TSC_DEADLINE behind, each alone.
    Source: qemu:target/i386/kvm/kvm.c kvm_put_msrs@v7.2.
    """
    return _put_indices(_Features(_vcpu_of("put_msr_indices", vcpu)), _level("put_msr_indices", level))


def _put_indices(has: _Features, level: PutLevel) -> tuple[int, ...]:
    heavy = (TSC, *has.paravirt(), *has.pmu(getting=False), *has.tail()) if level >= PutLevel.RESET else ()
    return (*has.head(getting=False), *_LONG_MODE, *heavy, *has.machine_check())


def _level(call: str, level: object) -> PutLevel:
    try:
        return PutLevel(level)  # type: ignore[arg-type]  # that is what is asked
    except ValueError:
        raise ArgumentError(call, "level", level, "PutLevel.RUNTIME, RESET or FULL") from None


# ---- which parts ----

_GET_ORDER = (
    "events",
    "mp_state",  # before regs and sregs: it may let in an INIT or SIPI, which sets CS and RIP
    "regs",
    "xsave",
    "fpu",
    "xcrs",
    "sregs2",
    "sregs",
    "msrs",
    "lapic",
    "debugregs",
    "nested_state",
)

# Each with the least level at which it is put.  tsc_khz is no part of env; lapic is the APIC device's: see put_apic.
_PUT_ORDER = (
    ("feature_control", PutLevel.RESET),  # forces the vCPU out of VMX operation
    ("sregs2", PutLevel.RUNTIME),
    ("sregs", PutLevel.RUNTIME),
    ("nested_state", PutLevel.RESET),
    ("tsc_khz", PutLevel.FULL),
    ("regs", PutLevel.RUNTIME),
    ("xsave", PutLevel.RUNTIME),
    ("fpu", PutLevel.RUNTIME),
    ("xcrs", PutLevel.RUNTIME),
    ("msrs", PutLevel.RUNTIME),
    ("events", PutLevel.RUNTIME),
    ("mp_state", PutLevel.RESET),
    ("tsc_deadline", PutLevel.RUNTIME),
    ("debugregs", PutLevel.RUNTIME),
)

_SIPI_RECEIVED = 4
# What is valid in events whatever the level, where KVM said that it was when they were got.
_EVENTS_KEPT = lib.KVM_VCPUEVENT_VALID_SMM | lib.KVM_VCPUEVENT_VALID_PAYLOAD | lib.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
_COMMON = Sregs._fields["interrupt_bitmap"].offset  # up to there sregs and sregs2 are the same
_CR0_PG, _CR4_PAE, _EFER_LMA = 1 << 31, 1 << 5, 1 << 10
_TOLERANCE = 250  # parts in a million by which a TSC's frequency counts as the same (the kernel's default)


class VcpuSync:
    """The state of one vCPU as QEMU keeps it; made by `synchronizer(cpu)`.

    `vcpu_dirty` says who has the state.  While we have it, `env` is what the vCPU is: the registers that `Cpu` shows
    are read from it and written to it, and the next run puts it first (PutLevel.RUNTIME).  Any other call that gets or
    sets state of that vCPU (hvmodel.kvm.Vcpu's, VcpuState) puts it at once.

    Thread safety: as Vcpu's: one thread at a time; BusyError where another thread runs the vCPU, and nothing is done.

    >>> from hvmodel import Machine
    >>> from hvmodel.state.sync import synchronizer
    >>> with Machine(ram="1M") as m:
    ...     m.load(0x7C00, b"\\xf4")
    ...     m.vcpu.real_mode(entry=0x7C00)
    ...     sync = synchronizer(m.vcpu)
    ...     env = sync.synchronize_state()
    ...     sync.env = env.replace(**{"regs.rax": 7})
    ...     m.vcpu.rax, sync.vcpu_dirty
    ...     m.run(timeout=1.0).reason, m.vcpu.rax, sync.vcpu_dirty
    (7, True)
    ('halted', 7, False)
    """

    __slots__ = ("_cpuid", "_env", "_features", "_is_putting", "_khz", "_ref", "_runs", "_taken", "_why")

    def __init__(self, vcpu: Vcpu, cpuid: tuple[CpuidEntry, ...] | None = None) -> None:
        self._ref = ref(vcpu)  # which has us
        self._cpuid = cpuid
        self._env: VcpuState | None = None
        self._why: BaseException | None = None  # of the last get, where it failed
        self._features: _Features | None = None
        self._taken: object = None  # the mark of the CPUID leaves that those are of
        self._runs = -1  # how often it had run when the TSC was got
        self._is_putting = False
        khz = lib.kvm_get_tsc_khz(vcpu._settled())
        self._khz = max(khz, 0)

    # ---- who has it ----

    @property
    def _vcpu(self) -> Vcpu:
        vcpu = self._ref()
        if vcpu is None:
            raise ClosedError("VcpuSync", "its Vcpu")
        return vcpu

    @property
    def vcpu_dirty(self) -> bool:
        """Whether the state is ours, and KVM is yet to be given it."""
        return bool(self._vcpu._c.dirty)

    @property
    def env(self) -> VcpuState:
        """The state while it is ours; assign another one to change it.

        ArgumentError: it is KVM's (synchronize_state takes it), or the last get failed.  A state that is assigned needs
        all parts that QEMU puts of this vCPU, or what is missing stays as it is in KVM.
        """
        return self._have("VcpuSync.env")

    @env.setter
    def env(self, state: VcpuState) -> None:
        if not isinstance(state, VcpuState):
            raise ArgumentTypeError("VcpuSync.env", "env", state, "a VcpuState")
        self._need_dirty("VcpuSync.env")
        self._env, self._why = state, None

    def _need_dirty(self, call: str) -> None:
        if self._vcpu.closed:
            raise self._vcpu._run_error(lib.HV_CLOSED, call)
        if not self._vcpu._c.dirty:
            raise ArgumentError(call, "env", None, "a state that is ours", "KVM has it: call synchronize_state()")

    def _have(self, call: str) -> VcpuState:
        self._need_dirty(call)
        if self._env is None:
            why = "nothing was assigned" if self._why is None else f"the last get failed: {self._why}"
            raise ArgumentError(call, "env", None, "a VcpuState: assign one, or discard()", why)
        return self._env

    def discard(self) -> None:
        """Forget `env`: the state is KVM's, as it was.  QEMU has no such thing."""
        self._mark("VcpuSync.discard", 0)
        self._env = self._why = None

    def _mark(self, call: str, dirty: int) -> None:
        rc = lib.hv_sync_mark(self._vcpu._c, dirty)
        if rc:
            raise self._vcpu._run_error(rc, call)

    # ---- taking it ----

    def synchronize_state(self) -> VcpuState:
        """Take the state, if it is KVM's: cpu_synchronize_state().  Returns env.

        First finishes the instruction of the last exit, as Vcpu.complete_io does.

        UnansweredError: the last exit is a read without an answer.  BusyError: another thread runs the vCPU.  Another
        refusal names the part, and leaves the vCPU dirty without env, as QEMU does: it does not run until the next
        synchronize_state() succeeds, env is assigned, or discard().

        Ioctls, in this order, where this KVM and VM have them: KVM_GET_VCPU_EVENTS, MP_STATE, REGS, XSAVE2, XCRS,
        SREGS2, MSRS, LAPIC, DEBUGREGS, NESTED_STATE.
        """
        if self._vcpu._c.dirty and self._env is not None:
            return self._env
        return self._get("VcpuSync.synchronize_state")

    def _get(self, call: str) -> VcpuState:
        vcpu = self._vcpu
        if vcpu._c.dirty:
            self._mark(call, 0)  # a get that failed is tried again
        known = _known_of(call, vcpu)
        indices = _get_indices(self._has(), self._env is None or self._runs != vcpu._c.runs)
        have = set(known.sizes) - {double for better, double in _DOUBLES if better in known.sizes}
        names = [name for name in _GET_ORDER if name in have]
        msrs = _blank(indices)
        while True:
            layout = Layout.of((name, len(msrs) if name == "msrs" else known.sizes[name]) for name in names)
            block = bytearray(layout.size)
            _, begin, end = layout.at["msrs"]
            block[begin:end] = msrs
            rows = []
            for name in names:
                _, begin, end = layout.at[name]
                rows.append((name, get_call(part(name), end - begin), begin, end - begin))
            blank = bytes(block)
            word = lib.hv_sync_get(vcpu._c, _table(rows), len(rows), ffi.from_buffer("uint8_t[]", block))
            if not word:
                break
            if word < 0:
                raise vcpu._run_error(word, call)
            stop = word >> lib.HV_STATE_AT_SHIFT & 0xFF
            if word & 0xFF == lib.HV_STATE_RESIZED:
                known.sizes[names[stop]] = word >> lib.HV_STATE_DONE_SHIFT
                known.plans.clear()
                known.renew()
                self._mark(call, 0)
                continue
            # The error counts the parts in its own order.
            at = layout.getting.index(names[stop])
            error = _get_error(vcpu, word & ~0xFF00 | at << lib.HV_STATE_AT_SHIFT, layout, blank)
            self._env, self._why = None, error
            raise error
        got = VcpuState._of(layout, bytes(block), None)
        if TSC not in indices and self._env is not None and TSC in self._env.msrs:
            got = got.replace(msrs=got.msrs.replace({TSC: self._env.msrs[TSC]}))
        self._env, self._why, self._runs = got, None, vcpu._c.runs
        return got

    def synchronize_pre_loadvm(self) -> None:
        """The state is ours, without a get: it is about to be assigned.  cpu_synchronize_pre_loadvm()."""
        self._mark("VcpuSync.synchronize_pre_loadvm", 1)
        self._env = self._why = None

    # ---- putting it ----

    def synchronize_post_reset(self) -> None:
        """Put env at PutLevel.RESET; the state is KVM's then.  cpu_synchronize_post_reset()."""
        self.put(PutLevel.RESET)

    def synchronize_post_init(self) -> None:
        """Put env at PutLevel.FULL; the state is KVM's then.  cpu_synchronize_post_init()."""
        self.put(PutLevel.FULL)

    def flush(self) -> None:
        """Put env at PutLevel.RUNTIME, if the state is ours: what every run begins with."""
        if self._vcpu._c.dirty and not self._is_putting:
            self.put(PutLevel.RUNTIME)

    def put(self, level: PutLevel) -> None:
        """Put env as QEMU does at `level`; the state is KVM's then.

        Ioctls, in this order, where this KVM and VM have them: from RESET on KVM_SET_MSRS of FEATURE_CONTROL;
        KVM_SET_SREGS2; from RESET on KVM_SET_NESTED_STATE; at FULL KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ; KVM_SET_REGS,
        XSAVE, XCRS, MSRS (put_msr_indices), VCPU_EVENTS; from RESET on MP_STATE; MSRS of TSC_DEADLINE; DEBUGREGS.

        RefusedStateError names part, field and rule, ChangedStateError what KVM took and does not keep (CR0.PG); then
        the state is ours still, and env is what it was: KVM may have parts of it.  ArgumentError: there is no env.
        BusyError.
        """
        call = "VcpuSync.put"
        level = _level(call, level)
        vcpu = self._vcpu
        env = self._have(call)
        self._is_putting, vcpu._calm = True, None
        try:
            rows, block = self._put_rows(env, level)
            cr8 = env.sregs.cr8 if "sregs2" in env or "sregs" in env else vcpu.cr8
            word = lib.hv_sync_put(vcpu._c, _table(rows), len(rows), block, cr8)
            if word < 0:
                raise vcpu._run_error(word, call)
            if word:
                raise self._put_error(rows, block, word)
            self._refuse_dropped(call, env)
        finally:
            self._is_putting = False

    def _refuse_dropped(self, call: str, env: VcpuState) -> None:
        # Raises where KVM took CR0.PG and does not keep it: as if it had been refused.
        name = env._may_be_dropped()
        if name is None:
            return
        from . import refusals

        changed = refusals.dropped(self._vcpu, name, env.part_bytes(name))
        if changed is not None:
            self._mark(call, 1)
            raise changed

    def _put_rows(self, env: VcpuState, level: PutLevel) -> tuple[list[tuple[str, str, int, int]], bytes]:
        # The ioctls and their bytes, in the order of their rows.
        rows: list[tuple[str, str, int, int]] = []
        block = b""
        for name, least in _PUT_ORDER:
            if level < least:
                continue
            data = self._data(env, name, level)
            if data is None:
                continue
            if name == "tsc_khz":
                rows.append((name, "KVM_GET_TSC_KHZ", len(block), len(data)))
                if not self._may_set_tsc_khz(int.from_bytes(data, "little")):
                    continue
            rows.append((name, part(_PART_OF.get(name, name)).put, len(block), len(data)))
            block += data.ljust(-len(data) % 8 + len(data), b"\0")
        return rows, block

    def _data(self, env: VcpuState, name: str, level: PutLevel) -> bytes | None:
        # The bytes of a row of _PUT_ORDER; None: this vCPU, or this state, does not have it.
        has = self._has()
        if name == "feature_control":
            wanted = (_FEATURE_CONTROL,) if has.has_feature_control else ()
            return _msr_bytes(env, wanted)
        if name == "tsc_deadline":
            return _msr_bytes(env, (TSC_DEADLINE,) if TSC_DEADLINE in has.listed else ())
        if name == "msrs":
            return _msr_bytes(env, _put_indices(has, level))
        if name == "tsc_khz":
            khz = env.tsc_khz if "tsc_khz" in env else self._khz
            return khz.to_bytes(4, "little") if self._khz else None
        if name not in env or (name, True) in ((double, better in env) for better, double in _DOUBLES):
            return None
        if name == "sregs":  # the interrupt is in events
            return env.part_bytes("sregs")[:_COMMON].ljust(Sregs.SIZE, b"\0")
        if name == "events":
            return bytes(self._events(env, level))
        return env.part_bytes(name)

    @staticmethod
    def _events(env: VcpuState, level: PutLevel) -> VcpuEvents:
        events = env.events
        flags = events.flags & _EVENTS_KEPT
        if level >= PutLevel.RESET:
            flags |= lib.KVM_VCPUEVENT_VALID_NMI_PENDING
            if "mp_state" in env and env.mp_state.mp_state == _SIPI_RECEIVED:
                flags |= lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR
        return events.replace(flags=flags)

    def _may_set_tsc_khz(self, khz: int) -> bool:
        # Where KVM cannot scale the TSC, it takes the frequency that it has.
        can_scale = self._vcpu.vm.check_extension(lib.KVM_CAP_TSC_CONTROL) > 0
        return can_scale or abs(self._khz - khz) * 1_000_000 <= khz * _TOLERANCE

    def _put_error(self, rows: list[tuple[str, str, int, int]], block: bytes, word: int) -> BaseException:
        from . import refusals

        at = word >> lib.HV_STATE_AT_SHIFT & 0xFF
        error = word >> lib.HV_STATE_ERROR_SHIFT & 0xFFFF
        name, call, begin, size = rows[at]
        name = _PART_OF.get(name, name)
        data = block[begin : begin + size]
        if name == "msrs":
            index, value = _msr_rows(data)[word >> lib.HV_STATE_DONE_SHIFT]
            data = bytes(Msrs({index: value}))
        return refusals.explain(self._vcpu, name, data, error or errno.EINVAL, call)

    def put_apic(self) -> None:
        """Put the APIC base and, with an in-kernel APIC, its registers: what QEMU's APIC device does of its own, after
        a reset and after a state was loaded, before the vCPU's put.

        Ioctls: KVM_SET_MSRS of APIC_BASE, KVM_SET_LAPIC.  Source: qemu:hw/i386/kvm/apic.c kvm_apic_put@v7.2.
        """
        call = "VcpuSync.put_apic"
        env, vcpu = self._have(call), self._vcpu
        vcpu._calm = None
        data = bytes(Msrs({_APIC_BASE: env.sregs.apic_base}))
        rows = [("msrs", "KVM_SET_MSRS", 0, len(data))]
        if "lapic" in env:
            rows.append(("lapic", "KVM_SET_LAPIC", len(data), len(env.part_bytes("lapic"))))
            data += env.part_bytes("lapic")
        self._is_putting = True
        try:
            word = lib.hv_sync_put(vcpu._c, _table(rows), len(rows), data, env.sregs.cr8)
            if word < 0:
                raise vcpu._run_error(word, call)
            if word:
                raise self._put_error(rows, data, word)
            self._mark(call, 1)  # the rest is ours still
        finally:
            self._is_putting = False

    def _has(self) -> _Features:
        vcpu = self._vcpu
        was, self._is_putting = self._is_putting, True
        try:
            taken = _known_of("VcpuSync", vcpu).taken
            if self._features is None or self._taken is not taken:
                self._features, self._taken = _Features(vcpu, self._cpuid), taken
        finally:
            self._is_putting = was
        return self._features

    # ---- the registers of Cpu, while the state is ours ----

    def _read(self, part_name: str) -> bytes:
        # The bytes of "regs" or "sregs".
        env = self._have(f"Cpu.{part_name}")
        if part_name == "regs" or "sregs2" not in env:
            return env.part_bytes(part_name)
        bitmap = 0
        if "events" in env and env.events.interrupt.injected and not env.events.interrupt.soft:
            bitmap = 1 << env.events.interrupt.nr
        return env.part_bytes("sregs2")[:_COMMON] + bitmap.to_bytes(32, "little")

    def _write_regs(self, offset: int, data: bytes) -> None:
        env = self._have("Cpu.regs")
        regs = bytearray(env.part_bytes("regs"))
        regs[offset : offset + len(data)] = data
        new = Regs.from_bytes(regs)
        self._env = env.replace(regs=new.replace(rflags=new.rflags | 2))

    def _write_sregs(self, sregs: Sregs) -> None:
        env = self._have("Cpu.sregs")
        if "sregs2" not in env:
            self._env = env.replace(sregs=sregs)
            return
        old = env.sregs2
        new = Sregs2.from_bytes(bytes(sregs)[:_COMMON].ljust(Sregs2.SIZE, b"\0"))
        is_pae = new.cr0 & _CR0_PG and new.cr4 & _CR4_PAE and not new.efer & _EFER_LMA
        if is_pae and new.cr3 == old.cr3:
            new = new.replace(flags=old.flags, pdptrs=old.pdptrs)
        self._env = env.replace(sregs2=new)

    def __repr__(self) -> str:
        return f"<VcpuSync of {self._ref()!r}: {'ours' if self._ref() and self.vcpu_dirty else 'KVM has it'}>"


# A part that is left out where the other is there.
_DOUBLES = (("sregs2", "sregs"), ("xsave", "fpu"))
_PART_OF = {"feature_control": "msrs", "tsc_deadline": "msrs"}


def _table(rows: list[tuple[str, str, int, int]]) -> Any:
    # Of (name, ioctl, offset, size).
    table = ffi.new("struct hv_part[]", max(len(rows), 1))
    for entry, (name, call, offset, size) in zip(table, rows, strict=False):
        row = part(_PART_OF.get(name, name))
        entry.request, entry.kind, entry.argument = IOCTLS[call].request, row.kind, row.argument
        entry.offset, entry.size = offset, size
    return table


def _msr_bytes(env: VcpuState, indices: tuple[int, ...]) -> bytes | None:
    # A struct kvm_msrs of those of them that env has; QEMU stops the PMU by zeros before it sets it.
    if "msrs" not in env:
        return None
    msrs = env.msrs
    rows = [index for index in indices if index in msrs]
    if not rows:
        return None
    data = len(rows).to_bytes(8, "little")
    for at, index in enumerate(rows):
        value = 0 if index in rows[at + 1 :] else msrs[index]
        data += index.to_bytes(8, "little") + value.to_bytes(8, "little")
    return data


def _msr_rows(data: bytes) -> list[tuple[int, int]]:
    return [
        (int.from_bytes(data[at : at + 4], "little"), int.from_bytes(data[at + 8 : at + 16], "little"))
        for at in range(8, len(data), 16)
    ]


def synchronizer(cpu: Cpu | Vcpu, *, cpuid: Iterable[CpuidEntry] | None = None) -> VcpuSync:
    """The VcpuSync of a machine's vcpu, or of a hvmodel.kvm.Vcpu; the same one until it is closed.

    `cpuid`: at the first call, the leaves that decide which MSRs there are, in place of those that KVM keeps.  QEMU
    goes by what it has asked for; KVM may have added to it.
    """
    vcpu = _vcpu_of("synchronizer", cpu)
    if vcpu._synchronizer is None:
        vcpu._synchronizer = VcpuSync(vcpu, None if cpuid is None else tuple(CpuidTable(cpuid)))
    elif cpuid is not None:
        raise ArgumentError("synchronizer", "cpuid", cpuid, "None", "this vCPU has its synchronizer already")
    found: VcpuSync = vcpu._synchronizer
    return found


# ---- all vCPUs of a machine ----


def _all(machine: Machine, call: Callable[[VcpuSync], object]) -> None:
    for vcpu in list(_vm_of("synchronize_all", machine)._vcpus.values()):
        call(synchronizer(vcpu))


def synchronize_all_states(machine: Machine) -> None:
    """synchronize_state() of every vCPU: cpu_synchronize_all_states()."""
    _all(machine, VcpuSync.synchronize_state)


def synchronize_all_post_reset(machine: Machine) -> None:
    """synchronize_post_reset() of every vCPU: cpu_synchronize_all_post_reset()."""
    _all(machine, VcpuSync.synchronize_post_reset)


def synchronize_all_post_init(machine: Machine) -> None:
    """synchronize_post_init() of every vCPU: cpu_synchronize_all_post_init()."""
    _all(machine, VcpuSync.synchronize_post_init)


def synchronize_all_pre_loadvm(machine: Machine) -> None:
    """synchronize_pre_loadvm() of every vCPU: cpu_synchronize_all_pre_loadvm()."""
    _all(machine, VcpuSync.synchronize_pre_loadvm)
