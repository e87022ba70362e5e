"""What goes to a terminal, and what into a pipe."""

from __future__ import annotations

import os
import pty
import signal
import subprocess

import pytest

from hvmodel.cli import main, terminal
from tests.cli.command import COMMAND, ENVIRONMENT, hvmodel, is_one_sentence


def test_on_a_terminal_a_table_is_drawn() -> None:
    master, slave = pty.openpty()
    with subprocess.Popen([*COMMAND, "ioctls"], stdout=slave, env={**ENVIRONMENT, "TERM": "xterm"}) as process:
        os.close(slave)
        text = b""
        while True:
            try:
                text += os.read(master, 1 << 16)
            except OSError:  # EIO: the other side is closed
                break
        os.close(master)
        assert process.wait(30) == 0
    assert "━".encode() in text or "─".encode() in text
    assert b"KVM_RUN" in text


def test_help_and_version() -> None:
    done = hvmodel("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(b"hvmodel ")
    assert hvmodel().stdout == hvmodel("--help").stdout
    for command in ((), ("boot",), ("info",), ("ioctls",), ("verify",)):
        done = hvmodel(*command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(b"Usage: hvmodel")


@pytest.mark.parametrize("command", ["ioctls", "--help"])
def test_a_reader_that_has_gone(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, command], stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_write_goes_on_after_a_short_write() -> None:
    read, write = os.pipe()
    try:
        os.set_blocking(write, False)
        data = os.urandom(1 << 17)  # more than a pipe holds
        # The reader is another process, so that write() has somebody to wait for.
        with subprocess.Popen(["wc", "-c"], stdin=read, stdout=subprocess.PIPE) as reader:
            terminal.write(write, data)
            os.close(write)
            assert reader.stdout
            assert int(reader.stdout.read()) == len(data)
    finally:
        os.close(read)


def test_errors_of_write() -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(terminal.ReaderGoneError):
        terminal.write(write, b"x")
    os.close(write)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(terminal.OutputError, match="No space left"):
        terminal.write(full.fileno(), b"x")


def test_say_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    terminal.say("two\nlines  and\tspace \udc80")
    assert capfd.readouterr().err == "hvmodel: two lines and space ?\n"


def test_an_extension_that_cannot_be_used_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import hvmodel
    from hvmodel.errors import BuildError

    class Broken:
        def __getattr__(self, name: str) -> object:
            raise BuildError("not built: run this")

    monkeypatch.setitem(__import__("sys").modules, "hvmodel._ffi", Broken())
    monkeypatch.setattr(hvmodel, "_ffi", Broken(), raising=False)
    assert main(["ioctls"]) == 8
    error = capfd.readouterr().err
    assert is_one_sentence(error.encode())
    assert "run this" in error
