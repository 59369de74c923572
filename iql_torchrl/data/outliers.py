"""Numbers far outside all others: sentinels and slips that are finite, and so pass every other check.

A number is called an outlier where two things hold, each of which spares healthy data that the other does not:

- It is further from the median than a large multiple of the range that holds 90% of the numbers. That range does not
  follow the outliers, up to one number in twenty on either side. It counts as 1 where it is smaller: bonuses, flags and
  slips of a resting sensor are small, whatever they are a multiple of. Where it is 0, most numbers are the same one,
  and the median distance of the others counts: rewards of 0 and a rare 1 have no outlier, a 1e9 among them is one.
- No number lies between it and the others: it is 30 times further from the median than the furthest of them. Contact
  forces and velocities have long tails, and no such gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from iql_torchrl.data.log import pieces

# Times the range of 90%. Rewards and observations may have long tails; actions hardly, as the bounds of an action space
# are near what is used of it, and one number beyond them stretches the bounds that are taken from the data.
FACTORS = {"reward": 1000.0, "observation": 1000.0, "action": 50.0}
# Normalised scores that no episode of an environment with references has. The best policies reach 200, or 410 in Adroit
# pen, whose episodes are twice as long as D4RL's; running backwards as fast as they run forwards is about -140 in Ant
# and HalfCheetah.
SCORES = (-200.0, 500.0)
_GAP = 30.0
_SAMPLE = 10_000
# Numbers of a row that is compared at once, and so many such rows.
_WIDTH = 4096
_IN_CACHE = 32
# Fewer say nothing about what is usual.
_FEWEST = 20
# Of the distance of the rare numbers among equal ones, which may all be sentinels.
_LARGEST_RARE = 1e3

# Gives the rows of a column in pieces ``[rows, size]``, each with the number of its first row, as often as asked for.
Pieces = Callable[[], Iterable[tuple[int, np.ndarray]]]


@dataclass(frozen=True)
class Outliers:
    """Of one dimension: the rows, ascending, and their values; the range of the other numbers, and of 90% of all."""

    dimension: int
    rows: np.ndarray
    values: np.ndarray
    others: tuple[float, float]
    usual: tuple[float, float]


def outliers_of(kind: str, column: np.ndarray) -> list[Outliers]:
    """The outliers of an array ``[rows, size]`` of one of the kinds of :data:`FACTORS`."""
    # The extremes of all dimensions together cost a fraction of those of each, and mostly tell enough.
    together = [(piece.min(), piece.max()) for _, piece in pieces(column)]
    if float(max(high for _, high in together)) - float(min(low for low, _ in together)) <= FACTORS[kind]:
        return []
    return find_outliers(kind, lambda: pieces(column), len(column), *_extremes(column))


def _extremes(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest number of each dimension.

    NumPy compares rows, long ones fifteen times faster than short ones: many of the column's make one here.
    """
    size = column.shape[1]
    low, high = column[0].copy(), column[0].copy()
    for _, piece in pieces(column):
        joined = max(1, min(_WIDTH // size, len(piece)))
        whole = len(piece) - len(piece) % joined
        wide = piece[:whole].reshape(-1, joined * size)
        for start in range(0, len(wide), _IN_CACHE):
            part = wide[start : start + _IN_CACHE]
            np.minimum(low, part.min(0).reshape(joined, size).min(0), out=low)
            np.maximum(high, part.max(0).reshape(joined, size).max(0), out=high)
        if whole < len(piece):
            np.minimum(low, piece[whole:].min(0), out=low)
            np.maximum(high, piece[whole:].max(0), out=high)
    return low, high


def find_outliers(kind: str, read: Pieces, total: int, low: np.ndarray, high: np.ndarray) -> list[Outliers]:
    """The outliers of a column, a dimension each. What cannot have any by its range is not read.

    Args:
        kind: of :data:`FACTORS`.
        read: the column.
        total: rows of the column.
        low, high: the least and the largest number of each dimension, ``[size]``.
    """
    factor = FACTORS[kind]
    low, high = low.astype(np.float64), high.astype(np.float64)
    # The furthest number is no further from the median than this.
    suspects = np.flatnonzero(high - low > factor)
    if not len(suspects) or total < _FEWEST:
        return []
    stride = max(1, total // _SAMPLE)
    sample = np.concatenate([piece[-start % stride :: stride, suspects].astype(np.float64) for start, piece in read()])
    # Numbers that occur, so that the median of numbers that are nearly all the same is that one.
    last = len(sample) - 1
    ranks = [int(np.ceil(0.05 * last)), last // 2, int(0.95 * last)]
    bottom, median, top = np.partition(sample, ranks, axis=0)[ranks]
    spread = top - bottom
    limit = np.where(spread > 0, factor * np.maximum(spread, 1.0), 0.0)
    further = np.maximum(median - low[suspects], high[suspects] - median) > np.maximum(limit, factor)
    if not further.any():
        return []
    suspects, limit = suspects[further], limit[further]
    bottom, median, top = bottom[further], median[further], top[further]
    # The range of the numbers within the limits, and the rows and numbers beyond them.
    least, most = median.copy(), median.copy()
    beyond: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in suspects]
    for start, piece in read():
        numbers = piece[:, suspects].astype(np.float64)
        far = np.abs(numbers - median) > limit
        for index in np.flatnonzero(far.any(0)):
            rows = np.flatnonzero(far[:, index])
            beyond[index].append((start + rows, numbers[rows, index]))
        numbers = np.where(far, median, numbers)
        least, most = np.minimum(least, numbers.min(0)), np.maximum(most, numbers.max(0))
    outliers = []
    for index, dimension in enumerate(suspects):
        if not beyond[index]:
            continue
        rows, values = (np.concatenate(parts) for parts in zip(*beyond[index], strict=True))
        distance = np.abs(values - median[index])
        cut = limit[index] or factor * float(np.clip(np.median(distance), 1.0, _LARGEST_RARE))
        within = max(median[index] - least[index], most[index] - median[index])
        chosen = distance >= _first_after_gap(distance, within, cut)
        if chosen.any():
            known = np.concatenate([values[~chosen], [least[index], most[index]]])
            others = (float(known.min()), float(known.max()))
            usual = (float(bottom[index]), float(top[index]))
            outliers.append(Outliers(int(dimension), rows[chosen], values[chosen], others, usual))
    return outliers


def _first_after_gap(distance: np.ndarray, within: float, cut: float) -> float:
    """The least distance beyond the cut that is ``_GAP`` times the next smaller one; infinity where none is."""
    ordered = np.sort(distance[distance > cut])
    smaller = distance[distance <= cut]
    base = max(within, float(smaller.max()) if len(smaller) else 0.0)
    alone = np.flatnonzero(ordered > _GAP * np.append(base, ordered[:-1]))
    return float(ordered[alone[0]]) if len(alone) else np.inf


def sentence(kind: str, found: Sequence[Outliers], total: int, unit: str) -> str:
    """The outliers of a column in words, with the first one's row and value, and the share of the rows.

    Args:
        kind: of :data:`FACTORS`.
        found: of :func:`find_outliers`, at least one.
        total: rows of the column.
        unit: what a row is.
    """
    rows = rows_of(found)
    first = min(found, key=lambda one: one.rows[0])
    several = len(found) > 1 or kind != "reward"
    where = f" in {unit} {first.rows[0]}" + (f", dimension {first.dimension}," if several else ",")
    more = [str(one.dimension) for one in found if one is not first]
    others = f" (outliers in dimension{'s' * (len(more) > 1)} {_some(more)} too)" if more else ""
    verb = "has an" if len(rows) == 1 else "have an"
    return (
        f"{len(rows):,} {unit}{'s' * (len(rows) > 1)} ({100 * len(rows) / total:.3g}%) {verb} outlying {kind}: "
        f"{first.values[0]:g}{where} where 90% lie in [{first.usual[0]:g}, {first.usual[1]:g}] and all others in "
        f"[{first.others[0]:g}, {first.others[1]:g}]{others}; {_ADVICE[kind]}"
    )


_ADVICE = {
    "reward": "one such number outweighs all rewards, in Q as in the return range that scales them; repair or remove "
    "it",
    "observation": "a sentinel or a slip, which the networks take for a state; repair or remove it",
    "action": "a sentinel or a slip, which leaves the others close together where bounds come from the data; repair or "
    "remove it",
}


def rows_of(found: Sequence[Outliers]) -> np.ndarray:
    """The rows of all dimensions' outliers, ascending, each once."""
    return np.unique(np.concatenate([one.rows for one in found])) if found else np.empty(0, int)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def far_from_references(returns: np.ndarray, score: Callable[[float], float | None]) -> np.ndarray:
    """The episodes whose normalised score is none that a policy can have, ascending; none without references.

    Args:
        returns: of the episodes.
        score: the normalised score of a return, ``None`` where there is none.
    """
    zero, one = score(0.0), score(1.0)  # it is linear
    if zero is None or one is None:
        return np.empty(0, int)
    scores = zero + (one - zero) * returns.astype(np.float64)
    return np.flatnonzero((scores < SCORES[0]) | (scores > SCORES[1]))


def sentence_on_returns(
    far: np.ndarray, returns: np.ndarray, score: Callable[[float], float | None], row: int, unit: str
) -> str:
    """The episodes of :func:`far_from_references` in words; ``row`` is the first one's first."""
    value, count = float(returns[far[0]]), len(far)
    who = f"{count:,} episode{'s have returns' if count > 1 else ' has a return'}"
    return (
        f"{who} far from the environment's reference scores ({100 * count / len(returns):.3g}% of the episodes): "
        f"{value:g}, a normalised score of {score(value):.4g}, in the one that starts in {unit} {row}; no policy has "
        f"scores outside [{SCORES[0]:g}, {SCORES[1]:g}]: the rewards are in another unit or hold a sentinel, or the "
        "data are of another environment"
    )
