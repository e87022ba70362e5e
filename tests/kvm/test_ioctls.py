"""The tally of the ioctl table: each row is exercised or excused by a test of this directory, and really was."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hvmodel._ffi import IOCTLS, ffi
from hvmodel.kvm import Kvm, vendor_module
from hvmodel.kvm.exits import Hlt
from tests.kvm.guest import Guest
from tests.kvm.rows import REGISTRY, Registry
from tests.need import need

# Of rows, where the vendor module is kvm_pvm and the kernel 6.18 or later.  Elsewhere the number is only printed: how
# many are live is for the kernel and the CPU to say.
LIVE_ON_REFERENCE_HOST = 85


def is_reference_host() -> bool:
    release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    return vendor_module() == "kvm_pvm" and release >= (6, 18)


def test_every_row_is_exercised_or_excused(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    # Runs last of them: the names of the files say so.
    files = set(Path(__file__).parent.glob("test_ioctl_*.py"))
    selected = {item.path for item in request.session.items}
    ran = {getattr(item, "originalname", item.name) for item in request.session.items}
    named = {test for tests in REGISTRY.tests.values() for test in tests}
    if not files <= selected or not named <= ran:
        pytest.skip("not all tests of the ioctl table were selected")
    assert REGISTRY.missing() == []
    need("kvm")
    rows = {(name, scope) for name, row in IOCTLS.items() for scope in row.scope}
    assert sorted(rows - REGISTRY.outcomes.keys()) == [], "their tests failed or were skipped"
    live = {name for (name, _), outcome in REGISTRY.outcomes.items() if outcome == "live"}
    excuses = {pair: outcome for pair, outcome in REGISTRY.outcomes.items() if outcome != "live"}
    with capsys.disabled():
        print(f"\nioctls: {len(IOCTLS)} rows, {len(live)} live, {len(IOCTLS) - len(live)} excused; ", end="")
        print(f"by kind of fd: {len(rows)}, {len(rows) - len(excuses)} live, {len(excuses)} excused:")
        for (name, scope), why in sorted(excuses.items()):
            print(f"    {name:<33}{scope:<8}{why}")
    if is_reference_host():
        assert len(live) >= LIVE_ON_REFERENCE_HOST


def test_a_row_without_a_test_is_found() -> None:
    registry = Registry()
    assert ("KVM_GET_REGS", "vcpu") in registry.missing()
    registry.exercises("KVM_GET_REGS")(lambda: None)
    assert ("KVM_GET_REGS", "vcpu") not in registry.missing()
    registry.exercises("KVM_ENABLE_CAP", on="vm")(lambda: None)
    assert ("KVM_ENABLE_CAP", "vcpu") in registry.missing()


def test_a_row_must_be_named_with_its_kind_of_fd_where_there_are_several() -> None:
    with pytest.raises(AssertionError, match="on which of"):
        Registry().exercises("KVM_ENABLE_CAP")(lambda: None)


def test_saying_that_a_row_is_exercised_is_not_enough(kvm: Kvm) -> None:
    registry = Registry()

    @registry.exercises("KVM_GET_VCPU_MMAP_SIZE")
    def never_issues_it() -> None:
        assert kvm.api_version == 12

    with pytest.raises(AssertionError, match=r"says it exercises .*, which was answered \[\]"):
        never_issues_it()
    assert registry.outcomes == {}


def test_a_failed_call_does_not_exercise_a_row(kvm: Kvm) -> None:
    registry = Registry()

    @registry.exercises("KVM_CREATE_VM")
    def is_refused() -> None:
        with pytest.raises(OSError, match="KVM_CREATE_VM"):
            kvm.create_vm(99)

    with pytest.raises(AssertionError, match=r"answered \[-22\]"):
        is_refused()


def test_a_call_on_another_kind_of_fd_does_not_exercise_a_row(kvm: Kvm) -> None:
    registry = Registry()

    @registry.exercises("KVM_CHECK_EXTENSION", on="vm")
    def asks_the_system() -> None:
        assert kvm.check_extension(3) == 1

    with pytest.raises(AssertionError, match="says it exercises"):
        asks_the_system()


def test_descriptors_ioctl_and_run_are_noted(guest: Callable[..., Guest]) -> None:
    registry = Registry()

    @registry.exercises("KVM_GET_REGS", "KVM_SET_REGS", "KVM_GET_XCRS", "KVM_CREATE_VCPU", "KVM_RUN")
    def uses_each_door() -> None:
        g = guest()
        g.vcpu.regs = g.vcpu.regs
        g.vcpu.ioctl("KVM_GET_XCRS", ffi.new("struct kvm_xcrs *"))
        assert g.run() == Hlt()

    uses_each_door()
    assert set(registry.outcomes.values()) == {"live"}


def test_an_excuse_without_a_reason_is_none() -> None:
    registry = Registry()
    with pytest.raises(AssertionError, match="does not say why"):
        registry.excused("KVM_GET_REGS")(lambda: None)()
