"""Checks of the small models of hvmodel.mmu: the kernel's own layouts, the hash of shadow pages, the notifier's ranges,
what faults count, the worker for NX huge pages.

Their witnesses are BTF and the formats of trace events (`mmu_types`), a VM's statistics (`page_hash`), a vCPU's
statistics (`fault_stats`), the pages that fault again after madvise (`notifier`), and /proc/self/task with the
parameters of module kvm, which are only read (`nx_recovery`).

What no interface of the kernel shows: mmu_invalidate_seq and mmu_invalidate_in_progress, and so the retry of one fault;
the order in which the TDP MMU visits entries; the lists of NX huge pages.  Setters of parameters are not tried, for
they hold for all VMs of the host.  These are held against the source, by hand.
"""

from __future__ import annotations

import os
import random
import re
import time

from ..errors import HostError
from ..mmu import fault, levels
from ..mmu.bits import BitLayout
from ..mmu.notifier import MmuInvalidate, Slot
from ..mmu.nx_recovery import COMM, KVM_NR_MMU_TYPES, KVM_SHADOW_MMU, KVM_TDP_MMU, NxParameters
from ..mmu.page_hash import KVM_NUM_MMU_PAGES, PageHash, kvm_page_table_hashfn
from ..mmu.role import CPU_ROLE, EXTENDED_ROLE, PAGE_ROLE, PageRole, decode_role
from ..mmu.tdp_iter import TdpIter
from ..value import Value
from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .btf import Btf
    from .lab import Access, MmuLab
    from .result import Tally
    from .stats import Stats

__all__ = ["check_fault_stats", "check_mmu_types", "check_notifier", "check_nx_recovery", "check_page_hash"]

_PARAMETERS = "/sys/module/kvm/parameters"
_RECOVERY = ("nx_huge_pages_recovery_ratio", "nx_huge_pages_recovery_period_ms")
_PAGE = 4096

# ------------------------------------------------------------------------------------------------- layouts

# Plain C types that our models have as numbers: struct -> field -> its type in words.
_FIELDS: dict[str, dict[str, str]] = {
    "rsvd_bits_validate": {"rsvd_bits_mask": "u64[10]", "bad_mt_xwr": "u64"},
    "kvm_mmu": {"permissions": "u8[16]", "pkru_mask": "u32"},
    "kvm_mmu_page": {
        "role": "union kvm_mmu_page_role",
        "gfn": "gfn_t",
        "unsync": "bool",
        "root_count": "int",
        "unsync_children": "unsigned int",
        "nx_huge_page_disallowed": "bool",
        "parent_ptes": "struct kvm_rmap_head",
    },
    "kvm_mmu_root_info": {"pgd": "gpa_t", "hpa": "hpa_t"},
    "kvm_arch": {"shadow_mmio_value": "u64"},
}
# The kernel that the models are of.  An older one may lack what it has: then that is lacking, and no mismatch.
_MODELLED = (6, 18)


def _btf() -> Btf:
    from .btf import Btf

    return Btf.for_module("kvm")


def _unions(btf: Btf) -> Iterator[tuple[str, object, object]]:
    # Every bit-field of the roles, both ways: (what, ours, theirs).
    for layout, name in (
        (PAGE_ROLE, "kvm_mmu_page_role"),
        (EXTENDED_ROLE, "kvm_mmu_extended_role"),
    ):
        theirs = btf.struct(name)
        yield f"sizeof(union {name})", layout.width, 8 * theirs.size
        found = {path: (f.bit_offset, f.bit_size) for path, f in theirs.fields.items() if path != "word"}
        yield from _bit_fields(name, layout, found)
    both = btf.struct("kvm_cpu_role")
    yield "sizeof(union kvm_cpu_role)", CPU_ROLE.width, 8 * both.size
    parts = {}
    for path, part in both.fields.items():
        _, _, inner = path.partition(".")
        if inner and inner != "word":
            parts[inner] = (part.bit_offset, part.bit_size)
    yield from _bit_fields("kvm_cpu_role", CPU_ROLE, parts)


def _bit_fields(
    name: str, layout: BitLayout, theirs: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, object, object]]:
    ours = {field.name: (field.low, field.width) for field in layout.members}
    for path in sorted({*ours, *theirs}):
        yield f"{name}.{path} (first bit, bits)", ours.get(path), theirs.get(path)


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, os.uname().release.split(".")[:2]))


def _names(obj: object) -> set[str]:
    return {name for name in vars(obj) if not name.startswith("_")}


def _structs(btf: Btf) -> Iterator[tuple[str, object, object]]:
    # Structs of which we have the fields by name, and those of which we have the types.
    iterator = TdpIter(0, 4, lambda *_: 0, lambda *_: None)
    theirs = set(btf.struct("tdp_iter").fields)
    ours = {*_names(iterator), "sptep"}
    if "gfn_bits" not in theirs and _kernel() < (6, 14):
        ours.discard("gfn_bits")
    yield "fields of struct tdp_iter", sorted(ours), sorted(theirs)
    path = btf.struct("tdp_iter").fields["pt_path"]
    yield "tables in tdp_iter.pt_path", len(iterator.pt_path), path.size // 8
    kvm = btf.struct("kvm").fields
    wanted = {name for name in kvm if name.startswith("mmu_invalidate_")}
    yield "fields mmu_invalidate_* of struct kvm", sorted(_names(MmuInvalidate())), sorted(wanted)
    for name in sorted(wanted):
        yield f"bits of kvm.{name}", 64, kvm[name].bit_size
    for struct, fields in _FIELDS.items():
        there = btf.struct(struct).fields
        for field, kind in fields.items():
            yield f"type of {struct}.{field}", kind, there[field].type if field in there else None
    arch = btf.struct("kvm_arch").fields
    # Until Linux 6.16 an array; its pointer tells nothing of how many buckets there are.
    buckets = arch["mmu_page_hash"].type
    of = f"[{KVM_NUM_MMU_PAGES}]" if "[" in buckets else " *"
    yield "type of kvm_arch.mmu_page_hash", f"struct hlist_head{of}", buckets
    lists = arch.get("possible_nx_huge_pages")
    if lists is not None and "[" in lists.type:  # since Linux 6.18: one for each type of MMU
        size = btf.struct("kvm_possible_nx_huge_pages").size
        yield "lists in kvm_arch.possible_nx_huge_pages", KVM_NR_MMU_TYPES, lists.size // size


def _enums(btf: Btf) -> Iterator[tuple[str, object, object]]:
    theirs = btf.enumerators()
    ours = {name: value for name, value in vars(levels).items() if name.startswith("PG_LEVEL_")}
    if "PG_LEVEL_256T" not in theirs:  # 6.8 has not, 6.12 has
        del ours["PG_LEVEL_256T"]
        ours["PG_LEVEL_NUM"] -= 1
    ours |= fault.ret_pf_codes(os.uname().release)
    ours |= {name: value for name, value in vars(fault).items() if name.startswith("RET_PF_")}
    if "KVM_NR_MMU_TYPES" in theirs:  # since Linux 6.18
        ours |= {"KVM_SHADOW_MMU": KVM_SHADOW_MMU, "KVM_TDP_MMU": KVM_TDP_MMU, "KVM_NR_MMU_TYPES": KVM_NR_MMU_TYPES}
    for name in sorted({*ours, *(name for name in theirs if name.startswith(("PG_LEVEL_", "RET_PF_")))}):
        yield name, ours.get(name), theirs.get(name)


# In formats: { ((((1UL))) << (4)), "F" }, access_str[] = { "---", ... }, and REC->ret == 6, REC->ret == 5.
_FLAG = re.compile(r"<< \((\d+)\)\), \"(\w+)\" \}")
_ACCESS = re.compile(r"access_str\[\] = \{ ([^}]*) \}")
_RET = re.compile(r"spurious %d fixed %d.*REC->ret == (\d+), REC->ret == (\d+)")


def _formats() -> Iterator[tuple[str, object, object]]:
    # What the formats of trace events say in words: bits of error codes, rights of a role, answers to a fault.
    from .tracefs import Tracefs

    with Tracefs() as tracefs:
        walker, get_page, fast = (
            tracefs.read_text(f"events/kvmmmu/{event}/format")
            for event in ("kvm_mmu_walker_error", "kvm_mmu_get_page", "fast_page_fault")
        )
    ours = {field.name: field.low for field in fault.PFERR.members}
    for bit, name in _FLAG.findall(walker):
        yield f"bit of PFERR {name}", ours.get(name), int(bit)
    words = _ACCESS.search(get_page)
    for access, word in enumerate(re.findall(r'"(.*?)"', words[1]) if words else ()):
        said = next(part.meaning for part in decode_role(access << 8 | 1).parts if part.name == "access")
        yield f"rights of access {access}", said, word
    codes = fault.ret_pf_codes(os.uname().release)
    answers = _RET.search(fast)
    for name, code in zip(("RET_PF_SPURIOUS", "RET_PF_FIXED"), answers.groups() if answers else (), strict=False):
        yield f"{name} in fast_page_fault", codes[name], int(code)


@check("types of hvmodel.mmu", "BTF and the trace formats of the running kernel")
def check_mmu_types(tally: Tally, _cases: int) -> None:
    """Every union, struct and enum that hvmodel.mmu mirrors, field by field and both ways; what the formats of KVM's
    events say of error codes, rights and answers to a fault.
    """
    btf = _btf()
    if "kvm_cpu_role" not in btf:
        raise Lacking(f"{btf.source} has no union kvm_cpu_role: no KVM, or one of before Linux 5.19")
    for what, ours, theirs in (*_unions(btf), *_structs(btf), *_enums(btf)):
        if theirs is None and _kernel() < _MODELLED:
            tally.lack(f"{what}: this kernel has none")
        else:
            tally.compare(what, ours, theirs)
    try:
        said = list(_formats())
    except HostError as error:
        tally.lack(f"formats of trace events: {error}")
        return
    for what, ours, theirs in said:
        tally.compare(what, ours, theirs)
    for event, begins in (
        ("kvm_mmu_walker_error", "bit of"),
        ("kvm_mmu_get_page", "rights"),
        ("fast_page_fault", "RET_"),
    ):
        if not any(what.startswith(begins) for what, _, _ in said):
            tally.lack(f"the format of {event} is not of the form known here")


# ------------------------------------------------------------------------------------------------- the hash


_HASH_GPA, _HASH_SIZE = 16 << 20, 64 << 20  # 16384 frames: about 4 of each bucket
_HASH_ROOTS = 150  # of one VM, whose statistic only rises
_HASH_EVENTS = ("kvmmmu:kvm_mmu_get_page", "kvmmmu:kvm_mmu_prepare_zap_page", "kvm:kvm_userspace_exit")


def _shadows() -> None:
    # Lacking where KVM uses EPT or NPT: then shadow paging has no event, and no statistic.
    from ..kvm.system import vendor_module

    module = vendor_module() or ""
    name = {"kvm_intel": "ept", "kvm_amd": "npt"}.get(module)
    if name is not None and _parameter(name, module) in ("Y", "1"):
        raise Lacking(f"{module} has {name}=Y: it keeps no shadow pages for such a guest")


def _parameter(name: str, module: str = "kvm") -> str:
    try:
        with open(f"/sys/module/{module}/parameters/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _roots(rng: random.Random) -> list[tuple[int, int, int]]:
    # Frame, CR0, CR4 of the roots of one VM: many frames of a few buckets, some of others, each in several roles.
    by_bucket: dict[int, list[int]] = {}
    for gfn in range(_HASH_GPA // _PAGE, (_HASH_GPA + _HASH_SIZE) // _PAGE):
        by_bucket.setdefault(kvm_page_table_hashfn(gfn), []).append(gfn)
    full = [gfns for gfns in by_bucket.values() if len(gfns) >= 5]
    wanted = [gfn for gfns in rng.sample(full, 3) for gfn in gfns]
    wanted += [rng.choice(rng.choice(list(by_bucket.values()))) for _ in range(4)]
    roles = [(0x80010033, 0x20), (0x80000033, 0x20), (0x80000033, 0x100020)]  # WP; none; SMEP without WP
    # The first frame is found again behind three pages of the second: that, and no later root, tells the lists' order.
    roots = [(wanted[0], *roles[0]), *[(wanted[1], *role) for role in roles], (wanted[0], *roles[0])]
    return roots + [(rng.choice(wanted), *rng.choice(roles)) for _ in range(_HASH_ROOTS)]


@check("PageHash", "max_mmu_page_hash_collisions of KVM_GET_STATS_FD", cases=4_000, slow=40_000)
def check_page_hash(tally: Tally, cases: int) -> None:
    """Which pages are made and which are found, as KVM gets them for random roots, many of which fall into the same
    buckets; after each access the most collisions that one search met.  Now and then all pages are zapped.
    """
    from .kvm_trace import GetPage, PrepareZapPage
    from .lab import DRIVER, Access, LabSlot, MmuLab
    from .stats import Stats

    _shadows()
    rng = random.Random(0x61C8)
    slot = LabSlot(_HASH_GPA, _HASH_SIZE, populate=False, fill=False)
    while tally.compared < cases and not tally.mismatches:
        with MmuLab([slot], events=_HASH_EVENTS) as lab, Stats(lab.vm.stats_fd()) as stats:
            lab.vm.ioctl("KVM_SET_NR_MMU_PAGES", 4096)  # so little RAM gives fewer, and KVM would zap the oldest
            pages = PageHash()
            for number, (gfn, lab.cr0, lab.cr4) in enumerate(_roots(rng)):
                if rng.random() < 0.03:
                    lab.flush()
                    pages.zap_all()
                lab.cr3 = gfn * _PAGE
                lab.link(lab.cr3)
                (outcome,) = lab.run([Access(DRIVER + _PAGE * 512, user=rng.random() < 0.5)])
                for event in outcome.records:
                    if isinstance(event, GetPage):
                        made = pages.get_page(event.gfn, PageRole(event.role))
                        tally.compare(f"root {number}, {event}: made", made, event.created)
                    elif isinstance(event, PrepareZapPage):
                        pages.zap(event.gfn, PageRole(event.role))
                theirs = stats.read()["max_mmu_page_hash_collisions"]
                tally.compare(f"root {number}, frame {gfn:#x}: collisions", pages.max_collisions, theirs)


# ------------------------------------------------------------------------------------------------- the notifier

_PAGES = 96  # of host memory; pages 40 to 47 are in slot 12 only, 80 to 95 in none
_SHARES = ((10, 0, 40), (11, 48, 80), (12, 30, 60))  # slot, its first page of that memory and the one behind its last
_AT = 1 << 30  # where the slots begin, 1 MiB apart: gpa and linear address


@check(
    "ranges of the MMU notifier", "kvm_mmu_set_spte, kvm_page_fault and kvm_unmap_hva_range", cases=4_000, slow=40_000
)
def check_notifier(tally: Tally, cases: int) -> None:
    """Which pages of three slots, two of which share memory with the third, fault again after the host gave up random
    pages; and the addresses that the notifier was told.
    """
    import threading

    from ..host import Mapping
    from .kvm_trace import PageFault, SetSpte
    from .lab import Access, MmuLab
    from .tracefs import Tracefs

    rng = random.Random(0x5E9)
    events = ("kvmmmu:kvm_mmu_set_spte", "kvm:kvm_page_fault", "kvm:kvm_userspace_exit")
    tid = threading.get_native_id()
    with (
        Mapping(None, _PAGES * _PAGE) as memory,
        Tracefs() as tracefs,
        MmuLab(events=events) as lab,
        tracefs.instance(["kvm:kvm_unmap_hva_range"], [tid], follow=False) as told,
    ):
        memory.advise("nohugepage")
        hva = int(memory.hva)
        slots, accesses = [], []
        for at, (number, first, end) in enumerate(_SHARES):
            gpa, size = _AT + (at << 20), (end - first) * _PAGE
            lab.vm.set_user_memory_region(number, gpa, memory, offset=first * _PAGE, size=size)
            slots.append(Slot(gpa // _PAGE, end - first, hva + first * _PAGE, number))
            for page in range(gpa, gpa + size, _PAGE):
                lab.map(page, page, 0x27)  # P, W, U, A
                accesses.append(Access(page))
        state = MmuInvalidate()
        memory.write(0, bytes(memory.size))
        lab.run(accesses)
        while tally.compared < cases and not tally.mismatches:
            told.read()
            calls: list[tuple[int, int]] = []
            gone: set[int] = set()
            for _ in range(rng.randrange(3)):
                start, end = sorted(rng.sample(range(_PAGES + 1), 2))
                calls.append((hva + start * _PAGE, hva + end * _PAGE))
                memory.advise("dontneed", start * _PAGE, (end - start) * _PAGE)
                for part in state.invalidate(slots, *calls[-1]):
                    gone.update(range(part.start, part.end))
            theirs = [(record["start"], record["end"]) for record in told.read()]
            tally.compare("what the notifier was told", calls, theirs)
            again: set[int] = set()
            for outcome in lab.run(rng.sample(accesses, len(accesses))):
                again.update(event.gfn for event in outcome.records if isinstance(event, SetSpte))
                faults = [event.fault_address for event in outcome.records if isinstance(event, PageFault)]
                again.update(address // _PAGE for address in faults)
            for access in accesses:
                gfn = access.gva // _PAGE
                where = f"frame {gfn:#x} behind {[(hex(start), hex(end)) for start, end in calls]}: faults again"
                tally.compare(where, gfn in gone, gfn in again)
    tally.lack("mmu_invalidate_seq, mmu_invalidate_in_progress, and that a fault was tried again: nothing shows them")


# ------------------------------------------------------------------------------------------------- what faults count

_STATS = ("pf_taken", "pf_fast", "pf_fixed", "pf_emulate", "pf_spurious", "pf_guest")
_LEAF = 0x27  # P, W, U, A
_READONLY_GPA, _NO_SLOT = 2 << 30, 4 << 30
_STEP = 8 * _PAGE  # KVM prefetches within 8 entries: one page of each 8 is used
_FIRST = 1 << 30  # linear address
_NR_TABLES = 8


class _Kind(Value):
    # An access, and the fault that it makes: `fault`, what the steps of kvm_mmu_page_fault answer, None for no fault.
    # `before`, the accesses that come first.  `leaf`: the entry of its page, `gpa`: where that is, 0 for a fresh page
    # of the lab's memory.
    name: str
    kind: str
    fault: Mapping[str, int] | None
    before: tuple[str, ...] = ()
    leaf: int = _LEAF
    gpa: int = 0


_FIXED: dict[str, int] = {}
_REFUSED = {"walks": 0}
_MMIO = {"faultin": fault.RET_PF_EMULATE}
_KINDS = (
    _Kind("a first load", "load", _FIXED),
    _Kind("a load again", "load", None, ("load",)),
    _Kind("a first store", "store", _FIXED),
    _Kind("a store again", "store", None, ("store",)),
    _Kind("a load behind a store", "load", None, ("store",)),
    _Kind("a store to what was clean", "store", _FIXED, ("load",)),
    _Kind("a fetch", "fetch", _FIXED),
    _Kind("no entry", "load", _REFUSED, leaf=0),
    _Kind("a store to what is read-only", "store", _REFUSED, leaf=0x25),
    _Kind("a store to what is read-only and was read", "store", _REFUSED, ("load",), leaf=0x25),
    _Kind("a page of the supervisor", "load", _REFUSED, leaf=0x23),
    _Kind("a fetch without the right", "fetch", _REFUSED, leaf=1 << 63 | _LEAF),
    _Kind("a reserved bit", "load", _REFUSED, leaf=1 << 51 | _LEAF),
    _Kind("a load from no memory", "load", _MMIO, gpa=_NO_SLOT),
    _Kind("a store to no memory", "store", _MMIO, gpa=_NO_SLOT),
    _Kind("a load from a read-only slot", "load", _FIXED, gpa=_READONLY_GPA),
    _Kind("a store to a read-only slot", "store", _MMIO, ("load",), gpa=_READONLY_GPA),
)


@check("kvm_mmu_page_fault", "pf_* of KVM_GET_STATS_FD", cases=1_000, slow=20_000)
def check_fault_stats(tally: Tally, cases: int) -> None:
    """What loads, stores and fetches of CPL 3 add to the vCPU's statistics of faults: of pages that are new, known,
    clean, read-only, not there, not allowed; of memory that is in no slot or a read-only one; of page tables.
    """
    from .lab import Access, LabSlot, MmuLab
    from .stats import Stats

    _shadows()
    rng = random.Random(0xFA17)
    slots = [LabSlot(16 << 20, 64 << 20, populate=True), LabSlot(_READONLY_GPA, 16 << 20, flags=2)]
    with MmuLab(slots, trace=False) as lab, Stats(lab.vcpu.stats_fd()) as stats:
        gpa = slots[0].gpa
        lab.map(_FIRST, gpa, _LEAF)
        lab.run([Access(_FIRST), Access(_FIRST + _PAGE), Access(_FIRST, user=False)])  # the driver's own pages
        for number in range(_NR_TABLES):
            _table_stats(tally, lab, stats, number, gpa)
        at = 0
        while tally.compared < cases:
            kind = rng.choice(_KINDS)
            at += 1
            gva = _FIRST + (1 << 30) + at * _STEP
            lab.map(gva, (kind.gpa or gpa) + at * _STEP % (16 << 20), kind.leaf)
            lab.run([Access(gva, before) for before in kind.before])
            _one_stat(tally, lab, stats, kind.name, Access(gva, kind.kind), kind.fault)


def _one_stat(
    tally: Tally, lab: MmuLab, stats: Stats, name: str, access: Access, steps: Mapping[str, int] | None
) -> None:
    # One access, and what it adds.
    ours = dict.fromkeys(_STATS, 0)
    if steps is not None:
        ours |= dict.fromkeys(fault.kvm_mmu_page_fault(**steps).stats, 1)  # type: ignore[arg-type]  # 0 is False
    then = stats.read()
    lab.run([access])
    now = stats.read()
    tally.compare(name, ours, {stat: now[stat] - then[stat] for stat in _STATS})  # type: ignore[operator]  # ints


def _table_stats(tally: Tally, lab: MmuLab, stats: Stats, number: int, gpa: int) -> None:
    # Stores to page tables that are shadowed, to entries that nothing uses: a table of level 1 goes out of step with
    # its shadow page and is free to be written; one of level 2 stays protected.
    from .lab import Access

    gva = _FIRST + (64 + number << 30)
    table = lab.map(gva, gpa, _LEAF) & -_PAGE
    directory = lab.read_entry(lab.read_entry(lab.root + 8 * (gva >> 39)) & -_PAGE | 8 * (gva >> 30 & 511)) & -_PAGE
    lab.run([Access(gva)])
    at = gva + (2 << 20)
    for window, (name, target, steps) in enumerate(
        (("level 1", table, _FIXED), ("level 2", directory, {"mapped": fault.RET_PF_WRITE_PROTECTED}))
    ):
        here = at + window * _STEP
        lab.map(here, target, _LEAF)
        store = Access(here + 8 * 511, "store", value=0)
        _one_stat(tally, lab, stats, f"a store to a table of {name}", store, steps)


# ------------------------------------------------------------------------------------------------- NX recovery

_NR_VMS = 4
_PATIENCE = 2.0  # seconds that a new thread may take to have its name


def _workers() -> int:
    # Threads of this process with the worker's name.
    found = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm", encoding="ascii", errors="replace") as file:
                found += file.read().strip() == COMM
        except OSError:
            continue  # a thread that has just ended
    return found


def _settled(wanted: int) -> int:
    # The number of workers, once it is `wanted`, or after a while.
    end = time.monotonic() + _PATIENCE
    while True:
        found = _workers()
        if found == wanted or time.monotonic() > end:
            return found
        time.sleep(0.002)


@check("NX huge page recovery", "/proc/self/task and the parameters of module kvm", cases=1)
def check_nx_recovery(tally: Tally, _cases: int) -> None:
    """The worker that each VM gets in this process at its first KVM_RUN, no earlier, and that ends with it; the values
    that the parameters show.
    """
    from ..host import Mapping
    from ..kvm import Kvm

    shown = {name: _parameter(name) for name in ("nx_huge_pages", *_RECOVERY)}
    if not all(shown.values()):
        raise Lacking(f"no parameters of NX huge pages in {_PARAMETERS}")
    if _kernel() < (6, 13):
        raise Lacking("before Linux 6.13 the worker is a kernel thread (but in some 6.12): not in /proc/self/task")
    model = NxParameters(ratio=int(shown[_RECOVERY[0]]), period_ms=int(shown[_RECOVERY[1]]))
    model.set_nx_huge_pages(shown["nx_huge_pages"])
    already = _workers()
    with Mapping(None, _PAGE) as page, Kvm() as kvm:
        tally.compare("nx_huge_pages", model.get_nx_huge_pages(), shown["nx_huge_pages"])
        page.write(0, b"\xf4")
        for number in range(1, _NR_VMS + 1):
            with kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
                vm.set_user_memory_region(0, 0x1000, page)
                sregs = vcpu.sregs
                sregs.cs.base = sregs.cs.selector = 0
                vcpu.sregs = sregs
                regs = vcpu.regs
                regs.rip = 0x1000
                vcpu.regs = regs
                tally.compare(f"VM {number}: workers before the first KVM_RUN", 0, _workers() - already)
                vcpu.run(10)
                wanted = already + model.has_worker
                tally.compare(f"VM {number}: workers behind it", wanted, _settled(wanted))
            tally.compare(f"VM {number}: workers behind its end", already, _settled(already))
    tally.lack("writes to the parameters, periods and lists of NX huge pages: they hold for every VM of this host")
