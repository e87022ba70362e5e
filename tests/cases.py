"""How many cases a test tries: few in the fast suite, all of them with `--slow` or HVMODEL_SLOW=1."""

from __future__ import annotations

import os
from typing import TypeVar

__all__ = ["cases"]


T = TypeVar("T")


def cases(fast: T, slow: T) -> T:
    """`slow` where the suite was asked for the full numbers, else `fast`."""
    return slow if os.environ.get("HVMODEL_SLOW", "0") not in ("", "0") else fast
