"""What a log must be, and which of its rows become transitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iql_torchrl.data.log import OPTIONAL, REQUIRED, Column, Log, pieces
from iql_torchrl.errors import DatasetError

# Labels and hashes in place of numbers would make networks of their size.
_MOST_ACTIONS = 1_000_000
_OBSERVATIONS = ("observations", "next_observations")
_VECTORS = (*_OBSERVATIONS, "actions")


def check_log(log: Log, *, max_episode_steps: int | None = None) -> Ends:
    """Refuse a log that :func:`iql_torchrl.data.transitions.transitions_from_log` would, with the same errors."""
    ends = ends_of(log, max_episode_steps)
    length = len(ends.terminals)
    observation_width(log, length, log.own_next_observations)
    keys = ["observations", *(["next_observations"] if log.own_next_observations else [])]
    if has_discrete_actions(log):
        discrete_actions(log, length)
    else:
        width_of(log, "actions", length)
        keys.append("actions")
    width_of(log, "rewards", length, column=True)
    for key in (*keys, "rewards"):
        copy_rows(log, key, [], unused=ends.terminals if key == "next_observations" else None)
    return ends


def has_next_observations(log: Log) -> bool:
    """Whether a log that :func:`check_log` accepts could be kept whole, with its own next observations."""
    if "next_observations" not in log.columns:
        return False
    try:
        observation_width(log, log.columns["observations"].shape[0], True)
        copy_rows(log, "next_observations", [], unused=_flags(log, "terminals"))
    except DatasetError:
        return False
    return True


def has_discrete_actions(log: Log) -> bool:
    """Whether the log's actions are one integer a row."""
    actions = log.columns["actions"]
    return _is_column(actions) and actions.dtype.kind in "iu"


def observation_width(log: Log, length: int, own_next: bool) -> int:
    """Numbers of an observation; with ``own_next`` the next observations must be of the same size."""
    width = width_of(log, "observations", length)
    if own_next and width_of(log, "next_observations", length) != width:
        shapes = [tuple(log.columns[key].shape) for key in ("next_observations", "observations")]
        raise DatasetError(f"{log.origin}: next_observations has shape {shapes[0]}, observations {shapes[1]}.")
    return width


@dataclass(frozen=True)
class Ends:
    """Flags and episode number of every row, ``[rows]``, and the indices of the rows that become transitions.

    ``last`` are the rows at which episodes end.
    """

    terminals: np.ndarray
    timeouts: np.ndarray
    last: np.ndarray
    episode: np.ndarray
    rows: np.ndarray


def ends_of(log: Log, max_episode_steps: int | None = None) -> Ends:
    """Where episodes end, and which rows are kept; ``max_episode_steps`` is for a log that does not say.

    Raises:
        DatasetError: missing columns, flags that are none, episodes whose rows are scattered or that go on after an
            end, no complete transition.
    """
    own_next = log.own_next_observations
    required = [*REQUIRED, *(["next_observations"] if own_next else [])]
    missing = [key for key in required if key not in log.columns]
    if missing:
        reason = " (dataset.keep_timeouts=true needs it)" if missing == ["next_observations"] else ""
        raise DatasetError(
            f"{log.origin}: missing {', '.join(missing)}{reason}; found {', '.join(sorted(log.columns)) or 'nothing'}. "
            f"The columns are {', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}."
        )
    _refuse_other_lengths(log, required)
    terminals = _flags(log, "terminals")
    length = len(terminals)
    timeouts = np.zeros(length, dtype=bool)
    if "timeouts" in log.columns:
        timeouts = _flags(log, "timeouts")
        _check_length("timeouts", len(timeouts), length, log.origin)
    if "episode_ids" in log.columns:
        timeouts |= _last_rows(log, terminals | timeouts) & ~terminals
    elif "timeouts" not in log.columns:
        limit = max_episode_steps if log.max_episode_steps is None else log.max_episode_steps
        timeouts = _step_limit_rows(terminals, limit, log.count_after_terminal)

    kept = np.ones(length, dtype=bool)
    if not own_next:
        kept[-1:] = False
        kept &= ~timeouts
    rows = np.flatnonzero(kept)
    if not length:
        raise DatasetError(f"{log.origin}: it has no rows.")
    if not len(rows):
        raise DatasetError(
            f"{log.origin}: no complete transition in {length} rows; a transition needs a following row of the same "
            "episode, or dataset.keep_timeouts=true and next_observations in the file."
        )
    last = timeouts if log.terminals_inside else terminals | timeouts
    return Ends(terminals, timeouts, last, np.cumsum(last) - last, rows)  # an end belongs to the episode that it ends


def _refuse_other_lengths(log: Log, required: Sequence[str]) -> None:
    """Before a flag is read, or anything allocated for as many rows as one column says it has, compare their lengths.

    Shapes that a column cannot have are left to the check of that column.
    """
    if not _is_column(log.columns["terminals"]):
        return
    length = log.columns["terminals"].shape[0]
    for key in (*required, "timeouts", "episode_ids"):
        column = log.columns.get(key)
        if column is None:
            continue
        if (key in _VECTORS and len(column.shape) == 2) or (key not in _OBSERVATIONS and _is_column(column)):
            _check_length(key, column.shape[0], length, log.origin)


def _last_rows(log: Log, ends: np.ndarray) -> np.ndarray:
    """The last row of every episode by ``episode_ids``, with which the end flags must agree."""
    column = log.columns["episode_ids"]
    if not _is_column(column) or column.dtype.kind not in "iu":
        raise DatasetError(f"{log.origin}: episode_ids must be one integer a row, got {_describe(column)}.")
    ids = column[:].reshape(-1)
    _check_length("episode_ids", len(ids), len(ends), log.origin)
    last = np.append(ids[1:] != ids[:-1], True)[: len(ids)]
    of_runs = ids[last]
    order = np.argsort(of_runs, kind="stable")
    again = np.flatnonzero(of_runs[order][1:] == of_runs[order][:-1])
    if len(again):
        first, second = order[again[0]], order[again[0] + 1]
        starts = np.append(0, np.flatnonzero(last) + 1)
        raise DatasetError(
            f"{log.origin}: the rows of episode {of_runs[first]} in episode_ids are scattered: they begin in row "
            f"{starts[first]} and again in row {starts[second]}; sort the log by episode and time, or give every "
            "episode an id of its own."
        )
    going_on = np.flatnonzero(ends & ~last)
    if len(going_on):
        row = int(going_on[0])
        raise DatasetError(
            f"{log.origin}: an episode ends by its flags in row {row}, but row {row + 1} has the same number, "
            f"{ids[row]}, in episode_ids ({len(going_on)} such rows); one of the two is wrong: drop that column."
        )
    return last


def _step_limit_rows(terminals: np.ndarray, max_episode_steps: int | None, after_terminal: int) -> np.ndarray:
    """Rows at which an episode reaches its step limit, counted from the last end.

    ``after_terminal`` is what the count starts at after a terminal row: D4RL's own starts at 1, so that there the row
    before the limit is taken for the one at it.
    """
    timeouts = np.zeros(len(terminals), dtype=bool)
    if max_episode_steps is None:
        return timeouts
    row, count = 0, 0
    for terminal in (*np.flatnonzero(terminals).tolist(), len(terminals) - 1):
        limit = row + max_episode_steps - 1 - count
        if limit >= row:
            timeouts[limit : terminal + 1 : max_episode_steps] = True
        # An episode that terminates at its limit counts as cut there.
        row, count = terminal + 1, 0 if len(terminals) and timeouts[terminal] else after_terminal
    return timeouts


def _check_length(key: str, found: int, expected: int, origin: str) -> None:
    if found != expected:
        raise DatasetError(f"{origin}: {key} has {found} rows but terminals has {expected}; all must be equal.")


def _flags(log: Log, key: str) -> np.ndarray:
    column = log.columns[key]
    if not _is_column(column) or column.dtype.kind not in "biuf":
        raise DatasetError(f"{log.origin}: {key} must be one flag a row, got {_describe(column)}.")
    array = column[:].reshape(-1)
    odd = np.flatnonzero((array != 0) & (array != 1)) if array.dtype != bool else []
    if len(odd):
        raise DatasetError(f"{log.origin}: {key} must hold 0 and 1 only, got {array[odd[0]]} in row {odd[0]}.")
    return array.astype(bool)


def width_of(log: Log, key: str, length: int, *, column: bool = False) -> int:
    """Numbers a row, of a column of real numbers: ``[rows, width]``, or with ``column`` ``[rows]`` or ``[rows, 1]``."""
    found = log.columns[key]
    if column:
        if not _is_column(found):
            raise DatasetError(f"{log.origin}: {key} must have shape [rows], got {_describe(found)}.")
    elif len(found.shape) != 2 or found.shape[1] == 0:
        hint = (
            ", or hold one integer a row for discrete actions"
            if key == "actions"
            else "; images and other nested observations are not supported, flatten them first"
        )
        raise DatasetError(
            f"{log.origin}: {key} must have shape [rows, size]{hint}; got {_describe(found)}{_encoding(key, found)}."
        )
    if found.dtype.kind not in "iuf":
        raise DatasetError(
            f"{log.origin}: {key} must hold real numbers, got dtype {found.dtype}{_encoding(key, found)}."
        )
    _check_length(key, found.shape[0], length, log.origin)
    return 1 if column else found.shape[1]


def _encoding(key: str, column: Column) -> str:
    """The end of an error: what to do with the names of actions."""
    if key != "actions" or column.dtype.kind not in "SUO":
        return ""
    return "; encode names as integers from 0, as np.unique(actions, return_inverse=True) does"


def _is_column(column: Column) -> bool:
    return len(column.shape) == 1 or (len(column.shape) == 2 and column.shape[1] == 1)


def copy_rows(
    log: Log, key: str, targets: Sequence[tuple[np.ndarray, np.ndarray]], *, unused: np.ndarray | None = None
) -> None:
    """Read a column of real numbers once, piece by piece; copy to each target the rows that it wants, ascending.

    Args:
        log: of any source.
        key: names the column.
        targets: float32 arrays, each with the rows that it wants.
        unused: flags ``[rows]`` of those in which any number will do.

    Raises:
        DatasetError: a number that is not finite, with its row and column.
    """
    column = log.columns[key]
    first, count = None, 0
    for start, piece in pieces(column):
        with np.errstate(over="ignore"):
            piece = piece.astype(np.float32, copy=False)
        piece = piece.reshape(len(piece), -1)
        # The sum is finite where every entry is, and tells so without a mask; an overflowing sum of finite entries
        # falls through to the exact check.
        with np.errstate(invalid="ignore"):
            total = piece.sum(dtype=np.float64)
        if not np.isfinite(total):
            wrong = ~np.isfinite(piece)
            if unused is not None:
                wrong &= ~unused[start : start + len(piece), None]
            bad = np.argwhere(wrong)
            count += len(bad)
            if len(bad) and first is None:
                first = (piece[tuple(bad[0])], start + bad[0][0])
        for target, rows in targets:
            low, high = np.searchsorted(rows, (start, start + len(piece)))
            wanted = rows[low:high] - start
            # Ascending and distinct, so as many rows as there are means all of them.
            target[low:high] = piece if high - low == len(piece) else piece[wanted]
    if first is not None:
        raise DatasetError(
            f"{log.origin}: {key} holds {first[0]} in row {first[1]} ({count} such entries in all); remove or repair "
            "those rows."
        )


def discrete_actions(log: Log, length: int) -> np.ndarray:
    """One integer a row, int64 ``[rows]``."""
    _check_length("actions", log.columns["actions"].shape[0], length, log.origin)
    array = log.columns["actions"][:].reshape(-1)
    odd = np.flatnonzero((array < 0) | (array >= _MOST_ACTIONS))
    if len(odd):
        raise DatasetError(
            f"{log.origin}: discrete actions must be integers from 0, below {_MOST_ACTIONS:,}, got {array[odd[0]]} in "
            f"row {odd[0]}."
        )
    return array.astype(np.int64)


def _describe(column: Any) -> str:
    return f"shape {tuple(column.shape)} of dtype {column.dtype}"
