"""From the arrays of a log to transitions, by the rule of D4RL's ``qlearning_dataset``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_torchrl.errors import ConfigurationError, DatasetError

ReadArray = Callable[[str], np.ndarray]


def transitions_from_arrays(
    read: ReadArray,
    keys: set[str],
    *,
    origin: str,
    keep_timeouts: bool = False,
    max_episode_steps: int | None = None,
) -> TensorDict:
    """Check the arrays of a log in D4RL layout and turn them into transitions.

    The rule is that of D4RL's ``qlearning_dataset``: the following row is the next observation, the last row is
    dropped, and so is the row at a timeout, whose following row belongs to another episode. Where the file has no
    ``timeouts``, the row at the last of ``max_episode_steps`` counts as one. With ``keep_timeouts`` those rows, and
    the last one, are kept with the file's own ``next_observations`` and bootstrap on them.

    Args:
        read: gives the array of a key; called once a key, so that no more than is needed is in memory at a time.
        keys: the keys that the file has.
        origin: names the file in errors.
        keep_timeouts: see above.
        max_episode_steps: see above.

    Returns:
        the TensorDict described in :func:`iql_torchrl.data.load_transitions`.

    Raises:
        DatasetError: missing keys, wrong shapes or dtypes, lengths that differ, NaN or infinity, flags other than 0
            and 1, no complete transition, ``keep_timeouts`` without ``next_observations``.
        ConfigurationError: ``max_episode_steps`` below 1.
    """
    required = ["observations", "actions", "rewards", "terminals"]
    if keep_timeouts:
        required.append("next_observations")
    missing = [key for key in required if key not in keys]
    if missing:
        reason = " (dataset.keep_timeouts=true needs it)" if missing == ["next_observations"] else ""
        raise DatasetError(
            f"{origin}: missing {', '.join(missing)}{reason}; found {', '.join(sorted(keys)) or 'nothing'}. "
            "D4RL's layout has observations, actions, rewards, terminals, and optionally timeouts, next_observations."
        )
    terminals = _flags(read("terminals"), "terminals", origin)
    length = len(terminals)
    if "timeouts" in keys:
        timeouts = _flags(read("timeouts"), "timeouts", origin)
        _check_length("timeouts", len(timeouts), length, origin)
    else:
        timeouts = _step_limit_rows(terminals, max_episode_steps)

    kept = np.ones(length, dtype=bool)
    if not keep_timeouts:
        kept[-1:] = False
        kept &= ~timeouts
    rows = np.flatnonzero(kept)
    if not len(rows):
        raise DatasetError(
            f"{origin}: no complete transition in {length} rows; a transition needs a following row of the same "
            "episode, or dataset.keep_timeouts=true and next_observations in the file."
        )
    ends = terminals | timeouts
    episode = np.cumsum(ends) - ends  # an end belongs to the episode that it ends

    observations = _matrix(read("observations"), "observations", length, origin)
    if keep_timeouts:
        next_observations = _matrix(read("next_observations"), "next_observations", length, origin)
        if next_observations.shape != observations.shape:
            raise DatasetError(
                f"{origin}: next_observations has shape {next_observations.shape}, observations {observations.shape}."
            )
        next_observation = _take(next_observations, rows)
        del next_observations
    else:
        next_observation = observations[rows + 1]
    observation = _take(observations, rows)
    del observations
    action = _take(_actions(read("actions"), length, origin), rows)
    reward = _take(_vector(read("rewards"), "rewards", length, origin), rows)
    terminated, truncated = terminals[rows, None], timeouts[rows, None]
    return TensorDict(
        {
            "observation": torch.from_numpy(observation),
            "action": torch.from_numpy(action),
            "episode": torch.from_numpy(episode[rows]),
            "next": {
                "observation": torch.from_numpy(next_observation),
                "reward": torch.from_numpy(reward)[:, None],
                "done": torch.from_numpy(terminated | truncated),
                "terminated": torch.from_numpy(terminated),
                "truncated": torch.from_numpy(truncated),
            },
        },
        batch_size=[len(rows)],
    )


def episode_returns(transitions: TensorDict) -> np.ndarray:
    """Sum of rewards of every episode over its transitions, float64 ``[episodes]``."""
    _, index = np.unique(as_array(transitions, "episode"), return_inverse=True)
    return np.bincount(index, weights=as_array(transitions, ("next", "reward"))[:, 0].astype(np.float64))


def fingerprint(transitions: TensorDict) -> str:
    """SHA-256 over the content, so that two runs can tell whether they trained on the same data."""
    digest = hashlib.sha256()
    for key in ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated")):
        digest.update(np.ascontiguousarray(as_array(transitions, key)).data)
    return digest.hexdigest()


def as_array(transitions: TensorDictBase, key: NestedKey) -> np.ndarray:
    """An entry as NumPy, without a copy."""
    tensor = transitions.get(key)
    assert isinstance(tensor, Tensor)
    return tensor.numpy()


def _take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    # Rows are ascending and unique, so as many rows as there are means all of them: no copy.
    return array if len(rows) == len(array) else array[rows]


def _step_limit_rows(terminals: np.ndarray, max_episode_steps: int | None) -> np.ndarray:
    """Rows at which an episode reaches its step limit, counted from the last end."""
    if max_episode_steps is None:
        return np.zeros(len(terminals), dtype=bool)
    if max_episode_steps < 1:
        raise ConfigurationError(f"dataset.max_episode_steps must be at least 1, got {max_episode_steps}.")
    rows = np.arange(len(terminals))
    starts = np.zeros(len(terminals), dtype=np.int64)
    starts[1:][terminals[:-1]] = rows[1:][terminals[:-1]]
    return (rows - np.maximum.accumulate(starts)) % max_episode_steps == max_episode_steps - 1


def _check_length(key: str, found: int, expected: int, origin: str) -> None:
    if found != expected:
        raise DatasetError(f"{origin}: {key} has {found} rows but terminals has {expected}; all must be equal.")


def _flags(array: np.ndarray, key: str, origin: str) -> np.ndarray:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise DatasetError(f"{origin}: {key} must be one flag a row, got {_describe(array)}.")
    odd = np.flatnonzero((array != 0) & (array != 1)) if array.dtype != bool else []
    if len(odd):
        raise DatasetError(f"{origin}: {key} must hold 0 and 1 only, got {array[odd[0]]} in row {odd[0]}.")
    return array.astype(bool)


def _matrix(array: np.ndarray, key: str, length: int, origin: str) -> np.ndarray:
    if array.ndim != 2 or array.shape[1] == 0:
        raise DatasetError(
            f"{origin}: {key} must have shape [rows, size], got {_describe(array)}; images and other nested "
            "observations are not supported, flatten them first."
        )
    return _finite_float32(array, key, length, origin)


def _actions(array: np.ndarray, length: int, origin: str) -> np.ndarray:
    """Continuous actions ``[rows, A]``, or discrete ones: one integer a row."""
    one_a_row = array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)
    if not (one_a_row and array.dtype.kind in "iu"):
        if array.ndim == 1:
            raise DatasetError(
                f"{origin}: actions must have shape [rows, size], or hold one integer a row for discrete actions; got "
                f"{_describe(array)}."
            )
        return _matrix(array, "actions", length, origin)
    _check_length("actions", len(array), length, origin)
    array = array.reshape(-1).astype(np.int64)
    if (array < 0).any():
        row = int(np.argmax(array < 0))
        raise DatasetError(f"{origin}: discrete actions must be integers from 0, got {array[row]} in row {row}.")
    return array


def _vector(array: np.ndarray, key: str, length: int, origin: str) -> np.ndarray:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DatasetError(f"{origin}: {key} must have shape [rows], got {_describe(array)}.")
    return _finite_float32(array, key, length, origin)


def _finite_float32(array: np.ndarray, key: str, length: int, origin: str) -> np.ndarray:
    if array.dtype.kind not in "iuf":
        raise DatasetError(f"{origin}: {key} must hold real numbers, got dtype {array.dtype}.")
    _check_length(key, len(array), length, origin)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    # The sum is finite where every entry is, and tells so without a mask of the array's size; an overflowing sum of
    # finite entries falls through to the exact check.
    with np.errstate(invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if not np.isfinite(total):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            value = array[tuple(bad[0])]
            raise DatasetError(
                f"{origin}: {key} holds {value} in row {bad[0][0]} ({len(bad)} such entries in all); "
                "remove or repair those rows."
            )
    return array


def _describe(array: Any) -> str:
    return f"shape {array.shape} of dtype {array.dtype}"
