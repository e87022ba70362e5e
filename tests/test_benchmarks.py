"""Every benchmark runs and prints the JSON object that DESIGN.md describes.  What the figures are is not asked here."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, plot, ram
from benchmarks.harness import BenchmarkError
from hvmodel.ram import RamBlock
from tests.cases import cases
from tests.need import need

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {"name", "value", "unit", "floor", "ratio", "bar", "holds"}


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """All benchmarks' objects, of one run."""
    need("kvm", "gcc")
    done = _run("all", "--json", "--short")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


# A fast run has one of them as a run of its own, for the others the run of all.
@pytest.mark.parametrize("name", ["exits", "flatview", "import", "kick", "lifecycle", "mmu", "state"])
def test_prints_its_results_as_json(name: str, documents: list[dict[str, Any]]) -> None:
    if cases(name == "kick", True):
        done = _run(name, "--json", "--short")
        assert done.returncode == 0, done.stderr
        _check(json.loads(done.stdout), name)
    (document,) = [document for document in documents if document["benchmark"] == name]
    _check(document, name)


def _check(document: Any, name: str) -> None:
    # What holds of the object of every benchmark.
    assert set(document) == {"benchmark", "host", "results"}
    assert document["benchmark"] == name
    assert {"kernel", "vendor_module", "python"} <= set(document["host"])
    assert document["results"]
    for result in document["results"]:
        assert set(result) == FIELDS
        assert isinstance(result["name"], str)
        assert isinstance(result["unit"], str)
        assert isinstance(result["value"], (int, float))
        if result["floor"] is None:
            assert result["ratio"] is None
        else:
            assert result["ratio"] == pytest.approx(result["value"] / result["floor"])
        if result["bar"] is None:
            assert result["holds"] is None
        else:
            judged = result["value"] if result["ratio"] is None else result["ratio"]
            least = result["unit"].endswith("/s")  # a rate
            assert result["holds"] is (judged >= result["bar"] if least else judged <= result["bar"])
    assert len({result["name"] for result in document["results"]}) == len(document["results"])


def test_all_of_them(documents: list[dict[str, Any]]) -> None:
    assert [document["benchmark"] for document in documents] == [
        "exits",
        "flatview",
        "import",
        "kick",
        "lifecycle",
        "mmu",
        "ram",
        "state",
        "sync",
    ]
    assert all(document["results"] for document in documents)


def test_the_table_names_host_and_bars() -> None:
    need("kvm", "gcc")
    done = _run("lifecycle", "--short")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("lifecycle: Linux ")
    assert any("bar 1.15" in line for line in rest)


def test_an_unknown_name_is_a_usage_error() -> None:
    done = _run("no-such-benchmark")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


HUGETLB = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
THP = Path("/sys/kernel/mm/transparent_hugepage")


def _fixed(setting: Path) -> str:
    return setting.read_text().partition("[")[2].partition("]")[0]


def test_ram_measures_or_names_what_the_host_lacks(tmp_path: Path) -> None:
    need("gcc")
    picture = tmp_path / "ram.png"
    done = _run("ram", "--json", "--short", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    _check(document, "ram")
    lacks = document["host"].get("lacks", {})
    measured = {result["name"] for result in document["results"]}
    assert not measured & set(lacks)

    free = int((HUGETLB / "free_hugepages").read_text()) if HUGETLB.exists() else 0
    assert ("fill of a memfd in hugetlb" in lacks) is (free * 2 < 64)
    assert ("fill 64 MiB, hugetlb, populate" in measured) is (free * 2 >= 64)
    if _fixed(THP / "shmem_enabled") in ("never", "deny"):
        assert "shmem_enabled" in lacks["fill of a memfd in THP"]
        assert "fill 64 MiB, 4K, populate" in measured
    if _fixed(THP / "enabled") == "never":
        assert "fill of anonymous memory in THP" in lacks

    # Every way is barred at the sizes that the bars are for, and nowhere else.
    for kind in ("4K", "THP", "hugetlb"):
        ways = {name.rpartition(", ")[2] for name in measured if name.startswith(f"fill 64 MiB, {kind}, ")}
        if ways:
            files = {"pwrite"} if kind == "4K" else set()
            assert ways == {"touch", "populate", "prealloc-threads", "write"} | files
    for result in document["results"]:
        what, size, way = result["name"].split(", ") if result["name"].startswith("copy") else ("fill", "", "")
        if what == "fill":
            assert result["unit"] == "ms"
            assert result["bar"] == (1.03 if result["name"].startswith("fill 64 MiB, ") else None)
        else:
            assert result["unit"] == "GiB/s"
            assert result["bar"] == (0.95 if size == "64 MiB" and way != "read" else None)
    for direction in ("in", "out"):
        assert {f"copy {direction}, 64 MiB, view", f"copy {direction}, 64 MiB, numpy"} <= measured
    assert measured & {"copy in, 64 MiB, m.write", "copy in, 64 MiB, write"}

    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:24])) > 300


@pytest.mark.parametrize(
    ("file", "reason"),
    [("ram.txt", "must end in one of"), ("ram", "must end in one of"), ("no-such-dir/ram.png", "no such directory")],
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_the_measurement(tmp_path: Path, file: str, reason: str) -> None:
    with pytest.raises(BenchmarkError, match=reason):
        plot.check(str(tmp_path / file))
    plot.check(str(tmp_path / "ram.svg"))


def test_only_ram_is_plotted() -> None:
    done = _run("lifecycle", "--plot", "out.png")
    assert done.returncode == 2
    assert "--plot: only of ram" in done.stderr


@pytest.mark.parametrize(("rate", "holds"), [(0.96, True), (0.95, True), (0.94, False), (2.0, True)])
def test_a_rate_is_judged_by_the_least_that_holds(rate: float, holds: bool) -> None:
    assert harness.rate_against_floor("copy", rate, "GiB/s", 1.0, 0.95).holds is holds


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_copy_that_leaves_a_page_out_is_not_measured(direction: str) -> None:
    need("gcc")
    lib = ram._floor()
    data = memoryview(bytearray(4 * 4096))
    with RamBlock("bench.ram", len(data)) as block:

        def copy(size: int) -> None:
            if direction == "in":
                block.write(0, data[:size])
            else:
                data[:size] = block.view(0, size)

        ram._prove(lib, block, data, ram.Way("all", direction, lambda _: copy(len(data))), 1)
        with pytest.raises(BenchmarkError, match="1 of 4 pages did not arrive"):
            ram._prove(lib, block, data, ram.Way("most", direction, lambda _: copy(len(data) - 4096)), 2)


@pytest.mark.parametrize("method", ram.METHODS, ids=lambda method: method.name)
def test_a_fill_leaves_no_page_out(method: ram.Method) -> None:
    size = 4 << 20
    options = {} if method.work else {"prealloc": True, "prealloc_threads": 2}
    with ram._memfd(size, **options) as block:
        if method.work:
            assert os.fstat(block.fd).st_blocks == 0
            method.work(block, memoryview(bytes(1 << 20)))
        assert os.fstat(block.fd).st_blocks * 512 == size
