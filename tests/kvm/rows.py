"""The rows of the ioctl table, and what the tests here did to each of them.

A test says which rows it proves; a row that several kinds of fd take counts once per kind:

    @exercises("KVM_GET_REGS", "KVM_SET_REGS")           issues them, with success
    @exercises("KVM_SMI", cap="X86_SMM")                 the same where CHECK_EXTENSION has it, else excused by that
    @exercises("KVM_CREATE_DEVICE", unless=no_vfio)      the same, where no_vfio(kvm) returns no reason
    @excused("KVM_SET_MEMORY_REGION")                    asserts why it cannot be issued here, and returns the reason

Saying so is not enough: while a test runs, every call that the binding makes of the C wrappers is noted with the kind
of its fd and its answer, and an `exercises` test fails unless each of its rows was issued on such an fd and answered
with success.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from hvmodel import _ffi
from hvmodel._ffi import IOCTLS, ffi
from hvmodel.kvm import Device, Kvm, StructItem, Vcpu, Vm, batch, device, exits, handle, memslots, system
from hvmodel.kvm import vcpu as vcpu_module
from hvmodel.kvm import vm as vm_module
from tests.need import need

__all__ = ["REGISTRY", "Calls", "Registry", "excused", "exercises", "recording", "scope_of", "vm_with"]

_BY_FUNCTION = {name.lower(): name for name in IOCTLS}
_MODULES = (handle, system, vm_module, vcpu_module, device, memslots, batch, exits)


def scope_of(fd: int) -> str:
    """What kind of fd the kernel says it is; "-" for none of KVM's."""
    try:
        link = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "-"
    kind = link.removeprefix("anon_inode:").strip("[]")
    if kind == "kvm-vm":
        return "vm"
    if kind.startswith("kvm-vcpu"):
        return "vcpu"
    if kind.startswith("kvm-"):
        return "device"
    return "system" if link == "/dev/kvm" else "-"


class Calls:
    """Stands in for `lib`: hands everything through, and notes (ioctl, kind of fd, answer) of every ioctl."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.made: list[tuple[str, str, int]] = []

    def succeeded(self) -> set[tuple[str, str]]:
        """The (ioctl, kind of fd) that were answered with success at least once."""
        return {(name, scope) for name, scope, rc in self.made if rc >= 0}

    def noting(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        """`call`, noted as `name`."""

        def noted(fd: int, *args: Any) -> int:
            scope = scope_of(fd)
            rc = call(fd, *args)
            self.made.append((name, scope, rc))
            return rc

        return noted

    def noting_run(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, which is Vcpu.run or run_until, noted as KVM_RUN; an interruption is no success of it."""

        def noted(vcpu: Vcpu, *args: Any, **named: Any) -> Any:
            exit = run(vcpu, *args, **named)
            rc = -errno.EINTR if isinstance(exit, exits.Interrupted | exits.Again | exits.HostFault) else 0
            self.made.append(("KVM_RUN", scope_of(vcpu.fd), rc))
            return exit

        return noted

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        ioctl = _BY_FUNCTION.get(name)
        return value if ioctl is None else self.noting(ioctl, value)


@contextmanager
def recording() -> Iterator[Calls]:
    """Note the ioctls that hvmodel.kvm issues in the body, by methods, descriptors, ioctl() and run()."""
    calls = Calls(handle.lib)  # where decorators are stacked, that is the outer one's Calls
    items = [item for kind in (Kvm, Vm, Vcpu, Device) for item in vars(kind).values() if isinstance(item, StructItem)]
    patches = [mock.patch.object(module, "lib", calls) for module in _MODULES if hasattr(module, "lib")]
    patches += [mock.patch.object(Vcpu, name, calls.noting_run(getattr(Vcpu, name))) for name in ("run", "run_until")]
    for item in items:
        for ioctl, slot in ((item.get, "_get"), (item.put, "_put")):
            if ioctl is not None:
                patches.append(mock.patch.object(item, slot, calls.noting(ioctl, getattr(item, slot))))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield calls


class Registry:
    """Which test proves which row, and what came of it.

    `tests`: (ioctl, kind of fd) -> names of tests.  `outcomes`: (ioctl, kind of fd) -> "live", or the excuse.
    """

    def __init__(self) -> None:
        self.tests: dict[tuple[str, str], list[str]] = {}
        self.outcomes: dict[tuple[str, str], str] = {}

    def pairs(self, names: tuple[str, ...], on: str | None, test: str) -> list[tuple[str, str]]:
        """The rows that a decorator names, registered for `test`."""
        found = []
        for name in names:
            scopes = IOCTLS[name].scope
            assert on in scopes if on else len(scopes) == 1, f"{test}: on which of {scopes} is {name} issued?"
            pair = name, on or scopes[0]
            self.tests.setdefault(pair, []).append(test)
            found.append(pair)
        return found

    def missing(self) -> list[tuple[str, str]]:
        """The rows of the table that no test names."""
        return [(name, scope) for name, row in IOCTLS.items() for scope in row.scope if (name, scope) not in self.tests]

    def exercises(
        self,
        *names: str,
        on: str | None = None,
        cap: str | None = None,
        unless: Callable[[Kvm], str | None] | None = None,
    ) -> Callable[..., Any]:
        """See the module."""

        def decorate(test: Callable[..., None]) -> Callable[..., None]:
            pairs = self.pairs(names, on, test.__name__)
            scope = pairs[0][1]

            @functools.wraps(test)
            def wrapped(*args: Any, **named: Any) -> None:
                need("kvm")
                with Kvm() as kvm:
                    reason = lacks(kvm, cap, scope) if cap is not None else unless(kvm) if unless is not None else None
                if reason is not None:
                    for pair in pairs:
                        self.outcomes.setdefault(pair, f"{reason}; {answer(*pair)}")
                    return
                with recording() as calls:
                    test(*args, **named)
                done = calls.succeeded()
                for pair in pairs:
                    tried = [rc for name, scope, rc in calls.made if (name, scope) == pair]
                    assert pair in done, f"{test.__name__} says it exercises {pair}, which was answered {tried}"
                    self.outcomes[pair] = "live"

            return wrapped

        return decorate

    def excused(self, *names: str, on: str | None = None) -> Callable[..., Any]:
        """See the module."""

        def decorate(test: Callable[..., str]) -> Callable[..., None]:
            pairs = self.pairs(names, on, test.__name__)

            @functools.wraps(test)
            def wrapped(*args: Any, **named: Any) -> None:
                need("kvm")
                reason = test(*args, **named)
                assert isinstance(reason, str), f"{test.__name__} does not say why {names} cannot be exercised"
                for pair in pairs:
                    self.outcomes.setdefault(pair, reason)

            return wrapped

        return decorate


def vm_with(kvm: Kvm, cap: str) -> Vm | None:
    """A VM that has KVM_CAP_`cap`, of the default type or else a software-protected one, or None."""
    number = getattr(_ffi.lib, f"KVM_CAP_{cap}")
    types = max(kvm.check_extension(_ffi.lib.KVM_CAP_VM_TYPES), 1)
    for kind in (_ffi.lib.KVM_X86_DEFAULT_VM, _ffi.lib.KVM_X86_SW_PROTECTED_VM):
        if types >> kind & 1:
            vm = kvm.create_vm(kind)
            if vm.check_extension(number) > 0:
                return vm
            vm.close()
    return None


def lacks(kvm: Kvm, cap: str, scope: str) -> str | None:
    """Why the system, or every VM, is without KVM_CAP_`cap`, or None."""
    if scope == "system":
        found = kvm.check_extension(getattr(_ffi.lib, f"KVM_CAP_{cap}")) > 0
    else:
        vm = vm_with(kvm, cap)
        found = vm is not None
        if vm is not None:
            vm.close()
    return None if found else f"KVM_CHECK_EXTENSION(KVM_CAP_{cap}) = 0"


def answer(name: str, scope: str) -> str:
    """What this kernel answers to a row with an argument of zeros, in a word; it may have no business to accept it."""
    kind, _, detail = IOCTLS[name].argument.partition(":")
    call = getattr(_ffi.lib, name.lower())
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        owner = {"system": kvm, "vm": vm, "vcpu": vcpu}.get(scope)
        if owner is None:
            return "no such device"
        if kind == "-":
            rc = call(owner.fd)
        elif kind == "ulong":
            rc = call(owner.fd, 0)
        else:
            ctype = {"ptr": f"{detail} *", "struct": f"struct {detail} *"}[kind].replace("void", "uint64_t")
            rc = call(owner.fd, ffi.new(ctype))
        if rc >= 0 and IOCTLS[name].returns == "fd":
            os.close(rc)
    return errno.errorcode[-rc] if rc < 0 else f"answers {rc}"


REGISTRY = Registry()
exercises = REGISTRY.exercises
excused = REGISTRY.excused
