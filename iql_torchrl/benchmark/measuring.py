"""Timing rows side by side, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

from iql_torchrl.benchmark.case import Case, Row
from iql_torchrl.benchmark.limit import MatrixProducts
from iql_torchrl.benchmark.timing import milliseconds
from iql_torchrl.errors import LONGEST_REASON, first_line
from iql_torchrl.running.options import UpdateOptions
from iql_torchrl.training.step import TrainingStep

Plan = Sequence[tuple[Case, Sequence[Row]]]


def measure(plan: Plan, options: UpdateOptions) -> list[dict[str, Any]]:
    """Time the rows of each case in interleaved rounds, after the first calls, whose time is apart, and a warm-up.

    Returns:
        For each row the median and quartiles over rounds of its milliseconds, of its time over that of the matrix
        products of its order (``times_limit``), and of how often the time of the case's first row, where that is
        TorchRL's, holds its own (``times_as_fast_as_torchrl``), both round by round; of ours, whose ``products`` they
        are. A row that cannot be built or run has ``failed``, the reason, instead.
    """
    total = sum(options.rounds + _weight(row) for _, rows in plan for row in rows)
    results = []
    with tqdm(total=total, unit="round", smoothing=0.02) as bar:
        for case, rows in plan:
            results += _measure_case(case, rows, options, bar)
            # Compiled functions of the case are not needed any more, and the compiler gives up on a function of which
            # it has compiled several versions.
            torch.compiler.reset()
    return results


def _weight(row: Row) -> int:
    """About how many rounds the first call takes as long as, for the bar's estimate."""
    return 50 if row.mode in ("compiled", "CUDA graph") else 1


def _measure_case(case: Case, rows: Sequence[Row], options: UpdateOptions, bar: tqdm[Any]) -> list[dict[str, Any]]:
    calls: dict[Row, Callable[[], object]] = {}
    first: dict[Row, float] = {}
    failed: dict[Row, str] = {}
    times: dict[Row, list[float]] = {row: [] for row in rows}

    def attempt(row: Row, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a compiler or a library says; the other rows go on
            failed[row] = f"{type(error).__name__}: {first_line(error, LONGEST_REASON)}"
            calls.pop(row, None)

    def count(row: Row, updates: int) -> int:
        return -(-updates // (row.updates * case.slowness))

    for row in rows:
        bar.set_description(f"{case.name}: {row.implementation}, {row.mode}")

        def prepare(row: Row = row) -> None:
            calls[row] = row.build()
            first[row] = milliseconds(calls[row], 1, case.device) / 1e3
            milliseconds(calls[row], count(row, options.warm_up), case.device)

        attempt(row, prepare)
        bar.update(_weight(row) + (options.rounds if row in failed else 0))
    bar.set_description(f"{case.name}: measuring")
    for _ in range(options.rounds):
        for row in list(calls):

            def one_round(row: Row = row) -> None:
                calls[row]()  # not counted: the row before has left its data in the caches
                updates = count(row, options.steps_per_round)
                times[row].append(milliseconds(calls[row], updates, case.device) / row.updates)

            attempt(row, one_round)
            bar.update()
    limits = {row.order: times[row] for row in calls if isinstance(calls[row], MatrixProducts)}
    baseline = times[rows[0]] if rows[0] in calls and rows[0].implementation.startswith("TorchRL") else None
    results = []
    for row in rows:
        result = {"case": case.name, "implementation": row.implementation, "mode": row.mode, "order": row.order}
        if row in failed:
            results.append(result | {"failed": failed[row]})
            continue
        limit = limits.get(row.order)
        results.append(
            result
            | _spread("milliseconds", times[row])
            | {"updates_per_second": 1e3 / statistics.median(times[row]), "first_call_seconds": first[row]}
            | _spread("times_limit", limit and _ratios(times[row], limit))
            | _spread("times_as_fast_as_torchrl", baseline and _ratios(baseline, times[row]))
            | _notes(calls[row], times[row])
        )
    return results


def _ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(times, others, strict=True)]


def _spread(name: str, values: Sequence[float] | None) -> dict[str, Any]:
    """Median and quartiles; of nothing, ``None``."""
    if not values:
        return {f"{name}_median": None, f"{name}_quartiles": None}
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {f"{name}_median": cuts[1], f"{name}_quartiles": [cuts[0], cuts[2]]}


def _notes(call: Callable[[], object], times: Sequence[float]) -> dict[str, Any]:
    """What else there is to say of a row."""
    if isinstance(call, MatrixProducts):
        rate = call.flops / (statistics.median(times) * call.updates / 1e3)
        return {"flops": call.flops // call.updates, "flops_per_second": rate, "share_of_flops": call.shares}
    if isinstance(call, TrainingStep):
        return {"products": call.products} | ({"note": call.compile_note} if call.compile_note else {})
    return {}


def large_product_rate(device: torch.device, precision: str, size: int = 2048) -> float:
    """Floating-point operations a second of a ``size`` x ``size`` product, the median of ten."""
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [milliseconds(lambda: left @ right, 1, device) / 1e3 for _ in range(12)][2:]
    return 2 * size**3 / statistics.median(seconds)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as aligned lines.

    ``x limit`` is a row's time over that of the matrix products of its order, ``x TorchRL`` how many times as fast it
    is as the first row, TorchRL's; both with quartiles.
    """
    lines = [
        f"{'':<42} {'mode':<10} {'ms/update':>9} {'quartiles':>17} {'updates/s':>9} "
        f"{'x limit':>20} {'x TorchRL':>20} {'first s':>7}"
    ]
    for name, rows in groupby(results, key=lambda row: row["case"]):
        lines.append(f"{name}:")
        for row in rows:
            start = f"  {row['implementation']:<40} {row['mode']:<10}"
            if "failed" in row:
                lines.append(f"{start} failed: {row['failed']}")
                continue
            low, high = row["milliseconds_quartiles"]
            lines.append(
                f"{start} {row['milliseconds_median']:>9.3f} {f'{low:.3f} - {high:.3f}':>17} "
                f"{row['updates_per_second']:>9.0f} {_shown(row, 'times_limit'):>20} "
                f"{_shown(row, 'times_as_fast_as_torchrl'):>20} {row['first_call_seconds']:>7.1f}"
            )
    return "\n".join(lines)


def _shown(row: Mapping[str, Any], name: str) -> str:
    if row[f"{name}_median"] is None:
        return "-"
    low, high = row[f"{name}_quartiles"]
    return f"{row[f'{name}_median']:.2f} ({low:.2f} - {high:.2f})"
