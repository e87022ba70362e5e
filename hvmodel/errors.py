"""What can go wrong.

`HvError` roots every error of this package.  A refused system call is also an `OSError` with its errno;
bad arguments are also `ValueError` or `TypeError`; a closed object is also a `ValueError`.  Each error keeps
what it knows as attributes (the call, the field at fault, the value, what would be accepted), prints it, and pickles:
a value that is no plain one (None, a number, text, bytes, a tuple of them) is kept as the text of its repr.

EINTR is no error in this package: an interrupted KVM_RUN is an exit (`hvmodel.Interrupted`).
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BuildError",
    "BusyError",
    "ChangedStateError",
    "ClosedError",
    "ForkedError",
    "GuestAccessError",
    "HostError",
    "HvError",
    "KvmError",
    "PartialError",
    "RefusedStateError",
    "UnansweredError",
    "UnqualifiedError",
    "UnsupportedError",
    "VmDeadError",
]


_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class _Text(str):
    # What stands for a value that an error cannot keep; shown as it is.
    __slots__ = ()
    __repr__ = str.__str__


def _kept(value: object) -> object:
    # Errors pickle, and what they say does not change: of all but plain values they keep what `_show` makes of them.
    if type(value) in _PLAIN or type(value) is _Text:
        return value
    if isinstance(value, int):
        return int(value)  # an enum's member, which need not be importable where the error is read
    if type(value) is tuple:
        return tuple([_kept(item) for item in value])
    return _Text(_show(value))


def _show(value: object) -> str:
    # Addresses, sizes and flags read best in hexadecimal, small counts and file descriptors in decimal.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9:
        return f"{value:#x}" if type(value) is int else f"{value!r} ({int(value):#x})"
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # the caller's own class may do anything
        text = object.__repr__(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _sentence(call: str, field: str | None, value: object, accepted: str | None, detail: str | None) -> str:
    text = call
    if field is not None:
        text += f": {field}={_show(value)}"
    if detail:
        text += f": {detail}"
    if accepted:
        text += f"; accepted: {accepted}"
    return text


class HvError(Exception):
    """Root of every error raised by hvmodel."""


class ArgumentError(HvError, ValueError):
    """An argument that can never be right: `call`, `field`, `value`, `accepted`.

    >>> raise ArgumentError("Machine", "ram", 5, "a multiple of 4096 bytes")
    Traceback (most recent call last):
    hvmodel.errors.ArgumentError: Machine: ram=5; accepted: a multiple of 4096 bytes
    """

    def __init__(
        self, call: str, field: str, value: object, accepted: str | None = None, detail: str | None = None
    ) -> None:
        value = _kept(value)
        self.call, self.field, self.value, self.accepted, self.detail = call, field, value, accepted, detail
        super().__init__(_sentence(call, field, value, accepted, detail))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.field, self.value, self.accepted, self.detail)


class ArgumentTypeError(HvError, TypeError):
    """An argument of the wrong type: `call`, `field`, `value`, `accepted`, `got` (its type, and it)."""

    def __init__(self, call: str, field: str, value: object, accepted: str, got: str | None = None) -> None:
        self.call, self.field, self.accepted = call, field, accepted
        self.value = _kept(value)
        self.got = got if got is not None else f"{type(value).__name__} {_show(value)}"
        super().__init__(f"{call}: {field}: expected {accepted}, got {self.got}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.field, self.value, self.accepted, self.got)


class ClosedError(HvError, ValueError):
    """The object was closed: `call`, `owner` (its repr)."""

    def __init__(self, call: str, owner: str) -> None:
        self.call, self.owner = call, owner
        super().__init__(f"{call}: {owner} is closed")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.owner)


class BusyError(HvError):
    """Somebody else uses it now: a second runner of a vCPU, a live view of memory, a mapping in a memslot.

    Attributes: `call`, `what` (the resource), `why` (who holds it).
    """

    def __init__(self, call: str, what: str, why: str) -> None:
        self.call, self.what, self.why = call, what, why
        super().__init__(f"{call}: {what} is busy: {why}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.what, self.why)


class UnansweredError(HvError):
    """A read exit was not answered before the vCPU was to run again: `call`, `exit` (its repr)."""

    def __init__(self, call: str, exit: str) -> None:
        self.call, self.exit = call, exit
        super().__init__(
            f"{call}: the guest waits for the data of {exit}: call answer(data) on the vCPU or machine "
            "before running it again"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.exit)


class BuildError(HvError, ImportError):
    """The compiled extension is missing, of another version than the sources, or cannot run on this platform."""


class HostError(HvError, OSError):
    """A refused system call of the host (not KVM).

    Attributes: `call` (its name, as in its man page), `errno`, `strerror`, `field` (the argument at fault, or None
    where it could not be found out), `value`, `accepted`, `detail`.
    """

    call: str
    field: str | None
    value: object
    accepted: str | None
    detail: str | None

    def __init__(
        self,
        errno: int,
        call: str,
        field: str | None = None,
        value: object = None,
        accepted: str | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(errno, os.strerror(errno))
        self.call, self.field, self.value, self.accepted, self.detail = call, field, _kept(value), accepted, detail

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errno, self.call, self.field, self.value, self.accepted, self.detail)

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{_sentence(self.call, self.field, self.value, self.accepted, self.detail)} [{name}: {self.strerror}]"


class KvmError(HostError):
    """A refused KVM ioctl: the attributes of `HostError`; `call` is the ioctl's name, KVM_…."""

    @property
    def ioctl(self) -> str:
        """Name of the ioctl, such as "KVM_CREATE_VCPU"."""
        return self.call


class UnsupportedError(KvmError):
    """This kernel or vendor module does not have what was asked for; `field` names the capability, KVM_CAP_…."""

    @property
    def capability(self) -> str | None:
        """Name of the missing capability, or None where the kernel just does not know the ioctl (ENOTTY)."""
        return self.field


class UnqualifiedError(UnsupportedError):
    """This kind of stop does not work in this mode on this host: the attributes of `UnsupportedError`, and `mode`,
    `kind`, `saw` (what happened when it was tried) and `others` (the kinds that work in this mode).

    `mode` and `kind` are of hvmodel.machine.qualify.MODES and KINDS.
    """

    def __init__(self, call: str, mode: str, kind: str, saw: str, others: tuple[str, ...] = ()) -> None:
        self.mode, self.kind, self.saw, self.others = mode, kind, saw, others
        accepted = f"in this mode: {', '.join(others)}" if others else "nothing in this mode"
        detail = f"{kind!r} does not work in mode {mode!r} on this host (tried, it gave: {saw})"
        super().__init__(_errno.EOPNOTSUPP, call, None, None, accepted, detail)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.mode, self.kind, self.saw, self.others)


class RefusedStateError(KvmError):
    """KVM refused a part of a vCPU's or VM's state: the attributes of `KvmError`, and `part` and `rule`.

    `part`: which ("sregs", "msrs", …).  `field`, `value`: what it is refused for ("cr4", "cs.base", "msrs[0x1b]").
    `rule`: the name of the rule that this breaks, or None where the field was found by trying.  The state is as before.
    """

    def __init__(
        self,
        errno: int,
        call: str,
        part: str,
        field: str | None = None,
        value: object = None,
        accepted: str | None = None,
        detail: str | None = None,
        rule: str | None = None,
    ) -> None:
        super().__init__(errno, call, field, value, accepted, detail)
        self.part, self.rule = part, rule

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (
            self.errno,
            self.call,
            self.part,
            self.field,
            self.value,
            self.accepted,
            self.detail,
            self.rule,
        )


class ChangedStateError(HvError):
    """KVM took a state and keeps another one: `call`, `part`, `field`, `value` (asked for), `became`, `rule`, `detail`.

    The state is as before where it could be put back; the message says where it could not.
    """

    def __init__(
        self,
        call: str,
        part: str,
        field: str,
        value: object,
        became: object,
        detail: str | None = None,
        rule: str | None = None,
    ) -> None:
        self.call, self.part, self.field, self.rule, self.detail = call, part, field, rule, detail
        self.value, self.became = _kept(value), _kept(became)
        text = f"{call}: {field}={_show(self.value)}: KVM took it and keeps {_show(self.became)}"
        super().__init__(f"{text}: {detail}" if detail else text)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.part, self.field, self.value, self.became, self.detail, self.rule)


class VmDeadError(KvmError):
    """KVM has marked the VM dead (KVM_BUG_ON): every ioctl but close answers EIO.  Make a new VM."""


class ForkedError(KvmError):
    """The handle was made by another process: after os.fork a child must make its own VM (EIO from the kernel)."""


class PartialError(KvmError):
    """The kernel did the first `done` of `requested` elements and refused `first_failed` (MSRs, attributes)."""

    def __init__(self, errno: int, call: str, done: int, requested: int, first_failed: object, what: str) -> None:
        super().__init__(errno, call, what, first_failed, None, f"only the first {done} of {requested} were processed")
        self.done, self.requested, self.first_failed, self.what = done, requested, self.value, what

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errno, self.call, self.done, self.requested, self.first_failed, self.what)


class GuestAccessError(HvError):
    """The guest touched a port or address that nobody claims, on a `strict` machine.

    Attributes: `space` ("port" or "address"), `address` (port number or gpa), `size` and `count` (bytes, repeats),
    `is_write`, `data` (bytes; empty for a read), `cs`, `rip`, `insn` (up to 15 bytes at CS:RIP, b"" where they could
    not be read), `at_insn` and `before`.

    `at_insn`: whether CS:RIP is at the instruction that did it.  A write to an address leaves RIP behind its
    instruction (but for REP, which stays there), and the length of that is not known: `at_insn` is False then, and
    `before` has the up to 15 bytes before CS:RIP, which end with the instruction unless it jumped, as CALL does.
    """

    def __init__(
        self,
        space: str,
        address: int,
        size: int,
        count: int,
        is_write: bool,
        data: bytes,
        cs: int,
        rip: int,
        insn: bytes,
        at_insn: bool = True,
        before: bytes = b"",
    ) -> None:
        self.space, self.address, self.size, self.count, self.is_write = space, address, size, count, is_write
        self.data, self.cs, self.rip, self.insn, self.at_insn, self.before = data, cs, rip, insn, at_insn, before
        what = f"wrote {data.hex()} to" if is_write else "read from"
        code = (insn if at_insn else before).hex(" ") or "unreadable"
        where = "at" if at_insn else "behind the instruction, at"
        which = "instruction bytes" if at_insn else "bytes before it"
        super().__init__(
            f"the guest {what} {space} {address:#x} ({count} x {size} bytes), which nobody claims, "
            f"{where} CS:IP {cs:04x}:{rip:04x} ({which}: {code}); handle the exit in exits(), serve the "
            f"{space} with a rule, or make the machine with unclaimed='open_bus'"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (
            self.space,
            self.address,
            self.size,
            self.count,
            self.is_write,
            self.data,
            self.cs,
            self.rip,
            self.insn,
            self.at_insn,
            self.before,
        )
