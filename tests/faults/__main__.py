"""Runs that are killed, starved and lied to: ``python -m faults``, or ``python -m faults kills --cases 3``."""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

from faults.injecting import INJECTIONS
from faults.runs import Skipped

FOLDER = Path(tempfile.gettempdir()) / "iql_torchrl-faults"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(INJECTIONS)}; all where none is named")
    parser.add_argument("--cases", type=int, help="the first so many of each kind")
    parser.add_argument("--case", type=int, help="this one alone of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps the files of what went wrong")
    options = parser.parse_args()
    for kind in options.kinds:
        if kind not in INJECTIONS:
            parser.error(f"unknown kind {kind}; known: {', '.join(INJECTIONS)}")
    start, injected, survived, skipped = time.monotonic(), collections.Counter(), collections.Counter(), {}
    for kind in options.kinds or INJECTIONS:
        inject, count = INJECTIONS[kind]
        cases = range(count if options.cases is None else min(options.cases, count))
        for case in cases if options.case is None else [options.case]:
            begun = time.monotonic()
            try:
                what = inject(options.folder.absolute(), case, options.seed)
            except Skipped as reason:
                skipped[kind] = str(reason)
                break
            except AssertionError as error:
                injected[kind] += 1
                print(f"seed {options.seed} {kind} case {case}: NOT SURVIVED: {error}", flush=True)
                continue
            injected[kind] += 1
            survived[kind] += 1
            print(f"seed {options.seed} {kind} case {case}: {what} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{'fault':20}{'injected':>10}{'survived':>10}")
    for kind in options.kinds or INJECTIONS:
        note = f"  skipped: {skipped[kind]}" if kind in skipped else ""
        print(f"{kind:20}{injected[kind]:10}{survived[kind]:10}{note}")
    print(f"{time.monotonic() - start:.0f} s")
    return int(injected != survived)


if __name__ == "__main__":
    sys.exit(main())
