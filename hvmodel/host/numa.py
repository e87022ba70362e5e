"""NUMA: from which nodes the kernel takes the pages of a range.

    default      as the process's own policy says: as a rule the node of the processor that touches the page first
    preferred    one node, others when it is full
    bind         these nodes and no others
    interleave   these nodes in turn, page by page

These four are the policies of QEMU's memory backends.  A policy decides about pages to come; `move` has those that are
there already moved.

Source: mm/mempolicy.c@v6.18; mbind(2), get_mempolicy(2); backends/hostmem.c@v7.2 of QEMU.
"""

from __future__ import annotations

import errno

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, HostError
from ..value import Value
from .mapping import index
from .pagemap import page_range
from .smaps import target_range

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .smaps import Target

__all__ = ["MODES", "NumaPolicy", "get_mempolicy", "mbind", "node_of", "nodes"]

MODES = {
    "default": lib.HV_MPOL_DEFAULT,
    "preferred": lib.HV_MPOL_PREFERRED,
    "bind": lib.HV_MPOL_BIND,
    "interleave": lib.HV_MPOL_INTERLEAVE,
}
"""The policies that QEMU has, and the kernel's number (MPOL_*) of each."""

_NAMES = {number: name for name, number in MODES.items()} | {
    lib.HV_MPOL_LOCAL: "local",
    lib.HV_MPOL_PREFERRED_MANY: "preferred-many",
}
_MODE_FLAGS = 0b111 << 13  # MPOL_F_STATIC_NODES, MPOL_F_RELATIVE_NODES, MPOL_F_NUMA_BALANCING
_NODES_MAX = 1024  # CONFIG_NODES_SHIFT is 10 at most
_HAS_MEMORY = "/sys/devices/system/node/has_memory"


class NumaPolicy(Value):
    """A policy and its nodes, ascending: `policy` is one of `MODES`, or "local" or "preferred-many" where the kernel
    answered so.  `of` makes one that is checked."""

    policy: str
    nodes: tuple[int, ...] = ()

    @classmethod
    def of(cls, policy: str = "default", host_nodes: Iterable[int] = (), call: str = "NumaPolicy") -> NumaPolicy:
        """A policy by the names of QEMU's options, checked as QEMU does, and against the nodes that this host has.

        Raises ArgumentTypeError; ArgumentError, naming `call`, for a policy that is none of `MODES`, for nodes with
        policy "default", for another policy without nodes, and for nodes without memory on this host.

        >>> NumaPolicy.of("default")
        NumaPolicy(policy='default', nodes=())
        """
        if not isinstance(policy, str):
            raise ArgumentTypeError(call, "policy", policy, f"one of {', '.join(MODES)}")
        if policy not in MODES:
            raise ArgumentError(call, "policy", policy, f"one of {', '.join(MODES)}")
        if isinstance(host_nodes, str | bytes) or not hasattr(host_nodes, "__iter__"):
            raise ArgumentTypeError(call, "host_nodes", host_nodes, "numbers of nodes, such as (0, 1)")
        wanted = tuple(sorted({index(node, call, "host_nodes", "numbers of nodes") for node in host_nodes}))
        if policy == "default" and wanted:
            detail = "policy default takes no nodes"
            raise ArgumentError(call, "host_nodes", wanted, "no nodes, or another policy", detail)
        if policy != "default" and not wanted:
            raise ArgumentError(call, "host_nodes", wanted, "at least one node", f"policy {policy} needs nodes")
        if wanted:
            have = nodes()
            if missing := [node for node in wanted if node not in have]:
                raise ArgumentError(call, "host_nodes", missing[0], f"the nodes of this host that have memory: {have}")
        return cls(policy, wanted)


def nodes() -> tuple[int, ...]:
    """The numbers of this host's nodes that have memory; none on a kernel without NUMA.

    Source: /sys/devices/system/node/has_memory.

    >>> 0 in nodes() or nodes()
    True
    """
    try:
        with open(_HAS_MEMORY, encoding="ascii") as file:
            text = file.read().strip()
    except FileNotFoundError:
        return ()
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def mbind(
    target: Target,
    policy: NumaPolicy,
    *,
    offset: int = 0,
    size: int | None = None,
    move: bool = False,
    strict: bool = False,
) -> None:
    """Sets the policy of a range of this process: `size` bytes (None: all the rest) of `target` from `offset`.

    `target` is a Mapping, a RamBlock, or (hva, size); whole pages.  For a shared mapping of a memory file the policy
    belongs to the file's pages, and so holds for all who map it.  `move` moves the pages that are there and that no
    other process maps (MPOL_MF_MOVE); with `strict` a page that is on another node and stays there is EIO
    (MPOL_MF_STRICT).  QEMU sets both.

    Raises as `NumaPolicy.of`; ClosedError; HostError of mbind: EFAULT (part of the range is not mapped), EIO, EINVAL
    (none of the nodes may be used by this process, see cpuset(7)), ENOSYS (a kernel without NUMA), ENOMEM.
    Threads: any.
    """
    call = "mbind"
    if not isinstance(policy, NumaPolicy):
        raise ArgumentTypeError(call, "policy", policy, "a NumaPolicy")
    policy = NumaPolicy.of(policy.policy, policy.nodes, call)
    hva, size = target_range(call, target, offset, size)
    mask = None
    maxnode = 0
    if policy.nodes:
        maxnode = policy.nodes[-1] + 1
        mask = ffi.new("uint64_t[]", _NODES_MAX // 64)
        for node in policy.nodes:
            mask[node // 64] |= 1 << node % 64
    flags = move * lib.HV_MPOL_MF_MOVE | strict * lib.HV_MPOL_MF_STRICT
    # The kernel takes one off maxnode, which QEMU makes up for; so do we.
    error = lib.hv_mbind(hva, size, MODES[policy.policy], ffi.NULL if mask is None else mask, maxnode + 1, flags)
    if error < 0:
        raise _mbind_error(-error, policy, hva)


def _mbind_error(number: int, policy: NumaPolicy, hva: int) -> HostError:
    match number:
        case errno.EFAULT:
            return HostError(number, "mbind", "hva", hva, "a range all of which is mapped")
        case errno.EIO:
            detail = "strict: a page is on another node, and could not be moved"
            return HostError(number, "mbind", "strict", True, "move=True, or strict=False", detail)
        case errno.EINVAL:
            return HostError(number, "mbind", "nodes", policy.nodes, "nodes that this process may use: cpuset(7)")
        case errno.ENOSYS:
            return HostError(number, "mbind", None, None, "a kernel with CONFIG_NUMA")
    return HostError(number, "mbind", "policy", policy.policy)


def get_mempolicy(hva: int | None = None) -> NumaPolicy:
    """The policy of the memory at address `hva`, or with None that of the calling thread.

    Raises ArgumentError, ArgumentTypeError; HostError of get_mempolicy: EFAULT (nothing is mapped there), ENOSYS.
    Threads: any; None asks about the calling one.

    >>> get_mempolicy().policy in ("default", "bind", "interleave", "preferred", "local", "preferred-many")
    True
    """
    flags, address = 0, 0
    if hva is not None:
        address, _ = page_range("get_mempolicy", index(hva, "get_mempolicy", "hva") & -4096, 4096)
        flags = lib.HV_MPOL_F_ADDR
    mode, mask = _ask(address, flags)
    mode &= ~_MODE_FLAGS
    return NumaPolicy(
        _NAMES.get(mode, str(mode)), tuple(node for node in range(_NODES_MAX) if mask[node // 64] >> node % 64 & 1)
    )


def node_of(hva: int) -> int:
    """The node of the page at address `hva`.  A page that is not there is made: this counts as reading it.

    Raises ArgumentError, ArgumentTypeError; HostError of get_mempolicy: EFAULT (nothing is mapped there, or it cannot
    be read), ENOSYS.  Threads: any.
    """
    address, _ = page_range("node_of", index(hva, "node_of", "hva") & -4096, 4096)
    mode, _ = _ask(address, lib.HV_MPOL_F_ADDR | lib.HV_MPOL_F_NODE, with_nodes=False)
    return mode


def _ask(address: int, flags: int, with_nodes: bool = True) -> tuple[int, list[int]]:
    # get_mempolicy: what it says in `mode`, and the words of the nodes.
    mode = ffi.new("int *")
    mask = ffi.new("uint64_t[]", _NODES_MAX // 64)
    nodemask, maxnode = (mask, _NODES_MAX + 1) if with_nodes else (ffi.NULL, 0)
    error = lib.hv_get_mempolicy(mode, nodemask, maxnode, address, flags)
    if error == -errno.EFAULT:
        raise HostError(errno.EFAULT, "get_mempolicy", "hva", address, "an address that is mapped and can be read")
    if error < 0:
        raise HostError(-error, "get_mempolicy")
    return mode[0], list(mask)
