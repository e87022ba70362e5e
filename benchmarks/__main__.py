"""`python -m benchmarks NAME [--json]`: status 0 when every bar holds, 1 when one is missed, 2 when it cannot run.

`all` runs all of them, one after the other; with --json it prints an array of their objects.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module

from hvmodel.errors import HvError

from . import harness
from .guests import GuestBuildError
from .harness import BenchmarkError, Pace, Result

NAMES = {"exits": "exits", "import": "imports", "kick": "kick", "lifecycle": "lifecycle"}


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
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    pace = Pace(rounds=1, turns=1, short=True) if options.short else Pace(rounds=options.rounds)
    names = sorted(NAMES) if options.name == "all" else [options.name]
    found: dict[str, list[Result]] = {}
    status = 0
    for name in names:
        try:
            found[name] = _results(name, pace)
        except (BenchmarkError, GuestBuildError, HvError) as error:
            print(f"python -m benchmarks {name}: {error}", file=sys.stderr)
            status = 2
            continue
        if not options.json:
            harness.report(name, found[name])
    if options.json:
        documents = [harness.document(name, results) for name, results in found.items()]
        if documents or options.name == "all":
            print(json.dumps(documents if options.name == "all" else documents[0], indent=2))
    missed = any(result.holds is False for results in found.values() for result in results)
    return status or int(missed and not options.short)


def _results(name: str, pace: Pace) -> list[Result]:
    results: list[Result] = import_module(f".{NAMES[name]}", __package__).run(pace)
    return results


if __name__ == "__main__":
    sys.exit(main())
