"""Limits: how much memory this process can still get before the kernel begins to kill for it.

    host      /proc/meminfo: MemAvailable + SwapFree
    cgroups   the process's own and every one above it, up to what is mounted:
              v2   memory.max - memory.current             + inactive_file + active_file of memory.stat
              v1   memory.limit_in_bytes - ...usage_in_bytes + total_inactive_file + total_active_file

A cgroup's page cache of files counts as room, because the kernel takes it back before it kills; shared memory (memfds)
is not in these two counters.  A cgroup's swap is left out, so that the answer is rather too low than too high.

Source: mm/memcontrol.c, mm/memcontrol-v1.c, si_mem_available in mm/show_mem.c@v6.18;
Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst; proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os

from ..units import KiB
from ..value import Value

__all__ = ["Limit", "available_memory", "limits"]

# kind of cgroup -> its limit, its use, and the fields of memory.stat that can be taken back.
_FILES = {
    "cgroup2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


class Limit(Value):
    """One limit: `what` sets it, and the `room` in bytes that it leaves, from 0."""

    what: str
    room: int


def available_memory(*, proc: str = "/proc") -> int:
    """Bytes that this process can still get: the least `room` of `limits`.

    >>> available_memory() > 0
    True
    """
    return min(limit.room for limit in limits(proc=proc))


def limits(*, proc: str = "/proc") -> tuple[Limit, ...]:
    """What limits this process's memory, the least room first; at least the host.

    `proc` is where procfs is mounted.  What cannot be read does not limit.  A snapshot: others use memory meanwhile.
    Threads: any.
    """
    found = [Limit("the host's MemAvailable and SwapFree", _host_room(f"{proc}/meminfo"))]
    for kind, mount, root in _mounts(_text(f"{proc}/self/mountinfo")):
        path = _own_path(_text(f"{proc}/self/cgroup"), kind)
        if path is None:
            continue
        # In a container the mount shows the cgroups from `root` on.
        inside = path[len(root.rstrip("/")) :] if f"{path}/".startswith(f"{root.rstrip('/')}/") else ""
        parts = [part for part in inside.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            directory = "/".join([mount.rstrip("/"), *parts[:depth]])
            room = _cgroup_room(directory, kind)
            if room is not None:
                found.append(Limit(f"cgroup {directory}, {_FILES[kind][0]}", room))
    return tuple(sorted(found, key=lambda limit: limit.room))


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _host_room(path: str) -> int:
    # MemAvailable:   24163756 kB
    fields = dict(line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
    try:
        return KiB * sum(int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _mounts(mountinfo: str) -> list[tuple[str, str, str]]:
    # (kind, mount point, root) of the hierarchies that may have the memory controller.
    # 30 23 0:26 /root /mount rw,nosuid shared:4 - cgroup cgroup rw,memory
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        words, kinds = left.split(), right.split()
        if len(words) < 5 or not kinds or kinds[0] not in _FILES:
            continue
        if kinds[0] == "cgroup2" or "memory" in kinds[-1].split(","):
            found.append((kinds[0], _unescape(words[4]), _unescape(words[3])))
    return found


def _unescape(word: str) -> str:
    for code, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        word = word.replace(code, char)
    return word


def _own_path(cgroups: str, kind: str) -> str | None:
    # 4:memory:/path of v1; 0::/path of v2
    for line in cgroups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (kind == "cgroup2" and number == "0" and not controllers) or (
            kind == "cgroup" and "memory" in controllers.split(",")
        ):
            return path
    return None


def _cgroup_room(directory: str, kind: str) -> int | None:
    limit_file, used_file, back = _FILES[kind]
    try:
        limit, used = int(_text(f"{directory}/{limit_file}")), int(_text(f"{directory}/{used_file}"))
    except ValueError:
        return None  # "max", or a cgroup without the controller
    if limit >= 1 << 62:
        return None  # what v1 says for no limit, 2**63 less a page
    room = limit - used
    for line in _text(f"{directory}/memory.stat").splitlines():
        name, _, number = line.partition(" ")
        if name in back:
            room += int(number)
    return min(max(room, 0), limit)
