"""Where the time went, which versions ran, and the table at the end."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from iql_torchrl.experiment import PreparedData
from iql_torchrl.reporting.run_folder import RunFolder
from iql_torchrl.training import TrainingStep

_PACKAGES = ("iql_torchrl", "torch", "torchrl", "tensordict", "gymnasium", "mujoco", "numpy")


class Stopwatch:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = version(package)
    return found


def summarise(
    run: RunFolder, data: PreparedData, step: TrainingStep, stopwatch: Stopwatch, *, seed: int
) -> dict[str, Any]:
    """The content of ``summary.json``: scores, speed, time by stage, versions and the data's fingerprint."""
    metrics, evaluations = run.metrics(), run.evaluations()
    scores = [(data.score(row["episode_return_mean"]), int(row["step"])) for row in evaluations]
    rates = sorted(row["updates_per_second"] for row in metrics if "updates_per_second" in row)
    last = metrics[-1] if metrics else {}
    return {
        "score": data.score_label,
        "final_score": scores[-1][0] if scores else None,
        "best_score": max(scores)[0] if scores else None,
        "best_step": max(scores)[1] if scores else None,
        "data_score": data.score(float(data.returns.mean())),
        "validation_log_prob": last.get("validation_log_prob"),
        "validation_td_error": last.get("validation_td_error"),
        "steps": step.count,
        "seed": seed,
        "steps_per_second": rates[len(rates) // 2] if rates else None,  # median over the log intervals
        "seconds_by_stage": {stage: round(seconds, 3) for stage, seconds in stopwatch.seconds.items()},
        "compiled": step.compiled,
        "device": str(step.device),
        "environment": data.environment,
        "dataset_fingerprint": data.fingerprint,
        "transitions": len(data.training),
        "versions": versions(),
    }


def closing_table(summary: Mapping[str, Any]) -> str:
    """The summary as aligned lines for the terminal."""
    rows = {key: value for key, value in summary.items() if value is not None and not isinstance(value, dict)}
    rows |= {f"seconds: {stage}": seconds for stage, seconds in summary["seconds_by_stage"].items()}
    width = max(map(len, rows))
    return "\n".join(
        f"  {name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in rows.items()
    )
