"""What this process holds, as the kernel tells it: the witnesses of the leak tests."""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def fds() -> Counter[str]:
    """What the open file descriptors refer to, without the one that lists them."""
    links: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links[os.readlink(f"/proc/self/fd/{fd}")] += 1
    return links


def maps(name: str) -> list[str]:
    """The lines of /proc/self/maps about the memfd called `name`."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"/memfd:{name}" in line]


def anonymous_shared() -> int:
    """Bytes of anonymous shared mappings, which the kernel calls /dev/zero."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("/dev/zero (deleted)") and (m := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)):
            total += int(m[2], 16) - int(m[1], 16)
    return total


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """Fails if the body leaves a file descriptor, a memfd mapping or anonymous shared memory behind."""
    gc.collect()
    before = fds(), maps(""), anonymous_shared()
    yield
    gc.collect()
    assert (fds(), maps(""), anonymous_shared()) == before
