"""A KVM file descriptor: what `Kvm`, `Vm`, `Vcpu` and `Device` have in common.

Owns the fd, the raw door `ioctl(name, arg)`, and the way from a refusal to an error that says what was wrong.
"""

from __future__ import annotations

import errno
import os

from .. import _ffi
from .._ffi import ffi, lib
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    ForkedError,
    HvError,
    KvmError,
    UnsupportedError,
    VmDeadError,
)
from ..finalizer import Finalizer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Any, Generic, Self, TypeVar, overload

    T = TypeVar("T")
else:

    class Generic:
        def __class_getitem__(cls, item):
            return cls

    T = None

    def overload(function):
        return function


__all__ = ["Handle", "StructItem", "fields"]


def _uint(call: str, field: str, value: object, bits: int = 32) -> int:
    # An unsigned integer of so many bits, or the error that says so.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(call, field, value, "an int")
    if not 0 <= value < 1 << bits:
        raise ArgumentError(call, field, value, f"0 to 2**{bits}-1")
    return value


def _rows(call: str, field: str, values: Iterable[T], what: str) -> list[T]:
    # A list of an iterable, or the error that says what it should hold.
    try:
        return list(values)
    except TypeError:
        raise ArgumentTypeError(call, field, values, f"an iterable of {what}") from None


# Refusals that can mean "this kernel cannot do that" as well as "this argument is wrong".
_MAYBE_UNSUPPORTED = frozenset(
    {errno.ENOTTY, errno.EINVAL, errno.ENXIO, errno.EOPNOTSUPP, errno.EPERM, errno.ENODEV, errno.ENOSYS}
)
_CAP_USER_MEMORY = 3


def _abandon(fd: int, what: str, pid: int) -> None:
    # The finalizer: holds integers only, so that it keeps nothing alive.  The warning comes last, for it may be made an
    # exception.  A child of os.fork has copies of its parent's descriptors: it closes them, and has forgotten nothing.
    os.close(fd)
    if os.getpid() == pid:
        import warnings

        warnings.warn(f"unclosed {what}", ResourceWarning, stacklevel=2)


class Handle:
    """An open KVM file descriptor.

    `with` closes it; so does `close()`, which may be called again.  A handle that was forgotten warns
    (ResourceWarning) and is closed by its finalizer.  A child of os.fork cannot use VM and vCPU handles of its
    parent: the kernel answers EIO, which is raised as ForkedError.

    Thread safety: ioctls may be called from any thread; the kernel serialises those of one vCPU.
    """

    scope = "device"

    __slots__ = ("__weakref__", "_fd", "_finalizer", "_owner", "_pid")

    def __init__(self, fd: int, owner: Handle | None) -> None:
        self._fd = fd
        self._owner = owner  # a strong reference: what we were made from lives as long as we do
        self._pid = os.getpid()
        what = f"{type(self).__name__} fd={fd}"
        self._finalizer = Finalizer(self, _abandon, fd, what, self._pid)

    # ---- life ----

    @property
    def fd(self) -> int:
        """The file descriptor; ClosedError after close()."""
        return self._open_fd()

    def _open_fd(self) -> int:
        # For our own calls; what `fd` hands out to others may have consequences.
        if self._fd < 0:
            raise ClosedError(f"{type(self).__name__}.fd", repr(self))
        return self._fd

    def fileno(self) -> int:
        """The file descriptor, for select and its like."""
        return self.fd

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the file descriptor.  May be called again."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._finalizer.detach()
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"<{name} closed>" if self._fd < 0 else f"<{name} fd={self._fd}>"

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be pickled: it is a file descriptor of this process")

    # ---- ioctls ----

    def ioctl(self, name: str, arg: Any = None) -> int:
        """Issue any KVM ioctl of this kind of fd by name; the raw door of the binding.

        `arg` by the table's `argument` column: nothing for `-`; an int for `ulong`; for `struct:kvm_x` a pointer made
        by `ffi.new("struct kvm_x *")` (another struct's pointer is a TypeError); for `ptr:uint64_t` such a pointer,
        or an int that is passed by reference; for `ptr:void` a pointer or an address, unchecked.

        Returns what the kernel returned (>= 0): 0, a new file descriptor that is now yours, a count, or a value.

        Raises ArgumentError for a name that is not in the table or not for this kind of fd, ArgumentTypeError for a
        wrong argument, and KvmError (UnsupportedError, ForkedError, VmDeadError) for a refusal.

        >>> from hvmodel.kvm import Kvm
        >>> with Kvm() as kvm:
        ...     kvm.ioctl("KVM_GET_API_VERSION")
        12
        """
        if not isinstance(name, str):
            raise ArgumentTypeError("ioctl", "name", name, "the name of an ioctl")
        row = _ffi.IOCTLS.get(name)  # read when first asked for
        if row is None:
            raise ArgumentError("ioctl", "name", name, "a name from hvmodel.kvm.IOCTLS, such as 'KVM_GET_API_VERSION'")
        if self.scope not in row.scope:
            raise ArgumentError("ioctl", "name", name, f"an ioctl of a {self.scope} fd", f"it is one of {row.scope}")
        call: Callable[..., int] = getattr(lib, name.lower())
        kind, _, detail = row.argument.partition(":")
        if kind == "-":
            if arg is not None and (isinstance(arg, bool) or not isinstance(arg, int) or arg != 0):
                raise ArgumentTypeError(name, "arg", arg, "no argument")
            return self._check(name, call(self._open_fd()))
        if kind == "ulong":
            value = 0 if arg is None else arg
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(name, "arg", arg, "an int")
            if not 0 <= value < 1 << 64:
                raise ArgumentError(name, "arg", arg, "0 to 2**64-1")
            return self._check(name, call(self._open_fd(), value), None, value)
        ctype = f"struct {detail} *" if kind == "struct" else f"{detail} *"
        pointer: Any = arg
        if isinstance(arg, int) and not isinstance(arg, bool) and kind == "ptr":
            if not 0 <= arg < 1 << 64:
                raise ArgumentError(name, "arg", arg, "0 to 2**64-1")
            pointer = ffi.cast(ctype, arg) if detail == "void" else ffi.new(ctype, arg)
        if not isinstance(pointer, ffi.CData):
            raise ArgumentTypeError(name, "arg", arg, f"a pointer made by ffi.new({ctype!r})")
        if detail != "void" and not (len(pointer) if ffi.typeof(pointer).kind == "array" else pointer):
            raise ArgumentTypeError(name, "arg", arg, f"a {ctype!r} that points at something")
        try:
            rc = call(self._open_fd(), pointer)
        except TypeError:
            raise ArgumentTypeError(name, "arg", arg, f"a pointer made by ffi.new({ctype!r})") from None
        return self._check(name, rc)

    def _check(
        self,
        name: str,
        rc: int,
        field: str | None = None,
        value: object = None,
        accepted: str | None = None,
        detail: str | None = None,
    ) -> int:
        # The return value of a wrapper, or the error it stands for.
        if rc < 0:
            raise self._refusal(name, -rc, field, value, accepted, detail)
        return rc

    def _refusal(
        self,
        name: str,
        err: int,
        field: str | None = None,
        value: object = None,
        accepted: str | None = None,
        detail: str | None = None,
    ) -> HvError:
        # What a refusal with errno `err` means.
        if self._fd < 0:
            return ClosedError(name, repr(self))
        if err == errno.EIO and self.scope != "system":
            if os.getpid() != self._pid:
                return ForkedError(
                    err, name, None, None, "a VM made by this process", f"process {self._pid} made {self!r}"
                )
            if self._vm_is_dead():
                return VmDeadError(err, name, None, None, "close", "KVM has marked this VM dead; make a new one")
        row = _ffi.IOCTLS.get(name)
        if err in _MAYBE_UNSUPPORTED and row is not None and row.capability is not None:
            cap = getattr(lib, row.capability, None)
            if cap is not None and self._extension(cap) == 0:
                return UnsupportedError(
                    err, name, row.capability, None, None, "this kernel or vendor module does not have it"
                )
        if err == errno.ENOTTY:
            return UnsupportedError(err, name, None, None, None, "this kernel does not know the ioctl")
        return KvmError(err, name, field, value, accepted, detail)

    def _extension(self, cap: int) -> int:
        # KVM_CHECK_EXTENSION on the nearest fd that answers it, asking ours first; -errno where none does.
        handle: Handle | None = self
        while handle is not None:
            if handle.scope in ("system", "vm") and handle._fd >= 0:
                return lib.kvm_check_extension(handle._fd, cap)
            handle = handle._owner
        return -errno.EBADF

    def _vm_is_dead(self) -> bool:
        # As the kernel's own selftests tell it: a dead VM answers even KVM_CHECK_EXTENSION with EIO.
        handle: Handle | None = self
        while handle is not None and handle.scope != "vm":
            handle = handle._owner
        return (
            handle is not None
            and handle._fd >= 0
            and lib.kvm_check_extension(handle._fd, _CAP_USER_MEMORY) == -errno.EIO
        )


class StructItem(Generic[T]):
    """A pair of ioctls that get and set one struct of the kernel, as an attribute.

    Reading issues the get ioctl and returns a new struct of its own (a cffi pointer with the kernel's field names);
    assigning issues the set ioctl.  Change a copy and assign it back:

        regs = vcpu.regs
        regs.rip = 0x7C00
        vcpu.regs = regs
    """

    def __init__(self, get: str | None, put: str | None, struct: str, doc: str) -> None:
        self.get, self.put, self.struct = get, put, struct
        self.__doc__ = doc
        self._ctype = ffi.typeof(f"struct {struct} *")
        self._get: Any = getattr(lib, get.lower()) if get else None
        self._put: Any = getattr(lib, put.lower()) if put else None
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"{owner.__name__}.{name}"

    @overload
    def __get__(self, handle: None, owner: type) -> StructItem[T]: ...
    @overload
    def __get__(self, handle: Handle, owner: type) -> T: ...  # noqa: F811  # `overload` is found by its name only
    def __get__(self, handle: Handle | None, owner: type) -> StructItem[T] | T:  # noqa: F811
        if handle is None:
            return self
        if self.get is None:
            raise AttributeError(f"{self._name} can only be set")
        rc, value = self._fetch(handle)
        if rc < 0:
            raise handle._refusal(self.get, -rc)
        return value

    def __set__(self, handle: Handle, value: T) -> None:
        if self.put is None:
            raise AttributeError(f"{self._name} is read-only")
        # cffi would take a list too, and pass as little of the stack as that is long.
        if not isinstance(value, ffi.CData) or ffi.typeof(value) != self._ctype or not value:
            raise ArgumentTypeError(self._name, "value", value, f"a {self._ctype.cname!r}")
        rc = self._store(handle, value)
        if rc < 0:
            raise handle._refusal(self.put, -rc)

    def _fetch(self, handle: Handle) -> tuple[int, T]:
        # The ioctls themselves, for structs whose size depends on the VM to do otherwise.
        value: T = ffi.new(self._ctype)
        return self._get(handle._fd, value), value

    def _store(self, handle: Handle, value: T) -> int:
        rc: int = self._put(handle._fd, value)
        return rc


def _check_extension(handle: Handle, cap: int) -> int:
    # For Kvm and Vm alike.
    if isinstance(cap, bool) or not isinstance(cap, int):
        raise ArgumentTypeError("KVM_CHECK_EXTENSION", "cap", cap, "a KVM_CAP_* number")
    if not 0 <= cap < 1 << 32:
        raise ArgumentError("KVM_CHECK_EXTENSION", "cap", cap, "a KVM_CAP_* number")
    return handle._check("KVM_CHECK_EXTENSION", lib.kvm_check_extension(handle.fd, cap), "cap", cap)


def fields(struct: Any) -> dict[str, Any]:
    """The fields of a cffi struct (or pointer to one) as a dict of ints, lists, bytes and dicts, for printing and JSON.

    >>> from hvmodel._ffi import ffi
    >>> fields(ffi.new("struct kvm_mp_state *", [4]))
    {'mp_state': 4}
    """
    accepted = "a cffi struct, or a pointer to one"
    if not isinstance(struct, ffi.CData):
        raise ArgumentTypeError("fields", "struct", struct, accepted)
    ctype = ffi.typeof(struct)
    if ctype.kind == "pointer" and struct and ctype.item.kind in ("struct", "union"):
        struct, ctype = struct[0], ctype.item
    if ctype.kind not in ("struct", "union"):
        raise ArgumentTypeError("fields", "struct", struct, accepted)
    return {name: _plain(getattr(struct, name)) for name, _ in ctype.fields or ()}


def _plain(value: Any) -> Any:
    if not isinstance(value, ffi.CData):
        return value
    ctype = ffi.typeof(value)
    if ctype.kind == "array":
        if ctype.item.cname in ("uint8_t", "char"):
            return bytes(ffi.buffer(value)) if ctype.length is not None else b""
        return [_plain(item) for item in value] if ctype.length is not None else []
    if ctype.kind == "pointer":
        return int(ffi.cast("uintptr_t", value))
    return {name: _plain(getattr(value, name)) for name, _ in ctype.fields or ()}
