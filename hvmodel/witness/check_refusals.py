"""The check of refusals: a valid value with one field broken, which the kernel refuses, and the field that we name.

That the kernel takes the value once the named field alone is another one is the proof that it was the right one.
"""

from __future__ import annotations

import random
from contextlib import ExitStack

from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kvm import Kvm, Vcpu
    from .result import Tally

__all__ = ["BROKEN", "check_refusals", "check_refusals_tried", "random_value", "repairs"]

# part -> the fields of which KVM looks at some bits at least.  Of ten breaks seven are of these, three of any field.
BROKEN: dict[str, tuple[str, ...]] = {
    "sregs": ("cr0", "cr3", "cr4", "efer", "cs.l", "apic_base"),
    "sregs2": ("cr0", "cr3", "cr4", "efer", "cs.l", "apic_base", "flags"),
    "xcrs": ("xcrs[0].value", "nr_xcrs", "flags"),
    "debugregs": ("dr6", "dr7", "flags"),
    "events": ("flags", "exception.nr", "smi.smm", "smi.pending", "smi.smm_inside_nmi"),
    "xsave": ("xstate_bv", "xcomp_bv", "mxcsr", "region[528:576]"),
    "msrs": (),
    "cpuid": ("cpuid[0x80000008].eax", "cpuid[0xd, 0x0].eax"),
    "lapic": ("regs[0x20]",),
    "mp_state": ("mp_state",),
}
# How often each part comes, of 24.
_WEIGHTS = {"sregs": 5, "sregs2": 4, "xcrs": 3, "debugregs": 2, "events": 3, "xsave": 3, "msrs": 2, "cpuid": 1}
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_MODES = (  # CR0, CR4, EFER, CS.L
    (0x60000010, 0, 0, 0),
    (0x11, 0, 0, 0),
    (0x11, 0x20, 0x100, 0),
    (0x80000011, 0x10, 0, 0),
    (0x80000011, 0x20, 0x800, 0),
    (0x80000011, 0x20, 0x500, 1),
    (0x80050033, 0x6F0, 0xD01, 1),
    (0x80050033, 0x6F0, 0xD01, 0),
)
_TRIES = 400  # for a break that the kernel refuses


def _bits(rng: random.Random, size: int) -> int:
    # A number with few bits, many, or those at one end.
    bits = rng.randrange(1, 8 * size + 1)
    return rng.choice((rng.getrandbits(8 * size), rng.getrandbits(bits), 1 << bits - 1, 0))


def random_value(rng: random.Random, part: str, now: bytes) -> bytes:
    """A value that KVM may take, made of the one that the vCPU has; `now` are its bytes."""
    from ..state.facts import RECORDS
    from ..state.trial import leaves

    if part in ("sregs", "sregs2"):
        cr0, cr4, efer, code = rng.choice(_MODES)
        fields: dict[str, int] = {"cr0": cr0, "cr4": cr4, "efer": efer, "cs.l": code, "cr2": _bits(rng, 8)}
        fields["cr3"], fields["cr8"] = rng.getrandbits(20) << 12, rng.randrange(16)
        fields["gdt.base"], fields["idt.limit"] = _bits(rng, 8), _bits(rng, 2)
        for name in _SEGMENTS:
            fields |= {f"{name}.base": _bits(rng, 4), f"{name}.limit": _bits(rng, 4), f"{name}.dpl": rng.randrange(4)}
            fields[f"{name}.selector"] = rng.getrandbits(16)
        return bytes(RECORDS[part].from_bytes(now).replace(**fields))
    data = now
    for leaf in rng.sample(leaves(part, now), min(3, len(leaves(part, now)))):
        if part in ("msrs", "cpuid", "mp_state") or leaf.path in BROKEN[part] or leaf.path.startswith("xcrs"):
            continue
        data = leaf.set(data, rng.randbytes(leaf.size))
    if part == "xsave":
        data = data[:512] + bytes([rng.choice((0, 1, 2, 3, 7))]) + data[513:]
    elif part == "xcrs":
        data = data[:16] + bytes([rng.choice((1, 3, 7))]) + data[17:]
    elif part == "events":
        data = bytes([rng.randrange(2), rng.choice((0, 1, 3, 6, 13, 14, 31))]) + data[2:]
    return data


def _broken(rng: random.Random, part: str, good: bytes) -> tuple[str, bytes]:
    # (path, bytes) of the value with one field changed.
    from ..state.trial import leaves

    fields = leaves(part, good)
    favoured = [leaf for leaf in fields if leaf.path in BROKEN[part]]
    leaf = rng.choice(favoured if favoured and rng.random() < 0.7 else fields)
    old = int.from_bytes(leaf.of(good), "little")
    new = rng.choice((old ^ 1 << rng.randrange(8 * leaf.size), _bits(rng, leaf.size)))
    return leaf.path, leaf.set(good, new.to_bytes(leaf.size, "little"))


def repairs(vcpu: Vcpu, part: str, field: str, bad: bytes, good: bytes) -> bool:
    """Whether KVM takes `bad` with this one field changed: to what `good` has, or by one bit, or by two."""
    from ..state.trial import leaves, put_part

    found = [leaf for leaf in leaves(part, bad) if leaf.path == field]
    if not found:
        return False
    leaf = found[0]
    values = [leaf.of(good)]
    if leaf.size <= 8:
        old, bits = int.from_bytes(leaf.of(bad), "little"), range(8 * leaf.size)
        masks = [1 << one for one in bits] + [1 << one | 1 << two for one in bits for two in bits if two < one]
        values += [(old ^ mask).to_bytes(leaf.size, "little") for mask in masks]
    return any(put_part(vcpu, part, leaf.set(bad, value)) == 0 for value in values)


@check("refusals", "KVM_SET_* of one field corrected", cases=1500, slow=10_000)
def check_refusals(tally: Tally, cases: int) -> None:
    """Valid values with one field broken, so that the kernel refuses them: the field that the error names, changed
    alone, makes the kernel take them, and the vCPU is as it was.  Parts sregs, sregs2, xcrs, debugregs, events, xsave,
    msrs, cpuid, lapic and mp_state, on vCPUs with and without CPUID, in-kernel APIC, capabilities and a first run."""
    from ..kvm import Kvm

    rng = random.Random(4)
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        if not kvm.supported_cpuid():
            raise Lacking("KVM_GET_SUPPORTED_CPUID knows nothing")
        vcpus = [(make(stack, kvm), parts) for make, parts in _VCPUS]
        while tally.compared < cases:
            vcpu, parts = rng.choice(vcpus)
            part = rng.choice([part for part in parts for _ in range(_WEIGHTS.get(part, 1))])
            _one(tally, rng, vcpu, part)


@check("refusals found by trying", "KVM_SET_* of one field corrected", cases=100, slow=1000)
def check_refusals_tried(tally: Tally, cases: int) -> None:
    """The same without the rules: the field is found on a scratch vCPU.  CPUID after a run is left out: a vCPU that has
    not run takes it."""
    from ..kvm import Kvm

    rng = random.Random(5)
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        vcpus = [(make(stack, kvm), parts) for make, parts in _VCPUS if make is not _after_run]
        while tally.compared < cases:
            vcpu, parts = rng.choice(vcpus)
            _one(tally, rng, vcpu, rng.choice(parts), tried=True)


def _one(tally: Tally, rng: random.Random, vcpu: Vcpu, part: str, *, tried: bool = False) -> None:
    from ..state.refusals import explain
    from ..state.trial import Scratch, get_part, put_part, search

    like = _some_msrs(rng) if part == "msrs" else b""
    start = get_part(vcpu, part, like)
    good = random_value(rng, part, start)
    if put_part(vcpu, part, good):
        return
    for _ in range(_TRIES):
        path, bad = _broken(rng, part, good)
        err = put_part(vcpu, part, bad)
        put_part(vcpu, part, good)
        if err:
            break
    else:
        return  # nothing of this value can be refused
    before = get_part(vcpu, part, like)
    if tried:
        with Scratch(vcpu) as scratch:
            found = search(scratch, part, bad)
        field, said = (None, "nothing") if found is None else (found.field, str(found))
    else:
        error = explain(vcpu, part, bad, err)
        field, said = getattr(error, "field", None), str(error)
    after = get_part(vcpu, part, like)
    what = f"{part}: {path} broken: {said}"
    if before != after:
        tally.compare(f"{what}: the vCPU", "as before", "changed")
    else:
        tally.compare(what, True, field is not None and repairs(vcpu, part, field, bad, good))
    put_part(vcpu, part, start)


def _some_msrs(rng: random.Random) -> bytes:
    # struct kvm_msrs of four that can be set.
    rows = b"".join([index.to_bytes(8, "little") + bytes(8) for index in rng.sample(_MSRS, 4)])
    return (4).to_bytes(8, "little") + rows


# Those whose values KVM looks at, and three of which it takes all.
_MSRS = (0x1B, 0x200, 0x201, 0x20F, 0x250, 0x268, 0x2FF, 0x174, 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000084,
         0xC0000102, 0x4B564D03, 0x4B564D05)  # fmt: skip


def _bare(stack: ExitStack, kvm: Kvm) -> Vcpu:
    return stack.enter_context(stack.enter_context(kvm.create_vm()).create_vcpu())


def _with_cpuid(stack: ExitStack, kvm: Kvm) -> Vcpu:
    vcpu = _bare(stack, kvm)
    vcpu.set_cpuid2(kvm.supported_cpuid_table())
    return vcpu


def _with_apic(stack: ExitStack, kvm: Kvm) -> Vcpu:
    # x2APIC with ids of 32 bits, the exception payload and the triple fault.
    from .._ffi import lib

    vm = stack.enter_context(kvm.create_vm())
    vm.ioctl("KVM_CREATE_IRQCHIP")
    vm.enable_cap(lib.KVM_CAP_X2APIC_API, lib.KVM_X2APIC_API_USE_32BIT_IDS)
    vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    vm.enable_cap(lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    vcpu = stack.enter_context(vm.create_vcpu(3))
    vcpu.set_cpuid2(kvm.supported_cpuid_table())
    sregs = vcpu.sregs
    sregs.apic_base |= 0x400
    vcpu.sregs = sregs
    return vcpu


def _after_run(stack: ExitStack, kvm: Kvm) -> Vcpu:
    # One that has executed a HLT.
    import mmap

    from ..host import Mapping

    page = stack.enter_context(Mapping(None, mmap.PAGESIZE))
    page.write(0, b"\xf4")
    vcpu = _with_cpuid(stack, kvm)
    vcpu.vm.set_user_memory_region(0, 0, page)
    sregs = vcpu.sregs
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.sregs = sregs
    regs = vcpu.regs
    regs.rip = 0
    vcpu.regs = regs
    vcpu.run()
    return vcpu


_STATE = ("sregs", "sregs2", "xcrs", "debugregs", "events", "xsave", "msrs", "cpuid", "mp_state")
_VCPUS: tuple[tuple[Callable[[ExitStack, Kvm], Vcpu], tuple[str, ...]], ...] = (
    (_bare, ("sregs", "sregs2", "xcrs", "events", "mp_state")),
    (_with_cpuid, _STATE),
    (_with_apic, (*_STATE, "lapic")),
    (_after_run, ("cpuid", "sregs")),
)
