"""EPT, the page tables of a VM's physical addresses, as the processor reads them: entries, EPTP, what goes wrong.

    63 62 61  60 59 58 57 56    52 51                    12 11 10  9  8  7  6 5   3  2  1  0
    |#VE|  |SPP|SSS|  |PW|VGP| ignored |  address of the page  |  |XU| D| A|PS|IP|type| X| W| R|    a page
    |              ignored             |  address of the table |  |XU|  | A|     0    | X| W| R|    a table

    R, W, X read, write, execute (with mode-based execute control: X by the supervisor, XU by the user)
    type    memory type: 0 UC, 1 WC, 4 WT, 5 WP, 6 WB        IP   ignore the guest's PAT
    PS      page size: a PDPTE maps 1 GiB, a PDE 2 MiB       A, D accessed, dirty (EPTP bit 6)
    VGP     verify guest paging        PW  paging-write      SSS  supervisor shadow stack (EPTP bit 7)
    SPP     sub-page write permissions (PTE alone)           #VE  suppress #VE

    63              12 11   8  7  6  5       3 2   0
    |  address of the  |   0 |SSS|AD|walk - 1 |type |    EPTP: type 0 UC or 6 WB
    |  top table       |

This is the processor's view, by the manual: what KVM writes in the entries is in `spte`, what KVM's own walker makes of
a nested guest's EPT in `walk`.  Source: Intel SDM volume 3, 31.3 and 27.6.11 (numbers of edition 092 of 2026; older
ones have it in chapters 28 and 24).
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .bits import BitLayout, Decoded, Field
from .qualification import encode_qualification

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "EPTP",
    "EPT_LEAF_1G",
    "EPT_LEAF_2M",
    "EPT_LEAF_4K",
    "EPT_TABLE",
    "EptAccess",
    "EptControls",
    "EptOutcome",
    "convertible_to_ve",
    "decode_ept_entry",
    "decode_eptp",
    "ept_access",
    "ept_entry",
    "ept_misconfigurations",
    "ept_walk",
    "eptp",
    "is_ept_leaf",
    "is_ept_present",
    "sub_page_vector",
]

_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}
_RIGHTS = (Field("r", 0, text="read"), Field("w", 1, text="write"), Field("x", 2, text="execute"))
_ACCESSED = Field("a", 8, text="accessed (with bit 6 of the EPTP)")
_XU = Field("xu", 10, text="execute by the user (mode-based execute control)")


def _leaf(size: str, shift: int) -> BitLayout:
    # 31.3.2, tables 31-3 (1 GiB), 31-5 (2 MiB), 31-7 (4 KiB).
    large = shift > 12
    return BitLayout(
        f"EPT entry of a {size} page",
        64,
        (
            *_RIGHTS,
            Field("memory_type", 3, 3, values=_TYPES),
            Field("ignore_pat", 6, text="the guest's PAT does not count"),
            Field("page_size", 7, text="maps a page", clear="refers to a table")
            if large
            else Field("ignored_7", 7, text="ignored"),
            _ACCESSED,
            Field("d", 9, text="dirty (with bit 6 of the EPTP)"),
            _XU,
            Field("ignored_11", 11, text="ignored"),
            Field("address", shift, 52 - shift, scale=shift),
            Field("ignored_52", 52, 5, text="ignored"),
            Field("verify_guest_paging", 57, text="linear addresses come here by paging-write tables alone (control)"),
            Field("paging_write", 58, text="page walks may write here (control)"),
            Field("ignored_59", 59, text="ignored"),
            Field("supervisor_shadow_stack", 60, text="supervisor shadow-stack accesses (with bit 7 of the EPTP)"),
            *(
                (Field("ignored_61", 61, 2, text="ignored"),)
                if large
                else (
                    Field("sub_page_write", 61, text="writes by the sub-page permission table (control)"),
                    Field("ignored_62", 62, text="ignored"),
                )
            ),
            Field("suppress_ve", 63, text="EPT violations here exit, and do not become #VE (control)"),
        ),
    )


EPT_LEAF_4K = _leaf("4-KiB", 12)
EPT_LEAF_2M = _leaf("2-MiB", 21)
EPT_LEAF_1G = _leaf("1-GiB", 30)
"""Entries that map a page (31.3.2)."""

EPT_TABLE = BitLayout(
    "EPT entry of a table",
    64,
    (
        *_RIGHTS,
        _ACCESSED,
        Field("ignored_9", 9, text="ignored"),
        _XU,
        Field("ignored_11", 11, text="ignored"),
        Field("address", 12, 40, scale=12),
        Field("ignored_52", 52, 11, text="ignored"),
        Field("suppress_ve", 63, text="ignored: it counts where the entry is not present, or maps a page"),
    ),
)
"""Entries that refer to a table; bits 7:3 are reserved (31.3.2, tables 31-1, 31-2, 31-4, 31-6)."""

EPTP = BitLayout(
    "EPTP",
    64,
    (
        Field("memory_type", 0, 3, values={0: "UC", 6: "WB"}, text="of the EPT structures"),
        Field("walk_length_minus_1", 3, 3, values={3: "4 levels", 4: "5 levels"}),
        Field("ad", 6, text="accessed and dirty flags are used"),
        Field("supervisor_shadow_stack", 7, text="access rights of supervisor shadow stacks are enforced"),
        Field("address", 12, 40, scale=12),
    ),
)
"""The EPT pointer, VMCS field 201AH (27.6.11, table 27-9)."""

_LEAVES = {1: EPT_LEAF_4K, 2: EPT_LEAF_2M, 3: EPT_LEAF_1G}
_LAST_ADDRESS = (1 << 52) - 1
_ADDRESS = _LAST_ADDRESS & ~0xFFF
_RESERVED_ARGUMENTS = {"r": "read", "w": "write", "x": "execute", "a": "accessed", "d": "dirty", "page_size": "leaf"}


class EptControls(Value):
    """What decides how entries are read: the processor's abilities, and the controls of the VM.

    `exec_only`, `page_2m`, `page_1g`: of IA32_VMX_EPT_VPID_CAP (bits 0, 16, 17).  `advanced_exit_info`: its bit 22.
    `maxphyaddr`: width of physical addresses in bits, 32 to 52.  `ad`, `sss`: bits 6 and 7 of the EPTP.  `mbec`:
    mode-based execute control (secondary control 22); `spp`: sub-page write permissions (secondary control 23);
    `paging_write`, `guest_paging_verification`: tertiary controls 2 and 3 (the second acts only with the first); `ve`:
    EPT-violation #VE (secondary control 18).
    """

    maxphyaddr: int = 46
    exec_only: bool = True
    page_2m: bool = True
    page_1g: bool = True
    advanced_exit_info: bool = False
    ad: bool = True
    sss: bool = False
    mbec: bool = False
    spp: bool = False
    paging_write: bool = False
    guest_paging_verification: bool = False
    ve: bool = False


class EptAccess(Value):
    """One access to a guest-physical address.

    `kind`: "read", "write", "modify" (a read-modify-write: it needs both rights) or "fetch".  `linear`: whether a
    linear address led here (False: the PDPTEs that MOV to CR loads, and writes of trace output or of PEBS).  `final`:
    the translation of that linear address; False: a guest paging structure, which is a "read".  `ad_update`: the walker
    writes an accessed or dirty flag in that structure.  `user`: the linear address is a user-mode one (all guest
    entries have U/S set, or paging is off), which picks XU for a fetch under mode-based execute control.
    `shadow_stack`: a shadow-stack access, of the supervisor unless `user`.  `writable_linear`, `nx_linear`: rights of
    the linear address, for the advanced exit information.
    """

    kind: str = "read"
    linear: bool = True
    final: bool = True
    ad_update: bool = False
    user: bool = False
    shadow_stack: bool = False
    writable_linear: bool = True
    nx_linear: bool = False


class EptOutcome(Value):
    """What an access by the EPT comes to.

    `exit`: None, "EPT_VIOLATION", "EPT_MISCONFIG", "SPP_EVENT", or "VE" (a #VE in the guest in place of the
    violation).  `address`: the physical address, where there is one.  `qualification`: of the exit; None for a
    misconfiguration, which leaves it undefined.  Its bits 12 and 16 are 0 here; of a read-modify-write bit 0 is 0,
    which the manual leaves to the processor.  `entries`: (level, entry) of each entry read, from the top.  `rules`:
    why, a sentence each.  `accessed`, `dirty`: levels in whose entry the processor sets that flag; () where there is an
    exit, for the manual does not say which flags are set before it.
    """

    exit: str | None
    address: int | None
    qualification: int | None
    entries: tuple[tuple[int, int], ...]
    rules: tuple[str, ...] = ()
    accessed: tuple[int, ...] = ()
    dirty: tuple[int, ...] = ()


def _level(call: str, level: object, last: int = 5) -> int:
    return number(call, "level", level, last, 1)


def _flag(call: str, field: str, value: object) -> int:
    return number(call, field, value, 1)


def _controls(call: str, controls: EptControls | None) -> EptControls:
    if controls is None:
        return EptControls()
    if not isinstance(controls, EptControls):
        raise ArgumentTypeError(call, "controls", controls, "an EptControls")
    number(call, "controls.maxphyaddr", controls.maxphyaddr, 52, 32)
    return controls


def _access(call: str, access: EptAccess | None) -> EptAccess:
    if access is None:
        return EptAccess()
    if not isinstance(access, EptAccess):
        raise ArgumentTypeError(call, "access", access, "an EptAccess")
    if access.kind not in ("read", "write", "modify", "fetch"):
        raise ArgumentError(call, "access.kind", access.kind, "read, write, modify, fetch")
    structure = access.linear and not access.final
    if structure and access.kind != "read":
        raise ArgumentError(call, "access.kind", access.kind, "read", "a guest paging structure is read; see ad_update")
    if access.ad_update and not structure:
        raise ArgumentError(call, "access.ad_update", True, "False", "flags are set in guest paging structures only")
    if not access.linear and access.kind == "fetch":
        raise ArgumentError(call, "access.kind", access.kind, "read, write, modify", "a fetch has a linear address")
    if access.shadow_stack and (structure or not access.linear or access.kind == "fetch"):
        what = "a shadow stack is read and written by its linear address"
        raise ArgumentError(call, "access.shadow_stack", True, "False", what)
    return access


def _rights(entries: Sequence[tuple[int, int]]) -> int:
    # R, W, X, XU that all of the entries have; none without an entry.
    rights = 0x407 if entries else 0
    for _, entry in entries:
        rights &= entry
    return rights


def _by_sub_pages(read: Sequence[tuple[int, int]], access: EptAccess, controls: EptControls) -> bool:
    # Whether the sub-page permission table decides a write that some clear W refuses (31.3.4.1).  That R must be set in
    # all of the entries is not in the manual's words; Bochs asks it (bochs/cpu/paging.cc), and so do we.  Nor does the
    # manual speak of writes without a linear address but for those of PEBS, which are never eligible.
    level, leaf = read[-1]
    return (
        controls.spp
        and level == 1
        and bool(leaf >> 61 & 1)
        and access.kind in ("write", "modify")
        and access.linear
        and not _is_shadow_stack_checked(access, controls)
        and _rights(read) & 3 == 1
    )


def _is_shadow_stack_checked(access: EptAccess, controls: EptControls) -> bool:
    # Whether bit 60 decides (31.3.3.2): of accesses of users to their shadow stacks it does not.
    return controls.sss and access.shadow_stack and not access.user


def is_ept_present(entry: int, *, mbec: bool = False) -> bool:
    """Whether the entry is present: any of R, W, X is set, or XU under mode-based execute control (31.3.2).

    >>> is_ept_present(0x400), is_ept_present(0x400, mbec=True)
    (False, True)
    """
    return bool(number("is_ept_present", "entry", entry) & (0x407 if mbec else 0x7))


def is_ept_leaf(entry: int, level: int) -> bool:
    """Whether a present entry maps a page: every one at level 1; at 2 and 3 with bit 7.  Levels count from 1 (PTE)."""
    number("is_ept_leaf", "entry", entry)
    level = _level("is_ept_leaf", level)
    return level == 1 or (level < 4 and bool(entry >> 7 & 1))


def ept_misconfigurations(entry: int, level: int, controls: EptControls | None = None) -> tuple[str, ...]:
    """Why a present entry is misconfigured (exit reason 49), a sentence for each rule; () where it is not.

    An entry that is not present never is.  ArgumentError: `entry` not of 64 bits, `level` not 1 to 5.
    Source: SDM volume 3, 31.3.3.1.

    >>> ept_misconfigurations(0b010, 1)
    ('bits 1:0 are 10b: writable, not readable',)
    """
    call = "ept_misconfigurations"
    return _misconfigurations(number(call, "entry", entry), _level(call, level), _controls(call, controls))


def _misconfigurations(entry: int, level: int, controls: EptControls) -> tuple[str, ...]:
    if not is_ept_present(entry, mbec=controls.mbec):
        return ()
    rules = []
    leaf = is_ept_leaf(entry, level)
    if entry & 3 == 2:
        rules.append("bits 1:0 are 10b: writable, not readable")
    executable = entry & (0x404 if controls.mbec else 0x4)
    if not controls.exec_only and not entry & 1 and executable and entry & 3 != 2:
        rules.append("executable, not readable: this processor has no execute-only entries")
    high = _ADDRESS >> controls.maxphyaddr << controls.maxphyaddr
    if entry & high:
        rules.append(f"address bits {entry & high:#x} are above MAXPHYADDR {controls.maxphyaddr}")
    if level == 3 and entry >> 7 & 1 and not controls.page_1g:
        rules.append("bit 7 of a PDPTE: this processor has no 1-GiB pages")
    if level == 2 and entry >> 7 & 1 and not controls.page_2m:
        rules.append("bit 7 of a PDE: this processor has no 2-MiB pages")
    if not leaf:
        reserved = 0xF8 if level >= 4 else 0x78
        if entry & reserved:
            rules.append(f"reserved bits {entry & reserved:#x} of an entry that refers to a table")
    else:
        low = (1 << 12 + 9 * (level - 1)) - 0x1000
        if entry & low:
            rules.append(f"address bits {entry & low:#x} are below the page's size")
        if entry >> 3 & 7 not in _TYPES:
            rules.append(f"memory type {entry >> 3 & 7} is reserved")
        if controls.paging_write and entry >> 58 & 1 and not entry & 1:
            rules.append("paging-write (bit 58) of a page that is not readable")
    return tuple(rules)


def decode_ept_entry(entry: int, level: int, controls: EptControls | None = None) -> Decoded:
    """An EPT entry at a level (1 PTE, 2 PDE, 3 PDPTE, 4 PML4E, 5 PML5E) by its fields; misconfigurations as problems.

    >>> print(decode_ept_entry(0xB7, 2))
    EPT entry of a 2-MiB page 0x00000000000000b7: page_size memory_type=0x6 x w r
    """
    call = "decode_ept_entry"
    entry, level, controls = number(call, "entry", entry), _level(call, level), _controls(call, controls)
    present = is_ept_present(entry, mbec=controls.mbec)
    if not present:
        layout = BitLayout(
            "EPT entry, not present",
            64,
            (
                *_RIGHTS,
                Field("ignored", 3, 60, text="ignored"),
                Field("suppress_ve", 63, text="its EPT violations do not become #VE"),
            ),
        )
        return layout.decode(entry)
    if is_ept_leaf(entry, level):
        layout = _LEAVES[level]
    else:
        layout = EPT_TABLE
        if level < 4:
            layout = BitLayout(
                layout.title,
                64,
                tuple(sorted((*layout.members, Field("page_size", 7, clear="refers to a table")), key=_low)),
            )
    # The rules say more than the table's "reserved": they take its place.
    decoded = layout.decode(entry)
    return Decoded(decoded.title, 64, entry, decoded.parts, _misconfigurations(entry, level, controls))


def _low(field: Field) -> int:
    return field.low


def ept_entry(
    address: int,
    level: int,
    *,
    read: bool = True,
    write: bool = True,
    execute: bool = True,
    leaf: bool | None = None,
    memory_type: int = 6,
    ignore_pat: bool = False,
    accessed: bool = False,
    dirty: bool = False,
    controls: EptControls | None = None,
    **fields: int,
) -> int:
    """An EPT entry, refused where it would be misconfigured (ArgumentError with the rule).

    `address`: physical, of the page or table; `level`: 1 to 5; `leaf`: whether it maps a page (default: at level 1).
    `memory_type`, `ignore_pat`, `dirty` count for leaves.  More fields by the layout's names: xu, suppress_ve,
    verify_guest_paging, paging_write, supervisor_shadow_stack, sub_page_write.  Without read, write and execute the
    entry is not present.

    >>> hex(ept_entry(0x200000, 2, leaf=True))
    '0x2000b7'
    """
    call = "ept_entry"
    level = _level(call, level)
    address = number(call, "address", address, _LAST_ADDRESS)
    controls = _controls(call, controls)
    for field, argument in _RESERVED_ARGUMENTS.items():
        if field in fields:
            raise ArgumentError(call, field, fields[field], f"not given: the argument {argument} says it")
    leaf = level == 1 if leaf is None else bool(leaf)
    if leaf and level > 3:
        raise ArgumentError(call, "leaf", leaf, "False", f"no page is mapped at level {level}")
    if not leaf and level == 1:
        raise ArgumentError(call, "leaf", leaf, "True", "an entry of level 1 maps a page")
    shift = 12 + 9 * (level - 1) if leaf else 12
    if address & ((1 << shift) - 1):
        raise ArgumentError(call, "address", address, f"a multiple of {1 << shift:#x}")
    words = {
        "r": _flag(call, "read", read),
        "w": _flag(call, "write", write),
        "x": _flag(call, "execute", execute),
        "a": _flag(call, "accessed", accessed),
        "address": address >> shift,
        **fields,
    }
    if leaf:
        words |= {"memory_type": memory_type, "ignore_pat": _flag(call, "ignore_pat", ignore_pat)}
        words["d"] = _flag(call, "dirty", dirty)
        if level > 1:
            words["page_size"] = 1
    entry = (_LEAVES[level] if leaf else EPT_TABLE).encode_for(call, words)
    rules = _misconfigurations(entry, level, controls)
    if rules:
        raise ArgumentError(call, "entry", entry, "an entry that is not misconfigured", "; ".join(rules))
    return entry


def eptp(address: int, *, levels: int = 4, ad: bool = True, memory_type: int = 6, sss: bool = False) -> int:
    """The EPTP of a top table.  `address`: a multiple of 4 KiB; `levels`: 4 or 5; ArgumentError otherwise.

    >>> hex(eptp(0x1000))
    '0x105e'
    """
    call = "eptp"
    address = number(call, "address", address, _LAST_ADDRESS)
    if address & 0xFFF:
        raise ArgumentError(call, "address", address, "a multiple of 0x1000")
    words = {
        "memory_type": memory_type,
        "walk_length_minus_1": number(call, "levels", levels, 5, 4) - 1,
        "ad": _flag(call, "ad", ad),
        "supervisor_shadow_stack": _flag(call, "sss", sss),
        "address": address >> 12,
    }
    return EPTP.encode_for(call, words)


def decode_eptp(value: int, *, capability: int | None = None, maxphyaddr: int = 52) -> Decoded:
    """An EPTP by its fields.  What VM entry would refuse is a problem: `capability` is the IA32_VMX_EPT_VPID_CAP that
    says what the processor has (None: not asked), `maxphyaddr` the width of physical addresses in bits.

    Source: SDM volume 3, 27.6.11 and 29.2.1.1.  That one calls bits 11:7 reserved, the other defines bit 7: here it is
    defined, and needs bit 23 of the capability.

    >>> print(decode_eptp(0x105E))
    EPTP 0x000000000000105e: address=0x1000 ad walk_length_minus_1=0x3 memory_type=0x6
    """
    number("decode_eptp", "value", value)
    number("decode_eptp", "maxphyaddr", maxphyaddr, 52, 32)
    decoded = EPTP.decode(value)
    problems = list(decoded.problems)
    high = _ADDRESS >> maxphyaddr << maxphyaddr
    if value & high:
        problems.append(f"address bits {value & high:#x} are above MAXPHYADDR {maxphyaddr}")
    if capability is not None:
        number("decode_eptp", "capability", capability)
        for wanted, bit, what in (
            (decoded["memory_type"] == 0, 8, "memory_type 0 (UC)"),
            (decoded["memory_type"] == 6, 14, "memory_type 6 (WB)"),
            (decoded["walk_length_minus_1"] == 3, 6, "a walk of 4 levels"),
            (decoded["walk_length_minus_1"] == 4, 7, "a walk of 5 levels"),
            (decoded["ad"], 21, "accessed and dirty flags (bit 6)"),
            (decoded["supervisor_shadow_stack"], 23, "supervisor shadow stacks (bit 7)"),
        ):
            if wanted and not capability >> bit & 1:
                problems.append(f"{what}: bit {bit} of IA32_VMX_EPT_VPID_CAP is clear")
    return Decoded(decoded.title, 64, value, decoded.parts, tuple(problems))


def convertible_to_ve(entries: Sequence[tuple[int, int]], controls: EptControls) -> bool:
    """Whether an EPT violation by these entries ((level, entry) from the top) becomes a #VE: bit 63 is clear in the
    entry that is not present, or else in the one that maps the page (28.5.8.1).  Without an entry it does not: the
    manual names none for it.

    What else a #VE needs is taken to hold: CR0.PE is 1, no event is being delivered, the access is not of trace output
    or PEBS, no shadow stack became prematurely busy, and the word at offset 4 of the information area is 0.
    """
    return controls.ve and bool(entries) and not entries[-1][1] >> 63


def sub_page_vector(read: Callable[[int], int], pointer: int, gpa: int, *, maxphyaddr: int = 52) -> int | str:
    """The sub-page permission vector of a 4-KiB page, or why there is none: "miss" or "misconfiguration".

    `read(address)`: the 64-bit entry at a physical address; `pointer`: the SPPTP (VMCS field 2030H), a multiple of
    4 KiB below 2**maxphyaddr; `gpa`: below 2**52, of which bits 47:12 choose the vector.  Bit 2n of the vector allows
    writes to bytes 128n to 128n+127.  Three levels of entries have a valid bit (0) and an address (maxphyaddr-1 to 12),
    the rest reserved; odd bits of the vector are reserved.  Source: SDM volume 3, 31.3.4.2.
    """
    call = "sub_page_vector"
    maxphyaddr = number(call, "maxphyaddr", maxphyaddr, 52, 32)
    last = (1 << maxphyaddr) - 1
    table = number(call, "pointer", pointer, last)
    if table & 0xFFF:
        raise ArgumentError(call, "pointer", pointer, "a multiple of 0x1000")
    gpa = number(call, "gpa", gpa, _LAST_ADDRESS)
    for level in (4, 3, 2):
        entry = _read(call, read, table | (gpa >> 12 + 9 * (level - 1) & 511) << 3)
        if not entry & 1:
            return "miss"
        if entry & ~(last & ~0xFFF) & ~1:
            return "misconfiguration"
        table = entry & _ADDRESS
    vector = _read(call, read, table | (gpa >> 12 & 511) << 3)
    return "misconfiguration" if vector & 0xAAAA_AAAA_AAAA_AAAA else vector


def _read(call: str, read: Callable[[int], int], address: int) -> int:
    return number(call, f"read({address:#x})", read(address))


def ept_walk(
    read: Callable[[int], int],
    pointer: int,
    gpa: int,
    access: EptAccess | None = None,
    controls: EptControls | None = None,
    *,
    guest_tables_verified: bool = True,
    sub_page_table: int | None = None,
) -> EptOutcome:
    """The processor's walk of the EPT for one access to a guest-physical address.

    `read(address)`: the 64-bit entry at a physical address; `pointer`: the EPTP, whose bits 7:6 count in place of
    `controls.ad` and `.sss`; `gpa`: below 2**52 (with 4 levels, one from 2**48 on is a violation); `sub_page_table`:
    the SPPTP, needed where the controls have `spp` and a write comes to an entry with bit 61; `guest_tables_verified`:
    as `ept_access` has it.  ArgumentError names what is out of range, or missing.
    """
    call = "ept_walk"
    controls, access = _controls(call, controls), _access(call, access)
    pointer = number(call, "pointer", pointer)
    decoded = decode_eptp(pointer, maxphyaddr=controls.maxphyaddr)
    if decoded.problems:
        raise ArgumentError(call, "pointer", pointer, "an EPTP that VM entry takes", "; ".join(decoded.problems))
    levels = decoded["walk_length_minus_1"] + 1
    gpa = number(call, "gpa", gpa, _LAST_ADDRESS)
    words = {name: getattr(controls, name) for name in EptControls.fields()}
    words |= {"ad": bool(decoded["ad"]), "sss": bool(decoded["supervisor_shadow_stack"])}
    controls = EptControls(**words)
    if levels == 4 and gpa >> 48:
        return _violation((), access, controls, _WIDE)
    entries: list[tuple[int, int]] = []
    table = pointer & _ADDRESS
    for level in range(levels, 0, -1):
        entry = _read(call, read, table | (gpa >> 12 + 9 * (level - 1) & 511) << 3)
        entries.append((level, entry))
        if _ends(entry, level, controls):
            break
        table = entry & _ADDRESS
    sub_pages = None
    level, last = entries[-1]
    if not _misconfigurations(last, level, controls) and _by_sub_pages(entries, access, controls):
        if sub_page_table is None:
            raise ArgumentError(call, "sub_page_table", None, "the SPPTP: sub-page permissions decide this write")
        sub_pages = sub_page_vector(read, sub_page_table, gpa, maxphyaddr=controls.maxphyaddr)
    return ept_access(
        tuple(entries), gpa, access, controls, guest_tables_verified=guest_tables_verified, sub_pages=sub_pages
    )


_WIDE = ("bits 51:48 of the address are not all 0, and the walk has 4 levels",)


def _ends(entry: int, level: int, controls: EptControls) -> bool:
    # Whether a walk goes no further than this entry: it is not present, maps a page, or is misconfigured.
    return (
        not is_ept_present(entry, mbec=controls.mbec)
        or is_ept_leaf(entry, level)
        or bool(_misconfigurations(entry, level, controls))
    )


def ept_access(
    entries: Sequence[tuple[int, int]],
    gpa: int,
    access: EptAccess | None = None,
    controls: EptControls | None = None,
    *,
    guest_tables_verified: bool = True,
    sub_pages: int | str | None = None,
) -> EptOutcome:
    """What an access comes to by the EPT entries of its translation: (level, entry) from the top, level 5 or 4, to the
    one that ends it, because it is not present, misconfigured, or maps a page.

    `gpa`: below 2**52; from level 4 on, one from 2**48 on is a violation whatever the entries are.
    `guest_tables_verified`: whether the leaf entries that map the guest's paging structures of this linear address all
    have paging-write (bit 58): guest-paging verification asks.  `sub_pages`: what `sub_page_vector` answers, where the
    controls have `spp`; needed once a write comes to a leaf whose bit 61 is set and some W is clear.  Some writes that
    sub-page permissions never apply to (in a transaction, of an enclave, of PEBS) cannot be told here, nor can accesses
    of more than one sub-page or page.  ArgumentError names what is out of range, or missing.

    Source: SDM volume 3, 31.3.3.2 (violations), 31.3.3.3 (order), 31.3.4 (sub-page permissions), 31.3.5 (accessed and
    dirty), 30.2.1 table 30-7 (the qualification), 28.5.8.1 (#VE).
    """
    call = "ept_access"
    access, controls = _access(call, access), _controls(call, controls)
    gpa = number(call, "gpa", gpa, _LAST_ADDRESS)
    read = tuple([(_level(call, level), number(call, "entry", entry)) for level, entry in entries])
    if not read or read[0][0] < 4:
        raise ArgumentError(call, "entries", entries, "(level, entry) from the top, level 5 or 4")
    for place, (level, entry) in enumerate(read):
        if level != read[0][0] - place:
            raise ArgumentError(call, "entries", entries, "levels that go down one by one")
        if _ends(entry, level, controls) != (place + 1 == len(read)):
            raise ArgumentError(
                call, "entries", entries, "entries to the first that is not present, misconfigured, or maps a page"
            )
    if read[0][0] == 4 and gpa >> 48:
        return _violation((), access, controls, _WIDE)
    level, last = read[-1]
    rules = _misconfigurations(last, level, controls)
    if rules:
        return EptOutcome("EPT_MISCONFIG", None, None, read, rules)
    if not is_ept_present(last, mbec=controls.mbec):
        return _violation(read, access, controls, (f"the entry of level {level} is not present",))
    by_sub_pages = False
    if _by_sub_pages(read, access, controls):
        if sub_pages is None:
            raise ArgumentError(call, "sub_pages", None, "the answer of sub_page_vector for this address")
        if isinstance(sub_pages, str):
            miss = encode_qualification(66, miss=int(sub_pages == "miss"))
            return EptOutcome("SPP_EVENT", None, miss, read, (f"sub-page permissions: {sub_pages}",))
        by_sub_pages = bool(number(call, "sub_pages", sub_pages) >> 2 * (gpa >> 7 & 31) & 1)
    rules = _refusals(read, access, controls, by_sub_pages)
    if rules:
        return _violation(read, access, controls, rules)
    # Both controls, for a page that is the translation of a linear address (31.3.3.2).
    verifies = controls.guest_paging_verification and controls.paging_write and access.linear and access.final
    if verifies and last >> 57 & 1 and not guest_tables_verified:
        rules = ("verify-guest-paging (bit 57), and a guest paging structure is mapped without bit 58",)
        return _violation(read, access, controls, rules, verification=True)
    size = 1 << 12 + 9 * (level - 1)
    return EptOutcome(
        None,
        (last & _ADDRESS & -size) | gpa & size - 1,
        None,
        read,
        (),
        tuple([above for above, _ in read]) if controls.ad else (),
        (level,) if controls.ad and _is_write(access, controls) else (),
    )


def _is_paging_write(access: EptAccess, controls: EptControls) -> bool:
    # With accessed and dirty flags in the EPT, every look at a guest paging structure counts as a write (31.3.3.2).
    return access.linear and not access.final and (access.ad_update or controls.ad)


def _is_write(access: EptAccess, controls: EptControls) -> bool:
    return access.kind in ("write", "modify") or _is_paging_write(access, controls)


def _refusals(
    read: Sequence[tuple[int, int]], access: EptAccess, controls: EptControls, by_sub_pages: bool
) -> tuple[str, ...]:
    # Why the rights of entries that map a page do not allow the access (31.3.3.2).
    rights, above, leaf = _rights(read), _rights(read[:-1]), read[-1][1]
    wrong = []
    if _is_shadow_stack_checked(access, controls):
        if not rights & 1:
            wrong.append("a supervisor shadow-stack access, and some entry has R clear")
        if not above & 2:
            wrong.append("a supervisor shadow-stack access, and an entry above the leaf has W clear")
        if not leaf >> 60 & 1:
            wrong.append("a supervisor shadow-stack access, and bit 60 of the leaf is clear")
        return tuple(wrong)
    if access.kind in ("read", "modify") and not rights & 1:
        wrong.append("a read, and some entry has R clear")
    if access.kind == "fetch":
        name, bit = ("XU", 0x400) if controls.mbec and access.user else ("X", 4)
        if not rights & bit:
            wrong.append(f"a fetch, and some entry has {name} clear")
    if _is_write(access, controls) and not rights & 2 and not by_sub_pages:
        paging = _is_paging_write(access, controls)
        if not (paging and controls.paging_write and above & 2 and leaf >> 58 & 1):
            what = "a write"
            if paging and not access.ad_update:
                what = "a guest paging structure is accessed as by a write (EPTP bit 6)"
            wrong.append(f"{what}, and some entry has W clear")
    return tuple(wrong)


def _violation(
    read: tuple[tuple[int, int], ...],
    access: EptAccess,
    controls: EptControls,
    rules: tuple[str, ...],
    *,
    verification: bool = False,
) -> EptOutcome:
    # Table 30-7.  An entry that is not present gives no right at all, nor does an address that is too wide; bit 14 is
    # undefined then, and 0 here.
    present = bool(read) and is_ept_present(read[-1][1], mbec=controls.mbec)
    rights = _rights(read)
    structure = access.linear and not access.final
    words = {
        "read": (access.kind == "read" and not access.ad_update) or (structure and controls.ad),
        "write": _is_write(access, controls),
        "fetch": access.kind == "fetch",
        "readable": rights & 1,
        "writable": rights >> 1 & 1,
        "executable": rights >> 2 & 1,
        "user_executable": controls.mbec and rights >> 10 & 1,
        "linear_valid": access.linear,
        "final": access.linear and access.final,
        "shadow_stack": access.shadow_stack,
        "supervisor_shadow_stack": controls.sss and present and read[-1][1] >> 60 & 1,
        "guest_paging_verification": verification,
    }
    if controls.advanced_exit_info and access.linear and access.final:
        words |= {
            "user_linear": access.user,
            "writable_linear": access.writable_linear,
            "nx_linear": access.nx_linear,
        }
    qualification = encode_qualification(48, **{name: int(bool(value)) for name, value in words.items()})
    exit = "VE" if convertible_to_ve(read, controls) else "EPT_VIOLATION"
    return EptOutcome(exit, None, qualification, read, rules)
