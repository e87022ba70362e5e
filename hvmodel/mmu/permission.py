"""What an access may do: the permission bitmap, the protection-key mask, and the page fault that a forbidden one takes.

An access, and a page fault's error code, are words of these bits (the processor's, and KVM's own above bit 31):

    48        35   34    33    32           31    15   6  5  4  3    2 1 0
    implicit  vmpl sizem encr. final  page  rmp   sgx  SS PK F  RSVD U W P
                               32=final 33=page

    U  by CPL 3    W  a write    F  an instruction fetch    none of the three: a read by the supervisor
    implicit  by the processor itself, to a system structure: RFLAGS.AC does not lift SMAP for it

The bitmap is 16 bytes.  The byte is chosen by the access, `(W | U | F | not_smap << 3) >> 1`: RSVD never is an access'
bit, so its place says that SMAP is lifted.  The bit is chosen by what the walk allows (`pte_access`, 0 to 7):

    2  ACC_USER   (EPT: readable)      1  ACC_WRITE      0  ACC_EXEC

and is 1 where the access faults.  The mask of protection keys has two bits (write-disable, access-disable) for each
such index, where RSVD's place says whether the page is a user page.

Sources: kernel arch/x86/kvm/mmu/mmu.c update_permission_bitmask, update_pkru_bitmask, arch/x86/kvm/mmu.h
permission_fault, arch/x86/include/asm/kvm_host.h PFERR_*@v6.18; Intel SDM volume 3, 5.6 and 5.7.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError, ArgumentTypeError

__all__ = [
    "ACCESS_BITS",
    "ACC_ALL",
    "ACC_EXEC_MASK",
    "ACC_USER_MASK",
    "ACC_WRITE_MASK",
    "PFERR_FETCH_MASK",
    "PFERR_GUEST_FINAL_MASK",
    "PFERR_GUEST_PAGE_MASK",
    "PFERR_IMPLICIT_ACCESS",
    "PFERR_PK_MASK",
    "PFERR_PRESENT_MASK",
    "PFERR_RSVD_MASK",
    "PFERR_USER_MASK",
    "PFERR_WRITE_MASK",
    "check_access",
    "permission_fault",
    "update_permission_bitmask",
    "update_pkru_bitmask",
]

ACC_EXEC_MASK, ACC_WRITE_MASK, ACC_USER_MASK, ACC_ALL = 1, 2, 4, 7
"""The bits of `pte_access` and of a role's `access`."""

PFERR_PRESENT_MASK = 1
PFERR_WRITE_MASK = 1 << 1
PFERR_USER_MASK = 1 << 2
PFERR_RSVD_MASK = 1 << 3
PFERR_FETCH_MASK = 1 << 4
PFERR_PK_MASK = 1 << 5
PFERR_GUEST_FINAL_MASK = 1 << 32
PFERR_GUEST_PAGE_MASK = 1 << 33
PFERR_IMPLICIT_ACCESS = 1 << 48

_KINDS = PFERR_WRITE_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK


def update_permission_bitmask(
    *, cr0_wp: bool, efer_nx: bool, cr4_smep: bool = False, cr4_smap: bool = False, ept: bool = False
) -> bytes:
    """The permission bitmap, 16 bytes, of paging with these bits; `ept`: of EPT, where they say nothing.

    kernel mmu/mmu.c update_permission_bitmask@v6.18.

    >>> update_permission_bitmask(cr0_wp=True, efer_nx=True).hex(" ")
    '00 33 0f 3f 00 33 0f 3f 55 77 5f 7f 55 77 5f 7f'
    """
    found = bytearray(16)
    for index in range(16):
        pfec = index << 1
        write, user, fetch = pfec & PFERR_WRITE_MASK, pfec & PFERR_USER_MASK, pfec & PFERR_FETCH_MASK
        lifted = pfec & PFERR_RSVD_MASK  # in its place: SMAP does not apply
        for pte_access in range(8):
            x, w, u = pte_access & ACC_EXEC_MASK, pte_access & ACC_WRITE_MASK, pte_access & ACC_USER_MASK
            fault = bool(user and not u)
            if ept:
                fault |= bool(write and not w) or bool(fetch and not x)
            else:
                fault |= bool(write and not w and (cr0_wp or user))
                fault |= bool(fetch and not x and efer_nx)
                fault |= bool(fetch and u and not user and cr4_smep)
                fault |= bool(not fetch and u and not user and cr4_smap and not lifted)
            found[index] |= fault << pte_access
    return bytes(found)


def update_pkru_bitmask(*, cr0_wp: bool, cr4_pke: bool) -> int:
    """The mask of protection keys, 32 bits: 0 without CR4.PKE (which counts in long mode only).

    kernel mmu/mmu.c update_pkru_bitmask@v6.18.

    >>> hex(update_pkru_bitmask(cr0_wp=True, cr4_pke=True)), hex(update_pkru_bitmask(cr0_wp=False, cr4_pke=True))
    ('0xdd00', '0xd500')
    """
    mask = 0
    for pfec in range(0, 32, 2) if cr4_pke else ():
        if pfec & PFERR_FETCH_MASK or not pfec & PFERR_RSVD_MASK:  # in its place: a user page
            continue
        mask |= 1 << pfec  # access-disable
        if pfec & PFERR_WRITE_MASK and (pfec & PFERR_USER_MASK or cr0_wp):
            mask |= 2 << pfec  # write-disable
    return mask


def permission_fault(
    permissions: bytes,
    pkru_mask: int,
    pte_access: int,
    pte_pkey: int,
    access: int,
    *,
    pkru: int = 0,
    rflags_ac: bool = False,
) -> int:
    """0 where the access may be done, else the bits it adds to the error code: P, or P and PK.

    `permissions`, `pkru_mask`: of `update_permission_bitmask` and `update_pkru_bitmask`.  `pte_access`: what the walk
    allows, 0 to 7.  `pte_pkey`: bits 62:59 of the last entry.  `access`: PFERR bits; RSVD, PK and SS are none.
    `pkru`: the register.  `rflags_ac`: RFLAGS.AC, which lifts SMAP for an access that is not implicit.

    kernel arch/x86/kvm/mmu.h permission_fault@v6.18.  ArgumentError for what is out of range.

    >>> bitmap = update_permission_bitmask(cr0_wp=True, efer_nx=True)
    >>> permission_fault(bitmap, 0, ACC_USER_MASK, 0, PFERR_WRITE_MASK | PFERR_USER_MASK)
    1
    """
    call = "permission_fault"
    if not isinstance(permissions, (bytes, bytearray)):
        raise ArgumentTypeError(call, "permissions", permissions, "16 bytes, of update_permission_bitmask")
    if len(permissions) != 16:
        raise ArgumentError(call, "permissions", permissions, "16 bytes, of update_permission_bitmask")
    number(call, "pkru_mask", pkru_mask, (1 << 32) - 1)
    number(call, "pte_access", pte_access, ACC_ALL)
    number(call, "pte_pkey", pte_pkey, 15)
    number(call, "pkru", pkru, (1 << 32) - 1)
    check_access(call, access)
    return _permission_fault(permissions, pkru_mask, pte_access, pte_pkey, access, pkru, rflags_ac)


ACCESS_BITS = _KINDS | PFERR_PRESENT_MASK | PFERR_GUEST_FINAL_MASK | PFERR_GUEST_PAGE_MASK | PFERR_IMPLICIT_ACCESS


def check_access(call: str, access: int) -> int:
    """`access` as an int, of the bits that one may have: U, W, F, implicit; P and those of nesting, which say nothing.

    ArgumentError for others; ArgumentTypeError.
    """
    access = number(call, "access", access)
    if access & ~ACCESS_BITS:
        raise ArgumentError(call, "access", access, "PFERR bits W 2, U 4, F 0x10, implicit 1<<48", "RSVD, PK, SS")
    return access


def _permission_fault(
    permissions: bytes, pkru_mask: int, pte_access: int, pte_pkey: int, access: int, pkru: int, rflags_ac: bool
) -> int:
    fault = _is_forbidden(permissions, pte_access, access, rflags_ac)
    errcode = PFERR_PRESENT_MASK
    if pkru_mask:
        at = access & _KINDS | (PFERR_RSVD_MASK if pte_access & ACC_USER_MASK else 0)
        if pkru >> pte_pkey * 2 & pkru_mask >> at & 3:
            fault = 1
            errcode |= PFERR_PK_MASK
    return errcode if fault else 0


def _is_forbidden(permissions: bytes, pte_access: int, access: int, rflags_ac: bool) -> int:
    # By the rights of the entries; protection keys come on top.
    not_smap = PFERR_RSVD_MASK if rflags_ac and not access & PFERR_IMPLICIT_ACCESS else 0
    return permissions[(access & _KINDS | not_smap) >> 1] >> pte_access & 1
