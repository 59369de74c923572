"""Runs that are killed, starved and lied to end as if nothing had happened; ``make faults`` has ten times as many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    [("kills", 3), ("kills online", 2), ("checkpoint cut", 4), ("read-only folder", 3), ("simulator lost", 1)],
)
def test_a_run_that_something_happens_to_ends_as_the_one_that_nothing_happens_to(kind, count, tmp_path):
    # A process without a thread, which the runs are forked off.
    done = subprocess.run(
        [sys.executable, "-m", "faults", kind, "--cases", str(count), "--folder", tmp_path],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-10_000:]}\n{done.stderr[-5000:]}"
    row = done.stdout.splitlines()[-2]
    if "skipped" in row:
        pytest.skip(row)
    assert row.split()[-2:] == [str(count)] * 2
