"""Where the time went, which versions ran, and the table at the end."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.reporting.run_folder import Records
from iql_torchrl.reporting.score_table import of_seeds
from iql_torchrl.reporting.statistics import score_statistics
from iql_torchrl.training.step import TrainingStep

_PACKAGES = ("iql_torchrl", "torchrl", "tensordict", "gymnasium", "mujoco", "numpy")
_HELD_OUT = ("validation_log_prob", "validation_td_error")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    # torch's own word: the metadata of some of its wheels do not tell the build.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return found | {package: version(package) for package in _PACKAGES}


def summarise(
    records: Records,
    data: PreparedData,
    step: TrainingStep,
    seconds_by_stage: Mapping[str, float],
    *,
    seeds: Sequence[int],
    warnings: Sequence[str] = (),
    interrupted: str | None = None,
    diverged: Sequence[Mapping[str, Any]] = (),
    online: Mapping[str, Any] | None = None,
    findings: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    judged: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json``: scores, findings, speed, time by stage, versions and the data's fingerprint.

    Of several seeds, ``final_score`` and ``best_score`` are means over those that were evaluated; the scores of each,
    and :func:`iql_torchrl.reporting.statistics.score_statistics` of the final ones, stand beside.

    Args:
        records, data, step: of the run.
        seconds_by_stage: of its stopwatch.
        seeds: of the run.
        warnings: what looked wrong on the way.
        interrupted: the signal that ended it early.
        diverged: of each seed that did: ``seed``, ``step`` and what became of it.
        online: what is to be said of a phase in the environment; the last score before it stands beside.
        findings: of :func:`iql_torchrl.reporting.doctor.diagnose`.
        facts: of :func:`iql_torchrl.reporting.data_facts.data_facts`.
        judged: of each seed, of :func:`iql_torchrl.evaluation.judging.judge_losses`.
    """
    metrics, evaluations = records.metrics(), records.evaluations()
    scores: dict[int, dict[int, float]] = {}  # by step, then seed
    for row in evaluations:
        scores.setdefault(int(row["step"]), {})[int(row["seed"])] = _score(row)
    means = [(statistics.fmean(by_seed.values()), step_) for step_, by_seed in sorted(scores.items())]
    rates = [row["updates_per_second"] for row in metrics if "updates_per_second" in row]
    last = {key: [row[key] for row in _of_last_step(metrics) if key in row] for key in _HELD_OUT}
    successes = [row["success_rate"] for row in _of_last_step(evaluations) if "success_rate" in row]
    several: dict[str, Any] = {}
    if means and len(seeds) > 1:
        final = scores[means[-1][1]]
        several = _by_seed(final, scores) | score_statistics(list(final.values()))
    if online:
        before = [mean for mean, step_ in means if step_ <= online["offline_updates"]]
        online = {"offline_score": before[-1] if before else None, **online}
    held_out = {key: statistics.fmean(values) if values else None for key, values in last.items()}
    # What a sweep maximises. Without a simulator, how well the critics predict what they were not trained on: it ranks
    # critics, and says little of the returns of policies.
    objective, objective_is = (means[-1][0], "final_score") if means else (None, None)
    if not means and (error := held_out["validation_td_error"]) is not None:
        objective, objective_is = -error, "-validation_td_error"
    return {
        "score": data.score_label,
        "final_score": means[-1][0] if means else None,
        "best_score": max(means)[0] if means else None,
        "best_step": max(means)[1] if means else None,
        **several,
        **(online or {}),
        "data_score": data.data_score,
        "score_note": data.note or None,
        "score_references": None if data.environment is None else data.environment.references,
        "remarks": [asdict(remark) for remark in data.remarks],
        "published_name": data.published_name,
        "final_success_rate": statistics.fmean(successes) if successes else None,
        **held_out,
        "objective": objective,
        "objective_is": objective_is,
        "steps": step.count,
        "warnings": list(warnings) or None,
        "findings": list(findings),
        "judged": {str(seed): dict(one) for seed, one in judged.items()} if judged else None,
        "interrupted": interrupted,
        "diverged": list(diverged) or None,
        "seed": seeds[0],
        "num_seeds": len(seeds),
        "steps_per_second": statistics.median(rates) if rates else None,  # of each seed, over the log intervals
        "seconds_by_stage": {stage: round(seconds, 3) for stage, seconds in seconds_by_stage.items()},
        "compiled": step.compiled,
        "products": step.products,
        "stacked_seeds": step.stacked,
        "device": str(step.device),
        "environment": None if data.environment is None else data.environment.name,
        "dataset_fingerprint": data.fingerprint,
        "transitions": len(data.training),
        "data": facts,
        "versions": versions(),
    }


def _score(evaluation: Mapping[str, float]) -> float:
    return evaluation.get("normalized_score", evaluation["episode_return_mean"])


def _of_last_step(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def _by_seed(final: Mapping[int, float], scores: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    best: dict[int, tuple[float, int]] = {}
    for step, by_seed in scores.items():
        for seed, score in by_seed.items():
            best[seed] = max(best.get(seed, (score, step)), (score, step))
    return {
        "final_scores": final,
        "best_scores": {seed: score for seed, (score, _) in best.items()},
        "best_steps": {seed: step for seed, (_, step) in best.items()},
    }


def closing_table(summary: Mapping[str, Any]) -> str:
    """The summary as aligned lines for the terminal; of several seeds, what was evaluated of each."""
    told = {"warnings", "diverged", "findings", "remarks", "score_references"}  # before or after it
    of_each = of_seeds(summary) if "final_scores" in summary else ""
    if of_each:
        told |= {"mean", "mean_interval", "interquartile_mean", "interquartile_mean_interval"}
        told |= {"standard_deviation", "interval_note"}
    shown = {key: value for key, value in summary.items() if key not in told}
    rows = {key: value for key, value in shown.items() if value is not None and not isinstance(value, dict)}
    rows |= {f"seconds: {stage}": seconds for stage, seconds in summary["seconds_by_stage"].items()}
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {_rounded(value)}" for name, value in rows.items()]
    return "\n".join([*lines, *filter(None, [of_each])])


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
