"""What a dataset holds, and what looks wrong with it: as numbers, as text and as a picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from iql_torchrl.atomic import write_atomically
from iql_torchrl.configuration.options import EnvironmentOptions
from iql_torchrl.data.checks import Ends, check_log, has_discrete_actions
from iql_torchrl.data.comparability import remarks_on
from iql_torchrl.data.log import OPTIONAL, REQUIRED, ROWS_AT_A_TIME, Log
from iql_torchrl.data.outliers import (
    far_from_references,
    find_outliers,
    outliers_of,
    rows_of,
    sentence,
    sentence_on_returns,
)
from iql_torchrl.data.preparation import environment_of
from iql_torchrl.data.sources.source import Source
from iql_torchrl.environments.simulators import spaces_of, step_limit
from iql_torchrl.errors import ConfigurationError, SimulatorError

# An action that the step of training would clip counts as one at its bound.
_AT_BOUND = 1e-5
# A jump is a step of so many times the 95th percentile of steps, in some dimension: more than any step inside the
# episodes of Hopper's, Pendulum's and Adroit door's logs, less than nearly all resets of Hopper's and door's. Half of
# Pendulum's are below it: a step there may cross the whole space.
_JUMP = 10.0
# The original code's bound for a following row that is not the next observation.
_SAME = 1e-6
_SAMPLE = 200_000
_BINS = 40
_EXAMPLES = 5


def inspect_dataset(source: Source, chosen: EnvironmentOptions) -> dict[str, Any]:
    """The report of :func:`describe_log`, with action bounds, step limit and scores of the environment that starts.

    Args:
        source: of the data.
        chosen: the options ``env``.

    Raises:
        DatasetError: the dataset cannot be trained on; all else is in the report.
    """
    environment, note = environment_of(source, chosen)
    limit = None if environment is None else step_limit(environment)
    bounds, bounds_from = None, "the environment's"
    with source.open() as log:
        complete = {"observations", "actions"} <= set(log.columns)  # else describing the log says what is missing
        discrete = complete and has_discrete_actions(log)
        if discrete and source.action_low is not None:
            raise ConfigurationError(
                "dataset.action_low and dataset.action_high are for continuous actions; the data's are discrete."
            )
        if environment is not None and complete and not discrete:
            sizes = [log.columns[key].shape[-1] for key in ("observations", "actions")]
            try:
                spaces = spaces_of(environment, observation_dim=sizes[0], action_dim=sizes[1])
                bounds = (spaces.action_low.numpy(), spaces.action_high.numpy())
            except SimulatorError as error:
                environment, note = None, str(error)
        elif complete and source.action_low is not None and len(log.columns["actions"].shape) == 2:
            bounds = source.action_bounds(log.columns["actions"].shape[1])
            bounds_from = "those of dataset.action_low and dataset.action_high"
        if source.normalised_actions and bounds is not None:
            bounds = (-np.ones_like(bounds[0]), np.ones_like(bounds[1]))
        comparable = environment is not None and environment.scores_data
        report = describe_log(
            log,
            bounds=bounds,
            bounds_from=bounds_from,
            max_episode_steps=limit,
            score=environment.score if environment is not None and comparable else None,
        )
    report["environment"] = None if environment is None else environment.name
    report["note"] = note or None
    report["remarks"] = [
        remark.sentence for remark in remarks_on(source, environment, float(report["returns"]["mean"]))
    ]
    if environment is not None and environment.scores_data and environment.references is not None:
        report["normalised_score"] = {
            name: environment.score(report["returns"][name]) for name in ("minimum", "mean", "median", "maximum")
        }
    return report


def describe_log(
    log: Log,
    *,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
    bounds_from: str = "the environment's",
    max_episode_steps: int | None = None,
    score: Callable[[float], float | None] | None = None,
) -> dict[str, Any]:
    """Measure a log, reading it in pieces. Returns and lengths are over all rows of an episode; training drops some.

    Args:
        log: of any source.
        bounds: of the actions, ``[A]`` each; each dimension's own range where not given.
        bounds_from: whose these are.
        max_episode_steps: where episodes were cut, of a log that does not say.
        score: the normalised score of an episode's return, where the data's have one.

    Returns:
        numbers, lists and strings: ``rows``, ``transitions``, ``episodes``, ``returns``, ``lengths``, ``rewards``,
        ``observations``, ``actions``, ``duplicate_rows``, ``histograms`` and ``findings``, the suspicious things, each
        with ``kind``, ``count``, ``rows`` (the first few) and ``meaning``.

    Raises:
        DatasetError: the log cannot be trained on at all.
    """
    ends = check_log(log, max_episode_steps=max_episode_steps)
    rows = len(ends.terminals)
    rewards = log.columns["rewards"][:].reshape(-1).astype(np.float64)
    finished = ends.last
    starts = np.append(0, np.flatnonzero(finished) + 1)
    starts = starts[starts < rows]
    lengths = np.diff(np.append(starts, rows))
    returns = np.add.reduceat(rewards, starts)
    unfinished = not finished[-1]

    discrete = has_discrete_actions(log)
    observations, jumps, breaks = _observations(log, finished)
    report: dict[str, Any] = {
        "origin": log.origin,
        "columns": sorted(key for key in log.columns if key in (*REQUIRED, *OPTIONAL)),
        "rows": rows,
        "transitions": len(ends.rows),
        "episodes": {
            "count": len(starts),
            "terminated": int((ends.terminals & finished).sum()),
            "truncated": int((ends.timeouts & ~ends.terminals).sum()),
            "unfinished": int(unfinished),
        },
        "returns": _statistics(returns),
        "lengths": _statistics(lengths),
        "rewards": {**_statistics(rewards), "zero_share": float((rewards == 0).mean())},
        "observations": observations,
        "actions": _discrete_actions(log) if discrete else _actions(log, bounds, bounds_from),
        "duplicate_rows": _duplicates(log),
    }
    report["histograms"] = {
        name: _histogram(values) for name, values in (("returns", returns), ("lengths", lengths), ("rewards", rewards))
    }
    report["findings"] = _findings(report, ends, lengths, jumps, breaks)
    report["findings"] += _outlying(log, report, rewards) + _far_returns(returns, starts, score)
    return report


def as_text(report: Mapping[str, Any]) -> str:
    """The report as aligned lines, findings last."""
    episodes, actions, observations = report["episodes"], report["actions"], report["observations"]
    lines = {
        "rows": f"{report['rows']:,}, of which {report['transitions']:,} become transitions",
        "columns": ", ".join(report["columns"]),
        "episodes": f"{episodes['count']:,}: {episodes['terminated']:,} terminated, {episodes['truncated']:,} truncated"
        + (", the last one unfinished" if episodes["unfinished"] else ""),
    }
    for key, name in (("returns", "episode return"), ("lengths", "episode length"), ("rewards", "reward")):
        found = report[key]
        lines[name] = (
            f"{found['minimum']:.4g} to {found['maximum']:.4g}, mean {found['mean']:.4g}, median {found['median']:.4g}"
            f", std {found['std']:.4g}"
        )
    if "normalised_score" in report:
        found = report["normalised_score"]
        lines["normalised score"] = f"{found['minimum']:.1f} to {found['maximum']:.1f}, mean {found['mean']:.1f}"
    lines["observations"] = f"{observations['size']} dimensions, {len(observations['constant_dimensions'])} constant"
    if "counts" in actions:
        lines["actions"] = (
            f"{len(actions['counts'])} discrete ones, taken {', '.join(map(str, actions['counts']))} times"
        )
    else:
        lines["actions"] = (
            f"{actions['size']} dimensions in [{min(actions['minimum']):.4g}, {max(actions['maximum']):.4g}], "
            f"{100 * actions['clipped_share']:.2f}% of the numbers at a bound, {len(actions['constant_dimensions'])} "
            "dimensions constant"
        )
        lines["action bounds"] = actions["bounds_from"]
    lines["duplicate rows"] = f"{report['duplicate_rows']:,}"
    if report.get("environment"):
        lines["environment"] = report["environment"]
    if report.get("note"):
        lines["note"] = report["note"]
    if report.get("remarks"):
        lines["scores"] = " ".join(report["remarks"])
    width = max(map(len, lines))
    text = [report["origin"], *(f"  {name:<{width}}  {value}" for name, value in lines.items())]
    findings = [
        f"  ! {finding['meaning']}"
        + (f" First rows: {', '.join(map(str, finding['rows']))}." if finding["rows"] else "")
        for finding in report["findings"]
    ]
    return "\n".join([*text, *(findings or ["  nothing suspicious found"])])


def draw_report(report: Mapping[str, Any], path: Path) -> None:
    """Draw returns, lengths, rewards, and the range of every action and observation dimension."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    figure.suptitle(report["origin"])
    for axis, key in zip(axes[0], ("returns", "lengths", "rewards"), strict=True):
        histogram = report["histograms"][key]
        axis.stairs(histogram["counts"], histogram["edges"], fill=True, alpha=0.7)
        axis.axvline(report[key]["mean"], color="black", linestyle="--", label=f"mean {report[key]['mean']:.4g}")
        axis.legend()
        names = {"returns": ("Episode returns", "undiscounted return", "episodes")}
        names |= {"lengths": ("Episode lengths", "steps", "episodes"), "rewards": ("Rewards", "reward", "rows")}
        title, label, unit = names[key]
        axis.set(title=title, xlabel=label, ylabel=unit)
    axes[0, 2].set_yscale("log")
    actions, clipped, observations = axes[1]
    found = report["actions"]
    if "counts" in found:
        actions.bar(range(len(found["counts"])), found["counts"])
        actions.set(title="Actions", xlabel="action", ylabel="rows")
        clipped.set_axis_off()
    else:
        _ranges(actions, found)
        actions.plot(found["low"], "k_", found["high"], "k_", markersize=12)
        actions.set(title="Actions: range, mean and standard deviation; bounds", xlabel="dimension")
        clipped.bar(range(found["size"]), found["clipped_share_by_dimension"])
        clipped.set(title="Share of actions at a bound", xlabel="dimension", ylim=(0, 1))
    _ranges(observations, report["observations"])
    observations.set(title="Observations: range, mean and standard deviation", xlabel="dimension")
    observations.set_yscale("symlog")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    write_atomically(path, lambda file: file.write(picture.getvalue()))


def _ranges(axis: Any, found: Mapping[str, Any]) -> None:
    dimensions = np.arange(found["size"])
    axis.vlines(dimensions, found["minimum"], found["maximum"], color="tab:blue", alpha=0.4)
    axis.errorbar(dimensions, found["mean"], found["std"], fmt="o", markersize=3, color="tab:blue", linewidth=2)


def _statistics(values: np.ndarray) -> dict[str, float]:
    quartiles = np.percentile(values, (25, 50, 75))
    return {
        "minimum": float(values.min()),
        "lower_quartile": float(quartiles[0]),
        "median": float(quartiles[1]),
        "upper_quartile": float(quartiles[2]),
        "maximum": float(values.max()),
        "mean": float(values.mean()),
        "std": float(values.std()),
    }


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    low, high = float(values.min()), float(values.max())
    size = max(abs(low), abs(high))
    if high - low < 1e-9 * size:  # between which there may be fewer numbers than bins
        room = max(0.5, 1e-9 * size)
        low, high = low - room, high + room
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _pieces(log: Log, *keys: str, overlap: int = 0) -> Iterator[tuple[int, list[np.ndarray]]]:
    """First row and content of each piece of some columns, float64 ``[rows, size]``, ``overlap`` rows longer."""
    rows = log.columns["rewards"].shape[0]
    for start in tqdm(range(0, rows, ROWS_AT_A_TIME), desc=", ".join(keys), unit="piece", delay=2, leave=False):
        pieces = [log.columns[key][start : min(start + ROWS_AT_A_TIME + overlap, rows)] for key in keys]
        yield start, [piece.reshape(len(piece), -1).astype(np.float64) for piece in pieces]


def _pieces_of(log: Log, key: str) -> Iterator[tuple[int, np.ndarray]]:
    """The same of one column."""
    for start, (piece,) in _pieces(log, key):
        yield start, piece


class _Moments:
    """Range, mean and standard deviation of every dimension, of pieces."""

    def __init__(self, size: int) -> None:
        self.count, self.sum = 0, np.zeros(size)
        self.shift, self.squares = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, piece: np.ndarray) -> None:
        if not self.count:
            self.shift = piece[0].copy()  # squares of small numbers: those of large ones cancel
        self.count += len(piece)
        self.sum += (piece - self.shift).sum(0)
        self.squares += np.square(piece - self.shift).sum(0)
        self.low, self.high = np.minimum(self.low, piece.min(0)), np.maximum(self.high, piece.max(0))

    def report(self) -> dict[str, Any]:
        mean = self.sum / self.count
        variance = np.maximum(self.squares / self.count - mean**2, 0)
        return {
            "size": len(mean),
            "minimum": self.low.tolist(),
            "maximum": self.high.tolist(),
            "mean": (mean + self.shift).tolist(),
            "std": np.sqrt(variance).tolist(),
            "constant_dimensions": np.flatnonzero(self.low == self.high).tolist(),
        }


def _observations(log: Log, finished: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Moments; the rows after which the observation jumps, and those whose next observation is not the following row,
    without an end flag."""
    rows, size = log.columns["observations"].shape
    moments = _Moments(size)
    stride = max(1, rows // _SAMPLE)
    steps = []
    for start, (piece,) in _pieces(log, "observations", overlap=1):
        moments.add(piece[:ROWS_AT_A_TIME])
        inside = ~finished[start : start + len(piece) - 1]
        steps.append(np.abs(np.diff(piece, axis=0))[inside][::stride])
    sample = np.concatenate(steps) if steps else np.empty((0, size))
    usual = np.quantile(sample, 0.95, axis=0) if len(sample) else np.full(size, np.inf)
    usual[usual == 0] = np.inf  # a dimension that hardly ever moves may move as it likes
    following = log.columns.get("next_observations")
    # One that training does not read may be anything.
    has_next = following is not None and following.shape == (rows, size) and following.dtype.kind in "iuf"
    jumps, breaks = [], []
    keys = ("observations", "next_observations") if has_next else ("observations",)
    for start, pieces in _pieces(log, *keys, overlap=1):
        inside = ~finished[start : start + len(pieces[0]) - 1]
        jump = (np.abs(np.diff(pieces[0], axis=0)) > _JUMP * usual).any(1)
        jumps.append(start + np.flatnonzero(jump & inside))
        if has_next:
            other = (np.abs(pieces[1][:-1] - pieces[0][1:]) > _SAME).any(1)
            breaks.append(start + np.flatnonzero(other & inside))
    none = [np.empty(0, int)]
    return moments.report(), np.concatenate(jumps or none), np.concatenate(breaks or none)


def _actions(log: Log, bounds: tuple[np.ndarray, np.ndarray] | None, bounds_from: str) -> dict[str, Any]:
    moments = _Moments(log.columns["actions"].shape[1])
    for _, (piece,) in _pieces(log, "actions"):
        moments.add(piece)
    found = moments.report()
    source = bounds_from
    if bounds is None or not np.isfinite(bounds).all():
        infinite = ", because the environment's are infinite, which training refuses"
        source = "each dimension's own range" + (infinite if bounds is not None else "")
        bounds = (moments.low, moments.high)
    low, high = bounds
    room = _AT_BOUND * (high - low) / 2
    at_bound, outside = np.zeros(found["size"]), 0
    for _, (piece,) in _pieces(log, "actions"):
        at_bound += ((piece <= low + room) | (piece >= high - room)).sum(0)
        outside += int(((piece < low - room) | (piece > high + room)).any(1).sum())
    share = at_bound / moments.count
    return {
        **found,
        "low": np.asarray(low, float).tolist(),
        "high": np.asarray(high, float).tolist(),
        "bounds_from": source,
        "clipped_share": float(share.mean()),
        "clipped_share_by_dimension": share.tolist(),
        "rows_outside_bounds": outside,
    }


def _discrete_actions(log: Log) -> dict[str, Any]:
    return {"counts": np.bincount(log.columns["actions"][:].reshape(-1).astype(np.int64)).tolist()}


def _duplicates(log: Log) -> int:
    """Rows whose observation, action and reward are all those of an earlier row, compared by a hash of 64 bits."""
    hashes = np.zeros(log.columns["rewards"].shape[0], np.uint64)
    prime = np.uint64(0x9E3779B97F4A7C15)
    for start, pieces in _pieces(log, "observations", "actions", "rewards"):
        found = np.zeros(len(pieces[0]), np.uint64)
        for column in np.concatenate(pieces, axis=1).T + 0.0:  # which makes -0 the 0 that it equals
            found = (found ^ np.ascontiguousarray(column).view(np.uint64)) * prime
            found ^= found >> np.uint64(29)
        hashes[start : start + len(found)] = found
    hashes.sort()
    return int((hashes[1:] == hashes[:-1]).sum())


def _findings(
    report: Mapping[str, Any], ends: Ends, lengths: np.ndarray, jumps: np.ndarray, breaks: np.ndarray
) -> list[dict[str, Any]]:
    findings = []

    def add(kind: str, found: np.ndarray | list[int] | int, meaning: str) -> None:
        count = found if isinstance(found, int) else len(found)
        rows = [] if isinstance(found, int) else [int(row) for row in found[:_EXAMPLES]]
        if count:
            findings.append({"kind": kind, "count": count, "rows": rows, "meaning": meaning.format(count=f"{count:,}")})

    finished = ends.last
    last_rows = np.flatnonzero(finished)
    if not len(last_rows):
        add(
            "no_end", 1, "No row ends an episode: set terminals, timeouts or episode_ids, or dataset.max_episode_steps."
        )
    add(
        "missing_end",
        breaks,
        "{count} rows have a next observation that is not the following row, and no end flag: an episode probably ends "
        "there, and the following row is taken for its continuation.",
    )
    if not len(breaks):
        add(
            "jump",
            jumps,
            f"After {{count}} rows without an end flag the observation jumps ({_JUMP:g} times further than 95% of the "
            "steps): an episode may end there.",
        )
    ended = lengths[: len(last_rows)]
    truncated = ends.timeouts[last_rows] & ~ends.terminals[last_rows]
    if truncated.any():
        counts = np.bincount(ended[truncated])
        limit = int(counts.argmax())
        odd = last_rows[truncated & (ended != limit)]
        if counts.max() > 1 or not len(odd):
            add(
                "odd_timeout",
                odd,
                f"{{count}} timeouts come at other lengths than the usual {limit} steps: they may be terminals, which "
                "do not bootstrap.",
            )
        else:
            meaning = "{count} timeouts come at lengths all different: they may be terminals, which do not bootstrap."
            add("odd_timeout", last_rows[truncated], meaning)
        add(
            "terminal_at_limit",
            last_rows[ends.terminals[last_rows] & ~ends.timeouts[last_rows] & (ended == limit)],
            f"{{count}} terminals come at {limit} steps, where episodes time out: they may be timeouts, which "
            "bootstrap.",
        )
    elif len(last_rows) > 1 and (ended == ended[0]).all():
        add(
            "terminal_at_limit",
            last_rows,
            f"All {{count}} terminals come after {int(ended[0])} steps: they may be timeouts, which bootstrap.",
        )
    add("episodes_of_one_step", int((ended == 1).sum()), "{count} episodes have one step.")
    add(
        "duplicate_rows",
        report["duplicate_rows"],
        "{count} rows repeat an earlier row's observation, action and reward.",
    )
    constant = report["observations"]["constant_dimensions"]
    add("constant_observations", len(constant), f"{{count}} observation dimensions never change: {_some(constant)}.")
    actions = report["actions"]
    add(
        "actions_outside_bounds",
        actions.get("rows_outside_bounds", 0),
        "{count} rows have actions outside the bounds: training refuses them; clip them, or set env.name, or without a "
        "simulator dataset.action_low and dataset.action_high.",
    )
    constant = actions.get("constant_dimensions", [])
    add("constant_actions", len(constant), f"{{count}} action dimensions never change: {_some(constant)}.")
    if report["rewards"]["minimum"] == report["rewards"]["maximum"]:
        add("constant_reward", 1, "All rewards are the same: nothing tells good actions from bad ones.")
    return findings


def _outlying(log: Log, report: Mapping[str, Any], rewards: np.ndarray) -> list[dict[str, Any]]:
    """Findings of numbers far outside all others."""
    found = {"reward": outliers_of("reward", rewards[:, None])}
    for kind, key in (("observation", "observations"), ("action", "actions")):
        if "minimum" in report[key]:  # discrete actions have none
            low, high = (np.array(report[key][name]) for name in ("minimum", "maximum"))
            found[kind] = find_outliers(kind, partial(_pieces_of, log, key), report["rows"], low, high)
    return [
        _finding(f"outlying_{kind}", rows_of(outliers), f"{sentence(kind, outliers, report['rows'], 'row')}.")
        for kind, outliers in found.items()
        if outliers
    ]


def _far_returns(
    returns: np.ndarray, starts: np.ndarray, score: Callable[[float], float | None] | None
) -> list[dict[str, Any]]:
    """A finding of returns that no policy has, where the data's returns have a normalised score."""
    far = np.empty(0, int) if score is None else far_from_references(returns, score)
    if score is None or not len(far):
        return []
    meaning = f"{sentence_on_returns(far, returns, score, int(starts[far[0]]), 'row')}."
    return [_finding("returns_far_from_references", starts[far], meaning)]


def _finding(kind: str, rows: np.ndarray, meaning: str) -> dict[str, Any]:
    return {"kind": kind, "count": len(rows), "rows": [int(row) for row in rows[:_EXAMPLES]], "meaning": meaning}


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
