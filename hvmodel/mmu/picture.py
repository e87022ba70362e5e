"""Shadow tables to look at: the tree as text, and as a picture (SVG).

    root gfn 0x1, level 4, xwu, cr3 0x1000
      [0x000] gfn 0x2, level 3, xwu
        [0x000] gfn 0x3, level 2, xwu
          [0x000] gfn 0x4, level 1, xwu
            [0x000] 0x0                gfn 0x5      pfn 0x100005   x-u a
            [0x001] 0x1000             gfn 0x6      pfn 0x100006   x-u

A line for each entry that is there: its index, then the page it leads to, or the address and the frame it maps.  What
a leaf permits and has is told in letters: x, w, u; a, d; `!` where it is write-protected though the guest may write
(its page holds a table, or is logged).  After a page: "direct" (it shadows no table), "unsync" (its entries may be
stale), "unsync below".
"""

from __future__ import annotations

from .spte import is_last_spte, is_mmio_spte, is_shadow_present_pte, is_writable_pte, spte_to_pfn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .masks import ShadowMasks
    from .shadow_page import ShadowPage
    from .simulate import ShadowMmu

__all__ = ["access_letters", "leaf_letters", "svg", "tree"]


def access_letters(access: int) -> str:
    """ACC bits in letters.

    >>> access_letters(7), access_letters(5)
    ('xwu', 'x-u')
    """
    return "".join(letter if access & bit else "-" for letter, bit in (("x", 1), ("w", 2), ("u", 4)))


def leaf_letters(masks: ShadowMasks, spte: int, access: int) -> str:
    """What a present leaf permits and has; `access`: what the guest's tables allow there.

    >>> from hvmodel.mmu import reset_all_pte_masks
    >>> leaf_letters(reset_all_pte_masks(46), 0x12345a25, 7)
    'x-u a !'
    """
    allowed = (0 if spte & masks.nx_mask else 1) | (2 if is_writable_pte(spte) else 0)
    allowed |= 4 if spte & masks.user_mask else 0
    words = [access_letters(allowed)]
    words.append(("a" if spte & masks.accessed_mask else "") + ("d" if spte & masks.dirty_mask else ""))
    words.append("!" if access & 2 and not is_writable_pte(spte) else "")
    return " ".join(word for word in words if word)


def _page_words(sp: ShadowPage) -> str:
    words = [f"gfn {sp.gfn:#x}, level {sp.level}, {access_letters(sp.access)}"]
    words += ["direct"] * sp.direct + ["unsync"] * sp.unsync
    words += ["unsync below"] * bool(sp.unsync_children) + ["invalid"] * sp.invalid
    return ", ".join(words)


def _roots(mmu: ShadowMmu) -> Iterator[tuple[str, int, ShadowPage]]:
    # (name, CR3, page) of the root in use, then of those kept.
    named = [("root", mmu.root), *((f"kept root {i}", root) for i, root in enumerate(mmu.prev_roots))]
    for name, root in named:
        if root is not None:
            yield from ((name, root.pgd, sp) for sp in root.pages if sp is not None)


def tree(mmu: ShadowMmu) -> str:
    """The shadow tables below all roots as text; a page that was told of before is not told again."""
    lines: list[str] = []
    told: set[ShadowPage] = set()

    def tell(sp: ShadowPage, indent: str, gva: int) -> None:
        told.add(sp)
        for index in sorted(sp.spt):
            spte, at = sp.spt[index], gva | index << 12 + 9 * (sp.level - 1)
            label = f"{indent}[{index:#05x}]"
            if is_mmio_spte(mmu.masks, spte):
                lines.append(f"{label} {at:<#18x} nothing there")
            elif not is_shadow_present_pte(spte):
                continue
            elif is_last_spte(spte, sp.level):
                letters = leaf_letters(mmu.masks, spte, sp.access_of(index))
                gfn, pfn = f"gfn {sp.gfn_of(index):#x}", f"pfn {spte_to_pfn(spte):#x}"
                size = "  2M" if sp.level == 2 else "  1G" if sp.level == 3 else ""
                lines.append(f"{label} {at:<#18x} {gfn:<12} {pfn:<14} {letters}{size}")
            else:
                child = sp.children[index]
                again = child in told
                lines.append(f"{label} {_page_words(child)}{', as above' if again else ''}")
                if not again:
                    tell(child, indent + "  ", at)

    for name, pgd, sp in _roots(mmu):
        lines.append(f"{name} {_page_words(sp)}, cr3 {pgd:#x}" + (", as above" if sp in told else ""))
        if sp not in told:
            tell(sp, "  ", 0)
    return "\n".join(lines)


# ---- the picture: a column for each level, a box for each page, a line for each link ----

_BOX_WIDTH, _COLUMN, _LINE, _GAP, _MOST = 210, 270, 15, 12, 8
_COLORS = {"direct": "#e8f0e4", "unsync": "#fbe3d4", "": "#e6ebf5"}


def _rows(mmu: ShadowMmu, sp: ShadowPage) -> list[tuple[str, int | None]]:
    # (text, index of a link) of what stands in a page's box
    found: list[tuple[str, int | None]] = []
    for index, spte in sp.present():
        if is_last_spte(spte, sp.level):
            letters = leaf_letters(mmu.masks, spte, sp.access_of(index))
            found.append((f"{index:#05x}  gfn {sp.gfn_of(index):#x}  {letters}", None))
        else:
            found.append((f"{index:#05x}", index))
    leaves = [row for row in found if row[1] is None]
    if len(leaves) > _MOST:
        left = len(leaves) - _MOST
        found = [row for row in found if row[1] is not None] + leaves[:_MOST] + [(f"… and {left} more", None)]
    return found


def svg(mmu: ShadowMmu) -> str:
    """The shadow tables below all roots as an SVG picture, the roots at the left; a box is a shadow page.

    Shadow pages of tables are blue, direct ones green, unsync ones red.
    """
    from html import escape

    columns: dict[int, list[ShadowPage]] = {}
    seen: set[ShadowPage] = set()

    def place(sp: ShadowPage) -> None:
        if sp not in seen:
            seen.add(sp)
            columns.setdefault(sp.level, []).append(sp)
            for index, _ in sp.present():
                if index in sp.children:
                    place(sp.children[index])

    for _, _, root in _roots(mmu):
        place(root)
    top = max(columns, default=1)
    boxes: dict[ShadowPage, tuple[int, int, list[tuple[str, int | None]]]] = {}
    height = 0
    for level, pages in columns.items():
        y = _GAP
        for sp in pages:
            rows = _rows(mmu, sp)
            boxes[sp] = (_GAP + (top - level) * _COLUMN, y, rows)
            y += _LINE * (len(rows) + 1) + 2 * _GAP
        height = max(height, y)
    shapes, lines = [], []
    for sp, (x, y, rows) in boxes.items():
        color = _COLORS["unsync" if sp.unsync else "direct" if sp.direct else ""]
        size = _LINE * (len(rows) + 1) + _GAP // 2
        shapes.append(
            f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{size}" rx="4" fill="{color}" stroke="#556"/>'
        )
        title = f"gfn {sp.gfn:#x}  level {sp.level}  {access_letters(sp.access)}"
        shapes.append(f'<text x="{x + 6}" y="{y + 13}" font-weight="bold">{escape(title)}</text>')
        for at, (text, index) in enumerate(rows, 1):
            row_y = y + 13 + at * _LINE
            shapes.append(f'<text x="{x + 6}" y="{row_y}">{escape(text)}</text>')
            if index is not None:
                to_x, to_y, _ = boxes[sp.children[index]]
                lines.append(
                    f'<line x1="{x + _BOX_WIDTH}" y1="{row_y - 4}" x2="{to_x}" y2="{to_y + 9}" stroke="#88a"/>'
                )
    width = top * _COLUMN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="monospace" font-size="11">{"".join(lines)}{"".join(shapes)}</svg>'
    )
