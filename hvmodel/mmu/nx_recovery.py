"""NX huge pages: when KVM makes huge pages non-executable, and how it gives huge pages back that it had to split.

Some processors hang on a machine check where an instruction page's size changes under them (iTLB multihit).  Against
that KVM maps huge pages without execute and splits one where the guest executes from it.  A worker of each VM gives
split pages back later, a share of those on a list each period:

    enabled   nx_huge_pages and a ratio that is not 0
    period    nx_huge_pages_recovery_period_ms, or where that is 0 an hour / ratio, one second at least
    to zap    ceil(pages on the list / ratio), from the list's head; one list for each type of MMU
    a page    is zapped, or only taken off the list where its slot logs dirty pages

The parameters are those of module kvm, in /sys/module/kvm/parameters, for all VMs of the host; a model changes nothing
there.

By version: "never" came with 6.5 (and stable kernels before); the worker was a kernel thread until 6.12, since 6.13
(and in later stable kernels of 6.12) it is a thread of the VM's own process, named kvm-nx-lpage-recovery and seen as
its first 15 letters; until 6.17 there was one list, and the share was of the VM's statistic nx_lpage_splits, which is
the length of both lists now.  6.14 reads no truth value that begins with e or d ("enabled", "disabled"); 6.18 does.

Source: linux:arch/x86/kvm/mmu/mmu.c (set_nx_huge_pages, set_nx_huge_pages_recovery_param,
calc_nx_huge_pages_recovery_period, kvm_recover_nx_huge_pages, kvm_nx_huge_page_recovery_worker) @v6.18;
lib/kstrtox.c (kstrtobool, kstrtouint) @v6.18.
"""

from __future__ import annotations

import errno

from ..arch.number import ALL, number
from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Hashable

__all__ = [
    "KVM_NR_MMU_TYPES",
    "KVM_SHADOW_MMU",
    "KVM_TDP_MMU",
    "NxParameters",
    "NxRecovered",
    "PossibleNxHugePages",
    "SetAnswer",
    "recovery_period_ms",
    "recovery_to_zap",
    "recovery_wait_ms",
]

# enum kvm_mmu_type: what each list of struct kvm_arch.possible_nx_huge_pages is for.
KVM_SHADOW_MMU, KVM_TDP_MMU, KVM_NR_MMU_TYPES = range(3)

WORKER = "kvm-nx-lpage-recovery"
COMM = WORKER[:15]

_UINT_MAX = (1 << 32) - 1
_HOUR_MS = 60 * 60 * 1000
_SLOWEST_RATIO = 3600  # that makes a period of one second

_TRUE = ("e", "E", "y", "Y", "t", "T", "1")
_FALSE = ("d", "D", "n", "N", "f", "F", "0")


def recovery_period_ms(nx_huge_pages: bool, ratio: int, period_ms: int) -> int | None:
    """The time between two rounds in ms, or None where there are none (calc_nx_huge_pages_recovery_period).

    `nx_huge_pages`, `ratio`, `period_ms` (0 to 2**32-1): the three parameters.  ArgumentError: out of range.

    >>> recovery_period_ms(True, 60, 0), recovery_period_ms(True, 5000, 0), recovery_period_ms(False, 60, 0)
    (60000, 1000, None)
    """
    ratio = number("recovery_period_ms", "ratio", ratio, _UINT_MAX)
    period_ms = number("recovery_period_ms", "period_ms", period_ms, _UINT_MAX)
    if not nx_huge_pages or not ratio:
        return None
    return period_ms or _HOUR_MS // min(ratio, _SLOWEST_RATIO)


def recovery_to_zap(nr_pages: int, ratio: int) -> int:
    """How many of `nr_pages` pages on a list one round gives back.  ArgumentError: out of range.

    >>> recovery_to_zap(61, 60), recovery_to_zap(60, 60), recovery_to_zap(5, 0)
    (2, 1, 0)
    """
    nr_pages, ratio = (
        number("recovery_to_zap", "nr_pages", nr_pages),
        number("recovery_to_zap", "ratio", ratio, _UINT_MAX),
    )
    return -(-nr_pages // ratio) if ratio else 0


def recovery_wait_ms(last_ms: int, now_ms: int, period_ms: int | None) -> int | None:
    """How long the worker sleeps on: 0 for a round now, None until it is woken, for want of a period.

    `last_ms`: the end of the last round, or the VM's first KVM_RUN; `now_ms` is no earlier.

    >>> recovery_wait_ms(0, 59_000, 60_000), recovery_wait_ms(0, 61_000, 60_000), recovery_wait_ms(0, 5, None)
    (1000, 0, None)
    """
    if period_ms is None:
        return None
    now_ms = number("recovery_wait_ms", "now_ms", now_ms, first=number("recovery_wait_ms", "last_ms", last_ms))
    return max(0, last_ms + number("recovery_wait_ms", "period_ms", period_ms) - now_ms)


class NxRecovered(Value):
    """What one round did with a list: the pages that it zapped, and those that it only took off."""

    mmu_type: int
    zapped: tuple[Hashable, ...] = ()
    dropped: tuple[Hashable, ...] = ()


class PossibleNxHugePages:
    """The lists of one VM: shadow pages that keep a huge page from being there; one thread at a time.

    A page gets on the list of its MMU (KVM_SHADOW_MMU, KVM_TDP_MMU) when a fetch put it where the host has a huge page:
    where the size that the fault could have had is at least that of the entry that leads to the page.  A page may be
    anything hashable.

    >>> pages = PossibleNxHugePages()
    >>> [pages.track(name) for name in ("a", "b", "c", "a")]
    [True, True, True, False]
    >>> pages.recover(ratio=2, dirty_logged={"b"})[KVM_SHADOW_MMU]  # ceil(3 / 2) of them
    NxRecovered(mmu_type=0, zapped=('a',), dropped=('b',))
    >>> pages.nx_lpage_splits
    1
    """

    def __init__(self) -> None:
        # In the order in which they came, one list for each type of MMU.
        self._lists: tuple[dict[Hashable, None], ...] = tuple([{} for _ in range(KVM_NR_MMU_TYPES)])

    def __repr__(self) -> str:
        numbers = [len(pages) for pages in self._lists]
        return f"<PossibleNxHugePages: {numbers[KVM_SHADOW_MMU]} shadow, {numbers[KVM_TDP_MMU]} TDP>"

    @property
    def nx_lpage_splits(self) -> int:
        """The VM's statistic of this name: the pages on both lists."""
        return sum(map(len, self._lists))

    def pages(self, mmu_type: int = KVM_SHADOW_MMU) -> tuple[Hashable, ...]:
        """The pages of a list, the next to be taken first.  ArgumentError: no type of MMU."""
        return tuple(self._list("pages", mmu_type))

    def track(self, page: Hashable, mmu_type: int = KVM_SHADOW_MMU) -> bool:
        """Put a page at the end of a list; False where it is on it already (track_possible_nx_huge_page).

        ArgumentError: no type of MMU, or a page that is on the other list, for a page belongs to one MMU.
        """
        pages = self._list("track", mmu_type)
        if page in self._lists[1 - mmu_type]:
            raise ArgumentError("track", "page", page, f"one that is not on list {1 - mmu_type}", "it has one MMU")
        if page in pages:
            return False
        pages[page] = None
        return True

    def untrack(self, page: Hashable, mmu_type: int = KVM_SHADOW_MMU) -> bool:
        """Take a page off a list, as when it is zapped; False where it is on none (untrack_possible_nx_huge_page).

        ArgumentError: no type of MMU.
        """
        pages = self._list("untrack", mmu_type)
        if page not in pages:
            return False
        del pages[page]
        return True

    def recover(self, ratio: int, dirty_logged: Container[Hashable] = ()) -> tuple[NxRecovered, ...]:
        """One round of the worker: of each list its share, from the head (kvm_recover_nx_huge_pages).

        `ratio`: the parameter (0: nothing is taken).  `dirty_logged`: pages whose slot logs dirty pages, which would
        only be split again.  ArgumentError: `ratio` out of range.
        """
        done = []
        for mmu_type, pages in enumerate(self._lists):
            taken = list(pages)[: recovery_to_zap(len(pages), ratio)]
            for page in taken:
                del pages[page]
            zapped = tuple([page for page in taken if page not in dirty_logged])
            done.append(NxRecovered(mmu_type, zapped, tuple([page for page in taken if page in dirty_logged])))
        return tuple(done)

    def _list(self, call: str, mmu_type: int) -> dict[Hashable, None]:
        return self._lists[number(call, "mmu_type", mmu_type, KVM_NR_MMU_TYPES - 1)]


class SetAnswer(Value):
    """What a write to a parameter did.  `error`: 0, or the number of the error that write(2) gives.

    `zaps`: every VM's shadow pages are zapped.  `wakes`: the worker of every VM that has one is woken.
    """

    error: int = 0
    zaps: bool = False
    wakes: bool = False


class NxParameters:
    """The parameters of module kvm that are about NX huge pages, as its setters change them; one thread at a time.

    `multihit`: the processor has the bug and mitigations are not off, which is what "auto" goes by.

    >>> parameters = NxParameters(multihit=False)
    >>> parameters.set_nx_huge_pages("force"), parameters.get_nx_huge_pages()
    (SetAnswer(error=0, zaps=True, wakes=True), 'Y')
    >>> parameters.set_nx_huge_pages("never", nr_vms=1).error == errno.EBUSY
    True
    """

    def __init__(self, *, multihit: bool = False, ratio: int = 60, period_ms: int = 0) -> None:
        self.multihit = bool(multihit)
        self.nx_huge_pages = self.multihit
        self.hard_disabled = False
        self.recovery_ratio = number("NxParameters", "ratio", ratio, _UINT_MAX)
        self.recovery_period_ms = number("NxParameters", "period_ms", period_ms, _UINT_MAX)

    def __repr__(self) -> str:
        text = f"nx_huge_pages={self.get_nx_huge_pages()}, ratio={self.recovery_ratio}"
        return f"<NxParameters {text}, period_ms={self.recovery_period_ms}>"

    @property
    def period_ms(self) -> int | None:
        """What `recovery_period_ms` says of the parameters now."""
        return recovery_period_ms(self.nx_huge_pages, self.recovery_ratio, self.recovery_period_ms)

    @property
    def has_worker(self) -> bool:
        """Whether a VM gets a worker at its first KVM_RUN: always, but after "never"."""
        return not self.hard_disabled

    def get_nx_huge_pages(self) -> str:
        """What a read of nx_huge_pages gives: Y, N, never."""
        return "never" if self.hard_disabled else "Y" if self.nx_huge_pages else "N"

    def set_nx_huge_pages(self, text: str, *, nr_vms: int = 0) -> SetAnswer:
        """Write to nx_huge_pages: off, force, auto, never, or a truth value as the kernel reads one.

        A line's end is allowed.  "never" holds until the module is loaded anew, and is EBUSY while there are VMs.
        ArgumentTypeError: no str.
        """
        if not isinstance(text, str):
            raise ArgumentTypeError("set_nx_huge_pages", "text", text, "what is written, a str")
        if self.hard_disabled:
            return SetAnswer(errno.EPERM)
        word = text.removesuffix("\n")
        old = self.nx_huge_pages
        if word == "off":
            new = False
        elif word == "force":
            new = True
        elif word == "auto":
            new = self.multihit
        elif word == "never":
            if nr_vms:
                return SetAnswer(errno.EBUSY)
            new, self.hard_disabled = False, True
        else:
            known = _kstrtobool(text)
            if known is None:
                return SetAnswer(errno.EINVAL)
            new = known
        self.nx_huge_pages = new
        return SetAnswer(0, zaps=new != old, wakes=new != old)

    def set_recovery_ratio(self, text: str) -> SetAnswer:
        """Write to nx_huge_pages_recovery_ratio: an unsigned int.  Errors as `set_nx_huge_pages`."""
        return self._set_recovery("recovery_ratio", text)

    def set_recovery_period_ms(self, text: str) -> SetAnswer:
        """Write to nx_huge_pages_recovery_period_ms: an unsigned int.  Errors as `set_nx_huge_pages`."""
        return self._set_recovery("recovery_period_ms", text)

    def _set_recovery(self, name: str, text: str) -> SetAnswer:
        if not isinstance(text, str):
            raise ArgumentTypeError(f"set_{name}", "text", text, "what is written, a str")
        if self.hard_disabled:
            return SetAnswer(errno.EPERM)
        value = _kstrtouint(text)
        if isinstance(value, SetAnswer):
            return value
        old = self.period_ms
        setattr(self, name, value)
        new = self.period_ms
        return SetAnswer(0, wakes=new is not None and (old is None or old > new))


def _kstrtobool(text: str) -> bool | None:
    # lib/kstrtox.c: the first letter decides, of "on" and "off" the second.
    if text[:1] in _TRUE:
        return True
    if text[:1] in _FALSE:
        return False
    if text[:1] in ("o", "O"):
        return {"n": True, "N": True, "f": False, "F": False}.get(text[1:2])
    return None


def _kstrtouint(text: str) -> int | SetAnswer:
    # kstrtouint with base 0: decimal, 0x, or octal with a leading 0; one sign +, one line's end.  Digits that make more
    # than 64 bits are told before what stands behind them (lib/kstrtox.c _kstrtoull).
    digits = text.removesuffix("\n").removeprefix("+")
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[:1] == "0" else 10
    digits = (digits[2:] if base == 16 else digits).lower()
    alphabet = "0123456789abcdef"[:base]
    rest = digits.lstrip(alphabet)
    value = 0
    for digit in digits.removesuffix(rest):
        value = value * base + alphabet.index(digit)
    if (rest or not digits) and value <= ALL:
        return SetAnswer(errno.EINVAL)
    return value if value <= _UINT_MAX else SetAnswer(errno.ERANGE)
