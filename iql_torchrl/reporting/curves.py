"""The picture of a run."""

from __future__ import annotations

import io
import math
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from iql_torchrl.atomic import write_atomically
from iql_torchrl.reporting.run_folder import Records, RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOSSES = {"loss_qvalue": "Q", "loss_value": "V"}
# Beyond it matplotlib cannot draw a logarithmic axis with room at its ends.
_LARGEST = 1e100
# Of the lines of one axis, in their order: two that lie on each other are seen both.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "tab:blue", "linestyle": "-", "linewidth": 2.2},
    {"color": "tab:orange", "linestyle": (0, (4, 2)), "linewidth": 1.4},
    {"color": "tab:green", "linestyle": (0, (6, 2, 1, 2)), "linewidth": 1.4},
)
_BAND_OPACITY, _BAND_EDGE_OPACITY = 0.18, 0.4
# More points than that have no markers of their own.
_MOST_MARKERS = 50
# So much of an axis is left free at its ends, where markers and lines would be cut.
_ROOM = 0.03
# What is drawn where no simulator is, and its unit.
_FIT = {True: ("Log-likelihood of", "nats"), False: ("Fit of the policy's network to", "minus its squared error")}


def draw_curves(run: RunFolder, *, title: str, **how: Any) -> Path:
    """Draw ``curves.png`` of a run folder.

    Args:
        run: the folder, of whose CSV files the curves are drawn.
        title: of the figure, and of the file.
        **how: of :func:`curves`.
    """
    picture = io.BytesIO()
    curves(run, title=title, **how).savefig(picture, dpi=120, format="png", metadata={"Title": title})
    write_atomically(run.curves, lambda file: file.write(picture.getvalue()))
    return run.curves


def curves(
    records: Records,
    *,
    title: str,
    data_score: float | None = None,
    score_label: str = "return",
    hand_over: int | None = None,
    updates: int | None = None,
    has_likelihood: bool = True,
) -> Figure:
    """Score, losses, values and advantage-weight diagnostics over updates.

    Of several seeds, each line is their mean, in a band from the lowest to the highest. All four have the same updates
    on their axis, from 0, or from the hand-over where nothing before it is of this run, to the last.

    Args:
        records: the rows of the run.
        title: of the figure.
        data_score: mean score of the dataset's episodes, drawn as a line to beat.
        score_label: of the score axis: a normalised score where there is one, else the episode return.
        hand_over: the update after which the policy acts in its environment, marked.
        updates: done by the run; ``None``: up to its last row.
        has_likelihood: what ``log_prob`` in the rows is, else minus the squared error of the policy's network.
    """
    from matplotlib.figure import Figure  # not of pyplot, which keeps figures and may want a screen
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    metrics, evaluations = records.metrics(), records.evaluations()
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    axes = figure.subplots(2, 2)
    score, losses, values, weights = axes.flat
    figure.suptitle(title, wrap=True)

    if evaluations:
        key = "normalized_score" if "normalized_score" in evaluations[-1] else "episode_return_mean"
        _plot(score, evaluations, key, "policy", 0, marked=True)
        if data_score is not None:
            score.axhline(data_score, color="grey", linestyle="--", label="mean of the data")
        if min(data_score or 0.0, *(row[key] for row in evaluations)) >= 0:
            top = score.get_ylim()[1]
            score.set_ylim(-_ROOM * top, top)
        score.set(title="Evaluation", ylabel=score_label)
    else:
        for place, (key, label) in enumerate((("log_prob", "training"), ("validation_log_prob", "held out"))):
            _plot(score, metrics, key, label, place)
        what, unit = _FIT[has_likelihood]
        score.set(title=f"{what} the data's actions", ylabel=unit)
    for place, (key, label) in enumerate(_LOSSES.items()):
        _plot(losses, metrics, _mean_of(key, metrics), label, place)
    losses.set(title="Losses, means of the intervals", ylabel="Q and V loss")
    if any(row.get(_mean_of(key, metrics), 0.0) > 0 for row in metrics for key in _LOSSES):
        losses.set_yscale("log")
    actor = losses.twinx()
    _plot(actor, metrics, _mean_of("loss_actor", metrics), "policy (right)", 2)
    actor.set_ylabel("policy loss")
    for place, (key, label) in enumerate((("qvalue", "min target Q"), ("value", "V"))):
        _plot(values, metrics, key, label, place)
    values.set(title="Values of the batch", ylabel="discounted return, scaled")
    _plot(weights, metrics, "effective_sample_size", "effective sample size", 0)
    _plot(weights, metrics, "clipped_fraction", "clipped share", 1)
    weights.set(title="Advantage weights", ylabel="share of the batch", ylim=(-_ROOM, 1 + _ROOM))

    rows = [*metrics, *evaluations]
    last = max((int(row["step"]) for row in rows), default=1) if updates is None else updates
    first = hand_over if hand_over is not None and rows and all(row["step"] >= hand_over for row in rows) else 0
    room = _ROOM * max(last - first, 1)
    shared: list[Any] = []
    seeds = len({row["seed"] for row in rows})
    if seeds > 1:
        label = f"lowest to highest of {seeds} seeds; the lines are their means"
        shared.append(Patch(**_band("grey"), label=label))
    if hand_over is not None and hand_over <= last:
        shared.append(Line2D([], [], color="black", linestyle=":", label="online from here"))
        for axis in axes.flat:
            axis.axvline(hand_over, color="black", linestyle=":")
    for axis in axes.flat:
        axis.set(xlabel="updates", xlim=(first - room, last + room))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=0.3)
        lines = axis.get_legend_handles_labels()[0] + (actor.get_legend_handles_labels()[0] if axis is losses else [])
        if lines:  # between the title and the axes, where no line is
            axis.legend(
                handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, borderaxespad=0.2
            )
            axis.set_title(axis.get_title(), pad=24)
    if shared:
        figure.legend(handles=shared, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _mean_of(key: str, metrics: list[dict[str, float]]) -> str:
    """The column of a loss's means, which runs of earlier releases do not have."""
    return f"{key}_mean" if any(f"{key}_mean" in row for row in metrics) else key


def _plot(axis: Any, rows: list[dict[str, Any]], key: str, label: str, place: int, *, marked: bool = False) -> None:
    by_step: dict[float, list[float]] = {}
    for row in rows:
        if key in row and math.isfinite(row[key]):
            by_step.setdefault(row["step"], []).append(min(max(row[key], -_LARGEST), _LARGEST))
    if not by_step:
        return
    style, count = _STYLES[place], len(by_step)
    marker = "o" if count == 1 or (marked and count <= _MOST_MARKERS) else None  # a line of one point is none
    axis.plot(list(by_step), [fmean(values) for values in by_step.values()], label=label, marker=marker, **style)
    if any(len(values) > 1 for values in by_step.values()):
        low, high = zip(*((min(values), max(values)) for values in by_step.values()), strict=True)
        axis.fill_between(list(by_step), low, high, **_band(style["color"]))


def _band(color: str) -> dict[str, Any]:
    """With an outline, so that two bands that lie on each other are told apart."""
    return {"facecolor": (color, _BAND_OPACITY), "edgecolor": (color, _BAND_EDGE_OPACITY), "linewidth": 0.6}
