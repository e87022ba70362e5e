"""Slots, shadow pages and events as values."""

from __future__ import annotations

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.mmu import HostMemory, HostPage, MmuEvent, PageRole, ShadowPage, SimSlot


def test_slots_and_pages_that_cannot_be_large() -> None:
    # A slot of 6 MiB from 1 MiB on: the 2 MiB at its ends are no large pages, those between are.
    slot = SimSlot(0x100, 0x600)
    assert [slot.lpage_allowed(gfn, 2) for gfn in (0x100, 0x1FF, 0x200, 0x3FF, 0x400, 0x5FF, 0x600, 0x6FF)] == [
        False, False, True, True, True, True, False, False,
    ]  # fmt: skip
    assert not any(slot.lpage_allowed(gfn, 3) for gfn in (0x100, 0x400, 0x6FF))
    shifted = SimSlot(0x200, 0x400, hva=0x7F00_0010_0000)  # the host's address is not the guest's, modulo 2 MiB
    assert not shifted.lpage_allowed(0x200, 2)


def test_values() -> None:
    page = ShadowPage(5, PageRole(0x3704), 0x7000, 0)
    assert "gfn=0x5" in repr(page)
    assert str(page.event("get_page", True)) == "get_page gfn=0x5 role=0x3704 created=0x1"
    assert HostPage(5).writable
    assert "flags=2" in repr(SimSlot(1, 1, 2))


def test_ends_of_slots() -> None:
    # A slot from page 1 to page 0x201: neither of the 2 MiB it has parts of is whole, and none of 1 GiB.
    slot = SimSlot(1, 0x200)
    assert [slot.lpage_allowed(gfn, 2) for gfn in (1, 0x1FF, 0x200)] == [False] * 3
    assert [SimSlot(0, 0x400).lpage_allowed(gfn, 2) for gfn in (0, 0x3FF)] == [True, True]
    assert not SimSlot(0, 0x200, hva=0x1000).lpage_allowed(0, 2)  # one page off in the host
    assert SimSlot(0, 0x200, hva=0x40000000).lpage_allowed(0, 2)
    assert not SimSlot(0, 0x40000, hva=0x200000).lpage_allowed(0, 3)
    assert SimSlot(0, 0x40000, hva=0x200000).lpage_allowed(0, 2)
    assert SimSlot(0, 0x40000, hva=0x40000000).lpage_allowed(0, 3)


def test_limits_of_slots() -> None:
    SimSlot((1 << 40) - 1, (1 << 31) - 1)
    for base, npages in ((1 << 40, 1), (0, 1 << 31)):
        with pytest.raises(ArgumentError):
            SimSlot(base, npages)


def test_a_count_of_reasons() -> None:
    slot = SimSlot(0, 0x400)
    slot.count_disallow(5, 1)
    slot.count_disallow(6, 1)
    slot.count_disallow(5, -1)
    assert [slot.lpage_allowed(gfn, 2) for gfn in (0, 0x200)] == [False, True]
    slot.count_disallow(6, -1)
    assert slot.lpage_allowed(0, 2)


def test_host_memory() -> None:
    host = HostMemory(0x100, huge=[0x400], readonly=[7])
    assert [host.fast(5), host.fast(7), host.fault_in(5, True), host.fault_in(7, True), host.fault_in(7, False)] == [
        0x105, None, HostPage(0x105), None, HostPage(0x107, False),
    ]  # fmt: skip
    assert [host.mapping_level(gfn) for gfn in (0x3FF, 0x400, 0x5FF, 0x600)] == [1, 2, 2, 1]


def test_what_an_event_leaves_out_is_0() -> None:
    event = MmuEvent("zap_all_fast")
    assert [getattr(event, name) for name in event.fields()[1:]] == [0] * 9
    assert ShadowPage(5, PageRole(0x3704), 0x7000, 0).entry(3) == 0
