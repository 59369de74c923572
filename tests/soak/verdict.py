"""Whether what was sampled stays what it was, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

# Of what is allowed to change: a share of the first value, or a difference from it.
MEMORY, SPEED, COUNT = 0.05, 0.10, 0


def judge(found: Mapping[str, Any], settled: int) -> dict[str, dict[str, Any]]:
    """Each quantity with its first value after ``settled`` updates, the most that it became, and whether that is well.

    Raises:
        ValueError: too few samples after that.
    """
    samples = [sample for sample in found["samples"] if sample["updates"] >= settled]
    speed = [row["updates_per_second"] for row in found["speed"] if row["updates"] > settled]
    if len(samples) < 2 or len(speed) < 10:
        raise ValueError(f"{len(samples)} samples and {len(speed)} rows after {settled:,} updates are too few")
    quantities = {}
    for name, key, allowed in (
        ("resident bytes", "resident_bytes", MEMORY),
        ("threads", "threads", COUNT),
        ("open handles", "handles", COUNT),
    ):
        values = [sample[key] for sample in samples]
        # What is given back is no growth.
        most = max(values)
        change = (most - values[0]) / values[0]
        quantities[name] = {"first": values[0], "least": min(values), "most": most, "change": change}
        quantities[name]["passed"] = change <= allowed
    tenths = [median(speed[len(speed) * i // 10 : len(speed) * (i + 1) // 10]) for i in range(10)]
    middle = median(speed)
    change = max(abs(tenth - middle) for tenth in tenths) / middle
    quantities["updates per second"] = {
        "first": tenths[0],
        "least": min(tenths),
        "most": max(tenths),
        "change": change,
        "passed": change <= SPEED,
    }
    return quantities


def lines(quantities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The verdict as a table."""
    found = [f"{'':20}{'first':>14}{'least':>14}{'most':>14}{'change':>9}"]
    for name, one in quantities.items():
        numbers = "".join(f"{one[key]:14,.0f}" for key in ("first", "least", "most"))
        found.append(f"{name:20}{numbers}{one['change']:9.1%}  {'PASS' if one['passed'] else 'FAIL'}")
    return found


def draw(found: Mapping[str, Any], path: Path, settled: int) -> None:
    """Memory, counts and speed over updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    samples, speed = found["samples"], found["speed"]
    updates = [sample["updates"] for sample in samples]
    figure, (memory, counts, rate) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    memory.plot(updates, [sample["resident_bytes"] / 1e6 for sample in samples])
    memory.set(title="Resident memory", ylabel="MB")
    counts.plot(updates, [sample["threads"] for sample in samples], label="threads")
    counts.plot(updates, [sample["handles"] for sample in samples], label="open file handles")
    counts.set(title="Threads and handles")
    rate.plot([row["updates"] for row in speed], [row["updates_per_second"] for row in speed])
    rate.set(title="Speed", ylabel="updates per second")
    for axis in (memory, counts, rate):
        axis.axvline(settled, color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel="updates", ylim=(0, None))
        axis.grid(alpha=0.3)
    counts.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
