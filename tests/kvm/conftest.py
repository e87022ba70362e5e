"""Fixtures of the KVM tests: a system, a VM, a vCPU, and small real-mode guests; all closed when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from hvmodel.kvm import Kvm, Vcpu, Vm
from tests.kvm.guest import Guest
from tests.need import need


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    need("kvm")
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as vm:
        yield vm


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    with vm.create_vcpu(0) as vcpu:
        yield vcpu


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[Callable[..., Guest]]:
    """`guest(code, irqchip=…)`: see Guest; as many as a test wants."""
    with ExitStack() as stack:
        yield lambda *args, **named: stack.enter_context(Guest(kvm, *args, **named))
