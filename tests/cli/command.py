"""`python -m hvmodel` as people run it: a process, its output, its status."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "COMMAND",
    "ENVIRONMENT",
    "ROOT",
    "feed",
    "hvmodel",
    "in_namespace",
    "is_one_sentence",
    "object_of",
    "started",
    "wait_for_vcpu",
]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "hvmodel"]
# From any directory; narrow terminals and colours are nobody's business here.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::ResourceWarning", "COLUMNS": "200"}


def hvmodel(*arguments: object, input: bytes = b"", cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run the command; stdin is `input`."""
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(words, input=input, capture_output=True, env=ENVIRONMENT, cwd=cwd, check=False, timeout=300)


@contextlib.contextmanager
def started(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs, with pipes where `options` say nothing else; killed at the end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # pytest may run with SIGINT ignored, which children inherit.
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **{**pipes, **options},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def feed(process: subprocess.Popen[bytes], data: bytes) -> None:
    """Give it `data` on stdin, and the end of file."""
    assert process.stdin
    process.stdin.write(data)
    process.stdin.close()


def wait_for_vcpu(process: subprocess.Popen[bytes]) -> None:
    """Until it has made a vCPU; fails where it ends first."""
    while True:
        assert process.poll() is None
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if "kvm-vcpu" in os.readlink(fd):
                    return


def object_of(done: subprocess.CompletedProcess[bytes]) -> Any:
    """The one JSON object (or array) on stdout."""
    assert done.stdout.count(b"\n") == 1, done
    return json.loads(done.stdout)


def is_one_sentence(text: bytes) -> bool:
    """Whether this is how the command refuses: one line that begins with its name, no traceback."""
    return text.startswith(b"hvmodel: ") and text.count(b"\n") == 1 and text.endswith(b"\n")


def in_namespace(script: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run `script` (sh), to which "$@" is the command, in a mount namespace; skips where that is not allowed."""
    probe = subprocess.run(
        ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && : >/dev/null"],
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip(f"needs a mount namespace with device nodes: {probe.stderr.decode().strip()}")
    words = ["unshare", "-m", "sh", "-c", script, "sh", *COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, env=ENVIRONMENT, check=False, timeout=300)
