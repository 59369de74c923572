"""The picture of a run."""

from __future__ import annotations

import io
import math
from pathlib import Path
from statistics import fmean

from iql_torchrl.atomic import write_atomically
from iql_torchrl.reporting.run_folder import RunFolder

_LOSSES = {"loss_qvalue": "Q", "loss_value": "V"}
# Beyond it matplotlib cannot draw a logarithmic axis with room at its ends.
_LARGEST = 1e100


def draw_curves(
    run: RunFolder,
    *,
    title: str,
    data_score: float | None = None,
    score_label: str = "return",
    hand_over: int | None = None,
) -> Path:
    """Draw ``curves.png``: score, losses, values and advantage-weight diagnostics over updates.

    Of several seeds, each line is their mean, in a band from the lowest to the highest.

    Args:
        run: the folder, of whose CSV files the curves are drawn.
        title: of the figure.
        data_score: mean score of the dataset's episodes, drawn as a line to beat.
        score_label: of the score axis: a normalised score where there is one, else the episode return.
        hand_over: the update after which the policy acts in its environment, marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics, evaluations = run.metrics(), run.evaluations()
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    score, losses, values, weights = axes.flat
    figure.suptitle(title, wrap=True)

    if evaluations:
        key = "normalized_score" if "normalized_score" in evaluations[-1] else "episode_return_mean"
        _plot(score, evaluations, key, "policy", marker="o")
        if data_score is not None:
            score.axhline(data_score, color="grey", linestyle="--", label="mean of the data")
        score.set_ylim(bottom=min(0.0, *[row[key] for row in evaluations]))
        score.set(title="Evaluation", ylabel=score_label)
    else:
        for key, label in (("log_prob", "training"), ("validation_log_prob", "held out")):
            _plot(score, metrics, key, label)
        score.set(title="Log-likelihood of the data's actions", ylabel="nats")
    for key, label in _LOSSES.items():
        _plot(losses, metrics, _mean_of(key, metrics), label)
    losses.set(title="Losses, means of the intervals", ylabel="Q and V loss")
    if any(row.get(key, 0.0) > 0 for row in metrics for key in _LOSSES):
        losses.set_yscale("log")
    actor = losses.twinx()
    _plot(actor, metrics, _mean_of("loss_actor", metrics), "policy", color="tab:green")
    actor.set_ylabel("policy loss")
    for key, label in (("qvalue", "min target Q"), ("value", "V")):
        _plot(values, metrics, key, label)
    values.set(title="Values of the batch", ylabel="discounted return, scaled")
    _plot(weights, metrics, "effective_sample_size", "effective sample size")
    _plot(weights, metrics, "clipped_fraction", "clipped share")
    weights.set(title="Advantage weights", ylabel="share of the batch", ylim=(0, 1))
    for axis in axes.flat:
        if hand_over is not None:
            axis.axvline(hand_over, color="black", linestyle=":", label="online from here" if axis is score else None)
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
    lines = [*losses.get_legend_handles_labels()[0], *actor.get_legend_handles_labels()[0]]
    for axis in (losses, actor):
        axis.margins(y=0.25)  # room for the legend
    losses.legend(handles=lines, loc="upper center", ncols=3)
    for axis in (score, values, weights):
        if axis.get_legend_handles_labels()[0]:
            axis.legend()

    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png", metadata={"Title": title})
    plt.close(figure)
    write_atomically(run.curves, lambda file: file.write(picture.getvalue()))
    return run.curves


def _mean_of(key: str, metrics: list[dict[str, float]]) -> str:
    """The column of a loss's means, which runs of earlier releases do not have."""
    return f"{key}_mean" if any(f"{key}_mean" in row for row in metrics) else key


def _plot(axis, metrics: list[dict[str, float]], key: str, label: str, **style) -> None:
    by_step: dict[float, list[float]] = {}
    for row in metrics:
        if key in row and math.isfinite(row[key]):
            by_step.setdefault(row["step"], []).append(min(max(row[key], -_LARGEST), _LARGEST))
    if not by_step:
        return
    (line,) = axis.plot(list(by_step), [fmean(values) for values in by_step.values()], label=label, **style)
    if any(len(values) > 1 for values in by_step.values()):
        low, high = zip(*((min(values), max(values)) for values in by_step.values()), strict=True)
        axis.fill_between(list(by_step), low, high, color=line.get_color(), alpha=0.2, linewidth=0)
