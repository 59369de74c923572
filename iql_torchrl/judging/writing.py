"""A judgement as text, table and picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.atomic import write_atomically, write_text_atomically
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.evaluation.judging import CRITERIA, criterion
from iql_torchrl.judging.judgement import CLONED, Judgement
from iql_torchrl.reporting.doctor import as_text as findings_as_text
from iql_torchrl.reporting.run_folder import without_non_finite
from iql_torchrl.reporting.summary import versions

LABELS = {
    "fitted_q": "fitted Q evaluation",
    "fitted_q_low": "lower end of its interval",
    "critic": "the policy's own critics",
    "minus_td_error": "- TD error",
    "log_prob": "log-likelihood of the data's actions",
    "minus_action_distance": "- distance from the data's actions",
}
# More policies are in the table, and not in the picture without a simulator.
_MOST_DRAWN = 40


def check_output(folder: Path) -> Path:
    """Make the folder before hours go into what is written there.

    Raises:
        ConfigurationError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"output={folder} cannot be written: {error.strerror or error}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"output={folder} cannot be written: it is read-only, or another user's.")
    return folder


def write_judgement(judgement: Judgement, folder: Path) -> list[Path]:
    """Write ``judge.json``, ``judge.csv`` and ``judge.png``; files of these names are replaced.

    Raises:
        ConfigurationError: the folder cannot be written.
    """
    paths = [folder / f"judge.{kind}" for kind in ("json", "csv", "png")]
    content = json.dumps(without_non_finite({**asdict(judgement), "versions": versions()}), indent=2)
    picture = _picture(judgement)
    try:
        write_text_atomically(paths[0], content + "\n")
        write_text_atomically(paths[1], _as_csv(judgement.rows))
        write_atomically(paths[2], lambda file: file.write(picture))
    except OSError as error:
        raise ConfigurationError(f"output={folder} cannot be written: {error.strerror or error}.") from error
    return paths


def as_text(judgement: Judgement) -> str:
    """The table for the terminal, best first by fitted Q evaluation."""
    true = any("true_value" in row for row in judgement.rows)
    width = max(len(row["policy"]) for row in judgement.rows)
    lines = [
        f"values on {judgement.data}, discount {judgement.discount:g}; the data's episodes {judgement.data_value:.4g}",
        f"  {'policy':<{width}}  {'fitted Q (95% interval)':<26}  {'critic':>9}  {'TD error':>9}  {'log-lik.':>9}  "
        f"{'distance':>8}" + (f"  {'true value':>10}  {'return':>9}" if true else ""),
    ]
    for row in judgement.rows:
        interval = "" if row["fitted_q_low"] is None else f" ({row['fitted_q_low']:.4g} to {row['fitted_q_high']:.4g})"
        value = f"{row['fitted_q']:.4g}{interval}"
        others = ("-" if row[key] is None else f"{row[key]:.4g}" for key in ("critic", "td_error", "log_prob"))
        line = "  ".join([f"  {row['policy']:<{width}}", f"{value:<26}", *(f"{one:>9}" for one in others), ""])
        line += f"{row['action_distance']:>8.3f}"
        lines.append(line + (f"  {row['true_value']:>10.4g}  {row['true_return']:>9.4g}" if true else ""))
    trained_on = [row["policy"] for row in judgement.rows if not row["held_out"]]
    if trained_on:
        of = "" if len(trained_on) == len(judgement.rows) else f" of {', '.join(trained_on)}"
        lines.append(f"  TD error and log-likelihood{of} are on the training data: nothing of them was held out")
    for truth, criteria in judgement.agreement.items():
        lines.append(f"agreement with the true {truth}, over {len(judgement.rows)} policies:")
        for name, found in criteria.items():
            error = found["normalised_absolute_error"]
            lines.append(
                f"  {LABELS[name]:<36}  Spearman {found['spearman']:5.2f} ({found['spearman_low']:.2f} to "
                f"{found['spearman_high']:.2f})  regret@1 {found['regret_at_1']:.2f}  regret@5 "
                f"{found['regret_at_5']:.2f}" + ("" if error is None else f"  normalised absolute error {error:.2f}")
            )
    lines += [f"note: {note}" for note in judgement.notes]
    lines += [f"  ! {one.path}: {one.status}, {one.reason}" for one in judgement.listed]
    for run, findings in judgement.findings.items():
        if findings:
            lines.append(f"findings of {run}:\n{findings_as_text(findings)}")
    return "\n".join(lines)


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _picture(judgement: Judgement) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    draw = _against_truth if judgement.agreement.get("value") else _bars
    figure = draw(plt, judgement)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png", facecolor="white")
    plt.close(figure)
    return picture.getvalue()


def _against_truth(plt: Any, judgement: Judgement) -> Any:
    """Each criterion against what the policies are worth."""
    criteria = judgement.agreement["value"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained", sharey=True)
    figure.suptitle(f"{judgement.data}: what data say of {len(judgement.rows)} policies, and the simulator")
    for axis, name in zip(axes.flat, CRITERIA, strict=True):
        if name not in criteria:
            axis.axis("off")
            continue
        for cloned, colour in ((False, "tab:blue"), (True, "tab:orange")):
            rows = [row for row in judgement.rows if (row["policy"] == CLONED) == cloned]
            both = [(value, row["true_value"], row) for row in rows if (value := criterion(row, name)) is not None]
            if not both:
                continue
            values, truths, of_rows = zip(*both, strict=True)
            if name == "fitted_q" and all(row["fitted_q_low"] is not None for row in of_rows):
                half = [row["fitted_q_high"] - row["fitted_q"] for row in of_rows]
                axis.errorbar(values, truths, xerr=half, fmt="none", ecolor=colour, alpha=0.4)
            axis.scatter(values, truths, s=18, color=colour, label=CLONED if cloned else "checkpoints")
        if CRITERIA[name]:
            truths = [row["true_value"] for row in judgement.rows]
            axis.plot(
                [min(truths), max(truths)], [min(truths), max(truths)], color="grey", linestyle="--", label="equal"
            )
        found = criteria[name]
        axis.set_title(
            f"{LABELS[name]}\nSpearman {found['spearman']:.2f} ({found['spearman_low']:.2f} to "
            f"{found['spearman_high']:.2f}), regret@1 {found['regret_at_1']:.2f}",
            fontsize=10,
        )
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for axis in axes[:, 0]:
        axis.set_ylabel("true discounted value")
    return figure


def _bars(plt: Any, judgement: Judgement) -> Any:
    """Estimates with their intervals, and beside them what is not in their units."""
    rows = judgement.rows[:_MOST_DRAWN]
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 2.2 + 0.3 * len(rows)), layout="constrained", sharey=True, width_ratios=[2, 1, 1]
    )
    figure.suptitle(f"{judgement.data}: what data say of {len(judgement.rows)} policies")
    places = np.arange(len(rows))[::-1]
    half = [0.0 if row["fitted_q_low"] is None else row["fitted_q_high"] - row["fitted_q"] for row in rows]
    axes[0].errorbar([row["fitted_q"] for row in rows], places, xerr=half, fmt="o", label="fitted Q, 95% interval")
    critics = [(row["critic"], place) for row, place in zip(rows, places, strict=True) if row["critic"] is not None]
    if critics:
        axes[0].scatter(*zip(*critics, strict=True), marker="x", color="tab:red", label="own critics", zorder=3)
    axes[0].axvline(judgement.data_value, color="grey", linestyle="--", label="the data's episodes")
    axes[0].set(xlabel="discounted value", yticks=places, yticklabels=[row["policy"] for row in rows])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    known = [(row["log_prob"], place) for row, place in zip(rows, places, strict=True) if row["log_prob"] is not None]
    axes[1].scatter(*(zip(*known, strict=True) if known else ([], [])))
    axes[1].set(xlabel="log-likelihood of the data's actions")
    axes[2].scatter([row["action_distance"] for row in rows], places)
    axes[2].set(xlabel="distance from the data's actions")
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure
