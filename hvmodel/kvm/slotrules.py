"""What the kernel takes and refuses of a memslot: `SlotLimits`, the host's numbers, and `refusal`, the model of
KVM_SET_USER_MEMORY_REGION and its successor, which predicts the errno and names the field.

The kernel says EINVAL to 20 different mistakes and EEXIST to one.  They are checked here in the kernel's order:

    slot id, flags                     of the ioctl (the first of the two has no KVM_MEM_GUEST_MEMFD)
    size, gpa, hva, offset, space      each by itself; gpa + size may not reach 2**64
    deletion                           size 0: the slot must be there
    change of a slot                   only its gpa and KVM_MEM_LOG_DIRTY_PAGES can change; none of a guest_memfd's
    overlap                            EEXIST: with another slot of the same address space
    guest_memfd                        EBADF where it is no open file; a range of it is in one slot at a time
    guest's address width              of the processor and the vendor module, so that it comes last

Source: linux:virt/kvm/kvm_main.c kvm_vm_ioctl_set_memory_region, kvm_set_memory_region@v6.18; virt/kvm/guest_memfd.c
kvm_gmem_bind@v6.18; arch/x86/kvm/x86.c kvm_arch_prepare_memory_region@v6.18.
"""

from __future__ import annotations

import errno
import os

from .._ffi import lib
from ..units import PAGE_SIZE
from ..value import Value
from .memslots import MemSlot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["SlotLimits", "SlotRefusal", "explain_region", "guest_size", "refusal"]

_LOG_DIRTY, _READONLY, _GUEST_MEMFD = 1, 2, 4  # KVM_MEM_*
_V1_FLAGS = _LOG_DIRTY | _READONLY
_FLAGS = {"KVM_MEM_LOG_DIRTY_PAGES": _LOG_DIRTY, "KVM_MEM_READONLY": _READONLY, "KVM_MEM_GUEST_MEMFD": _GUEST_MEMFD}
_MAX_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
_END = 1 << 64
_SHADOW_BITS = 52  # of a guest physical address, where KVM walks no second page table of the processor's


class SlotLimits(Value):
    """What differs between hosts: `nr_slots` ids in each of `nr_spaces` address spaces, `flags` that are known,
    `user_end` (hva + size may reach it), `gpa_bits` (gpa + size may reach 2**gpa_bits).

    >>> SlotLimits(32764, 1, 7, (1 << 47) - 4096, 52).nr_slots
    32764
    """

    nr_slots: int
    nr_spaces: int
    flags: int
    user_end: int
    gpa_bits: int

    @classmethod
    def of(cls, vm_fd: int) -> SlotLimits:
        """Those of the VM with this descriptor, by KVM_CHECK_EXTENSION and /proc/cpuinfo.

        Where the processor walks the guest's physical addresses (EPT, NPT), `gpa_bits` is what /proc/cpuinfo says,
        which is too little on a host with memory encryption keys (TME).
        """
        check = lib.kvm_check_extension
        flags = _LOG_DIRTY
        if check(vm_fd, lib.KVM_CAP_READONLY_MEM) > 0:
            flags |= _READONLY
        if check(vm_fd, lib.KVM_CAP_GUEST_MEMFD) > 0:
            flags |= _GUEST_MEMFD
        nr_slots = max(check(vm_fd, lib.KVM_CAP_NR_MEMSLOTS), 1)
        nr_spaces = max(check(vm_fd, lib.KVM_CAP_MULTI_ADDRESS_SPACE), 1)
        virtual, physical = _address_bits()
        return cls(nr_slots, nr_spaces, flags, (1 << virtual) - PAGE_SIZE, physical)


class SlotRefusal(Value):
    """Why the kernel refuses: `errno`, the `field` at fault, its `value`, what would be `accepted`, `detail`."""

    errno: int
    field: str
    value: object
    accepted: str
    detail: str


def _address_bits() -> tuple[int, int]:
    # Of a user address (without the half that is the kernel's), and of a guest physical one.
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read(8192).partition("\n\n")[0]
    except OSError:
        first = ""
    fields = dict(line.partition("\t")[::2] for line in first.splitlines())
    words = {name: value.lstrip("\t: ") for name, value in fields.items()}
    virtual = 56 if "la57" in words.get("flags", "").split() else 47
    for path in ("/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"):
        try:
            with open(path) as file:
                if file.read(1) in ("Y", "1"):
                    return virtual, int(words["address sizes"].split()[0])
        except (OSError, KeyError, ValueError):
            pass
    return virtual, _SHADOW_BITS


def guest_size(fd: int) -> int:
    """Size in bytes of the guest_memfd with descriptor `fd`; -EBADF for what is not open, -EINVAL for another file.

    Whether it is of the right VM cannot be seen.
    """
    try:
        size = os.fstat(fd).st_size
        kind = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return -errno.EBADF
    return size if "kvm-gmem" in kind or "guest_memfd" in kind else -errno.EINVAL


def refusal(
    limits: SlotLimits,
    slots: Mapping[int, MemSlot],
    wanted: MemSlot,
    guests: Mapping[int, int] | None = None,
    *,
    second: bool = False,
    err: int = 0,
) -> SlotRefusal | None:
    """What the kernel answers to a VM with `slots` that is to have the slot `wanted` (size 0: no longer); None: it
    takes it.

    `guests` are the guest_memfds of the VM: fd -> size, as `guest_size` has it; one that is missing is not open.
    `second`: it is KVM_SET_USER_MEMORY_REGION2.  `err`: only a refusal with this errno, of what was refused.

    Pure: no system call.

    >>> limits = SlotLimits(32764, 1, 7, (1 << 47) - 4096, 52)
    >>> refusal(limits, {}, MemSlot(0, 0x1000, 0x2000, 0x7F0000000000, 0)) is None
    True
    >>> refusal(limits, {}, MemSlot(0, 0x1001, 0x2000, 0x7F0000000000, 0)).field
    'gpa'
    """
    for fault in _faults(limits, slots, wanted, guests or {}, second):
        if err in (0, fault.errno):
            return fault
    return None


def _faults(
    limits: SlotLimits, slots: Mapping[int, MemSlot], wanted: MemSlot, guests: Mapping[int, int], second: bool
) -> Iterator[SlotRefusal]:
    # All that is wrong, in the kernel's order.
    slot, gpa, size, hva, flags = wanted.slot, wanted.gpa, wanted.size, wanted.hva, wanted.flags
    bad, page = errno.EINVAL, f"a multiple of {PAGE_SIZE}"
    guest = flags & _GUEST_MEMFD

    known = limits.flags if second else limits.flags & _V1_FLAGS
    if not second and flags & ~_V1_FLAGS:
        yield SlotRefusal(bad, "flags", flags, f"of {_names(known)}", "a flag that this ioctl does not have here")
    if slot & 0xFFFF >= limits.nr_slots:
        yield SlotRefusal(bad, "slot", slot, f"0 to {limits.nr_slots - 1}", "no such slot")
    if guest and second and flags & _V1_FLAGS:
        detail = "a guest_memfd is neither logged nor read-only"
        yield SlotRefusal(bad, "flags", flags, "KVM_MEM_GUEST_MEMFD by itself", detail)
    if flags & ~known:
        yield SlotRefusal(bad, "flags", flags, f"of {_names(known)}", "a flag that this ioctl does not have here")
    if size % PAGE_SIZE:
        yield SlotRefusal(bad, "size", size, f"{page} bytes", "not a whole number of pages")
    if gpa % PAGE_SIZE:
        yield SlotRefusal(bad, "gpa", gpa, page, "not page-aligned")
    if hva % PAGE_SIZE:
        yield SlotRefusal(bad, "hva", hva, page, "not page-aligned")
    if hva + size > limits.user_end:
        yield SlotRefusal(bad, "hva", hva, "an address of this process", "not a user address")
    offset = wanted.guest_memfd_offset
    if guest and offset % PAGE_SIZE:
        yield SlotRefusal(bad, "guest_memfd_offset", offset, page, "not page-aligned")
    if guest and offset + size >= _END:
        yield SlotRefusal(bad, "guest_memfd_offset", offset, "offset + size below 2**64", "the range wraps around")
    if slot >> 16 >= limits.nr_spaces:
        accepted = f"address space (bits 31:16) below {limits.nr_spaces}"
        yield SlotRefusal(bad, "slot", slot, accepted, "no such address space")
    if gpa + size >= _END:
        yield SlotRefusal(bad, "gpa", gpa, "gpa + size below 2**64", "the range wraps around")
    if size // PAGE_SIZE > _MAX_PAGES:
        yield SlotRefusal(bad, "size", size, f"up to {_MAX_PAGES} pages", "too large for one slot")

    old = slots.get(slot)
    if size == 0:
        if old is None:
            accepted = f"a slot that exists: {sorted(slots)}"
            yield SlotRefusal(bad, "slot", slot, accepted, "there is no such slot to delete")
        return
    if old is not None:
        yield from _change_faults(old, wanted)
    if old is None or old.gpa != gpa:
        for other in slots.values():
            if other.slot != slot and other.slot >> 16 == slot >> 16 and gpa < other.end and other.gpa < gpa + size:
                where = f"slot {other.slot} [{other.gpa:#x}, {other.end:#x})"
                detail = f"[{gpa:#x}, {gpa + size:#x}) overlaps {where}"
                yield SlotRefusal(errno.EEXIST, "gpa", gpa, "a range that no other slot covers", detail)
        if guest:
            yield from _guest_faults(slots, wanted, guests)
        if gpa + size > 1 << limits.gpa_bits:
            accepted = f"gpa + size up to 2**{limits.gpa_bits}, which the vendor module can map"
            yield SlotRefusal(bad, "gpa", gpa, accepted, "beyond the guest's address width")


def _change_faults(old: MemSlot, wanted: MemSlot) -> Iterator[SlotRefusal]:
    # A slot that is there can be moved, and can have its logging switched.
    bad, flags = errno.EINVAL, wanted.flags
    if flags & _GUEST_MEMFD or old.flags & _GUEST_MEMFD:
        accepted = "a slot that is not there"
        yield SlotRefusal(bad, "slot", wanted.slot, accepted, "a slot with a guest_memfd can only be deleted")
    if wanted.hva != old.hva:
        detail = "a slot's memory cannot be changed: delete it first"
        yield SlotRefusal(bad, "hva", wanted.hva, f"{old.hva:#x}, as it is", detail)
    if wanted.size != old.size:
        detail = "a slot cannot be resized: delete it, then make it anew"
        yield SlotRefusal(bad, "size", wanted.size, f"{old.size:#x}, as it is", detail)
    if (flags ^ old.flags) & _READONLY:
        detail = "READONLY cannot be toggled: delete the slot first"
        yield SlotRefusal(bad, "flags", flags, "KVM_MEM_READONLY as it is", detail)


def _guest_faults(slots: Mapping[int, MemSlot], wanted: MemSlot, guests: Mapping[int, int]) -> Iterator[SlotRefusal]:
    fd, start, bad = wanted.guest_memfd, wanted.guest_memfd_offset, errno.EINVAL
    length = guests.get(-1 if fd is None else fd, -errno.EBADF)
    if length < 0:
        detail = "not an open file" if length == -errno.EBADF else "not a guest_memfd of this VM"
        yield SlotRefusal(-length, "guest_memfd", fd, "a guest_memfd of this VM", detail)
        return
    end = start + wanted.size
    if end > length:
        accepted = f"offset + size up to {length:#x}, the size of the guest_memfd"
        yield SlotRefusal(bad, "guest_memfd_offset", start, accepted, f"size={wanted.size:#x}")
    for other in slots.values():
        first = other.guest_memfd_offset
        if other.guest_memfd == fd and other.slot != wanted.slot and start < first + other.size and first < end:
            accepted = "a range of the guest_memfd that no slot has"
            detail = f"slot {other.slot} has [{first:#x}, {first + other.size:#x}) of it"
            yield SlotRefusal(bad, "guest_memfd_offset", start, accepted, detail)


def _names(flags: int) -> str:
    return ", ".join(f"{name} ({bit})" for name, bit in _FLAGS.items() if bit & flags)


def explain_region(
    vm_fd: int, slots: Mapping[int, MemSlot], wanted: MemSlot, err: int = 0, *, second: bool = False
) -> SlotRefusal | None:
    """Why this kernel refuses the slot `wanted` to the VM with the descriptor `vm_fd`, None where no cause is found.

    `err`: the errno, if known.  As `refusal`, but that it asks the kernel for its limits.
    """
    guests: dict[int, int] = {}
    if wanted.guest_memfd is not None:
        guests[wanted.guest_memfd] = guest_size(wanted.guest_memfd)
    return refusal(SlotLimits.of(vm_fd), slots, wanted, guests, second=second, err=err)
