"""Every benchmark runs and prints the JSON object that DESIGN.md describes.  What the figures are is not asked here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["exits", "import", "kick", "lifecycle"])
def test_prints_its_results_as_json(name: str) -> None:
    need("kvm", "gcc")
    done = _run(name, "--json", "--short")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
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
            assert result["holds"] is (judged <= result["bar"])
    assert len({result["name"] for result in document["results"]}) == len(document["results"])


def test_all_of_them() -> None:
    need("kvm", "gcc")
    done = _run("all", "--json", "--short")
    assert done.returncode == 0, done.stderr
    documents = json.loads(done.stdout)
    assert [document["benchmark"] for document in documents] == ["exits", "import", "kick", "lifecycle"]
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
