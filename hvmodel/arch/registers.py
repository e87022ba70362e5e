"""The system registers by their bits: control registers, EFER, RFLAGS, XCR0 and XSS, DR6 and DR7, the APIC base.

Names are those of Intel's manual (volume 3, 2.3 and 2.5), of AMD's where only AMD has the bit.  Each class is a
`Bits` whose members are all bits that either vendor defines; a field of several bits (RFLAGS.IOPL, DR7.LEN0) is one
member.  A value may have other bits too: they stay, and `bit_names` calls them by number.

        63      32 31 30 29                18   16        11         8         5  4  3  2  1  0
    CR0 |reserved |PG|CD|NW|             |AM|  |WP|                           |NE|ET|TS|EM|MP|PE|

        63     32   28      27   25    24  23  22  21   20   19 18      17    16
    CR4 |   |FRED| |LAM_SUP|LASS|UINTR|PKS|CET|PKE|SMAP|SMEP|KL|OSXSAVE|PCIDE|FSGSBASE|
        15 14   13   12   11   10         9      8   7   6   5   4   3  2   1   0
        | |SMXE|VMXE|LA57|UMIP|OSXMMEXCPT|OSFXSR|PCE|PGE|MCE|PAE|PSE|DE|TSD|PVI|VME|

        63    62      61      60        52 51         12 11     5  4   3  2  0
    CR3 |NOFL|LAM_U48|LAM_U57|            | page table  |       |PCD|PWT|    |     CR4.PCIDE clear
        |NOFL|LAM_U48|LAM_U57|            | page table  |        PCID        |     CR4.PCIDE set

         21    20      18    17     15   14    13   12   11  10   8       0
    EFER |AIBRSE|UAIE|INTWB|MCOMMIT|TCE|FFXSR|LMSLE|SVME|NXE|LMA|LME|...|SCE|

         21  20  19 18 17 16    14 13 12 11 10  9  8  7  6     4     2  1  0
    RFLAGS |ID|VIP|VIF|AC|VM|RF|  |NT|IOPL|OF|DF|IF|TF|SF|ZF|  |AF|  |PF| 1|CF|

         31 30 29 28 27 26 25 24 23 22 21 20 19 18 17 16 15 14 13  12  11 10  9  8  7  6  5  4  3  2  1  0
    DR7  |LEN3|RW3  |LEN2 |RW2  |LEN1 |RW1  |LEN0 |RW0  |     |GD|  |RTM| 1|GE|LE|G3|L3|G2|L2|G1|L1|G0|L0|
    DR6  |                                        |RTM|BT|BS|BD| |BLD| 1 1 1 1 1 1 1          |B3|B2|B1|B0|
"""

from __future__ import annotations

from enum import IntFlag

from ..errors import ArgumentError, ArgumentTypeError
from .number import ALL, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "APIC_BASE",
    "CR0",
    "CR3",
    "CR4",
    "CR8",
    "DR6",
    "DR6_FIXED",
    "DR7",
    "EFER",
    "RFLAGS",
    "XCR0",
    "XSS",
    "Bits",
    "bit_names",
    "field_of",
    "is_canonical",
    "page_table_of",
    "pcid_of",
]


class Bits(IntFlag):
    """What the classes of bits here are: an IntFlag of 64 bits, so that `value & ~member` clears no other bit.

    With a plain IntFlag it clears all bits above the highest member too.

    >>> hex(0xFEE00900 & ~APIC_BASE.EN)
    '0xfee00100'
    """

    @classmethod
    def _missing_(cls, value: object) -> Any:
        # ~member asks for a negative number, which IntFlag would cut to as many bits as its members have.
        return super()._missing_(value & ALL if isinstance(value, int) and value < 0 else value)


class CR0(Bits):
    """CR0: operating mode and state of the processor.

    >>> CR0(0x60000010)
    <CR0.ET|NW|CD: 1610612752>
    """

    PE = 1 << 0  # protected mode
    MP = 1 << 1  # WAIT takes #NM where TS is set
    EM = 1 << 2  # no x87: its instructions take #NM
    TS = 1 << 3  # task switched: x87 and SSE take #NM
    ET = 1 << 4  # 387; always 1
    NE = 1 << 5  # x87 errors by #MF
    WP = 1 << 16  # read-only pages are so for the supervisor too
    AM = 1 << 18  # RFLAGS.AC asks for #AC
    NW = 1 << 29  # not write-through; goes with CD only
    CD = 1 << 30  # no caching
    PG = 1 << 31  # paging; goes with PE only


class CR3(Bits):
    """The flags of CR3; the rest of it is the address of the page table, see `page_table_of`, and `pcid_of`."""

    PWT = 1 << 3  # the table is cached write-through
    PCD = 1 << 4  # the table is not cached
    LAM_U57 = 1 << 61  # bits 62:57 of user addresses are ignored
    LAM_U48 = 1 << 62  # bits 62:48 of user addresses are ignored
    NOFLUSH = 1 << 63  # MOV to CR3 keeps the TLB's entries (CR4.PCIDE); reads as 0


class CR4(Bits):
    """CR4: extensions, each of which a CPUID feature announces."""

    VME = 1 << 0  # virtual interrupts in virtual-8086 mode
    PVI = 1 << 1  # virtual interrupts in protected mode
    TSD = 1 << 2  # RDTSC at CPL 0 only
    DE = 1 << 3  # I/O breakpoints; DR4 and DR5 take #UD
    PSE = 1 << 4  # 4 MiB pages in 32-bit paging
    PAE = 1 << 5  # 64-bit page table entries
    MCE = 1 << 6  # machine checks
    PGE = 1 << 7  # global pages
    PCE = 1 << 8  # RDPMC at every CPL
    OSFXSR = 1 << 9  # SSE, FXSAVE
    OSXMMEXCPT = 1 << 10  # SSE errors by #XM
    UMIP = 1 << 11  # no SGDT, SIDT, SLDT, SMSW, STR at CPL 3
    LA57 = 1 << 12  # 5-level paging
    VMXE = 1 << 13  # VMX
    SMXE = 1 << 14  # SMX (GETSEC)
    FSGSBASE = 1 << 16  # RDFSBASE and its like
    PCIDE = 1 << 17  # process-context identifiers in CR3
    OSXSAVE = 1 << 18  # XSAVE, XGETBV
    KL = 1 << 19  # key locker
    SMEP = 1 << 20  # the supervisor does not execute user pages
    SMAP = 1 << 21  # the supervisor does not touch user pages
    PKE = 1 << 22  # protection keys of user pages
    CET = 1 << 23  # shadow stacks, indirect branch tracking; goes with CR0.WP only
    PKS = 1 << 24  # protection keys of supervisor pages
    UINTR = 1 << 25  # user interrupts
    LASS = 1 << 27  # linear-address-space separation
    LAM_SUP = 1 << 28  # bits of supervisor addresses are ignored
    FRED = 1 << 32  # event delivery without an IDT


class CR8(Bits):
    """CR8: the task priority; interrupts of its class and below wait."""

    TPL = 0xF


class EFER(Bits):
    """MSR 0xC0000080, extended feature enables."""

    SCE = 1 << 0  # SYSCALL
    LME = 1 << 8  # long mode, as soon as there is paging
    LMA = 1 << 10  # long mode is active: LME and CR0.PG
    NXE = 1 << 11  # bit 63 of a page table entry forbids to execute
    SVME = 1 << 12  # SVM (AMD)
    LMSLE = 1 << 13  # segment limits in long mode (AMD)
    FFXSR = 1 << 14  # FXSAVE at CPL 0 without XMM (AMD)
    TCE = 1 << 15  # INVLPG keeps upper-level translations (AMD)
    MCOMMIT = 1 << 17  # (AMD)
    INTWB = 1 << 18  # WBINVD can be interrupted (AMD)
    UAIE = 1 << 20  # bits 62:57 of addresses are ignored (AMD)
    AIBRSE = 1 << 21  # automatic IBRS (AMD)


class RFLAGS(Bits):
    """RFLAGS: status, control and system flags."""

    CF = 1 << 0
    FIXED = 1 << 1  # always 1
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8  # single step
    IF = 1 << 9  # interrupts
    DF = 1 << 10
    OF = 1 << 11
    IOPL = 3 << 12  # I/O goes up to this CPL
    NT = 1 << 14  # nested task
    RF = 1 << 16  # no instruction breakpoint at the next instruction
    VM = 1 << 17  # virtual-8086 mode
    AC = 1 << 18  # alignment checks; with SMAP, access to user pages
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21  # that it can be changed says that there is CPUID


class XCR0(Bits):
    """XCR0: the user state components that XSAVE saves (CPUID 0xD.0 says which may be set)."""

    X87 = 1 << 0  # always 1
    SSE = 1 << 1
    AVX = 1 << 2
    BNDREGS = 1 << 3  # MPX
    BNDCSR = 1 << 4
    OPMASK = 1 << 5  # AVX-512: k0 to k7
    ZMM_HI256 = 1 << 6  # upper halves of ZMM0 to ZMM15
    HI16_ZMM = 1 << 7  # ZMM16 to ZMM31
    PKRU = 1 << 9
    XTILECFG = 1 << 17  # AMX
    XTILEDATA = 1 << 18
    APX = 1 << 19  # r16 to r31
    LWP = 1 << 62  # (AMD)


class XSS(Bits):
    """MSR 0xDA0: the supervisor state components that XSAVES saves (CPUID 0xD.1 says which may be set)."""

    PT = 1 << 8  # processor trace
    PASID = 1 << 10
    CET_U = 1 << 11
    CET_S = 1 << 12
    HDC = 1 << 13
    UINTR = 1 << 14
    LBR = 1 << 15
    HWP = 1 << 16


class DR6(Bits):
    """DR6: what a debug exception was for.  BLD and RTM are 0 where it happened, and 1 else.

    `DR6_FIXED` has the bits that are always 1; bit 12 and bits 63:32 are always 0.
    """

    B0 = 1 << 0  # breakpoint 0
    B1 = 1 << 1
    B2 = 1 << 2
    B3 = 1 << 3
    BLD = 1 << 11  # bus lock (0: there was one)
    BD = 1 << 13  # a debug register was touched while DR7.GD was set
    BS = 1 << 14  # single step
    BT = 1 << 15  # task switch
    RTM = 1 << 16  # in a transaction (0: it was)


DR6_FIXED = 0xFFFE07F0  # bits 31:17 and 10:4


class DR7(Bits):
    """DR7: which breakpoints are on, and what each is for.

    `RWn`: 0 execution, 1 writes, 2 I/O (CR4.DE), 3 reads and writes.  `LENn`: 0 one byte, 1 two, 2 eight, 3 four.
    """

    L0 = 1 << 0  # local enable of breakpoint 0
    G0 = 1 << 1  # global enable
    L1 = 1 << 2
    G1 = 1 << 3
    L2 = 1 << 4
    G2 = 1 << 5
    L3 = 1 << 6
    G3 = 1 << 7
    LE = 1 << 8
    GE = 1 << 9
    FIXED = 1 << 10  # always 1
    RTM = 1 << 11  # debugging of transactions
    GD = 1 << 13  # touching a debug register takes #DB
    RW0 = 3 << 16
    LEN0 = 3 << 18
    RW1 = 3 << 20
    LEN1 = 3 << 22
    RW2 = 3 << 24
    LEN2 = 3 << 26
    RW3 = 3 << 28
    LEN3 = 3 << 30


class APIC_BASE(Bits):
    """MSR 0x1B: flags beside the address of the local APIC, which is in bits MAXPHYADDR-1:12."""

    BSP = 1 << 8  # the bootstrap processor
    EXTD = 1 << 10  # x2APIC mode; goes with EN only
    EN = 1 << 11  # the APIC is on


# register class -> name of each of its bits, 0 to 63, or "" for a bit that has none
_tables: dict[type[IntFlag], tuple[str, ...]] = {}


def _table(register: Any) -> tuple[str, ...]:
    try:
        return _tables[register]
    except (KeyError, TypeError, ValueError):  # a ValueError of what has no hash
        pass
    if not (isinstance(register, type) and issubclass(register, IntFlag)):
        raise ArgumentTypeError("bit_names", "register", register, "a class of bits, as CR0")
    names = [""] * 64
    for name, member in register.__members__.items():
        bits = [bit for bit in range(64) if member >> bit & 1]
        for at, bit in enumerate(bits):
            if not names[bit]:
                names[bit] = name if len(bits) == 1 else f"{name}[{at}]"
    full = tuple([f"{register.__name__}.{name}" if name else f"{register.__name__} bit {bit}"
                  for bit, name in enumerate(names)])  # fmt: skip
    _tables[register] = full
    return full


def bit_names(register: type[IntFlag], value: int) -> tuple[str, ...]:
    """Names of the bits that are set in `value` (0 to 2**64-1), from bit 0 up.

    >>> bit_names(CR0, 1 << 31 | 1 << 40)
    ('CR0.PG', 'CR0 bit 40')
    >>> bit_names(RFLAGS, 0x2200)
    ('RFLAGS.IF', 'RFLAGS.IOPL[1]')
    """
    table, found, bits = _table(register), [], number("bit_names", "value", value)
    while bits:
        lowest = bits & -bits
        found.append(table[lowest.bit_length() - 1])
        bits ^= lowest
    return tuple(found)


def field_of(value: int, field: IntFlag) -> int:
    """The number that the bits of `field` make in `value` (0 to 2**64-1); ArgumentError for a field without bits.

    >>> field_of(0x3202, RFLAGS.IOPL), field_of(0x3202, RFLAGS.IF), field_of(0xD0000, DR7.LEN0)
    (3, 1, 3)
    """
    mask = number("field_of", "field", field)
    if not mask:
        raise ArgumentError("field_of", "field", field, "a member with at least one bit")
    return (number("field_of", "value", value) & mask) >> ((mask & -mask).bit_length() - 1)


def page_table_of(cr3: int, *, pae: bool = False) -> int:
    """Where the page table is that CR3 names: bits 51:12, or with `pae` (PAE paging: 4 entries of 8 bytes) 31:5.

    >>> hex(page_table_of(0x8000_0000_0010_3018)), hex(page_table_of(0x1030A8, pae=True))
    ('0x103000', '0x1030a0')
    """
    return number("page_table_of", "cr3", cr3) & (0xFFFF_FFE0 if pae else 0xF_FFFF_FFFF_F000)


def pcid_of(cr3: int, cr4: int) -> int:
    """The process-context identifier in CR3, 0 to 4095: 0 where CR4.PCIDE is clear.

    >>> pcid_of(0x103018, CR4.PAE), pcid_of(0x103018, CR4.PAE | CR4.PCIDE)
    (0, 24)
    """
    return number("pcid_of", "cr3", cr3) & 0xFFF if number("pcid_of", "cr4", cr4) & CR4.PCIDE else 0


def is_canonical(address: int, *, la57: bool = False) -> bool:
    """Whether bits 63:47 of a linear address are equal, or with `la57` (5-level paging) bits 63:56.

    >>> is_canonical(0xFFFF_8000_0000_0000), is_canonical(1 << 47), is_canonical(1 << 47, la57=True)
    (True, False, True)
    """
    upper = number("is_canonical", "address", address) >> (56 if la57 else 47)
    return upper in (0, (1 << (8 if la57 else 17)) - 1)
