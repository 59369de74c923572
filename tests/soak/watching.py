"""A run as a user starts it, and what the kernel tells of its process meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import ROOT, rows


def watch(folder: Path, updates: int, seconds: float, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the recipe on the embedded dataset in ``folder``, which is emptied, and sample its process.

    Returns:
        ``samples``, each with seconds since the start, updates done, resident bytes, threads and open handles;
        ``speed``, the rows' updates per second, each with the updates done.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / "run"
    command = [sys.executable, str(ROOT / "recipes" / "iql_offline.py"), f"train.steps={updates}", f"run_dir={run}"]
    command += ["train.device=cpu", "checkpoint.interval=10000", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    start, samples = time.monotonic(), []
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                sample = _sample(process.pid)
                if sample is not None:
                    done = _updates_done(run / "metrics.csv")
                    samples.append({"seconds": round(time.monotonic() - start, 1), "updates": done, **sample})
                time.sleep(seconds)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise RuntimeError(
            f"the run ended with status {process.returncode}:\n{(folder / 'log.txt').read_text()[-3000:]}"
        )
    # The picture at the end is no update: matplotlib is loaded for it.
    samples = [sample for sample in samples if sample["updates"] < updates]
    speed = [
        {"updates": int(row["step"]), "updates_per_second": float(row["updates_per_second"])}
        for row in rows(run / "metrics.csv")
        if row["updates_per_second"]
    ]
    return {"command": command[1:], "seconds": round(time.monotonic() - start, 1), "samples": samples, "speed": speed}


def _sample(process: int) -> dict[str, int] | None:
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        handles = len(os.listdir(f"/proc/{process}/fd"))
        return {
            "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
            "threads": int(status["Threads"]),
            "handles": handles,
        }
    except (OSError, KeyError):  # it has just ended
        return None


def _updates_done(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    last = metrics.read_text().splitlines()[-1].split(",")[0]
    return int(last) if last.isdigit() else 0
