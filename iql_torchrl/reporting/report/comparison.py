"""Runs as a table: a row a task, a column for each set of options, the seeds of both in a cell."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from statistics import median
from typing import Any

import numpy as np

from iql_torchrl.configuration.declaring import Options, declaration, is_learnt
from iql_torchrl.configuration.options import (
    AlgorithmOptions,
    EvaluationOptions,
    OnlineOptions,
    TrainOptions,
)
from iql_torchrl.data.comparability import changes_between
from iql_torchrl.environments.specification import task_of
from iql_torchrl.reporting.report.gathering import ReportedRun

_SECTIONS: dict[str, type[Options]] = {
    "algorithm": AlgorithmOptions,
    "train": TrainOptions,
    "online": OnlineOptions,
    "eval": EvaluationOptions,
}
# What is learnt does not depend on the length of a run, so that it may be resumed with another; its score does.
_ALSO = ("train.steps", "online.steps", "eval.episodes")
# Which seeds there are is in the cells; the other is another name of the discount.
_NOT = ("train.seed", "train.num_seeds", "algorithm.gamma")
_PLACES = (
    "source",
    "name",
    "path",
    "root",
    "url",
    "arrays",
    "buffer",
    "dataset",
    "storage",
    "storage_folder",
    "download",
)
# Cells that a note names.
_NAMED = 5


@dataclass(frozen=True)
class Task:
    """A dataset and the environment that its policies are evaluated in; ``unit`` is that of the scores.

    ``label`` tells it from the others, ``marks`` are why its scores do not compare, ``references`` what a normalised
    score counts as 0 and 100, and ``published`` is D4RL's name of the data where published scores stand beside.
    """

    name: str
    environment: str | None
    unit: str
    fingerprint: str
    label: str = ""
    references: tuple[float, float] | None = field(default=None, compare=False)
    marks: str = field(default="", compare=False)
    published: str | None = field(default=None, compare=False)

    @property
    def normalised(self) -> bool:
        """Whether scores may be averaged with those of other tasks."""
        return self.unit != "return"


@dataclass(frozen=True)
class Comparison:
    """All runs that have a score.

    Args:
        cells: runs by the label of their task and the name of their set of options.
        tasks: by label, in the order of the rows.
        names: of the sets of options, in the order of the columns.
        differing: by name, the options in which it differs from another, with its values.
        notes: what is to be known of the table.
    """

    cells: Mapping[tuple[str, str], Sequence[ReportedRun]]
    tasks: Mapping[str, Task]
    names: Sequence[str]
    differing: Mapping[str, Mapping[str, str]]
    notes: Sequence[str] = field(default_factory=list)

    def scores(self, task: str, name: str) -> np.ndarray:
        """Of all seeds of a cell, empty where it has no run."""
        return np.array([score for run in self.cells.get((task, name), ()) for score in run.scores.values()], float)

    def speed(self, task: str, name: str) -> float | None:
        """Updates per second, the median over the runs of a cell."""
        rates = [run.summary.get("steps_per_second") for run in self.cells.get((task, name), ())]
        found = [rate for rate in rates if rate is not None]
        return median(found) if found else None

    @cached_property
    def common(self) -> list[str]:
        """The tasks with normalised scores that every set of options has runs of."""
        return [
            label
            for label, task in self.tasks.items()
            if task.normalised and all(len(self.scores(label, name)) for name in self.names)
        ]

    def over(self, name: str) -> list[str]:
        """The tasks over which a set of options is averaged: the common ones, or its own where there are none."""
        own = [label for label, task in self.tasks.items() if task.normalised and len(self.scores(label, name))]
        return self.common or own


def compare(runs: Sequence[ReportedRun]) -> Comparison:
    """Sort runs into tasks and sets of options, which are named by what tells them apart."""
    tasks = _tasks(runs)
    options = [_options(run) for run in runs]
    chosen = _telling_apart(options, [task.label for task in tasks])
    names = _names(options, chosen)
    cells: dict[tuple[str, str], list[ReportedRun]] = {}
    for task, name, run in zip(tasks, names, runs, strict=True):
        cells.setdefault((task.label, name), []).append(run)
    differing = {
        name: {key: one.get(key, "-") for key in chosen if key != "method"}
        for name, one in zip(names, options, strict=True)
    }
    notes = _repeated(cells) + _mixed(tasks)
    notes += dict.fromkeys(
        note if note.startswith(f"{task.label} ") else f"{task.label}: {note}"
        for task, run in zip(tasks, runs, strict=True)
        for note in run.notes
    )
    # Of runs on the same data the one that knows most of them tells what they are.
    known = {task.label: task for task in sorted(tasks, key=lambda task: (task.published is not None, task.marks))}
    ordered = sorted(known.items(), key=lambda one: (not one[1].normalised, one[0]))
    return Comparison(cells, dict(ordered), list(dict.fromkeys(sorted(names, key=_column))), differing, notes)


def _repeated(cells: Mapping[tuple[str, str], Sequence[ReportedRun]]) -> list[str]:
    """A line on the seeds that a cell has more than once."""
    found = []
    for (label, name), several in cells.items():
        counts = Counter(seed for run in several for seed in run.scores)
        again = [str(seed) for seed, count in sorted(counts.items()) if count > 1]
        if again:
            found.append(f"{label}, {name}: seed {', '.join(again)}")
    more = f"; and in {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    what = "There more than once, and such runs are not independent of each other"
    return [f"{what}: {'; '.join(found[:_NAMED])}{more}."] if found else []


def _mixed(tasks: Sequence[Task]) -> list[str]:
    """A line on tasks that are alike, or averaged in one table, and do not compare."""
    different, found = list(dict.fromkeys(tasks)), []
    alike: dict[str, list[Task]] = {}
    for task in different:
        if task.environment is not None:
            alike.setdefault(task_of(task.environment.partition(" ")[0]), []).append(task)
    for kind, unordered in alike.items():
        several = sorted(unordered, key=lambda task: (str(task.environment), task.label))
        if meaning := _difference(sorted({str(task.environment) for task in several})):
            places = _some([f"{task.environment} ({task.label})" for task in several])
            found.append(f"{kind} in several versions or settings, {places}: {meaning}.")
        scales = [(task.label, task.references) for task in several if task.normalised and task.references]
        if len({scale for _, scale in scales}) > 1:
            told = _some([f"{low:,.1f} to {high:,.1f} ({label})" for label, (low, high) in scales])
            found.append(f"{kind} on several scales, {told}: normalised scores do not compare.")
    returns = [task.label for task in different if not task.normalised]
    if 0 < len(returns) < len(different):
        found.append(f"Returns among normalised scores, with which they are not averaged: {_some(returns)}.")
    return found


def _difference(environments: Sequence[str]) -> str:
    """Between environments of one kind, sorted; empty where their scores compare."""
    if len({" ".join(one.split(" ")[1:]) for one in environments}) > 1:
        return "scores do not compare"
    return changes_between(environments[0].split(" ")[0], environments[-1].split(" ")[0])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def published() -> dict[str, Any]:
    """``sources`` by code, and ``scores``, each with ``name`` of the dataset, ``code``, ``score`` and ``std``."""
    return json.loads((files("iql_torchrl.reporting.report") / "published.json").read_text())


def _tasks(runs: Sequence[ReportedRun]) -> list[Task]:
    """Of each run; labels tell tasks apart whose datasets have one name."""
    bare = [_task(run) for run in runs]
    labels: dict[Task, str] = {}
    for task in dict.fromkeys(bare):
        alike = [other for other in dict.fromkeys(bare) if other.name == task.name and other != task]
        label = task.name
        if any(other.environment != task.environment for other in alike):
            label += f" in {task.environment}"
        if any(other.fingerprint != task.fingerprint and other.environment == task.environment for other in alike):
            label += f" ({task.fingerprint[:6]})"
        labels[task] = label if label not in labels.values() else f"{label} ({task.unit})"
    return [replace(task, label=labels[task]) for task in bare]


def _task(run: ReportedRun) -> Task:
    summary, environment = run.summary, run.summary.get("environment")
    arguments = (run.config.get("env") or {}).get("kwargs")
    if environment is not None and arguments:
        environment += f" {_as_text(arguments)}"
    return Task(
        run.dataset,
        environment,
        summary["score"],
        summary["dataset_fingerprint"],
        references=run.references,
        marks=run.marks,
        published=summary.get("published_name"),
    )


def _options(run: ReportedRun) -> dict[str, str]:
    """What may tell a run from another: its method, and the options that scores depend on."""
    algorithm = run.config.get("algorithm") or {}
    method = "behaviour cloning" if algorithm.get("temperature") == 0 else "IQL"
    found = {"method": f"{method}, then online" if "online" in run.config else method}
    for section, declared in _SECTIONS.items():
        for key, value in (run.config.get(section) or {}).items():
            name = f"{section}.{key}"
            option = declaration(declared, key)
            if name not in _NOT and (name in _ALSO or option is None or is_learnt(option)):
                found[name] = _as_text(value)
    dataset = run.config.get("dataset") or {}
    return found | {f"dataset.{key}": _as_text(value) for key, value in dataset.items() if key not in _PLACES}


def _as_text(value: Any) -> str:
    """As on the command line; 1 and 1.0 are one value."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_as_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_as_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _telling_apart(options: Sequence[Mapping[str, str]], tasks: Sequence[str]) -> list[str]:
    """The fewest options, in the order of their declaration, that tell apart what differs within some task.

    A preset that each domain has of its own does not: it goes with the task. What follows from an option that is
    chosen already, as all that a variant sets, does not tell more.
    """
    chosen: list[str] = []
    keys = dict.fromkeys(key for one in options for key in one)
    first = [key for key in ("method", "algorithm.variant", "online.protocol") if key in keys]
    for key in (*first, *(key for key in keys if key not in first)):
        before = {(task, *(one.get(name) for name in chosen)) for task, one in zip(tasks, options, strict=True)}
        after = {
            (task, *(one.get(name) for name in chosen), one.get(key)) for task, one in zip(tasks, options, strict=True)
        }
        if len(after) > len(before):
            chosen.append(key)
    return chosen if "method" in chosen else ["method", *chosen]


def _names(options: Sequence[Mapping[str, str]], chosen: Sequence[str]) -> list[str]:
    """Of each run: its method, and those of the chosen options in which runs differ that agree up to there."""
    parts: list[list[str]] = [[] for _ in options]
    for place, key in enumerate(chosen):
        values: dict[tuple[str | None, ...], set[str | None]] = {}
        before = [tuple(one.get(name) for name in chosen[:place]) for one in options]
        for agreed, one in zip(before, options, strict=True):
            values.setdefault(agreed, set()).add(one.get(key))
        for agreed, one, said in zip(before, options, parts, strict=True):
            if key == "method":
                said.append(one[key])
            elif key in one and len(values[agreed]) > 1:
                said.append(f"{key.removeprefix('algorithm.')}={one[key]}")
    return [" ".join(said) for said in parts]


def _column(name: str) -> tuple[bool, str]:
    return not name.startswith("IQL"), name
