"""Records what the running kernel does with random guest programs: tests/mmu/shadow_programs.json.gz.

    python -m tests.mmu.record_shadow [CANDIDATES]

It needs root, tracefs and a KVM with shadow paging.  Of CANDIDATES programs (default 200) those are kept that let the
simulator execute lines that none before did.  What is written is the kernel's: its trace, error codes and addresses of
MMIO, with the memory, the host's frames and the steps that led to them.  Frames that were there at the beginning are
written as FRAMES + gfn.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from hvmodel.mmu import shadow_page, shadow_roots, shadow_tree, simulate
from hvmodel.mmu.masks import ShadowMasks
from hvmodel.mmu.simulate import ShadowMmu
from hvmodel.witness.check_simulator import ShadowLab, _theirs
from hvmodel.witness.shadow_program import SLOTS, Program, Registers

FILE = Path(__file__).with_name("shadow_programs.json.gz")
FRAMES = 1 << 30
_ADDRESS = (1 << 52) - 4096
_TABLES = [(0x1000, 0x5000), (SLOTS[0][0], SLOTS[0][0] + 96 * 4096)]
_TABLES += [(SLOTS[slot][0] + 200 * 4096, SLOTS[slot][0] + 202 * 4096) for slot in (1, 2)]


class _Recorder(ShadowLab):
    # A lab that keeps how things were when the program's steps began.
    before: dict[str, Any]

    def new_mmu(self, registers: Registers) -> ShadowMmu:
        mmu = super().new_mmu(registers)
        words = []
        for start, end in _TABLES:
            data = self.memory.get(start, end - start)
            assert data is not None
            found = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
            words += [[start + 8 * at, word] for at, word in enumerate(found) if word]
        absent = [gfn for at, (gpa, size, *_) in enumerate(SLOTS) for gfn in range(gpa >> 12, gpa + size >> 12)]
        absent = [gfn for gfn in absent if gfn not in self.host.frames]
        self.frames = dict(self.host.frames)
        self.before = {
            "registers": [registers.cr3, registers.cr0, registers.cr4, registers.efer],
            "memory": words,
            "absent": _ranges(absent),
            "huge": sorted(self.host.huge_ranges),
            "hvas": [slot.hva & (1 << 30) - 1 for slot in mmu.slots],
        }
        return mmu


def _ranges(numbers: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found


def _frame(frames: dict[int, int], gfn: int, pfn: int) -> int:
    return FRAMES + gfn if frames.get(gfn) == pfn else pfn


def _event(frames: dict[int, int], event: Any) -> list[Any] | None:
    their = _theirs(event)
    if their is None:
        return None
    found = list(their)
    if found[0] == "set_spte":
        pfn = _frame(frames, found[1], (found[3] & _ADDRESS) >> 12)
        found[3] = found[3] & ~_ADDRESS | pfn << 12
    elif found[0] == "spte_requested":
        found[3] = _frame(frames, found[1], found[3])
    return found


def _lines(program: Any) -> set[tuple[str, int]]:
    # The lines of the simulator that making a program executes.
    files = {module.__file__ for module in (simulate, shadow_roots, shadow_tree, shadow_page)}
    found: set[tuple[str, int]] = set()

    def local(frame: Any, event: str, _: object) -> Any:
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename in files else None)
    try:
        program()
    finally:
        sys.settrace(None)
    return found


def record(candidates: int) -> None:
    """Write FILE."""
    kept: list[dict[str, Any]] = []
    seen: set[tuple[str, int]] = set()
    facts: dict[str, Any] = {}
    kernel = Path("/proc/sys/kernel/osrelease").read_text(encoding="ascii").strip()
    lab: _Recorder | None = None
    for seed in range(candidates):
        if seed % 32 == 0:
            if lab is not None:
                lab.close()
            lab = _Recorder()
            facts = {"masks": {name: getattr(lab.masks, name) for name in ShadowMasks.__match_args__}, **lab.facts}
        assert lab is not None
        made: list[Program] = []
        lines = _lines(lambda made=made, lab=lab, seed=seed: made.append(Program(seed, lab)))
        [program] = made
        before = lab.before
        outcomes = lab.run(program)
        if not lines - seen and len(kept) >= 8:
            continue
        seen |= lines
        steps = []
        for step in program.steps:
            fields = {
                name: getattr(step, name) for name in step.fields() if getattr(step, name) != step._defaults.get(name)
            }
            if step.registers is not None:
                registers = step.registers
                fields["registers"] = [registers.cr3, registers.cr0, registers.cr4, registers.efer]
            steps.append(fields)
        results = []
        for outcome in outcomes:
            events = [found for event in outcome.records if (found := _event(lab.frames, event)) is not None]
            fault = None if outcome.fault is None else outcome.fault.error_code
            results.append([fault, outcome.mmio[0][0] if outcome.mmio else None, events])
        logs = [sorted(log) for log in lab.logs]
        kept.append({"seed": seed, **before, "steps": steps, "results": results, "logs": logs})
    if lab is not None:
        lab.close()
    text = ",\n".join(json.dumps(program, separators=(",", ":")) for program in kept)
    whole = f'{{"kernel": "{kernel}", "facts": {json.dumps(facts)}, "programs": [\n{text}\n]}}\n'
    FILE.write_bytes(gzip.compress(whole.encode(), mtime=0))
    print(f"{len(kept)} programs, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    record(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
