"""Damaged and forged files end in a result or in one clear error; ``make fuzz`` has ten times as many of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_damaged_file_ends_in_a_result_or_in_one_clear_error(tmp_path):
    # A process without a thread, which the cases are forked off.
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--cases", "306", "--seed", "0", "--folder", tmp_path / "fuzz"],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5000:]}"
    counts = dict(zip(("ok", "clear", "other"), map(int, done.stdout.splitlines()[-2].split()[1:]), strict=True))
    assert counts["other"] == 0 and counts["ok"] + counts["clear"] == 306
    assert counts["clear"] > 100 and counts["ok"] > 10  # the damage does damage, and not always
