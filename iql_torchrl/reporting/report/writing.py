"""A report as files: the page, its pictures, and the table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from iql_torchrl.atomic import write_atomically, write_text_atomically
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.reporting.report.comparison import Comparison, compare, published
from iql_torchrl.reporting.report.figures import draw
from iql_torchrl.reporting.report.gathering import Listed, gather, nothing_left
from iql_torchrl.reporting.report.page import page
from iql_torchrl.reporting.statistics import score_statistics, standard_deviation

_COLUMNS: tuple[str, ...] = (
    "dataset",
    "environment",
    "score",
    "options",
    "source",
    "runs",
    "mean",
    "std",
    "interquartile_mean",
    "interval_low",
    "interval_high",
    "updates_per_second",
)


def write_report(entries: Sequence[str], output: Path) -> tuple[Comparison, list[Listed]]:
    """Gather runs and write ``report.html``, ``table.csv`` and the pictures as PNG.

    Args:
        entries: run folders, folders of runs such as that of a sweep, and patterns of both.
        output: folder, new or not; files of these names are replaced.

    Returns:
        the table, and what is not in it.

    Raises:
        ConfigurationError: no run with a score is left, or the folder cannot be written.
    """
    runs, listed = gather(entries)
    scored = [run for run in runs if run.scores]
    if not scored:
        named = f"runs=[{','.join(entries)}] names no finished run with a score"
        hint = "Name run folders that were evaluated, or folders of them."
        raise ConfigurationError(f"{nothing_left(named, listed)} {hint}")
    comparison = compare(scored)
    pictures = draw(comparison)
    text = page(runs, listed, comparison, pictures)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, (_, picture) in pictures.items():
            write_atomically(output / name, lambda file, picture=picture: file.write(picture))
        write_text_atomically(output / "table.csv", _as_csv(comparison))
        write_text_atomically(output / "report.html", text)
    except OSError as error:
        raise ConfigurationError(f"output={output} cannot be written: {error}.") from error
    return comparison, listed


def summary_lines(comparison: Comparison, listed: Sequence[Listed]) -> str:
    """The table for the terminal, a line a task and set of options, and what is not in it."""
    lines = []
    for label, task in comparison.tasks.items():
        lines.append(f"{label}, {task.unit}{f' ({task.marks})' if task.marks else ''}")
        for name in comparison.names:
            scores = comparison.scores(label, name)
            if len(scores):
                deviation = standard_deviation(scores)
                std = "" if deviation is None else f" +- {deviation:.1f}"
                lines.append(f"  {scores.mean():8.1f}{std} ({len(scores)})  {name}")
    lines += [f"  ! {note}" for note in comparison.notes]
    lines += [f"  ! {one.path}: {one.status}, {one.reason}" for one in listed]
    return "\n".join(lines)


def _as_csv(comparison: Comparison) -> str:
    """A row a task and set of options; published scores have their source and no options."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    for label, task in comparison.tasks.items():
        shared = {"dataset": label, "environment": task.environment, "score": task.unit}
        for name in comparison.names:
            scores = comparison.scores(label, name)
            if not len(scores):
                continue
            found = score_statistics(scores)
            low, high = found["interquartile_mean_interval"] or (None, None)
            row = shared | {"options": name, "source": "runs", "runs": len(scores), "mean": found["mean"]}
            row |= {"std": found["standard_deviation"], "interquartile_mean": found["interquartile_mean"]}
            row |= {"interval_low": low, "interval_high": high}
            writer.writerow(row | {"updates_per_second": comparison.speed(label, name)})
        for one in published()["scores"] if task.normalised else ():
            if one["name"] == task.published:
                writer.writerow(shared | {"source": one["code"], "mean": one["score"], "std": one["std"]})
    return text.getvalue()
