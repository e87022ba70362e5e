"""The check of the simulator: the kernel agrees on random programs, and a model that is wrong in one rule is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hvmodel.errors import HvError
from hvmodel.mmu import shadow_tree, simulate
from hvmodel.mmu.shadow_page import SimSlot
from hvmodel.mmu.simulate import ShadowMmu
from hvmodel.witness import CheckResult, run
from hvmodel.witness.check_simulator import ShadowLab, compare_program
from hvmodel.witness.result import Tally
from hvmodel.witness.shadow_program import HostFrames, Program, Registers, Step
from tests.cases import cases
from tests.need import need


@pytest.fixture(scope="module")
def lab() -> Iterator[ShadowLab]:
    need("kvm", "tracefs", "root")
    try:
        made = ShadowLab()
    except HvError as error:
        pytest.skip(str(error))
    with made:
        yield made


def test_programs_agree() -> None:
    need("kvm", "tracefs", "root")
    result: CheckResult
    (result,) = run(["simulator"], cases=cases(24, 2000))
    if result.skipped:
        pytest.skip(result.lacking[0])
    assert result.mismatches == 0, result.examples
    assert result.compared > 100 * cases(24, 2000) // 2


def _prefetch_less(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(simulate, "PTE_PREFETCH_NUM", 4)


def _flood_later(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shadow_tree, "_FLOOD", 4)


def _more_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shadow_tree, "_PAGES_RATIO", 40)


def _never_unsync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShadowMmu, "_try_to_unsync", lambda *_: False)


def _always_large(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimSlot, "lpage_allowed", lambda *_: True)


def _no_zero_page(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostFrames, "fast", lambda self, gfn: self.frames.get(gfn))


def _no_write_protection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShadowMmu, "_write_protect_gfn", lambda *_: None)


@pytest.mark.parametrize(
    "wrong",
    [
        _prefetch_less,
        _flood_later,
        _more_pages,
        _never_unsync,
        _always_large,
        _no_zero_page,
        _no_write_protection,
    ],
)
def test_a_wrong_model_is_seen(
    lab: ShadowLab, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[pytest.MonkeyPatch], None]
) -> None:
    wrong(monkeypatch)
    tally = Tally("the simulator", "KVM")
    for seed in range(60):
        try:
            if not compare_program(tally, Program(seed, lab), lab):
                return
        except AssertionError:
            return  # the model noticed by itself
    pytest.fail("60 programs agree")


def test_a_difference_names_program_access_and_event(lab: ShadowLab) -> None:
    program = Program(3, lab)
    step, result, events = next(found for found in program.predicted if any(e.name == "set_spte" for e in found[2]))
    at = program.predicted.index((step, result, events))
    index = next(i for i, event in enumerate(events) if event.name == "set_spte")
    wrong: dict[str, Any] = {name: getattr(events[index], name) for name in events[index].fields()}
    events[index] = type(events[index])(**{**wrong, "spte": wrong["spte"] ^ 1 << 9})
    tally = Tally("the simulator", "KVM")
    assert not compare_program(tally, program, lab)
    result_ = tally.result()
    assert result_.mismatches >= 1
    assert f"program 3, access {at} ({step})" in result_.examples[0]
    assert "set_spte" in result_.examples[0]


def test_a_program_is_the_same_for_its_seed(lab: ShadowLab) -> None:
    one, other = Program(11, lab), Program(11, lab)
    assert one.steps == other.steps
    assert Program(12, lab).steps != one.steps


def test_steps_in_words() -> None:
    assert str(Step("store", 0x1000, value=5)) == "store 0x1000 by CPL 3, value 0x5"
    assert str(Step("log", slot=3, on=True)) == "log slot 3 first 0x0 count 0 on True"
    assert str(Step("sregs", registers=Registers(0x1000))).startswith("sregs Registers(cr3=0x1000")
