"""Random public calls on memory of every kind reach neither SIGSEGV nor SIGBUS, and raise nothing but our errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import cases

ROOT = Path(__file__).parents[2]
NUMBER = cases(6_000, 100_000)


@pytest.mark.parametrize("seed", range(2))
def test_random_calls(seed: int) -> None:
    code = [
        sys.executable,
        "-W",
        "ignore::ResourceWarning",
        "-W",
        "ignore::RuntimeWarning",
        str(Path(__file__).with_name("random_calls.py")),
    ]
    done = subprocess.run(
        [*code, str(seed), str(NUMBER)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    calls, refused, kinds = (int(word) for word in done.stdout.split())
    assert calls == NUMBER
    assert NUMBER // 10 < refused < NUMBER  # neither all nothing nor all refused
    assert kinds >= 6  # ArgumentError, ArgumentTypeError, ClosedError, HostError, ViewError, BusyError
