"""The checks of a vCPU's state: what is put is what is got again, from the same vCPU and from one of a fresh VM."""

from __future__ import annotations

import random
from contextlib import contextmanager

from .registry import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..kvm import Kvm, Vcpu, Vm
    from ..state import CpuidTable, VcpuState
    from .result import Tally

__all__ = ["check_state_parts", "check_state_random", "random_state"]

_CHIPS = ("no APIC", "APIC, PICs, I/O APIC, PIT", "APIC alone")
_PER_VM = 4
_CODE_GPA = 0x1000
_CODE = bytes.fromhex(
    "b83412"  #  mov ax, 0x1234
    "0f23c0"  #  mov dr0, eax
    "0f22d0"  #  mov cr2, eax
    "e610"  #    out 0x10, al
)

_PE, _ET, _NE, _PG = 1, 1 << 4, 1 << 5, 1 << 31
_PAE, _OSFXSR, _OSXSAVE = 1 << 5, 1 << 9, 1 << 18
_SCE, _LME, _LMA, _NXE = 1, 1 << 8, 1 << 10, 1 << 11
_CANONICAL_MSRS = (0x175, 0x176, 0xC0000082, 0xC0000083, 0xC0000102)  # SYSENTER_ESP and EIP, LSTAR, CSTAR, KERNEL_GS
_PAT, _STAR, _SYSENTER_CS, _FMASK = 0x277, 0xC0000081, 0x174, 0xC0000084
_PAT_TYPES, _MTRR_TYPES = (0, 1, 4, 5, 6, 7), (0, 1, 4, 5, 6)
_MTRR_DEFAULT, _MTRR_FIXED, _MTRR_BASE, _MC0_CTL, _MC0_STATUS = 0x2FF, 0x250, 0x200, 0x400, 0x401
_CPUID_OSXSAVE, _XSAVEC, _LEGACY_SIZE = 1 << 27, 1 << 1, 576
_WITH_CODE = (10, 11, 12, 13, 14, 17)
_WITHOUT_CODE = (0, 1, 5, 6, 7, 16, 18, 19)


@contextmanager
def _vcpu(kvm: Kvm, chips: int) -> Iterator[tuple[Vm, Vcpu]]:
    # A vCPU with CPUID as KVM gives it, in a new VM with the chips of _CHIPS.
    from .._ffi import lib

    with kvm.create_vm() as vm:
        if chips == 1:
            vm.create_irqchip()
            vm.create_pit2()
        elif chips == 2:
            vm.enable_cap(lib.KVM_CAP_SPLIT_IRQCHIP, 24)
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(kvm.supported_cpuid_table())
            yield vm, vcpu


def _compare(tally: Tally, case: str, put: VcpuState, got: VcpuState) -> None:
    # Every part of both, byte for byte but for the time that passes.
    for name in put.parts:
        changes = [str(change) for change in put.only(name).diff(got.only(name), time=False)]
        tally.compare(f"{case}: {name}", [], changes)


@check("state, part by part", "KVM's gets after our puts")
def check_state_parts(tally: Tally, _cases: int) -> None:
    """get, put, get again, of every part alone and of all, into the same vCPU and into one of a fresh VM; before and
    after a guest has run; with all chips, with an APIC only, and without; and the VM's own parts.  All of them, always.
    Registers by both pairs of ioctls: sregs besides sregs2, fpu besides xsave."""
    from ..host import Mapping
    from ..kvm import Kvm
    from ..state import VcpuState, VmState

    with Kvm() as kvm, Mapping(None, 4096) as page:
        page.write(0, _CODE)
        for chips, words in enumerate(_CHIPS):
            for runs in (False, True):
                case = f"{words}{', after a run' if runs else ''}"
                with _vcpu(kvm, chips) as (vm, vcpu), _vcpu(kvm, chips) as (other_vm, other):
                    vm.set_user_memory_region(0, _CODE_GPA, page)
                    if runs:
                        _run(vcpu)
                    whole = VcpuState.get(vcpu)
                    for name in (*whole.parts, "sregs", "fpu"):
                        alone = VcpuState.get(vcpu, (name,))
                        alone.put(vcpu)
                        _compare(tally, f"{case}, same vCPU, alone", alone, VcpuState.get(vcpu, (name,)))
                    whole.put(vcpu)
                    _compare(tally, f"{case}, same vCPU", whole, VcpuState.get(vcpu))
                    whole.put(other)
                    _compare(tally, f"{case}, fresh VM", whole, VcpuState.get(other))
                    chip_state = VmState.get(vm)
                    for to, where in ((vm, "same VM"), (other_vm, "fresh VM")):
                        chip_state.put(to)
                        changes = chip_state.diff(VmState.get(to), time=False)
                        tally.compare(f"{case}, {where}: {chip_state.parts}", [], [str(change) for change in changes])
    if "nested_state" not in whole:
        tally.lack("KVM_CAP_NESTED_STATE: the nested state")


def _run(vcpu: Vcpu) -> None:
    # Some instructions in real mode, up to an exit that is not answered and not finished.
    from ..kvm import IoOut
    from ..state import VcpuState

    state = VcpuState.get(vcpu)
    flat = {"sregs2.cs.base": 0, "sregs2.cs.selector": 0}
    if "sregs2" not in state:
        flat = {"sregs.cs.base": 0, "sregs.cs.selector": 0}
    state.replace(**flat, **{"regs.rip": _CODE_GPA, "regs.rflags": 2}).put(vcpu)
    while not isinstance(vcpu.run(timeout=10), IoOut):
        pass


@check("random states", "KVM's gets after our puts", cases=1000, slow=10_000)
def check_state_random(tally: Tally, cases: int) -> None:
    """A random valid state is put, and got again unchanged; in turn without an APIC, with all chips, with an APIC only.
    What was got is put into a vCPU of a VM that is fresh for every fourth case, and got from there: a VM takes 10 ms.
    KVM derives some bits from others (OSXSAVE in CPUID from CR4, …): the state has them as they must come out."""
    from ..kvm import Kvm
    from ..state import VcpuState

    rng = random.Random(4)
    with Kvm() as kvm, _vcpu(kvm, 0) as (_, bare), _vcpu(kvm, 1) as (_, full), _vcpu(kvm, 2) as (_, split):
        vcpus = (bare, full, split)
        bases = tuple([VcpuState.get(vcpu) for vcpu in vcpus])
        for case in range(cases):
            chips = case % len(vcpus)
            state = random_state(rng, bases[chips])
            state.put(vcpus[chips])
            got = VcpuState.get(vcpus[chips])
            changes = [str(change) for change in state.diff(got, time=False)]
            if case % _PER_VM < 1:
                with _vcpu(kvm, chips) as (_, other):
                    got.put(other)
                    changes += [f"fresh VM: {change}" for change in got.diff(VcpuState.get(other), time=False)]
            tally.compare(f"state {case}", [], changes)


def random_state(rng: random.Random, base: VcpuState) -> VcpuState:
    """A random state that KVM takes and keeps as it is: `base`, of the same vCPU, with other values of all parts.

    Real mode, protected mode without paging, or long mode with 4 levels; no event that the vCPU would lose.
    """
    has_lapic = "lapic" in base
    mode = rng.choice(("real", "protected", "long"))
    regs = {name: rng.getrandbits(64) for name in base.regs.fields()}
    regs["rflags"] = 2 | rng.getrandbits(12) & 0xCD5
    if mode != "long":
        regs["rip"] &= 0xFFFF if mode == "real" else 0xFFFFFFFF
    cr8 = rng.randrange(16)
    changes: dict[str, Any] = {
        "regs": base.regs.replace(**regs),
        "sregs2" if "sregs2" in base else "sregs": _random_sregs(rng, base, mode, cr8),
        "msrs": base.msrs.replace(_random_msrs(rng, base)),
        "debugregs": base.debugregs.replace(
            db=tuple([rng.getrandbits(64) for _ in range(4)]),
            dr6=0xFFFF0FF0 | rng.getrandbits(4) | rng.getrandbits(1) << 14,
            dr7=0x400 | rng.getrandbits(8) | rng.getrandbits(16) << 16,
        ),
        "events": _random_events(rng, base),
    }
    xcr0 = 1
    if "xcrs" in base:
        xcr0 = rng.choice((1, 3, 7) if base.cpuid.has("AVX") else (1, 3))
        changes["xcrs"] = base.xcrs.replace(xcrs=(base.xcrs.xcrs[0].replace(value=xcr0), *base.xcrs.xcrs[1:]))
    if "xsave" in base:
        changes["xsave"] = _random_xsave(rng, base)
    if has_lapic:
        changes["lapic"] = (
            base.lapic.replace_register(0x80, cr8 << 4)
            .replace_register(0xA0, cr8 << 4)  # PPR: TPR, with nothing in service
            .replace_register(0xD0, rng.getrandbits(8) << 24)
            .replace_register(0xF0, 0x1FF)
        )
        changes["mp_state"] = base.mp_state.replace(mp_state=rng.choice((0, 3)))
    cr4 = changes["sregs2" if "sregs2" in base else "sregs"].cr4
    changes["cpuid"] = _derived(base.cpuid, bool(cr4 & _OSXSAVE), xcr0)
    return base.replace(**changes)


def _derived(cpuid: CpuidTable, osxsave: bool, xcr0: int) -> CpuidTable:
    # What KVM writes into CPUID itself: OSXSAVE is CR4's, leaf 0xd has the size of the area of what XCR0 enables.
    leaf = cpuid.leaf(1)
    if leaf is not None:
        cpuid = cpuid.replace(1, ecx=leaf.ecx & ~_CPUID_OSXSAVE | (_CPUID_OSXSAVE if osxsave else 0))
    avx = cpuid.leaf(0xD, 2)
    if avx is not None:
        with_avx = bool(xcr0 & 4)
        cpuid = cpuid.replace(0xD, 0, ebx=avx.ebx + avx.eax if with_avx else _LEGACY_SIZE)
        compact = cpuid.leaf(0xD, 1)
        if compact is not None and compact.eax & _XSAVEC:
            cpuid = cpuid.replace(0xD, 1, ebx=_LEGACY_SIZE + (avx.eax if with_avx else 0))
    return cpuid


def _canonical(rng: random.Random) -> int:
    low = rng.getrandbits(47)
    return low if rng.getrandbits(1) else low | 0xFFFF8000_00000000


def _random_sregs(rng: random.Random, base: VcpuState, mode: str, cr8: int) -> object:
    old = base.sregs
    fields: dict[str, object] = {}
    for name in ("ds", "es", "fs", "gs", "ss"):
        segment = getattr(old, name)
        fields[name] = segment.replace(selector=rng.getrandbits(16) & ~3, base=rng.getrandbits(32), limit=0xFFFF)
    cr0, cr4, efer = _ET | rng.choice((0, _NE)), rng.choice((0, _OSFXSR)), rng.choice((0, _SCE))
    wide = {"g": 1, "limit": 0xFFFFFFFF}
    if mode != "real":
        cr0 |= _PE
        fields["cs"] = old.cs.replace(base=0, selector=8, type=0xB, present=1, s=1, dpl=0, db=1, l=0, **wide)
    if mode == "long":
        cr0, cr4, efer = cr0 | _PG, cr4 | _PAE, efer | _LME | _LMA | rng.choice((0, _NXE))
        fields["cs"] = old.cs.replace(base=0, selector=8, type=0xB, present=1, s=1, dpl=0, db=0, l=1, **wide)
        fields["fs"] = old.fs.replace(base=_canonical(rng), limit=0xFFFF)
        fields["gs"] = old.gs.replace(base=_canonical(rng), limit=0xFFFF)
        fields["tr"] = old.tr.replace(base=_canonical(rng), type=0xB, selector=0x40, limit=0x67)
    if "xcrs" in base:
        cr4 |= rng.choice((0, _OSXSAVE))
    fields |= {"cr0": cr0, "cr4": cr4, "efer": efer, "cr8": cr8, "cr2": rng.getrandbits(64)}
    fields["cr3"] = rng.getrandbits(20) << 12
    for name in ("gdt", "idt"):
        fields[name] = getattr(old, name).replace(base=_canonical(rng), limit=rng.getrandbits(16))
    return old.replace(**fields)


def _random_msrs(rng: random.Random, base: VcpuState) -> dict[int, int]:
    values = {index: _canonical(rng) for index in _CANONICAL_MSRS}
    values[_PAT] = int.from_bytes(bytes([rng.choice(_PAT_TYPES) for _ in range(8)]), "little")
    values[_STAR], values[_FMASK] = rng.getrandbits(64), rng.getrandbits(32)
    values[_SYSENTER_CS] = rng.getrandbits(16)
    values[_MTRR_DEFAULT] = rng.choice(_MTRR_TYPES) | rng.getrandbits(2) << 10
    values[_MTRR_FIXED] = int.from_bytes(bytes([rng.choice(_MTRR_TYPES) for _ in range(8)]), "little")
    values[_MTRR_BASE] = rng.getrandbits(20) << 12 | rng.choice(_MTRR_TYPES)
    values[_MC0_CTL], values[_MC0_STATUS] = rng.choice((0, (1 << 64) - 1)), rng.getrandbits(64)
    return {index: value for index, value in values.items() if index in base.msrs}


def _random_events(rng: random.Random, base: VcpuState) -> object:
    events = base.events
    what = rng.choice(("nothing", "exception", "exception", "nmi"))
    if what == "exception":
        with_code = rng.getrandbits(1)
        vector = rng.choice(_WITH_CODE if with_code else _WITHOUT_CODE)
        code = rng.getrandbits(16) if with_code else 0
        changed = events.exception.replace(injected=1, nr=vector, has_error_code=with_code, error_code=code)
        events = events.replace(exception=changed)
    elif what == "nmi":
        events = events.replace(**{"nmi.injected": 1, "nmi.masked": rng.getrandbits(1)})
    return events


def _random_xsave(rng: random.Random, base: VcpuState) -> object:
    # KVM gives zeros for components that are in their initial state.
    whole = bytes(base.xsave)
    area = base.xsave.from_bytes(whole[:_LEGACY_SIZE].ljust(len(whole), b"\0")).replace(
        fcw=0x37F & ~rng.getrandbits(6),
        fsw=rng.getrandbits(16) & 0x7F7F,
        fop=rng.getrandbits(11),
        mxcsr=0x1F80 & ~(rng.getrandbits(6) << 7),
        st=tuple([rng.randbytes(10) + bytes(6) for _ in range(8)]),
        xmm=tuple([rng.randbytes(16) for _ in range(16)]),
        xstate_bv=3,
    )
    if rng.getrandbits(1) and base.cpuid.has("AVX"):
        from ..state import components

        avx = next((one for one in components(base.cpuid) if one.number == 2), None)
        if avx is not None:
            area = area.replace_component(avx, rng.randbytes(avx.size))
    return area
