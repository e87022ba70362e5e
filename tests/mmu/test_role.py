"""Roles: words that KVM's trace showed, and the rules of the source case by case; the rest is in `check_role`."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from itertools import product

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu import role as module
from hvmodel.mmu.role import (
    CPU_ROLE,
    EXTENDED_ROLE,
    PAGE_ROLE,
    CpuRole,
    ExtendedRole,
    PageRole,
    calc_cpu_role,
    child_role,
    decode_cpu_role,
    decode_role,
    nested_ept_role,
    nested_npt_role,
    root_pages,
    shadow_root_role,
    tdp_child_role,
    tdp_level,
    tdp_root_role,
)

PE, WP, PG = 1 << 0, 1 << 16, 1 << 31
PSE, PAE, LA57, SMEP, SMAP, PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
LME, LMA, NX = 1 << 8, 1 << 10, 1 << 11
LONG = (PE | PG | WP, PAE, LME | LMA | NX)


def test_the_bits_of_a_page_role() -> None:
    # Bit positions of the kernel's union, as in BTF (check_mmu_types compares them all): first bit, bits.
    places = {
        "level": (0, 4), "has_4_byte_gpte": (4, 1), "quadrant": (5, 2), "direct": (7, 1), "access": (8, 3),
        "invalid": (11, 1), "efer_nx": (12, 1), "cr0_wp": (13, 1), "smep_andnot_wp": (14, 1),
        "smap_andnot_wp": (15, 1), "ad_disabled": (16, 1), "guest_mode": (17, 1), "passthrough": (18, 1),
        "is_mirror": (19, 1), "smm": (24, 8),
    }  # fmt: skip
    assert {field.name: (field.low, field.width) for field in PAGE_ROLE.members} == places
    for name, (low, _) in places.items():
        role = PageRole(1 << low)
        assert getattr(role, name) == 1
        assert sum(getattr(role, other) for other in places) == 1
        assert PageRole(0xFFFFFFFF & ~(PAGE_ROLE.field(name).mask)).decode()[name] == 0
    assert PageRole(0xFFFFFFFF).smm == 255
    assert PageRole(0xFFFFFFFF).level == 15


def test_the_bits_of_an_extended_role() -> None:
    names = ["valid", "execonly", "cr4_pse", "cr4_pke", "cr4_smap", "cr4_smep", "cr4_la57", "efer_lma"]
    assert [field.name for field in EXTENDED_ROLE.members] == names
    for bit, name in enumerate(names):
        assert getattr(ExtendedRole(1 << bit), name) == 1
        assert CPU_ROLE.field(name).low == 32 + bit
        assert ExtendedRole.of(**{name: 1}).word == 1 << bit


# (CR0, CR4, EFER) -> CPU role, by the source; root role, as kvm_mmu_get_page of Linux 6.18 shows it.
SEEN = [
    (LONG, 0x81_0000_3704, 0x3704),
    ((PE | PG, PAE, LME | LMA | NX), 0x81_0000_1704, 0x1704),
    ((PE | PG | WP, PAE, LME | LMA), 0x81_0000_2704, 0x3704),
    ((PE | PG | WP, PAE | PSE, LME | LMA | NX), 0x85_0000_3704, 0x3704),
    ((0, 0, 0), 0x1_0000_0780, 0x1783),
    ((PE | PG, PAE | SMEP, LME | LMA | NX), 0xA1_0000_5704, 0x5704),
]


@pytest.mark.parametrize(("registers", "cpu", "root"), SEEN)
def test_words_that_were_seen(registers: tuple[int, int, int], cpu: int, root: int) -> None:
    role = calc_cpu_role(*registers)
    assert role == CpuRole(cpu)
    assert shadow_root_role(role) == PageRole(root)
    assert not role.decode().problems
    assert not decode_role(root).problems


def rules(cr0: int, cr4: int, efer: int) -> dict[str, int]:
    # kvm_calc_cpu_role in words of the source, a field at a time.
    if not cr0 & PG:
        return {"access": 7, "direct": 1, "valid": 1}
    long_mode, wp = bool(efer & LMA), bool(cr0 & WP)
    level = (5 if cr4 & LA57 else 4) if long_mode else (3 if cr4 & PAE else 2)
    fields = {
        "access": 7,
        "valid": 1,
        "level": level,
        "efer_nx": bool(efer & NX),
        "cr0_wp": wp,
        "smep_andnot_wp": bool(cr4 & SMEP) and not wp,
        "smap_andnot_wp": bool(cr4 & SMAP) and not wp,
        "has_4_byte_gpte": not cr4 & PAE,
        "cr4_pse": bool(cr4 & PSE),
        "cr4_pke": long_mode and bool(cr4 & PKE),
        "cr4_smap": bool(cr4 & SMAP),
        "cr4_smep": bool(cr4 & SMEP),
        "cr4_la57": long_mode and bool(cr4 & LA57),
        "efer_lma": long_mode,
    }
    return {name: int(value) for name, value in fields.items()}


def sums(*bits: int) -> list[int]:
    return [sum(chosen) for chosen in product(*[(0, bit) for bit in bits])]


def test_every_combination_of_the_bits_that_matter() -> None:
    seen = 0
    for cr0, cr4, efer in product(sums(PE, PG, WP), sums(PSE, PAE, LA57, SMEP, SMAP, PKE), sums(LME, LMA, NX)):
        contradicts = (
            (cr0 & PG and not cr0 & PE)
            or bool(efer & LMA) != bool(efer & LME and cr0 & PG)
            or (efer & LMA and not cr4 & PAE)
        )
        if contradicts:
            with pytest.raises(ArgumentError, match=r"calc_cpu_role: (cr0|cr4|efer)="):
                calc_cpu_role(cr0, cr4, efer)
            continue
        role = calc_cpu_role(cr0, cr4, efer)
        assert role.as_u64 == CPU_ROLE.encode(**rules(cr0, cr4, efer)), (hex(cr0), hex(cr4), hex(efer))
        assert not role.decode().problems
        root = shadow_root_role(role)
        base = role.base
        assert root == base.replace(level=max(base.level, 3), efer_nx=1)
        # In SMM and in a nested guest the word has that bit, and nothing else is different.
        for smm, guest_mode in product((False, True), repeat=2):
            with_both = calc_cpu_role(cr0, cr4, efer, smm=smm, guest_mode=guest_mode)
            assert with_both.base == base.replace(smm=int(smm), guest_mode=int(guest_mode))
            assert with_both.ext == role.ext
        seen += 1
    # CR0.PG clear: PE, WP, 6 of CR4, LME, NX; set: WP, 6 of CR4, NX; in long mode: WP, 5 of CR4, NX.
    assert seen == 2**10 + 2**8 + 2**7


def test_other_bits_of_the_registers_do_not_matter() -> None:
    known = (PE | PG | WP, PSE | PAE | LA57 | SMEP | SMAP | PKE, LME | LMA | NX)
    word = calc_cpu_role(*LONG)
    for which in range(3):
        for bit in range(64):
            if not known[which] >> bit & 1:
                registers = list(LONG)
                registers[which] |= 1 << bit
                assert calc_cpu_role(*registers) == word


def test_tdp_roots() -> None:
    # kvm_calc_tdp_mmu_root_page_role: access 7, cr0_wp, efer_nx, direct, level; ad_disabled without A/D bits.
    assert tdp_root_role(4).word == 4 | 1 << 7 | 7 << 8 | 1 << 12 | 1 << 13
    assert tdp_root_role(5, ad_enabled=False, smm=True).word == tdp_root_role(4).word + 1 + (1 << 16) + (1 << 24)
    assert tdp_root_role(4, guest_mode=True, mirror=True).word == tdp_root_role(4).word | 1 << 17 | 1 << 19
    assert tdp_child_role(tdp_child_role(tdp_root_role(4))) == tdp_root_role(4).replace(level=2)
    with pytest.raises(ArgumentError, match="tdp_child_role: parent="):
        tdp_child_role(PageRole(0x3781))
    for level in (2, 6):
        with pytest.raises(ArgumentError, match="tdp_root_role: level="):
            tdp_root_role(level)


def test_levels_of_tdp() -> None:
    # kvm_mmu_get_tdp_level: forced wins; 5 levels are used only above 48 bits.
    assert [tdp_level(bits) for bits in (36, 48, 49, 52)] == [4, 4, 5, 5]
    assert [tdp_level(bits, max_level=4) for bits in (48, 52)] == [4, 4]
    assert [tdp_level(bits, forced=5) for bits in (36, 52)] == [5, 5]
    assert tdp_level(52, max_level=3) == 3
    assert tdp_level(52, forced=3) == 3
    for arguments in ((53, 5, None), (48, 6, None), (48, 2, None), (48, 5, 2), (48, 5, 6), (48, 5, 0)):
        with pytest.raises(ArgumentError, match="tdp_level"):
            tdp_level(arguments[0], max_level=arguments[1], forced=arguments[2])


def test_nested_ept() -> None:
    for level, accessed_dirty, execonly in product((4, 5), (False, True), (False, True)):
        role = nested_ept_role(level, accessed_dirty=accessed_dirty, execonly=execonly)
        assert role.base == PageRole.of(level=level, access=7, guest_mode=1, ad_disabled=not accessed_dirty)
        assert role.ext == ExtendedRole.of(valid=1, execonly=execonly)
    assert nested_ept_role().base.ad_disabled == 1
    for level in (3, 6):
        with pytest.raises(ArgumentError, match="nested_ept_role: level="):
            nested_ept_role(level)


def test_nested_npt() -> None:
    # kvm_init_shadow_npt_mmu: CR0 is PG alone, CR4 without PKE, in guest mode; the root has the host's levels.
    cpu, root = nested_npt_role(PAE | PKE | SMEP, LME | LMA | NX)
    expected = rules(PG, PAE | SMEP, LME | LMA | NX)
    assert cpu.as_u64 == CPU_ROLE.encode(**expected, guest_mode=1)
    assert root == cpu.base
    cpu, root = nested_npt_role(PAE, LME | LMA | NX, level=5)
    assert root == cpu.base.replace(level=5, passthrough=1)
    cpu, root = nested_npt_role(PAE | LA57, LME | LMA | NX, level=5, smm=True)
    assert (root, root.passthrough, root.level, root.smm) == (cpu.base, 0, 5, 1)
    # A hypervisor of 2-level paging: its roots are four tables of level 2, the role's level is the host's.
    cpu, root = nested_npt_role(0, NX, level=5)
    assert (cpu.base.level, root.level, root.has_4_byte_gpte, root.passthrough) == (2, 5, 1, 0)
    assert not root.decode().problems
    assert [(gfn, page.quadrant, page.level) for _, gfn, page in root_pages(cpu, root, 9)] == [
        (9, at, 2) for at in range(4)
    ]
    cpu, root = nested_npt_role(PAE, 0)
    assert (cpu.base.level, root.level, root.efer_nx) == (3, 4, 0)
    for cr4, efer, field in ((0, LME | LMA, "cr4"), (PAE, LMA, "efer"), (PAE, LME, "efer")):
        with pytest.raises(ArgumentError, match=f"nested_npt_role: {field}="):
            nested_npt_role(cr4, efer)
    with pytest.raises(ArgumentError, match="nested_npt_role: level="):
        nested_npt_role(PAE, LME | LMA, level=2)


def test_children() -> None:
    root = PageRole.of(level=5, access=7, efer_nx=1, cr0_wp=1, passthrough=1, smm=1, guest_mode=1)
    child = child_role(root, 5, True, index=511)
    assert child == root.replace(level=4, access=5, direct=1, passthrough=0)
    assert child_role(child, 0, False, index=3) == root.replace(level=3, access=0, passthrough=0)
    directory = PageRole.of(level=2, has_4_byte_gpte=1, quadrant=3, access=7)
    assert [child_role(directory, 7, False, index=i).quadrant for i in (0, 1, 2, 511)] == [0, 1, 0, 1]
    assert child_role(directory, 7, False).has_4_byte_gpte == 1
    # Below a 4 MiB page of the guest: direct, and still of 4-byte entries, as kvm_mmu_child_role leaves it.
    small = child_role(directory, 7, True, index=511)
    assert small == PageRole.of(level=1, has_4_byte_gpte=1, quadrant=1, access=7, direct=1)
    assert not small.decode().problems
    assert child_role(PageRole.of(level=2, quadrant=2), 7, False, index=1).quadrant == 2
    for parent, access, index, field in (
        (PageRole(0x3701), 7, 0, "parent"),
        (PageRole(0), 7, 0, "parent"),
        (directory.replace(level=3), 7, 0, "parent"),
        (root, 8, 0, "access"),
        (root, 7, 512, "index"),
    ):
        with pytest.raises(ArgumentError, match=f"child_role: {field}="):
            child_role(parent, access, False, index=index)


def test_roots() -> None:
    long_mode = calc_cpu_role(*LONG)
    assert root_pages(long_mode, shadow_root_role(long_mode), 0x123) == ((0, 0x123, PageRole(0x3704)),)
    five = calc_cpu_role(LONG[0], PAE | LA57, LONG[2])
    assert root_pages(five, shadow_root_role(five), 7) == ((0, 7, PageRole(0x3705)),)
    assert root_pages(long_mode, tdp_root_role(4), 0x123) == ((0, 0, tdp_root_role(4)),)
    none = calc_cpu_role(PE, 0, 0)
    # As the trace shows them: role 0x1782 at 0, 1, 2, 3 GiB.
    assert root_pages(none, shadow_root_role(none), 0x123) == tuple(
        (i, gfn, PageRole(0x1782)) for i, gfn in enumerate((0, 0x40000, 0x80000, 0xC0000))
    )
    two = calc_cpu_role(PE | PG, PSE, 0)
    assert root_pages(two, shadow_root_role(two), 0x55) == tuple(
        (i, 0x55, PageRole.of(level=2, has_4_byte_gpte=1, quadrant=i, access=7, efer_nx=1)) for i in range(4)
    )
    pae = calc_cpu_role(PE | PG, PAE, NX)
    found = root_pages(pae, shadow_root_role(pae), 0x55, [0x1001, 0x2000, 0x8_0000_0000_3001, 0xFFF0_0000_0000_4FFF])
    role = PageRole.of(level=2, access=7, efer_nx=1)
    assert found == ((0, 1, role), (2, 0x80_0000_0003, role), (3, 4, role))
    for pdptrs in (None, [1, 2, 3]):
        with pytest.raises(ArgumentError, match="root_pages: pdptrs="):
            root_pages(pae, shadow_root_role(pae), 0x55, pdptrs)
    with pytest.raises(ArgumentError, match="root_pages: cpu_role="):
        root_pages(none, shadow_root_role(pae), 0x55, [1, 1, 1, 1])
    with pytest.raises(ArgumentError, match=r"pdptrs\[1\]="):
        root_pages(pae, shadow_root_role(pae), 0x55, [0, 1 << 64, 0, 0])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (0x700, "level 0"),
        (0x780, "level 0"),
        (0x721, "quadrant without has_4_byte_gpte"),
        (0x714, "has_4_byte_gpte with level 4"),
        (0x751, "quadrant 2 at level 1"),
        (0x6704, "smep_andnot_wp with cr0_wp"),
        (0xA704, "smap_andnot_wp with cr0_wp"),
        (0x40704, "passthrough with level 4"),
        (0x706, "level .* is 6, which is reserved"),
        (0x2000704, "smm .* is 2, which is reserved"),
        (0x100704, "bit 20 is reserved"),
        (0x800704, "bit 23 is reserved"),
    ],
)
def test_problems_of_a_page_role(word: int, said: str) -> None:
    problems = decode_role(word).problems
    assert [p for p in problems if re.search(said, p)], problems
    assert len(problems) == 1, problems


@pytest.mark.parametrize(
    "word",
    [
        0x3704,
        0x1782,
        0x40705,
        0x80784,
        0x772 & ~0x20,
        0x752,
        0x711,
        0x731,
        0x713,
        0x4704,
        0x8704,
        0x1000704,
        0xF01,
        0x792,
        0x7B1,
        0x20714,
    ],
)
def test_right_page_roles_have_no_problem(word: int) -> None:
    assert decode_role(word).problems == ()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (0x3704, "valid is clear"),
        (0x1_0000_0790, "direct with has_4_byte_gpte"),
        (0x81_0002_0714, "has_4_byte_gpte with level 4"),
        (0x5_0000_0780, "direct with bits of an extended role"),
        (0x81_0000_4704, "smep_andnot_wp without cr4_smep"),
        (0x81_0000_8704, "smap_andnot_wp without cr4_smap"),
        (0x41_0000_0703, "cr4_la57 or cr4_pke without efer_lma"),
        (0x9_0000_0703, "cr4_la57 or cr4_pke without efer_lma"),
        (0x81_0000_0F04, "invalid is not a matter of registers"),
        (0x81_0004_0705, "passthrough is not"),
        (0x81_0008_0704, "is_mirror is not"),
        (0x1_0000_0732, "quadrant is not"),
        (0x1_0000_0700, "level 0"),
        (0x101_0000_0780 | 1 << 33, "direct with bits"),
    ],
)
def test_problems_of_a_cpu_role(word: int, said: str) -> None:
    problems = decode_cpu_role(word).problems
    assert [p for p in problems if said in p], problems


def test_versions() -> None:
    assert decode_role(0x80784, version="6.14").problems == ()
    assert decode_role(0x80784, version="6.18.44-x").problems == ()
    assert decode_role(0x80784, version="7.0").problems == ()
    for version in ("6.13", "6.6.30", "5.19"):
        assert decode_role(0x80784, version=version).problems == ("bit 19 is reserved before Linux 6.14",)
    for wrong in ("6", "", "six.one", "6.x"):
        with pytest.raises(ArgumentError, match="version="):
            decode_role(0x3704, version=wrong)
        with pytest.raises(ArgumentError, match="version="):
            decode_cpu_role(0x3704, version=wrong)
    with pytest.raises(ArgumentError, match=r"version=6\.18"):
        decode_role(0x3704, version=6.18)  # type: ignore[arg-type]


def test_words_are_checked() -> None:
    calls: list[tuple[Callable[[int], object], int]] = [
        (PageRole.from_word, 32),
        (ExtendedRole.from_word, 32),
        (decode_role, 32),
        (CpuRole.from_word, 64),
        (decode_cpu_role, 64),
    ]
    for call, bits in calls:
        for word in (1 << bits, -1):
            with pytest.raises(ArgumentError, match="word="):
                call(word)
    assert CpuRole.from_word(2**64 - 1).as_u64 == int(decode_cpu_role(2**64 - 1)) == 2**64 - 1
    assert PageRole.from_word(2**32 - 1).word == int(decode_role(2**32 - 1)) == 2**32 - 1
    with pytest.raises(ArgumentTypeError):
        PageRole.from_word("0x3704")  # type: ignore[arg-type]
    for fields in ({"level": 6}, {"access": 8}, {"nothing": 1}, {"smm": 2}):
        with pytest.raises(ArgumentError):
            PageRole.of(**fields)
        with pytest.raises(ArgumentError):
            PageRole(0x3704).replace(**fields)
    for name, value in (("cr0", 1 << 64), ("cr4", -1), ("efer", 1 << 64)):
        given = dict(zip(("cr0", "cr4", "efer"), LONG, strict=True)) | {name: value}
        with pytest.raises(ArgumentError, match=f"calc_cpu_role: {name}="):
            calc_cpu_role(given["cr0"], given["cr4"], given["efer"])


def test_values_are_values() -> None:
    assert (PageRole().word, ExtendedRole().word, CpuRole().as_u64) == (0, 0, 0)
    for value in (PageRole(0x3704), ExtendedRole(0x81), CpuRole(0x8100003704)):
        assert pickle.loads(pickle.dumps(value)) == value
        assert len({value, pickle.loads(pickle.dumps(value))}) == 1
    assert PageRole(0x3704) != ExtendedRole(0x3704)
    assert repr(PageRole(0x103704)) == "PageRole(level=4, access=7, efer_nx=1, cr0_wp=1, reserved=0x100000)"
    assert "PageRole(level=4" in repr(CpuRole(0x8100003704))


def test_every_form_of_the_words() -> None:
    decoded = decode_role(0x1582)
    assert [(p.name, p.meaning) for p in decoded.parts if p.value] == [
        ("efer_nx", "bit 63 of an entry is NX"),
        ("access", "-ux"),
        ("direct", "maps frames one to one; no guest table is behind it"),
        ("level", "entries of 2M"),
    ]
    assert module.PAGE_ROLE.mask == 0xFF0FFFFF
    assert "kvm_cpu_role" in decode_cpu_role(0x8100003704).table()


def test_help_says_what_a_field_means() -> None:
    for field in PAGE_ROLE.members:
        assert vars(module.PageRole)[field.name].__doc__ == (field.text or field.name)
