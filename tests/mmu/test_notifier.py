"""The notifier: ranges against a page-by-page look-up, retry rules case by case, and the kernel by its effects."""

from __future__ import annotations

import random

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.mmu import notifier
from hvmodel.mmu.notifier import INVALID_GPA, GfnRange, MmuInvalidate, Slot, gfn_ranges, is_page_fault_stale
from hvmodel.witness import run
from tests.need import need


def test_ranges_page_by_page() -> None:
    rng = random.Random(2)
    for _ in range(200):
        slots = [
            Slot(rng.randrange(1 << 20), rng.randrange(1, 30), rng.randrange(1, 60) << 12, n)
            for n in range(rng.randrange(5))
        ]
        start = rng.randrange(100 << 12)
        end = start + rng.randrange(1, 20 << 12)
        expected = {
            (slot.id, slot.base_gfn + page)
            for slot in slots
            for page in range(slot.npages)
            # a byte of the page is in the range
            if start < slot.hva + (page + 1) * 4096 and slot.hva + page * 4096 < end
        }
        found = gfn_ranges(slots, start, end)
        assert {(part.slot, gfn) for part in found for gfn in range(part.start, part.end)} == expected
        hvas = [next(slot.hva for slot in slots if slot.id == part.slot) for part in found]
        assert hvas == sorted(hvas)
        assert all(part.start < part.end for part in found)


def test_a_byte_of_a_page_is_the_page() -> None:
    slot = Slot(0x100, 4, 0x10000)
    assert gfn_ranges([slot], 0x10FFF, 0x11001) == (GfnRange(0, 0x100, 0x102),)
    assert gfn_ranges([slot], 0x11000, 0x12000) == (GfnRange(0, 0x101, 0x102),)
    assert gfn_ranges([slot], 0xF000, 0x10000) == gfn_ranges([slot], 0x14000, 0x15000) == ()


def test_a_new_vm() -> None:
    assert vars(MmuInvalidate()) == dict.fromkeys(
        ("mmu_invalidate_seq", "mmu_invalidate_in_progress", "mmu_invalidate_range_start", "mmu_invalidate_range_end"),
        0,
    )


def test_ranges_refuse() -> None:
    for start, end in ((5, 5), (6, 5), (-1, 5), (0, 1 << 64)):
        with pytest.raises(ArgumentError, match=r"gfn_ranges: (start|end)="):
            gfn_ranges([], start, end)
    assert gfn_ranges([Slot(0, 1, 0)], 0, 2**64 - 1) == (GfnRange(0, 0, 1),)


def test_a_range_under_way() -> None:
    state = MmuInvalidate()
    seq = state.mmu_invalidate_seq
    assert not state.retry(seq)
    state.begin()
    assert (state.mmu_invalidate_range_start, state.mmu_invalidate_range_end) == (INVALID_GPA, INVALID_GPA)
    # Between begin and range_add the kernel warns, and retries; without the lock it knows of no range.
    assert state.retry_gfn(seq, 0)
    assert not state.retry_gfn_unsafe(seq, 0)
    state.range_add(5, 8)
    for gfn in range(12):
        wanted = gfn in (5, 6, 7)
        assert state.retry_gfn(seq, gfn) is state.retry_gfn_unsafe(seq, gfn) is wanted
        assert state.retry(seq)
    assert repr(state) == "<MmuInvalidate seq=0, in_progress=1, range=[0x5, 0x8)>"
    state.end()
    assert repr(state) == "<MmuInvalidate seq=1, in_progress=0>"
    assert (state.mmu_invalidate_seq, state.mmu_invalidate_in_progress) == (seq + 1, 0)
    # Behind the end the old number says retry for any frame, the new one for none.
    for gfn in range(12):
        assert state.retry_gfn(seq, gfn)
        assert state.retry_gfn_unsafe(seq, gfn)
        assert not state.retry_gfn(seq + 1, gfn)
        assert not state.retry_gfn_unsafe(seq + 1, gfn)
    assert state.retry(seq)
    assert not state.retry(seq + 1)


def test_two_at_a_time_have_one_range() -> None:
    state = MmuInvalidate()
    state.begin()
    state.range_add(10, 12)
    state.begin()
    state.range_add(2, 4)
    assert (state.mmu_invalidate_range_start, state.mmu_invalidate_range_end) == (2, 12)
    state.range_add(11, 20)
    assert (state.mmu_invalidate_range_start, state.mmu_invalidate_range_end) == (2, 20)
    state.end()
    # The second is still under way, and the range stays what it was.
    assert state.mmu_invalidate_in_progress == 1
    assert [state.retry_gfn(1, gfn) for gfn in (1, 2, 7, 19, 20)] == [False, True, True, True, False]
    state.end()
    assert state.mmu_invalidate_seq == 2
    state.begin()
    assert state.mmu_invalidate_range_start == INVALID_GPA
    state.range_add(30, 31)
    assert not state.retry_gfn(2, 7)


def test_the_number_wraps_as_an_unsigned_long() -> None:
    state = MmuInvalidate()
    state.mmu_invalidate_seq = 2**64 - 1
    state.begin()
    state.range_add(0, 1)
    state.end()
    assert state.mmu_invalidate_seq == 0


def test_only_what_meets_a_slot_counts() -> None:
    state, slots = MmuInvalidate(), [Slot(0x100, 4, 0x10000), Slot(0x200, 4, 0x20000, 1)]
    assert state.invalidate(slots, 0x14000, 0x20000) == ()
    assert state.mmu_invalidate_seq == 0
    assert state.invalidate(slots, 0x13000, 0x21000) == (GfnRange(0, 0x103, 0x104), GfnRange(1, 0x200, 0x201))
    assert (state.mmu_invalidate_seq, state.mmu_invalidate_in_progress) == (1, 0)


def test_the_order_of_calls() -> None:
    state = MmuInvalidate()
    with pytest.raises(ArgumentError, match="begin comes first"):
        state.range_add(0, 1)
    with pytest.raises(ArgumentError, match="begin comes first"):
        state.end()
    state.begin()
    for start, end in ((3, 3), (4, 3)):
        with pytest.raises(ArgumentError, match="range_add: end="):
            state.range_add(start, end)
    for call in (state.retry_gfn, state.retry_gfn_unsafe):
        with pytest.raises(ArgumentError, match="gfn="):
            call(0, -1)
        with pytest.raises(ArgumentError, match="mmu_seq="):
            call(-1, 0)
    with pytest.raises(ArgumentError, match="mmu_seq="):
        state.retry(1 << 64)


def test_stale_faults() -> None:
    state = MmuInvalidate()
    assert not is_page_fault_stale(state, 0, 5)
    assert is_page_fault_stale(state, 1, 5)
    assert not is_page_fault_stale(state, 1, 5, has_slot=False)
    assert is_page_fault_stale(state, 0, 5, root_obsolete=True)
    assert is_page_fault_stale(state, 0, 5, has_slot=False, root_obsolete=True)
    # A root without a page cannot be obsolete; a request to free roots counts for it, and only for it.
    assert not is_page_fault_stale(state, 0, 5, root_obsolete=True, root_is_special=True)
    assert is_page_fault_stale(state, 0, 5, root_is_special=True, free_requested=True)
    assert not is_page_fault_stale(state, 0, 5, free_requested=True)
    assert not is_page_fault_stale(state, 0, 5, root_is_special=True)


def only(cases: int) -> tuple[int, int]:
    need("kvm", "root", "tracefs")
    (result,) = run(["notifier"], cases=cases)
    if result.skipped:
        pytest.skip(result.lacking[0])
    assert any("mmu_invalidate_seq" in text for text in result.lacking)
    return result.compared, result.mismatches


def test_the_pages_that_fault_again() -> None:
    compared, mismatches = only(1000)
    assert compared >= 1000
    assert mismatches == 0


@pytest.mark.parametrize("wrong", ["a page too many", "a page too few", "one slot only"])
def test_the_check_sees_a_wrong_model(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gfn_ranges

    def model(slots: list[Slot], start: int, end: int) -> tuple[GfnRange, ...]:
        found = real(slots, start, end)
        if wrong == "one slot only":
            return found[:1]
        more = 1 if wrong == "a page too many" else -1
        return tuple(GfnRange(part.slot, part.start, part.end + more) for part in found)

    monkeypatch.setattr(notifier, "gfn_ranges", model)
    assert only(1000)[1]
