"""A guest of a few tables for the tests of the shadow MMU."""

from __future__ import annotations

from typing import Any

from hvmodel.mmu import HostMemory, MmuEvent, ShadowMmu, SimSlot, reset_all_pte_masks
from hvmodel.mmu.masks import ShadowMasks

MASKS = reset_all_pte_masks(46, mmio_caching=False)
P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ALL = P | W | U | A | D


class Ram:
    """1 MiB at 0 with tables of 8-byte entries: root at 0x1000, then 0x2000, 0x3000, 0x4000; pages from 0x10000 on."""

    def __init__(self, *leaves: int, upper: int = ALL, size: int = 1 << 20) -> None:
        self.data = bytearray(size)
        for table in (0x1000, 0x2000, 0x3000):
            self.put(table, table + 0x1000 | upper)
        for index, leaf in enumerate(leaves):
            self.put(0x4000 + 8 * index, leaf)

    def put(self, gpa: int, value: int, size: int = 8) -> None:
        self.data[gpa : gpa + size] = value.to_bytes(size, "little")

    def get(self, gpa: int) -> int:
        return int.from_bytes(self.data[gpa : gpa + 8], "little")

    def mmu(self, masks: ShadowMasks = MASKS, **options: Any) -> ShadowMmu:
        slots = options.pop("slots", None) or [SimSlot(0, len(self.data) >> 12)]
        memory = options.pop("memory", self.data)
        return ShadowMmu(masks, memory, slots, **{"cr3": 0x1000, **options})


def named(events: list[MmuEvent], name: str) -> list[MmuEvent]:
    return [event for event in events if event.name == name]


def low(mmu: ShadowMmu) -> list[tuple[int, int]]:
    # (gfn, SPTE without its frame) of each kvm_mmu_set_spte so far
    return [(e.gfn, e.spte & ~0xFFFFFFFFFF000) for e in named(mmu.take_events(), "set_spte")]


def large_ram(host: HostMemory, **options: Any) -> ShadowMmu:
    # 8 MiB; entry 0 of the PD (0x3000) is a page of 2 MiB at 4 MiB.
    ram = Ram(size=8 << 20)
    ram.put(0x3000, 0x400000 | ALL | PS)
    return ram.mmu(host=host, **options)


def check_books(mmu: ShadowMmu) -> None:
    """What the simulator keeps in two places has to be the same in both, as in the kernel."""
    pages = [sp for bucket in mmu.pages.buckets.values() for sp in bucket]
    assert len(pages) == len(set(pages)) == mmu.pages.used
    assert {sp for sp in pages if not sp.invalid} == set(mmu.pages.active)
    links = {(sp, index) for sp in pages for index in sp.children}
    assert links == {link for sp in pages for link in sp.parents}
    for sp, index in links:
        assert mmu.masks.present_mask & sp.spt[index]
        assert (sp, index) in sp.children[index].parents
    leaves = {(sp, index) for sp in pages for index, _ in sp.present() if sp.is_leaf(index)}
    mapped = {leaf for slot in mmu.slots for row in slot.rmap.values() for leaf in row}
    assert leaves == mapped
    for slot in mmu.slots:
        for (level, gfn), row in slot.rmap.items():
            assert all((sp.level, sp.gfn_of(index)) == (level, gfn) for sp, index in row)
        tables = [sp for sp in pages if sp.has_gptes and not sp.invalid and sp.gfn in slot]
        for gfn in {sp.gfn for sp in tables} | set(slot.tracked):
            assert slot.tracked.get(gfn, 0) == sum(sp.gfn == gfn and sp.level > 1 for sp in tables)
        for (level, first), count in slot.disallow.items():
            inside = range(first, first + (1 << 9 * (level - 1)))
            assert count == sum(sp.gfn in inside for sp in tables)
    for sp in pages:
        if sp.unsync or sp.unsync_children:
            assert all(index in parent.unsync_children for parent, index in sp.parents)
