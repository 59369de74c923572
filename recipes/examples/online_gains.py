"""What going on online has brought, drawn: `python recipes/examples/online_gains.py [--runs FOLDER] [--output FILE]`.

`--runs` takes any number of folders of `iql_finetune.py`, each as `TASK:NAME=FOLDER`: a panel a task, a line a name.
Draws the evaluations of both phases with the hand-over between them, each line the mean of the seeds in a band from the
lowest to the highest, and prints a table: scores before and after, and the regret of the training episodes.
"""

import argparse
import csv
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
from omegaconf import OmegaConf

parser = argparse.ArgumentParser()
parser.add_argument("--runs", nargs="+", required=True, metavar="TASK:NAME=FOLDER")
parser.add_argument("--output", default="online_gains.png")
arguments = parser.parse_args()


def rows(path: Path) -> list[dict[str, float]]:
    """The rows of a table of a run, `nan` where a cell is empty, without the column of words."""
    with open(path, newline="") as file:
        table = csv.DictReader(file)
        return [{key: float(cell or "nan") for key, cell in row.items() if key != "phase"} for row in table]


panels: dict[str, dict[str, Path]] = {}
for one in arguments.runs:
    title, folder = one.split("=", 1)
    task, name = title.split(":", 1)
    panels.setdefault(task, {})[name] = Path(folder)

colours = {
    name: f"C{place}" for place, name in enumerate(dict.fromkeys(one for runs in panels.values() for one in runs))
}
figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
print(f"{'task':16} {'protocol':10} {'before':24} {'after':24} {'regret':22}")
for axis, (task, runs) in zip(axes.flat, panels.items(), strict=True):
    for name, folder in runs.items():
        evaluations, metrics = rows(folder / "eval.csv"), rows(folder / "metrics.csv")
        key = "normalized_score" if evaluations[-1]["normalized_score"] > -1e9 else "episode_return_mean"
        # The evaluations of the run that this one started from come before its own.
        start, begins = OmegaConf.load(folder / "config.yaml").checkpoint.start, min(row["step"] for row in evaluations)
        if start is not None and Path(start).is_dir():
            evaluations = [row for row in rows(Path(start) / "eval.csv") if row["step"] < begins] + evaluations
        else:
            begins = OmegaConf.load(folder / "config.yaml").train.steps
        known = [(row["step"], row["environment_steps"]) for row in metrics if row["step"] > begins]
        updates, steps = zip((begins, 0), *known, strict=True)
        lines: dict[float, list[float]] = {}
        for row in evaluations:
            place = row["step"] - begins if row["step"] < begins else np.interp(row["step"], updates, steps)
            lines.setdefault(float(place) / 1e3, []).append(row[key])
        axis.plot(list(lines), [fmean(one) for one in lines.values()], marker=".", label=name, color=colours[name])
        low, high = ([kind(scores) for scores in lines.values()] for kind in (min, max))
        axis.fill_between(list(lines), low, high, color=colours[name], alpha=0.15, linewidth=0)
        last = max(row["step"] for row in metrics)
        columns = [lines[0.0], lines[max(lines)], [row["regret"] for row in metrics if row["step"] == last]]
        cells = [f"{fmean(column):.4g} ({', '.join(f'{one:.3g}' for one in column)})" for column in columns]
        print(f"{task:16} {name:10} {cells[0]:24} {cells[1]:24} {cells[2]:22}")
    axis.axvline(0, color="black", linestyle=":")
    axis.set(
        title=task,
        xlabel="thousand updates before, thousand steps online after",
        ylabel="normalised score" if key == "normalized_score" else "return",
    )
    axis.grid(alpha=0.3)
    axis.legend()
figure.savefig(arguments.output, dpi=110)
print(f"wrote {arguments.output}")
