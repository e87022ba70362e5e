"""A VM by fcntl.ioctl alone, so that the witnesses are tested without the binding they are to watch.

Owns /dev/kvm, VM, vCPU and one page of guest memory with real-mode code at gpa 0x1000.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from typing import Self

KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_GET_STATS_FD = 0xAECE

KVM_EXIT_IO = 2

OUT_LOOP = bytes.fromhex("e610 ebfc")  # l: out 0x10, al; jmp l


class PlainVm:
    """Runs `code` from gpa 0x1000; `run()` returns the exit reason."""

    def __init__(self, code: bytes = OUT_LOOP) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = fcntl.ioctl(self.kvm, KVM_CREATE_VM, 0)
        self.ram = mmap.mmap(-1, 4096)
        self.ram[: len(code)] = code
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        fcntl.ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0x1000, 4096, address))
        self.vcpu = fcntl.ioctl(self.vm, KVM_CREATE_VCPU, 0)
        self.kvm_run = mmap.mmap(self.vcpu, fcntl.ioctl(self.kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
        sregs = bytearray(fcntl.ioctl(self.vcpu, KVM_GET_SREGS, bytes(312)))
        struct.pack_into("<QIH", sregs, 0, 0, 0xFFFF, 0)  # cs: base 0, limit, selector 0
        fcntl.ioctl(self.vcpu, KVM_SET_SREGS, bytes(sregs))
        fcntl.ioctl(self.vcpu, KVM_SET_REGS, struct.pack("<18Q", *[0] * 16, 0x1000, 2))  # rip, rflags

    def run(self) -> int:
        fcntl.ioctl(self.vcpu, KVM_RUN, 0)
        reason: int = struct.unpack_from("<I", self.kvm_run, 8)[0]
        return reason

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kvm_run.close()
        for fd in (self.vcpu, self.vm, self.kvm):
            os.close(fd)
        self.ram.close()
