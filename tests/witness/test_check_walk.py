"""The checks of the page walker: the kernel agrees, and a walker that is wrong is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hvmodel.mmu.reserved import ReservedBits
from hvmodel.mmu.walk import GuestMmu
from hvmodel.witness import CheckResult, MmuLab, Outcome, Tally, TraceLost, check_walk, run
from hvmodel.witness.kvm_trace import UserspaceExit
from tests.cases import cases
from tests.need import need


def only(name: str, cases: int) -> CheckResult:
    need("kvm") if name == "walk" else need("kvm", "tracefs", "root")
    (result,) = run([name], cases=cases)
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result


def test_translations_agree() -> None:
    result = only("walk", cases(5000, 200_000))
    assert (result.mismatches, result.lacking) == (0, ()), result.examples
    assert result.compared >= cases(5000, 200_000)


def test_traced_accesses_agree() -> None:
    nr = cases(1000, 50_000)
    result = only("walk_access", nr)
    assert result.mismatches == 0, result.examples
    # Of each access that was walked for: its kind, one walk or more, and mostly its outcome.
    assert result.compared > 2 * nr


# What makes a walker wrong, and which check must see it: KVM_TRANSLATE asks for reads of CPL 0 only.
WRONG: dict[str, tuple[Callable[[GuestMmu], dict[str, Any]], tuple[str, ...]]] = {
    "permissions": (lambda mmu: {"permissions": bytes(bits ^ 0x40 for bits in mmu.permissions)}, ("walk_access",)),
    "no reserved bits": (
        lambda _: {"rsvd": ReservedBits(((0,) * 5, (0,) * 5))},
        ("walk", "walk_access"),
    ),
    "no A and D": (lambda _: {"have_ad": False}, ("walk", "walk_access")),
    "no F": (lambda _: {"reports_fetch": False}, ("walk_access",)),
    "no keys": (lambda _: {"pkru_mask": 0}, ("walk", "walk_access")),
    "another PKRU": (lambda mmu: {"pkru": mmu.pkru ^ 0x3FFFFFFC}, ("walk", "walk_access")),
    "AC": (lambda mmu: {"rflags_ac": not mmu.rflags_ac}, ("walk_access",)),
}


@pytest.mark.parametrize(("how", "name"), [(how, name) for how, (_, names) in WRONG.items() for name in names])
def test_a_walker_that_is_wrong_is_seen(how: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, change = GuestMmu.of, WRONG[how][0]

    class Tampered:
        @staticmethod
        def of(**named: Any) -> GuestMmu:
            mmu = real(**named)
            values = {field: getattr(mmu, field) for field in GuestMmu.fields()}
            return GuestMmu(**values | change(mmu))

    if how in ("no keys", "another PKRU"):
        need("kvm")
        with MmuLab(trace=False) as lab:
            if check_walk._PKE not in check_walk._cr4_bits(lab):
                pytest.skip("needs a KVM that takes CR4.PKE")
    monkeypatch.setattr(check_walk, "GuestMmu", Tampered)
    result = only(name, 3000 if name == "walk" else 500)
    assert result.mismatches > 0


def test_a_trace_with_gaps_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = MmuLab.run, [0]

    def sometimes(lab: MmuLab, program: Any) -> Any:
        found = real(lab, program)
        calls[0] += 1
        if calls[0] % 2:
            raise TraceLost(1, "for this test")
        return found

    monkeypatch.setattr(MmuLab, "run", sometimes)
    result = only("walk_access", 200)
    assert result.mismatches == 0, result.examples
    assert calls[0] >= 4
    # Two calls are need_walks(), of which one was lost; the others are worlds.
    assert result.lacking[0].startswith(f"{calls[0] // 2 - 1} of {calls[0] - 2} worlds")


def test_a_trace_that_is_never_whole_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(lab: MmuLab, program: Any) -> Any:
        raise TraceLost(1, "for this test")

    monkeypatch.setattr(MmuLab, "run", never)
    result = only("walk_access", 200)
    assert not result.ok
    assert "for this test" in result.examples[-1]


def test_a_processor_that_walks_itself_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    # EPT and NPT: the trace has exits, and no walks.
    real = MmuLab.run

    def without_walks(lab: MmuLab, program: Any) -> list[Outcome]:
        return [
            Outcome(
                seen.access,
                seen.value,
                seen.fault,
                seen.mmio,
                seen.stop,
                tuple(event for event in seen.records if type(event) is UserspaceExit),
            )
            for seen in real(lab, program)
        ]

    need("kvm", "tracefs", "root")
    monkeypatch.setattr(MmuLab, "run", without_walks)
    for name in ("walk_access", "spte"):
        (result,) = run([name], cases=200)
        assert result.skipped, result
        assert "EPT" in result.lacking[-1]


def test_a_world_is_done_again_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm")
    with monkeypatch.context() as patch:
        patch.setattr(check_walk._Copy, "tables_differ", lambda self: "for this test")
        (result,) = run(["walk"], cases=600)
    # 600 is the first, and there are more than one.
    names = [text.partition(":")[0] for text in result.examples]
    assert names == [f"world {600 + at}" for at in range(len(names))]
    assert len(names) == result.mismatches > 1
    seen: list[list[int]] = []
    real = MmuLab.translate

    def translate(lab: MmuLab, gvas: Any) -> list[int | None]:
        seen.append(list(gvas))
        return real(lab, gvas)

    monkeypatch.setattr(MmuLab, "translate", translate)
    again = Tally("ours", "theirs")
    check_walk.check_walk(again, 600)
    check_walk.check_walk(again, again.compared + 1, first=601)
    assert again.mismatches == 0
    assert seen[-1] == seen[1]
    # Each address is of another page.
    assert len({gva >> 12 for gva in seen[0]}) == len(seen[0])
