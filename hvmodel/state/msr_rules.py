"""Which values KVM refuses of which MSR: `MSR_RULES`.

KVM_SET_MSRS says which MSR it stumbled over (it returns how many it has set), but not why.  A rule has the MSRs that it
is about and what they take.  It is the host that sets them: what holds for the guest's WRMSR only, as that EFER.LME
cannot change while paging is on, is no rule here.

Source, where no other file is named: linux:arch/x86/kvm/x86.c kvm_set_msr_common, __kvm_set_msr@v6.18.
"""

from __future__ import annotations

from ..arch.cpuid import has_feature, max_phys_bits
from ..arch.registers import APIC_BASE, EFER, is_canonical
from ..value import Value
from .facts import Facts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Takes = Callable[[int, int, Facts], bool]
    Accepted = Callable[[int, Facts], str]

__all__ = ["MSR_RULES", "MsrRule", "msr_field"]

_ALL = (1 << 64) - 1
_EFER, _APIC_BASE = 0xC0000080, 0x1B
_MEMORY_TYPES = (0, 1, 4, 5, 6)
_PAT_TYPES = (*_MEMORY_TYPES, 7)
_ASYNC_PF_EN, _STEAL_TIME, _PV_EOI, _POLL_CONTROL, _ASYNC_PF_INT = range(0x4B564D02, 0x4B564D07)
_HWCR_TAKEN = 1 << 18 | 1 << 24 | 0x148  # McStatusWrEn, TscFreqSel, and three that are taken and dropped


class MsrRule(Value):
    """One check of an MSR's value.

    `name`.  `indices`: the MSRs that have it, () for all.  `takes(index, value, facts)`: whether KVM takes it.
    `accepted(index, facts)`: what it takes, in words.  `why`, `source`, `hosts`: as of hvmodel.state.rules.Rule.
    """

    name: str
    indices: tuple[int, ...]
    takes: Takes
    accepted: Accepted
    why: str
    source: str = "kvm/x86.c kvm_set_msr_common"
    hosts: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        """The fields that can break it, in words."""
        if not self.indices:
            return "msrs[…]"
        first, last = self.indices[0], self.indices[-1]
        return msr_field(first) if first == last else f"{msr_field(first)} to {msr_field(last)}"

    def find(self, values: Mapping[int, int], facts: Facts) -> Iterator[tuple[str, object, str, str | None]]:
        """What breaks it: (field, value, accepted, detail)."""
        for index, value in values.items():
            if (not self.indices or index in self.indices) and not self.takes(index, value, facts):
                yield msr_field(index), value, self.accepted(index, facts), self.why


def msr_field(index: int) -> str:
    """The path of an MSR.

    >>> msr_field(0xC0000080)
    'msrs[0xc0000080]'
    """
    return f"msrs[{index:#x}]"


def _efer(_index: int, facts: Facts) -> int:
    # What KVM has switched on in EFER; LMA is taken, and kept as it was.
    host = facts.host_cpuid
    bits = EFER.SCE | EFER.LME | EFER.LMA
    if not host or has_feature(host, "NX"):
        bits |= EFER.NXE
    if facts.vendor == "kvm_amd":
        bits |= EFER.FFXSR if has_feature(host, "FXSR_OPT") else 0
        bits |= EFER.SVME | EFER.LMSLE if has_feature(host, "SVM") else 0
        bits |= EFER.AIBRSE if has_feature(host, "AUTOIBRS") else 0
    return int(bits)


def _beyond_gpa(facts: Facts) -> int:
    return _ALL & ~((1 << max_phys_bits(facts.cpuid)) - 1)


def _apic_base(_index: int, facts: Facts) -> int:
    x2apic = int(APIC_BASE.EXTD) if has_feature(facts.cpuid, "X2APIC") else 0  # ~ of a flag has no other bits
    return _ALL & ~_beyond_gpa(facts) & ~0x6FF | 0x100 | x2apic


def _variable(index: int, facts: Facts) -> int:
    # Bits of a variable MTRR: of a base the address and the type, of a mask the address and whether it counts.
    return _ALL & ~(_beyond_gpa(facts) | (0x7FF if index & 1 else 0xF00))


def _takes_variable(index: int, value: int, facts: Facts) -> bool:
    return not value & ~_variable(index, facts) and (bool(index & 1) or value & 0xFF in _MEMORY_TYPES)


def _accepts_variable(index: int, facts: Facts) -> str:
    bits = f"bits of {_variable(index, facts):#x}"
    return bits if index & 1 else f"{bits}, the type (bits 7:0) one of {_MEMORY_TYPES}"


def _takes_bytes(types: tuple[int, ...]) -> Takes:
    return lambda _index, value, _facts: all(value >> at & 0xFF in types for at in range(0, 64, 8))


def _takes_bits(mask: Callable[[int, Facts], int]) -> Takes:
    return lambda index, value, facts: not value & ~mask(index, facts)


def _accepts_bits(mask: Callable[[int, Facts], int]) -> Accepted:
    return lambda index, facts: f"bits of {mask(index, facts):#x}"


def _bits(name: str, index: int, mask: int, why: str, source: str = "kvm/x86.c kvm_set_msr_common") -> MsrRule:
    # The rule of one MSR that has these bits.
    def of(_index: int, _facts: Facts) -> int:
        return mask

    return MsrRule(name, (index,), _takes_bits(of), _accepts_bits(of), why, source)


def _words(text: str) -> Accepted:
    return lambda _index, _facts: text


MSR_RULES: tuple[MsrRule, ...] = (
    MsrRule(
        "unknown",
        (),
        lambda index, _value, facts: index not in facts.unreadable,
        _words("an MSR of KVM_GET_MSR_INDEX_LIST"),
        "KVM does not have this MSR, or not for this guest",
    ),
    MsrRule(
        "read_only",
        (0xFE, 0x179, 0x1DB, 0x1DC, 0x1DD, 0x1DE),
        lambda _index, _value, _facts: False,
        _words("no value"),
        "this MSR can only be read",
    ),
    MsrRule(
        "efer",
        (_EFER,),
        _takes_bits(_efer),
        _accepts_bits(_efer),
        "bits that EFER does not have here",
        "kvm/x86.c set_efer",
    ),
    MsrRule(
        "apic_base",
        (_APIC_BASE,),
        _takes_bits(_apic_base),
        _accepts_bits(_apic_base),
        "reserved bits of the APIC base",
        "kvm/lapic.c kvm_apic_set_base",
    ),
    MsrRule(
        "apic_mode",
        (_APIC_BASE,),
        lambda _index, value, _facts: value & 0xC00 != 0x400,
        _words("EXTD (bit 10) with EN (bit 11) only"),
        "x2APIC mode of an APIC that is off",
        "kvm/lapic.c kvm_apic_set_base",
    ),
    MsrRule(
        "canonical",
        (0xC0000082, 0xC0000083, 0xC0000100, 0xC0000101, 0xC0000102),
        lambda _index, value, facts: is_canonical(value, la57=facts.la57),
        lambda _index, facts: f"bits 63:{56 if facts.la57 else 47} all equal",
        "no canonical address",
        "kvm/x86.c __kvm_set_msr",
    ),
    MsrRule(
        "tsc_aux",
        (0xC0000103,),
        lambda _index, value, _facts: not value >> 32,
        _words("bits of 0xffffffff"),
        "TSC_AUX has 32 bits",
        "kvm/x86.c __kvm_set_msr",
    ),
    MsrRule(
        "mtrr_variable",
        tuple(range(0x200, 0x210)),
        _takes_variable,
        _accepts_variable,
        "reserved bits, or no type of memory",
        "kvm/mtrr.c kvm_mtrr_valid",
    ),
    MsrRule(
        "mtrr_fixed",
        (0x250, 0x258, 0x259, *range(0x268, 0x270)),
        _takes_bytes(_MEMORY_TYPES),
        _words(f"eight bytes, each one of {_MEMORY_TYPES}"),
        "no type of memory",
        "kvm/mtrr.c kvm_mtrr_valid",
    ),
    MsrRule(
        "mtrr_default",
        (0x2FF,),
        lambda _index, value, _facts: not value & ~0xCFF and value & 0xFF in _MEMORY_TYPES,
        _words(f"bits of 0xcff, the type (bits 7:0) one of {_MEMORY_TYPES}"),
        "reserved bits, or no type of memory",
        "kvm/mtrr.c kvm_mtrr_valid",
    ),
    MsrRule(
        "pat",
        (0x277,),
        _takes_bytes(_PAT_TYPES),
        _words(f"eight bytes, each one of {_PAT_TYPES}"),
        "no type of memory",
        "kvm/x86.h kvm_pat_valid",
        ("kvm_intel", "kvm_amd"),
    ),
    MsrRule(
        "mc_ctl",
        tuple(range(0x400, 0x480, 4)),
        lambda _index, value, _facts: value == 0 or value | 0x401 == _ALL,
        _words("0, or all bits (0 and 10 may be clear)"),
        "a bank of machine checks is on or off",
        "kvm/x86.c set_msr_mce",
    ),
    MsrRule(
        "mcg_ctl",
        (0x17B,),
        lambda _index, value, _facts: value in (0, _ALL),
        _words("0, or all bits where MCG_CAP (0x179) has MCG_CTL_P (bit 8)"),
        "machine checks are on or off",
        "kvm/x86.c set_msr_mce",
    ),
    MsrRule(
        "async_pf_lapic",
        (_ASYNC_PF_EN, _ASYNC_PF_INT),
        lambda index, value, facts: facts.lapic or (index == _ASYNC_PF_EN and not value),
        lambda index, _facts: "0" if index == _ASYNC_PF_EN else "no value",
        "asynchronous page faults take an in-kernel APIC",
        "kvm/x86.c kvm_pv_enable_async_pf, kvm_pv_enable_async_pf_int",
    ),
    _bits("async_pf", _ASYNC_PF_EN, _ALL & ~0x30, "bits 5:4 are reserved", "kvm/x86.c kvm_pv_enable_async_pf"),
    _bits("async_pf_int", _ASYNC_PF_INT, 0xFF, "a vector has 8 bits", "kvm/x86.c kvm_pv_enable_async_pf_int"),
    _bits("steal_time", _STEAL_TIME, _ALL & ~0x3E, "bits 5:1 are reserved"),
    _bits("pv_eoi", _PV_EOI, _ALL & ~2, "the address is a multiple of 4", "kvm/lapic.c kvm_lapic_set_pv_eoi"),
    MsrRule(
        "no_memory",
        (_ASYNC_PF_EN, _PV_EOI),
        lambda index, value, _facts: value & 9 != 9 if index == _ASYNC_PF_EN else not value & 1,
        _words("bit 0 clear, or the address of memory"),
        "it is switched on (bit 0, of asynchronous page faults bits 0 and 3), and there is no memory at the address",
        "kvm/x86.c kvm_pv_enable_async_pf, kvm/lapic.c kvm_lapic_set_pv_eoi",
    ),
    _bits("poll_control", _POLL_CONTROL, 1, "bits 63:1 are reserved"),
    _bits("hwcr", 0xC0010015, _HWCR_TAKEN, "bits of HWCR that KVM does not have"),
    MsrRule(
        "lacking",
        (0x3A, 0x345, 0xDA0),
        lambda _index, value, _facts: value == 0,
        _words("0, or bits of what the guest has"),
        "bits of features that this guest, or this KVM, does not have",
    ),
)
"""All rules of MSRs.  The first three look at the index, and at what the host has; the others at the value."""
