"""NX huge page recovery: periods and shares by arithmetic, parameters by the source, the worker as this kernel does."""

from __future__ import annotations

import errno

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu import nx_recovery
from hvmodel.mmu.nx_recovery import (
    KVM_SHADOW_MMU,
    KVM_TDP_MMU,
    NxParameters,
    NxRecovered,
    PossibleNxHugePages,
    SetAnswer,
    recovery_period_ms,
    recovery_to_zap,
    recovery_wait_ms,
)
from hvmodel.witness import run
from tests.need import need


def test_periods() -> None:
    # An hour holds `ratio` periods; no period is shorter than a second, unless it is given.
    for ratio in (1, 2, 7, 60, 3599, 3600):
        assert recovery_period_ms(True, ratio, 0) == 3_600_000 // ratio
    for ratio in (3601, 2**32 - 1):
        assert recovery_period_ms(True, ratio, 0) == 1000
    for period in (1, 999, 2**32 - 1):
        assert recovery_period_ms(True, 60, period) == period
        assert recovery_period_ms(False, 60, period) is recovery_period_ms(True, 0, period) is None
    for ratio, period, field in ((1 << 32, 0, "ratio"), (0, 1 << 32, "period_ms"), (-1, 0, "ratio")):
        with pytest.raises(ArgumentError, match=f"recovery_period_ms: {field}="):
            recovery_period_ms(True, ratio, period)


def test_shares() -> None:
    for pages in range(200):
        for ratio in (1, 2, 3, 60, 199):
            zapped = recovery_to_zap(pages, ratio)
            # The least number of which `ratio` rounds give all back.
            assert zapped * ratio >= pages > (zapped - 1) * ratio or pages == zapped == 0
    assert recovery_to_zap(100, 0) == 0
    with pytest.raises(ArgumentError, match="ratio="):
        recovery_to_zap(1, 1 << 32)
    with pytest.raises(ArgumentError, match="nr_pages="):
        recovery_to_zap(-1, 1)


def test_waits() -> None:
    assert [recovery_wait_ms(100, now, 50) for now in (100, 120, 149, 150, 151, 500)] == [50, 30, 1, 0, 0, 0]
    assert recovery_wait_ms(100, 101, None) is None
    for last, now, period, field in ((100, 99, 5, "now_ms"), (-1, 0, 5, "last_ms"), (0, 0, -1, "period_ms")):
        with pytest.raises(ArgumentError, match=f"recovery_wait_ms: {field}="):
            recovery_wait_ms(last, now, period)


WORDS = {
    "off": "N", "force": "Y", "auto": "N", "never": "never", "Y": "Y", "y": "Y", "1": "Y", "t": "Y", "T": "Y",
    "yes": "Y", "on": "Y", "ON": "Y", "oN": "Y", "N": "N", "n": "N", "no": "N", "0": "N", "f": "N", "F": "N",
    "enabled": "Y", "E": "Y", "disabled": "N", "D": "N", "nEVER": "N",
    "of": "N", "Off": "N", "off\n": "N", "force\n": "Y", "never\n": "never", "10": "Y",
}  # fmt: skip


@pytest.mark.parametrize("before", ["Y", "N"])
@pytest.mark.parametrize("text", WORDS)
def test_words_for_nx_huge_pages(text: str, before: str) -> None:
    model = NxParameters()
    model.set_nx_huge_pages(before)
    answer = model.set_nx_huge_pages(text)
    assert model.get_nx_huge_pages() == WORDS[text]
    changed = (WORDS[text] == "Y") != (before == "Y")
    assert answer == SetAnswer(0, zaps=changed, wakes=changed)


def test_lists() -> None:
    pages = PossibleNxHugePages()
    assert [pages.track(page) for page in range(7)] == [True] * 7
    assert not pages.track(3)  # linked a second time: it keeps its place
    assert [pages.track(f"tdp {n}", KVM_TDP_MMU) for n in range(3)] == [True] * 3
    assert (pages.nx_lpage_splits, repr(pages)) == (10, "<PossibleNxHugePages: 7 shadow, 3 TDP>")
    assert pages.recover(0) == (NxRecovered(KVM_SHADOW_MMU), NxRecovered(KVM_TDP_MMU))
    # ceil(7 / 3) = 3 and ceil(3 / 3) = 1, from the heads; a logged one is part of the share, and off the list too.
    assert pages.recover(3, {1, 6}) == (
        NxRecovered(KVM_SHADOW_MMU, (0, 2), (1,)),
        NxRecovered(KVM_TDP_MMU, ("tdp 0",)),
    )
    assert (pages.pages(), pages.pages(KVM_TDP_MMU)) == ((3, 4, 5, 6), ("tdp 1", "tdp 2"))
    assert pages.untrack(4)
    assert not pages.untrack(4)
    assert not pages.untrack(5, KVM_TDP_MMU)
    assert pages.track(4)
    assert pages.pages() == (3, 5, 6, 4)
    # As many rounds as the ratio says give all back, if nothing comes.
    rounds = [pages.recover(2) for _ in range(3)]
    assert [page for done, _ in rounds for page in done.zapped] == [3, 5, 6, 4]
    assert pages.nx_lpage_splits == 0


def test_lists_refuse() -> None:
    pages = PossibleNxHugePages()
    pages.track("a")
    for call in (pages.track, pages.untrack):
        with pytest.raises(ArgumentError, match="mmu_type="):
            call("b", 2)
    with pytest.raises(ArgumentError, match="pages: mmu_type="):
        pages.pages(-1)
    with pytest.raises(ArgumentError, match=r"track: page=.*one MMU"):
        pages.track("a", KVM_TDP_MMU)
    with pytest.raises(ArgumentError, match="ratio="):
        pages.recover(1 << 32)
    assert pages.pages() == ("a",)


def test_auto_goes_by_the_processor() -> None:
    model = NxParameters(multihit=True)
    assert model.get_nx_huge_pages() == "Y"
    assert model.set_nx_huge_pages("auto") == SetAnswer()
    assert NxParameters().get_nx_huge_pages() == "N"
    assert model.set_nx_huge_pages("off").zaps
    assert model.set_nx_huge_pages("auto").zaps


@pytest.mark.parametrize("text", ["", "maybe", "o", "ok", "2", "-1", " y", "forced"])
def test_what_is_no_word(text: str) -> None:
    model = NxParameters(multihit=True)
    answer = model.set_nx_huge_pages(text)
    wanted = errno.EINVAL
    if text == "forced":  # begins with f, as false does
        wanted = 0
    assert answer.error == wanted
    assert model.get_nx_huge_pages() == ("N" if text == "forced" else "Y")


def test_never_is_for_ever() -> None:
    model = NxParameters(multihit=True)
    assert model.set_nx_huge_pages("never", nr_vms=1) == SetAnswer(errno.EBUSY)
    assert (model.get_nx_huge_pages(), model.has_worker, model.period_ms) == ("Y", True, 60_000)
    assert model.set_nx_huge_pages("never") == SetAnswer(0, zaps=True, wakes=True)
    now: tuple[object, ...] = (model.get_nx_huge_pages(), model.has_worker, model.period_ms)
    assert now == ("never", False, None)
    for answer in (
        model.set_nx_huge_pages("Y"),
        model.set_nx_huge_pages("never"),
        model.set_recovery_ratio("1"),
        model.set_recovery_period_ms("1"),
    ):
        assert answer == SetAnswer(errno.EPERM)
    assert repr(model) == "<NxParameters nx_huge_pages=never, ratio=60, period_ms=0>"


def test_recovery_wakes_what_would_sleep_too_long() -> None:
    model = NxParameters()
    found: tuple[object, ...] = (model.recovery_ratio, model.recovery_period_ms, model.period_ms)
    assert found == (60, 0, None)
    assert model.set_recovery_ratio("30") == SetAnswer()  # nothing is recovered: nobody to wake
    model.set_nx_huge_pages("force")
    assert model.period_ms == 120_000
    assert model.set_recovery_ratio("60") == SetAnswer(wakes=True)  # shorter
    assert model.set_recovery_ratio("60") == SetAnswer()
    assert model.set_recovery_ratio("50") == SetAnswer()  # longer
    assert model.set_recovery_period_ms("71999") == SetAnswer(wakes=True)
    assert model.set_recovery_period_ms("0") == SetAnswer()
    assert model.set_recovery_ratio("0") == SetAnswer()
    periods = [model.period_ms]
    assert model.set_recovery_ratio("1") == SetAnswer(wakes=True)
    assert [*periods, model.period_ms] == [None, 3_600_000]


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("0x10", 16), ("0X1f", 31), ("010", 8), ("+5", 5), ("5\n", 5), ("4294967295", 2**32 - 1), ("0", 0)],
)
def test_numbers(text: str, value: int) -> None:
    model = NxParameters()
    assert model.set_recovery_ratio(text).error == model.set_recovery_period_ms(text).error == 0
    assert (model.recovery_ratio, model.recovery_period_ms) == (value, value)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "0x", "08", "x", "1 2", " 1", "0xg", "++1", "1\n\n"])
def test_what_is_no_number(text: str) -> None:
    model = NxParameters()
    assert model.set_recovery_ratio(text) == SetAnswer(errno.EINVAL)
    assert model.set_recovery_period_ms("4294967296") == SetAnswer(errno.ERANGE)
    assert model.set_recovery_period_ms("9" * 5000) == SetAnswer(errno.ERANGE)
    assert (model.recovery_ratio, model.recovery_period_ms) == (60, 0)


def test_refusals() -> None:
    model = NxParameters()
    for call in (model.set_nx_huge_pages, model.set_recovery_ratio, model.set_recovery_period_ms):
        with pytest.raises(ArgumentTypeError, match="text"):
            call(1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="NxParameters: ratio="):
        NxParameters(ratio=1 << 32)
    with pytest.raises(ArgumentError, match="NxParameters: period_ms="):
        NxParameters(period_ms=-1)


def test_names() -> None:
    # The kernel's enum kvm_mmu_type; a thread's name has 15 letters (TASK_COMM_LEN less its end).
    assert (nx_recovery.KVM_SHADOW_MMU, nx_recovery.KVM_TDP_MMU, nx_recovery.KVM_NR_MMU_TYPES) == (0, 1, 2)
    assert nx_recovery.COMM == "kvm-nx-lpage-re"
    assert len(nx_recovery.COMM) == 15


def test_the_worker_of_this_kernel() -> None:
    need("kvm")
    (result,) = run(["nx_recovery"])
    if result.skipped:
        pytest.skip(result.lacking[0])
    assert (result.mismatches, result.compared) == (0, 1 + 4 * 3), result


def test_the_check_sees_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvmodel.witness import check_mmu_small

    need("kvm")
    if run(["nx_recovery"])[0].skipped:
        pytest.skip("no worker here")
    monkeypatch.setattr(check_mmu_small, "COMM", nx_recovery.COMM[:-1])
    monkeypatch.setattr(check_mmu_small, "_PATIENCE", 0.05)
    assert run(["nx_recovery"])[0].mismatches == 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        # kstrtouint of lib/kstrtox.c: 2**64 does not fit and is told at once; less is read on, to what is no digit.
        ("18446744073709551616z", errno.ERANGE),
        ("18446744073709551615z", errno.EINVAL),
        ("0x10000000000000000z", errno.ERANGE),
        ("0xffffffffffffffffz", errno.EINVAL),
        ("4294967296", errno.ERANGE),
        ("4294967295", 0),
        ("040000000000", errno.ERANGE),
        ("037777777777", 0),
        ("0xffffffff", 0),
        ("0" * 5000 + "7", 0),
        ("9" * 5000, errno.ERANGE),
        ("08", errno.EINVAL),
        ("0xg", errno.EINVAL),
        ("0x", errno.EINVAL),
        ("z9", errno.EINVAL),
        ("1z9", errno.EINVAL),
        ("", errno.EINVAL),
    ],
)
def test_numbers_that_are_too_long(text: str, error: int) -> None:
    parameters = NxParameters()
    assert parameters.set_recovery_period_ms(text).error == error
    value = {"4294967295": 2**32 - 1, "037777777777": 2**32 - 1, "0xffffffff": 2**32 - 1}.get(text, 7)
    assert parameters.recovery_period_ms == (0 if error else value)
