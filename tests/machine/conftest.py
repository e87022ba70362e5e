"""Fixtures of the machine tests: machines with a few bytes of code, all closed when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import hvmodel as hv
from tests.need import need


@pytest.fixture
def boot() -> Iterator[Callable[..., hv.Machine]]:
    """`boot(code, entry=0x7C00, ram="1M", …)`: a machine that starts with these bytes; code as bytes or hexadecimal."""
    need("kvm")
    with ExitStack() as stack:

        def start(
            code: bytes | str = b"\xf4", *, entry: int = 0x7C00, ram: int | str = "1M", **named: Any
        ) -> hv.Machine:
            machine = stack.enter_context(hv.Machine(ram=ram, **named))
            machine.load(entry, bytes.fromhex(code) if isinstance(code, str) else code)
            machine.vcpu.real_mode(entry=entry)
            return machine

        yield start
