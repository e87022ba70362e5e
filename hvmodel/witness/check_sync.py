"""The check of the synchronisation: which ioctls a vCPU gets, in which order, in ours and in QEMU, both under strace.

QEMU is started with -accel kvm, stopped; its monitor makes it get the state (info registers), run (cont) and reset
(system_reset).  Then a process of ours does the same to a vCPU with the same CPUID features, as far as they decide
which MSRs there are.  What is compared is the calls on the vCPU's descriptor, one by one, those of MSRs with their
number, which is what the kernel returns.

Events of QEMU and the levels: the start puts FULL, then, as a part of its first reset, RESET with the APIC; cont puts
RUNTIME, system_reset RESET.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..errors import HvError
from ..value import Value
from .qemu import Qemu
from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kvm import CpuidEntry, Vcpu, Vm
    from .result import Tally

    Calls = list[tuple[str, int]]

__all__ = ["VARIANTS", "Variant", "check_sync", "our_events", "perform", "qemu_events"]

_STRACE = ("strace", "-f", "-e", "trace=ioctl,write", "-o")
_PARTS = "VCPU_EVENTS|MP_STATE|REGS|XSAVE2?|XCRS|SREGS2?|MSRS|LAPIC|DEBUGREGS|NESTED_STATE|FPU|TSC_KHZ"
_CALL = re.compile(rf"ioctl\((\d+), (KVM_(?:GET|SET)_(?:{_PARTS})|KVM_CREATE_VCPU|KVM_SET_CPUID2|KVM_RUN)\b.*= (-?\d+)")
_MARK = re.compile(r'write\(\d+, "event (\w+)')
_PATIENCE = 20.0  # seconds for an event of QEMU's to be seen

# Bits of CPUID 0x40000001.EAX as "-cpu qemu64" has them with KVM (qemu:target/i386/kvm/kvm-cpu.c
# kvm_default_props@v7.2): kvmclock, nopiodelay, kvmclock, asyncpf, steal-time, pv-eoi, stable clock.
_CLOCK, _ASYNC_PF, _STEAL, _PV_EOI, _ASYNC_PF_INT, _POLL = 1 << 0 | 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 14, 1 << 12
_DEFAULT = _CLOCK | 1 << 1 | _ASYNC_PF | _STEAL | _PV_EOI | 1 << 24
_CPUID = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
_NR_BANKS = 10  # machine-check banks of QEMU's CPUs (MCE_BANKS_DEF)


class Variant(Value):
    """A model of a CPU: QEMU's -cpu, the paravirtual features that it then has, and whether it has MTRRs."""

    cpu: str
    paravirt: int
    mtrr: bool = True


VARIANTS = (
    Variant("qemu64", _DEFAULT),
    Variant("qemu64,-mtrr", _DEFAULT, mtrr=False),
    Variant("qemu64,kvm-asyncpf-int=on,kvm-poll-control=on", _DEFAULT | _ASYNC_PF_INT | _POLL),
    Variant("qemu64,kvm-pv-eoi=off", _DEFAULT & ~_PV_EOI),
    Variant("qemu64,kvm-asyncpf=off,kvm-steal-time=off", _DEFAULT & ~(_ASYNC_PF | _STEAL)),
)


def _lines(text: str) -> list[str]:
    # Of a trace, calls that another thread interrupted put together: "… <unfinished ...>", "<... ioctl resumed>…".
    begun: dict[str, str] = {}
    found = []
    for line in text.splitlines():
        thread = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif " resumed>" in line:
            found.append(begun.pop(thread, "") + line.partition(" resumed>")[2])
        else:
            found.append(line)
    return found


def _calls(lines: list[str], fd: int) -> Calls:
    # The calls on the vCPU in a piece of a trace, up to KVM_RUN; of MSRs with what the kernel returned.
    found: Calls = []
    for line in lines:
        seen = _CALL.search(line)
        if seen is None or int(seen[1]) != fd:
            continue
        if seen[2] == "KVM_RUN":
            break
        result = int(seen[3])
        found.append((seen[2], result if seen[2].endswith("MSRS") else min(result, 0)))
    return found


class _Trace:
    # The file that strace writes, from one event to the next.
    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0

    def skip(self) -> None:
        # What was written up to now is no event's.
        self.at = len(self._all())

    def _all(self) -> list[str]:
        return _lines(self.path.read_text().rpartition("\n")[0])

    def until(self, call: str, count: int = 1) -> list[str]:
        # What was written since the last time, up to the last of so many calls of this name.
        end = time.monotonic() + _PATIENCE
        while True:
            lines = self._all()[self.at :]
            places = [at for at, line in enumerate(lines) if f", {call}, " in line and ") " in line]
            if len(places) >= count:
                last = places[count - 1] + 1
                self.at += last
                return lines[:last]
            if time.monotonic() > end:
                raise HvError(f"strace of QEMU: no {call} within {_PATIENCE:g} s")
            time.sleep(0.02)


def qemu_events(cpu: str) -> dict[str, Calls]:
    """What QEMU calls on its vCPU at each event: full, first_get, reset, get, run, get_after, second_reset.

    Lacking: QEMU, strace or /dev/kvm is not there.  QemuError: QEMU refuses `cpu`.
    """
    if shutil.which("strace") is None:
        raise Lacking("strace is not installed")
    with tempfile.TemporaryDirectory(prefix="sync-") as directory:
        path = Path(directory, "trace")
        path.touch()
        trace = _Trace(path)
        with Qemu("-cpu", cpu, "-m", "16", accel="kvm", prefix=(*_STRACE, str(path))) as qemu:
            # The start is over when the monitor answers; what comes then is the event's.
            start = trace.until("KVM_SET_DEBUGREGS", 2)
            fd = _vcpu_fd(start)
            begin = next(at for at, line in enumerate(start) if ", KVM_SET_CPUID2, " in line)
            found = _split_start(_calls(start[begin:], fd))
            qemu.monitor("info registers")
            found["get"] = _calls(trace.until("KVM_GET_DEBUGREGS"), fd)
            qemu.execute("cont")
            found["run"] = _calls(trace.until("KVM_RUN"), fd)
            qemu.execute("stop")
            trace.skip()
            qemu.monitor("info registers")
            found["get_after"] = _calls(trace.until("KVM_GET_DEBUGREGS"), fd)
            qemu.reset()
            found["second_reset"] = _calls(trace.until("KVM_SET_DEBUGREGS"), fd)
    return found


def _vcpu_fd(lines: list[str]) -> int:
    for line in lines:
        seen = _CALL.search(line)
        if seen is not None and seen[2] == "KVM_CREATE_VCPU":
            return int(seen[3])
    raise HvError("strace: no KVM_CREATE_VCPU")


def _split_start(calls: Calls) -> dict[str, Calls]:
    # KVM_SET_MSRS of what never changes; FULL; a get; RESET.
    calls = calls[next(at for at, (name, _) in enumerate(calls) if name.startswith("KVM_SET_SREGS")) :]
    gets = [at for at, (name, _) in enumerate(calls) if name.startswith("KVM_GET_") and name != "KVM_GET_TSC_KHZ"]
    first, last = gets[0], gets[-1] + 1
    return {"full": calls[:first], "first_get": calls[first:last], "reset": calls[last:]}


def our_events(variant: Variant) -> dict[str, Calls]:
    """What hvmodel calls on a vCPU at the same events, in a process of its own under strace."""
    program = f"from hvmodel.witness.check_sync import VARIANTS, perform; perform(VARIANTS[{VARIANTS.index(variant)}])"
    with tempfile.TemporaryDirectory(prefix="sync-") as directory:
        path = Path(directory, "trace")
        done = subprocess.run(
            [*_STRACE, str(path), sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if done.returncode != 0:
            raise HvError(f"our process under strace ended with status {done.returncode}: {done.stderr[-2000:]}")
        text = path.read_text()
    fd = _vcpu_fd(_lines(text))
    pieces = _MARK.split(text)
    return {name: _calls(_lines(piece), fd) for name, piece in zip(pieces[1::2], pieces[2::2], strict=True)}


def perform(variant: Variant) -> None:
    """Make a vCPU of this variant and bring about the events, each announced by a write to /dev/null."""
    from ..host import Mapping
    from ..kvm import Kvm
    from ..state.sync import synchronizer

    with (
        open("/dev/null", "wb", buffering=0) as marks,
        Mapping(None, 1 << 20) as ram,
        Kvm() as kvm,
        kvm.create_vm() as vm,
    ):
        vcpu, entries = _make_vcpu(vm, variant, ram)
        sync = synchronizer(vcpu, cpuid=entries)
        sync._has()  # asks for what decides which MSRs there are
        rows: tuple[tuple[str, tuple[Callable[[], object], ...]], ...] = (
            ("first_get", (sync.synchronize_state,)),
            ("full", (sync.synchronize_post_init,)),
            ("get", (sync.synchronize_state,)),
            ("reset", (sync.put_apic, sync.synchronize_post_reset)),
            ("again", (sync.synchronize_state,)),
            ("run", (lambda: vcpu.run(0.01),)),
            ("end", ()),
        )
        for name, steps in rows:
            marks.write(f"event {name}\n".encode())
            for step in steps:
                step()


def _make_vcpu(vm: Vm, variant: Variant, ram: object) -> tuple[Vcpu, list[CpuidEntry]]:
    from ..kvm import CpuidEntry

    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    entries = []
    for row in vm.kvm.supported_cpuid():
        changes: dict[str, int] = {}
        if row.function == 1:  # without VMX and SMX; MTRR
            changes = {"ecx": row.ecx & ~(1 << 5 | 1 << 6), "edx": row.edx & ~(1 << 12) | variant.mtrr << 12}
        elif row.function == 7 and row.index == 0:  # without SGX, PT, SGX_LC
            changes = {"ebx": row.ebx & ~(1 << 2 | 1 << 25), "ecx": row.ecx & ~(1 << 30)}
        elif row.function == 0xA:  # without a PMU
            changes = {"eax": 0}
        elif row.function == 0xD and row.index == 1:  # without XFD
            changes = {"eax": row.eax & ~(1 << 4)}
        elif row.function == 0x40000001:
            changes = {"eax": variant.paravirt}
        entries.append(CpuidEntry(**{name: changes.get(name, getattr(row, name)) for name in _CPUID}))
    vcpu.set_cpuid2(entries)
    vcpu.ioctl("KVM_X86_SETUP_MCE", 1 << 8 | _NR_BANKS)  # MCG_CTL_P
    vm.set_user_memory_region(0, 0, ram)  # type: ignore[arg-type]  # a Mapping
    return vcpu, entries


@check("synchronisation", "QEMU under strace", cases=2, slow=len(VARIANTS))
def check_sync(tally: Tally, cases: int) -> None:
    """Which ioctls on a vCPU, in which order and with how many MSRs, at each event, for `cases` models of CPUs."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise Lacking("/dev/kvm cannot be opened")
    for variant in VARIANTS[:cases]:
        theirs, ours = qemu_events(variant.cpu), our_events(variant)
        for event, as_ours in (
            ("full", "full"),
            ("first_get", "first_get"),
            ("reset", "reset"),
            ("get", "get"),
            ("run", "run"),
            ("get_after", "get"),
            ("second_reset", "reset"),
        ):
            _compare(tally, f"{variant.cpu}, {event}", ours[as_ours], theirs[event])
    tally.lack("QEMU's put of a loaded state (loadvm): it is that of the start, FULL")


def _compare(tally: Tally, case: str, ours: Calls, theirs: Calls) -> None:
    # Call by call, and then whether one has more.
    for at, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        tally.compare(f"{case}, call {at}", mine, other)
    tally.compare(f"{case}, calls", len(ours), len(theirs))
