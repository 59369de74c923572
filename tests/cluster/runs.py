"""A sweep of short runs, and whether two sweeps have the same results, bit for bit."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
from comparing import rows_without_times, same

RECIPE = Path(__file__).parents[2] / "recipes" / "iql_offline.py"


def command(folder: Path, *options: str, steps: int) -> list[str]:
    """A multirun of the recipe on the embedded dataset, with small networks and a checkpoint every 500 updates."""
    return [
        *(sys.executable, str(RECIPE), "-m", f"run_dir={folder}", f"train.steps={steps}"),
        *("algorithm.hidden_dims=[16,16]", "algorithm.batch_size=32"),
        *("train.device=cpu", "train.compile=false", "train.products=mkl", "train.log_interval=500"),
        *("eval.episodes=2", f"eval.interval={steps}", "checkpoint.interval=500"),
        *options,
    ]


def jobs(folder: Path) -> dict[int, dict[str, Any]]:
    """What each job of a sweep that has begun says of itself: its status, its process."""
    found = {}
    for path in folder.glob("*/job.json"):
        try:
            found[int(path.parent.name)] = json.loads(path.read_text())
        except FileNotFoundError:
            continue
    return found


def under_way(folder: Path, processes: Any) -> int | None:
    """A job that runs in one of the processes and has saved a checkpoint."""
    for number, job in jobs(folder).items():
        checkpoints = folder / str(number) / "checkpoints"
        if job["status"] == "running" and job["process"] in processes and any(checkpoints.glob("step-*.pt")):
            return number
    return None


def faults_of_table(folder: Path, count: int) -> list[str]:
    """What is wrong with the table of a sweep in which every run is to have ended well, and is to be there once."""
    table = json.loads((folder / "sweep.json").read_text())["jobs"]
    with (folder / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    faults = [f"job {job['job']} is {job['status']}: {job['reason']}" for job in table if job["status"] != "finished"]
    for name, rows in (("sweep.json", table), ("sweep.csv", lines)):
        if sorted(int(row["job"]) for row in rows) != list(range(count)):
            faults.append(f"{name} has the jobs {[row['job'] for row in rows]}, and not each of {count} once")
    if len({tuple(job["overrides"]) for job in table}) != count:
        faults.append("two jobs of the table have the same options")
    return faults


def differences(expected: Path, found: Path, count: int) -> list[str]:
    """In what the runs of two sweeps differ: the last checkpoint's state, and every row apart from times."""
    return [
        f"job {number}: {what}"
        for number in range(count)
        for what in _differences(expected / str(number), found / str(number))
    ]


def _differences(expected: Path, found: Path) -> list[str]:
    one, other = (max((folder / "checkpoints").glob("step-*.pt"), default=None) for folder in (expected, found))
    if one is None or other is None or one.name != other.name:
        return [f"its last checkpoint is {other}, and was {one}"]
    states = [torch.load(path, weights_only=True)["training"] for path in (one, other)]
    what = [] if same(*states) else [f"the state in {other} differs from that in {one}"]
    return what + [
        f"{name} differs"
        for name in ("metrics.csv", "eval.csv")
        if rows_without_times(expected / name) != rows_without_times(found / name)
    ]
