"""Arguments of any kind to every public function and method of hvmodel.kvm.

Whatever they are given, they do their work or raise one of this package's errors; and they
leave nothing open.  The documented unsafe doors are given no addresses: `ioctl` is tested in test_handle.py.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel import kvm as binding
from hvmodel._ffi import ffi, lib
from hvmodel.errors import HvError
from hvmodel.host import Mapping
from hvmodel.kvm import (
    Batch,
    Capture,
    CpuidEntry,
    Device,
    Feed,
    IrqRoute,
    Kvm,
    MsiRoute,
    MsrFilterRange,
    StructItem,
    Vcpu,
    Vm,
)
from hvmodel.kvm.handle import Handle
from tests.cases import cases
from tests.host.held import nothing_leaks
from tests.kvm.guest import Guest
from tests.need import need

NUMBERS = [0, 1, 2, 3, 13, 64, -1, 4095, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
NUMBERS += [1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1, 1 << 64, 1 << 100, -(1 << 31), -(1 << 70)]
OTHERS: list[Any] = [None, True, False, 0.0, 1.5, -1.0, math.nan, math.inf, 1e300, "", "text", "stop", "/dev/null"]
OTHERS += ["\ud800", b"", b"x", b"\0" * 48, bytearray(16), memoryview(b"12345678")[::2], (), [], [0], [None], ["x"], {}]
OTHERS += [{1: 2}, {16: 1 << 64}, {"x": None}, {1, 2}, object(), int, len, range(3), lambda *_: None, ffi.NULL]
OTHERS += [ffi.typeof("int"), ffi.new("int *"), ffi.new("struct kvm_regs *"), ffi.new("struct kvm_regs *")[0]]
OTHERS += [IrqRoute(0, 0, 0), [IrqRoute(0, 0, 0)], [MsiRoute(None, "x", -1)], [MsrFilterRange(0, b"\xff")]]
OTHERS += [
    [MsrFilterRange(None, None)],
    [CpuidEntry(0)],
    [CpuidEntry("x", None)],
    MsrFilterRange(1, b""),
    Capture(),
    Feed(),
]

# Half of the arguments are numbers, which is what most parameters take.
ANYTHING = st.one_of(
    st.sampled_from(NUMBERS), st.integers(0, 300), st.sampled_from(OTHERS), st.integers(-(1 << 70), 1 << 70)
)
GIVES_A_FD = {"create_guest_memfd", "stats_fd"}
ENDS_ITS_OWNER = {"close"}
FUNCTIONS = {"fields", "iter_records", "vendor_module"}
KINDS = {"Kvm": Kvm, "Vm": Vm, "Vcpu": Vcpu, "Device": Device}


def public(kind: type) -> list[str]:
    """The methods of a class of handles, but for the raw door and what only Python calls."""
    return [
        name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name)) and name != "ioctl"
    ]


METHODS = [(kind, name) for kind, owner in KINDS.items() for name in public(owner)]
SETTABLE = [
    (kind, name)
    for kind, owner in KINDS.items()
    for name in dir(owner)
    if isinstance(inspect.getattr_static(owner, name), property | StructItem)
]


def arity(call: Callable[..., object]) -> tuple[int, list[str]]:
    """How many positional arguments a callable takes, and which keywords."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except ValueError:
        return 2, ["timeout"]  # Vcpu.run and run_until are C's
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    positional += 5 * any(p.kind is p.VAR_POSITIONAL for p in parameters)
    # What is called with an answer of ours raises what it likes.
    return positional, [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "done"]


def attempt(call: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], gives_a_fd: bool = False) -> None:
    try:
        result = call(*args, **named)
        if inspect.isgenerator(result):
            list(result)
    except HvError:
        return
    except TypeError as error:
        if re.search("missing|takes|unexpected keyword", str(error)):
            return  # Python's own, of a call that does not fit the signature
        raise
    if isinstance(result, Handle):
        result.close()
    elif gives_a_fd:
        os.close(result)


def arguments(
    data: st.DataObject,
    call: Callable[..., object],
    *,
    of_a_method: bool = False,
    values: st.SearchStrategy[Any] = ANYTHING,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional, keywords = arity(call)
    positional -= of_a_method and not inspect.ismethod(call)
    args = data.draw(st.lists(values, max_size=positional), label="args")
    names = data.draw(st.lists(st.sampled_from(keywords), unique=True), label="names") if keywords else []
    return tuple(args), {name: data.draw(values, label=name) for name in names}


def owner_of(kind: str, guest: Guest, stack: ExitStack) -> Handle:
    if kind == "Device":
        try:
            return stack.enter_context(guest.vm.create_device(lib.KVM_DEV_TYPE_VFIO))
        except HvError:
            pytest.skip("needs an in-kernel device: this kernel has no VFIO")
    return {"Kvm": guest.kvm, "Vm": guest.vm, "Vcpu": guest.vcpu}[kind]


@contextmanager
def an(kind: str) -> Iterator[Handle]:
    """A handle of some kind; its vCPU would run a HLT in an endless loop."""
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        yield owner_of(kind, stack.enter_context(Guest(kvm, b"\xf4\xeb\xfd", size=1 << 16)), stack)


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=[f"{kind}.{name}" for kind, name in METHODS])
def test_methods(kind: str, name: str) -> None:
    need("kvm")

    @settings(max_examples=cases(25, 300), deadline=None, database=None)
    @given(data=st.data())
    def any_arguments(data: st.DataObject) -> None:
        args, named = arguments(data, getattr(KINDS[kind], name), of_a_method=True)
        if name in ENDS_ITS_OWNER:
            with an(kind) as another:
                attempt(getattr(another, name), args, named)
        else:
            attempt(getattr(owner, name), args, named, name in GIVES_A_FD)

    with nothing_leaks(), an(kind) as owner:
        any_arguments()


@pytest.mark.parametrize(("kind", "name"), SETTABLE, ids=[f"{kind}.{name}" for kind, name in SETTABLE])
def test_attributes(kind: str, name: str) -> None:
    need("kvm")
    with nothing_leaks(), an(kind) as owner:
        for value in [*NUMBERS, *OTHERS]:
            with suppress(HvError, TypeError, ValueError, AttributeError):  # the last: read-only
                setattr(owner, name, value)


@pytest.mark.parametrize("name", ["Kvm", "Kvm.from_fd", *sorted(FUNCTIONS)])
def test_functions(name: str) -> None:
    need("kvm")
    call: Any = binding
    for part in name.split("."):
        call = getattr(call, part)

    @settings(max_examples=cases(60, 600), deadline=None, database=None)
    @given(data=st.data())
    def any_arguments(data: st.DataObject) -> None:
        attempt(call, *arguments(data, call))

    with nothing_leaks():
        any_arguments()


@pytest.mark.parametrize("name", ["Capture", "Feed", "Batch"])
def test_batches_and_their_rings(name: str) -> None:
    need("kvm")
    kind = {"Capture": Capture, "Feed": Feed, "Batch": Batch}[name]
    # A capacity of some gigabytes would be had.
    few = ANYTHING.filter(lambda value: not isinstance(value, int) or not 1 << 16 < value < 1 << 40)
    methods = [method for method in dir(kind) if not method.startswith("_") and callable(getattr(kind, method))]

    @settings(max_examples=cases(60, 600), deadline=None, database=None)
    @given(data=st.data())
    def any_arguments(data: st.DataObject) -> None:
        attempt(kind, *arguments(data, kind, values=few))
        thing = kind()
        for method in methods:
            attempt(getattr(thing, method), *arguments(data, getattr(thing, method), values=few))

    any_arguments()


def test_memory_of_every_kind() -> None:
    # set_user_memory_region with a real mapping, so that what is right beside it is tried too.
    need("kvm")

    @settings(max_examples=cases(60, 600), deadline=None, database=None)
    @given(slot=ANYTHING, gpa=ANYTHING, named=st.dictionaries(st.sampled_from(["offset", "size", "flags"]), ANYTHING))
    def any_arguments(slot: Any, gpa: Any, named: dict[str, Any]) -> None:
        with Mapping(None, 16 * 4096) as memory:
            with Kvm() as kvm, kvm.create_vm() as vm:
                attempt(vm.set_user_memory_region, (slot, gpa, memory), named)
            memory.close()

    with nothing_leaks():
        any_arguments()


def test_everything_public_is_tried() -> None:
    tried = {*KINDS, *FUNCTIONS, "Batch", "Capture", "Feed"}
    values = {"CpuidEntry", "ExitRecord", "IrqRoute", "MemSlot", "MsiRoute", "MsrFilterRange", "SlotMemory"}
    values |= {"Translation", "Ioctl"}
    rest = {"IOCTLS", "KVM_API_VERSION", "RECORD_DTYPE", "Cap", "Handle", "StructItem", "ffi"}
    elsewhere = {"GuestMemFd"}  # by tests/random_calls.py
    assert set(binding.__all__) - set(binding.exits.__all__) == tried | values | rest | elsewhere
