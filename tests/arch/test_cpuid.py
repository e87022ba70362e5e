"""CPUID by name: against GCC's header, /proc/cpuinfo with the processor's own CPUID, and KVM's header and leaves."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from hvmodel.arch.cpuid import (
    ALIASES,
    FEATURES,
    LEAVES,
    REGISTERS,
    Feature,
    feature,
    feature_name,
    feature_names,
    has_feature,
    leaf_name,
    max_linear_bits,
    max_phys_bits,
    register_of,
    vendor_of,
)
from hvmodel.errors import ArgumentError, ArgumentTypeError
from tests.need import need

PARA = Path("/usr/include/x86_64-linux-gnu/asm/kvm_para.h")

# Prints "leaf subleaf eax ebx ecx edx" of the processor that runs it.
DUMP = """
#include <cpuid.h>
#include <stdio.h>
static void one(unsigned leaf, unsigned subleaf)
{
	unsigned a, b, c, d;
	__cpuid_count(leaf, subleaf, a, b, c, d);
	printf("%u %u %u %u %u %u\\n", leaf, subleaf, a, b, c, d);
}
int main(void)
{
	unsigned leaf, subleaf, base;
	for (base = 0; base <= 0x80000000u; base += 0x80000000u) {
		unsigned last = __get_cpuid_max(base, 0);
		for (leaf = base; leaf <= last; leaf++)
			for (subleaf = 0; subleaf < 3; subleaf++)
				one(leaf, subleaf);
		if (base)
			break;
	}
	return 0;
}
"""

# What Linux prints though the processor need not say it (arch/x86/kernel/cpu/intel.c, amd.c).
SYNTHETIC = {"CONSTANT_TSC"}


def plain(name: str) -> str:
    return name.upper().replace("_", "")


def gcc_bits() -> list[tuple[str, str, int]]:
    # (name, register, bit) of GCC's <cpuid.h>; the register is that of the comment above, "" where that has none.
    include = subprocess.run(["gcc", "-print-file-name=include"], capture_output=True, text=True, check=True).stdout
    found, register = [], ""
    for line in (Path(include.strip()) / "cpuid.h").read_text().splitlines():
        heading = re.match(r"/\* %(e[abcd]x) *\*/", line)
        if heading:
            register = heading[1]
        elif "%eax == " in line:
            register = ""
        elif match := re.match(r"#define\s+bit_(\w+)\s+\(\s*1u?\s*<<\s*(\d+)\s*\)", line):
            found.append((match[1], register, int(match[2])))
    return found


def test_gcc_has_the_same_bits() -> None:
    need("gcc")
    ours = {plain(name): where for name, where in FEATURES.items()}
    ours |= {plain(alias): FEATURES[name] for alias, name in ALIASES.items()}
    compared = 0
    for name, register, bit in gcc_bits():
        known = ours.get(plain(name))
        if known is not None:
            assert (register or known.register, bit) == (known.register, known.bit), name
            compared += 1
    assert compared >= 80


def test_what_linux_says_of_this_processor_is_set_there(tmp_path: Path) -> None:
    need("gcc", "x86-64")
    source = tmp_path / "dump.c"
    source.write_text(DUMP)
    subprocess.run(["gcc", "-o", tmp_path / "dump", source], check=True)
    out = subprocess.run([tmp_path / "dump"], capture_output=True, text=True, check=True).stdout
    rows = [[int(word) for word in line.split()] for line in out.splitlines()]
    entries = [(leaf, subleaf, 1, *registers) for leaf, subleaf, *registers in rows]
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    assert flags
    compared = 0
    for flag in flags[1].split():
        name = ALIASES.get(flag.upper(), flag.upper())
        if name in FEATURES and name not in SYNTHETIC:
            assert has_feature(entries, flag), FEATURES[name]  # type: ignore[arg-type]
            compared += 1
    assert compared >= 40
    # Linux prints the same widths.
    sizes = re.search(
        r"^address sizes\s*: (\d+) bits physical, (\d+) bits virtual", Path("/proc/cpuinfo").read_text(), re.M
    )
    assert sizes
    assert (max_phys_bits(entries), max_linear_bits(entries)) == (int(sizes[1]), int(sizes[2]))  # type: ignore[arg-type]
    vendor = re.search(r"^vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.M)
    assert vendor
    assert vendor_of(entries) == vendor[1]  # type: ignore[arg-type]


def test_kvm_header_has_the_same_bits() -> None:
    if not PARA.exists():
        pytest.skip(f"{PARA} is not there")
    rows = re.findall(r"^#define KVM_FEATURE_(\w+)\s+(\d+)", PARA.read_text(), re.M)
    assert len(rows) >= 15
    for name, bit in rows:
        name = name.removesuffix("_BIT")
        assert feature(f"KVM_{name}") == Feature(f"KVM_{name}", 0x40000001, 0, "eax", int(bit))


def test_kvm_offers_leaves_with_names() -> None:
    need("kvm")
    from hvmodel.kvm import Kvm

    with Kvm() as kvm:
        entries = kvm.supported_cpuid()
    assert vendor_of(entries) in ("GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls", "  Shanghai  ")
    assert has_feature(entries, "X2APIC")  # KVM's own, on every host
    assert has_feature(entries, "LM")
    assert has_feature(entries, "KVM_CLOCKSOURCE2")
    assert 36 <= max_phys_bits(entries) <= 52
    for entry in entries:
        if entry.function not in LEAVES:
            assert (entry.eax, entry.ebx, entry.ecx, entry.edx) == (0, 0, 0, 0), hex(entry.function)


def test_no_two_features_share_a_bit() -> None:
    places = [(f.leaf, f.subleaf, f.register, f.bit) for f in FEATURES.values()]
    assert len(set(places)) == len(places)
    assert all(f.register in REGISTERS and 0 <= f.bit < 32 for f in FEATURES.values())
    assert not ALIASES.keys() & FEATURES.keys()
    assert set(ALIASES.values()) <= FEATURES.keys()


def test_by_name_and_by_place() -> None:
    # Intel SDM volume 2, CPUID: leaf 80000001H, EDX bit 20: execute disable.
    assert feature("XD") == feature("nx") == Feature("NX", 0x80000001, 0, "edx", 20)
    for known in FEATURES.values():
        assert feature_name(known.leaf, known.subleaf, known.register, known.bit) == known.name
    assert feature_name(0x5, 0, "eax", 0) is None
    assert str(feature("LA57")) == "LA57 (CPUID 0x7.0 ECX bit 16)"


def test_bits_that_no_header_here_has() -> None:
    # AMD APM volume 3, appendix E: ProcFeedbackInterface, CpuidUserDis, EPSF; Intel SDM volume 2, CPUID: ITD, INVD.
    assert feature("PROC_FEEDBACK") == Feature("PROC_FEEDBACK", 0x80000007, 0, "edx", 11)
    assert feature("GP_ON_USER_CPUID") == Feature("GP_ON_USER_CPUID", 0x80000021, 0, "eax", 17)
    assert feature("EPSF") == Feature("EPSF", 0x80000021, 0, "eax", 18)
    assert feature("ITD") == Feature("ITD", 6, 0, "eax", 23)
    assert feature("INVD_DISABLE") == Feature("INVD_DISABLE", 7, 1, "eax", 30)


def test_names_of_a_value() -> None:
    assert feature_names(1, 0, "ecx", 1 << 21 | 1 << 16) == ("CPUID 0x1.0 ECX bit 16", "X2APIC")
    assert feature_names(0xB, 0, "eax", 5) == ()
    assert leaf_name(7) == "extended features"
    assert leaf_name(0x12345) is None


def test_subleaves() -> None:
    # (function, index, flags, eax, ebx, ecx, edx): bit 0 of flags says that index counts.
    rows = [(7, 0, 1, 2, 1, 0, 0), (7, 1, 1, 1 << 26, 0, 0, 0), (1, 0, 0, 0, 0, 1, 0)]
    assert has_feature(rows, "FSGSBASE")
    assert has_feature(rows, "LAM")
    assert not has_feature(rows, "UMIP")
    assert has_feature(rows, "SSE3")
    assert not has_feature(rows, "NX")  # there is no such leaf
    assert register_of(rows, 7, 2, "edx") is None
    assert register_of(rows, 1, 5, "ecx") == 1  # its index does not count


def test_widths_without_their_leaf() -> None:
    # linux:arch/x86/kvm/cpuid.c cpuid_query_maxphyaddr: 36 where leaf 0x80000000 does not reach 0x80000008.
    wide = (0x80000008, 0, 0, 0x392E, 0, 0, 0)
    assert (max_phys_bits([wide]), max_linear_bits([wide])) == (36, 48)
    assert max_phys_bits([(0x80000000, 0, 0, 0x80000007, 0, 0, 0), wide]) == 36
    assert max_linear_bits([(0x80000000, 0, 0, 0x80000008, 0, 0, 0), wide]) == 0x39
    assert vendor_of([]) is None


def test_bad_names_and_numbers() -> None:
    with pytest.raises(ArgumentError, match="LA57"):
        feature("LA75")
    with pytest.raises(ArgumentTypeError):
        feature(5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="0 to 31"):
        feature_name(1, 0, "eax", 32)
    with pytest.raises(ArgumentError, match="eax, ebx, ecx, edx"):
        feature_name(1, 0, "rax", 0)
    with pytest.raises(ArgumentError):
        feature_names(1, 0, "eax", 1 << 32)
    with pytest.raises(ArgumentError):
        leaf_name(-1)
    with pytest.raises(ArgumentError, match="items"):
        register_of([(1, 2)], 1, 0, "eax")  # type: ignore[list-item]
    with pytest.raises(ArgumentTypeError):
        feature_names("1", 0, "eax", 0)  # type: ignore[arg-type]
    for entry in (5, None, [1, 0, 0, 1, 2, 3, 4]):
        with pytest.raises(ArgumentTypeError, match="entries"):
            register_of([entry], 1, 0, "eax")  # type: ignore[list-item]
    with pytest.raises(ArgumentTypeError, match="eax"):
        register_of([(1, 0, 0, "1", 2, 3, 4)], 1, 0, "eax")  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="ebx"):
        vendor_of([(0, 0, 0, 0, 1 << 32, 0, 0)])


# linux:arch/x86/include/asm/cpufeatures.h, arch/x86/kvm/reverse_cpuid.h: one of each register.
@pytest.mark.parametrize(
    ("name", "leaf", "subleaf", "register", "bit"),
    [
        ("XMM3", 0x1, 0, "ecx", 0),
        ("PBE", 0x1, 0, "edx", 31),
        ("ARAT", 0x6, 0, "eax", 2),
        ("SMEP", 0x7, 0, "ebx", 7),
        ("LA57", 0x7, 0, "ecx", 16),
        ("SPEC_CTRL", 0x7, 0, "edx", 26),
        ("LAM", 0x7, 1, "eax", 26),
        ("PPIN", 0x7, 1, "ebx", 0),
        ("MSR_IMM", 0x7, 1, "ecx", 5),
        ("AVX_VNNI_INT8", 0x7, 1, "edx", 4),
        ("MCDT_NO", 0x7, 2, "edx", 5),
        ("XSAVES", 0xD, 1, "eax", 3),
        ("SGX2", 0x12, 0, "eax", 1),
        ("AVX10_512", 0x24, 0, "ebx", 18),
        ("SVM", 0x80000001, 0, "ecx", 2),
        ("NX", 0x80000001, 0, "edx", 20),
        ("SUCCOR", 0x80000007, 0, "ebx", 1),
        ("CONSTANT_TSC", 0x80000007, 0, "edx", 8),
        ("AMD_IBPB", 0x80000008, 0, "ebx", 12),
        ("NPT", 0x8000000A, 0, "edx", 0),
        ("SEV", 0x8000001F, 0, "eax", 1),
        ("AUTOIBRS", 0x80000021, 0, "eax", 8),
        ("PERFMON_V2", 0x80000022, 0, "eax", 0),
        ("KVM_CLOCKSOURCE", 0x40000001, 0, "eax", 0),
    ],
)
def test_one_of_each_register(name: str, leaf: int, subleaf: int, register: str, bit: int) -> None:
    assert feature(name) == Feature(name, leaf, subleaf, register, bit)


def test_leaves_are_those_of_the_manuals() -> None:
    # Intel SDM volume 2, CPUID: 0 to 24H without those that are reserved; AMD APM volume 3, appendix E.
    intel = set(range(0x25)) - {0x8, 0xC, 0xE, 0x11, 0x13, 0x22}
    amd = {0x80000000 + leaf for leaf in (*range(9), 0xA, 0x19, 0x1A, 0x1B, 0x1D, 0x1E, 0x1F, 0x20, 0x21, 0x22)}
    assert LEAVES.keys() == intel | amd | {0x40000000, 0x40000001, 0x40000010, 0xC0000000, 0xC0000001}
    for leaf, word in ((0xD, "XSAVE"), (0x24, "AVX10"), (0x8000000A, "SVM"), (0x80000021, "extended features 2")):
        assert word in (leaf_name(leaf) or "")


def test_a_leaf_that_is_missing_has_no_feature() -> None:
    for name in ("FPU", "XMM3", "NX", "KVM_CLOCKSOURCE"):  # bits 0, 0, 20, 0
        assert not has_feature([], name)


def test_a_vendor_of_no_letters() -> None:
    assert vendor_of([(0, 0, 0, 0, 0, 0, 0)]) == "\0" * 12


def test_leaves_and_subleaves_have_32_bits() -> None:
    assert feature_name(0xFFFFFFFF, 0xFFFFFFFF, "eax", 31) is None
    for arguments in ((1 << 32, 0, "eax", 0), (0, 1 << 32, "eax", 0)):
        with pytest.raises(ArgumentError, match="0 to 0xffffffff"):
            feature_name(*arguments)
