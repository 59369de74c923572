"""Finding runs, and what each has to say for itself: those that a table can take, and those that are only listed."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iql_torchrl.errors import ConfigurationError
from iql_torchrl.reporting.doctor import examine
from iql_torchrl.reporting.run_folder import RecordedRun
from iql_torchrl.reporting.statistics import scores_by_seed

# Of this release.
VERSION = version("iql_torchrl")
# So many lines of an error that names what was found.
_NAMED = 5
# Folders in which folders of runs are looked for: runs/DATE, runs/SWEEP/0.
_DEEPEST = 3
# Of a summary, what every release has written.
_NEEDED = ("score", "final_score", "steps", "seed", "dataset_fingerprint")


@dataclass(frozen=True)
class Listed:
    """What was named and is in no table, and why; or what is to be known of a run that is in one."""

    path: str
    status: str
    reason: str


@dataclass(frozen=True)
class ReportedRun:
    """A run whose scores can be compared.

    ``scores`` are the final ones by seed, without the seeds that diverged; ``evaluations`` the rows of ``eval.csv``;
    ``marks`` and ``notes`` say in short and in full how far the scores compare, ``references`` are their 0 and 100.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    findings: Sequence[Mapping[str, Any]]
    scores: Mapping[int, float]
    marks: str = ""
    notes: Sequence[str] = ()
    references: tuple[float, float] | None = None

    @property
    def normalised(self) -> bool:
        """Whether its scores are on a scale that tasks share."""
        return self.summary["score"] != "return"

    @property
    def dataset(self) -> str:
        """The name of its data, as they were given."""
        return dataset_name(self.config)


def dataset_name(config: Mapping[str, Any]) -> str:
    """How a configuration names its data: by their name, their file, or the kind of source."""
    dataset = config.get("dataset") or {}
    name, path = dataset.get("name"), dataset.get("path")
    return str(name or (Path(str(path)).stem if path else dataset.get("source", "data")))


def gather(entries: Sequence[str]) -> tuple[list[ReportedRun], list[Listed]]:
    """All runs that folders and patterns name, in their order, each once.

    Args:
        entries: run folders, folders of runs such as that of a sweep, and patterns of both (``runs/hopper-*``).

    Returns:
        the runs that have a score and are complete; and a line on each of the others, on seeds that diverged, and on
        runs of another release.
    """
    runs: list[ReportedRun] = []
    listed: list[Listed] = []
    seen: set[Path] = set()
    for path, known in _folders(entries):
        if known is not None:
            listed.append(known)
        elif path.resolve() not in seen:
            seen.add(path.resolve())
            run, lines = _read(path)
            runs += [run] if run is not None else []
            listed += lines
    return runs, listed


def named_paths(entries: Sequence[str]) -> Iterator[tuple[Path, Listed | None]]:
    """What names and patterns stand for, 2 before 10, and those that stand for nothing."""
    for entry in entries:
        pattern = str(Path(entry).expanduser())
        paths = [Path(pattern)] if Path(pattern).exists() else [Path(one) for one in glob.glob(pattern)]
        if not paths:
            what = "matches nothing" if glob.has_magic(pattern) else "does not exist"
            yield Path(pattern), Listed(entry, "missing", what)
        yield from ((path, None) for path in sorted(paths, key=_natural))


def nothing_left(named: str, listed: Sequence[Listed]) -> str:
    """The beginning of the error where nothing of what was named can be used."""
    lines = [f"{one.path}: {one.status}, {one.reason}" for one in listed]
    more = f", and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return f"{named}: {'; '.join(lines[:_NAMED])}{more}."


def _folders(entries: Sequence[str]) -> Iterator[tuple[Path, Listed | None]]:
    """Run folders, and what is none."""
    for path, problem in named_paths(entries):
        if problem is not None:
            yield path, problem
        else:
            yield from _below(path, 0)


def _below(path: Path, depth: int) -> Iterator[tuple[Path, Listed | None]]:
    if not path.is_dir():
        yield path, Listed(str(path), "foreign", "is no folder")
    elif any((path / name).is_file() for name in ("config.yaml", "metrics.csv", "summary.json")):
        yield path, None
    elif (path / "sweep.json").is_file():
        yield from _of_sweep(path)
    elif (path / "job.json").is_file():
        yield path, _failed_job(path, _json(path / "job.json"))
    else:
        folders = sorted((one for one in path.iterdir() if one.is_dir() and one.name[0] != "."), key=_natural)
        found = [one for folder in folders for one in _below(folder, depth + 1)] if depth < _DEEPEST else []
        if any(known is None or known.status != "foreign" for _, known in found):
            yield from found
        else:
            yield path, Listed(str(path), "foreign", "holds no run: no config.yaml, metrics.csv or sweep.json")


def _of_sweep(path: Path) -> Iterator[tuple[Path, Listed | None]]:
    jobs = _json(path / "sweep.json").get("jobs")
    if not isinstance(jobs, list):
        yield path, Listed(str(path / "sweep.json"), "damaged", "holds no list of jobs")
        jobs = []
    numbers = {one["job"]: one for one in jobs if isinstance(one, dict) and isinstance(one.get("job"), int)}
    folders = [one for one in path.iterdir() if one.is_dir() and one.name.isdigit()]
    for number in sorted({*numbers, *(int(one.name) for one in folders)}):
        folder, job = path / str(number), numbers.get(number, {})
        if (folder / "config.yaml").is_file():
            yield folder, None
        else:
            yield folder, _failed_job(folder, job or _json(folder / "job.json"))


def _failed_job(folder: Path, job: Mapping[str, Any]) -> Listed:
    overrides = " ".join(map(str, job.get("overrides") or []))
    status, reason = str(job.get("status") or "missing"), str(job.get("reason") or "no run is there")
    return Listed(str(folder), status, f"{reason}{f' ({overrides})' if overrides else ''}")


def _read(path: Path) -> tuple[ReportedRun | None, list[Listed]]:
    def listed(status: str, reason: str) -> Listed:
        return Listed(str(path), status, reason)

    try:
        found = RecordedRun(path)
        evaluations, summary = found.evaluations(), found.summary
        if summary is None:
            return None, [listed(*_unfinished(found, evaluations))]
        missing = [key for key in _NEEDED if key not in summary]
        if missing:
            return None, [listed("partial", f"summary.json lacks {', '.join(missing)}")]
        findings = summary.get("findings")
        if not isinstance(findings, list):  # of an earlier release
            findings = examine(path)
        scores, comparability = scores_by_seed(summary), _comparability(summary)
    except (ConfigurationError, TypeError, ValueError) as error:
        whole = all((path / name).is_file() for name in ("config.yaml", "metrics.csv"))
        status = "damaged" if whole else "partial"
        return None, [listed(status, str(error).removeprefix(f"{path} ").removeprefix(f"{path}/"))]
    lines = []
    written_by = (summary.get("versions") or {}).get("iql_torchrl")
    if written_by != VERSION:
        lines.append(listed("another version", f"was written by iql_torchrl {written_by}; this is {VERSION}"))
    for one in summary.get("diverged") or []:
        lines.append(listed("diverged", str(one["what"])))
    steps, last = (found.config.get("train") or {}).get("steps"), _last(evaluations)
    if summary.get("interrupted"):
        of = f" of {steps:,}" if isinstance(steps, int) and "online" not in found.config else ""
        what = f"{summary['interrupted']} at step {summary['steps']:,}{of}{last}; resume=auto goes on with it"
        return None, [*lines, listed("interrupted", what)]
    if not scores:
        if not lines or lines[-1].status != "diverged":
            lines.append(listed("no score", "was evaluated in no environment; its findings are below"))
        run = ReportedRun(path, found.config, summary, evaluations, findings, {}, *comparability)
        return run, lines
    return ReportedRun(path, found.config, summary, evaluations, findings, scores, *comparability), lines


def _comparability(summary: Mapping[str, Any]) -> tuple[str, list[str], tuple[float, float] | None]:
    """Marks, notes and references of :class:`ReportedRun`."""
    remarks = summary.get("remarks") or []
    if not isinstance(remarks, list) or not all(isinstance(one, dict) for one in remarks):
        raise TypeError("summary.json: remarks is no list of marks and sentences")
    notes = [str(summary["score_note"])] if summary.get("score_note") else []
    notes += [str(one.get("sentence")) for one in remarks]
    references = summary.get("score_references")
    if references is not None:
        low, high = map(float, references)
        references = (low, high)
    return "; ".join(str(one.get("mark")) for one in remarks), notes, references


def _unfinished(run: RecordedRun, evaluations: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    job = _json(run.path / "job.json")
    rows = run.metrics()
    step = f"no summary.json, last row at step {rows[-1]['step']:,.0f}" if rows else "no summary.json, no rows"
    reason = f"{job['reason']} ({step})" if job.get("reason") else f"{step}: it is under way, or was killed"
    status = job.get("status")
    return str(status if status not in (None, "finished") else "unfinished"), reason + _last(evaluations)


def _last(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return ""
    row = evaluations[-1]
    score = row.get("normalized_score", row.get("episode_return_mean", float("nan")))
    name = "normalised score" if "normalized_score" in row else "return"
    return f", last {name} {score:.1f}"


def _natural(path: str | Path) -> tuple[Any, ...]:
    """2 before 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in Path(path).parts)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
