"""Roles: what KVM calls a shadow page, and how it sums up a vCPU's paging, bit for bit as the kernel has them.

A shadow page is found by its frame and its *page role*: two guests' modes that need different shadow pages differ in
the role, and two that can share them do not.  A vCPU has a *CPU role*, what CR0, CR4 and EFER ask for, and from that a
*root role*, that of the tables KVM builds.

    union kvm_mmu_page_role                    (PageRole.word, 32 bits)
     31   24 23  20   19        18         17          16          15             14
    |  smm  |  0   |is_mirror|passthrough|guest_mode|ad_disabled|smap_andnot_wp|smep_andnot_wp|
       13      12      11    10     8    7    6       5        4         3     0
    |cr0_wp|efer_nx|invalid| access  |direct|quadrant  |has_4_byte_gpte| level |

    union kvm_mmu_extended_role                (ExtendedRole.word, 32 bits)
     31      8     7        6        5        4        3       2       1       0
    |    0    |efer_lma|cr4_la57|cr4_smep|cr4_smap|cr4_pke|cr4_pse|execonly|valid|

    union kvm_cpu_role                         (CpuRole.as_u64)
     63        32 31        0
    |     ext    |   base    |

`access` is what every entry on the way down allows: 1 execute, 2 write, 4 user.  `level` is that of the table, 4 for a
root of 4-level paging; a CPU role without paging has level 0.

By version: `passthrough` is there since Linux 5.19, `is_mirror` since 6.14 (6.13 has bits 23:19 unused).  Before 5.19
the CPU role was called kvm_mmu_role, with other fields.

Source: linux:arch/x86/include/asm/kvm_host.h (the unions), arch/x86/kvm/mmu/mmu.c (kvm_calc_cpu_role,
kvm_calc_tdp_mmu_root_page_role, kvm_calc_shadow_ept_root_page_role, kvm_init_shadow_npt_mmu, init_kvm_softmmu,
kvm_mmu_child_role, mmu_alloc_root and its callers), mmu/tdp_mmu.c (tdp_iter_child_role) @v6.18.
"""

from __future__ import annotations

from ..arch.number import ALL, number
from ..errors import ArgumentError
from ..value import Value
from .bits import BitLayout, Field
from .levels import LEVEL_NAMES
from .permission import ACC_ALL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Self

    from .bits import Decoded

__all__ = [
    "CPU_ROLE",
    "EXTENDED_ROLE",
    "PAGE_ROLE",
    "CpuRole",
    "ExtendedRole",
    "PageRole",
    "calc_cpu_role",
    "child_role",
    "decode_cpu_role",
    "decode_role",
    "nested_ept_role",
    "nested_npt_role",
    "root_pages",
    "shadow_root_role",
    "tdp_child_role",
    "tdp_level",
    "tdp_root_role",
]

_PAE_ROOT_LEVEL = 3

# Bits of the registers that a role depends on.
_CR0_PE, _CR0_WP, _CR0_PG = 1 << 0, 1 << 16, 1 << 31
_CR4_PSE, _CR4_PAE, _CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
_CR4_SMEP, _CR4_SMAP, _CR4_PKE = 1 << 20, 1 << 21, 1 << 22
_EFER_LME, _EFER_LMA, _EFER_NX = 1 << 8, 1 << 10, 1 << 11

_ACCESS_WORDS = {n: "".join(c if n & b else "-" for c, b in (("w", 2), ("u", 4), ("x", 1))) for n in range(8)}
_LEVELS = {0: "no paging"} | {n: f"entries of {size}" for n, size in LEVEL_NAMES.items()}

_PAGE_FIELDS = (
    Field("level", 0, 4, "level of the table", values=_LEVELS),
    Field("has_4_byte_gpte", 4, text="the guest's entries have 4 bytes: 2-level paging", clear="8-byte guest entries"),
    Field("quadrant", 5, 2, "which quarter of a guest directory, which half of a guest table"),
    Field("direct", 7, text="maps frames one to one; no guest table is behind it", clear="shadows a guest's table"),
    Field("access", 8, 3, values=_ACCESS_WORDS),
    Field("invalid", 11, text="waits to be freed"),
    Field("efer_nx", 12, text="bit 63 of an entry is NX", clear="bit 63 of a guest's entry is reserved"),
    Field("cr0_wp", 13, text="the supervisor obeys read-only", clear="the supervisor writes to read-only pages"),
    Field("smep_andnot_wp", 14, text="SMEP without WP"),
    Field("smap_andnot_wp", 15, text="SMAP without WP"),
    Field("ad_disabled", 16, text="entries without accessed and dirty bits"),
    Field("guest_mode", 17, text="belongs to a nested guest"),
    Field("passthrough", 18, text="a root of 5 levels above a guest's 4: its first entry only"),
    Field("is_mirror", 19, text="mirrors tables that KVM cannot write (TDX)"),
    Field("smm", 24, 8, "address space of system management mode", values={0: "not in SMM", 1: "in SMM"}),
)
_EXT_FIELDS = (
    Field("valid", 0, text="the role was computed", clear="no role yet"),
    Field("execonly", 1, text="nested EPT: execute-only entries are right"),
    Field("cr4_pse", 2, text="CR4.PSE"),
    Field("cr4_pke", 3, text="CR4.PKE in long mode"),
    Field("cr4_smap", 4, text="CR4.SMAP"),
    Field("cr4_smep", 5, text="CR4.SMEP"),
    Field("cr4_la57", 6, text="CR4.LA57 in long mode"),
    Field("efer_lma", 7, text="long mode"),
)

PAGE_ROLE = BitLayout("kvm_mmu_page_role", 32, _PAGE_FIELDS)
"""The bits of a page role, Linux 6.14 and later; before that bit 19 is reserved."""

EXTENDED_ROLE = BitLayout("kvm_mmu_extended_role", 32, _EXT_FIELDS)
"""The bits of an extended role."""

CPU_ROLE = BitLayout(
    "kvm_cpu_role",
    64,
    (
        *_PAGE_FIELDS,
        *(Field(f.name, f.low + 32, f.width, f.text, f.clear) for f in _EXT_FIELDS),
    ),
)
"""The bits of a CPU role: the page role below, the extended role above."""

_MIRROR_SINCE = (6, 14)


class _Bits:
    # A field of a role as an attribute; reads `word`.
    def __init__(self, layout: BitLayout, name: str) -> None:
        field = layout.field(name)
        self._low, self._mask = field.low, (1 << field.width) - 1
        self.__doc__ = field.text or name

    def __get__(self, role: Any, owner: object = None) -> int:
        word: int = role.word
        return word >> self._low & self._mask


class PageRole(Value):
    """kvm_mmu_page_role: a word of 32 bits, its fields as attributes.  `PageRole.of(level=4, …)` makes one of fields.

    The constructor takes any word, for speed without a look; `from_word` checks it.

    >>> role = PageRole.from_word(0x3704)
    >>> role.level, role.access, role.cr0_wp, role.efer_nx, role.direct
    (4, 7, 1, 1, 0)
    >>> role.replace(level=3, access=5)
    PageRole(level=3, access=5, efer_nx=1, cr0_wp=1)
    """

    word: int = 0

    level = _Bits(PAGE_ROLE, "level")
    has_4_byte_gpte = _Bits(PAGE_ROLE, "has_4_byte_gpte")
    quadrant = _Bits(PAGE_ROLE, "quadrant")
    direct = _Bits(PAGE_ROLE, "direct")
    access = _Bits(PAGE_ROLE, "access")
    invalid = _Bits(PAGE_ROLE, "invalid")
    efer_nx = _Bits(PAGE_ROLE, "efer_nx")
    cr0_wp = _Bits(PAGE_ROLE, "cr0_wp")
    smep_andnot_wp = _Bits(PAGE_ROLE, "smep_andnot_wp")
    smap_andnot_wp = _Bits(PAGE_ROLE, "smap_andnot_wp")
    ad_disabled = _Bits(PAGE_ROLE, "ad_disabled")
    guest_mode = _Bits(PAGE_ROLE, "guest_mode")
    passthrough = _Bits(PAGE_ROLE, "passthrough")
    is_mirror = _Bits(PAGE_ROLE, "is_mirror")
    smm = _Bits(PAGE_ROLE, "smm")

    @classmethod
    def from_word(cls, word: int) -> Self:
        """The role of this word.  ArgumentError for more than 32 bits; what no role has, `decode_role` tells."""
        return cls(number("PageRole.from_word", "word", word, (1 << 32) - 1))

    @classmethod
    def of(cls, **fields: int) -> Self:
        """The role with these fields, the others 0.  ArgumentError names a field that is unknown or does not fit.

        >>> hex(PageRole.of(level=1, direct=1, access=7).word)
        '0x781'
        """
        return cls(PAGE_ROLE.encode(**fields))

    def replace(self, **fields: int) -> Self:
        """The same role with these fields.  ArgumentError as `of`."""
        word = self.word
        for name in fields:
            word &= ~PAGE_ROLE.field(name).mask
        return type(self)(word | PAGE_ROLE.encode(**fields))

    def decode(self) -> Decoded:
        """The word by its fields, as `decode_role`."""
        return decode_role(self.word)

    def __repr__(self) -> str:
        return _repr(self, PAGE_ROLE)


class ExtendedRole(Value):
    """kvm_mmu_extended_role: what of the registers changes how a guest's tables are read, but no shadow page.

    >>> ExtendedRole(0x81)
    ExtendedRole(valid=1, efer_lma=1)
    """

    word: int = 0

    valid = _Bits(EXTENDED_ROLE, "valid")
    execonly = _Bits(EXTENDED_ROLE, "execonly")
    cr4_pse = _Bits(EXTENDED_ROLE, "cr4_pse")
    cr4_pke = _Bits(EXTENDED_ROLE, "cr4_pke")
    cr4_smap = _Bits(EXTENDED_ROLE, "cr4_smap")
    cr4_smep = _Bits(EXTENDED_ROLE, "cr4_smep")
    cr4_la57 = _Bits(EXTENDED_ROLE, "cr4_la57")
    efer_lma = _Bits(EXTENDED_ROLE, "efer_lma")

    @classmethod
    def from_word(cls, word: int) -> Self:
        """The extended role of this word.  ArgumentError for more than 32 bits."""
        return cls(number("ExtendedRole.from_word", "word", word, (1 << 32) - 1))

    @classmethod
    def of(cls, **fields: int) -> Self:
        """The extended role with these fields, the others 0.  ArgumentError names a field that does not fit."""
        return cls(EXTENDED_ROLE.encode(**fields))

    def __repr__(self) -> str:
        return _repr(self, EXTENDED_ROLE)


class CpuRole(Value):
    """kvm_cpu_role: `base` is the page role that the registers ask for, `ext` the rest that matters of them.

    >>> CpuRole(0x81_0000_3704).ext
    ExtendedRole(valid=1, efer_lma=1)
    """

    as_u64: int = 0

    @classmethod
    def from_word(cls, word: int) -> Self:
        """The CPU role of this word.  ArgumentError for more than 64 bits."""
        return cls(number("CpuRole.from_word", "word", word, ALL))

    @property
    def base(self) -> PageRole:
        """Bits 31:0."""
        return PageRole(self.as_u64 & 0xFFFF_FFFF)

    @property
    def ext(self) -> ExtendedRole:
        """Bits 63:32."""
        return ExtendedRole(self.as_u64 >> 32)

    def decode(self) -> Decoded:
        """The word by its fields, as `decode_cpu_role`."""
        return decode_cpu_role(self.as_u64)

    def __repr__(self) -> str:
        return f"CpuRole({self.as_u64:#x}: base={self.base!r}, ext={self.ext!r})"


def _repr(role: PageRole | ExtendedRole, layout: BitLayout) -> str:
    said = [f"{field.name}={field.of(role.word)}" for field in layout.members if field.of(role.word)]
    rest = role.word & ~layout.mask
    return f"{type(role).__name__}({', '.join(said + ([f'reserved={rest:#x}'] if rest else []))})"


def _version(call: str, version: object) -> tuple[int, int]:
    # (6, 18) of "6.18" or "6.18.44"
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        raise ArgumentError(call, "version", version, 'a kernel\'s version, as "6.18"')
    return int(parts[0]), int(parts[1])


# ------------------------------------------------------------------------------------------------- decoding


def _problems(role: PageRole, *, cpu: bool, version: tuple[int, int]) -> tuple[str, ...]:
    # What no page role has, in words; `cpu`: what no CPU role's base has.
    found = []
    if role.level == 0 and not (cpu and role.direct):
        found.append("level 0: a table has level 1 or more; only a CPU role without paging has 0")
    if cpu and role.direct and role.has_4_byte_gpte:
        found.append("direct with has_4_byte_gpte: without paging the guest has no entries")
    if role.quadrant and not role.has_4_byte_gpte:
        found.append("quadrant without has_4_byte_gpte: only 4-byte tables are cut in parts")
    # The root role of NPT that a 32-bit hypervisor made keeps the host's 4 or 5 levels.
    if role.has_4_byte_gpte and role.level > 3 and (cpu or not role.guest_mode):
        found.append(f"has_4_byte_gpte with level {role.level}: 2-level paging has no such table")
    if role.has_4_byte_gpte and role.level == 1 and role.quadrant > 1:
        found.append(f"quadrant {role.quadrant} at level 1: a 4-byte table has two halves")
    for bit, of in ((role.smep_andnot_wp, "smep"), (role.smap_andnot_wp, "smap")):
        if bit and role.cr0_wp:
            # With EPT or NPT KVM may follow a change of CR0.WP in the CPU role's cr0_wp alone.
            found.append(f"{of}_andnot_wp with cr0_wp: it says that WP is clear" + (", or was before" if cpu else ""))
    if role.passthrough and role.level != 5 and not cpu:
        found.append(f"passthrough with level {role.level}: only a root of 5 levels is one")
    if role.is_mirror and version < _MIRROR_SINCE:
        found.append("bit 19 is reserved before Linux 6.14")
    if cpu:
        alien = [name for name in ("quadrant", "invalid", "passthrough", "is_mirror") if getattr(role, name)]
        found += [f"{name} is not a matter of registers: 0 in a CPU role" for name in alien]
    return tuple(found)


def decode_role(word: int, *, version: str = "6.18") -> Decoded:
    """A page role's word by its fields, with what in it no role of this kernel has.

    ArgumentError: more than 32 bits, or a version that is none.

    >>> print(decode_role(0x1783))
    kvm_mmu_page_role 0x00001783: efer_nx access=0x7 direct level=0x3
    """
    known = _version("decode_role", version)
    word = number("decode_role", "word", word, (1 << 32) - 1)
    return PAGE_ROLE.decode(word, _problems(PageRole(word), cpu=False, version=known))


def decode_cpu_role(word: int, *, version: str = "6.18") -> Decoded:
    """A CPU role's word by its fields, with what in it no CPU role of this kernel has.

    ArgumentError: more than 64 bits, or a version that is none.

    >>> print(decode_cpu_role(0x81_0000_3704))
    kvm_cpu_role 0x0000008100003704: efer_lma valid cr0_wp efer_nx access=0x7 level=0x4
    """
    known = _version("decode_cpu_role", version)
    role = CpuRole(number("decode_cpu_role", "word", word, ALL))
    base, ext = role.base, role.ext
    found = list(_problems(base, cpu=True, version=known))
    if not ext.valid and word:
        found.append("valid is clear in a word that is not 0")
    if base.direct and ext.word & ~1:
        found.append("direct with bits of an extended role: without paging there are none but valid")
    if base.smep_andnot_wp and not ext.cr4_smep:
        found.append("smep_andnot_wp without cr4_smep")
    if base.smap_andnot_wp and not ext.cr4_smap:
        found.append("smap_andnot_wp without cr4_smap")
    if (ext.cr4_la57 or ext.cr4_pke) and not ext.efer_lma:
        found.append("cr4_la57 or cr4_pke without efer_lma: they count in long mode only")
    return CPU_ROLE.decode(word, tuple(found))


# ------------------------------------------------------------------------------------------------- making


def _base(cr0: int, cr4: int, efer: int, smm: bool, guest_mode: bool) -> int:
    # kvm_calc_cpu_role, of registers that go together.
    word = ACC_ALL << 8 | smm << 24 | guest_mode << 17
    ext = 1
    if not cr0 & _CR0_PG:
        return ext << 32 | word | 1 << 7
    wp, lma = bool(cr0 & _CR0_WP), bool(efer & _EFER_LMA)
    smep, smap = bool(cr4 & _CR4_SMEP), bool(cr4 & _CR4_SMAP)
    word |= bool(efer & _EFER_NX) << 12 | wp << 13 | (smep and not wp) << 14 | (smap and not wp) << 15
    word |= (not cr4 & _CR4_PAE) << 4
    if lma:
        word |= 5 if cr4 & _CR4_LA57 else 4
    else:
        word |= 3 if cr4 & _CR4_PAE else 2
    ext |= bool(cr4 & _CR4_PSE) << 2 | smap << 4 | smep << 5 | lma << 7
    ext |= (lma and bool(cr4 & _CR4_PKE)) << 3 | (lma and bool(cr4 & _CR4_LA57)) << 6
    return ext << 32 | word


def _check_registers(call: str, cr0: int, cr4: int, efer: int) -> None:
    # Registers that contradict each other, which no processor has.
    if cr0 & _CR0_PG and not cr0 & _CR0_PE:
        raise ArgumentError(call, "cr0", cr0, "PE with PG", "CR0.PG goes with CR0.PE only")
    long_mode = bool(efer & _EFER_LME and cr0 & _CR0_PG)
    if bool(efer & _EFER_LMA) != long_mode:
        wanted = "LMA set" if long_mode else "LMA clear"
        raise ArgumentError(call, "efer", efer, wanted, "EFER.LMA says that EFER.LME and CR0.PG are set")
    if long_mode and not cr4 & _CR4_PAE:
        raise ArgumentError(call, "cr4", cr4, "PAE set", "long mode goes with CR4.PAE only")


def calc_cpu_role(cr0: int, cr4: int, efer: int, *, smm: bool = False, guest_mode: bool = False) -> CpuRole:
    """The CPU role of these registers (kvm_calc_cpu_role); `smm`, `guest_mode`: in SMM, in a nested guest.

    ArgumentError: registers that contradict each other (CR0.PG without CR0.PE, EFER.LMA that does not say what EFER.LME
    and CR0.PG say, long mode without CR4.PAE), or of more than 64 bits.

    >>> hex(calc_cpu_role(0x8001_0001, 0x20, 0xD00).as_u64)  # 4-level paging, WP, NX
    '0x8100003704'
    >>> hex(calc_cpu_role(0, 0, 0).as_u64)
    '0x100000780'
    """
    call = "calc_cpu_role"
    cr0, cr4, efer = number(call, "cr0", cr0), number(call, "cr4", cr4), number(call, "efer", efer)
    _check_registers(call, cr0, cr4, efer)
    return CpuRole(_base(cr0, cr4, efer, bool(smm), bool(guest_mode)))


def shadow_root_role(cpu_role: CpuRole) -> PageRole:
    """The role of the root that KVM builds by shadow paging: at least 3 levels of 8-byte entries, always with NX.

    >>> shadow_root_role(calc_cpu_role(0, 0, 0))
    PageRole(level=3, direct=1, access=7, efer_nx=1)
    """
    base = cpu_role.base
    return PageRole(base.word & ~0xF | max(base.level, _PAE_ROOT_LEVEL) | 1 << 12)


def tdp_level(maxphyaddr: int, *, max_level: int = 5, forced: int | None = None) -> int:
    """Levels of the tables of EPT or NPT (kvm_mmu_get_tdp_level), 3 to 5.

    `maxphyaddr`: bits of the guest's physical addresses, by its CPUID (of a TDX guest those of EAX[23:16] of leaf
    0x80000008); `max_level`: what the processor can; `forced`: the one number that the host's own paging leaves to NPT,
    None for EPT.

    >>> tdp_level(48), tdp_level(52), tdp_level(48, forced=5)
    (4, 5, 5)
    """
    maxphyaddr = number("tdp_level", "maxphyaddr", maxphyaddr, 52)
    max_level = number("tdp_level", "max_level", max_level, 5, 3)
    if forced is not None:
        return number("tdp_level", "forced", forced, 5, 3)
    return 4 if max_level == 5 and maxphyaddr <= 48 else max_level


def tdp_root_role(
    level: int = 4, *, ad_enabled: bool = True, smm: bool = False, guest_mode: bool = False, mirror: bool = False
) -> PageRole:
    """The role of the root of EPT or NPT (kvm_calc_tdp_mmu_root_page_role): no register of the guest is in it.

    `level`: see `tdp_level`.  `ad_enabled`: entries have accessed and dirty bits.  `mirror`: of the tables that mirror
    those of TDX.  ArgumentError: a level not 3 to 5.

    >>> hex(tdp_root_role(4).word), hex(tdp_root_role(4, ad_enabled=False).word)
    ('0x3784', '0x13784')
    """
    level = number("tdp_root_role", "level", level, 5, 3)
    word = level | 1 << 7 | ACC_ALL << 8 | 1 << 12 | 1 << 13
    word |= (not ad_enabled) << 16 | bool(guest_mode) << 17 | bool(mirror) << 19 | bool(smm) << 24
    return PageRole(word)


def nested_ept_role(level: int = 4, *, accessed_dirty: bool = False, execonly: bool = False) -> CpuRole:
    """The CPU role of a nested guest under EPT (kvm_calc_shadow_ept_root_page_role); its `base` is the root role too.

    `level`, `accessed_dirty`: from the EPTP of the guest's hypervisor.  ArgumentError: a level not 4 or 5.

    >>> nested_ept_role(4, execonly=True)
    CpuRole(0x300030704: base=PageRole(level=4, access=7, ad_disabled=1, guest_mode=1), \
ext=ExtendedRole(valid=1, execonly=1))
    """
    level = number("nested_ept_role", "level", level, 5, 4)
    word = level | ACC_ALL << 8 | (not accessed_dirty) << 16 | 1 << 17
    return CpuRole((1 | bool(execonly) << 1) << 32 | word)


def nested_npt_role(cr4: int, efer: int, *, level: int = 4, smm: bool = False) -> tuple[CpuRole, PageRole]:
    """The CPU role and the root role of a nested guest under NPT (kvm_init_shadow_npt_mmu).

    `cr4`, `efer`: of the guest's hypervisor, which decide how NPT is walked; CR0 counts as PG alone, and protection
    keys do not exist there.  `level`: see `tdp_level`.  ArgumentError: `efer` with one of LME and LMA (the hypervisor
    pages), long mode without CR4.PAE, a level not 3 to 5.

    >>> [hex(role.word) for role in [nested_npt_role(0x20, 0xD00)[1], nested_npt_role(0x20, 0xD00, level=5)[1]]]
    ['0x21704', '0x61705']
    """
    call = "nested_npt_role"
    cr4, efer = number(call, "cr4", cr4), number(call, "efer", efer)
    level = number(call, "level", level, 5, 3)
    _check_registers(call, _CR0_PG | _CR0_PE, cr4, efer)
    role = CpuRole(_base(_CR0_PG, cr4 & ~_CR4_PKE, efer, bool(smm), True))
    base = role.base
    return role, PageRole(base.word & ~0xF | level | (level == 5 and base.level == 4) << 18)


def child_role(parent: PageRole, access: int, direct: bool, *, index: int = 0) -> PageRole:
    """The role of the table below entry `index` (0 to 511) of a shadow page (kvm_mmu_child_role).

    `access` (0 to 7): what the guest's entries so far allow; `direct`: no guest table is behind it, as below a large
    page of the guest.  A table below a 4 MiB page stays one with has_4_byte_gpte, and has the quadrant of its half.

    ArgumentError: a parent of level 1 or less, which has no child, or of 2-level paging and another level than 2;
    numbers out of range.

    >>> child_role(PageRole(0x3704), 5, False)
    PageRole(level=3, access=5, efer_nx=1, cr0_wp=1)
    """
    word, level = parent.word, parent.level
    access = number("child_role", "access", access, ACC_ALL)
    index = number("child_role", "index", index, 511)
    if level < 2:
        raise ArgumentError("child_role", "parent", parent, "a role of level 2 or more", "there is no table below")
    if parent.has_4_byte_gpte and level != 2:
        accepted = "a role of level 2"
        raise ArgumentError("child_role", "parent", parent, accepted, "2-level paging has tables of levels 2 and 1")
    word = word & ~(0xF | 1 << 7 | ACC_ALL << 8 | 1 << 18) | level - 1 | bool(direct) << 7 | access << 8
    if word & 1 << 4:
        word = word & ~(3 << 5) | (index & 1) << 5
    return PageRole(word)


def tdp_child_role(parent: PageRole) -> PageRole:
    """The role of a table below another one of EPT or NPT (tdp_iter_child_role): the same, one level down.

    ArgumentError: a parent of level 1 or less has no child.

    >>> tdp_child_role(tdp_root_role(4)).level
    3
    """
    if parent.level < 2:
        raise ArgumentError("tdp_child_role", "parent", parent, "a role of level 2 or more", "there is no table below")
    return PageRole(parent.word - 1)


def root_pages(
    cpu_role: CpuRole, root_role: PageRole, root_gfn: int = 0, pdptrs: Sequence[int] | None = None
) -> tuple[tuple[int, int, PageRole], ...]:
    """The roots that KVM makes for a vCPU by shadow paging: (number, frame, role) of each (mmu_alloc_root).

    One of 4 or 5 levels; else four of 2 levels, below the 4 PDPTEs that the processor then walks.  Without paging they
    cover 1 GiB each; of a 2-level guest (`root_gfn`: the frame in CR3) each is a quarter of the guest's directory; of a
    PAE guest there is one for each entry of `pdptrs` (4 numbers) that is present.

    The frames are taken to be in memslots: where that of CR3 is not, KVM uses a dummy root, which is no shadow page; a
    PDPTE that leads out of them has no root.

    ArgumentError: a PAE guest without 4 `pdptrs`; a root role that pages for a CPU role that does not.

    >>> nopaging = calc_cpu_role(0, 0, 0)
    >>> [(hex(gfn), hex(role.word)) for _, gfn, role in root_pages(nopaging, shadow_root_role(nopaging))]
    [('0x0', '0x1782'), ('0x40000', '0x1782'), ('0x80000', '0x1782'), ('0xc0000', '0x1782')]
    """
    root_gfn = number("root_pages", "root_gfn", root_gfn, ALL >> 12)
    if root_role.direct and root_role.level >= 4:
        return ((0, 0, root_role),)
    base = cpu_role.base
    if base.level >= 4:
        return ((0, root_gfn, root_role),)
    two = root_role.word & ~0xF | 2
    if root_role.direct:
        return tuple([(i, i << 18, PageRole(two)) for i in range(4)])
    if base.level == 2:
        return tuple([(i, root_gfn, PageRole(two & ~(3 << 5) | i << 5)) for i in range(4)])
    if base.level != _PAE_ROOT_LEVEL:
        accepted = "a role with paging, as the root role has"
        raise ArgumentError("root_pages", "cpu_role", cpu_role, accepted, "the root role is not direct")
    if pdptrs is None or len(pdptrs) != 4:
        raise ArgumentError("root_pages", "pdptrs", pdptrs, "the 4 PDPTEs", "the guest has PAE paging")
    entries = [number("root_pages", f"pdptrs[{i}]", entry) for i, entry in enumerate(pdptrs)]
    return tuple(
        [(i, (entry & 0xF_FFFF_FFFF_F000) >> 12, PageRole(two)) for i, entry in enumerate(entries) if entry & 1]
    )
