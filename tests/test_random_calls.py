"""Random public calls of all that has guest memory, or a vCPU's state, reach neither SIGSEGV nor SIGBUS, and raise
nothing undocumented."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import hvmodel.errors
from hvmodel.errors import HvError
from hvmodel.host import PassingError, ViewError
from hvmodel.ram import MemTxError
from tests.cases import cases
from tests.need import need

NUMBER = cases(4_000, 100_000)
NUMBER_OF_STATE = cases(2_500, 60_000)
LIMIT = cases(120, 600)  # seconds, for a machine that has much else to do
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None

_ERRORS = {name for name in hvmodel.errors.__all__ if issubclass(getattr(hvmodel.errors, name), HvError)}
DOCUMENTED = (
    _ERRORS | {error.__name__ for error in (ViewError, MemTxError, PassingError)} | {"Refusal"}
)  # our callbacks'


def run(
    seed: int, number: int, tmp_path: Path, before: str = "", script: str = "random_calls.py"
) -> subprocess.CompletedProcess[str]:
    """The calls in a child, after the Python statements `before`."""
    script = str(Path(__file__).with_name(script))
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); sys.path.insert(0, '.')\n"
    code += f"{before}\nrunpy.run_path({script!r}, run_name='__main__')"
    with tempfile.TemporaryDirectory(dir=SHM) as shm:
        return subprocess.run(
            [sys.executable, "-c", code, str(seed), str(number), str(LIMIT), str(tmp_path), shm],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT + 60,
        )


@pytest.mark.parametrize(
    ("script", "number", "least"),  # kinds: those without KVM and userfaultfd
    [("random_calls.py", NUMBER, 50), ("random_state_calls.py", NUMBER_OF_STATE, 7)],
)
def test_random_calls(script: str, number: int, least: int, tmp_path: Path) -> None:
    seed = int(os.environ.get("HVMODEL_SEED") or random.SystemRandom().randrange(1 << 20))
    print(f"HVMODEL_SEED={seed}")
    done = run(seed, number, tmp_path, script=script)
    assert done.returncode == 0, f"HVMODEL_SEED={seed}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    outcome = json.loads(done.stdout.splitlines()[-1])
    succeeded, failed = outcome["succeeded"], outcome["failed"]
    assert outcome["seed"] == seed
    assert sum(succeeded.values()) + sum(failed.values()) == outcome["calls"] == number
    assert not outcome["undocumented"], f"HVMODEL_SEED={seed}\n" + "\n".join(outcome["undocumented"].values())
    assert outcome["left"] == [], f"HVMODEL_SEED={seed}"
    assert outcome["errors"].keys() <= DOCUMENTED, f"HVMODEL_SEED={seed}"
    assert len(succeeded) > least
    one_sided = [name for name in succeeded if not (succeeded[name] and failed[name])]
    # A short run may miss a rare one.
    assert len(one_sided) <= (0 if number >= 20_000 else 4), f"HVMODEL_SEED={seed}: {one_sided}"


@pytest.mark.parametrize(
    ("broken", "seen"),
    [
        ("Access._range = lambda self, method, offset, size, field='size': (offset, size or 0)", "Segmentation fault"),
        ("Access._find_fault = lambda self: None", "Bus error"),
        ("Export.overlaps = lambda self, offset, end: False; Access._nr_views = lambda self: 0", "Fatal|Broken"),
    ],
)
def test_a_missing_check_is_seen(broken: str, seen: str, tmp_path: Path) -> None:
    # What the tests above would say of a library that does not check ranges, files that can be cut off, live views.
    before = f"from hvmodel.host.access import Access; from hvmodel.host.views import Export; {broken}"
    done = run(1, 100_000, tmp_path, before)
    assert done.returncode != 0
    assert re.search(seen, done.stderr), done.stderr


def test_a_refused_put_that_is_not_undone_is_seen(tmp_path: Path) -> None:
    need("kvm")
    before = "from hvmodel._ffi import ffi, lib; import hvmodel.state.vcpu_state as state\n"
    before += "state._put_all = lambda vcpu, parts, nr, block, undo: lib.hv_state_put(vcpu, parts, nr, block, ffi.NULL)"
    done = run(1, 20_000, tmp_path, before, "random_state_calls.py")
    assert done.returncode != 0
    assert "Broken: after " in done.stderr, done.stderr
