"""Makes random public calls of all that has a vCPU's or VM's state: the words of the architecture, values of state,
get and put, registers, modes, events, debugging, QEMU's synchronisation.

    random_state_calls.py SEED NUMBER LIMIT DIRECTORY...      as random_calls.py, whose `main` runs it

The vCPUs are in any state meanwhile: at an exit that nobody has answered, shut down, closed, run by another thread, in
a child of fork.  A call that is refused leaves vCPU, RAM and breakpoints as they were.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import hvmodel as hv
import hvmodel.state as values
from hvmodel.arch.exceptions import ExceptionQueue
from hvmodel.arch.legal import SregsLimits
from hvmodel.arch.msr import Msr
from hvmodel.arch.paging import PageTables
from hvmodel.arch.registers import CR0, CR4, EFER
from hvmodel.arch.segment import Descriptor, Gate, Selector
from hvmodel.arch.tables import DescriptorTable, Idt, Ivt
from hvmodel.arch.vectors import Vector
from hvmodel.errors import HvError, UnansweredError
from hvmodel.kvm import CpuidEntry, Kvm, Vcpu, Vm
from hvmodel.machine.qualify import qualify
from hvmodel.state import (
    Component,
    CpuidTable,
    EventQueue,
    Msrs,
    NestedState,
    Record,
    Regs,
    Segment,
    Sregs,
    VcpuEvents,
    VcpuState,
    VmState,
    Xsave,
    events,
    refusals,
    sync,
)
from tests.need import lacking
from tests.random_calls import Broken, Kinds, Skip, World, main
from tests.random_calls import kind as kind_of

table: Kinds = {}
kind = partial(kind_of, table=table)

ENTRY = 0x1000
# IN and OUT, MMIO, an endless loop, HLT, INT3, steps, UD2, flags, INS, STI and HLT, CR0.PG.
GUESTS = [
    bytes.fromhex(code)
    for code in (
        *("ecee40ebfb", "8b07890781c3f10febf6", "ebfe", "f4", "ccf4", "9090909090ebf9", "0f0b", "9c9debfc"),
        *("f36cebfc", "fbf4", "66b8000000800f22c0ebfe"),
    )
]
WORDS = ("registers", "modes", "segment", "msr", "cpuid", "legal", "tables", "paging", "vectors", "exceptions")
REGISTERS = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r15", "rip", "rflags"]
PARTS = [row.name for row in values.vcpu_parts()]
RECORDS = [each for each in vars(values).values() if isinstance(each, type) and issubclass(each, Record)]
RECORDS.remove(Record)
WALL_CLOCK = (0x11, 0x4B564D00)  # writing these MSRs has KVM write the time to RAM: putting them back does too
END = 1 << 64
FIELDS = [
    *("regs", "regs.rip", "regs.", "regs.x", "sregs2.cs.base", "sregs2.cs", "sregs2.cr0", "sregs2.cr4", "sregs2.efer"),
    *("msrs[0x10]", "msrs[", "msrs[-1]", "msrs", "cpuid", "cpuid.eax", "xsave.fcw", "xsave.st", "tsc_khz"),
    *("tsc_khz.khz", "nested_state.flags", "lapic.regs", "events.nmi", "events.exception.nr", "xcrs.xcrs"),
    *("debugregs.db", "mp_state.mp_state", ".", "clock"),
]


def functions() -> list[Any]:
    """The public functions of hvmodel.arch."""
    found = []
    for word in WORDS:
        module = import_module(f"hvmodel.arch.{word}")
        found += [each for name in module.__all__ if inspect.isfunction(each := getattr(module, name))]
    return found


class StateWorld(World):
    def __init__(self, seed: int, directories: list[str]) -> None:
        super().__init__(seed, directories)
        self.functions = functions()
        self.queues = [ExceptionQueue()]
        self.tables = [PageTables(0x5000), PageTables(0x5000, "pae"), PageTables(0x5000, "32bit")]
        self.descriptors: list[Any] = [DescriptorTable(), Idt(16), Idt(32), Idt(64), Ivt()]
        self.records: list[Record] = [each() for each in RECORDS]
        self.states = [VcpuState(), VcpuState(regs=Regs(rip=ENTRY, rflags=2), msrs=Msrs({0x10: 5}))]
        self.vm_states = [VmState()]
        self.deep = 0  # whether this is called by another kind
        self.nonsense += [
            CR0.PG, CR4.PAE, EFER.LMA | EFER.LME, Vector.GP, Vector.DF, Msr.IA32_TSC, CR0, Regs(), Sregs(),
            VcpuEvents(), EventQueue.of(VcpuEvents()), SregsLimits(), SregsLimits(cr4_allowed=-1),
            {"cr0": 1 << 31}, {"cs": 3}, [(1,)], [(1, 0, 0, 0, 0, 0, 0)], bytes(8), b"\xff" * 16, "regs", "0x10",
            {"format": 1, "parts": {}}, *self.tables, *self.descriptors,
        ]  # fmt: skip
        if lacking("kvm") is None:
            self.kvms.append(Kvm())
            for _ in range(2):
                self.machines.append(self.fresh())
            closed = self.fresh()
            closed.close()
            self.nonsense += [closed, closed.vcpu, closed.vcpu.kvm]
            self.chips, self.plain = self.vm(chips=True), self.vm(chips=False)
            self.states += [VcpuState.get(each) for each in (self.machines[0].vcpu.kvm, *self.vcpus)]
            self.vm_states += [VmState.get(self.chips), VmState.get(self.plain)]

    @classmethod
    def warm(cls) -> None:
        if lacking("kvm") is None:
            qualify()

    def vm(self, *, chips: bool) -> Vm:
        vm = self.kvms[0].create_vm()
        self.vms.append(vm)
        vm.set_tss_addr(0xFFFBD000)
        if chips:
            vm.create_irqchip()
            vm.create_pit2()
        vcpu = vm.create_vcpu(0)
        self.vcpus.append(vcpu)
        if chips:
            vcpu.set_cpuid2(self.kvms[0].supported_cpuid())
        return vm

    def fresh(self) -> hv.Machine:
        machine = hv.Machine(self.rng.choice(["64K", "256K"]), unclaimed=self.rng.choice(["strict", "open_bus"]))
        machine.load(ENTRY, self.rng.choice(GUESTS))
        machine.vcpu.real_mode(entry=ENTRY)
        return machine

    # ---- picking ----

    def number(self) -> int:
        rng = self.rng
        return rng.choice([0, 1, 2, ENTRY, 0x7C00, rng.getrandbits(16), rng.getrandbits(32), rng.getrandbits(64),
                           1 << rng.randrange(64), END - 1])  # fmt: skip

    def flipped(self, data: bytes) -> bytes:
        """With some bits the other way round; at times truncated, or with more."""
        found = bytearray(data)
        for _ in range(self.rng.randrange(1, 4)):
            if found:
                found[self.rng.randrange(len(found))] ^= 1 << self.rng.randrange(8)
        draw = self.rng.random()
        if draw < 0.05:
            del found[self.rng.randrange(len(found) + 1) :]
        return bytes(found) + bytes(self.rng.randrange(64) if draw > 0.97 else 0)

    def vcpu(self) -> Any:
        """A machine's, or a Vcpu underneath, or one of a VM of its own."""
        cpus = [machine.vcpu for machine in self.machines]
        return self.rng.choice([*cpus, *cpus, *cpus, cpus[0].kvm, *self.vcpus])

    def cpu(self) -> Any:
        return self.one(self.machines).vcpu

    def state(self) -> VcpuState:
        """One that was got, or a part of one, or one with something wrong."""
        state, draw = self.rng.choice(self.states), self.rng.random()
        if draw < 0.3 or not state.parts:
            return state
        if draw < 0.5:
            return state.only(*self.rng.sample(state.parts, self.rng.randrange(len(state.parts) + 1)))
        with contextlib.suppress(HvError):
            if draw < 0.8:
                name = self.rng.choice(state.parts)
                value = state.part(name)
                return state.replace(**{name: type(value).from_bytes(self.flipped(bytes(value)))})
            return state.replace(**{self.rng.choice(FIELDS): self.number()})
        return state

    # ---- what must hold ----

    def look(self, machine: hv.Machine) -> tuple[Any, bytes, Any] | None:
        cpu = machine.vcpu
        if machine.closed or cpu.kvm._c.dirty:  # looking would put what hvmodel.state.sync has
            return None
        seen: Any
        try:
            seen = VcpuState.get(cpu)
        except UnansweredError:
            seen = bytes(cpu.regs), bytes(cpu.sregs)
        except HvError:
            return None
        return seen, machine.read(0, machine.ram.used_length), cpu.breakpoints

    @contextlib.contextmanager
    def nothing_changes(self) -> Iterator[None]:
        """Where the body is refused: state, RAM and breakpoints of the machines are what they were."""
        if self.deep or self.rng.random() < 0.5:
            yield
            return
        before = [(machine, self.look(machine)) for machine in self.machines]
        try:
            yield
        except HvError as error:
            if getattr(error, "__notes__", ()):
                raise  # it says what is not as before
            for machine, then in before:
                now = self.look(machine) if then is not None else None
                if then is not None and now is not None and (what := self.changed(then, now)):
                    raise Broken(f"after {error!r}: {what}") from error
            raise

    def changed(self, then: tuple[Any, bytes, Any], now: tuple[Any, bytes, Any]) -> str:
        if isinstance(then[0], VcpuState) and isinstance(now[0], VcpuState):
            changes = then[0].diff(now[0], time=False)
            if "events" in then[0].parts and then[0].events.exception.injected:
                # Without KVM_CAP_EXCEPTION_PAYLOAD a pending exception is told as both, and can be put as injected only
                # (linux:arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_set_vcpu_events@v6.18).
                changes = [change for change in changes if change.path != "events.exception.pending"]
            if changes:
                return "; ".join(map(str, changes[:8]))
        elif then[0] != now[0]:
            return "other registers"
        clocks = [then[0].msrs.to_dict().get(index, 0) for index in WALL_CLOCK] if type(then[0]) is VcpuState else []
        bytes_of = [at for at in range(len(then[1])) if then[1][at] != now[1][at]] if then[1] != now[1] else []
        moved = [at for at in bytes_of if not any(clock <= at < clock + 12 for clock in clocks)]
        if moved:
            return f"other RAM at {moved[0]:#x}"
        return f"{then[2]} {now[2]}" if then[2] != now[2] else ""

    def check(self) -> None:
        super().check()
        for each in (*self.states, *self.vm_states, *self.records, *self.queues, *self.tables, *self.descriptors):
            repr(each)

    # ---- the words of the architecture ----

    @kind(4)
    def arch_function(self) -> None:
        function = self.one(self.functions)
        args, named = [], {}
        for name, parameter in inspect.signature(function).parameters.items():
            if name == "call" or (parameter.default is not parameter.empty and self.rng.random() < 0.5):
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                named[self.one(["esp0", "rsp0", "sp0", "ist1", "x"])] = self.number()
                continue
            value = self.one([self.number(), self.number(), self.rng.randrange(40)], *self.nonsense)
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[name] = value
            else:
                args.append(value)
        function(*args, **named)

    @kind(2)
    def arch_descriptor(self) -> None:
        dpl = self.one([0, 3])
        match self.rng.randrange(5):
            case 0:
                new = self.do(Descriptor.code, self.one([16, 32, 64]), base=self.number(), dpl=dpl)
            case 1:
                new = self.do(Descriptor.data, self.one([16, 32]), limit=self.one([0xFFFF, self.number()]), dpl=dpl)
            case 2:
                new = self.do(Descriptor.tss, self.number(), self.one([0x67, self.number()]), bits=self.one([32, 64]))
            case 3:
                new = self.do(Gate, self.one([8, self.number()]), self.number(), self.one([14, 15, 12, 5]), dpl)
            case _:
                new = self.do(Selector, self.one([1, self.number()]), False, dpl)
                int(new)
                return
        bytes(new)
        self.do(self.one([Descriptor, Gate]).from_bytes, self.flipped(bytes(new)))

    @kind(2)
    def arch_table(self) -> None:
        table = self.one(self.descriptors)
        if isinstance(table, DescriptorTable):
            self.do(table.set, self.one([8, 16, 0x50]), self.one([Descriptor.code(), Descriptor.tss(0), bytes(8)]))
        elif isinstance(table, Ivt):
            self.do(table.set, self.one([0, 255, self.number()]), 0xF000, self.number() & 0xFFFF)
        else:
            self.do(table.gate, self.one([0, 255, 13]), self.number(), 8, dpl=self.one([0, 3]))
        bytes(table)

    @kind(2)
    def arch_pages(self) -> None:
        tables = self.one(self.tables)
        if self.rng.random() < 0.2:
            self.tables[self.tables.index(tables)] = PageTables(0x5000, tables.mode)
        named = {"user": self.one([True, False]), "nx": self.one([False, True]), "page_size": self.one([None, 4096])}
        self.do(tables.map, self.number() & -4096, self.number() & 0xFFFFF000, self.one([4096, 65536, 7]), **named)
        self.do(tables.find, self.number())

    @kind(2)
    def arch_queue(self) -> None:
        queue = self.one(self.queues)
        match self.rng.randrange(6):
            case 0:
                self.put(self.queues, self.do(ExceptionQueue, rflags=self.number()), 3)
            case 1:
                self.do(queue.queue, self.rng.randrange(33), self.one([None, 0]), self.one([None, 1]))
            case 2:
                self.do(queue.requeue, self.rng.randrange(33), self.one([None, 0]))
            case 3:
                queue.nmi(), self.do(queue.interrupt, self.rng.randrange(257))
            case 4:
                queue.enter(), queue.delivered(), repr(queue)
            case _:
                self.do(queue.set_events, {**queue.get_events(), self.one([*queue.get_events()]): self.number()})

    # ---- values ----

    @kind(3)
    def value_new(self) -> None:
        record = self.one(self.records)
        kind, name = type(record), self.one([*record.fields(), "x", "cs.base", "cs."])
        changed: dict[str, Any] = {name: self.number()}
        match self.rng.randrange(4):
            case 0:
                new = self.do(kind, **changed)
            case 1:
                new = self.do(record.replace, **changed)
            case 2:
                new = self.do(kind.from_bytes, self.flipped(bytes(record)))
            case _:
                new = self.do(kind.from_json, self.damaged(json.loads(json.dumps(record.to_json()))))
        if pickle.loads(pickle.dumps(new)) != new or (new == record and new.diff(record)):
            raise Broken(f"{new!r} is not what it was, or other than {record!r}")
        str(self.do(new.diff, record))
        self.records[self.records.index(record)] = new

    @kind(2)
    def value_of_any_size(self) -> None:
        match self.rng.randrange(4):
            case 0:
                msrs: Any = self.do(Msrs, self.one([{0x10: 5}, [(1, 2), (1, 3)], {self.number(): self.number()}]))
                (
                    msrs.replace({self.one([0x10, self.number()]): 1}),
                    self.do(msrs.only, [0x10]),
                    self.do(Msrs.from_json, {"0x10": 1}),
                )
                self.do(Msrs.from_bytes, self.flipped(bytes(msrs)))
            case 1:
                leaves = [CpuidEntry(1), CpuidEntry(7, 0, 1), CpuidEntry(1, eax=self.number())]
                cpuid = self.do(CpuidTable, leaves)
                self.do(cpuid.replace, 1, 0, ecx=self.number()), self.do(cpuid.changes, [CpuidEntry(1)])
                self.do(CpuidTable.from_bytes, self.flipped(bytes(cpuid)))
            case 2:
                area = self.do(Xsave.initial, self.one([4096, 8192, self.number()]))
                changed: dict[str, Any] = {self.one(["fcw", "mxcsr", "xmm", "x"]): self.number() & 0xFFFF}
                self.do(area.replace, **changed)
                which = Component(self.one([2, 64]), "AVX", self.one([576, self.number()]), self.one([256, -1]))
                self.do(area.component, which), self.do(Xsave.from_json, self.one(["4096:", "9" * 30 + ":00", "x"]))
                self.do(area.is_initial, 2)
            case _:
                nested = self.do(NestedState.make, self.one(["vmx", "svm"]), self.one([0, self.number()]))
                self.do(NestedState.from_json, self.damaged(nested.to_json()))
                self.do(NestedState.from_bytes, self.flipped(bytes(nested)))

    def damaged(self, document: Any) -> Any:
        """JSON with something else somewhere in it."""
        rng = self.rng
        if isinstance(document, dict) and document and rng.random() < 0.9:
            name = rng.choice([*document])
            draw, document = rng.random(), dict(document)
            if draw < 0.1:
                del document[name]
            elif draw < 0.2:
                document[rng.choice(["x", "", 5])] = document[name]
            elif draw < 0.9:
                document[name] = self.damaged(document[name])
            return document
        if isinstance(document, list) and document and rng.random() < 0.8:
            at = rng.randrange(len(document))
            return [*document[:at], self.damaged(document[at]), *document[at + 1 :]]
        odd = [
            None,
            True,
            -1,
            1 << 70,
            2.5,
            "zz",
            "00",
            "",
            [],
            {},
            [None],
            "4096:zz",
            "-5:00",
            "9" * 30 + ":",
            {"x": 1},
        ]
        return rng.choice([*odd, document, document])

    @kind(3)
    def state_keep(self) -> None:
        """A state by JSON and pickle, whole and damaged."""
        state = self.state()
        document = json.loads(json.dumps(state.to_json()))
        if pickle.loads(pickle.dumps(state)) != state or VcpuState.from_json(document).diff(state):
            raise Broken(f"{state!r} is not what it was")
        if self.rng.random() < 0.5:
            self.do(VcpuState.from_json, self.damaged(document))
        else:
            reduced: Any = state.__reduce__()
            again, (made, sizes, block) = reduced
            block = self.one([block, block[: self.rng.randrange(len(block) + 1)], None, b""])
            again(made, self.one([sizes, [(name, size - 1) for name, size in sizes], (("x", 5),), ((5, 5),)]), block)

    @kind(3)
    def state_change(self) -> None:
        state = self.state()
        value = self.one([self.number(), self.number(), Regs(), Segment(), Msrs({0x10: 1}), bytes(16)])
        self.put(self.states, self.do(state.replace, **{self.one(FIELDS): value}), 12)
        self.do(state.only, *self.rng.sample(PARTS, 2))

    @kind(2)
    def state_compare(self) -> None:
        state = self.state()
        for change in self.do(state.diff, self.state(), time=self.one([True, False])):
            str(change)
        hash(state), repr(state), list(state.items()), self.one(PARTS) in state
        self.do(state.part, self.one(PARTS))

    # ---- the state of a vCPU and a VM ----

    @kind(4, "kvm")
    def state_get(self) -> None:
        named: dict[str, Any] = {}
        if self.rng.random() < 0.2:
            named["msrs"] = self.one([None, [0x10], [Msr.IA32_TSC], [1 << 40], [0x12345], range(300)])
        parts = self.one([None, None, None, self.rng.sample(PARTS, 3), "regs", ("regs", "regs"), ["regs", None]])
        with self.nothing_changes():
            self.put(self.states, self.do(VcpuState.get, self.vcpu(), parts, **named), 12)

    @kind(8, "kvm")
    def state_put(self) -> None:
        parts = self.one([None, None, None, ("regs",), ("sregs2", "regs"), "msrs", ["nested_state"]])
        with self.nothing_changes():
            self.do(self.state().put, self.vcpu(), parts)

    @kind(2, "kvm")
    def state_own(self) -> None:
        vcpu = self.vcpu()
        VcpuState.get(vcpu).put(vcpu)

    @kind(1, "kvm")
    def vm_state(self) -> None:
        vm = self.one([self.chips, self.plain, *self.machines])
        self.put(self.vm_states, self.do(VmState.get, vm, self.one([None, None, "clock", ("pit", "clock"), [None]])), 6)

    @kind(1, "kvm")
    def vm_state_put(self) -> None:
        state = self.one(self.vm_states)
        if state.parts and self.rng.random() < 0.6:
            name = self.one([*state.parts])
            value = state.part(name)
            state = state.replace(**{name: type(value).from_bytes(self.flipped(bytes(value)))})
        named = {"realtime": self.one([True, False])} if self.rng.random() < 0.3 else {}
        self.do(state.put, self.one([self.chips, self.plain, *self.machines]), **named)

    @kind(3, "kvm")
    def msrs(self) -> None:
        some = [0x10, 0x174, 0x1A0, 0x277, 0x2FF, 0x6E0, 0xC0000080, 0xC0000081, 0x4B564D02, 0x12345]
        with self.nothing_changes():
            if self.rng.random() < 0.4:
                self.do(Msrs.get, self.vcpu(), self.one([None, [0x10], [self.one(some)], [-1], [True]]))
            else:
                Msrs({self.one(some): self.number(), 0x175: 5}).put(self.vcpu())

    @kind(2, "kvm")
    def cpuid(self) -> None:
        vcpu = self.vcpu()
        found = self.do(CpuidTable.get, vcpu)
        if self.rng.random() < 0.5:
            changed = [CpuidTable(), found, CpuidTable([*found][:3] * 3)]
            if found.leaf(1) is not None:
                changed.append(found.replace(1, ecx=self.number() & 0xFFFFFFFF))
            with self.nothing_changes():
                self.do(self.one(changed).put, vcpu)

    @kind(2, "kvm")
    def refusal(self) -> None:
        name = self.one([*refusals.PARTS])
        having = [state for state in self.states if name in state]
        value = self.one(having).part(name)
        if name == "msrs":
            value = value.only([self.one([*value.keys()])])
        data = self.one([value, self.flipped(bytes(value))])
        vcpu = self.vcpu()
        with self.nothing_changes():
            if self.rng.random() < 0.6:
                str(self.do(refusals.explain, vcpu, name, data))
            else:
                self.do(self.one([refusals.kept, refusals.dropped]), vcpu, name, data)

    @kind(5, "kvm")
    def sync_one(self) -> None:
        vcpu = self.vcpu()
        mine = self.do(sync.synchronizer, vcpu)
        match self.rng.randrange(9):
            case 0 | 1:
                mine.synchronize_state()
            case 2:
                self.one([mine.synchronize_post_reset, mine.synchronize_post_init, mine.flush, mine.put_apic])()
            case 3:
                mine.synchronize_pre_loadvm()
            case 4:
                mine.discard()
            case 5:
                self.do(setattr, mine, "env", self.state(), firm=(0, 1))
            case 6:
                self.do(mine.put, self.one([1, 2, 3, sync.PutLevel.FULL]))
            case 7:
                mine.env, repr(mine)
            case _:
                self.do(sync.put_msr_indices, vcpu, self.one([1, 2, 3])), self.do(sync.get_msr_indices, vcpu)
                self.do(sync.synchronizer, vcpu, cpuid=self.one([None, (), [None]]))

    @kind(0.5, "kvm")
    def sync_all(self) -> None:
        every = [sync.synchronize_all_states, sync.synchronize_all_post_reset, sync.synchronize_all_post_init]
        self.do(self.one([*every, sync.synchronize_all_pre_loadvm]), self.one(self.machines))

    # ---- a machine's vCPU ----

    @kind(3, "kvm")
    def register_set(self) -> None:
        with self.nothing_changes():
            self.do(setattr, self.cpu(), self.one(REGISTERS), self.number(), firm=(0, 1))

    @kind(2, "kvm")
    def register_get(self) -> None:
        cpu = self.cpu()
        getattr(cpu, self.one(REGISTERS)), cpu.regs, cpu.sregs, repr(cpu), cpu.location()

    @kind(3, "kvm")
    def registers_set(self) -> None:
        cpu = self.cpu()
        with self.nothing_changes():
            if self.rng.random() < 0.4:
                self.do(setattr, cpu, "regs", cpu.regs.replace(rip=self.number()), firm=(0, 1))
            else:
                sregs = cpu.sregs
                name = self.one(["cr0", "cr4", "efer", "cs.l", "apic_base", "tr.type", "gdt.base"])
                changed = [
                    sregs,
                    Sregs.from_bytes(self.flipped(bytes(sregs))[: Sregs.SIZE]),
                    sregs.replace(**{name: 0}),
                ]
                self.do(setattr, cpu, "sregs", self.one(changed), firm=(0, 1))

    @kind(6, "kvm")
    def start(self) -> None:
        cpu, entry = self.cpu(), self.one([ENTRY, ENTRY, ENTRY, self.number()])
        some: dict[str, list[Any]] = {
            "stack": [0x8000, self.number()],
            "user": [True, False],
            "handlers": [{13: 0x3000}, {}, {-1: 1}, {"x": 1}, Idt(32), Idt(64)],
            "ports": [True, False, (0x10,), [(1, 2)], [None]],
            "tables": [0x9000, 0x8001, self.number()],
            "pages": [*self.tables],
            "bits": [16, 32, 64],
        }
        named: dict[str, Any] = {name: self.one(those) for name, those in some.items() if self.rng.random() < 0.15}
        with self.nothing_changes():
            match self.rng.randrange(5):
                case 0:
                    cpu.reset()
                case 1:
                    self.do(cpu.real_mode, entry, sp=self.number() & 0x1FFFF)
                case 2:
                    named = {name: value for name, value in named.items() if name in ("handlers", "ports", "tables")}
                    self.do(cpu.vm86_mode, entry, iopl=self.one([0, 3]), **named)
                case 3:
                    self.do(cpu.protected_mode, entry, paging=self.one([None, None, "pae", "32bit"]), **named)
                case _:
                    self.do(cpu.long_mode, entry, levels=self.one([4, 4, 5]), **named)

    @kind(5, "kvm")
    def inject(self) -> None:
        cpu = self.cpu()
        with self.nothing_changes():
            match self.rng.randrange(5):
                case 0 | 1:
                    vector, code, payload = self.rng.randrange(34), self.one([None, None, 0]), self.one([None, None, 1])
                    self.do(
                        self.one([cpu.inject_exception, partial(events.inject_exception, cpu)]), vector, code, payload
                    )
                case 2:
                    self.do(cpu.inject_interrupt, self.one([0x20, 8, 255, 256]))
                case 3:
                    self.do(events.inject_interrupt, self.vcpu(), self.one([0x20, 256]))
                case _:
                    self.one([cpu.inject_nmi, cpu.event_queue, partial(self.do, events.queue, self.vcpu())])()

    @kind(4, "kvm")
    def points(self) -> None:
        cpu = self.cpu()
        address = self.one([ENTRY, ENTRY + 1, ENTRY + 4, self.number()])
        with self.nothing_changes():
            match self.rng.randrange(4):
                case 0:
                    named = {"mode": self.one([None, "real", "long"])} if self.rng.random() < 0.3 else {}
                    self.do(cpu.add_breakpoint, address, self.one(["hardware", "hlt", "software"]), **named)
                case 1:
                    self.do(cpu.add_watchpoint, address & -8, self.one([1, 2, 4, 8]), self.one(["w", "rw"]))
                case 2:
                    self.do(cpu.remove_breakpoint, self.one([address, *cpu.breakpoints]))
                case _:
                    self.do(cpu.remove_watchpoint, self.one([address, *cpu.breakpoints]))

    def wait(self) -> Any:
        return self.one([0.0, 0.001, 0.001, 0.002, -1, "x"])

    @kind(3, "kvm")
    def step(self) -> None:
        self.do(self.cpu().step, self.one([1, 1, 2, 5]), self.wait(), firm=(1,))

    @kind(5, "kvm")
    def run(self) -> None:
        machine = self.one(self.machines)
        if self.rng.random() < 0.4:
            machine.load(ENTRY, self.one(GUESTS))
        if self.rng.random() < 0.5:
            machine.run(timeout=self.wait())
        else:
            next(machine.exits(self.wait()))

    @kind(2, "kvm")
    def answer(self) -> None:
        cpu = self.cpu()
        self.do(self.one([cpu.answer, cpu.kvm.answer]), self.one([0, 1, b"\0", b"\0\0"]))

    @kind(1, "kvm")
    def raw(self) -> None:
        """What is underneath: kvm.Vcpu's own ioctls."""
        vcpu: Vcpu = self.cpu().kvm
        match self.rng.randrange(5):
            case 0:
                vcpu.regs, vcpu.sregs, vcpu.debugregs = vcpu.regs, vcpu.sregs, vcpu.debugregs
            case 1:
                vcpu.vcpu_events, vcpu.sync_regs = vcpu.vcpu_events, vcpu.sync_regs
            case 2:
                self.do(vcpu.set_msrs, {self.one([0x10, 0x174, 0xC0000080]): self.number()})
            case 3:
                self.do(vcpu.translate, self.number())
            case _:
                vcpu.complete_io()

    @kind(2, "kvm")
    def begin_again(self) -> None:
        """A state that more can be done with."""
        machine = self.one(self.machines)
        for cleared in (lambda: machine.answer(0), sync.synchronizer(machine.vcpu).discard):
            with contextlib.suppress(HvError):
                cleared()
        for point in machine.vcpu.breakpoints[2:]:
            machine.vcpu.remove_breakpoint(point) if hasattr(point, "kind") and not hasattr(point, "size") else None
        machine.load(ENTRY, self.one(GUESTS))
        self.do(machine.vcpu.real_mode, entry=ENTRY)

    # ---- at odd moments ----

    def others(self, seconds: float, number: int) -> None:
        """Kinds of calls by the way: any HvError will do."""
        mine = [row for name, row in table.items() if name not in ("other_thread", "machine_again", "child")]
        end = time.monotonic() + seconds
        self.deep += 1
        try:
            for _ in range(number):
                if time.monotonic() > end:
                    break
                function = self.rng.choices(mine, [row[1] for row in mine])[0][0]
                with contextlib.suppress(HvError, Skip):
                    function(self)
        finally:
            self.deep -= 1

    @kind(0.7, "kvm")
    def other_thread(self) -> None:
        """While another thread runs the vCPU."""
        machine = self.one(self.machines)
        with contextlib.suppress(HvError):
            machine.answer(0)
        machine.load(ENTRY, bytes.fromhex("ebfe"))
        self.do(machine.vcpu.real_mode, entry=ENTRY)
        failed: list[str] = []

        def go() -> None:
            try:
                machine.run(timeout=0.02)
            except HvError:
                pass
            except BaseException:  # noqa: BLE001  # shown by who waits
                failed.append(traceback.format_exc())

        thread = threading.Thread(target=go)
        thread.start()
        try:
            self.others(0.02, 12)
        finally:
            with contextlib.suppress(HvError):
                machine.kick()
            thread.join(30)
        if thread.is_alive() or failed:
            raise Broken("".join(failed) or "a run does not end")

    @kind(0.3, "kvm")
    def machine_again(self) -> None:
        """A machine is closed: what can be asked of it then, and a new one."""
        at = self.rng.randrange(len(self.machines))
        machine, kept = self.machines[at], [*self.machines]
        machine.close()
        self.machines[:] = [machine]
        self.deep += 1
        try:
            for name in ("state_get", "state_own", "register_set", "register_get", "start", "inject", "points", "step",
                         "run", "sync_one", "msrs", "refusal"):  # fmt: skip
                with contextlib.suppress(HvError, Skip):
                    table[name][0](self)
        finally:
            self.deep -= 1
            kept[at] = self.fresh()
            self.machines[:] = kept
        if self.rng.random() < 0.5:
            machine.vcpu.rip  # noqa: B018  # ClosedError

    def fork(self) -> None:
        """A child makes some of the calls: none of them comes to its parent's vCPUs."""
        if lacking("kvm") is not None:
            return
        seen = [self.look(machine) for machine in self.machines]
        pid = os.fork()
        if not pid:
            signal.alarm(30)
            try:
                self.rng = random.Random(self.rng.random())
                self.others(5, 20)
                os._exit(0)
            except BaseException:  # noqa: BLE001  # a child does not go on as its parent
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if status:
            raise Broken(f"a child of fork ended with {os.waitstatus_to_exitcode(status)}")
        for machine, then in zip(self.machines, seen, strict=True):
            now = self.look(machine)
            if then is None or now is None:
                continue
            # But for the RAM, which they share.
            if what := self.changed((then[0], b"", then[2]), (now[0], b"", now[2])):
                raise Broken(f"a child of fork has changed {machine!r}: {what}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:], table, StateWorld)
