"""How well estimates of policies agree with what the policies are worth, as DOPE measures it (arXiv 2103.16596)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_RESAMPLES = 2000


def spearman(estimates: Sequence[float], truths: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where either are all the same."""
    from scipy.stats import rankdata

    one, other = rankdata(estimates), rankdata(truths)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def regret_at(k: int, estimates: Sequence[float], truths: Sequence[float]) -> float:
    """What the best of the ``k`` policies with the highest estimates lacks to the best of all.

    In units of the range of true values: 0 is the best, 1 the worst that can be.
    """
    true = np.asarray(truths)
    chosen = np.argsort(-np.asarray(estimates), kind="stable")[:k]
    return float((true.max() - true[chosen].max()) / (np.ptp(true) or 1.0))


def normalised_absolute_error(estimates: Sequence[float], truths: Sequence[float]) -> float:
    """Mean absolute error, in units of the range of true values."""
    true = np.asarray(truths)
    return float(np.abs(np.asarray(estimates) - true).mean() / (np.ptp(true) or 1.0))


def agreement(estimates: Sequence[float], truths: Sequence[float], *, comparable: bool) -> Mapping[str, float | None]:
    """All of them, and a 95% percentile-bootstrap interval over the policies for the correlation.

    Args:
        estimates: of each policy; a higher one says that it is better.
        truths: what each is worth.
        comparable: whether estimates are of the same kind as the truths, so that their difference is an error.
    """
    draws = np.random.default_rng(0).integers(len(truths), size=(_RESAMPLES, len(truths)))
    estimated, true = np.asarray(estimates), np.asarray(truths)
    resampled = [spearman(estimated[one].tolist(), true[one].tolist()) for one in draws]
    low, high = np.nanpercentile(resampled, [2.5, 97.5]) if np.isfinite(resampled).any() else (np.nan, np.nan)
    return {
        "policies": len(truths),
        "spearman": spearman(estimates, truths),
        "spearman_low": float(low),
        "spearman_high": float(high),
        "regret_at_1": regret_at(1, estimates, truths),
        "regret_at_5": regret_at(5, estimates, truths),
        "normalised_absolute_error": normalised_absolute_error(estimates, truths) if comparable else None,
    }
