"""The files of a run: rows are appended, everything else is replaced in one rename."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from iql_torchrl.atomic import remove_leftovers, write_text_atomically
from iql_torchrl.errors import LONGEST_REASON, ConfigurationError, first_line, writing_to

METRICS_COLUMNS = (
    "step",
    "seed",
    "loss_actor",
    "loss_qvalue",
    "loss_value",
    "entropy",
    "learning_rate",
    "qvalue",
    "value",
    "advantage_mean",
    "advantage_std",
    "clipped_fraction",
    "updates_per_second",
    "effective_sample_size",
    "log_prob",
    "policy_std",
    "td_error",
    "validation_log_prob",
    "validation_td_error",
    "validation_advantage_mean",
    "loss_actor_mean",
    "loss_qvalue_mean",
    "loss_value_mean",
    "entropy_mean",
    "environment_steps",
    "training_return",
    "regret",
    "environment_seconds",
    "inference_seconds",
    "qvalue_std",
    "positive_advantages",
)
EVAL_COLUMNS = (
    "step",
    "seed",
    "episode_return_mean",
    "episode_return_std",
    "normalized_score",
    "episodes",
    "seconds",
    "success_rate",
    "phase",
)
# The one column of words, of runs that go on online: before the policy acts in its environment, or after.
OFFLINE, ONLINE = "offline", "online"


class Records:
    """The rows of a run, in memory."""

    def __init__(self) -> None:
        self._rows: dict[str, list[dict[str, Any]]] = {"metrics": [], "evaluations": []}

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row of losses and diagnostics; absent columns stay empty."""
        self._append("metrics", METRICS_COLUMNS, row)

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append a row of an evaluation."""
        self._append("evaluations", EVAL_COLUMNS, row)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of losses and diagnostics; empty cells are left out."""
        return self._rows["metrics"]

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations; empty cells are left out."""
        return self._rows["evaluations"]

    def _append(self, kind: str, columns: tuple[str, ...], row: Mapping[str, Any]) -> None:
        _refuse_unknown_columns(kind, columns, row)
        self._rows[kind].append(_numbers({key: value for key, value in row.items() if value is not None}))


class RunFolder(Records):
    """``config.yaml``, ``metrics.csv``, ``eval.csv``, ``checkpoints/``, ``curves.png`` and ``summary.json``.

    Args:
        path: the folder; created where it does not exist.
        resume_step: rows of later steps are dropped, because the resumed run writes them again; ``None`` starts a run.

    Raises:
        ConfigurationError: the folder holds a run already and this one does not resume it, or it cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.curves = path / "curves.png"
        self._metrics = path / "metrics.csv"
        self._evaluations = path / "eval.csv"
        if resume_step is None and self._metrics.exists():
            raise ConfigurationError(
                f"run_dir={path} holds a run already, which is left as it is; continue it with resume=auto, or name "
                "another run_dir."
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (path, self.checkpoints, *self.checkpoints.glob("seed-*")):
                remove_leftovers(folder)
            for file, columns in ((self._metrics, METRICS_COLUMNS), (self._evaluations, EVAL_COLUMNS)):
                rows = _read(file) if resume_step is not None and file.exists() else []
                kept = [row for row in rows if int(row["step"]) <= (resume_step or 0)]
                write_text_atomically(file, _as_csv(columns, kept))
        except OSError as error:
            raise ConfigurationError(f"run_dir={path} cannot be written: {error}.") from error

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.yaml``."""
        text = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
        with self.writing():
            write_text_atomically(self.path / "config.yaml", text)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row of ``metrics.csv``; absent columns stay empty."""
        with self.writing():
            _append(self._metrics, METRICS_COLUMNS, row)

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append a row of ``eval.csv``."""
        with self.writing():
            _append(self._evaluations, EVAL_COLUMNS, row)

    def sync(self) -> None:
        """Have the rows on the disk, before a checkpoint that counts on them: the machine may fail."""
        for path in (self._metrics, self._evaluations):
            with self.writing(), open(path, "ab") as file:
                os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.csv``; empty cells are left out."""
        return [_numbers(row) for row in _read(self._metrics)]

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of ``eval.csv``; empty cells are left out."""
        return [_numbers(row) for row in _read(self._evaluations)]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        text = json.dumps(without_non_finite(summary), indent=2, allow_nan=False) + "\n"
        with self.writing():
            write_text_atomically(self.path / "summary.json", text)

    def writing(self) -> AbstractContextManager[None]:
        """Around whatever writes into the folder of a run that has begun.

        Raises:
            RunError: it cannot be written any more; what was complete stays.
        """
        return writing_to(
            f"run_dir={self.path}",
            "Its rows and checkpoints up to here are whole; once it can be written, continue with resume=auto "
            f"run_dir={self.path}.",
        )


class RecordedRun(Records):
    """A run folder that is read, and left as it is.

    Args:
        path: the folder.

    Raises:
        ConfigurationError: it is no run folder, or what is read of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if not (path / "config.yaml").is_file() or not (path / "metrics.csv").is_file():
            there = "has no config.yaml and metrics.csv" if path.is_dir() else "is no folder"
            raise ConfigurationError(f"{path} {there}: it is no run folder; name one, such as runs/hopper.")
        # PyYAML's own, in C where it was built so, is ten times as fast as OmegaConf.
        safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.config: dict[str, Any] = self._mapping("config.yaml", lambda text: safe(text).get_single_data())
        self.summary: dict[str, Any] | None = None
        if (path / "summary.json").is_file():  # which a run that is under way, or was killed, has not
            self.summary = self._mapping("summary.json", json.loads)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.csv``; empty cells are left out."""
        return self._rows_of("metrics.csv")

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of ``eval.csv``; empty cells are left out."""
        return self._rows_of("eval.csv") if (self.path / "eval.csv").is_file() else []

    def _rows_of(self, name: str) -> list[dict[str, Any]]:
        try:
            return [_numbers(row) for row in _read(self.path / name)]
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise ConfigurationError(f"{self.path / name} is damaged: {first_line(error, LONGEST_REASON)}.") from error

    def _mapping(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        try:
            found = parse((self.path / name).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigurationError(f"{self.path / name} is damaged: {first_line(error, LONGEST_REASON)}.") from error
        if not isinstance(found, dict):
            raise ConfigurationError(f"{self.path / name} is damaged: it holds no mapping.")
        return found


def without_non_finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, Mapping):
        return {key: without_non_finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_csv(columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _refuse_unknown_columns(name: str, columns: tuple[str, ...], row: Mapping[str, Any]) -> None:
    unknown = set(row) - set(columns)
    if unknown:
        raise KeyError(f"{name} has no column {', '.join(sorted(unknown))}")


def _append(path: Path, columns: tuple[str, ...], row: Mapping[str, Any]) -> None:
    _refuse_unknown_columns(path.name, columns, row)
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerow(row)
    line = text.getvalue().encode()
    with open(path, "ab", buffering=0) as file:  # in one call, which a kill cannot cut
        size = file.tell()
        if file.write(line) < len(line):  # which a full disk can
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        # A row that a killed process left unfinished has no value in its later columns.
        return [row for row in csv.DictReader(file) if row["step"] and None not in row.values()]


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value if key == "phase" else float(value) for key, value in row.items() if value != ""}
