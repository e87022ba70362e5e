"""Fixtures of the state tests: those of the KVM tests."""

from __future__ import annotations

from tests.kvm.conftest import guest, kvm, vcpu, vm

__all__ = ["guest", "kvm", "vcpu", "vm"]
