"""Random public calls on memory of every kind reach neither SIGSEGV nor SIGBUS, and raise nothing but our errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import cases
from tests.need import need

ROOT = Path(__file__).parents[2]
NUMBER = cases(6_000, 100_000)


def run(script: str, seed: int, number: int) -> tuple[int, int]:
    """How many calls were refused, and by how many kinds of errors."""
    code = [
        sys.executable,
        "-W",
        "ignore::ResourceWarning",
        "-W",
        "ignore::RuntimeWarning",
        str(Path(__file__).with_name(script)),
    ]
    done = subprocess.run(
        [*code, str(seed), str(number)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr  # of a thread
    calls, refused, kinds = (int(word) for word in done.stdout.split())
    assert calls == number
    return refused, kinds


@pytest.mark.parametrize("seed", range(2))
def test_random_calls(seed: int) -> None:
    refused, kinds = run("random_calls.py", seed, NUMBER)
    assert NUMBER // 10 < refused < NUMBER  # neither all nothing nor all refused
    assert kinds >= 6  # ArgumentError, ArgumentTypeError, ClosedError, HostError, ViewError, BusyError


def test_random_calls_with_page_faults() -> None:
    need("userfaultfd")
    number = cases(2_000, 50_000)
    refused, kinds = run("random_faults.py", 0, number)
    assert number // 10 < refused < number
    assert kinds >= 4  # ArgumentError, HostError, ViewError, BusyError
