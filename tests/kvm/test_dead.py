"""EIO: from a VM that KVM has given up, and from one that is alive.

No request kills a VM here; so a child process has the kernel itself answer EIO, by a seccomp filter on ioctl(2) of the
chosen descriptors: what a dead VM does, KVM_CHECK_EXTENSION included (linux:virt/kvm/kvm_main.c kvm_vm_ioctl@v6.18).
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from tests.need import need

ROOT = Path(__file__).parents[2]

SETUP = """
import ctypes, errno, struct

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import KvmError, VmDeadError
from hvmodel.kvm import IoOut, Kvm
from tests.kvm.guest import Guest

LD_W, JEQ, RET = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NR, ARG0 = 0, 16  # of struct seccomp_data
IOCTL = 16

def answer_eio(*fds):
    # nr == ioctl and args[0] in fds: EIO; all else is allowed.
    code = [(LD_W, 0, 0, NR), (JEQ, 0, len(fds) + 1, IOCTL), (LD_W, 0, 0, ARG0)]
    code += [(JEQ, len(fds) - at, 0, fd) for at, fd in enumerate(fds)]
    code += [(RET, 0, 0, ALLOW), (RET, 0, 0, ERRNO | errno.EIO)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    filter = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

kvm = Kvm()
guest = Guest(kvm, bytes.fromhex("b041 e610 f4"))
vm, vcpu = guest.vm, guest.vcpu
assert vcpu.run(10) == IoOut(0x10, 1, 1, b"A")
CALLS = {
    "KVM_RUN": lambda: vcpu.run(1.0),
    "KVM_GET_REGS": lambda: vcpu.regs,
    "KVM_SET_REGS": lambda: setattr(vcpu, "regs", ffi.new("struct kvm_regs *")),
    "KVM_GET_MSRS": lambda: vcpu.get_msrs([0x10]),
    "KVM_NMI": vcpu.nmi,
    "KVM_GET_XCRS": lambda: vcpu.ioctl("KVM_GET_XCRS", ffi.new("struct kvm_xcrs *")),
}
VM_CALLS = {
    "KVM_CREATE_VCPU": lambda: vm.create_vcpu(1),
    "KVM_GET_CLOCK": lambda: vm.clock,
    "KVM_CHECK_EXTENSION": lambda: vm.check_extension(3),
    "KVM_SET_USER_MEMORY_REGION": lambda: vm.set_user_memory_region(1, 1 << 20, guest.ram.hva, size=4096),
    "KVM_GET_DIRTY_LOG": lambda: vm.get_dirty_log(0),
    "KVM_CREATE_IRQCHIP": vm.create_irqchip,
    "KVM_SET_GSI_ROUTING": lambda: vm.set_gsi_routing([]),
    "KVM_CREATE_DEVICE": lambda: vm.create_device(4),
    "KVM_SET_TSS_ADDR": lambda: vm.set_tss_addr(0),
    "KVM_X86_SET_MSR_FILTER": vm.set_msr_filter,
    "KVM_ENABLE_CAP": lambda: vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, 1),
}

def check(calls, kind):
    for name, call in calls.items():
        with pytest.raises(KvmError) as refused:
            call()
        error = refused.value
        assert type(error) is kind, (name, error)
        assert (error.errno, error.call) == (errno.EIO, name), (name, error)
        if kind is VmDeadError:
            assert "KVM has marked this VM dead; make a new one" in str(error)
"""


def run(script: str) -> None:
    """Run SETUP and `script` in a process of their own, which prints "ok" in the end."""
    need("kvm", "x86-64")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SETUP + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", ""), done.stderr


def test_a_dead_vm_is_told_as_such_by_everything() -> None:
    run("""
        answer_eio(vm.fd, vcpu.fd)
        check(CALLS | VM_CALLS, VmDeadError)
        with Guest(kvm, bytes.fromhex("b042 e610 f4")) as other:
            assert other.run() == IoOut(0x10, 1, 1, b"B")
        guest.__exit__()
        assert vm.closed and vcpu.closed and guest.ram.closed
        kvm.close()
        print("ok")
        """)


def test_eio_of_a_living_vm_is_only_an_error() -> None:
    run("""
        answer_eio(vcpu.fd)
        check(CALLS, KvmError)
        assert vm.check_extension(3) == 1
        guest.__exit__()
        kvm.close()
        print("ok")
        """)
