"""Aggregates over tasks and seeds, with stratified bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264).

The definitions are those of rliable 1.2.0, against which the tests compare them. It is not used itself: it needs pandas
and statsmodels, an older pandas than the newest, and as many runs of every task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Scores of the runs of each task; tasks may have different numbers of runs.
Scores = Sequence[np.ndarray]
_RESAMPLES = 2000
_SEED = 0


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
