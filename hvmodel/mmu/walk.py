"""The walk through a guest's page tables: `Walker`, its `Walk`s, and `NestedWalker`, the walk in two dimensions.

One walker for the three kinds of tables, as paging_tmpl.h is one text compiled for three:

    PTTYPE   entry   levels                   A   D   present          permits
    32       4       2                        5   6   bit 0            W 1, U 2
    64       8       3 (PAE), 4, 5            5   6   bit 0            W 1, U 2, X not 63
    EPT      8       4, 5                     8   9   any of 2:0       R 0, W 1, X 2; A, D with EPTP[6] only

    entry of the level above (at first CR3)      address
       51                  12                    |  9 bits for each level (10 of 32)  |  12  |
       |  table's frame     |  +  index * size   =  gpa of the entry of this level

    from the root on:  read the entry; it is in no memory -> not present
                       AND its rights to those so far;  not present -> fault 0|W|U|F
                       a reserved bit -> fault RSVD|P|W|U|F;  level 1, or bit 7 -> the last
    then:              permission_fault -> fault P[|PK]|W|U|F;  A in every entry, and D in the last on a write

A walk that faults sets nothing.  PAE's top entries (PDPTEs) restrict nothing and have no A.  F is reported only where
EFER.NXE or CR4.SMEP is 1.

Sources: kernel arch/x86/kvm/mmu/paging_tmpl.h walk_addr_generic, update_accessed_dirty_bits, protect_clean_gpte,
arch/x86/kvm/mmu/mmu.c nonpaging_gva_to_gpa, arch/x86/kvm/x86.c translate_nested_gpa@v6.18; Intel SDM volume 3,
chapters 5 and 30.
"""

from __future__ import annotations

from ..arch.number import ALL, number
from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .guest_memory import GuestMemory
from .permission import (
    ACC_ALL,
    ACC_WRITE_MASK,
    PFERR_FETCH_MASK,
    PFERR_GUEST_FINAL_MASK,
    PFERR_GUEST_PAGE_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    _permission_fault,
    check_access,
    update_permission_bitmask,
    update_pkru_bitmask,
)
from .reserved import ReservedBits, reset_guest_rsvds_bits_mask, reset_rsvds_bits_mask_ept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

    from .guest_memory import Piece

    Memory = GuestMemory | Buffer | Iterable[Piece]

__all__ = ["Entry", "Fault", "GuestMmu", "NestedWalk", "NestedWalker", "Update", "Walk", "Walker", "walk_addr"]

_PE, _WP, _PG = 1 << 0, 1 << 16, 1 << 31
_PSE, _PAE, _LA57, _SMEP, _SMAP, _PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
_LME, _LMA, _NXE = 1 << 8, 1 << 10, 1 << 11
_AC = 1 << 18
_NX = 1 << 63
_ADDRESS = (1 << 52) - 4096
_LEVELS = {"paging64": (3, 4, 5), "paging32": (2,), "ept": (4, 5), "nonpaging": (0,)}
_GVA_IS_VALID, _GVA_TRANSLATED = 1 << 7, 1 << 8


class Entry(Value):
    """One entry that a walk read: the `level` of its table, its guest physical address, its value, its bytes.

    `nested`: it is one of the nested tables (EPT, NPT).  Of the guest's tables, `gpa` is an address of that guest.
    """

    level: int
    gpa: int
    value: int
    size: int = 8
    nested: bool = False

    @property
    def gfn(self) -> int:
        """The frame of its table."""
        return self.gpa >> 12

    @property
    def index(self) -> int:
        """Its number in its table."""
        return (self.gpa & 0xFFF) // self.size


class Update(Value):
    """A and D bits that a walk sets in one entry: `old` becomes `new`.

    `accessed`, `dirty`: which of the two, as KVM traces them (kvm_mmu_set_accessed_bit, kvm_mmu_set_dirty_bit).  In
    memory that may not be written nothing is stored, though it is traced.
    """

    level: int
    gpa: int
    old: int
    new: int
    size: int = 8
    accessed: bool = False
    dirty: bool = False
    nested: bool = False

    @property
    def gfn(self) -> int:
        """The frame of its table."""
        return self.gpa >> 12

    @property
    def index(self) -> int:
        """Its number in its table."""
        return (self.gpa & 0xFFF) // self.size


class Fault(Value):
    """Why a walk failed: `error_code` as in the kernel's struct x86_exception, at `address`.

    Of EPT: `exit_qualification` of the violation; None for a misconfiguration (RSVD in `error_code`).
    `nested`: it is a fault of the nested tables; `address` then is the address of the guest's memory.
    """

    error_code: int
    address: int
    nested: bool = False
    exit_qualification: int | None = None


class GuestMmu(Value):
    """What a walk has to know besides memory and address: of the kernel's struct kvm_mmu, and of the vCPU's registers.

    `kind`: "paging64", "paging32", "ept" or "nonpaging".  `level`: of the root; 3 is PAE.  `root`: its address.
    `rsvd`, `permissions`, `pkru_mask`: as reserved.py and permission.py have them.  `reports_fetch`: F goes into the
    error code.  `pdptrs`: PAE's four top entries as the processor holds them, or None: the walk reads them.
    """

    kind: str
    level: int
    root: int
    rsvd: ReservedBits
    permissions: bytes
    pkru_mask: int = 0
    pkru: int = 0
    rflags_ac: bool = False
    reports_fetch: bool = False
    have_ad: bool = True
    cr4_pse: bool = False
    pse36: bool = True
    pdptrs: tuple[int, int, int, int] | None = None

    @property
    def entry_size(self) -> int:
        """Bytes of an entry: 4 or 8."""
        return 4 if self.kind == "paging32" else 8

    @property
    def linear_bits(self) -> int:
        """Bits of an address that a walk takes: 32 below long mode, else 64.

        The walk looks at 48 or 57 of them; a processor refuses an address that is not canonical before any walk.
        """
        return 32 if self.kind == "paging32" or self.level == 3 else 64

    @classmethod
    def of(
        cls,
        call: str = "GuestMmu.of",
        *,
        cr3: int = 0,
        cr0: int = _PG | _WP | _PE,
        cr4: int = _PAE,
        efer: int = _LMA | _LME | _NXE,
        rflags: int = 2,
        pkru: int = 0,
        maxphyaddr: int = 52,
        gbpages: bool = True,
        amd: bool = False,
        pse36: bool = True,
        pdptrs: tuple[int, int, int, int] | None = None,
    ) -> GuestMmu:
        """Of a processor's registers; see `Walker` for what they are and what is refused."""
        for name, value in (("cr0", cr0), ("cr3", cr3), ("cr4", cr4), ("efer", efer), ("rflags", rflags)):
            number(call, name, value)
        number(call, "pkru", pkru, (1 << 32) - 1)
        number(call, "maxphyaddr", maxphyaddr, 52, 32)
        paging, pae, lma = bool(cr0 & _PG), bool(cr4 & _PAE), bool(efer & _LMA)
        if paging and not cr0 & _PE:
            raise ArgumentError(call, "cr0", cr0, "PE with PG", "paging is there in protected mode only")
        if lma != bool(paging and efer & _LME):
            raise ArgumentError(call, "efer", efer, "LMA where there are LME and CR0.PG, and only there")
        if lma and not pae:
            raise ArgumentError(call, "cr4", cr4, "PAE with EFER.LMA", "long mode has entries of 8 bytes")
        if not paging:
            return cls("nonpaging", 0, 0, reset_guest_rsvds_bits_mask(0), bytes(16))
        level = (5 if cr4 & _LA57 else 4) if lma else 3 if pae else 2
        last = (1 << 32) - 1 if not lma else ALL
        number(call, "cr3", cr3, last)
        if lma and cr3 & ((1 << 61) - (1 << maxphyaddr)):
            raise ArgumentError(call, "cr3", cr3, f"an address below 2**{maxphyaddr}", "maxphyaddr")
        if pdptrs is not None:
            if not isinstance(pdptrs, (tuple, list)):
                raise ArgumentTypeError(call, "pdptrs", pdptrs, "the four entries of PAE paging, or None")
            if level != 3 or len(pdptrs) != 4:
                raise ArgumentError(call, "pdptrs", pdptrs, "the four entries of PAE paging, or None")
            pdptrs = (*(number(call, "pdptrs", entry) for entry in pdptrs),)  # type: ignore[assignment]
        nx, wp, smep = bool(efer & _NXE), bool(cr0 & _WP), bool(cr4 & _SMEP)
        root = cr3 & (_ADDRESS if level > 3 else 0xFFFFFFE0 if level == 3 else 0xFFFFF000)
        return cls(
            kind="paging64" if pae else "paging32",
            level=level,
            root=root,
            rsvd=reset_guest_rsvds_bits_mask(
                level,
                maxphyaddr=maxphyaddr,
                nx=nx,
                gbpages=gbpages,
                pse=bool(cr4 & _PSE),
                amd=amd,
                pse36=pse36,
            ),
            permissions=update_permission_bitmask(cr0_wp=wp, efer_nx=nx, cr4_smep=smep, cr4_smap=bool(cr4 & _SMAP)),
            pkru_mask=update_pkru_bitmask(cr0_wp=wp, cr4_pke=lma and bool(cr4 & _PKE)),
            pkru=pkru,
            rflags_ac=bool(rflags & _AC),
            reports_fetch=nx or smep,
            cr4_pse=bool(cr4 & _PSE),
            pse36=pse36,
            pdptrs=pdptrs,
        )

    @classmethod
    def of_eptp(cls, eptp: int, *, maxphyaddr: int = 52, execonly: bool = True, huge_page_level: int = 3) -> GuestMmu:
        """Of EPT tables; see `Walker.ept`."""
        call = "Walker.ept"
        number(call, "maxphyaddr", maxphyaddr, 52, 32)
        if number(call, "eptp", eptp) >> maxphyaddr:
            raise ArgumentError(call, "eptp", eptp, f"an address below 2**{maxphyaddr}", "maxphyaddr")
        level = (eptp >> 3 & 7) + 1
        if level not in (4, 5):
            raise ArgumentError(call, "eptp", eptp, "a walk length (bits 5:3) of 3 or 4: 4 or 5 levels")
        if eptp & 7 not in (0, 6):
            raise ArgumentError(call, "eptp", eptp, "a memory type (bits 2:0) of 0 or 6")
        if eptp >> 8 & 0xF:
            raise ArgumentError(call, "eptp", eptp, "bits 11:8 clear", "they are reserved")
        return cls(
            kind="ept",
            level=level,
            root=eptp & _ADDRESS,
            rsvd=reset_rsvds_bits_mask_ept(maxphyaddr=maxphyaddr, execonly=execonly, huge_page_level=huge_page_level),
            permissions=update_permission_bitmask(cr0_wp=True, efer_nx=True, ept=True),
            reports_fetch=True,
            have_ad=bool(eptp & 0x40),
        )

    def gpte_access(self, entry: int) -> int:
        """What one entry permits, ACC bits."""
        if self.kind == "ept":
            return entry & 2 | (entry >> 2 & 1) | (entry & 1) << 2
        return entry & 6 | (1 if self.kind == "paging32" or not entry & _NX else 0)

    def gpa_of(self, entry: int, level: int, addr: int) -> int:
        """Where the entry that is the last of a walk leads with this address."""
        if self.kind == "paging32":
            if level == 1:
                return entry & 0xFFFFF000 | addr & 0xFFF
            high = (entry & 0x1E000) << 19 if self.pse36 else 0
            return entry & 0xFFC00000 | addr & 0x3FFFFF | high
        offset = (1 << 12 + 9 * (level - 1)) - 1
        return entry & _ADDRESS & ~offset | addr & offset

    def entry_gpa(self, table: int, level: int, addr: int) -> int:
        """The address of the entry of `addr` in the table of this level whose parent entry (or root) is `table`."""
        if self.kind == "paging32":
            return (table & 0xFFFFF000) + (addr >> 12 + 10 * (level - 1) & 0x3FF) * 4
        if level == 3 == self.level:
            return self.root + (addr >> 30 & 3) * 8
        return (table & _ADDRESS) + (addr >> 12 + 9 * (level - 1) & 0x1FF) * 8

    def is_last(self, entry: int, level: int) -> bool:
        """Whether the walk ends with this entry, if it is present and has no reserved bit."""
        if level == 1:
            return True
        if self.kind == "paging32":
            return bool(entry & 0x80) and self.cr4_pse
        return bool(entry & 0x80) and not level == 3 == self.level


class Walk:
    """What a walk found.  Read-only; equal to another with the same outcome.

    All numbers are plain ints.  Nothing of it changes when memory does.
    """

    # `_head`: GuestMmu, access, error code or None, level it ended at.  `_values`: of the entries, from the root on.
    __slots__ = ("_gpa", "_gva", "_head", "_values")

    _gva: int
    _gpa: int | None
    _head: tuple[GuestMmu, int, int | None, int]
    _values: tuple[int, ...]

    @property
    def gva(self) -> int:
        """The address that was walked."""
        return self._gva

    @property
    def access(self) -> int:
        """The access, PFERR bits."""
        return self._head[1]

    @property
    def gpa(self) -> int | None:
        """Where it leads; None: it faults."""
        return self._gpa

    @property
    def gfn(self) -> int | None:
        """The frame where it leads; None: it faults."""
        return None if self._gpa is None else self._gpa >> 12

    @property
    def ok(self) -> bool:
        """Whether it leads anywhere."""
        return self._gpa is not None

    @property
    def level(self) -> int:
        """The level it ended at: of the page that maps the address, or at which it failed; 0 without paging."""
        return self._head[3]

    @property
    def page_size(self) -> int | None:
        """Bytes of the page that maps the address; None: it faults, or there is no paging."""
        mmu, _, _, level = self._head
        if self._gpa is None or not level:
            return None
        return 1 << 12 + (10 if mmu.kind == "paging32" else 9) * (level - 1)

    @property
    def error_code(self) -> int | None:
        """The error code of its page fault; None: it leads somewhere."""
        return self._head[2]

    @property
    def fault(self) -> Fault | None:
        """Its fault; None: it leads somewhere."""
        (mmu, access, code, _), values = self._head, self._values
        if code is None:
            return None
        if mmu.kind != "ept" or code & PFERR_RSVD_MASK:
            return Fault(code, self._gva)
        rwx = 7
        for value in values:
            rwx &= value
        qualification = rwx << 3 | _GVA_IS_VALID
        if not access & PFERR_GUEST_PAGE_MASK:
            qualification |= _GVA_TRANSLATED
        for asked, bit in ((PFERR_USER_MASK, 1), (PFERR_WRITE_MASK, 2), (PFERR_FETCH_MASK, 4)):
            if access & asked:
                qualification |= bit
        return Fault(code, self._gva, False, qualification)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry that was read, from the root on, with the one that is not present or has a reserved bit.

        A PDPTE that the processor holds is among them, at the address that it was once loaded from.
        """
        mmu, values = self._head[0], self._values
        level, table, found = mmu.level, mmu.root, []
        for value in values:
            found.append(Entry(level, mmu.entry_gpa(table, level, self._gva), value, mmu.entry_size))
            level, table = level - 1, value
        return tuple(found)

    @property
    def missing(self) -> int | None:
        """The address of the entry that no memory holds, which ended the walk; None: there is no such."""
        (mmu, _, code, level), values = self._head, self._values
        if code is None or mmu.level - len(values) != level:
            return None
        return mmu.entry_gpa(values[-1] if values else mmu.root, level, self._gva)

    def _rights(self, count: int) -> int:
        # What the first `count` entries permit together; PDPTEs of PAE permit all.
        mmu, values = self._head[0], self._values
        access = ACC_ALL
        for value in values[1 if mmu.level == 3 else 0 : count]:
            access &= mmu.gpte_access(value)
        return access

    @property
    def pte_access(self) -> int:
        """What the entries permit together, ACC bits: of a page that is not dirty, and not written now, no write.

        As KVM's walker leaves it for make_spte.  0 where the walk faults before the rights are known.
        """
        (mmu, access, code, _), values = self._head, self._values
        if code is not None and (not code & PFERR_PRESENT_MASK or code & PFERR_RSVD_MASK):
            return 0
        rights = self._rights(len(values))
        is_read = code is None and values and mmu.have_ad and not access & PFERR_WRITE_MASK
        if is_read and not values[-1] & (1 << (9 if mmu.kind == "ept" else 6)):
            rights &= ~ACC_WRITE_MASK
        return rights

    @property
    def pt_access(self) -> tuple[int, ...]:
        """What the entries above each one that was read permit together, from the root's (7) on; see `entries`.

        The kernel's guest_walker.pt_access: the access of the shadow page that stands for the entry's table.
        """
        return tuple(self._rights(at) for at in range(len(self._values)))

    @property
    def pkey(self) -> int:
        """The protection key of the last entry (bits 62:59); 0 but for entries of 8 bytes."""
        mmu, values = self._head[0], self._values
        return values[-1] >> 59 & 15 if values and mmu.kind == "paging64" else 0

    @property
    def updates(self) -> tuple[Update, ...]:
        """The A and D bits that the access sets, from the root on; of a walk that faults none."""
        mmu, access, code, _ = self._head
        if code is not None or not mmu.have_ad:
            return ()
        a, d = (1 << 8, 1 << 9) if mmu.kind == "ept" else (1 << 5, 1 << 6)
        found = []
        entries = self.entries
        for entry in entries[1:] if mmu.level == 3 else entries:
            accessed = not entry.value & a
            dirty = entry.level == self.level and bool(access & PFERR_WRITE_MASK) and not entry.value & d
            if accessed or dirty:
                new = entry.value | a | (d if dirty else 0)
                found.append(Update(entry.level, entry.gpa, entry.value, new, entry.size, accessed, dirty))
        return tuple(found)

    def _state(self) -> tuple[object, ...]:
        return self._gva, self._gpa, self._head, self._values

    def __eq__(self, other: object) -> bool:
        return self._state() == other._state() if isinstance(other, Walk) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._state())

    def __reduce__(self) -> tuple[object, ...]:
        return _walk, (self._gva, self._gpa, *self._head, self._values)

    def __repr__(self) -> str:
        if self._gpa is not None:
            return f"<Walk {self._gva:#x} -> {self._gpa:#x}, level {self.level}, access {self.pte_access}>"
        return f"<Walk {self._gva:#x} faults at level {self.level} with {self.error_code:#x}>"

    def __str__(self) -> str:
        lines = [repr(self)[1:-1]]
        lines += [f"  level {e.level}  {e.gpa:#014x}  {e.value:#0{e.size * 2 + 2}x}" for e in self.entries]
        if self.missing is not None:
            lines.append(f"  level {self.level}  {self.missing:#014x}  no memory there")
        for update in self.updates:
            bits = "A" * update.accessed + "D" * update.dirty
            lines.append(f"  sets {bits} at {update.gpa:#x}: {update.old:#x} -> {update.new:#x}")
        return "\n".join(lines)


def _walk(
    gva: int, gpa: int | None, mmu: GuestMmu, access: int, code: int | None, level: int, values: tuple[int, ...]
) -> Walk:
    walk = Walk()
    walk._gva, walk._gpa, walk._head, walk._values = gva, gpa, (mmu, access, code, level), values
    return walk


def walk_addr(mmu: GuestMmu, read: Callable[[int, int], int | None], addr: int, access: int) -> Walk:
    """The walk itself, straight from the kernel's walk_addr_generic; nothing is written.

    `read(gpa, size)`: the entry there, or None where there is no memory.  The arguments are not checked.
    """
    level, table = mmu.level, mmu.root
    if not level:
        return _walk(addr, addr, mmu, access, None, 0, ())
    values: list[int] = []
    rights, size, code = ACC_ALL, mmu.entry_size, 0
    while True:
        if level == 3 == mmu.level and mmu.pdptrs is not None:
            entry: int | None = mmu.pdptrs[addr >> 30 & 3]
        else:
            entry = read(mmu.entry_gpa(table, level, addr), size)
        if entry is None:
            break
        values.append(entry)
        if not entry & (7 if mmu.kind == "ept" else 1):
            break
        if not level == 3 == mmu.level:
            rights &= mmu.gpte_access(entry)
        # The processor's PDPTEs were looked at when CR3 was loaded.
        if mmu.rsvd._is_set(entry, level) and (level < mmu.level or mmu.pdptrs is None):
            code = PFERR_RSVD_MASK | PFERR_PRESENT_MASK
            break
        if mmu.is_last(entry, level):
            pkey = entry >> 59 & 15 if mmu.kind == "paging64" else 0
            code = _permission_fault(mmu.permissions, mmu.pkru_mask, rights, pkey, access, mmu.pkru, mmu.rflags_ac)
            if not code:
                return _walk(addr, mmu.gpa_of(entry, level, addr), mmu, access, None, level, tuple(values))
            break
        table, level = entry, level - 1
    code |= access & (PFERR_WRITE_MASK | PFERR_USER_MASK)
    if mmu.reports_fetch:
        code |= access & PFERR_FETCH_MASK
    return _walk(addr, None, mmu, access, code, level, tuple(values))


class Walker:
    """Walks a guest's page tables in its memory, as KVM's walker (and a processor) does.

    `memory`: an image (bytes, …) that begins at gpa 0; or pieces, (gpa, buffer) or (gpa, buffer, writable); or a
    GuestMemory.  Of a live machine, see `Machine.walker`.

    `cr0`, `cr3`, `cr4`, `efer`, `rflags`, `pkru`: the registers; of `rflags` only AC counts.  Default: 4-level paging
    with WP and NX.  `maxphyaddr`: bits of a physical address, 32 to 52.  `gbpages`: CPUID has 1 GiB pages.  `amd`:
    CPUID is AMD's, where bit 8 of the upper levels is reserved.  `pse36`: 4 MiB pages reach 64 GiB.  `pdptrs`: PAE's
    four top entries as the processor holds them since CR3 was loaded; None: each walk reads them from memory, and looks
    at their reserved bits, which a load of CR3 does otherwise.

    ArgumentError: registers that no processor has (PG without PE, LMA without PAE, LMA that is not LME and PG, a CR3
    above `maxphyaddr`), and an image that does not hold the root table.  ArgumentTypeError.

    What it keeps between walks: for each entry's value, where in memory the table is that it leads to.  Every walk
    reads every entry anew.  Threads: any, as far as the memory's owner allows.

    >>> from hvmodel.arch.paging import PageTables
    >>> tables = PageTables(0x1000)
    >>> tables.map(0x40_0000, 0x9000, 0x1000, user=True)
    >>> walker = Walker(bytes(0x1000) + tables.image(), cr3=tables.cr3)
    >>> walker.walk(0x40_0123)
    <Walk 0x400123 -> 0x9123, level 1, access 5>
    >>> walker.walk(0x40_1123, PFERR_WRITE_MASK).error_code
    2
    >>> [(entry.level, hex(entry.gpa)) for entry in walker.walk(0x40_0123).entries]
    [(4, '0x1000'), (3, '0x2000'), (2, '0x3010'), (1, '0x4000')]
    """

    memory: GuestMemory
    """The memory that it reads."""
    mmu: GuestMmu
    """What it walks by."""

    def __init__(
        self,
        memory: Memory,
        *,
        cr3: int = 0,
        cr0: int = _PG | _WP | _PE,
        cr4: int = _PAE,
        efer: int = _LMA | _LME | _NXE,
        rflags: int = 2,
        pkru: int = 0,
        maxphyaddr: int = 52,
        gbpages: bool = True,
        amd: bool = False,
        pse36: bool = True,
        pdptrs: tuple[int, int, int, int] | None = None,
    ) -> None:
        mmu = GuestMmu.of(
            "Walker",
            cr3=cr3,
            cr0=cr0,
            cr4=cr4,
            efer=efer,
            rflags=rflags,
            pkru=pkru,
            maxphyaddr=maxphyaddr,
            gbpages=gbpages,
            amd=amd,
            pse36=pse36,
            pdptrs=pdptrs,
        )
        self._begin("Walker", memory, mmu)

    def _begin(self, call: str, memory: Memory, mmu: GuestMmu) -> None:
        self.memory = GuestMemory.of(call, memory)
        self.mmu = mmu
        from .compiled_walk import Functions

        self._functions = Functions(mmu, self.memory)
        # Takes the place of the method, whose call would add a tenth to the time of a walk.
        self.walk = self._functions.dispatcher()  # type: ignore[method-assign]
        if not isinstance(memory, GuestMemory) and len(self.memory.pieces()) == 1 and mmu.level:
            size = 32 if mmu.level == 3 else 4096
            (start, length, _), root = self.memory.pieces()[0], mmu.root
            if mmu.pdptrs is None and not start <= root <= start + length - size:
                raise ArgumentError(
                    call, "memory", length, f"an image with the root table at {root:#x}", f"{length:#x} bytes"
                )

    @classmethod
    def ept(
        cls, memory: Memory, *, eptp: int, maxphyaddr: int = 52, execonly: bool = True, huge_page_level: int = 3
    ) -> Walker:
        """A walker of EPT tables: it walks guest physical addresses; reads ask for U (readable), as KVM's do.

        `eptp`: the pointer: memory type 2:0, levels - 1 in 5:3, bit 6 for A and D.  `execonly`: the processor has
        entries that only permit to execute.  `huge_page_level`: 1, 2 (2 MiB pages) or 3 (1 GiB pages).

        ArgumentError: a pointer that is not such.  ArgumentTypeError.
        """
        mmu = GuestMmu.of_eptp(eptp, maxphyaddr=maxphyaddr, execonly=execonly, huge_page_level=huge_page_level)
        return cls.of(memory, mmu)

    @classmethod
    def of(cls, memory: Memory, mmu: GuestMmu) -> Walker:
        """A walker by a GuestMmu."""
        if not isinstance(mmu, GuestMmu):
            raise ArgumentTypeError("Walker.of", "mmu", mmu, "a GuestMmu")
        if mmu.level not in _LEVELS.get(mmu.kind, ()):
            raise ArgumentError("Walker.of", "mmu", (mmu.kind, mmu.level), f"kind and levels: {_LEVELS}")
        walker = cls.__new__(cls)
        walker._begin("Walker.of", memory, mmu)
        return walker

    def walk(self, gva: int, access: int = 0, update: bool = False) -> Walk:
        """Walk `gva` (0 to 2**64-1; below long mode to 2**32-1) for an access.

        `access`: PFERR bits: 0 is a read by the supervisor; W 2, U 4 (by CPL 3), F 0x10 (a fetch), and
        PFERR_IMPLICIT_ACCESS, by the processor itself.
        `update`: set A and D in memory, where that may be written; the Walk then shows what was there before, and what
        its `updates` are.  An entry that has changed since it was read makes the walk begin anew, as in KVM; the Walk
        is the last one.  Not atomic: stop who else writes the tables (a running vCPU) first.  By default nothing is
        written.

        Address bits that no level looks at are ignored, as KVM's walker ignores them.  ArgumentError: an address or
        access out of range.  ArgumentTypeError.
        """
        return self._functions.dispatcher()(gva, access, update)

    def function(self, access: int = 0) -> Callable[[int], Walk]:
        """The function that `walk` calls for this access: one argument, the address.

        ArgumentError, ArgumentTypeError: of the access.  ClosedError.  It raises the same for the address.
        """
        return self._functions.function("Walker.function", access)

    def close(self) -> None:
        """Let go of the views of the memory, so that it can be unmapped; a walk raises ClosedError then."""
        self.memory.close()

    def __repr__(self) -> str:
        return f"<Walker {self.mmu.kind}, {self.mmu.level} levels, root {self.mmu.root:#x}>"


class NestedWalk(Value):
    """What a walk in two dimensions found.

    `entries`: every entry touched, in order, the nested tables' marked so: for 4 levels below 4 levels up to 24.
    `gpa`: the final address; None: it faults.  `guest_gpa`: the address that the guest's own tables lead to, or None.
    `updates`: the A and D bits it sets, in the order in which KVM sets them.
    """

    gva: int
    access: int
    gpa: int | None
    guest_gpa: int | None
    entries: tuple[Entry, ...]
    updates: tuple[Update, ...]
    fault: Fault | None


class _NestedFault(Exception):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class NestedWalker:
    """The walk in two dimensions: a guest's tables, whose every address goes through nested tables (EPT or NPT) first.

    `nested`: a Walker of the nested tables: `Walker.ept`, or for NPT a Walker of 64-bit paging.  The other arguments
    are those of `Walker`, of the guest inside.

    As KVM does it for L2: each table of the guest is read as a write of CPL 3 (its A and D may be set), the final
    address with the access itself, and U in either: NPT has no other, and with EPT U stands for readable.  (A processor
    asks for readable tables only where the EPTP has no A and D, and fetches from a page that is not readable.)
    A fault of the nested tables carries GUEST_PAGE or GUEST_FINAL.

    >>> from hvmodel.arch.paging import PageTables
    >>> inner, outer = PageTables(0x1000), PageTables(0x10_0000)
    >>> inner.map(0x40_0000, 0x9000, 0x1000)
    >>> outer.map(0, 0, 1 << 20, page_size=4096, user=True)
    >>> memory = [(inner.cr3, inner.image()), (outer.cr3, outer.image())]
    >>> walk = NestedWalker(Walker(memory, cr3=outer.cr3), cr3=inner.cr3).walk(0x40_0123)
    >>> hex(walk.gpa), len(walk.entries), sum(entry.nested for entry in walk.entries)
    ('0x9123', 24, 20)
    """

    __slots__ = ("guest", "nested")

    guest: GuestMmu
    """What the guest's tables are walked by."""
    nested: Walker
    """The walker of the nested tables."""

    def __init__(
        self,
        nested: Walker,
        *,
        cr3: int = 0,
        cr0: int = _PG | _WP | _PE,
        cr4: int = _PAE,
        efer: int = _LMA | _LME | _NXE,
        rflags: int = 2,
        pkru: int = 0,
        maxphyaddr: int = 52,
        gbpages: bool = True,
        amd: bool = False,
        pse36: bool = True,
        pdptrs: tuple[int, int, int, int] | None = None,
    ) -> None:
        if not isinstance(nested, Walker):
            raise ArgumentTypeError("NestedWalker", "nested", nested, "a Walker")
        if nested.mmu.kind != "ept" and nested.mmu.level not in (4, 5):
            raise ArgumentError("NestedWalker", "nested", nested, "EPT, or 64-bit paging of 4 or 5 levels")
        self.nested = nested
        self.guest = GuestMmu.of(
            "NestedWalker",
            cr3=cr3,
            cr0=cr0,
            cr4=cr4,
            efer=efer,
            rflags=rflags,
            pkru=pkru,
            maxphyaddr=maxphyaddr,
            gbpages=gbpages,
            amd=amd,
            pse36=pse36,
            pdptrs=pdptrs,
        )

    def walk(self, gva: int, access: int = 0, update: bool = False) -> NestedWalk:
        """Walk `gva`; arguments and errors as of `Walker.walk`."""
        call = "NestedWalker.walk"
        gva = number(call, "gva", gva, (1 << self.guest.linear_bits) - 1)
        access = check_access(call, access)
        found = self._walk(gva, access, update)
        while found is None:  # an entry has changed on the way
            found = self._walk(gva, access, update)
        return found

    def _walk(self, gva: int, access: int, update: bool) -> NestedWalk | None:
        entries: list[Entry] = []
        updates: list[Update] = []
        places: list[int] = []  # where the guest's entries really are
        first = self.guest.level  # of those that are read
        if self.guest.pdptrs is not None:
            at = self.guest.entry_gpa(self.guest.root, first, gva)
            entries.append(Entry(first, at, self.guest.pdptrs[gva >> 30 & 3]))
            first -= 1

        def translate(gpa: int, access: int, stage: int) -> int:
            found = self.nested.walk(gpa, access | PFERR_USER_MASK | stage, update)
            entries.extend(Entry(e.level, e.gpa, e.value, e.size, True) for e in found.entries)
            updates.extend(
                Update(u.level, u.gpa, u.old, u.new, u.size, u.accessed, u.dirty, True) for u in found.updates
            )
            fault = found.fault
            if fault is not None:
                raise _NestedFault(Fault(fault.error_code | stage, gpa, True, fault.exit_qualification))
            assert found.gpa is not None
            return found.gpa

        def read(gpa: int, size: int) -> int | None:
            # KVM translates the table's address, the index comes after it.
            real = translate(gpa & ~0xFFF, PFERR_WRITE_MASK, PFERR_GUEST_PAGE_MASK) | gpa & 0xFFF
            value = self.nested.memory.entry(real, size)
            if value is not None:
                entries.append(Entry(first - len(places), gpa, value, size))
                places.append(real)
            return value

        def done(gpa: int | None, guest_gpa: int | None, fault: Fault | None) -> NestedWalk:
            return NestedWalk(gva, access, gpa, guest_gpa, tuple(entries), tuple(updates), fault)

        walk = None
        try:
            walk = walk_addr(self.guest, read, gva, access)
            if walk.gpa is None:
                return done(None, None, walk.fault)
            gpa = translate(walk.gpa & ~0xFFF, access, PFERR_GUEST_FINAL_MASK) | walk.gpa & 0xFFF
        except _NestedFault as stop:
            return done(None, None if walk is None else walk.gpa, stop.fault)
        updates.extend(walk.updates)
        if update:
            for own, real in zip(walk.updates, self._places(walk, places), strict=True):
                if not self.nested.memory.exchange(real, own.old, own.new, own.size):
                    return None
        return done(gpa, walk.gpa, None)

    def _places(self, walk: Walk, places: list[int]) -> list[int]:
        # Where the entries of `walk.updates` really are.
        by_gpa = {entry.gpa: real for entry, real in zip(walk.entries[-len(places) :], places, strict=True)}
        return [by_gpa[update.gpa] for update in walk.updates]

    def __repr__(self) -> str:
        return f"<NestedWalker {self.guest.kind}, {self.guest.level} levels, below {self.nested!r}>"
