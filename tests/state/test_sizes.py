"""The values whose size varies: MSRs, CPUID, the XSAVE area, nested state; the APIC's page and the chips."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.kvm import CpuidEntry, Kvm, Vcpu, Vm
from hvmodel.state import (
    Component,
    CpuidTable,
    IoApic,
    IoApicState,
    Lapic,
    Msrs,
    NestedState,
    Pic,
    PicState,
    Regs,
    TscKhz,
    VcpuState,
    Xsave,
    components,
    msr_indices,
)
from hvmodel.state.record import Packed
from tests.need import need_cap

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
MSRS = st.dictionaries(U32, U64, max_size=6).map(Msrs)
ENTRIES = st.lists(st.builds(CpuidEntry, *[U32] * 7), max_size=5)
LSTAR, STAR = 0xC0000082, 0xC0000081

# With padding that is not 0, as nobody but bytes can have it.
PADDED_MSRS = st.tuples(U32, st.dictionaries(U32, st.tuples(U32, U64), max_size=4)).map(
    lambda drawn: Msrs.from_bytes(
        pack("<II", len(drawn[1]), drawn[0])
        + b"".join(pack("<IIQ", index, reserved, value) for index, (reserved, value) in drawn[1].items())
    )
)
PADDED_CPUID = st.tuples(U32, st.lists(st.tuples(*[U32] * 10), max_size=4)).map(
    lambda drawn: CpuidTable.from_bytes(
        pack("<II", len(drawn[1]), drawn[0]) + b"".join(pack("<10I", *row) for row in drawn[1])
    )
)

VALUES = st.one_of(
    MSRS,
    PADDED_MSRS,
    ENTRIES.map(CpuidTable),
    PADDED_CPUID,
    st.binary(min_size=4096, max_size=4096).map(Xsave.from_bytes),
    st.builds(lambda at, data: NestedState.make("vmx", 3, data, vmcs12_pa=at), U64, st.binary(max_size=40)),
    st.builds(lambda at, data: NestedState.make("svm", 0x100, data, vmcb_pa=at), U64, st.binary(max_size=40)),
    st.binary(min_size=120, max_size=120).map(lambda header: NestedState.from_bytes(bytes(4) + b"\x80\0\0\0" + header)),
    st.binary(min_size=1024, max_size=1024).map(Lapic.from_bytes),
    st.binary(min_size=16, max_size=16).map(lambda data: Pic(1, PicState.from_bytes(data))),
    st.binary(min_size=216, max_size=216).map(lambda data: IoApic(IoApicState.from_bytes(data))),
    st.integers(1, (1 << 31) - 1).map(TscKhz.of),
)


@given(VALUES)
def test_all_ways_there_and_back(value: Packed) -> None:
    kind = type(value)
    again = [
        kind.from_bytes(bytes(value)),
        pickle.loads(pickle.dumps(value)),
        kind.from_json(json.loads(json.dumps(value.to_json()))),
    ]
    assert again == [value] * 3
    assert len({value, *again}) == 1
    assert value.diff(again[0]) == []
    assert repr(value)
    with pytest.raises(AttributeError):
        value._data = b""


@given(st.data())
def test_diff_is_empty_only_of_equal_values(data: st.DataObject) -> None:
    one, other = data.draw(VALUES), data.draw(VALUES)
    if type(one) is not type(other):
        with pytest.raises(ArgumentTypeError):
            one.diff(other)
    elif type(one) is not CpuidTable and type(one) is not Msrs:  # in those the order counts too
        assert (one.diff(other) == []) == (one == other)


# ---- MSRs ----


@given(st.dictionaries(U32, U64, max_size=8))
def test_msrs_are_the_kernels_struct(values: dict[int, int]) -> None:
    struct = ffi.new("struct kvm_msrs *", {"nmsrs": len(values), "entries": len(values)})
    for at, (index, value) in enumerate(values.items()):
        struct.entries[at].index, struct.entries[at].data = index, value
    msrs = Msrs(values)
    assert bytes(msrs) == bytes(ffi.buffer(struct, 8 + 16 * len(values)))
    assert msrs.to_dict() == values
    assert (list(msrs), msrs.keys(), msrs.values()) == (list(values), tuple(values), tuple(values.values()))
    assert dict(msrs) == values
    assert all(index in msrs and msrs[index] == value for index, value in values.items())


def test_msrs_by_index() -> None:
    msrs = Msrs({LSTAR: 1, STAR: 2})
    assert list(msrs.replace({STAR: 5, 0x10: 7}).to_dict().items()) == [(LSTAR, 1), (STAR, 5), (0x10, 7)]
    assert msrs.only([STAR, 0x10]) == Msrs({STAR: 2})
    with pytest.raises(KeyError):
        msrs[0x10]
    efer = 0xC0000080
    change = Msrs({efer: 0}).diff(Msrs({efer: 0x100}))[0]
    assert (change.path, change.bits) == (f"[{efer:#x}]", ("EFER.LME",))
    gone = msrs.diff(Msrs({LSTAR: 1}))[0]
    assert (gone.path, gone.before, gone.after) == ("[0xc0000081]", 2, None)


@pytest.mark.parametrize(
    ("values", "kind", "field"),
    [
        (5, ArgumentTypeError, "values"),
        ([1], ArgumentTypeError, "values"),
        ([(1, 2), (1, 3)], ArgumentError, "values"),
        ({-1: 0}, ArgumentError, "index"),
        ({1 << 32: 0}, ArgumentError, "index"),
        ({True: 0}, ArgumentTypeError, "index"),
        ({"STAR": 0}, ArgumentTypeError, "index"),
        ({STAR: 1 << 64}, ArgumentError, "msrs[0xc0000081]"),
        ({STAR: -1}, ArgumentError, "msrs[0xc0000081]"),
        ({STAR: None}, ArgumentTypeError, "msrs[0xc0000081]"),
    ],
)
def test_wrong_msrs(values: object, kind: type[Exception], field: str) -> None:
    with pytest.raises(kind) as refused:
        Msrs(values)  # type: ignore[arg-type]
    assert refused.value.field == field


def test_wrong_bytes_of_msrs() -> None:
    # The kernel goes by the count: it must be true of the bytes.
    good = bytes(Msrs({1: 2, 3: 4}))
    for wrong in (b"", good[:7], good[:-1], good + b"x", good[:-16], (3).to_bytes(4, "little") + good[4:]):
        with pytest.raises(ArgumentError):
            Msrs.from_bytes(wrong)
    with pytest.raises(ArgumentError, match="once"):
        Msrs.from_bytes((2).to_bytes(8, "little") + 2 * (5).to_bytes(16, "little"))
    for document in (
        *([], {"x": 1}, {"0x10": "1"}, {"0x10": 1, "16": 2}, {5: 1}),
        *({"pad": -1}, {"pad": 1 << 32}, {"pad": True}, {"0x10": {"data": 1}}, {"0x10": {"data": 1, "reserved": "x"}}),
        *({"0x10": {"data": 1, "reserved": 1 << 32}}, {"0x10": {"data": "1", "reserved": 1}}),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            Msrs.from_json(document)


def test_the_msrs_that_depend_on_others_are_last(kvm: Kvm) -> None:
    listed = kvm.msr_index_list()
    found = msr_indices(kvm)
    assert sorted(found) == sorted(listed)
    last = [index for index in (0x4B564D02, 0x6E0) if index in listed]  # ASYNC_PF_EN, TSC_DEADLINE
    assert list(found[-len(last) :]) == last
    assert set(listed) - set(msr_indices(kvm, has_lapic=False)) == {0x4B564D06} & set(listed)


# ---- CPUID ----


@given(ENTRIES)
def test_cpuid_is_the_kernels_struct(entries: list[CpuidEntry]) -> None:
    struct = ffi.new("struct kvm_cpuid2 *", {"nent": len(entries), "entries": len(entries)})
    for at, entry in enumerate(entries):
        for field in CpuidEntry.fields():
            setattr(struct.entries[at], field, getattr(entry, field))
    table = CpuidTable(entries)
    assert bytes(table) == bytes(ffi.buffer(struct, 8 + 40 * len(entries)))
    assert list(table) == entries
    assert [table[at] for at in range(len(table))] == entries


def test_cpuid_by_leaf() -> None:
    table = CpuidTable([CpuidEntry(1, ecx=5), CpuidEntry(7, 0, 1, ebx=1), CpuidEntry(7, 1, 1, ebx=2)])
    assert (table.leaf(1, 9).ecx, table.leaf(7, 1).ebx, table.leaf(7, 2), table.leaf(2)) == (5, 2, None, None)
    changed = table.replace(7, 1, ebx=3, edx=4)
    assert [entry.ebx for entry in changed] == [0, 1, 3]
    assert changed.leaf(7, 1) == CpuidEntry(7, 1, 1, 0, 3, 0, 4)
    assert [change.path for change in table.diff(changed)] == ["[0x7, 0x1].ebx", "[0x7, 0x1].edx"]
    for arguments, registers in (
        ((2,), {"eax": 1}),
        ((7, 2), {"eax": 1}),
        ((1,), {"rax": 1}),
        ((1,), {"eax": 1 << 32}),
    ):
        with pytest.raises(ArgumentError):
            table.replace(*arguments, **registers)
    with pytest.raises(IndexError):
        table[3]


def test_what_kvm_changed_is_named(kvm: Kvm, vcpu: Vcpu) -> None:
    # Every feature that KVM must keep up to date by itself: OSXSAVE follows CR4 (bit 18), whatever was set.
    asked = CpuidTable(kvm.supported_cpuid())
    asked = asked.replace(1, ecx=asked.leaf(1).ecx | 1 << 27)
    asked.put(vcpu)
    kept = CpuidTable.get(vcpu)
    assert list(kept) == vcpu.get_cpuid2()
    changes = kept.changes(asked)
    assert "OSXSAVE" in next(change for change in changes if change.path == "[0x1].ecx").bits
    before, after = by_register(asked), by_register(vcpu.get_cpuid2())
    differing = {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}
    assert {change.path: (change.before, change.after) for change in changes} == differing
    assert kept.changes(kept) == []
    assert kept.changes(vcpu.get_cpuid2()) == []


def by_register(entries: Iterable[CpuidEntry]) -> dict[str, int]:
    found = {}
    for entry in entries:
        leaf = f"[{entry.function:#x}, {entry.index:#x}]" if entry.flags & 1 else f"[{entry.function:#x}]"
        for field in ("flags", "eax", "ebx", "ecx", "edx"):
            found[f"{leaf}.{field}"] = getattr(entry, field)
    return found


@pytest.mark.parametrize("wrong", [5, [5], [CpuidEntry(-1)], [CpuidEntry(1 << 32)], [CpuidEntry(True)]])
def test_wrong_cpuid(wrong: object) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        CpuidTable(wrong)  # type: ignore[arg-type]


def test_wrong_bytes_of_cpuid() -> None:
    good = bytes(CpuidTable([CpuidEntry(1)]))
    for wrong in (b"", good[:-1], good + b"x", good[:8], (257).to_bytes(8, "little") + bytes(257 * 40)):
        with pytest.raises(ArgumentError):
            CpuidTable.from_bytes(wrong)
    with pytest.raises(ArgumentError, match="too many"):
        CpuidTable([CpuidEntry(1)] * 257)
    for document in (
        *({}, [5], [{"index": 1}], [{"function": 1, "x": 2}], [{"padding": "1"}], [{"function": 1}, {"padding": 1}]),
        *([{"function": 1, "padding": 1}], [{"function": 1, "padding": [1, 2]}]),
        [{"function": 1, "padding": [1, 2, None]}],
    ):
        with pytest.raises(ArgumentTypeError):
            CpuidTable.from_json(document)
    for document in ([{"padding": -1}], [{"function": 1, "padding": [0, 0, 1 << 32]}]):
        with pytest.raises(ArgumentError):
            CpuidTable.from_json(document)


def test_padding_that_kvm_keeps_is_kept_in_json(kvm: Kvm) -> None:
    # KVM_SET_CPUID2 takes any padding in an entry, and KVM_GET_CPUID2 gives it.
    data = pack("<II", 1, 0) + pack("<10I", 0x40000000, 0, 0, 1, 2, 3, 4, 5, 6, 7)
    with kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        CpuidTable.from_bytes(data).put(vcpu)
        got = CpuidTable.get(vcpu)
    assert bytes(got) == data
    assert bytes(CpuidTable.from_json(json.loads(json.dumps(got.to_json())))) == data
    assert [str(row) for row in got.diff(CpuidTable(got))] == [
        f"[0x40000000].padding[{at}]: {5 + at:#x} -> None" for at in range(3)
    ]
    msrs = Msrs.from_bytes(pack("<II", 1, 9) + pack("<IIQ", STAR, 8, 7))
    assert msrs.to_json() == {"pad": 9, "0xc0000081": {"data": 7, "reserved": 8}}
    assert dict(msrs.items()) == {"pad": 9, "[0xc0000081]": 7, "[0xc0000081].reserved": 8}


# ---- XSAVE ----


def test_legacy_fields_are_those_of_the_fpu_ioctl(vcpu: Vcpu) -> None:
    # KVM_SET_FPU writes them, KVM_GET_XSAVE shows them where the area has them; once the components are in use, for
    # KVM_SET_FPU does not put them in use.
    need_cap(vcpu.vm, "XSAVE")
    VcpuState(xsave=Xsave.initial().replace(xstate_bv=3)).put(vcpu)
    fpu = vcpu.fpu
    fpu.fcw, fpu.fsw, fpu.last_opcode, fpu.last_ip, fpu.last_dp = 0x35F, 0x4123, 0x155, 0x1234, 0x5678
    for at in range(8):
        fpu.fpr[at] = bytes(range(at, at + 10)) + bytes(6)
    for at in range(16):
        fpu.xmm[at] = bytes(range(at, at + 16))
    vcpu.fpu = fpu
    area = VcpuState.get(vcpu, ("xsave",)).xsave
    assert (area.fcw, area.fsw, area.fop, area.fip, area.fdp) == (0x35F, 0x4123, 0x155, 0x1234, 0x5678)
    assert area.mxcsr == 0x1F80  # which KVM_SET_FPU does not set
    assert area.st == tuple([bytes(range(at, at + 10)) + bytes(6) for at in range(8)])
    assert area.xmm == tuple([bytes(range(at, at + 16)) for at in range(16)])
    assert not area.is_initial(0)
    assert not area.is_initial(1)
    changed = area.replace(fcw=0x37F, xmm=(b"x" * 16, *area.xmm[1:]))
    VcpuState(xsave=changed).put(vcpu)
    assert vcpu.fpu.fcw == 0x37F
    assert bytes(ffi.buffer(vcpu.fpu.xmm[0])) == b"x" * 16
    assert [change.path for change in area.diff(changed)] == ["fcw", "xmm[0]"]


def test_components_are_where_cpuid_says(kvm: Kvm, vcpu: Vcpu) -> None:
    vcpu.set_cpuid2(kvm.supported_cpuid())
    state = VcpuState.get(vcpu)
    found = components(state.cpuid)
    if not found:
        pytest.skip("this processor has no extended components")
    for one in found:
        leaf = state.cpuid.leaf(0xD, one.number)
        assert (one.offset, one.size) == (leaf.ebx, leaf.eax)
    avx = found[0]
    assert (avx.number, avx.offset, avx.size) == (2, 576, 256)  # SDM vol. 1, 13.4.3: always there
    area = state.xsave.replace_component(avx, bytes(range(256)))
    assert not area.is_initial(2)
    state.replace(xsave=area).put(vcpu)
    assert VcpuState.get(vcpu).xsave.component() == bytes(range(256))
    # Its bit clear, the component comes back in its initial state.
    state.replace(xsave=area.replace(xstate_bv=3)).put(vcpu)
    assert VcpuState.get(vcpu).xsave.is_initial(2)


def test_wrong_areas() -> None:
    for size in (0, 576, 4095, 4097):
        with pytest.raises(ArgumentError):
            Xsave.from_bytes(bytes(size))
    area = Xsave.initial()
    for fields in ({"fcw": 1 << 16}, {"fcw": -1}, {"mxcsr": None}, {"st": ()}, {"xmm": [b""] * 16}, {"ymm": 1}):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            area.replace(**fields)
    for which in (5, None):
        with pytest.raises(ArgumentTypeError):
            area.component(which)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        area.component(Component(18, "XTILEDATA", 2816, 8192))
    with pytest.raises(ArgumentTypeError):
        area.replace_component(Component(2, "AVX", 576, 256), b"x")
    for document in (5, "", "4096", "4096:x", "4:0011223344", "10:00", f"{10**15}:00", "-1:", "4096:00:00"):
        with pytest.raises(ArgumentError):
            Xsave.from_json(document)


# ---- nested state ----


@given(st.tuples(*[U64] * 3), st.tuples(*[st.integers(0, 0xFFFF)] * 3), st.binary(max_size=64))
def test_nested_state_is_the_kernels_struct(wide: tuple[int, ...], narrow: tuple[int, ...], data: bytes) -> None:
    for name in ("vmx", "svm"):
        struct = ffi.new("struct kvm_nested_state *", {"data": len(data)})
        struct.flags, struct.size = narrow[0], 128 + len(data)
        ffi.memmove(struct.data, data, len(data))
        if name == "vmx":
            struct.format = lib.KVM_STATE_NESTED_FORMAT_VMX
            header = {"vmxon_pa": wide[0], "vmcs12_pa": wide[1], "smm_flags": narrow[1], "vmx_flags": narrow[2]}
            header["preemption_timer_deadline"] = wide[2]
            struct.hdr.vmx.vmxon_pa, struct.hdr.vmx.vmcs12_pa = wide[0], wide[1]
            struct.hdr.vmx.smm.flags, struct.hdr.vmx.flags = narrow[1], narrow[2]
            struct.hdr.vmx.preemption_timer_deadline = wide[2]
        else:
            struct.format = lib.KVM_STATE_NESTED_FORMAT_SVM
            header = {"vmcb_pa": wide[0]}
            struct.hdr.svm.vmcb_pa = wide[0]
        ours = NestedState.make(name, narrow[0], data, **header)
        assert bytes(ours) == bytes(ffi.buffer(struct, 128 + len(data)))
        assert (ours.format, ours.flags, ours.data) == (name, narrow[0], data)
        assert {field: ours.header[field] for field in header} == header


def test_wrong_nested_state() -> None:
    for name, fields in (("arm", {}), ("svm", {"vmxon_pa": 1}), ("vmx", {"smm_flags": 1 << 16}), ("vmx", {"pad": -1})):
        with pytest.raises(ArgumentError):
            NestedState.make(name, **fields)
    with pytest.raises(ArgumentError):
        NestedState.make("vmx", 1 << 16)
    good = bytes(NestedState.make("vmx"))
    for wrong in (b"", good[:-1], good + b"x", good[:2] + b"\5" + good[3:]):
        with pytest.raises(ArgumentError):
            NestedState.from_bytes(wrong)
    for document in (5, {}, {"format": "vmx", "flags": 0, "header": {}, "data": "x"},
                     {"format": [], "flags": 0, "header": {}, "data": ""}):  # fmt: skip
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            NestedState.from_json(document)


# ---- the others ----


def test_registers_of_the_apic(vm: Vm) -> None:
    # SDM vol. 3 table 13-1: 0x20 is the ID, 0x30 the version, 0xf0 the spurious vector, 0xff after reset (13.4.7.1).
    vm.create_irqchip()
    with vm.create_vcpu(3) as vcpu:
        page = VcpuState.get(vcpu).lapic
        assert bytes(page) == bytes(ffi.buffer(vcpu.lapic))
        assert page.register(0x20) >> 24 == 3
        assert page.register(0xF0) == 0xFF
        changed = page.replace_register(0x80, 0x20).replace_register(0xA0, 0x20)
        VcpuState(lapic=changed).put(vcpu)
        assert vcpu.lapic.regs[0x80] == b"\x20"
        assert [change.path for change in page.diff(changed)] == ["regs[0x80]", "regs[0xa0]"]


def test_bits_of_the_apic_and_the_chips_are_named() -> None:
    # SDM vol. 3: ISR, TMR, IRR are 256 bits each, 32 in each register, from 0x100, 0x180, 0x200 (13.8.4); LVT timer
    # 0x320: mask is bit 16, mode bits 18:17 (13.5.1); SVR 0xf0: enabled is bit 8 (13.9).
    def bits(value: Packed, other: Packed) -> dict[str, tuple[str, ...]]:
        return {change.path: change.bits for change in value.diff(other)}

    page = Lapic()
    for vector in (0, 31, 32, 0x31, 255):
        offset = 16 * (vector // 32)
        for first, kind in ((0x100, "ISR"), (0x180, "TMR"), (0x200, "IRR")):
            changed = page.replace_register(first + offset, 1 << vector % 32)
            assert bits(page, changed) == {f"regs[{first + offset:#x}]": (f"{kind}.vector {vector:#x}",)}
    timer = page.replace_register(0x320, 1 << 17 | 1 << 16 | 2)
    changed = timer.replace_register(0xF0, 1 << 8).replace_register(0x20, 5)
    assert bits(page, changed) == {
        "regs[0x320]": ("LVT_TIMER.vector[1]", "LVT_TIMER.masked", "LVT_TIMER.periodic"),
        "regs[0xf0]": ("SVR.enabled",), "regs[0x20]": (),
    }  # fmt: skip
    # 8259A: IMR bit n is input n; 82093AA 3.2.4: bit 16 masks, bit 15 is level, 63:56 the destination.
    assert bits(Pic(0, PicState()), Pic(0, PicState(imr=0x81))) == {"imr": ("IMR.input 0", "IMR.input 7")}
    entries = (0, 0, 1 << 63 | 1 << 16 | 1 << 15 | 1 << 11, *[0] * 21)
    assert bits(IoApic(IoApicState()), IoApic(IoApicState(redirtbl=entries))) == {
        "redirtbl[2]": ("entry 2.logical", "entry 2.level", "entry 2.masked", "entry 2.destination[7]")
    }
    # SDM vol. 1, 10.2.3: MXCSR.DAZ is bit 6, FZ 15; 13.1: component 2 is AVX.
    area = Xsave.initial()
    assert bits(area, area.replace(mxcsr=0x1F80 ^ 0x8040, xstate_bv=4 | 1 << 40)) == {
        "mxcsr": ("MXCSR.DAZ", "MXCSR.FZ"), "xstate_bv": ("XSTATE_BV.AVX", "XSTATE_BV bit 40"),
    }  # fmt: skip


def test_wrong_registers_of_the_apic() -> None:
    page = Lapic()
    for offset in (-4, 2, 0x400, None, 1.0, True):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            page.register(offset)  # type: ignore[arg-type]
    for value in (-1, 1 << 32, None, True):
        with pytest.raises(ArgumentError):
            page.replace_register(0x80, value)


def test_wrong_chips_and_frequencies() -> None:
    for wrong in ((2, PicState()), (0, IoApicState())):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            Pic(*wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError):
        IoApic(PicState())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        Pic.from_bytes(bytes(IoApic(IoApicState())))
    with pytest.raises(ArgumentError):
        Pic.from_bytes(b"")
    with pytest.raises(ArgumentTypeError):
        Pic.from_json({"chip_id": 0})
    for khz in (0, -1, 1 << 31, 1 << 32, "x", None, True):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            TscKhz.of(khz)
    with pytest.raises(ArgumentError):
        TscKhz.from_bytes(b"123")
    with pytest.raises(ArgumentError):
        TscKhz.from_bytes(b"\0\0\0\x80")


def test_values_of_any_size_that_cannot_be() -> None:
    for kind in (Xsave, NestedState, TscKhz):
        with pytest.raises(ArgumentTypeError, match=r"by from_bytes\(\)"):
            kind()
    area = Xsave.initial()
    for size in (1 << 40, -1, 4095, "x", None, True):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="Xsave"):
            Xsave.initial(size)  # type: ignore[arg-type]
    for number in (-1, 64, 1 << 70, "x"):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="number"):
            area.is_initial(number)  # type: ignore[arg-type]
        with pytest.raises((ArgumentError, ArgumentTypeError), match="number"):
            area.component(Component(number, "AVX", 576, 256))  # type: ignore[arg-type]
    for offset, size in ((-16, 16), (576, -1), ("x", 16), (1 << 70, 16)):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=r"offset|size"):
            area.component(Component(2, "AVX", offset, size))  # type: ignore[arg-type]
    made = NestedState.make("svm").to_json()
    for header in ({5: 1}, {"format": 1}, {"flags": 1}):
        with pytest.raises(ArgumentError, match="no such field"):
            NestedState.from_json(made | {"header": header})
    with pytest.raises(ArgumentTypeError, match="names of fields"):
        Regs.from_json({5: 1})
    for indices in (5, [None]):
        with pytest.raises(ArgumentTypeError):
            Msrs({0x10: 5}).only(indices)  # type: ignore[arg-type]
