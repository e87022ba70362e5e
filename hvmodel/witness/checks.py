"""The checks of the foundation: our ABI against the kernel's types, our exits against the kernel's events."""

from __future__ import annotations

import errno
import os
from itertools import zip_longest

from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kvm import Vcpu
    from .result import Tally

__all__ = ["check_abi", "check_exits_batch", "check_exits_run"]

# The guest: 5 exits each time round, of 3 reasons, with reads to be answered.  Nothing is at port 0x10 or gpa 0x9000.
_CODE_GPA = 0x1000
_CODE = bytes.fromhex(
    "e610"  #   again: out 0x10, al
    "e420"  #          in al, 0x20
    "a20090"  #        mov [0x9000], al
    "a00090"  #        mov al, [0x9000]
    "f4"  #            hlt
    "ebf3"  #          jmp again         13 bytes: -13 = 0xf3
)
_CHUNK = 5000  # exits between two reads of the trace: 20 bytes each, a tenth of the buffer


# Structs of ours that BTF must have, or it is not that of a KVM.  6.18 has 79: 5 are newer than Linux 6.1, and 8
# go with CONFIG_KVM_IOAPIC.
_STRUCTS = 66


@check("ABI header", "BTF of the running kernel")
def check_abi(tally: Tally, _cases: int) -> None:
    """Size of every struct, and offset and size of every field, that BTF knows: all of them, always."""
    from .abi import compare_abi
    from .btf import Btf

    btf = Btf.for_module("kvm")
    found = compare_abi(btf)
    if found.structs < _STRUCTS and not os.path.exists("/sys/module/kvm"):
        raise Lacking(f"{btf.source} has {found.structs} of our structs: KVM is not loaded, and not built in")
    tally.count(found.structs + found.fields, found.mismatches)
    if found.structs < _STRUCTS:
        tally.break_off(f"{btf.source} has {found.structs} of our structs, and every KVM has {_STRUCTS}")
    if found.missing:
        tally.lack(f"not in this kernel's BTF: {', '.join(found.missing)}")


@check("exits of Vcpu.run", "kvm:kvm_userspace_exit", cases=10_000, slow=100_000)
def check_exits_run(tally: Tally, cases: int) -> None:
    """The exits that Vcpu.run returns are those the kernel saw, one for one and in order."""
    from .._ffi import lib
    from ..kvm import Hlt, Interrupted, IoIn, IoOut, MmioRead, MmioWrite

    reasons = {
        IoIn: lib.KVM_EXIT_IO,
        IoOut: lib.KVM_EXIT_IO,
        MmioRead: lib.KVM_EXIT_MMIO,
        MmioWrite: lib.KVM_EXIT_MMIO,
        Hlt: lib.KVM_EXIT_HLT,
    }

    def run(vcpu: Vcpu, nr: int) -> list[int]:
        seen: list[int] = []
        while len(seen) < nr:
            found = vcpu.run()
            if isinstance(found, Interrupted):
                continue  # by a signal: no exit of the guest
            seen.append(reasons.get(type(found), lib.KVM_EXIT_UNKNOWN))
            if isinstance(found, IoIn | MmioRead):
                vcpu.answer(0x5A)
        return seen

    _compare_exits(tally, cases, run)


@check("exits of the C batch loop", "kvm:kvm_userspace_exit", cases=10_000, slow=100_000)
def check_exits_batch(tally: Tally, cases: int) -> None:
    """The exits that a Batch records are those the kernel saw, one for one and in order."""
    from ..kvm import Batch, Interrupted, iter_records

    batch = Batch(unclaimed_pio="ignore", unclaimed_mmio="ignore")

    def run(vcpu: Vcpu, nr: int) -> list[int]:
        vcpu.batch = batch
        batch.record(nr)
        while vcpu.run() != Interrupted("records"):
            pass
        return [record.reason for record in iter_records(bytes(batch.take_records()))]

    _compare_exits(tally, cases, run)


def _compare_exits(tally: Tally, cases: int, run: Callable[[Vcpu, int], list[int]]) -> None:
    # Lets run(vcpu, n) see n exits at a time, and compares their reasons with the events of this thread.
    import mmap
    import threading

    from ..host import Mapping
    from ..kvm import Kvm
    from .tracefs import Tracefs

    event = "kvm:kvm_userspace_exit"
    with (
        Tracefs() as tracefs,
        Mapping(None, mmap.PAGESIZE) as page,
        Kvm() as kvm,
        kvm.create_vm() as vm,
        vm.create_vcpu() as vcpu,
        tracefs.instance([event], [threading.get_native_id()], follow=False) as trace,
    ):
        page.write(0, _CODE)
        vm.set_user_memory_region(0, _CODE_GPA, page)
        sregs = vcpu.sregs
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.sregs = sregs
        regs = vcpu.regs
        regs.rip = _CODE_GPA
        vcpu.regs = regs
        done = 0
        while done < cases:
            ours = run(vcpu, min(_CHUNK, cases - done))
            # An interrupted KVM_RUN (EINTR) is no exit: the loop enters again.
            theirs = [record["reason"] for record in trace.read() if record["errno"] != -errno.EINTR]
            if trace.lost.total:
                tally.break_off(f"{trace.lost.total} events lost by the trace buffer")
                return
            for number, (our, their) in enumerate(zip_longest(ours, theirs), done):
                tally.compare(f"exit {number}", our, their)
            done += len(ours)
