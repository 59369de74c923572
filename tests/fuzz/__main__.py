"""Damaged files by the thousand: ``python -m fuzz --cases 3000``, or ``--case N`` for one of them again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from fuzz.running import run, summary

FOLDER = Path(tempfile.gettempdir()) / "iql_torchrl-fuzz"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps the files of what went wrong")
    parser.add_argument("--verbose", action="store_true", help="print every error")
    options = parser.parse_args()
    cases = range(options.cases) if options.case is None else range(options.case, options.case + 1)
    start, outcomes = time.perf_counter(), []
    for outcome in run(cases, options.seed, options.folder.absolute()):
        outcomes.append(outcome)
        if outcome.kind == "other" or options.verbose or options.case is not None:
            print(
                f"seed {options.seed} case {outcome.case} {outcome.target}: {outcome.kind}: {outcome.text}", flush=True
            )
    print(summary(outcomes))
    slowest = max(outcomes, key=lambda one: one.seconds)
    print(f"{time.perf_counter() - start:.0f} s; the slowest, case {slowest.case}, took {slowest.seconds:.1f} s")
    return any(outcome.kind == "other" for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
