from __future__ import annotations

import itertools
import threading
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hvmodel.ram.dirty import HostDirty, merge, pages_of

PAGES = 64
writes = st.lists(
    st.integers(0, PAGES * 4096 - 1).flatmap(
        lambda offset: st.tuples(st.just(offset), st.integers(0, PAGES * 4096 - offset))
    ),
    max_size=20,
)


def touched(written: list[tuple[int, int]]) -> set[int]:
    # The pages by their definition: those that hold the first byte, the last one, and all between.
    return {page for offset, size in written if size for page in range(offset // 4096, (offset + size - 1) // 4096 + 1)}


def disjoint(ranges: list[range]) -> bool:
    return all(len(pages) for pages in ranges) and all(a.stop < b.start for a, b in itertools.pairwise(ranges))


@given(writes)
def test_marks_are_the_pages_written(written: list[tuple[int, int]]) -> None:
    dirty = HostDirty(PAGES)
    for offset, size in written:
        dirty.mark(offset, size)
    seen = dirty.ranges()
    assert {page for pages in seen for page in pages} == touched(written)
    assert disjoint(seen)
    assert dirty.take() == seen
    assert dirty.ranges() == dirty.take() == []
    assert len(dirty.marks) == PAGES


@given(writes)
def test_merge(written: list[tuple[int, int]]) -> None:
    ranges = [pages_of(offset, size) for offset, size in written if size]
    merged = merge(ranges)
    assert {page for pages in merged for page in pages} == touched(written)
    assert disjoint(merged)


def test_edges() -> None:
    dirty = HostDirty(PAGES)
    dirty.mark(0, 0)
    dirty.mark(PAGES * 4096, 0)
    dirty.mark(4095, 0)
    assert dirty.ranges() == []
    dirty.mark(4095, 2)
    dirty.mark(PAGES * 4096 - 1, 1)
    assert dirty.take() == [range(2), range(PAGES - 1, PAGES)]
    dirty.mark(0, PAGES * 4096)
    assert dirty.take() == [range(PAGES)]


def test_no_mark_is_lost_to_a_take_in_another_thread() -> None:
    for _ in range(20):
        dirty = HostDirty(PAGES)
        taken: list[range] = []
        stop = threading.Event()

        def take(dirty: HostDirty = dirty, taken: list[range] = taken, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                taken.extend(dirty.take())

        thread = threading.Thread(target=take)
        thread.start()
        for page in range(PAGES):
            dirty.mark(page * 4096, 1)
        stop.set()
        thread.join()
        taken.extend(dirty.take())
        assert {page for pages in taken for page in pages} == set(range(PAGES))


def test_marks_of_very_much_memory_cost_nothing() -> None:
    # 1 TiB of RAM: 256 MiB of marks, of which a page or two are touched.
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    dirty = HostDirty(1 << 28)
    dirty.mark((1 << 40) - 4097, 2)
    dirty.mark(0, 8192)
    assert resident() - before < 16 << 20
    assert dirty.take() == [range(2), range((1 << 28) - 2, (1 << 28))]
    assert dirty.ranges() == []
