"""Scores of seeds, and aggregates over tasks, with bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264).

The definitions are those of rliable 1.2.0, against which the tests compare them. It is not used itself: it needs pandas
and statsmodels, an older pandas than the newest, and as many runs of every task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Scores of the runs of each task; tasks may have different numbers of runs.
Scores = Sequence[np.ndarray]
_RESAMPLES = 2000
_SEED = 0
# Intervals over fewer scores are none.
_FEWEST = 5


def scores_by_seed(summary: Mapping[str, Any]) -> dict[int, float]:
    """The final scores of a ``summary.json``, without the seeds that diverged; empty where nothing was evaluated."""
    final = summary.get("final_score")
    by_seed = summary.get("final_scores") or ({summary["seed"]: final} if final is not None else {})
    diverged = {int(one["seed"]) for one in summary.get("diverged") or []}
    found = {int(seed): float(score) for seed, score in by_seed.items() if score is not None}
    return {seed: score for seed, score in found.items() if seed not in diverged}


def score_statistics(scores: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """What is said of the scores of several seeds.

    Args:
        scores: one at least.

    Returns:
        ``mean`` and ``interquartile_mean``, each with its 95% percentile-bootstrap ``*_interval``,
        ``standard_deviation`` (n - 1), and ``interval_note`` of :func:`on_few_seeds`. Of one score there are no
        intervals and no deviation: ``None``.
    """
    found: dict[str, Any] = {}
    of_task = np.asarray(scores, dtype=float)
    for name, statistic in (("mean", _mean), ("interquartile_mean", interquartile_mean)):
        point, low, high = stratified_interval([of_task], statistic)
        found[name] = float(point)
        found[f"{name}_interval"] = [float(low), float(high)] if len(scores) > 1 else None
    return found | {"standard_deviation": standard_deviation(of_task), "interval_note": on_few_seeds(len(scores))}


def on_few_seeds(count: int) -> str | None:
    """What a bootstrap interval over so few seeds is worth, in words; ``None`` where there are enough."""
    if count >= _FEWEST:
        return None
    if count == 1:
        return "Nothing tells how sure the score of one seed is."
    number = {2: "two", 3: "three", 4: "four"}[count]
    return (
        f"A 95% interval over {number} seeds is not one: resamples of {number} scores reach no further than these, so "
        "that the true mean lies outside far more often than one time in twenty."
    )


def standard_deviation(scores: np.ndarray) -> float | None:
    """With n - 1, which one score has not."""
    return float(scores.std(ddof=1)) if len(scores) > 1 else None


def _mean(scores: np.ndarray) -> np.ndarray:
    return scores.mean(-1)


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the last axis, ``[..., N]`` to ``[...]``."""
    ordered = np.sort(scores, axis=-1)
    count = ordered.shape[-1]
    cut = int(0.25 * count)
    return ordered[..., cut : count - cut].mean(-1)


def share_above(levels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The performance profile: of scores ``[..., N]``, the share above each level, ``[..., levels]``."""

    def profile(scores: np.ndarray) -> np.ndarray:
        ordered = np.sort(scores, axis=-1).reshape(-1, scores.shape[-1])
        found = np.stack([1 - np.searchsorted(one, levels, side="right") / len(one) for one in ordered])
        return found.reshape(*scores.shape[:-1], len(levels))

    return profile


def stratified_interval(
    scores: Scores, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = _RESAMPLES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic over all runs, and its 95% percentile interval over resamples of the runs within each task.

    Args:
        scores: of each task.
        statistic: of ``[..., N]``.
        resamples: how many.

    Returns:
        the statistic, the lower and the upper bound.
    """
    random = np.random.default_rng(_SEED)
    drawn = np.concatenate([task[random.integers(len(task), size=(resamples, len(task)))] for task in scores], axis=1)
    low, high = np.percentile(statistic(drawn), (2.5, 97.5), axis=0)
    return statistic(np.concatenate(scores)), low, high


def probability_of_improvement(ours: Scores, others: Scores, resamples: int = _RESAMPLES) -> tuple[float, float, float]:
    """How probably a run of the first is better than one of the second on a task drawn at random, with its interval.

    Args:
        ours, others: of the same tasks; a tie counts as half.
        resamples: of both, independently, within each task.

    Returns:
        the probability, the lower and the upper bound.
    """
    random = np.random.default_rng(_SEED)
    point, drawn = 0.0, np.zeros(resamples)
    for one, other in zip(ours, others, strict=True):
        better = (one[:, None] > other) + 0.5 * (one[:, None] == other)
        rows = random.integers(len(one), size=(resamples, len(one), 1))
        columns = random.integers(len(other), size=(resamples, 1, len(other)))
        point += better.mean() / len(ours)
        drawn += better[rows, columns].mean((1, 2)) / len(ours)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(point), float(low), float(high)
