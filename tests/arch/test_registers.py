"""The bits of the system registers: against Linux's headers, the manuals' values after a reset, and arithmetic."""

from __future__ import annotations

import re
import subprocess
from enum import IntFlag
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel.arch import msr, registers, segment
from hvmodel.arch.registers import (
    APIC_BASE,
    CR0,
    CR3,
    CR4,
    CR8,
    DR6,
    DR6_FIXED,
    DR7,
    EFER,
    RFLAGS,
    XCR0,
    XSS,
    Bits,
    bit_names,
    field_of,
    is_canonical,
    page_table_of,
    pcid_of,
)
from hvmodel.errors import ArgumentError, ArgumentTypeError
from tests.need import need

ALL = (CR0, CR3, CR4, CR8, EFER, RFLAGS, XCR0, XSS, DR6, DR7, APIC_BASE)

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/processor-flags.h")


def header_flags(tmp_path: Path) -> dict[str, int]:
    # X86_CR0_PE and the like, with the values that a program has which was compiled with the header.
    words = re.findall(r"^#define (X86_(?:EFLAGS|CR0|CR3|CR4)_(\w+))\s", HEADER.read_text(), re.M)
    names = [full for full, word in words if not word.endswith(("_BIT", "_BITS", "_MASK"))]
    prints = "".join(f'printf("{name} %llu\\n", (unsigned long long)({name}));\n' for name in names)
    source = tmp_path / "flags.c"
    source.write_text(
        f"#include <asm/processor-flags.h>\n#include <stdio.h>\nint main(void) {{\n{prints}return 0;\n}}\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "flags", source], check=True, capture_output=True)
    out = subprocess.run([tmp_path / "flags"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in out.splitlines())}


def test_linux_header_has_the_same_bits(tmp_path: Path) -> None:
    need("gcc")
    if not HEADER.exists():
        pytest.skip(f"{HEADER} is not there")
    compared = 0
    for full, value in header_flags(tmp_path).items():
        kind, _, name = full.removeprefix("X86_").partition("_")
        register = {"CR0": CR0, "CR3": CR3, "CR4": CR4, "EFLAGS": RFLAGS}[kind]
        if name in register.__members__:
            assert int(register[name]) == value, full
            compared += 1
    assert compared >= 45


def test_every_member_is_bits_of_its_own() -> None:
    for register in ALL:
        seen = 0
        for name, member in register.__members__.items():
            assert 0 < int(member) < 1 << 64, name
            assert not seen & member, f"{register.__name__}.{name} overlaps another"
            seen |= int(member)


def test_reset_values_have_names_only() -> None:
    # Intel SDM volume 3, table 9-1: what the processor has after a reset.
    assert bit_names(CR0, 0x60000010) == ("CR0.ET", "CR0.NW", "CR0.CD")
    assert bit_names(RFLAGS, 2) == ("RFLAGS.FIXED",)
    assert bit_names(DR7, 0x400) == ("DR7.FIXED",)
    assert DR6_FIXED | DR6.BLD | DR6.RTM == 0xFFFF0FF0
    assert bit_names(APIC_BASE, 0xFEE00900)[:2] == ("APIC_BASE.BSP", "APIC_BASE.EN")


@given(st.sampled_from(ALL), st.integers(0, (1 << 64) - 1))
def test_each_set_bit_has_one_name(register: type[IntFlag], value: int) -> None:
    names = bit_names(register, value)
    assert len(set(names)) == len(names) == value.bit_count()
    assert all(name.startswith(register.__name__) for name in names)
    for name in names:
        if " bit " in name:
            bit = int(name.rpartition(" ")[2])
            assert value >> bit & 1
            assert not any(int(member) >> bit & 1 for member in register.__members__.values())


def test_names_of_bits_and_fields() -> None:
    assert bit_names(CR0, 1 << 31 | 1 << 40) == ("CR0.PG", "CR0 bit 40")
    assert bit_names(DR7, 3 << 18) == ("DR7.LEN0[0]", "DR7.LEN0[1]")
    assert bit_names(CR4, 0) == ()
    assert bit_names(EFER, EFER.LMA) == ("EFER.LMA",)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_numbers_that_no_register_has(value: int) -> None:
    for call in (
        lambda: bit_names(CR0, value),
        lambda: field_of(value, CR0.PG),
        lambda: is_canonical(value),
        lambda: page_table_of(value),
        lambda: pcid_of(0, value),
    ):
        with pytest.raises(ArgumentError, match=r"2\*\*64-1"):
            call()


@given(st.integers(0, (1 << 64) - 1))
def test_a_complement_clears_its_member_and_nothing_else(value: int) -> None:
    for module in (registers, msr, segment):
        for kind in vars(module).values():
            for member in kind.__members__.values() if isinstance(kind, type) and issubclass(kind, Bits) else ():
                assert value & ~member == value - (value & int(member)), member


def test_the_complement_that_a_plain_intflag_gets_wrong() -> None:
    assert 0xFEE00900 & ~APIC_BASE.EN == 0xFEE00100
    assert 0xFFFF4FF0 & ~DR6.BS == 0xFFFF0FF0
    assert 0xFEE00D00 & ~(APIC_BASE.EN | APIC_BASE.EXTD) == 0xFEE00100
    assert ~~CR0.PG is CR0.PG


def test_what_is_no_register() -> None:
    nothing: list[Any] = [5, "CR0", int, CR0.PG, []]
    for register in nothing:
        with pytest.raises(ArgumentTypeError, match="register"):
            bit_names(register, 1)
    for field in ("PG", None, True):
        with pytest.raises(ArgumentTypeError, match="field"):
            field_of(1, field)  # type: ignore[arg-type]


def test_what_is_no_number() -> None:
    for value in ("1", None, 1.0, True):
        with pytest.raises(ArgumentTypeError):
            bit_names(CR0, value)  # type: ignore[arg-type]
        with pytest.raises(ArgumentTypeError):
            is_canonical(value)  # type: ignore[arg-type]


def test_fields() -> None:
    # 0x3202: IOPL is bits 13:12, both set; LEN3 bits 31:30, RW3 bits 29:28.
    assert field_of(0x3202, RFLAGS.IOPL) == 3
    assert field_of(0x90000000, DR7.RW3) == 1
    assert field_of(0x90000000, DR7.LEN3) == 2
    assert field_of(0x123, CR8.TPL) == 3
    with pytest.raises(ArgumentError):
        field_of(1, CR0(0))


@given(st.integers(0, (1 << 64) - 1))
def test_canonical_is_a_sign_extension(address: int) -> None:
    for la57, bits in ((False, 48), (True, 57)):
        low = address & (1 << bits) - 1
        extended = low | ((1 << 64) - (1 << bits) if low >> bits - 1 else 0)
        assert is_canonical(address, la57=la57) == (extended == address)


def test_canonical_at_the_edges() -> None:
    assert is_canonical((1 << 47) - 1)
    assert not is_canonical(1 << 47)
    assert not is_canonical((1 << 64) - (1 << 47) - 1)
    assert is_canonical((1 << 64) - (1 << 47))
    assert is_canonical(1 << 55, la57=True)
    assert not is_canonical(1 << 56, la57=True)


def test_parts_of_cr3() -> None:
    cr3 = 1 << 63 | 0x12345018
    assert page_table_of(cr3) == 0x12345000
    assert page_table_of(0x123450E7, pae=True) == 0x123450E0
    assert pcid_of(cr3, 0) == 0
    assert pcid_of(cr3, CR4.PCIDE) == 0x18
    assert bit_names(CR3, cr3 & ~0x12345000) == ("CR3.PWT", "CR3.PCD", "CR3.NOFLUSH")


def test_all_is_listed() -> None:
    assert {"Bits", *[register.__name__ for register in ALL]} == {
        name for name in registers.__all__ if isinstance(getattr(registers, name), type)
    }


@pytest.mark.parametrize(
    ("register", "rows"),
    [
        # Linux's header lacks these.  Intel SDM volume 1, 13.1 (XCR0, XSS), APX's manual (bit 19), AMD APM volume 2,
        # 11.5.2 (LWP); volume 3, figure 19-1 (DR6, DR7), 11.4.4 (APIC base); AMD APM volume 2, 3.1.7 (EFER).
        (XCR0, "0 X87 SSE AVX BNDREGS BNDCSR OPMASK ZMM_HI256 HI16_ZMM - PKRU; 17 XTILECFG XTILEDATA APX; 62 LWP"),
        (XSS, "8 PT - PASID CET_U CET_S HDC UINTR LBR HWP"),
        (EFER, "0 SCE; 8 LME - LMA NXE SVME LMSLE FFXSR TCE - MCOMMIT INTWB - UAIE AIBRSE"),
        (APIC_BASE, "8 BSP - EXTD EN"),
        (DR6, "0 B0 B1 B2 B3; 11 BLD - BD BS BT RTM"),
        (DR7, "0 L0 G0 L1 G1 L2 G2 L3 G3 LE GE FIXED RTM - GD"),
        (CR4, "14 SMXE; 19 KL; 24 PKS UINTR - LASS LAM_SUP; 32 FRED"),
        (CR3, "61 LAM_U57 LAM_U48 NOFLUSH"),
    ],
)
def test_bits_by_the_manuals(register: type[Bits], rows: str) -> None:
    for row in rows.split(";"):
        first, *names = row.split()
        for bit, name in enumerate(names, int(first)):
            assert register.__members__.get(name) == (None if name == "-" else 1 << bit), name


def test_fields_by_the_manuals() -> None:
    # Intel SDM volume 3, figure 19-1: RWn bits 17+4n:16+4n, LENn bits 19+4n:18+4n; CR8 bits 3:0; IOPL bits 13:12.
    for at in range(4):
        assert DR7[f"RW{at}"] == 0b11 << 16 + 4 * at
        assert DR7[f"LEN{at}"] == 0b11 << 18 + 4 * at
    assert (CR8.TPL, RFLAGS.IOPL) == (0xF, 0x3000)


def test_what_is_no_number_is_no_value() -> None:
    with pytest.raises(ValueError, match="PG"):
        CR0("PG")
    assert int(CR0(1 << 70 | 1)) == 1 << 70 | 1  # of more than 64 bits nothing is cut
