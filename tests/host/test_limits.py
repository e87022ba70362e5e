from __future__ import annotations

from pathlib import Path

import pytest

from hvmodel.host import available_memory
from hvmodel.host.limits import Limit, limits
from hvmodel.units import GiB, KiB, MiB

NO_LIMIT_V1 = (1 << 63) - 4096  # PAGE_COUNTER_MAX pages in bytes, as memory.limit_in_bytes shows it


def meminfo() -> dict[str, int]:
    lines = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(value.split()[0]) * KiB for name, value in lines}


def test_the_hosts_own() -> None:
    host = next(limit.room for limit in limits() if "MemAvailable" in limit.what)
    now = meminfo()
    assert abs(host - now["MemAvailable"] - now["SwapFree"]) < 2 * GiB  # others use memory meanwhile
    assert 0 < available_memory() <= now["MemTotal"] + now["SwapTotal"]
    assert available_memory() <= min(limit.room for limit in limits()) + 2 * GiB


class Proc:
    """A procfs and the cgroups that it tells of, in a temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "self").mkdir()
        (root / "meminfo").write_text("MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\nSwapFree:  1048576 kB\n")
        self.mounts: list[str] = []
        self.cgroups: list[str] = []

    def mount(self, kind: str, options: str, root: str = "/") -> Path:
        where = self.root / f"{kind} {len(self.mounts)}"  # a blank, which mountinfo writes as \040
        where.mkdir()
        name = str(where).replace(" ", r"\040")
        self.mounts.append(f"30 23 0:26 {root} {name} rw,nosuid shared:4 - {kind} cgroup {options}\n")
        return where

    def group(self, where: Path, **files: object) -> None:
        where.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (where / f"memory.{name}").write_text(f"{value}\n")

    def rooms(self) -> list[int]:
        (self.root / "self" / "mountinfo").write_text("25 1 0:22 / /proc rw - proc proc rw\n" + "".join(self.mounts))
        (self.root / "self" / "cgroup").write_text("".join(self.cgroups))
        found = limits(proc=str(self.root))
        assert available_memory(proc=str(self.root)) == found[0].room
        assert [limit.room for limit in found] == sorted(limit.room for limit in found)
        return [limit.room for limit in found]


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


HOST = 5 * GiB


def test_no_cgroups(proc: Proc) -> None:
    assert proc.rooms() == [HOST]


def test_v2_with_a_limit_above(proc: Proc) -> None:
    top = proc.mount("cgroup2", "rw")
    proc.cgroups.append("0::/a/b\n")
    proc.group(
        top / "a", max=1 * GiB, current=900 * MiB, stat=f"anon 5\ninactive_file {10 * MiB}\nactive_file {6 * MiB}"
    )
    proc.group(top / "a/b", max="max", current=5, stat="")
    assert proc.rooms() == [124 * MiB + 16 * MiB, HOST]
    proc.group(top / "a/b", max=100 * MiB, current=40 * MiB)
    assert proc.rooms() == [60 * MiB, 140 * MiB, HOST]
    proc.group(top / "a/b", max=100 * MiB, current=101 * MiB)  # over the limit for a moment
    assert proc.rooms() == [0, 140 * MiB, HOST]
    assert limits(proc=str(proc.root))[0] == Limit(f"cgroup {top}/a/b, memory.max", 0)


def test_the_caches_are_never_more_than_the_limit(proc: Proc) -> None:
    top = proc.mount("cgroup2", "rw")
    proc.cgroups.append("0::/a\n")
    proc.group(top / "a", max=MiB, current=MiB // 2, stat=f"inactive_file {8 * MiB}")
    assert proc.rooms() == [MiB, HOST]


def test_v1(proc: Proc) -> None:
    proc.mount("cgroup", "rw,cpu")
    top = proc.mount("cgroup", "rw,memory")
    proc.cgroups += ["9:name=systemd:/a/b\n", "4:memory:/a/b\n", "0::/\n"]
    stat = f"cache 1\ninactive_file 7\ntotal_inactive_file {3 * MiB}\ntotal_active_file {1 * MiB}"
    proc.group(top, limit_in_bytes=NO_LIMIT_V1, usage_in_bytes=5)
    proc.group(top / "a", limit_in_bytes=64 * MiB, usage_in_bytes=32 * MiB, stat=stat)
    proc.group(top / "a/b", limit_in_bytes=NO_LIMIT_V1, usage_in_bytes=5)
    assert proc.rooms() == [36 * MiB, HOST]


def test_a_container_that_sees_its_own_cgroups_only(proc: Proc) -> None:
    # The mount's root is the container's cgroup; its path is told from the host's root, or, with a cgroup namespace,
    # from its own.
    top = proc.mount("cgroup2", "rw", root="/docker/5")
    proc.group(top, max=10 * MiB, current=0)
    proc.group(top / "inner", max=4 * MiB, current=0)
    for path, rooms in (
        ("/docker/5/inner", [4 * MiB, 10 * MiB, HOST]),
        ("/docker/5", [10 * MiB, HOST]),
        ("/docker/56", [10 * MiB, HOST]),
        ("/", [10 * MiB, HOST]),
    ):
        proc.cgroups[:] = [f"0::{path}\n"]
        assert proc.rooms() == rooms
    top = proc.mount("cgroup2", "rw", root="/")
    proc.group(top / "inner", max=MiB, current=0)
    proc.cgroups[:] = ["0::/inner\n"]
    assert proc.rooms()[0] == MiB


def test_what_cannot_be_read_does_not_limit(proc: Proc, tmp_path: Path) -> None:
    proc.mount("cgroup2", "rw")
    proc.cgroups.append("0::/gone\n")
    assert proc.rooms() == [HOST]
    proc.mounts.append("nonsense\n")
    proc.cgroups.append("nonsense\n")
    assert proc.rooms() == [HOST]
    assert available_memory(proc=str(tmp_path / "nothing")) > 0
