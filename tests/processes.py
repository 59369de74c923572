"""The recipes as a user runs them: real processes."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = (
    "algorithm.hidden_dims=[16,16]",
    "algorithm.batch_size=32",
    "train.compile=false",
    "train.device=cpu",
    "train.log_interval=10",
    "eval.episodes=2",
    "eval.interval=20",
    "checkpoint.interval=20",
)


def start(recipe, *arguments, cwd):
    command = [sys.executable, str(ROOT / "recipes" / recipe), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, timeout=300):
    out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def run(recipe, *arguments, cwd):
    code, out, error = finish(start(recipe, *arguments, cwd=cwd))
    assert code == 0, f"{out}\n{error}"
    return out


def refused(recipe, *arguments, cwd):
    code, out, error = finish(start(recipe, *arguments, cwd=cwd))
    assert code == 2, f"{code}\n{out}\n{error}"
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    return lines[0]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def wait_for_rows(path, count, timeout=240):
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        if path.exists() and len(path.read_text().splitlines()) > count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not get {count} rows in {timeout} s")
