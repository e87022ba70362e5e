"""The shadow tables as text and as a picture."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from tests.mmu.shadow_ram import ALL, Ram


def test_tree_and_picture() -> None:
    mmu = Ram(0x10000 | ALL, 0x4000 | ALL).mmu()
    mmu.access(0)
    mmu.access(0x1000, "store")
    text = mmu.tree()
    assert "level 1, xwu, unsync" in text
    assert text.splitlines()[0] == "root gfn 0x1, level 4, xwu, unsync below, cr3 0x1000"
    assert "gfn 0x10" in text
    root = ET.fromstring(mmu.svg())
    assert len([element for element in root if element.tag.endswith("rect")]) == 4
    assert len([element for element in root if element.tag.endswith("line")]) == 3
    assert mmu._repr_svg_() == mmu.svg()
    assert set(mmu.sptes().values()) == {spte for sp in mmu.pages.active if sp.level == 1 for _, spte in sp.present()}


def test_a_kept_root_is_told_too() -> None:
    ram = Ram(0x10000 | ALL)
    ram.put(0x5000, 0x2000 | ALL)
    mmu = ram.mmu()
    mmu.access(0)
    mmu.mov_cr3(0x5000)
    assert "kept root 0 gfn 0x1" in mmu.tree()
