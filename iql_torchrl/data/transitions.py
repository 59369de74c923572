"""From a log to transitions, by the rule of D4RL's ``qlearning_dataset``."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from iql_torchrl.data.checks import (
    copy_rows,
    discrete_actions,
    ends_of,
    has_discrete_actions,
    observation_width,
    width_of,
)
from iql_torchrl.data.log import Log
from iql_torchrl.data.storage import Allocate


def transitions_from_log(
    log: Log,
    *,
    max_episode_steps: int | None = None,
    allocate: Allocate = np.empty,
) -> TensorDict:
    """Check a log and turn it into transitions.

    The rule is that of D4RL's ``qlearning_dataset``: the following row is the next observation, the last row is
    dropped, and so is the row at a timeout, whose following row belongs to another episode. Where the log has
    ``episode_ids``, the last row of an episode that is not terminal counts as one at a timeout; where it has neither
    these nor ``timeouts``, the row at the last of ``max_episode_steps`` does (and for D4RL's own files, after a
    terminal row, the one before: its counter starts at 1 there). Where the rows have their own next observations, those
    rows and the last one are kept, and bootstrap on them.

    A column is read in pieces, so that the result and one piece are all that is in memory.

    Args:
        log: columns ``observations`` ``[rows, O]``, ``actions`` ``[rows, A]`` (or one integer a row: discrete ones),
            ``rewards``, ``terminals``, and optionally ``timeouts`` and ``episode_ids`` ``[rows]`` or ``[rows, 1]``,
            ``next_observations`` ``[rows, O]``.
        max_episode_steps: see above, for a log that does not tell its own.
        allocate: an uninitialised array of a shape and dtype.

    Returns:
        the TensorDict described in :func:`iql_torchrl.load_transitions`.

    Raises:
        DatasetError: missing columns, wrong shapes or dtypes, lengths that differ, NaN or infinity, flags other than 0
            and 1, episodes whose rows are scattered or that go on after an end, no complete transition.
    """
    own_next = log.own_next_observations
    ends = ends_of(log, max_episode_steps)
    rows, length = ends.rows, len(ends.terminals)

    width = observation_width(log, length, own_next)
    if own_next:
        observation = _rows(log, "observations", rows, width, allocate)
        next_observation = _rows(log, "next_observations", rows, width, allocate, unused=ends.terminals)
        # Of a terminal row only the reward counts, but the value of what stands there is still computed.
        last = np.flatnonzero(ends.terminals[rows])
        last = last[~np.isfinite(next_observation[last]).all(1)]
        next_observation[last] = observation[last]
    else:
        observation, next_observation = (allocate((len(rows), width), np.float32) for _ in range(2))
        copy_rows(log, "observations", [(observation, rows), (next_observation, rows + 1)])
    if has_discrete_actions(log):
        action = discrete_actions(log, length)[rows]
    else:
        action = _rows(log, "actions", rows, width_of(log, "actions", length), allocate)
    reward = _rows(log, "rewards", rows, width_of(log, "rewards", length, column=True), allocate)
    terminated, truncated = ends.terminals[rows, None], ends.timeouts[rows, None]
    return TensorDict(
        {
            "observation": torch.from_numpy(observation),
            "action": torch.from_numpy(action),
            "episode": torch.from_numpy(ends.episode[rows]),
            "next": {
                "observation": torch.from_numpy(next_observation),
                "reward": torch.from_numpy(reward),
                "done": torch.from_numpy(terminated | truncated),
                "terminated": torch.from_numpy(terminated),
                "truncated": torch.from_numpy(truncated),
            },
        },
        batch_size=[len(rows)],
    )


def _rows(
    log: Log, key: str, rows: np.ndarray, width: int, allocate: Allocate, *, unused: np.ndarray | None = None
) -> np.ndarray:
    """Some rows of a column, float32 ``[len(rows), width]``; the column itself where it is that and may be taken."""
    column = log.columns[key]
    if log.owned and isinstance(column, np.ndarray) and column.shape == (len(rows), width):
        copy_rows(log, key, [], unused=unused)
        return column
    found = allocate((len(rows), width), np.float32)
    copy_rows(log, key, [(found, rows)], unused=unused)
    return found


def episode_returns(transitions: TensorDict) -> np.ndarray:
    """Sum of rewards of every episode over its transitions, float64 ``[episodes]``; an episode's rows are adjacent."""
    return np.add.reduceat(
        as_array(transitions, ("next", "reward"))[:, 0], episode_starts(transitions), dtype=np.float64
    )


def episode_lengths(transitions: TensorDict) -> np.ndarray:
    """How many transitions every episode has, ``[episodes]``."""
    return np.diff(np.append(episode_starts(transitions), len(transitions)))


def episode_starts(transitions: TensorDict) -> np.ndarray:
    """The first row of every episode, ``[episodes]``; an episode's rows are adjacent."""
    episode = as_array(transitions, "episode")
    return np.flatnonzero(np.append(True, episode[1:] != episode[:-1]))


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
