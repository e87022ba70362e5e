from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys

import pytest

from hvmodel.errors import ArgumentError, HostError, HvError, KvmError, UnansweredError, UnsupportedError
from hvmodel.witness import CheckResult, Lacking, Tally, registry
from hvmodel.witness.registry import check, registered, run
from hvmodel.witness.ringbuffer import FormatError


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_checks", {})
    monkeypatch.setattr(registry, "MODULES", ())


def test_result_is_a_frozen_value() -> None:
    result = CheckResult("m", "w", 3, 1, ("x",), ("y",))
    with pytest.raises(AttributeError):
        result.compared = 4  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(result)) == result
    assert json.loads(json.dumps(result.to_json())) == {
        "model": "m", "witness": "w", "compared": 3, "mismatches": 1, "examples": ["x"], "lacking": ["y"],
        "ok": False, "skipped": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("compared", "mismatches", "lacking", "ok", "skipped"),
    [
        (5, 0, (), True, False),
        (5, 0, ("one thing",), True, False),
        (5, 1, (), False, False),
        (0, 0, (), False, False),  # compared nothing and has no excuse
        (0, 0, ("root",), False, True),
    ],
)
def test_ok_and_skipped(compared: int, mismatches: int, lacking: tuple[str, ...], ok: bool, skipped: bool) -> None:
    result = CheckResult("m", "w", compared, mismatches, (), lacking)
    assert (result.ok, result.skipped) == (ok, skipped)


def test_tally_keeps_the_first_examples_and_counts_all() -> None:
    tally = Tally("m", "w")
    for i in range(100):
        tally.compare(f"case {i}", i, i // 2 * 2)  # every odd one differs: 50
    result = tally.result(["this", "this"])
    assert (result.compared, result.mismatches, len(result.examples)) == (100, 50, 8)
    assert result.examples[0] == "case 1: m says 1, w says 0"
    assert result.lacking == ("this",)


def test_run_is_ordered_by_model_and_witness_and_passes_cases() -> None:
    seen = []

    @check("z", "b", cases=2, slow=20)
    def check_last(tally: Tally, cases: int) -> None:
        seen.append(("last", cases))

    @check("z", "a")
    def check_middle(tally: Tally, cases: int) -> None:
        seen.append(("middle", cases))

    @check("a", "c", cases=3, slow=30)
    def check_first(tally: Tally, cases: int) -> None:
        seen.append(("first", cases))
        tally.compare("it", 1, 1)

    assert [c.name for c in registered()] == ["first", "middle", "last"]
    results = run()
    assert [(r.model, r.witness, r.ok) for r in results] == [("a", "c", True), ("z", "a", False), ("z", "b", False)]
    run(slow=True)
    run(["last", "first"], cases=7)
    fast, thorough = [("first", 3), ("middle", 1), ("last", 2)], [("first", 30), ("middle", 1), ("last", 20)]
    assert seen == [*fast, *thorough, ("first", 7), ("last", 7)]


LACKS = [
    Lacking("no such CPU"),
    UnsupportedError(errno.ENOTTY, "KVM_GET_STATS_FD", "KVM_CAP_BINARY_STATS_FD"),
    HostError(errno.EPERM, "fsopen", "fs", "tracefs", "root"),
    HostError(errno.ENODEV, "fsopen", "fs", "tracefs"),
    HostError(errno.EACCES, "open", "path", "/dev/kvm"),
    HostError(errno.ENOENT, "open", "path", "/dev/kvm"),
    HostError(errno.ENODEV, "open", "path", "/dev/kvm"),
    HostError(errno.EACCES, "mkdir", "path", "instances/hvmodel-1-2-3"),
    HostError(errno.EACCES, "open", "path", "events/header_page"),
    HostError(errno.ENOTSUP, "set_event_pid", "pid namespace", "nested"),
]
BREAKS = [
    HvError("of another kind"),
    KvmError(errno.EINVAL, "KVM_SET_REGS", "rflags", 0),
    KvmError(errno.EPERM, "KVM_SET_REGS"),  # opens nothing
    HostError(errno.EPERM, "mprotect"),
    HostError(errno.EMFILE, "open", "path", "/dev/kvm"),
    HostError(errno.ENOENT, "open", "path", "events/kvm/no_such_event/format"),  # below a mount that is there
    UnansweredError("run", "IoIn"),
    FormatError("header_page", "no commit"),
    OSError(errno.EBADF, "Bad file descriptor"),
]


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}-{getattr(error, 'errno', None)}-{getattr(error, 'call', '')}"


@pytest.mark.parametrize("error", LACKS, ids=_kind)
def test_what_a_host_lacks_is_lacking_before_the_first_comparison_only(error: Exception) -> None:
    @check("a", "w")
    def check_first(tally: Tally, cases: int) -> None:
        raise error

    @check("b", "w")
    def check_later(tally: Tally, cases: int) -> None:
        tally.compare("one", 1, 1)
        raise error

    text = f"{type(error).__name__}: {error}"
    assert run() == [
        CheckResult("a", "w", 0, 0, (), (text,)),
        CheckResult("b", "w", 1, 1, (f"broke off after 1 cases: {text}",), ()),
    ]
    assert [result.skipped for result in run()] == [True, False]
    assert not any(result.ok for result in run())


@pytest.mark.parametrize("error", BREAKS, ids=_kind)
@pytest.mark.parametrize("compared", [0, 5])
def test_any_other_error_is_a_mismatch(error: Exception, compared: int) -> None:
    @check("m", "w")
    def check_it(tally: Tally, cases: int) -> None:
        tally.count(compared)
        raise error

    (result,) = run()
    assert (result.ok, result.skipped) == (False, False)
    assert (result.compared, result.mismatches, result.lacking) == (compared, 1, ())
    assert result.examples == (f"broke off after {compared} cases: {type(error).__name__}: {error}",)


def test_why_it_broke_off_is_shown_after_many_mismatches_too() -> None:
    tally = Tally("m", "w")
    tally.count(50, [f"number {i}" for i in range(50)])
    tally.break_off("no more")
    result = tally.result()
    assert (result.mismatches, len(result.examples)) == (51, 8)
    assert result.examples[-1] == "broke off after 50 cases: no more"


def test_a_bug_in_a_check_rises() -> None:
    @check("m", "w")
    def check_it(tally: Tally, cases: int) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run()


def test_duplicates_are_refused() -> None:
    @check("m", "w")
    def check_it(tally: Tally, cases: int) -> None: ...

    with pytest.raises(ArgumentError, match="taken"):

        @check("other", "w")
        def check_it(tally: Tally, cases: int) -> None: ...

    with pytest.raises(ArgumentError, match="taken"):

        @check("m", "w")
        def check_other(tally: Tally, cases: int) -> None: ...

    assert len(registered()) == 1


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="unknown"):
        run(["unknown"])
    with pytest.raises(ArgumentError, match="cases"):
        run(cases=0)
    with pytest.raises(ArgumentError, match="cases"):
        check("m", "w", cases=5, slow=4)


def test_import_is_lazy() -> None:
    code = (
        "import sys, hvmodel.witness as w\n"
        "heavy = {'ctypes', 'subprocess'}\n"
        "assert not (heavy | {'hvmodel.witness.tracefs'}) & set(sys.modules)\n"
        "w.Tracefs, w.Stats, w.run\n"
        "assert not heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exported_names_exist() -> None:
    import hvmodel.witness as w

    assert set(w.__all__) == set(w._HOMES)
    assert {name for name in w.__all__ if not hasattr(w, name)} == set()
    with pytest.raises(AttributeError, match="nothing"):
        w.nothing  # noqa: B018
