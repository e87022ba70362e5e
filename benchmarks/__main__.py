"""`python -m benchmarks NAME [--json]`: status 0 when every bar holds, 1 when one is missed, 2 when it cannot run.

`all` runs all of them, one after the other; with --json it prints an array of their objects.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module

from hvmodel.errors import HvError

from . import harness, plot
from .guests import GuestBuildError
from .harness import BenchmarkError, Findings, Pace

NAMES = {
    "exits": "exits",
    "flatview": "flatview",
    "import": "imports",
    "kick": "kick",
    "lifecycle": "lifecycle",
    "mmu": "mmu",
    "ram": "ram",
    "state": "state",
    "sync": "sync",
}
PLOTTED = ("ram",)


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark, or all, and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What hvmodel costs, against plain C.")
    parser.add_argument("name", choices=[*sorted(NAMES), "all"])
    parser.add_argument("--json", action="store_true", help="a JSON object instead of a table (all: an array of them)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of each variant (7)")
    parser.add_argument(
        "--short",
        action="store_true",
        help="one small round: shows that all works, no figure means anything, no bar is asked",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the curves, as a PNG or what else the suffix says")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.plot and options.name not in PLOTTED:
        parser.error(f"--plot: only of {', '.join(PLOTTED)}")
    pace = Pace(rounds=1, turns=1, short=True) if options.short else Pace(rounds=options.rounds)
    names = sorted(NAMES) if options.name == "all" else [options.name]
    found: dict[str, Findings] = {}
    status = 0
    for name in names:
        try:
            if options.plot:
                plot.check(options.plot)
            found[name] = _findings(name, pace)
            if not options.json:
                harness.report(name, found[name])
            if options.plot:
                plot.draw(name, found[name], options.plot)
        except (BenchmarkError, GuestBuildError, HvError) as error:
            print(f"python -m benchmarks {name}: {error}", file=sys.stderr)
            status = 2
    if options.json:
        documents = [harness.document(name, findings) for name, findings in found.items()]
        if documents or options.name == "all":
            print(json.dumps(documents if options.name == "all" else documents[0], indent=2))
    missed = any(result.holds is False for findings in found.values() for result in findings.results)
    return status or int(missed and not options.short)


def _findings(name: str, pace: Pace) -> Findings:
    found = import_module(f".{NAMES[name]}", __package__).run(pace)
    return found if isinstance(found, Findings) else Findings(found)


if __name__ == "__main__":
    sys.exit(main())
