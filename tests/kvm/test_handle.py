"""What every KVM handle has: a life, the raw door `ioctl`, attributes that get and set a struct, and refusals."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from hvmodel._ffi import IOCTLS, ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HvError, KvmError, UnsupportedError
from hvmodel.kvm import Device, Handle, Kvm, StructItem, Vcpu, Vm, fields
from tests.host.held import nothing_leaks
from tests.kvm.guest import Guest

ITEMS = [(kind, name) for kind in (Vm, Vcpu) for name, item in vars(kind).items() if isinstance(item, StructItem)]
GETTERS = [(kind, name) for kind, name in ITEMS if getattr(kind, name).get]
SETTERS = [(kind, name) for kind, name in ITEMS if getattr(kind, name).put]


def named(items: list[tuple[type, str]]) -> Any:
    return pytest.mark.parametrize(("kind", "name"), items, ids=[f"{kind.__name__}.{name}" for kind, name in items])


def handles(kvm: Kvm) -> list[Handle]:
    """One of each kind, device first."""
    vm = kvm.create_vm()
    made: list[Handle] = [vm, vm.create_vcpu(0)]
    with suppress(KvmError):
        made.append(vm.create_device(lib.KVM_DEV_TYPE_VFIO))
    return [*reversed(made), Kvm()]


# ---- life ----


def test_close_may_be_called_again(kvm: Kvm) -> None:
    with nothing_leaks():
        for handle in handles(kvm):
            fd = handle.fd
            assert handle.fileno() == fd
            assert not handle.closed
            handle.close()
            handle.close()
            assert handle.closed
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


def test_a_handle_shows_itself(kvm: Kvm) -> None:
    for handle in handles(kvm):
        name = type(handle).__name__
        assert f"fd={handle.fd}" in repr(handle)
        handle.close()
        assert repr(handle) in (f"<{name} closed>", f"<{name} 0 closed>")


def test_a_forgotten_handle_warns_and_is_closed(kvm: Kvm) -> None:
    def forgotten(make: Callable[[], object]) -> list[str]:
        with warnings.catch_warnings(record=True, action="always") as seen:
            make()
            gc.collect()
        assert {warning.category for warning in seen} == {ResourceWarning}
        return sorted(str(warning.message).split(" fd=")[0] for warning in seen)

    with nothing_leaks():
        assert forgotten(Kvm) == ["unclosed Kvm"]
        assert forgotten(kvm.create_vm) == ["unclosed Vm"]
        # A vCPU and its VM hold each other: they go together.
        assert forgotten(lambda: kvm.create_vm().create_vcpu(0)) == ["unclosed Vcpu 0", "unclosed Vm"]


def test_a_closed_handle_says_so(kvm: Kvm) -> None:
    for handle in handles(kvm):
        handle.close()
        with pytest.raises(ClosedError):
            _ = handle.fd
        for name, row in IOCTLS.items():
            if handle.scope not in row.scope:
                continue
            kind, _, detail = row.argument.partition(":")
            arg = {"-": None, "ulong": 0, "struct": None, "ptr": None}[kind]
            if kind in ("struct", "ptr"):
                arg = ffi.new("uint64_t[2]" if kind == "ptr" else f"struct {detail} *")
            with pytest.raises(ClosedError, match="closed"):
                handle.ioctl(name, arg)


@named(GETTERS)
def test_an_attribute_of_a_closed_handle_cannot_be_read(kvm: Kvm, kind: type, name: str) -> None:
    for handle in handles(kvm):
        handle.close()
        if isinstance(handle, kind):
            with pytest.raises(ClosedError):
                getattr(handle, name)


@named(SETTERS)
def test_an_attribute_of_a_closed_handle_cannot_be_set(kvm: Kvm, kind: type, name: str) -> None:
    for handle in handles(kvm):
        handle.close()
        if isinstance(handle, kind):
            with pytest.raises(ClosedError):
                setattr(handle, name, ffi.new(f"struct {getattr(kind, name).struct} *"))


def test_handles_cannot_be_pickled_or_copied(kvm: Kvm) -> None:
    for handle in handles(kvm):
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled"):
                way(handle)
        handle.close()


def test_closing_a_vm_closes_its_vcpus(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    vcpus = [vm.create_vcpu(id) for id in (2, 0, 1)]
    assert [vcpu.id for vcpu in vm.vcpus] == [0, 1, 2]
    assert all(vcpu.vm is vm for vcpu in vcpus)
    assert vm.kvm is kvm
    vcpus[0].close()
    assert [vcpu.id for vcpu in vm.vcpus] == [0, 1]
    vm.close()
    assert all(vcpu.closed for vcpu in vcpus)
    assert vm.vcpus == ()


# ---- ioctl ----


def test_only_names_of_the_table_and_of_this_kind_of_fd(kvm: Kvm) -> None:
    for handle in handles(kvm):
        for name in ("KVM_NO_SUCH", "kvm_get_regs", ""):
            with pytest.raises(ArgumentError, match=r"a name from hvmodel\.kvm\.IOCTLS"):
                handle.ioctl(name)
        for name, row in IOCTLS.items():
            if handle.scope not in row.scope:
                with pytest.raises(ArgumentError, match=f"an ioctl of a {handle.scope} fd"):
                    handle.ioctl(name)
        handle.close()


def test_every_row_refuses_wrong_types(kvm: Kvm) -> None:
    other = ffi.new("struct kvm_irq_routing_s390_adapter *")
    wrong = [1.5, "text", b"bytes", [], [{}], (), {}, object(), other[0], ffi.typeof("int"), ffi.NULL, True]
    for handle in handles(kvm):
        for name, row in IOCTLS.items():
            if handle.scope not in row.scope:
                continue
            kind, _, detail = row.argument.partition(":")
            for arg in wrong + ([other] if detail != "void" else []):
                if detail == "void" and isinstance(arg, ffi.CData):
                    continue  # any address will do there
                with pytest.raises(ArgumentTypeError) as refused:
                    handle.ioctl(name, arg)
                assert refused.value.call == name
            if kind in ("struct", "ptr"):
                with pytest.raises(ArgumentTypeError):
                    handle.ioctl(name)
            if kind == "struct":
                with pytest.raises(ArgumentTypeError):
                    handle.ioctl(name, 4096)
                with pytest.raises(ArgumentTypeError):  # room for none
                    handle.ioctl(name, ffi.new(f"struct {detail}[]", 0))
            else:
                for number in (-1, 1 << 64):
                    with pytest.raises((ArgumentError, ArgumentTypeError)):
                        handle.ioctl(name, number)
        handle.close()


def test_every_wrapper_refuses_wrong_types() -> None:
    # The wrappers are cffi's own: TypeError and OverflowError are its words.
    other = ffi.new("struct kvm_irq_routing_s390_adapter *")
    for name, row in IOCTLS.items():
        call = getattr(lib, name.lower())
        arity = 1 if row.argument == "-" else 2
        for fd in (None, "text", 1.5, b"", object(), [], other):
            with pytest.raises(TypeError):
                call(fd, *([0] if arity == 2 else []))
        with pytest.raises(OverflowError):
            call(1 << 40, *([0] if arity == 2 else []))
        for extra in ((), (-1, None, None)):
            with pytest.raises(TypeError):
                call(*extra)
        if arity == 2:
            for arg in (None, "text", 1.5, object(), other[0]) + ((other,) if "void" not in row.argument else ()):
                with pytest.raises(TypeError):
                    call(-1, arg)


def test_an_integer_is_passed_by_reference_where_the_row_points_at_one(vm: Vm) -> None:
    assert vm.ioctl("KVM_SET_IDENTITY_MAP_ADDR", 0xFEFFC000) == 0
    assert vm.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", 0xFEFFC000)) == 0


def test_an_address_is_passed_as_it_is_where_the_row_says_void(vm: Vm) -> None:
    # 0 is an address too: SEV's way to ask whether there is SEV.
    try:
        assert vm.ioctl("KVM_MEMORY_ENCRYPT_OP", 0) == 0
    except KvmError as error:
        assert error.call == "KVM_MEMORY_ENCRYPT_OP"  # noqa: PT017


def test_what_the_kernel_does_not_know_is_unsupported(vm: Vm, vcpu: Vcpu) -> None:
    with pytest.raises(UnsupportedError) as refused:
        vm.ioctl("KVM_SET_MEMORY_REGION", ffi.new("struct kvm_memory_region *"))
    assert refused.value.capability is None
    if not vm.check_extension(lib.KVM_CAP_X86_SMM):
        with pytest.raises(UnsupportedError) as refused:
            vcpu.smi()
        assert refused.value.capability == "KVM_CAP_X86_SMM"
        assert "does not have it" in str(refused.value)


# ---- attributes ----


def test_an_attribute_of_the_class_is_its_descriptor() -> None:
    assert isinstance(Vcpu.regs, StructItem)
    assert (Vcpu.regs.get, Vcpu.regs.put, Vcpu.regs.struct) == ("KVM_GET_REGS", "KVM_SET_REGS", "kvm_regs")
    for kind, name in ITEMS:
        item = getattr(kind, name)
        assert item.__doc__
        for ioctl in (item.get, item.put):
            assert ioctl is None or IOCTLS[ioctl].argument == f"struct:{item.struct}"
            assert ioctl is None or kind.scope in IOCTLS[ioctl].scope


def test_reading_gives_a_struct_of_its_own(vcpu: Vcpu) -> None:
    first, second = vcpu.regs, vcpu.regs
    first.rax = 99
    assert second.rax == vcpu.regs.rax == 0


def test_every_attribute_can_be_set_to_what_it_is(guest: Callable[..., Guest]) -> None:
    def before(vm: Vm) -> None:
        vm.create_pit2()

    g = guest(irqchip=True, before=before)
    g.vcpu.set_cpuid2(g.kvm.supported_cpuid_table())
    for kind, name in GETTERS:
        owner = g.vm if kind is Vm else g.vcpu
        value = getattr(owner, name)
        if name == "clock":
            value.flags = 0  # what can be got is not all that can be set
        setattr(owner, name, value)
        again = getattr(owner, name)
        if name not in ("clock", "pit", "pit2"):  # where time goes on
            assert bytes(ffi.buffer(again)) == bytes(ffi.buffer(value)), name
        assert fields(again).keys() == fields(value).keys() != set()


@named(SETTERS)
def test_an_attribute_takes_its_own_struct_only(kvm: Kvm, kind: type, name: str) -> None:
    struct = getattr(kind, name).struct
    right = ffi.new(f"struct {struct} *")
    wrong = [None, 5, "text", b"x", [], [{}], (), {}, object(), True, right[0], ffi.NULL]
    wrong += [
        ffi.new("struct kvm_irq_routing_s390_adapter *"),
        ffi.new(f"struct {struct}[]", 0),
        ffi.cast("void *", right),
    ]
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        owner = vm if kind is Vm else vcpu
        for value in wrong:
            with pytest.raises(ArgumentTypeError, match=f"{kind.__name__}.{name}: value: expected a 'struct {struct}"):
                setattr(owner, name, value)


def test_an_attribute_that_can_only_be_set(vcpu: Vcpu) -> None:
    with pytest.raises(AttributeError, match="can only be set"):
        _ = vcpu.guest_debug
    vcpu.guest_debug = ffi.new("struct kvm_guest_debug *")


def test_an_attribute_that_can_only_be_read(vcpu: Vcpu) -> None:
    item: StructItem[Any] = StructItem("KVM_GET_REGS", None, "kvm_regs", "")
    item.__set_name__(Vcpu, "only")
    assert item.__get__(vcpu, Vcpu).rip == 0xFFF0
    with pytest.raises(AttributeError, match=r"Vcpu\.only is read-only"):
        item.__set__(vcpu, ffi.new("struct kvm_regs *"))


def test_a_refused_attribute_names_its_ioctl(vm: Vm, vcpu: Vcpu) -> None:
    for owner, name, call in ((vm, "pit2", "KVM_GET_PIT2"), (vcpu, "lapic", "KVM_GET_LAPIC")):
        with pytest.raises(KvmError) as refused:
            getattr(owner, name)
        assert refused.value.ioctl == call
    with pytest.raises(KvmError) as refused:
        vcpu.mp_state = ffi.new("struct kvm_mp_state *", [77])
    assert refused.value.ioctl == "KVM_SET_MP_STATE"


# ---- fields ----


def test_fields_of_every_struct_that_an_attribute_has(vcpu: Vcpu) -> None:
    sregs = fields(vcpu.sregs)
    assert sregs["cs"]["base"] == 0xFFFF0000
    assert sregs["interrupt_bitmap"] == [0, 0, 0, 0]
    assert fields(vcpu.fpu)["fcw"] == 0x37F
    assert len(fields(vcpu.fpu)["xmm"]) == 16
    assert fields(vcpu.regs[0]) == fields(vcpu.regs)
    assert fields(vcpu._kvm_run)["immediate_exit"] == 0
    assert fields(ffi.new("struct kvm_msrs *", {"entries": 3}))["entries"] == []  # how many, only nmsrs knows


def test_fields_of_what_is_no_struct() -> None:
    pointer = ffi.new("struct kvm_regs *")
    for wrong in (None, 5, "x", [], ffi.NULL, ffi.cast("struct kvm_regs *", 0), ffi.new("int *"), ffi.typeof(pointer)):
        with pytest.raises(ArgumentTypeError):
            fields(wrong)


def test_every_error_of_the_binding_is_of_one_family() -> None:
    assert all(issubclass(kind, HvError) for kind in (ArgumentError, ArgumentTypeError, ClosedError, KvmError))
    assert issubclass(Device, Handle)
