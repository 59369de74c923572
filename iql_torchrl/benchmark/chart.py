"""The picture of a benchmark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from iql_torchrl.atomic import write_atomically
from iql_torchrl.benchmark.case import Case

_COLOURS = {
    "iql_torchrl": "tab:blue",
    "TorchRL": "tab:orange",
    "plain PyTorch": "tab:green",
}
_PALE = 0.5
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def draw(results: Sequence[Mapping[str, Any]], cases: Sequence[Case], title: str, path: Path) -> None:
    """Bars of the time of an update over that of its matrix products, with quartiles, a panel a case, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = {name: list(rows) for name, rows in groupby(results, key=lambda row: row["case"])}
    # The limit is the line at 1.
    bars = {name: [row for row in rows if not _is_limit(row)] for name, rows in panels.items()}
    columns = min(2, len(panels))
    lines = [list(bars)[start : start + columns] for start in range(0, len(bars), columns)]
    heights = [max(len(bars[name]) for name in line) + 1.5 for line in lines]
    figure, axes = plt.subplots(
        len(lines),
        columns,
        figsize=(9 * columns, 0.36 * sum(heights) + 1.6),
        height_ratios=heights,
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    ratios = [row for row in results if row.get("times_limit_median")]
    highest = max((row["times_limit_median"] for row in ratios), default=1.0)
    # One disturbed row shall not make the others small.
    longest = min(max((row["times_limit_quartiles"][1] for row in ratios), default=1.0), 1.3 * highest)
    labels = {case.name: case.label for case in cases}
    for line, row_of_axes in zip(lines, axes, strict=True):
        for axis, name in zip(row_of_axes, line, strict=False):
            _panel(axis, bars[name], longest, places=max(len(bars[one]) for one in line))
            axis.set_title(labels[name], loc="left", fontweight="bold")
    for axis in axes[-1]:
        axis.set_xlabel("time of an update / time of its matrix products alone (median, quartiles)")
    axes[0, 0].set_xlim(0, 1.35 * longest)
    legend = [Patch(color=colour, label=label) for label, colour in _COLOURS.items() if _has(results, label)]
    legend.append(Patch(color="grey", alpha=_PALE, label="paler: eager"))
    limit = Line2D([], [], color="black", linestyle="--", label="matrix products alone, the limit")
    figure.legend(handles=[*legend, limit], loc="outside lower center", ncols=len(legend) + 1, frameon=False)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    write_atomically(path, lambda file: file.write(picture.getvalue()))


def _panel(axis: Any, rows: Sequence[Mapping[str, Any]], longest: float, places: int) -> None:
    for place, row in enumerate(rows):
        ratio = row.get("times_limit_median")
        if ratio is None:
            axis.text(0.02 * longest, place, _shortened(row.get("failed", "no limit")), va="center", color="tab:red")
            continue
        low, high = row["times_limit_quartiles"]
        error = [[max(0.0, ratio - low)], [max(0.0, high - ratio)]]
        colour = next((colour for label, colour in _COLOURS.items() if row["implementation"].startswith(label)), "grey")
        axis.barh(place, ratio, xerr=error, color=colour, capsize=3, alpha=_PALE if row["mode"] == "eager" else 1.0)
        text = f"{ratio:.2f}  ({row['updates_per_second']:,.0f}/s)"
        axis.text(min(high, longest) + 0.02 * longest, place, text, va="center", bbox=_ON_WHITE)
    axis.set_yticks(range(len(rows)), [f"{row['implementation']}, {row['mode']}" for row in rows])
    axis.set_ylim(places - 0.4, -0.6)
    axis.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelbottom=True)


def _is_limit(row: Mapping[str, Any]) -> bool:
    return row["implementation"] == "matrix products alone"


def _has(results: Sequence[Mapping[str, Any]], label: str) -> bool:
    return any(row["implementation"].startswith(label) for row in results)


def _shortened(reason: str, letters: int = 60) -> str:
    text = f"failed: {reason}"
    return text if len(text) <= letters else f"{text[: letters - 3]}..."
