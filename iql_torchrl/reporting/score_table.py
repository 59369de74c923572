"""Scores of several seeds and of the jobs of a sweep, as lines for the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iql_torchrl.reporting.statistics import on_few_seeds

# Digits of the largest number of a table; the others have as many decimals.
_DIGITS = 4
_WIDTH = 100
_INTERVAL = "95% interval"


def of_seeds(summary: Mapping[str, Any]) -> str:
    """A line for each seed of a ``summary.json``, and their statistics below.

    Args:
        summary: of several seeds, of which one at least was evaluated.
    """
    final, best, steps = (summary[key] for key in ("final_scores", "best_scores", "best_steps"))
    diverged = {one["seed"]: f"diverged at step {one['step']:,}" for one in summary["diverged"] or []}
    number = _like([*final.values(), *best.values()])
    rows = [("seed", "final score", "best score", "at step", "")]
    for seed in range(summary["seed"], summary["seed"] + summary["num_seeds"]):
        cells = (number(final.get(seed)), number(best.get(seed)), f"{steps[seed]:,}" if seed in steps else "-")
        rows.append((str(seed), *cells, diverged.get(seed, "")))
    for key in ("mean", "interquartile_mean"):
        rows.append(
            (key.replace("_", " "), number(summary[key]), "", "", _interval(summary[f"{key}_interval"], number))
        )
    rows.insert(-1, ("standard deviation", number(summary["standard_deviation"]), "", "", ""))
    return "\n".join([*_aligned(rows), *_wrapped(summary["interval_note"])])


def of_jobs(jobs: Sequence[Mapping[str, Any]], names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each job of a sweep, and, where some differ in their seed alone, one for all of these.

    Args:
        jobs: of ``sweep.json``.
        names: of the jobs, by the options in which they differ.
        groups: of ``sweep.json``.
    """
    number = _like([one["objective"] for one in jobs if one["objective"] is not None])
    rows: list[Sequence[str]] = [("run", "status", _measure(jobs), "folder", "")]
    for job, name in zip(jobs, names, strict=True):
        reason = "".join((job["reason"] or "").splitlines()[:1])
        rows.append((name, job["status"], number(job["objective"]), str(job["job"]), reason))
    lines = _aligned(rows)
    if all(len(one["jobs"]) < 2 and len(one["scores"]) < 2 for one in groups):
        return lines
    number = _like([score for one in groups for score in one["scores"]])
    rows = [("over seeds", "scores", "mean", "std", "interquartile mean", f"its {_INTERVAL}")]
    for one in groups:
        rows.append(
            (
                named(one["options"]) or "all runs",
                str(len(one["scores"])),
                *(number(one.get(key)) for key in ("mean", "standard_deviation", "interquartile_mean")),
                _without_results(one["counts"], _interval(one.get("interquartile_mean_interval"), number, "")),
            )
        )
    fewest = min((len(one["scores"]) for one in groups if len(one["scores"]) > 1), default=None)
    return [*lines, *_aligned(rows), *_wrapped(None if fewest is None else on_few_seeds(fewest))]


def named(options: Mapping[str, str]) -> str:
    """Options as on the command line."""
    return " ".join(f"{key}={value}" for key, value in options.items())


def _measure(jobs: Sequence[Mapping[str, Any]]) -> str:
    found = {str(one["objective_is"]).replace("_", " ") for one in jobs if one["objective_is"] is not None}
    return found.pop() if len(found) == 1 else "objective"


def _without_results(counts: Mapping[str, int], interval: str) -> str:
    others = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "finished")
    return ", ".join(filter(None, (interval, others)))


def _interval(found: Sequence[float] | None, number: Callable[[float | None], str], name: str = _INTERVAL) -> str:
    return "" if found is None else f"{name} {' to '.join(map(number, found))}".strip()


def _like(values: Sequence[float]) -> Callable[[float | None], str]:
    """A format in which the largest of the values has four digits, and at least one decimal."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    decimals = min(max(_DIGITS - 1 - math.floor(math.log10(largest)), 1), 2 * _DIGITS) if largest else 1
    return lambda value: "-" if value is None else f"{value:,.{decimals}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Numbers to the right; the first and the last column, which are words, to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells, last in rows:
        middle = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
        lines.append("  " + "  ".join((first.ljust(widths[0]), *middle, last)).rstrip())
    return lines


def _wrapped(note: str | None) -> list[str]:
    return textwrap.wrap(note or "", _WIDTH, initial_indent="  ", subsequent_indent="  ")
