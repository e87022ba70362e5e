"""What every test runs under: requirements that exist, and doctests only where their machine is."""

from __future__ import annotations

import gc
import os
import signal

import pytest

from tests.need import NEEDS, _required, lacking

_WITHOUT_KVM = ("errors", "finalizer", "units", "value", "arch", "mmu", "host", "ram", "witness")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="the full numbers of cases (as HVMODEL_SLOW=1)")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what is in its background with SIGINT ignored, and so would our children be.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--slow"):
        os.environ["HVMODEL_SLOW"] = "1"
    unknown = _required() - NEEDS.keys()
    if unknown:
        raise pytest.UsageError(f"HVMODEL_REQUIRE: {sorted(unknown)} unknown; known: {sorted(NEEDS)}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    have = [what for what in NEEDS if lacking(what) is None]
    lack = [f"{what} ({lacking(what)})" for what in NEEDS if lacking(what) is not None]
    return [f"hvmodel: this machine has {', '.join(have)}; lacks {', '.join(lack) or 'nothing'}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Not by a fixture: one of this directory's would not reach the doctests in hvmodel/.
    uffd = None if "userfaultfd" in _required() else lacking("userfaultfd")
    for item in items:
        if uffd is not None and isinstance(item, pytest.DoctestItem) and "hvmodel.host.userfaultfd" in item.name:
            item.add_marker(pytest.mark.skip(reason=f"needs userfaultfd: {uffd}"))
    why = lacking("kvm")
    if why is None or "kvm" in _required():
        return
    for item in items:
        if isinstance(item, pytest.DoctestItem) and not any(f"hvmodel.{name}" in item.name for name in _WITHOUT_KVM):
            item.add_marker(pytest.mark.skip(reason=f"needs kvm: {why}"))


def pytest_collection_finish() -> None:
    # What thousands of tests are before they run stays for good: many call gc.collect(), which need not look at it each
    # time.
    gc.collect()
    gc.freeze()
