"""One long run, watched from outside: ``python -m soak``, or ``--updates 20000`` for a short one."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from soak.verdict import draw, judge, lines
from soak.watching import watch

FOLDER = Path(tempfile.gettempdir()) / "iql_torchrl-soak"
SETTLED = 10_000  # updates, after which nothing may grow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the run, soak.json and soak.png")
    parser.add_argument("--seconds", type=float, default=2.0, help="between two samples")
    parser.add_argument("overrides", nargs="*", help="further options of the recipe")
    options = parser.parse_args()
    folder = options.folder.absolute()
    found = watch(folder, options.updates, options.seconds, options.overrides)
    quantities = judge(found, settled=SETTLED)
    (folder / "soak.json").write_text(json.dumps({"quantities": quantities, **found}, indent=2) + "\n")
    draw(found, folder / "soak.png", settled=SETTLED)
    print("\n".join(lines(quantities)))
    print(f"{folder / 'soak.json'}, {folder / 'soak.png'}")
    # A busy machine slows a run down: the speed is told, and fails nothing.
    return 1 if any(not one["passed"] for name, one in quantities.items() if name != "updates per second") else 0


if __name__ == "__main__":
    sys.exit(main())
