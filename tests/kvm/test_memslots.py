"""Memslots: what the kernel takes and refuses, against what we say of it."""

from __future__ import annotations

import errno
import gc
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, KvmError
from hvmodel.host import Mapping
from hvmodel.kvm import Kvm, MemSlot, SlotMemory, Vm
from hvmodel.kvm import slotrules as slotrules_module
from hvmodel.kvm import vm as vm_module
from hvmodel.kvm.memslots import _SlotMap
from hvmodel.kvm.slotrules import SlotLimits, explain_region, guest_size, refusal
from hvmodel.witness.check_memslots import check_memslots, random_change, set_region
from hvmodel.witness.result import Tally
from tests.cases import cases
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
            vm.set_user_memory_region(0, 0, memory_, size=PAGE)  # type: ignore[arg-type]


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


class _Interrupting:
    # The library, whose next change of a slot is interrupted before or after it is made.
    def __init__(self, when: str) -> None:
        self.when = when

    def __getattr__(self, name: str) -> Any:
        return self.set if name == "kvm_set_user_memory_region" else getattr(lib, name)

    def set(self, fd: int, region: Any) -> int:
        when, self.when = self.when, ""
        if when == "before":
            raise KeyboardInterrupt
        rc = int(lib.kvm_set_user_memory_region(fd, region))
        if when == "after":
            raise KeyboardInterrupt
        return rc


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_change_of_a_slot(vm: Vm, memory: Mapping, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = vm.set_user_memory_region(0, 0, memory, size=PAGE)

    def interrupted(change: Any, *args: Any, **named: Any) -> None:
        monkeypatch.setattr(vm_module, "lib", _Interrupting(when))
        with pytest.raises(KeyboardInterrupt):
            change(*args, **named)
        monkeypatch.undo()

    interrupted(vm.set_user_memory_region, 1, PAGE, memory, size=PAGE)
    interrupted(vm.set_user_memory_region, 0, 8 * PAGE, memory, size=PAGE)
    assert vm.memslots == {0: kept}
    # The kernel has no slot at one of the new places, and still has the old one.
    vm.set_user_memory_region(2, PAGE, memory, size=8 * PAGE)
    vm.delete_memory_region(2)
    assert refused(vm, 2, 0, memory, size=PAGE) == ("EEXIST", "gpa")
    interrupted(vm.delete_memory_region, 0)
    assert vm.memslots == {}
    vm.set_user_memory_region(2, 0, memory, size=PAGE)
    vm.delete_memory_region(2)
    memory.close()  # no pin is left


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
            fault = explain_region(vm.fd, before, MemSlot(slot, gpa, size, hva, flags), err)
            if err:
                assert err in (errno.EINVAL, errno.EEXIST)
                assert fault is not None, f"{region} was refused and is not explained: {before}"
                assert (err == errno.EEXIST) == ("overlaps" in fault.detail)
                assert fault.field in ("slot", "gpa", "size", "hva", "flags")
                with pytest.raises(KvmError):
                    vm.ioctl("KVM_SET_USER_MEMORY_REGION", pointer)
                assert vm.memslots == before
            else:
                vm._note(MemSlot(slot, gpa, size, hva, flags))
                assert vm.memslots.get(slot) == (MemSlot(slot, gpa, size, hva, flags) if size else None)
                if hva + size <= everywhere[0] and gpa + size <= everywhere[1]:
                    assert fault is None, f"{region} was taken: {fault}"


# ---- many slots at once ----


def test_a_change_of_many_slots(vm: Vm, memory: Mapping) -> None:
    first = vm.change_memory_regions(add=[SlotMemory(at * PAGE, memory, at * PAGE, PAGE) for at in (5, 3, 1)])
    assert first == [MemSlot(slot, at * PAGE, PAGE, memory.hva + at * PAGE, 0) for slot, at in enumerate((5, 3, 1))]
    assert vm.memslots == {slot.slot: slot for slot in first}
    assert [vm.memslot_at(at * PAGE) for at in (1, 2, 3, 5)] == [first[2], None, first[1], first[0]]
    [new] = vm.change_memory_regions(
        delete=[1, 0], flags={2: LOG}, add=[SlotMemory(3 * PAGE, memory, 0, 3 * PAGE, LOG)]
    )
    assert (new.slot, new.gpa, new.size, new.flags) == (0, 3 * PAGE, 3 * PAGE, LOG)
    assert vm.memslots.keys() == {0, 2}
    assert vm.memslot(2) == MemSlot(2, PAGE, PAGE, memory.hva + PAGE, LOG)
    assert vm.memslot(1) is None
    for slot in (0, 2):
        assert vm.get_dirty_log(slot) == bytes(8)  # the kernel logs it
    with pytest.raises(BusyError):
        memory.close()
    assert vm.change_memory_regions(delete=[0, 2]) == []
    memory.close()  # no pin is left


def test_a_refused_change_of_many_slots_changes_nothing(vm: Vm, memory: Mapping) -> None:
    vm.change_memory_regions(add=[SlotMemory(at * PAGE, memory, at * PAGE, PAGE) for at in range(4)])
    before = vm.memslots
    good = SlotMemory(0x100 * PAGE, memory, 0, PAGE)
    for bad, field, err in (
        (SlotMemory(3 * PAGE, memory, 0, PAGE), "gpa", errno.EEXIST),
        (SlotMemory(0x200 * PAGE + 1, memory, 0, PAGE), "gpa", errno.EINVAL),
        (SlotMemory(0x200 * PAGE, memory, 8, PAGE), "hva", errno.EINVAL),
        (SlotMemory(0x200 * PAGE, memory, 0, 8), "size", errno.EINVAL),
        (SlotMemory(0x200 * PAGE, memory, 0, PAGE, 8), "flags", errno.EINVAL),
    ):
        with pytest.raises(KvmError) as error:
            vm.change_memory_regions(delete=[0, 2], flags={1: LOG}, add=[good, bad])
        assert (error.value.errno, error.value.field) == (err, field)
        assert vm.memslots == before
        for slot in before:  # in the kernel, too: a slot that is there as it is can be set again, but not anew
            vm.ioctl(
                "KVM_SET_USER_MEMORY_REGION",
                ffi.new("struct kvm_userspace_memory_region *", [slot, 0, slot * PAGE, PAGE, memory.hva + slot * PAGE]),
            )
        with pytest.raises(KvmError):
            vm.delete_memory_region(4)
    vm.change_memory_regions(delete=list(before))
    memory.close()


def test_a_change_that_can_never_be_right_asks_nobody(vm: Vm, memory: Mapping) -> None:
    row = SlotMemory(0, memory, 0, PAGE)
    nr_slots = vm.check_extension(lib.KVM_CAP_NR_MEMSLOTS)
    never: list[dict[str, Any]] = [
        {"delete": [0]},
        {"flags": {0: LOG}},
        {"add": [row] * (nr_slots + 1)},
        {"add": [SlotMemory(0, memory, 0, 0)]},
        {"add": [SlotMemory(0, memory, PAGE, memory.size)]},
        {"add": [SlotMemory(0, memory.hva, 0, PAGE << 31)]},  # type: ignore[arg-type]
        {"add": [row], "address_space": 1 << 16},
    ]
    for bad in never:
        with pytest.raises(ArgumentError):
            vm.change_memory_regions(**bad)
    never = [{"delete": 5}, {"add": [5]}, {"add": None}, {"flags": [1]}, {"delete": ["0"]}, {"flags": {0: None}}]
    for bad in never:
        with pytest.raises(ArgumentTypeError):
            vm.change_memory_regions(**bad)
    vm.set_user_memory_region(0, 0, memory)
    with pytest.raises(ArgumentError):
        vm.change_memory_regions(delete=[0, 0])
    with pytest.raises(ArgumentError):
        vm.change_memory_regions(delete=[0], flags={0: LOG})
    assert vm.memslots.keys() == {0}


def test_what_cannot_be_put_back_is_told(vm: Vm, memory: Mapping) -> None:
    # The memory of a slot that was set by its address is gone by the time it is to be put back: the kernel takes it all
    # the same.  A guest_memfd whose descriptor was closed it does not take.
    need_cap(vm, "GUEST_MEMFD")
    fd = vm.create_guest_memfd(4 * PAGE)
    vm.set_user_memory_region2(0, 0, memory, size=PAGE, guest_memfd=fd)
    vm.set_user_memory_region(1, PAGE, memory, size=PAGE)
    os.close(fd)
    with pytest.raises(KvmError) as error:
        vm.change_memory_regions(delete=[0, 1], add=[SlotMemory(1, memory, 0, PAGE)])
    [note] = error.value.__notes__
    assert note.startswith("slot 0 could not be put back as it was: KVM_SET_USER_MEMORY_REGION2: guest_memfd=")
    assert vm.memslots.keys() == {1}
    assert vm.memslot_at(0) is None
    vm.delete_memory_region(1)
    memory.close()


# ---- guest_memfd ----


def test_a_slot_with_a_guest_memfd(vm: Vm, memory: Mapping) -> None:
    need_cap(vm, "GUEST_MEMFD")
    fd = vm.create_guest_memfd(8 * PAGE)
    try:
        assert guest_size(fd) == 8 * PAGE
        slot = vm.set_user_memory_region2(
            0, 0, memory, size=4 * PAGE, guest_memfd=fd, guest_memfd_offset=2 * PAGE, flags=0
        )
        assert slot == MemSlot(0, 0, 4 * PAGE, memory.hva, GUEST_MEMFD, fd, 2 * PAGE)
        assert vm.memslots == {0: slot}

        def refused2(*args: Any, **named: Any) -> tuple[str, str | None]:
            with pytest.raises(KvmError) as error:
                vm.set_user_memory_region2(*args, **named)
            assert error.value.call == "KVM_SET_USER_MEMORY_REGION2"
            return errno.errorcode[error.value.errno or 0], error.value.field

        assert refused2(0, 0x100000, memory, size=4 * PAGE, guest_memfd=fd) == ("EINVAL", "slot")
        assert refused2(0, 0x100000, memory, size=4 * PAGE) == ("EINVAL", "slot")
        more = {"size": 2 * PAGE, "guest_memfd": fd}
        assert refused2(1, 0x100000, memory, guest_memfd_offset=PAGE, **more) == ("EINVAL", "guest_memfd_offset")
        assert refused2(1, 0x100000, memory, guest_memfd_offset=7 * PAGE, **more) == ("EINVAL", "guest_memfd_offset")
        assert refused2(1, 0x100000, memory, guest_memfd_offset=1, **more) == ("EINVAL", "guest_memfd_offset")
        assert refused2(1, 0x100000, memory, guest_memfd_offset=(1 << 64) - PAGE, **more) == (
            "EINVAL",
            "guest_memfd_offset",
        )
        for flags in (LOG, READONLY, 8):
            assert refused2(1, 0x100000, memory, flags=flags, **more) == ("EINVAL", "flags")
        assert refused2(1, 0, memory, **more) == ("EEXIST", "gpa")
        assert refused2(1, 0x100000, memory, size=PAGE, guest_memfd=0x7FFFFFF0) == ("EBADF", "guest_memfd")
        with open("/dev/null", "rb") as null:
            assert refused2(1, 0x100000, memory, size=PAGE, guest_memfd=null) == ("EINVAL", "guest_memfd")
        with vm.kvm.create_vm() as other:
            foreign = other.create_guest_memfd(8 * PAGE)
            assert refused2(1, 0x100000, memory, size=PAGE, guest_memfd=foreign) == ("EINVAL", "guest_memfd")
            os.close(foreign)
        vm.set_user_memory_region2(1, 0x100000, memory, guest_memfd_offset=6 * PAGE, **more)
        vm.delete_memory_region(0)
        vm.set_user_memory_region2(0, 0, memory, size=6 * PAGE, guest_memfd=fd)
    finally:
        os.close(fd)


def test_the_second_ioctl_does_what_the_first_does(vm: Vm, memory: Mapping) -> None:
    need_cap(vm, "USER_MEMORY2")
    slot = vm.set_user_memory_region2(3, PAGE, memory, offset=PAGE, size=PAGE, flags=LOG)
    assert slot == MemSlot(3, PAGE, PAGE, memory.hva + PAGE, LOG)
    with pytest.raises(BusyError):
        memory.close()
    assert vm.get_dirty_log(3) == bytes(8)
    with pytest.raises(ArgumentError, match="with a guest_memfd only"):
        vm.set_user_memory_region2(4, 0, memory, size=PAGE, flags=GUEST_MEMFD)
    vm.delete_memory_region(3)
    memory.close()


def test_a_guest_memfd_s_owner_is_kept(vm: Vm, memory: Mapping) -> None:
    need_cap(vm, "GUEST_MEMFD")

    class Owner:
        def __init__(self) -> None:
            self.fd, self.pins = vm.create_guest_memfd(PAGE), 0

        def fileno(self) -> int:
            return self.fd

        def pin(self, why: str) -> None:
            assert "memslot 0" in why
            self.pins += 1

        def unpin(self, _why: str) -> None:
            self.pins -= 1

    owner = Owner()
    with pytest.raises(KvmError):
        vm.set_user_memory_region2(0, 1, memory, size=PAGE, guest_memfd=owner)
    assert owner.pins == 0
    vm.set_user_memory_region2(0, 0, memory, size=PAGE, guest_memfd=owner)
    assert owner.pins == 1
    vm.delete_memory_region(0)
    assert owner.pins == 0
    os.close(owner.fd)


# ---- the rules, against the kernel ----


def test_limits_are_the_kernel_s(vm: Vm, memory: Mapping) -> None:
    limits = SlotLimits.of(vm.fd)
    last = limits.nr_slots - 1
    vm.set_user_memory_region(last, 0, memory, size=PAGE)
    vm.set_user_memory_region(0, PAGE, limits.user_end - PAGE, size=PAGE)
    assert refused(vm, 1, 2 * PAGE, limits.user_end, size=PAGE) == ("EINVAL", "hva")
    vm.delete_memory_region(last)
    if limits.gpa_bits == 52:  # no EPT, no NPT: of the processor's page tables, which every KVM has alike
        edge = 1 << 52
        vm.set_user_memory_region(last, edge - PAGE, memory, size=PAGE)
        assert refused(vm, 1, edge, memory, size=PAGE) == ("EINVAL", "gpa")
        assert refused(vm, 1, edge - 2 * PAGE, memory, size=4 * PAGE) == ("EEXIST", "gpa")  # an overlap comes first


@settings(max_examples=cases(40, 400), deadline=None, database=None)
@given(seed=st.integers(0, 1 << 32), length=st.integers(1, 120))
def test_the_rules_predict_the_kernel(seed: int, length: int) -> None:
    need("kvm")
    rng = random.Random(seed)
    with Mapping(None, NR_PAGES * PAGE) as memory, Kvm() as kvm, kvm.create_vm() as vm:
        limits = SlotLimits.of(vm.fd)
        mine = [vm.create_guest_memfd(NR_PAGES * PAGE)] if limits.flags & GUEST_MEMFD else []
        slots: dict[int, MemSlot] = {}
        try:
            for _ in range(length):
                change, second = random_change(rng, limits, memory.hva, [*mine, -1])
                slot, gpa, size, hva, flags, fd, offset = change
                wanted = MemSlot(slot, gpa, size, hva, flags, fd if flags & GUEST_MEMFD else None, offset)
                fault = refusal(limits, slots, wanted, dict.fromkeys(mine, NR_PAGES * PAGE), second=second)
                err = set_region(vm, change, second)
                assert (fault.errno if fault else 0) == err, f"{wanted} to {slots}: {fault}"
                explained = explain_region(vm.fd, slots, wanted, err, second=second) if err else None
                assert not err or explained is not None
                if not err:
                    slots.pop(slot, None)
                    slots |= {slot: wanted} if size else {}
        finally:
            for fd in mine:
                os.close(fd)


@pytest.mark.parametrize("rule", ["overlaps", "READONLY cannot", "page-aligned", "address width", "only be deleted"])
def test_the_check_sees_a_rule_that_is_missing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm")
    faults = slotrules_module._faults
    right = Tally("slots", "kernel")
    check_memslots(right, 1500)
    assert right.result().ok
    monkeypatch.setattr(slotrules_module, "_faults", lambda *args: (f for f in faults(*args) if rule not in f.detail))
    wrong = Tally("slots", "kernel")
    check_memslots(wrong, 1500)
    assert wrong.mismatches > 0


def test_a_forgotten_vm_lets_go_of_its_memory() -> None:
    need("kvm")
    with Kvm() as kvm, Mapping(None, "64K") as mapping:
        vms = [kvm.create_vm()]
        vms[0].set_user_memory_region(0, 0, mapping)
        with pytest.raises(BusyError, match="memslot 0"):
            mapping.close()
        with pytest.warns(ResourceWarning, match="unclosed Vm"):
            vms.clear(), gc.collect()
        mapping.close()
        assert mapping.closed


def test_what_is_to_be_called_at_the_end_of_a_change_must_be_callable(vm: Vm) -> None:
    with pytest.raises(ArgumentTypeError, match="done: expected None, or a callable"):
        vm.change_memory_regions(done=1)  # type: ignore[arg-type]
