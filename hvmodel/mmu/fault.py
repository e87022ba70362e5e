"""What handling a guest's page fault returns inside KVM, in which order it is asked, and what each answer leads to.

    RET_PF_CONTINUE         go on with the next step; never the last word
    RET_PF_RETRY            let the guest run on: it faults again, or has a #PF to take
    RET_PF_EMULATE          emulate the instruction: no page (MMIO), or one the guest may not write
    RET_PF_WRITE_PROTECTED  a write to a table that is shadowed: emulate it, or unprotect the page and retry
    RET_PF_INVALID          the fast path does not know this fault: the slow one handles it
    RET_PF_FIXED            the entry is there now
    RET_PF_SPURIOUS         the entry was there already: another vCPU was faster

`kvm_mmu_page_fault` asks these steps; the first that does not hand on has the answer:

    handle_mmio_page_fault      RSVD faults only: EMULATE, RETRY; INVALID hands on
      from here on it is pf_taken
    FNAME(walk_addr)            shadow paging only: the guest's tables refuse -> #PF (pf_guest), RETRY
    page_fault_handle_page_track  a write to a table that is shadowed -> WRITE_PROTECTED
    fast_page_fault             direct roots only: FIXED, SPURIOUS (pf_fast); INVALID hands on
    kvm_mmu_faultin_pfn         EMULATE, RETRY; CONTINUE hands on
    is_page_fault_stale         -> RETRY (see `notifier`)
    FNAME(fetch), direct_map, kvm_tdp_mmu_map   EMULATE, RETRY, WRITE_PROTECTED, FIXED, SPURIOUS
    kvm_mmu_write_protect_fault WRITE_PROTECTED becomes EMULATE or RETRY
      now the answer is counted: pf_fixed, pf_emulate, pf_spurious, or nothing for RETRY
    x86_emulate_instruction     after EMULATE

A step may also fail with an errno, with which KVM_RUN ends; that is no answer.  Pages that came by an asynchronous #PF
are `pf_fixed` too, without `pf_taken`.

The error code that says what faulted has PFERR_*: the processor's bits, and above those KVM's own.

By version: RET_PF_WRITE_PROTECTED came with 6.12, and moved those behind it up by one; RET_PF_CONTINUE came with 5.19.

Source: linux:arch/x86/kvm/mmu/mmu_internal.h (enum RET_PF_*, kvm_mmu_do_page_fault), arch/x86/kvm/mmu/mmu.c
(kvm_mmu_page_fault, direct_page_fault, kvm_tdp_mmu_page_fault, fast_page_fault, kvm_mmu_faultin_pfn,
kvm_mmu_write_protect_fault), arch/x86/kvm/mmu/paging_tmpl.h (FNAME(page_fault)), arch/x86/include/asm/kvm_host.h
(PFERR_*) @v6.18; Intel SDM volume 3, 5.7 (error code).
"""

from __future__ import annotations

from ..arch.number import ALL, number
from ..errors import ArgumentError
from ..value import Value
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
    "PageFaultAnswer",
    "decode_pfec",
    "fault_stats",
    "kvm_mmu_page_fault",
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
_CONTINUE_SINCE, _WRITE_PROTECTED_SINCE = (5, 19), (6, 12)

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
"""The bits of a page fault's error code as KVM has them; bits 32 and up are no processor's #PF."""


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
    """The answers of a kernel by name: enum RET_PF_*.  ArgumentError: no version, or one before 5.19.

    >>> ret_pf_codes("6.6")["RET_PF_FIXED"], ret_pf_codes("6.18")["RET_PF_FIXED"]
    (4, 5)
    """
    known = _version("ret_pf_codes", version)
    if known < _CONTINUE_SINCE:
        raise ArgumentError("ret_pf_codes", "version", version, "5.19 or later", "the answers were others before")
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


def fault_stats(answer: int, *, write_protected: int = RET_PF_EMULATE, fast: bool = False) -> dict[str, int]:
    """What a fault that is answered so (a code of 6.12 and later) adds to the vCPU's statistics.

    `write_protected`: what became of RET_PF_WRITE_PROTECTED, RET_PF_EMULATE or RET_PF_RETRY.  `fast`: the answer is
    that of fast_page_fault, RET_PF_FIXED or RET_PF_SPURIOUS.  A fault by a reserved bit that handle_mmio_page_fault
    answers adds nothing: see `kvm_mmu_page_fault`.

    ArgumentError: RET_PF_CONTINUE or RET_PF_INVALID, which no fault ends with; another code; one that is not fast.

    >>> fault_stats(RET_PF_FIXED), fault_stats(RET_PF_RETRY)
    ({'pf_taken': 1, 'pf_fixed': 1}, {'pf_taken': 1})
    """
    answer = number("fault_stats", "answer", answer, RET_PF_SPURIOUS)
    if answer in (RET_PF_CONTINUE, RET_PF_INVALID):
        raise ArgumentError("fault_stats", "answer", answer, "a last answer", f"{_NAMES[answer]} is none")
    if fast and answer not in _FAST:
        raise ArgumentError("fault_stats", "answer", answer, _names(_FAST), "fast_page_fault gives no other")
    if answer == RET_PF_WRITE_PROTECTED:
        if write_protected not in (RET_PF_EMULATE, RET_PF_RETRY):
            raise ArgumentError("fault_stats", "write_protected", write_protected, "RET_PF_EMULATE, RET_PF_RETRY")
        answer = write_protected
    stat = _STATS.get(answer)
    return {"pf_taken": 1} | ({"pf_fast": 1} if fast else {}) | ({stat: 1} if stat else {})


# ------------------------------------------------------------------------------------------------- the order of steps

# What each step may answer, but errnos.
_FAST = (RET_PF_FIXED, RET_PF_SPURIOUS)
_MMIO = (RET_PF_EMULATE, RET_PF_RETRY, RET_PF_INVALID)
_FAULTIN = (RET_PF_CONTINUE, RET_PF_RETRY, RET_PF_EMULATE)
_MAPPED = (RET_PF_RETRY, RET_PF_EMULATE, RET_PF_WRITE_PROTECTED, RET_PF_FIXED, RET_PF_SPURIOUS)
_UNPROTECTED = (RET_PF_EMULATE, RET_PF_RETRY)


class PageFaultAnswer(Value):
    """How a fault ended: the last answer, the statistics that went up by one, the steps that were asked, in order.

    Steps are the kernel's functions, but `walk_addr` (FNAME), `page_track` (page_fault_handle_page_track), and `map`
    (FNAME(fetch), direct_map or kvm_tdp_mmu_map).
    """

    answer: int
    stats: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


def _names(answers: tuple[int, ...]) -> str:
    return ", ".join([_NAMES[answer] for answer in answers])


def kvm_mmu_page_fault(
    *,
    direct: bool = False,
    mmio: int | None = None,
    walks: bool = True,
    tracked: bool = False,
    fast: int = RET_PF_INVALID,
    faultin: int = RET_PF_CONTINUE,
    stale: bool = False,
    mapped: int = RET_PF_FIXED,
    write_protected: int = RET_PF_EMULATE,
) -> PageFaultAnswer:
    """How a fault ends whose steps answer so (kvm_mmu_page_fault and what it calls; codes of 6.12 and later).

    `direct`: the root is direct (EPT, NPT, no paging).  `mmio`: what handle_mmio_page_fault says of a fault by a
    reserved bit, None for another fault.  `walks`: the guest's tables allow the access; always so where `direct`.
    `tracked`: it is a write to a shadowed table.  `fast`, `faultin`, `mapped`, `write_protected`: the answers of
    fast_page_fault, kvm_mmu_faultin_pfn, the step that maps the page, kvm_mmu_write_protect_fault.  `stale`: see
    `is_page_fault_stale`.

    ArgumentError: an answer that its step does not give; `fast` or `walks` of a root that has no such step.

    >>> kvm_mmu_page_fault(direct=True, fast=RET_PF_FIXED)
    PageFaultAnswer(answer=5, stats=('pf_taken', 'pf_fast', 'pf_fixed'), steps=('page_track', 'fast_page_fault'))
    >>> kvm_mmu_page_fault(walks=False).stats
    ('pf_taken', 'pf_guest')
    >>> kvm_mmu_page_fault(mmio=RET_PF_EMULATE).stats
    ()
    """
    call = "kvm_mmu_page_fault"
    asked = (
        ("mmio", RET_PF_INVALID if mmio is None else mmio, _MMIO),
        ("fast", fast, (RET_PF_INVALID, *_FAST)),
        ("faultin", faultin, _FAULTIN),
        ("mapped", mapped, _MAPPED),
        ("write_protected", write_protected, _UNPROTECTED),
    )
    for field, answer, answers in asked:
        if number(call, field, answer, RET_PF_SPURIOUS) not in answers:
            raise ArgumentError(call, field, answer, _names(answers), "this step gives no other answer")
    if direct and not walks:
        raise ArgumentError(call, "walks", walks, "True", "a direct root has no guest tables to walk")
    if not direct and fast != RET_PF_INVALID:
        raise ArgumentError(call, "fast", fast, "RET_PF_INVALID", "only a fault of a direct root may be fast")
    steps: list[str] = []
    if mmio is not None:
        steps.append("handle_mmio_page_fault")
        if mmio != RET_PF_INVALID:
            # Neither taken nor counted.
            return _ended(mmio, [], steps)
    if not direct:
        steps.append("walk_addr")
        if not walks:
            return PageFaultAnswer(RET_PF_RETRY, ("pf_taken", "pf_guest"), tuple(steps))
    steps.append("page_track")
    if tracked:
        answer = RET_PF_WRITE_PROTECTED
    else:
        if direct:
            steps.append("fast_page_fault")
            if fast != RET_PF_INVALID:
                return _ended(fast, list(fault_stats(fast, fast=True)), steps)
        steps.append("kvm_mmu_faultin_pfn")
        answer = faultin
        if answer == RET_PF_CONTINUE:
            steps.append("is_page_fault_stale")
            answer = RET_PF_RETRY
            if not stale:
                steps.append("map")
                answer = mapped
    if answer == RET_PF_WRITE_PROTECTED:
        steps.append("kvm_mmu_write_protect_fault")
        answer = write_protected
    return _ended(answer, list(fault_stats(answer)), steps)


def _ended(answer: int, stats: list[str], steps: list[str]) -> PageFaultAnswer:
    if answer == RET_PF_EMULATE:
        steps.append("x86_emulate_instruction")
    return PageFaultAnswer(answer, tuple(stats), tuple(steps))
