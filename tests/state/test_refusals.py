"""Refusals explained: each rule by the kernel's own answer, every bit of every part, and what no rule knows."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from struct import pack, pack_into
from typing import TYPE_CHECKING, Any

import pytest

from hvmodel._ffi import lib
from hvmodel.errors import (
    ArgumentError,
    ArgumentTypeError,
    ChangedStateError,
    ClosedError,
    ForkedError,
    HvError,
    RefusedStateError,
    UnsupportedError,
)
from hvmodel.host import Mapping
from hvmodel.kvm import Kvm
from hvmodel.kvm.system import vendor_module
from hvmodel.machine import Machine
from hvmodel.state import DebugRegs, Lapic, MpState, Msrs, Regs, VcpuEvents, Xcr, Xcrs, facts, refusals, rules
from hvmodel.state.facts import Facts, facts_of
from hvmodel.state.msr_rules import MSR_RULES
from hvmodel.state.refusals import CHANGES, explain, kept
from hvmodel.state.rules import RULES, faults
from hvmodel.state.trial import Scratch, get_part, leaves, put_part, search
from hvmodel.witness.check_refusals import repairs
from tests.need import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hvmodel.kvm import Vcpu

EXTD = 0x400


# ---- vCPUs ----


class Host:
    """Makes vCPUs, each in a VM of its own, and closes them."""

    def __init__(self) -> None:
        self.kvm = Kvm()
        self.made: list[Any] = []

    def vcpu(self, *, cpuid: bool = True, irqchip: bool = False, caps: tuple[int, ...] = (), id: int = 0) -> Vcpu:
        vm = self.kvm.create_vm()
        self.made.append(vm)
        if irqchip:
            vm.ioctl("KVM_CREATE_IRQCHIP")
        for cap in caps:
            vm.enable_cap(cap, 1)
        vcpu = vm.create_vcpu(id)
        if cpuid:
            vcpu.set_cpuid2(self.kvm.supported_cpuid_table())
        return vcpu

    def x2apic(self) -> Vcpu:
        vcpu = self.vcpu(irqchip=True, caps=(lib.KVM_CAP_X2APIC_API,), id=3)
        sregs = vcpu.sregs
        sregs.apic_base |= EXTD
        vcpu.sregs = sregs
        return vcpu

    def has_run(self) -> Vcpu:
        page = Mapping(None, 4096)
        page.write(0, b"\xf4")
        vcpu = self.vcpu()
        vcpu.vm.set_user_memory_region(0, 0, page)
        self.made.append(page)
        sregs = vcpu.sregs
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.sregs = sregs
        regs = vcpu.regs
        regs.rip = 0
        vcpu.regs = regs
        vcpu.run()
        return vcpu

    def close(self) -> None:
        for one in self.made:  # VMs before the memory in their slots
            one.close()
        self.kvm.close()


@pytest.fixture
def host() -> Iterator[Host]:
    need("kvm")
    made = Host()
    yield made
    made.close()


def sregs(vcpu: Vcpu, part: str = "sregs", **fields: Any) -> bytes:
    """The vCPU's special registers with these fields, "cs__l" for "cs.l"."""
    record = facts.RECORDS[part].from_bytes(get_part(vcpu, part, b""))
    return bytes(record.replace(**{name.replace("__", "."): value for name, value in fields.items()}))


LONG = {"cr0": 0x80000011, "cr4": 0x20, "efer": 0x500, "cr3": 0x1000}


def xsave(vcpu: Vcpu, offset: int, code: str, value: int, components: int = 3) -> bytes:
    area = bytearray(get_part(vcpu, "xsave", b""))
    pack_into("<Q", area, 512, components)
    pack_into(code, area, offset, value)
    return bytes(area)


def xcr0(value: int, **fields: int) -> bytes:
    return bytes(Xcrs(**({"nr_xcrs": 1} | fields), xcrs=[Xcr(value=value)] + [Xcr()] * 15))


def msr(index: int, value: int) -> bytes:
    return pack("<IIIIQ", 1, 0, index, 0, value)


def leaf(vcpu: Vcpu, path: str, value: int) -> bytes:
    table = get_part(vcpu, "cpuid", b"")
    (found,) = [one for one in leaves("cpuid", table) if one.path == path]
    return found.set(table, value.to_bytes(4, "little"))


def events(**fields: int) -> bytes:
    return bytes(VcpuEvents().replace(**{name.replace("__", "."): value for name, value in fields.items()}))


def lapic(vcpu: Vcpu, apic_id: int) -> bytes:
    page = bytearray(get_part(vcpu, "lapic", b""))
    pack_into("<I", page, 0x20, apic_id)
    return bytes(page)


# ---- the rules: (the vCPU, the part's bytes), and the field that is to be named ----

Case = tuple["Callable[[Host], Vcpu]", "Callable[[Vcpu], bytes]", str]


def plain(host: Host) -> Vcpu:
    return host.vcpu()


def bare(host: Host) -> Vcpu:
    return host.vcpu(cpuid=False)


def with_apic(host: Host) -> Vcpu:
    return host.vcpu(irqchip=True)


def both(name: str, field: str, **fields: int) -> dict[str, Case]:
    # A rule of sregs and of sregs2.
    def of(part: str) -> Case:
        return plain, lambda vcpu: sregs(vcpu, part, **fields), field

    return {f"{part}.{name}": of(part) for part in ("sregs", "sregs2")}


PROVOKED: dict[str, Case] = {
    **both("long-mode-needs-pae", "cr4", **(LONG | {"cr4": 0})),
    **both("long-mode-needs-lma", "efer", **(LONG | {"efer": 0x100})),
    **both("cr3-width", "cr3", **(LONG | {"cr3": 1 << 60})),
    **both("lma-without-long-mode", "efer", efer=0x400),
    **both("cs-l-without-long-mode", "cs.l", cs__l=1),
    **both("cr4-reserved", "cr4", cr4=1 << 40),
    **both("cr0-upper-half", "cr0", cr0=1 << 32 | 0x11),
    **both("cr0-nw-without-cd", "cr0", cr0=0x20000011),
    **both("cr0-pg-without-pe", "cr0", cr0=0x80000010),
    **both("apic-base-reserved", "apic_base", apic_base=0xFEE00901),
    **both("apic-base-x2apic-off", "apic_base", apic_base=0xFEE00500),
    "sregs2.sregs2-flags": (plain, lambda vcpu: sregs(vcpu, "sregs2", flags=2), "flags"),
    "sregs2.sregs2-pdptrs": (plain, lambda vcpu: sregs(vcpu, "sregs2", flags=1), "flags"),
    "xcrs.count": (plain, lambda _: xcr0(1, nr_xcrs=17), "nr_xcrs"),
    "xcrs.flags": (plain, lambda _: xcr0(1, flags=1), "flags"),
    "xcrs.x87": (plain, lambda _: xcr0(2), "xcrs[0].value"),
    "xcrs.avx": (plain, lambda _: xcr0(5), "xcrs[0].value"),
    "xcrs.lacking": (bare, lambda _: xcr0(3), "xcrs[0].value"),
    "xcrs.avx512": (plain, lambda _: xcr0(0x27), "xcrs[0].value"),
    "debugregs.flags": (plain, lambda _: bytes(DebugRegs(flags=1)), "flags"),
    "debugregs.dr6": (plain, lambda _: bytes(DebugRegs(dr6=1 << 32)), "dr6"),
    "debugregs.dr7": (plain, lambda _: bytes(DebugRegs(dr7=1 << 63)), "dr7"),
    "events.flags": (plain, lambda _: events(flags=0x40), "flags"),
    "events.payload": (plain, lambda _: events(flags=0x10), "flags"),
    "events.vector": (plain, lambda _: events(exception__injected=1, exception__nr=32), "exception.nr"),
    "events.smm": (plain, lambda _: events(flags=8, smi__smm=1), "smi.smm"),
    "events.triple_fault": (plain, lambda _: events(flags=0x20, triple_fault__pending=1), "flags"),
    "xsave.components": (plain, lambda vcpu: xsave(vcpu, 512, "<Q", 1 << 63), "xstate_bv"),
    "xsave.compacted": (plain, lambda vcpu: xsave(vcpu, 520, "<Q", 1 << 63), "xcomp_bv"),
    "xsave.reserved": (plain, lambda vcpu: xsave(vcpu, 575, "<B", 1), "region[528:576]"),
    "xsave.mxcsr": (plain, lambda vcpu: xsave(vcpu, 24, "<I", 0x10000), "mxcsr"),
    "lapic.absent": (plain, lambda _: bytes(Lapic()), "regs"),
    "lapic.id": (lambda host: host.x2apic(), lambda vcpu: lapic(vcpu, 4), "regs[0x20]"),
    "mp_state.unknown": (with_apic, lambda _: bytes(MpState(mp_state=5)), "mp_state"),
    "mp_state.lapic": (plain, lambda _: bytes(MpState(mp_state=3)), "mp_state"),
    "cpuid.count": (plain, lambda _: pack("<II", 257, 0) + bytes(40 * 257), "nent"),
    "cpuid.address_width": (plain, lambda vcpu: leaf(vcpu, "cpuid[0x80000008].eax", 49 << 8), "cpuid[0x80000008].eax"),
    "cpuid.permission": (plain, lambda vcpu: leaf(vcpu, "cpuid[0xd, 0x0].eax", 1 << 18 | 3), "cpuid[0xd, 0x0].eax"),
    "cpuid.after_run": (lambda host: host.has_run(), lambda vcpu: leaf(vcpu, "cpuid[0x1].eax", 1), "cpuid[0x1].eax"),
    "msrs.unknown": (plain, lambda _: msr(0x9999, 0), "msrs[0x9999]"),
    "msrs.read_only": (plain, lambda _: msr(0xFE, 0), "msrs[0xfe]"),
    "msrs.efer": (plain, lambda _: msr(0xC0000080, 2), "msrs[0xc0000080]"),
    "msrs.apic_base": (plain, lambda _: msr(0x1B, 0xFEE00901), "msrs[0x1b]"),
    "msrs.apic_mode": (plain, lambda _: msr(0x1B, 0xFEE00500), "msrs[0x1b]"),
    "msrs.canonical": (plain, lambda _: msr(0xC0000082, 1 << 63), "msrs[0xc0000082]"),
    "msrs.tsc_aux": (plain, lambda _: msr(0xC0000103, 1 << 32), "msrs[0xc0000103]"),
    "msrs.mtrr_variable": (plain, lambda _: msr(0x200, 2), "msrs[0x200]"),
    "msrs.mtrr_fixed": (plain, lambda _: msr(0x250, 3 << 56), "msrs[0x250]"),
    "msrs.mtrr_default": (plain, lambda _: msr(0x2FF, 0x100), "msrs[0x2ff]"),
    "msrs.mc_ctl": (plain, lambda _: msr(0x400, 5), "msrs[0x400]"),
    "msrs.mcg_ctl": (plain, lambda _: msr(0x17B, 5), "msrs[0x17b]"),
    "msrs.async_pf_lapic": (plain, lambda _: msr(0x4B564D06, 0), "msrs[0x4b564d06]"),
    "msrs.async_pf": (with_apic, lambda _: msr(0x4B564D02, 0x10), "msrs[0x4b564d02]"),
    "msrs.async_pf_int": (with_apic, lambda _: msr(0x4B564D06, 0x100), "msrs[0x4b564d06]"),
    "msrs.steal_time": (plain, lambda _: msr(0x4B564D03, 2), "msrs[0x4b564d03]"),
    "msrs.pv_eoi": (plain, lambda _: msr(0x4B564D04, 2), "msrs[0x4b564d04]"),
    "msrs.no_memory": (plain, lambda _: msr(0x4B564D04, 1), "msrs[0x4b564d04]"),
    "msrs.poll_control": (plain, lambda _: msr(0x4B564D05, 2), "msrs[0x4b564d05]"),
    "msrs.hwcr": (plain, lambda _: msr(0xC0010015, 1), "msrs[0xc0010015]"),
    "msrs.lacking": (plain, lambda _: msr(0x3A, 1 << 63), "msrs[0x3a]"),
    "tsc_khz.slow": (plain, lambda vcpu: (vcpu.tsc_khz // 2).to_bytes(4, "little"), "tsc_khz"),
}

# Not to be provoked on every host, and asked of the model alone.
NESTED = bytes(128)
MODELLED: dict[str, tuple[bytes, Facts, str]] = {
    "xcrs.mpx": (xcr0(0xB), Facts(cpuid=((0xD, 0, 1, 0x1F, 0, 0, 0),), xcr0=0x1F), "xcrs[0].value"),
    "xcrs.amx": (xcr0(0x20003), Facts(cpuid=((0xD, 0, 1, 0x60003, 0, 0, 0),), xcr0=0x60003), "xcrs[0].value"),
    "msrs.pat": (msr(0x277, 2), Facts(vendor="kvm_intel"), "msrs[0x277]"),
    "nested_state.size": (pack("<HHI", 0, 0, 127) + NESTED[8:], Facts(vendor="kvm_intel"), "size"),
    "nested_state.flags": (pack("<HHI", 0x20, 0, 128) + NESTED[8:], Facts(vendor="kvm_intel"), "flags"),
    "nested_state.pending": (pack("<HHI", 2, 0, 128) + NESTED[8:], Facts(vendor="kvm_intel"), "flags"),
    "nested_state.format": (pack("<HHI", 0, 0, 128) + NESTED[8:], Facts(vendor="kvm_amd"), "format"),
}
# No other value of the field would be taken.
HOPELESS = ("lapic.absent", "cpuid.count", "msrs.unknown", "msrs.read_only", "msrs.async_pf_lapic")
# Capabilities that make a rule void.
VOID = {"events.smm": lib.KVM_CAP_X86_SMM, "tsc_khz.slow": lib.KVM_CAP_TSC_CONTROL}


def test_every_rule_has_its_case() -> None:
    assert {rule.name for rule in RULES} == PROVOKED.keys() | MODELLED.keys()
    assert not PROVOKED.keys() & MODELLED.keys()
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.name.startswith(f"{rule.part}."), rule
        assert all((rule.why, rule.source, rule.field)), rule


@pytest.mark.parametrize("name", PROVOKED)
def test_rule_is_the_kernels(host: Host, name: str) -> None:
    make, value, field = PROVOKED[name]
    part = name.partition(".")[0]
    vcpu = make(host)
    if name in VOID and vcpu.vm.check_extension(VOID[name]) > 0:
        pytest.skip("this host has what the rule is about")
    good = b"" if name == "lapic.absent" else get_part(vcpu, part, value(vcpu))
    bad = value(vcpu)
    err = put_part(vcpu, part, bad)
    assert err, "KVM takes it"
    if good and part != "msrs":
        put_part(vcpu, part, good)  # events that were taken in part
    error = explain(vcpu, part, bad, err)
    assert isinstance(error, RefusedStateError)
    assert (error.rule, error.part, error.errno, error.field) == (name, part, err, field)
    assert error.accepted
    assert error.detail
    assert error.call.startswith("KVM_SET_")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.rule, again.part) == (str(error), name, part)
    if part == "lapic" and not good:
        return
    assert get_part(vcpu, part, bad) == good
    if name not in HOPELESS:
        assert repairs(vcpu, part, field, bad, good)


@pytest.mark.parametrize("name", MODELLED)
def test_rule_of_another_host(name: str) -> None:
    data, host_facts, field = MODELLED[name]
    part = name.partition(".")[0]
    assert [(fault.rule, fault.field) for fault in faults(part, data, host_facts)] == [(name, field)]
    other = "kvm_amd" if host_facts.vendor == "kvm_intel" else "kvm_pvm"
    (rule,) = [rule for rule in RULES if rule.name == name]
    if rule.hosts and other not in rule.hosts:
        assert not list(faults(part, data, Facts(vendor=other)))


# ---- every bit ----


@pytest.mark.parametrize("part", ["sregs", "sregs2", "xcrs", "debugregs", "events", "mp_state", "regs", "fpu"])
@pytest.mark.parametrize("irqchip", [False, True])
def test_every_bit_of_a_part(host: Host, part: str, irqchip: bool) -> None:
    # Each bit turned alone: refused by the rules exactly where the kernel refuses it, and by the field it is in.
    vcpu = host.vcpu(irqchip=irqchip)
    bases = [get_part(vcpu, part, b"")]
    if part in ("sregs", "sregs2"):
        bases.append(sregs(vcpu, part, **LONG))
    if part == "events":
        bases.append(events(exception__injected=1, exception__nr=13, flags=0xD))
    for base in bases:
        assert put_part(vcpu, part, base) == 0
        known = facts_of(vcpu, part, facts.decode(part, base))
        seen = 0
        for one in leaves(part, base):
            for bit in range(8 * one.size):
                value = int.from_bytes(one.of(base), "little") ^ 1 << bit
                data = one.set(base, value.to_bytes(one.size, "little"))
                refused = put_part(vcpu, part, data) != 0
                assert put_part(vcpu, part, base) == 0
                found = list(faults(part, data, known))
                assert bool(found) == refused, (one.path, bit, found)
                if refused:
                    seen += 1
                    assert repairs(vcpu, part, found[0].field, data, base), (one.path, bit, found[0])
                    put_part(vcpu, part, base)
        assert seen or part in ("regs", "fpu")


@pytest.mark.parametrize("components", [0, 1, 2, 3])
def test_every_bit_of_the_xsave_header(host: Host, components: int) -> None:
    vcpu = host.vcpu()
    base = xsave(vcpu, 512, "<Q", components)
    known = facts_of(vcpu, "xsave", base)
    nr_refused = 0
    for byte in (*range(24, 28), *range(512, 576)):
        for bit in range(8):
            data = bytearray(base)
            data[byte] ^= 1 << bit
            refused = put_part(vcpu, "xsave", bytes(data)) != 0
            assert bool(list(faults("xsave", bytes(data), known))) == refused, (byte, bit)
            nr_refused += refused
    assert nr_refused >= 8 * 56  # XCOMP_BV and the reserved bytes at least


def test_every_bit_of_the_apic_id(host: Host) -> None:
    for vcpu, is_checked in ((host.x2apic(), True), (host.vcpu(irqchip=True, id=3), False)):
        base = get_part(vcpu, "lapic", b"")
        known = facts_of(vcpu, "lapic", facts.decode("lapic", base))
        for bit in range(32):
            data = lapic(vcpu, int.from_bytes(base[0x20:0x24], "little") ^ 1 << bit)
            refused = put_part(vcpu, "lapic", data) != 0
            assert refused == is_checked == bool(list(faults("lapic", data, known))), bit
            put_part(vcpu, "lapic", base)


# Rules that know what one vendor does; a KVM that takes more is no mistake of theirs.
LOOSE = ("msrs.lacking", "msrs.hwcr", "msrs.mcg_ctl")


@pytest.mark.parametrize("irqchip", [False, True])
def test_every_bit_of_the_msrs_with_rules(host: Host, irqchip: bool) -> None:
    vcpu = host.vcpu(irqchip=irqchip)
    indices = sorted({index for rule in MSR_RULES for index in rule.indices if not rule.hosts})
    compared = 0
    for index in indices:
        base = get_part(vcpu, "msrs", msr(index, 0))
        known = facts_of(vcpu, "msrs", {index: 0})
        (now,) = facts.decode("msrs", base).values()
        for bit in range(64):
            data = msr(index, now ^ 1 << bit)
            refused = put_part(vcpu, "msrs", data) != 0
            found = list(faults("msrs", data, known))
            assert not refused or found, (hex(index), bit)
            if not refused:
                assert not found or found[0].rule in LOOSE, (hex(index), bit, found)
                put_part(vcpu, "msrs", base)
            compared += 1
    assert compared == 64 * len(indices)


def test_every_bit_of_the_address_width_and_components(host: Host) -> None:
    vcpu = host.vcpu()
    for path in ("cpuid[0x80000008].eax", "cpuid[0xd, 0x0].eax"):
        base = get_part(vcpu, "cpuid", b"")
        (one,) = [one for one in leaves("cpuid", base) if one.path == path]
        for bit in range(32):
            data = one.set(base, (int(one.value(base)) ^ 1 << bit).to_bytes(4, "little"))
            err = put_part(vcpu, "cpuid", data)
            put_part(vcpu, "cpuid", base)
            found = [fault.errno for fault in faults("cpuid", data, Facts()) if fault.rule != "cpuid.after_run"]
            assert found == ([err] if err else []), (path, bit)


# ---- what no rule knows ----


@pytest.fixture
def no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "faults", lambda *_: iter(()))


@pytest.mark.usefixtures("no_rules")
@pytest.mark.parametrize("name", [n for n in PROVOKED if n not in (*HOPELESS, "cpuid.after_run")])
def test_without_the_rule_the_field_is_found(host: Host, name: str) -> None:
    make, value, _ = PROVOKED[name]
    part = name.partition(".")[0]
    vcpu = make(host)
    if name in VOID and vcpu.vm.check_extension(VOID[name]) > 0:
        pytest.skip("this host has what the rule is about")
    bad = value(vcpu)
    good = get_part(vcpu, part, bad)
    error = explain(vcpu, part, bad, put_part(vcpu, part, bad))
    assert isinstance(error, RefusedStateError)
    assert error.rule is None
    assert error.field is not None, error
    assert repairs(vcpu, part, error.field, bad, good)


def test_the_bit_at_fault_is_found(host: Host) -> None:
    vcpu = host.vcpu()
    with Scratch(vcpu) as scratch:
        found = search(scratch, "sregs", sregs(vcpu, cr4=1 << 40 | 0x600))
    assert found is not None
    assert (found.field, found.value, found.fix) == ("cr4", 1 << 40 | 0x600, 0x600)


def test_fields_at_fault_together(host: Host) -> None:
    vcpu = host.vcpu()
    bad = bytes(DebugRegs(dr6=1 << 40, dr7=1 << 41, db=[5, 6, 7, 8]))
    with Scratch(vcpu) as scratch:
        found = search(scratch, "debugregs", bad)
        assert found is not None
        assert (found.field, found.together) == ("dr6", ("dr7",))
        assert search(scratch, "debugregs", bad, most=1) is None  # too few trials
        assert search(scratch, "debugregs", bytes(DebugRegs(dr6=1))) is None  # nothing is wrong


# What is wrong with all of a vCPU's MSRs, and what is to be found: the field, whether a value for it, those with it.
# 0x9999 is no MSR, STAR and the others have reserved bits (as the rules know); the order is that of the state.
FAULTY_MSRS: list[tuple[dict[int, int], str, bool, set[str]]] = [
    ({0xC0000082: 1 << 63}, "msrs[0xc0000082]", True, set()),
    ({0x9999: 0}, "msrs[0x9999]", False, set()),
    ({0xC0000082: 1 << 63, 0x2FF: 0x100}, "msrs[0x2ff]", True, {"msrs[0xc0000082]"}),
    ({0xC0000082: 1 << 63, 0x2FF: 0x100, 0x9999: 0}, "msrs[0x2ff]", True, {"msrs[0xc0000082]", "msrs[0x9999]"}),
    ({0x9999 + at: 0 for at in range(3)}, "msrs[0x9999]", False, {"msrs[0x999a]", "msrs[0x999b]"}),
]


@pytest.mark.parametrize(("changes", "field", "has_fix", "together"), FAULTY_MSRS)
def test_of_many_msrs_the_one_at_fault_takes_few_trials(
    host: Host, changes: dict[int, int], field: str, has_fix: bool, together: set[str]
) -> None:
    vcpu = host.vcpu()
    good = Msrs.get(vcpu)
    bad = good.replace(changes)
    assert len(good) > 100
    with Scratch(vcpu) as scratch:
        assert search(scratch, "msrs", bytes(good)) is None
        scratch.trials = 0
        found = search(scratch, "msrs", bytes(bad))
        assert found is not None
        assert (found.field, set(found.together)) == (field, together)
        assert (found.value, found.fix is not None) == (bad[int(field[5:-1], 16)], has_fix)
        # Of each: 8 that halve 255 MSRs, up to 2 for each of 8 halves that are left out, 64 bits and zero; 3 more.
        assert scratch.trials <= (1 + len(together)) * (8 + 16 + 65 + 3)
        for most in range(1, 12):
            begin = scratch.trials
            search(scratch, "msrs", bytes(bad), most=most)
            assert scratch.trials - begin <= most + 1


def test_msrs_that_are_refused_together_are_found(host: Host) -> None:
    # KVM_MTRR and APIC_BASE have no such pair: here KVM refuses SYSENTER_EIP = 7 behind SYSENTER_CS = 5, as it were.
    vcpu = host.vcpu()
    bad = Msrs.get(vcpu).replace({0x174: 5, 0x176: 7})

    class Pair(Scratch):
        def takes(self, part: str, data: bytes) -> bool:
            self.trials += 1
            rows = Msrs.from_bytes(data)
            return (rows.to_dict().get(0x174), rows.to_dict().get(0x176)) != (5, 7)

    with Pair(vcpu) as scratch:
        found = search(scratch, "msrs", bytes(bad))
        assert found is not None
        assert {found.field, *found.together} <= {"msrs[0x174]", "msrs[0x176]"}
        assert found.fix is not None
        assert scratch.trials <= 8 + 4 * 8 + 2 * 65 + 3


@pytest.mark.usefixtures("no_rules")
def test_an_msr_that_there_is_not_is_named_without_a_rule(host: Host) -> None:
    error = explain(host.vcpu(), "msrs", Msrs({0x10: 0, 0x9999: 5}), errno.EPERM)
    assert isinstance(error, RefusedStateError)
    assert (error.field, error.value, error.rule) == ("msrs[0x9999]", 5, None)
    assert "none of its other values" in str(error)
    assert error.accepted == "the MSRs without it"


def test_msrs_are_read_past_those_that_cannot_be(host: Host) -> None:
    # By one KVM_GET_MSRS for as many as it gives; one by one they are the same.
    vcpu = host.vcpu()
    indices = [0x9998, *Msrs.get(vcpu), 0x9999]
    indices[100:100] = [0x999A, 0x999B]
    assert len(indices) > 200
    vcpu.set_msrs({0x174: 0x55})
    like = b"".join([len(indices).to_bytes(8, "little"), *[pack("<IIQ", index, 0, 7) for index in indices]])
    alone = [Msrs.from_bytes(get_part(vcpu, "msrs", msr(index, 7)))[index] for index in indices if index != 0x10]
    whole = Msrs.from_bytes(get_part(vcpu, "msrs", like)).to_dict()
    del whole[0x10]  # the TSC
    assert list(whole.values()) == alone
    assert [whole[index] for index in (0x174, 0x9998, 0x9999, 0x999A, 0x999B)] == [0x55, 0, 0, 0, 0]


@pytest.mark.usefixtures("no_rules")
def test_trying_leaves_nothing_open_and_says_what_goes_together(host: Host) -> None:
    vcpu = host.vcpu()
    before = get_part(vcpu, "debugregs", b""), len(os.listdir("/proc/self/fd"))
    error = explain(vcpu, "debugregs", DebugRegs(dr6=1 << 40, dr7=1 << 41))
    assert "together with dr7" in str(error)
    assert (get_part(vcpu, "debugregs", b""), len(os.listdir("/proc/self/fd"))) == before
    nothing = explain(vcpu, "debugregs", DebugRegs(dr6=1))
    assert isinstance(nothing, RefusedStateError)
    assert (nothing.field, nothing.rule) == (None, None)
    assert "no field was found" in str(nothing)


def test_a_scratch_vcpu_is_like_the_other(host: Host) -> None:
    caps = (lib.KVM_CAP_EXCEPTION_PAYLOAD, lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    for vcpu in (host.vcpu(irqchip=True, caps=caps, id=2), host.vcpu(cpuid=False), host.x2apic()):
        assert put_part(vcpu, "xcrs", xcr0(1)) == 0
        put_part(vcpu, "sregs", sregs(vcpu, cr2=0x1234))
        with Scratch(vcpu) as scratch:
            for part in ("cpuid", "sregs", "xcrs", "regs", "xsave", "debugregs", "events"):
                assert get_part(scratch.vcpu, part, b"") == get_part(vcpu, part, b""), part
            assert scratch.vcpu.id == vcpu.id
        assert scratch.vcpu.closed


@pytest.mark.usefixtures("no_rules")
def test_a_pending_init_stays_pending(host: Host) -> None:
    # KVM_GET_MP_STATE would let it in, and reset the vCPU.
    vcpu = host.vcpu(irqchip=True)
    assert put_part(vcpu, "regs", bytes(Regs(rax=5, rflags=2))) == 0
    assert put_part(vcpu, "events", events(flags=8, smi__latched_init=1)) == 0
    for part, bad in (("debugregs", bytes(DebugRegs(dr7=1 << 40))), ("xcrs", xcr0(2)), ("events", events(flags=64))):
        assert isinstance(explain(vcpu, part, bad), RefusedStateError)
    assert vcpu.regs.rax == 5
    assert vcpu.vcpu_events.smi.latched_init == 1


def test_parts_that_were_put_before_count(host: Host) -> None:
    # XCR0 = 3 is legal with the CPUID that is put with it, and the vCPU has none now.
    vcpu, other = host.vcpu(cpuid=False), host.vcpu()
    bad = xcr0(7 | 1 << 62)
    mine = explain(vcpu, "xcrs", bad)
    with_cpuid = explain(vcpu, "xcrs", bad, among={"cpuid": get_part(other, "cpuid", b"")})
    assert isinstance(mine, RefusedStateError)
    assert isinstance(with_cpuid, RefusedStateError)
    assert "bits of 0x1," in str(mine.accepted)
    assert "bits of 0x1," not in str(with_cpuid.accepted)


# ---- other answers, bad input ----


def test_other_causes(host: Host) -> None:
    vcpu = host.vcpu()
    error = explain(vcpu, "debugregs", DebugRegs(), errno.ENOMEM)
    assert isinstance(error, RefusedStateError)
    assert (error.errno, error.field) == (errno.ENOMEM, None)
    if vcpu.vm.check_extension(lib.KVM_CAP_NESTED_STATE) <= 0:
        nested = explain(vcpu, "nested_state", pack("<HHI", 0, 0, 128) + bytes(120))
        assert isinstance(nested, UnsupportedError)
        assert nested.capability == "KVM_CAP_NESTED_STATE"
    vcpu.close()
    assert isinstance(explain(vcpu, "debugregs", DebugRegs(dr6=1 << 40)), ClosedError)


def test_in_a_child_of_fork(host: Host) -> None:
    vcpu = host.vcpu()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        error = explain(vcpu, "debugregs", DebugRegs(), errno.EIO)
        os.write(writer, type(error).__name__.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 100).decode() == ForkedError.__name__
    os.close(reader)
    os.close(writer)


BAD_INPUT: list[tuple[Any, Any, type[HvError], str]] = [
    ("nothing", DebugRegs(), ArgumentError, "part"),
    (3, DebugRegs(), ArgumentTypeError, "part"),
    ("debugregs", 5, ArgumentTypeError, "value"),
    ("debugregs", 1 << 60, ArgumentTypeError, "value"),  # bytes() of it would be an exbibyte
    ("debugregs", "text", ArgumentTypeError, "value"),
    ("debugregs", None, ArgumentTypeError, "value"),
    ("debugregs", [1, 2], ArgumentTypeError, "value"),
    ("debugregs", b"short", ArgumentError, "data"),
    ("debugregs", Regs(), ArgumentError, "data"),
    ("xsave", bytes(100), ArgumentError, "data"),
    ("msrs", b"", ArgumentError, "data"),
    ("cpuid", pack("<II", 5, 0), ArgumentError, "nent"),
    ("tsc_khz", -1, ArgumentError, "value"),
    ("tsc_khz", 1 << 32, ArgumentError, "value"),
    ("tsc_khz", True, ArgumentTypeError, "value"),
]


@pytest.mark.parametrize(("part", "value", "kind", "field"), BAD_INPUT)
@pytest.mark.parametrize("call", [explain, kept])
def test_bad_input(host: Host, call: Any, part: Any, value: Any, kind: type[HvError], field: str) -> None:
    with pytest.raises(kind) as raised:
        call(host.vcpu(), part, value)
    assert raised.value.field == field  # type: ignore[attr-defined]  # all of these have one


@pytest.mark.parametrize(
    ("options", "kind", "field"),
    [
        ({"vcpu": None}, ArgumentTypeError, "vcpu"),
        ({"errno": "EINVAL"}, ArgumentTypeError, "errno"),
        ({"errno": True}, ArgumentTypeError, "errno"),
        ({"errno": -22}, ArgumentError, "errno"),
        ({"among": 5}, ArgumentTypeError, "among"),
        ({"among": {"nothing": b""}}, ArgumentError, "part"),
        ({"among": {"cpuid": b"abc"}}, ArgumentError, "data"),
    ],
)
def test_bad_options(host: Host, options: dict[str, Any], kind: type[HvError], field: str) -> None:
    with pytest.raises(kind) as raised:
        explain(**{"vcpu": host.vcpu(), "part": "debugregs", "value": DebugRegs(dr7=1 << 40)} | options)
    assert raised.value.field == field  # type: ignore[attr-defined]  # all of these have one


@pytest.mark.parametrize("refused", [True, False])
def test_the_registers_of_an_exit_stay_at_hand(refused: bool) -> None:
    # Who asks for the reason does not make every later reading of a register cost an ioctl.
    need("kvm")
    with Machine(ram="64K") as machine:
        machine.load(0x7C00, bytes.fromhex("e610ebfc"))  # L: out 0x10, al; jmp L
        cpu = machine.vcpu
        cpu.real_mode()
        for call in (explain, kept):
            error = call(cpu, "debugregs", DebugRegs(dr7=1 << 40 if refused else 0x402))
            assert isinstance(error, RefusedStateError if call is explain else ChangedStateError)
        next(machine.exits(5))
        assert not cpu.kvm._is_exposed
        c = cpu.kvm._c
        assert c.fresh & lib.KVM_SYNC_X86_REGS
        assert c.begun == c.seen


# ---- taken, and changed ----


def put_kept(vcpu: Vcpu, part: str, data: bytes) -> ChangedStateError | None:
    assert put_part(vcpu, part, data) == 0
    return kept(vcpu, part, data)


def test_paging_that_is_dropped(host: Host) -> None:
    for part in ("sregs", "sregs2"):
        vcpu = host.vcpu()
        assert put_kept(vcpu, part, sregs(vcpu, part, **LONG)) is None
        error = put_kept(vcpu, part, sregs(vcpu, part, cr0=0x80000011, cr4=0, efer=0))
        if vendor_module() != "kvm_pvm":
            assert error is None
            continue
        assert error is not None
        assert (error.field, error.value, error.became) == ("cr0", 0x80000011, 0x11)
        assert error.rule == f"{part}.pvm-drops-paging"
        assert "LME" in str(error)


def test_other_changes(host: Host) -> None:
    vcpu = host.vcpu()
    error = put_kept(vcpu, "sregs", sregs(vcpu, cr8=0x10))
    assert error is not None
    assert (error.field, error.became, error.rule) == ("cr8", 0, "sregs.cr8-reserved")
    before = facts.RECORDS["sregs"].from_bytes(sregs(vcpu))
    two = bytes(before.replace(interrupt_bitmap=[0, 1 << 5 | 1 << 9, 0, 0]))
    error = put_kept(vcpu, "sregs", two)
    assert error is not None
    assert (error.field, error.became, error.rule) == ("interrupt_bitmap[1]", 1 << 5, "sregs.one-interrupt")
    error = put_kept(vcpu, "events", events(flags=1, nmi__pending=9))
    assert error is not None
    assert (error.field, error.became, error.rule) == ("nmi.pending", 2, None)
    table = pack("<II", 1, 0) + pack("<10I", 0xD, 0, 0, 3, 0xFFFFFFFF, 0, 0, 0, 0, 0)
    error = put_kept(vcpu, "cpuid", table)
    assert error is not None
    assert error.field.startswith(("cpuid[", "nent"))


# (part, bytes that KVM takes, a field of which it keeps another value)
UNMISSED: list[tuple[str, Callable[[Vcpu], bytes], str]] = [
    ("regs", lambda _: bytes(Regs(rflags=0)), "rflags"),
    ("sregs", lambda vcpu: sregs(vcpu, gdt__padding=[1, 2, 3]), "gdt.padding[0]"),
    ("sregs2", lambda vcpu: sregs(vcpu, "sregs2", idt__padding=[1, 2, 3]), "idt.padding[0]"),
    ("sregs2", lambda vcpu: sregs(vcpu, "sregs2", pdptrs=[1, 2, 3, 4]), "pdptrs[0]"),
    ("fpu", lambda _: bytes(facts.RECORDS["fpu"](mxcsr=0x1F80, fcw=0x37F)), "mxcsr"),
    ("fpu", lambda _: bytes(facts.RECORDS["fpu"](pad1=1, pad2=1, fcw=0x37F)), "pad1"),
    ("xcrs", lambda _: xcr0(1, nr_xcrs=2), "nr_xcrs"),
    ("xcrs", lambda _: bytes(Xcrs(nr_xcrs=1, xcrs=[Xcr(value=1), *[Xcr(xcr=5)] * 15])), "xcrs[1].xcr"),
    ("debugregs", lambda _: bytes(DebugRegs(reserved=[1] * 9)), "reserved[0]"),
    ("events", lambda _: events(flags=0, nmi__pad=1), "nmi.pad"),
    ("events", lambda _: events(flags=0, nmi__pending=1), "nmi.pending"),
    ("events", lambda _: events(flags=2, sipi_vector=7), "sipi_vector"),
    ("lapic", lambda vcpu: lapic(vcpu, 0)[:0x30] + bytes(4) + lapic(vcpu, 0)[0x34:], "regs[0x30]"),
    ("xsave", lambda vcpu: xsave(vcpu, 160, "<Q", 5, components=1), "region[160:176]"),
    ("msrs", lambda _: msr(0x10, 0), "msrs[0x10]"),
]


@pytest.mark.parametrize(("part", "value", "path"), UNMISSED)
def test_changes_that_nobody_misses(host: Host, part: str, value: Callable[[Vcpu], bytes], path: str) -> None:
    vcpu = host.vcpu(irqchip=True)
    data = value(vcpu)
    assert put_part(vcpu, part, data) == 0
    now = get_part(vcpu, part, data)
    (one,) = [one for one in leaves(part, data) if one.path == path]
    assert one.of(now) != one.of(data), "KVM keeps it"
    assert kept(vcpu, part, data) is None


def test_changes_are_of_parts_and_fields_that_exist(host: Host) -> None:
    vcpu = host.vcpu(irqchip=True)
    for change in CHANGES:
        data = msr(0x10, 0) + pack("<IIQ", 0x6E0, 0, 0) if change.part == "msrs" else get_part(vcpu, change.part, b"")
        for path in change.paths:
            assert any(one.path.startswith(path) for one in leaves(change.part, data)), (change, path)


def test_leaves_cover_every_byte_once(host: Host) -> None:
    vcpu = host.vcpu(irqchip=True)
    for part in (*facts.RECORDS, "xsave", "cpuid"):
        data = get_part(vcpu, part, b"")
        seen = [at for one in leaves(part, data) for at in range(one.offset, one.offset + one.size)]
        whole = range(len(data))
        if part == "cpuid":
            whole = [at for at in range(8, len(data)) if (at - 8) % 40 < 28]  # type: ignore[assignment]
        assert sorted(seen) == list(whole), part
        assert len({one.path for one in leaves(part, data)}) == len(leaves(part, data)), part


def test_cpuid_leaves_that_are_there_twice() -> None:
    rows = ((1, 0, 0, 1, 2, 3, 4), (1, 0, 0, 5, 6, 7, 8), (7, 1, 1, 0, 0, 0, 0))
    assert rules.cpuid_fields(rows) == ["cpuid[0x1]", "cpuid[0x1]#2", "cpuid[0x7, 0x1]"]


def test_facts_of_a_host_without_the_attribute(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    # Linux before 5.17 has no KVM_X86_XCOMP_GUEST_SUPP; CPUID says the same.
    vcpu = host.vcpu()
    known = facts_of(vcpu, "xcrs", None).xcr0
    monkeypatch.setattr(facts, "_xcomp_attribute", lambda _: None)
    assert facts_of(vcpu, "xcrs", None).xcr0 == known


def test_the_guide_has_every_rule_and_change() -> None:
    text = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text()
    for rule in RULES:
        hosts = f" ({', '.join(rule.hosts)})" if rule.hosts else ""
        if rule.part == "sregs2" and not rule.name.startswith("sregs2.sregs2-"):
            continue  # as of sregs
        assert f"| `{rule.name}` | {rule.field} | {rule.why}{hosts} | {rule.source} |" in text, rule
    for change in CHANGES:
        assert f"| {change.part} | {', '.join(change.paths)} | {change.why} |" in text, change
