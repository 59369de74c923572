"""The pictures of a report, as PNG; on white, which the page turns over where it is dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from iql_torchrl.reporting.report.comparison import Comparison, Task
from iql_torchrl.reporting.report.gathering import ReportedRun
from iql_torchrl.reporting.statistics import (
    interquartile_mean,
    probability_of_improvement,
    share_above,
    stratified_interval,
)

# More tasks are in the tables, and more sets of options than lines can be told apart.
MOST_TASKS = 16
MOST_NAMES = 8
# Narrow, so that the letters can be read on a phone.
_WIDTH = 5.2


def draw(comparison: Comparison) -> dict[str, tuple[str, bytes]]:
    """Title and PNG of every picture, by the name of its file, in the order of the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: dict[str, tuple[str, bytes]] = {}

    def save(name: str, title: str, figure: Any) -> None:
        picture = io.BytesIO()
        figure.savefig(picture, dpi=140, format="png", facecolor="white")
        plt.close(figure)
        found[name] = (title, picture.getvalue())

    names = [name for name in best_first(comparison) if comparison.over(name)]
    if names:
        save("intervals.png", "Interquartile mean, 95% intervals", _intervals(plt, comparison, names))
        save("profiles.png", "Performance profiles", _profiles(plt, comparison, names[:MOST_NAMES]))
        if len(names) > 1 and comparison.common:
            title = "Probability of improvement, 95% intervals"
            save("improvement.png", title, _improvement(plt, comparison, names[:MOST_NAMES]))
    for label, task in list(comparison.tasks.items())[:MOST_TASKS]:
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-")
        save(f"curves-{slug}.png", label, _curves(plt, comparison, task))
    return found


def best_first(comparison: Comparison) -> list[str]:
    """The names of the sets of options by their interquartile mean, those without one last, as in the table."""

    def key(name: str) -> float:
        tasks = comparison.over(name)
        if not tasks:
            return np.inf
        return -float(interquartile_mean(np.concatenate([comparison.scores(label, name) for label in tasks])))

    return sorted(comparison.names, key=key)


def _scores(comparison: Comparison, name: str) -> list[np.ndarray]:
    return [comparison.scores(label, name) for label in comparison.over(name)]


def _intervals(plt: Any, comparison: Comparison, names: Sequence[str]) -> Any:
    shown = names[: 3 * MOST_NAMES]
    figure, axis = plt.subplots(figsize=(_WIDTH, 1.2 + 0.35 * len(shown)), layout="constrained")
    for place, name in enumerate(shown):
        middle, low, high = stratified_interval(_scores(comparison, name), interquartile_mean)
        axis.barh(place, high - low, left=low, height=0.5, color="tab:blue", alpha=0.35)
        axis.plot([middle, middle], [place - 0.25, place + 0.25], color="tab:blue", linewidth=2)
    axis.set_yticks(range(len(shown)), [_short(name) for name in shown])
    axis.invert_yaxis()
    axis.set_xlabel("normalised scores")
    axis.grid(alpha=0.3, axis="x")
    return figure


def _profiles(plt: Any, comparison: Comparison, names: Sequence[str]) -> Any:
    everything = np.concatenate([one for name in names for one in _scores(comparison, name)])
    low, high = everything.min(), everything.max()
    room = max(0.05 * (high - low), 1.0)
    levels = np.linspace(low - room, high + room, 101)
    figure, axis = plt.subplots(figsize=(_WIDTH, 3.4), layout="constrained")
    for name in names:
        middle, lower, upper = stratified_interval(_scores(comparison, name), share_above(levels))
        (line,) = axis.plot(levels, middle, label=_short(name))
        axis.fill_between(levels, lower, upper, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel="normalised score", ylabel="share of the runs above it", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def _improvement(plt: Any, comparison: Comparison, names: Sequence[str]) -> Any:
    pairs = [(one, other) for place, one in enumerate(names) for other in names[place + 1 :]]
    if len(pairs) > 2 * MOST_NAMES:  # each against the best
        pairs = [(names[0], other) for other in names[1:]]
    figure, axis = plt.subplots(figsize=(_WIDTH, 1.2 + 0.5 * len(pairs)), layout="constrained")
    for place, (one, other) in enumerate(pairs):
        ours, others = (_scores(comparison, name) for name in (one, other))
        middle, low, high = probability_of_improvement(ours, others)
        axis.barh(place, high - low, left=low, height=0.4, color="tab:green", alpha=0.35)
        axis.plot([middle, middle], [place - 0.2, place + 0.2], color="tab:green", linewidth=2)
    axis.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(pairs)), [f"{_short(one)}\n> {_short(other)}" for one, other in pairs], fontsize="small")
    axis.invert_yaxis()
    axis.set(xlabel="probability", xlim=(-0.02, 1.02))
    axis.grid(alpha=0.3, axis="x")
    return figure


def _curves(plt: Any, comparison: Comparison, task: Task) -> Any:
    figure, axis = plt.subplots(figsize=(_WIDTH, 3.4), layout="constrained")
    names = [name for name in comparison.names if len(comparison.scores(task.label, name))]
    best = sorted(names, key=lambda name: -comparison.scores(task.label, name).mean())[:MOST_NAMES]
    data_scores = set()
    for name in (name for name in names if name in best):
        runs = comparison.cells[task.label, name]
        data_scores |= {run.summary.get("data_score") for run in runs}
        steps, mean, low, high = _band(runs, task)
        marker = "o" if len(steps) < 30 else None
        (line,) = axis.plot(steps, mean, marker=marker, markersize=3, label=_short(name))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for score in data_scores - {None}:
        axis.axhline(score, color="grey", linestyle="--", linewidth=1, label="mean of the data")
    axis.set_title(task.label + (f"\n{task.marks}" if task.marks else ""), fontsize="medium", wrap=True)
    axis.set(xlabel="updates", ylabel=task.unit)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def _band(runs: Sequence[ReportedRun], task: Task) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, and the mean, lowest and highest score of the seeds at each."""
    key = "normalized_score" if task.normalised else "episode_return_mean"
    by_step: dict[float, list[float]] = {}
    for run in runs:
        for row in run.evaluations:
            if key in row and int(row["seed"]) in run.scores:
                by_step.setdefault(row["step"], []).append(row[key])
    ordered = dict(sorted(by_step.items()))
    values = ordered.values()
    return list(ordered), [fmean(one) for one in values], [min(one) for one in values], [max(one) for one in values]


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:45]}..."
