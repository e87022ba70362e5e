"""Without a Machine: /dev/kvm, a VM, a memslot over memory of our own, a vCPU.

Prints:

    12
    IoOut(port=0x10, size=1, count=1, data=b'!')
    0x1004
    b'!'
"""

from __future__ import annotations

from hvmodel.host import Mapping
from hvmodel.kvm import Cap, IoOut, Kvm

GUEST = bytes.fromhex(
    "b021"  #        mov al, '!'
    "e610"  #        out 0x10, al
    "a20018"  #      mov [0x1800], al
    "f4"  #          hlt
)

with Kvm() as kvm, Mapping(None, 0x1000) as page, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
    print(kvm.api_version)
    assert vm.check_extension(Cap.USER_MEMORY)
    page.write(0, GUEST)
    vm.set_user_memory_region(0, 0x1000, page)  # slot 0: gpa 0x1000

    sregs = vcpu.sregs  # a fresh struct kvm_sregs; assigning it is KVM_SET_SREGS
    sregs.cs.base, sregs.cs.selector = 0, 0
    vcpu.sregs = sregs
    regs = vcpu.regs
    regs.rip, regs.rflags = 0x1000, 2
    vcpu.regs = regs

    exit = vcpu.run(timeout=10)
    print(exit)
    assert isinstance(exit, IoOut)
    print(hex(vcpu.regs.rip))  # behind `out`: KVM has moved it
    vcpu.run(timeout=10)  # to the hlt
    print(page.read(0x800, 1))
