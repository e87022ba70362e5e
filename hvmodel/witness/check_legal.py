"""The check of special registers: what our model says of combinations of CR0, CR4, EFER and CS.L, and what KVM does."""

from __future__ import annotations

from itertools import combinations, product

from ..arch.legal import VENDORS, SregsLimits, sregs_answer, sregs_changes
from ..arch.registers import CR0, CR4, EFER
from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..kvm import Vcpu
    from .result import Tally

    Base = tuple[int, int, int, int]

__all__ = ["check_legal", "cr4_sets"]

_NAMED, _ALL = 1, 2  # "cases" of a run: with pairs of the bits of CR4 that have a name, or with pairs of all
_CR0 = [int(CR0.PE), int(CR0.PG), int(CR0.WP), int(CR0.NW), int(CR0.CD)]
_EFER = [int(EFER.LME), int(EFER.LMA), int(EFER.NXE)]
_PAE = int(CR4.PAE)
_CR3 = 0x1000

_REFUSED = "refused"


def cr4_sets(*, all_pairs: bool) -> list[int]:
    """No, every single and every pair of the bits of CR4 but PAE: pairs of all 63, or of those that have a name.

    >>> len(cr4_sets(all_pairs=True)), 1 + 63 + 63 * 62 // 2
    (2017, 2017)
    """
    every = [1 << bit for bit in range(64) if 1 << bit != _PAE]
    paired = every if all_pairs else [int(bit) for bit in CR4 if int(bit) != _PAE]
    return [0, *every, *[one | other for one, other in combinations(paired, 2)]]


def _subsets(bits: list[int]) -> list[int]:
    # The sums of all subsets.
    return [sum(chosen) for chosen in product(*[(0, bit) for bit in bits])]


def _bases() -> Iterator[Base]:
    # (CR0, PAE of CR4, EFER, CS.L): 32 x 2 x 8 x 2
    yield from product(_subsets(_CR0), (0, _PAE), _subsets(_EFER), (0, 1))


@check("legal CR0, CR4, EFER, CS.L", "KVM_SET_SREGS and KVM_GET_SREGS", cases=_NAMED, slow=_ALL)
def check_legal(tally: Tally, cases: int) -> None:
    """All combinations of CR0.{PE,PG,WP,NW,CD}, CR4.PAE, EFER.{LME,LMA,NXE} and CS.L, each with no, every single and
    every pair of the other bits of CR4: refused, accepted, or accepted and changed, and then to what.

    `cases` 1: pairs of the bits of CR4 that have a name; from 2: of all.
    """
    from ..kvm import Kvm
    from ..state.facts import facts_of

    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.set_cpuid2(kvm.supported_cpuid_table())
        limits = facts_of(vcpu, "sregs", None).limits
        if limits.vendor not in VENDORS:
            known = ", ".join(VENDORS)
            raise Lacking(f"the vendor module {limits.vendor or 'is not visible'}: the model knows those of {known}")
        others = cr4_sets(all_pairs=cases >= _ALL)
        for base in _bases():
            _compare(tally, vcpu, limits, base, others)


def _say(answer: tuple[int, ...] | str, given: tuple[int, ...]) -> str:
    # An answer in words: that of KVM, or ours.
    if isinstance(answer, str):
        return answer
    if answer == given:
        return "accepted"
    return "changed to " + ", ".join(
        f"{name} {now:#x}"
        for name, was, now in zip(("CR0", "CR4", "EFER", "CS.L"), given, answer, strict=True)
        if was != now
    )


def _predict(model: dict[str, int], limits: SregsLimits) -> tuple[int, ...] | str:
    # What KVM should keep, or that it should refuse.
    answer = sregs_answer(model, limits)
    if answer == _REFUSED:
        return _REFUSED
    kept = model
    if answer != "accepted":
        kept = model | {change.field: change.became for change in sregs_changes(model, limits)}
    return kept["cr0"], kept["cr4"], kept["efer"], kept["cs.l"]


def _compare(tally: Tally, vcpu: Vcpu, limits: SregsLimits, base: Base, others: list[int]) -> None:
    # One of the 1024 combinations, with each of the other bits of CR4; by the ioctls themselves, for there are many.
    from .._ffi import ffi, lib

    given, kept = ffi.new("struct kvm_sregs *"), ffi.new("struct kvm_sregs *")
    given[0] = vcpu.sregs[0]
    cr0, pae, efer, l_bit = base
    given.cr0, given.cr3, given.efer, given.cs.l = cr0, _CR3, efer, l_bit
    model = {"cr0": cr0, "cr3": _CR3, "efer": efer, "cs.l": l_bit, "apic_base": given.apic_base}
    fd, set_sregs, get_sregs = vcpu.fd, lib.kvm_set_sregs, lib.kvm_get_sregs
    differ = []
    for other in others:
        given.cr4 = model["cr4"] = cr4 = pae | other
        ours = _predict(model, limits)
        theirs: tuple[int, ...] | str = _REFUSED
        if set_sregs(fd, given) >= 0:
            get_sregs(fd, kept)
            theirs = (kept.cr0, kept.cr4, kept.efer, kept.cs.l)
        if ours != theirs:
            asked = (cr0, cr4, efer, l_bit)
            where = f"CR0 {cr0:#x}, CR4 {cr4:#x}, EFER {efer:#x}, CS.L {l_bit}"
            differ.append(f"{where}: {tally.model} says {_say(ours, asked)}, KVM {_say(theirs, asked)}")
    tally.count(len(others), differ)
