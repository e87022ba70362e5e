"""In which mode a processor with these registers is, and how it pages; plain numbers in, words out.

    CR0.PE  EFER.LMA  RFLAGS.VM  CS.L  CS.D
      0        .          .        .     .    real: 16 bits, whatever CS.D says it can be 32 ("unreal")
      1        0          1        .     .    virtual-8086
      1        0          0        .    0 1   protected, 16 or 32 bits
      1        1          .        0    0 1   compatibility, 16 or 32 bits
      1        1          .        1     0    64-bit (CS.L with CS.D is reserved)

    CR0.PG  CR4.PAE  EFER.LMA  CR4.LA57
      0        .         .         .    none
      1        0         0         .    32-bit: 2 levels of 4-byte entries; with CR4.PSE 4 MiB pages too
      1        1         0         .    PAE: 3 levels of 8-byte entries
      1        1         1        0 1   4 or 5 levels

Source: Intel SDM volume 3, 2.2 (modes), and "Four Paging Modes"; AMD APM volume 2, 1.3.
"""

from __future__ import annotations

from enum import StrEnum

from ..errors import ArgumentError, ArgumentTypeError
from .number import number
from .registers import CR0, CR4, EFER, RFLAGS

__all__ = ["Mode", "Paging", "default_bits", "linear_bits", "mode_of", "mode_of_sregs", "paging_of"]

_PE, _PG = int(CR0.PE), int(CR0.PG)
_PSE, _PAE, _LA57 = int(CR4.PSE), int(CR4.PAE), int(CR4.LA57)
_LMA, _VM = int(EFER.LMA), int(RFLAGS.VM)


class Mode(StrEnum):
    """A mode of the processor; its value is its name.

    >>> Mode.VM86, Mode("64-bit").is_long
    (<Mode.VM86: 'virtual-8086'>, True)
    """

    REAL = "real"
    VM86 = "virtual-8086"
    PROTECTED16 = "16-bit protected"
    PROTECTED32 = "32-bit protected"
    COMPAT16 = "16-bit compatibility"
    COMPAT32 = "32-bit compatibility"
    LONG = "64-bit"

    @property
    def is_long(self) -> bool:
        """Long mode: 64-bit code, or compatibility mode below a 64-bit system."""
        return self in (Mode.LONG, Mode.COMPAT16, Mode.COMPAT32)

    @property
    def is_protected(self) -> bool:
        """Segments come from descriptor tables: all but real and virtual-8086 mode."""
        return self not in (Mode.REAL, Mode.VM86)


class Paging(StrEnum):
    """A way of paging; its value is its name.

    >>> Paging.PAE.levels, Paging.PAE.entry_size, Paging.LEVEL5.linear_bits
    (3, 8, 57)
    """

    NONE = "none"
    BITS32 = "32-bit"
    PSE = "32-bit with 4 MiB pages"
    PAE = "PAE"
    LEVEL4 = "4-level"
    LEVEL5 = "5-level"

    @property
    def levels(self) -> int:
        """How many tables a walk goes through; 0 without paging."""
        return _SHAPES[self][0]

    @property
    def entry_size(self) -> int:
        """Bytes of a page table entry: 4 or 8; 0 without paging."""
        return _SHAPES[self][1]

    @property
    def linear_bits(self) -> int:
        """Width of the linear addresses that are translated; 32 without paging."""
        return _SHAPES[self][2]


# way of paging -> levels, bytes of an entry, bits of a linear address
_SHAPES = {
    Paging.NONE: (0, 0, 32),
    Paging.BITS32: (2, 4, 32),
    Paging.PSE: (2, 4, 32),
    Paging.PAE: (3, 8, 32),
    Paging.LEVEL4: (4, 8, 48),
    Paging.LEVEL5: (5, 8, 57),
}


def mode_of(cr0: int, efer: int = 0, rflags: int = 0, *, cs_l: int = 0, cs_db: int = 0) -> Mode:
    """The mode of a processor with these registers, each 0 to 2**64-1; `cs_l` and `cs_db`: L and D of its CS, 0 or 1.

    ArgumentError: CS.L with CS.D in long mode, which is reserved.

    >>> mode_of(0x11, cs_db=1), mode_of(0x80000011, 0x500, cs_l=1)
    (<Mode.PROTECTED32: '32-bit protected'>, <Mode.LONG: '64-bit'>)
    """
    call = "mode_of"
    cr0, efer, rflags = number(call, "cr0", cr0), number(call, "efer", efer), number(call, "rflags", rflags)
    cs_l, cs_db = number(call, "cs_l", cs_l, 1), number(call, "cs_db", cs_db, 1)
    if not cr0 & _PE:
        return Mode.REAL
    if efer & _LMA:
        if not cs_l:
            return Mode.COMPAT32 if cs_db else Mode.COMPAT16
        if cs_db:
            raise ArgumentError(call, "cs_db", cs_db, "0", "CS.L is set: CS.L with CS.D is reserved")
        return Mode.LONG
    if rflags & _VM:
        return Mode.VM86
    return Mode.PROTECTED32 if cs_db else Mode.PROTECTED16


def mode_of_sregs(sregs: object, rflags: int = 0) -> Mode:
    """mode_of() of what has the attributes of struct kvm_sregs: cr0, efer, cs.l, cs.db."""
    try:
        cs = sregs.cs  # type: ignore[attr-defined]  # whatever has them
        return mode_of(sregs.cr0, sregs.efer, rflags, cs_l=cs.l, cs_db=cs.db)  # type: ignore[attr-defined]
    except AttributeError:
        raise ArgumentTypeError("mode_of_sregs", "sregs", sregs, "an object with cr0, efer, cs.l and cs.db") from None


def paging_of(cr0: int, cr4: int = 0, efer: int = 0) -> Paging:
    """How a processor with these registers pages, each 0 to 2**64-1.

    ArgumentError: paging with EFER.LMA and without CR4.PAE, which no processor enters.

    >>> paging_of(0x11), paging_of(0x80000011, 0x30), paging_of(0x80000011, 0x1020, 0x500)
    (<Paging.NONE: 'none'>, <Paging.PAE: 'PAE'>, <Paging.LEVEL5: '5-level'>)
    """
    call = "paging_of"
    cr0, cr4, efer = number(call, "cr0", cr0), number(call, "cr4", cr4), number(call, "efer", efer)
    if not cr0 & _PG:
        return Paging.NONE
    if efer & _LMA:
        if not cr4 & _PAE:
            raise ArgumentError(call, "cr4", cr4, f"CR4.PAE set ({cr4 | _PAE:#x})", "long mode pages with PAE")
        return Paging.LEVEL5 if cr4 & _LA57 else Paging.LEVEL4
    if cr4 & _PAE:
        return Paging.PAE
    return Paging.PSE if cr4 & _PSE else Paging.BITS32


def default_bits(mode: Mode, *, cs_db: int = 0) -> int:
    """The size of addresses of an instruction without prefixes: 16, 32 or 64.

    `cs_db` counts in real mode, where CS.D can be left from protected mode.  ArgumentError: `mode` is no Mode.

    >>> [default_bits(mode) for mode in (Mode.VM86, Mode.COMPAT32, Mode.LONG)]
    [16, 32, 64]
    """
    if mode not in Mode.__members__.values():
        raise ArgumentError("default_bits", "mode", mode, "a Mode, or its value")
    if mode == Mode.LONG:
        return 64
    if mode == Mode.REAL:
        return 32 if cs_db else 16
    return 32 if mode in (Mode.PROTECTED32, Mode.COMPAT32) else 16


def linear_bits(cr0: int, cr4: int = 0, efer: int = 0) -> int:
    """Width of the linear addresses that these registers translate: 32, 48 or 57.

    >>> linear_bits(0x80000011, 0x20, 0x500)
    48
    """
    return paging_of(cr0, cr4, efer).linear_bits
