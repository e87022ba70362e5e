"""The checks of page tables and accounting: they agree, and they see what is wrong."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from hvmodel.errors import HostError
from hvmodel.host.pagemap import Category, PageEntry, PageMap, PageRegion, Scan
from hvmodel.host.smaps import Accounting, Vma
from hvmodel.value import Value
from hvmodel.witness import CheckResult, check_pages, run
from tests.cases import cases

NAMES = ["accounting", "page_frames", "pagemap_scan", "smaps_sums"]


def replaced(value: Any, **fields: object) -> Any:
    """A copy of a Value with other fields."""
    return type(value)(**{field: fields.get(field, getattr(value, field)) for field in value.fields()})


def only(name: str, nr: int = 1) -> CheckResult:
    (result,) = run([name], cases=nr)
    return result


def test_they_agree() -> None:
    for result in run(NAMES, cases=cases(2, 20)):
        assert result.mismatches == 0, result
        assert result.compared or result.lacking, result


def test_all_kinds_of_pages_are_among_them() -> None:
    with check_pages._stopped(1) as pid, PageMap(pid) as pages:
        entries: list[PageEntry] = []
        for vma in check_pages._vmas(pid):
            entries += pages.entries(vma.start, vma.size)
        whole = Accounting.of(check_pages._vmas(pid))
    for test in ("present", "file", "exclusive"):
        assert {getattr(entry, test) for entry in entries} == {False, True}, test
    assert whole.shared
    assert whole.anon
    assert whole.rss > whole.anon


def test_a_page_too_many_in_a_part_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = check_pages.account
    for field in ("rss", "private", "anon", "huge", "mapped"):

        def wrong(*args: Any, field: str = field, **named: Any) -> Accounting:
            found = real(*args, **named)
            return replaced(found, **{field: getattr(found, field) + 4096})

        monkeypatch.setattr(check_pages, "account", wrong)
        result = only("accounting")
        assert result.mismatches > 5
        assert any(f": {field}: " in text for text in result.examples)


def test_wrong_sums_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = check_pages.read_smaps
    changes: list[Callable[[list[Vma]], list[Vma]]] = [
        lambda vmas: vmas[:-2] + vmas[-1:],  # one left out (the last is not the process's)
        lambda vmas: [replaced(vmas[0], pss=vmas[0].pss + (1 << 20)), *vmas[1:]],
        lambda vmas: [replaced(vma, private_dirty=0) for vma in vmas],
    ]
    for change in changes:
        monkeypatch.setattr(check_pages, "read_smaps", lambda pid, change=change: change(list(real(pid))))
        assert only("smaps_sums").mismatches >= 1


@pytest.mark.parametrize(
    "change",
    [
        lambda scan: Scan(scan.regions[1:], scan.walk_end),
        lambda scan: Scan(
            tuple(replaced(region, categories=region.categories ^ Category.PRESENT) for region in scan.regions),
            scan.walk_end,
        ),
        # Neighbours that are not joined.
        lambda scan: Scan(
            tuple(
                part
                for region in scan.regions
                for part in (
                    PageRegion(region.start, region.start + 4096, region.categories),
                    PageRegion(region.start + 4096, region.end, region.categories),
                )
                if part.start < part.end
            ),
            scan.walk_end,
        ),
    ],
)
def test_wrong_regions_are_seen(change: Callable[[Scan], Scan], monkeypatch: pytest.MonkeyPatch) -> None:
    real = PageMap.scan
    monkeypatch.setattr(PageMap, "scan", lambda *args, **named: change(real(*args, **named)))
    assert only("pagemap_scan", 30).mismatches > 3


def test_a_wrong_entry_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PageMap.entries
    for bit in (56, 61):  # exclusive, file
        monkeypatch.setattr(
            PageMap, "entries", lambda *args, bit=bit: [PageEntry(e.word ^ 1 << bit) for e in real(*args)]
        )
        result = only("page_frames", 30)
        assert result.mismatches > 5, result


def test_what_this_host_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_scan(*args: object, **named: object) -> Scan:
        raise HostError(errno.ENOTTY, "ioctl(PAGEMAP_SCAN)")

    with monkeypatch.context() as patch:
        patch.setattr(PageMap, "scan", no_scan)
        assert only("pagemap_scan").skipped
    with monkeypatch.context() as patch:
        real = PageMap.entries
        hidden = (1 << 55) - 1
        patch.setattr(PageMap, "entries", lambda *args: [PageEntry(e.word & ~hidden) for e in real(*args)])
        result = only("page_frames")
        assert result.skipped
        assert "root" in result.lacking[0]
    with monkeypatch.context() as patch:
        values = iter(range(100))
        patch.setattr(check_pages, "smaps_rollup", lambda pid: {"Rss": next(values)})
        assert only("smaps_sums").skipped
    with monkeypatch.context() as patch:
        real_account = check_pages.account
        patch.setattr(
            check_pages,
            "account",
            lambda *args, **named: replaced(real_account(*args, **named), pss=None, swapped=None),
        )
        result = only("accounting")
        assert result.ok
        assert len(result.lacking) == 2
    with monkeypatch.context() as patch:
        patch.setattr(check_pages, "_kernel", lambda: (6, 12))
        assert "6.17" in only("smaps_sums").lacking[0]
    with monkeypatch.context() as patch:
        patch.setattr(check_pages, "_SCRIPT", "raise SystemExit")
        assert only("accounting").skipped


def test_replaced() -> None:
    assert isinstance(replaced(PageEntry(1), word=2), Value)
    assert replaced(PageEntry(1), word=2) == PageEntry(2)
