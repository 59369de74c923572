"""What is in sets: a table, and the returns of their episodes as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from iql_torchrl.atomic import write_atomically
from iql_torchrl.collecting.steps import Steps
from iql_torchrl.environments.scores import normalised_score

_BINS = 40


def table(sets: Mapping[str, Steps], references: tuple[float, float] | None) -> str:
    """A row for each set: its size, and the returns of its episodes, a cut one left out.

    Args:
        sets: by name.
        references: random and expert return, for a column of normalised scores.
    """
    heads = ["set", "steps", "episodes", "return: mean", "std", "lowest", "highest", "score", "length", "terminated"]
    rows = [heads, ["---"] * len(heads)]
    for name, steps in sets.items():
        returns = steps.returns
        score = None if references is None else normalised_score(references, float(returns.mean()))
        rows.append(
            [
                name,
                f"{len(steps):,}",
                f"{len(steps.episodes):,}",
                *(f"{value:.1f}" for value in (returns.mean(), returns.std(), returns.min(), returns.max())),
                "" if score is None else f"{score:.1f}",
                f"{len(steps) / len(steps.episodes):.0f}",
                f"{steps.terminals.sum() / len(steps.episodes):.0%}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_returns(sets: Mapping[str, Steps], title: str, path: Path) -> None:
    """Draw histograms of the episodes' returns, a set above the other, on one axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    returns = {name: steps.returns for name, steps in sets.items()}
    everything = np.concatenate(list(returns.values()))
    low, high = float(everything.min()), float(everything.max())
    bins = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    figure, axes = plt.subplots(
        len(sets), 1, figsize=(8, 0.6 + 1.4 * len(sets)), sharex=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for axis, (name, found) in zip(axes.flat, returns.items(), strict=True):
        axis.hist(found, bins=bins.tolist())
        axis.axvline(found.mean(), color="black", linestyle=":", label=f"mean {found.mean():.1f}")
        axis.set_ylabel(name)
        axis.legend(loc="upper center")
    axes.flat[-1].set_xlabel("return of an episode")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_atomically(path, lambda file: file.write(picture.getvalue()))
