"""CPUID by name: which leaf, subleaf, register and bit announces which feature, and what the leaves are for.

Names are those of Linux (X86_FEATURE_..., without the prefix), which KVM's own tables have too; where Intel's or AMD's
manual uses another word, that is an alias: SSE3 is XMM3, XD is NX.  Of KVM's own leaf 0x40000001 the names are those of
Documentation/virt/kvm/x86/cpuid.rst, without FEATURE: KVM_CLOCKSOURCE2.

An entry is anything that has the attributes of KVM's struct kvm_cpuid_entry2 (hvmodel.kvm.CpuidEntry does), or a tuple
of them: (function, index, flags, eax, ebx, ecx, edx).  Bit 0 of `flags` says that `index` counts.

Sources: linux:arch/x86/include/asm/cpufeatures.h@v6.18, linux:arch/x86/kvm/cpuid.c and reverse_cpuid.h@v6.18; Intel SDM
volume 2, CPUID; AMD APM volume 3, appendix E.
"""

from __future__ import annotations

from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .number import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    class _Entry(Protocol):
        @property
        def function(self) -> int: ...
        @property
        def index(self) -> int: ...
        @property
        def flags(self) -> int: ...
        @property
        def eax(self) -> int: ...
        @property
        def ebx(self) -> int: ...
        @property
        def ecx(self) -> int: ...
        @property
        def edx(self) -> int: ...

    Entry = _Entry | tuple[int, int, int, int, int, int, int]

__all__ = [
    "ALIASES",
    "FEATURES",
    "LEAVES",
    "REGISTERS",
    "Feature",
    "feature",
    "feature_name",
    "feature_names",
    "has_feature",
    "leaf_name",
    "max_linear_bits",
    "max_phys_bits",
    "register_of",
    "vendor_of",
]

REGISTERS = ("eax", "ebx", "ecx", "edx")

_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_PHYS_BITS_UNKNOWN = 36  # what KVM takes where there is no leaf 0x80000008

# (leaf, subleaf, register): the features from bit 0 up; "-" is a bit without a name, "n:" goes on with bit n.
_BITS = {
    (0x1, 0, "ecx"): """
        XMM3 PCLMULQDQ DTES64 MWAIT DSCPL VMX SMX EST TM2 SSSE3 CID SDBG FMA CX16 XTPR PDCM
        - PCID DCA XMM4_1 XMM4_2 X2APIC MOVBE POPCNT TSC_DEADLINE_TIMER AES XSAVE OSXSAVE AVX F16C RDRAND HYPERVISOR""",
    (0x1, 0, "edx"): """
        FPU VME DE PSE TSC MSR PAE MCE CX8 APIC - SEP MTRR PGE MCA CMOV
        PAT PSE36 PN CLFLUSH - DS ACPI MMX FXSR XMM XMM2 SELFSNOOP HT ACC IA64 PBE""",
    (0x6, 0, "eax"): """
        DTHERM IDA ARAT - PLN - PTS HWP HWP_NOTIFY HWP_ACT_WINDOW HWP_EPP HWP_PKG_REQ 15: HWP_HIGHEST_PERF_CHANGE
        19: HFI 23: ITD""",
    (0x7, 0, "ebx"): """
        FSGSBASE TSC_ADJUST SGX BMI1 HLE AVX2 FDP_EXCPTN_ONLY SMEP BMI2 ERMS INVPCID RTM CQM ZERO_FCS_FDS MPX RDT_A
        AVX512F AVX512DQ RDSEED ADX SMAP AVX512IFMA - CLFLUSHOPT
        CLWB INTEL_PT AVX512PF AVX512ER AVX512CD SHA_NI AVX512BW AVX512VL""",
    (0x7, 0, "ecx"): """
        PREFETCHWT1 AVX512VBMI UMIP PKU OSPKE WAITPKG AVX512_VBMI2 SHSTK GFNI VAES VPCLMULQDQ AVX512_VNNI AVX512_BITALG
        TME AVX512_VPOPCNTDQ - LA57 22: RDPID KEYLOCKER BUS_LOCK_DETECT CLDEMOTE - MOVDIRI MOVDIR64B ENQCMD SGX_LC
        PKS""",
    (0x7, 0, "edx"): """
        - SGX_KEYS AVX512_4VNNIW AVX512_4FMAPS FSRM UINTR - - AVX512_VP2INTERSECT SRBDS_CTRL MD_CLEAR RTM_ALWAYS_ABORT
        13: TSX_FORCE_ABORT SERIALIZE HYBRID_CPU TSXLDTRK 18: PCONFIG ARCH_LBR IBT 22: AMX_BF16 AVX512_FP16 AMX_TILE
        AMX_INT8 SPEC_CTRL INTEL_STIBP FLUSH_L1D ARCH_CAPABILITIES CORE_CAPABILITIES SPEC_CTRL_SSBD""",
    (0x7, 1, "eax"): """
        SHA512 SM3 SM4 RAO_INT AVX_VNNI AVX512_BF16 LASS CMPCCXADD ARCH_PERFMON_EXT 10: FZRM FSRS FSRC
        17: FRED LKGS WRMSRNS NMI_SOURCE AMX_FP16 HRESET AVX_IFMA 26: LAM MSRLIST 30: INVD_DISABLE MOVRS""",
    (0x7, 1, "ebx"): "PPIN 3: CPUID_MAXVAL_LIM_RMV",
    (0x7, 1, "ecx"): "5: MSR_IMM",
    (0x7, 1, "edx"): """
        4: AVX_VNNI_INT8 AVX_NE_CONVERT 8: AMX_COMPLEX 10: AVX_VNNI_INT16 13: UTMR PREFETCHITI USER_MSR
        17: UIRET_UIF CET_SSS AVX10 21: APX_F 23: MWAIT_LEAF""",
    (0x7, 2, "edx"): "INTEL_PSFD IPRED_CTRL RRSBA_CTRL DDPD_U BHI_CTRL MCDT_NO UC_LOCK_DIS MONITOR_MITG_NO",
    (0xD, 1, "eax"): "XSAVEOPT XSAVEC XGETBV1 XSAVES XFD",
    (0x12, 0, "eax"): "SGX1 SGX2 5: SGX_ENCLV SGX_ENCLS_C SGX_EVERIFYREPORT2 10: SGX_EUPDATESVN SGX_EDECCSSA",
    (0x24, 0, "ebx"): "16: AVX10_128 AVX10_256 AVX10_512",
    (0x80000001, 0, "ecx"): """
        LAHF_LM CMP_LEGACY SVM EXTAPIC CR8_LEGACY ABM SSE4A MISALIGNSSE 3DNOWPREFETCH OSVW IBS XOP SKINIT WDT - LWP
        FMA4 TCE - NODEID_MSR - TBM TOPOEXT PERFCTR_CORE PERFCTR_NB - BPEXT PTSC PERFCTR_LLC MWAITX""",
    (0x80000001, 0, "edx"): """
        11: SYSCALL 19: MP NX 22: MMXEXT 25: FXSR_OPT GBPAGES RDTSCP 29: LM 3DNOWEXT 3DNOW""",
    (0x80000007, 0, "ebx"): "OVERFLOW_RECOV SUCCOR 3: SMCA",
    (0x80000007, 0, "edx"): "8: CONSTANT_TSC 11: PROC_FEEDBACK",
    (0x80000008, 0, "ebx"): """
        CLZERO IRPERF XSAVEERPTR INVLPGB RDPRU 8: MCOMMIT WBNOINVD 12: AMD_IBPB 14: AMD_IBRS AMD_STIBP
        AMD_IBRS_ALWAYS_ON
        AMD_STIBP_ALWAYS_ON - AMD_IBRS_SAME_MODE EFER_LMSLE_MBZ - - AMD_PPIN AMD_SSBD VIRT_SSBD AMD_SSB_NO CPPC
        AMD_PSFD
        BTC_NO AMD_IBPB_RET BRS""",
    (0x8000000A, 0, "edx"): """
        NPT LBRV SVML NRIPS TSCRATEMSR VMCBCLEAN FLUSHBYASID DECODEASSISTS - - PAUSEFILTER - PFTHRESHOLD AVIC -
        V_VMSAVE_VMLOAD VGIF GMET X2AVIC - V_SPEC_CTRL 25: VNMI 28: SVME_ADDR_CHK BUS_LOCK_THRESHOLD
        IDLE_HLT""",
    (0x8000001F, 0, "eax"): """
        SME SEV VM_PAGE_FLUSH SEV_ES SEV_SNP VMPL 9: V_TSC_AUX SME_COHERENT 14: DEBUG_SWAP 21: RMPREAD
        23: SEGMENTED_RMP 27: ALLOWED_SEV_FEATURES SVSM 30: HV_INUSE_WR_ALLOWED""",
    (0x80000021, 0, "eax"): """
        NO_NESTED_DATA_BP WRMSR_XX_BASE_NS LFENCE_RDTSC 5: VERW_CLEAR NULL_SEL_CLR_BASE 8: AUTOIBRS NO_SMM_CTL_MSR
        FSRS_AMD FSRC_AMD 13: PREFETCHCTL 17: GP_ON_USER_CPUID EPSF 27: SBPB IBPB_BRTYPE SRSO_NO SRSO_USER_KERNEL_NO
        SRSO_BP_SPEC_REDUCE""",
    (0x80000022, 0, "eax"): "PERFMON_V2 AMD_LBR_V2 AMD_LBR_PMC_FREEZE",
    (0x40000001, 0, "eax"): """
        KVM_CLOCKSOURCE KVM_NOP_IO_DELAY KVM_MMU_OP KVM_CLOCKSOURCE2 KVM_ASYNC_PF KVM_STEAL_TIME KVM_PV_EOI
        KVM_PV_UNHALT - KVM_PV_TLB_FLUSH KVM_ASYNC_PF_VMEXIT KVM_PV_SEND_IPI KVM_POLL_CONTROL KVM_PV_SCHED_YIELD
        KVM_ASYNC_PF_INT KVM_MSI_EXT_DEST_ID KVM_HC_MAP_GPA_RANGE KVM_MIGRATION_CONTROL 24: KVM_CLOCKSOURCE_STABLE""",
}  # fmt: skip

# The manuals' names, and those in common use.
ALIASES = {
    "3DNOWP": "3DNOWEXT",
    "BMI": "BMI1",
    "CLFSH": "CLFLUSH",
    "CMPXCHG16B": "CX16",
    "CMPXCHG8B": "CX8",
    "CNXT_ID": "CID",
    "DS_CPL": "DSCPL",
    "FXSAVE": "FXSR",
    "HTT": "HT",
    "KL": "KEYLOCKER",
    "LZCNT": "ABM",
    "MONITOR": "MWAIT",
    "PAGE1GB": "GBPAGES",
    "PCLMUL": "PCLMULQDQ",
    "PDPE1GB": "GBPAGES",
    "PNI": "XMM3",
    "PREFETCHW": "3DNOWPREFETCH",
    "PRFCHW": "3DNOWPREFETCH",
    "PSN": "PN",
    "RDRND": "RDRAND",
    "SHA": "SHA_NI",
    "SS": "SELFSNOOP",
    "SSE": "XMM",
    "SSE2": "XMM2",
    "SSE3": "XMM3",
    "SSE4_1": "XMM4_1",
    "SSE4_2": "XMM4_2",
    "TM": "ACC",
    "TSC_DEADLINE": "TSC_DEADLINE_TIMER",
    "XD": "NX",
}

# leaf -> what it is for
LEAVES = {
    0x0: "highest leaf and vendor",
    0x1: "version and features",
    0x2: "caches and TLBs",
    0x3: "serial number",
    0x4: "caches",
    0x5: "MONITOR and MWAIT",
    0x6: "thermal and power management",
    0x7: "extended features",
    0x9: "direct cache access",
    0xA: "performance monitoring",
    0xB: "topology",
    0xD: "XSAVE: state components",
    0xF: "resource monitoring",
    0x10: "resource allocation",
    0x12: "SGX",
    0x14: "processor trace",
    0x15: "TSC and crystal clock",
    0x16: "frequencies",
    0x17: "system on chip",
    0x18: "TLBs",
    0x19: "key locker",
    0x1A: "kind of core",
    0x1B: "PCONFIG",
    0x1C: "last branch records",
    0x1D: "AMX tiles",
    0x1E: "AMX multiplier",
    0x1F: "topology, version 2",
    0x20: "history reset",
    0x21: "TDX",
    0x23: "performance monitoring, extended",
    0x24: "AVX10",
    0x40000000: "hypervisor: highest leaf and signature",
    0x40000001: "KVM: features",
    0x40000010: "hypervisor: TSC and bus frequency",
    0x80000000: "highest extended leaf and vendor",
    0x80000001: "extended version and features",
    0x80000002: "brand, part 1",
    0x80000003: "brand, part 2",
    0x80000004: "brand, part 3",
    0x80000005: "L1 caches and TLBs (AMD)",
    0x80000006: "L2 and L3 caches",
    0x80000007: "power management, invariant TSC",
    0x80000008: "address widths, more features",
    0x8000000A: "SVM",
    0x80000019: "TLBs of 1 GiB pages (AMD)",
    0x8000001A: "performance optimization (AMD)",
    0x8000001B: "instruction-based sampling (AMD)",
    0x8000001D: "caches (AMD)",
    0x8000001E: "topology (AMD)",
    0x8000001F: "memory encryption (AMD)",
    0x80000020: "quality of service (AMD)",
    0x80000021: "extended features 2 (AMD)",
    0x80000022: "performance monitoring and debugging (AMD)",
    0xC0000000: "highest leaf (Centaur)",
    0xC0000001: "features (Centaur)",
}


class Feature(Value):
    """One bit of CPUID: `register` is "eax", "ebx", "ecx" or "edx" of leaf `leaf` (EAX), subleaf `subleaf` (ECX)."""

    name: str
    leaf: int
    subleaf: int
    register: str
    bit: int

    def __str__(self) -> str:
        return f"{self.name} (CPUID {self.leaf:#x}.{self.subleaf} {self.register.upper()} bit {self.bit})"


def _features() -> dict[str, Feature]:
    found: dict[str, Feature] = {}
    for (leaf, subleaf, register), text in _BITS.items():
        bit = 0
        for word in text.split():
            if word.endswith(":"):
                bit = int(word[:-1])
                continue
            if word != "-":
                assert word not in found, word
                found[word] = Feature(word, leaf, subleaf, register, bit)
            bit += 1
    return found


# name -> where it is
FEATURES: dict[str, Feature] = _features()
_NAMES = {(f.leaf, f.subleaf, f.register, f.bit): f.name for f in FEATURES.values()}


def feature(name: str) -> Feature:
    """The feature with this name or alias, in either case; ArgumentError names those that are near.

    >>> feature("nx")
    Feature(name='NX', leaf=0x80000001, subleaf=0, register='edx', bit=0x14)
    """
    if not isinstance(name, str):
        raise ArgumentTypeError("feature", "name", name, "the name of a CPUID feature")
    upper = name.upper()
    found = FEATURES.get(ALIASES.get(upper, upper))
    if found is None:
        from difflib import get_close_matches

        near = get_close_matches(upper, [*FEATURES, *ALIASES], 3)
        raise ArgumentError("feature", "name", name, ", ".join(near) or "a name of hvmodel.arch.cpuid.FEATURES")
    return found


def _place(call: str, leaf: object, subleaf: object, register: object) -> None:
    number(call, "leaf", leaf, 0xFFFFFFFF)
    number(call, "subleaf", subleaf, 0xFFFFFFFF)
    if register not in REGISTERS:
        raise ArgumentError(call, "register", register, ", ".join(REGISTERS))


def feature_name(leaf: int, subleaf: int, register: str, bit: int) -> str | None:
    """Name of the feature that this bit (0 to 31) announces, or None where it has none.

    >>> feature_name(7, 0, "ecx", 16), feature_name(7, 0, "ecx", 15)
    ('LA57', None)
    """
    _place("feature_name", leaf, subleaf, register)
    number("feature_name", "bit", bit, 31)
    return _NAMES.get((leaf, subleaf, register, bit))


def feature_names(leaf: int, subleaf: int, register: str, value: int) -> tuple[str, ...]:
    """Names of the bits that are set in `value` (32 bits) of a register, from bit 0 up; () where it is no set of bits.

    >>> feature_names(7, 0, "ecx", 1 << 16 | 1 << 15)
    ('CPUID 0x7.0 ECX bit 15', 'LA57')
    >>> feature_names(0x80000008, 0, "eax", 0x3028)
    ()
    """
    _place("feature_names", leaf, subleaf, register)
    number("feature_names", "value", value, 0xFFFFFFFF)
    if (leaf, subleaf, register) not in _BITS:
        return ()
    where = f"CPUID {leaf:#x}.{subleaf} {register.upper()} bit"
    return tuple(
        [_NAMES.get((leaf, subleaf, register, bit), f"{where} {bit}") for bit in range(32) if value >> bit & 1]
    )


def leaf_name(leaf: int) -> str | None:
    """What a leaf is for, in a few words, or None where that is not known.

    >>> leaf_name(0xD)
    'XSAVE: state components'
    """
    _place("leaf_name", leaf, 0, "eax")
    return LEAVES.get(leaf)


def _list(call: str, field: str, entries: Iterable[Entry]) -> list[Entry]:
    try:
        return list(entries)
    except TypeError:
        raise ArgumentTypeError(call, field, entries, "entries of CPUID") from None


def register_of(entries: Iterable[Entry], leaf: int, subleaf: int, register: str) -> int | None:
    """The register as these entries give it, or None where they have no such leaf.

    ArgumentError, ArgumentTypeError: no such register; what is no entry.

    >>> register_of([(7, 0, 1, 2, 0x281, 0, 0)], 7, 0, "ebx")
    641
    """
    _place("register_of", leaf, subleaf, register)
    at = 3 + REGISTERS.index(register)
    for entry in _list("register_of", "entries", entries):
        if isinstance(entry, tuple):
            if len(entry) != 7:
                raise ArgumentError(
                    "register_of",
                    "entries",
                    entry,
                    "(function, index, flags, eax, ebx, ecx, edx)",
                    f"{len(entry)} items",
                )
            function, index, flags = entry[:3]
        else:
            try:
                function, index, flags = entry.function, entry.index, entry.flags
            except AttributeError:
                raise ArgumentTypeError("register_of", "entries", entry, "entries of CPUID, or tuples") from None
        if function == leaf and (index == subleaf or not flags & _SIGNIFICANT_INDEX):
            value = entry[at] if isinstance(entry, tuple) else getattr(entry, register)
            return number("register_of", register, value, 0xFFFFFFFF)
    return None


def has_feature(entries: Iterable[Entry], name: str) -> bool:
    """Whether the entries announce the feature; False where its leaf is missing.  ArgumentError: no such feature.

    >>> has_feature([(0x80000001, 0, 0, 0, 0, 0, 1 << 20)], "NX")
    True
    """
    known = feature(name)
    return bool((register_of(entries, known.leaf, known.subleaf, known.register) or 0) >> known.bit & 1)


def max_phys_bits(entries: Iterable[Entry]) -> int:
    """MAXPHYADDR, the width of a physical address: leaf 0x80000008, or 36 as KVM has it where that leaf is missing.

    Source: linux:arch/x86/kvm/cpuid.c cpuid_query_maxphyaddr@v6.18.

    >>> max_phys_bits([(0x80000000, 0, 0, 0x80000008, 0, 0, 0), (0x80000008, 0, 0, 0x392E, 0, 0, 0)])
    46
    """
    width = _widths(entries)
    return _PHYS_BITS_UNKNOWN if width is None else width & 0xFF


def max_linear_bits(entries: Iterable[Entry]) -> int:
    """Width of a linear address that leaf 0x80000008 gives: 48 or 57; 48 where it is missing."""
    width = _widths(entries)
    return 48 if width is None else width >> 8 & 0xFF


def _widths(entries: Iterable[Entry]) -> int | None:
    rows = _list("max_phys_bits", "entries", entries)
    if (register_of(rows, 0x80000000, 0, "eax") or 0) < 0x80000008:
        return None
    return register_of(rows, 0x80000008, 0, "eax")


def vendor_of(entries: Iterable[Entry]) -> str | None:
    """The twelve letters of leaf 0, "GenuineIntel" or "AuthenticAMD", or None where it is missing.

    >>> vendor_of([(0, 0, 0, 0x20, 0x756E6547, 0x6C65746E, 0x49656E69)])
    'GenuineIntel'
    """
    rows = _list("vendor_of", "entries", entries)
    words = [register_of(rows, 0, 0, register) for register in ("ebx", "edx", "ecx")]
    if None in words:
        return None
    return b"".join([(word or 0).to_bytes(4, "little") for word in words]).decode("latin-1")
