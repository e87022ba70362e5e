"""What is done for an object that nobody closed: `Finalizer`.

As weakref.finalize, without the millisecond and more that `import weakref` takes.
"""

from __future__ import annotations

from _weakref import ref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Finalizer"]

# In the order in which they were made.  They are kept here, not by their owners: of a weak reference that goes with
# its owner, as of one in a cycle, nobody is called.
_pending: dict[Finalizer, bool] = {}
_is_registered = False
_is_over = False  # what is forgotten after the interpreter's exit handlers stays as it is


class Finalizer:
    """Calls `call(*arguments)` once: when `owner` is gone, or when the interpreter exits, unless `atexit` is False.

    At exit the last one that was made is called first.  `call` and the arguments must not keep the owner alive.
    Threads: any.

    >>> class Lamp: pass
    >>> lamp = Lamp()
    >>> finalizer = Finalizer(lamp, print, "the lamp is gone")
    >>> del lamp
    the lamp is gone
    >>> finalizer.detach()
    False
    """

    __slots__ = ("_arguments", "_call", "_owner", "atexit")

    def __init__(self, owner: object, call: Callable[..., object], *arguments: object) -> None:
        if not _is_registered:
            _register()
        self.atexit = True
        self._call, self._arguments = call, arguments
        self._owner: ref[object] | None = ref(owner, self)
        _pending[self] = True

    def detach(self) -> bool:
        """Never call it: the owner was closed.  Whether it was still to be called."""
        self._owner = None  # which has this object for its callback
        return _pending.pop(self, False)

    def __call__(self, _: object = None) -> None:
        """Call it now, if it is still to be called."""
        if self.detach() and not _is_over:
            self._call(*self._arguments)


def _register() -> None:
    global _is_registered
    import atexit

    atexit.register(_at_exit)
    _is_registered = True


def _at_exit() -> None:
    # What a call raises is shown and keeps nobody from being called; what it makes has its turn too.
    global _is_over
    import sys

    try:
        while rest := [finalizer for finalizer in list(_pending) if finalizer.atexit]:
            for finalizer in reversed(rest):
                try:
                    finalizer()
                except Exception:  # noqa: BLE001  # an exit handler's
                    sys.excepthook(*sys.exc_info())
    finally:
        _is_over = True
