"""The checks of hvmodel.mmu.masks: what the running kernel shows of the masks that `host_masks` works out.

Three things show something of them:

    BTF         the parameters of the functions that set the masks up and make SPTEs, and fields that go with them: they
                tell which kernel's rules are the right ones
    parameters  of the modules: whether EPT, NPT, A/D bits and MMIO caching are in use
    SPTEs       of a guest of ours, by the trace event kvm_mmu_set_spte: every bit but the address; and, by how the
                entries of two accesses differ that differ in one respect, single masks

    gpa 16 MiB  4 MiB of 4 KiB pages      32 MiB  the same, under dirty logging
        24 MiB  the same, read-only       48 MiB  of huge pages, where the host has some
"""

from __future__ import annotations

from itertools import count

from ..mmu.masks import kernel_version
from ..mmu.permission import ACC_ALL, ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK
from ..mmu.spte import (
    SPTE_BASE_ADDR_MASK,
    SPTE_MMU_PRESENT_MASK,
    make_mmio_spte,
    make_spte,
    spte_kind,
)
from ..units import MiB
from ..value import Value
from .hostmasks import host_masks
from .registry import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..mmu.masks import ShadowMasks
    from .btf import Btf
    from .hostmasks import HostMasks
    from .lab import MmuLab
    from .result import Tally

__all__ = ["FUNCTIONS", "check_masks", "check_masks_rules"]

# function -> its parameters, and the kernels that have it so: from, before ((0, 0): none)
_Rows = tuple[tuple[str, tuple[str, ...], tuple[int, int], tuple[int, int]], ...]
_OLD, _NEVER = (0, 0), (99, 0)
_MAKE_SPTE = ("vcpu", "sp", "slot", "pte_access", "gfn", "pfn", "old_spte", "prefetch")

FUNCTIONS: _Rows = (
    ("kvm_mmu_reset_all_pte_masks", (), _OLD, _NEVER),
    ("kvm_mmu_set_ept_masks", ("has_ad_bits", "has_exec_only"), _OLD, _NEVER),
    ("kvm_mmu_set_mmio_spte_mask", ("mmio_value", "mmio_mask", "access_mask"), _OLD, _NEVER),
    ("kvm_mmu_set_me_spte_mask", ("me_value", "me_mask"), _OLD, _NEVER),
    ("kvm_mmu_set_mmio_spte_value", ("kvm", "mmio_value"), (6, 16), _NEVER),
    ("make_spte", (*_MAKE_SPTE, "can_unsync", "host_writable", "new_spte"), _OLD, (6, 13)),
    ("make_spte", (*_MAKE_SPTE, "synchronizing", "host_writable", "new_spte"), (6, 13), _NEVER),
    ("make_nonleaf_spte", ("child_pt", "ad_disabled"), _OLD, _NEVER),
    ("make_mmio_spte", ("vcpu", "gfn", "access"), _OLD, _NEVER),
    ("make_small_spte", ("kvm", "huge_spte", "role", "index"), (6, 13), _NEVER),
    ("make_huge_spte", ("kvm", "small_spte", "level"), (6, 13), _NEVER),
    ("mark_spte_for_access_track", ("spte",), _OLD, _NEVER),
)
"""(function, its parameters, first kernel that has it so, first one that has not any more)."""

_FIELDS = (
    ("kvm_host_values", "maxphyaddr", "u8", (6, 11)),
    ("kvm_arch", "shadow_mmio_value", "u64", (6, 10)),
)  # struct, field, its type, first kernel that has it

_RW, _READONLY, _LOGGED, _HUGE = 16 * MiB, 24 * MiB, 32 * MiB, 48 * MiB
_SIZE = 4 * MiB
_ROUNDS = 100  # the pages of a slot last for these
_PTE_P, _PTE_W, _PTE_U, _PTE_A, _PTE_D, _PTE_NX = 1, 2, 4, 0x20, 0x40, 1 << 63
_BASE, _STEP = 1 << 30, 0x8000  # linear addresses: the first, and to the next, so that none is prefetched with another
_LARGE_AT = 2 << 30
_IPAT = 1 << 6
_NOWHERE = 1 << 30  # a gpa that is in no slot


class _Role(Value):
    # What of a page's role an SPTE depends on.
    level: int
    access: int = ACC_ALL
    ad_disabled: int = 0
    guest_mode: int = 0


class _Case(Value):
    # An access and what KVM should make of it: `pte` are the guest's bits, `access` what shadow paging then permits.
    name: str
    gpa: int
    pte: int
    kind: str
    access: int
    level: int = 1
    host_writable: bool = True


def _cases(round_: int) -> list[_Case]:
    # The accesses of one round, each to a page of its own.
    page = 0x1000 * (8 * round_ + 0x10)
    rw, ro = _PTE_P | _PTE_W | _PTE_U, _PTE_P | _PTE_U
    dirty, clean = ACC_ALL, ACC_EXEC_MASK | ACC_USER_MASK
    no_exec = ACC_WRITE_MASK | ACC_USER_MASK
    return [
        _Case("load", _RW + page, rw, "load", clean),
        _Case("store", _RW + page + 0x1000, rw, "store", dirty),
        _Case("load of a dirty page", _RW + page + 0x2000, rw | _PTE_A | _PTE_D, "load", dirty),
        _Case("load of a page without W", _RW + page + 0x3000, ro, "load", clean),
        _Case("load, NX", _RW + page + 0x4000, rw | _PTE_NX, "load", ACC_USER_MASK),
        _Case("store, NX", _RW + page + 0x5000, rw | _PTE_NX, "store", no_exec),
        _Case("fetch", _RW + page + 0x6000, rw, "fetch", clean),
        _Case("load, read-only slot", _READONLY + page, rw | _PTE_A | _PTE_D, "load", dirty, host_writable=False),
        _Case("load, dirty log", _LOGGED + page, rw, "load", clean),
        _Case("store, dirty log", _LOGGED + page + 0x1000, rw, "store", dirty),
    ]


@check("SPTE masks of this host", "traced SPTEs", cases=20, slow=100)
def check_masks(tally: Tally, cases: int) -> None:
    """SPTEs of `cases` rounds of accesses, by every bit but the address; pairs of them that differ in one respect."""
    from .lab import LabSlot, MmuLab

    found = host_masks()
    slots = [
        LabSlot(_RW, _SIZE),
        LabSlot(_READONLY, _SIZE, flags=2),
        LabSlot(_LOGGED, _SIZE, flags=1),
        LabSlot(_HUGE, _SIZE, huge=True),
    ]
    with MmuLab(slots) as lab:
        seen: dict[str, int] = {}
        places = count(_BASE, _STEP)
        for round_ in range(min(cases, _ROUNDS)):
            for case in _cases(round_):
                _compare_one(tally, lab, found.masks, case, next(places), seen)
        _compare_large(tally, lab, found, seen)
        _compare_differences(tally, found.masks, seen)
        _compare_mmio(tally, lab, found.masks, next(places))
        if found.masks.kind != "shadow":
            _compare_nonpresent(tally, lab, found.masks, next(places))
    tally.lack(*found.notes, *_manual_only(found))


@check("SPTE masks: which rules", "BTF and parameters of the modules")
def check_masks_rules(tally: Tally, _cases: int) -> None:
    """The functions of `FUNCTIONS` and two fields are in the kernel as its version says; the parameters read as the
    masks make them.
    """
    from .btf import Btf

    btf = Btf.for_module("kvm")
    found = host_masks()
    _compare_btf(tally, btf, found.masks)
    _compare_parameters(tally, found)


def _manual_only(found: HostMasks) -> list[str]:
    # What this host's KVM can't show, whatever is tried: checked against tables only.
    masks = found.masks
    kinds = {"shadow": "shadow paging", "npt": "NPT", "ept": "EPT"}
    seen = (masks.kind, "shadow") if masks.kind == "npt" else (masks.kind,)  # NPT has the masks of shadow paging
    texts = [f"manual only: masks of {text}" for kind, text in kinds.items() if kind not in seen]
    if not masks.enable_mmio_caching:
        texts.append("manual only: MMIO SPTEs, for kvm.mmio_caching reads N")
    if not masks.me_mask:
        texts.append("manual only: me_value and me_mask, for memory is not encrypted")
    if not masks.nonpresent_or_rsvd_mask:
        texts.append("manual only: nonpresent_or_rsvd_mask, for the processor has not L1TF")
    unseen = "nonpresent_value, " if masks.kind == "shadow" else ""
    texts.append(f"manual only: {unseen}acc_track_mask and the warnings of refused masks, which no event shows")
    return texts


def _compare_btf(tally: Tally, btf: Btf, masks: ShadowMasks) -> None:
    from .btf import BtfLookupError

    version = kernel_version(masks.version)
    for name, parameters, first, last in FUNCTIONS:
        if first <= version < last:
            shown = _parameters(btf, name)
            if shown is None:
                tally.lack(f"BTF has no function {name}: inlined everywhere")
            else:
                tally.compare(f"parameters of {name}", parameters, shown)
        elif version < first and name not in [other for other, _, _, end in FUNCTIONS if version < end <= first]:
            tally.compare(f"{name} before {first[0]}.{first[1]}", None, _parameters(btf, name))
    for struct, field, kind, first in _FIELDS:
        try:
            fields = btf.struct(struct).fields
        except BtfLookupError:
            fields = {}
        wanted = kind if version >= first else None
        tally.compare(f"{struct}.{field}", wanted, fields[field].type if field in fields else None)


def _parameters(btf: Btf, name: str) -> tuple[str, ...] | None:
    from .btf import BtfLookupError

    try:
        return tuple(btf.function(name))
    except BtfLookupError:
        return None


def _compare_parameters(tally: Tally, found: HostMasks) -> None:
    masks, facts = found.masks, found.facts
    caching = facts.parameter("kvm.mmio_caching")
    if caching is not None:
        tally.compare("kvm.mmio_caching", "Y" if masks.enable_mmio_caching else "N", caching)
    tdp = facts.parameter("kvm.tdp_mmu")
    if tdp is not None and masks.kind == "shadow":
        tally.compare("kvm.tdp_mmu without EPT and NPT", "N", tdp)
    if masks.kind == "ept" and facts.ept_vpid_cap is not None:
        # The parameter is on only where the processor has A/D bits.
        has_ad = bool(facts.ept_vpid_cap >> 21 & 1)
        tally.compare("kvm_intel.eptad without A/D bits in the processor", False, masks.kvm_ad_enabled and not has_ad)


# -- SPTEs --------------------------------------------------------------------------------------------------------


def _own(lab: MmuLab, gva: int, case: _Case) -> list[tuple[int, int]]:
    # (SPTE, level) of what the access set for its own frame.
    from .lab import Access

    lab.map(gva, case.gpa, case.pte, level=case.level)
    [outcome] = lab.run([Access(gva, case.kind)])
    frame = case.gpa >> 12
    found = [s for s in outcome.sptes if s.gfn == frame or (s.level > 1 and s.gfn == frame & ~0x1FF)]
    return [(s.spte, s.level) for s in found]


def _predicted(masks: ShadowMasks, case: _Case, level: int, nx_huge_page: bool = False) -> int:
    # Under EPT and NPT the guest's tables say nothing: every right is given.
    access = case.access if masks.kind == "shadow" else ACC_ALL
    role = _Role(level, ACC_ALL, int(masks.kind == "ept" and not masks.kvm_ad_enabled))
    spte, _ = make_spte(masks, role, access, 0, 0, host_writable=case.host_writable, nx_huge_page=nx_huge_page)
    return spte & ~SPTE_BASE_ADDR_MASK


def _compare_one(tally: Tally, lab: MmuLab, masks: ShadowMasks, case: _Case, gva: int, seen: dict[str, int]) -> None:
    found = _own(lab, gva, case)
    # IPAT depends on devices and quirks of the VM.
    ignored = _IPAT if masks.kind == "ept" else 0
    if not found:
        tally.compare(case.name, "an SPTE", "no SPTE was set")
        return
    spte, level = found[-1]
    bits = spte & ~SPTE_BASE_ADDR_MASK
    tally.compare(case.name, hex(_predicted(masks, case, level) & ~ignored), hex(bits & ~ignored))
    if masks.me_mask:
        tally.compare(f"{case.name}: encryption", hex(masks.me_value), hex(spte & masks.me_mask))
    seen.setdefault(case.name, bits)


def _compare_large(tally: Tally, lab: MmuLab, host: HostMasks, seen: dict[str, int]) -> None:
    # A large page of the host and the guest; and one of the guest alone, of which the neighbours are prefetched.
    from .lab import Access

    masks, rw, clean = host.masks, _PTE_P | _PTE_W | _PTE_U, ACC_EXEC_MASK | ACC_USER_MASK
    large = _Case("load, 2 MiB", _HUGE, rw, "load", clean, 2)
    found = _own(lab, _LARGE_AT, large)
    if found and found[-1][1] == 2:
        ignored = _IPAT if masks.kind == "ept" else 0
        mitigated = host.facts.parameter("kvm.nx_huge_pages") == "Y"
        bits = found[-1][0] & ~SPTE_BASE_ADDR_MASK
        tally.compare(large.name, hex(_predicted(masks, large, 2, mitigated) & ~ignored), hex(bits & ~ignored))
        seen[large.name] = bits
    else:
        tally.lack("SPTEs of large pages: the host has no huge page free, or KVM maps none")
    if masks.kind != "shadow":
        return
    lab.map(_LARGE_AT + 2 * MiB, _LOGGED, rw, level=2)
    [outcome] = lab.run([Access(_LARGE_AT + 2 * MiB, "load")])
    for event in outcome.sptes:
        prefetch = event.gfn != _LOGGED >> 12
        spte, _ = make_spte(masks, _Role(1), clean, 0, 0, prefetch=prefetch)
        name = "prefetched" if prefetch else "load of a small part of a large page"
        bits = event.spte & ~SPTE_BASE_ADDR_MASK
        tally.compare(name, hex(spte), hex(bits))
        seen.setdefault(name, bits)


def _compare_differences(tally: Tally, masks: ShadowMasks, seen: dict[str, int]) -> None:
    # Two accesses that differ in one respect: the masks that this respect goes by.
    written = _PTE_W | masks.dirty_mask | masks.mmu_writable_mask
    pairs = [("read-only slot", "load of a dirty page", "load, read-only slot", written | masks.host_writable_mask)]
    if masks.kind == "shadow":
        pairs += [
            ("not accessed", "load of a small part of a large page", "prefetched", masks.accessed_mask),
            ("NX", "load", "load, NX", masks.nx_mask | masks.x_mask),
            ("dirty", "load", "load of a dirty page", written),
            ("host-writable", "load", "load, read-only slot", masks.host_writable_mask),
            ("large", "load", "load, 2 MiB", 1 << 7),
        ]
    for name, one, other, mask in pairs:
        if one in seen and other in seen:
            tally.compare(f"bits that tell: {name}", hex(mask), hex(seen[one] ^ seen[other]))
    if masks.kind == "shadow" and seen:
        every = -1
        for spte in seen.values():
            every &= spte
        always = masks.present_mask | masks.user_mask | SPTE_MMU_PRESENT_MASK
        tally.compare("bits of all of them", hex(always), hex(every))


def _compare_mmio(tally: Tally, lab: MmuLab, masks: ShadowMasks, gva: int) -> None:
    # Two loads from where there is no memory: the first makes an MMIO SPTE, the second hits it; or neither.
    from .kvm_trace import CheckMmioSpte, MarkMmioSpte
    from .lab import Access

    lab.map(gva, _NOWHERE, _PTE_P | _PTE_W | _PTE_U | _PTE_A | _PTE_D)
    outcomes = lab.run([Access(gva, "load"), Access(gva, "load")])
    for at, outcome in enumerate(outcomes):
        tally.compare(f"exits for memory that is not there, load {at}", [(_NOWHERE, 8, False)], [*outcome.mmio])
    marks = [mark for outcome in outcomes for mark in outcome.events(MarkMmioSpte)]
    tally.compare("an MMIO SPTE is made", masks.enable_mmio_caching, bool(marks))
    hits = [hit for outcome in outcomes for hit in outcome.events(CheckMmioSpte) if hit.spte is not None]
    for hit in hits:
        gen, access = hit.spte_gen, marks[0].access if marks else ACC_ALL
        tally.compare("the MMIO SPTE", hex(make_mmio_spte(masks, gen, _NOWHERE >> 12, access)), hex(hit.spte or 0))


def _compare_nonpresent(tally: Tally, lab: MmuLab, masks: ShadowMasks, gva: int) -> None:
    # What the TDP MMU finds where nothing was mapped yet.
    from .kvm_trace import TdpMmuSpteChanged
    from .lab import Access

    lab.map(gva, _RW + _SIZE - 0x1000, _PTE_P | _PTE_W | _PTE_U)
    [outcome] = lab.run([Access(gva, "store")])
    for event in outcome.events(TdpMmuSpteChanged):
        if spte_kind(masks, event.old_spte, event.level) in ("none", "unknown"):
            tally.compare("an SPTE that maps nothing", hex(masks.nonpresent_value), hex(event.old_spte))
