"""What handling a guest's page fault returns inside KVM, and what each answer leads to.

    RET_PF_CONTINUE         go on with the next step; never the last word
    RET_PF_RETRY            let the guest run on: it faults again, or has a #PF to take
    RET_PF_EMULATE          emulate the instruction: no page (MMIO), or one the guest may not write
    RET_PF_WRITE_PROTECTED  a write to a table that is shadowed: emulate it, or unprotect the page and retry
    RET_PF_INVALID          the fast path does not know this fault: the slow one handles it
    RET_PF_FIXED            the entry is there now
    RET_PF_SPURIOUS         the entry was there already: another vCPU was faster

and the error code that says what faulted, PFERR_*: the processor's bits, and above those KVM's own.

A vCPU's statistics count them: every fault that reaches the slow path is `pf_taken`, and then by the answer `pf_fixed`,
`pf_emulate`, `pf_spurious` or nothing; a #PF that goes to the guest is `pf_guest`; what the fast path mends is
`pf_fast`.

By version: RET_PF_WRITE_PROTECTED came with 6.12, and moved those behind it up by one; RET_PF_CONTINUE came with 5.18.

Source: linux:arch/x86/kvm/mmu/mmu_internal.h (enum RET_PF_*), arch/x86/kvm/mmu/mmu.c (kvm_mmu_page_fault,
kvm_mmu_write_protect_fault), arch/x86/include/asm/kvm_host.h (PFERR_*) @v6.18; Intel SDM volume 3, 5.7 (error code).
"""

from __future__ import annotations

from ..arch.number import ALL, number
from ..errors import ArgumentError
from .bits import BitLayout, Field
from .role import _version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .bits import Decoded

__all__ = [
    "PFERR",
    "RET_PF_CONTINUE",
    "RET_PF_EMULATE",
    "RET_PF_FIXED",
    "RET_PF_INVALID",
    "RET_PF_RETRY",
    "RET_PF_SPURIOUS",
    "RET_PF_WRITE_PROTECTED",
    "decode_pfec",
    "fault_stats",
    "pferr",
    "ret_pf_codes",
    "ret_pf_name",
]

# The answers of Linux 6.12 and later.
(
    RET_PF_CONTINUE,
    RET_PF_RETRY,
    RET_PF_EMULATE,
    RET_PF_WRITE_PROTECTED,
    RET_PF_INVALID,
    RET_PF_FIXED,
    RET_PF_SPURIOUS,
) = range(7)

_NAMES = (
    "RET_PF_CONTINUE",
    "RET_PF_RETRY",
    "RET_PF_EMULATE",
    "RET_PF_WRITE_PROTECTED",
    "RET_PF_INVALID",
    "RET_PF_FIXED",
    "RET_PF_SPURIOUS",
)
_CONTINUE_SINCE, _WRITE_PROTECTED_SINCE = (5, 18), (6, 12)

# answer -> the statistic that it adds to, besides pf_taken
_STATS = {RET_PF_FIXED: "pf_fixed", RET_PF_EMULATE: "pf_emulate", RET_PF_SPURIOUS: "pf_spurious"}

PFERR = BitLayout(
    "page fault error code",
    64,
    (
        Field("P", 0, text="a right was missing", clear="no page was there"),
        Field("W", 1, text="write", clear="read"),
        Field("U", 2, text="by the user", clear="by the supervisor"),
        Field("RSVD", 3, text="a reserved bit was set"),
        Field("F", 4, text="instruction fetch"),
        Field("PK", 5, text="a protection key forbade it"),
        Field("SS", 6, text="shadow stack access"),
        Field("SGX", 15, text="by SGX's rules"),
        Field("GUEST_RMP", 31, text="by the RMP (SEV-SNP)"),
        Field("GUEST_FINAL", 32, text="nested: at the final address"),
        Field("GUEST_PAGE", 33, text="nested: while walking the guest's tables"),
        Field("GUEST_ENC", 34, text="the guest's address is encrypted"),
        Field("GUEST_SIZEM", 35, text="a page of another size than the RMP's"),
        Field("GUEST_VMPL", 36, text="by the VMPL's rights"),
        Field("IMPLICIT", 48, text="implicit supervisor access; KVM's own bit"),
        Field("PRIVATE", 49, text="to private memory; KVM's own bit"),
    ),
)
"""The bits of a page fault's error code as KVM has them; bits 31 and up are no processor's #PF."""


def pferr(*names: str) -> int:
    """The error code with these bits, by the names in `PFERR`.  ArgumentError: an unknown name.

    >>> hex(pferr("P", "W", "U"))
    '0x7'
    """
    return PFERR.encode(**dict.fromkeys(names, 1))


def decode_pfec(code: int) -> Decoded:
    """A page fault's error code by its bits, with what in it no fault has.  ArgumentError: more than 64 bits.

    >>> print(decode_pfec(0x7))
    page fault error code 0x0000000000000007: U W P
    """
    code = number("decode_pfec", "code", code, ALL)
    problems = []
    if code >> 3 & 1 and not code & 1:
        problems.append("RSVD without P: a processor sets both (QEMU's TCG does not)")
    if code >> 5 & 1 and not code & 1:
        problems.append("PK without P: a key forbids only what is there")
    if code >> 5 & 1 and code >> 4 & 1:
        problems.append("PK with F: keys do not apply to fetches")
    if code >> 1 & 1 and code >> 4 & 1:
        problems.append("W with F: a fetch does not write")
    if code >> 32 & 1 and code >> 33 & 1:
        problems.append("GUEST_FINAL with GUEST_PAGE: a nested fault is one of the two")
    return PFERR.decode(code, tuple(problems))


def ret_pf_codes(version: str = "6.18") -> dict[str, int]:
    """The answers of a kernel by name: enum RET_PF_*.  ArgumentError: no version, or one before 5.18.

    >>> ret_pf_codes("6.6")["RET_PF_FIXED"], ret_pf_codes("6.18")["RET_PF_FIXED"]
    (4, 5)
    """
    known = _version("ret_pf_codes", version)
    if known < _CONTINUE_SINCE:
        raise ArgumentError("ret_pf_codes", "version", version, "5.18 or later", "the answers were others before")
    names = [name for name in _NAMES if name != "RET_PF_WRITE_PROTECTED" or known >= _WRITE_PROTECTED_SINCE]
    return {name: code for code, name in enumerate(names)}


def ret_pf_name(code: int, version: str = "6.18") -> str:
    """The name of an answer.  ArgumentError: a code that this kernel does not have.

    >>> ret_pf_name(5)
    'RET_PF_FIXED'
    """
    codes = ret_pf_codes(version)
    code = number("ret_pf_name", "code", code, len(codes) - 1)
    return list(codes)[code]


def fault_stats(answer: int, *, write_protected: int = RET_PF_EMULATE) -> dict[str, int]:
    """What a fault that the slow path answers so (a code of 6.12 and later) adds to the vCPU's statistics.

    `write_protected`: what became of RET_PF_WRITE_PROTECTED, RET_PF_EMULATE or RET_PF_RETRY.

    ArgumentError: RET_PF_CONTINUE or RET_PF_INVALID, which the slow path does not return; another code.

    >>> fault_stats(RET_PF_FIXED), fault_stats(RET_PF_RETRY)
    ({'pf_taken': 1, 'pf_fixed': 1}, {'pf_taken': 1})
    """
    answer = number("fault_stats", "answer", answer, RET_PF_SPURIOUS)
    if answer in (RET_PF_CONTINUE, RET_PF_INVALID):
        raise ArgumentError("fault_stats", "answer", answer, "an answer of the slow path", f"{_NAMES[answer]} is none")
    if answer == RET_PF_WRITE_PROTECTED:
        if write_protected not in (RET_PF_EMULATE, RET_PF_RETRY):
            raise ArgumentError("fault_stats", "write_protected", write_protected, "RET_PF_EMULATE, RET_PF_RETRY")
        answer = write_protected
    stat = _STATS.get(answer)
    return {"pf_taken": 1} | ({stat: 1} if stat else {})
