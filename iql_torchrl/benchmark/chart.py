"""The picture of a benchmark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iql_torchrl.atomic import write_atomically


def draw(results: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """A bar chart of updates a second with quartiles, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.45 * len(results) + 1.5), layout="constrained")
    names = [f"{row['implementation']}, {row['mode']}" for row in results]
    rates = [row["updates_per_second"] for row in results]
    colours = {"TorchRL recipe": "tab:orange", "matrix products alone": "lightgrey"}
    slow, fast = zip(*(row["milliseconds_quartiles"][::-1] for row in results), strict=True)
    low = [rate - 1e3 / milli for rate, milli in zip(rates, slow, strict=True)]
    high = [1e3 / milli - rate for rate, milli in zip(rates, fast, strict=True)]
    bars = axis.barh(
        names,
        rates,
        xerr=([max(0.0, value) for value in low], [max(0.0, value) for value in high]),
        color=[colours.get(row["implementation"], "tab:blue") for row in results],
    )
    axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=6)
    figure.suptitle(title)
    axis.set_xlabel("updates per second (median, quartiles)")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_atomically(path, lambda file: file.write(picture.getvalue()))
