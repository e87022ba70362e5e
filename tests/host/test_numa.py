"""NUMA policies: what was set is what the kernel says; what this host has not is refused, as QEMU refuses it."""

from __future__ import annotations

import ctypes
import errno
import re
import subprocess
from pathlib import Path

import pytest

from hvmodel import RamBlock
from hvmodel._ffi import lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.host import Mapping, MemFd
from hvmodel.host.numa import MODES, NumaPolicy, get_mempolicy, mbind, node_of, nodes
from tests.need import need

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def numa() -> None:
    if not nodes():
        pytest.skip("needs a kernel with CONFIG_NUMA")


def numa_maps(hva: int) -> str:
    """What /proc/self/numa_maps says of the mapping at `hva`."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if line.startswith(f"{hva:x} "):
            return line.split(maxsplit=1)[1]
    raise LookupError(hex(hva))


def test_nodes_are_those_of_sysfs() -> None:
    root = Path("/sys/devices/system/node")
    assert set(nodes()) == {
        int(path.name[4:])
        for path in root.glob("node[0-9]*")
        if int(re.search(r"MemTotal:\s*(\d+)", (path / "meminfo").read_text())[1]) > 0
    }


def test_lists_of_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "has_memory"
    monkeypatch.setattr("hvmodel.host.numa._HAS_MEMORY", str(file))
    for text, expected in (("0\n", (0,)), ("0-3,8,10-11\n", (0, 1, 2, 3, 8, 10, 11)), ("\n", ())):
        file.write_text(text)
        assert nodes() == expected
    file.unlink()
    assert nodes() == ()


@pytest.mark.parametrize("policy", ["bind", "interleave", "preferred"])
def test_a_policy_that_was_set(policy: str) -> None:
    node = nodes()[0]
    with Mapping(None, 8 * PAGE, shared=False) as memory:
        wanted = NumaPolicy.of(policy, [node])
        mbind(memory, wanted, offset=2 * PAGE, size=4 * PAGE)
        assert get_mempolicy(memory.hva + 2 * PAGE) == get_mempolicy(memory.hva + 6 * PAGE - 1) == wanted
        assert get_mempolicy(memory.hva) == get_mempolicy(memory.hva + 6 * PAGE) == NumaPolicy("default")
        said = numa_maps(memory.hva + 2 * PAGE)
        assert re.match({"preferred": "prefer"}.get(policy, policy) + rf"(=\w+)?:{node}\b", said), said
        mbind(memory, NumaPolicy("default"))
        assert get_mempolicy(memory.hva + 2 * PAGE) == NumaPolicy("default")


def test_pages_that_are_there_are_where_they_should_be() -> None:
    node = nodes()[0]
    with RamBlock("pc.ram", "64K") as block:
        block.write(0, b"x")
        if node_of(block.host) == node:
            mbind(block, NumaPolicy.of("bind", (node,)), strict=True, move=True)  # as QEMU sets it
        assert get_mempolicy(block.host) == NumaPolicy("bind", (node,))
        assert node_of(block.host) in nodes()


def test_the_policy_of_a_file_is_its_mappers() -> None:
    node = nodes()[0]
    with MemFd("policy", "64K") as memfd, Mapping(memfd, "64K") as one, Mapping(memfd, "64K") as other:
        mbind(one, NumaPolicy.of("bind", (node,)))
        assert get_mempolicy(other.hva) == NumaPolicy("bind", (node,))


def test_the_threads_own() -> None:
    # set_mempolicy, system call 238: MPOL_BIND 2, MPOL_DEFAULT 0.
    mask = ctypes.c_ulong(1 << nodes()[0])
    try:
        assert libc.syscall(238, 2, ctypes.byref(mask), 65) == 0
        assert get_mempolicy() == NumaPolicy("bind", (nodes()[0],))
    finally:
        libc.syscall(238, 0, None, 0)
    assert get_mempolicy() == NumaPolicy("default")


def test_policies_the_kernel_may_answer() -> None:
    # mbind, system call 237: MPOL_LOCAL 4.
    with Mapping(None, PAGE, shared=False) as memory:
        assert libc.syscall(237, ctypes.c_void_p(memory.hva), ctypes.c_ulong(PAGE), 4, None, 0, 0) == 0
        assert get_mempolicy(memory.hva).policy == "local"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("policy", "host_nodes", "field", "words"),
    [
        ("default", (0,), "host_nodes", "takes no nodes"),
        ("bind", (), "host_nodes", "needs nodes"),
        ("preferred", [], "host_nodes", "needs nodes"),
        ("interleave", (), "host_nodes", "needs nodes"),
        ("weighted", (0,), "policy", "default, preferred, bind, interleave"),
        ("local", (), "policy", "default, preferred, bind, interleave"),
        ("bind", (1023,), "host_nodes", "nodes of this host"),
        ("bind", (0, 1023), "host_nodes", "nodes of this host"),
        ("bind", (-1,), "host_nodes", "nodes of this host"),
        ("bind", (1 << 70,), "host_nodes", "nodes of this host"),
    ],
)
def test_policies_are_refused(policy: str, host_nodes: object, field: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        NumaPolicy.of(policy, host_nodes)
    assert caught.value.field == field
    with Mapping(None, PAGE) as memory, pytest.raises(ArgumentError, match=words) as caught:
        mbind(memory, NumaPolicy(policy, tuple(host_nodes)))
    assert (caught.value.call, caught.value.field) == ("mbind", field)


@pytest.mark.parametrize(
    ("policy", "host_nodes"), [(2, (0,)), ("bind", 0), ("bind", "0"), ("bind", ("0",)), ("bind", (True,))]
)
def test_types_are_refused(policy: object, host_nodes: object) -> None:
    with pytest.raises(ArgumentTypeError):
        NumaPolicy.of(policy, host_nodes)


@pytest.mark.parametrize("options", ["policy=default,host-nodes=0", "policy=bind", "policy=bind,host-nodes=99"])
def test_qemu_refuses_the_same(options: str) -> None:
    need("qemu")
    words = dict(option.split("=") for option in options.split(","))
    with pytest.raises(ArgumentError):
        NumaPolicy.of(words["policy"], [int(words["host-nodes"])] if "host-nodes" in words else [])
    done = subprocess.run(
        ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-machine", "none",
         "-object", f"memory-backend-ram,id=m,size=1M,{options}"],
        capture_output=True, text=True, check=False, timeout=30, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    assert "host-nodes" in done.stderr or "bind memory" in done.stderr, done.stderr


def test_ranges_are_refused() -> None:
    bind = NumaPolicy.of("bind", nodes()[:1])
    with Mapping(None, 4 * PAGE) as memory:
        for named, field in [
            ({"offset": 1}, "offset"), ({"offset": 5 * PAGE}, "offset"), ({"size": 1}, "size"), ({"size": -1}, "size"),
        ]:  # fmt: skip
            with pytest.raises(ArgumentError) as caught:
                mbind(memory, bind, **named)
            assert (caught.value.call, caught.value.field) == ("mbind", field)
        with pytest.raises(ArgumentTypeError):
            mbind(memory, "bind")
        lib.hv_munmap(memory.hva + PAGE, PAGE)
        for call, field in [(lambda: mbind(memory, bind), "hva"), (lambda: get_mempolicy(memory.hva + PAGE), "hva"),
                            (lambda: node_of(memory.hva + PAGE), "hva")]:  # fmt: skip
            with pytest.raises(HostError, match="mapped") as caught:
                call()
            assert (caught.value.errno, caught.value.field) == (errno.EFAULT, field)
    with pytest.raises(ClosedError):
        mbind(memory, bind)


def test_a_refusal_that_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # A node that our check takes for there, and the kernel does not.
    monkeypatch.setattr("hvmodel.host.numa.nodes", lambda: tuple(range(1024)))
    with Mapping(None, PAGE) as memory, pytest.raises(HostError, match=r"cpuset\(7\)") as caught:
        mbind(memory, NumaPolicy("bind", (1000,)))
    assert (caught.value.errno, caught.value.call, caught.value.field) == (errno.EINVAL, "mbind", "nodes")


def test_modes_are_qemus() -> None:
    # qapi/machine.json, HostMemPolicy; include/uapi/linux/mempolicy.h.
    assert MODES == {"default": 0, "preferred": 1, "bind": 2, "interleave": 3}
