"""A triple fault that waits, and how to take it back.

kvm_pvm answers CR0.PG without EFER.LME with one: KVM_SET_SREGS succeeds, CR0.PG stays clear, and the next KVM_RUN
returns KVM_EXIT_SHUTDOWN whatever is set until then.  Only KVM_SET_VCPU_EVENTS takes such a request back, while
KVM_CAP_X86_TRIPLE_FAULT_EVENT is enabled for the VM.  Where none can wait (Vcpu._has_calm) none need be taken back.

Sources: linux:arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_set_vcpu_events@v6.18 (KVM_REQ_TRIPLE_FAULT).
"""

from __future__ import annotations

from .._ffi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._native import kvm_vcpu_events
    from .vcpu import Vcpu

__all__ = ["drop_triple_fault"]


def drop_triple_fault(vcpu: Vcpu, events: kvm_vcpu_events | None = None) -> None:
    """Take back a triple fault that waits for the vCPU's next run, and set `events`, if given.

    The capability is enabled for that long only, where it is not.  A kernel without it (before 6.1) gets `events`.

    Ioctls: KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS (4.31, 4.32), KVM_ENABLE_CAP.  Thread safety: as Vcpu.
    """
    with vcpu._changing():
        rc = lib.hv_events_put_calm(vcpu._open_fd(), vcpu.vm._open_fd(), ffi.NULL if events is None else events)
    vcpu._check("KVM_SET_VCPU_EVENTS", rc)
