"""Which special registers KVM takes: the model of the checks behind KVM_SET_SREGS and KVM_SET_SREGS2.

Pure: numbers in, answers out.  `SregsLimits` is what the answer depends on beside the registers: the vendor module, the
width of addresses, the bits of CR4 there are.  Three answers are possible:

    refused    EINVAL, the vCPU is as before; `sregs_violations` says which rules are broken
    changed    KVM takes it and keeps another value; `sregs_changes` says which fields, and what they become
    accepted   what GET gives is what SET got

and `sregs_repairs` says which field, changed alone, makes a refused state one that KVM takes.

The registers are anything with the attributes of struct kvm_sregs or kvm_sregs2 (hvmodel.state.Sregs, Sregs2, or cffi's
struct), or a dict of paths to numbers, as {"cr0": 0x11, "cs.l": 0}, in which a missing field is 0; what is changed of
segments is not said of a dict, nor of padding, which KVM makes 0, of either.

What KVM does not look at stays out: reserved bits of CR0 below bit 32 and of EFER are taken as they are, CR2, segments
and descriptor tables are never refused.  Not modelled: a vCPU in nested VMX operation or in SMM, for which CR0 and CR4
have further rules, and SEV guests, whose registers KVM does not have.

Source: linux:arch/x86/kvm/x86.c (kvm_is_valid_sregs, __set_sregs_common, __set_sregs, __set_sregs2), x86.h
(__cr4_reserved_bits), cpuid.h (kvm_vcpu_is_legal_cr3), lapic.c (kvm_apic_set_base), vmx/vmx.c (__vmx_set_segment,
vmx_get_segment), svm/svm.c (svm_set_segment, svm_get_segment), all @v6.18.  What kvm_pvm does was found by trying.
"""

from __future__ import annotations

from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .cpuid import _list, has_feature, max_phys_bits
from .number import ALL, number
from .registers import APIC_BASE, CR0, CR3, CR4, CR8, EFER, bit_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .cpuid import Entry

__all__ = [
    "CR4_ALWAYS",
    "CR4_FEATURES",
    "SREGS_RULES",
    "VENDORS",
    "Change",
    "Repair",
    "Rule",
    "SregsLimits",
    "Violation",
    "sregs_answer",
    "sregs_changes",
    "sregs_repairs",
    "sregs_violations",
]

VENDORS = ("kvm_intel", "kvm_amd", "kvm_pvm")

# As plain ints: arithmetic on members of an IntFlag costs twenty times as much.
_PE, _NW, _CD, _PG = int(CR0.PE), int(CR0.NW), int(CR0.CD), int(CR0.PG)
_PAE = int(CR4.PAE)
_LME, _LMA = int(EFER.LME), int(EFER.LMA)
_LAM = int(CR3.LAM_U48 | CR3.LAM_U57)
_EXTD, _EN = int(APIC_BASE.EXTD), int(APIC_BASE.EN)
_TPL = int(CR8.TPL)
_APIC_RESERVED = 0x2FF  # bits 9 and 7:0
_PDPTRS_VALID = 1  # KVM_SREGS2_FLAGS_PDPTRS_VALID
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_BITMAP = tuple([f"interrupt_bitmap[{at}]" for at in range(4)])
# fields of a segment -> the bits of them that processors have
_BITS_OF = {"type": 15, "present": 1, "dpl": 3, "db": 1, "s": 1, "l": 1, "g": 1, "avl": 1, "unusable": 1}

# Every path of struct kvm_sregs and kvm_sregs2 but interrupt_bitmap, pdptrs and padding, which are arrays.
_PATHS = frozenset(
    [
        *("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "flags"),
        *[f"{table}.{field}" for table in ("gdt", "idt") for field in ("base", "limit")],
        *[f"{name}.{field}" for name in _SEGMENTS for field in ("base", "limit", "selector", *_BITS_OF)],
    ]
)
_ARRAYS = ("interrupt_bitmap[", "pdptrs[", "gdt.padding[", "idt.padding[")

# Bits of CR4 that need no feature.
CR4_ALWAYS = int(
    CR4.VME | CR4.PVI | CR4.TSD | CR4.DE | CR4.PSE | CR4.PAE | CR4.MCE | CR4.PGE | CR4.PCE | CR4.OSFXSR | CR4.OSXMMEXCPT
)

# Each other bit that KVM knows -> the features of which one must be there, in the guest's CPUID and in what KVM offers.
CR4_FEATURES: dict[CR4, tuple[str, ...]] = {
    CR4.UMIP: ("UMIP",),
    CR4.LA57: ("LA57",),
    CR4.VMXE: ("VMX",),
    CR4.FSGSBASE: ("FSGSBASE",),
    CR4.PCIDE: ("PCID",),
    CR4.OSXSAVE: ("XSAVE",),
    CR4.SMEP: ("SMEP",),
    CR4.SMAP: ("SMAP",),
    CR4.PKE: ("PKU",),
    CR4.CET: ("SHSTK", "IBT"),
    CR4.LAM_SUP: ("LAM",),
}

# kvm_pvm goes by the processor's features, whatever the guest's CPUID says, and does not offer all of them.
_PVM_CR4 = (CR4.UMIP, CR4.LA57, CR4.FSGSBASE, CR4.OSXSAVE, CR4.SMEP, CR4.SMAP, CR4.PKE)


class Rule(Value):
    """A rule for special registers: `looks_at` has its fields, `text` says what must hold, `source` where that is.

    `refuses`: a state that breaks it is refused; else KVM takes the state and changes it.
    """

    name: str
    looks_at: tuple[str, ...]
    text: str
    source: str
    refuses: bool = True


def _rules(*rules: Rule) -> dict[str, Rule]:
    return {rule.name: rule for rule in rules}


_VALID = "x86.c kvm_is_valid_sregs"
_VALID_CR0 = "x86.c kvm_is_valid_cr0"
_APIC = "lapic.c kvm_apic_set_base"

# name -> rule: those that refuse, in the order in which KVM asks; then those by which a value is changed.
SREGS_RULES: dict[str, Rule] = _rules(
    Rule("sregs2-flags", ("flags",), "only bit 0 (PDPTRS_VALID) of flags is known", "x86.c __set_sregs2"),
    Rule("sregs2-pdptrs", ("flags", "cr0", "cr4", "efer"), "PDPTRs go with PAE paging only", "x86.c __set_sregs2"),
    Rule("long-mode-needs-pae", ("cr4", "cr0", "efer"), "with EFER.LME and CR0.PG, CR4.PAE is set", _VALID),
    Rule("long-mode-needs-lma", ("efer", "cr0"), "with EFER.LME and CR0.PG, EFER.LMA is set", _VALID),
    Rule("cr3-width", ("cr3", "cr0", "efer"), "in long mode CR3 is no wider than physical addresses", _VALID),
    Rule("lma-without-long-mode", ("efer", "cr0"), "without EFER.LME and CR0.PG, EFER.LMA is clear", _VALID),
    Rule("cs-l-without-long-mode", ("cs.l", "cr0", "efer"), "without EFER.LME and CR0.PG, CS.L is clear", _VALID),
    Rule("cr4-reserved", ("cr4",), "each bit of CR4 has its feature, in the guest's CPUID and in KVM", _VALID),
    Rule("cr0-upper-half", ("cr0",), "bits 63:32 of CR0 are clear", _VALID_CR0),
    Rule("cr0-nw-without-cd", ("cr0",), "with CR0.NW, CR0.CD is set", _VALID_CR0),
    Rule("cr0-pg-without-pe", ("cr0",), "with CR0.PG, CR0.PE is set", _VALID_CR0),
    Rule("apic-base-reserved", ("apic_base",), "reserved bits are clear; EXTD goes with x2APIC in CPUID", _APIC),
    Rule("apic-base-x2apic-off", ("apic_base",), "with APIC_BASE.EXTD, APIC_BASE.EN is set", _APIC),
    Rule("pvm-drops-paging", ("cr0", "efer"), "without EFER.LME kvm_pvm clears CR0.PG", "found by trying", False),
    Rule("cr8-reserved", ("cr8",), "a CR8 above 15 is ignored, and the one before stays", "x86.c kvm_set_cr8", False),
    Rule(
        "one-interrupt",
        ("interrupt_bitmap",),
        "the lowest interrupt is kept; with none, the one before stays",
        "x86.c __set_sregs",
        False,
    ),
    Rule(
        "vmx-segment",
        _SEGMENTS,
        "VMX marks what is not present as unusable, and what is usable as accessed",
        "vmx/vmx.c vmx_segment_access_rights, vmx_get_segment",
        False,
    ),
    Rule(
        "svm-segment",
        _SEGMENTS,
        "SVM marks what is unusable as not present, and makes the bits G, accessed and busy",
        "svm/svm.c svm_set_segment, svm_get_segment",
        False,
    ),
)


class SregsLimits(Value):
    """What special registers are measured against, beside each other.

    `vendor`: one of `VENDORS`, or "" for another, which is taken to do what KVM's common part does.  `phys_bits`: width
    of a physical address, by the guest's CPUID.  `cr4_allowed`: the bits of CR4 that may be set.  `x2apic`, `lam`:
    whether the guest has these features.  `unrestricted`: VMX runs real mode itself (parameter unrestricted_guest of
    kvm_intel).  `apic_base`: the one that the vCPU has, which is taken again without a look; None: not known.
    """

    vendor: str = ""
    phys_bits: int = 36
    cr4_allowed: int = CR4_ALWAYS
    x2apic: bool = False
    lam: bool = False
    unrestricted: bool = True
    apic_base: int | None = None

    @classmethod
    def of(
        cls,
        guest: Iterable[Entry],
        supported: Iterable[Entry] | None = None,
        *,
        vendor: str = "",
        processor: Iterable[str] | None = None,
        unrestricted: bool = True,
        apic_base: int | None = None,
    ) -> SregsLimits:
        """The limits of a vCPU.

        `guest`: its CPUID as KVM_GET_CPUID2 gives it; nothing where it was not set, which KVM takes for no features and
        36 bits of physical address (before Linux 6.14 every feature of KVM's counted then).  `supported`:
        KVM_GET_SUPPORTED_CPUID; a feature counts where both have it; None: what the guest has, KVM has.  `processor`:
        the flags of /proc/cpuinfo, by which kvm_pvm goes whatever the guest's CPUID says; None: all but 5-level paging.

        ArgumentTypeError: `vendor` is no str; the others are no entries, no words.

        >>> limits = SregsLimits.of([], vendor="kvm_pvm", processor=["smep", "pcid"])
        >>> bit_names(CR4, limits.cr4_allowed & ~CR4_ALWAYS), limits.phys_bits
        (('CR4.SMEP',), 36)
        """
        if not isinstance(vendor, str):
            raise ArgumentTypeError("SregsLimits.of", "vendor", vendor, f"one of {', '.join(VENDORS)}, or another name")
        if isinstance(processor, str):
            raise ArgumentTypeError("SregsLimits.of", "processor", processor, "words, as those of /proc/cpuinfo")
        if guest is None:
            raise ArgumentTypeError("SregsLimits.of", "guest", guest, "the entries of KVM_GET_CPUID2")
        mine = _list("SregsLimits.of", "guest", guest)
        offered = mine if supported is None else _list("SregsLimits.of", "supported", supported)

        def has(name: str) -> bool:
            return has_feature(mine, name) and has_feature(offered, name)

        allowed = CR4_ALWAYS
        if vendor == "kvm_pvm":
            flags = None if processor is None else {flag.upper() for flag in processor}
            for bit in _PVM_CR4:
                if bit is not CR4.LA57 if flags is None else not flags.isdisjoint(CR4_FEATURES[bit]):
                    allowed |= int(bit)
            # The x2APIC is KVM's own, and LAM is not offered.
            x2apic, lam = has_feature(mine, "X2APIC"), False
        else:
            for bit, names in CR4_FEATURES.items():
                if any(has(name) for name in names):
                    allowed |= int(bit)
            x2apic, lam = has("X2APIC"), has("LAM")
        return cls(vendor, max_phys_bits(mine), allowed, x2apic, lam, unrestricted, apic_base)


class Violation(Value):
    """A broken rule: the field that KVM looks at, its value, the rule's name, what would be accepted, what is wrong."""

    field: str
    value: int
    rule: str
    accepted: str
    detail: str

    def __str__(self) -> str:
        return f"{self.field}={self.value:#x}: {self.detail}; accepted: {self.accepted}"


class Change(Value):
    """A field of which KVM keeps another value than it was given: `became`."""

    field: str
    value: int
    became: int
    rule: str

    def __str__(self) -> str:
        return f"{self.field}={self.value:#x} becomes {self.became:#x}: {SREGS_RULES[self.rule].text}"


class Repair(Value):
    """A field that, given `value` instead, makes the state one that KVM takes."""

    field: str
    value: int


def _read(sregs: Any, path: str) -> int:
    # A field by its path; 0 where a dict has none, and for flags in the older struct.
    if isinstance(sregs, dict):
        return number("sregs", path, sregs.get(path, 0))
    value = sregs
    try:
        for name in path.split("."):
            value = getattr(value, name)
    except AttributeError:
        if path == "flags":
            return 0
        accepted = "an object with the fields of struct kvm_sregs, or a dict of their paths"
        raise ArgumentTypeError("sregs", path, sregs, accepted) from None
    return number("sregs", path, value)


_CORE = ("cr0", "cr3", "cr4", "efer", "cs.l", "apic_base", "flags")


def _core(sregs: Any) -> tuple[int, ...]:
    # The fields that can be refused; `flags` is 0 in what is no sregs2, which breaks no rule.
    if isinstance(sregs, dict):
        if not sregs.keys() <= _PATHS:
            _check_paths(sregs)
        get = sregs.get
        return (
            get("cr0", 0), get("cr3", 0), get("cr4", 0), get("efer", 0), get("cs.l", 0), get("apic_base", 0),
            get("flags", 0),
        )  # fmt: skip
    return tuple([_read(sregs, path) for path in _CORE])


def _check_paths(sregs: dict[Any, Any]) -> None:
    for path, value in sregs.items():
        is_array = isinstance(path, str) and (path.startswith(_ARRAYS) or path.endswith(".padding"))
        if path not in _PATHS and not is_array:
            raise ArgumentError("sregs", f"{path}", value, "paths as cr0, cs.l, interrupt_bitmap[0]", "no such field")


def _broken(core: tuple[int, ...], limits: SregsLimits) -> list[str]:
    # Names of the broken rules, in KVM's order.
    cr0, cr3, cr4, efer, l_bit, apic_base, flags = core
    broken = []
    if flags:
        if flags & ~_PDPTRS_VALID:
            broken.append("sregs2-flags")
        if flags & _PDPTRS_VALID and (not cr0 & _PG or not cr4 & _PAE or efer & _LMA):
            broken.append("sregs2-pdptrs")
    if efer & _LME and cr0 & _PG:
        if not cr4 & _PAE:
            broken.append("long-mode-needs-pae")
        if not efer & _LMA:
            broken.append("long-mode-needs-lma")
        if (cr3 & ~_LAM if limits.lam else cr3) >> limits.phys_bits:
            broken.append("cr3-width")
    else:
        if efer & _LMA:
            broken.append("lma-without-long-mode")
        if l_bit:
            broken.append("cs-l-without-long-mode")
    if cr4 & ~limits.cr4_allowed:
        broken.append("cr4-reserved")
    if cr0 >> 32:
        broken.append("cr0-upper-half")
    if cr0 & _NW and not cr0 & _CD:
        broken.append("cr0-nw-without-cd")
    if cr0 & _PG and not cr0 & _PE:
        broken.append("cr0-pg-without-pe")
    if apic_base != limits.apic_base:
        if apic_base & (_APIC_RESERVED | (0 if limits.x2apic else _EXTD)) or apic_base >> limits.phys_bits:
            broken.append("apic-base-reserved")
        if apic_base & _EXTD and not apic_base & _EN:
            broken.append("apic-base-x2apic-off")
    return broken


def _apic_allowed(limits: SregsLimits) -> int:
    reserved = _APIC_RESERVED | ALL << limits.phys_bits
    return ALL & ~(reserved if limits.x2apic else reserved | _EXTD)


def _explain(rule: str, core: tuple[int, ...], limits: SregsLimits) -> Violation:
    cr0, cr3, cr4, efer, l_bit, apic_base, flags = core
    long = "EFER.LME and CR0.PG are set"
    short = "EFER.LME is clear" if cr0 & _PG else "CR0.PG is clear"
    if rule == "sregs2-flags":
        return Violation("flags", flags, rule, "0 or 1", "bit 0, the PDPTRs are valid, is all there is")
    if rule == "sregs2-pdptrs":
        detail = "there is no PAE paging (CR0.PG and CR4.PAE set, EFER.LMA clear), so there are no PDPTRs"
        return Violation("flags", flags, rule, "0", detail)
    if rule == "long-mode-needs-pae":
        return Violation("cr4", cr4, rule, f"CR4.PAE set ({cr4 | _PAE:#x})", f"CR4.PAE is clear, while {long}")
    if rule == "long-mode-needs-lma":
        return Violation("efer", efer, rule, f"EFER.LMA set ({efer | _LMA:#x})", f"EFER.LMA is clear, while {long}")
    if rule == "cr3-width":
        bad = (cr3 & ~_LAM if limits.lam else cr3) >> limits.phys_bits << limits.phys_bits
        lam = ", and 62:61 (LAM)" if limits.lam else ""
        return Violation("cr3", cr3, rule, f"bits {limits.phys_bits - 1}:0{lam}", f"bits above them are set: {bad:#x}")
    if rule == "lma-without-long-mode":
        return Violation("efer", efer, rule, f"EFER.LMA clear ({efer & ~_LMA:#x})", f"EFER.LMA is set, while {short}")
    if rule == "cs-l-without-long-mode":
        return Violation("cs.l", l_bit, rule, "0", f"it says 64-bit code, while {short}")
    if rule == "cr4-reserved":
        bad = cr4 & ~limits.cr4_allowed
        names = ", ".join(bit_names(CR4, bad))
        return Violation("cr4", cr4, rule, f"bits of {limits.cr4_allowed:#x}", f"{names}: {_missing(bad, limits)}")
    if rule == "cr0-upper-half":
        return Violation("cr0", cr0, rule, f"bits 31:0 ({cr0 & 0xFFFFFFFF:#x})", "bits 63:32 are reserved")
    if rule == "cr0-nw-without-cd":
        accepted = f"CR0.CD set ({cr0 | _CD:#x}) or CR0.NW clear ({cr0 & ~_NW:#x})"
        return Violation("cr0", cr0, rule, accepted, "CR0.NW is set without CR0.CD")
    if rule == "cr0-pg-without-pe":
        accepted = f"CR0.PE set ({cr0 | _PE:#x}) or CR0.PG clear ({cr0 & ~_PG:#x})"
        return Violation("cr0", cr0, rule, accepted, "CR0.PG is set without CR0.PE")
    if rule == "apic-base-reserved":
        allowed = _apic_allowed(limits)
        bad = apic_base & ~allowed
        why = ", ".join(bit_names(APIC_BASE, bad)) + ": reserved"
        if bad & _EXTD:
            why += "; the guest's CPUID has no x2APIC"
        return Violation("apic_base", apic_base, rule, f"bits of {allowed:#x}", why)
    accepted = f"APIC_BASE.EN set ({apic_base | _EN:#x}) or APIC_BASE.EXTD clear ({apic_base & ~_EXTD:#x})"
    return Violation("apic_base", apic_base, rule, accepted, "x2APIC mode of an APIC that is off")


def _missing(bad: int, limits: SregsLimits) -> str:
    # Why these bits of CR4 are reserved.
    features = [names for bit, names in CR4_FEATURES.items() if bad & bit]
    if not features:
        return "reserved"
    wanted = ", ".join(" or ".join(names) for names in features)
    if limits.vendor == "kvm_pvm":
        return f"reserved, for kvm_pvm does not offer {wanted} here"
    return f"reserved without {wanted} in the guest's CPUID and in KVM"


def _checked(call: str, sregs: Any, limits: SregsLimits) -> tuple[int, ...]:
    if not isinstance(limits, SregsLimits):
        raise ArgumentTypeError(call, "limits", limits, "SregsLimits")
    number(call, "limits.phys_bits", limits.phys_bits, 0xFF)
    core = _core(sregs)
    try:
        cr0, cr3, cr4, efer, l_bit, apic_base, flags = core
        together = cr0 | cr3 | cr4 | efer | l_bit | apic_base | flags
        if type(together) is int and 0 <= together <= ALL:
            return core
    except TypeError:
        pass
    return tuple([number(call, path, value) for path, value in zip(_CORE, core, strict=True)])


def sregs_violations(sregs: Any, limits: SregsLimits) -> list[Violation]:
    """Every rule that these registers break, in the order in which KVM asks; [] where KVM takes them.

    >>> limits = SregsLimits(phys_bits=46)
    >>> [print(v) for v in sregs_violations({"cr0": 0x80000011, "cr4": 0, "efer": 0x500}, limits)]
    cr4=0x0: CR4.PAE is clear, while EFER.LME and CR0.PG are set; accepted: CR4.PAE set (0x20)
    [None]
    >>> [v.rule for v in sregs_violations({"cr0": 0x60000010, "cr4": 1 << 12}, limits)]
    ['cr4-reserved']
    """
    core = _checked("sregs_violations", sregs, limits)
    return [_explain(rule, core, limits) for rule in _broken(core, limits)]


def sregs_answer(sregs: Any, limits: SregsLimits, before: Any = None) -> str:
    """What KVM_SET_SREGS does with these registers: "accepted", "changed" or "refused".  `before`: see sregs_changes.

    >>> paging = {"cr0": 0x80000011}
    >>> [sregs_answer(paging, SregsLimits(vendor)) for vendor in ("kvm_intel", "kvm_pvm")]
    ['accepted', 'changed']
    """
    core = _checked("sregs_answer", sregs, limits)
    if _broken(core, limits):
        return "refused"
    return "changed" if _changes(core, sregs, limits, before) else "accepted"


def sregs_changes(sregs: Any, limits: SregsLimits, before: Any = None) -> list[Change]:
    """The fields of which KVM keeps another value, where it takes the registers at all.

    `before`: the registers as they were, some of which stay (CR8, an injected interrupt); None: as after a reset.

    >>> for change in sregs_changes({"cr0": 0x80000011}, SregsLimits("kvm_pvm")): print(change)
    cr0=0x80000011 becomes 0x11: without EFER.LME kvm_pvm clears CR0.PG
    """
    return _changes(_checked("sregs_changes", sregs, limits), sregs, limits, before)


def _changes(core: tuple[int, ...], sregs: Any, limits: SregsLimits, before: Any) -> list[Change]:
    found = []
    cr0, efer = core[0], core[3]
    if limits.vendor == "kvm_pvm" and cr0 & _PG and not efer & _LME:
        found.append(Change("cr0", cr0, cr0 & ~_PG, "pvm-drops-paging"))
    cr8 = _read(sregs, "cr8")
    if cr8 & ~_TPL:
        was = 0 if before is None else _read(before, "cr8")
        if was != cr8:
            found.append(Change("cr8", cr8, was, "cr8-reserved"))
    found += _interrupt_changes(sregs, before)
    if limits.vendor in ("kvm_intel", "kvm_amd") and not isinstance(sregs, dict):
        found += _segment_changes(sregs, limits)
    return found


def _bitmap(sregs: Any) -> tuple[int, ...]:
    if not isinstance(sregs, dict):
        return tuple(getattr(sregs, "interrupt_bitmap", ()))
    return () if sregs.keys().isdisjoint(_BITMAP) else tuple([_read(sregs, path) for path in _BITMAP])


def _interrupt_changes(sregs: Any, before: Any) -> list[Change]:
    # 256 bits in four words: the lowest one that is set is injected.
    words = _bitmap(sregs)
    if not words:
        return []
    number = sum(word << 64 * at for at, word in enumerate(words))
    if number:
        kept = number & -number
    else:
        kept = sum(word << 64 * at for at, word in enumerate(_bitmap(before))) if before is not None else 0
    return [
        Change(f"interrupt_bitmap[{at}]", word, kept >> 64 * at & ALL, "one-interrupt")
        for at, word in enumerate(words)
        if word != kept >> 64 * at & ALL
    ]


def _segment_changes(sregs: Any, limits: SregsLimits) -> list[Change]:
    # VMX keeps access rights in 17 bits, SVM in 12, and each makes some of them when it is asked.
    if limits.vendor == "kvm_intel" and not limits.unrestricted and not _read(sregs, "cr0") & _PE:
        return []  # real mode without help of the processor: KVM keeps the segments itself
    found = []
    for name in _SEGMENTS:
        given = {field: _read(sregs, f"{name}.{field}") for field in _BITS_OF}
        kept = {field: given[field] & mask for field, mask in _BITS_OF.items()}
        if limits.vendor == "kvm_intel":
            rule = "vmx-segment"
            kept["unusable"] = int(bool(given["unusable"]) or not given["present"])
            kept["present"] = 1 - kept["unusable"]
            if limits.unrestricted and name != "ldt":
                kept["type"] |= 1
        else:
            rule = "svm-segment"
            kept["present"] = int(bool(given["present"] & 1) and not given["unusable"])
            kept["unusable"] = 1 - kept["present"]
            kept["g"] = int(_read(sregs, f"{name}.limit") > 0xFFFFF)
            if name == "tr":
                kept["type"] |= 2
            elif name in ("ds", "es", "fs", "gs") and kept["present"]:
                kept["type"] |= 1
            elif name == "ss" and kept["unusable"]:
                kept["db"] = 0
        found += [Change(f"{name}.{f}", given[f], kept[f], rule) for f in _BITS_OF if given[f] != kept[f]]
    return found


def sregs_repairs(sregs: Any, limits: SregsLimits) -> list[Repair]:
    """The fields that, changed alone, make refused registers ones that KVM takes; those of fewer changed bits first.

    [] where KVM takes them already, or where more than one field must change.

    >>> sregs_repairs({"cr0": 0x80000011, "cr4": 0x20, "efer": 0x100, "cr3": 0x1000}, SregsLimits())
    [Repair(field='cr0', value=0x11), Repair(field='efer', value=0x500)]
    """
    core = _checked("sregs_repairs", sregs, limits)
    if not _broken(core, limits):
        return []
    found = []
    for at, path in enumerate(_CORE):
        value = core[at]
        fit = [
            other
            for other in _candidates(path, value, limits)
            if not _broken((*core[:at], other, *core[at + 1 :]), limits)
        ]
        if fit:
            best = min(fit, key=lambda other: (other ^ value).bit_count())
            found.append(((best ^ value).bit_count(), Repair(path, best)))
    found.sort(key=lambda pair: pair[0])
    return [repair for _, repair in found]


def _candidates(path: str, value: int, limits: SregsLimits) -> list[int]:
    # Values that a field could have had instead: without what it may not have, and with its deciding bits either way.
    clean, deciding = {
        "cr0": (value & 0xFFFFFFFF, (_PG, _PE, _NW, _CD)),
        "cr3": (value & (((1 << limits.phys_bits) - 1) | (_LAM if limits.lam else 0)), ()),
        "cr4": (value & limits.cr4_allowed, (_PAE,)),
        "efer": (value, (_LMA, _LME)),
        "cs.l": (0, ()),
        "apic_base": (value & _apic_allowed(limits), (_EXTD & _apic_allowed(limits), _EN)),
        "flags": (value & _PDPTRS_VALID, (_PDPTRS_VALID,)),
    }[path]
    found = [clean]
    for bit in deciding:
        found += [other ^ bit for other in found] if bit else []
    return found
