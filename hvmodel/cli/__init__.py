"""The command `hvmodel`: what goes to a terminal is decided here and nowhere below.

commands   the command line: options, help, errors as one sentence and a status
boot       a guest's run: its output, its exits, how it ended
decode     words of the MMU by their bits
info       what this host's KVM is and can do
masks      the masks of KVM's page table entries
mtree      the memory of a board, as QEMU prints it
ram        what guest RAM costs the host
walk       walks of page tables in an image
terminal   tables, and writing to descriptors
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hvmodel` with these arguments (default: the process's own); its exit status.

    Never raises but for a bug: a refusal is a sentence on stderr and a status.  Where the reader of its output has
    gone, the process ends by SIGPIPE.  Thread safety: the main thread, once.
    """
    try:
        from . import commands

        return commands.run(arguments)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as a shell has it
