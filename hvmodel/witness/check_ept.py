"""The check of exit reasons and qualifications: what a processor with VMX writes in the VMCS of a guest we know.

The trace event `kvm:kvm_exit` carries the exit reason and, as info1, the qualification.  The guest does I/O with every
size, direction and encoding of the port, and then reads, writes and executes pages that no EPT entry maps yet.
"""

from __future__ import annotations

from ..mmu.ept import EptAccess, ept_access
from ..mmu.exit_reason import EXIT_REASONS, exit_reason_number
from ..mmu.qualification import decode_qualification
from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..machine import Machine
    from .result import Tally

__all__ = ["check_ept", "compare", "expected_io", "run_guest"]

_ISA_VMX = 1  # KVM_ISA_VMX, arch/x86/kvm/trace.h@v6.18
_MANUAL = "manual only: the tests hold entries, EPTP, violations and qualifications against the manual's tables"
_COMPARED = 0x1BF  # of an EPT violation's qualification: bits 8:0 but for 6, which is undefined without MBEC

_EVENTS = ("kvm:kvm_exit", "kvm:kvm_page_fault")
_PORT = 0xE9
_PAGES = 0x10000  # the pages touched: one read, one written, one executed

# Instructions, and what their exits must say: the fields of an I/O instruction's qualification.
_INSTRUCTIONS: tuple[tuple[str, dict[str, int]], ...] = (
    ("e6e9", {"size": 0, "in": 0, "immediate": 1}),  # out 0xe9, al
    ("e7e9", {"size": 1, "in": 0, "immediate": 1}),  # out 0xe9, ax
    ("66e7e9", {"size": 3, "in": 0, "immediate": 1}),  # out 0xe9, eax
    ("ee", {"size": 0, "in": 0, "immediate": 0}),  # out dx, al
    ("ef", {"size": 1, "in": 0, "immediate": 0}),
    ("66ef", {"size": 3, "in": 0, "immediate": 0}),
    ("e4e9", {"size": 0, "in": 1, "immediate": 1}),  # in al, 0xe9
    ("e5e9", {"size": 1, "in": 1, "immediate": 1}),
    ("66e5e9", {"size": 3, "in": 1, "immediate": 1}),
    ("ec", {"size": 0, "in": 1, "immediate": 0}),
    ("ed", {"size": 1, "in": 1, "immediate": 0}),
    ("66ed", {"size": 3, "in": 1, "immediate": 0}),
)
# mov ax, 0x1000; mov ds, ax; mov al, [0]; mov ax, 0x1100; mov ds, ax; mov [0], al; call far 0x1200:0; hlt
_TOUCH = "b80010 8ed8 a00000 b80011 8ed8 a20000 9a00000012 f4"
_TOUCHED = {_PAGES: "read", _PAGES + 0x1000: "write", _PAGES + 0x2000: "fetch"}


def expected_io() -> list[dict[str, int]]:
    """The qualification fields of the guest's I/O instructions, in the order in which it runs them."""
    return [{"port": _PORT, "string": 0, "rep": 0, **fields} for _, fields in _INSTRUCTIONS]


def _number(values: Mapping[str, object], name: str) -> int:
    value = values[name]
    if not isinstance(value, int):
        raise Lacking(f"kvm:kvm_exit with a number as {name}; it is {value!r}; {_MANUAL}")
    return value


def compare(tally: Tally, exits: Iterable[tuple[int, int, int]]) -> None:
    """Compare exits (reason, qualification, guest-physical address or -1) with what the guest did.

    The model's side of an EPT violation is the qualification of an access by an entry that is not present; of it, bits
    8:7 and 5:0 count, for the rest depends on the processor.  Each page must have been seen.
    """
    io = exit_reason_number("IO_INSTRUCTION")
    violation = exit_reason_number("EPT_VIOLATION")
    expected = expected_io()
    seen, touched = 0, set()
    for reason, qualification, gpa in exits:
        if reason == io:
            if seen < len(expected):
                said = decode_qualification(reason, qualification)
                fields = expected[seen]
                tally.compare(f"I/O instruction {seen}", {name: said[name] for name in fields}, fields)
                tally.compare(f"I/O instruction {seen}: problems", said.problems, ())
            seen += 1
        elif reason == violation and gpa & ~0xFFF in _TOUCHED:
            kind = _TOUCHED[gpa & ~0xFFF]
            ours = ept_access(((4, 0),), gpa, EptAccess(kind)).qualification or 0
            tally.compare(f"EPT violation, {kind} of {gpa:#x}", ours & _COMPARED, qualification & _COMPARED)
            touched.add(kind)
        else:
            tally.compare(f"reason {reason} is known", reason in EXIT_REASONS, True)
    tally.compare("I/O instructions seen", seen, len(expected))
    tally.compare("pages touched", sorted(touched), sorted(_TOUCHED.values()))


def run_guest(machine: Machine) -> list[object]:
    """Run the guest in a fresh machine of 1 MiB to its HLT; its exits."""
    from ..kvm import Hlt, IoIn

    machine.load(0x7C00, bytes.fromhex("bae900" + "".join(code for code, _ in _INSTRUCTIONS) + _TOUCH))
    machine.load(_PAGES + 0x2000, bytes.fromhex("cb"))  # retf
    machine.vcpu.real_mode(entry=0x7C00, sp=0x7000)
    seen: list[object] = []
    for exit in machine.exits(timeout=10):
        seen.append(exit)
        if isinstance(exit, IoIn):
            machine.answer(bytes(exit.size))
        elif isinstance(exit, Hlt):
            break
    return seen


@check("exit reasons, qualifications, EPT violations", "kvm:kvm_exit of a guest under VMX", cases=1)
def check_ept(tally: Tally, cases: int) -> None:
    """A guest whose exits are known, `cases` times, each in a fresh VM."""
    from pathlib import Path

    if not Path("/sys/module/kvm_intel").exists():
        raise Lacking(f"no VMX on this host: kvm_intel is not loaded; {_MANUAL}")
    from ..machine import Machine
    from .tracefs import Tracefs

    for _ in range(cases):
        with Tracefs() as tracefs, Machine(ram="1M") as machine, tracefs.instance(_EVENTS) as trace:
            run_guest(machine)
            exits: list[tuple[int, int, int]] = []
            for record in trace.read():
                values = record.values
                if record.event == "kvm:kvm_exit":
                    if values["isa"] != _ISA_VMX:
                        raise Lacking(f"no VMX: kvm_exit says isa {values['isa']!r}; {_MANUAL}")
                    exits.append((_number(values, "exit_reason") & 0xFFFF, _number(values, "info1"), -1))
                elif exits:  # kvm:kvm_page_fault, which tells the address of the exit before it
                    exits[-1] = (*exits[-1][:2], _number(values, "fault_address"))
            lost = trace.lost.total
        if lost:
            tally.break_off(f"{lost} events lost")
            return
        compare(tally, exits)
