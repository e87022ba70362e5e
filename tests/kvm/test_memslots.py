"""Memslots: what the kernel takes and refuses, against what we say of it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, KvmError
from hvmodel.host import Mapping
from hvmodel.kvm import Kvm, MemSlot, Vm
from hvmodel.kvm.memslots import _SlotMap, explain_region
from tests.need import need, need_cap

PAGE = 4096
LOG, READONLY, GUEST_MEMFD = 1, 2, 4
NR_PAGES = 64


@pytest.fixture
def memory() -> Iterator[Mapping]:
    with Mapping(None, NR_PAGES * PAGE) as memory:
        yield memory


@pytest.fixture
def vm(kvm: Kvm, memory: Mapping) -> Iterator[Vm]:
    """A VM that is closed before the memory in its slots is."""
    with kvm.create_vm() as vm:
        yield vm


def refused(vm: Vm, *args: Any, **named: Any) -> tuple[str, str | None]:
    """The errno's name and the field that a refused set_user_memory_region() blames."""
    with pytest.raises(KvmError) as error:
        vm.set_user_memory_region(*args, **named)
    assert error.value.call == "KVM_SET_USER_MEMORY_REGION"
    assert error.value.accepted
    return errno.errorcode[error.value.errno or 0], error.value.field


# ---- every cause by itself ----


def test_unaligned(vm: Vm, memory: Mapping) -> None:
    assert refused(vm, 0, 0, memory, size=PAGE + 1) == ("EINVAL", "size")
    assert refused(vm, 0, 0, memory, size=1) == ("EINVAL", "size")
    assert refused(vm, 0, 1, memory) == ("EINVAL", "gpa")
    assert refused(vm, 0, 0, memory, offset=8, size=PAGE) == ("EINVAL", "hva")


def test_unknown_flags(vm: Vm, memory: Mapping) -> None:
    for flags in (GUEST_MEMFD, 8, 1 << 31):  # a guest_memfd is for KVM_SET_USER_MEMORY_REGION2
        assert refused(vm, 0, 0, memory, flags=flags) == ("EINVAL", "flags")


def test_no_such_slot(vm: Vm, memory: Mapping) -> None:
    nr_slots = vm.check_extension(lib.KVM_CAP_NR_MEMSLOTS)
    assert refused(vm, nr_slots, 0, memory) == ("EINVAL", "slot")
    assert refused(vm, 0xFFFF, 0, memory) == ("EINVAL", "slot")
    spaces = max(vm.check_extension(lib.KVM_CAP_MULTI_ADDRESS_SPACE), 1)
    assert refused(vm, spaces << 16, 0, memory) == ("EINVAL", "slot")


def test_not_an_address_of_this_process(vm: Vm) -> None:
    assert refused(vm, 0, 0, 0xFFFF800000000000, size=PAGE) == ("EINVAL", "hva")
    with pytest.raises(ArgumentError):
        vm.set_user_memory_region(0, 0, (1 << 64) - PAGE, size=2 * PAGE)


def test_beyond_the_guest_s_addresses(vm: Vm, memory: Mapping) -> None:
    assert refused(vm, 0, 1 << 52, memory) == ("EINVAL", "gpa")
    assert refused(vm, 0, (1 << 64) - PAGE, memory, size=PAGE) == ("EINVAL", "gpa")  # ends at 2**64
    assert refused(vm, 0, (1 << 64) - PAGE, memory, size=2 * PAGE) == ("EINVAL", "gpa")


def test_too_large_for_a_slot(vm: Vm) -> None:
    assert refused(vm, 0, 0, PAGE, size=PAGE << 31) == ("EINVAL", "size")


def test_overlap(vm: Vm, memory: Mapping) -> None:
    vm.set_user_memory_region(0, 4 * PAGE, memory, size=4 * PAGE)
    for gpa, size in ((4, 4), (7, 1), (3, 2), (0, 16), (5, 1)):
        assert refused(vm, 1, gpa * PAGE, memory, size=size * PAGE) == ("EEXIST", "gpa")
    with pytest.raises(KvmError, match=r"\[0x3000, 0x5000\) overlaps slot 0 \[0x4000, 0x8000\)"):
        vm.set_user_memory_region(1, 3 * PAGE, memory, size=2 * PAGE)
    vm.set_user_memory_region(1, 8 * PAGE, memory, size=PAGE)
    vm.set_user_memory_region(2, 3 * PAGE, memory, size=PAGE)


def test_change_of_a_slot(vm: Vm, memory: Mapping) -> None:
    need_cap(vm, "READONLY_MEM")
    vm.set_user_memory_region(3, 0, memory, size=4 * PAGE)
    assert refused(vm, 3, 0, memory, size=5 * PAGE) == ("EINVAL", "size")
    assert refused(vm, 3, 0, memory, offset=PAGE, size=4 * PAGE) == ("EINVAL", "hva")
    assert refused(vm, 3, 0, memory, size=4 * PAGE, flags=READONLY) == ("EINVAL", "flags")
    vm.set_user_memory_region(3, 8 * PAGE, memory, size=4 * PAGE)
    vm.set_user_memory_region(3, 8 * PAGE, memory, size=4 * PAGE, flags=LOG)
    assert vm.memslots == {3: MemSlot(3, 8 * PAGE, 4 * PAGE, memory.hva, LOG)}
    vm.set_user_memory_region(4, 0, memory, size=PAGE)
    assert refused(vm, 4, 11 * PAGE, memory, size=PAGE) == ("EEXIST", "gpa")


def test_deleting_what_is_not_there(vm: Vm, memory: Mapping) -> None:
    vm.set_user_memory_region(1, 0, memory)
    for slot in (0, 99, 0xFFFF, 1 << 16):
        with pytest.raises(KvmError) as error:
            vm.delete_memory_region(slot)
        assert (error.value.errno, error.value.field) == (errno.EINVAL, "slot")
    vm.delete_memory_region(1)
    assert vm.memslots == {}


def test_arguments_that_can_never_be_right(vm: Vm, memory: Mapping) -> None:
    for bad in (
        {"size": 0},
        {"offset": memory.size},
        {"offset": PAGE, "size": memory.size},
        {"size": memory.size + PAGE},
    ):
        with pytest.raises(ArgumentError):
            vm.set_user_memory_region(0, 0, memory, **bad)
    with pytest.raises(ArgumentError, match="a size in bytes, where the memory is an address"):
        vm.set_user_memory_region(0, 0, memory.hva)
    for memory_ in (None, "x", b"\0" * PAGE, 1.5, True):
        with pytest.raises(ArgumentTypeError):
            vm.set_user_memory_region(0, 0, memory_, size=PAGE)


# ---- the memory of a slot ----


def test_a_slot_keeps_its_mapping(vm: Vm, memory: Mapping) -> None:
    vm.set_user_memory_region(0, 0, memory, size=PAGE)
    vm.set_user_memory_region(1, PAGE, memory, offset=PAGE)
    with pytest.raises(BusyError, match="memslot 0 of"):
        memory.close()
    vm.delete_memory_region(0)
    with pytest.raises(BusyError, match="memslot 1 of"):
        memory.close()
    vm.delete_memory_region(1)
    memory.close()


def test_a_refused_slot_keeps_nothing(vm: Vm, memory: Mapping) -> None:
    with pytest.raises(KvmError):
        vm.set_user_memory_region(0, 1, memory)
    memory.close()


def test_a_changed_slot_keeps_its_mapping_once(vm: Vm, memory: Mapping) -> None:
    for gpa in (0, 1 << 20, 2 << 20):
        vm.set_user_memory_region(0, gpa, memory)
    vm.delete_memory_region(0)
    memory.close()


def test_a_closed_vm_keeps_nothing(kvm: Kvm, memory: Mapping) -> None:
    vm = kvm.create_vm()
    vm.set_user_memory_region(0, 0, memory)
    vm.close()
    with pytest.raises(ClosedError):
        vm.set_user_memory_region(1, 0, memory)
    memory.close()
    assert memory.closed


def test_slots_set_by_the_raw_door_are_known(vm: Vm, memory: Mapping) -> None:
    fields = {"slot": 5, "guest_phys_addr": PAGE, "memory_size": 2 * PAGE, "userspace_addr": memory.hva, "flags": LOG}
    vm.ioctl("KVM_SET_USER_MEMORY_REGION", ffi.new("struct kvm_userspace_memory_region *", fields))
    assert vm.memslots == {5: MemSlot(5, PAGE, 2 * PAGE, memory.hva, LOG)}
    assert refused(vm, 6, 2 * PAGE, memory) == ("EEXIST", "gpa")
    fields["memory_size"] = 0
    vm.ioctl("KVM_SET_USER_MEMORY_REGION", ffi.new("struct kvm_userspace_memory_region *", fields))
    assert vm.memslots == {}


def test_a_slot_is_found_by_its_addresses(vm: Vm, memory: Mapping) -> None:
    slot = vm.set_user_memory_region(2, 4 * PAGE, memory, size=2 * PAGE, flags=LOG)
    assert (slot.end, slot.readonly) == (6 * PAGE, False)
    assert [vm.memslot_at(gpa) for gpa in (0, 4 * PAGE - 1, 4 * PAGE, 6 * PAGE - 1, 6 * PAGE, 1 << 60)] == [
        None,
        None,
        slot,
        slot,
        None,
        None,
    ]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=8), st.integers(0, 40))
def test_the_lookup_is_what_a_search_finds(ranges: list[tuple[int, int]], at: int) -> None:
    slots = _SlotMap()
    kept: list[MemSlot] = []
    for number, (start, size) in enumerate(ranges):
        if all(start + size <= other.gpa or other.end <= start for other in kept):
            kept.append(MemSlot(number, start, size, 0, 0))
            slots.put(kept[-1])
    assert slots.at(at) == next((slot for slot in kept if slot.gpa <= at < slot.end), None)
    for slot in kept[::2]:
        slots.drop(slot.slot)
    assert slots.at(at) == next((slot for slot in kept[1::2] if slot.gpa <= at < slot.end), None)


# ---- the kernel's answers to random changes ----

# A change is one that could be right, with at most one value that cannot.
_PLAUSIBLE = st.tuples(
    st.integers(0, 3),
    st.integers(0, 15).map(lambda page: page * PAGE),
    st.sampled_from([2 * PAGE, 2 * PAGE, 2 * PAGE, 3 * PAGE, 0]),
    st.sampled_from([0, 0, 0, PAGE]),
    st.sampled_from([0, 0, LOG, LOG, READONLY]),
)
_WRONG = {
    0: (32763, 32764, 0xFFFF, 1 << 16, (1 << 32) - 1),
    1: (1, 1 << 52, (1 << 64) - PAGE, (1 << 64) - 2 * PAGE),
    2: (100, PAGE + 1, PAGE << 31, 1 << 63),
    3: (1, (1 << 47) - PAGE, 1 << 63, (1 << 64) - 2 * PAGE),
    4: (GUEST_MEMFD, 5, 8, 1 << 16),
}
_MISTAKES = st.one_of(
    st.none(),
    st.none(),
    st.none(),
    st.sampled_from([(at, value) for at, values in _WRONG.items() for value in values]),
)


def _with(change: tuple[int, ...], mistake: tuple[int, int] | None) -> tuple[int, ...]:
    if mistake is None:
        return change
    at, value = mistake
    return (*change[:at], value, *change[at + 1 :])


@settings(max_examples=120, deadline=None)
@given(changes=st.lists(st.builds(_with, _PLAUSIBLE, _MISTAKES), min_size=1, max_size=30))
def test_a_field_is_blamed_exactly_when_the_kernel_refuses(changes: list[tuple[int, ...]]) -> None:
    need("kvm")
    # Addresses up to here are every host's: a refusal beyond may or may not come.
    everywhere = (1 << 47) - PAGE, 1 << 36
    with Mapping(None, NR_PAGES * PAGE) as memory, Kvm() as kvm, kvm.create_vm() as vm:
        for slot, gpa, size, at, flags in changes:
            hva = at if at >= 1 << 46 else memory.hva + at
            region = {"slot": slot, "flags": flags, "guest_phys_addr": gpa, "memory_size": size, "userspace_addr": hva}
            before = vm.memslots
            pointer = ffi.new("struct kvm_userspace_memory_region *", region)
            err = -min(lib.kvm_set_user_memory_region(vm.fd, pointer), 0)
            fault = explain_region(vm.fd, before, slot, gpa, size, hva, flags, err)
            if err:
                assert err in (errno.EINVAL, errno.EEXIST)
                assert fault is not None, f"{region} was refused and is not explained: {before}"
                assert (err == errno.EEXIST) == ("overlaps" in fault[3])
                assert fault[0] in ("slot", "gpa", "size", "hva", "flags")
                with pytest.raises(KvmError):
                    vm.ioctl("KVM_SET_USER_MEMORY_REGION", pointer)
                assert vm.memslots == before
            else:
                vm._note(slot, gpa, size, hva, flags)
                assert vm.memslots.get(slot) == (MemSlot(slot, gpa, size, hva, flags) if size else None)
                if hva + size <= everywhere[0] and gpa + size <= everywhere[1]:
                    assert fault is None, f"{region} was taken: {fault}"
