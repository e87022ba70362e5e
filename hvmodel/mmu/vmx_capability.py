"""What a VMX processor says of its EPT and VPID: the MSR IA32_VMX_EPT_VPID_CAP (48CH).

    63      54 53          48 47   44 43    40 39    33   32    31      27 26     25
    |         | HLAT prefix |        | INVVPID |       |INVVPID|          | INVEPT  |
    24 23  22   21   20   19 18 17 16 15 14 13     9  8    7   6  5      1  0
    |  |SSS|ADV| AD |INVEPT|    |1G|2M|  |WB|        | UC| L5| L4|        |XO|

Source: Intel SDM volume 3, appendix A.10.
"""

from __future__ import annotations

from ..arch.number import number
from .bits import BitLayout, Decoded, Field

__all__ = ["EPT_VPID_CAP", "decode_ept_vpid_cap", "ept_vpid_cap"]

EPT_VPID_CAP = BitLayout(
    "IA32_VMX_EPT_VPID_CAP",
    64,
    (
        Field(
            "exec_only", 0, text="an entry may allow execution alone", clear="execute-only entries are misconfigured"
        ),
        Field("walk_4", 6, text="a walk of 4 levels"),
        Field("walk_5", 7, text="a walk of 5 levels"),
        Field("uc", 8, text="EPT structures may be uncacheable"),
        Field("wb", 14, text="EPT structures may be write-back"),
        Field("page_2m", 16, text="a PDE may map 2 MiB"),
        Field("page_1g", 17, text="a PDPTE may map 1 GiB"),
        Field("invept", 20, text="INVEPT"),
        Field("ad", 21, text="accessed and dirty flags"),
        Field("advanced_exit_info", 22, text="EPT violations tell the rights of the linear address"),
        Field("supervisor_shadow_stack", 23, text="supervisor shadow-stack control"),
        Field("invept_single", 25, text="INVEPT of one EPTP"),
        Field("invept_all", 26, text="INVEPT of all"),
        Field("invvpid", 32, text="INVVPID"),
        Field("invvpid_address", 40, text="INVVPID of one address"),
        Field("invvpid_single", 41, text="INVVPID of one VPID"),
        Field("invvpid_all", 42, text="INVVPID of all"),
        Field("invvpid_single_non_global", 43, text="INVVPID of one VPID but for its global pages"),
        Field("hlat_prefix", 48, 6, text="largest HLAT prefix size (1 where there is HLAT)"),
    ),
)
"""The MSR's fields (A.10)."""


def decode_ept_vpid_cap(value: int) -> Decoded:
    """The MSR's value by its fields.  ArgumentError: not a number of 64 bits.

    INVEPT or INVVPID without any of its types, or a type without the instruction, is told as a problem.  The manual
    does not forbid it in words; it says of each type that the instruction has it.

    >>> print(decode_ept_vpid_cap(0x4041))
    IA32_VMX_EPT_VPID_CAP 0x0000000000004041: wb walk_4 exec_only
    """
    number("decode_ept_vpid_cap", "value", value)
    decoded = EPT_VPID_CAP.decode(value)
    problems = []
    if decoded["invept"] != (decoded["invept_single"] | decoded["invept_all"]):
        problems.append("invept (bit 20) and its types (bits 25, 26) disagree: some type goes with the instruction")
    types = ("invvpid_address", "invvpid_single", "invvpid_all", "invvpid_single_non_global")
    if decoded["invvpid"] != any(decoded[name] for name in types):
        problems.append("invvpid (bit 32) and its types (bits 43:40) disagree: some type goes with the instruction")
    return EPT_VPID_CAP.decode(value, tuple(problems)) if problems else decoded


def ept_vpid_cap(**fields: int) -> int:
    """The MSR with these fields (`EPT_VPID_CAP.members` by name); ArgumentError names an unknown one.

    >>> hex(ept_vpid_cap(exec_only=1, walk_4=1, wb=1))
    '0x4041'
    """
    return EPT_VPID_CAP.encode_for("ept_vpid_cap", fields)
