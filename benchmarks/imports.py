"""import: what `import hvmodel` and naming hvmodel.Machine add to the start of a Python process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import harness
from .harness import BenchmarkError, Pace, Result

__all__ = ["HEAVY", "run"]

BAR_MS = 20.0
STARTS = 1
ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("click", "numpy", "psutil", "ptrace", "rich")

# Without byte code on disk, a start would compile; the warm-up writes what is missing.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
NOTHING = "pass"
PACKAGE = "import hvmodel"
MACHINE = "import hvmodel; hvmodel.Machine"


def run(pace: Pace) -> list[Result]:
    """The least of whole processes, one after the other; then which heavy modules came along."""
    starts = pace.count(STARTS)

    def least(code: str) -> Callable[[], float]:
        return lambda: min(_start_ms(code) for _ in range(starts))

    best = harness.interleave(pace, {code: least(code) for code in (NOTHING, PACKAGE, MACHINE)})
    came = _output(f"{MACHINE}; import sys; print(*sorted({set(HEAVY)!r} & set(sys.modules)))").split()
    if came:
        print(f"imported by {MACHINE!r}: {', '.join(came)}", file=sys.stderr)
    return [
        harness.ceiling("python -c pass", best[NOTHING], "ms", None),
        harness.ceiling("import hvmodel, over that", best[PACKAGE] - best[NOTHING], "ms", None),
        harness.ceiling("import hvmodel; hvmodel.Machine, over that", best[MACHINE] - best[NOTHING], "ms", BAR_MS),
        harness.ceiling(f"of {', '.join(HEAVY)}: imported by it", len(came), "modules", 0),
    ]


def _start_ms(code: str) -> float:
    # Without pipes and without closing fds in the child, subprocess is one vfork, exec and wait.
    start = time.perf_counter_ns()
    status = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, close_fds=False, check=False
    ).returncode
    took = time.perf_counter_ns() - start
    if status:
        raise BenchmarkError(f"python -c {code!r} ended with status {status}")
    return took / 1e6


def _output(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchmarkError(f"python -c {code!r} ended with status {done.returncode}:\n{done.stderr}")
    return done.stdout
