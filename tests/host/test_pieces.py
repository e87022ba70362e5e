from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hvmodel.host.pieces import change, within

SIZE = 12
ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


@given(changes=st.lists(st.tuples(ranges, st.integers(0, 2)), max_size=10), cut=ranges)
def test_as_a_list_of_values(changes: list[tuple[list[int], int]], cut: list[int]) -> None:
    pieces, plain = ((0, SIZE, 0),), [0] * SIZE
    for (start, end), more in changes:
        pieces = change(pieces, start, end, lambda value, more=more: (value + more) % 3)
        plain[start:end] = [(value + more) % 3 for value in plain[start:end]]
    assert [value for start, end, value in pieces for _ in range(start, end)] == plain
    assert all(start < end for start, end, _ in pieces)
    assert all(a[1] == b[0] and a[2] != b[2] for a, b in pairwise(pieces))
    start, end = cut
    got = list(within(pieces, start, end))
    assert [value for low, high, value in got for _ in range(low, high)] == plain[start:end]
    assert all(start <= low < high <= end for low, high, _ in got)
