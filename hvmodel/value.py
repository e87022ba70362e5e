"""Frozen, slotted values: what `dataclass(frozen=True, slots=True)` makes, without its 11 ms of import.

A subclass of `Value` lists its fields as annotations.  It gets `__slots__`, `__match_args__`, a constructor that
takes the fields by position or name, equality and hash over the fields (two classes are never equal), a repr that
shows integers above 9 in hexadecimal, pickling, and `fields()`.  Assignment raises AttributeError.  The constructor
is compiled at the first use of a class, so that a class nobody makes costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


__all__ = ["Value"]


class _ValueMeta(type):
    def __new__(mcls, name: str, bases: tuple[type, ...], ns: dict[str, Any]) -> _ValueMeta:
        inherited = tuple(f for base in bases for f in getattr(base, "__match_args__", ()))
        own = tuple(
            f
            for f, kind in ns.get("__annotations__", {}).items()
            if not f.startswith("__") and not str(kind).startswith("ClassVar")
        )
        defaults = dict(getattr(bases[0], "_defaults", {})) if bases else {}
        for field in own:
            if field in ns:
                defaults[field] = ns.pop(field)
        ns["__slots__"] = own + tuple(ns.pop("_extra_slots", ()))
        ns["__match_args__"] = inherited + own
        ns["_defaults"] = defaults
        cls = super().__new__(mcls, name, bases, ns)
        if "__init__" not in ns:
            type.__setattr__(cls, "__init__", _first_init)
        return cls


def _first_init(self: Value, *args: object, **kwargs: object) -> None:
    # Runs once per class: compile the constructor, put it in place of this stand-in, and go on with it.
    cls = type(self)
    fields = cls.__match_args__
    scope: dict[str, Any] = {f"_set_{f}": getattr(cls, f).__set__ for f in fields}
    scope |= {f"_default_{f}": value for f, value in cls._defaults.items()}
    params = "".join(f", {f}=_default_{f}" if f in cls._defaults else f", {f}" for f in fields)
    body = "\n".join(f" _set_{f}(self, {f})" for f in fields) or " pass"
    exec(f"def __init__(self{params}):\n{body}\n", scope)
    init = scope["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__module__ = cls.__module__
    type.__setattr__(cls, "__init__", init)
    init(self, *args, **kwargs)


@dataclass_transform(frozen_default=True)
class Value(metaclass=_ValueMeta):
    """Base of all frozen values; see the module's text."""

    if TYPE_CHECKING:
        __match_args__: tuple[str, ...]
        _defaults: dict[str, Any]

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """Names of the fields, in the order of the constructor."""
        return cls.__match_args__

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot delete {name}")

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, f) == getattr(other, f) for f in self.__match_args__)

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, f) for f in self.__match_args__)))

    def __repr__(self) -> str:
        shown = ", ".join(f"{f}={_show(getattr(self, f))}" for f in self.__match_args__)
        return f"{type(self).__name__}({shown})"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), tuple(getattr(self, f) for f in self.__match_args__)


def _show(value: object) -> str:
    return f"{value:#x}" if type(value) is int and abs(value) > 9 else repr(value)
