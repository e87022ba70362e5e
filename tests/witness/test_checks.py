"""The registered checks agree with the kernel here, and would say so if they did not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvmodel.errors import HostError
from hvmodel.witness import Tally, checks, registered, run, tracefs
from tests.need import need

if TYPE_CHECKING:
    from hvmodel.kvm import Vcpu


def test_names() -> None:
    assert {c.name for c in registered()} >= {"abi", "exits_run", "exits_batch"}
    pairs = [(c.model, c.witness) for c in registered()]
    assert pairs == sorted(set(pairs))


def test_abi_agrees() -> None:
    need("btf")
    (result,) = run(["abi"])
    assert result.ok, result
    assert result.compared > 500


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
