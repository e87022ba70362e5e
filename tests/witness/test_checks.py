"""The registered checks agree with the kernel here, and would say so if they did not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from hvmodel.errors import HostError
from hvmodel.witness import Tally, abi, btf, checks, registered, run, tracefs
from tests.need import need

if TYPE_CHECKING:
    from hvmodel.kvm import Vcpu


def test_names() -> None:
    assert {c.name for c in registered()} >= {"abi", "exits_run", "exits_batch"}
    pairs = [(c.model, c.witness) for c in registered()]
    assert pairs == sorted(set(pairs))


def test_abi_agrees() -> None:
    need("btf", "kvm")
    (result,) = run(["abi"])
    assert result.ok, result
    assert result.compared > 500


def test_btf_with_few_structs_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a kernel whose KVM is a module without BTF: vmlinux alone knows few of the structs, and they agree.
    monkeypatch.setattr(abi, "compare_abi", lambda _: abi.AbiComparison(65, 900, (), (), ()))
    monkeypatch.setattr(btf.Btf, "for_module", lambda _: btf.Btf.__new__(btf.Btf))
    monkeypatch.setattr(btf.Btf, "source", "vmlinux", raising=False)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/sys/module/kvm")
    (result,) = run(["abi"])
    assert (result.ok, result.skipped, result.mismatches) == (False, False, 1)
    assert "65 of our structs" in result.examples[0]
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    (result,) = run(["abi"])
    assert result.skipped
    assert "not loaded" in result.lacking[0]


def test_lost_events_are_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm", "tracefs")
    monkeypatch.setattr(tracefs.Instance, "lost", property(lambda _: tracefs.Lost(next(losses), 0, 0)))
    monkeypatch.setattr(checks, "_CHUNK", 5)
    losses = iter([0, 7, 7])  # at each look; the text looks again
    (result,) = run(["exits_run"], cases=10)
    assert (result.ok, result.skipped, result.compared, result.mismatches) == (False, False, 5, 1)
    assert result.examples == ("broke off after 5 cases: 7 events lost by the trace buffer",)
    losses = iter([7, 7])
    (result,) = run(["exits_run"], cases=10)
    assert (result.ok, result.skipped, result.compared) == (False, False, 0)


@pytest.mark.parametrize("name", ["exits_run", "exits_batch"])
def test_exits_agree_one_for_one(name: str) -> None:
    need("kvm")
    need("tracefs")
    (result,) = run([name])
    assert (result.compared, result.mismatches, result.lacking) == (10_000, 0, ()), result


def test_an_exit_too_few_or_too_many_is_seen() -> None:
    need("kvm")
    need("tracefs")

    def forgetful(vcpu: Vcpu, nr: int) -> list[int]:
        vcpu.run()
        vcpu.run()  # IoIn: two events
        return [2]  # KVM_EXIT_IO, once

    tally = Tally("m", "w")
    checks._compare_exits(tally, 1, forgetful)
    assert (tally.compared, tally.mismatches) == (2, 1)

    def inventive(vcpu: Vcpu, nr: int) -> list[int]:
        vcpu.run()
        return [2, 5][:nr]

    tally = Tally("m", "w")
    checks._compare_exits(tally, 2, inventive)  # says two exits, the kernel had one
    assert (tally.compared, tally.mismatches) == (2, 1)


def test_without_tracefs_it_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise HostError(1, "fsopen", "fs", "tracefs", "to be root (CAP_SYS_ADMIN)")

    monkeypatch.setattr(tracefs, "_existing_mount", refuse)
    for result in run(["exits_run", "exits_batch"]):
        assert result.skipped, result
        assert "root" in result.lacking[0]
