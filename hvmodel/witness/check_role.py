"""Checks of hvmodel.mmu.role: the role words that KVM gives the roots and the tables it builds, by its own trace.

A vCPU is given CR0, CR4 and EFER and runs one instruction, `out`, for which KVM needs a root: each root, and each table
below it, is an event kvm_mmu_get_page with the frame of the guest's table and the role.  `role` compares the roots for
all combinations that this host takes; `role_children` the tables below them, for every sum of rights on three levels,
which code of CPL 3 reads through.  Where KVM has EPT or NPT one root serves all registers, so what is compared there is
each table that KVM makes, a few in all.

No event has the extended role of a CPU role, nor a role in SMM or of a nested guest, on this host: they are not seen.

    gpa 0x00000  the `out` of CPL 0
        0x01000  the code of CPL 3
        0x02000  its list: the addresses to be read
        0x05000  tables, twice: the low 2 MiB to themselves, for the supervisor
        0x0b000  the same for PAE paging: PDPTEs, which have no W and A, and lead to the directories of those
        0x10000  tables of `_Paths`
        2 MiB    what the large pages of those map
"""

from __future__ import annotations

import errno
from itertools import product

from .._ffi import ffi, lib
from ..kvm import IoOut
from ..mmu.levels import gfn_round_for_level
from ..mmu.role import (
    CpuRole,
    PageRole,
    calc_cpu_role,
    child_role,
    root_pages,
    shadow_root_role,
    tdp_child_role,
    tdp_level,
    tdp_root_role,
)
from ..value import Value
from .check_legal import cr4_sets
from .registry import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Any, Self

    from .result import Tally

    Regs = tuple[int, int, int]  # CR0, CR4, EFER
    Page = tuple[int, int]  # frame, role word

__all__ = ["check_role", "check_role_children"]

_NAMED, _ALL = 1, 2  # "cases" of a run, as in check_legal

_GET_PAGE, _EXIT = "kvmmmu:kvm_mmu_get_page", "kvm:kvm_userspace_exit"
_CHUNK = 1000  # cases between two reads of the trace: up to 6 events of 40 bytes each

_PE, _WP, _NW, _CD, _PG = 1 << 0, 1 << 16, 1 << 29, 1 << 30, 1 << 31
_PSE, _PAE, _LA57, _SMEP, _SMAP, _PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
_LME, _LMA, _NXE = 1 << 8, 1 << 10, 1 << 11

# What a role depends on: all sums of these are tried.
_ROLE_BITS = ((_PE, _PG, _WP), (_PSE, _PAE, _LA57, _SMEP, _SMAP, _PKE), (_LME, _LMA, _NXE))
_NAMES = ("CR0", "CR4", "EFER")

_KERNEL_CODE, _USER_CODE, _LIST = 0x0000, 0x1000, 0x2000
_ROOTS = (0x5000, 0x8000)
_PAE_ROOTS = (0xB000, 0xC000)
_PATHS = 0x10000
_LARGE = 2 << 20
_RAM = 4 << 20
_RFLAGS = 0x3002  # IOPL 3

_OUT = bytes.fromhex("e610")  # out 0x10, al
_READ_ALL = bytes.fromhex(
    "488b37"  #   again: mov rsi, [rdi]
    "8a06"  #            mov al, [rsi]
    "4883c708"  #        add rdi, 8
    "ffc9"  #            dec ecx
    "75f3"  #            jnz again
    "e610"  #            out 0x10, al          13 bytes before it: -13 = 0xf3
)

_P, _W, _U, _A, _D, _PS, _NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63


def _sums(bits: Iterable[int]) -> list[int]:
    return [sum(chosen) for chosen in product(*[(0, bit) for bit in bits])]


def _say(regs: Regs) -> str:
    return ", ".join(f"{name} {value:#x}" for name, value in zip(_NAMES, regs, strict=True))


def _words(pages: Iterable[Page]) -> str:
    return " ".join(f"{gfn:#x}:{word:#x}" for gfn, word in pages) or "nothing"


# ------------------------------------------------------------------------------------------------- the guest


class _Guest:
    # A VM with one vCPU, and a trace of the tables that KVM gets for it.
    def __init__(self) -> None:
        import threading
        from contextlib import ExitStack

        from ..host import Mapping
        from ..kvm import Kvm
        from ..kvm.system import vendor_module
        from .tracefs import Tracefs

        self._stack = ExitStack()
        enter = self._stack.enter_context
        try:
            tracefs, kvm = enter(Tracefs()), enter(Kvm())
            self.ram = enter(Mapping(None, _RAM))
            self.ram.advise("nohugepage")
            self._other = enter(Mapping(None, 4096))
            self.vm = enter(kvm.create_vm())
            self.vm.set_user_memory_region(0, 0, self.ram)
            self.vm.ioctl("KVM_SET_NR_MMU_PAGES", 1024)  # so little RAM gives 64, and KVM would zap the oldest
            self.vcpu = enter(self.vm.create_vcpu())
            cpuid = kvm.supported_cpuid_table()
            self.vcpu.set_cpuid2(cpuid)
            self.tdp_role = _tdp_role(vendor_module() or "", cpuid)
            self.trace = enter(
                tracefs.instance([_GET_PAGE, _EXIT], [threading.get_native_id()], follow=False, overwrite=False)
            )
        except BaseException:
            self._stack.close()
            raise
        self._kept = ffi.new("struct kvm_sregs *")
        self._templates = {(cpl, is_long): self._template(cpl, is_long) for cpl in (0, 3) for is_long in (False, True)}
        self._regs = ffi.new("struct kvm_regs *", {"rip": _KERNEL_CODE, "rflags": _RFLAGS})
        self.ram.write(_KERNEL_CODE, _OUT)
        for start, pae in zip(_ROOTS, _PAE_ROOTS, strict=True):
            upper = _P | _W | _A
            self.write({start: start + 0x1000 | upper, start + 0x1000: start + 0x2000 | upper})
            self.write({start + 0x2000: upper | _D | _PS, pae: start + 0x2000 | _P})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def write(self, entries: dict[int, int]) -> None:
        # Page table entries, or what else has 8 bytes: gpa -> number.
        for gpa, entry in entries.items():
            self.ram.write(gpa, entry.to_bytes(8, "little"))

    def _template(self, cpl: int, is_long: bool) -> Any:
        sregs = ffi.new("struct kvm_sregs *")
        sregs[0] = self.vcpu.sregs[0]
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment, is_code = getattr(sregs, name), name == "cs"
            segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, (0x30 if is_code else 0x28) | cpl
            segment.type, segment.s, segment.dpl, segment.present = 11 if is_code else 3, 1, cpl, 1
            segment.db, segment.l, segment.g, segment.unusable = 1, 0, 1, 0
        sregs.cs.l, sregs.cs.db = is_long, not is_long
        return sregs

    def forget_tables(self) -> None:
        # A memslot that goes takes all shadow pages with it.
        self.vm.set_user_memory_region(1, _RAM, self._other)
        self.vm.delete_memory_region(1)

    def put(self, regs: Regs, cr3: int, cpl: int = 0) -> Regs | None:
        # KVM_SET_SREGS: what KVM keeps of CR0, CR4, EFER; None where it refuses.
        sregs, kept, fd = self._templates[cpl, bool(regs[2] & _LMA)], self._kept, self.vcpu.fd
        sregs.cr0, sregs.cr4, sregs.efer = regs
        sregs.cr3 = cr3
        if lib.kvm_set_sregs(fd, sregs) < 0:
            return None
        lib.kvm_get_sregs(fd, kept)
        return kept.cr0, kept.cr4, kept.efer

    def run(self, **regs: int) -> int:
        # Runs to the `out` with these registers; by how many exits.  kvm_pvm shuts a vCPU down once after it dropped
        # CR0.PG, and takes it as it is from then on.
        state = ffi.new("struct kvm_regs *", {"rflags": _RFLAGS, **regs}) if regs else self._regs
        for nr in (1, 2):
            lib.kvm_set_regs(self.vcpu.fd, state)
            if isinstance(self.vcpu.run(10), IoOut):
                return nr
        return 2

    def seen(self, runs: list[int]) -> tuple[list[list[Page]], str | None]:
        # The pages that KVM got in each of these cases, of so many exits each; and what is wrong with the trace.
        records = self.trace.read()
        lost = self.trace.lost.total
        cases: list[list[Page]] = [[] for _ in runs]
        left = list(runs)
        at = 0
        for record in records:
            if at == len(cases):
                return cases, "an event behind the last exit"
            if record.event == _GET_PAGE:
                cases[at].append((record["gfn"], record["role"]))  # type: ignore[arg-type]  # both are ints
            elif record["errno"] != -errno.EINTR:  # an interrupted KVM_RUN is no exit
                left[at] -= 1
                at += not left[at]
        if lost or at != len(cases):
            return cases, f"{lost} events lost by the trace buffer, {len(cases) - at} cases without their exits"
        return cases, None


def _tdp_differ(root: PageRole, pages: Iterable[Page]) -> list[str]:
    # Those of the tables that cannot be in the tree of this root of EPT or NPT: a role and a frame for each level.
    differ = []
    roles = {root.level: root}
    while min(roles) > 1:
        roles[min(roles) - 1] = tdp_child_role(roles[min(roles)])
    for gfn, word in pages:
        ours = roles.get(word & 0xF)
        if ours is None or ours.word != word:
            differ.append(
                f"{_words([(gfn, word)])}: the model has {_words([(gfn, role.word) for role in roles.values()])}"
            )
        elif gfn != (gfn_round_for_level(gfn, ours.level + 1) if ours != root else 0):
            differ.append(f"{_words([(gfn, word)])}: no table of this level begins at that frame")
    return differ


def _tdp_role(vendor: str, cpuid: Any) -> PageRole | None:
    # The role of the root of EPT or NPT where this KVM uses it; None where it shadows.
    from ..arch.cpuid import max_phys_bits

    which = {"kvm_intel": "ept", "kvm_amd": "npt"}.get(vendor)
    if which is None or _parameter(vendor, which) not in ("Y", "1"):
        return None
    ad_enabled = vendor == "kvm_amd" or _parameter(vendor, "eptad") in ("Y", "1")
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        is_5level = " la57" in file.read()
    forced = 5 if is_5level and vendor == "kvm_amd" else None
    return tdp_root_role(
        tdp_level(max_phys_bits(cpuid), max_level=5 if is_5level else 4, forced=forced), ad_enabled=ad_enabled
    )


def _parameter(module: str, name: str) -> str:
    try:
        with open(f"/sys/module/{module}/parameters/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


# ------------------------------------------------------------------------------------------------- the roots


def _bases() -> Iterator[Regs]:
    yield from product(*[_sums(bits) for bits in _ROLE_BITS])


def _others(accepted: list[Regs], *, every: bool) -> Iterator[Regs]:
    # With one other bit of the three registers; unless `every`, those without paging with none of EFER's and CR4's.
    for which, bits in enumerate(_ROLE_BITS):
        for bit in [1 << bit for bit in range(64) if 1 << bit not in bits]:
            for regs in accepted:
                if every or regs[0] & _PG or (which == 0 and regs[1] in (0, _PAE)):
                    cr0, cr4, efer = [value | (bit if at == which else 0) for at, value in enumerate(regs)]
                    yield cr0, cr4, efer


def _legal(*, all_pairs: bool) -> Iterator[tuple[Regs, list[int]]]:
    # Those of check_legal: sums of some bits, and what else CR4 is given.
    others = cr4_sets(all_pairs=all_pairs)
    for cr0, pae, efer in product(_sums((_PE, _PG, _WP, _NW, _CD)), (0, _PAE), _sums((_LME, _LMA, _NXE))):
        yield (cr0, pae, efer), others


@check("page roles of roots", "kvmmmu:kvm_mmu_get_page", cases=_NAMED, slow=_ALL)
def check_role(tally: Tally, cases: int) -> None:
    """The roots of every CR0, CR4 and EFER that this host takes, of these: all sums of the bits that a role depends on;
    those with every single other bit of the three registers; and those of `check_legal`, with every single and every
    pair of CR4's bits.

    `cases` 1: pairs of the bits of CR4 that have a name, other bits of EFER and CR4 with paging only; from 2: all.
    """
    with _Guest() as guest:
        run = _Run(tally, guest)
        accepted = [regs for regs in _bases() if run.case(regs)]
        for regs in _others(accepted, every=cases >= _ALL):
            run.case(regs)
        for base, others in _legal(all_pairs=cases >= _ALL):
            if run.case(base):
                for other in others:
                    run.case((base[0], base[1] | other, base[2]))
        run.compare()
        run.say_what_was_lacking()


class _Run:
    # The cases of one check_role: done, then compared by the chunk.
    def __init__(self, tally: Tally, guest: _Guest) -> None:
        self.tally, self.guest = tally, guest
        self.nr = 0
        self.paging: set[str] = set()
        self._waiting: list[tuple[Regs, Regs, int]] = []  # what was asked for, what KVM kept, CR3
        self._runs: list[int] = []

    def case(self, regs: Regs) -> bool:
        # Whether KVM takes these registers; runs the guest where it does.  CR3 alternates, so that roots are got anew.
        self.nr += 1
        is_pae = regs[0] & _PG and regs[1] & _PAE and not regs[2] & _LMA
        cr3 = (_PAE_ROOTS if is_pae else _ROOTS)[self.nr & 1]
        kept = self.guest.put(regs, cr3)
        if kept is None:
            return False
        self._runs.append(self.guest.run(rip=_KERNEL_CODE))
        self._waiting.append((regs, kept, cr3))
        if len(self._runs) == _CHUNK:
            self.compare()
        return True

    def compare(self) -> None:
        seen, wrong = self.guest.seen(self._runs)
        tdp_role = self.guest.tdp_role
        differ: list[str] = []
        compared = 0
        for (asked, kept, cr3), pages in zip(self._waiting, seen, strict=True):
            cpu_role = calc_cpu_role(*kept)
            self.paging.add(f"{cpu_role.base.level}-level" if cpu_role.base.level else "no")
            if tdp_role is not None:
                # The root stays; only what KVM makes anew is seen.
                compared += len(pages)
                differ += [f"{_say(kept)}: {text}" for text in _tdp_differ(tdp_role, pages)]
                continue
            compared += 1
            roots = self._roots(cpu_role, cr3)
            # Where CPL 0 runs on the processor, tables below the roots follow.
            if tuple(pages[: max(len(roots), 1)]) != roots:
                where = f"{_say(asked)}" + (f" (kept: {_say(kept)})" if kept != asked else "")
                differ.append(f"{where}: {self.tally.model} says {_words(roots)}, the trace {_words(pages)}")
        self.tally.count(compared, differ)
        if wrong:
            self.tally.break_off(wrong)
        self._runs, self._waiting = [], []

    def _roots(self, cpu_role: CpuRole, cr3: int) -> tuple[Page, ...]:
        pdptrs = [0, 0, 0, 0]
        if cpu_role.base.level == 3:
            pdptrs = [int.from_bytes(self.guest.ram.read(cr3 + 8 * at, 8), "little") for at in range(4)]
        roots = root_pages(cpu_role, shadow_root_role(cpu_role), cr3 >> 12, pdptrs)
        return tuple([(gfn, role.word) for _, gfn, role in roots])

    def say_what_was_lacking(self) -> None:
        if self.guest.tdp_role is not None:
            self.tally.lack("roles by CR0, CR4 and EFER: EPT or NPT has one root for all of them; by hand only")
            return
        unseen = [f"{name} paging" for name in ("2-level", "3-level", "4-level", "5-level") if name not in self.paging]
        if unseen:
            self.tally.lack(f"roles of {', '.join(unseen)}: this host takes no such registers; by hand only")
        self.tally.lack(
            "extended roles, and roles in SMM and of nested guests: no event on this host has them; by hand only"
        )


# ------------------------------------------------------------------------------------------------- the children


class _Path(Value):
    # An address, and the entries it goes through from the root down; the table of each, as a frame.
    gva: int
    entries: tuple[int, ...]
    tables: tuple[int, ...]


class _Paths:
    # Page tables with a path for every sum of W and NX at three levels, all for the user; below each a table of 4 KiB
    # pages, and beside it large pages with every sum of W, NX and D.
    def __init__(self, nx: bool) -> None:
        self.entries: dict[int, int] = {}
        self.paths: list[_Path] = []
        self._next = _PATHS + 0x1000
        rights = _sums((_W, _NX)) if nx else [0, _W]
        base = _P | _U | _A
        for first, top in enumerate(rights):
            pdpt = self._table(_PATHS + 8 * first, base | top)
            for second, middle in enumerate(rights):
                pd = self._table(pdpt + 8 * second, base | middle)
                at = (first << 39) + (second << 30)
                for third, low in enumerate(rights):
                    table = self._table(pd + 8 * third, base | low)
                    self.entries[table] = _USER_CODE | base
                    self._add(at + (third << 21), (_PATHS, pdpt, pd, table))
                for third, low in enumerate(_sums((_W, _D, _NX) if nx else (_W, _D)), len(rights)):
                    self.entries[pd + 8 * third] = _LARGE | base | low | _PS
                    self._add(at + (third << 21), (_PATHS, pdpt, pd))
        # The code and its list, by paths of their own: everything allowed.
        pdpt = self._table(_PATHS + 8 * 8, base | _W)
        pd = self._table(pdpt, base | _W)
        table = self._table(pd, base | _W)
        self.entries |= {table + (gpa >> 9): gpa | base | _W | _D for gpa in range(_USER_CODE, _PATHS, 0x1000)}
        self.code = self._path((8 << 39) + _USER_CODE, (_PATHS, pdpt, pd, table))
        self.list = (8 << 39) + _LIST

    def _table(self, at: int, bits: int) -> int:
        table = self._next
        self._next += 0x1000
        self.entries[at] = table | bits
        return table

    def _path(self, gva: int, tables: tuple[int, ...]) -> _Path:
        found = [self.entries[table + 8 * (gva >> 39 - 9 * depth & 511)] for depth, table in enumerate(tables)]
        return _Path(gva, tuple(found), tuple([table >> 12 for table in tables]))

    def _add(self, gva: int, tables: tuple[int, ...]) -> None:
        self.paths.append(self._path(gva, tables))


def _children(root: PageRole, path: _Path) -> Iterator[tuple[int, Page]]:
    # The tables that KVM gets below the root for a read of this path, each with where the guest's entry is.
    access, role = 7, root
    for depth, (entry, table) in enumerate(zip(path.entries, path.tables, strict=True)):
        access &= entry & (_W | _U) | (not entry >> 63)
        at = (table << 12) + 8 * (path.gva >> 39 - 9 * depth & 511)
        if depth + 1 < len(path.tables):
            role = child_role(role, access, False)
            yield at, (path.tables[depth + 1], role.word)
        elif entry & _PS:
            # Small pages behind a large one.  A read of what is not dirty does not make it writable.
            if not entry & _D:
                access &= ~_W
            yield at, (_LARGE >> 12, child_role(role, access, True).word)


@check("page roles of tables", "kvmmmu:kvm_mmu_get_page", cases=1)
def check_role_children(tally: Tally, _cases: int) -> None:
    """The tables below the root, for all sums of CR0.WP, CR4.{PSE,SMEP,SMAP,PKE} and EFER.NXE that this host takes:
    every sum of W and (with EFER.NXE) NX at three levels, over small pages, and large ones of every sum of W, NX, D.
    """
    with _Guest() as guest:
        guest.ram.write(_USER_CODE, _READ_ALL)
        paths = {nx: _Paths(nx) for nx in (False, True)}
        for nxe in (0, _NXE):
            here = paths[bool(nxe)]
            guest.ram.write(_PATHS, bytes(here._next - _PATHS))
            guest.write(here.entries)
            guest.write({_LIST + 8 * at: path.gva for at, path in enumerate(here.paths)})
            for wp, cr4 in product((0, _WP), _sums((_PSE, _SMEP, _SMAP, _PKE))):
                regs = _PE | _PG | wp, _PAE | cr4, _LME | _LMA | nxe
                guest.forget_tables()
                if guest.put(regs, _PATHS, cpl=3) == regs:
                    _compare_children(tally, guest, regs, here)
                if tally.mismatches:
                    return


def _compare_children(tally: Tally, guest: _Guest, regs: Regs, here: _Paths) -> None:
    runs = guest.run(rip=here.code.gva, rdi=here.list, rcx=len(here.paths))
    (seen,), wrong = guest.seen([runs])
    if guest.tdp_role is not None:
        tally.count(len(seen), [f"{_say(regs)}: {text}" for text in _tdp_differ(guest.tdp_role, seen)])
    else:
        root = shadow_root_role(calc_cpu_role(*regs))
        # A table is got once for each entry that leads to it.
        links: dict[int, Page] = {}
        for path in (here.code, *here.paths):
            links |= dict(_children(root, path))
        expected = [(_PATHS >> 12, root.word), *links.values()]
        differ = [
            f"{_say(regs)}: table {at}: {tally.model} says {_words([ours])}, the trace {_words([theirs])}"
            for at, (ours, theirs) in enumerate(zip(expected, seen, strict=False))
            if ours != theirs
        ]
        tally.count(min(len(expected), len(seen)), differ)
        if len(expected) != len(seen):
            tally.break_off(f"{_say(regs)}: {len(seen)} tables in the trace, {len(expected)} by {tally.model}")
    if wrong:
        tally.break_off(wrong)
