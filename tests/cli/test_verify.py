"""`hvmodel verify`: the registry's results, and a status that tells them apart."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from hvmodel.cli import main
from hvmodel.witness import Lacking, Tally, check, registered, registry
from tests.cli.command import hvmodel, is_one_sentence, object_of
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


def test_all_that_can_be_compared_here_agrees() -> None:
    need("kvm", "btf", "tracefs")
    done = hvmodel("verify", "--json")
    rows = object_of(done)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [row["name"] for row in rows] == [check.name for check in registered()]
    assert all(row["ok"] and row["compared"] > 0 and row["mismatches"] == 0 for row in rows)


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
    for arguments, cases in ((["verify", "--json"], 3), (["verify", "--json", "--slow"], 5)):
        assert main(arguments) == 0
        assert json.loads(capfd.readouterr().out)[0]["compared"] == cases
