from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.ram import page_size_init

powers = st.integers(0, 30).map(lambda n: 1 << n)


def test_of_this_host() -> None:
    page = page_size_init()
    assert (page.size, page.real, page.target) == (os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PAGE_SIZE"), 4096)
    assert page.mask == -4096
    assert 0x12345 & page.mask == 0x12000


@settings(deadline=None)
@given(st.one_of(st.just(0), powers), powers, powers, st.integers(0, 1 << 40))
def test_whole_host_pages_are_whole_target_pages(wanted: int, real: int, target: int, length: int) -> None:
    page = page_size_init(wanted, real=real, target=target)
    assert page.size >= target
    assert page.size in (wanted or real, target)
    rounded = page.align_up(length)
    assert length <= rounded < length + page.size
    assert rounded % target == 0
    assert rounded % (wanted or real) == 0


def test_without_the_rule_a_block_would_end_in_a_target_page() -> None:
    # Host page 4 KiB, target page 8 KiB: 12 KiB are three pages of the host, and one and a half of the target.
    length, real, target = 12 << 10, 4 << 10, 8 << 10
    assert length % real == 0
    assert length % target != 0
    assert page_size_init(real=real, target=target).align_up(length) == 16 << 10


@pytest.mark.parametrize("field", ["host_page_size", "real", "target"])
def test_refused(field: str) -> None:
    for value in (3, -4096, 4097):
        with pytest.raises(ArgumentError, match=f"page_size_init: {field}"):
            page_size_init(**{field: value})
    with pytest.raises(ArgumentTypeError, match=f"page_size_init: {field}"):
        page_size_init(**{field: "4K"})
    if field != "host_page_size":
        with pytest.raises(ArgumentError):
            page_size_init(**{field: 0})
