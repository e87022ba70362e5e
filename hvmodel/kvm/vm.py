"""A virtual machine: memslots, the in-kernel interrupt controllers, events, the dirty log, and the making of vCPUs."""

from __future__ import annotations

import errno
from _thread import allocate_lock

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, HvError
from ..value import Value
from .handle import Handle, StructItem, _check_extension, _rows, _uint
from .memslots import MemSlot, SlotMemory, _SlotMap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from .._native import kvm_clock_data, kvm_coalesced_mmio_zone, kvm_irqchip, kvm_pit_state, kvm_pit_state2
    from ..host import Mapping
    from .device import Device
    from .system import Kvm
    from .vcpu import Vcpu

__all__ = ["IrqRoute", "MsiRoute", "MsrFilterRange", "Vm"]


class IrqRoute(Value):
    """A GSI that raises `pin` of in-kernel chip `irqchip` (0 PIC master, 1 PIC slave, 2 IOAPIC)."""

    gsi: int
    irqchip: int
    pin: int


class MsiRoute(Value):
    """A GSI that sends the MSI `data` to `address` (64 bits)."""

    gsi: int
    address: int
    data: int


class MsrFilterRange(Value):
    """`len(bitmap) * 8` MSRs from `base` on; a 1 bit allows, a 0 bit makes the access exit or raise #GP.

    `flags`: KVM_MSR_FILTER_READ = 1, KVM_MSR_FILTER_WRITE = 2.
    """

    base: int
    bitmap: bytes
    flags: int = 3


def _fd_of(call: str, field: str, file: object) -> int:
    # A file descriptor, or an object that has one.
    fd = file.fileno() if hasattr(file, "fileno") else file
    return _uint(call, field, fd, 31)


class Vm(Handle):
    """A virtual machine, made by `Kvm.create_vm()`.

    Closing it closes its vCPUs first, and then lets go of the memory in its slots, which end with it: deleting them one
    by one would cost a grace period each.

    Thread safety: any thread; ioctls only from the process that made it (ForkedError in a child of os.fork).
    """

    scope = "vm"
    __slots__ = ("_changes", "_mmap_size", "_pinned", "_slot_lock", "_slots", "_vcpus")

    def __init__(self, fd: int, kvm: Kvm) -> None:
        super().__init__(fd, kvm)
        self._changes = 0  # of capabilities, memslots, ...: what KVM goes by when it takes a vCPU's state
        self._mmap_size = kvm.vcpu_mmap_size
        self._slot_lock = allocate_lock()  # a slot is changed and noted, or looked up and used, in one step
        self._slots = _SlotMap()
        self._pinned: dict[int, tuple[list[Any], str]] = {}  # slot -> what it keeps, and the name of the pins
        self._vcpus: dict[int, Vcpu] = {}

    @property
    def kvm(self) -> Kvm:
        """The system it was made from."""
        kvm: Kvm = self._owner  # type: ignore[assignment]  # the base class knows it as a Handle
        return kvm

    def close(self) -> None:
        """Close its vCPUs, close the fd, let go of the memory that was in its slots.  May be called again.

        BusyError: a vCPU's thread did not leave KVM_RUN within 10 s; it and the VM stay open then.
        """
        if self.closed:
            return
        for vcpu in list(self._vcpus.values()):
            vcpu.close()
        super().close()
        for slot in list(self._pinned):
            self._release(slot)

    # Of one that nobody closed: its finalizer closes the fd, and what was in its slots is let go of here, for else it
    # could never be closed.
    def __del__(self) -> None:
        for keep, why in getattr(self, "_pinned", {}).values():
            _unpin(keep, why)

    def ioctl(self, name: str, arg: Any = None) -> int:
        """As Handle.ioctl.  A memslot that is set in this way is noted in `memslots`, and pins no memory."""
        self._changes += 1
        if name not in ("KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2"):
            return super().ioctl(name, arg)
        with self._slot_lock:
            rc = super().ioctl(name, arg)
            region = ffi.cast("struct kvm_userspace_memory_region2 *", arg)  # which begins as the first one
            guest: tuple[int | None, int] = None, 0
            if region.flags & lib.KVM_MEM_GUEST_MEMFD and region.memory_size:
                guest = region.guest_memfd, region.guest_memfd_offset
            address, size = region.guest_phys_addr, region.memory_size
            self._note(MemSlot(region.slot, address, size, region.userspace_addr, region.flags, *guest))
        return rc

    # ---- capabilities ----

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION on this VM (KVM_CAP_CHECK_EXTENSION_VM): what holds for it rather than for all."""
        return _check_extension(self, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP: switch capability `cap` on, with up to four arguments.

        Raises UnsupportedError where KVM_CHECK_EXTENSION says 0 (some kernels accept what they do not have), KvmError
        EINVAL for arguments or a time that the capability does not allow (many must come before the first vCPU).
        """
        self._changes += 1
        return _enable_cap(self, cap, args, flags)

    # ---- vCPUs and devices ----

    def create_vcpu(self, id: int = 0) -> Vcpu:
        """Make vCPU number `id` (its APIC id) and map its kvm_run page (KVM_CREATE_VCPU).

        KvmError: EEXIST there is one with that id; EINVAL id beyond KVM_CAP_MAX_VCPU_ID or too many vCPUs.
        """
        from .vcpu import Vcpu

        _uint("KVM_CREATE_VCPU", "id", id, 63)
        fd = lib.kvm_create_vcpu(self.fd, id)
        if fd < 0:
            limit = self._extension(lib.KVM_CAP_MAX_VCPU_ID) or self._extension(lib.KVM_CAP_MAX_VCPUS)
            detail = None
            if fd == -errno.EEXIST:
                detail = "this VM has a vCPU with that id"
            elif fd == -errno.EINVAL and id < limit:
                detail = f"too many vCPUs: at most {self._extension(lib.KVM_CAP_MAX_VCPUS)}"
            raise self._refusal("KVM_CREATE_VCPU", -fd, "id", id, f"an unused id, 0 to {limit - 1}", detail)
        return Vcpu(fd, self, id)

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """Its open vCPUs by id."""
        return tuple(self._vcpus[id] for id in sorted(self._vcpus))

    def create_device(self, type: int) -> Device:
        """Make an in-kernel device (KVM_CREATE_DEVICE) of KVM_DEV_TYPE_* `type`.  KvmError ENODEV: unknown type."""
        from .device import Device

        arg = ffi.new("struct kvm_create_device *", {"type": _uint("KVM_CREATE_DEVICE", "type", type)})
        self._check("KVM_CREATE_DEVICE", lib.kvm_create_device(self.fd, arg), "type", type, "a KVM_DEV_TYPE_*")
        return Device(arg.fd, self)

    def stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a new file descriptor of the VM's statistics; the caller's to close."""
        return self._check("KVM_GET_STATS_FD", lib.kvm_get_stats_fd(self.fd))

    # ---- memory ----

    @property
    def memslots(self) -> dict[int, MemSlot]:
        """The slots as they stand: id -> MemSlot."""
        return dict(self._slots.slots)

    def memslot(self, slot: int) -> MemSlot | None:
        """Slot number `slot`, or None where there is none."""
        return self._slots.slots.get(_uint("Vm.memslot", "slot", slot))

    def memslot_at(self, gpa: int) -> MemSlot | None:
        """The slot (address space 0) that holds `gpa`, or None."""
        return self._slots.at(_uint("Vm.memslot_at", "gpa", gpa, 64))

    def set_user_memory_region(
        self, slot: int, gpa: int, memory: Mapping | int, *, offset: int = 0, size: int | None = None, flags: int = 0
    ) -> MemSlot:
        """Back `size` bytes at `gpa` with host memory (KVM_SET_USER_MEMORY_REGION).

        `memory`: a hvmodel.host.Mapping, from `offset` on (`size` defaults to its rest); the VM keeps it from being
        unmapped as long as it is in the slot.  Or an int, a host virtual address: unsafe, for then nothing does.
        `flags`: KVM_MEM_LOG_DIRTY_PAGES = 1, KVM_MEM_READONLY = 2.  The same slot again moves it or changes
        LOG_DIRTY_PAGES; `delete_memory_region` deletes it.

        KvmError EINVAL, EEXIST (overlap): `field` says which argument, and why.
        """
        call = "KVM_SET_USER_MEMORY_REGION"
        fd = self.fd
        mapping, hva, size = _backing(call, slot, gpa, memory, offset, size, flags)
        entry = MemSlot(slot, gpa, size, hva, flags)
        with self._slot_lock:
            self._take(fd, entry, [] if mapping is None else [mapping])
        return entry

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        memory: Mapping | int,
        *,
        offset: int = 0,
        size: int | None = None,
        flags: int = 0,
        guest_memfd: object | None = None,
        guest_memfd_offset: int = 0,
    ) -> MemSlot:
        """As set_user_memory_region, by KVM_SET_USER_MEMORY_REGION2 (KVM_CAP_USER_MEMORY2, since Linux 6.8).

        `guest_memfd`: a guest_memfd of this VM, as a descriptor or an object that has one, which is then what backs the
        slot's private pages (all of them, if it was made with GUEST_MEMFD_FLAG_MMAP), from `guest_memfd_offset` on.
        KVM_MEM_GUEST_MEMFD = 4 is added to the flags.  An object is kept, and pinned where it has `pin`; of a mere
        descriptor, closing it takes the memory from the guest.  Such a slot cannot be changed, only deleted.

        KvmError EINVAL, EEXIST, EBADF (guest_memfd): `field` says which argument, and why.  UnsupportedError.
        """
        call = "KVM_SET_USER_MEMORY_REGION2"
        fd = self.fd
        _uint(call, "guest_memfd_offset", guest_memfd_offset, 64)
        guest = None if guest_memfd is None else _fd_of(call, "guest_memfd", guest_memfd)
        mapping, hva, size = _backing(call, slot, gpa, memory, offset, size, flags)
        keep: list[Any] = [] if mapping is None else [mapping]
        if guest is not None:
            flags |= lib.KVM_MEM_GUEST_MEMFD
            keep += [] if isinstance(guest_memfd, int) else [guest_memfd]
        elif flags & lib.KVM_MEM_GUEST_MEMFD:
            raise ArgumentError(call, "flags", flags, "KVM_MEM_GUEST_MEMFD with a guest_memfd only")
        entry = MemSlot(slot, gpa, size, hva, flags, guest, guest_memfd_offset)
        with self._slot_lock:
            self._take(fd, entry, keep, second=True)
        return entry

    def delete_memory_region(self, slot: int) -> None:
        """Take slot `slot` away (memory_size 0).  KvmError EINVAL: there is no such slot."""
        entry = MemSlot(_uint("KVM_SET_USER_MEMORY_REGION", "slot", slot), 0, 0, 0, 0)
        with self._slot_lock:
            try:
                self._set(self.fd, entry)
            except HvError:
                raise
            except BaseException:  # an interruption, before or after it was deleted
                self._put_back(entry)
                self._note(entry)
                raise
            self._note(entry)

    def change_memory_regions(
        self,
        *,
        delete: Iterable[int] = (),
        flags: dict[int, int] | None = None,
        add: Iterable[SlotMemory] = (),
        address_space: int = 0,
        done: Callable[[list[MemSlot]], object] | None = None,
    ) -> list[MemSlot]:
        """Delete slots, give others new `flags` (id -> KVM_MEM_*), make new ones: all of that or, with an error, none.

        One KVM_SET_USER_MEMORY_REGION each, in that order; other slots are not touched.  A new slot gets the first id
        of `address_space` that is free then.  Returns the new slots in the order of `add`.  `done(new slots)` is called
        as the last step, before any other change of slots; if it raises, all is undone.

        A vCPU that runs meanwhile may find nothing at the address of a slot that is deleted and made anew: it exits, as
        for an address without memory, or its VM sees another slot change.  What KVM logged of a deleted slot is lost:
        `get_dirty_log` first.

        Before anything is changed: ArgumentError for ids that are not there, more slots than the kernel has, or more
        pages than a slot can have.  KvmError with `field`, as of set_user_memory_region: what was done is undone by
        then, with the old ids; notes of the exception tell what could not be.
        """
        from .slotchange import change

        call = "KVM_SET_USER_MEMORY_REGION"
        if flags is not None and not isinstance(flags, dict):
            raise ArgumentTypeError(call, "flags", flags, "a dict of slot ids and flags")
        slots, rows = _rows(call, "delete", delete, "slot ids"), _rows(call, "add", add, "SlotMemory values")
        return change(self, slots, flags or {}, rows, address_space, done)

    def _take(self, fd: int, entry: MemSlot, keep: list[Any], *, second: bool = False) -> None:
        # Makes or changes a slot.  What backs it is pinned before the kernel has it, so that there is no time in which
        # it could go.
        why = f"memslot {entry.slot} of VM fd={self._fd}"
        _pin(keep, why)
        old = self._slots.slots.get(entry.slot, MemSlot(entry.slot, 0, 0, 0, 0))
        try:
            self._set(fd, entry, second=second)
            self._slots.put(entry)
        except HvError:
            _unpin(keep, why)
            raise
        except BaseException:  # an interruption, before or after it was made
            self._put_back(old)
            if old.size:
                self._slots.put(old)
            else:
                self._slots.drop(old.slot)
            _unpin(keep, why)
            raise
        self._release(entry.slot)
        if keep:
            self._pinned[entry.slot] = keep, why

    def _put_back(self, entry: MemSlot) -> None:
        # The slot as it was, or none of size 0, which the kernel may have deleted already.
        from contextlib import suppress

        with suppress(HvError):
            self._set(self.fd, entry)

    def _set(self, fd: int, entry: MemSlot, *, second: bool = False, slots: dict[int, MemSlot] | None = None) -> None:
        # The ioctl, or its refusal explained by the slots of that moment.
        self._changes += 1
        if second:
            arg2 = ffi.new(
                "struct kvm_userspace_memory_region2 *",
                [entry.slot, entry.flags, entry.gpa, entry.size, entry.hva, entry.guest_memfd_offset],
            )
            arg2.guest_memfd = entry.guest_memfd or 0
            rc = lib.kvm_set_user_memory_region2(fd, arg2)
        else:
            arg = ffi.new(
                "struct kvm_userspace_memory_region *", [entry.slot, entry.flags, entry.gpa, entry.size, entry.hva]
            )
            rc = lib.kvm_set_user_memory_region(fd, arg)
        if rc < 0:
            raise self._region_refusal(-rc, entry, second, self._slots.slots if slots is None else slots)

    def _note(self, entry: MemSlot) -> None:
        # What the kernel has taken.
        if entry.size:
            self._slots.put(entry)
        else:
            self._slots.drop(entry.slot)
            self._release(entry.slot)

    def _region_refusal(self, err: int, entry: MemSlot, second: bool, slots: dict[int, MemSlot]) -> HvError:
        from .slotrules import explain_region

        fault = None
        if err in (errno.EINVAL, errno.EEXIST, errno.EBADF):
            fault = explain_region(self.fd, slots, entry, err, second=second)
        name = "KVM_SET_USER_MEMORY_REGION2" if second else "KVM_SET_USER_MEMORY_REGION"
        if fault is not None:
            return self._refusal(name, err, fault.field, fault.value, fault.accepted, fault.detail)
        if err == errno.EINVAL and entry.guest_memfd is not None:
            accepted = "a guest_memfd that this VM made, whose range no other slot has"
            return self._refusal(name, err, "guest_memfd", entry.guest_memfd, accepted)
        return self._refusal(name, err)

    def _release(self, slot: int) -> None:
        _unpin(*self._pinned.pop(slot, ((), "")))

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD: a new guest_memfd of `size` bytes; its fd is the caller's to close.

        `flags`: GUEST_MEMFD_FLAG_MMAP = 1, INIT_SHARED = 2 (KVM_CAP_GUEST_MEMFD_FLAGS is the mask of what there is).
        KvmError EINVAL: size zero or not page-sized, unknown flag.
        """
        call = "KVM_CREATE_GUEST_MEMFD"
        arg = ffi.new(
            "struct kvm_create_guest_memfd *",
            {"size": _uint(call, "size", size, 64), "flags": _uint(call, "flags", flags, 64)},
        )
        rc = lib.kvm_create_guest_memfd(self.fd, arg)
        if rc == -errno.EINVAL:
            if size == 0 or size % 4096:
                raise self._refusal(call, -rc, "size", size, "a multiple of 4096 bytes, not zero")
            mask = max(self._extension(lib.KVM_CAP_GUEST_MEMFD_FLAGS), 0)
            if flags & ~mask:
                raise self._refusal(call, -rc, "flags", flags, f"of mask {mask:#x}")
        return self._check(call, rc)

    def get_dirty_log(self, slot: int) -> bytearray:
        """KVM_GET_DIRTY_LOG: one bit per page of slot `slot`, bit 0 of byte 0 first, 64 pages a word.

        Without manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) this clears the log.  KvmError ENOENT: no such
        slot, or it has no KVM_MEM_LOG_DIRTY_PAGES; ENXIO: the dirty ring is in use.
        """
        _uint("KVM_GET_DIRTY_LOG", "slot", slot)
        with self._slot_lock:
            # The kernel writes as much as the slot has pages; for a slot that is not there, to nowhere.
            entry = self._slots.slots.get(slot)
            bitmap = bytearray(((entry.size >> 12) + 63) // 64 * 8 if entry else 0)
            address = ffi.from_buffer(bitmap)
            target = ffi.cast("void *", address) if entry else ffi.NULL
            arg = ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": target})
            rc = lib.kvm_get_dirty_log(self.fd, arg)
            ffi.release(address)
        if rc == -errno.ENOENT and entry is None:
            raise self._refusal("KVM_GET_DIRTY_LOG", -rc, "slot", slot, f"one of {sorted(self._slots.slots)}")
        detail = "the slot has no KVM_MEM_LOG_DIRTY_PAGES" if rc == -errno.ENOENT else None
        self._check("KVM_GET_DIRTY_LOG", rc, "slot", slot, None, detail)
        return bitmap

    def clear_dirty_log(
        self, slot: int, bitmap: bytes | bytearray, *, first_page: int = 0, num_pages: int | None = None
    ) -> None:
        """KVM_CLEAR_DIRTY_LOG: write-protect anew the pages whose bits are set.

        `first_page` must be a multiple of 64; so must `num_pages`, unless the range ends the slot (the default).
        KvmError EINVAL: `field` says which; ENOENT no such slot or no log; ENXIO dirty ring.
        """
        call = "KVM_CLEAR_DIRTY_LOG"
        entry = self._slots.slots.get(_uint(call, "slot", slot))
        _uint(call, "first_page", first_page, 64)
        pages = entry.size >> 12 if entry else 0
        if num_pages is None:
            num_pages = max(pages - first_page, 0)
        _uint(call, "num_pages", num_pages)
        if not isinstance(bitmap, bytes | bytearray):
            raise ArgumentTypeError(call, "bitmap", bitmap, "bytes or bytearray")
        if len(bitmap) * 8 < num_pages:
            raise ArgumentError(
                call, "bitmap", len(bitmap), f"at least {(num_pages + 7) // 8} bytes for {num_pages} pages"
            )
        # The kernel reads whole words.
        copy = ffi.new("uint64_t[]", max((num_pages + 63) // 64, 1))
        ffi.memmove(copy, bytes(bitmap[: len(copy) * 8]), min(len(bitmap), len(copy) * 8))
        arg = ffi.new(
            "struct kvm_clear_dirty_log *",
            {"slot": slot, "num_pages": num_pages, "first_page": first_page, "dirty_bitmap": copy},
        )
        rc = lib.kvm_clear_dirty_log(self.fd, arg)
        if rc == -errno.EINVAL and entry is not None:
            if first_page % 64:
                raise self._refusal(call, -rc, "first_page", first_page, "a multiple of 64")
            if num_pages == 0 or first_page + num_pages > pages:
                raise self._refusal(call, -rc, "num_pages", num_pages, f"a range within the slot's {pages} pages")
            if num_pages % 64 and first_page + num_pages != pages:
                raise self._refusal(call, -rc, "num_pages", num_pages, "a multiple of 64, or up to the slot's end")
        self._check(call, rc, "slot" if rc == -errno.ENOENT else None, slot)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: collect the harvested entries of all rings; how many were reset."""
        return self._check("KVM_RESET_DIRTY_RINGS", lib.kvm_reset_dirty_rings(self.fd))

    # ---- what must be set before vCPUs ----

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages at `gpa` (below 4 GiB, free of RAM) for Intel's real-mode emulation."""
        self._check(
            "KVM_SET_TSS_ADDR",
            lib.kvm_set_tss_addr(self.fd, _uint("KVM_SET_TSS_ADDR", "gpa", gpa, 64)),
            "gpa",
            gpa,
            "an address whose three pages lie below 4 GiB, outside every slot",
        )

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page at `gpa` (0: the default, 0xfffbc000).  EINVAL: there are vCPUs."""
        call = "KVM_SET_IDENTITY_MAP_ADDR"
        arg = ffi.new("uint64_t *", _uint(call, "gpa", gpa, 64))
        rc = lib.kvm_set_identity_map_addr(self.fd, arg)
        detail = "vCPUs were made already" if rc == -errno.EINVAL and self._vcpus else None
        self._check(call, rc, "gpa", gpa, "before the first vCPU", detail)

    def set_boot_cpu_id(self, id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: which vCPU is the bootstrap processor.  KvmError EBUSY: there are vCPUs."""
        call = "KVM_SET_BOOT_CPU_ID"
        self._check(call, lib.kvm_set_boot_cpu_id(self.fd, _uint(call, "id", id)), "id", id, "before the first vCPU")

    # ---- interrupts ----

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PICs, IOAPIC and local APICs in the kernel.  EEXIST: there; EINVAL: after a vCPU."""
        rc = lib.kvm_create_irqchip(self.fd)
        detail = "it must come before the first vCPU" if rc == -errno.EINVAL and self._vcpus else None
        self._check("KVM_CREATE_IRQCHIP", rc, None, None, None, detail)

    def create_pit2(self, *, speaker_dummy: bool = False) -> None:
        """KVM_CREATE_PIT2: the 8254 timer in the kernel.  ENOENT: no in-kernel irqchip; EEXIST: there is one."""
        arg = ffi.new("struct kvm_pit_config *", {"flags": 1 if speaker_dummy else 0})
        rc = lib.kvm_create_pit2(self.fd, arg)
        detail = "create_irqchip() first" if rc == -errno.ENOENT else None
        self._check("KVM_CREATE_PIT2", rc, None, None, None, detail)

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """KVM_GET_IRQCHIP: `struct kvm_irqchip *` of chip 0 (PIC master), 1 (PIC slave), 2 (IOAPIC)."""
        call = "KVM_GET_IRQCHIP"
        arg = ffi.new("struct kvm_irqchip *", {"chip_id": _uint(call, "chip_id", chip_id)})
        self._check(call, lib.kvm_get_irqchip(self.fd, arg), "chip_id", chip_id, "0, 1 or 2, with an in-kernel irqchip")
        return arg

    def set_irqchip(self, chip: kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP from a `struct kvm_irqchip *`."""
        self.ioctl("KVM_SET_IRQCHIP", chip)

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: set interrupt line `gsi` to `level` 0 or 1.  ENXIO: no in-kernel irqchip."""
        arg = ffi.new(
            "struct kvm_irq_level *",
            {"irq": _uint("KVM_IRQ_LINE", "gsi", gsi), "level": _uint("KVM_IRQ_LINE", "level", level)},
        )
        self._check("KVM_IRQ_LINE", lib.kvm_irq_line(self.fd, arg), "gsi", gsi, "a GSI of an in-kernel irqchip")

    def irq_line_status(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: as irq_line; returns 1 delivered, 0 coalesced, -1 masked."""
        call = "KVM_IRQ_LINE_STATUS"
        arg = ffi.new("struct kvm_irq_level *", {"irq": _uint(call, "gsi", gsi), "level": _uint(call, "level", level)})
        self._check(call, lib.kvm_irq_line_status(self.fd, arg), "gsi", gsi, "a GSI of an in-kernel irqchip")
        return int(ffi.cast("int32_t", arg.status))

    def set_gsi_routing(self, routes: Iterable[IrqRoute | MsiRoute]) -> None:
        """KVM_SET_GSI_ROUTING: replace the routing table.  KvmError EINVAL: an entry's gsi, chip or pin."""
        call = "KVM_SET_GSI_ROUTING"
        rows = _rows(call, "routes", routes, "IrqRoute and MsiRoute values")
        table = ffi.new("struct kvm_irq_routing *", {"nr": len(rows), "entries": len(rows)})
        for at, row in enumerate(rows):
            entry = table.entries[at]
            if isinstance(row, IrqRoute):
                entry.gsi, entry.type = _uint(call, f"routes[{at}].gsi", row.gsi), lib.KVM_IRQ_ROUTING_IRQCHIP
                entry.u.irqchip.irqchip = _uint(call, f"routes[{at}].irqchip", row.irqchip)
                entry.u.irqchip.pin = _uint(call, f"routes[{at}].pin", row.pin)
            elif isinstance(row, MsiRoute):
                address = _uint(call, f"routes[{at}].address", row.address, 64)
                entry.gsi, entry.type = _uint(call, f"routes[{at}].gsi", row.gsi), lib.KVM_IRQ_ROUTING_MSI
                entry.u.msi.address_lo, entry.u.msi.address_hi = address & 0xFFFFFFFF, address >> 32
                entry.u.msi.data = _uint(call, f"routes[{at}].data", row.data)
            else:
                raise ArgumentTypeError(call, f"routes[{at}]", row, "an IrqRoute or MsiRoute")
        limit = self._extension(lib.KVM_CAP_IRQ_ROUTING)
        self._check(
            call, lib.kvm_set_gsi_routing(self.fd, table), "routes", len(rows), f"up to {limit} entries, gsi below that"
        )

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: send an MSI now; > 0 delivered, 0 blocked by the guest.  EINVAL: no in-kernel local APIC."""
        _uint("KVM_SIGNAL_MSI", "address", address, 64)
        arg = ffi.new(
            "struct kvm_msi *",
            {
                "address_lo": address & 0xFFFFFFFF,
                "address_hi": address >> 32,
                "data": _uint("KVM_SIGNAL_MSI", "data", data),
            },
        )
        return self._check("KVM_SIGNAL_MSI", lib.kvm_signal_msi(self.fd, arg), "address", address)

    def irqfd(self, eventfd: object, gsi: int, *, resamplefd: object | None = None, deassign: bool = False) -> None:
        """KVM_IRQFD: raise `gsi` whenever `eventfd` (a descriptor or an object with one) is signalled.

        `resamplefd`: level-triggered; signalled when the guest ends the interrupt.  EINVAL: no irqchip, not an eventfd;
        EBUSY: the eventfd is in use; EBADF.
        """
        arg = ffi.new(
            "struct kvm_irqfd *",
            {
                "fd": _fd_of("KVM_IRQFD", "eventfd", eventfd),
                "gsi": _uint("KVM_IRQFD", "gsi", gsi),
                "flags": (lib.KVM_IRQFD_FLAG_DEASSIGN if deassign else 0)
                | (lib.KVM_IRQFD_FLAG_RESAMPLE if resamplefd is not None else 0),
                "resamplefd": 0 if resamplefd is None else _fd_of("KVM_IRQFD", "resamplefd", resamplefd),
            },
        )
        self._check("KVM_IRQFD", lib.kvm_irqfd(self.fd, arg), "gsi", gsi, "a routed GSI and an eventfd of its own")

    def ioeventfd(
        self,
        eventfd: object,
        address: int,
        size: int,
        *,
        pio: bool = False,
        datamatch: int | None = None,
        deassign: bool = False,
    ) -> None:
        """KVM_IOEVENTFD: signal `eventfd` when the guest writes `size` bytes (0 any, 1, 2, 4, 8) at gpa or port
        `address`.

        The write then does not exit.  `datamatch`: only writes of that value.  EEXIST: the same is registered;
        ENOENT: nothing to deassign; ENOSPC: 1000 are registered; EINVAL: size, or address + size wraps.
        """
        call = "KVM_IOEVENTFD"
        _uint(call, "size", size)
        _uint(call, "address", address, 64)
        flags = (1 if datamatch is not None else 0) | (2 if pio else 0) | (4 if deassign else 0)
        arg = ffi.new(
            "struct kvm_ioeventfd *",
            {
                "fd": _fd_of(call, "eventfd", eventfd),
                "addr": address,
                "len": size,
                "flags": flags,
                "datamatch": 0 if datamatch is None else _uint(call, "datamatch", datamatch, 64),
            },
        )
        rc = lib.kvm_ioeventfd(self.fd, arg)
        if rc == -errno.EINVAL:
            if size not in (0, 1, 2, 4, 8):
                raise self._refusal(call, -rc, "size", size, "0, 1, 2, 4 or 8")
            if size == 0 and datamatch is not None:
                raise self._refusal(call, -rc, "datamatch", datamatch, "a size other than 0 with it")
        self._check(call, rc, "address", address)

    def register_coalesced_mmio(self, address: int, size: int, *, pio: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO: writes to [address, address + size) go to the ring instead of exiting."""
        call = "KVM_REGISTER_COALESCED_MMIO"
        self._check(call, lib.kvm_register_coalesced_mmio(self.fd, _zone(call, address, size, pio)), "address", address)

    def unregister_coalesced_mmio(self, address: int, size: int, *, pio: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO of the zones within the range."""
        call = "KVM_UNREGISTER_COALESCED_MMIO"
        self._check(
            call, lib.kvm_unregister_coalesced_mmio(self.fd, _zone(call, address, size, pio)), "address", address
        )

    # ---- filters ----

    def set_msr_filter(self, ranges: Iterable[MsrFilterRange] = (), *, default_allow: bool = True) -> None:
        """KVM_X86_SET_MSR_FILTER: up to 16 ranges of MSRs that are allowed or denied to the guest; none: no filter.

        What a denied access does is set by enable_cap(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER).
        """
        call = "KVM_X86_SET_MSR_FILTER"
        rows = _rows(call, "ranges", ranges, "MsrFilterRange values")
        arg = ffi.new("struct kvm_msr_filter *", {"flags": 0 if default_allow else lib.KVM_MSR_FILTER_DEFAULT_DENY})
        if len(rows) > len(arg.ranges):
            raise ArgumentError(call, "ranges", len(rows), f"up to {len(arg.ranges)} ranges")
        keep = []
        for at, row in enumerate(rows):
            if not isinstance(row, MsrFilterRange):
                raise ArgumentTypeError(call, f"ranges[{at}]", row, "a MsrFilterRange")
            if not isinstance(row.bitmap, bytes | bytearray):
                raise ArgumentTypeError(call, f"ranges[{at}].bitmap", row.bitmap, "bytes")
            bitmap = ffi.new("uint8_t[]", bytes(row.bitmap))
            keep.append(bitmap)
            target = arg.ranges[at]
            target.flags = _uint(call, f"ranges[{at}].flags", row.flags)
            target.base = _uint(call, f"ranges[{at}].base", row.base)
            target.nmsrs = len(row.bitmap) * 8
            target.bitmap = bitmap
        self._check(call, lib.kvm_x86_set_msr_filter(self.fd, arg), "ranges", len(rows))

    clock: StructItem[kvm_clock_data] = StructItem(
        "KVM_GET_CLOCK", "KVM_SET_CLOCK", "kvm_clock_data", "kvmclock in ns (`clock`), with `flags` KVM_CLOCK_*."
    )
    pit: StructItem[kvm_pit_state] = StructItem(
        "KVM_GET_PIT", "KVM_SET_PIT", "kvm_pit_state", "The three channels of the 8254.  ENXIO: create_pit2() first."
    )
    pit2: StructItem[kvm_pit_state2] = StructItem(
        "KVM_GET_PIT2", "KVM_SET_PIT2", "kvm_pit_state2", "The three channels of the 8254 and its flags."
    )


def _backing(
    call: str, slot: int, gpa: int, memory: Mapping | int, offset: int, size: int | None, flags: int
) -> tuple[Mapping | None, int, int]:
    # The mapping, address and size of a region whose arguments can be right, or the error that says which cannot.
    _uint(call, "slot", slot)
    _uint(call, "gpa", gpa, 64)
    _uint(call, "offset", offset, 64)
    _uint(call, "flags", flags)
    mapping: Mapping | None = None
    if isinstance(memory, int):
        hva = _uint(call, "memory", memory, 64) + offset
        if size is None:
            raise ArgumentError(call, "size", None, "a size in bytes, where the memory is an address")
    elif hasattr(memory, "pin") and hasattr(memory, "hva"):
        mapping = memory
        if size is None:
            size = max(mapping.size - offset, 0)
        if offset + _uint(call, "size", size, 64) > mapping.size:
            raise ArgumentError(call, "offset", offset, f"offset + size up to {mapping.size:#x}", f"size={size:#x}")
        hva = mapping.hva + offset
    else:
        raise ArgumentTypeError(call, "memory", memory, "a Mapping or a host virtual address")
    if _uint(call, "size", size, 64) == 0:
        raise ArgumentError(call, "size", size, "at least a page; delete_memory_region() deletes a slot")
    if hva + size > 1 << 64:
        raise ArgumentError(call, "memory", hva, "hva + size up to 2**64")
    return mapping, hva, size


def _pin(keep: Iterable[Any], why: str) -> None:
    done: list[Any] = []
    for owner in keep:
        try:
            if hasattr(owner, "pin"):
                owner.pin(why)
            if any(bar.signals for bar in getattr(owner, "_bars", ())):
                owner.unpin(why)
                raise BusyError(why, repr(owner), "it has poisoned pages, and to touch one is SIGBUS for a vCPU")
        except BaseException:
            _unpin(done, why)
            raise
        done.append(owner)


def _unpin(keep: Iterable[Any], why: str) -> None:
    for owner in keep:
        if hasattr(owner, "unpin"):
            owner.unpin(why)


def _zone(call: str, address: int, size: int, pio: bool) -> kvm_coalesced_mmio_zone:
    return ffi.new(
        "struct kvm_coalesced_mmio_zone *",
        {"addr": _uint(call, "address", address, 64), "size": _uint(call, "size", size), "pio": 1 if pio else 0},
    )


def _enable_cap(handle: Handle, cap: int, args: tuple[int, ...], flags: int) -> int:
    # For Vm and Vcpu alike.
    call = "KVM_ENABLE_CAP"
    _uint(call, "cap", cap)
    _uint(call, "flags", flags)
    if len(args) > 4:
        raise ArgumentError(call, "args", len(args), "up to four arguments")
    values = [_uint(call, f"args[{at}]", arg, 64) for at, arg in enumerate(args)]
    arg = ffi.new("struct kvm_enable_cap *", {"cap": cap, "flags": flags, "args": values})
    fd = handle._open_fd()
    if handle._extension(cap) == 0:
        from ..errors import UnsupportedError

        raise UnsupportedError(errno.EINVAL, call, "cap", cap, None, "KVM_CHECK_EXTENSION says 0")
    rc = lib.kvm_enable_cap(fd, arg)
    if rc >= 0:
        return rc
    field, value = ("flags", flags) if flags and rc == -errno.EINVAL else ("args", tuple(args))
    if not args and not flags:
        field, value = "cap", cap
    raise handle._refusal(call, -rc, field, value, None, f"capability {cap} does not take this here and now")
