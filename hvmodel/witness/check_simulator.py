"""The check of the shadow-MMU simulator: random guest programs (shadow_program), run in both.

The simulator runs a program first, and predicts all of it.  What the host decides is its input: which pages are there
at the beginning, in which frames, and where by huge pages (/proc/self/pagemap, PAGEMAP_SCAN).  A frame that the host
chooses in the course of the program stands as a number of its own, which has to be the same frame each time.

Compared, access by access and in order: the trace's kvm_mmu_get_page, kvm_mmu_set_spte, kvm_mmu_spte_requested,
kvm_mmu_prepare_zap_page, kvm_mmu_unsync_page and kvm_mmu_sync_page, in all their fields; error codes of page faults,
MMIO, and what loads read; dirty logs; and, at the end, all of the guest's memory.  The place of an SPTE (sptep) has to
be in the same shadow page each time.  A program ends with accesses to much of what it has mapped, so that an entry
that is there in one only is seen.

No event tells of entries above the last level, and of entries that go: the next access shows those.  Sources as of
hvmodel.mmu.simulate.
"""

from __future__ import annotations

import os
from functools import partial

from ..mmu.shadow_page import MmuEvent, SimSlot
from ..mmu.simulate import ShadowMmu
from ..units import PAGE_SIZE, MiB
from .registry import check
from .result import Lacking
from .shadow_program import ABSENT, FAKE_PFN, SLOTS, GuestCopy, HostFrames, Program, Registers, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Self

    from ..mmu.masks import ShadowMasks
    from .lab import Outcome
    from .result import Tally

__all__ = ["ShadowLab", "check_simulator", "compare_program"]

_EVENTS = (
    "kvmmmu:kvm_mmu_get_page",
    "kvmmmu:kvm_mmu_sync_page",
    "kvmmmu:kvm_mmu_unsync_page",
    "kvmmmu:kvm_mmu_prepare_zap_page",
    "kvmmmu:kvm_mmu_set_spte",
    "kvmmmu:kvm_mmu_spte_requested",
    "kvm:kvm_userspace_exit",
)
_KINDS = ("load", "store", "load8", "store8", "xchg", "invlpg", "cr3")  # of accesses with an instruction of the driver
_PER_LAB = 64  # programs in one VM
_ADDRESS = (1 << 52) - PAGE_SIZE
_STACKS = 64 * 1024  # of the driver's slot: KVM writes there when it delivers exceptions


def _parameter(name: str, default: str) -> str:
    # A parameter of the kvm module; the default where this kernel has none of the name.
    try:
        with open(f"/sys/module/kvm/parameters/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return default


class ShadowLab:
    """A lab, the simulator's copy of its memory, and programs in both.  Close it, best by `with`.

    `masks`: those that KVM uses, by default as `host_masks` says.  `events`: what is traced; by default what is
    compared.

    Lacking, HostError: as MmuLab; `Lacking` where KVM does not shadow the guest's page tables.
    """

    def __init__(self, masks: ShadowMasks | None = None, events: Iterable[str] | None = None) -> None:
        from contextlib import ExitStack

        from ..host.pagemap import Category, PageMap
        from .lab import LabSlot, MmuLab

        if masks is None:
            from .hostmasks import host_masks

            masks = host_masks().masks
        self.masks = masks
        if masks.kind != "shadow":
            raise Lacking(f"KVM uses {masks.kind.upper()} here: it does not shadow the guest's page tables")
        #: Whether KVM emulates CPL 0 many instructions at a time, as kvm_pvm does.
        self.emulation_batch = os.path.exists("/sys/module/kvm_pvm")
        self._closed = False
        with ExitStack() as stack:
            #: The lab.
            self.lab = stack.enter_context(
                MmuLab([LabSlot(*slot, slot[-1]) for slot in SLOTS], events=_EVENTS if events is None else events)
            )
            self._pagemap = stack.enter_context(PageMap())
            stack.pop_all()
        #: Where the driver's code of each kind of access is, for CPL 3.
        self.driver = {kind: self.lab.stub(kind) for kind in _KINDS}
        starts = [0, *(gpa for gpa, *_ in SLOTS)]
        self.memory = GuestCopy([(gpa, bytearray(self.lab.view(at))) for at, gpa in enumerate(starts)])
        self.host = HostFrames()
        #: What the last program's dirty logs were.
        self.logs: list[set[int]] = []
        self._category = Category.HUGE
        # By slot number: its frames, its huge pages; and which are to be looked at anew.
        self._frames: dict[int, dict[int, int]] = {}
        self._huge: dict[int, list[int]] = {}
        self._changed = set(range(len(SLOTS) + 1))
        entries = {entry.function: entry for entry in self.lab.vcpu.get_cpuid2()}
        vendor = b"".join(word.to_bytes(4, "little") for word in (entries[0].ebx, entries[0].edx, entries[0].ecx))
        #: What of the simulator's arguments is this host's.
        self.facts: dict[str, Any] = {
            "maxphyaddr": entries[0x80000008].eax & 0xFF,
            "gbpages": bool(entries[0x80000001].edx >> 26 & 1),
            "amd": vendor in (b"AuthenticAMD", b"HygonGenuine"),
            "nx_huge_pages": _parameter("nx_huge_pages", "N") == "Y",
            "eager_zap_unsync_children": _parameter("eager_zap_unsync_children", "Y") == "Y",
            "emulation_batch": self.emulation_batch,
        }

    def close(self) -> None:
        """Give back the lab.  Any number of calls."""
        self._closed = True
        self._pagemap.close()
        self.lab.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ShadowLab {'closed' if self._closed else self.masks.kind}>"

    # ---- before a program ----

    def poke(self, gpa: int, data: bytes) -> None:
        """Bytes that stand in memory before the program begins, in both."""
        self.memory.put(gpa, data)
        self.lab.write(gpa, data)

    def new_mmu(self, registers: Registers) -> ShadowMmu:
        """A simulator of the lab, from which all shadow pages have gone."""
        lab = self.lab
        lab.flush()
        self._set_registers(registers.at(lab.root))  # one of the two is a change, which drops all roots
        self._set_registers(registers)
        self._look_at_host()
        slots = [SimSlot(0, 512, 0, lab.hva(0))]
        slots += [SimSlot(gpa >> 12, size >> 12, flags, lab.hva(gpa)) for gpa, size, flags, *_ in SLOTS]
        return ShadowMmu(
            self.masks,
            list(self.memory.pieces),
            slots,
            host=self.host,
            cr0=registers.cr0,
            cr3=registers.cr3,
            cr4=registers.cr4,
            efer=registers.efer,
            **self.facts,
        )

    def _set_registers(self, registers: Registers) -> None:
        lab = self.lab
        lab.cr0, lab.cr3, lab.cr4, lab.efer = registers.cr0, registers.cr3, registers.cr4, registers.efer
        lab.load_registers()

    def _look_at_host(self) -> None:
        # Memory as programs begin with it, and the host's frames for it; what no program changed is known.
        lab, host = self.lab, self.host
        host.frames.clear()
        host.zero.clear()
        host.huge_ranges.clear()
        for at in range(len(SLOTS) + 1):
            if at and lab.vm.memslots[at].flags != SLOTS[at - 1][2]:
                lab.set_flags(at, SLOTS[at - 1][2])
            if at in self._changed:
                self._renew(at)
                first, hva, size = self._place(at)
                words = enumerate(self._pagemap.words(hva, size), first >> 12)
                self._frames[at] = {gfn: word & (1 << 55) - 1 for gfn, word in words if word >> 63}
                self._huge[at] = self._huge_pages(at)
            host.frames.update(self._frames[at])
            host.huge_ranges.update(self._huge[at])
        self._changed.clear()

    def _place(self, at: int) -> tuple[int, int, int]:
        # Where slot `at` is for the guest, where for the host, and its size.
        mapping = self.lab.mapping(at)
        return SLOTS[at - 1][0] if at else 0, int(mapping.hva), mapping.size

    def _renew(self, at: int) -> None:
        # Brings a slot's memory back to how programs begin.
        if not at:
            return
        gpa, size, _, huge, there = SLOTS[at - 1]
        mapping = self.lab.mapping(at)
        if huge and len(self._huge_pages(at)) < size // (2 * MiB):
            mapping.advise("dontneed")
            self.poke(gpa, b"\xee" * size)
        elif there:
            mapping.populate()
        else:
            mapping.advise("dontneed")
            self.memory.put(gpa, bytes(size))

    def _huge_pages(self, at: int) -> list[int]:
        # First frames of the 2 MiB of a slot that the host maps by one entry.
        first, hva, size = self._place(at)
        found = self._pagemap.scan(hva, hva + size, mask=self._category)
        return [
            (first + start - hva) >> 12
            for region in found.regions
            for start in range(region.start, region.end, 2 * MiB)
        ]

    # ---- a program ----

    def run(self, program: Program) -> list[Outcome]:
        """Run a program in the lab: what each of its accesses came to.  Its dirty logs go to `logs`."""
        from .lab import Access

        self.logs = []
        self._changed.add(ABSENT + 1)
        steps: list[Access | Callable[[], object]] = []
        for step in program.steps:
            if step.is_access:
                steps.append(Access(step.gva, step.what, step.user, step.value))
            elif step.registers is not None:
                steps.append(partial(self._set_registers, step.registers))
            else:
                steps.append(partial(self._host_step, step))
        return self.lab.run(steps)

    def _host_step(self, step: Step) -> None:
        lab, slot = self.lab, step.slot + 1
        if step.what == "log":
            lab.set_flags(slot, int(step.on))
        elif step.what == "take_log":
            log = lab.vm.get_dirty_log(slot)
            self.logs.append({8 * at + bit for at, byte in enumerate(log) for bit in range(8) if byte >> bit & 1})
        elif step.what == "zap":
            lab.flush()
        else:
            self._changed.add(slot)
            size = min(step.count, SLOTS[step.slot][1] // PAGE_SIZE - step.first) * PAGE_SIZE
            lab.mapping(slot).advise("dontneed", step.first * PAGE_SIZE, size)


# ---- comparison ----

_PAGE_EVENTS = {
    "GetPage": "get_page",
    "SyncPage": "sync_page",
    "UnsyncPage": "unsync_page",
    "PrepareZapPage": "prepare_zap_page",
}


def _ours(event: MmuEvent) -> tuple[Any, ...] | None:
    if event.name == "set_spte":
        return event.name, event.gfn, event.level, event.spte, event.sptep
    if event.name == "spte_requested":
        return event.name, event.gfn, event.level, event.pfn
    if event.name == "zap_all_fast":
        return None
    return event.name, event.gfn, event.role, event.root_count, bool(event.unsync), bool(event.created)


def _theirs(event: Any) -> tuple[Any, ...] | None:
    kind = type(event).__name__
    name = _PAGE_EVENTS.get(kind)
    if name is not None:
        created = name == "get_page" and bool(event.created)
        return name, event.gfn, event.role, event.root_count, bool(event.unsync), created
    if kind == "SetSpte":
        return "set_spte", event.gfn, event.level, event.spte, event.sptep
    if kind == "SpteRequested":
        return "spte_requested", event.gfn, event.level, event.pfn
    return None


class _Names:
    # What only KVM knows, learned as it goes: which page an SPTE's page of ours is, which frame the host chose.
    def __init__(self) -> None:
        self.pages: dict[int, int] = {}
        self.taken: dict[int, int] = {}
        self.frames: dict[int, int] = {}

    def same(self, our: tuple[Any, ...], their: tuple[Any, ...]) -> bool:
        if our[:3] != their[:3] or our[0] not in ("set_spte", "spte_requested"):
            return our == their
        if our[0] == "spte_requested":
            return self._same_frame(our[3], their[3])
        if our[3] & ~_ADDRESS != their[3] & ~_ADDRESS or our[4] % PAGE_SIZE != their[4] % PAGE_SIZE:
            return False
        same = self._same_frame((our[3] & _ADDRESS) >> 12, (their[3] & _ADDRESS) >> 12)
        return same and self._same_page(our[4] >> 12, their[4] >> 12)

    def _same_frame(self, our: int, their: int) -> bool:
        return our == their if our < FAKE_PFN - 1 else self.frames.setdefault(our, their) == their

    def _same_page(self, our: int, their: int) -> bool:
        # A page of ours is made once; the kernel's may have been another before.
        if our not in self.pages:
            self.pages[our] = their
            self.taken[their] = our
        return self.pages[our] == their and self.taken[their] == our


def _syncs(program: Program, at: int) -> list[tuple[Any, ...]]:
    # The events that access `at` begins with, as far as they are kvm_mmu_sync_page.
    found = []
    for event in program.predicted[at][2] if at < len(program.predicted) else ():
        if event.name != "sync_page":
            break
        found.append(_ours(event))
    return [our for our in found if our is not None]


def compare_program(tally: Tally, program: Program, lab: ShadowLab) -> bool:
    """Run a program in the lab, and hold each access against what the simulator said.  False: there is a difference,
    and the rest of the program was not compared."""
    outcomes = lab.run(program)
    names, name, early = _Names(), f"program {program.seed}", 0
    for at, ((step, result, events), outcome) in enumerate(zip(program.predicted, outcomes, strict=True)):
        where = f"{name}, access {at} ({step})"
        ours = [our for event in events if (our := _ours(event)) is not None][early:]
        theirs = [their for event in outcome.records if (their := _theirs(event)) is not None]
        early = 0
        if step.what == "cr3" and lab.emulation_batch and len(theirs) > len(ours):
            # What MOV to CR3 asks for waits until the guest is entered, or the host interrupts the batch.
            early = len(theirs) - len(ours)
            ours += _syncs(program, at + 1)[:early]
        for our, their in zip(ours, theirs, strict=False):
            if not names.same(our, their):
                return tally.compare(f"{where}: event", our, their)
        tally.count(min(len(ours), len(theirs)))
        if len(ours) != len(theirs):
            return tally.compare(f"{where}: events", ours[len(theirs) :], theirs[len(ours) :])
        code = None if outcome.fault is None else outcome.fault.error_code
        mmio = outcome.mmio[0][0] if outcome.mmio else None
        value = result.data
        if value is None or step.what != "load":
            our, their = (result.fault, result.mmio, None), (code, mmio, outcome.stop)
        else:
            our = (result.fault, result.mmio, None, int.from_bytes(value, "little"))
            their = (code, mmio, outcome.stop, outcome.value)
        if not tally.compare(f"{where}: (error code, MMIO, stop, value)", our, their):
            return False
    same = tally.compare(f"{name}: dirty logs", program.logs, lab.logs)
    for at, (gpa, data) in enumerate(lab.memory.pieces):
        start, view = (0 if gpa else _STACKS), lab.lab.view(at)
        if data == view if gpa else data[start:] == view[start:]:
            tally.count(1)
            continue
        bad = next(i for i in range(start, len(data), 8) if data[i : i + 8] != view[i : i + 8])
        same = tally.compare(f"{name}: memory at {gpa + bad:#x}", data[bad : bad + 8], bytes(view[bad : bad + 8]))
        data[:] = view  # for the next program
    return same


@check("shadow-MMU simulator", "kvmmmu tracepoints, dirty logs, guest memory", cases=500, slow=10_000)
def check_simulator(tally: Tally, cases: int) -> None:
    """Random guest programs: the shadow pages, roles, SPTEs, zaps and unsyncs that KVM traces, one for one in order.

    `cases`: programs.  What is counted are events and accesses.
    """
    from .kvm_trace import TraceLost

    done = 0
    while done < cases:
        with ShadowLab() as lab:
            for seed in range(done, min(done + _PER_LAB, cases)):
                done = seed + 1
                try:
                    if not compare_program(tally, Program(seed, lab), lab):
                        break
                except TraceLost as error:
                    tally.break_off(f"program {seed}: {error}")
                    return
