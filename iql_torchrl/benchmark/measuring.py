"""Timing rows side by side, and their table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from iql_torchrl.benchmark.rows import Row, dtype_of
from iql_torchrl.running.options import UpdateOptions


def measure(rows: Sequence[Row], options: UpdateOptions, device: torch.device) -> list[dict[str, Any]]:
    """Time all rows in interleaved rounds, after the first calls, whose time is apart, and a warm-up."""
    first = []
    for row in tqdm(rows, desc="compile and warm up", unit="row"):
        first.append(milliseconds(row.call, 1, device) / 1e3)
        milliseconds(row.call, -(-options.warm_up // row.updates), device)
    times: list[list[float]] = [[] for _ in rows]
    for _ in tqdm(range(options.rounds), desc="measure", unit="round"):
        for row, values in zip(rows, times, strict=True):
            calls = -(-options.steps_per_round // row.updates)
            values.append(milliseconds(row.call, calls, device) / row.updates)
    results = []
    for row, values, seconds in zip(rows, times, first, strict=True):
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        results.append(
            {
                "implementation": row.implementation,
                "mode": row.mode,
                "milliseconds_median": median,
                "milliseconds_quartiles": [low, high],
                "updates_per_second": 1e3 / median,
                "first_call_seconds": seconds,
            }
        )
    return results


def milliseconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Mean time of ``count`` calls."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / count * 1e3


def large_product_rate(device: torch.device, precision: str, size: int = 2048) -> float:
    """Floating-point operations a second of a ``size`` x ``size`` product, the median of ten."""
    dtype = torch.bfloat16 if precision == "bfloat16" else dtype_of(precision)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [milliseconds(lambda: left @ right, 1, device) / 1e3 for _ in range(12)][2:]
    return 2 * size**3 / statistics.median(seconds)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as aligned lines; ``x TorchRL`` compares updates a second with its eager recipe."""
    baseline = results[0]["milliseconds_median"]
    lines = [
        f"{'':<42} {'mode':<11} {'ms/update':>9} {'quartiles':>15} {'updates/s':>10} {'x TorchRL':>10} {'first s':>8}"
    ]
    for row in results:
        low, high = row["milliseconds_quartiles"]
        lines.append(
            f"{row['implementation']:<42} {row['mode']:<11} {row['milliseconds_median']:>9.3f} "
            f"{f'{low:.3f} - {high:.3f}':>15} {row['updates_per_second']:>10.0f} "
            f"{baseline / row['milliseconds_median']:>10.2f} {row['first_call_seconds']:>8.1f}"
        )
    return "\n".join(lines)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
