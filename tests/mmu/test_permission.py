"""The permission bitmap and the protection keys, against the manual's rules, said here once more in other words."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu import permission
from hvmodel.mmu.permission import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    PFERR_FETCH_MASK,
    PFERR_IMPLICIT_ACCESS,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    permission_fault,
    update_permission_bitmask,
    update_pkru_bitmask,
)

W, U, F = PFERR_WRITE_MASK, PFERR_USER_MASK, PFERR_FETCH_MASK
BOTH = (False, True)


def may(access: int, pte: int, *, wp: bool, nx: bool, smep: bool, smap: bool, ac: bool) -> bool:
    """Intel SDM volume 3, 5.6.1 "Determination of Access Rights", case by case."""
    is_user_page, writable, executable = bool(pte & 4), bool(pte & 2), bool(pte & 1)
    if access & U:  # user-mode accesses
        if not is_user_page:
            return False
        if access & F:
            return executable or not nx
        return writable if access & W else True
    if access & F:  # supervisor-mode fetches
        if is_user_page and smep:
            return False
        return executable or not nx
    if is_user_page and smap and not ac:  # supervisor-mode data accesses
        return False
    return not access & W or writable or not wp


@pytest.mark.parametrize("wp", BOTH)
@pytest.mark.parametrize("nx", BOTH)
@pytest.mark.parametrize("smep", BOTH)
@pytest.mark.parametrize("smap", BOTH)
def test_every_access_to_every_page(wp: bool, nx: bool, smep: bool, smap: bool) -> None:
    bitmap = update_permission_bitmask(cr0_wp=wp, efer_nx=nx, cr4_smep=smep, cr4_smap=smap)
    assert len(bitmap) == 16
    for access, pte, ac in itertools.product((0, W, U, U | W, F, U | F), range(8), BOTH):
        code = permission_fault(bitmap, 0, pte, 0, access, rflags_ac=ac)
        assert code == (0 if may(access, pte, wp=wp, nx=nx, smep=smep, smap=smap, ac=ac) else 1), (access, pte, ac)


def test_the_processors_own_accesses_are_not_lifted() -> None:
    # SDM 5.6: "implicit supervisor-mode accesses" are forbidden to user pages whatever RFLAGS.AC says.
    bitmap = update_permission_bitmask(cr0_wp=True, efer_nx=True, cr4_smap=True)
    assert permission_fault(bitmap, 0, ACC_USER_MASK, 0, 0, rflags_ac=True) == 0
    assert permission_fault(bitmap, 0, ACC_USER_MASK, 0, PFERR_IMPLICIT_ACCESS, rflags_ac=True) == 1
    assert permission_fault(bitmap, 0, ACC_WRITE_MASK, 0, PFERR_IMPLICIT_ACCESS | W, rflags_ac=True) == 0


def test_ept_asks_for_what_the_access_is_and_nothing_else() -> None:
    bitmap = update_permission_bitmask(cr0_wp=False, efer_nx=False, cr4_smep=True, cr4_smap=True, ept=True)
    asked = {U: ACC_USER_MASK, W: ACC_WRITE_MASK, F: ACC_EXEC_MASK}
    for access, pte in itertools.product((0, U, W, F, U | W, U | F), range(8)):
        lacking = any(access & bit and not pte & right for bit, right in asked.items())
        assert permission_fault(bitmap, 0, pte, 0, access) == int(lacking)


@pytest.mark.parametrize("wp", BOTH)
def test_protection_keys(wp: bool) -> None:
    # SDM 5.6.2: of user pages, AD forbids data accesses, WD writes, those of the supervisor with CR0.WP only.
    mask = update_pkru_bitmask(cr0_wp=wp, cr4_pke=True)
    bitmap = update_permission_bitmask(cr0_wp=wp, efer_nx=True)
    for key, bits, access, pte in itertools.product((0, 7, 15), range(4), (0, W, U, U | W, F, U | F), range(8)):
        ad, wd = bits & 1, bits & 2
        of_key = False
        if pte & ACC_USER_MASK and not access & F:
            of_key = bool(ad or (wd and access & W and (access & U or wp)))
        by_rights = permission_fault(bitmap, 0, pte, 0, access)
        code = permission_fault(bitmap, mask, pte, key, access, pkru=bits << 2 * key)
        assert code == (0x21 if of_key else by_rights), (key, bits, access, pte)
        other = (key + 1) % 16
        assert permission_fault(bitmap, mask, pte, other, access, pkru=bits << 2 * key) == by_rights


def test_masks_seen_in_the_running_kernel() -> None:
    # Kernel 6.18: kvm_mmu.pkru_mask without and with CR0.WP.
    assert update_pkru_bitmask(cr0_wp=False, cr4_pke=True) == 0xD500
    assert update_pkru_bitmask(cr0_wp=True, cr4_pke=True) == 0xDD00
    assert update_pkru_bitmask(cr0_wp=True, cr4_pke=False) == 0


def test_refusals() -> None:
    bitmap = update_permission_bitmask(cr0_wp=True, efer_nx=True)
    calls: tuple[Callable[[], int], ...] = (
        lambda: permission_fault(bitmap[:15], 0, 0, 0, 0),
        lambda: permission_fault(bitmap, 1 << 32, 0, 0, 0),
        lambda: permission_fault(bitmap, 0, 8, 0, 0),
        lambda: permission_fault(bitmap, 0, 0, 16, 0),
        lambda: permission_fault(bitmap, 0, 0, 0, 8),  # RSVD
        lambda: permission_fault(bitmap, 0, 0, 0, 0x20),  # PK
        lambda: permission_fault(bitmap, 0, 0, 0, 0, pkru=-1),
    )
    for call in calls:
        with pytest.raises(ArgumentError):
            call()
    with pytest.raises(ArgumentTypeError):
        permission_fault(bitmap, 0, 0, 0, "w")  # type: ignore[arg-type]  # is what is asked
    with pytest.raises(ArgumentTypeError):
        permission_fault(16, 0, 0, 0, 0)  # type: ignore[arg-type]  # is what is asked


def test_the_ends_of_ranges_are_in_them() -> None:
    # Registers of 32 bits, keys 0 to 15, rights 0 to 7: all ones are such a number.  All keys forbid then (the code has
    # P and PK), and a mask of no bits asks no key.
    bitmap = update_permission_bitmask(cr0_wp=True, efer_nx=True)
    last = (1 << 32) - 1
    assert permission_fault(bitmap, last, 7, 15, 0, pkru=last) == 0x21
    assert permission_fault(bitmap, 0, 7, 15, 0, pkru=last) == 0
    # Without another word the register is 0, and every key permits all.
    assert [permission_fault(bitmap, last, 7, key, 0) for key in range(16)] == [0] * 16
    with pytest.raises(ArgumentError, match="pkru="):
        permission_fault(bitmap, 0, 7, 15, 0, pkru=last + 1)
    with pytest.raises(ArgumentError, match="permissions"):
        permission_fault(bitmap + b"\0", 0, 7, 15, 0)


def test_the_bits_of_an_error_code() -> None:
    # SDM 5.7, figure 5-12: P, W/R, U/S, RSVD, I/D, PK; KVM's own of arch/x86/include/asm/kvm_host.h@v6.18.
    bits = {"PRESENT": 0, "WRITE": 1, "USER": 2, "RSVD": 3, "FETCH": 4, "PK": 5, "GUEST_FINAL": 32, "GUEST_PAGE": 33}
    assert {name: getattr(permission, f"PFERR_{name}_MASK") for name in bits} == {n: 2**bit for n, bit in bits.items()}
    assert permission.PFERR_IMPLICIT_ACCESS == 2**48
    for bit in range(64):
        if bit in (0, 1, 2, 4, 32, 33, 48):
            assert permission.check_access("call", 1 << bit) == 1 << bit
        else:
            with pytest.raises(ArgumentError, match="call: access="):
                permission.check_access("call", 1 << bit)
