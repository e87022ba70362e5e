"""Special registers: each rule provoked on the kernel, every bit alone, random states; other vendors' by model."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hvmodel.arch.legal import (
    CR4_ALWAYS,
    CR4_FEATURES,
    SREGS_RULES,
    VENDORS,
    SregsLimits,
    sregs_answer,
    sregs_changes,
    sregs_repairs,
    sregs_violations,
)
from hvmodel.arch.registers import CR0, CR4, EFER
from hvmodel.errors import ArgumentError, ArgumentTypeError
from tests.cases import cases
from tests.need import need

REAL = {"cr0": 0x60000010}
PROTECTED = {"cr0": 0x11}
PAGED = {"cr0": 0x80000011, "cr4": 0x20, "cr3": 0x1000}
LONG = {"cr0": 0x80000011, "cr4": 0x20, "cr3": 0x1000, "efer": 0x500, "cs.l": 1}
STATES = {"real": REAL, "protected": PROTECTED, "paged": PAGED, "long": LONG}
FIELDS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
PARTS = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable")


class Kernel:
    """A vCPU that is asked, and its limits."""

    def __init__(self, cpuid: str = "all", *, irqchip: bool = False) -> None:
        from hvmodel.kvm import Kvm

        self.kvm = Kvm()
        self.vm = self.kvm.create_vm()
        if irqchip:
            self.vm.ioctl("KVM_CREATE_IRQCHIP")
        self.vcpu = self.vm.create_vcpu()
        self.set_cpuid(cpuid)
        self.fresh = self.vcpu.sregs

    def set_cpuid(self, cpuid: str) -> None:
        entries = self.kvm.supported_cpuid()
        changed = []
        for entry in entries:
            values = {field: getattr(entry, field) for field in entry.fields()}
            if cpuid == "no x2apic" and entry.function == 1:
                values["ecx"] &= ~(1 << 21)
            if cpuid == "40 bits" and entry.function == 0x80000008:
                values["eax"] = values["eax"] & ~0xFF | 40
            changed.append(type(entry)(**values))
        if cpuid != "none":
            self.vcpu.set_cpuid2(changed)

    def limits(self) -> SregsLimits:
        from hvmodel.state.facts import facts_of

        return facts_of(self.vcpu, "sregs", None).limits

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()
        self.kvm.close()

    def struct(self, fields: dict[str, int], second: bool = False) -> Any:
        from hvmodel._ffi import ffi

        given = ffi.new(f"struct kvm_sregs{2 if second else ''} *")
        ffi.memmove(given, self.fresh, ffi.offsetof("struct kvm_sregs", "interrupt_bitmap"))
        for path, value in fields.items():
            *names, last = path.split(".")
            at = given
            for name in names:
                at = getattr(at, name)
            if "[" in last:
                name, _, index = last.rstrip("]").partition("[")
                getattr(at, name)[int(index)] = value
            else:
                setattr(at, last, value)
        return given

    def forget_interrupt(self) -> None:
        events = self.vcpu.vcpu_events
        events.interrupt.injected = 0
        self.vcpu.vcpu_events = events

    def put(self, given: Any, second: bool = False) -> int:
        from hvmodel._ffi import lib

        return lib.kvm_set_sregs2(self.vcpu.fd, given) if second else lib.kvm_set_sregs(self.vcpu.fd, given)


@pytest.fixture(params=["all", "none", "no x2apic", "40 bits"])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    need("kvm")
    found = Kernel(request.param)
    yield found
    found.close()


@pytest.fixture
def one() -> Iterator[Kernel]:
    need("kvm")
    found = Kernel()
    yield found
    found.close()


def leaves(sregs: Any) -> dict[str, int]:
    # The fields that could change, by path; an Sregs has them as attributes.
    found = {name: getattr(sregs, name) for name in FIELDS}
    found |= {f"{name}.{part}": getattr(getattr(sregs, name), part) for name in SEGMENTS for part in PARTS}
    found |= {
        f"{name}.{part}": getattr(getattr(sregs, name), part) for name in ("gdt", "idt") for part in ("base", "limit")
    }
    if hasattr(sregs, "interrupt_bitmap"):
        found |= {f"interrupt_bitmap[{at}]": sregs.interrupt_bitmap[at] for at in range(4)}
    return found


def check(kernel: Kernel, limits: SregsLimits, given: Any, what: object) -> str:
    """The model's answer and the kernel's are the same, what is changed too."""
    from hvmodel._ffi import ffi

    before = ffi.new("struct kvm_sregs *")
    before[0] = kernel.vcpu.sregs[0]
    answer = sregs_answer(given, limits, before)
    rc = kernel.put(given)
    after = leaves(kernel.vcpu.sregs)
    if rc:
        assert rc == -errno.EINVAL
        assert answer == "refused", what
        assert sregs_violations(given, limits)
        assert after == leaves(before), "refused, and the vCPU as before"
        return answer
    assert not sregs_violations(given, limits), what
    predicted = leaves(given) | {change.field: change.became for change in sregs_changes(given, limits, before)}
    assert {path: hex(value) for path, value in after.items() if predicted[path] != value} == {}, what
    assert answer == ("accepted" if after == leaves(given) else "changed"), what
    return answer


@pytest.mark.parametrize("state", STATES)
def test_every_bit_alone(kernel: Kernel, state: str) -> None:
    # Flipped in each field: legal = accepted, and what KVM keeps is what we say.
    limits = kernel.limits()
    if limits.vendor not in VENDORS:
        pytest.skip(f"the vendor module {limits.vendor!r} is not modelled")
    answers = set()
    for field in FIELDS:
        start = getattr(kernel.struct(STATES[state]), field)
        for bit in range(64):
            given = kernel.struct(STATES[state] | {field: start ^ 1 << bit})
            # CR8 and what was changed before would stay.
            kernel.put(kernel.struct({}))
            answers.add(check(kernel, kernel_limits(kernel, limits), given, (state, field, bit)))
    assert {"accepted", "refused"} <= answers


def kernel_limits(kernel: Kernel, limits: SregsLimits) -> SregsLimits:
    # The same with the APIC base that the vCPU has now.
    values = {name: getattr(limits, name) for name in limits.fields()} | {"apic_base": kernel.vcpu.sregs.apic_base}
    return SregsLimits(**values)


@pytest.mark.parametrize("irqchip", [False, True])
def test_random_registers(irqchip: bool) -> None:
    # What is random is bits that decide, bits that do not, whole numbers, and segments with values that no bit has.
    need("kvm")
    kernel = Kernel(irqchip=irqchip)
    limits = kernel.limits()
    if limits.vendor not in VENDORS:
        kernel.close()
        pytest.skip(f"the vendor module {limits.vendor!r} is not modelled")
    rng = random.Random(4)
    answers = {"accepted": 0, "changed": 0, "refused": 0}
    for number in range(cases(1500, 40_000)):
        fields = dict(rng.choice(list(STATES.values())))
        for field in rng.sample(FIELDS, rng.randrange(3)):
            value = fields.get(field, getattr(kernel.fresh, field))
            fields[field] = rng.choice(
                [value ^ 1 << rng.randrange(64), value ^ 1 << rng.randrange(12), rng.getrandbits(64)]
            )
        if rng.random() < 0.2:
            name, part = rng.choice(SEGMENTS), rng.choice(PARTS)
            width = {"base": 64, "limit": 32, "selector": 16}.get(part, rng.choice([1, 8]))
            fields[f"{name}.{part}"] = rng.getrandbits(width)
        if rng.random() < 0.1:
            table = rng.choice(["gdt", "idt"])
            fields[f"{table}.base"], fields[f"{table}.limit"] = rng.getrandbits(64), rng.getrandbits(16)
        if rng.random() < 0.2:
            fields[f"interrupt_bitmap[{rng.randrange(4)}]"] = 1 << rng.randrange(64) | 1 << rng.randrange(64)
        if rng.random() < 0.8:
            kernel.forget_interrupt()
        answers[check(kernel, kernel_limits(kernel, limits), kernel.struct(fields), (number, fields))] += 1
    kernel.close()
    assert min(answers.values()) >= 20, answers


# rule -> (fields that break it and no other, the same fields as they would be taken)
BROKEN = {
    "long-mode-needs-pae": (LONG | {"cr4": 0}, LONG),
    "long-mode-needs-lma": (LONG | {"efer": 0x100}, LONG),
    "cr3-width": (LONG | {"cr3": 1 << 52 | 0x1000}, LONG),
    "lma-without-long-mode": (PROTECTED | {"efer": 0x400}, PROTECTED),
    "cs-l-without-long-mode": (PROTECTED | {"cs.l": 1}, PROTECTED),
    "cr4-reserved": (PROTECTED | {"cr4": 1 << 15}, PROTECTED),
    "cr0-upper-half": (PROTECTED | {"cr0": 0x1_0000_0011}, PROTECTED),
    "cr0-nw-without-cd": (PROTECTED | {"cr0": 0x20000011}, PROTECTED),
    "cr0-pg-without-pe": (PAGED | {"cr0": 0x80000010}, REAL),
    "apic-base-reserved": ({"apic_base": 0xFEE00A00}, {"apic_base": 0xFEE00800}),
    "apic-base-x2apic-off": ({"apic_base": 0xFEE00400}, {"apic_base": 0xFEE00C00}),
}
BROKEN2 = {
    "sregs2-flags": (PROTECTED | {"flags": 2}, PROTECTED),
    "sregs2-pdptrs": (PROTECTED | {"flags": 1}, PAGED | {"flags": 1}),
}


def test_every_rule_is_provoked_here_or_is_another_vendors() -> None:
    refusing = {name for name, rule in SREGS_RULES.items() if rule.refuses}
    assert refusing == BROKEN.keys() | BROKEN2.keys()
    assert all(name == rule.name and rule.looks_at and rule.text and rule.source for name, rule in SREGS_RULES.items())


@pytest.mark.parametrize("rule", [*BROKEN, *BROKEN2])
def test_a_rule(one: Kernel, rule: str) -> None:
    second = rule in BROKEN2
    bad, good = (BROKEN2 if second else BROKEN)[rule]
    limits = one.limits()
    given = one.struct(bad, second)
    (violation,) = sregs_violations(given, limits)
    assert violation.rule == rule
    assert violation.field in SREGS_RULES[rule].looks_at
    assert f"{violation.field}={violation.value:#x}" in str(violation)
    assert one.put(given, second) == -errno.EINVAL
    fixed = one.struct(good, second)
    assert sregs_violations(fixed, limits) == []
    assert one.put(fixed, second) == 0
    # A mapping of paths says the same as the struct.
    as_dict = {"apic_base": one.fresh.apic_base} | bad
    assert sregs_violations(as_dict, limits) == [violation]


def test_repairs_are_what_the_kernel_takes(one: Kernel) -> None:
    # Of random refused states; where there is none, no field alone does it: its deciding bits are tried one by one.
    limits = one.limits()
    rng = random.Random(5)
    repaired = hopeless = 0
    for _ in range(cases(400, 5000)):
        fields = dict(rng.choice(list(STATES.values())))
        for field in rng.sample(FIELDS, rng.randrange(1, 4)):
            fields[field] = fields.get(field, getattr(one.fresh, field)) ^ 1 << rng.randrange(64)
        given = one.struct(fields)
        repairs = sregs_repairs(given, limits)
        if not sregs_violations(given, limits):
            assert repairs == []
            continue
        for repair in repairs:
            assert one.put(one.struct(fields | {repair.field: repair.value})) == 0, (fields, repair)
            repaired += 1
        if not repairs:
            hopeless += 1
            for field in ("cr0", "cr3", "cr4", "efer", "apic_base"):
                value = getattr(given, field)
                for other in (0, *[value ^ 1 << bit for bit in range(64)]):
                    assert one.put(one.struct(fields | {field: other})) == -errno.EINVAL, (fields, field, other)
    assert repaired > 100
    assert hopeless > 10


def test_the_first_repair_changes_least() -> None:
    state = LONG | {"cr4": 0}
    repairs = sregs_repairs(state | {"cs.l": 0}, SregsLimits())
    assert (repairs[0].field, repairs[0].value) == ("cr4", 0x20)
    assert sregs_repairs(LONG, SregsLimits()) == []
    assert sregs_repairs({"cr4": 1 << 15, "apic_base": 1}, SregsLimits()) == []


def test_an_apic_base_that_is_there_is_taken_again(one: Kernel) -> None:
    # x2APIC mode, and then a CPUID without x2APIC.
    one.put(one.struct({"apic_base": 0xFEE00D00}))
    one.set_cpuid("no x2apic")
    given = one.struct({"apic_base": 0xFEE00D00})
    limits = one.limits()
    assert not limits.x2apic
    assert sregs_violations(given, kernel_limits(one, limits)) == []
    assert [v.rule for v in sregs_violations(given, SregsLimits(phys_bits=46))] == ["apic-base-reserved"]
    assert one.put(given) == 0
    one.put(one.struct({}))
    assert one.put(given) == -errno.EINVAL


def test_an_interrupt_stays(one: Kernel) -> None:
    first = one.struct({"interrupt_bitmap[0]": 1 << 40 | 1 << 50, "interrupt_bitmap[3]": 1})
    limits = one.limits()
    assert [(c.field, c.became) for c in sregs_changes(first, limits)] == [
        ("interrupt_bitmap[0]", 1 << 40),
        ("interrupt_bitmap[3]", 0),
    ]
    assert one.put(first) == 0
    none = one.struct({})
    (stays,) = sregs_changes(none, limits, one.vcpu.sregs)
    assert (stays.rule, stays.became) == ("one-interrupt", 1 << 40)
    assert one.put(none) == 0
    assert one.vcpu.sregs.interrupt_bitmap[0] == 1 << 40


# ---- what the limits are made of ----

ONES = 0xFFFFFFFF
FULL = [(leaf, sub, 1, ONES, ONES, ONES, ONES) for leaf in (1, 7, 0x80000001) for sub in (0, 1)]


def test_bits_of_cr4_go_by_features_of_guest_and_kvm() -> None:
    # linux:arch/x86/kvm/x86.h __cr4_reserved_bits: each feature alone gives its bit, and no other.
    assert SregsLimits.of([]).cr4_allowed == CR4_ALWAYS
    everything = CR4_ALWAYS | sum(int(bit) for bit in CR4_FEATURES)
    for vendor in ("", "kvm_intel", "kvm_amd"):
        assert SregsLimits.of(FULL, vendor=vendor).cr4_allowed == everything
        assert SregsLimits.of(FULL, [], vendor=vendor).cr4_allowed == CR4_ALWAYS
        assert SregsLimits.of([], FULL, vendor=vendor).cr4_allowed == CR4_ALWAYS
    # CPUID.7.0 ECX bit 16: LA57; bit 7: shadow stacks; 1 ECX bit 17: PCID (Intel SDM volume 2, CPUID).
    for entry, bit in (
        ((7, 0, 1, 0, 0, 1 << 16, 0), CR4.LA57),
        ((7, 0, 1, 0, 0, 1 << 7, 0), CR4.CET),
        ((7, 0, 1, 0, 0, 0, 1 << 20), CR4.CET),
        ((7, 0, 1, 0, 1 << 7, 0, 0), CR4.SMEP),
        ((7, 1, 1, 1 << 26, 0, 0, 0), CR4.LAM_SUP),
        ((1, 0, 0, 0, 0, 1 << 17, 0), CR4.PCIDE),
        ((1, 0, 0, 0, 0, 1 << 5, 0), CR4.VMXE),
        ((1, 0, 0, 0, 0, 1 << 26, 0), CR4.OSXSAVE),
    ):
        assert SregsLimits.of([entry], vendor="kvm_intel").cr4_allowed == CR4_ALWAYS | bit


def test_kvm_pvm_goes_by_the_processor() -> None:
    limits = SregsLimits.of(FULL, FULL, vendor="kvm_pvm", processor=["smep", "pku", "vmx", "pcid", "ibt"])
    assert limits.cr4_allowed == CR4_ALWAYS | CR4.SMEP | CR4.PKE
    assert not SregsLimits.of([], vendor="kvm_pvm").cr4_allowed & CR4.LA57


def test_lam_and_width_of_cr3() -> None:
    wide = LONG | {"cr3": 3 << 61 | 0x1000}
    assert sregs_answer(wide, SregsLimits(phys_bits=46, lam=True)) == "accepted"
    (violation,) = sregs_violations(wide, SregsLimits(phys_bits=46))
    assert violation.rule == "cr3-width"
    assert "0x6000000000000000" in violation.detail
    assert sregs_answer(LONG | {"cr3": 1 << 46}, SregsLimits(phys_bits=46)) == "refused"
    assert sregs_answer(PROTECTED | {"cr3": 1 << 63}, SregsLimits()) == "accepted"  # not looked at


def test_only_kvm_pvm_drops_paging() -> None:
    for vendor in ("", *VENDORS):
        answer = sregs_answer(PAGED, SregsLimits(vendor))
        assert answer == ("changed" if vendor == "kvm_pvm" else "accepted")
        assert sregs_answer(LONG, SregsLimits(vendor)) == "accepted"


def segments(**changed: int) -> Any:
    # Registers of protected mode, all of whose segments are flat and present, but for one field of DS.
    flat = {"base": 0, "limit": 0xFFFFFFFF, "selector": 8, "type": 3, "present": 1, "dpl": 0, "db": 1, "s": 1, "l": 0}
    flat |= {"g": 1, "avl": 0, "unusable": 0}
    found = {name: SimpleNamespace(**flat) for name in SEGMENTS}
    found["ds"] = SimpleNamespace(**flat | changed)
    return SimpleNamespace(cr0=0x11, cr3=0, cr4=0, cr8=0, efer=0, apic_base=0, **found)


@pytest.mark.parametrize(
    ("vendor", "changed", "became"),
    [
        # vmx.c: type 3:0, unusable where it is so or not present, present the opposite; accessed where unrestricted
        ("kvm_intel", {}, {}),
        ("kvm_intel", {"type": 2}, {"ds.type": 3}),
        ("kvm_intel", {"present": 0}, {"ds.unusable": 1}),
        ("kvm_intel", {"unusable": 1}, {"ds.present": 0}),
        ("kvm_intel", {"type": 0x13}, {"ds.type": 3}),
        # svm.c: not present where it is unusable, unusable the opposite of present, G by the limit, accessed if usable
        ("kvm_amd", {}, {}),
        ("kvm_amd", {"type": 2}, {"ds.type": 3}),
        ("kvm_amd", {"unusable": 1}, {"ds.present": 0}),
        ("kvm_amd", {"present": 0, "type": 2}, {"ds.unusable": 1}),
        ("kvm_amd", {"limit": 0xFFFF}, {"ds.g": 0}),
        ("kvm_pvm", {"type": 0x12, "present": 0}, {}),
        ("", {"type": 2}, {}),
    ],
)
def test_segments_of_other_vendors(vendor: str, changed: dict[str, int], became: dict[str, int]) -> None:
    found = sregs_changes(segments(**changed), SregsLimits(vendor))
    assert {change.field: change.became for change in found} == became


def test_segments_that_are_special() -> None:
    # VMX: the LDT is not marked as accessed; real mode without its help keeps all.  SVM: TR is busy, SS loses D.
    state = segments()
    state.ldt.type = 2
    assert sregs_changes(state, SregsLimits("kvm_intel")) == []
    state.ds.type = 2
    assert sregs_changes(state, SregsLimits("kvm_intel", unrestricted=False)) == []
    state.ds.unusable, state.cr0 = 1, 0x10
    assert sregs_changes(state, SregsLimits("kvm_intel", unrestricted=False)) == []
    assert sregs_changes(state, SregsLimits("kvm_intel"))
    state = segments()
    state.tr.type, state.ss.unusable = 9, 1
    assert {c.field: c.became for c in sregs_changes(state, SregsLimits("kvm_amd"))} == {
        "tr.type": 11,
        "ss.present": 0,
        "ss.db": 0,
    }


def test_bad_input() -> None:
    limits = SregsLimits()
    for call in (sregs_violations, sregs_changes, sregs_answer, sregs_repairs):
        with pytest.raises(ArgumentTypeError, match="limits"):
            call({}, None)  # type: ignore[arg-type]
        for value in ("1", None, 1.5):
            with pytest.raises(ArgumentTypeError, match="cr4"):
                call({"cr4": value}, limits)
        for value in (-1, 1 << 64):
            with pytest.raises(ArgumentError, match="cr4"):
                call({"cr4": value}, limits)
        for nothing in (None, 5, "cr0", [], object(), SimpleNamespace(cr0=1)):
            with pytest.raises(ArgumentTypeError, match="struct kvm_sregs"):
                call(nothing, limits)
        for path in ("CR0", "cr5", "cs", "cs.L", "interrupt_bitmap", 0):
            with pytest.raises(ArgumentError, match="no such field"):
                call({path: 1}, limits)
        with pytest.raises(ArgumentError, match="phys_bits"):
            call({}, SregsLimits(phys_bits=-1))
    for call in (sregs_changes, sregs_answer):
        for path in ("cr8", "interrupt_bitmap[3]"):
            with pytest.raises(ArgumentError, match="2\\*\\*64-1"):
                call({path: 1 << 64}, limits)
            with pytest.raises(ArgumentTypeError, match="an int"):
                call({path: "1"}, limits)
    with pytest.raises(ArgumentError):
        sregs_violations({"flags": -1 - 1}, limits)
    for arguments in ({"vendor": None}, {"processor": "smep pcid"}, {"guest": None}):
        with pytest.raises(ArgumentTypeError, match=next(iter(arguments))):
            SregsLimits.of(**{"guest": [], **arguments})  # type: ignore[arg-type]
    # Nothing at all is a processor in real mode.
    assert sregs_violations({}, limits) == []


def test_a_dict_may_have_every_path_of_the_structs() -> None:
    from hvmodel.state import Sregs, Sregs2

    for record in (Sregs(cr0=0x80000010), Sregs2(cr0=0x80000010)):
        paths = dict(record.items())
        assert [v.rule for v in sregs_violations(paths, SregsLimits())] == ["cr0-pg-without-pe"]
    (change,) = sregs_changes({"interrupt_bitmap[1]": 3}, SregsLimits())
    assert (change.field, change.became) == ("interrupt_bitmap[1]", 1)


def test_members_of_the_classes_of_bits_are_numbers() -> None:
    state = {"cr0": CR0.PE | CR0.PG, "cr4": CR4.PAE, "efer": EFER.LME}
    (violation,) = sregs_violations(state, SregsLimits())
    assert (violation.field, violation.value, type(violation.value)) == ("efer", 0x100, int)
    assert sregs_violations(state | {"efer": EFER.LME | EFER.LMA}, SregsLimits()) == []


def test_a_reserved_bit_of_the_apic_base_is_named_alone() -> None:
    # Bit 9 is reserved; EXTD, bit 10, goes with x2APIC only.
    for x2apic, bits, said in ((True, 0x200, False), (False, 0x200, False), (False, 0x400, True)):
        state = {"apic_base": 0xFEE00800 | bits}
        (violation,) = sregs_violations(state, SregsLimits(x2apic=x2apic))
        assert ("no x2APIC" in violation.detail) == said


def test_what_is_missing_is_said_by_vendor() -> None:
    for vendor, words in (
        ("kvm_pvm", "kvm_pvm does not offer SMEP here"),
        ("kvm_intel", "without SMEP in the guest's"),
    ):
        (violation,) = sregs_violations({"cr4": CR4.SMEP}, SregsLimits(vendor))
        assert words in violation.detail


def test_repairs_of_cr3_keep_what_may_be_there() -> None:
    # Bits 62:61 are LAM's; bit 50 is beyond 46 bits of address.
    state = LONG | {"cr3": 1 << 62 | 1 << 50 | 0x1000}
    for lam, wanted in ((True, 1 << 62 | 0x1000), (False, 0x1000)):
        found = {repair.field: repair.value for repair in sregs_repairs(state, SregsLimits(phys_bits=46, lam=lam))}
        assert found["cr3"] == wanted


def test_widths_of_addresses() -> None:
    # The width is 8 bits of a register (CPUID 0x80000008 EAX 7:0).
    assert sregs_violations({}, SregsLimits(phys_bits=255)) == []
    with pytest.raises(ArgumentError, match="phys_bits"):
        sregs_violations({}, SregsLimits(phys_bits=256))
    (violation,) = sregs_violations(LONG | {"cr3": 1 << 62 | 1 << 50}, SregsLimits(phys_bits=46, lam=True))
    assert violation.detail.endswith(f": {1 << 50:#x}")  # bit 62 is LAM's
    # Of no bits only 0 is left.
    found = sregs_repairs(LONG | {"cr3": 1}, SregsLimits(phys_bits=0))
    assert {repair.field: repair.value for repair in found}["cr3"] == 0


@pytest.mark.parametrize("path", ["cr0", "cr3", "cr4", "efer", "cs.l", "apic_base", "flags"])
def test_each_field_has_64_bits(path: str) -> None:
    for value in (-1, 1 << 64):
        with pytest.raises(ArgumentError) as caught:
            sregs_violations({path: value}, SregsLimits())
        assert (caught.value.field, caught.value.value) == (path, value)


def test_a_guest_without_a_width_has_36_bits() -> None:
    # KVM's cpuid_query_maxphyaddr where CPUID has no leaf 0x80000008 (arch/x86/kvm/cpuid.c@v6.18): the first processors
    # with PAE had 36.
    assert SregsLimits().phys_bits == SregsLimits.of([]).phys_bits == 36


@pytest.mark.parametrize("x2apic", [False, True])
def test_what_an_apic_base_may_have(x2apic: bool) -> None:
    # Bits 7:0 and 9 are reserved, 10 goes with x2APIC, and from the width of an address on all are (SDM volume 3,
    # figure 12-26); each bit alone, with the APIC enabled (11).
    limits = SregsLimits(phys_bits=40, x2apic=x2apic)
    allowed = {8, *range(11, 40), *([10] if x2apic else [])}
    for bit in range(64):
        base = {"cr0": 0x60000010, "apic_base": 1 << bit | 1 << 11}
        broken = [one for one in sregs_violations(base, limits) if one.field == "apic_base"]
        assert bool(broken) == (bit not in allowed), bit
        for one in broken:
            accepted = one.accepted or ""
            assert hex(sum(1 << bit for bit in allowed)) in accepted or bit == 10, (bit, accepted)


@pytest.mark.parametrize("field", ["cr0", "cr3", "cr4", "efer", "cs.l", "apic_base", "flags"])
def test_a_field_that_is_not_given_is_0(field: str) -> None:
    rng = random.Random(7)
    for _ in range(300):
        state = {
            "cr0": rng.choice([0, 1, 0x80000001, 0x60000010]),
            "cr3": rng.choice([0, 0x1000, 1 << 60]),
            "cr4": rng.choice([0, 0x20]),
            "efer": rng.choice([0, 0x100, 0x500]),
            "cs.l": rng.choice([0, 1]),
            "apic_base": rng.choice([0, 0xFEE00900, 0xFEE00400]),
            "flags": rng.choice([0, 1]),
        }
        absent = {name: value for name, value in state.items() if name != field}
        assert sregs_violations(absent, SregsLimits()) == sregs_violations(absent | {field: 0}, SregsLimits())
