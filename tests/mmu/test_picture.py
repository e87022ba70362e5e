"""The shadow tables as text and as a picture."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree as ET

from hvmodel.mmu import HostMemory, reset_all_pte_masks
from hvmodel.mmu.picture import leaf_letters
from tests.mmu.shadow_ram import ALL, NX, Ram, U, W, large_ram


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


def numbers(root: ET.Element, tag: str, *names: str) -> list[tuple[int, ...]]:
    found = [element for element in root if element.tag.endswith(tag)]
    return [tuple(int(element.attrib[name]) for name in names) for element in found]


def test_where_everything_is_drawn() -> None:
    # A column for each level, 270 apart, the first and all boxes from 12 on; a box is 210 wide, and 15 high for its
    # title and each row, and 6; the next one in its column is 24 below the rows.  Two roots: at 0x5000, and one kept.
    ram = Ram(*[0x10000 + 0x1000 * index | ALL for index in range(11)])
    ram.put(0x5000, 0x2000 | ALL)
    mmu = ram.mmu()
    mmu.access(0)
    mmu.mov_cr3(0x5000)
    for index in range(8):
        mmu.access(index << 12)
    root = ET.fromstring(mmu.svg())
    assert "more" not in mmu.svg()  # 8 leaves are all shown
    for index in range(8, 11):
        mmu.access(index << 12)
    root = ET.fromstring(mmu.svg())
    one, ten = 15 * 2 + 6, 15 * 10 + 6  # with a row; with 8 rows and "… and 3 more"
    second = 12 + 15 * 2 + 24
    assert numbers(root, "rect", "x", "y", "width", "height") == [
        (12, 12, 210, one),
        (12, second, 210, one),
        (12 + 270, 12, 210, one),
        (12 + 540, 12, 210, one),
        (12 + 810, 12, 210, ten),
    ]
    # A line leads from its row, 4 above the text's foot, to the title of the box of the next level.
    assert numbers(root, "line", "x1", "y1", "x2", "y2") == [
        (12 + 210, 12 + 13 + 15 - 4, 12 + 270, 12 + 9),
        (12 + 210, second + 13 + 15 - 4, 12 + 270, 12 + 9),
        (12 + 270 + 210, 12 + 13 + 15 - 4, 12 + 540, 12 + 9),
        (12 + 540 + 210, 12 + 13 + 15 - 4, 12 + 810, 12 + 9),
    ]
    texts = [(element.attrib["y"], element.text) for element in root if element.tag.endswith("text")][-10:]
    assert [int(y) for y, _ in texts] == [12 + 13 + 15 * row for row in range(10)]
    assert [str(text)[:15] for _, text in texts[:9]] == [
        "gfn 0x4  level ",
        *(f"0x{index:03x}  gfn 0x{0x10 + index:x}" for index in range(8)),
    ]
    assert texts[-1][1] == "… and 3 more"
    assert (root.attrib["width"], root.attrib["height"]) == (str(4 * 270), str(12 + 15 * 10 + 24))
    empty = ET.fromstring(Ram().mmu().svg())
    assert (empty.attrib["width"], empty.attrib["height"], len(empty)) == ("270", "0", 0)


def test_letters_of_a_leaf() -> None:
    # The processor's bits (SDM volume 3, table 5-20): W 1, U 2, A 5, D 6, NX 63.  "!": the guest may write, the host
    # does not let it yet.
    masks = reset_all_pte_masks(46)
    for x, w, u, a, d, guest in itertools.product((0, 1), (0, 1), (0, 1), (0, 1), (0, 1), range(8)):
        spte = 0x12345000 | 0xA01 | (0 if x else NX) | W * w | U * u | 0x20 * a | 0x40 * d
        words = ["x" * x + "-" * (1 - x) + ("w" if w else "-") + ("u" if u else "-"), "a" * a + "d" * d]
        words.append("!" if guest & 2 and not w else "")
        assert leaf_letters(masks, spte, guest) == " ".join(filter(None, words))


def test_the_tree_says_addresses_and_sizes() -> None:
    # Entry 1 of each level: 512 GiB + 1 GiB + 2 MiB + 4 KiB.
    ram = Ram(0x10000 | ALL, 0x11000 | ALL, 0x40000000 | ALL)
    for table in (0x1000, 0x2000, 0x3000):
        ram.put(table + 8, table + 0x1000 | ALL)
    mmu = ram.mmu(reset_all_pte_masks(46))
    mmu.access((1 << 39) + (1 << 30) + (1 << 21) + (1 << 12))
    mmu.access((1 << 39) + (1 << 30) + (1 << 21) + (2 << 12))
    assert [line.split()[:4] for line in mmu.tree().splitlines()[-2:]] == [
        ["[0x001]", "0x8040201000", "gfn", "0x11"],
        ["[0x002]", "0x8040202000", "nothing", "there"],
    ]
    assert not mmu.tree().endswith("M")

    class Host(HostMemory):
        def mapping_level(self, gfn: int) -> int:
            return 3

    large = large_ram(Host())
    large.access(0)
    assert large.tree().splitlines()[-1].endswith("  2M")
