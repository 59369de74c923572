"""A sweep: the runs of Hydra's multirun, each a job that can be started again, and one table of them all.

Hydra's sweepers choose the runs, its launchers (Ray, Slurm, processes of this machine) place them; see
:func:`job_of_sweep` for what a run of a sweep does differently, and :class:`Sweep` for what happens around all of them.
"""

from __future__ import annotations

import atexit
import csv
import io
import json
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from iql_torchrl.atomic import write_text_atomically
from iql_torchrl.errors import DivergenceError, UserError, first_line
from iql_torchrl.reporting.score_table import named, of_jobs
from iql_torchrl.reporting.statistics import score_statistics, scores_by_seed
from iql_torchrl.running.clusters import check_cluster, divide_threads
from iql_torchrl.running.options import OfflineOptions

_JOB, _TABLE, _CSV, _LOCK = "job.json", "sweep.json", "sweep.csv", ".sweep.lock"
_OF_SUMMARY = ("final_score", "best_score", "best_step", "steps", "seed", "num_seeds", "steps_per_second", "diverged")
_WITH_RESULTS = ("finished", "diverged")
_SEED = "train.seed"


def job_of_sweep(function: Callable[[OfflineOptions], Any], composed: Callable[[], OfflineOptions]) -> float:
    """One run of a sweep.

    A run that is finished already is recognised by its summary and not repeated; one that was broken off goes on from
    its newest checkpoint. An error ends this run alone: it is written beside it and the sweep goes on.

    Args:
        function: of a recipe, called with the options.
        composed: gives them; with ``resume=auto``, so that those in the run's folder must agree.

    Returns:
        the objective of :func:`iql_torchrl.reporting.summary.summarise`; NaN where there is none.

    Raises:
        SystemExit: the run was interrupted.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if Path(hydra.runtime.cwd).is_dir():  # relative names are those of the command line, wherever the job runs
        os.chdir(hydra.runtime.cwd)
    job = _Job(folder, list(hydra.overrides.task))
    divide_threads(cast(DictConfig, hydra), len(_expected(folder.parent)))
    job.record("running")
    try:
        options = composed()
        summary = _finished(folder, options)
        if summary is None:
            function(options)
            summary = _read(folder / "summary.json")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        job.record("failed", str(error))
    except (SystemExit, KeyboardInterrupt) as error:
        if getattr(error, "code", None) != DivergenceError.status:
            job.record("interrupted")
            raise
        job.record("diverged")
    except Exception as error:  # whatever it is, the other runs go on
        traceback.print_exc()
        job.record("failed", f"{type(error).__name__}: {first_line(error)}")
    else:
        job.record("diverged" if summary.get("diverged") else "finished")
        objective = summary.get("objective")
        return math.nan if objective is None else float(objective)
    return math.nan


class Sweep(Callback):
    """What happens around all runs of a sweep, as a callback of Hydra: a check of the cluster before, a table after."""

    def __init__(self) -> None:
        self._folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a cluster that cannot run the jobs, and list the jobs that there will be."""
        try:
            expected = _jobs(config)
            check_cluster(config.hydra)
        except (UserError, HydraException) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        self._folder = Path(str(config.hydra.sweep.dir))
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_table(self._folder, expected=expected)
        atexit.register(self._close)  # where the launcher raises, or the sweep is interrupted, Hydra calls no more

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the table; the process ends with status 1 where a run did not end well."""
        if not self._close():
            raise SystemExit(1)

    def _close(self) -> bool:
        atexit.unregister(self._close)
        if self._folder is None:
            return True
        folder, self._folder = self._folder, None
        jobs = _write_table(folder, ended=True)
        print(_shown(jobs, folder))
        return all(job["status"] == "finished" for job in jobs)


class _Job:
    """The record of a run of a sweep in its folder, from which the table is made."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self._folder = folder
        self._content: dict[str, Any] = {
            "overrides": list(overrides),
            "process": os.getpid(),
            "host": os.uname().nodename,
        }

    def record(self, status: str, reason: str | None = None) -> None:
        self._content |= {"status": status, "reason": reason}
        _write_json(self._folder / _JOB, self._content)
        _write_table(self._folder.parent)


def _finished(folder: Path, options: OfflineOptions) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    summary = _read(folder / "summary.json")
    done = summary.get("steps") == options.train.steps and not summary.get("interrupted")
    everyone_diverged = len(summary.get("diverged") or []) == options.train.num_seeds
    return summary if done or (everyone_diverged and not summary.get("interrupted")) else None


def _jobs(config: DictConfig) -> list[list[str] | None]:
    """The overrides of every job; ``None`` of those that the sweeper has yet to choose."""
    sweeper, overrides = config.hydra.sweeper, OmegaConf.to_container(config.hydra.overrides.task)
    assert isinstance(overrides, list)
    if "n_trials" in sweeper:
        return [None] * int(sweeper.n_trials)
    lines = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()] + overrides
    parsed = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(lines)
    return [*BasicSweeper.split_arguments(parsed, None)[0]]


def _expected(folder: Path) -> list[Any]:
    return _read(folder / _TABLE).get("expected", [])


def _write_table(
    folder: Path, *, expected: list[list[str] | None] | None = None, ended: bool = False
) -> list[dict[str, Any]]:
    """Write ``sweep.json`` and ``sweep.csv`` over all jobs.

    Args:
        folder: of the sweep.
        expected: the jobs that there will be; those of the table where not given.
        ended: no job runs any more: one that had not ended was broken off.

    Returns:
        a row a job.
    """
    with FileLock(folder / _LOCK):
        expected = _expected(folder) if expected is None else expected
        numbers = {int(path.parent.name) for path in folder.glob(f"*/{_JOB}") if path.parent.name.isdigit()}
        jobs = [_row(folder, number, expected, ended) for number in sorted({*numbers, *range(len(expected))})]
        counts = dict(Counter(job["status"] for job in jobs))
        _write_json(folder / _TABLE, {"jobs": jobs, "groups": _groups(jobs), "counts": counts, "expected": expected})
        write_text_atomically(folder / _CSV, _as_csv(jobs))
    return jobs


def _row(folder: Path, number: int, expected: list[Any], ended: bool) -> dict[str, Any]:
    of_job = folder / str(number)
    job, summary = _read(of_job / _JOB), _read(of_job / "summary.json")
    chosen = expected[number] if number < len(expected) else None
    status = job.get("status", "missing")
    if ended and status == "running":
        status = "broken off"
    found = summary if status in _WITH_RESULTS else {}
    return {
        "job": number,
        "status": status,
        "overrides": job.get("overrides") or chosen or [],
        "objective": found.get("objective"),
        "objective_is": found.get("objective_is"),
        **{key: found.get(key) for key in _OF_SUMMARY},
        "scores": scores_by_seed(found),
        "reason": job.get("reason"),
        "folder": str(of_job),
    }


def _options(job: Mapping[str, Any]) -> dict[str, str]:
    return dict(one.lstrip("+").partition("=")[::2] for one in job["overrides"])


def _differing(options: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Of each its options that another has not, or with another value."""
    names = dict.fromkeys(name for one in options for name in one)
    varied = [name for name in names if len({one.get(name) for one in options}) > 1]
    return [{name: one[name] for name in varied if name in one} for one in options]


def _groups(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the jobs that differ in their seed alone, what is said of the scores of all these seeds.

    Without a simulator, of the objectives of the jobs. A seed that diverged, or a job without a result, is counted and
    has none. A job whose options are not known yet is in no group.
    """
    grouped: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for job in jobs:
        if options := _options(job):
            key = tuple(sorted((name, value) for name, value in options.items() if name != _SEED))
            grouped.setdefault(key, []).append(job)
    found = []
    for differing, alike in zip(_differing([dict(key) for key in grouped]), grouped.values(), strict=True):
        scores = [(seed, score) for job in alike for seed, score in job["scores"].items()]
        if not any(job["objective_is"] == "final_score" for job in alike):
            scores = [(job["seed"], job["objective"]) for job in alike if job["objective"] is not None]
        values = [score for _, score in scores]
        found.append(
            {
                "options": differing,
                "jobs": [job["job"] for job in alike],
                "counts": dict(Counter(job["status"] for job in alike)),
                "seeds": [seed for seed, _ in scores],
                "scores": values,
                **(score_statistics(values) if values else {}),
            }
        )
    return found


def _as_csv(jobs: Sequence[Mapping[str, Any]]) -> str:
    """A line a job; the options that differ between jobs are columns."""
    options = _differing([_options(job) for job in jobs])
    varied = dict.fromkeys(name for one in options for name in one)
    columns = ["job", "status", *varied, "objective", "objective_is", *_OF_SUMMARY[:-1], "reason", "folder"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**job, **one} for job, one in zip(jobs, options, strict=True))
    return text.getvalue()


def _shown(jobs: Sequence[Mapping[str, Any]], folder: Path) -> str:
    counts = Counter(job["status"] for job in jobs)
    lines = [f"sweep of {len(jobs)} runs: {', '.join(f'{count} {status}' for status, count in counts.items())}"]
    names = [named(options) or "run" for options in _differing([_options(job) for job in jobs])]
    lines += of_jobs(jobs, names, _groups(jobs))
    lines.append(f"table: {folder / _TABLE} and {_CSV}")
    if any(job["status"] != "finished" for job in jobs):
        lines.append(f"the same command with run_dir={folder} goes on with those that are not finished")
    return "\n".join(line.rstrip() for line in lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or damaged
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_text_atomically(path, text)
