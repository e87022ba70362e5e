"""`hvmodel verify`: the registry's results, and a status that tells them apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hvmodel.cli import main
from hvmodel.witness import Lacking, Tally, check, registered, registry
from tests.cases import cases
from tests.cli.command import ENVIRONMENT, hvmodel, is_one_sentence, object_of
from tests.need import need

Register = Callable[[Callable[[Tally], None]], None]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Register:
    # A registry with one check, whose tally the test fills.
    monkeypatch.setattr(registry, "MODULES", ())
    monkeypatch.setattr(registry, "_checks", {})

    def register(fill: Callable[[Tally], None]) -> None:
        def check_only(tally: Tally, _cases: int) -> None:
            fill(tally)

        check("a model", "its witness")(check_only)

    return register


# What a fast run leaves out of checks that take seconds: cases, of which each check's own tests have more.  `legal` is
# compared whole by tests/witness/test_check_legal.py; here without the pairs of bits of CR4.
FEWER = """
import sys
from hvmodel.cli import main
from hvmodel.witness import check_legal, registry
run, sets = registry.Check.run, check_legal.cr4_sets
registry.Check.run = lambda self, cases: run(self, min(cases, 40) if self.cases < 5000 else cases)
check_legal.cr4_sets = lambda **named: [one for one in sets(**named) if one.bit_count() < 2]
sys.exit(main(["verify", "--json"]))
"""


def test_all_that_can_be_compared_here_agrees() -> None:
    need("kvm", "btf", "tracefs")
    words = cases(["-c", FEWER], ["-m", "hvmodel", "verify", "--json"])
    done = subprocess.run([sys.executable, *words], capture_output=True, env=ENVIRONMENT, check=False, timeout=900)
    rows = object_of(done)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [row["name"] for row in rows] == [check.name for check in registered()]
    # A check may be skipped for what this host truly lacks, and for nothing else.
    lacked = {} if Path("/sys/module/kvm_intel").exists() else {"ept": "no VMX"}
    for row in rows:
        assert row["mismatches"] == 0, row
        if row["name"] in lacked:
            assert row["skipped"], row
            assert any(lacked[row["name"]] in text for text in row["lacking"]), row
        else:
            assert row["ok"], row
            assert row["compared"] > 0, row


def test_names() -> None:
    need("btf")
    rows = object_of(hvmodel("verify", "abi", "--json"))
    assert [row["name"] for row in rows] == ["abi"]
    lines = hvmodel("verify", "abi").stdout.decode().splitlines()
    assert lines[0].split() == ["NAME", "MODEL", "WITNESS", "COMPARED", "MISMATCHES", "RESULT"]
    assert lines[1].split()[0] == "abi"
    assert lines[1].split()[-1] == "ok"


def test_an_unknown_name_is_a_sentence() -> None:
    done = hvmodel("verify", "nonsense")
    assert (done.returncode, done.stdout) == (2, b"")
    assert is_one_sentence(done.stderr)
    assert b"nonsense" in done.stderr
    assert b"abi" in done.stderr


def test_a_mismatch_is_1(only: Register, capfd: pytest.CaptureFixture[str]) -> None:
    only(lambda tally: tally.count(3, ["one differs"]))
    assert main(["verify"]) == 1
    text = capfd.readouterr().out
    assert "3         1           WRONG" in text
    assert "only: mismatch: one differs" in text


def test_comparing_nothing_for_no_reason_is_1(only: Register, capfd: pytest.CaptureFixture[str]) -> None:
    only(lambda tally: None)
    assert main(["verify"]) == 1


def test_nothing_to_compare_with_is_8(only: Register, capfd: pytest.CaptureFixture[str]) -> None:
    def lacks(tally: Tally) -> None:
        raise Lacking("no such thing here")

    only(lacks)
    assert main(["verify", "--json"]) == 8
    assert [row["skipped"] for row in json.loads(capfd.readouterr().out)] == [True]


def test_breaking_off_is_1(only: Register, capfd: pytest.CaptureFixture[str]) -> None:
    def breaks_off(tally: Tally) -> None:
        tally.count(3)
        raise Lacking("no more of it")

    only(breaks_off)
    assert main(["verify"]) == 1
    text = capfd.readouterr().out
    assert "3         1           WRONG" in text
    assert "only: mismatch: broke off after 3 cases: Lacking: no more of it" in text


def test_slow_takes_more_cases(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "MODULES", ())
    monkeypatch.setattr(registry, "_checks", {})

    def check_counted(tally: Tally, cases: int) -> None:
        tally.count(cases)

    check("a model", "its witness", cases=3, slow=5)(check_counted)
    for arguments, expected in ((["verify", "--json"], 3), (["verify", "--json", "--slow"], 5)):
        assert main(arguments) == 0
        assert json.loads(capfd.readouterr().out)[0]["compared"] == expected
