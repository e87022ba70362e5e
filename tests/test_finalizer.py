"""Finalizer: called once, for who was forgotten; weakref.finalize is the oracle of when."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from hvmodel.finalizer import Finalizer

ROOT = Path(__file__).resolve().parents[1]


class Owner:
    """Something that can be forgotten."""


@pytest.fixture(params=[Finalizer, weakref.finalize], ids=["ours", "weakref"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_called_once_when_the_owner_is_gone(kind: Any) -> None:
    seen: list[int] = []
    owner = Owner()
    finalizer = kind(owner, seen.append, 1)
    assert seen == []
    del owner
    assert seen == [1]
    finalizer()
    assert seen == [1]
    assert not finalizer.detach()


def test_called_by_hand(kind: Any) -> None:
    seen: list[int] = []
    owner = Owner()
    finalizer = kind(owner, seen.append, 1)
    finalizer()
    del owner
    assert seen == [1]


def test_detached_is_never_called(kind: Any) -> None:
    seen: list[int] = []
    owner = Owner()
    finalizer = kind(owner, seen.append, 1)
    assert finalizer.detach()
    assert not finalizer.detach()
    finalizer()
    del owner
    assert seen == []


def test_an_owner_in_a_cycle_with_its_finalizer(kind: Any) -> None:
    # Of a weak reference that is garbage itself, the callback is not called: somebody else must have it.
    seen: list[int] = []
    owner: Any = Owner()
    owner.itself, owner.finalizer = owner, kind(owner, seen.append, 1)
    del owner
    gc.collect()
    assert seen == [1]


def test_a_detached_one_keeps_nothing_alive() -> None:
    class Argument:
        pass

    owner, argument = Owner(), Argument()
    known = weakref.ref(argument)
    finalizer = Finalizer(owner, print, argument)
    finalizer.detach()
    gc.disable()
    try:
        del finalizer, argument
        assert known() is None  # without the garbage collector
    finally:
        gc.enable()


EXIT = """
import sys
from {module} import {name} as kind
class Owner: pass
owners = [Owner() for _ in range(5)]
def more():
    owners.append(Owner())
    kind(owners[-1], print, "made at exit")
kind(owners[0], print, "first")
kind(owners[1], print, "not at exit").atexit = False
kind(owners[2], lambda: 1 / 0)
kind(owners[3], more)
kind(owners[4], print, "last")
"""


def at_exit(module: str, name: str) -> tuple[set[str], str, bool]:
    code = EXIT.format(module=module, name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stdout.splitlines()
    return set(lines), lines[0], done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_at_exit() -> None:
    # The last one first, the others whatever one of them raises, and not those that are not to be.
    ours = at_exit("hvmodel.finalizer", "Finalizer")
    assert ours == ({"first", "made at exit", "last"}, "last", True)
    assert ours == at_exit("weakref", "finalize")
