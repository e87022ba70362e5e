"""The check of refusals agrees here, and would say so if the errors named another field."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hvmodel.kvm import Kvm
from hvmodel.state import DebugRegs, refusals, trial
from hvmodel.state.trial import get_part, put_part
from hvmodel.witness import check_refusals as checked
from hvmodel.witness import run
from tests.need import need


@pytest.mark.parametrize(("name", "cases"), [("refusals", 400), ("refusals_tried", 30)])
def test_agrees(name: str, cases: int) -> None:
    need("kvm")
    (result,) = run([name], cases=cases)
    assert result.ok, result
    assert result.compared == cases


def test_a_wrong_field_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm")
    right = refusals.explain

    def wrong(*args: Any, **options: Any) -> Any:
        error = right(*args, **options)
        error.field = {"dr6": "dr7", "cr4": "cr2"}.get(error.field, "flags")  # type: ignore[attr-defined]
        return error

    monkeypatch.setattr(refusals, "explain", wrong)
    (result,) = run(["refusals"], cases=60)
    assert result.mismatches > 20


def test_a_changed_vcpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm")
    right = refusals.explain

    def careless(vcpu: Any, part: str, *args: Any) -> Any:
        error = right(vcpu, part, *args)
        put_part(vcpu, "debugregs", bytes(DebugRegs(dr7=0x400, db=[1, 2, 3, 4])))
        return error

    monkeypatch.setattr(refusals, "explain", careless)
    monkeypatch.setattr(checked, "_VCPUS", ((checked._with_cpuid, ("debugregs",)),))
    (result,) = run(["refusals"], cases=20)
    assert result.mismatches >= 20
    assert "as before" in result.examples[0]


def test_nothing_found_by_trying_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm")
    monkeypatch.setattr(trial, "search", lambda *_: None)
    (result,) = run(["refusals_tried"], cases=5)
    assert result.mismatches == 5


@pytest.mark.parametrize("part", ["sregs", "sregs2", "xcrs", "events", "xsave", "debugregs"])
def test_most_random_values_are_valid(part: str) -> None:
    # Else the check would break what is broken.
    need("kvm")
    rng = random.Random(6)
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.set_cpuid2(kvm.supported_cpuid_table())
        start = get_part(vcpu, part, b"")
        values = [checked.random_value(rng, part, start) for _ in range(50)]
        assert sum(put_part(vcpu, part, value) == 0 for value in values) >= 40
        assert len(set(values)) > 2
